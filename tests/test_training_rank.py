"""What merging costs a run: the guard that stops it, and the threshold that keeps to a budget."""

import math
import warnings

import pytest
import torch
from test_training import batches, loss_of, net, optimizer_of
from torch import nn

import inmerge_fast
from inmerge_fast import CollapseGuard, CollapseWarning, InMerge, NoEffectWarning, NoiseThreshold, RankBudget, linear
from inmerge_fast.thresholds import MOST_SHARE
from inmerge_fast.training import rank_watch
from inmerge_fast.training.rank_watch import CHECK_EVERY, DELAY

NO_GUARD = CollapseGuard(loss=0.999, action="warn")  # keeps account, and never speaks


def deep(seed=1):
    """Layers whose filters have something in common: pairs of many similarities."""
    torch.manual_seed(seed)
    convs = [nn.Conv2d(8, 32, 3), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 48, 1, groups=2)]
    model = nn.Sequential(*convs, nn.Linear(48, 2))  # reads the last one, which would be a head without it
    with torch.no_grad():
        for conv in convs:
            conv.weight += 0.3 * conv.weight[:1].clone() * torch.randn(len(conv.weight), 1, 1, 1)
    return model


def ranks(model):
    return {layer.name: layer.effective_rank for layer in inmerge_fast.similarity(model).layers}


def lost(merger):
    return {layer.name: layer.lost for layer in merger.summary().layers}


# ------------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: RankBudget(0.0), ValueError, "loss must be above 0 and below 1, got 0.0"),
        (lambda: RankBudget(1), ValueError, "loss must be above 0 and below 1, got 1"),
        (lambda: RankBudget("all"), TypeError, "loss must be a number"),
        (lambda: RankBudget(steps=0), ValueError, "steps must be at least 1, got 0"),
        (lambda: RankBudget(every=2.0), TypeError, "every must be an int, got 2.0"),
        (lambda: CollapseGuard(loss=1.0), ValueError, "loss must be above 0 and below 1, got 1.0"),
        (lambda: CollapseGuard(loss=None), TypeError, "loss must be a number"),
        (lambda: CollapseGuard(action="raise"), ValueError, "action must be one of"),
        (lambda: InMerge(net(), threshold=RankBudget()), ValueError, r"to know how many they are: pass stop=.*steps="),
    ],
)  # fmt: skip
def test_bad_budgets_and_guards_raise_when_made(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        ({"stop": 100}, 100),
        ({"start": 20, "stop": 100, "every": 3}, 27),
        ({"start": 1, "stop": 3, "steps_per_epoch": 10}, 20),
        ({"threshold": RankBudget(steps=50), "every": 4}, 13),
        ({"threshold": RankBudget(steps=50), "stop": 10}, 50),
    ],
)
def test_a_budget_is_for_the_steps_that_merge(recipe, steps):
    merger = InMerge(net(), **{"threshold": RankBudget()} | recipe)
    assert merger._run.recipe.merging_steps == steps


# --------------------------------------------------------------------------------------------------------------- budget


RECIPES = {
    "default": {},
    "similar": {"partner": "similar"},
    "nearest": {"partner": "nearest"},
    "half": {"alpha": 0.5},
    "rarely": {"every": 3, "start": 7},
    "ramps": {"alpha": linear(0.95, 0.6, end=300), "prob": linear(0.0, 0.8, end=300)},
    "often": {"threshold": RankBudget(0.08, every=5)},
}


