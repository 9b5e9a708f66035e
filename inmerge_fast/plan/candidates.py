"""Which layers of a target can take part in merging: the walk, its order, and the reason for every layer left out."""

from __future__ import annotations

import math
import numbers
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from .filters import FilterLayout, check_weight, filter_layout
from .heads import HEAD, heads_of

# What wrappers put into module names: torch.compile, activation checkpointing, FSDP1, Fabric. The names of a model, its
# state dict and a saved InMerge must not depend on them.
INSERTED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
FROZEN = "frozen (requires_grad is False)"
ONE_PER_GROUP = "one filter per group, nothing to pair it with"  # depthwise layers


@dataclass(frozen=True)
class Candidate:
    """A convolution, Linear or tensor that a target holds, before anything is known about its weight."""

    name: str
    layer_id: int
    holder: nn.Module | torch.Tensor
    is_head: bool = False

    @property
    def weight(self) -> torch.Tensor | None:
        """The weight as it is now; None if the module computes it or has none."""
        return self.holder._parameters.get("weight") if isinstance(self.holder, nn.Module) else self.holder


class MergeLayer:
    """One layer of a plan: where its filters are, and whether they are still there.

    Attributes:
        name: qualified module name, or its position in the iterable.
        layer_id: the layer's word in the draw.
        layout: where its filters lie.
        shape: shape of the weight.
        dtype: dtype of the weight.
        device: device of the weight.
        pointer: address of the weight.
    """

    def __init__(self, candidate: Candidate, weight: torch.Tensor, layout: FilterLayout) -> None:
        self.name, self.layer_id, self.layout = candidate.name, candidate.layer_id, layout
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device
        # Weak, because a cached plan must not keep its target alive, not even through a hook that refers back to it.
        self._holder = weakref.ref(candidate.holder)
        self._id = id(weight)  # a weak reference would keep torch.utils.swap_tensors from converting the module
        self._type, self._stride = type(weight), weight.stride()
        self.pointer = weight.data_ptr()

    @property
    def holder(self) -> nn.Module | torch.Tensor | None:
        """The module, or the tensor that was given; None if it is gone."""
        return self._holder()

    @property
    def weight(self) -> torch.Tensor | None:
        """The layer's weight as it is now; None if it is gone."""
        holder = self._holder()
        return holder._parameters.get("weight") if isinstance(holder, nn.Module) else holder

    def is_current(self) -> bool:
        """Whether the weight is read as it was, at the same address."""
        weight = self.weight
        return self.is_read_alike() and weight is not None and weight.data_ptr() == self.pointer

    def is_read_alike(self) -> bool:
        """Whether the weight is the same object of the same type, with dtype, device, shape and strides."""
        weight = self.weight
        return (
            weight is not None
            and id(weight) == self._id  # first: a tensor put in its place may have no address to ask for
            and type(weight) is self._type  # torch.utils.swap_tensors makes another kind of tensor of the same object
            and weight.dtype is self.dtype
            and weight.device == self.device
            and weight.shape == self.shape
            and weight.stride() == self._stride
            and (weight.is_leaf or not weight.requires_grad)
        )


def module_candidates(model: nn.Module, include_linear: bool) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """Convolutions of ``model`` in module order (and its Linears), each weight once, and what was left out.

    That is what is tied, and weights with a kernel in what is no convolution of PyTorch. Convolutions are numbered
    first, so that asking for Linears does not renumber them.
    """
    modules = list(model.named_modules())
    heads = heads_of(modules)
    found: list[tuple[str, nn.Module]] = []
    foreign: list[tuple[str, str]] = []
    sharing = SharedWeights()
    names = {"": ""}  # by path, without what wrappers insert
    for path, module in modules:
        above, _, part = path.rpartition(".")
        inserted = part in INSERTED or (part == "module" and _is_wrapper(model.get_submodule(above)))
        around = names.get(above, above)
        names[path] = around if inserted else f"{around}.{part}".removeprefix(".")
        if not is_mergeable_module(module):
            foreign += _foreign(names[path], module)
            continue
        if isinstance(module, nn.Linear) and not include_linear:
            continue
        name = names[path] or type(module).__name__
        if not sharing.is_tied(name, module):
            found.append((name, module))
    convolutions = sum(not isinstance(module, nn.Linear) for _, module in found)
    next_id = {False: 0, True: convolutions}
    candidates = []
    for name, module in found:
        is_linear = isinstance(module, nn.Linear)
        candidates.append(Candidate(name, next_id[is_linear], module, id(module) in heads))
        next_id[is_linear] += 1
    return candidates, [*sharing.tied, *foreign]


