"""``InMerge.preview`` and ``InMerge.summary``: what merging will do, and what it has done."""

import csv
import math

import pytest
import torch
from test_training import net
from test_training_rank import NO_GUARD, deep, ranks

from inmerge_fast import (
    CollapseGuard,
    DictLogger,
    InMerge,
    NoEffectWarning,
    NoiseThreshold,
    QuantileThreshold,
    RankBudget,
    cosine,
    linear,
)


def totals(steps):
    """Sampled and merged by layer, from what every step has returned."""
    found = {}
    for layer in (layer for layers in steps for layer in layers):
        before = found.get(layer.name, (0, 0))
        found[layer.name] = (before[0] + layer.sampled, before[1] + layer.merged)
    return found


def stepped(merger, steps):
    """The numbers of so many steps, read before others take their place."""
    return [() if (stats := merger.step()) is None else stats.layers for _ in range(steps)]


def test_totals_are_of_every_step_not_of_those_that_are_logged(device):
    log = DictLogger()
    model = deep().to(device)
    merger = InMerge(model, threshold=0.1, skip_first=0, loggers=[log], observe_every=10, start=3, stop=60, every=2)
    steps = stepped(merger, 70)
    expected = totals(steps)
    summary = merger.summary()
    assert {layer.name: (layer.sampled, layer.merged) for layer in summary.layers} == expected
    assert (summary.sampled, summary.merged) == tuple(sum(each) for each in zip(*expected.values(), strict=True))
    assert summary.steps == 70
    assert 0 < sum(row["merged"] for row in log.rows) < summary.merged / 5


def test_totals_go_on_over_new_plans_and_checkpoints():
    model = deep()
    merger = InMerge(model, threshold=0.1, skip_first=0, guard=None)
    steps = stepped(merger, 10)
    model[1].weight.requires_grad_(False)
    steps += stepped(merger, 10)
    gone = merger.summary()
    assert [layer.name for layer in gone.layers] == ["0", "2"]
    assert gone.left == {"1": totals(steps)["1"]}
    assert "1, merged before: " in str(gone)
    assert gone.merged == sum(merged for _, merged in totals(steps).values())
    model[1].weight.requires_grad_(True)
    steps += stepped(merger, 10)
    other = deep()
    other.load_state_dict(model.state_dict())
    resumed = InMerge(other, threshold=0.1, skip_first=0, guard=None)
    resumed.step()  # what it had done before it was loaded does not count
    resumed.load_state_dict(merger.state_dict())
    other.load_state_dict(model.state_dict())
    steps += stepped(resumed, 10)
    summary = resumed.summary()
    assert {layer.name: (layer.sampled, layer.merged) for layer in summary.layers} == totals(steps)


@pytest.mark.parametrize("look", ["effective_rank", "preview", "summary"])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("threshold", [0.1, RankBudget(steps=50)])
def test_a_look_right_after_freezing_is_of_what_is_trained_now(look, trains, threshold):
    model = deep()
    model[0].weight.requires_grad_(not trains)
    merger = InMerge(model, skip_first=0, guard=None, threshold=threshold)
    merger.step()
    model[0].weight.requires_grad_(trains)
    found = getattr(merger, look)()
    if look != "effective_rank":
        found = {layer.name: layer.rank if look == "preview" else layer.rank_end for layer in found.layers}
    assert list(found) == (["0", "1", "2"] if trains else ["1", "2"])
    assert found == pytest.approx(InMerge(model, skip_first=0).effective_rank())


def test_verdicts_ranks_and_losses():
    model = deep()
    before = ranks(model)
    thresholds = {"0": 1.0, "1": 0.2, "2": -0.5}
    merger = InMerge(model, threshold=thresholds, prob=0.2, skip_first=0, guard=NO_GUARD)
    assert all(math.isnan(layer.rank_start) and math.isnan(layer.lost) for layer in merger.summary().layers)
    for _ in range(60):
        merger.step()
    merger._run.guard.loss = 0.1  # what the summary judges by
    idle, some, many = merger.summary().layers
    assert [layer.verdict for layer in (idle, some, many)] == ["no effect", "active", "collapsing"]
    now = ranks(model)
    for layer in (idle, some, many):
        assert layer.rank_start == pytest.approx(before[layer.name])
        assert layer.rank_end == pytest.approx(now[layer.name])
        assert layer.lost == pytest.approx(1 - now[layer.name] / before[layer.name], rel=0.4, abs=1e-9)
    assert idle.lost == 0
    assert 0 < some.lost < 0.1 < many.lost


