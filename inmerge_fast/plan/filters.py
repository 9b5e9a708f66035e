"""Where the filters of a weight lie in memory, and which weights can be merged in place at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MERGEABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class FilterLayout:
    """Addresses of the filters of one weight, in elements from its first element.

    With ``group_size`` filters per group, element ``e`` of filter ``i`` lies at ``(i // group_size) * group_stride +
    (i % group_size) * filter_stride + (e // run) * outer_stride + (e % run) * inner_stride``. A *dense* filter is one
    run of consecutive elements in whatever order the memory format gives them: cosine and blend do not depend on it,
    so contiguous and channels_last weights are merged as they lie.
    """

    filters: int
    elements: int
    group_size: int
    group_stride: int
    filter_stride: int
    run: int
    outer_stride: int
    inner_stride: int

    @property
    def is_dense(self) -> bool:
        """Whether every filter is one run of consecutive elements, and the filters follow each other."""
        return self.run == self.elements and self.inner_stride == 1 and self.filter_stride == self.elements

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """A view of ``weight`` that has one filter per leading index: ``(N, D)``, or 4-D where filters are strided.

        The strided form is ``(groups, group_size, D // run, run)``. Writes to the view reach the weight.
        """
        if self.is_dense:
            return weight.as_strided((self.filters, self.elements), (self.elements, 1))
        return weight.as_strided(
            (self.filters // self.group_size, self.group_size, self.elements // self.run, self.run),
            (self.group_stride, self.filter_stride, self.outer_stride, self.inner_stride),
        )

    def gather(self, rows: torch.Tensor, index: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Filters ``index`` of the view ``rows`` as a matrix ``(A, D)``, in ``out`` and its dtype if given."""
        if self.is_dense and (out is None or rows.dtype == out.dtype):
            return torch.index_select(rows, 0, index, out=out)
        found = rows.index_select(0, index) if self.is_dense else rows[self._group_and_place(index)]
        found = found.reshape(len(index), self.elements)
        return found if out is None else out.copy_(found)

    def scatter_(self, rows: torch.Tensor, index: torch.Tensor, new: torch.Tensor) -> None:
        """Write ``new`` ``(A, D)`` to filters ``index`` of the view ``rows``."""
        if self.is_dense:
            rows.index_copy_(0, index, new)
        else:
            rows[self._group_and_place(index)] = new.view(len(index), *rows.shape[2:])

    def _group_and_place(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.div(index, self.group_size, rounding_mode="floor"), index % self.group_size


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """What the eager paths compute in: float64 for float64 weights, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def mark_written(weights: Sequence[torch.Tensor]) -> None:
    """Tell autograd and autocast that the weights have been written to."""
    # Counted as a write even where nothing passes: asking an accelerator what passed would make the host wait.
    torch.autograd.graph.increment_version(weights)
    # Low-precision copies of weights that autocast keeps until its region ends predate the merge; also where
    # autocast is off here but on around.
    torch.clear_autocast_cache()


def check_outside_transforms() -> None:
    """Raise inside ``torch.func`` transforms and FakeTensorMode: tensors have no memory there, or must not be written.

    Raises:
        ValueError: a transform or a FakeTensorMode is active.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError("merge_ was called inside a torch.func transform; call it outside of it")
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise ValueError("merge_ was called under a FakeTensorMode, where nothing is computed; call it outside of it")


def check_weight(weight: object, name: str) -> torch.Tensor:
    """Return ``weight`` if its memory may be rewritten in place; raise, naming it, if not.

    Raises:
        TypeError: not a plain tensor or Parameter, or its dtype cannot be merged.
        ValueError: it has no memory of its own, or writing to it would be lost or corrupt a gradient.
    """
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{name}: expected a weight tensor, got {type(weight).__name__}")
    if torch.nn.parameter.is_lazy(weight):
        raise ValueError(f"{name}: the weight of this lazy module is not initialised; run one forward pass first")
    if type(weight) not in (torch.Tensor, torch.nn.Parameter):
        # A DTensor, FakeTensor or other subclass reports data_ptr() == 0 or another tensor's memory without an error.
        raise TypeError(
            f"{name}: the weight is a {type(weight).__name__}, not a plain tensor; merge the plain local weight "
            "(for FSDP: before sharding, or on the gathered full weight) or leave the layer out with exclude="
        )
    if weight.layout is not torch.strided or weight.is_nested:
        layout = "nested" if weight.is_nested else weight.layout
        raise TypeError(f"{name}: the weight has layout {layout}; only dense (strided) weights can be merged")
    if weight.is_quantized or weight.dtype not in MERGEABLE_DTYPES:
        raise TypeError(
            f"{name}: the weight has dtype {weight.dtype}; float32, bfloat16, float16 and float64 can be merged"
        )
    if weight.is_meta:
        raise ValueError(f"{name}: the weight is on the meta device and has no data; materialise it first (to_empty)")
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name}: the weight was created in inference mode and cannot be changed outside of it; "
            "clone it outside torch.inference_mode() first"
        )
    if torch.autograd.forward_ad.unpack_dual(weight).tangent is not None:
        raise ValueError(f"{name}: the weight carries a forward-mode tangent; call merge_ outside of dual_level()")
    if weight.requires_grad and not weight.is_leaf:
        raise ValueError(
            f"{name}: the weight is computed from other tensors (it has a grad_fn), so its gradient would not know "
            "of the merge; merge the leaf Parameter it is computed from, or weight.detach()"
        )
    return weight


def has_memory(weight: torch.Tensor) -> bool:
    """Whether the storage of a dense weight holds all its elements: it may have been freed or resized."""
    end = weight.storage_offset() + weight.numel()  # dense: the last element is the numel-th
    return weight.untyped_storage().nbytes() >= end * weight.element_size()


def filter_layout(weight: torch.Tensor, name: str, *, groups: int = 1, transposed: bool = False) -> FilterLayout:
    """Layout of the filters of ``weight``; no copy is made.

    Args:
        weight: ``(N, ...)`` with D elements per filter, or ``(C_in, N / groups, ...)`` if ``transposed``.
        name: how errors call it.
        groups: groups of the convolution.
        transposed: whether it is the weight of a transposed convolution, whose filters lie along dim 1.

    Raises:
        ValueError: fewer than 2 dimensions, no elements, or memory that is not dense with the filters outermost.
    """
    shape, stride = tuple(weight.shape), weight.stride()
    if len(shape) < 2:
        raise ValueError(
            f"{name}: a weight needs at least 2 dimensions (filters, ...), got shape {shape}; "
            "biases and normalisation weights cannot be merged"
        )
    if weight.numel() == 0:
        raise ValueError(f"{name}: the weight of shape {shape} has no elements")
    if groups < 1 or (shape[0] % groups):
        raise ValueError(f"{name}: the weight of shape {shape} cannot be divided into groups={groups}")
    layout = _transposed_layout(shape, stride, groups) if transposed else _layout(shape, stride, groups)
    if layout is None or weight.is_neg():
        raise ValueError(
            f"{name}: the weight of shape {shape} has strides {stride}; it must be dense with its filters outermost "
            "(contiguous, channels_last). Expanded, overlapping, sliced and permuted weights cannot be merged in "
            "place: make it a contiguous Parameter of its own (weight.detach().clone(memory_format="
            "torch.contiguous_format))"
        )
    if not has_memory(weight):
        raise ValueError(f"{name}: the storage of the weight has been freed or resized (storage().resize_(0))")
    return layout


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for step, size in sorted((st, sz) for sz, st in zip(shape, stride, strict=True) if sz > 1):
        if step != expected:
            return False
        expected *= size
    return True


def _layout(shape: tuple[int, ...], stride: tuple[int, ...], groups: int) -> FilterLayout | None:
    filters = shape[0]
    elements = 1
    for size in shape[1:]:
        elements *= size
    if not _is_dense(shape[1:], stride[1:]) or (filters > 1 and stride[0] != elements):
        return None
    size = filters // groups
    return FilterLayout(filters, elements, size, size * elements, elements, elements, elements, 1)


def _transposed_layout(shape: tuple[int, ...], stride: tuple[int, ...], groups: int) -> FilterLayout | None:
    if not _is_dense(shape, stride):
        return None
    run, inner = 1, 1
    for size, step in zip(reversed(shape[2:]), reversed(stride[2:]), strict=True):  # spatial dims as one run
        if size == 1:
            continue
        if run == 1:
            inner = step
        elif step != run * inner:
            return None
        run *= size
    channels, size = shape[0] // groups, shape[1]
    return FilterLayout(groups * size, channels * run, size, channels * stride[0], stride[1], run, stride[0], inner)
