"""Pictures of a :class:`~inmerge_fast.Similarity`, with matplotlib and scipy (the extra ``plots``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform

from ..layer_similarity import BINS, RESOLUTION, LayerSimilarity
from .similarity import Similarity

PER_PAGE = 24  # histograms of one picture
BARS = 60
ORDERED_OPTIMALLY = 600  # filters; the time of it grows faster than their square
CHANNELS_DRAWN = 64
PAPER_THRESHOLD = 0.3
EDGES = np.linspace(-1, 1, BINS + 1)


def histograms(found: Similarity) -> list[Figure]:
    """Histogram of the pairwise similarities of every layer, with what random filters would have; 24 per picture."""
    layers = [layer for layer in found.layers if layer.pairs]
    return [_histogram_page(layers[start : start + PER_PAGE]) for start in range(0, len(layers), PER_PAGE)]


def _histogram_page(layers: Sequence[LayerSimilarity]) -> Figure:
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.3 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, layer in zip(axes.flat, layers, strict=False):
        seen = np.flatnonzero(layer.pair_counts)
        width = -(-(seen[-1] + 1 - seen[0]) // BARS)  # whole bins per bar
        starts = np.arange(seen[0], seen[-1] + 1, width)
        bars = np.add.reduceat(layer.pair_counts, starts)
        edges = -1 + RESOLUTION * np.append(starts, starts[-1] + width)
        ax.stairs(bars, edges, fill=True, color="tab:blue", label="pairs")
        middles = (edges[1:] + edges[:-1]) / 2
        spread = layer.elements**-0.5
        expected = layer.pairs * np.diff(edges) * np.exp(-0.5 * (middles / spread) ** 2) / spread / math.sqrt(math.tau)
        ax.plot(middles, expected, color="tab:orange", linewidth=1.2, label="random filters, standard deviation 1/√D")
        ax.set_yscale("log")
        ax.set_ylim(0.5, 3 * bars.max())
        ax.set_xlim(edges[0] - 0.02 * (edges[-1] - edges[0]), edges[-1] + 0.02 * (edges[-1] - edges[0]))
        ax.set_title(f"{_short(layer.name)}\nN = {layer.filters}, D = {layer.elements}", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(5))
    for ax in figure.axes[len(layers) :]:
        ax.remove()
    figure.supxlabel("cosine similarity of two filters", fontsize=10)
    figure.supylabel("pairs", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=1 if columns == 1 else 2, fontsize=9)
    return figure


def merge_rates(found: Similarity) -> Figure:
    """Share of the sampled filters that would merge, against the threshold, for every layer and both kinds of rule."""
    layers = [layer for layer in found.layers if layer.pairs]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = colormaps["viridis"](np.linspace(0, 0.93, len(layers)))
    titles = ['partner="random"', 'partner="similar" or "nearest"']
    for ax, title, kind in zip(axes, titles, ("pair_counts", "nearest_counts"), strict=True):
        for layer, colour in zip(layers, colours, strict=True):
            counts = getattr(layer, kind)
            above = np.concatenate([counts[::-1].cumsum()[::-1], [0]]) / counts.sum()
            ax.plot(EDGES, np.where(above > 0, above, np.nan), color=colour, linewidth=1.3, label=_short(layer.name))
        ax.axvline(PAPER_THRESHOLD, color="0.4", linestyle="--", linewidth=1)
        ax.text(PAPER_THRESHOLD + 0.01, 0.02, "paper: 0.3", transform=ax.get_xaxis_transform(), fontsize=8, va="bottom",
                color="0.3", bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5})  # fmt: skip
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("threshold")
        ax.set_yscale("log")
        ax.set_ylim(1e-5, 1.5)
        ax.set_xlim(-0.25, 1.0)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("share of sampled filters that merge")
    if len(layers) <= 12:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    else:
        mappable = ScalarMappable(Normalize(1, len(layers)), colormaps["viridis"])
        figure.colorbar(mappable, ax=list(axes), label="layer, in module order")
    return figure


def heat_map(name: str, matrix: torch.Tensor) -> Figure:
    """A layer's similarity matrix with its filters reordered so that similar ones are neighbours.

    Args:
        name: the layer.
        matrix: ``(N, N)``, from :meth:`inmerge_fast.Similarity.matrix`.
    """
    values = matrix.detach().cpu().double().numpy()
    order = clustered_order(values)
    values = values[np.ix_(order, order)]
    shown = values.copy()
    np.fill_diagonal(shown, np.nan)
    limit = max(0.05, float(np.nanquantile(np.abs(shown), 0.999)) if np.isfinite(shown).any() else 1.0)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    ax = figure.subplots()
    cmap = colormaps["RdBu_r"].with_extremes(bad="0.8")
    image = ax.imshow(values, cmap=cmap, vmin=-limit, vmax=limit, interpolation="nearest")
    ax.set_title(f"{_short(name, 60)}: cosine similarity of {len(values)} filters", fontsize=10)
    ax.set_xlabel("filter, ordered by average-linkage clustering")
    ax.set_ylabel("filter, in the same order")
    bar = figure.colorbar(image, ax=ax, extend="both")
    bar.set_label("cosine similarity (colours saturate at the ends)", fontsize=9)
    return figure


def clustered_order(similarity: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Filters in the order of the leaves of an average-linkage clustering; unknown similarities (NaN) count as 0.

    Args:
        similarity: ``(N, N)``.

    Returns:
        A permutation of ``0 .. N - 1``.
    """
    distance = 1 - np.nan_to_num((similarity + similarity.T) / 2)
    np.fill_diagonal(distance, 0)
    condensed = squareform(distance.clip(min=0), checks=False)
    tree = linkage(condensed, "average")
    if len(distance) <= ORDERED_OPTIMALLY:
        tree = optimal_leaf_ordering(tree, condensed)
    order: npt.NDArray[np.int64] = leaves_list(tree)
    return order


