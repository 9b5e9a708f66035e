"""The benchmarks measure what they say: providers are checked, floors are those of the draw, failures stay apart."""

from dataclasses import replace

import conftest
import numpy as np
import pytest
import torch

import inmerge_fast
from benchmarks import (
    bench_forward,
    bench_match,
    bench_merge,
    bench_scaling,
    bench_training,
    ceilings,
    compiled,
    device_time,
    forward_only,
    providers,
    report,
    result_files,
    searches,
    timing,
)
from benchmarks.check import Checker
from benchmarks.timing import means_of, time_interleaved
from benchmarks.work import REGIMES, SEED, Settings, bytes_of_draw, mean_bytes

ALL = [providers.PUBLISHED, providers.EAGER, providers.SAMPLED, providers.MERGE]


def plan_of(dtype=torch.float32, filters=48, elements=40):
    torch.manual_seed(1)
    weights = [torch.randn(filters, elements).to(dtype), torch.randn(20, 33).to(dtype)]
    return inmerge_fast.MergePlan(weights), weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_provider_does_what_the_reference_does(dtype):
    plan, weights = plan_of(dtype)
    before = [weight.clone() for weight in weights]
    name = str(dtype).removeprefix("torch.")
    checker = Checker(plan)
    for provider in ALL:
        if name in provider.dtypes:
            checker.check(provider)
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


@pytest.mark.skipif(compiled.why_not(torch.device("cpu")) != "", reason="torch.compile needs a C++ compiler")
def test_the_compiled_forms_do_what_the_reference_does():
    plan, _weights = plan_of()
    checker = Checker(plan)
    forms = [form for form in compiled.forms_for(plan) if form.form.startswith("sampled")]
    assert len(forms) == 2
    for form in forms:
        checker.check(form)


def test_without_a_compiler_there_is_a_reason_and_no_form(monkeypatch):
    plan, _weights = plan_of()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler"):
        compiled.forms_for(plan)


FORWARD = [forward_only.EAGER, forward_only.SAMPLED, forward_only.MERGED]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_of_forward_only_merging_does_what_the_reference_does_and_restores(dtype):
    plan, weights = plan_of(dtype)
    before = [weight.clone() for weight in weights]
    for provider in FORWARD:
        Checker(plan, 0.5).check_restored(provider)
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


@pytest.mark.skipif(compiled.why_not(torch.device("cpu")) != "", reason="torch.compile needs a C++ compiler")
def test_the_compiled_forms_of_forward_only_merging_do_too():
    plan, _weights = plan_of()
    for form in forward_only.forms_for(plan):
        Checker(plan, 0.5).check_restored(form)


@pytest.mark.parametrize("part", [0, 1])
def test_a_provider_of_forward_only_merging_that_is_wrong_is_not_timed(part):
    plan, weights = plan_of()
    before = [weight.clone() for weight in weights]

    def prepare(plan, settings, draws):
        parts = list(forward_only.MERGED.prepare(plan, settings, draws).parts)
        right = parts[part]
        parts[part] = lambda step: (right(step), weights[1][3].mul_(1 + 1e-5))
        return timing.InParts(*parts)

    what = "changed a filter|filters are wrong" if part == 0 else "not restored|left as it is"
    with pytest.raises((AssertionError, RuntimeError), match=what):
        Checker(plan, 0.5).check_restored(providers.Provider("wrong", prepare))
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)), "others come after it"


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
    plan, weights = plan_of()
    before = [weight.clone() for weight in weights]
    with pytest.raises(AssertionError, match=r"wrong, layer .*threshold"):
        Checker(plan).check(providers.Provider("wrong", wrong))
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)), "others come after it"


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
    kept_and_put_back = 3 * (expected[True] - expected[False])
    assert mean_bytes(plan, [7], Settings(-1.0, restores=True)) == expected[True] + kept_and_put_back


def test_the_floor_on_average_is_what_the_docstring_says():
    plan = inmerge_fast.MergePlan([torch.zeros(4000, 2)])
    share = mean_bytes(plan, range(20), Settings(-1.0, 0.5, restores=True)) / (4000 * 2 * 4)
    assert share == pytest.approx(1 - 0.5 * np.exp(-0.5) + 4 * 0.5, rel=0.01)
    assert share == pytest.approx(2.7, abs=0.03)


def test_a_call_in_parts_is_timed_part_by_part_each_with_a_cold_cache(monkeypatch):
    order = []
    monkeypatch.setattr(timing, "cold_cache", lambda _: lambda: order.append("fill"))
    call = timing.InParts(lambda n: order.append(("merge", n)), lambda n: order.append(("restore", n)))
    samples = time_interleaved(
        {"both": call}, torch.device("cpu"), repeats=3, seconds_each=1.0, before_round=lambda: None
    )
    assert len(samples.seconds["both"]) == 3
    assert order[-4:] == ["fill", ("merge", 2), "fill", ("restore", 2)]


