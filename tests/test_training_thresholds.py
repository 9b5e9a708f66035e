"""Schedules, thresholds that follow the layer, and what is logged."""

import json
import math

import pytest
import torch
from test_training import net
from torch import nn

import inmerge_fast
from inmerge_fast import (
    DictLogger,
    InMerge,
    NoiseThreshold,
    QuantileThreshold,
    RankBudget,
    TensorBoardLogger,
    cosine,
    linear,
)
from inmerge_fast.training.recipe import fitted_to


def test_ramps_begin_end_and_bend_where_they_should():
    straight, bent = linear(0.9, 0.5, begin=10, end=20), cosine(0.9, 0.5, begin=10, end=20)
    for ramp in (straight, bent):
        assert ramp(0) == ramp(10) == 0.9
        assert ramp(20) == ramp(10**9) == 0.5
        assert ramp(15) == pytest.approx(0.7)
    assert straight(12) == pytest.approx(0.82)
    assert bent(12) == pytest.approx(0.5 + 0.2 * (1 + math.cos(0.2 * math.pi)))


def test_schedules_reach_the_merge():
    """Each step is a ``merge_`` with that step's numbers."""
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    alpha, prob, threshold = linear(1.0, 0.2, end=10), cosine(0.0, 1.0, end=10), lambda step: -0.1 if step % 2 else 0.1
    merger = InMerge(model, alpha=alpha, prob=prob, threshold=threshold, skip_first=0, guard=None)
    for step in range(12):
        stats = merger.step()
        same = inmerge_fast.merge_(
            twin, alpha=alpha(step), prob=prob(step), threshold=threshold(step), skip_first=0, seed=0, step=step
        )
        assert stats.layers == same.layers or not stats.sampled
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: linear(0.1, 0.2, begin=5, end=5), ValueError, "end must be after begin"),
        (lambda: linear("a", 0.2, end=5), TypeError, "first must be a number"),
        (lambda: cosine(0.1, 2.0, end=5), ValueError, r"last must be in \[-1, 1\]"),
        (lambda: InMerge(net(), alpha=linear(-0.5, 0.5, end=5)), ValueError, "alpha's first value"),
        (lambda: NoiseThreshold("4"), TypeError, "z must be a number"),
        (lambda: NoiseThreshold(math.nan), ValueError, "z must be finite"),
        (lambda: QuantileThreshold(1.5), ValueError, "rate must be in"),
        (lambda: QuantileThreshold(0.1, every=0), ValueError, "every must be at least 1"),
        (lambda: QuantileThreshold(0.1, every=2.5), TypeError, "every must be an int"),
    ],
)
def test_bad_schedules_and_thresholds_raise_when_made(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_schedule_that_leaves_its_range_raises_before_anything_is_written():
    model = net()
    merger = InMerge(model, prob=lambda step: 0.5 * step, threshold=-1.0, skip_first=0)
    for _ in range(3):
        merger.step()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"prob at step 3 must be in \[0, 1\], got 1.5"):
        merger.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert merger.step_count == 3


def plant(weight, place, similarity):
    """Give filter ``place`` this cosine similarity with filter ``place + 1``."""
    with torch.no_grad():
        x = nn.functional.normalize(weight[place].flatten(), dim=0)
        y = weight[place + 1].flatten()
        y = nn.functional.normalize(y - (y @ x) * x, dim=0)
        weight[place + 1] = (similarity * x + math.sqrt(1 - similarity**2) * y).view_as(weight[0])


@pytest.mark.parametrize(("z", "acts"), [(5.0, [False, True]), (0.2, [True, True])])
def test_noise_threshold_is_in_units_of_each_layers_noise(z, acts):
    """The same similarity of 0.25 is 2 of a small layer's standard deviations, and 12 of a large one's."""
    model = nn.Sequential(nn.Conv2d(8, 2, 3), nn.Conv2d(256, 2, 3))
    for conv in model:
        plant(conv.weight, 0, 0.25)
    assert [NoiseThreshold(z).of(d) for d in (72, 2304)] == [z / math.sqrt(72), z / math.sqrt(2304)]
    stats = InMerge(model, prob=1.0, threshold=NoiseThreshold(z), skip_first=0, include_heads=True).step()
    assert [s.merged > 0 for s in stats.layers] == acts
    assert NoiseThreshold(100).of(4) == 1.0
    assert NoiseThreshold(-100).of(4) == -1.0


@pytest.mark.parametrize("partner", ["random", "nearest"])
def test_quantile_threshold_gives_the_wanted_rate_in_every_layer(partner):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 64, 3), nn.Conv2d(64, 96, 3), nn.Conv2d(96, 64, 1))
    merger = InMerge(
        model, prob=1.0, alpha=1.0, threshold=QuantileThreshold(0.25), partner=partner, skip_first=0, guard=None
    )
    counts = [[layer.merged / layer.sampled for layer in merger.step().layers] for _ in range(20)]
    for rate in torch.tensor(counts).mean(0):
        assert rate == pytest.approx(0.25, abs=0.05)


def test_quantile_threshold_is_refreshed_every_k_steps(monkeypatch):
    merger = InMerge(net(), threshold=QuantileThreshold(0.1, every=4), skip_first=0, every=2)
    measured = []
    run = merger._run
    original = run._measure_quantiles
    monkeypatch.setattr(run, "_measure_quantiles", lambda rate: measured.append(run.step_count) or original(rate))
    for _ in range(10):
        merger.step()
    assert measured == [0, 4, 8]


