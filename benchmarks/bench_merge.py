"""Time of merging whole networks, every provider beside every other: ``python -m benchmarks.bench_merge``.

The layers after the tenth convolution, the paper's choice, in three dtypes, where every sampled pair merges and where
none does. Wall time from call to done with nothing in cache, all providers interleaved; on a GPU also the device time
of all launches of a call and the host time of queueing them. Each provider is first checked against the reference with
recorded draws; one that is wrong or fails is recorded with its error, and the rest are timed.

In passes, each with a file of its own under ``benchmarks/results/<device>/``, since the slow and the fragile come last:
*eager* (``merge.json``, with ``merge_`` itself), *threads* (``merge-threads.json``: ``merge_`` with two threads, on a
CPU), *published* and *compile*. Each of the last three times ``merge_`` in the same rounds.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

import inmerge_fast
from benchmarks import compiled, providers
from benchmarks.ceilings import copy_bandwidth
from benchmarks.check import Checker
from benchmarks.command import for_each_net, open_file, parser_of, print_row
from benchmarks.device_time import device_times, kernel_times
from benchmarks.providers import Call, Provider
from benchmarks.result_files import ResultFile
from benchmarks.timing import means_of, quantiles, time_interleaved
from benchmarks.work import DTYPES, NETS, REGIMES, Settings, mean_bytes, net_of
from inmerge_fast.paths.triton.draw_ahead import DRAW_AHEAD

COLUMNS = {"net": 16, "series": 13, "value": 10, "dtype": 9, "regime": 11, "provider": 17}
TIMES = ("wall_us", "wall_q20_us", "wall_q80_us", "floor_us", "device_us", "host_us")


def walls_of(provider: Provider, seconds: Mapping[int, float], device: torch.device) -> list[float]:
    """Samples to take the median of."""
    if device.type == "cuda" and provider.exact:
        return means_of(seconds.values(), DRAW_AHEAD)  # one call draws for as many, and would not be seen in a median
    return list(seconds.values())


def time_plan(
    plan: inmerge_fast.MergePlan,
    chosen: Sequence[Provider],
    settings: Settings,
    about: Mapping[str, object],
    options: argparse.Namespace,
    file: ResultFile,
    *,
    beside: Provider | None = None,
    kernels: bool = False,
) -> None:
    """Add a row for each provider: wall times, on a GPU device times, and the floor of the draws that were timed.

    The floor's draws are ``merge_``'s; the others draw as many pairs from other streams.

    Args:
        plan: what is merged; its weights come back as they were.
        chosen: the providers.
        settings: of the merges.
        about: what all rows begin with.
        options: of the command line: device, repeats, seconds and threads.
        file: where rows and failures go.
        beside: timed in the same rounds without a row of its own; its median is ``merge_us`` in the others'.
        kernels: also the device time of each kernel of ``merge_``, a second or two by the profiler.
    """
    device, weights = options.device, plan.weights()
    kept = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def restore() -> None:
        for weight, old in zip(weights, kept, strict=True):
            weight.copy_(old)

    every = {provider.name: provider for provider in ([beside] if beside else []) + list(chosen)}
    named = {
        name: {key: about[key] for key in COLUMNS if key in about} | {"provider": name, "form": provider.form}
        for name, provider in every.items()
    }  # fmt: skip
    calls: dict[str, Call] = {}
    for name, provider in every.items():
        with file.attempt(**named[name]):
            calls[name] = provider.prepare(plan, settings, None)

    def use_threads(name: str) -> None:
        torch.set_num_threads(every[name].threads or options.threads)

    samples = time_interleaved(
        calls, device, repeats=options.repeats, seconds_each=options.seconds, before_round=restore,
        before_call=use_threads,
    )  # fmt: skip
    for name, error in samples.errors.items():
        file.fail(error, **named[name])
    floor = mean_bytes(plan, range(options.repeats), settings)
    rows = {}
    for provider in chosen:
        if provider.name not in samples.seconds:
            continue
        walls, threads = samples.seconds[provider.name], provider.threads or options.threads
        row = {**about, "provider": provider.name, "form": provider.form, "threads": threads, "samples": len(walls)}
        row |= quantiles(walls_of(provider, walls, device), "wall")
        if beside and beside.name in samples.seconds:
            row["merge_us"] = quantiles(walls_of(beside, samples.seconds[beside.name], device), "wall")["wall_us"]
        torch.set_num_threads(threads)
        row |= {"floor_bytes": round(floor), "floor_us": round(floor / copy_bandwidth(device) * 1e6, 3)}
        file.add(row)
        rows[provider] = row
    torch.set_num_threads(options.threads)
    for provider, row in rows.items():
        if device.type == "cuda" and provider.queues:
            restore()
            with file.attempt(**named[provider.name], what="device time"):
                file.extend(row, device_times(calls[provider.name], device, options.repeats))
            if kernels and provider.exact:
                with file.attempt(**named[provider.name], what="time of each kernel"):
                    file.extend(row, {"kernels_us": kernel_times(calls[provider.name], device)})
        print_row(row, {key: width for key, width in COLUMNS.items() if key in row}, TIMES, header=row is file.rows[0])
    restore()


# --- passes


@dataclass(frozen=True)
class Pass:
    """What one pass times: the networks and dtypes unless the command line names others, and the providers."""

    nets: Sequence[str]
    dtypes: Sequence[str]
    candidates: Callable[[inmerge_fast.MergePlan], list[Provider]]


def about_net(name: str, dtype: str, plan: inmerge_fast.MergePlan) -> dict[str, object]:
    """What all rows of a network have in common."""
    return {
        "net": name, "dtype": dtype, "layers": len(plan.layers), "filters": sum(plan.filters), "path": plan.path,
        "weights_bytes": sum(w.numel() * w.element_size() for w in plan.weights()),
    }  # fmt: skip


def run_passes(
    stem: str,
    passes: Mapping[str, Pass],
    wanted: Iterable[str],
    options: argparse.Namespace,
    settings: Mapping[str, object],
    time_net: Callable[[str, str, str, argparse.Namespace, ResultFile], None],
) -> int:
    """Time the networks of the wanted passes, each into a file of its own; the exit status.

    Args:
        stem: name of the file of the eager pass, and the beginning of the others'.
        passes: all passes by name.
        wanted: names of those to run, in this order.
        options: of the command line.
        settings: what the files say of all rows.
        time_net: times one network in one dtype, in the pass of this name.
    """
    status = 0
    for pass_ in wanted:
        file = open_file(options, stem if pass_ == "eager" else f"{stem}-{pass_}", settings)
        chosen = vars(options) | {
            "nets": options.nets or passes[pass_].nets, "dtypes": options.dtypes or passes[pass_].dtypes
        }  # fmt: skip
        for_each_net(argparse.Namespace(**chosen), file, functools.partial(time_net, pass_))
        status |= file.finish()
    return status


def cores() -> int:
    """How many of the CPU's this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def two_threads(plan: inmerge_fast.MergePlan) -> list[Provider]:
    """``merge_`` with two threads.

    Raises:
        RuntimeError: there are no two cores for them.
    """
    if plan.device.type != "cpu" or cores() < 2:
        raise RuntimeError(f"two threads need two cores of a CPU; this is {plan.device} with {cores()}")
    return [replace(providers.MERGE, name="merge_, 2 threads", threads=2)]


