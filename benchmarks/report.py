"""The performance tables and plots, from the result files and nothing else: ``python -m benchmarks.report``.

Replaces what stands between the two ``benchmarks`` markers of README.md (three networks) and of benchmarks/README.md
(all there is), and writes ``benchmarks/results/plots/*.svg`` (``benchmarks/plots.py``). What an interrupted run has
measured is reported like all else. With ``--check`` it writes nothing and fails if a page is not in step with them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import markers
from benchmarks.helps import parser_with
from benchmarks.result_files import RESULTS, ROOT, Results, by_device, joined, load, slug
from benchmarks.tables import (
    FRONT_NETS,
    forward_table,
    front_table,
    host_table,
    match_table,
    merge_table,
    target_table,
    training_table,
)
from benchmarks.targets import (
    cpu_targets,
    forward_targets,
    host_targets,
    match_targets,
    merge_targets,
    scaling_targets,
    training_targets,
)

PLOTS = RESULTS / "plots"
BEGIN, END = "<!-- benchmarks: begin (python -m benchmarks.report) -->", "<!-- benchmarks: end -->"
NAMING = ("net", "target", "series", "value", "dtype", "regime", "prob", "provider", "form", "part", "what")


def link(path: Path) -> str:
    """To a file of the repository, from benchmarks/README.md."""
    return path.relative_to("benchmarks").as_posix() if path.is_relative_to("benchmarks") else path.as_posix()


def machine(passes: Sequence[Results]) -> str:
    """Where, with what and how a table was measured, one command a pass."""
    about, on_gpu = passes[0].environment, passes[0].on_gpu
    parts = [passes[0].device, f"torch {about['torch']}", f"triton {about['triton']}", f"Python {about['python']}"]
    if on_gpu:
        parts += [f"driver {about['driver']}", str(about["clocks"])]
    else:
        parts.append(f"{about['threads']} thread{'s' if about['threads'] != 1 else ''}")
    parts += [f"copies at {about['copy_bandwidth_gb_s']:g} GB/s", f"commit {about['commit']}"]
    runs = []
    for results in passes:
        command = re.sub(r" --out \S+", "", results.environment["command"])  # where somebody kept the file
        run = f"`{command}`; [{results.path.name}]({link(results.path)})"
        commit = results.environment["commit"]
        run += f" at commit {commit}" if commit != about["commit"] else ""
        runs.append(run + ("" if results.complete else ", **interrupted**"))
    return f"{', '.join(parts)}; {', '.join(runs)}."


def said_of(passes: Sequence[Results]) -> list[str]:
    """What stands under the figures of a benchmark: what could not be measured, and why; where and how the rest was."""
    lines = []
    for failure in joined(passes).failures:
        what = ", ".join(f"{value}" for key, value in failure.items() if key in NAMING and value != "")
        lines.append(f"- not measured: {what}: {failure['error']}")
    return ["\n".join(lines), machine(passes)] if lines else [machine(passes)]


SECTIONS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "merge": (
        "Wall time of one merge of the layers after the tenth convolution, from call to done, cold cache, α = 0.8, "
        "p = 0.3; every sampled pair merges / none does. The floor is the time of a copy of the bytes that the draw "
        "must move.",
        merge_table,
    ),
    "forward": (
        "Wall time of forward-only merging of all convolutions, merging and restoring each from call to done and added "
        "up, cold cache, α = 0.5, p = 0.5, no threshold; beside one `merge_` with the same arguments. The floor is the "
        "time of a copy of the bytes that the draw must move, of which keeping and restoring are more than half.",
        forward_table,
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
    """The section of benchmarks/README.md between the markers."""
    parts = []
    for device, here in by_device(found).items():
        on_gpu = any(results.on_gpu for passes in here.values() for results in passes)
        parts.append(f"## On {'a GPU' if on_gpu else 'a CPU'}: {device}")
        for bench, (caption, make) in SECTIONS.items():
            if bench not in here:
                continue
            results = joined(here[bench])
            if bench == "host" and any(row["driver"] == "stub" for row in results.rows):
                caption += (
                    " Measured without a GPU over a CUDA driver that does nothing; a real one adds 2 to 3 µs a launch."
                )
            parts += [caption, make(results), *said_of(here[bench])]
        for bench, name, title in (
            ("merge", "ratios", "time of every provider over that of `merge_`"),
            ("merge", "floor", "time against the bytes that must move, with the floor"),
            ("scaling", "scaling", "time as the number of filters, elements, layers and p grow"),
        ):
            path = PLOTS / f"{slug(device)}-{name}.svg"
            if any(results.rows for results in here.get(bench, ())):
                parts.append(f"![{device}: {title}]({link(path.relative_to(RESULTS.parents[1]))})")
        if "scaling" in here:  # it has no table that they would stand under
            parts += said_of(here["scaling"])
    targets = [*merge_targets(found), *cpu_targets(found), *match_targets(found), *host_targets(found),
               *training_targets(found), *scaling_targets(found), *forward_targets(found)]  # fmt: skip
    caption = "The worst committed figure of each against what this project aims at; host times machine by machine."
    parts += ["## Targets", caption, target_table(targets)]
    return "\n\n".join(parts)


def front(found: Sequence[Results]) -> str:
    """The section of README.md between the markers: of the first GPU and the first CPU that have some of it."""
    shown: dict[str, Results] = {}
    for here in by_device(found).values():
        results = joined(here["merge"]) if "merge" in here else None
        if results is not None and any(results.pick(net=net, provider="merge_") for net in FRONT_NETS):
            shown.setdefault("GPU" if results.on_gpu else "CPU", results)
    if not shown:
        return "Not yet measured."
    machines = [
        f"{results.device}, torch {results.environment['torch']}"
        + ("" if results.on_gpu else f", {results.environment['threads']} thread")
        for results in shown.values()
    ]
    caption = f"Wall time of one step where every chosen pair merges, float32 ({'; '.join(machines)}):"
    return f"{caption}\n\n{front_table(shown)}"


PAGES: dict[str, Callable[[Sequence[Results]], str]] = {"README.md": front, "benchmarks/README.md": render}


def updated(page: str, section: str) -> str:
    """A page with another section between this command's markers, see :func:`benchmarks.markers.updated`."""
    return markers.updated(page, BEGIN, END, section)


def main(arguments: list[str] | None = None) -> int:
    """Write the sections and the plots, or check the sections."""
    parser = parser_with(__doc__, "pip install -c constraints.txt -e '.[plots]'",
                         "python -m benchmarks.report", "python -m benchmarks.report --check")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a page is out of step")
    options = parser.parse_args(arguments)
    found = load()
    old = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
    new = {name: updated(old[name], make(found)) for name, make in PAGES.items()}
    if options.check:
        for name in PAGES:
            said = "is in step" if new[name] == old[name] else "is out of step: run python -m benchmarks.report"
            print(name, said)
        return int(new != old)
    from benchmarks.plots import draw_all  # needs matplotlib, which the tables do not

    PLOTS.mkdir(parents=True, exist_ok=True)
    for path in draw_all(found, PLOTS):
        print("written", path)
    for name, text in new.items():
        (ROOT / name).write_text(text, encoding="utf-8")
        print(name, "rewritten" if text != old[name] else "was in step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
