"""``python -m inmerge_fast inspect``: how alike the filters of a saved or pretrained model are."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.networks import Network
from ..checkpoints.read import HUB, Checkpoint, is_there, names_a_file, read
from ..stats import describe_skipped
from .outlook import outlook
from .outputs import Outputs, describe, write_pictures, write_table
from .similarity import MOST_PICTURED, PICTURED_LAYERS, most_alike, similarity


def load_weights(source: str, entry: str | None = None) -> tuple[nn.Module | Network, str]:
    """The weights of a checkpoint, or a timm model by its name.

    Args:
        source: a file or folder (:func:`inmerge_fast.checkpoints.read.read`), ``hf-hub:OWNER/NAME``, or a name that
            timm knows.
        entry: which of several networks in it; the first if None.

    Returns:
        A state dict or a model, and what it is, for people.

    Raises:
        ValueError: it cannot be read, holds no weights, or needs a package that is not installed.
    """
    if not names_a_file(source):
        name = re.sub(r"^timm/", f"{HUB}timm/", source)
        if name.startswith(f"{HUB}timm/") or not name.startswith(HUB):
            if importlib.util.find_spec("timm") is not None:
                return _from_timm(source, name, entry)
            if not name.startswith(HUB):
                raise ValueError(
                    f"{source!r} is not a file, and for a timm model timm must be installed: pip install timm; a model "
                    f"of the Hugging Face hub is named {HUB}OWNER/NAME"
                )
        source = name
    checkpoint = read(source)
    network = checkpoint.network(entry)
    if not network.tensors:
        raise ValueError(
            f"{checkpoint.source}: nothing in it can be read: {'; '.join(describe_skipped(network.skipped))}"
        )
    return network, _title(checkpoint, network)


def _from_timm(source: str, name: str, entry: str | None) -> tuple[nn.Module, str]:
    if entry is not None:
        raise ValueError(f"{source!r} is a timm model, which has no entries; leave out --entry")
    try:
        timm: Any = importlib.import_module("timm")
        return timm.create_model(name, pretrained=True).eval(), f"timm model {source}, pretrained"
    except Exception as error:  # timm and the hub raise errors of many types
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{source!r} is not a file, and timm cannot make it: {reason}") from error


def _title(checkpoint: Checkpoint, network: Network) -> str:
    where = f", entry {network.entry!r}" if network.entry else ""
    lines = [f"{checkpoint.source}{where}, {len(network.tensors)} tensors"]
    if network.optimizer:
        lines[0] += f" ({network.optimizer} of an optimizer left out)"
    others = [
        f"{one.entry!r} ({len(one.tensors)})"
        for one in checkpoint.networks
        if one is not network and any(tensor.dim() > 1 for tensor in one.tensors.values())
    ]
    if others:
        lines.append(f"other entries with weights, for --entry: {', '.join(others)}")
    return "\n".join(lines)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Compare the filters of each convolution of a saved model with each other: a table, the threshold\n"
        "for some merge rates, what merging would do, and pictures. Nothing in the file is executed or changed.",
        epilog=f"""\
needs: for pictures pip install 'inmerge_fast[plots]', for names of models timm.

examples:
  {program} net.pt --no-pictures
  {program} trained.ckpt --entry ema --skip-first 10 --csv table.csv
  {program} resnet18                        # a pretrained model of timm""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="CHECKPOINT_OR_NAME",
        help="a file with weights (PyTorch, safetensors, .npz, .onnx; nothing in it is executed), a folder of a saved "
        "model, hf-hub:OWNER/NAME, or the name of a pretrained timm model",
    )
    parser.add_argument("--entry", metavar="NAME", help="which of several networks in the file (default: what is "
                        "called model, state_dict, ... before ema, teacher, ...; the others are listed)")  # fmt: skip
    parser.add_argument(
        "--skip-first",
        metavar="N",
        type=_count_share_or_pattern,
        help="leave out this many of the first layers, or this share of them, or those of a pattern, as merge_ does "
        "(default: none)",
    )
    parser.add_argument("--layers", action="append", metavar="PATTERN", default=[], help="only layers whose name "
                        "matches (fnmatch); repeatable")  # fmt: skip
    parser.add_argument("--exclude", action="append", metavar="PATTERN", default=[],
                        help="leave out layers whose name matches; repeatable")  # fmt: skip
    parser.add_argument("--include-linear", action="store_true", help="Linear weights too")
    parser.add_argument("--output", metavar="FOLDER", help="where the pictures go (default: similarity-NAME)")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write the table there, too")
    parser.add_argument("--no-pictures", action="store_true", help="only print the table")
    parser.add_argument("--layer", action="append", metavar="NAME", help="draw heat map and pairs of this layer; "
                        f"repeatable (default: the {PICTURED_LAYERS} layers with the most alike filters)")  # fmt: skip
    return parser


