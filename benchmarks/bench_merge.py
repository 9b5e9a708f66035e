"""Time of merging whole networks, every provider beside every other: ``python -m benchmarks.bench_merge``.

The layers after the tenth convolution, the paper's choice, in float32 and bfloat16, where every sampled pair merges and
where none does. Wall time from call to done with nothing in cache, all providers interleaved; on a GPU also the device
time of all launches of a call and the host time of queueing them. Each provider is first checked against the reference
with recorded draws. Writes ``benchmarks/results/<device>/merge.json``.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

import inmerge_fast
from benchmarks import providers
from benchmarks.device_time import device_times, kernel_times
from benchmarks.providers import Call, Provider
from benchmarks.timing import (
    copy_bandwidth,
    environment,
    means_of,
    quantiles,
    time_interleaved,
    wall_seconds,
    write_results,
)
from benchmarks.work import DTYPES, NETS, REGIMES, SKIP_FIRST, Settings, mean_bytes
from inmerge_fast.paths.triton.draw_ahead import DRAW_AHEAD

COMPILED_LAYERS = 12  # compiling all layers of a deeper network as one graph takes minutes, and is not the fastest form
FORM_TRIALS = 5
RECOMPILE_LIMIT = 64  # one graph per shape of layer until the sizes are dynamic; 8, the default, is not enough


def forms_of_compile(plan: inmerge_fast.MergePlan) -> tuple[list[Provider], str]:
    """What torch.compile is tried with, and a note of what is not."""
    reason = providers.why_not_compile(plan.device)
    if reason:
        return [], reason
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    forms = providers.compiled_forms(plan.device)
    if len(plan.layers) <= COMPILED_LAYERS:
        return forms, ""
    note = f"dense forms not compiled for {len(plan.layers)} layers: minutes, and slower than the sampled ones"
    return [form for form in forms if not form.form.startswith("dense")], note


def best_form(forms: Sequence[Provider], plan: inmerge_fast.MergePlan, settings: Settings) -> Provider:
    """The form of torch.compile with the least median of a few trials, of which the first may compile."""

    def trial(form: Provider) -> float:
        call = form.prepare(plan, settings, None)
        return statistics.median(
            wall_seconds(functools.partial(call, step), plan.device) for step in range(FORM_TRIALS)
        )

    return min(forms, key=trial)


def time_plan(
    plan: inmerge_fast.MergePlan,
    chosen: Mapping[str, Provider],
    settings: Settings,
    about: Mapping[str, object],
    repeats: int,
    seconds_each: float,
) -> list[dict[str, object]]:
    """One row for each provider: wall times, on a GPU device times, and the floor of the draws that were timed.

    The floor's draws are ``merge_``'s; the others draw as many pairs from other streams.
    """
    device, weights = plan.device, plan.weights()
    kept = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def restore() -> None:
        for weight, old in zip(weights, kept, strict=True):
            weight.copy_(old)

    calls: dict[str, Call] = {name: provider.prepare(plan, settings, None) for name, provider in chosen.items()}
    samples = time_interleaved(calls, device, repeats=repeats, seconds_each=seconds_each, before_round=restore)
    floor = mean_bytes(plan, range(repeats), settings)
    rows = []
    for name, provider in chosen.items():
        row = {**about, "provider": name, "form": provider.form, "samples": len(samples[name])}
        walls = list(samples[name].values())
        if device.type == "cuda" and provider.exact:
            walls = means_of(walls, DRAW_AHEAD)  # one call draws for as many, and would not be seen in a median
        row |= quantiles(walls, "wall")
        row |= {"floor_bytes": round(floor), "floor_us": round(floor / copy_bandwidth(device) * 1e6, 3)}
        if device.type == "cuda" and provider.queues:
            restore()
            row |= device_times(calls[name], device, repeats).row()
            if provider.exact:
                row["kernels_us"] = kernel_times(calls[name], device)
        rows.append(row)
    restore()
    return rows


def time_net(name: str, dtype: str, device: torch.device, options: argparse.Namespace) -> list[dict[str, object]]:
    """All rows of one network in one dtype."""
    torch.manual_seed(0)
    with torch.device(device):
        model = NETS[name]()
    model = model.to(DTYPES[dtype])
    plan = inmerge_fast.MergePlan(model, skip_first=SKIP_FIRST)
    every = (providers.PUBLISHED, providers.EAGER, providers.SAMPLED, providers.MERGE)
    always = [provider for provider in every if dtype in provider.dtypes]
    compiled = name in options.compile_nets
    forms, note = forms_of_compile(plan) if compiled else ([], "torch.compile left out by --compile-nets")
    providers.check([*always, *forms], plan)
    about = {
        "net": name, "dtype": dtype, "layers": len(plan.layers), "filters": sum(plan.filters), "path": plan.path,
        "weights_bytes": sum(w.numel() * w.element_size() for w in plan.weights()),
    }  # fmt: skip
    rows = []
    for regime, threshold in REGIMES.items():
        settings = Settings(threshold)
        chosen = {provider.name: provider for provider in always}
        if forms:
            chosen["compile"] = best_form(forms, plan, settings)
        rows += time_plan(plan, chosen, settings, about | {"regime": regime, "note": note}, options.repeats,
                          options.seconds)  # fmt: skip
    return rows


def print_rows(rows: Sequence[Mapping[str, object]]) -> None:
    """A table for the terminal."""
    wide = ("net", 16), ("dtype", 9), ("regime", 11), ("provider", 14)
    times = ("wall_us", "wall_q20_us", "wall_q80_us", "floor_us", "device_us", "host_us")
    print(" ".join(f"{name:{width}}" for name, width in wide), " ".join(f"{name:>11}" for name in times), "form")
    for row in rows:
        numbers = (f"{row[name]:11.1f}" if name in row else f"{'-':>11}" for name in times)
        print(" ".join(f"{row[name]:{width}}" for name, width in wide), " ".join(numbers), row["form"])


def parser_of(description: str) -> argparse.ArgumentParser:
    """What the benchmarks of this folder have in common on their command lines."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--repeats", type=int, default=40, help="samples of each provider")
    parser.add_argument("--seconds", type=float, default=3.0, help="slow providers get fewer samples, to take so long")
    parser.add_argument("--quick", action="store_true", help="few samples of little work, to see that all of it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    return parser


def time_nets(
    options: argparse.Namespace,
    time_net: Callable[[str, str, torch.device, argparse.Namespace], list[dict[str, object]]],
    print_rows: Callable[[list[dict[str, object]]], None],
) -> list[dict[str, object]]:
    """Rows of all networks and dtypes that the command line names, printed as they come."""
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.nets:
        for dtype in options.dtypes:
            new = time_net(name, dtype, options.device, options)
            print_rows(new)
            rows += new
            gc.collect()
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Time all networks and write the result file."""
    parser = parser_of(__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), metavar="NET")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE")
    parser.add_argument("--compile-nets", nargs="*", choices=NETS, default=list(NETS), metavar="NET",
                        help="networks that torch.compile is timed with, minutes in all (default: all)")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.quick:
        options.nets, options.dtypes = ["ResNet-18"], ["float32"]
        options.repeats, options.seconds, options.compile_nets = 5, 0.3, []
    rows = time_nets(options, time_net, print_rows)
    about = environment(options.device)
    print("written to", write_results(options.out, "merge", about, {"prob": 0.3, "alpha": 0.8}, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
