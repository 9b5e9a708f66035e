"""Result files are whole whatever ends a run, and tables, targets and plots take what is there."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from benchmarks import report, result_files, tables, targets
from benchmarks.result_files import ResultFile

ABOUT = {"device": "Some(R) Device"}


def read(path):
    return json.loads(path.read_text())


def test_every_row_is_written_at_once_and_a_bad_one_changes_nothing(tmp_path):
    file = ResultFile(tmp_path, "merge", ABOUT, {"prob": 0.3})
    assert file.path == tmp_path / "Some-Device" / "merge.json"
    row = {"a": 1}
    file.add(row)
    assert (read(file.path)["rows"], read(file.path)["complete"]) == ([{"a": 1}], False)
    file.extend(row, {"b": 2})
    assert read(file.path)["rows"] == [{"a": 1, "b": 2}]
    for bad in ({"a": float("nan")}, {"a": float("inf")}):
        with pytest.raises(ValueError, match="not JSON compliant"):
            file.add(bad)
        with pytest.raises(ValueError, match="not JSON compliant"):
            file.extend(row, bad)
    file.add({"a": 3})
    assert read(file.path)["rows"] == [{"a": 1, "b": 2}, {"a": 3}]
    assert file.finish() == 0
    assert read(file.path)["complete"]
    assert [path.name for path in file.path.parent.iterdir()] == ["merge.json"]


def test_a_failure_is_recorded_with_its_error_and_an_interrupt_is_not_swallowed(tmp_path, capsys):
    file = ResultFile(tmp_path, "merge", ABOUT, {})
    with file.attempt(net="VGG19", provider="compile"):
        raise RuntimeError("first line\nsecond line")
    assert read(file.path)["failures"] == [
        {"net": "VGG19", "provider": "compile", "error": "RuntimeError: first line"}
    ]  # fmt: skip
    assert "second line" in capsys.readouterr().err, "the traceback is in the log"
    with pytest.raises(KeyboardInterrupt), file.attempt(net="VGG19"):
        raise KeyboardInterrupt
    assert file.finish() == 1


KILLED = """
import sys
from pathlib import Path
from benchmarks.result_files import ResultFile
file = ResultFile(Path(sys.argv[1]), "merge", {"device": "d"}, {})
for number in range(10**6):
    file.add({"number": number, "filling": "x" * 2000})
    if number == 20:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_a_file_that_can_be_read(tmp_path, signal_):
    environment = os.environ | {"PYTHONPATH": str(result_files.ROOT)}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal_)
    (results,) = result_files.load(tmp_path)
    assert len(results.rows) > 20
    assert [row["number"] for row in results.rows] == list(range(len(results.rows)))
    assert not results.complete
    section = report.machine([as_measured(results)])
    assert "**interrupted**" in section


def as_measured(results):
    about = {"torch": "2", "triton": "3", "python": "3", "threads": 1, "copy_bandwidth_gb_s": 40.0, "commit": "c",
             "command": "python -m benchmarks.bench_merge"}  # fmt: skip
    return result_files.Results(
        results.path, results.bench, {**results.environment, **about}, results.rows, results.failures, results.complete
    )


def test_passes_are_one_table_and_compare_with_merge_in_their_own_rounds(tmp_path):
    first = ResultFile(tmp_path, "merge", ABOUT, {})
    first.add(row("merge_", 10.0))
    first.add(row("eager", 50.0))
    second = ResultFile(tmp_path, "merge-published", ABOUT, {})
    second.add(row("published", 900.0) | {"merge_us": 30.0})
    found = result_files.load(tmp_path)
    assert [results.bench for results in found] == ["merge", "merge"]
    joined = result_files.joined(found)
    ratios = {row["provider"]: joined.over_merge(row) for row in joined.rows}
    assert ratios == {"merge_": 1.0, "eager": 5.0, "published": 30.0}
    text = tables.merge_table(joined)
    assert "| network | dtype | layers | published | eager | `merge_` | `merge_` / floor |" in text
    assert "| VGG19 | float32 | 6 | 900 µs / - | 50 µs / - | 10 µs / - | 1.0 / - |" in text
    assert found[1].over_merge(found[1].rows[0]) == 30.0
    assert found[0].over_merge(row("published", 1.0) | {"net": "ResNet-50"}) is None


