"""The experiments as commands: end to end, killed and resumed, on two ranks, and made again from their files."""

import csv
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from paper_fixtures import TINY, write_chestxray14, write_npz

from benchmarks.paper import forward_page, grid, protocol, report
from benchmarks.paper.__main__ import main, show
from benchmarks.paper.config import BACKBONE, BASELINE, RESEEDED, Arm, Merging, Run
from benchmarks.paper.experiments import EXPERIMENTS, Experiment, Options, recipes
from benchmarks.paper.grid import Where, execute
from benchmarks.paper.models import Weights
from benchmarks.paper.published import CHESTXRAY14
from benchmarks.paper.storage import append, is_stored, load_result, mend, path_of, runs_of
from benchmarks.paper.tables import csv_of, write_manifest
from inmerge_fast.demo.train import build_net

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
MERGE_ALL = Arm(Merging(threshold=-1.0))
FAST = dataclasses.replace(TINY, arm_epochs=1, limit=64)


def experiment(seeds=2, figure="bars", arms=(BASELINE, RESEEDED, MERGE_ALL)):
    return Experiment("partner-rules", "Small", ((FAST, arms),), tuple(range(seeds)), figure)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the results of a small experiment, its tables and figures."""
    out = tmp_path_factory.mktemp("paper") / "results"
    execute(experiment().runs(), Where(out))
    show(experiment(), out)
    return out


def test_results_are_not_trained_again(finished, monkeypatch, capsys):
    monkeypatch.setattr(protocol, "run_arm", None)
    execute(experiment().runs(), Where(finished))
    assert "6 of 6 runs are done already" in capsys.readouterr().out


def test_everything_is_made_again_byte_for_byte(finished, capsys):
    made = [path for path in finished.iterdir() if path.suffix in (".md", ".svg")]
    assert len(made) == 2
    before = {path: path.read_bytes() for path in made}
    for path in made:
        path.unlink()
    page = report.write(finished)
    assert {path: path.read_bytes() for path in made} == before
    pages = [page, *(finished / name for name in ("README.md", "tables.csv", "all.svg") if (finished / name).exists())]
    texts = [one.read_bytes() for one in pages]
    report.write(finished)
    assert [one.read_bytes() for one in pages] == texts
    tables = finished / f"partner-rules.{FAST.name}.md"
    assert "| baseline, reseeded |" in tables.read_text()
    assert f"![{tables.stem}]({tables.stem}.svg)" in tables.read_text()
    assert f"- [{tables.stem}]({tables.name}): " in (finished / "README.md").read_text()


def test_table_shows_what_the_files_say(finished):
    runs = runs_of(finished / f"{FAST.name}.jsonl")
    merged, bases = ([runs[name] for name in sorted(runs) if name.startswith(start)] for start in ("tau", "baseline."))
    values = [
        100 * (a["metrics"]["corrupted"]["auc"] - b["metrics"]["corrupted"]["auc"])
        for a, b in zip(merged, bases, strict=True)
    ]
    lines = csv_of([finished / f"partner-rules.{FAST.name}.json"]).splitlines()
    rows = {(row["arm"], row["statistics"], row["metric"]): row for row in csv.DictReader(lines)}
    row = rows["tau -1, alpha 0.8, p 0.3", "as trained", "corrupted AUC"]
    assert float(row["d_mean"]) == pytest.approx(sum(values) / 2, rel=1e-5)
    values = [
        100 * (a["recomputed"]["attacked"]["pgd 2/255"] - b["recomputed"]["attacked"]["pgd 2/255"])
        for a, b in zip(merged, bases, strict=True)
    ]
    again = rows["tau -1, alpha 0.8, p 0.3", "recomputed", "PGD 2/255 acc"]
    assert float(again["d_mean"]) == pytest.approx(sum(values) / 2, rel=1e-5)
    assert float(row["merges_per_step"]) > 50
    assert int(row["seeds"]) == 2
    text = (finished / f"partner-rules.{FAST.name}.md").read_text()
    for column in (
        "statistics",
        "ECE",
        "d corrupted ECE",
        "merges",
        "rank",
        "collapsed",
        "identical",
        "d corrupted AUC",
    ):
        assert f"| {column} |" in text


@pytest.mark.parametrize("figure", ["line", "heat"])
def test_other_figures_repeat(finished, tmp_path, figure):
    from benchmarks.paper.figures import write_figures

    path = write_manifest(experiment(figure=figure), finished)
    first = [one.read_bytes() for one in write_figures(path)]
    assert [one.read_bytes() for one in write_figures(path)] == first
    write_manifest(experiment(), finished)
    write_figures(path)


def test_fewer_seeds_and_other_options_leave_tables_alone(finished):
    manifest = finished / f"partner-rules.{FAST.name}.json"
    before = manifest.read_bytes()
    assert write_manifest(experiment(seeds=1), finished) == manifest
    assert manifest.read_bytes() == before
    usual = {recipe.name for recipe in recipes(Options())}
    assert usual == {"digits-ordinary", "digits-strong-decay"}
    assert {recipe.name for recipe in recipes(Options(batch_size=32, seeds=2))} == usual  # the default, spelt out
    others = [{"arm_epochs": 2}, {"batch_size": 16}, {"bf16": True}, {"in_validation": True}, {"micro_batches": 2},
              {"weights": "a.pth, md5 0"}, {"weights": "a.pth, md5 1"}, {"arm_epochs": 3}]  # fmt: skip
    names = {recipes(Options(**changed))[0].name for changed in others}
    assert len(names | usual) == len(others) + 2


def small(seed):
    about = {key: {} for key in ("data", "digests", "metrics", "filters")}
    return about | {"recipe": {"name": "small"}, "arm": {"label": "a"}, "seed": seed}


def test_a_cut_last_line_is_no_run_and_the_next_command_removes_it(tmp_path):
    for seed in range(3):
        append(tmp_path, f"small/a/test-00{seed}", small(seed))
    path = tmp_path / "small.jsonl"
    whole = path.read_bytes()
    for cut in (whole[:-1], whole[:-30], whole[: whole.rfind(b"\n", 0, -1) + 2]):
        path.write_bytes(cut)
        assert list(runs_of(path)) == ["a/test-000", "a/test-001"]
        assert not is_stored(tmp_path, "small/a/test-002")
        mend(tmp_path, "small")
        append(tmp_path, "small/a/test-002", small(2))
        assert path.read_bytes() == whole
    mend(tmp_path, "small")
    assert path.read_bytes() == whole
    append(tmp_path, "small/a/test-001", small(7))  # made again: the last one counts
    assert load_result(tmp_path, "small/a/test-001")["seed"] == 7


def test_damaged_results_are_named(tmp_path):
    append(tmp_path, "small/a/test-000", small(0))
    path = tmp_path / "small.jsonl"
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"small\.jsonl: has no run b/test-000"):
        load_result(tmp_path, "small/b/test-000")
    path.write_bytes(whole[:20] + b"\n" + whole)
    with pytest.raises(ValueError, match=r"small\.jsonl, line 1: cannot be read as a result"):
        runs_of(path)
    path.write_bytes(whole + b"{}\n")
    with pytest.raises(ValueError, match=r"small\.jsonl, line 2: is not a result: arm, data"):
        runs_of(path)


COMMAND = ["-m", "benchmarks.paper", "sweep-layers", "--quick", "--device", "cpu"]


def environment():
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return kept | {"OMP_NUM_THREADS": "1"}


def test_a_killed_sweep_resumes_without_repeating_or_losing_a_run(tmp_path):
    """SIGKILL while runs are under way in two processes; their group is killed, as a batch system would."""
    out = tmp_path / "results"
    arguments = [sys.executable, *COMMAND, "--processes", "2", "--out", str(out)]
    expected = [run.key() for run in EXPERIMENTS["sweep-layers"](Options(quick=True)).runs()]
    path = path_of(out, expected[0])
    assert len(expected) == 8
    first = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_bytes().endswith(b"\n")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = path.read_bytes()
    assert 0 < done.count(b"\n") < 8
    path.write_bytes(done + b'{"run": "cut')  # as if killed in mid-write
    main([*COMMAND[2:], "--processes", "1", "--out", str(out)])
    assert path.read_bytes().startswith(done[: done.rfind(b"\n") + 1])
    assert path.read_bytes().count(b"\n") == 8  # none was made twice
    assert sorted(f"{path.stem}/{name}" for name in runs_of(path)) == sorted(expected)
    picture = out / "sweep-layers.digits-quick-strong-decay.svg"
    before = picture.read_bytes()
    picture.unlink()
    checkpoints = out / "checkpoints"
    shutil.rmtree(checkpoints)
    main([*COMMAND[2:], "--show", "--out", str(out)])  # trains nothing
    assert picture.read_bytes() == before
    assert not checkpoints.exists()


def test_data_of_the_same_name_are_told_apart(tmp_path):
    """Two folders with a file of one name have the same runs: the results of one are not shown as the other's."""
    for place, seed in (("a", 1), ("b", 2)):
        (tmp_path / place).mkdir()
        images = np.random.default_rng(seed).integers(0, 256, (24, 16, 16), dtype=np.uint8)
        write_npz(tmp_path / place / "own.npz", shape=(16, 16), train_images=images)
    recipe = dataclasses.replace(FAST, data="own.npz", name="own", limit=None)
    one, other = (Where(tmp_path / "out", root=str(tmp_path / place)) for place in "ab")
    execute([Run(recipe, BACKBONE, 0)], one)
    for runs in ([Run(recipe, BACKBONE, 0)], [Run(recipe, BACKBONE, 0), Run(recipe, BASELINE, 0)]):
        with pytest.raises(
            ValueError, match=r"was done with other data of this name \(own.npz, md5 .*: choose another"
        ):
            execute(runs, other)
    (tmp_path / "a" / "own.npz").unlink()
    grid._benches.clear()
    execute([Run(recipe, BACKBONE, 0)], one)  # no data, and none are needed