PASSES = {
    "eager": Pass(list(NETS), list(DTYPES), lambda _: [providers.EAGER, providers.SAMPLED, providers.MERGE]),
    "threads": Pass(["VGG19", "ResNet-50"], ["float32"], two_threads),
    "published": Pass(list(NETS), providers.PUBLISHED.dtypes, lambda _: [providers.PUBLISHED]),
    "compile": Pass(["VGG19", "ResNet-18", "ResNet-50", "3D ResNet-18"], ["float32", "bfloat16"], compiled.forms_for),
}


def time_net(pass_: str, name: str, dtype: str, options: argparse.Namespace, file: ResultFile) -> None:
    """All rows of one network in one dtype."""
    _model, plan = net_of(name, dtype, options.device)  # the plan keeps no network alive
    candidates = PASSES[pass_].candidates(plan)
    checker, sound = Checker(plan), []
    for provider in candidates:
        with file.attempt(net=name, dtype=dtype, provider=provider.name, form=provider.form):
            checker.check(provider)
            sound.append(provider)
    about = about_net(name, dtype, plan)
    for regime, threshold in REGIMES.items():
        settings = Settings(threshold)
        with file.attempt(net=name, dtype=dtype, regime=regime):
            chosen = [compiled.fastest(sound, plan, settings)] if pass_ == "compile" and sound else sound
            beside = None if pass_ == "eager" else providers.MERGE
            time_plan(plan, chosen, settings, about | {"regime": regime}, options, file, beside=beside, kernels=True)


def main(arguments: list[str] | None = None) -> int:
    """Time all networks, pass by pass, and write the result files."""
    parser = parser_of(__doc__)
    parser.add_argument("--passes", nargs="+", choices=PASSES, metavar="PASS",
                        help="in this order (default: all; no threads on a GPU)")  # fmt: skip
    parser.add_argument("--nets", nargs="+", choices=NETS, metavar="NET", help="default: what each pass is for")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help="likewise")
    options = parser.parse_args(arguments)
    if options.quick:  # compiling is never quick
        options.nets, options.dtypes, options.repeats, options.seconds = ["ConvNeXt-T"], ["float32"], 5, 0.3
        options.passes = options.passes or ["eager", "published"]
    left_out = ["threads"] if options.device.type == "cuda" else []
    wanted = options.passes or [name for name in PASSES if name not in left_out]
    return run_passes("merge", PASSES, wanted, options, {"prob": 0.3, "alpha": 0.8}, time_net)


if __name__ == "__main__":
    sys.exit(main())
