"""Images that occur more than once in a data set: in training and test they make a test of memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

WORDS = {"train": "training", "val": "validation", "test": "test"}


def digest_of(image: npt.NDArray) -> bytes:
    """Sixteen bytes that differ if any pixel of an image does."""
    return hashlib.sha256(np.ascontiguousarray(image).data).digest()[:16]


def same_images(parts: Mapping[str, tuple[Sequence[bytes], npt.NDArray]]) -> list[str]:
    """What to say of images that occur more than once, a sentence each; nothing if none does.

    Args:
        parts: of each split, "train", "val" or "test", the digests of its images and their labels ``(N,)`` or
            ``(N, K)``.
    """
    notes = []
    for one, other in combinations(parts, 2):
        known = set(parts[one][0])
        shared = sum(digest in known for digest in parts[other][0])
        if shared:
            notes.append(
                f"{shared} of the {len(parts[other][0])} {WORDS[other]} images are {WORDS[one]} images too, pixel for "
                "pixel"
            )
    labels: dict[bytes, set[bytes]] = {}
    for digests, values in parts.values():
        for digest, value in zip(digests, np.asarray(values), strict=True):
            labels.setdefault(digest, set()).add(value.tobytes())
    for name, (digests, _) in parts.items():
        repeated = len(digests) - len(set(digests))
        if repeated:
            notes.append(f"{repeated} of the {len(digests)} {WORDS[name]} images repeat another of them")
    differing = sum(len(values) > 1 for values in labels.values())
    if differing:
        notes.append(f"{differing} images occur with different labels")
    return notes
