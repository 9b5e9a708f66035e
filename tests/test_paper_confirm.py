"""Search, plan and confirmation: chosen on validation images, and looked at once on test images."""

import dataclasses
import json

import pytest
from paper_fixtures import TINY

from benchmarks.paper import confirm, report
from benchmarks.paper.compare import compare
from benchmarks.paper.config import Merging
from benchmarks.paper.experiments import Options
from benchmarks.paper.grid import Where
from benchmarks.paper.storage import load_result, runs_of

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

FAST = dataclasses.replace(TINY, arm_epochs=1, limit=64)


def test_a_plan_that_confirms_nothing_is_reported(tmp_path):
    """Without a confirmation there is no manifest of one, and the plan says what the search came to."""
    search = {"z 3": {"d_mean": -0.5, "collapsed": 0}, "z 2": {"d_mean": -0.02, "collapsed": 1}}
    plan = {"recipe": {"name": "digits-ordinary"}, "rule": "the rule", "search": search, "confirm": []}
    (tmp_path / "plan.digits-ordinary.json").write_text(json.dumps(plan))
    (said,) = [report._unconfirmed(path) for path in tmp_path.iterdir()]
    assert said.startswith("**confirm**, digits-ordinary: nothing to confirm")
    assert "the rule. None of the 2 settings of the search is; the best is z 2 with -0.02 points." in said
    (tmp_path / "plan.digits-ordinary.json").write_text(json.dumps(plan | {"confirm": [{"z": 3.0}]}))
    assert report._unconfirmed(tmp_path / "plan.digits-ordinary.json") == ""


def test_a_plan_is_chosen_on_validation_images_and_confirmed_once(tmp_path, monkeypatch, capsys):
    where, options = Where(tmp_path / "results"), Options(quick=True, seeds=2)
    monkeypatch.setattr(confirm, "BOOTSTRAP_REPEATS", 50)
    monkeypatch.setattr(confirm, "recipes", lambda options: (FAST, FAST))
    monkeypatch.setattr(confirm, "CANDIDATES", (Merging(threshold=1.0), Merging(z=0.5, prob=1.0, alpha=0.5)))
    with pytest.raises(ValueError, match="there is no plan; run search and plan first"):
        confirm.confirm(options, where)
    with pytest.raises(ValueError, match="the search is not complete: 6 runs are missing"):
        confirm.plan(options, where)
    confirm.search(options, where)
    # A search with other options leaves its manifest in the same place; the plan is made from its own search.
    other = dataclasses.replace(FAST, batch_size=64)
    with monkeypatch.context() as patch:
        patch.setattr(confirm, "recipes", lambda options: (other, other))
        confirm.search(options, where)
    assert not any(
        "/test-" in name for path in where.out.glob("*.jsonl") for name in runs_of(path)
    )  # the test images are not looked at
    confirm.plan(options, where)
    path = confirm.plan_path(options, where.out)
    plan = json.loads(path.read_text())
    own = compare([[load_result(where.out, run.key()) for run in confirm.search_experiment(options).runs()
                    if run.arm == arm] for arm in confirm.search_experiment(options).groups[0][1]])  # fmt: skip
    assert {row.label: row.judged("corrupted AUC").mean for row in own[1:]} == pytest.approx(
        {label: one["d_mean"] for label, one in plan["search"].items()}, abs=1e-12
    )
    gains = [label for label, one in plan["search"].items() if one["d_mean"] > 0 and not one["collapsed"]]
    assert [Merging(**setting).label() for setting in plan["confirm"]] == gains[:2]
    assert not set(plan["seeds"]) & {0, 1}
    with pytest.raises(ValueError, match="there is a plan already"):
        confirm.plan(options, where)
    # Whatever the search chose: confirm both, with the verdict that the files give.
    plan["confirm"] = [dataclasses.asdict(setting) for setting in confirm.CANDIDATES]
    plan["seeds"] = [100, 101]
    path.write_text(json.dumps(plan))
    confirm.confirm(options, where)
    verdict = json.loads(next(where.out.glob("confirm.*.result.json")).read_text())
    idle = verdict["tau 1, alpha 0.8, p 0.3"]
    assert (idle["d_mean"], idle["bootstrap_low"], idle["bootstrap_high"], idle["confirmed"]) == (0, 0, 0, False)
    assert all(one["seeds"] == 2 for one in verdict.values())
    report.write(where.out)
    assert "**confirm**" in (where.out / "README.md").read_text()
    # Scores are not committed: where they are missing, runs are made again.
    for path in (next(where.out.glob("confirm.*.result.json")), next(where.out.glob("*/*/test-101.npz"))):
        path.unlink()
    confirm.confirm(options, where)
    assert json.loads(next(where.out.glob("confirm.*.result.json")).read_text()) == verdict
    monkeypatch.setattr(confirm, "execute", None)
    confirm.confirm(options, where)  # one look is one look
    assert "confirmed already" in capsys.readouterr().out
    capsys.readouterr()
