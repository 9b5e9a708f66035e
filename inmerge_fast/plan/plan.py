"""Which filters of which layers are merged, in what order, and why the other layers are not."""

from __future__ import annotations

import numbers
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.autograd import forward_ad

from ..stats import describe_skipped
from .candidates import (
    Candidate,
    Choice,
    MergeLayer,
    SharedWeights,
    check_not_sharded,
    choose,
    describe_modules,
    examine,
    is_mergeable_module,
    module_candidates,
    unwrap_compiled,
)
from .filters import check_outside_transforms
from .rows import Rows
from .structure import Storage, Structure

DEFAULT_SKIP_FIRST = 0.6

Target: TypeAlias = "nn.Module | torch.Tensor | Iterable[nn.Module | torch.Tensor]"


class LayerPlan:
    """The layers of a target that are merged, found and checked once. It knows nothing of how they are merged.

    Args:
        target: what to merge, see :func:`inmerge_fast.merge_`.
        skip_first: see :func:`inmerge_fast.merge_`; models only.
        exclude: see :func:`inmerge_fast.merge_`; models only.
        include_linear: see :func:`inmerge_fast.merge_`; models only.
        include_frozen: whether weights that require no gradient take part, too; what is not a model is meant anyway.
        include_heads: see :func:`inmerge_fast.merge_`; models only.
        layer: layer id of a single layer in the draw; 0 for models and iterables, which number their layers.
        may_wait: whether there may be no layer for now, because all of them are frozen.

    Attributes:
        layers: the layers that are merged, in module order.
        skipped: ``(name, reason)`` of every other candidate, in module order where it came from a model.
        candidates: names of all, merged or not, without those that share a weight with one of them.
        frozen: names of those that would be merged if their weights required a gradient.
        heads: names of those that are heads, merged or not.
        rows: the filters of all layers, one after the other.
        names: name of each layer.
        filters: number of filters of each layer.

    Raises:
        TypeError: the target or one of its weights has the wrong type.
        ValueError: nothing can be merged, or a weight cannot be rewritten in place.
    """

    def __init__(
        self,
        target: Target,
        *,
        skip_first: float | str | Sequence[str] = DEFAULT_SKIP_FIRST,
        exclude: str | Sequence[str] = (),
        include_linear: bool = False,
        include_frozen: bool = False,
        include_heads: bool = False,
        layer: int = 0,
        may_wait: bool = False,
    ) -> None:
        skip_first, patterns = check_selection(skip_first, exclude)
        check_outside_transforms()
        roots: list[nn.Module | torch.Tensor]
        if isinstance(target, nn.Module):
            target = unwrap_compiled(target)
        if isinstance(target, nn.Module) and not is_mergeable_module(target):
            if layer != 0:
                raise ValueError(f"layer is for single layers; a model numbers its own, got layer={layer}")
            roots = [target]
            candidates, tied = module_candidates(target, include_linear)
            choice = choose(candidates, tied, skip_first, patterns, include_frozen, include_heads)
        else:
            if skip_first not in (DEFAULT_SKIP_FIRST, 0) or patterns:
                raise ValueError(
                    f"skip_first and exclude choose among the layers of a model, but the target is a "
                    f"{type(target).__name__}; got skip_first={skip_first}, exclude={exclude!r}"
                )
            roots, candidates, tied = listed_candidates(target, layer)
            choice = Choice(candidates, [], [], [None] * len(candidates))
        for root in roots:
            if isinstance(root, nn.Module):
                check_not_sharded(root)
        layers, unpaired = examine(choice.kept)
        self._set_layers(layers, choice, unpaired, candidates, tied)
        if not layers and not (may_wait and choice.frozen):
            raise ValueError(self._why_nothing(target, candidates, include_linear))

        self._tabulate()
        self._root_references = [weakref.ref(root) for root in roots]
        self._holding: list[weakref.ref[nn.Module]] | None = None
        self._structure = Structure(roots)
        weights = self.weights()
        self._storage = Storage(self.rows, weights)
        held = self._structure.weights() or []
        place_of = {id(weight): place for place, weight in enumerate(held)}
        self._places = [place_of.get(id(weight), -1) for weight in weights]
        self._trained: list[bool | None] = [None] * len(held)
        for candidate, is_trained in zip(candidates, choice.trained, strict=True):
            place = place_of.get(id(candidate.weight))
            if place is not None:
                self._trained[place] = is_trained
        self._watch = self._structure.compiled(self._places, self._trained)
        # What is watched was looked at last: without this another thread's change would never be noticed.
        if (
            -1 in self._places
            or not all(layer.is_current() for layer in self.layers)
            or any(
                _is_trained(c) is not was for c, was in zip(candidates, choice.trained, strict=True) if was is not None
            )
        ):
            raise ValueError("the target was changed by another thread while its layers were looked at; try again")
        self._has_inference_weights = any(w.is_inference() for w in weights)

    def _set_layers(
        self,
        layers: Sequence[MergeLayer],
        choice: Choice,
        unpaired: Sequence[tuple[str, str]],
        candidates: Sequence[Candidate],
        tied: Sequence[tuple[str, str]],
    ) -> None:
        place = {c.name: index for index, c in enumerate(candidates)}
        self.layers = tuple(layers)
        self.skipped = tuple(sorted([*choice.left_out, *unpaired], key=lambda item: place[item[0]])) + tuple(tied)
        self.candidates = tuple(place)
        self.frozen = tuple(candidate.name for candidate in choice.frozen)
        self.heads = tuple(candidate.name for candidate in candidates if candidate.is_head)
        self._frozen_holders = [weakref.ref(candidate.holder) for candidate in choice.frozen]
        devices = [c.weight.device for c in (*choice.kept, *choice.frozen) if c.weight is not None]
        self._device = devices[0] if devices else torch.device("cpu")

    def _tabulate(self) -> None:
        self.rows = Rows(self.layers, self._device)
        self.names = [layer.name for layer in self.layers]
        self.filters = [layer.layout.filters for layer in self.layers]

    def _why_nothing(self, target: object, candidates: Sequence[Candidate], include_linear: bool) -> str:
        if candidates:
            found = "; ".join(describe_skipped(self.skipped))
            cure = "; include_frozen=True merges frozen layers, too" if self.frozen else ""
            return f"no layer of this {type(target).__name__} can be merged: {found}{cure}"
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
        return self._device

    def weights(self, *, waiting: bool = False) -> list[torch.Tensor]:
        """The weights as they are now.

        Args:
            waiting: also those of frozen layers, at the end.

        Raises:
            ValueError: one of them is gone.
        """
        weights = []
        for layer in self.layers:
            weight = layer.weight
            if weight is None:
                raise ValueError(f"{layer.name}: its weight is gone; keep a reference to the target of a plan")
            weights.append(weight)
        if waiting:
            holders = [holder() for holder in self._frozen_holders]
            frozen = [holder._parameters.get("weight") for holder in holders if isinstance(holder, nn.Module)]
            weights += [weight for weight in frozen if weight is not None]
        return weights

    def holders(self) -> list[nn.Module]:
        """Every module of the target that holds one of the weights, also those that share it with another."""
        if self._holding is None:
            wanted = set(map(id, self.weights()))
            roots = (reference() for reference in self._root_references)
            found = {
                id(module): module
                for root in roots
                if isinstance(root, nn.Module)
                for module in root.modules()
                if any(id(parameter) in wanted for parameter in module._parameters.values())
            }
            self._holding = [weakref.ref(module) for module in found.values()]
        return [module for module in (holder() for holder in self._holding) if module is not None]

    def is_current(self) -> bool:
        """Whether every layer is still the same module with the same weight, read in the same way, and no other came.

        Where the weight lies may change (``weight.data = other``): that is taken note of.
        """
        return self.current_weights() is not None

    def current_weights(self) -> list[torch.Tensor] | None:
        """The weights if the plan :meth:`is_current`, else None."""
        if self._has_inference_weights and not torch.is_inference_mode_enabled():
            return None
        if forward_ad._current_level >= 0 and self._have_tangents():
            return None
        if self._watch is not None:
            seen = self._watch.weights()
            return seen if seen is None or type(seen) is list else self._moved(seen)
        found = self._structure.weights()
        if found is None:
            return None
        weights = [found[place] for place in self._places]
        if not self._same_are_frozen(found):
            return None
        return weights if self._storage.holds(weights) else None

    def _moved(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        assert self._watch is not None
        self._watch.take_note()  # before: what another thread moves from here on is seen at the next call
        if self._storage.move(weights):
            return list(weights)
        self._watch = None  # it takes the new place for the right one
        return None

    def _have_tangents(self) -> bool:
        weights = (layer.weight for layer in self.layers)
        return any(w is None or forward_ad.unpack_dual(w).tangent is not None for w in weights)

    def _same_are_frozen(self, weights: Sequence[torch.Tensor]) -> bool:
        return all(
            weight.requires_grad is was for weight, was in zip(weights, self._trained, strict=True) if was is not None
        )

    def draw(self, seed: int, step: int, prob: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Coins and partners (indices within the layer) of all filters, layer after layer: ``(rows,)`` each."""
        return self.rows.draw(seed, step, prob)

    def __str__(self) -> str:
        width = max(map(len, ["layer", *self.names]))
        lines = [
            f"merges {len(self.layers)} layers, {sum(self.filters)} filters",
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
            f"a {type(self).__name__} belongs to the memory of its target and cannot be copied or saved; "
            "build a new one"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={len(self.layers)}, skipped={len(self.skipped)})"


def _is_trained(candidate: Candidate) -> bool:
    weight = candidate.weight
    return weight is not None and weight.requires_grad


def check_selection(skip_first: object, exclude: object) -> tuple[float, tuple[str, ...]]:
    """Check the arguments that choose layers; returns how many or what share to skip first, and patterns to leave out.

    ``skip_first`` may be patterns of names itself: then no layer is skipped for coming first.

    Raises:
        TypeError: wrong types.
        ValueError: ``skip_first`` is negative or a fraction outside [0, 1).
    """
    patterns = name_patterns("exclude", exclude)
    if isinstance(skip_first, str) or (isinstance(skip_first, Sequence) and not isinstance(skip_first, bytes)):
        return 0, name_patterns("skip_first", skip_first) + patterns
    if type(skip_first) is not float and (isinstance(skip_first, bool) or not isinstance(skip_first, numbers.Real)):
        raise TypeError(
            "skip_first must be an int (layers), a float in [0, 1) (share of them) or name patterns, "
            f"got {skip_first!r}"
        )
    whole = type(skip_first) is not float and isinstance(skip_first, numbers.Integral)
    if whole and skip_first < 0:
        raise ValueError(f"skip_first must not be negative, got {skip_first}")
    if not whole and not 0.0 <= skip_first < 1.0:  # type: ignore[operator]
        raise ValueError(f"skip_first as a share must be in [0, 1), got {skip_first}; give an int to skip that many")
    return skip_first, patterns  # type: ignore[return-value]


def name_patterns(argument: str, given: object) -> tuple[str, ...]:
    """One or several name patterns as a tuple.

    Raises:
        TypeError: they are none; the message names the argument.
    """
    if isinstance(given, str):
        return (given,)
    if given == ():
        return ()
    patterns = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{argument} must be a name pattern or an iterable of them, got {given!r}")
    return patterns


def listed_candidates(
    target: Any, layer: int
) -> tuple[list[nn.Module | torch.Tensor], list[Candidate], list[tuple[str, str]]]:
    """What a target that is no model lists: all of it, each weight once as a candidate, and those tied to one.

    Raises:
        TypeError: it is no layer, no tensor and no iterable of those.
        ValueError: ``layer`` is given for an iterable.
    """
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
