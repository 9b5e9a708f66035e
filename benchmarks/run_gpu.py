"""Tests and benchmarks on a machine with a GPU, in parts that fit the minutes for which one may have it.

``bash benchmarks/run_gpu.sh [FOLDER] [PART or STEP]...`` runs *correct*, *speed*, *more* and *forward-only*, or what is
named of them (``benchmarks/gpu_parts.py``). A part takes less than nine minutes whatever happens: every step is a
process of its own with its own limit, and whether it fails, crashes, hangs or is killed, the next one runs. FOLDER
(``$OUT``, or ``gpu-results``) then holds a handful of files, all of them written as things happen, so that nothing is
lost if the machine is taken away in the middle:

- ``summary.txt``: how each step ended, after how long;
- ``log.txt``: what all of them printed, each line with the name of its step;
- ``results/<device>/*.json``: the figures. Copy the folder to ``benchmarks/results/`` and run
  ``python -m benchmarks.report`` to publish them.

The exit status is 1 if anything failed. Where the checkout is a copy, say its commit in ``INMERGE_COMMIT``. On a
machine without a GPU it is a rehearsal: GPU tests skip themselves and benchmarks are quick.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_parts import FIRST, MERCY, NO_GPU, PARTS, PYTHON, RESULTS, Step, every_step, listing
from benchmarks.helps import parser_with

ROOT = Path(__file__).parents[1]
SHOWN = 15  # lines of a step that did not pass, on the terminal
UNSET = ("TRITON_INTERPRET", "INMERGE_INTERPRET", "INMERGE_FORCE_EAGER")
EXAMPLES_SHARE = 20  # of the random configurations, one in so many is tried: they are thousands, each with its kernels


@dataclass
class Run:
    """Steps that run, and what is written of them.

    Attributes:
        folder: where that goes.
        python: what runs the steps.
        quick: whether this is a rehearsal.
        limits: of steps by name, where they are not their own.
        failed: how many steps did not pass.
    """

    folder: Path
    python: str
    quick: bool
    limits: Mapping[str, float]
    failed: int = 0
    _running: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, line: str, *files: str) -> None:
        """A line on the terminal and at the end of files of the folder."""
        with self._lock:
            for name in files:
                with (self.folder / name).open("a") as file:
                    file.write(line + "\n")
            with contextlib.suppress(OSError):  # nobody may be listening any more
                print(line, flush=True)

    def log(self, name: str, process: subprocess.Popen[str], kept: list[str]) -> None:
        """Copy what a process prints to the log, line by line, until nobody has its output open any more."""
        assert process.stdout is not None
        for line in process.stdout:
            kept.append(line.rstrip())
            with self._lock, (self.folder / "log.txt").open("a") as file:
                file.write(f"[{name}] {line.rstrip()}\n")

    def environment(self) -> dict[str, str]:
        """Of the steps."""
        kept = {name: value for name, value in os.environ.items() if name not in UNSET}
        path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
        return kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1",
                       "INMERGE_EXAMPLES_SHARE": str(EXAMPLES_SHARE)}  # fmt: skip

    def step(self, step: Step) -> list[str]:
        """Run a step to its end or its limit, and write how it ended; returns the lines that it printed."""
        replaced = {PYTHON: self.python, RESULTS: str(self.folder / "results")}
        command = [replaced.get(word, word) for word in step.command + (step.quick if self.quick else ())]
        limit = self.limits.get(step.name, step.limit)
        lines: list[str] = []
        start = time.monotonic()
        if shutil.which(command[0]) is None:
            self.say(f"{step.name:21} skipped: there is no {command[0]} here", "summary.txt", "log.txt")
            return lines
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        with self._lock:
            self._running.add(process.pid)
        reader = threading.Thread(target=self.log, args=(step.name, process, lines), daemon=True)
        reader.start()
        try:
            status = process.wait(limit)
            outcome = "passed" if status == 0 else f"failed with status {status}"
            if status < 0:
                outcome = f"killed by {signal.Signals(-status).name}"
        except subprocess.TimeoutExpired:
            outcome = f"reached its limit of {limit:g} s"
            _end(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(MERCY)
        _end(process.pid, signal.SIGKILL)  # the process where it has not ended, and what it has left behind
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold a process that is dead
            process.wait(MERCY)
        with self._lock:
            self._running.discard(process.pid)
        reader.join(MERCY)  # a process that left its session may hold the output open: not waited for
        last = next((line for line in reversed(lines) if line), "")
        took = f"{time.monotonic() - start:5.0f} s"
        if outcome != "passed":
            self.failed += 1
            for line in lines[-SHOWN:]:
                self.say(f"    [{step.name}] {line}")
        self.say(f"{step.name:21} {took}  {outcome}: {last.strip('= ')[:100]}", "summary.txt", "log.txt")
        return lines

    def together(self, steps: Sequence[Step]) -> None:
        """Run steps at the same time, and wait for all of them."""
        threads = [threading.Thread(target=self.step, args=(step,), daemon=True) for step in steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def stop(self) -> None:
        """End all that runs."""
        for pid in list(self._running):
            _end(pid, signal.SIGKILL)


def _end(session: int, with_: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, with_)


def _interrupted(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is named."""
    parser = parser_with(
        __doc__, "PyTorch, Triton and pytest; a GPU, but for --list", "bash benchmarks/run_gpu.sh --list",
        "bash benchmarks/run_gpu.sh gpu-results correct", program="bash benchmarks/run_gpu.sh",
    )  # fmt: skip
    parser.add_argument("named", nargs="*", metavar="FOLDER or PART or STEP", help="default: all parts")
    parser.add_argument("--list", action="store_true", help="print all parts and steps, and run nothing")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: benchmarks with few samples of little work")
    parser.add_argument("--limit", action="append", default=[], metavar="STEP=SECONDS", help="another than its own")
    parser.add_argument("--python", default=sys.executable, help="what runs the steps (default: this Python)")
    options = parser.parse_intermixed_args(arguments)  # in any order
    if options.list:
        print(listing())
        return 0
    known = {*PARTS, *every_step()}
    folder = os.environ.get("OUT") or "gpu-results"
    named = list(options.named)
    if named and named[0] not in known:
        folder = named.pop(0)
        if os.sep not in folder and not Path(folder).is_dir():
            parser.error(f"{folder!r} is no part, no step and no folder; a new folder needs a {os.sep} in its name")
    limits = {name: float(seconds) for name, _, seconds in (given.partition("=") for given in options.limit)}
    for name in (*named, *(name for name in limits if name != FIRST.name)):
        if name not in known:
            parser.error(f"{name!r} is no part and no step; --list prints them")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _interrupted)
    run = Run(Path(folder).resolve(), options.python, options.quick, limits)
    run.folder.mkdir(parents=True, exist_ok=True)
    chosen = [
        tuple(step for step in group if not named or part in named or step.name in named)
        for part, groups in PARTS.items()
        for group in groups
    ]
    try:
        run.quick |= NO_GPU in run.step(FIRST)
        for group in filter(None, chosen):
            run.together(group)
    except KeyboardInterrupt as interrupt:
        run.stop()
        run.say(f"interrupted by {interrupt}: what is not above did not run", "summary.txt", "log.txt")
        return 1
    run.say(
        "all passed" if not run.failed else f"{run.failed} of the steps above did not pass", "summary.txt", "log.txt"
    )
    return int(run.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