def _foreign(name: str, module: nn.Module) -> list[tuple[str, str]]:
    """Weights with a kernel in a module that is no convolution of PyTorch, as a ``DeformConv2d`` or ``ParameterList``.

    How their filters lie is not known, so they are not merged, and not absent either. Position embeddings and
    gains are no weights of filters.
    """
    found: list[tuple[str, str]] = []
    if isinstance(module, parametrize.ParametrizationList):  # its convolution is here, and says itself what it is
        return found
    for own, weight in module._parameters.items():
        if not isinstance(weight, torch.Tensor) or nn.parameter.is_lazy(weight) or weight.dim() < 3:
            continue
        if len(weight) < 2 or weight.numel() <= len(weight):  # of all together, or a gain for each channel
            continue
        shape = ", ".join(map(str, weight.shape))
        reason = f"({shape}) of a {type(module).__name__}, which is no convolution of PyTorch; merge the tensor itself"
        found.append((f"{name}.{own}".removeprefix("."), reason))
    return found


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module is a wrapper that keeps what it wraps as ``module``, as those for data parallelism do."""
    if isinstance(module, AveragedModel):
        return True
    return any("DataParallel" in base.__name__ or base.__name__ == "DeepSpeedEngine" for base in type(module).__mro__)


class SharedWeights:
    """Tells the first holder of a weight from those that share it, which go with it."""

    def __init__(self) -> None:
        self.tied: list[tuple[str, str]] = []
        self._first_name: dict[int, str] = {}

    def is_tied(self, name: str, holder: nn.Module | torch.Tensor) -> bool:
        """Whether an earlier holder has the same weight; ``tied`` then gets its name and the reason."""
        weight = holder._parameters.get("weight") if isinstance(holder, nn.Module) else holder
        if weight is None:
            return False
        first = self._first_name.setdefault(id(weight), name)
        if first != name:
            self.tied.append((name, f"shares its weight with {first} and goes with it"))
        return first != name


def unwrap_compiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` returned a wrapper of; other modules as they are."""
    while type(module).__name__ == "OptimizedModule":
        module = module._modules["_orig_mod"]  # type: ignore[assignment]
    return module


def is_mergeable_module(module: nn.Module) -> bool:
    """Whether ``module`` is a (transposed) convolution or a Linear."""
    return isinstance(module, (_ConvNd, nn.Linear))


def count_to_skip(skip_first: float, candidates: int) -> int:
    """How many of the first candidates ``skip_first`` leaves out: that many, or that share but never all of them."""
    if isinstance(skip_first, numbers.Integral):
        return min(int(skip_first), candidates)
    return min(math.floor(skip_first * candidates + 0.5), max(candidates - 1, 0))


@dataclass(frozen=True)
class Choice:
    """Which candidates of a model take part.

    Attributes:
        kept: those that do.
        frozen: those that would if their weights required a gradient.
        left_out: ``(name, reason)`` of all that do not.
        trained: whether each candidate requires a gradient, None where that changes nothing; for all candidates.
    """

    kept: list[Candidate]
    frozen: list[Candidate]
    left_out: list[tuple[str, str]]
    trained: list[bool | None]


def choose(
    candidates: Sequence[Candidate],
    tied: Sequence[tuple[str, str]],
    skip_first: float,
    exclude: Sequence[str],
    include_frozen: bool,
    include_heads: bool,
) -> Choice:
    """Choose among the candidates of a model, in module order.

    Frozen layers do not count where ``skip_first`` is a share: whether a frozen network stands before the trained one
    or behind it would decide what is left out of that.

    Raises:
        ValueError: a pattern of ``exclude``, or of ``skip_first``, matches no candidate.
    """
    for pattern in exclude:
        every_name = [c.name for c in candidates] + [name for name, _ in tied]
        if not any(fnmatchcase(name, pattern) for name in every_name):
            names = ", ".join(every_name) or "none"
            raise ValueError(
                f"name pattern {pattern!r} matches no candidate layer (exclude=, or patterns as skip_first=); "
                f"the candidates are: {names}"
            )
    is_frozen = [not include_frozen and _is_frozen(candidate) for candidate in candidates]
    is_share = not isinstance(skip_first, numbers.Integral)
    shallow = count_to_skip(skip_first, is_frozen.count(False) if is_share else len(candidates))
    if is_share and not include_heads:  # nor does a share leave out all but heads
        counted = [c.is_head for c, frozen in zip(candidates, is_frozen, strict=True) if not frozen]
        shallow = min(shallow, max((place for place, is_head in enumerate(counted) if not is_head), default=shallow))
    choice = Choice([], [], [], [])
    before = 0  # candidates before this one that count
    for candidate, frozen in zip(candidates, is_frozen, strict=True):
        excluded_by = next((p for p in exclude if fnmatchcase(candidate.name, p)), None)
        is_shallow = before < shallow and not (frozen and is_share)
        if is_shallow:
            choice.left_out.append((candidate.name, f"among the first {shallow} (skip_first={skip_first})"))
        elif excluded_by is not None:
            choice.left_out.append((candidate.name, f"excluded by {excluded_by!r}"))
        elif candidate.is_head and not include_heads:
            choice.left_out.append((candidate.name, HEAD))
        elif frozen:
            choice.frozen.append(candidate)
            choice.left_out.append((candidate.name, FROZEN))
        else:
            choice.kept.append(candidate)
        before += not (frozen and is_share)
        counts = is_share and skip_first > 0
        is_out = is_shallow or excluded_by is not None or (candidate.is_head and not include_heads)
        matters = not include_frozen and (counts or not is_out)
        choice.trained.append(not frozen if matters and candidate.weight is not None else None)
    return choice


