"""PyTorch's own files, which are pickles: read without loading a class or calling a function that they name."""

from __future__ import annotations

import _compat_pickle
import contextlib
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from .kinds import first_line
from .stand_ins import stand_in_for

CHUNK = 1 << 20  # bytes
RETRIES = 20  # classes of mappings and lists, found one by one
FILLED = re.compile(r"Can only (?:(SETITEMS?) for .*|append to lists|extend lists)[ ,]+but got <class '([^']+)'>")


def load_zip(path: Path, archive: zipfile.ZipFile) -> object:
    """What ``torch.save`` or ``torch.jit.save`` has written.

    Raises:
        ValueError: it is damaged, or cannot be read without running code.
    """
    _check_sums(archive)
    names = archive.namelist()
    root = next(name for name in names if name == "data.pkl" or name.endswith("/data.pkl")).removesuffix("data.pkl")
    with archive.open(f"{root}data.pkl") as stream:
        references = list(_references(io.BytesIO(stream.read()), 1))
    if f"{root}constants.pkl" in names:  # TorchScript: PyTorch would load its code, so it gets the data alone
        source = io.BytesIO()
        with zipfile.ZipFile(source, "w") as copy:
            for name in names:
                if name.startswith(f"{root}data/") or name in (f"{root}data.pkl", f"{root}version", f"{root}byteorder"):
                    copy.writestr(name, archive.read(name))
        return _load(path, source, references)
    with path.open("rb") as file:
        return _load(path, file, references)


def _check_sums(archive: zipfile.ZipFile) -> None:
    """Compare all checksums, which PyTorch's reader does not; 25 million weights take 0.03 s.

    Raises:
        zipfile.BadZipFile: one is wrong.
    """
    for entry in archive.infolist():
        if entry.CRC == 0:  # PyTorch has written none, after torch.serialization.set_crc32_options(False)
            del entry.CRC  # zipfile's own way of not knowing it
            continue
        with archive.open(entry) as content:
            while content.read(CHUNK):
                pass


def load_legacy(path: Path) -> object:
    """What ``torch.save`` wrote before PyTorch 1.6, and writes without a zip.

    Raises:
        ValueError: it is damaged, or cannot be read without running code.
    """
    with path.open("rb") as file:
        references = list(_references(file, 4))  # magic number, protocol, system, content
        return _load(path, file, references)


