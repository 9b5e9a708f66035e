"""Weights in files of other makers: NumPy's, ONNX, and PyTorch's exported programs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .kinds import first_line
from .networks import Network

# Numbers of dtypes in an exported program: the order of torch.export's schema, which is written into every file.
EXPORTED_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip


def load_numpy(path: Path) -> dict[str, Any]:
    """The arrays of a ``.npz`` or ``.npy`` file by name; what would have to be unpickled is left out.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {path.stem: found}
        with found:
            return dict(_arrays(found))
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: a NumPy file that cannot be read: {str(error).splitlines()[0]}") from error


def _arrays(archive: Any) -> Iterator[tuple[str, Any]]:
    for name in archive.files:
        try:
            yield name, archive[name]
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise
            yield name, np.empty(0, object)  # listed as what it is, an array of objects


def load_exported(path: Path, archive: zipfile.ZipFile) -> dict[str, torch.Tensor]:
    """The weights of an exported program (``torch.export.save``); its code is not looked at.

    Raises:
        ValueError: the archive is damaged, or of a version with another layout.
    """
    place = next(name for name in archive.namelist() if name.endswith("weights/model_weights_config.json"))
    folder = place.removesuffix("model_weights_config.json")
    try:
        return {
            key: _exported(archive.read(folder + entry["path_name"]), entry["tensor_meta"])
            for key, entry in json.loads(archive.read(place))["config"].items()
            if not entry["use_pickle"]
        }
    except (KeyError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: an exported program that cannot be read ({type(error).__name__}: {error}); save its weights: "
            "torch.save(torch.export.load(file).state_dict, 'weights.pt')"
        ) from error


def _exported(content: bytes, meta: dict[str, Any]) -> torch.Tensor:
    storage = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(EXPORTED_DTYPES[meta["dtype"]])
    sizes, strides = ([int(one["as_int"]) for one in meta[part]] for part in ("sizes", "strides"))
    return storage.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"]))


def load_onnx(path: Path) -> Network:
    """The weights of an ONNX file, with the groups of its convolutions.

    Raises:
        ValueError: the package ``onnx`` is missing, or the file is damaged.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ValueError(f"{path}: an ONNX file, and to read it onnx must be installed: pip install onnx")
    try:
        onnx: Any = importlib.import_module("onnx")
    except Exception as error:  # a part of it is missing, or does not fit
        raise ValueError(f"{path}: an ONNX file, and onnx cannot be imported: {first_line(error)}") from error
    try:
        graph = onnx.load(str(path)).graph
        values = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
        for node in graph.node:
            for one in node.attribute:
                if node.op_type == "Constant" and one.name == "value":
                    values[node.output[0]] = onnx.numpy_helper.to_array(one.t)
    except Exception as error:  # protobuf and onnx raise errors of many types
        raise ValueError(f"{path}: an ONNX file that cannot be read: {first_line(error)}") from error
    tensors: dict[str, torch.Tensor] = {}
    skipped, layouts = [], {}
    of_convolutions = {}
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and len(node.input) > 1:
            groups = next((one.i for one in node.attribute if one.name == "group"), 1)
            of_convolutions[node.input[1]] = groups, node.op_type == "ConvTranspose"
    # Convolutions in the order in which they run; files list their weights in any.
    for key in dict.fromkeys([*(name for name in of_convolutions if name in values), *values]):
        value = values[key]
        if value.ndim >= 3 and key not in of_convolutions:
            continue  # constants of the graph have any shape; a weight is what an operator takes as one
        try:
            tensors[key] = torch.from_numpy(np.array(value))
        except TypeError:
            skipped.append((key, f"is an array of {value.dtype}"))
        if key in of_convolutions:
            layouts[key] = of_convolutions[key]
    return Network("", tensors, tuple(skipped), layouts)
