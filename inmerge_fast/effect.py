"""Counts what the calls of a plan sample and merge, and says so where that is next to nothing."""

from __future__ import annotations

import atexit
import inspect
import math
import os
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .stats import NoEffectWarning

NO_EFFECT_CALLS = 100  # after which the first look is taken; the next ones after ten times as many
NO_EFFECT_RATE = 1e-4  # of the sampled pairs, below which merging has no effect: at prob 0.3 one merge in 33,000 steps
SUMMED_AT_ONCE = 16  # calls on the host
SHORTEST = 10  # calls that a run must have made for a word at its end
MAX_WITHOUT_A_WORD = 64  # monitors that are kept for a word at the end of the process


Buffer: TypeAlias = Any  # bytes, or what has them: it has no common type before Python 3.12


class RunningCounts(Protocol):
    """Counts that a path adds to in device memory."""

    largest: torch.Tensor

    def by_layer(self) -> torch.Tensor:
        """Pairs sampled and passed in each layer, int64 ``(layers, 2)``; nothing waits."""

    def reset(self) -> None:
        """Forget all calls."""


class OnItsWay:
    """A copy of a tensor to the host that has begun; nobody waits before it is read.

    Args:
        tensor: what is copied; on a CPU it is there at once.
        into: where to, in page-locked memory of the same shape and dtype; None for new memory.
    """

    def __init__(self, tensor: torch.Tensor, into: torch.Tensor | None = None) -> None:
        self._copied: torch.Event | None = None
        if tensor.device.type == "cpu":
            self._host = tensor
            return
        self._host = page_locked(tensor.shape, tensor.dtype, tensor.is_cuda) if into is None else into
        self._host.copy_(tensor, non_blocking=True)
        self._copied = torch.Event(device=tensor.device)
        # By itself it would be recorded on the current device, which need not be the one that copies.
        self._copied.record(torch.accelerator.current_stream(tensor.device))

    def has_arrived(self) -> bool:
        """Whether reading waits for nothing."""
        return self._copied is None or self._copied.query()

    def read(self) -> npt.NDArray[Any]:
        """The numbers; waits for them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.numpy()


def page_locked(shape: Sequence[int], dtype: torch.dtype, cuda: bool) -> torch.Tensor:
    """Host memory that a tensor on a device can be copied to without waiting."""
    with torch.inference_mode(False):  # it outlives the mode that this call may run in
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=cuda)


class EffectMonitor:
    """Counts the calls of a plan that may write, and warns once if they sample pairs and merge next to none.

    On an accelerator the counts stay in device memory and are copied asynchronously, so the warning may come a few
    calls late, and never makes the host wait. A run that ends before it has a word at the end of the process.

    Args:
        layers: number of layers.

    Attributes:
        calls: calls that were counted; on a GPU also those in which no coin fell.
    """

    def __init__(self, layers: int) -> None:
        self.calls = 0
        self._sampled, self._merged = np.zeros(layers, np.int64), np.zeros(layers, np.int64)
        self._unsummed: list[tuple[Buffer, Buffer]] = []  # counts and outcomes of the latest calls on the host
        self._largest = -math.inf
        self._merged_there: torch.Tensor | None = None  # on a device, by the eager path, as is the next one
        self._largest_there: torch.Tensor | None = None
        self._running: RunningCounts | None = None
        self._before: torch.Tensor | None = None  # what counts in device memory that were replaced had come to
        self._earlier: torch.Tensor | None = None  # the numbers of earlier plans
        self._host: torch.Tensor | None = None
        self._arriving: OnItsWay | None = None
        self._looked_at = 0  # calls that the copy on its way is of
        self._next_look: float = NO_EFFECT_CALLS
        self._has_spoken = False
        self._advice: str | None = None
        self._place = ("", 0)  # the user's line that called first

    # ------------------------------------------------------------------------------------------------------ counting

    def count(self, counts: Buffer, passed: Buffer, passed_total: float, largest: float) -> None:
        """Count a call whose outcome is on the host.

        Args:
            counts: pairs sampled in each layer, int64 ``(layers,)``.
            passed: whether each pair passed, layer after layer, bool ``(pairs,)``.
            passed_total: how many did.
            largest: the largest similarity; minus infinity if there is none.
        """
        if not len(passed):
            return
        self._unsummed.append((counts, passed if passed_total else b""))
        if len(self._unsummed) >= SUMMED_AT_ONCE:
            self._sum()
        if largest > self._largest:
            self._largest = largest
        self._count_call()

    def _sum(self) -> None:
        """Sum up by layer: several calls at once, since NumPy takes as long for one."""
        calls, self._unsummed = self._unsummed, []
        if calls:
            self._sampled += (
                np.frombuffer(b"".join(counts for counts, _ in calls), np.int64).reshape(len(calls), -1).sum(0)
            )
        merging = [call for call in calls if len(call[1])]
        if merging:
            counts = np.frombuffer(b"".join(counts for counts, _ in merging), np.int64)
            until = np.concatenate([[0], np.frombuffer(b"".join(passed for _, passed in merging), np.bool_).cumsum()])
            ends = counts.cumsum()
            self._merged += (until[ends] - until[ends - counts]).reshape(len(merging), -1).sum(0)

    def count_pairs(self, counts: npt.NDArray[np.int64], similarity: torch.Tensor, passed: torch.Tensor) -> None:
        """Count a call whose outcome is on the weights' device.

        Args:
            counts: pairs sampled in each layer, ``(layers,)``.
            similarity: of each pair, ``(pairs,)``, NaN for pairs with a non-finite filter.
            passed: bool ``(pairs,)``.
        """
        if not similarity.numel():
            return
        device = passed.device
        # float32 is enough for a message, and MPS has no float64
        largest = similarity.float().nan_to_num(nan=-math.inf).max()
        if self._merged_there is None or self._merged_there.device != device:
            self._keep(self._take_there())
            if self._largest_there is not None:
                self._largest = max(self._largest, float(self._largest_there))
            with torch.inference_mode(False):
                self._merged_there = torch.zeros(len(counts), dtype=torch.int32, device=device)
            self._largest_there = largest
        layer = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(device)
        self._merged_there = self._merged_there.index_add(0, layer, passed.int())
        self._largest_there = torch.maximum(self._largest_there, largest)  # type: ignore[arg-type]
        self._sampled += counts
        self._count_call()

    def count_running(self, running: RunningCounts) -> None:
        """Count a call that was added to counts in device memory.

        Args:
            running: the counts of this plan's calls; others than at the last call go on from there.
        """
        if running is not self._running or self._host is None:
            self._take_up(running)
        self._count_call()

    def _take_up(self, running: RunningCounts) -> None:
        if self._running is not None and running is not self._running:
            self._keep(self._running.by_layer())
        self._running = running
        if not _is_capturing():  # page-locking memory is slow, so now, and not in the middle of a run
            self._host = page_locked((3,), torch.int64, running.largest.is_cuda)

    def _count_call(self) -> None:
        self.calls += 1
        if self.calls >= self._next_look:
            self._look()
        elif self.calls == 1:
            self._place = callers_place()
            _without_a_word[id(self)] = self
            while len(_without_a_word) > MAX_WITHOUT_A_WORD:
                del _without_a_word[next(iter(_without_a_word))]

    # ------------------------------------------------------------------------------------------------------- totals

    def totals(self) -> torch.Tensor:
        """Pairs sampled and merged in each layer by all calls, int64 ``(layers, 2)``, where they are; nothing waits."""
        self._sum()
        parts = [] if self._running is None else [self._running.by_layer()]
        parts += [part for part in (self._before, self._take_there()) if part is not None]
        if not parts or self._sampled.any():  # not without need: it would be copied to the device
            parts.append(torch.from_numpy(np.stack([self._sampled, self._merged], 1)))
        found = parts[0]
        for part in parts[1:]:
            found = found + part.to(found.device)
        return found

    def _take_there(self) -> torch.Tensor | None:
        merged = self._merged_there
        return None if merged is None else torch.stack([torch.zeros_like(merged), merged], 1).long()

    def _keep(self, counts: torch.Tensor | None) -> None:
        if counts is not None:
            self._before = counts if self._before is None else self._before.to(counts.device) + counts

    def reset(self) -> None:
        """Forget all calls, as where a run goes on from a checkpoint."""
        running, host, advice = self._running, self._host, self._advice
        if running is not None:
            running.reset()
        EffectMonitor.__init__(self, len(self._sampled))
        self._running, self._host = running, host
        if advice is not None:
            self.advise(advice)

    def go_on_from(self, other: EffectMonitor) -> None:
        """Count on where the monitor of an earlier plan of the same target has stopped, except for the totals."""
        self.calls, self._place, self._has_spoken = other.calls, other._place, other._has_spoken
        self._next_look, self._advice = other._next_look, other._advice
        self._earlier = other._numbers()
        if _without_a_word.pop(id(other), None) is not None:
            _without_a_word[id(self)] = self

    def advise(self, advice: str) -> None:
        """What to say instead of naming a threshold that would act, and only at the end.

        For those who merge as rarely as they want to: no rate is too low for them, unless it is 0.
        """
        self._advice, self._next_look = advice, math.inf

    # -------------------------------------------------------------------------------------------------------- no effect

    def _numbers(self) -> torch.Tensor:
        """Pairs sampled, pairs merged and the key of the largest similarity, int64 ``(3,)``."""
        totals = self.totals().sum(0)
        keys = []
        if self._earlier is not None:
            totals = totals + self._earlier[:2].to(totals.device)
            keys.append(self._earlier[2:].to(totals.device))
        if self._largest > -math.inf or totals.device.type == "cpu":
            keys.append(torch.tensor([_key(self._largest)], device=totals.device))
        if self._largest_there is not None:
            bits = self._largest_there.view(1).view(torch.int32)
            keys.append(torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long().to(totals.device))
        if self._running is not None:
            keys.append(self._running.largest.long())
        return torch.cat([totals, torch.stack(keys).amax(0)])

    def _look(self) -> None:
        if _is_capturing():
            return  # a CUDA graph would take the copy along, and nobody may ask for its event
        if self._arriving is None:
            self._arriving, self._looked_at = OnItsWay(self._numbers(), self._host), self.calls
        if self._arriving.has_arrived():
            self._next_look *= 10
            sampled, merged, key = self._arriving.read().tolist()
            self._arriving = None
            _without_a_word.pop(id(self), None)
            if has_no_effect(sampled, merged):
                self._next_look, self._has_spoken = math.inf, True
                message = self._message(self._looked_at, sampled, merged, similarity_of(key))
                warnings.warn(message, NoEffectWarning, stacklevel=callers_level())

    def end(self) -> None:
        """Say now what there is to say, because the run is over; waits for the device."""
        message = self.last_word()
        if message is not None:
            warnings.warn(message, NoEffectWarning, stacklevel=callers_level())

    def last_word(self) -> str | None:
        """The warning of a run that is over and had no effect, once; waits for the device."""
        _without_a_word.pop(id(self), None)
        if self.calls < SHORTEST or self._has_spoken:
            return None
        sampled, merged, key = OnItsWay(self._numbers()).read().tolist()
        if not (has_no_effect(sampled, merged) if self._advice is None else sampled > 0 == merged):
            return None
        self._next_look, self._has_spoken = math.inf, True
        return self._message(self.calls, sampled, merged, similarity_of(key))

    def _message(self, calls: int, sampled: int, merged: int, largest: float) -> str:
        seen = f"{calls} calls of merge_ sampled {sampled:,} filter pairs and merged {merged or 'none'}"
        if self._advice is not None:
            return f"{seen}: {self._advice}"
        if largest == -math.inf:
            return (
                f"{seen}: no sampled pair had finite filters; check the model for NaN and Inf, or no filter had "
                'another one above the threshold, with partner="similar": print(inmerge_fast.similarity(model))'
            )
        if merged:
            return (
                f"{seen}, which is next to nothing: the largest similarity seen was {largest:.4f}, that of few pairs. "
                "print(inmerge_fast.similarity(model)) shows those of every layer; InMerge with "
                "threshold=RankBudget() finds thresholds that act and do not collapse a layer"
            )
        acting = max(math.floor((largest - 0.1 * abs(largest)) * 1000) / 1000, -1.0)
        return (
            f"{seen}: the largest similarity seen was {largest:.4f}. A threshold of {acting:.3f} would have acted; "
            "merge_(..., dry_run=True) shows the similarities of every layer"
        )


def has_no_effect(sampled: int, merged: int) -> bool:
    """Whether so few of the sampled pairs merged that nothing can come of it."""
    return sampled > 0 and merged < NO_EFFECT_RATE * sampled


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _key(similarity: float) -> int:
    bits = int(np.float32(similarity).view(np.int32))
    return bits if bits >= 0 else bits ^ 0x7FFFFFFF


def similarity_of(key: int) -> float:
    """The similarity that sorts like the integer ``key``; minus infinity where there was none."""
    if key == -(2**31):
        return -math.inf
    return float(np.array(key if key >= 0 else key ^ 0x7FFFFFFF, np.int32).view(np.float32))


def callers_level() -> int:
    """``stacklevel``, for a warning in the calling function, of the user's frame."""
    return _users_frame(inspect.currentframe())[0] - 1