def test_whatever_part_of_a_gpu_run_is_there_is_reported(tmp_path):
    """Every file of a run on a GPU, cut after any number of rows, and with only what comes first in a row."""
    about = {"device": "NVIDIA X", "cuda": "13", "driver": "580", "clocks": "fast", "torch": "2", "triton": "3",
             "python": "3", "threads": 1, "copy_bandwidth_gb_s": 3000.0, "commit": "c", "command": "x"}  # fmt: skip
    device = {"device_us": 12.0, "device_q20_us": 12.0, "device_q80_us": 12.0, "host_us": 9.0}
    merges = [row(provider, 40.0, regime=regime) | {"floor_bytes": 1e6} | more
              for regime in result_files.REGIMES
              for provider, more in (("eager", {}), ("merge_", device))]  # fmt: skip
    series = [{"series": series, "value": value, "dtype": "float32", "regime": regime, "provider": provider,
               "wall_us": 20.0, "floor_us": 5.0, "floor_bytes": 1000 * value} | (device if provider == "merge_" else {})
              for series in ("filters", "elements", "layers", "prob") for value in (1, 2)
              for provider in ("eager sampled", "merge_") for regime in result_files.REGIMES]  # fmt: skip
    floors = {"floor_flops_us": 1.0, "floor_bytes_us": 1.0}
    matches = [{"net": net, "dtype": "float32", "prob": prob, "provider": provider, "wall_us": 30.0} | floors | device
               for net in ("VGG19", "ResNet-50") for prob in (0.3, 1.0)
               for provider in ("eager", "gemm", "match")]  # fmt: skip
    trained = {"net": "ResNet-50", "batch": [64, 3, 224, 224], "step_us": 3e4, "ab_us": 1.0, "ab_low_us": 0.0,
               "ab_high_us": 2.0}  # fmt: skip
    training = [trained, trained | {"net": "VGG19", "merge_device_us": 1.0, "merge_host_us": 1.0, "kept_bytes": 1,
                                    "peak_added_bytes": 1, "share_percent": 0.1}]  # fmt: skip
    hosts = [{"target": target, "layers": layers, "driver": "cuda", "part": part, "host_us": 9.0, "launches": 2}
             for target, layers in (("conv", 1), ("VGG19", 6)) for part in ("merge_", "InMerge.step")]  # fmt: skip
    plots = pytest.importorskip("benchmarks.plots", reason="needs matplotlib", exc_type=ImportError)
    compile_failed = {"net": "VGG19", "dtype": "float32", "provider": "compile", "form": "dense", "error": "E: no"}
    forwards = [row(provider, 40.0) | {"merge_us": 20.0} | more
                for provider, more in (("eager", {}), ("merged", device))]  # fmt: skip
    everything = {
        "merge": merges,
        "forward": forwards,
        "scaling": series,
        "match": matches,
        "training": training,
        "host": hosts,
    }
    for bench, rows in everything.items():
        for columns in (set(), set(device) if bench != "host" else set()):
            for cut in range(len(rows) + 1):
                kept = [{key: value for key, value in row.items() if key not in columns} for row in rows[:cut]]
                path = result_files.RESULTS / "NVIDIA-X" / f"{bench}.json"
                results = result_files.Results(path, bench, about, kept, [compile_failed], complete=False)
                text = report.render([results])
                assert "nan" not in text
                assert "**interrupted**" in text
                assert "- not measured: VGG19, float32, compile, dense: E: no" in text
                if cut in (0, 1, len(rows)):
                    drawn = list(plots.draw_all([results], tmp_path))
                    linked = [path.name for path in drawn if f"plots/{path.name})" in text]
                    assert len(linked) == len(drawn) == text.count("](results/plots"), bench


def row(provider, wall, *, net="VGG19", device=None, regime="all pass", layers=6):
    row = {"net": net, "dtype": "float32", "regime": regime, "provider": provider, "layers": layers, "wall_us": wall,
           "floor_us": 10.0}  # fmt: skip
    return row if device is None else row | {"device_us": device}


def results_of(rows, *, gpu, bench="merge", device="d"):
    about = {"device": device, "commit": "c"} | ({"cuda": "13"} if gpu else {})
    return result_files.Results(result_files.RESULTS / "x.json", bench, about, rows)


def test_targets_take_the_worst_figure_and_say_what_was_not_measured():
    found = [results_of([
        row("merge_", 50.0, device=13.0), row("merge_", 50.0, net="ResNet-50", device=20.0, layers=43),
        row("published", 60_000.0), row("eager sampled", 900.0, net="ResNet-50", layers=43),
    ], gpu=True)]  # fmt: skip
    aims = {target.what: target for target in targets.merge_targets(found)}
    device = aims["GPU device time over its floor: VGG19, ResNet-50, 3D ResNet-18, float32, all pass"]
    assert device.measured == 2.0
    assert not device.reached
    published = aims["GPU wall time, VGG19: `published` over `merge_`"]
    assert published.measured == 1200
    assert published.reached
    assert not aims["GPU wall time, nets of 40 and more layers: `eager sampled` over `merge_`"].reached
    assert aims["the same, bfloat16"].measured is None
    text = tables.target_table(aims.values())
    assert f"| {targets.NOT_MEASURED} | open |" in text
    assert "**missed**" in text


