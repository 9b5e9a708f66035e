"""Device time of a merge under other choices of the merge kernel's constants: ``python -m benchmarks.bench_tuning``.

What only a GPU can decide: programs per multiprocessor, registers, elements of a block with the warps that work on it,
blocks that are kept in registers (SPAN), and the block of strided filters. One choice at a time beside the launcher's
own, on networks, and on layers of filters of one length, where one choice takes over from another: there are the
cut-offs between them. Never on live weights: every trial merges again. Writes
``benchmarks/results/<device>/tuning.json``; what wins goes into ``inmerge_fast/paths/triton/handle.py`` by hand
(``MERGE_SHAPES``, ``MERGE_REGISTERS``, ``STRIDED_BLOCK``, :func:`merge_programs`), with a note.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping

import torch

import inmerge_fast
from benchmarks.ceilings import copy_bandwidth
from benchmarks.command import open_file, parser_of, print_row
from benchmarks.device_time import device_times
from benchmarks.result_files import ResultFile
from benchmarks.work import REGIMES, SEED, Layers, Settings, mean_bytes, net_of

NETS = ("VGG19", "ResNet-50", "DenseNet-121", "EfficientNet-B0")
STRIDED_NETS = ("VGG19", "DenseNet-121")  # channels_last
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)  # elements of a filter
LAYER, BYTES = 512, 1 << 25  # filters of a layer, and of all layers, whatever the length
PROGRAMS_PER_SM = (4, 8, 12, 16, 24, 32, 48)
MAXNREG = (64, 72, 80, 88)
# BLOCK, warps, SPAN, and the fewest registers with which ptxas (Triton 3.7.1) spills nothing on an H100: with 4
# elements of a block for each thread, then with 8.
SHAPES = (
    (128, 1, 1, 56), (128, 1, 3, 72), (128, 1, 4, 88), (128, 1, 5, 88),
    (256, 2, 1, 56), (256, 2, 3, 56), (256, 2, 4, 64), (256, 2, 5, 80),
    (512, 4, 1, 56), (512, 4, 3, 56), (512, 4, 4, 64), (512, 4, 5, 80),
    (1024, 8, 1, 56), (1024, 8, 3, 56), (1024, 8, 4, 72),
    (256, 1, 1, 64), (256, 1, 3, 104), (512, 2, 1, 64), (512, 2, 3, 96), (1024, 4, 1, 64),
)  # fmt: skip
STRIDED_BLOCKS = (128, 256, 512)
CHOICE = ("per_sm", "BLOCK", "num_warps", "SPAN", "maxnreg", "STRIDED_BLOCK")
COLUMNS = {"work": 24} | {name: max(6, len(name)) for name in CHOICE}


def choices(*, strided: bool, quick: bool) -> Iterator[dict[str, int]]:
    """The launcher's own choice, then others, those first that need no compiling."""
    yield {}
    if strided:
        yield from ({"STRIDED_BLOCK": block} for block in STRIDED_BLOCKS)
        return
    yield from ({"per_sm": count} for count in PROGRAMS_PER_SM)
    yield from ({"maxnreg": count} for count in MAXNREG)
    for shape in SHAPES[:4] if quick else SHAPES:
        yield dict(zip(("BLOCK", "num_warps", "SPAN", "maxnreg"), shape, strict=True))


def work(device: torch.device, *, quick: bool) -> Iterator[tuple[str, object, inmerge_fast.MergePlan]]:
    """What is merged, all in float32: its name, what keeps its weights alive, and its plan."""
    for name in ("ConvNeXt-T",) if quick else NETS:
        yield name, *net_of(name, "float32", device)
    for elements in LENGTHS[:1] if quick else LENGTHS:
        layers = Layers("", 0, LAYER, elements, BYTES // (4 * elements * LAYER))
        weights = layers.weights(device)
        yield f"{elements} elements", weights, inmerge_fast.MergePlan(weights)
    for name in () if quick else STRIDED_NETS:
        model, plan = net_of(name, "float32", device)
        model.to(memory_format=torch.channels_last)
        yield f"{name}, channels_last", model, plan


def time_choice(
    plan: inmerge_fast.MergePlan, choice: Mapping[str, int], device: torch.device, repeats: int
) -> dict[str, float]:
    """Device and host time of a call in which all pairs pass."""
    launcher, settings = plan.paths.triton.launcher(plan.weights()), Settings(REGIMES["all pass"])
    numbers = {"prob": settings.prob, "alpha": settings.alpha, "threshold": settings.threshold, "dry_run": False}
    overrides = {name: value for name, value in choice.items() if name != "per_sm"}
    if "per_sm" in choice:
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        overrides["programs"] = min(multiprocessors * choice["per_sm"], launcher.rows)
    return device_times(lambda step: launcher.run(SEED, step, **numbers, **overrides), device, repeats)


def time_work(
    name: str, plan: inmerge_fast.MergePlan, options: argparse.Namespace, file: ResultFile
) -> list[dict[str, object]]:
    """Add the rows of all choices on one work; returns them."""
    floor = mean_bytes(plan, range(options.repeats), Settings(REGIMES["all pass"])) / copy_bandwidth(options.device)
    about = {"work": name, "filters": sum(plan.filters), "floor_us": round(floor * 1e6, 2)}
    rows = []
    for choice in choices(strided="channels_last" in name, quick=options.quick):
        with file.attempt(work=name, **choice):
            row = about | choice | time_choice(plan, choice, options.device, options.repeats)
            file.add(row)
            rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Time all choices and write the result file."""
    parser = parser_of(__doc__)
    parser.set_defaults(repeats=20)
    options = parser.parse_args(arguments)
    if options.device.type != "cuda":
        print("bench_tuning needs a CUDA device: nothing was measured")
        return 0
    if options.quick:
        options.repeats = 4
    file = open_file(options, "tuning", {"prob": Settings.prob, "alpha": Settings.alpha, "dtype": "float32"})
    header = True
    for name, _kept, plan in work(options.device, quick=options.quick):
        with file.attempt(work=name):
            own, *others = time_work(name, plan, options, file)
            for row in [own, *sorted(others, key=lambda row: row["device_us"])[:4]]:  # the rest is in the file
                shown = {key: row.get(key, "") for key in CHOICE} | row
                print_row(shown, COLUMNS, ("device_us", "floor_us"), header=header)
                header = False
    return file.finish()


if __name__ == "__main__":
    sys.exit(main())
