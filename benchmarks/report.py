"""The README's performance tables and plots, from the result files and nothing else: ``python -m benchmarks.report``.

Replaces what stands between the two ``benchmarks`` markers of README.md, and writes ``benchmarks/results/plots/*.svg``
(``benchmarks/plots.py``). With ``--check`` it writes nothing and fails if the README is not in step with the files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence

from benchmarks.result_files import REGIMES, RESULTS, ROOT, Results, load, slug
from benchmarks.targets import (
    NOT_MEASURED,
    Target,
    host_targets,
    match_targets,
    merge_targets,
    scaling_targets,
    training_targets,
)

PLOTS = RESULTS / "plots"
BEGIN, END = "<!-- benchmarks: begin (python -m benchmarks.report) -->", "<!-- benchmarks: end -->"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def microseconds(value: float | None) -> str:
    """A time with three significant digits and its unit."""
    if value is None:
        return "-"
    if value >= 999.5:
        return f"{value / 1e3:.3g} ms" if value < 999_500 else f"{value / 1e6:.3g} s"
    return f"{value:.3g} µs"


def machine(results: Results) -> str:
    """Where, with what and how a table was measured."""
    about = results.environment
    parts = [f"{results.device}", f"torch {about['torch']}", f"triton {about['triton']}", f"Python {about['python']}"]
    if results.on_gpu:
        parts += [f"driver {about['driver']}", str(about["clocks"])]
    else:
        parts.append(f"{about['threads']} thread{'s' if about['threads'] != 1 else ''}")
    parts += [f"copies at {about['copy_bandwidth_gb_s']:g} GB/s", f"commit {about['commit']}"]
    link = f"[{results.path.name}]({results.path.as_posix()})"
    return f"{', '.join(parts)}; `{about['command']}`; {link}."


def merge_table(results: Results) -> str:
    """Wall time of every provider for every network, all pass / none passes, and ``merge_``'s over the floor."""
    providers = list(dict.fromkeys(row["provider"] for row in results.rows))
    header = ["network", "dtype", "layers", *(f"`{p}`" if p == "merge_" else p for p in providers), "`merge_` / floor"]
    if results.on_gpu:
        header.append("`merge_` on the device (floor)")
    lines = []
    for net, dtype in dict.fromkeys((row["net"], row["dtype"]) for row in results.rows):
        here = {"net": net, "dtype": dtype}
        line = [net, dtype, str(results.pick(**here)[0]["layers"])]
        for provider in providers:
            times = [results.value("wall_us", **here, regime=regime, provider=provider) for regime in REGIMES]
            line.append(" / ".join(map(microseconds, times)) if any(times) else "-")
        column = "device_us" if results.on_gpu else "wall_us"
        ours = [results.pick(**here, regime=regime, provider="merge_")[0] for regime in REGIMES]
        line.append(" / ".join(f"{row[column] / row['floor_us']:.1f}" for row in ours))
        if results.on_gpu:
            line.append(" / ".join(f"{row['device_us']:.1f} ({row['floor_us']:.1f}) µs" for row in ours))
        lines.append(line)
    return table(header, lines)


def training_table(results: Results) -> str:
    """What merging adds to a training step."""
    header = ["network", "batch", "step", "`merge_`", "share of the step", "A/B difference (95 % interval)"]
    if results.on_gpu:
        header += ["host", "peak memory added", "kept"]
    lines = []
    for row in results.rows:
        merge = row["merge_device_us"] if results.on_gpu else row["merge_host_us"]
        line = [
            row["net"], "x".join(map(str, row["batch"])), microseconds(row["step_us"]), microseconds(merge),
            f"{row['share_percent']:.2g} %",
            f"{row['ab_us'] / 1e3:+.2f} ms ({row['ab_low_us'] / 1e3:+.2f} to {row['ab_high_us'] / 1e3:+.2f})",
        ]  # fmt: skip
        if results.on_gpu:
            line += [microseconds(row["merge_host_us"]), f"{row['peak_added_bytes'] / 1e6:.1f} MB",
                     f"{row['kept_bytes'] / 1e6:.1f} MB"]  # fmt: skip
        lines.append(line)
    return table(header, lines)


def host_table(results: Results) -> str:
    """Host time of a call."""
    names = list(dict.fromkeys((row["target"], row["layers"]) for row in results.rows))
    parts = list(dict.fromkeys(row["part"] for row in results.rows))
    lines = []
    for target, layers in names:
        values = [results.value("host_us", target=target, part=part) for part in parts]
        lines.append([target, str(layers), *map(microseconds, values)])
    return table(["target", "layers", *(f"`{p}`" if p == "merge_" else p for p in parts)], lines)