def test_providers_are_interleaved_and_slow_ones_get_fewer_samples():
    order, restored = [], []

    def call(name, spins):
        return lambda _: (order.append(name), sum(range(spins)))

    calls = {"slow": call("slow", 2_000_000), "quick": call("quick", 10)}
    samples = time_interleaved(
        calls, torch.device("cpu"), repeats=20, seconds_each=1e-9, before_round=lambda: restored.append(1)
    ).seconds
    assert len(samples["slow"]) == 5
    assert len(order) == sum(map(len, samples.values())) + 4, "two calls of each to warm up"
    assert order[4:6] == ["slow", "quick"]
    assert len(restored) == 22
    assert all(seconds > 0 for taken in samples.values() for seconds in taken.values())


def test_a_call_that_fails_is_left_out_and_the_rest_go_on():
    def fails_late(number):
        if number == 3:
            raise RuntimeError("broken")

    def fails_at_once(_):
        raise ValueError("never")

    calls = {"late": fails_late, "sound": lambda _: None, "never": fails_at_once}
    samples = time_interleaved(
        calls, torch.device("cpu"), repeats=6, seconds_each=1.0, before_round=lambda: None
    )  # fmt: skip
    assert list(samples.seconds) == ["sound"]
    assert len(samples.seconds["sound"]) == 6
    assert {name: str(error) for name, error in samples.errors.items()} == {"late": "broken", "never": "never"}


def test_copies_are_timed_with_the_threads_of_the_moment(monkeypatch):
    seen = []
    monkeypatch.setattr(ceilings, "_copy_bandwidth", lambda device, threads: seen.append(threads))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ceilings.copy_bandwidth(torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2]


class Device:
    """A GPU with a queue of 1024 launches of 3 us each, which a host fills at 4 us a launch, on a clock of its own."""

    LAUNCH, QUEUE, LENGTH = 3e-6, 4e-6, 1024

    def __init__(self):
        self.now, self.ends, self.busy = 0.0, [], 0.0

    def queue(self, seconds):
        self.ends = [end for end in self.ends if end > self.now]
        if len(self.ends) >= self.LENGTH:
            self.now = self.ends[-self.LENGTH]  # until there is room
        self.now += self.QUEUE
        self.busy = max(self.busy, self.now) + seconds
        self.ends.append(self.busy)
        return self.busy

    def pretend(self, monkeypatch):
        device = self

        class Event:
            def __init__(self, **_):
                pass

            def record(self):
                self.at = device.queue(0.0)

            def query(self):
                return device.now >= self.at

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: setattr(device, "now", max(device.now, device.busy)))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: device.queue(cycles / timing.CYCLES_PER_SECOND))
        monkeypatch.setattr(device_time, "cold_cache", lambda _: lambda: device.queue(100e-6))
        monkeypatch.setattr(device_time.time, "perf_counter", lambda: device.now)


@pytest.mark.parametrize(("launches", "queued"), [(2, 12), (80, 12), (200, 4), (1000, 1)])
def test_device_times_are_those_of_the_launches_whatever_the_queue_holds(launches, queued, monkeypatch):
    device, seen = Device(), []
    device.pretend(monkeypatch)
    kept = device_time._queued
    monkeypatch.setattr(device_time, "_queued", lambda *arguments: seen.append(arguments[-1]) or kept(*arguments))

    def call(_):
        for _ in range(launches):
            device.queue(device.LAUNCH)

    times = device_time.device_times(call, torch.device("cuda"), repeats=24)
    assert seen[-1] == queued
    assert times["device_us"] == pytest.approx(launches * 3.0, rel=1e-3)
    assert times["host_us"] == pytest.approx(launches * 4.0, rel=1e-3)
    if launches < 1000:  # two such calls do not fit
        in_parts = device_time.device_times(timing.InParts(call, call), torch.device("cuda"), repeats=12)
        assert in_parts["device_us"] == pytest.approx(2 * launches * 3.0, rel=1e-3), "without what fills the cache"
        assert in_parts["host_us"] == pytest.approx(2 * launches * 4.0, rel=1e-3)


def test_a_call_that_does_not_fit_the_queue_has_no_device_time(monkeypatch):
    device = Device()
    device.pretend(monkeypatch)
    with pytest.raises(device_time.QueueOverflowError):
        device_time.device_times(
            lambda _: [device.queue(device.LAUNCH) for _ in range(1100)], torch.device("cuda"), repeats=8
        )