@pytest.mark.parametrize("name", RECIPES)
def test_merging_costs_what_the_budget_allows_and_what_it_says(name, monkeypatch):
    """Without training, so that all that the rank loses is lost by merging; and no limit but the budget binds."""
    monkeypatch.setattr(rank_watch, "MOST_SHARE", 0.05)
    model = deep()
    before = ranks(model)
    recipe = {"threshold": RankBudget(0.08), "stop": 400, "skip_first": 0, "guard": NO_GUARD} | RECIPES[name]
    merger = InMerge(model, **recipe)
    half = {}
    for step in range(400):
        merger.step()
        if step == 200:
            half = lost(merger)
    allowed = recipe["threshold"].loss
    for layer in merger.summary().layers:
        truth = 1 - layer.rank_end / before[layer.name]
        assert 0.3 * allowed < truth < 1.5 * allowed, (layer.name, truth)
        assert layer.lost == pytest.approx(truth, rel=0.35)
        assert layer.rank_start == pytest.approx(before[layer.name])
        assert half[layer.name] < 0.8 * allowed, "it is spent evenly"
        assert layer.verdict == "active"


def test_a_budget_that_would_allow_more_merges_one_in_a_hundred():
    model = deep()
    merger = InMerge(model, threshold=RankBudget(0.9), stop=300, skip_first=0, guard=NO_GUARD)
    for _ in range(300):
        merger.step()
    for layer in merger.summary().layers:
        # 2 of the pairs of a small layer are the least there is, and a threshold is kept for some steps.
        assert 0 < layer.merged < 2 * max(MOST_SHARE, 2 / (layer.filters * (layer.filters - 1))) * layer.sampled


def test_nothing_merges_after_the_steps_that_the_budget_was_for():
    model = deep()
    merger = InMerge(model, threshold=RankBudget(0.05, steps=60), skip_first=0)
    during = sum(merger.step().merged for _ in range(60))
    after = [merger.step().merged for _ in range(60)]
    assert during > 20
    assert not any(after)


def test_a_budget_that_is_spent_is_spent():
    """What a layer has lost before, as by a lower threshold, leaves nothing for later."""
    model = deep()
    merger = InMerge(model, threshold=RankBudget(0.05), stop=200, skip_first=0, guard=NO_GUARD)
    merger.step()
    for ledger in merger._run.watch.ledgers.values():
        ledger.spent = 0.06
    late = [merger.step().merged for _ in range(2 * CHECK_EVERY)]
    assert sum(late[CHECK_EVERY:]) == 0


def test_a_layer_that_changes_is_measured_before_its_window_is_over(monkeypatch):
    """Filters that have become alike pass at the old threshold: merges, which are counted, tell."""
    model = deep()
    merger = InMerge(model, threshold=RankBudget(0.04), stop=20_000, skip_first=0, prob=0.1)
    measured = []
    original = rank_watch.RankWatch.measured
    monkeypatch.setattr(
        rank_watch.RankWatch,
        "measured",
        lambda self, recipe, step, name, *rest: (
            measured.append((step, name)) or original(self, recipe, step, name, *rest)
        ),
    )
    for _ in range(2000):
        merger.step()
    window = merger._run.watch.window(merger._run.recipe, 2000)
    assert window > 10 * CHECK_EVERY
    assert [step for step, name in measured if name == "1"][-1] < 2000 - CHECK_EVERY
    with torch.no_grad():
        model[1].weight += 0.5 * model[1].weight[:1].clone()
    merger._run.watch.ledgers["1"].threshold = 0.2
    measured.clear()
    for _ in range(2 * CHECK_EVERY + DELAY):
        merger.step()
    assert {name for _, name in measured} == {"1"}


def test_a_run_that_the_budget_is_too_small_for_says_so_at_the_end():
    torch.manual_seed(0)
    merger = InMerge(nn.Sequential(nn.Conv2d(4, 3, 3)), threshold=RankBudget(1e-4), stop=30, skip_first=0)
    for _ in range(30):
        merger.step()
    assert merger.summary().layers[0].verdict == "no effect"
    with pytest.warns(NoEffectWarning, match=r"merged none: the RankBudget of every layer was too small") as seen:
        merger.flush()
    assert seen[0].filename == __file__


