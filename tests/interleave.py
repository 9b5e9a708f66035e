"""Interpreted kernels in other orders than Triton's: programs permuted, or interleaved at every memory operation."""

from __future__ import annotations

import contextlib
import inspect
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from interpreter import Access, Observer, apply_fixes, observe
from races import Race, RaceDetector
from triton.runtime import interpreter

GridIndex = tuple[int, int, int]


def _grid_indices(grid: GridIndex) -> list[GridIndex]:
    """In the order in which Triton interprets them."""
    return [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]


@contextlib.contextmanager
def permuted(seed: int) -> Iterator[list[GridIndex]]:
    """Run the programs of every launch inside one after another, in random order; yields the list of those run so far.

    Costs nothing. It shows what depends on the order of programs, but not what goes wrong while two of them run.
    """
    apply_fixes()
    builder = interpreter.interpreter_builder
    rng = random.Random(seed)
    order: dict[GridIndex, GridIndex] = {}
    done: list[GridIndex] = []

    def set_grid_dim(*grid):
        type(builder).set_grid_dim(builder, *grid)
        indices = _grid_indices(grid)
        order.update(zip(indices, rng.sample(indices, len(indices)), strict=True))

    def set_grid_idx(*index):
        done.append(order[index])
        type(builder).set_grid_idx(builder, *order[index])

    # On the instance they hide the methods.
    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    try:
        yield done
    finally:
        del builder.set_grid_dim, builder.set_grid_idx


class _Stopped(BaseException):
    """Ends a program when another one has failed. Not an Exception, which the interpreter would wrap."""


class _Program:
    def __init__(self, number: int, index: GridIndex, speed: float) -> None:
        self.number = number
        self.index = index
        self.speed = speed
        self.turn = threading.Lock()  # held while it is another's turn
        self.turn.acquire()
        self.thread: threading.Thread | None = None


class Schedule(Observer):
    """One random interleaving of every launch, and what was seen in it.

    Attributes:
        races: data races, in the order of finding them.
        steps: memory operations so far.
    """

    def __init__(
        self,
        seed: int,
        tensors: Mapping[str, torch.Tensor],
        barrier_before_release: bool,
        resident: int | None,
        max_steps: int,
    ) -> None:
        self.races: list[Race] = []
        self.steps = 0
        self._rng = random.Random(seed)
        self._tensors = tensors
        self._barrier_before_release = barrier_before_release
        self._resident = resident
        self._max_steps = max_steps

    def access(self, access: Access) -> None:
        """A program is about to touch memory: others may come first."""
        self._step()
        self._detector.access(self._current.number, access)

    def barrier(self) -> None:
        """A program joins its threads. Nothing that other programs could see, so they are not given a turn."""
        self._detector.barrier(self._current.number)

    def run(self, body: Callable[[], None], grid: GridIndex) -> None:
        """Run ``body`` once per grid index, in threads that take turns: exactly one of them runs at any time."""
        indices = _grid_indices(grid)
        numbers = self._rng.sample(range(len(indices)), len(indices))
        # Different speeds, or all programs would always be at about the same place.
        self._waiting = [_Program(number, indices[number], 10 ** self._rng.uniform(-1, 1)) for number in numbers]
        self._running: list[_Program] = []
        self._body = body
        self._error: BaseException | None = None
        self._launch_steps = 0
        self._all_done = threading.Lock()
        self._all_done.acquire()
        self._detector = RaceDetector(
            len(indices), barrier_before_release=self._barrier_before_release, tensors=self._tensors
        )
        self._admit()
        if self._running:
            self._pick().turn.release()
            self._all_done.acquire()
        self.races += self._detector.races
        self.steps += self._launch_steps
        if self._error is not None:
            raise self._error

    def _admit(self) -> None:
        """Start programs, as many as may be resident."""
        while self._waiting and (self._resident is None or len(self._running) < self._resident):
            program = self._waiting.pop()
            self._running.append(program)
            program.thread = threading.Thread(target=self._run_program, args=(program,), daemon=True)
            program.thread.start()

    def _pick(self) -> _Program:
        return self._rng.choices(self._running, [program.speed for program in self._running])[0]

    def _run_program(self, program: _Program) -> None:
        try:
            self._await_turn(program)
            with np.errstate(all="ignore"):  # NumPy keeps it per thread
                self._body()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = self._error or error
        self._running.remove(program)
        if self._error is None:
            self._admit()
        if self._running:
            self._pick().turn.release()
        else:
            self._all_done.release()

    def _await_turn(self, program: _Program) -> None:
        program.turn.acquire()
        if self._error is not None:
            raise _Stopped
        self._current = program
        interpreter.interpreter_builder.grid_idx = program.index

    def _step(self) -> None:
        self._launch_steps += 1
        if self._launch_steps > self._max_steps:
            running = sorted(program.number for program in self._running)
            raise RuntimeError(
                f"no end after {self._max_steps} memory operations, a deadlock? Running: {running[:8]}, "
                f"not started: {len(self._waiting)}"
            )
        current, following = self._current, self._pick()
        if following is not current:
            following.turn.release()
            self._await_turn(current)


class _WholeGrid:
    """Stands in for a kernel's function: called for grid index 0, it runs all programs, for others nothing.

    So Triton itself converts the arguments and evaluates the grid.
    """

    def __init__(self, function: Any, schedule: Schedule) -> None:
        # What Triton looks at.
        self.__globals__ = function.__globals__
        self.__name__ = function.__name__
        self.__signature__ = inspect.signature(function)
        self._function = function
        self._schedule = schedule

    def __call__(self, **arguments: Any) -> None:
        builder = interpreter.interpreter_builder
        if builder.grid_idx == (0, 0, 0):
            self._schedule.run(lambda: self._function(**arguments), builder.grid_dim)
            builder.grid_idx = (0, 0, 0)


@contextlib.contextmanager
def interleaved(
    seed: int,
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
    barrier_before_release: bool = False,
    resident: int | None = None,
    max_steps: int = 200_000,
) -> Iterator[Schedule]:
    """Run the programs of every launch inside interleaved at random, and look for data races.

    Programs switch before every load, store and atomic::

        with interleaved(seed, tensors={"weight": weight}) as schedule:
            kernel[grid](...)
        assert not schedule.races

    Args:
        seed: of the interleaving.
        tensors: names for the reports of races.
        barrier_before_release: model what Triton 3.6 and 3.7 emit, a barrier before every release, the kernel's or
            not. They do not promise it; what passes without passes with it, too.
        resident: how many programs may be in flight, as on a small GPU; all by default. They start in random order.
        max_steps: memory operations of one launch after which it counts as deadlocked: RuntimeError.
    """
    schedule = Schedule(seed, tensors or {}, barrier_before_release, resident, max_steps)
    apply_fixes()
    executor = interpreter.GridExecutor
    launch = executor.__call__

    def interleaved_launch(self, *args, **kwargs):
        self.fn = _WholeGrid(self.fn, schedule)
        launch(self, *args, **kwargs)

    executor.__call__ = interleaved_launch
    try:
        with observe(schedule):
            yield schedule
    finally:
        executor.__call__ = launch