def test_quantile_threshold_of_a_layer_without_finite_filters_is_never():
    model = net()
    with torch.no_grad():
        model[3].weight.fill_(torch.nan)
    stats = InMerge(model, threshold=QuantileThreshold(1.0), prob=1.0, skip_first=0).step()
    assert [layer.merged > 0 for layer in stats.layers] == [True, False, True]


def test_without_loggers_nothing_is_read():
    merger = InMerge(net(), observe_every=1)
    merger.step()
    assert not merger._run.monitor.pending


def test_a_logger_gets_each_observed_step_by_layer(tmp_path):
    log = DictLogger()
    merger = InMerge(net(), threshold=0.05, prob=0.5, skip_first=1, loggers=[log], observe_every=3, every=2)
    stats = [merger.step() for _ in range(14)]
    assert [row["step"] for row in log.rows] == [0, 6], "the last observation is under way"
    merger.flush()
    assert [row["step"] for row in log.rows] == [0, 6, 12]
    for row in log.rows:
        at = stats[row["step"]]
        assert (row["sampled"], row["passed"], row["merged"]) == (at.sampled, at.passed, at.merged)
        assert row["mean_similarity"] == pytest.approx(at.mean_similarity)
        assert row["max_similarity"] == at.max_similarity
        assert [row["layers"][s.name]["merged"] for s in at.layers] == [s.merged for s in at.layers]
        assert all(layer["threshold"] == 0.05 for layer in row["layers"].values())
    log.save(tmp_path / "log.json")
    assert json.loads((tmp_path / "log.json").read_text()) == log.rows


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    log = DictLogger()
    with SummaryWriter(str(tmp_path)) as writer:
        merger = InMerge(net(), prob=1.0, loggers=[log, TensorBoardLogger(writer)], observe_every=1, skip_first=0)
        for _ in range(3):
            merger.step()
        merger.flush()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("inmerge/merged")] == [row["merged"] for row in log.rows]
    found = [(e.step, e.value) for e in events.Scalars("inmerge/5/mean_similarity")]
    wanted = [(row["step"], pytest.approx(row["layers"]["5"]["mean_similarity"], rel=1e-6)) for row in log.rows]
    assert found == wanted


@pytest.mark.parametrize(
    ("arguments", "total", "epochs", "steps"),
    [
        ({"threshold": RankBudget()}, 90, 3, 90),
        ({"threshold": RankBudget(), "start": 1, "steps_per_epoch": 30}, 90, 3, 60),
        ({"threshold": RankBudget(steps=7)}, 90, 3, 7),
        ({"threshold": RankBudget(), "stop": 40}, 90, 3, None),
        ({"threshold": RankBudget()}, math.inf, None, None),
    ],
)
def test_a_framework_that_knows_the_length_of_a_run_tells_the_budget(arguments, total, epochs, steps):
    assert fitted_to(arguments, total, epochs)["threshold"].steps == steps
    assert arguments["threshold"].steps in (None, 7), "the user's own stays what it is"


def test_an_epoch_of_batches_is_no_epoch_of_optimizer_steps():
    fitted_to({"steps_per_epoch": 25}, 76, 3)  # the last batches of an epoch may be fewer
    fitted_to({"steps_per_epoch": 100}, 75, None)
    with pytest.warns(UserWarning, match=r"steps_per_epoch=100, but this trainer makes 25 optimizer steps") as seen:
        fitted_to({"steps_per_epoch": 100}, 75, 3)
    assert seen[0].filename == __file__


def test_effective_rank_on_demand():
    model = net()
    merger = InMerge(model, skip_first=0)
    with torch.no_grad():
        model[3].weight.copy_(model[3].weight[:1].expand_as(model[3].weight))
    ranks = merger.effective_rank()
    assert ranks["3"] == pytest.approx(1.0, abs=1e-3)
    assert 4 < ranks["0"] <= 6
    assert ranks == {s.name: s.effective_rank for s in inmerge_fast.similarity(model).layers}


def test_a_plot_shows_every_layer_and_step(tmp_path):
    pytest.importorskip("matplotlib")
    log = DictLogger()
    merger = InMerge(net(), prob=1.0, threshold=-1.0, skip_first=0, loggers=[log], observe_every=1, every=4, guard=None)
    with pytest.raises(ValueError, match="nothing has been observed yet"):
        inmerge_fast.plot_merges(log.rows)
    for _ in range(9):
        merger.step()
    merger.flush()
    figure = inmerge_fast.plot_merges(log.rows, str(tmp_path / "merges.png"))
    assert (tmp_path / "merges.png").stat().st_size > 5000
    above, below, _ = figure.axes
    assert above.lines[0].get_ydata().tolist() == [row["merged"] for row in log.rows]
    assert above.lines[0].get_xdata().tolist() == [0, 4, 8]
    assert [label.get_text() for label in below.get_yticklabels()] == ["0", "3", "5"]
    assert below.collections[0].get_array().tolist() == [[100.0] * 3] * 3
    assert not below.texts
    assert inmerge_fast.plot_merges(log.rows[:1]).axes


def test_a_plot_of_a_run_that_merged_nothing_says_so(tmp_path):
    pytest.importorskip("matplotlib")
    log = DictLogger()
    merger = InMerge(net(), threshold=1.0, skip_first=0, loggers=[log], observe_every=1)
    for _ in range(8):
        merger.step()
    merger.flush()
    _, below, _ = inmerge_fast.plot_merges(log.rows, str(tmp_path / "merges.png")).axes
    [text] = below.texts
    assert text.get_text().startswith("no filter merged at any of the 8 observed steps")
