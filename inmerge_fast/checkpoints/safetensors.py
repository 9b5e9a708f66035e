"""``.safetensors`` files: a length, a JSON header and the tensors' bytes, all of it checked before any is believed."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import torch

LONGEST_HEADER = 100_000_000  # as the format says
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def load(path: Path) -> tuple[dict[str, torch.Tensor], list[tuple[str, str]]]:
    """The tensors of a file, and ``(key, reason)`` of those that PyTorch has no dtype for.

    Raises:
        ValueError: the file is cut short or damaged; the message says where.
    """
    with path.open("rb") as file:
        header, data = _header(path, file)
        tensors, skipped, spans = {}, [], []
        for key, entry in header.items():
            name, shape, start, end = _checked(path, key, entry)
            if end > data:
                raise ValueError(
                    f"{path}: a safetensors file that is cut short: tensor {key!r} ends at byte {end} of the data, "
                    f"and there are {data}; download it again"
                )
            spans.append((start, end, key))
            dtype = DTYPES.get(name)
            if dtype is None:
                skipped.append((key, f"has dtype {name}, which PyTorch does not have"))
                continue
            if end - start != math.prod(shape) * dtype.itemsize:
                raise _damaged(path, f"tensor {key!r} of {name} {shape} has {end - start} bytes")
            file.seek(-data + start, 2)
            tensors[key] = _tensor(bytearray(file.read(end - start)), dtype, shape)
        spans.sort()
        for (_, end, key), (start, _, other) in pairwise(spans):
            if start < end:
                raise _damaged(path, f"tensors {key!r} and {other!r} overlap")
    return {key: tensors[key] for key in sorted(tensors, key=_natural)}, skipped


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10: the file has forgotten the order of the module."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", key)]


def _header(path: Path, file: BinaryIO) -> tuple[dict[str, object], int]:
    """The entries of the header, and how many bytes follow it."""
    length = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size - 8
    if length > LONGEST_HEADER:
        raise _damaged(path, f"its header would have {length} bytes")
    if length > size:
        raise ValueError(
            f"{path}: a safetensors file that is cut short: its header has {length} bytes, and {max(size, 0)} are "
            "there; download it again"
        )
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON: {error}") from error
    header.pop("__metadata__", None)
    return header, size - length


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _checked(path: Path, key: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    if isinstance(entry, dict):
        name, shape, offsets = entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
        if isinstance(name, str) and shape is not None and offsets is not None and len(offsets) == 2:
            start, end = offsets
            if start <= end:
                return name, shape, start, end
    raise _damaged(path, f"the entry of tensor {key!r} is not what the format says")


def _counts(value: object) -> tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) and all(type(n) is int and n >= 0 for n in value) else None


def _tensor(content: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not content:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(content, dtype=torch.uint8).view(dtype).view(shape)


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: a safetensors file that is damaged: {what}; download it again")