def test_without_a_guard_the_cost_is_not_known():
    merger = InMerge(deep(), threshold=0.1, skip_first=0, guard=None)
    for _ in range(20):
        merger.step()
    layer = merger.summary().layers[0]
    assert layer.merged > 0
    assert math.isnan(layer.rank_start)
    assert math.isnan(layer.lost)
    assert layer.verdict == "active"
    assert " - " in str(merger.summary())


def test_a_table_and_a_file(tmp_path):
    merger = InMerge(deep(), threshold=0.1, skip_first=1)
    for _ in range(20):
        merger.step()
    summary = merger.summary()
    lines = str(summary).splitlines()
    assert lines[0] == f"20 optimizer steps: {summary.merged:,} merges in {summary.sampled:,} sampled pairs"
    assert lines[1].endswith("rank, start to now  lost by merging  verdict")
    assert len(lines) == 5
    assert lines[2].split()[:4] == ["1", "64", str(summary.layers[0].sampled), str(summary.layers[0].merged)]
    assert lines[-1] == "skipped 1, among the first 1 (skip_first=1): 0"
    assert repr(summary) == f"RunSummary(layers=2, steps=20, merged={summary.merged})"
    path = tmp_path / "summary.csv"
    summary.to_csv(str(path))
    with open(path, newline="") as file:
        read = list(csv.DictReader(file))
    for row, layer in zip(read, summary.rows(), strict=True):
        assert (row["name"], int(row["merged"]), row["verdict"]) == (layer["name"], layer["merged"], layer["verdict"])
        assert float(row["rank_end"]) == layer["rank_end"]
        assert row["stopped"] == "False"


@pytest.mark.filterwarnings("ignore::inmerge_fast.CollapseWarning")
@pytest.mark.parametrize(
    "recipe",
    [{"threshold": RankBudget(), "stop": 50}, {"threshold": QuantileThreshold(0.1, every=7)}, {"threshold": -0.1}],
    ids=["budget", "quantile", "constant"],
)
def test_to_look_changes_nothing(recipe):
    model, twin = deep(), deep()
    looked, plain = InMerge(model, skip_first=0, **recipe), InMerge(twin, skip_first=0, **recipe)
    for step in range(45):
        looked.step()
        plain.step()
        if step % 3 == 0:
            looked.summary()
            looked.preview()
    assert looked.state_dict() == plain.state_dict()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("partner", ["random", "nearest"])
@pytest.mark.parametrize(
    "threshold", [0.12, NoiseThreshold(1.5), QuantileThreshold(0.1), {"0": 0.1, "1": 0.3, "2": 0.9}], ids=str
)
def test_a_preview_is_what_happens(threshold, partner):
    """With alpha 1 the weights stay what they are."""
    merger = InMerge(deep(), threshold=threshold, partner=partner, alpha=1.0, skip_first=0, guard=None)
    preview = merger.preview()
    merged = dict.fromkeys(merger.plan.names, 0)
    for _ in range(200):
        for layer in merger.step().layers:
            merged[layer.name] += layer.merged
    for layer in preview.layers:
        spread = math.sqrt(max(layer.merges, 0.05) / 200)
        assert merged[layer.name] / 200 == pytest.approx(layer.merges, abs=4 * spread)
        assert layer.can_act == (layer.max_similarity > layer.threshold)
    assert preview.merges == pytest.approx(sum(layer.merges for layer in preview.layers))


def test_a_preview_names_the_layers_that_cannot_act():
    merger = InMerge(deep(), threshold={"0": 1.0, "1": 0.1, "2": 1.0}, skip_first=0, start=12)
    preview = merger.preview()
    text = str(preview)
    assert preview.step == 12
    assert "merges expected at step 12, for the weights as they are now; training moves them" in text
    assert "2 layers cannot act, no pair is above the threshold: 0, 2" in text
    assert ranks(merger._run.model)["1"] == pytest.approx(preview.layers[1].rank)
    assert repr(preview).startswith("Preview(layers=3, step=12, merges=")


