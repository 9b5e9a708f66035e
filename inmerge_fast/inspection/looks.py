"""Weights to be looked at and not written to: whatever can be read, and why the rest cannot."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeGuard

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..checkpoints.kinds import first_line
from ..checkpoints.networks import as_tensor, is_array
from ..merge_plan import MergePlan
from ..plan.candidates import (
    ONE_PER_GROUP,
    Candidate,
    choose,
    describe_modules,
    is_mergeable_module,
    module_candidates,
    unwrap_compiled,
)
from ..plan.filters import FilterLayout, check_outside_transforms, filter_layout
from ..plan.plan import Target, check_selection, listed_candidates, name_patterns
from ..stats import describe_skipped

LARGEST_COPY = 1 << 28  # elements of what is not dense: an expanded or sparse tensor may claim any size
FEW_CHANNELS = 4  # of an image
NAMED = 3  # entries that a message names
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Look:
    """A weight that can be read, and how its filters lie in it.

    Attributes:
        name: the layer, or the key in a state dict.
        groups: groups of the convolution.
        transposed: whether it is that of a transposed convolution.
    """

    def __init__(self, name: str, holder: nn.Module | torch.Tensor, groups: int = 1, transposed: bool = False) -> None:
        self.name, self.groups, self.transposed = name, groups, transposed
        self._kept = holder if isinstance(holder, torch.Tensor) else None  # nothing else may hold it
        self._holder = weakref.ref(holder)

    def weight(self) -> tuple[torch.Tensor, FilterLayout]:
        """The weight as it is now, a copy where it is not dense, and where its filters lie.

        Raises:
            ValueError: it is gone, or cannot be read any more.
        """
        found = self._read()
        if isinstance(found, str):
            raise ValueError(f"{self.name}: {found}")
        return found

    def obstacle(self) -> str:
        """Why there is nothing to look at; empty where there is."""
        found = self._read()
        return found if isinstance(found, str) else ""

    def filter(self, index: int) -> torch.Tensor:
        """One filter in its shape, ``(channels, *kernel)``."""
        weight, layout = self.weight()
        if not self.transposed:
            return weight[index]
        group, place = divmod(index, layout.group_size)
        channels = weight.shape[0] // self.groups
        return weight[group * channels : (group + 1) * channels, place]

    def _read(self) -> tuple[torch.Tensor, FilterLayout] | str:
        holder = self._holder()
        if holder is None:
            return "its weight is gone; keep a reference to what is looked at"
        weight: object = holder
        if isinstance(holder, nn.Module):
            try:  # a parametrised weight is computed here, as every forward pass does
                weight = holder.weight
            except Exception as error:  # whatever its code raises
                return f"its weight cannot be computed: {first_line(error)}"
            expected = 2 + len(holder.kernel_size) if isinstance(holder, _ConvNd) else 2
            if _has_dimensions(weight) and weight.dim() != expected:
                return f"its weight has {weight.dim()} dimensions instead of {expected}, a shard of a flat one perhaps"
        plain = readable(weight)
        if isinstance(plain, str):
            return plain
        return laid_out(plain, self.name, self.groups, self.transposed)


def _has_dimensions(weight: object) -> TypeGuard[torch.Tensor]:
    return isinstance(weight, torch.Tensor) and not nn.parameter.is_lazy(weight) and not weight.is_nested


@torch.no_grad()
def readable(weight: object) -> torch.Tensor | str:
    """The values of a tensor as an ordinary one of a type that filters have, or why there are none.

    Nothing here depends on whether the tensor could be written to.
    """
    if not isinstance(weight, torch.Tensor):
        return f"its weight is a {type(weight).__name__}, not a tensor"
    if nn.parameter.is_lazy(weight):
        return "is not initialised yet"
    kind = type(weight).__name__
    try:
        if kind in ("DTensor", "ShardedTensor"):
            return f"is a {kind}, of which this process holds a part; look at the gathered weight"
        if type(weight) not in (torch.Tensor, nn.Parameter):
            weight = weight.detach().as_subclass(torch.Tensor)
        return _values(weight.detach(), kind)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return f"cannot be read ({kind}, {first_line(error)})"


def _values(weight: torch.Tensor, kind: str) -> torch.Tensor | str:
    if weight.is_meta:
        return "is on the meta device and has no values"
    if weight.is_nested:
        return "is nested: its parts may have different shapes"
    if weight.is_quantized:
        weight = weight.dequantize()
    if weight.is_complex():
        return f"has dtype {_short(weight.dtype)}; filters are real"
    if not weight.is_floating_point():
        return f"has dtype {_short(weight.dtype)}; filters are floating-point numbers"
    if weight.layout is not torch.strided:
        if weight.numel() > LARGEST_COPY:
            return f"has layout {_short(weight.layout)} and {weight.numel()} elements when dense"
        weight = weight.to_dense()
    elif weight.numel():
        last = sum((size - 1) * step for size, step in zip(weight.shape, weight.stride(), strict=True))
        memory = weight.untyped_storage()
        if memory.nbytes() < (weight.storage_offset() + last + 1) * weight.element_size():
            return "has no memory: its storage was freed or resized"
        if memory.data_ptr() == 0:
            return f"is a {kind}, which keeps its values elsewhere"
        if weight.numel() > max(LARGEST_COPY, memory.nbytes()):
            return f"is expanded to {weight.numel()} elements"
    if weight.dtype not in FLOATS:
        weight = weight.to(torch.float32)
    return weight.resolve_neg()


def laid_out(weight: torch.Tensor, name: str, groups: int, transposed: bool) -> tuple[torch.Tensor, FilterLayout] | str:
    """A readable weight, a copy where it is not dense, and where its filters lie; or why nothing can be compared."""
    if weight.dim() < 2:
        return f"has {weight.dim()} dimensions; a weight has at least 2"
    if weight.numel() == 0:
        return "has no elements"
    if groups < 1 or weight.shape[0] % groups:
        return f"its shape {tuple(weight.shape)} does not fit groups={groups}"
    try:
        layout = filter_layout(weight, name, groups=groups, transposed=transposed)
    except ValueError:  # neither dense nor with its filters outermost
        weight = weight.contiguous()
        layout = filter_layout(weight, name, groups=groups, transposed=transposed)
    if layout.group_size < 2:
        return "has a single filter" if layout.filters == 1 else ONE_PER_GROUP
    return weight, layout


@dataclass(frozen=True)
class Selection:
    """Which layers of a target are looked at.

    Attributes:
        skip_first: see :func:`inmerge_fast.merge_`; likewise exclude and include_linear.
        exclude: name pattern or patterns of layers to leave out.
        layers: name pattern or patterns of the only layers to look at; all where there are none.
        include_linear: whether Linear layers are meant, too.
    """

    skip_first: float | str | Sequence[str] = 0
    exclude: str | Sequence[str] = ()
    layers: str | Sequence[str] = ()
    include_linear: bool = False


def looks_at(
    target: Target | MergePlan | Mapping[str, object], selection: Selection, layouts: Mapping[str, tuple[int, bool]]
) -> tuple[list[Look], list[tuple[str, str]]]:
    """What :func:`inmerge_fast.similarity` compares, and ``(name, reason)`` of what it leaves out.

    Raises:
        TypeError: see there.
        ValueError: see there.
    """
    check_outside_transforms()
    if isinstance(target, MergePlan):
        if selection != Selection():
            raise ValueError("skip_first, exclude, layers and include_linear are set where a MergePlan is built")
        found, skipped = _of_plan(target), list(target.skipped)
    elif isinstance(target, Mapping):
        found, skipped = _of_state_dict(target, selection, layouts)
    else:
        found, skipped = _of_modules(target, selection)
    kept = []
    for look in found:
        reason = look.obstacle()
        if reason:
            skipped.append((look.name, reason))
        else:
            kept.append(look)
    if not kept:
        why = "; ".join(describe_skipped(skipped))
        raise ValueError(f"no layer of this {type(target).__name__} can be compared: {why}")
    return kept, skipped


def _of_plan(plan: MergePlan) -> list[Look]:
    found = []
    for layer, weight in zip(plan.layers, plan.weights(), strict=True):
        holder: nn.Module | torch.Tensor = layer.holder if isinstance(layer.holder, nn.Module) else weight
        groups = layer.layout.filters // layer.layout.group_size
        found.append(Look(layer.name, holder, groups, getattr(holder, "transposed", False)))
    return found


def _of_modules(target: Target, selection: Selection) -> tuple[list[Look], list[tuple[str, str]]]:
    if isinstance(target, nn.Module):
        target = unwrap_compiled(target)
    if isinstance(target, nn.Module) and not is_mergeable_module(target):
        candidates, tied = module_candidates(target, selection.include_linear)
        if not candidates:
            hint = "" if selection.include_linear else "; Linear layers take part with include_linear=True"
            if any(_has_dimensions(one) and one.dim() >= 3 for one in target.state_dict().values()):
                hint = "; what TorchScript and quantised models hold is compared as similarity(model.state_dict())"
            raise ValueError(
                f"no convolution found in this {type(target).__name__}; it has {describe_modules(target)}{hint}"
            )
    else:
        if selection not in (Selection(), Selection(include_linear=True)):
            raise ValueError(
                f"skip_first, exclude and layers choose among the layers of a model, but the target is a "
                f"{type(target).__name__}; got {selection}"
            )
        _, candidates, tied = listed_candidates(target, 0)
    kept, left_out = _chosen(candidates, tied, selection, lambda pattern: pattern)
    found = []
    for candidate in kept:
        holder = candidate.holder
        groups, transposed = (holder.groups, holder.transposed) if isinstance(holder, _ConvNd) else (1, False)
        found.append(Look(candidate.name, holder, groups, transposed))
    return found, left_out


def _chosen(
    candidates: list[Candidate],
    tied: list[tuple[str, str]],
    selection: Selection,
    resolve: Callable[[str], str],
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """The candidates that a selection keeps, and why the others are left out; ``resolve`` completes a pattern."""
    count, patterns = check_selection(selection.skip_first, selection.exclude)
    wanted = name_patterns("layers", selection.layers)
    choice = choose(
        candidates, tied, count, [resolve(pattern) for pattern in patterns], include_frozen=True, include_heads=True
    )
    kept = choice.kept
    if wanted:
        wanted = tuple(resolve(pattern) for pattern in wanted)
        names = [candidate.name for candidate in kept]
        for pattern in wanted:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"layers: {pattern!r} matches no candidate layer; they are: {', '.join(names)}")
        kept = [candidate for candidate in kept if any(fnmatchcase(candidate.name, p) for p in wanted)]
    return kept, [*choice.left_out, *tied]


def _of_state_dict(
    state: Mapping[str, object], selection: Selection, layouts: Mapping[str, tuple[int, bool]]
) -> tuple[list[Look], list[tuple[str, str]]]:
    """Looks at the tensors of a state dict that have the shape of a weight.

    Raises:
        ValueError: none has.
    """
    dims = 2 if selection.include_linear else 3
    given = {str(key): as_tensor(value) for key, value in state.items() if is_array(value)}
    skipped = [(key, value) for key, value in given.items() if isinstance(value, str)]
    shaped: dict[str, torch.Tensor] = {}
    for key, value in given.items():
        if isinstance(value, torch.Tensor) and nn.parameter.is_lazy(value):
            skipped.append((key, "is not initialised yet"))
        elif isinstance(value, torch.Tensor) and value.dim() >= dims:
            shaped[key] = value
    if not shaped:
        inner = [repr(key) for key, value in state.items() if isinstance(value, (Mapping, nn.Module))]
        cure = f"; pass one of what it holds: {', '.join(inner[:NAMED])}" if inner else ""
        raise ValueError(
            f"the state dict has {len(state)} entries, but no floating-point tensor of {dims} dimensions{cure}"
        )
    depthwise = _depthwise(shaped, layouts)
    candidates: list[Candidate] = []
    tied: list[tuple[str, str]] = []
    first_at: dict[object, str] = {}
    for key, value in shaped.items():
        place = _place(value)
        first = key if place is None else first_at.setdefault(place, key)
        if first != key:
            tied.append((key, f"shares its weight with {first} and goes with it"))
        elif key.endswith("_mask") and f"{key.removesuffix('_mask')}_orig" in shaped:
            skipped.append((key, "the mask of a pruned weight"))
        elif key not in layouts and not value.is_nested and value.numel() == len(value) > 0:
            skipped.append((key, "one element per filter: a gain, not a filter"))
        else:
            mask = shaped.get(f"{key.removesuffix('_orig')}_mask") if key.endswith("_orig") else None
            pruned = value if mask is None or mask.shape != value.shape else value * mask
            candidates.append(Candidate(key, len(candidates), pruned))
    kept, left_out = _chosen(candidates, tied, selection, lambda pattern: _completed(pattern, [*shaped]))
    found = []
    for candidate in kept:
        key = candidate.name
        groups, transposed = (len(shaped[key]), False) if key in depthwise else layouts.get(key, (1, False))
        found.append(Look(key, candidate.holder, groups, transposed))
    return found, [*left_out, *skipped]


def _completed(pattern: str, keys: Sequence[str]) -> str:
    """A pattern of layer names as one of keys in a state dict."""
    for ending in ("", ".weight", ".weight_*", ".parametrizations.weight.*"):
        if any(fnmatchcase(key, pattern + ending) for key in keys):
            return pattern + ending
    return pattern


def _depthwise(shaped: Mapping[str, torch.Tensor], layouts: Mapping[str, tuple[int, bool]]) -> set[str]:
    """Keys of what is taken for depthwise layers: filters with one input channel, where no layout is known.

    The first layer of a network for grey images or sound has that, too: so the first entry is left out, unless its name
    says otherwise (safetensors files are sorted by name), and a single one where nothing else takes few channels.
    """
    channels = {key: value.shape[1] for key, value in shaped.items() if not value.is_nested and value.dim() >= 3}
    alone = [key for key, count in channels.items() if count == 1 < len(shaped[key]) < shaped[key].numel()]
    if len(alone) == 1 and not any(1 < count <= FEW_CHANNELS for count in channels.values()):
        return set()
    first = next(iter(shaped))
    return {key for key in alone if key not in layouts and (key != first or re.search("dw|depthwise", key))}


def _place(value: torch.Tensor) -> object | None:
    """Where a tensor lies and how it is read; None where that says nothing."""
    try:
        pointer = value.data_ptr()
        return (pointer, value.dtype, value.shape, value.stride()) if pointer and value.numel() else None
    except (RuntimeError, NotImplementedError):  # sparse, nested, quantised, of a class with values elsewhere
        return None


def _short(name: object) -> str:
    return str(name).removeprefix("torch.")
