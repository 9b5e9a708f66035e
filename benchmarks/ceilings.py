"""What a machine does at its best, which floors are made of: copies and matrix products."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from benchmarks.timing import synchronize, wall_seconds

COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
COPIES = 12  # of which the first two fault pages in
GEMM_SIZE = {"cpu": 1024, "cuda": 4096}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written per second by ``copy_`` of much more than the caches hold; the best of 10.

    On a CPU with as many threads as PyTorch may use now. On a GPU by events: the wait for the end of a copy is not its.
    """
    return _copy_bandwidth(device, torch.get_num_threads() if device.type == "cpu" else 1)


@functools.cache
def _copy_bandwidth(device: torch.device, _threads: int) -> float:
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    if device.type == "cpu":
        seconds = [wall_seconds(lambda: target.copy_(source), device) for _ in range(COPIES)]
    else:
        events = []
        for _ in range(COPIES):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            end.record()
            events.append((start, end))
        synchronize(device)
        seconds = [start.elapsed_time(end) * 1e-3 for start, end in events]
    return 2 * source.numel() / min(seconds[2:])


@contextlib.contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Float32 matrix products in TF32 on a GPU, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def gemm_rate(device: torch.device) -> float:
    """Flops per second of a large square matrix product: TF32 on a GPU, float32 on a CPU; the best of 40."""
    size = GEMM_SIZE[device.type]
    square = torch.randn(size, size, device=device)
    with tf32(True):
        return 2 * size**3 / min(wall_seconds(lambda: torch.mm(square, square), device) for _ in range(40))