def filter_pairs(name: str, filters: Sequence[torch.Tensor], matrix: torch.Tensor) -> Figure:
    """Three pairs of a layer's filters with their similarity, like Figure 1 of the paper.

    The most similar pair, one half as similar, and one that is not similar at all. Filters are drawn divided by their
    norms, which the similarity does not depend on, one tile per input channel.

    Args:
        name: the layer.
        filters: the N filters, each ``(channels, *kernel)``.
        matrix: ``(N, N)`` similarities.
    """
    chosen = example_pairs(matrix.detach().cpu().double().numpy())
    pairs = [[_tiles(filters[k].detach().cpu().double()) for k in pair[:2]] for pair in chosen]
    weights = [tile.ravel() for pair in pairs for tile in pair]
    limit = np.nanquantile(np.abs(np.concatenate(weights)), 0.99) if weights else 1.0
    colours = ScalarMappable(Normalize(-limit or -1.0, limit or 1.0), colormaps["RdBu_r"].with_extremes(bad="0.8"))
    figure = Figure(figsize=(12, 2.75), layout="constrained")
    ratios = [1] * max(1, len(chosen)) + [0.16]
    parts: Any = figure.subfigures(1, len(ratios), wspace=0.04, width_ratios=ratios)
    for part, (i, j, similarity), pair in zip(parts, chosen, pairs, strict=False):
        part.suptitle(f"{i} and {j}: similarity {round(similarity, 4) + 0.0:.4f}", fontsize=10)
        for ax, tile in zip(part.subplots(1, 2), pair, strict=True):
            ax.imshow(tile, cmap=colours.cmap, norm=colours.norm, interpolation="nearest")
            ax.set_axis_off()
    if chosen:
        bar = parts[-1].colorbar(colours, cax=parts[-1].add_axes((0.05, 0.12, 0.16, 0.7)), extend="both")
        bar.set_label("weight over the filter's norm", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    shape = tuple(filters[0].shape)
    drawn = f", the first {CHANNELS_DRAWN} channels of each" if len(shape) > 1 and shape[0] > CHANNELS_DRAWN else ""
    figure.suptitle(f"{_short(name, 60)}: filters of {' x '.join(map(str, shape))}{drawn}", fontsize=11)
    return figure


def example_pairs(similarity: npt.NDArray[np.float64]) -> list[tuple[int, int, float]]:
    """The most similar pair, the one closest to half of its similarity, and the one closest to 0; fewer if alike."""
    upper = np.triu_indices(len(similarity), 1)
    values = similarity[upper]
    known = np.flatnonzero(~np.isnan(values))
    if not known.size:
        return []
    best = values[known].max()
    places = [known[np.abs(values[known] - wanted).argmin()] for wanted in (best, best / 2, 0.0)]
    return [(int(upper[0][p]), int(upper[1][p]), float(values[p])) for p in dict.fromkeys(places)]


def _tiles(kernel: torch.Tensor) -> npt.NDArray[np.float64]:
    """One filter as an image: a tile per channel, with gaps; a filter of single weights as one square."""
    values = (kernel / kernel.norm().clamp(min=1e-8)).numpy()
    if values.ndim < 2 or values[0].size == 1:
        values, gap = values.reshape(-1, 1, 1), 0
    else:
        values, gap = values.reshape(len(values), values.shape[1], -1)[:CHANNELS_DRAWN], 1
    count, height, width = values.shape
    columns = math.ceil(math.sqrt(count * height / width))
    rows = -(-count // columns)
    image = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), np.nan)
    for place, tile in enumerate(values):
        top, left = (place // columns) * (height + gap), (place % columns) * (width + gap)
        image[top : top + height, left : left + width] = tile
    return image


def _short(name: str, length: int = 34) -> str:
    """Names of deep modules are long; their ends tell them apart."""
    return name if len(name) <= length else f"…{name[1 - length :]}"
