"""Trainers for nnU-Net v2: ``nnUNetv2_train DATASET 2d 0 -tr nnUNetTrainerInMerge``.

nnU-Net finds trainers in the folders that an environment variable names::

    export nnUNet_extTrainer=$(python -m inmerge_fast.integrations.nnunet)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..thresholds import RankBudget
from ..training.arguments import InMergeArguments
from ..training.inmerge import InMerge
from .common import Blueprint, require

require("nnunetv2", "nnunetv2.training.nnUNetTrainer.nnUNetTrainer:nnUNetTrainer")

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # noqa: E402

SEARCH_PATH = Path(__file__).parent / "nnunet_trainers"  # a folder of its own: nnU-Net imports all that it finds there
FIELD = "inmerge_state"  # in nnU-Net's checkpoints, beside its own


class nnUNetTrainerInMerge(nnUNetTrainer):  # type: ignore[misc]  # noqa: N801, as nnU-Net names trainers
    """nnU-Net's trainer, with in-model merging after each optimizer step.

    Prints the plan of what is merged when training starts, and after each epoch what was merged. Its state is the field
    ``inmerge_state`` of nnU-Net's checkpoints, from which ``--c`` goes on to the bit; a checkpoint of the trainer
    without merging is gone on from with a warning, and this one's can be used by that. Compiled networks and DDP need
    nothing further.

    For other settings, write a class of your own into a folder that ``nnUNet_extTrainer`` names as well::

        class nnUNetTrainerInMergeMine(nnUNetTrainerInMerge):
            inmerge = {"threshold": 0.3, "prob": 0.5}

    Attributes:
        inmerge: arguments of :class:`inmerge_fast.InMerge`. A ``RankBudget`` is told the steps of the run.
        merger: the :class:`inmerge_fast.InMerge` of this run; None before it begins.

    Raises:
        TypeError: one of the arguments has the wrong type, or is none.
        ValueError: one of them is out of range.
    """

    inmerge: ClassVar[InMergeArguments] = {"threshold": RankBudget()}

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008, nnU-Net's own
    ) -> None:
        self._blueprint = Blueprint(None, (), self.inmerge, type(self).__name__)
        self._saved: Mapping[str, Any] | None = None
        self._told = (0, 0)  # pairs sampled and merged before this epoch
        self.merger: InMerge | None = None
        super().__init__(plans, configuration, fold, dataset_json, device)

    # --------------------------------------------------------------------------------------------------------- one run

    def on_train_start(self) -> None:
        """Build the InMerge, have it go on if training does, print its plan, and attach it."""
        super().on_train_start()
        total = self.num_epochs * self.num_iterations_per_epoch
        self.merger = self._blueprint.merger(self.network, total, self.num_epochs, [])
        if self._saved is not None:
            self._blueprint.load(self.merger, self._saved)
        elif self.current_epoch:
            self._blueprint.join(self.merger, self.current_epoch * self.num_iterations_per_epoch)
        self._told = self._counted()
        self.print_to_log_file(f"in-model merging: {self.merger!r}\n{self.merger.plan}", add_timestamp=False)
        self.merger.attach(self.optimizer)

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Print what the epoch has merged."""
        super().on_train_epoch_end(train_outputs)
        before, self._told = self._told, self._counted()
        sampled, merged = (now - then for now, then in zip(self._told, before, strict=True))
        self.print_to_log_file(f"in-model merging: {merged} of {sampled} sampled filters merged")

    def on_train_end(self) -> None:
        """Detach, once the last checkpoint is written."""
        try:
            super().on_train_end()
        finally:
            if self.merger is not None:
                self.merger.detach()
                self.merger.flush()

    def _counted(self) -> tuple[int, int]:
        """Pairs sampled and merged so far; waits for the device."""
        assert self.merger is not None
        counted = self.merger._run.counted_by_layer().values()
        return sum(sampled for sampled, _ in counted), sum(merged for _, merged in counted)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint, with one more field."""
        super().save_checkpoint(filename)
        if self.local_rank or self.disable_checkpointing or self.merger is None:
            return
        checkpoint = torch.load(filename, map_location="cpu", weights_only=False)  # has been written a moment ago
        part = f"{filename}.part"  # whoever is killed here has the one that nnU-Net wrote
        torch.save(checkpoint | {FIELD: self.merger.state_dict()}, part)
        os.replace(part, filename)

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """nnU-Net's checkpoint, with the field if it has it."""
        super().load_checkpoint(filename_or_checkpoint)
        checkpoint: Any = filename_or_checkpoint
        if not isinstance(checkpoint, dict):
            checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=False)
        self._saved = checkpoint.get(FIELD)
        if self._saved is not None and self.merger is not None and self.merger.attached:
            self._blueprint.load(self.merger, self._saved)


class nnUNetTrainerInMergeForwardOnly(nnUNetTrainerInMerge):  # noqa: N801
    """The same with forward-only merging, see :class:`inmerge_fast.merged`."""

    inmerge: ClassVar[InMergeArguments] = {"lasting": False}


if __name__ == "__main__":
    print(SEARCH_PATH)
