"""What merging costs a training step, in time and memory: ``python -m benchmarks.bench_training``.

Whole training steps (forward, backward, SGD with momentum) as users run them: on a GPU with bfloat16 autocast and
channels_last, on a CPU with small float32 batches. Two ways, one to check the other:

- *direct*: the host's and the device's time of merging alone, over the time of a plain step;
- *A/B*: steps with and without merging in random order within pairs, and the 95 % interval of the mean difference by
  bootstrap over the pairs.

Memory is the peak of a step with merging minus that of one without, and what the plan keeps. Writes
``benchmarks/results/<device>/training.json``, or with ``--forward-only`` ``training-forward.json``, of merging all
convolutions with its defaults before the forward pass and putting them back after the backward pass.
"""

from __future__ import annotations

import functools
import gc
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import inmerge_fast
from benchmarks import nets
from benchmarks.command import open_file, parser_of, print_row
from benchmarks.device_time import device_times
from benchmarks.result_files import ResultFile
from benchmarks.timing import InParts, cold_cache, parts_of, quantiles, wall_seconds
from benchmarks.work import SEED, SKIP_FIRST
from inmerge_fast.forward_only import ALPHA, PROB, THRESHOLD

LASTING = {"alpha": 0.8, "prob": 0.3, "threshold": -1.0}  # all pass: the most that merging can cost
FORWARD_ONLY = {"alpha": ALPHA, "prob": PROB, "threshold": THRESHOLD}
CLASSES = 10
BOOTSTRAP = 10_000
TIMES = ("step_us", "merge_host_us", "merge_device_us", "share_percent", "ab_us", "ab_low_us", "ab_high_us")


@dataclass(frozen=True)
class Work:
    """A network with the batch that it is trained with on a device."""

    name: str
    build: Callable[..., nn.Module]
    shape: tuple[int, ...]


WORK = {
    "cuda": [
        Work("ResNet-50", nets.resnet50, (64, 3, 224, 224)),
        Work("VGG19", nets.vgg19, (32, 3, 224, 224)),
        Work("3D ResNet-18", nets.r3d_18, (8, 3, 16, 112, 112)),
    ],
    "cpu": [
        Work("ResNet-50", nets.resnet50, (4, 3, 112, 112)),
        Work("VGG19", nets.vgg19, (4, 3, 112, 112)),
        Work("3D ResNet-18", nets.r3d_18, (2, 3, 8, 56, 56)),
    ],
}


class Step:
    """One training step on random images, with merging before its forward pass or without.

    Args:
        work: the network and its batch.
        device: where.
        lasting: whether merging stays in the weights, or is undone before the optimizer steps.
    """

    def __init__(self, work: Work, device: torch.device, *, lasting: bool) -> None:
        torch.manual_seed(0)
        self.device, self.lasting = device, lasting
        self.on_gpu = device.type == "cuda"
        memory_format = torch.channels_last if len(work.shape) == 4 else torch.channels_last_3d
        self.model = work.build(classes=CLASSES).to(device)
        self.x = torch.randn(work.shape, device=device)
        if self.on_gpu:
            self.model, self.x = self.model.to(memory_format=memory_format), self.x.to(memory_format=memory_format)
        self.y = torch.randint(CLASSES, work.shape[:1], device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.steps = 0
        self._block: inmerge_fast.merged | None = None
        self.merge = self._merge if lasting else InParts(self._merge, self._restore)  # alone
        self.merge(0)  # plan and kernels exist before anything is timed

    def plan(self) -> inmerge_fast.MergePlan:
        """A plan of what is merged."""
        return inmerge_fast.MergePlan(self.model, skip_first=SKIP_FIRST if self.lasting else 0)

    def _merge(self, step: int) -> None:
        if self.lasting:
            inmerge_fast.merge_(self.model, skip_first=SKIP_FIRST, seed=SEED, step=step, **LASTING)
        else:
            self._block = inmerge_fast.merged(self.model, seed=SEED, step=step, **FORWARD_ONLY)
            self._block.__enter__()

    def _restore(self, _: int) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(None, None, None)

    def __call__(self, *, merging: bool) -> None:
        """One step."""
        self.steps += 1
        if merging:
            self._merge(self.steps)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.on_gpu):
            loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self._restore(self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, *, merging: bool) -> float:
        """Wall time of one step."""
        return wall_seconds(lambda: self(merging=merging), self.device)

    def peak(self, *, merging: bool) -> int:
        """Peak bytes that PyTorch holds on the GPU during one step."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self(merging=merging)
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def difference(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Mean of with minus without in microseconds, and its 95 % interval by bootstrap over the pairs."""
    differences = np.array([merged - plain for merged, plain in pairs]) * 1e6
    drawn = np.random.default_rng(0).integers(len(pairs), size=(BOOTSTRAP, len(pairs)))
    low, high = np.quantile(differences[drawn].mean(1), [0.025, 0.975])
    return {
        "ab_pairs": len(pairs),
        "ab_us": round(float(differences.mean()), 1),
        "ab_low_us": round(float(low), 1),
        "ab_high_us": round(float(high), 1),
    }


