"""Whether several ranks do the same: asked once when they begin, and now and then without a wait."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from ..effect import OnItsWay
from .distributed import first_ranks_numbers

CHECK_EVERY = 16  # merging steps after which ranks are compared, and at 2, 4 and 8
DELAY = 2  # merging steps that numbers have to come from the device before they are looked at


def is_check(occasion: int) -> bool:
    """Whether ranks are compared, and merges counted, at this one of the steps that merge."""
    return occasion > 0 and (occasion % CHECK_EVERY == 0 or occasion in (2, 4, 8))


def check_agreement(recipe: dict[str, Any], group: Any) -> None:
    """Raise, on every rank, if the recipes of the ranks differ; all ranks of ``group`` must call it.

    Raises:
        ValueError: they differ.
    """
    recipes: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(recipes, recipe, group=group)
    for rank, other in enumerate(recipes):
        for name, value in recipes[0].items():
            if other[name] != value:
                raise ValueError(
                    f"the ranks disagree about {name}: {_short(value)} on rank 0, {_short(other[name])} on rank "
                    f"{rank}; the replicas would drift apart. Pass the same arguments on every rank, or, where ranks "
                    "hold different models (pipeline stages), the process_group of those that hold this one"
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


class Comparison:
    """Compares what this rank does with what the first one does, in the course of a run.

    What may come to differ is the plan: somebody freezes, replaces or prunes a layer on one rank only. That cannot be
    asked at every step without a wait, so 16 bytes are sent every 16 merging steps and looked at two steps later.

    Args:
        group: the ranks that train this model; None for all.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._latest = -1
        self._sent: tuple[int, list[int], OnItsWay] | None = None

    def look(self, occasion: int, step: int, device: torch.device, described: Callable[[], object]) -> None:
        """Look at what there is to look at before the merge of ``step``; all ranks must call it.

        Args:
            occasion: number of the step among those that merge.
            step: the optimizer step.
            device: where the numbers are sent from.
            described: gives what must be the same on all ranks.

        Raises:
            ValueError: this rank differs from the first one.
        """
        if occasion == self._latest:
            return
        self._latest = occasion
        if self._sent is not None and occasion >= self._sent[0]:
            (_, own, numbers), self._sent = self._sent, None
            if numbers.read().tolist() != own:
                raise ValueError(
                    f"the ranks disagree about what is merged: at step {own[1]} this rank was about to merge "
                    f"{_short(described())}, and the first rank something else; the replicas drift apart. Freeze, "
                    "replace and load layers, and load_state_dict(), on all ranks alike"
                )
        if is_check(occasion):
            digest = hashlib.blake2b(repr(described()).encode(), digest_size=8).digest()
            own = [int.from_bytes(digest, "little") >> 1, step]
            # A tensor made of the list would be copied there, and the host would wait for it.
            there = torch.stack([torch.full((), number, dtype=torch.int64, device=device) for number in own])
            self._sent = (occasion + DELAY, own, OnItsWay(first_ranks_numbers(there, self._group)))