def test_a_damaged_backbone_is_trained_again_and_named(tmp_path, capfd):
    where = Where(tmp_path)
    execute([Run(FAST, BACKBONE, 0)], where)
    [path] = (tmp_path / "checkpoints").glob("*.pt")
    path.write_bytes(path.read_bytes()[:1000])
    execute([Run(FAST, RESEEDED, 0)], where)
    assert f"{path}: is damaged (" in capfd.readouterr().err
    results = [load_result(tmp_path, Run(FAST, arm, 0).key()) for arm in (BACKBONE, RESEEDED)]
    assert results[0]["digests"]["backbone"] == results[1]["digests"]["backbone"]


def test_weights_are_checked_and_said_before_anything_is_trained(tmp_path, capsys):
    net = build_net(1, 7, 0)
    torch.save({"state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}}, tmp_path / "w.ckpt")
    execute([Run(FAST, BACKBONE, 0)], Where(tmp_path / "out", weights=Weights(tmp_path / "w.ckpt")))
    said = capsys.readouterr().out
    assert "w.ckpt, entry 'state_dict': 48 tensors loaded; the head starts at random, the file's is for another" in said
    command = ["sweep-layers", "--quick", "--processes", "1", "--out", str(tmp_path / "cli"), "--corruptions", "own"]
    with pytest.raises(SystemExit):
        main([*command, "--weights", str(tmp_path / "w.ckpt"), "--model", "resnet18"])
    assert "conv1.weight (16, 1, 3, 3) instead of (64, 3, 7, 7)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--entry", "ema"])
    assert "argument --entry: is for --weights" in capsys.readouterr().err


