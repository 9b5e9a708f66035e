"""Runs that diverged in the search and its confirmation: they are chosen by nobody, and no verdict rests on them."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from paper_fixtures import TINY
from torch import nn

from benchmarks.paper import confirm
from benchmarks.paper.config import BASELINE, Arm
from benchmarks.paper.experiments import Experiment, Options
from benchmarks.paper.grid import Where, scores_path
from benchmarks.paper.report import _confirmation, _unconfirmed
from benchmarks.paper.storage import append
from benchmarks.whole_runs.recipes import RECIPES, Images
from benchmarks.whole_runs.table import _table

pytest.importorskip("sklearn")


def put(out, run, value, collapsed=False):
    """A run's result as far as search and confirmation look at it; None: it diverged."""
    metrics = {key: {"acc": value, "auc": value} for key in ("clean", "corrupted", "noise")}
    result = {
        "recipe": json.loads(json.dumps(dataclasses.asdict(run.recipe))), "data": {}, "seed": run.seed,
        "arm": {"label": run.arm.label(), **dataclasses.asdict(run.arm)}, "corruptions": "own", "loss": [value],
        "digests": {"backbone": "b", "weights": run.key()}, "merging": None,
        "filters": {"rank_before": 1.0, "rank": 1.0, "collapsed": collapsed},
        "metrics": metrics | {"attacked": {"fgsm 8/255": value, "pgd 2/255": value}},
    }  # fmt: skip
    append(out, run.key(), result)


def test_a_plan_does_not_choose_what_diverged(tmp_path):
    options = Options(quick=True, seeds=2)
    experiment = confirm.search_experiment(options)
    arms = experiment.groups[0][1]
    for run in experiment.runs():
        place = arms.index(run.arm)
        # The later, the better; the best diverged once, the next best always.
        gone = (place == len(arms) - 1 and run.seed == 1) or place == len(arms) - 2
        put(tmp_path, run, None if gone else 0.5 + 0.01 * place)
    confirm.plan(options, Where(tmp_path))
    [path] = tmp_path.glob("plan.*.json")
    content = json.loads(path.read_text())
    chosen = [dataclasses.asdict(setting) for setting in (confirm.CANDIDATES[-3], confirm.CANDIDATES[-4])]
    assert content["confirm"] == chosen
    searched = list(content["search"].values())
    assert searched[-1] == {"d_mean": pytest.approx(6), "collapsed": 0, "diverged": 1}
    assert searched[-2] == {"d_mean": None, "collapsed": 0, "diverged": 2}


def test_a_search_in_which_everything_diverged(tmp_path):
    path = tmp_path / "plan.r.json"
    search = {"tau": {"d_mean": None, "collapsed": 0, "diverged": 2}}
    path.write_text(json.dumps({"confirm": [], "recipe": {"name": "r"}, "rule": "any", "search": search}))
    assert "every setting of the search diverged" in _unconfirmed(path)


@pytest.mark.parametrize("gone", [(3,), (0, 1, 2, 3)])
def test_a_verdict_leaves_out_seeds_that_diverged(tmp_path, gone):
    arm = Arm(confirm.CANDIDATES[0])
    experiment = Experiment("confirm", "", ((TINY, (BASELINE, arm)),), (0, 1, 2, 3), keep_scores=True)
    labels = np.arange(20) % 2
    for run in experiment.runs():
        sharp = 0.4 if run.arm == arm else 0.05
        value = None if run.arm == arm and run.seed in gone else 0.5 + sharp + 0.01 * run.seed * sharp
        put(tmp_path, run, value)
        noise = np.random.default_rng(run.seed).normal(scale=0.2, size=20)
        second = 0.5 + sharp * (2 * labels - 1) + noise if value is not None else np.full(20, np.nan)
        path = scores_path(tmp_path, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, labels=labels, **{"blur-3": np.stack([1 - second, second], 1)})
    found = confirm.verdict(experiment, tmp_path)[arm.label()]
    assert (found["seeds"], found["diverged"]) == (4 - len(gone), len(gone))
    if len(gone) == 4:
        assert not found["confirmed"]
        assert found["d_mean"] is None
    else:
        assert found["d_mean"] == pytest.approx(35.35, abs=0.1)
        assert found["confirmed"]
    result = confirm.result_path(experiment, tmp_path)
    manifest = result.with_name(result.name.replace(".result.json", ".json"))
    manifest.write_text(json.dumps({"groups": []}))
    (tmp_path / f"plan.{TINY.name}.json").write_text(json.dumps({"rule": "any"}))
    said = _confirmation(manifest)
    assert f"({len(gone)} more seeds diverged)" in said
    assert ("not confirmed, no interval" if len(gone) == 4 else ": confirmed") in said


def test_whole_runs_do_not_judge_by_outputs_that_are_not_finite():
    images = Images(RECIPES["digits"], None)

    class Constant(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.scores = torch.zeros(10)
            self.scores[0] = value

        def forward(self, x):
            return self.scores.expand(len(x), -1)

    assert images.accuracy(Constant(1.0)) == pytest.approx((images.test[1] == 0).float().mean().item())
    for bad in (math.nan, math.inf):
        assert math.isnan(images.accuracy(Constant(bad)))


def test_the_table_of_whole_runs_leaves_out_what_diverged():
    def line(setting, seed, accuracy):
        rank = {"a": None if accuracy is None else 5.0}
        return {"setting": setting, "seed": seed, "accuracy": accuracy, "rank": rank}

    text = "\n".join(_table([
        line("without merging", 0, 0.5), line("without merging", 1, 0.6), line("without merging", 2, None),
        line("0.3", 0, 0.4), line("0.3", 1, None), line("0.3", 2, 0.9),
    ]))  # fmt: skip
    assert "| 0.3 | 1 |" in text
    assert "-10.00 (-10.00)" in text
    assert "Accuracy without merging: 50.00, 60.00 %." in text
    assert "Diverged, and in no number above: without merging, seed 2; 0.3, seed 1." in text
