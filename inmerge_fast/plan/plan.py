"""The plan of a merge: which filters of which layers take part, in what order, and why the other layers do not."""

from __future__ import annotations

import importlib.util
import numbers
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..draw import draw_filters
from ..effect import EffectMonitor
from ..stats import describe_skipped
from .candidates import (
    Candidate,
    SharedWeights,
    check_not_sharded,
    describe_modules,
    examine,
    is_mergeable_module,
    module_candidates,
    split_excluded,
    split_frozen,
    unwrap_compiled,
)
from .filters import check_outside_transforms
from .structure import Storage, Structure

if TYPE_CHECKING:
    from ..paths.triton.launch import Launcher  # imports Triton

DEFAULT_SKIP_FIRST = 0.6
_OF_DEVICE = "device"  # as a reason: what the device is

Target: TypeAlias = "nn.Module | torch.Tensor | Iterable[nn.Module | torch.Tensor]"


class MergePlan:
    """The layers that ``merge_`` works on, found and checked once, and printable.

    ``merge_`` builds and caches one by itself; build one to look at it, or to pass it as ``merge_``'s target::

        plan = inmerge_fast.MergePlan(model, skip_first=10)
        print(plan)
        inmerge_fast.merge_(plan, seed=0, step=step)

    Args:
        target: what to merge, see :func:`inmerge_fast.merge_`.
        skip_first: see :func:`inmerge_fast.merge_`; models only.
        exclude: see :func:`inmerge_fast.merge_`; models only.
        include_linear: see :func:`inmerge_fast.merge_`; models only.
        include_frozen: whether weights that require no gradient take part; models only.
        layer: layer id of a single layer in the draw; 0 for models and iterables, which number their layers.

    Attributes:
        layers: the layers that are merged, in module order.
        skipped: ``(name, reason)`` of every other candidate, in module order where it came from a model.

    Raises:
        TypeError: the target or one of its weights has the wrong type.
        ValueError: nothing can be merged, or a weight cannot be rewritten in place.
    """

    def __init__(
        self,
        target: Target,
        *,
        skip_first: float = DEFAULT_SKIP_FIRST,
        exclude: str | Sequence[str] = (),
        include_linear: bool = False,
        include_frozen: bool = True,
        layer: int = 0,
    ) -> None:
        patterns = check_selection(skip_first, exclude)
        check_outside_transforms()
        roots: list[nn.Module | torch.Tensor]
        frozen: list[Candidate] = []
        if isinstance(target, nn.Module):
            target = unwrap_compiled(target)
        if isinstance(target, nn.Module) and not is_mergeable_module(target):
            if layer != 0:
                raise ValueError(f"layer is for single layers; a model numbers its own, got layer={layer}")
            roots = [target]
            candidates, tied = module_candidates(target, include_linear)
            kept, left_out = split_excluded(candidates, tied, skip_first, patterns)
            if not include_frozen:
                kept, frozen = split_frozen(kept)
                left_out += [(candidate.name, "frozen (requires_grad is False)") for candidate in frozen]
        else:
            if skip_first not in (DEFAULT_SKIP_FIRST, 0) or patterns:
                raise ValueError(
                    f"skip_first and exclude choose among the layers of a model, but the target is a "
                    f"{type(target).__name__}; got skip_first={skip_first}, exclude={exclude!r}"
                )
            roots, kept, tied = _listed_candidates(target, layer)
            candidates, left_out = kept, []
        for root in roots:
            if isinstance(root, nn.Module):
                check_not_sharded(root)
        layers, unpaired = examine(kept)
        place = {c.name: index for index, c in enumerate(candidates)}
        self.layers = tuple(layers)
        self.skipped = tuple(sorted([*left_out, *unpaired], key=lambda item: place[item[0]])) + tuple(tied)
        if not layers:
            raise ValueError(self._why_nothing(target, candidates, include_linear))

        self._structure = Structure(roots)
        weights = self.weights()
        self._storage = Storage(self.layers, weights)
        place_of = {id(weight): place for place, weight in enumerate(self._structure.weights() or ())}
        self._places = [place_of[id(weight)] for weight in weights]
        self._without_frozen = not include_frozen
        self._frozen = [weakref.ref(candidate.holder) for candidate in frozen]
        self.effect = EffectMonitor()
        self._kind = self.device.type
        self._kernels_fit: str | None = None
        self._launcher: Launcher | None = None
        self._launcher_lock = threading.Lock()
        self._has_inference_weights = any(w.is_inference() for w in weights)
        self._tabulate()

    def _tabulate(self) -> None:
        self.names = [layer.name for layer in self.layers]
        self.filters = sizes = [layer.layout.filters for layer in self.layers]
        self.row_start = np.concatenate([[0], np.cumsum(sizes)])
        self._row_filter = np.concatenate([np.arange(size) for size in sizes])
        self._row_layer_id = np.repeat([layer.layer_id for layer in self.layers], sizes)
        self._row_group_size = np.repeat([layer.layout.group_size for layer in self.layers], sizes)

    def _why_nothing(self, target: object, candidates: Sequence[Candidate], include_linear: bool) -> str:
        if candidates:
            found = "; ".join(describe_skipped(self.skipped))
            return f"no layer of this {type(target).__name__} can be merged: {found}"
        if isinstance(target, nn.Module):
            has_linear = any(isinstance(module, nn.Linear) for module in target.modules())
            hint = "; Linear layers take part with include_linear=True" if has_linear and not include_linear else ""
            return (
                f"no convolution found in this {type(target).__name__} (TorchScript, exported and quantised modules "
                f"hold none that could be merged); it has {describe_modules(target)}{hint}"
            )
        return "the target is an empty iterable; pass convolutions, weight tensors or a model"

    @property
    def device(self) -> torch.device:
        """Device of all the weights."""
        return self.layers[0].device

    @property
    def path(self) -> str:
        """The code that merges these layers on this machine: "triton" (the kernels) or "eager" (PyTorch)."""
        return "eager" if self._why_eager() else "triton"

    @property
    def path_reason(self) -> str:
        """Why :attr:`path` is what it is."""
        on = f"device {self.device}"
        why = self._why_eager() or ("interpreted, INMERGE_INTERPRET is set" if self._kind == "cpu" else _OF_DEVICE)
        return on if why == _OF_DEVICE else why

    def _why_eager(self) -> str:
        """Why the eager path is taken; empty if it is not. Asked at every call, so it composes no text."""
        if _is_set("INMERGE_FORCE_EAGER"):
            return "INMERGE_FORCE_EAGER is set"
        if self._kind != "cuda" and not (self._kind == "cpu" and _is_set("INMERGE_INTERPRET")):
            return _OF_DEVICE
        if self._kernels_fit is None:
            self._kernels_fit = self._why_not_kernels()
        return self._kernels_fit

    def _why_not_kernels(self) -> str:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if torch.version.hip:
            # Compiled for gfx942, a release waits for the releasing wave's stores only; nobody has tried it on one.
            return "the kernels are not verified on AMD GPUs"
        from ..paths.triton.layer_table import can_merge

        return "" if can_merge(self.layers) else "float64 layers, or layers of 2**20 filters and more"

    def launcher(self, weights: Sequence[torch.Tensor]) -> Launcher:
        """The kernels' tables and buffers for these weights, built at the first call."""
        with self._launcher_lock:
            if self._launcher is None:
                from ..paths.triton.launch import Launcher

                self._launcher = Launcher(self.layers, weights, self.row_start)
            return self._launcher

    def weights(self) -> list[torch.Tensor]:
        """The weights as they are now.

        Raises:
            ValueError: one of them is gone.
        """
        weights = []
        for layer in self.layers:
            weight = layer.weight
            if weight is None:
                raise ValueError(f"{layer.name}: its weight is gone; keep a reference to the target of a plan")
            weights.append(weight)
        return weights

    def is_current(self) -> bool:
        """Whether every layer is still the same module with the same weight at the same place, and no other came."""
        return self.current_weights() is not None

    def current_weights(self) -> list[torch.Tensor] | None:
        """The weights if the plan :meth:`is_current`, else None."""
        found = self._structure.weights()
        if found is None or (self._has_inference_weights and not torch.is_inference_mode_enabled()):
            return None
        weights = [found[place] for place in self._places]
        if self._without_frozen and not self._same_are_frozen(weights):
            return None
        return weights if self._storage.holds(weights) else None

    def _same_are_frozen(self, weights: Sequence[torch.Tensor]) -> bool:
        # Their holders are alive, or the structure would have changed.
        return all(weight.requires_grad for weight in weights) and not any(
            holder()._parameters["weight"].requires_grad  # type: ignore[union-attr]
            for holder in self._frozen
        )

    def draw(self, seed: int, step: int, prob: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Coins and partners (indices within the layer) of all filters, layer after layer: ``(rows,)`` each."""
        return draw_filters(seed, step, self._row_layer_id, self._row_filter, self._row_group_size, prob)

    def __str__(self) -> str:
        width = max(len(name) for name in ["layer", *(x.name for x in self.layers)])
        filters = sum(layer.layout.filters for layer in self.layers)
        lines = [
            f"merges {len(self.layers)} layers, {filters} filters; path: {self.path} ({self.path_reason})",
            f"{'layer':{width}}    id  filters  groups  elements  dtype",
        ]
        for layer in self.layers:
            lay = layer.layout
            lines.append(
                f"{layer.name:{width}}  {layer.layer_id:4d}  {lay.filters:7d}  {lay.filters // lay.group_size:6d}  "
                f"{lay.elements:8d}  {str(layer.dtype).removeprefix('torch.')}"
            )
        return "\n".join(lines + describe_skipped(self.skipped))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a MergePlan belongs to the memory of its target and cannot be copied or saved; build a new one"
        )

    def __repr__(self) -> str:
        return f"MergePlan(layers={len(self.layers)}, skipped={len(self.skipped)}, path={self.path!r})"


def _is_set(variable: str) -> bool:
    # Asked itself, os.environ raises an exception and catches it where a variable is missing, 0.9 us.
    inside = getattr(os.environ, "_data", None)
    if inside is None:  # tests may put a dict in its place
        return os.environ.get(variable, "0") not in ("", "0")
    value = inside.get(os.environ.encodekey(variable))
    return value is not None and os.environ.decodevalue(value) not in ("", "0")


def check_selection(skip_first: float, exclude: object) -> tuple[str, ...]:
    """Check the arguments that choose layers; returns the patterns of ``exclude``.

    Raises:
        TypeError: wrong types.
        ValueError: ``skip_first`` is negative or a fraction outside [0, 1).
    """
    if type(skip_first) is not float and (isinstance(skip_first, bool) or not isinstance(skip_first, numbers.Real)):
        raise TypeError(f"skip_first must be an int (layers) or a float in [0, 1) (share of them), got {skip_first!r}")
    whole = type(skip_first) is not float and isinstance(skip_first, numbers.Integral)
    if whole and skip_first < 0:
        raise ValueError(f"skip_first must not be negative, got {skip_first}")
    if not whole and not 0.0 <= skip_first < 1.0:
        raise ValueError(f"skip_first as a share must be in [0, 1), got {skip_first}; give an int to skip that many")
    if isinstance(exclude, str):
        return (exclude,)
    if exclude == ():
        return ()
    patterns = tuple(exclude) if isinstance(exclude, Iterable) else (exclude,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"exclude must be a name pattern or an iterable of them, got {exclude!r}")
    return patterns


def _listed_candidates(
    target: Any, layer: int
) -> tuple[list[nn.Module | torch.Tensor], list[Candidate], list[tuple[str, str]]]:
    if isinstance(target, (nn.Module, torch.Tensor)):
        name = type(target).__name__
        return [target], [Candidate(name, layer, target)], []
    if isinstance(target, (str, bytes)) or not isinstance(target, Iterable):
        raise TypeError(
            f"target must be a convolution, a Linear, a weight tensor, an iterable of those, or a model; "
            f"got {type(target).__name__}"
        )
    if layer != 0:
        raise ValueError(f"layer is for single layers; an iterable numbers its own, got layer={layer}")
    roots, candidates, sharing = [], [], SharedWeights()
    for index, item in enumerate(target):
        if not isinstance(item, torch.Tensor) and not (isinstance(item, nn.Module) and is_mergeable_module(item)):
            raise TypeError(
                f"target[{index}] must be a convolution, a Linear or a weight tensor, got {type(item).__name__}; "
                "pass models one by one"
            )
        roots.append(item)  # the tied ones too: untying one must be noticed
        name = f"{index}: {type(item).__name__}"
        if not sharing.is_tied(name, item):
            candidates.append(Candidate(name, index, item))
    return roots, candidates, sharing.tied