@pytest.mark.parametrize(
    ("bench", "columns"),
    [
        (
            bench_merge,
            {"net", "dtype", "regime", "provider", "wall_us", "floor_us", "floor_bytes", "samples", "threads"},
        ),
        (bench_match, {"net", "dtype", "prob", "provider", "wall_us", "floor_flops_us", "floor_bytes_us", "flops"}),
        (bench_forward, {"net", "dtype", "provider", "wall_us", "floor_us", "floor_bytes", "merge_us"}),
        (bench_scaling, {"series", "value", "provider", "wall_us", "floor_us"}),
        (bench_training, {"net", "step_us", "merge_host_us", "ab_us", "ab_low_us", "ab_high_us", "share_percent"}),
    ],
    ids=["merge", "match", "forward", "scaling", "training"],
)
def test_quick_runs_write_what_the_report_reads(bench, columns, tmp_path, capsys):
    assert bench.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = result_files.load(tmp_path)
    assert found
    for results in found:
        assert all(columns <= set(row) for row in results.rows)
        assert results.rows
        assert results.complete
        assert not results.failures
        assert {"commit", "torch", "triton", "command", "copy_bandwidth_gb_s", "device", "date", "load"} <= set(
            results.environment
        )
        assert not results.on_gpu
    section = report.render(found)
    assert "nan" not in section.lower()
    assert "written to" in capsys.readouterr().out


def test_training_with_forward_only_merging_has_a_file_of_its_own(tmp_path):
    for more in ([], ["--forward-only"]):
        assert bench_training.main(["--quick", *more, "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = result_files.load(tmp_path)
    assert [results.path.stem for results in found] == ["training", "training-forward"]
    assert [row["merging"] for results in found for row in results.rows] == ["lasting", "forward-only"]
    assert "| ResNet-18 | 2x3x32x32 | forward-only |" in report.render(found)


def test_slow_and_fragile_passes_have_files_of_their_own_and_time_merge_beside_them(tmp_path):
    passes = ["published", "threads"] if bench_merge.cores() > 1 else ["published"]
    assert bench_merge.main(["--quick", "--device", "cpu", "--passes", *passes, "--out", str(tmp_path)]) == 0
    found = result_files.load(tmp_path)
    assert [results.path.stem for results in found] == [f"merge-{name}" for name in passes]
    for results in found:
        assert {row["regime"] for row in results.rows} == set(REGIMES)
        assert all(row["provider"] != "merge_" and row["merge_us"] > 0 for row in results.rows)
    if len(found) == 2:
        assert {row["threads"] for row in found[1].rows} == {2}
    assert torch.get_num_threads() == 1


def test_a_provider_that_fails_is_recorded_and_the_rest_are_timed(tmp_path, monkeypatch, capsys):
    def prepare(plan, settings, draws):
        if draws is None:
            raise RuntimeError("no memory left\nand more")
        return sampled.prepare(plan, settings, draws)

    monkeypatch.setattr(providers, "EAGER", providers.Provider("eager", _touches_others))
    sampled = providers.SAMPLED
    monkeypatch.setattr(providers, "SAMPLED", replace(sampled, prepare=prepare))
    assert bench_merge.main(["--quick", "--device", "cpu", "--passes", "eager", "--out", str(tmp_path)]) == 1
    (results,) = result_files.load(tmp_path)
    assert {row["provider"] for row in results.rows} == {"merge_"}
    assert len(results.rows) == len(REGIMES)
    assert results.complete
    wrong, first, second = results.failures
    assert wrong["error"].startswith("AssertionError: eager, layer ")
    assert (first["regime"], second["regime"]) == tuple(REGIMES)
    assert first["error"] == "RuntimeError: no memory left"
    assert (
        "- not measured: ConvNeXt-T, float32, all pass, eager sampled: RuntimeError: no memory left"
        in report.render([results])
    )
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("interpreted", [False, pytest.param(True, marks=pytest.mark.interpreted)])
def test_searches_are_checked_and_a_wrong_one_is_not_timed(interpreted, monkeypatch):
    if interpreted:
        pytest.importorskip("triton")
        from interpreter import apply_fixes

        apply_fixes()
        monkeypatch.setenv("INMERGE_INTERPRET", "1")
    plan, _weights = plan_of()
    assert plan.path == ("triton" if interpreted else "cpu" if conftest.CPU_KERNEL else "eager")
    eager = searches.eager(plan)
    searches.check(plan, "eager", eager)
    searches.check(plan, "match", searches.found_by_match(plan))
    with pytest.raises(AssertionError, match="match, layer .*: off by"):
        searches.check(plan, "match", lambda: [found.roll(1) for found in eager()])


def test_the_floors_of_a_search_are_its_flops_and_bytes():
    plan, _weights = plan_of()
    floors = bench_match.floors(plan, 0.5, rate=1e6)
    flops = 2 * (48 * 48 * 40 + 20 * 20 * 33)
    assert floors["flops"] == flops
    assert floors["floor_flops_us"] == pytest.approx(0.5 * flops)
    assert floors["floor_bytes_us"] > 0


def test_samples_are_averaged_over_as_many_calls_as_are_drawn_for():
    assert means_of([1, 2, 3, 10, 5, 5, 5, 5, 9], 4) == [4.0, 5.0]
    assert means_of([1, 2], 4) == [1.5]
