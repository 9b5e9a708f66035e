"""Arms of the paper's experiments: what is equal stays bit-identical, and what differs is only what was set."""

import dataclasses
import math

import pytest
import torch
from paper_fixtures import TINY

from benchmarks.paper import protocol
from benchmarks.paper.compare import compare, has_diverged
from benchmarks.paper.config import BACKBONE, BASELINE, RESEEDED, Arm, Merging, Run
from benchmarks.paper.data import load
from benchmarks.paper.experiments import EXPERIMENTS, Options
from benchmarks.paper.merging import Merger
from benchmarks.paper.models import PUBLISHED, build
from inmerge_fast import MergePlan, merge_

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("PIL")

MERGE_ALL = Merging(threshold=-1.0)


@pytest.fixture(scope="module")
def bench():
    return protocol.Bench(load("digits"), torch.device("cpu"), TINY.limit)


@pytest.fixture(scope="module")
def backbone(bench):
    return protocol.train_backbone(TINY, bench, 0)


@pytest.fixture(scope="module")
def arm(bench, backbone):
    """Results by arm, each trained once."""
    done = {}

    def result(one, recipe=TINY, split="test"):
        key = (one, recipe, split)
        if key not in done:
            done[key] = protocol.run_arm(Run(recipe, one, 0, split), bench, backbone)[0]
        return done[key]

    return result


def test_a_backbone_repeats(bench, backbone):
    assert protocol.digest_of(protocol.train_backbone(TINY, bench, 0)) == protocol.digest_of(backbone)


@pytest.mark.parametrize("off", [Merging(prob=0.0, threshold=-1.0), Merging(threshold=1.0), Merging(z=1e6)],
                         ids=["p = 0", "nothing passes", "z out of reach"])  # fmt: skip
def test_without_merges_an_arm_is_the_baseline_bit_for_bit(arm, off):
    base, other = arm(BASELINE), arm(Arm(off))
    assert other["digests"] == base["digests"]
    assert other["metrics"] == base["metrics"]
    assert other["loss"] == base["loss"]
    assert other["merging"]["per_step"] == 0
    row = compare([[base], [other]])[1]
    assert (row.identical, row.judged("corrupted AUC").mean) == (1, 0)


def test_arms_part_from_one_backbone_and_differ_where_they_should(arm):
    base, merged, reseeded, stopped = (arm(one) for one in (BASELINE, Arm(MERGE_ALL), RESEEDED, BACKBONE))
    assert len({one["digests"]["backbone"] for one in (base, merged, reseeded, stopped)}) == 1
    assert len({one["digests"]["weights"] for one in (base, merged, reseeded, stopped)}) == 4
    assert stopped["digests"]["weights"] == stopped["digests"]["backbone"]
    assert stopped["loss"] == []
    assert len(base["loss"]) == len(merged["loss"]) == len(reseeded["loss"]) == 2
    assert merged["merging"]["steps"] == 2 * 3
    assert merged["merging"]["per_step"] == pytest.approx(0.3 * 320, rel=0.15)  # 30 % of 64 + 128 + 128 filters
    assert merged["filters"]["rank"] < base["filters"]["rank"]


def test_layers_count_as_the_setting_says(arm):
    everything = arm(Arm(dataclasses.replace(MERGE_ALL, skip_first=0.0)))
    assert list(everything["merging"]["merged_by_layer"]) == [f"conv{index}" for index in range(1, 9)]
    assert list(arm(Arm(MERGE_ALL))["merging"]["merged_by_layer"]) == ["conv6", "conv7", "conv8"]


def test_published_code_is_reproduced_where_asked(arm):
    plain = arm(Arm(MERGE_ALL))["merging"]
    faithful = arm(Arm(dataclasses.replace(MERGE_ALL, in_validation=True)))["merging"]
    assert (plain["validation_steps"], faithful["validation_steps"]) == (0, 2 * 3)  # 96 images in threes of 32
    parts = dataclasses.replace(TINY, micro_batches=4)
    once = arm(Arm(MERGE_ALL), parts)["merging"]
    each = arm(Arm(dataclasses.replace(MERGE_ALL, each_forward=True)), parts)["merging"]
    assert (once["steps"], each["steps"]) == (6, 24)


def test_accumulated_gradients_are_those_of_the_batch(bench, backbone):
    # Without batch norm, whose statistics are of the parts.
    recipe = dataclasses.replace(TINY, model="vit_small", arm_epochs=1)
    state = protocol.train_backbone(recipe, bench, 0)
    nets = []
    for parts in (1, 4):
        model = build("vit_small", bench.data, 0)
        model.net.load_state_dict(state)
        one = dataclasses.replace(recipe, micro_batches=parts)
        protocol._train(model, one, bench, protocol.schedules(one, 0)[1], None)
        nets.append(model.net)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rule", ["random", "similar", "nearest"])