def callers_place() -> tuple[str, int]:
    """File and line of the user's frame."""
    frame = _users_frame(inspect.currentframe())[1]
    return (sys.argv[0], 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def _users_frame(frame: FrameType | None) -> tuple[int, FrameType | None]:
    """The first frame, and how far out it is, that is in no library: it calls Lightning, which calls the optimizer.

    Where all are, as in a training script that is installed itself, the first outside this package and PyTorch.
    """
    level, first = 1, (0, None)  # type: tuple[int, tuple[int, FrameType | None]]
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] not in (__package__, "torch"):
            if first[1] is None:
                first = level, frame
            if not _is_of_a_library(frame.f_code.co_filename):
                return level, frame
        level, frame = level + 1, frame.f_back
    return first if first[1] is not None else (level, None)


def _is_of_a_library(file: str) -> bool:
    return (
        file.startswith(("<frozen ", os.path.join(sysconfig.get_path("stdlib"), "")))
        or f"{os.sep}site-packages{os.sep}" in file
        or f"{os.sep}dist-packages{os.sep}" in file
    )


# Monitors that have not looked yet, oldest first: what they have to say at the end of the process. They are kept alive
# though their model may be gone, as after a main() that has returned, with a few numbers per filter each.
_without_a_word: dict[int, EffectMonitor] = {}


@atexit.register
def _say_last_words() -> None:
    words = []
    for monitor in list(_without_a_word.values()):
        try:
            message = monitor.last_word()
        except RuntimeError:  # the device has failed, and the script with it, which has other things to say
            continue
        if message is not None:
            words.append((message, monitor._place))
    if words:
        message, (file, line) = words[-1]
        others = f" (and {len(words) - 1} other targets likewise)" if len(words) > 1 else ""
        warnings.warn_explicit(message + others, NoEffectWarning, file, line)