def time_work(
    work: Work, device: torch.device, pairs: int, repeats: int, file: ResultFile, *, lasting: bool
) -> dict[str, object]:
    """Add the row of one network: first whole steps, then merging alone."""
    step = Step(work, device, lasting=lasting)
    order = random.Random(0)
    for merging in (True, False):
        step(merging=merging)
    timed: list[tuple[float, float]] = []
    for _ in range(pairs):
        first = order.random() < 0.5
        taken = {merging: step.seconds(merging=merging) for merging in (first, not first)}
        timed.append((taken[True], taken[False]))
    row: dict[str, object] = {
        "net": work.name, "merging": "lasting" if lasting else "forward-only", "batch": list(work.shape),
        "amp": step.on_gpu, "channels_last": step.on_gpu,
        **quantiles([plain for _, plain in timed], "step"), **difference(timed),
    }  # fmt: skip
    file.add(row)
    with file.attempt(net=work.name, what="merging alone"):
        if step.on_gpu:
            direct = device_times(step.merge, device, repeats)
            file.extend(row, {f"merge_{name}": value for name, value in direct.items()})
            file.extend(row, memory_of(step))
            spent = direct["device_us"]
        else:
            host = []
            for n in range(repeats):
                took = 0.0
                for part in parts_of(step.merge):
                    cold_cache(device)()  # as after the passes that it follows
                    took += wall_seconds(functools.partial(part, n), device)
                host.append(took)
            file.extend(row, quantiles(host, "merge_host"))
            spent = float(row["merge_host_us"])
        file.extend(row, {"share_percent": round(100 * spent / float(row["step_us"]), 4)})
    return row


def memory_of(step: Step) -> dict[str, int]:
    """Bytes on the GPU: the peak of a plain step, what merging adds to it, and what a plan keeps."""
    plain = step.peak(merging=False)
    added = step.peak(merging=True) - plain
    plan = step.plan()
    before = torch.cuda.memory_allocated(step.device)
    if step.lasting:
        inmerge_fast.merge_(plan, seed=SEED, step=0, **LASTING)
    else:
        with inmerge_fast.merged(plan, seed=SEED, step=0, **FORWARD_ONLY):
            pass
    kept = torch.cuda.memory_allocated(step.device) - before
    return {"peak_bytes": plain, "peak_added_bytes": added, "kept_bytes": kept}


def main(arguments: list[str] | None = None) -> int:
    """Measure all networks and write the result file."""
    parser = parser_of(__doc__)
    parser.add_argument("--pairs", type=int, default=None, help="A/B pairs (default: 200 on a GPU, 12 on a CPU)")
    parser.add_argument("--forward-only", action="store_true", help="of merging that is undone before the update")
    options = parser.parse_args(arguments)
    lasting = not options.forward_only
    pairs = options.pairs or (200 if options.device.type == "cuda" else 12)
    work = WORK[options.device.type]
    if options.quick:
        work, pairs, options.repeats = [Work("ResNet-18", nets.resnet18, (2, 3, 32, 32))], 3, 5
    name, settings = ("training", LASTING) if lasting else ("training-forward", FORWARD_ONLY)
    file = open_file(options, name, settings)
    for item in work:
        with file.attempt(net=item.name):
            row = time_work(item, options.device, pairs, options.repeats, file, lasting=lasting)
            print_row(row, {"net": 14}, TIMES, header=len(file.rows) == 1)
        gc.collect()
    return file.finish()


if __name__ == "__main__":
    sys.exit(main())
