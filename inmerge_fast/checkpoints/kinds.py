"""What a file is, told by its first bytes and not by its name, and what to do with those that hold no weights."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tarfile
import zipfile
from pathlib import Path

HEAD = 1024
# PyTorch's number at the start of its files without a zip, as pickled.
LEGACY = (b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"l\xfc\x9cF\xf9 j\xa8P\x19")
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7-Zip",
          b"Rar!": "RAR"}  # fmt: skip
OTHERS = {
    b"\x89HDF": "an HDF5 file, as Keras and TensorFlow write; convert its weights to a .npz or .safetensors file",
    b"GGUF": "a GGUF file of llama.cpp, whose weights are packed in blocks; take the file that it was made from",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program or library",
}


def kind_of(path: Path) -> str:
    """How a file is read: "zip", "legacy", "safetensors", "npz", "npy", "onnx", "exported" or "index".

    Raises:
        ValueError: it is no file, cannot be opened, or holds no weights; the message says what it is and what to do.
    """
    head, size = _head(path)
    if size == 0:
        raise ValueError(f"{path}: the file is empty; a download or a save was cut short, so repeat it")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer instead of the file itself; run git lfs pull, or download it")
    if path.suffix == ".distcp":
        raise ValueError(
            f"{path}: a part of a distributed checkpoint; name its folder, {path.parent}, to see what to do"
        )
    if head.startswith(b"PK"):
        return _kind_of_zip(path, size)
    if head.startswith(b"\x80") and any(number in head[:24] for number in LEGACY):
        return "legacy"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors"
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x3a")):  # its version, its maker
        return "onnx"
    text = _text(head)
    if text is not None:
        return _kind_of_text(path, text)
    raise ValueError(f"{path}: {_what_else(path, head, size)}")


def check_readable(path: Path) -> None:
    """Raise where a path is no regular file that can be opened.

    Raises:
        ValueError: it is not; the message says why.
    """
    try:
        mode = path.stat().st_mode  # follows links
    except FileNotFoundError:
        raise ValueError(f"there is no file {str(path)!r}") from None
    except (OSError, ValueError) as error:  # a loop of links, a name too long, a NUL in it
        raise ValueError(f"{str(path)!r}: cannot be opened: {why(error)}") from error
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path}: a folder, not a file")
    if not stat.S_ISREG(mode):  # reading a pipe would wait for ever
        raise ValueError(f"{path}: not a regular file (a pipe, a socket or a device)")


def first_line(error: Exception) -> str:
    """What an error says, or its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def why(error: Exception) -> str:
    """What the system says of a file, without its name and number."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _head(path: Path) -> tuple[bytes, int]:
    check_readable(path)
    try:
        with path.open("rb") as file:
            return file.read(HEAD), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {why(error)}") from error


def _kind_of_zip(path: Path, size: int) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{path}: the start of a zip archive (as torch.save writes), but its end is missing or damaged: {size} "
            "bytes, so a download or a save was cut short; repeat it"
        ) from error
    if any(name.endswith("weights/model_weights_config.json") for name in names):
        return "exported"
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return "zip"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    if any(name.endswith((".weights.h5", "keras_metadata.pb")) for name in names):
        raise ValueError(f"{path}: a Keras model, not read here; convert its weights to a .npz or .safetensors file")
    if any(name.endswith("serialized_exported_program.json") for name in names):
        raise ValueError(
            f"{path}: an exported program of an old PyTorch, not read here; save its weights with that version: "
            "torch.save(torch.export.load(file).state_dict, 'weights.pt')"
        )
    raise ValueError(f"{path}: a zip archive that is no checkpoint, with {_some(names)}; name a file of it, unpacked")


def _kind_of_text(path: Path, text: str) -> str:
    start = text.lstrip("\ufeff \t\r\n")
    if start[:15].lower().startswith(("<!doctype", "<html", "<?xml", "<head", "<body")):
        raise ValueError(
            f"{path}: an HTML page (or XML) instead of weights, as from a download that needs a login or has moved; "
            "download the file itself"
        )
    if start.startswith(("{", "[")):
        content = None
        with contextlib.suppress(ValueError, OSError, RecursionError):
            content = json.loads(path.read_text("utf-8"))
        if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
            return "index"
        raise ValueError(f"{path}: a JSON file{'' if content is not None else ', damaged'}, not weights")
    line = " ".join(start.split())[:40]
    raise ValueError(f"{path}: a text file instead of weights; it begins with {line!r}")


def _text(head: bytes) -> str | None:
    for cut in range(4):  # the head may end within a character
        with contextlib.suppress(UnicodeDecodeError):
            text = head[: len(head) - cut].decode("utf-8")
            return text if all(c.isprintable() or c in "\ufeff\t\r\n\f" for c in text) else None
    return None


def _what_else(path: Path, head: bytes, size: int) -> str:
    for start, what in PACKED.items():
        if head.startswith(start):
            return f"compressed with {what}; unpack it first"
    for start, what in OTHERS.items():
        if head.startswith(start):
            return what
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model, not read here"
    if head[257:262] == b"ustar" or tarfile.is_tarfile(path):
        with contextlib.suppress(tarfile.TarError, OSError), tarfile.open(path) as archive:
            names = archive.getnames()
            if {"pickle", "storages", "tensors"} <= set(names):
                return "a checkpoint of PyTorch before 0.2 (a tar archive); load and save it once with torch.load"
            if names:  # zeros pass for an empty one
                return f"a tar archive with {_some(names)}; unpack it and name a file in it"
    if head[:1] == b"\x80" and 2 <= head[1] <= 5:
        return (
            "a pickle that torch.save did not write; to load it would run any code in it, so load it where you trust "
            "it and save the weights with torch.save"
        )
    return f"{size} bytes that are no checkpoint of any known format"


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "nothing in it"