def test_a_layer_without_finite_filters_is_never_merged():
    model = deep()
    with torch.no_grad():
        model[1].weight.fill_(torch.nan)
    merger = InMerge(model, threshold=RankBudget(), stop=100, skip_first=0, prob=1.0)
    merged = [{layer.name: layer.merged for layer in merger.step().layers} for _ in range(100)]
    assert sum(step["1"] for step in merged) == 0
    assert sum(step["0"] for step in merged) > 0


@pytest.mark.filterwarnings("ignore::inmerge_fast.NoEffectWarning")
def test_training_keeps_the_rank_that_it_has_without_merging():
    """A small net that trains: the whole promise, in a minute's worth of steps."""
    torch.manual_seed(0)
    images, labels = torch.randn(256, 3, 8, 8), torch.arange(256) % 4
    for label in range(4):
        images[labels == label, :, label : label + 4] += 1.0

    def trained(**recipe):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 48, 3), nn.BatchNorm2d(48), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4),
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)
        merger = InMerge(model, skip_first=0, stop=200, **recipe)
        for step in range(200):
            batch = torch.arange(32 * step, 32 * step + 32) % 256
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            merger.step()
            optimizer.zero_grad()
        return ranks(model), merger

    base, _ = trained(threshold=1.0)
    kept, merger = trained(threshold=RankBudget())
    assert merger.summary().merged > 20
    assert all(kept[name] > 0.9 * base[name] for name in base)
    assert not merger.stopped


# ---------------------------------------------------------------------------------------------------------------- guard


@pytest.mark.parametrize("threshold", [-1.0, NoiseThreshold(0.5), lambda step: 0.05, {"0": -1.0, "1": -1.0, "2": 0.0}])
def test_the_guard_stops_layers_before_they_collapse(threshold):
    model = deep()
    before = ranks(model)
    merger = InMerge(model, threshold=threshold, skip_first=0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(300):
            merger.step()  # the line
    assert [warning.category for warning in seen] == [CollapseWarning] * 3
    assert merger.stopped == {"0", "1", "2"}
    assert all(warning.filename == __file__ for warning in seen), "the warnings point at the caller"
    text = str(seen[0].message)
    assert "is collapsing: merging has cost it about" in text
    assert "limit 10 %); it is merged no more; a higher threshold" in text
    now = ranks(model)
    for layer in merger.summary().layers:
        assert (layer.verdict, layer.stopped) == ("collapsing", True)
        assert now[layer.name] > 0.6 * before[layer.name], "a few merges later than it should have been, at most"
    assert merger.step().merged == 0


@pytest.mark.parametrize("alpha", [0.0, 0.2])
@pytest.mark.parametrize("recipe", [{"threshold": -1.0, "prob": 1.0}, {"threshold": NoiseThreshold(2), "prob": 0.5}])
def test_the_guard_sees_filters_that_are_replaced(alpha, recipe):
    """Whose first merges leave copies, which may be merged with each other at no cost."""
    merger = InMerge(deep(), skip_first=0, alpha=alpha, **recipe)
    before = merger.effective_rank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        for _ in range(200):
            merger.step()
    for layer in merger.summary().layers:
        fell = merger.effective_rank()[layer.name] < 0.85 * before[layer.name]
        assert (layer.stopped and layer.lost > 0.1) or not fell, layer
    assert merger.stopped


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.4])
@pytest.mark.parametrize("partner", ["random", "nearest"])
def test_a_budget_is_kept_where_filters_are_replaced(alpha, partner):
    """Nothing is trained, so that what a layer lacks is what merging has cost it."""
    budget = RankBudget(0.04)
    merger = InMerge(deep(), threshold=budget, stop=200, prob=1.0, alpha=alpha, partner=partner, skip_first=0)
    before = merger.effective_rank()
    for _ in range(200):
        merger.step()
    after = merger.effective_rank()
    assert all(after[name] > 0.92 * before[name] for name in before)
    assert merger.summary().merged or partner == "nearest"


