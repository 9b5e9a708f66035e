"""The project's kernels under one random schedule each: plans and draws, tables of partners, partner rules.

Every case draws all it needs from one number, so that number is enough to see it again: ``python -m tests.ptx``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from oracle import assert_is_matched, assert_is_reference, bits
from torch import nn

from .launch import Device, on_ptx
from .machine import Finding, Schedule, StuckError
from .memory import AccessError
from .project import Launcher, launcher_of, reference_merge

FLOAT32, BFLOAT16, FLOAT16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALPHA = 0.75
WAYS = ("even", "speeds", "priorities")
# Of the merge kernel: a warp, two and four, with spans that end within short rows and beyond them.
SHAPES = [{"BLOCK": b, "SPAN": s} for b, s in ((512, 1), (128, 3), (256, 2), (512, 3), (128, 1), (256, 4), (256, 5))]
WEAK = ((0.0, 1.0), (0.05, 0.5), (0.5, 0.5))  # as late as can be; mixed; soon


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        wrong: how the result differs from the reference, or what was raised.
        findings: races and the like.
        rows: active rows, ``steps`` that others could observe, and schedules.
    """

    wrong: str | None = None
    findings: list[Finding] = field(default_factory=list)
    rows: int = 0
    steps: int = 0

    def __str__(self) -> str:
        found = [self.wrong] if self.wrong else []
        return "\n".join([*found, *map(str, self.findings[:4])]) or "fine"

    @property
    def is_fine(self) -> bool:
        return not self.wrong and not self.findings


