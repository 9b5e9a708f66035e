"""The first page: merging beside its controls, with recomputed statistics, and what was fine-tuned."""

import dataclasses
import json
from pathlib import Path

import pytest
from paper_fixtures import TINY

from benchmarks.paper import compare, controls_page, front
from benchmarks.paper.config import BASELINE, FORWARD, PAPER, Arm
from benchmarks.paper.experiments import Experiment
from benchmarks.paper.robustness import CORRUPTIONS
from benchmarks.paper.storage import append
from benchmarks.paper.tables import write_manifest

pytest.importorskip("sklearn")

FOLDER = Path(__file__).parents[1] / "benchmarks/paper"
ARMS = (BASELINE, Arm(PAPER), Arm(FORWARD), Arm(dropout=0.2))


def fine_tuning(out, seeds, gain=0.02):
    """Results of four arms: a gain as trained that recomputed statistics take back, but for the last arm."""
    recipe = dataclasses.replace(TINY, data="own.npz", model="efficientnet_lite0", name="own-fine-tune")
    experiment = Experiment("fine-tune", "Fine-tuning", ((recipe, ARMS),), tuple(range(seeds)))
    for run in experiment.runs():
        place = ARMS.index(run.arm)

        def metrics(extra, seed=run.seed):
            value = {"acc": 0.8 + extra, "auc": 0.9 + extra + 1e-4 * seed * bool(extra), "ece": 0.1}
            return dict.fromkeys(("clean", "corrupted", "noise"), value) | {"attacked": {}}

        append(out, run.key(), {
            "recipe": json.loads(json.dumps(dataclasses.asdict(recipe))), "data": {}, "seed": run.seed,
            "arm": {"label": run.arm.label(), **dataclasses.asdict(run.arm)}, "corruptions": "own", "loss": [0.1],
            "digests": {"backbone": "b", "weights": run.key()}, "batch_norms": 1,
            "merging": {"per_step": 3.0} if run.arm.merging else None,
            "filters": {"rank_before": 1.0, "rank": 1.0, "collapsed": False},
            "metrics": metrics(gain * place), "recomputed": metrics(gain * (place == 3)),
        })  # fmt: skip
    return write_manifest(experiment, out)


def test_what_counts_in_fine_tuning_is_with_recomputed_statistics(tmp_path):
    manifest = fine_tuning(tmp_path, 4)
    [said] = controls_page.fine_tuned([manifest])
    assert said.startswith("**Fine-tuning** (own, efficientnet_lite0 with ImageNet weights, 4 seeds), 3 arms")
    assert "gains Dropout2d 0.2: AUC +2.02, Dropout2d 0.2: corrupted AUC +2.02" in said, said
    assert "; losses none. The library's default of forward-only merging, `forward-only merging, alpha" in said, said
    assert said.endswith("corrupted AUC 0, noise AUC 0, AUC 0, corrupted ECE 0."), said
    text = controls_page.answer_table([manifest], tmp_path)
    [row] = [line for line in text.splitlines() if line.startswith("| own,")]
    assert row.endswith(r"| all | – | 0 | – | – | – | – | – | +2.02 [+1.99, +2.04] \* | – |"), row
    text = controls_page.section([manifest], tmp_path)
    row = next(line for line in text.splitlines() if "Dropout2d" in line and line.startswith("|"))
    assert row.split(" | ")[3].startswith("+2.00")
    assert (
        "| own, efficientnet_lite0 with ImageNet weights, 4 seeds | tau 0.3, alpha 0.8, p 0.3 | 3.00 | 0 | 0 |" in text
    )


def test_the_mean_without_noise_leaves_all_kinds_of_noise_out():
    kinds = {"shot_noise": 0.2, "gaussian_noise": 0.4, "jpeg": 0.6, "gaussian_blur": 0.9}
    levels = {kind: {"3": {"auc": value}, "5": {"auc": value - 0.1}} for kind, value in kinds.items()}
    metrics = {"by_corruption": levels}
    assert compare.group_of(metrics, "not noise")["auc"] == pytest.approx((0.6 + 0.5 + 0.9 + 0.8) / 4)
    levels["jpeg"]["3"]["auc"] = None  # diverged
    assert compare.group_of(metrics, "not noise") == {"auc": None}
    assert compare.group_of({}, "not noise") == {"auc": None}
    assert sum("noise" in kind for kind in CORRUPTIONS) == 4
    assert len(CORRUPTIONS) == 13  # as the pages say


def test_too_few_seeds_say_nothing(tmp_path):
    manifest = fine_tuning(tmp_path, 2)
    assert controls_page.fine_tuned([manifest]) == []
    assert controls_page.section([manifest], tmp_path) == controls_page.answer_table([manifest], tmp_path) == ""
    assert controls_page.forward_only_answer(tmp_path) == []


def test_what_does_not_last_is_not_counted_as_lasting_merging(tmp_path):
    [one] = front.settings_of([fine_tuning(tmp_path, 3)])
    assert one.row.label == Arm(PAPER).label()


def test_the_committed_controls_are_those_of_the_page_of_forward_only_merging():
    page, other = ((FOLDER / name).read_text().replace(r" \*\*", "").replace(r" \*", "") for name in
                   ("RESULTS.md", "FORWARD_ONLY.md"))  # fmt: skip
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("|") and "Dropout2d" in line]
    there = [line for line in other.splitlines() if "| recomputed |" in line]
    found = 0
    for _, label, _, acc, auc, ece, *_ in rows:
        found += any(line.startswith(f"| {label} | recomputed |") and f"| {acc} | {auc} | {ece} |" in line
                     for line in there)  # fmt: skip
    assert found >= 8