def test_forward_only_merging_is_held_to_its_own_floor_and_compared_with_its_own_providers():
    rows = [row("merged", 12.0), row("eager sampled", 30.0), row("merged", 20.0, net="DenseNet-121"),
            row("eager sampled", 30.0, net="DenseNet-121")]  # fmt: skip
    gpu, wide, short, eager = targets.forward_targets([results_of(rows, gpu=False, bench="forward")])
    assert gpu.measured is None
    assert (wide.measured, short.measured, eager.measured) == (1.2, 2.0, 1.5)
    assert not any(target.measured for target in targets.forward_targets([results_of(rows, gpu=False)]))
    both = [results_of([row("merged", 99.0, device=14.0)], gpu=True, bench="forward")]
    assert targets.forward_targets(both)[0].measured == 1.4
    trained = [{"net": "ResNet-50", "share_percent": share, "merging": merging}
               for share, merging in ((0.2, "lasting"), (0.9, "forward-only"))]  # fmt: skip
    assert targets.training_targets([results_of(trained, gpu=True, bench="training")])[0].measured == 0.2


def test_match_targets_compare_the_search_of_all_pairs_with_its_products():
    def row(provider, device, wall=900.0, net="VGG19", prob=1.0):
        return {
            "net": net,
            "dtype": "float32",
            "prob": prob,
            "provider": provider,
            "device_us": device,
            "wall_us": wall,
        }

    assert all(target.measured is None for target in targets.match_targets([]))
    rows = [row("gemm", 40.0), row("match", 50.0, 100.0), row("match", 1.0, prob=0.3), row("eager", 500.0),
            row("match", 250.0, net="ResNet-50", wall=300.0), row("eager", 2000.0, net="ResNet-50")]  # fmt: skip
    products, resnet, eager = targets.match_targets([results_of(rows, gpu=True, bench="match")])
    assert (products.measured, products.reached) == (1.25, True)
    assert (resnet.measured, resnet.reached) == (250.0, False)
    assert (eager.measured, eager.reached) == (3.0, False)
    assert not any(t.measured for t in targets.match_targets([results_of(rows, gpu=False, bench="match")]))


def host(part, target, layers, us, driver="stub", **more):
    return {"part": part, "target": target, "layers": layers, "host_us": us, "driver": driver} | more


def test_host_times_are_held_to_a_bound_on_its_own_machine_and_reported_elsewhere():
    rows = [host("merge_", "conv", 1, 11.0), host("merge_", "VGG19", 6, 12.0), host("merge_", "ResNet-50", 43, 19.0)]
    amd = results_of(rows, gpu=False, bench="host", device="AMD EPYC")
    intel = results_of(rows, gpu=False, bench="host", device="Intel")
    real = results_of([host("merge_", "conv", 1, 14.0, driver="cuda")], gpu=True, bench="host", device="NVIDIA")
    found = targets.host_targets([amd, intel])[2:]
    assert [target.measured for target in found] == [None] * 3 + [11.0, 19.0, None] * 2
    assert [target.outcome for target in found] == ["open"] * 3 + ["**missed**", "reached", "open"] + [
        "reported"
    ] * 2 + ["open"]
    text = tables.target_table(found)
    assert "one convolution | ≤ 10 µs | 11 µs (Intel, commit c) | reported |" in text
    on_gpu = targets.host_targets([real, amd])[2:]
    assert [(target.measured, target.outcome) for target in on_gpu[:2]] == [(14.0, "reached"), (None, "open")]
    assert "on a machine with a GPU" in on_gpu[0].what


def test_cpu_targets_take_the_worst_of_their_nets_and_dtypes():
    def rows(dtype, wall, provider="merge_", **more):
        return [row(provider, wall, net=net, regime=regime) | {"dtype": dtype} | more
                for net in targets.WIDE for regime in result_files.REGIMES]  # fmt: skip

    merged = [*rows("float32", 12.0), *rows("bfloat16", 15.0), *rows("float16", 19.0)]
    slow = row("compile", 45.0, net="ResNet-18") | {"merge_us": 30.0}
    found = [results_of([*merged, *rows("float32", 500.0, "published"), slow], gpu=False)]
    aims = {target.what: target for target in targets.cpu_targets(found)}
    wide = "VGG19, ResNet-18, 3D ResNet-18"
    assert aims[f"CPU wall time over its floor: {wide}, float32, all pass"].measured == 1.2
    halves = aims[f"CPU wall time over its floor: {wide}, bfloat16 and float16, all pass"]
    assert (halves.measured, halves.reached) == (1.9, False)
    assert aims["CPU wall time, every float32 row: `published` over `merge_`"].measured == 500 / 12
    compile_ = aims["CPU wall time, every row where it runs: `compile` over `merge_`"]
    assert (compile_.measured, compile_.reached) == (1.5, False), "over merge_ in its own rounds"
    assert aims["CPU wall time over its floor: ResNet-50, float32, all pass"].outcome == "open"
    assert all(target.measured is None for target in targets.merge_targets(found))