def _load(path: Path, source: BinaryIO, references: list[str]) -> object:
    known = dict(_numpy()) | {name: _first for name in references if name.startswith("torch.jit._pickle.")}
    made_by = dict(_tensor_classes(references))
    filled = {"collections.defaultdict": "mapping", "collections.deque": "list"}
    for _ in range(RETRIES):
        allowed = dict(known)
        for reference in dict.fromkeys(references):
            name = _modern(reference)
            if name not in known:
                stand_in = stand_in_for(
                    name,
                    filled=filled.get(name, ""),
                    tensor=name in made_by,
                    wrapper=made_by.get(name) == "torch._utils._rebuild_wrapper_subclass",
                )
                allowed |= {reference: stand_in, name: stand_in}  # PyTorch knows not all names of Python 2
        try:
            source.seek(0)
            with warnings.catch_warnings(), _only(allowed):
                warnings.simplefilter("ignore")  # of dtypes and pickle protocols that PyTorch is about to drop
                return torch.load(source, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            wanted = FILLED.search(str(error))
            if wanted and wanted[2] not in filled:
                filled[wanted[2]] = "mapping" if wanted[1] else "list"
                continue
            reason = _reason(error)
            if "Unsupported operand" in reason:
                raise ValueError(
                    f"{path}: pickled by a protocol that PyTorch's safe reader does not take (pickle_protocol=4 or "
                    "5, or a damaged file); load it where you trust it, and save it again as torch.save does by default"
                ) from error
            if "Only persistent_load of storage" in reason:  # a file without a zip keeps the source code of modules
                reason = f"it holds an object of the class {_with_source(source)} with its source code"
            raise ValueError(
                f"{path}: not a checkpoint of tensors alone: {reason}. A pickled model can run any code when "
                "it is loaded, so it is refused; save model.state_dict() instead"
            ) from error
        except Exception as error:  # torch.load raises whatever its readers do
            raise ValueError(f"{path}: a checkpoint that is damaged: {first_line(error)}") from error
    raise ValueError(
        f"{path}: holds mappings and lists of more than {RETRIES} classes; save model.state_dict() instead"
    )


@contextlib.contextmanager
def _only(allowed: dict[str, Any]) -> Iterator[None]:
    """Let PyTorch's reader use these, and for a while none of those that the process has allowed elsewhere."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals([(value, name) for name, value in allowed.items()])
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _reason(error: Exception) -> str:
    """What stood in the way, without PyTorch's advice to load the file unsafely."""
    text = " ".join(line.strip() for line in str(error).splitlines())
    found = re.search(r"WeightsUnpickler error: (.*?)(?:\. Please use|$| Check the documentation)", text)
    return (found[1] if found else text.split(". ")[0]).strip(" .")


def _references(stream: BinaryIO, pickles: int) -> Iterator[str]:
    """Names of the functions and classes that pickles refer to, as they stand there, each time they do."""
    for _ in range(pickles):
        memo: dict[object, str] = {}
        last = ""
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    last = str(argument).replace(" ", ".")
                    yield last
                elif opcode.name in ("BINPUT", "LONG_BINPUT"):
                    if last:
                        memo[argument] = last
                    last = ""
                elif opcode.name in ("BINGET", "LONG_BINGET") and argument in memo:
                    yield memo[argument]
                elif opcode.name not in ("MARK", "PROTO"):
                    last = ""
        except ValueError:  # cut off or no pickle at all: whoever reads it says so
            return


def _with_source(stream: BinaryIO) -> str:
    """The first class that a file without a zip names together with its source: "module", the class, its file."""
    stream.seek(0)
    for _ in range(4):
        memo: dict[object, object] = {}
        last: object = None
        named = ""
        with contextlib.suppress(ValueError):
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("BINPUT", "LONG_BINPUT"):
                    memo[argument] = last
                    continue
                if named and opcode.name == "BINUNICODE":
                    return named
                named = str(argument).replace(" ", ".") if opcode.name == "GLOBAL" and last == "module" else ""
                last = memo.get(argument) if opcode.name in ("BINGET", "LONG_BINGET") else argument
    return "?"


def _modern(reference: str) -> str:
    module, _, name = reference.rpartition(".")
    if (module, name) in _compat_pickle.NAME_MAPPING:
        module, name = _compat_pickle.NAME_MAPPING[module, name]
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


def _tensor_classes(references: list[str]) -> Iterator[tuple[str, str]]:
    """Subclasses of tensors, and what makes their data: they follow it, and that the function that makes one of it."""
    for first, second, third in zip(references, references[1:], references[2:], strict=False):
        if first == "torch._tensor._rebuild_from_type_v2" and second.startswith("torch._utils._rebuild"):
            yield third, second


def _numpy() -> Iterator[tuple[str, Any]]:
    """What arrays and scalars of NumPy are made with, old and new names."""
    scalar, array = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]
    for core in ("numpy.core", "numpy._core"):
        yield f"{core}.multiarray.scalar", scalar
        yield f"{core}.multiarray._reconstruct", array
    for kept in ("ndarray", "memmap", "recarray", "rec.recarray", "matrix", "matrixlib.defmatrix.matrix"):
        yield f"numpy.{kept}", np.ndarray
    for row in ("record", "rec.record"):
        yield f"numpy.{row}", np.record
    yield "numpy.dtype", np.dtype
    for kind in vars(np.dtypes).values():
        if isinstance(kind, type):
            yield f"numpy.dtypes.{kind.__name__}", kind


def _first(value: Any, *_: Any) -> Any:
    """TorchScript names the types of lists by functions that return them."""
    return value