def target_table(targets: Iterable[Target]) -> str:
    """What was aimed at, what was measured, and whether it is reached."""
    lines = []
    for target in targets:
        if target.measured is None:
            outcome = [NOT_MEASURED, "open"]
        else:
            where = f" ({target.where})" if target.where else ""
            outcome = [f"{target.measured:.3g}{target.unit}{where}", "reached" if target.reached else "**missed**"]
        lines.append([target.what, f"{'≤' if target.at_most else '≥'} {target.bound:g}{target.unit}", *outcome])
    return table(["target", "bound", "measured", ""], lines)


def match_table(results: Results) -> str:
    """Time of every provider for every network, for every filter and for the sampled ones."""
    providers = list(dict.fromkeys(row["provider"] for row in results.rows))
    header = ["network", "dtype", "prob", *(f"`{p}`" if p in ("match", "merge_") else p for p in providers),
              "floor by flops", "by bytes"]  # fmt: skip
    column = "device_us" if results.on_gpu else "wall_us"
    lines = []
    for net, dtype, prob in dict.fromkeys((row["net"], row["dtype"], row["prob"]) for row in results.rows):
        rows = {row["provider"]: row for row in results.pick(net=net, dtype=dtype, prob=prob)}
        times = [microseconds(rows[name][column]) if name in rows else "-" for name in providers]
        floors = [microseconds(rows["match"][f"floor_{kind}_us"]) for kind in ("flops", "bytes")]
        lines.append([net, dtype, f"{prob:g}", *times, *floors])
    return table(header, lines)


SECTIONS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "merge": (
        "Wall time of one merge of the layers after the tenth convolution, from call to done, cold cache, α = 0.8, "
        "p = 0.3; every sampled pair merges / none does. The floor is the time of a copy of the bytes that the draw "
        "must move.",
        merge_table,
    ),
    "training": ("What merging adds to a whole training step where every sampled pair merges.", training_table),
    "match": (
        'Finding the nearest partner of every sampled filter (`match`), and `merge_(partner="nearest")` as a whole, '
        "against normalising, multiplying and taking the argmax of all filters layer by layer (eager, and compiled), "
        "and the matrix products alone (gemm); device time on a GPU, wall time on a CPU.",
        match_table,
    ),
    "host": ("Time until a call returns, its target checked and everything queued, with a cached plan.", host_table),
}


def render(found: Sequence[Results]) -> str:
    """The README's section between the markers."""
    parts = []
    for device in dict.fromkeys(results.device for results in found):
        here = {results.bench: results for results in found if results.device == device}
        parts.append(f"### On {'a GPU' if next(iter(here.values())).on_gpu else 'a CPU'}: {device}")
        for bench, (caption, make) in SECTIONS.items():
            if bench not in here:
                continue
            if bench == "host" and any(row["driver"] == "stub" for row in here[bench].rows):
                caption += (
                    " Measured without a GPU over a CUDA driver that does nothing; a real one adds 2 to 3 µs a launch."
                )
            parts += [caption, make(here[bench]), machine(here[bench])]
        for bench, name, title in (
            ("merge", "ratios", "time of every provider over that of `merge_`"),
            ("merge", "floor", "time against the bytes that must move, with the floor"),
            ("scaling", "scaling", "time as the number of filters, elements, layers and p grow"),
        ):
            path = PLOTS / f"{slug(device)}-{name}.svg"
            if bench in here:
                parts.append(f"![{device}: {title}]({path.relative_to(RESULTS.parents[1]).as_posix()})")
    targets = [*merge_targets(found), *match_targets(found), *host_targets(found), *training_targets(found),
               *scaling_targets(found)]  # fmt: skip
    caption = "The worst committed figure of each against what this project aims at; host times machine by machine."
    parts += ["### Targets", caption, target_table(targets)]
    return "\n\n".join(parts)


def updated(readme: str, section: str) -> str:
    """The README with another section between the markers.

    Raises:
        ValueError: the markers are missing.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md must have the lines {BEGIN!r} and {END!r} once each")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Write the README's section and the plots, or check the section."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the README is out of step")
    options = parser.parse_args(arguments)
    found = load()
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = updated(old, render(found))
    if options.check:
        print("README.md is in step" if new == old else "README.md is out of step: run python -m benchmarks.report")
        return int(new != old)
    from benchmarks.plots import draw_all  # needs matplotlib, which the tables do not

    PLOTS.mkdir(parents=True, exist_ok=True)
    for path in draw_all(found, PLOTS):
        print("written", path)
    readme.write_text(new)
    print("README.md", "rewritten" if new != old else "was in step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