def test_z_is_a_threshold_for_every_layer(bench, rule):
    setting = Merging(z=1.0, prob=1.0, partner=rule)
    one, other = (build("vgg8", bench.data, 0).net for _ in range(2))
    Merger(one, setting, 7, 0, 10)(5)
    plan = MergePlan(other)
    for planned in plan.layers:
        threshold = 1 / math.sqrt(planned.layout.elements)
        layer = other.get_submodule(planned.name)
        merge_(layer, layer=planned.layer_id, prob=1.0, threshold=threshold, partner=rule, seed=7, step=5)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    whole = build("vgg8", bench.data, 0).net
    merge_(whole, prob=1.0, threshold=1 / math.sqrt(576), partner=rule, seed=7, step=5)
    assert torch.equal(whole.conv6.weight, one.conv6.weight)  # the draws are those of the whole model
    assert not torch.equal(whole.conv6.weight, build("vgg8", bench.data, 0).net.conv6.weight)


def test_late_start_and_decay(bench):
    net = build("vgg8", bench.data, 0).net
    late = Merger(net, Merging(threshold=-1.0, prob=1.0, start=0.5), 0, 100, 10)
    counts = []
    for step in range(10):
        late(100 + step)
        counts.append(late.merged)
    assert counts[:5] == [0] * 5
    assert counts[5] == 64 + 128 + 128
    decaying = Merger(net, Merging(threshold=-1.0, prob=1.0, decay=True), 0, 100, 10)
    before, per_step = 0, []
    for step in range(10):
        decaying(100 + step)
        per_step.append(decaying.merged - before)
        before = decaying.merged
    assert per_step[0] == 320
    assert per_step[4] < 270
    assert per_step[9] < 40


def test_comparisons_refuse_what_is_not_paired(arm):
    base, merged = arm(BASELINE), arm(Arm(MERGE_ALL))
    other = dict(merged, digests=dict(merged["digests"], backbone="0" * 16))
    with pytest.raises(ValueError, match="another backbone than the baseline's"):
        compare([[base], [other]])
    with pytest.raises(ValueError, match="seed 3 has no baseline"):
        compare([[base], [dict(merged, seed=3)]])


def test_a_network_that_diverged_has_no_measures(bench, backbone):
    gone = {key: value * math.nan if value.is_floating_point() else value for key, value in backbone.items()}
    result, _ = protocol.run_arm(Run(TINY, BACKBONE, 0), bench, gone)

    def numbers(value):
        return [one for part in value.values() for one in numbers(part)] if isinstance(value, dict) else [value]

    assert all(math.isnan(value) for value in numbers(result["metrics"]))
    assert has_diverged(result)
    assert not has_diverged(protocol.run_arm(Run(TINY, BACKBONE, 0), bench, backbone)[0])


def test_validation_runs_look_at_validation_images(arm, bench):
    one = arm(BASELINE, split="val")
    assert one["split"] == "val"
    assert one["metrics"] != arm(BASELINE)["metrics"]
    assert one["digests"] == arm(BASELINE)["digests"]


def test_runs_are_named_by_their_configuration():
    runs = [run for make in EXPERIMENTS.values() for run in make(Options()).runs()]
    names = {run.key() for run in runs}
    assert len(names) == len(set(runs))
    assert all(len(name) < 200 and " " not in name for name in names)
    # Experiments share runs: the paper's setting in a sweep is the one of the table.
    shared = {run.key() for run in EXPERIMENTS["table-medmnist"](Options()).runs()}
    assert shared & {run.key() for run in EXPERIMENTS["sweep-threshold"](Options()).runs()}


@pytest.mark.parametrize("name", ["resnet18_small", "vit_small", "mamba_small"])
def test_small_models_train_and_merge(bench, name):
    model = build(name, bench.data, 0)
    optimizer = torch.optim.Adam(model.net.parameters(), lr=3e-3)
    images, labels = bench.data.train.images[:32].float() / 255, bench.data.train.labels[:32]
    losses = []
    for _ in range(8):
        loss = bench.loss(model.net(bench.prepare(model, images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    stats = merge_(model.net, prob=1.0, threshold=-1.0, include_linear=name != "resnet18_small", seed=0, step=0)
    assert stats.merged > 0
    if name == "mamba_small":
        assert any("in_proj" in layer.name for layer in stats.layers)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_size(name):
    with torch.device("meta"):
        net = PUBLISHED[name](1000)
    parameters = {"vgg11": 132_863_336, "vgg16": 138_357_544, "vgg19": 143_667_240, "vgg11_bn": 132_868_840,
                  "vgg16_bn": 138_365_992,
                  "vgg19_bn": 143_678_248, "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032,
                  "densenet121": 7_978_856}  # fmt: skip
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters[name]


def test_weights_from_a_file(tmp_path, bench):
    theirs = PUBLISHED["resnet18"](7)  # a head of another size
    path = tmp_path / "resnet18.pth"
    torch.save(theirs.state_dict(), path)
    model = build("resnet18", bench.data, 1, path)
    assert torch.equal(model.net.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    assert model.net.fc.weight.shape == (10, 512)
    assert model.normalisation is not None
    with pytest.raises(ValueError, match="none of its 122 tensors has a name of the model's; in the file conv1.weight"):
        build("densenet121", bench.data, 1, path)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"resnet18\.pth: a text file instead of weights"):
        build("resnet18", bench.data, 1, path)


def test_unknown_models_and_missing_timm(bench, monkeypatch):
    with pytest.raises(ValueError, match="model must be one of vgg11, .* package.module:function, got 'alexnet'"):
        build("alexnet", bench.data, 0)
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match="timm cannot be imported"):
        build("timm:resnet18", bench.data, 0)
