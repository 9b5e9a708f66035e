"""The layer table: what the kernels know of each layer (columns in ``kernels/tables.py``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ...kernels import tables
from ...kernels.merge import FLAG
from ...plan.candidates import MergeLayer

_KINDS = {torch.float32: tables.FLOAT32, torch.bfloat16: tables.BFLOAT16, torch.float16: tables.FLOAT16}


def can_merge(layers: Sequence[MergeLayer]) -> bool:
    """Whether the kernels know the dtypes of all layers; float64 takes the eager path."""
    return all(layer.dtype in _KINDS and layer.layout.filters < FLAG.value for layer in layers)


def layer_table(
    layers: Sequence[MergeLayer], weights: Sequence[torch.Tensor], row_start: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The table, ``(layers, COLUMNS)``."""
    table = np.zeros((len(layers), tables.COLUMNS.value), np.int64)
    for line, layer, weight, first_row in zip(table, layers, weights, row_start, strict=False):
        _fill_line(line, layer, weight, int(first_row))
    return table


def kind_at(layer: MergeLayer, address: int) -> int:
    """What the table's KIND says of a layer whose weight lies at ``address``: its dtype, and how it may be read."""
    layout = layer.layout
    aligned = layout.is_dense and address % 16 == 0 and layout.elements * layer.dtype.itemsize % 16 == 0
    kind: int = _KINDS[layer.dtype].value + (0 if aligned else tables.STRIDED.value)
    return kind


def _fill_line(line: np.ndarray, layer: MergeLayer, weight: torch.Tensor, first_row: int) -> None:
    layout, size = layer.layout, weight.element_size()
    columns = {
        tables.BASE: weight.data_ptr(),
        tables.ELEMENTS: layout.elements,
        tables.GROUP_SIZE: layout.group_size,
        tables.FIRST_ROW: first_row,
        tables.LAYER_ID: layer.layer_id,
        tables.KIND: kind_at(layer, weight.data_ptr()),
        tables.GROUP_STRIDE: layout.group_stride,
        tables.FILTER_STRIDE: layout.filter_stride,
        tables.RUN: layout.run,
        tables.OUTER_STRIDE: layout.outer_stride,
        tables.INNER_STRIDE: layout.inner_stride,
    }
    for column, value in columns.items():
        line[column.value] = value