def test_the_guard_can_only_warn():
    merger = InMerge(deep(), threshold=-1.0, skip_first=0, guard=CollapseGuard(0.2, action="warn"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(100):
            merger.step()
    assert len(seen) == 3
    assert all('limit 20 %); CollapseGuard(action="stop") would' in str(warning.message) for warning in seen)
    assert not merger.stopped
    assert merger.step().merged > 0
    assert {layer.verdict for layer in merger.summary().layers} == {"collapsing"}


def test_no_alarm_is_possible_where_nothing_merges(monkeypatch):
    """Nor is anything measured but the ranks at the start."""
    monkeypatch.setattr(rank_watch.LayerLedger, "charge", pytest.fail)
    model = deep()
    with torch.no_grad():  # more alike than any merging makes them
        model[1].weight.copy_(model[1].weight[:1] + 0.01 * torch.randn_like(model[1].weight))
    merger = InMerge(model, threshold=1.0, skip_first=0)
    for _ in range(90):
        merger.step()
        with torch.no_grad():
            model[0].weight.mul_(0.9).add_(model[0].weight.mean(0), alpha=0.1)
    assert not merger.stopped


def test_a_rank_that_falls_by_training_is_not_merging():
    """All filters of a layer drift together while a few merges happen."""
    model = deep()
    merger = InMerge(model, threshold=RankBudget(0.02), stop=120, skip_first=0)
    for _ in range(120):
        merger.step()
        with torch.no_grad():
            model[0].weight.mul_(0.98).add_(model[0].weight.mean(0), alpha=0.02)
    summary = {layer.name: layer for layer in merger.summary().layers}
    assert summary["0"].rank_end < 0.7 * summary["0"].rank_start
    assert summary["0"].lost < 0.05
    assert not merger.stopped


def test_without_a_guard_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(rank_watch, "RankCost", pytest.fail)
    merger = InMerge(deep(), threshold=-1.0, skip_first=0, guard=None)
    for _ in range(40):
        merger.step()
    assert not merger.stopped


def test_a_guarded_step_waits_for_no_count(monkeypatch):
    """Counts are on their way for two steps before they are looked at."""
    read, model = [], deep()
    merger = InMerge(model, threshold=0.05, prob=0.05, skip_first=0)
    original = rank_watch._Count.merged
    monkeypatch.setattr(
        rank_watch._Count, "merged", lambda self: read.append(merger.step_count) or original(self)
    )  # fmt: skip
    for _ in range(52):
        merger.step()
    assert read == [4, 6, 10, 18, 34, 50]


def test_a_layer_that_is_unfrozen_is_watched_from_then_on():
    model = deep()
    model[1].weight.requires_grad_(False)
    merger = InMerge(model, threshold=RankBudget(), stop=200, skip_first=0)
    for _ in range(20):
        merger.step()
    assert set(merger._run.watch.ledgers) == {"0", "2"}
    model[1].weight.requires_grad_(True)
    merged = sum(merger.step().layers[1].merged for _ in range(100))
    assert merged > 0
    assert set(merger._run.watch.ledgers) == {"0", "1", "2"}
    assert math.isfinite(lost(merger)["1"])


def test_with_accumulation_and_skipped_steps_only_merges_are_charged():
    """Attached, so that it follows the steps that are taken: here one of three, and none where the gradient is not."""
    model = net()
    optimizer = optimizer_of("sgd", model)
    merger = InMerge(model, threshold=RankBudget(0.2), stop=20, skip_first=0).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the scaler
        for micro_step, x in enumerate(batches(60)):
            scale = torch.inf if micro_step % 6 == 5 else 1.0
            scaler.scale(loss_of(model, x) * scale).backward()
            if micro_step % 3 == 2:
                scaler.step(optimizer)
                scaler.update(8.0)
                optimizer.zero_grad()
    assert merger.step_count == 10
    watch = merger._run.watch
    counted = merger._run.counted_by_layer()
    assert all(ledger.merged <= counted[name][1] for name, ledger in watch.ledgers.items())
    assert all(value < 0.3 for value in lost(merger).values())