def test_two_ranks_train_one_model(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from test_paper_experiments import BASELINE, MERGE_ALL, FAST, Run, Where, execute\n"
        f"execute([Run(FAST, arm, 0) for arm in (BASELINE, MERGE_ALL)], Where(Path({str(tmp_path / 'out')!r})))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = list(runs_of(tmp_path / "out" / f"{FAST.name}.jsonl").values())
    assert [result["environment"]["ranks"] for result in results] == [2, 2]
    assert results[0]["digests"]["weights"] != results[1]["digests"]["weights"]
    assert results[1]["merging"]["per_step"] > 50


def test_drifting_ranks_are_noticed(monkeypatch):
    def gather(found, mine):
        found[:] = [mine, {"parameters": "other"}]

    monkeypatch.setattr(grid.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(grid.dist, "all_gather_object", gather)
    with pytest.raises(RuntimeError, match="the ranks have drifted apart"):
        grid._check_ranks(Run(FAST, BASELINE, 0), {"digests": {"parameters": "one"}})


def test_chestxray14_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_chestxray14(tmp_path / "nih", kaggle=True, new_table=False)
    command = ["table-chestxray14", "--quick", "--data", str(tmp_path / "nih"), "--size", "16", "--seeds", "1"]
    main([*command, "--device", "cpu", "--out", str(tmp_path / "results"), "--batch-size", "12"])
    text = capsys.readouterr().out
    for name, values in CHESTXRAY14.items():
        assert re.search(rf"\| {name} \|.* {values[-1]:.3f} \|", text)
        assert sum(values[:-1]) / 14 == pytest.approx(values[-1], abs=0.003)
    ours = [line for line in text.splitlines() if line.startswith("| **ours**")]
    assert [line.split(":")[1].split("(")[0].strip() for line in ours] == [
        "baseline", "baseline, reseeded", "tau 0.3, alpha 0.8, p 0.3",
    ]  # fmt: skip
    assert "–" in ours[0]  # findings that no image of so small a test set has
    assert 0 < float(ours[0].rstrip("| ").split("|")[-1]) < 1
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "results").rglob("*.json*"))


