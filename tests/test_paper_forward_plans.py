"""The stages of the experiment on forward-only merging: plan, confirm, supplement, images; and its page."""

import dataclasses
import json

import numpy as np
import pytest
from paper_fixtures import FORWARD_TINY as FAST
from paper_fixtures import few_images  # noqa: F401 - an automatic fixture

from benchmarks.paper import controls_page, forward_only, forward_page, resampled
from benchmarks.paper.config import FORWARD, PAPER, Arm
from benchmarks.paper.experiments import Options
from benchmarks.paper.forward_only import arm_of, confirm, differences, plan, plan_path, read_plan, supplement
from benchmarks.paper.grid import Where
from benchmarks.paper.storage import runs_of

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
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
        with pytest.raises(ValueError, match="was changed after its runs had begun"):
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
            assert cells[2] == f"{np.mean([one['loss'][-1] for one in results.values()]):.3f}"
            shown = cells[4 + list(forward_only.COLUMNS).index("corrupted AUC")]
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
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="2 of 3 seeds are done; run confirm first"):
        supplement(path)
    results.write_text("".join(lines))
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
    lines = controls_page.answer_table([], out).splitlines()
    titles, row = ([one.strip() for one in line.split("|")] for line in (lines[-4], lines[-2]))
    cells = dict(zip(titles, row, strict=True))
    for title, family in (("noise at its angle", forward_only.ANGLE), ("noise as large", forward_only.NOISE)):
        gain = np.mean(differences(found[family], found[""], "corrupted AUC"))
        assert cells[title].startswith(f"{gain:+.2f} [" if gain else "0"), (title, cells)
    default = forward_only.DEFAULT in before
    assert (cells["forward-only, as chosen"] == "the default") == (not default)
    assert (cells["noise at its angle"] == "–") == (not default)
    # It can be changed no more, be it itself or by another plan.
    content = json.loads(target.read_text())
    target.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="supplement.json: was changed after its runs had begun"):
        confirm(path, here)
    target.write_text(json.dumps(content | {"plan": "0" * 16}))
    with pytest.raises(ValueError, match="is for plan 0000000000000000"):
        confirm(path, here)
    with pytest.raises(ValueError, match="is for plan 0000000000000000"):
        forward_page.write(out)
    target.unlink()
    for look in (supplement, forward_only.confirmed_results):
        with pytest.raises(ValueError, match="supplement.json: was changed after its runs had begun"):
            look(path)


def test_intervals_over_images_are_of_the_same_runs(planned, tmp_path, monkeypatch):
    where, plan_file = planned
    out = tmp_path / "results"
    out.mkdir()
    path, results = out / plan_file.name, out / f"{FAST.name}.jsonl"
    path.write_bytes(plan_file.read_bytes())
    lines = (where.out / results.name).read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:-1]))
    here = dataclasses.replace(where, out=out)
    monkeypatch.setattr(resampled, "REPEATS", 40)
    with pytest.raises(ValueError, match="2 of 3 seeds are done; run confirm first"):
        resampled.resample(path, here)
    results.write_text("".join(lines))
    content = json.loads(resampled.resample(path, here).read_text())
    arms, found = forward_only.confirmed_results(path)
    family = forward_only.DEFAULT if forward_only.DEFAULT in arms else forward_only.MERGING
    for metric in ("corrupted AUC", "non-noise AUC"):
        values = differences(found[family], found[""], metric)
        one = content[metric]
        assert one["d_mean"] == pytest.approx(np.mean(values), abs=1e-6)
        assert one["d_low"] <= one["d_mean"] <= one["d_high"]
        assert one["d_high"] > one["d_low"]
    said = f"over seeds and images: d corrupted AUC {content['corrupted AUC']['d_mean']:+.2f} ["
    assert forward_page.write(out).read_text().count(said) == 1
    # Runs that come out otherwise are not those that are stored, and a plan is not another one.
    changed = [json.loads(line) for line in lines]
    for one in changed:
        one["recomputed"]["corrupted"]["auc"] += 1e-12
    results.write_text("".join(json.dumps(one) + "\n" for one in changed))
    with pytest.raises(ValueError, match="has other recomputed than in"):
        resampled.resample(path, here)
    results.write_text("".join(lines))
    for changed in ({"seeds": 2}, {"repeats": 7}, {"corrupted AUC": content["corrupted AUC"] | {"d_mean": 9.0}}):
        forward_only.beside(path, resampled.STAGE).write_text(json.dumps(content | changed))
        with pytest.raises(ValueError, match="is not of the runs of"):
            forward_page.write(out)
    scores = next((out / "checkpoints" / "scores" / FAST.name).rglob("*.npz"))
    kept = dict(np.load(scores))
    np.savez(scores, **(kept | {"contrast_down-3": kept["contrast_down-3"][::-1]}))
    with pytest.raises(ValueError, match="has other scores of contrast_down than in"):
        resampled.resample(path, here)


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
