"""A picture of what merging did in the course of a run: which layer merged when, and how many filters in all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..training.monitor import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_merges(rows: Sequence[Row], path: str | None = None) -> Figure:
    """Draw merged filters over optimizer steps: by layer as a map, and all together as a line above it.

    Where no filter merged at the observed steps, the picture says so.

    Needs matplotlib (``pip install 'inmerge_fast[plots]'``).

    Args:
        rows: what a :class:`inmerge_fast.DictLogger` has kept.
        path: file to write, its format by its ending; None for none.

    Returns:
        The figure.

    Raises:
        ValueError: there are no rows.
    """
    from matplotlib.figure import Figure  # not pyplot: nothing global, no window

    if not rows:
        raise ValueError("rows is empty: nothing has been observed yet; flush() passes on what is under way")
    steps = [row["step"] for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row["layers"]))
    share = np.full((len(names), len(rows)), np.nan)
    for column, row in enumerate(rows):
        for name, layer in row["layers"].items():
            share[names.index(name), column] = 100 * layer["merged"] / layer["filters"]
    figure = Figure(figsize=(8.0, 2.4 + 0.22 * len(names)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, max(1.0, 0.2 * len(names))])
    above.plot(steps, [row["merged"] for row in rows], drawstyle="steps-mid", linewidth=1.0, color="tab:blue")
    above.set_ylabel("filters merged")
    above.set_ylim(bottom=0)
    above.margins(x=0)
    edges = np.array([*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)], float)
    edges -= 0.5 * np.diff(edges, append=edges[-1] + 1)[0]
    merged = sum(row["merged"] for row in rows)
    image = below.pcolormesh(
        edges, np.arange(len(names) + 1), share, cmap="viridis", vmin=0, vmax=None if merged else 1
    )
    if not merged:
        said = f"no filter merged at any of the {len(rows)} observed steps\n(InMerge.summary() counts all steps)"
        below.text(0.5, 0.5, said, transform=below.transAxes, ha="center", va="center", color="white", fontsize=11)
    below.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=7)
    below.invert_yaxis()
    below.set_ylabel("layer")
    below.set_xlabel("optimizer step")
    figure.colorbar(image, ax=below, label="merged, % of the layer's filters")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