def test_chestxray14_without_data_leaves_our_row_empty(tmp_path, capsys):
    main(["table-chestxray14", "--root", str(tmp_path), "--out", str(tmp_path / "results"), "--device", "cpu"])
    text = capsys.readouterr().out
    assert "put NIH ChestX-ray14 there" in text
    assert "| **ours**: no data, see below | – |" in text
    assert "Our row is empty" in text
    assert not list((tmp_path / "results").glob("*.png"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_starts_with_its_baseline(name):
    for quick in (False, True):
        made = EXPERIMENTS[name](Options(quick=quick))
        assert made.name == name
        for _, arms in made.groups:
            assert arms[0] == BASELINE
            assert RESEEDED in arms
            assert any(arm.merging for arm in arms)
            assert len(set(arms)) == len(arms)


def test_sequence_models_run(tmp_path, capsys):
    main(["transformer", "--quick", "--seeds", "1", "--device", "cpu", "--out", str(tmp_path)])
    assert "| z 4, alpha 0.8, p 0.3, Linear |" in capsys.readouterr().out
    assert (tmp_path / "transformer.digits-vit_small-quick-ordinary.svg").exists()


def test_a_file_of_ones_own(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    path = write_npz(tmp_path / "mine.npz", count=64)
    main(["sweep-layers", "--quick", "--seeds", "1", "--device", "cpu", "--data", str(path), "--in-validation",
          "--out", str(tmp_path / "results"), "--tensorboard", str(tmp_path / "logs")])  # fmt: skip
    assert "| tau 0.3, alpha 0.8, p 0.3, skip 0, in validation |" in capsys.readouterr().out
    assert len(list((tmp_path / "logs").rglob("events.out.*"))) == 4
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "results").rglob("*.json*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep-layers", "--data", "missing.npz"], "missing.npz: there is no such file"),
        (["sweep-layers", "--seeds", "0"], "must be a whole number above 0"),
        (["sweep-layers", "--model", "alexnet", "--quick", "--processes", "1"], "model must be one of"),
        (["search", "--show"], "argument --show: is for experiments, not for search"),
        (["sweep-layers", "--each-forward"], "changes nothing with one forward pass per step"),
        (["report"], "holds no manifest of an experiment"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path), "--root", str(tmp_path), "--device", "cpu"])
    assert message in capsys.readouterr().err


def test_the_package_does_not_depend_on_the_harness():
    for path in (ROOT / "inmerge_fast").glob("*.py"):
        assert not re.search(r"^\s*(from|import) (benchmarks|tests)", path.read_text(), re.MULTILINE), path


def test_the_committed_page_is_made_from_the_committed_files(tmp_path, monkeypatch):
    """Numbers of RESULTS.md and of the pages that quote it: each has a result file behind it."""
    folder = ROOT / "benchmarks/paper"
    shutil.copytree(folder / "results", tmp_path / "results", ignore=shutil.ignore_patterns("checkpoints", "*.svg"))
    for path in [*(tmp_path / "results").glob("*.md"), tmp_path / "results/tables.csv"]:
        path.unlink()
    monkeypatch.setattr(report, "write_figures", lambda path: None)  # they depend on matplotlib's version
    monkeypatch.setattr(report.front, "write_figure", lambda settings, out: out)
    assert report.write(tmp_path / "results").read_text() == (folder / "RESULTS.md").read_text()
    pages = sorted((tmp_path / "results").glob("*.md"))
    assert [path.name for path in pages] == sorted(path.name for path in (folder / "results").glob("*.md"))
    for path in [*pages, tmp_path / "results/tables.csv"]:
        assert path.read_text() == (folder / "results" / path.name).read_text()
        for picture in re.findall(r"!\[.*\]\((.*)\)", path.read_text()):
            assert (folder / "results" / picture).exists()
    assert (tmp_path / "FORWARD_ONLY.md").read_text() == (folder / "FORWARD_ONLY.md").read_text()
    readme = (folder / "README.md").read_text()
    assert forward_page.updated(readme, forward_page.readme_section(tmp_path / "results")) == readme
    said = "".join(path.read_text() for path in [*pages, folder / "RESULTS.md", folder / "FORWARD_ONLY.md"])
    for path in (folder / "README.md", ROOT / "README.md"):
        quoted = re.findall(r"[−+-]?\d+\.\d+\s\[[^]]*\]", path.read_text())
        assert quoted
        for figure in quoted:
            assert " ".join(figure.replace("−", "-").split()) in said
