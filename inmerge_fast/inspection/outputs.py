"""What ``inspect`` writes, and whether it can before the work: tables to read and for a spreadsheet, pictures."""

from __future__ import annotations

import csv
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..checkpoints.kinds import why
from ..paths.match import PartnerRule
from .similarity import Similarity

RATES = (0.01, 0.05, 0.2)
RULES: tuple[PartnerRule, ...] = ("random", "nearest")
LONGEST_NAME = 120  # of a layer, in the name of a file; most file systems take 255 bytes


class Outputs:
    """A folder and a file that will be written, tried at once.

    Args:
        folder: where pictures go; None for none.
        table: the file of the table; None for none.
        source: what is looked at, which the table must not replace.

    Raises:
        ValueError: one of them cannot be written; the message says why.
    """

    def __init__(self, folder: Path | None, table: Path | None, source: Path) -> None:
        self.folder, self.table = folder, table
        self._made: list[Path] = []
        if table is not None:
            if _is_in(table, source):
                raise ValueError(f"--csv: {table}: is what is looked at and would be replaced; name another file")
            _try_file(table)
        if folder is not None:
            self._make(folder)

    def _make(self, folder: Path) -> None:
        try:
            missing = [one for one in (folder, *folder.parents) if not one.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            self._made = missing
            with tempfile.TemporaryFile(dir=folder):
                pass
        except (OSError, ValueError) as error:
            self.withdraw()
            raise ValueError(f"--output: {folder}: pictures cannot be written there: {why(error)}") from error

    def withdraw(self) -> None:
        """Take away the folders that were made, where nothing has been written into them."""
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                return


def _is_in(table: Path, source: Path) -> bool:
    """Whether a file is the source, by any name, or one of those in the folder that is the source."""
    try:
        return table.samefile(source) or (table.is_file() and table.parent.samefile(source))
    except (OSError, ValueError):  # one of them is not there, or can be no name of a file
        return False


def _try_file(path: Path) -> None:
    try:
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except (OSError, ValueError) as error:
        raise ValueError(f"--csv: {path}: cannot be written: {why(error)}") from error


def file_names(names: Iterable[str]) -> dict[str, str]:
    """A part of a file name for each layer, different ones also where a file system ignores case."""
    taken: set[str] = set()
    found = {}
    for name in names:
        safe = re.sub(r"[^\w.-]+", "_", name)[-LONGEST_NAME:]
        candidate, number = safe, 1
        while _folded(candidate) in taken:
            number += 1
            candidate = f"{safe}-{number}"
        taken.add(_folded(candidate))
        found[name] = candidate
    return found


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKD", name).casefold()


def write_pictures(found: Similarity, names: Sequence[str], folder: Path) -> list[Path]:
    """Write the pictures; heat maps and pairs of filters of the layers ``names`` only.

    Raises:
        ImportError: matplotlib or scipy is missing.
    """
    from . import pictures

    folder.mkdir(parents=True, exist_ok=True)
    figures = {f"histograms-{page}": figure for page, figure in enumerate(pictures.histograms(found), 1)}
    if figures:
        figures["merge-rates"] = pictures.merge_rates(found)
    for name, safe in file_names(dict.fromkeys(names)).items():
        matrix = found.matrix(name)
        look = found.look(name)
        figures[f"heat-map-{safe}"] = pictures.heat_map(name, matrix)
        filters = [look.filter(index) for index in range(len(matrix))]
        figures[f"pairs-{safe}"] = pictures.filter_pairs(name, filters, matrix)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
    return paths


def write_table(found: Similarity, path: Path) -> None:
    """Write one line per layer, the skipped ones with their reason, as comma-separated values."""
    rates = [(rule, rate) for rule in RULES for rate in RATES]
    columns = ["layer", "filters", "groups", "elements", "kernel", "finite", "zero", "effective_rank", "pairs", "mean",
               "std", "median", "quantile_99", "max", "above_0.3",
               *(f"threshold_{rule}_{100 * rate:g}%" for rule, rate in rates), "skipped"]  # fmt: skip
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:  # names may be no text
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for layer in found.layers:
            row: dict[str, object] = {
                "layer": layer.name, "filters": layer.filters, "groups": layer.groups, "elements": layer.elements,
                "kernel": "x".join(map(str, layer.kernel)), "finite": layer.finite, "zero": layer.zero,
                "effective_rank": layer.effective_rank, "pairs": layer.pairs,
            }  # fmt: skip
            if layer.pairs:
                row |= {"mean": layer.mean, "std": layer.std, "median": layer.quantile(0.5),
                        "quantile_99": layer.quantile(0.99), "max": layer.max,
                        "above_0.3": layer.share_above(0.3)}  # fmt: skip
                row |= {f"threshold_{rule}_{100 * rate:g}%": layer.threshold_for_rate(rate, rule)
                        for rule, rate in rates}  # fmt: skip
            writer.writerow(row)
        for name, reason in found.skipped:
            writer.writerow({"layer": name, "skipped": reason})


def describe(found: Similarity) -> str:
    """The table of similarities, and the thresholds for some merge rates."""
    layers = [layer for layer in found.layers if layer.pairs]
    width = max(len("layer"), *(len(layer.name) for layer in layers)) if layers else 5
    columns = [(rule, rate) for rule in RULES for rate in RATES]
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
