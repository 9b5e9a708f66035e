"""``read``: a file, a folder or a name of the hub as state dicts. What ``inspect`` and ``--weights`` take."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import others, safetensors
from .kinds import kind_of
from .networks import Network, choose, networks_in
from .pickled import load_legacy, load_zip

# What a folder of a saved model holds, best first.
MAIN_FILES = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors",
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "adapter_model.safetensors",
)  # fmt: skip
HUB = "hf-hub:"
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar", ".npz", ".npy", ".onnx", ".pt2", ".pkl", ".h5",
            ".keras", ".json", ".gz", ".zip")  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """What a source holds.

    Attributes:
        source: the file that was read.
        networks: the state dicts in it, the one that is meant when nobody chooses first; there is at least one.
    """

    source: str
    networks: tuple[Network, ...]

    def network(self, entry: str | None = None) -> Network:
        """The state dict of this entry, or the first.

        Raises:
            ValueError: there is no such entry.
        """
        try:
            return choose(self.networks, entry)
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from error


def is_there(source: str | Path) -> bool:
    """Whether there is a file or folder of this name, which need be no possible name of one."""
    try:
        return Path(source).exists()
    except (OSError, ValueError):
        return False


def names_a_file(source: str) -> bool:
    """Whether a name was meant as one of a file, there or not: by its ending, or as a path."""
    on_hub = source.startswith((HUB, "timm/"))
    return is_there(source) or source.endswith(SUFFIXES) or (not on_hub and ("/" in source or os.sep in source))


def read(source: str | Path) -> Checkpoint:
    """Read the weights that a file or a folder holds. Nothing in it is executed.

    PyTorch's files of all versions (state dicts, checkpoints, whole models, TorchScript, exported programs),
    safetensors in one file or in shards with their index, ``.npz``, and ``.onnx`` where the package ``onnx`` is there.
    A file is known by its content, not by its name.

    Args:
        source: the file; or a folder as ``save_pretrained`` writes it; or ``hf-hub:OWNER/NAME``, the weights of that
            name on the Hugging Face hub, with the package ``huggingface_hub``.

    Returns:
        The state dicts in it. Their keys are those of the module: without ``module.``, ``_orig_mod.`` and the like.

    Raises:
        ValueError: it cannot be read or holds no weights. The message is one line that says what the source is and what
            to do.
    """
    if re.match("(https?|ftp|s3|gs)://", str(source)):
        raise ValueError(f"{source}: an address, not a file; download it, and name the file")
    path = _from_hub(str(source)) if str(source).startswith(HUB) and not is_there(source) else Path(source)
    if is_there(path) and path.is_dir():
        path = _main_file(path)
    try:
        found = _networks(path)
    except ValueError:
        raise
    except Exception as error:  # a damaged file makes its readers raise whatever they do
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(f"{path}: cannot be read, it is damaged: {type(error).__name__}: {reason}") from error
    if not found:
        raise ValueError(f"{path}: there are no weights in it")
    return Checkpoint(str(path), tuple(found))


def _networks(path: Path) -> list[Network]:
    kind = kind_of(path)
    if kind == "index":
        return _of_index(path)
    if kind == "onnx":
        network = others.load_onnx(path)
        return [network] if network.tensors else []
    if kind == "safetensors":
        tensors, skipped = safetensors.load(path)
        return _with_skipped(networks_in(tensors), skipped)
    content: object
    if kind == "legacy":
        content = load_legacy(path)
    elif kind in ("npz", "npy"):
        content = others.load_numpy(path)
    else:
        with zipfile.ZipFile(path) as archive:
            content = load_zip(path, archive) if kind == "zip" else others.load_exported(path, archive)
    found = networks_in(content)
    if not found:
        raise ValueError(f"{path}: no state dict in it, {_describe(content)}")
    return found


def _with_skipped(networks: list[Network], skipped: Sequence[tuple[str, str]]) -> list[Network]:
    if not skipped:
        return networks
    first, *rest = networks or [Network("", {})]
    return [Network(first.entry, first.tensors, first.skipped + tuple(skipped), first.layouts, first.optimizer), *rest]


def _describe(content: object) -> str:
    if isinstance(content, dict):
        if "param_groups" in content:
            return "but an optimizer's state"
        keys = ", ".join(repr(str(key)) for key in list(content)[:5]) + (", ..." if len(content) > 5 else "")
        return f"but a dict of {len(content)} entries{f' ({keys})' if keys else ''}"
    name = getattr(content, "name", None) or type(content).__name__
    if name.startswith("__torch__."):
        return "a TorchScript module without parameters, as torch.jit.freeze makes: save it before that"
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _of_index(path: Path) -> list[Network]:
    """The tensors of all shards that an index names, as one network."""
    weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
    tensors: dict[str, Any] = {}
    skipped: list[tuple[str, str]] = []
    for shard in dict.fromkeys(weight_map.values()):
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path}: the index is damaged: it names {shard!r} as a file beside it")
        place = path.parent / shard
        if not place.exists():
            raise ValueError(
                f"{path}: the shard {shard} is missing beside it; download all {len(set(weight_map.values()))}"
            )
        for network in _networks(place):
            tensors |= network.tensors
            skipped += network.skipped
    missing = [key for key in weight_map if key not in tensors and key not in dict(skipped)]
    if missing:
        raise ValueError(
            f"{path}: its shards lack {len(missing)} of its tensors, as {missing[0]!r}; download them again"
        )
    return _with_skipped(networks_in(tensors), skipped)


def _main_file(folder: Path) -> Path:
    """The file of weights in a folder."""
    try:
        names = sorted(one.name for one in folder.iterdir())
    except OSError as error:
        raise ValueError(f"{folder}: the folder cannot be read: {error.strerror}") from error
    for name in MAIN_FILES:
        if name in names:
            return folder / name
    if "saved_model.pb" in names:
        raise ValueError(f"{folder}: a model of TensorFlow, not read here; convert its weights to a .npz file")
    if ".metadata" in names:
        raise ValueError(
            f"{folder}: a distributed checkpoint; make one file of it: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pt"
        )
    weights = [name for name in names if name.endswith(SUFFIXES) and not name.endswith(".json")]
    if len(weights) == 1:
        return folder / weights[0]
    there = ", ".join(weights[:5] or names[:5]) or "nothing"
    which = "name one of its files" if weights else "there are no weights in it"
    raise ValueError(f"{folder}: a folder, and {which}; it holds {there}{', ...' if len(weights or names) > 5 else ''}")


def _from_hub(source: str) -> Path:
    """The file of weights of ``hf-hub:OWNER/NAME``, downloaded unless it has been before."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError(f"{source}: needs huggingface_hub: pip install huggingface_hub; or download the file yourself")
    hub: Any = importlib.import_module("huggingface_hub")
    name = source.removeprefix(HUB)
    try:
        there = hub.list_repo_files(name)
        main = next((file for file in MAIN_FILES if file in there), None)
        if main is not None and main.endswith(".index.json"):
            shards = main.removesuffix(".index.json").rpartition(".")
            return Path(hub.snapshot_download(name, allow_patterns=[main, f"{shards[0]}-*.{shards[2]}"])) / main
        if main is not None:
            return Path(hub.hf_hub_download(name, main))
    except Exception as error:  # the hub raises errors of many types
        for file in MAIN_FILES:  # without a network, what was downloaded before
            known = hub.try_to_load_from_cache(name, file)
            if isinstance(known, str):
                return Path(known)
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{source}: cannot be had from the Hugging Face hub: {reason}") from error
    raise ValueError(f"{source}: no file of weights of a usual name in it; it has {', '.join(there[:8])}")
