"""What ``inspect`` prints and writes: outputs tried before the work, one file a layer, and the bottom line."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_looks import WEIGHT, plain
from torch import nn

import inmerge_fast
from inmerge_fast import similarity
from inmerge_fast.__main__ import main
from inmerge_fast.inspection import bar


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(
        {"a.b": WEIGHT, "A.b": WEIGHT.flip(0), "a/b": WEIGHT.flip(1), "a:b": WEIGHT.flip(2)}, tmp_path / "net.pt"
    )
    return str(tmp_path / "net.pt")


def error(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *map(str, arguments)])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""  # before the work
    return captured.err.strip().splitlines()[-1]


def test_outputs_that_cannot_be_written_are_said_before_the_work(checkpoint, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("x")
    assert f"--output: {blocked}: pictures cannot be written there: " in error(
        [checkpoint, "--output", blocked], capsys
    )
    assert "cannot be written there" in error([checkpoint, "--output", blocked / "deep" / "er"], capsys)
    assert "cannot be written there" in error(["gone.pt", "--output", blocked], capsys)
    if Path("/proc/self").exists():
        assert "cannot be written there" in error([checkpoint, "--output", "/proc/pictures"], capsys)
    assert "--csv: " in error([checkpoint, "--no-pictures", "--csv", tmp_path / "no" / "table.csv"], capsys)
    assert "Is a directory" in error([checkpoint, "--no-pictures", "--csv", tmp_path], capsys)


@pytest.mark.parametrize("named", ["itself", "a link", "a file of the folder"])
def test_a_table_never_replaces_what_is_looked_at(named, checkpoint, tmp_path, capsys):
    before = Path(checkpoint).read_bytes()
    table = Path(checkpoint)
    if named == "a link":
        table = tmp_path / "table.csv"
        table.symlink_to(checkpoint)
    source = tmp_path if named == "a file of the folder" else checkpoint
    assert "would be replaced; name another file" in error([source, "--no-pictures", "--csv", table], capsys)
    assert Path(checkpoint).read_bytes() == before


def test_names_that_are_no_text_are_written_to_the_table(tmp_path, capsys):
    torch.save({"\ud800": WEIGHT}, tmp_path / "net.pt")
    main(["inspect", str(tmp_path / "net.pt"), "--no-pictures", "--csv", str(tmp_path / "table.csv")])
    assert "\\ud800,8," in (tmp_path / "table.csv").read_text()


def test_what_was_made_for_nothing_is_taken_away(tmp_path, capsys):
    assert "there is no file" in error(
        ["gone.pt", "--output", tmp_path / "a" / "b", "--csv", tmp_path / "t.csv"], capsys
    )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    error(["gone.pt", "--output", tmp_path / "a" / "b"], capsys)
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


def test_two_layers_never_write_one_picture(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    names = [argument for name in ("a.b", "A.b", "a/b", "a:b") for argument in ("--layer", name)]
    main(["inspect", checkpoint, "--output", str(tmp_path / "out"), *names])
    written = [path.name for path in (tmp_path / "out").iterdir()]
    assert len({name.casefold() for name in written}) == 2 + 2 * 4


def test_the_table_as_comma_separated_values(checkpoint, tmp_path, capsys):
    path = tmp_path / "table.csv"
    torch.save(plain() | {"mask": torch.ones(8, 3, 3, dtype=torch.bool)}, checkpoint)
    main(["inspect", checkpoint, "--no-pictures", "--csv", str(path)])
    with path.open(newline="") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["0.weight", "1.weight", "mask"]
    assert rows["mask"]["skipped"].startswith("has dtype bool")
    assert rows["0.weight"]["kernel"] == "3x3"
    layer = similarity(torch.load(checkpoint))["0.weight"]
    assert float(rows["0.weight"]["mean"]) == layer.mean
    assert float(rows["0.weight"]["threshold_nearest_5%"]) == layer.threshold_for_rate(0.05, "nearest")


def test_the_bar_is_only_for_terminals(monkeypatch, capsys):
    monkeypatch.setattr(bar, "QUIET", 0.0)
    similarity(plain(), progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    similarity(plain(), progress=True)
    shown = capsys.readouterr().err
    assert "comparing filters [" in shown
    assert "1/2 1.weight" in shown
    assert shown.endswith("\r\033[K")
    similarity(plain())
    assert capsys.readouterr().err == ""


# ----------------------------------------------------------------------------------------- would merging do anything?


def test_the_bottom_line_is_what_merge_then_does(tmp_path, capsys):
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 40, 1), nn.Conv2d(40, 30, 3)]
    net = nn.Sequential(*convs, nn.BatchNorm2d(30))  # a file of weights would not say that the last one is a head
    with torch.no_grad():
        net[2].weight[20:] = net[2].weight[:20] + 0.3 * torch.randn(20, 8, 1, 1)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    main(["inspect", str(tmp_path / "net.pt"), "--no-pictures", "--skip-first", "1"])
    text = capsys.readouterr().out
    published = text.split("as published (threshold 0.3, p = 0.3): ")[1].split(" filters")[0]
    runs = [inmerge_fast.merge_(net, skip_first=1, seed=0, step=step, dry_run=True) for step in range(300)]
    merges = sum(run.passed for run in runs) / len(runs)
    assert float(published) == pytest.approx(merges, rel=0.1)
    assert "% of them in 1x1 layers" in text
    merger = inmerge_fast.InMerge(net, skip_first=1, threshold=inmerge_fast.RankBudget(), stop=1000)
    expected = merger.preview().merges
    said = text.split("over 1000 steps): ")[1].split(" ")[0]
    assert (0.0 if said.startswith("none") else float(said)) == pytest.approx(expected, rel=0.1)


def test_the_default_share_of_layers_is_skipped_in_the_bottom_line(tmp_path, capsys):
    net = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(5)))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    main(["inspect", str(tmp_path / "net.pt"), "--no-pictures"])
    assert "Of 8 filters in 2 layers" in capsys.readouterr().out
    for choice, kept in (("2", "3 layers"), ("0.6", "2 layers"), ("[012]", "2 layers"), ("0", "5 layers")):
        main(["inspect", str(tmp_path / "net.pt"), "--no-pictures", "--skip-first", choice])
        assert kept in capsys.readouterr().out
    assert "skip_first must not be negative" in error([tmp_path / "net.pt", "--no-pictures", "--skip-first=-1"], capsys)
    torch.save({"a": torch.randn(4, 3, 3, 3), "b": torch.randn(1, 3, 3, 3)}, tmp_path / "net.pt")
    main(["inspect", str(tmp_path / "net.pt"), "--no-pictures"])
    assert "No: the layers that merge_ takes by default hold nothing to merge." in capsys.readouterr().out


def test_names_that_a_terminal_cannot_show(tmp_path):
    torch.save({"größe.weight": WEIGHT, "b\udc80d": WEIGHT.clone()}, tmp_path / "net.pt")
    command = [sys.executable, "-m", "inmerge_fast", "inspect", str(tmp_path / "net.pt"), "--no-pictures"]
    done = subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[1],
                          env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rb"gr\xf6\xdfe.weight" in done.stdout