def alike(filters: int, elements: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Filters of which some pairs are more similar than 0.3 and some are not."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, elements, generator=generator)
    return (common + 1.5 * torch.randn(filters, elements, generator=generator)).to(dtype)


def any_schedule(rng: random.Random) -> Schedule:
    weak = rng.choice([None, *WEAK])
    return Schedule(rng.getrandbits(40), rng.choice(WAYS), rng.choice([None, None, 2]), weak)


def observe(device: Device, outcome: Outcome, run: Callable[[], None]) -> Outcome:
    """Run it and note what is wrong."""
    try:
        run()
    except (AssertionError, AccessError, StuckError) as error:
        outcome.wrong = f"{type(error).__name__}: {error}".split("\n")[0]
    outcome.steps = device.steps
    outcome.findings = list(device.findings)
    return outcome


def assert_is_clean(launcher: Launcher, state: torch.Tensor) -> None:
    assert not launcher.counter.any(), "counters must come back to zero"
    assert not state.any(), "state words must come back to zero"


# -------------------------------------------------------------------------------------------------- plans and draws

Target = tuple[torch.Tensor | nn.Module, dict[str, Any]]  # and how the reference must be told of its layout


def dense(rng: random.Random, dtype: torch.dtype, *, longest: int = 256) -> Target:
    """Filters that are multiples of 16 bytes, so that loads are as wide."""
    unit = 16 // dtype.itemsize
    elements = unit * rng.randint(longest // unit // 2 + 1, longest // unit)
    return alike(rng.choice([2, 3, 5, 9, 14]), elements, dtype, rng.getrandbits(30)), {}


def odd(rng: random.Random, dtype: torch.dtype) -> Target:
    elements = rng.choice([1, 7, 33, 129, 251])
    return alike(rng.choice([2, 3, 5, 9, 14]), elements, dtype, rng.getrandbits(30)), {}


def unaligned(rng: random.Random, dtype: torch.dtype) -> Target:
    filters = rng.choice([2, 5, 9])
    return alike(filters + 1, 16, dtype, rng.getrandbits(30)).flatten()[1 : 16 * filters + 1].view(filters, 16), {}


def convolution(rng: random.Random, dtype: torch.dtype) -> Target:
    kind = rng.choice(["plain", "grouped", "transposed", "transposed, grouped", "channels_last"])
    groups = 2 if "grouped" in kind else 1
    make = nn.ConvTranspose2d if "transposed" in kind else nn.Conv2d
    conv = make(4, 2 * rng.choice([2, 3, 5, 7]), 3, groups=groups, bias=False).to(dtype)
    shape = conv.weight.shape
    with torch.no_grad():
        conv.weight.copy_(alike(shape[0], shape[1:].numel(), dtype, rng.getrandbits(30)).view(shape))
    if kind == "channels_last":
        conv = conv.to(memory_format=torch.channels_last)
    return conv, {"groups": groups, "transposed": "transposed" in kind}


# By name: the layers of a plan, which decide on the kernel's code. Each name has a shape of its own.
PLANS: dict[str, Callable[[random.Random], list[Target]]] = {
    "float32": lambda rng: [dense(rng, FLOAT32) for _ in range(rng.choice([1, 2, 3]))],
    "bfloat16": lambda rng: [dense(rng, BFLOAT16) for _ in range(rng.choice([1, 2, 3]))],
    "short": lambda rng: [dense(rng, FLOAT32, longest=64), dense(rng, BFLOAT16, longest=64)],
    "float32 long": lambda rng: [dense(rng, FLOAT32, longest=1100)],
    "float16 odd": lambda rng: [odd(rng, FLOAT16), unaligned(rng, FLOAT16), alike_long(FLOAT16)],
    "float32 convolutions": lambda rng: [convolution(rng, FLOAT32), convolution(rng, FLOAT32), alike_long(FLOAT32)],
    "all": lambda rng: [*(dense(rng, dtype) for dtype in DTYPES), odd(rng, rng.choice(DTYPES))],
}


def alike_long(dtype: torch.dtype) -> Target:
    """A pair of long filters, strided."""
    return alike(2, 255, dtype, 0), {}


def random_plan(
    number: int, arch: str, name: str | None = None, *, from_memory: bool | None = None,
    schedule: Schedule | None = None, mutate: Callable[..., Any] | None = None,
) -> Outcome:  # fmt: skip
    """One or four calls of a plan, against the reference."""
    rng = random.Random(number)
    name = name or rng.choice(list(PLANS))
    chosen = PLANS[name](rng)
    launcher, weights = launcher_of([target for target, _ in chosen])
    if rng.random() < 0.2:  # such a filter is never merged and never read
        weights[0][rng.randrange(weights[0].shape[0])] = float(rng.choice(["nan", "inf"]))
    threshold = rng.choice([-1.0, 0.3, 0.3, "per layer"])
    each = [rng.choice([-1.0, 0.0, 0.3]) for _ in weights] if threshold == "per layer" else [threshold] * len(weights)
    call = {"prob": rng.choice([0.3, 0.8, 1.0]), "alpha": rng.choice([0.75, 0.1, 1.0])}
    dry_run, is_captured, seed = rng.random() < 0.1, rng.random() < 0.25, rng.getrandbits(64)
    from_memory = is_captured if from_memory is None else from_memory
    steps = (rng.getrandbits(62), 1, 2, 3)[: rng.choice([1, 1, 4])]  # the last ones are drawn ahead
    launcher.reserve_scratch(1.0)
    available = launcher.scratch.numel() // 16
    overrides = {"capacity": min(rng.choice([available, 0, 4, 20]), available), "programs": rng.choice([1, 2, 3, 5, 8])}
    overrides |= SHAPES[list(PLANS).index(name) % len(SHAPES)]
    outcome = Outcome()
    with on_ptx(arch, schedule or any_schedule(rng)) as device:
        device.watch(launcher, weights)
        device.mutate = mutate

        def run() -> None:
            for step in steps:
                before = [weight.clone() for weight in weights]
                if from_memory:  # as in a CUDA graph
                    launcher.prepare(seed, step, threshold=each, write=not dry_run, **call)
                    result = launcher.run_from_memory(**overrides)
                else:
                    result = launcher.run(seed, step, threshold=each, dry_run=dry_run, **call, **overrides)
                outcome.rows += int(result.fetch().counts.sum())
                for k, (_, layout) in enumerate(chosen):
                    assert_is_reference(
                        before[k], weights[k], seed=seed, step=step, layer=k, threshold=each[k], dry_run=dry_run,
                        **call, **layout,
                    )  # fmt: skip
                assert_is_clean(launcher, launcher.slot_of(launcher.calls).state)

        return observe(device, outcome, run)


# ---------------------------------------------------------------------------------------------- tables of partners


def tables_of(rng: random.Random, n: int) -> dict[str, list[int]]:
    """Partners that hardly any draw would make; -1 for none."""
    return {
        "chain": [*range(1, n), -1],
        "cycle": [(i + 1) % n for i in range(n)],
        "star": [1] + [0] * (n - 1),
        "read by all": [-1] + [0] * (n - 1),
        "two cycles with tails": [1, 0] + [3, 4, 2] + [i % 5 for i in range(n - 5)],
        "anyhow": [(i + rng.randint(1, n - 1)) % n if rng.random() < 0.8 else -1 for i in range(n)],
    }


def merge_table(
    number: int, arch: str, *, table: str | None = None, dtypes: tuple[torch.dtype, ...] = (FLOAT32,),
    elements: int | None = None, capacity: int | None = None, schedule: Schedule | None = None,
    mutate: Callable[..., Any] | None = None, repeats: int = 2, **overrides: Any,
) -> Outcome:  # fmt: skip
    """Merges with given partners, one table for each layer, against the reference."""
    rng = random.Random(number)
    n = rng.choice([6, 8])
    # Of float32, less than a block, a span or more, and not all multiples of them.
    lengths = [elements or rng.choice([20, 60, 256, 300, 516]) for _ in dtypes]
    shapes = zip(lengths, dtypes, strict=True)
    targets = [
        alike(n, length // 8 * 8 if dtype != FLOAT32 else length, dtype, rng.getrandbits(30))
        for length, dtype in shapes
    ]
    launcher, weights = launcher_of(targets)
    launcher.reserve_scratch(1.0)
    available = launcher.scratch.numel() // 16
    capacity = min(rng.choice([0, 0, 8, 70, available]) if capacity is None else capacity, available)
    settings = {"programs": rng.choice([2, 3, 5, 8]), "capacity": capacity}
    settings |= SHAPES[number % len(SHAPES)] | overrides
    outcome = Outcome()
    with on_ptx(arch, schedule or any_schedule(rng)) as device:
        device.watch(launcher, weights)
        device.mutate = mutate

        def run() -> None:
            for _ in range(repeats):
                expected, partners = [], []
                for weight, first in zip(weights, launcher.slots.row_start, strict=False):
                    tables = tables_of(rng, n)
                    partner = np.array(tables[table or rng.choice(list(tables))])
                    merged = reference_merge(weight, partner >= 0, partner, alpha=ALPHA, threshold=-1.0)
                    expected.append(merged.weight)
                    partners.append(np.where(partner >= 0, partner + first, -1))
                slot = launcher.slot_of(0)
                slot.partner[: launcher.rows] = torch.as_tensor(np.concatenate(partners))
                slot.readers.zero_()
                slot.outcome[: launcher.rows] = (slot.partner[: launcher.rows] >= 0).to(torch.int8)
                outcome.rows += int((slot.partner[: launcher.rows] >= 0).sum())
                launcher.merge_drawn(0, alpha=ALPHA, threshold=-1.0, dry_run=False, **settings)
                for weight, wanted in zip(weights, expected, strict=True):
                    assert torch.equal(bits(weight), bits(wanted)), "weights differ from the reference"
                assert_is_clean(launcher, launcher.slots.state)

        return observe(device, outcome, run)


# --------------------------------------------------------------------------------------------------- partner rules

# By name: dtypes of the layers, and whether filters are strided or unaligned; each is a kernel of its own.
MATCHES: dict[str, tuple[tuple[torch.dtype, ...], bool]] = {
    "float32": ((FLOAT32,), False), "bfloat16": ((BFLOAT16,), False), "float16": ((FLOAT16,), False),
    "float32 odd": ((FLOAT32,), True), "bfloat16 odd": ((BFLOAT16,), True), "all": (DTYPES, True),
}  # fmt: skip


def match(
    number: int, arch: str, rule: str, name: str, schedule: Schedule | None = None,
    mutate: Callable[..., Any] | None = None,
) -> Outcome:  # fmt: skip
    """One call with a partner rule, against float64 products of all pairs."""
    rng = random.Random(number)
    dtypes, is_odd = MATCHES[name]
    call = {"prob": 0.6, "alpha": ALPHA, "threshold": rng.choice([-1.0, 0.25])}
    chosen = []
    for dtype in dtypes:
        filters, elements = rng.choice([20, 45, 70]), rng.choice([8, 72, 96, 128])
        chosen.append(alike(filters, elements + 1 if is_odd else elements, dtype, rng.getrandbits(30)))
    launcher, weights = launcher_of(chosen)
    before, outcome = [weight.clone() for weight in weights], Outcome()
    with on_ptx(arch, schedule or any_schedule(rng)) as device:
        device.watch(launcher, weights)
        device.mutate = mutate

        def run() -> None:
            launcher.run(3, 5, dry_run=False, partner=rule, **call)
            for k, weight in enumerate(weights):
                sampled, _ = assert_is_matched(before[k], weight, rule, seed=3, step=5, layer=k, **call)
                outcome.rows += sampled

        return observe(device, outcome, run)
