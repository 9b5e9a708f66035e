"""Several ranks: what the first one knows, and weights that ``fully_shard`` has divided among them.

Replicas need no communication: decisions are a pure function of seed, step, layer and filter. A weight that is sharded
by filter is gathered, merged as a whole, and each rank keeps its own filters: the same arithmetic as on one rank, on
the same numbers. One layer is gathered at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from ..merge import several_ranks
from ..merge_plan import MergePlan
from ..paths.choice import Paths
from ..paths.eager import EagerPairs, EagerPath
from ..paths.path import Call, Outcome, Path
from ..plan.candidates import ONE_PER_GROUP, Candidate, choose, is_mergeable_module, module_candidates
from ..plan.filters import MERGEABLE_DTYPES, FilterLayout, filter_layout
from ..plan.plan import DEFAULT_SKIP_FIRST
from ..plan.rows import Rows


def broadcast_from_first(value: Any, group: Any) -> Any:
    """``value`` as the first rank of ``group`` has it; all its ranks must call it."""
    if not several_ranks(group):
        return value
    box = [value]
    first = torch.distributed.get_global_rank(group, 0) if group is not None else 0
    torch.distributed.broadcast_object_list(box, src=first, group=group)
    return box[0]


def is_first(group: Any) -> bool:
    """Whether this process is the first rank of ``group``, or the only one."""
    return not several_ranks(group) or torch.distributed.get_rank(group) == 0


def first_ranks_numbers(numbers: torch.Tensor, group: Any) -> torch.Tensor:
    """``numbers`` as the first rank of ``group`` has them; all its ranks must call it. On a GPU no host waits.

    Args:
        numbers: of the same shape and dtype on all ranks.
        group: the ranks; None for all.
    """
    if not several_ranks(group):
        return numbers
    if torch.distributed.get_backend(group) == "nccl" and numbers.device.type == "cpu":
        numbers = numbers.cuda()
    first = torch.distributed.get_global_rank(group, 0) if group is not None else 0
    torch.distributed.broadcast(numbers, src=first, group=group)
    return numbers


def is_sharded(model: nn.Module) -> bool:
    """Whether a weight of ``model`` is a DTensor, or a module is one that ``fully_shard`` manages."""
    return any(type(p).__name__ == "DTensor" for p in model.parameters()) or any(
        base.__name__ == "FSDPModule" for module in model.modules() for base in type(module).__mro__
    )


@dataclass(frozen=True)
class ShardedLayer:
    """A layer whose weight is a DTensor, or a plain tensor that all ranks hold whole."""

    name: str
    layer_id: int
    holder: nn.Module
    layout: FilterLayout
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    placements: tuple[Any, ...] | None

    @property
    def weight(self) -> torch.Tensor | None:
        """The weight as the module holds it now."""
        return self.holder._parameters.get("weight")

    def is_current(self) -> bool:
        """Whether the module still holds a weight of this shape, divided in this way."""
        weight = self.weight
        return (
            weight is not None
            and tuple(weight.shape) == self.shape
            and weight.dtype is self.dtype
            and _placements(weight) == self.placements
        )


class ShardedPlan(MergePlan):
    """A plan for a model whose weights are DTensors, sharded by filter (dim 0) or replicated.

    Args:
        model: a model after ``fully_shard``.
        skip_first: see :class:`inmerge_fast.MergePlan`, as are the others.
        exclude: name patterns to leave out.
        include_linear: whether Linears take part.
        include_frozen: whether frozen weights take part.
        include_heads: whether heads take part.
        may_wait: whether there may be no layer for now, because all of them are frozen.

    Raises:
        TypeError: a weight's dtype cannot be merged.
        ValueError: a weight is not sharded by filter, or nothing can be merged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        skip_first: float = DEFAULT_SKIP_FIRST,
        exclude: Sequence[str] = (),
        include_linear: bool = False,
        include_frozen: bool = False,
        include_heads: bool = False,
        may_wait: bool = False,
    ) -> None:
        candidates, tied = module_candidates(model, include_linear)
        choice = choose(candidates, tied, skip_first, exclude, include_frozen, include_heads)
        layers, unpaired = [], []
        for candidate in choice.kept:
            layer = _sharded_layer(candidate)
            if layer.layout.group_size < 2:
                unpaired.append((layer.name, ONE_PER_GROUP))
            else:
                layers.append(layer)
        self._set_layers(layers, choice, unpaired, candidates, tied)  # type: ignore[arg-type]
        if not layers and not (may_wait and choice.frozen):
            raise ValueError(self._why_nothing(model, candidates, include_linear))
        must = [(c.holder, was) for c, was in zip(candidates, choice.trained, strict=True) if was is not None]
        self._watched = must
        self._tabulate()

    def _tabulate(self) -> None:
        super()._tabulate()
        self.paths = OnlyPath(ShardedPath(self.rows))  # type: ignore[assignment]

    def current_weights(self) -> list[torch.Tensor] | None:
        """The weights if they are sharded as they were, else None."""
        if not all(layer.is_current() for layer in self.layers):
            return None
        for holder, was in self._watched:
            weight = holder._parameters.get("weight")  # type: ignore[union-attr]
            if weight is None or weight.requires_grad is not was:
                return None
        return self.weights()

    def gathered(self, weights: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Each weight as a whole, see :func:`gathered`; all ranks must iterate."""
        return gathered(weights)


def gathered(weights: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Each weight as a whole, the last one freed before the next one is gathered; all ranks must iterate."""
    for weight in weights:
        full = _whole(weight)
        yield full
        if full is not weight and full.untyped_storage().data_ptr() != _local(weight).untyped_storage().data_ptr():
            full.untyped_storage().resize_(0)  # whoever still holds it must not keep a second layer alive
        del full


SHARDED = (
    "weights that are sharded (FSDP2) cannot be merged for a forward pass only; use DistributedDataParallel, or "
    "lasting merging"
)


class ShardedPath:
    """Gathers one weight after the other, merges it as a whole as one rank would, and keeps this rank's filters.

    On a CPU that gives the same bits as on one rank. On a GPU eager PyTorch merges: tables of addresses would have to
    be made anew for every weight that is gathered.

    Args:
        rows: the plan's filters.
    """

    name = "eager"
    reason = "sharded weights, gathered layer by layer"

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    @torch.no_grad()
    def merge(self, weights: Sequence[torch.Tensor], call: Call) -> EagerPairs:
        """See :class:`inmerge_fast.paths.path.Path`; all ranks must call it."""
        rows = self._rows
        thresholds = call.threshold_of_each(len(weights))
        merged = []
        for layer, weight, full, threshold in zip(rows.layers, weights, gathered(weights), thresholds, strict=True):
            outcome = _path_of(Rows([layer])).merge([full], call._replace(thresholds=threshold))
            merged.append(_as_tensors(outcome))
            if full is not weight:
                _keep_own(weight, full)
        return EagerPairs(
            np.concatenate([one.counts for one in merged]),
            torch.cat([one.similarity for one in merged]),
            torch.cat([one.passed for one in merged]),
        )

    def for_now(self, weights: Sequence[torch.Tensor], call: Call) -> NoReturn:
        """Sharded weights are not merged for a forward pass.

        Raises:
            ValueError: always.
        """
        raise ValueError(SHARDED)


def _path_of(rows: Rows) -> Path:
    path = Paths(rows).choose()
    return EagerPath(rows, ShardedPath.reason) if path.name == "triton" else path


def _as_tensors(outcome: Outcome) -> EagerPairs:
    if isinstance(outcome, EagerPairs):
        return outcome
    pairs = outcome()
    return EagerPairs(pairs.counts, torch.from_numpy(pairs.similarity), torch.from_numpy(pairs.passed))


@dataclass(frozen=True)
class OnlyPath:
    """The paths of a plan that has one."""

    path: ShardedPath

    def choose(self) -> ShardedPath:
        """The path of a call that is made now."""
        return self.path

    def follow(self) -> None:
        """There is nothing on its way on other streams."""

    def release(self) -> None:
        """There is nothing that is kept."""


def _sharded_layer(candidate: Candidate) -> ShardedLayer:
    holder, name = candidate.holder, candidate.name
    weight = candidate.weight
    if not isinstance(holder, nn.Module) or weight is None or not is_mergeable_module(holder):
        raise ValueError(f"{name}: the weight is computed at every forward pass; leave the layer out with exclude=")
    is_dtensor = type(weight).__name__ == "DTensor"
    if not is_dtensor and _is_managed(holder):
        raise ValueError(
            f"{name}: the weight is unsharded now, a copy that fully_shard throws away; call merge between optimizer "
            "steps, after model.reshard()"
        )
    if weight.dtype not in MERGEABLE_DTYPES:
        raise TypeError(
            f"{name}: the weight has dtype {weight.dtype}; float32, bfloat16, float16 and float64 can be merged"
        )
    if is_dtensor:
        _check_placements(name, weight, bool(getattr(holder, "transposed", False)))
    groups = int(getattr(holder, "groups", 1))
    transposed = bool(getattr(holder, "transposed", False))
    layout = filter_layout(
        torch.empty(weight.shape, dtype=weight.dtype, device="meta"), name, groups=groups, transposed=transposed
    )
    return ShardedLayer(
        name, candidate.layer_id, holder, layout, tuple(weight.shape), weight.dtype, weight.device, _placements(weight)
    )


def _is_managed(module: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _placements(weight: torch.Tensor) -> tuple[Any, ...] | None:
    return tuple(weight.placements) if type(weight).__name__ == "DTensor" else None  # type: ignore[attr-defined]


def _check_placements(name: str, weight: Any, transposed: bool) -> None:
    from torch.distributed.tensor import Replicate, Shard

    shards = [p for p in weight.placements if not isinstance(p, Replicate)]
    if not shards:
        return
    if len(shards) > 1 or type(shards[0]) is not Shard or shards[0].dim != 0:
        raise ValueError(
            f"{name}: the weight is sharded as {tuple(weight.placements)}; only weights that are sharded by filter on "
            "one mesh dimension, Shard(0), can be merged. Leave the layer out with exclude=, or merge before sharding"
        )
    if transposed:
        raise ValueError(
            f"{name}: the filters of a transposed convolution lie along dim 1, but its weight is sharded along dim 0; "
            "leave the layer out with exclude="
        )


def _local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if type(weight).__name__ == "DTensor" else weight  # type: ignore[attr-defined]


def _whole(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().full_tensor() if type(weight).__name__ == "DTensor" else weight  # type: ignore[attr-defined]


def _keep_own(weight: Any, full: torch.Tensor) -> None:
    """Copy this rank's filters of the merged weight to its shard."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    local = weight.to_local()
    if local.numel() and local.data_ptr() != full.data_ptr():
        local.detach().copy_(full[offset[0] : offset[0] + shape[0]])
