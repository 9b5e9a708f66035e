"""``python -m inmerge_fast inspect``: how alike the filters of a saved or pretrained model are."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..reference import filter_of
from .similarity import Similarity, similarity

RATES = (0.01, 0.05, 0.2)
PICTURED_LAYERS = 3


def load_weights(source: str) -> tuple[nn.Module | dict[str, torch.Tensor], str]:
    """The weights of a checkpoint file, or a timm model by its name.

    Checkpoints are read with ``weights_only=True``, so that nothing in them is executed.

    Returns:
        A state dict or a model, and what it is, for people.

    Raises:
        ValueError: it cannot be read, holds no weights, or needs a package that is not installed.
    """
    path = Path(source)
    if path.is_file():
        return _load_checkpoint(path)
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".tar", ".safetensors") or "/" in source:
        raise ValueError(f"there is no file {source!r}")
    if importlib.util.find_spec("timm") is None:
        raise ValueError(f"{source!r} is not a file, and for a timm model timm must be installed: pip install timm")
    timm: Any = importlib.import_module("timm")
    try:
        return timm.create_model(source, pretrained=True).eval(), f"timm model {source}, pretrained"
    except Exception as error:  # timm and the hub raise errors of many types
        raise ValueError(f"{source!r} is not a file, and timm cannot make it: {error}") from error


def _load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    if path.suffix == ".safetensors":
        if importlib.util.find_spec("safetensors") is None:
            raise ValueError(f"{path}: reading it needs safetensors: pip install safetensors")
        content: object = importlib.import_module("safetensors.torch").load_file(path)
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{path}: not a checkpoint of tensors alone. A pickled model can run any code when it is loaded, so "
                f"it is refused; save model.state_dict() instead ({reason})"
            ) from error
        except (RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    state, key = _state_dict_in(content)
    if not state:
        raise ValueError(f"{path}: no state dict in it, a {type(content).__name__}")
    return state, f"{path}{f', entry {key!r}' if key else ''}, {len(state)} tensors"


def _state_dict_in(content: object) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a mapping, or of the entry of it that has the most, and that entry's key."""
    if not isinstance(content, Mapping):
        return {}, ""
    own = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    nested = [(str(key), _state_dict_in(value)) for key, value in content.items() if key != "optimizer"]
    best = max(nested, key=lambda item: len(item[1][0]), default=("", ({}, "")))
    key, (state, inner) = best
    return (state, f"{key}.{inner}" if inner else key) if len(state) > len(own) else (own, "")


def describe(found: Similarity) -> str:
    """The table of similarities, and the thresholds for some merge rates."""
    layers = [layer for layer in found.layers if layer.pairs]
    width = max(len("layer"), *(len(layer.name) for layer in layers)) if layers else 5
    columns = [(rule, rate) for rule in ("random", "nearest") for rate in RATES]
    lines = [
        str(found),
        "",
        "Threshold at which a share of the sampled filters would merge, by partner rule (similar as nearest):",
        f"{'layer':{width}}  " + "  ".join(f"{f'{rule} {100 * rate:g} %':>12}" for rule, rate in columns),
    ]
    lines += [
        f"{layer.name:{width}}  " + "  ".join(f"{layer.threshold_for_rate(rate, rule):12.4f}" for rule, rate in columns)
        for layer in layers
    ]
    return "\n".join(lines)


def write_pictures(
    weights: nn.Module | Mapping[str, torch.Tensor], found: Similarity, names: Sequence[str], folder: Path
) -> list[Path]:
    """Write the pictures; heat maps and pairs of filters of the layers ``names`` only.

    Raises:
        ImportError: matplotlib or scipy is missing.
    """
    from . import pictures

    folder.mkdir(parents=True, exist_ok=True)
    figures = {f"histograms-{page}": figure for page, figure in enumerate(pictures.histograms(found), 1)}
    if figures:
        figures["merge-rates"] = pictures.merge_rates(found)
    for name in names:
        matrix = found.matrix(name)
        safe = re.sub(r"[^\w.-]+", "_", name)
        figures[f"heat-map-{safe}"] = pictures.heat_map(name, matrix)
        figures[f"pairs-{safe}"] = pictures.filter_pairs(name, _filters(weights, name, len(matrix)), matrix)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
    return paths


def _filters(weights: nn.Module | Mapping[str, torch.Tensor], name: str, count: int) -> list[torch.Tensor]:
    if not isinstance(weights, nn.Module):
        return list(weights[name])
    module: Any = weights.get_submodule(name)
    groups, transposed = getattr(module, "groups", 1), getattr(module, "transposed", False)
    return [filter_of(module.weight, i, groups=groups, transposed=transposed) for i in range(count)]


def most_alike(found: Similarity) -> list[str]:
    """The layers in which a twentieth of the filters have the most similar nearest neighbours."""
    layers = [layer for layer in found.layers if layer.pairs]
    layers.sort(key=lambda layer: -layer.threshold_for_rate(0.05, "nearest"))
    return [layer.name for layer in layers[:PICTURED_LAYERS]]


def main(arguments: Sequence[str]) -> None:
    """Run ``python -m inmerge_fast inspect``.

    Args:
        arguments: command line after the word ``inspect``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m inmerge_fast inspect",
        description="Compare the filters of each convolution of a saved model with each other: a table, the threshold "
        "for some merge rates, and pictures.",
    )
    parser.add_argument("source", metavar="CHECKPOINT_OR_TIMM_NAME", help="a file with a state dict (read safely, "
                        "with weights_only=True), or the name of a pretrained timm model")  # fmt: skip
    parser.add_argument("--output", metavar="FOLDER", help="where the pictures go (default: similarity-NAME)")
    parser.add_argument("--no-pictures", action="store_true", help="only print the table")
    parser.add_argument("--layer", action="append", metavar="NAME", help="draw heat map and pairs of this layer; "
                        f"repeatable (default: the {PICTURED_LAYERS} layers with the most alike filters)")  # fmt: skip
    parser.add_argument("--include-linear", action="store_true", help="Linear weights too")
    options = parser.parse_args(arguments)
    try:
        weights, title = load_weights(options.source)
        found = similarity(weights, include_linear=options.include_linear)
        for name in options.layer or ():
            found[name]
    except ValueError as error:
        parser.error(str(error))
    except KeyError as error:
        parser.error(f"--layer: {error.args[0]}")
    print(f"{title}\n")
    print(describe(found))
    if options.no_pictures:
        return
    folder = Path(options.output or f"similarity-{Path(options.source).stem}")
    try:
        paths = write_pictures(weights, found, options.layer or most_alike(found), folder)
    except ImportError as error:
        parser.error(f"the pictures need matplotlib and scipy ({error}): pip install 'inmerge_fast[plots]', or "
                     "--no-pictures")  # fmt: skip
    print("\npictures:", *paths, sep="\n  ")