def _count_share_or_pattern(text: str) -> float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def main(arguments: Sequence[str], program: str = "python -m inmerge_fast inspect") -> None:
    """Run ``python -m inmerge_fast inspect``.

    Args:
        arguments: command line after the word ``inspect``.
        program: how the command was called, for help and errors.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # layers may have names that the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        _run(arguments, program)
        if sys.stdout is not None:  # closed by who started it
            sys.stdout.flush()
    except BrokenPipeError:  # who reads it, as head does, has had enough
        _drop_output()
    except OSError as error:  # of other files it is named where they are opened
        _drop_output()
        raise SystemExit(f"{program}: error: standard output: {error.strerror or error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _drop_output() -> None:
    """Let what is still to be printed go nowhere, or Python would complain of it at its end."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str], program: str) -> None:
    parser = _parser(program)
    options = parser.parse_args(arguments)
    folder = None if options.no_pictures else Path(options.output or f"similarity-{_stem(options.source)}")
    try:
        outputs = Outputs(folder, options.csv, Path(options.source))
    except ValueError as error:
        parser.error(_one_line(error))
    try:
        weights, title = load_weights(options.source, options.entry)
    except ValueError as error:
        outputs.withdraw()
        parser.error(_one_line(error))
    try:
        target: nn.Module | Mapping[str, object] = weights if isinstance(weights, nn.Module) else weights.tensors
        layouts = {} if isinstance(weights, nn.Module) else weights.layouts
        found = similarity(
            target, skip_first=options.skip_first or 0, layers=options.layers, exclude=options.exclude,
            include_linear=options.include_linear, layouts=layouts, progress=True,
        )  # fmt: skip
        if not isinstance(weights, nn.Module):
            found.skipped += weights.skipped
        for name in options.layer or ():
            if found[name].filters > MOST_PICTURED:
                raise ValueError(f"--layer: {name} has {found[name].filters} filters; up to {MOST_PICTURED} are drawn")
    except (ValueError, TypeError) as error:
        outputs.withdraw()
        parser.error(f"{options.source}: {_one_line(error)}")
    except KeyError as error:
        outputs.withdraw()
        parser.error(f"--layer: {error.args[0]}")
    print(f"{title}\n\n{describe(found)}\n", flush=True)
    print(outlook(target, found, options.skip_first, layouts))
    if options.csv is not None:
        try:
            write_table(found, options.csv)
        except OSError as error:
            parser.error(f"--csv: {options.csv}: {error.strerror or error}")
        print(f"\ntable: {options.csv}")
    if folder is None:
        return
    try:
        paths = write_pictures(found, options.layer or most_alike(found), folder)
    except ImportError as error:
        outputs.withdraw()
        cure = f"the pictures need matplotlib and scipy ({error}): pip install 'inmerge_fast[plots]'"
        if options.output is not None or options.layer is not None:  # asked for
            parser.error(f"{cure}, or --no-pictures")
        print(f"\nno pictures: {cure}")
        return
    except OSError as error:
        parser.error(f"--output: {folder}: {error.strerror or error}")
    print("\npictures:", *paths, sep="\n  ")


def _stem(source: str) -> str:
    name = Path(source).resolve().stem if is_there(source) else source[-60:]
    return re.sub(r"[^\w.-]+", "_", name).strip("_") or "weights"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
