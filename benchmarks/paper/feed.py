"""Training images on the device: all of them where they fit, else batches that are read while the network computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence

import torch

from inmerge_fast.demo.train import Schedule

CPU_BYTES = 2 * 2**30  # on a CPU: up to here images are taken from memory, or the mapped file, when they are needed
SHARE = 0.5  # of a GPU's free memory that images may take; uint8, 224 px in colour: 150 KB each
AHEAD = 4  # batches that are read before they are needed


class Feed:
    """Gives the images of one batch after another.

    Args:
        images: uint8 ``(N, channels, [depth,] height, width)``, in memory or mapped from a file.
        device: where the batches are wanted.
        room: bytes that all images may take there; by default half of the GPU's free memory, or 2 GiB on a CPU.
    """

    def __init__(self, images: torch.Tensor, device: torch.device, room: int | None = None) -> None:
        if room is None:
            room = int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else CPU_BYTES
        self.resident = images.numel() <= room
        self._images = images.to(device) if self.resident else images
        self._device = device
        self._ready: queue.Queue[torch.Tensor | BaseException] = queue.Queue(AHEAD)
        self._thread: threading.Thread | None = None
        self._left = threading.Event()

    def begin(self, batches: Sequence[torch.Tensor]) -> None:
        """Say which indices will be asked for, in order; needed before a batch where not all images fit."""
        self.close()
        if self.resident:
            return
        self._left = threading.Event()
        self._ready = queue.Queue(AHEAD)
        self._thread = threading.Thread(target=self._read, args=(list(batches), self._ready, self._left), daemon=True)
        self._thread.start()

    def __call__(self, indices: torch.Tensor) -> torch.Tensor:
        """The images at some indices ``(n,)`` on the host, on the device; where not all fit, the next that were said.

        Raises:
            RuntimeError: other images are asked for than :meth:`begin` said.
        """
        if self.resident:
            return self._images[indices.to(self._device, non_blocking=True)]
        if self._thread is None:
            raise RuntimeError("begin was not called: it says which images are to be read")
        found = self._ready.get()
        if isinstance(found, BaseException):
            raise found
        if len(found) != len(indices):
            raise RuntimeError(f"asked for {len(indices)} images where begin said {len(found)}")
        return found.to(self._device, non_blocking=True)

    def close(self) -> None:
        """Stop reading ahead."""
        self._left.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _read(self, batches: list[torch.Tensor], ready: queue.Queue, left: threading.Event) -> None:
        try:
            for indices in batches:
                found = self._images[indices]  # PyTorch gathers without the interpreter's lock
                _put(ready, found.pin_memory() if self._device.type == "cuda" else found, left)
            _put(ready, RuntimeError("asked for more batches than begin said"), left)
        except BaseException as error:  # is raised where the batch is asked for
            _put(ready, error, left)


def _put(ready: queue.Queue, what: torch.Tensor | BaseException, left: threading.Event) -> None:
    while not left.is_set():
        try:
            ready.put(what, timeout=0.1)
            return
        except queue.Full:
            continue


def parts_of(
    schedule: Schedule, epoch: int, images: int, micro_batches: int = 1, rank: int = 0, ranks: int = 1
) -> Iterator[torch.Tensor]:
    """Indices of every forward pass of an epoch, in the order of :func:`inmerge_fast.demo.train.epoch_steps`."""
    order = schedule.order(epoch, images)
    for batch in order[: schedule.batches(images) * schedule.batch_size].split(schedule.batch_size):
        for part in batch.tensor_split(micro_batches):
            yield part[rank::ranks]