def test_a_layer_of_which_nothing_is_sampled_yet_can_act():
    """Where the probability begins at 0, the first step says nothing about the pairs."""
    preview = InMerge(deep(), prob=linear(0.0, 0.3, end=50), threshold=-1.0, skip_first=0).preview()
    assert preview.merges == 0
    assert all(layer.can_act and layer.share == 1 for layer in preview.layers)
    assert "cannot act" not in str(preview)


def test_a_preview_of_a_budget_has_its_thresholds():
    merger = InMerge(deep(), threshold=RankBudget(), stop=100, skip_first=0)
    preview = merger.preview()
    merger.step()
    # Partners of the trial merges are drawn anew at each look.
    for layer in preview.layers:
        assert layer.threshold == pytest.approx(merger._run.watch.ledgers[layer.name].threshold, abs=0.05)
    assert 0 < preview.merges < 5


def test_there_is_nothing_to_preview_after_the_last_step():
    merger = InMerge(net(), stop=4)
    for _ in range(4):
        merger.step()
    with pytest.raises(ValueError, match="no step merges any more: step_count is 4, stop is 4"):
        merger.preview()


def test_stopped_layers_are_previewed_as_such():
    merger = InMerge(deep(), threshold=-1.0, skip_first=0, guard=CollapseGuard())
    merger._run.stopped.add("1")
    assert [layer.can_act for layer in merger.preview().layers] == [True, False, True]


def test_a_short_run_without_effect_has_its_word_when_it_is_flushed():
    merger = InMerge(deep(), threshold=1.0, skip_first=0)
    for _ in range(30):
        merger.step()
    with pytest.warns(NoEffectWarning, match="30 calls of merge_ sampled .* merged none") as seen:
        merger.flush()
    assert seen[0].filename == __file__
    merger.flush()
    busy = InMerge(deep(), threshold=0.0, skip_first=0, guard=None)
    for _ in range(30):
        busy.step()
    busy.flush()


def test_forward_only_merging_says_that_nothing_stays():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 16, 3), torch.nn.GroupNorm(4, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    merger = InMerge(model, lasting=False).attach(optimizer)
    preview = merger.preview()
    assert preview.kept_bytes == 0.5 * 4 * (8 * 27 + 16 * 72)
    assert preview.merges == 0.5 * (8 + 16)
    assert "every filter is restored before the update, so they cost no rank, and need no budget and no guard" in str(
        preview
    )
    assert "memory for what the filters were: about 0.00274 MB" in str(preview)
    for _ in range(3):
        model(torch.randn(1, 3, 8, 8)).sum().backward()
        optimizer.step()
    first, header, *rows = str(merger.summary()).split("\n")
    assert first.endswith("each for the passes of one step: nothing of them is in the weights")
    assert "lost" not in header
    assert [row.split()[-1] for row in rows] == ["active", "active"]
    assert [len(row.split()) for row in rows] == [7, 7]
    assert repr(merger) == (
        "InMerge(layers=2, step_count=3, alpha=0.5, prob=0.5, threshold=-1.0, partner='random', start=0, stop=None, "
        "every=1, seed=0, lasting=False)"
    )
    lasting = InMerge(model, skip_first=0, threshold=-1.0)
    assert "lost by merging" in str(lasting.summary())
    assert "memory" not in str(lasting.preview())
    assert lasting.preview().kept_bytes is None
    assert repr(lasting) == (
        "InMerge(layers=2, step_count=0, alpha=0.8, prob=0.3, threshold=-1.0, partner='random', start=0, stop=None, "
        "every=1, seed=0, lasting=True)"
    )


def test_what_is_printed_of_a_recipe_stays_one_line():
    model = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 3) for _ in range(30)))
    budget = InMerge(model, threshold=RankBudget(0.1), stop=100, prob=cosine(0.3, 0.1, end=50))
    assert "threshold=RankBudget(loss=0.1" in repr(budget)
    assert "prob=Ramp(first=0.3, last=0.1, begin=0, end=50, shape='cosine')" in repr(budget)
    by_layer = InMerge(model, threshold={str(index): 0.5 for index in range(12, 30)}, skip_first=12)
    assert "..." in repr(by_layer)
    assert len(repr(by_layer)) < 300
