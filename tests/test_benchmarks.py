"""The benchmarks measure what they say: providers are checked, floors are those of the draw, the report is in step."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import inmerge_fast
from benchmarks import bench_match, bench_merge, bench_scaling, bench_training, providers, report, result_files, targets
from benchmarks.timing import means_of, time_interleaved, write_results
from benchmarks.work import REGIMES, SEED, Settings, bytes_of_draw, mean_bytes

ALL = [providers.PUBLISHED, providers.EAGER, providers.SAMPLED, providers.MERGE]


def plan_of(dtype=torch.float32, filters=48, elements=40):
    torch.manual_seed(1)
    weights = [torch.randn(filters, elements).to(dtype), torch.randn(20, 33).to(dtype)]
    return inmerge_fast.MergePlan(weights), weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_does_what_the_reference_does(dtype):
    plan, weights = plan_of(dtype)
    before = [weight.clone() for weight in weights]
    name = str(dtype).removeprefix("torch.")
    providers.check([p for p in ALL if name in p.dtypes], plan)
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


@pytest.mark.skipif(providers.why_not_compile(torch.device("cpu")) != "", reason="torch.compile needs a C++ compiler")
def test_the_compiled_forms_do_what_the_reference_does():
    plan, _weights = plan_of()
    torch._dynamo.reset()
    providers.check([form for form in providers.compiled_forms(plan.device) if form.form.startswith("sampled")], plan)


def _reads_what_was_written(plan, settings, draws):
    weights = plan.weights()

    def call(_):
        for weight, (coin, partner) in zip(weights, draws, strict=True):
            for i in np.flatnonzero(coin):
                if torch.cosine_similarity(weight[i], weight[partner[i]], dim=0) > settings.threshold:
                    weight[i] = settings.alpha * weight[i] + (1 - settings.alpha) * weight[partner[i]]

    return call


def _touches_others(plan, settings, draws):
    call = providers.MERGE.prepare(plan, settings, draws)
    return lambda step: (call(step), plan.weights()[0].mul_(1 + 1e-6))


def _decides_otherwise(plan, settings, draws):
    other = (
        settings if settings.threshold in REGIMES.values() else replace(settings, threshold=settings.threshold + 0.1)
    )
    return providers.MERGE.prepare(plan, other, draws)


def _another_alpha(plan, settings, draws):
    return providers.MERGE.prepare(plan, replace(settings, alpha=0.8001), draws)


@pytest.mark.parametrize("wrong", [_reads_what_was_written, _touches_others, _decides_otherwise, _another_alpha])
def test_a_wrong_provider_is_not_timed(wrong):
    plan, _weights = plan_of()
    with pytest.raises(AssertionError, match=r"wrong, layer .*threshold"):
        providers.check([providers.Provider("wrong", wrong)], plan)


def test_bytes_of_a_draw_are_the_unique_reads_and_the_writes():
    plan, weights = plan_of(torch.bfloat16)
    expected = {True: 0, False: 0}
    for index, weight in enumerate(weights):
        coin, partner = inmerge_fast.draw(SEED, 7, index, len(weight), 0.3)
        read = {i for i in range(len(weight)) if coin[i]} | {int(partner[i]) for i in range(len(weight)) if coin[i]}
        for writes in expected:
            expected[writes] += 2 * weight.shape[1] * (len(read) + (int(coin.sum()) if writes else 0))
    for writes, bytes_ in expected.items():
        assert bytes_of_draw(plan, 7, 0.3, writes=writes) == bytes_
    assert mean_bytes(plan, [7], Settings(REGIMES["all pass"])) == expected[True]
    assert mean_bytes(plan, [7], Settings(REGIMES["none passes"])) == expected[False]


def test_providers_are_interleaved_and_slow_ones_get_fewer_samples():
    order, restored = [], []

    def call(name, spins):
        return lambda _: (order.append(name), sum(range(spins)))

    calls = {"slow": call("slow", 2_000_000), "quick": call("quick", 10)}
    samples = time_interleaved(
        calls, torch.device("cpu"), repeats=20, seconds_each=1e-9, before_round=lambda: restored.append(1)
    )
    assert len(samples["slow"]) == 5
    assert len(order) == sum(map(len, samples.values())) + 4, "two calls of each to warm up"
    assert order[4:6] == ["slow", "quick"]
    assert len(restored) == 22
    assert all(seconds > 0 for taken in samples.values() for seconds in taken.values())


def test_results_are_rewritten_whole_or_not_at_all(tmp_path):
    about = {"device": "Some(R) Device"}
    path = write_results(tmp_path, "merge", about, {}, [{"a": 1}, {"a": 2}])
    assert path == tmp_path / "Some-Device" / "merge.json"
    write_results(tmp_path, "merge", about, {}, [{"a": 3}])
    assert json.loads(path.read_text())["rows"] == [{"a": 3}]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(tmp_path, "merge", about, {}, [{"a": float("nan")}])
    assert json.loads(path.read_text())["rows"] == [{"a": 3}]


@pytest.mark.parametrize(
    ("bench", "columns"),
    [
        (bench_merge, {"net", "dtype", "regime", "provider", "wall_us", "floor_us", "floor_bytes", "samples"}),
        (bench_match, {"net", "dtype", "prob", "provider", "wall_us", "floor_flops_us", "floor_bytes_us", "flops"}),
        (bench_scaling, {"series", "value", "provider", "wall_us", "floor_us"}),
        (bench_training, {"net", "step_us", "merge_host_us", "ab_us", "ab_low_us", "ab_high_us", "share_percent"}),
    ],
    ids=["merge", "match", "scaling", "training"],
)
def test_quick_runs_write_what_the_report_reads(bench, columns, tmp_path, capsys):
    assert bench.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (results,) = result_files.load(tmp_path)
    assert all(columns <= set(row) for row in results.rows)
    assert {"commit", "torch", "triton", "command", "copy_bandwidth_gb_s", "device", "date"} <= set(results.environment)
    assert not results.on_gpu
    section = report.render([results])
    assert "nan" not in section.lower()
    assert "written to" in capsys.readouterr().out


def row(provider, wall, *, net="VGG19", device=None, regime="all pass", layers=6):
    row = {"net": net, "dtype": "float32", "regime": regime, "provider": provider, "layers": layers, "wall_us": wall,
           "floor_us": 10.0}  # fmt: skip
    return row if device is None else row | {"device_us": device}


def results_of(rows, *, gpu, bench="merge"):
    about = {"device": "d", "commit": "c"} | ({"cuda": "13"} if gpu else {})
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
    text = report.target_table(aims.values())
    assert f"| {report.NOT_MEASURED} | open |" in text
    assert "**missed**" in text


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


@pytest.mark.parametrize("interpreted", [False, pytest.param(True, marks=pytest.mark.interpreted)])
def test_searches_are_checked_and_a_wrong_one_is_not_timed(interpreted, monkeypatch):
    if interpreted:
        pytest.importorskip("triton")
        from interpreter import apply_fixes

        apply_fixes()
        monkeypatch.setenv("INMERGE_INTERPRET", "1")
    plan, _weights = plan_of()
    assert plan.path == ("triton" if interpreted else "eager")
    searches = {"eager": bench_match.eager(plan), "match": bench_match.found_by_match(plan)}
    bench_match.check(plan, searches)
    with pytest.raises(AssertionError, match="match, layer .*: off by"):
        bench_match.check(plan, {"match": lambda: [found.roll(1) for found in searches["eager"]()]})


def test_the_floors_of_a_search_are_its_flops_and_bytes():
    plan, _weights = plan_of()
    floors = bench_match.floors(plan, 0.5, rate=1e6)
    flops = 2 * (48 * 48 * 40 + 20 * 20 * 33)
    assert floors["flops"] == flops
    assert floors["floor_flops_us"] == pytest.approx(0.5 * flops)
    assert floors["floor_bytes_us"] > 0


def test_host_targets_prefer_a_gpu_and_name_the_stub():
    stub = results_of(
        [{"part": "merge_", "target": "conv", "layers": 1, "host_us": 10.0, "driver": "stub"}], gpu=False, bench="host"
    )
    real = results_of(
        [{"part": "merge_", "target": "conv", "layers": 1, "host_us": 14.0, "driver": "cuda"}], gpu=True, bench="host"
    )
    row = report.target_table([targets.host_targets([stub])[2]])
    assert "| 10 µs (d, commit c, over a driver that does nothing, not yet measured on a GPU) | reached |" in row
    assert targets.host_targets([stub, real])[2].measured == 14.0
    assert "| 14 µs (d, commit c) | reached |" in report.target_table([targets.host_targets([stub, real])[2]])
    assert [target.measured for target in targets.host_targets([stub, stub])] == [None, None, *(10.0, None, None) * 2]


def test_samples_are_averaged_over_as_many_calls_as_are_drawn_for():
    assert means_of([1, 2, 3, 10, 5, 5, 5, 5, 9], 4) == [4.0, 5.0]
    assert means_of([1, 2], 4) == [1.5]


def test_launches_are_the_most_of_any_network():
    rows = [{"part": part, "target": "conv", "layers": 1, "host_us": 10.0, "driver": "stub", "launches": launches}
            for part, launches in (("merge_", 2), ("merge_", 4), ("InMerge.step", 2))]  # fmt: skip
    call, step = targets.host_targets([results_of(rows, gpu=False, bench="host")])[:2]
    assert (call.measured, call.reached) == (4, False)
    assert (step.measured, step.reached) == (2, True)


def test_the_readme_is_in_step_with_the_result_files():
    assert report.main(["--check"]) == 0


def test_a_readme_that_is_out_of_step_is_noticed(tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.main(["--check"]) == 1
    assert "out of step" in capsys.readouterr().out
    assert "old" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="must have the lines"):
        report.updated("no markers", "section")


def test_the_plots_are_those_of_the_result_files(tmp_path):
    plots = pytest.importorskip("benchmarks.plots", reason="needs matplotlib", exc_type=ImportError)
    drawn = sorted(plots.draw_all(result_files.load(), tmp_path))
    assert [path.name for path in drawn] == sorted(path.name for path in report.PLOTS.glob("*.svg"))
    for path in drawn:
        assert path.read_bytes() == (report.PLOTS / path.name).read_bytes(), f"{path.name}: run benchmarks.report"
