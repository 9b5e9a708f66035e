"""Makes the project's launcher run its kernels' PTX, on CPU tensors and for a GPU that is not there.

::

    with on_ptx("sm_90", Schedule(seed=1)) as device:
        device.register(*weights)
        launcher.run(...)
    assert not device.findings

Types, alignments, constants and options are those of the launch, as a user's GPU would get them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any
from unittest import mock

import torch

from .compiler import Compiled, Request, ptx_of
from .machine import Finding, Machine, Schedule
from .memory import Memory
from .profile import Profile
from .program import Program
from .project import Handle, Launcher


@lru_cache(maxsize=64)
def program_of(ptx: str, shared_bytes: int) -> Program:
    """PTX, translated once."""
    return Program(ptx, shared_bytes)


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and behind its last one."""
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class Device:
    """Where launches go.

    Args:
        arch: "sm_80" and the like.
        schedule: of the launches; each gets a seed of its own, drawn by this one's.
        keep_profiles: whether to count what is executed.

    Attributes:
        findings: of all launches so far.
        profiles: of all launches so far, by kernel, if kept.
        steps: instructions that others could observe, by warp.
        mutate: what to do to a program before it is run, to see it noticed.
    """

    def __init__(self, arch: str, schedule: Schedule, *, keep_profiles: bool = False) -> None:
        self.arch, self.schedule, self.keep_profiles = arch, schedule, keep_profiles
        self.findings: list[Finding] = []
        self.profiles: list[tuple[str, Profile]] = []
        self.steps = 0
        self.mutate: Callable[[str, Program, Compiled], Program] | None = None
        self._rng = random.Random(schedule.seed)
        self._held: list[tuple[str, torch.Tensor]] = []
        self._undefined: dict[str, set[int]] = {}

    def register(self, *weights: torch.Tensor) -> None:
        """Weights, which kernels find in their tables."""
        self._held += [(f"weight{len(self._held) + i}", weight) for i, weight in enumerate(weights)]

    def undefined(self, kernel: str, *tensors: torch.Tensor) -> None:
        """A kernel may not read from these unless it has written to them first."""
        self._undefined.setdefault(kernel, set()).update(tensor.data_ptr() for tensor in tensors)

    def watch(self, launcher: Launcher, weights: list[torch.Tensor]) -> None:
        """Register a launcher's weights, and what its kernels must write before they read it."""
        self.register(*weights)
        of_slots = [slot.similarity for slot in launcher.slots]
        self.undefined("_merge_kernel", launcher.slot, launcher.deferred, launcher.scratch, *of_slots)
        self.undefined("_draw_kernel", launcher.partner, launcher.active, launcher.outcome)

    def launch(self, handle: Any, grid: tuple[int, int], tensors: tuple[torch.Tensor, ...], numbers: tuple) -> None:
        """Compile and run a kernel.

        Raises:
            AccessError, StuckError: see :mod:`.machine`.
            UnsupportedError: see :mod:`.program`.
        """
        function = handle._kernel.fn
        name = function.__name__
        compiled = ptx_of(
            Request(
                function.__module__, name, self.arch,
                tuple((str(tensor.dtype).removeprefix("torch."), tensor.data_ptr() % 16) for tensor in tensors),
                tuple(numbers), tuple(handle._constants.items()), tuple(handle._options.items()),
            )
        )  # fmt: skip
        program = program_of(compiled.ptx, compiled.shared_bytes)
        if self.mutate:
            program = self.mutate(name, program, compiled)
        undefined = self._undefined.get(name, set())
        named = [*zip(handle._kernel.arg_names, tensors, strict=False), *self._held]
        memory = Memory([(n, *span(t), t.data_ptr() not in undefined) for n, t in named if t.numel()])
        values = dict(zip(handle._kernel.arg_names, [*(t.data_ptr() for t in tensors), *numbers], strict=False))
        arguments = [values[name] for name in compiled.parameters]
        arguments += [0] * (len(program.kernel.params) - len(arguments))  # scratch of Triton's own, unused
        schedule = dataclasses.replace(self.schedule, seed=self._rng.getrandbits(48))
        profile = Profile(program) if self.keep_profiles else None
        machine = Machine(program, memory, arguments, grid, schedule, profile)
        try:
            machine.run()
        finally:
            self.findings += machine.findings.values()
            self.steps += machine.steps
        if profile:
            self.profiles.append((name, profile))
        memory.write_back()


@contextlib.contextmanager
def on_ptx(arch: str, schedule: Schedule, *, keep_profiles: bool = False) -> Iterator[Device]:
    """Run the PTX of every launch inside."""
    device = Device(arch, schedule, keep_profiles=keep_profiles)

    def launch(self: Any, grid: tuple[int, int], stream: int, tensors: Any, numbers: tuple) -> None:
        device.launch(self, grid, tuple(tensors), numbers)

    with mock.patch.object(Handle, "launch", launch):
        yield device
