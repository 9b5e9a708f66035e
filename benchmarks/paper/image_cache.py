"""Image files decoded once: pixels in a file that is mapped, under a key of what the images are.

The key holds each file's path, size and times, how it is decoded and by which Pillow: another folder never gets the
pixels of this one, and an image that was changed is decoded again. A digest of every image lies beside the pixels, so
that a cache that was cut or damaged is found, and two images with the same pixels.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from inmerge_fast.demo.data import require
from inmerge_fast.demo.duplicates import digest_of

from .pixels import read_grey

DECODING = 2  # raised whenever the same file gives other pixels


def default_folder() -> Path:
    """Where decoded images are kept: below ``XDG_CACHE_HOME``, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "inmerge_fast"


def decoded(
    paths: Sequence[Path], size: int, cache: Path, *, name: str, bits: int | None = None
) -> tuple[npt.NDArray[np.uint8], list[bytes]]:
    """Grey pixels of image files, from the cache if it has them.

    Args:
        paths: the files.
        size: side to which they are resized.
        cache: folder of the cache.
        name: what its files begin with.
        bits: as for :func:`benchmarks.paper.pixels.read_grey`.

    Returns:
        uint8 ``(N, 1, size, size)``, mapped from the cache, and a digest of each image.

    Raises:
        ValueError: an image cannot be decoded, or the cache cannot be written; the message names the file.
    """
    target = cache / f"{name}-{size}-{_key(paths, size, bits)}.npy"
    digests = target.with_suffix(".digests")
    if target.exists():
        try:
            return _read(target, digests, len(paths), size)
        except Exception as error:  # of a header that is damaged NumPy raises errors of many types
            print(f"{target}: is damaged ({error}); its images are decoded again", file=sys.stderr, flush=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _write(target, digests, paths, lambda path: read_grey(path, size, bits))
    except OSError as error:
        raise ValueError(
            f"{target}: decoded images cannot be written there ({error}); {len(paths) * size * size / 2**20:.0f} MiB "
            "are needed, and XDG_CACHE_HOME chooses another folder"
        ) from error
    return _read(target, digests, len(paths), size)


def _key(paths: Sequence[Path], size: int, bits: int | None) -> str:
    total = hashlib.sha256(f"{DECODING} {size} {bits} {importlib.metadata.version('pillow')}".encode())
    folders: dict[Path, str] = {}
    for path in paths:
        about = path.stat()  # of what a link leads to
        if path.parent not in folders:  # realpath looks at every folder above: 2 s for 112,120 files
            folders[path.parent] = os.path.realpath(path.parent)
        place = os.path.realpath(path) if path.is_symlink() else f"{folders[path.parent]}/{path.name}"
        # The last change of the entry shows an edit that has kept size and time, as a copy with its times does.
        total.update(f"\0{place}\0{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}".encode())
    return total.hexdigest()[:16]


def _read(target: Path, digests: Path, count: int, size: int) -> tuple[npt.NDArray[np.uint8], list[bytes]]:
    # Copy on write: torch warns of memory that it must not write to, although nothing here writes.
    images = np.load(target, mmap_mode="c", allow_pickle=False)
    if images.shape != (count, 1, size, size) or images.dtype != np.uint8:
        raise ValueError(f"it holds {images.dtype} {images.shape}")
    wanted = [bytes.fromhex(line) for line in digests.read_text().split()]
    with ThreadPoolExecutor() as pool:  # 5.6 GB of ChestX-ray14 at 224 px take one core 9 s
        found = list(pool.map(digest_of, images))
    if found != wanted:
        raise ValueError("pixels differ from their digests")
    return images, found


def _write(target: Path, digests: Path, paths: Sequence[Path], read: Callable[[Path], npt.NDArray[np.uint8]]) -> None:
    with replacing(target) as file, ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        lines = []
        bar = require("tqdm", "tqdm").tqdm(
            pool.map(read, paths), total=len(paths), desc="decoding", unit=" images", disable=None
        )
        try:
            for index, image in enumerate(bar):
                if index == 0:
                    shape = (len(paths), 1, *image.shape)
                    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                file.write(image.tobytes())
                lines.append(digest_of(image).hex())
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or the other 100,000 would be decoded first
            raise
        with replacing(digests) as beside:
            beside.write("\n".join(lines).encode())


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name once it is whole, so that no other process ever reads half of it."""
    handle, part = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(part, target)
    finally:
        Path(part).unlink(missing_ok=True)