@pytest.mark.parametrize(
    ("two", "floor", "outcome"), [(50.0, 10.0, "reached"), (80.0, 78.0, "reached"), (80.0, 60.0, "**missed**")]
)
def test_two_threads_are_faster_or_at_the_bandwidth(two, floor, outcome):
    rows = [row("merge_, 2 threads", wall, net=net) | {"merge_us": 100.0, "floor_us": floor_, "threads": 2}
            for net, wall, floor_ in (("VGG19", 40.0, 5.0), ("ResNet-50", two, floor))]  # fmt: skip
    target = targets.cpu_targets([results_of(rows, gpu=False)])[-1]
    assert target.measured == 100.0 / two
    assert target.outcome == outcome
    assert ("bandwidth of both cores" in target.where) == (floor == 78.0)


def test_launches_are_the_most_of_any_network():
    rows = [{"part": part, "target": "conv", "layers": 1, "host_us": 10.0, "driver": "stub", "launches": launches}
            for part, launches in (("merge_", 2), ("merge_", 4), ("InMerge.step", 2))]  # fmt: skip
    call, step = targets.host_targets([results_of(rows, gpu=False, bench="host")])[:2]
    assert (call.measured, call.reached) == (4, False)
    assert (step.measured, step.reached) == (2, True)


def test_the_pages_are_in_step_with_the_result_files():
    assert report.main(["--check"]) == 0


def front_row(device, net, provider, wall, gpu):
    about = {"device": device, "torch": "2", "threads": 1} | ({"cuda": "13"} if gpu else {})
    line = {"net": net, "dtype": "float32", "regime": "all pass", "provider": provider, "wall_us": wall}
    return result_files.Results(result_files.RESULTS / device / "merge.json", "merge", about, [line])


def test_the_front_page_has_a_gpu_as_soon_as_one_was_measured():
    cpu = front_row("C", "VGG19", "merge_", 3000.0, gpu=False)
    other = front_row("G", "VGG19", "eager", 50.0, gpu=True)
    ours = front_row("G", "VGG19", "merge_", 20.0, gpu=True)
    assert report.front([]) == "Not yet measured."
    assert report.front([cpu]) == report.front([other, cpu])
    assert "(C, torch 2, 1 thread)" in report.front([cpu])
    text = report.front([other, ours, cpu])
    assert "(G, torch 2; C, torch 2, 1 thread)" in text
    lines = dict(line.strip("| ").split(" | ", 1) for line in text.splitlines() if " | " in line)
    assert lines["VGG19, GPU"].split(" | ") == ["-", "50 µs", "-", "20 µs"]
    assert lines["VGG19, CPU"].split(" | ") == ["-", "-", "-", "3 ms"]
    assert set(lines["ResNet-50, GPU"].split(" | ")) == {"-"}


def test_a_page_that_is_out_of_step_is_noticed(tmp_path, monkeypatch, capsys):
    (tmp_path / "benchmarks").mkdir()
    for name in report.PAGES:
        (tmp_path / name).write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.main(["--check"]) == 1
    said = capsys.readouterr().out
    for name in report.PAGES:
        assert f"{name} is out of step" in said
        assert "old" in (tmp_path / name).read_text()
    with pytest.raises(ValueError, match="must have the lines"):
        report.updated("no markers", "section")


def test_the_plots_are_those_of_the_result_files(tmp_path):
    plots = pytest.importorskip("benchmarks.plots", reason="needs matplotlib", exc_type=ImportError)
    drawn = sorted(plots.draw_all(result_files.load(), tmp_path))
    assert [path.name for path in drawn] == sorted(path.name for path in report.PLOTS.glob("*.svg"))
    constraints = (report.RESULTS.parents[1] / "constraints.txt").read_text()
    (pinned,) = re.findall(r"^matplotlib==([\d.]+)", constraints, re.MULTILINE)
    if (installed := importlib.metadata.version("matplotlib")) != pinned:
        pytest.skip(f"the files are as matplotlib {pinned} draws them, and {installed} is installed")
    for path in drawn:
        assert path.read_bytes() == (report.PLOTS / path.name).read_bytes(), f"{path.name}: run benchmarks.report"
