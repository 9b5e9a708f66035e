"""Watches whether merging does anything, without waiting for the device."""

from __future__ import annotations

import inspect
import math
import warnings

import numpy as np
import torch

from .stats import NoEffectWarning

NO_EFFECT_CALLS = 100


class EffectMonitor:
    """Warns once if :data:`NO_EFFECT_CALLS` calls sampled pairs and merged none.

    On an accelerator the running totals stay in device memory and are copied asynchronously, so the warning may come a
    few calls late, and never makes the host wait.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._done = False
        self._largest = -math.inf
        self._totals: torch.Tensor | None = None
        self._host: torch.Tensor | None = None
        self._copied: torch.Event | None = None

    def count_pairs(self, similarity: torch.Tensor, passed: torch.Tensor) -> None:
        """Count a call that was allowed to write, with the similarity and outcome of each of its sampled pairs.

        Args:
            similarity: ``(pairs,)``, NaN for pairs with a non-finite filter.
            passed: bool ``(pairs,)``.
        """
        if self._done or not similarity.numel():
            return
        # float32 is enough for a message, and MPS has no float64
        largest = similarity.float().nan_to_num(nan=-math.inf).max()
        now = torch.stack([passed.sum(dtype=torch.float32), largest])
        if self._totals is not None:
            now = torch.stack([self._totals[0] + now[0], torch.maximum(self._totals[1], now[1])])
        self._totals = now
        if now.device.type == "cpu" and now[0] > 0:
            self._done = True
        self.count_call(now)

    def count_numbers(self, pairs: int, passed: int, largest: float) -> None:
        """Count a call that was allowed to write, whose outcome is on the host.

        Args:
            pairs: how many were sampled.
            passed: how many passed.
            largest: the largest similarity; minus infinity if there is none.
        """
        if self._done or not pairs:
            return
        self._calls += 1
        self._largest = max(self._largest, largest)
        if passed:
            self._done = True
        elif self._calls >= NO_EFFECT_CALLS:
            self._done = True
            warnings.warn(_message(self._largest), NoEffectWarning, stacklevel=_callers_level())

    def count_call(self, totals: torch.Tensor) -> None:
        """Count a call that sampled pairs and was allowed to write.

        Args:
            totals: ``(2,)`` over all calls so far: pairs passed, and the largest similarity, as float32 or as the int32
                key of ``kernels/merge.py``.
        """
        if self._done:
            return
        self._calls += 1
        host = self._host if self._host is not None and self._host.dtype == totals.dtype else None
        if self._calls < NO_EFFECT_CALLS and host is not None:
            return
        if totals.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # a graph would take the copy along, nobody may ask for its event, and nothing may be page-locked
        if host is None:  # page-locking memory is slow, so not in the middle of a run
            with torch.inference_mode(False):
                host = self._host = torch.empty(2, dtype=totals.dtype, device="cpu", pin_memory=totals.is_cuda)
            self._copied = None
        if self._calls < NO_EFFECT_CALLS:
            return
        if self._copied is None:
            host.copy_(totals, non_blocking=True)
            if totals.device.type != "cpu":
                self._copied = torch.Event(device=totals.device)
                # By itself it would be recorded on the current device, which need not be the one that copies.
                self._copied.record(torch.accelerator.current_stream(totals.device))
        if self._copied is None or self._copied.query():
            self._done = True
            if host[0] == 0:
                warnings.warn(_message(_largest_similarity(host)), NoEffectWarning, stacklevel=_callers_level())


def _largest_similarity(totals: torch.Tensor) -> float:
    if totals.dtype == torch.float32:
        return float(totals[1])
    key = int(totals[1])
    if key == -(2**31):
        return -math.inf
    return float(np.array(key if key >= 0 else key ^ 0x7FFFFFFF, np.int32).view(np.float32))


def _callers_level() -> int:
    """``stacklevel`` of the first frame outside this package and PyTorch's wrapper around ``merge_``."""
    level, frame = 1, inspect.currentframe()
    while (frame := frame.f_back if frame else None) is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] not in (__package__, "torch"):
            return level
        level += 1
    return level


def _message(largest: float) -> str:
    seen = f"{NO_EFFECT_CALLS} calls of merge_ sampled filter pairs and merged none"
    if largest == -math.inf:
        return (
            f"{seen}: no sampled pair had finite filters; check the model for NaN and Inf, or, with "
            'partner="similar", no filter had another one above the threshold: print(inmerge_fast.similarity(model))'
        )
    acting = max(math.floor((largest - 0.1 * abs(largest)) * 1000) / 1000, -1.0)
    return (
        f"{seen}: the largest similarity seen was {largest:.4f}. A threshold of {acting:.3f} would have acted; "
        "merge_(..., dry_run=True) shows the similarities of every layer"
    )