def _is_frozen(candidate: Candidate) -> bool:
    weight = candidate.weight
    return isinstance(weight, torch.Tensor) and not weight.requires_grad


def examine(candidates: Iterable[Candidate]) -> tuple[list[MergeLayer], list[tuple[str, str]]]:
    """Check every candidate's weight; returns the layers to merge and those with nothing to pair.

    Raises:
        TypeError: a weight's type, layout or dtype cannot be merged.
        ValueError: a weight cannot be rewritten in place, is computed by a parametrisation, or overlaps another one,
            or the weights are on several devices.
    """
    layers: list[MergeLayer] = []
    left_out: list[tuple[str, str]] = []
    spans: list[tuple[int, int, str]] = []
    for candidate in candidates:
        if isinstance(candidate.holder, nn.Module) and _is_complex(candidate.weight):
            left_out.append((candidate.name, "complex, and similarities that are complex exceed no threshold"))
            continue
        weight, layout = _weight_and_layout(candidate)
        if layout.group_size < 2:
            reason = ONE_PER_GROUP if layout.filters > 1 else "has a single filter"
            left_out.append((candidate.name, reason))
            continue
        layer = MergeLayer(candidate, weight, layout)
        if layers and layer.device != layers[0].device:
            raise ValueError(
                f"{layer.name}: the weight is on {layer.device}, but {layers[0].name} is on {layers[0].device}; "
                "call merge_ once per device"
            )
        layers.append(layer)
        start = weight.data_ptr()
        spans.append((start, start + weight.numel() * weight.element_size(), layer.name))
    spans.sort()
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            raise ValueError(f"{other}: the weight shares memory with that of {name}; merge only one of the two")
    return layers, left_out


def _is_complex(weight: object) -> bool:
    return isinstance(weight, torch.Tensor) and weight.is_complex()


def _weight_and_layout(candidate: Candidate) -> tuple[torch.Tensor, FilterLayout]:
    holder, name = candidate.holder, candidate.name
    if isinstance(holder, torch.Tensor):
        weight = check_weight(holder, name)
        return weight, filter_layout(weight, name)
    if holder._buffers.get("weight") is not None:
        raise ValueError(
            f"{name}: the weight is a buffer, which nothing trains; make it a Parameter, merge the tensor itself "
            "(merge_(module.weight)), or leave the layer out with exclude="
        )
    if "weight" not in holder._parameters or hasattr(type(holder), "weight"):
        raise ValueError(
            f"{name}: the weight is computed at every forward pass{_computed_by(holder)}, so a merge of it would be "
            "lost; remove that (torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove, ...) "
            "or leave the layer out with exclude="
        )
    weight = check_weight(holder._parameters["weight"], name)
    if isinstance(holder, _ConvNd):
        expected = 2 + len(holder.kernel_size)
        if weight.dim() != expected:
            raise ValueError(
                f"{name}: the weight of this {type(holder).__name__} has {weight.dim()} dimensions instead of "
                f"{expected}, a shard of a flattened weight perhaps; merge inside "
                "FullyShardedDataParallel.summon_full_params(model, writeback=True)"
            )
        return weight, filter_layout(weight, name, groups=holder.groups, transposed=holder.transposed)
    return weight, filter_layout(weight, name)


def _computed_by(module: nn.Module) -> str:
    if parametrize.is_parametrized(module, "weight"):
        names = [type(p).__name__ for p in module.parametrizations["weight"]]  # type: ignore[index, union-attr]
        return f" by the parametrization {', '.join(names)}"
    hooks = sorted({type(hook).__name__ for hook in module._forward_pre_hooks.values()})
    return f" by {', '.join(hooks)}" if hooks else ""


def check_not_sharded(model: nn.Module) -> None:
    """Raise where FSDP2 owns a module: inside a forward pass its unsharded weights look plain, and a merge is lost.

    Raises:
        ValueError: ``model`` or one of its modules is an FSDPModule.
    """
    for name, module in model.named_modules():
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            raise ValueError(
                f"{name or type(module).__name__}: the module is sharded by fully_shard, whose weights are DTensors "
                "or, between unshard() and reshard(), copies that are thrown away; merge before sharding, or with "
                "InMerge, which gathers them. Forward-only merging needs whole weights: use DistributedDataParallel"
            )


def describe_modules(model: nn.Module) -> str:
    """Classes of the leaf modules of ``model`` with their counts, for errors."""
    leaves = Counter(
        kind.__name__ if kind.__module__.startswith("torch.nn.modules.") else f"{kind.__module__}.{kind.__name__}"
        for kind in (type(m) for m in model.modules() if not m._modules)
    )
    return ", ".join(f"{count} {name}" for name, count in sorted(leaves.items()))
