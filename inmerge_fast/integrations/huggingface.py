"""A callback for Hugging Face's Trainer: ``Trainer(..., callbacks=[InMergeCallback(threshold=...)])``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..training.inmerge import InMerge
from ..training.recipe import fitted_to

FILE_NAME = "inmerge.pt"


class InMergeCallback(TrainerCallback):
    """In-model merging after each optimizer step of a ``transformers.Trainer``.

    Gradient accumulation, mixed precision and DDP need nothing further. The state is saved as ``inmerge.pt`` in the
    Trainer's checkpoint folders, and read from there by ``train(resume_from_checkpoint=...)``.

    Args:
        target: the part of the model that is merged, from the model; None for all of it.
        resume_from: folder of the checkpoint to resume from, if it is not below ``args.output_dir``.
        **recipe: arguments of :class:`inmerge_fast.InMerge`.

    Attributes:
        merger: the :class:`inmerge_fast.InMerge`, from the beginning of ``train`` on.
    """

    def __init__(
        self, *, target: Callable[[Any], nn.Module] | None = None, resume_from: str | None = None, **recipe: Any
    ) -> None:
        self._target, self._resume_from, self._recipe = target, resume_from, recipe
        self.merger: InMerge | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Build the InMerge, load its state if training resumes, and attach it."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        epochs = args.num_train_epochs if args.max_steps <= 0 else None
        recipe = fitted_to(self._recipe, state.max_steps, epochs)
        self.merger = InMerge(model if self._target is None else self._target(model), **recipe)
        if state.global_step > 0:
            folder = self._resume_from or os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            path = os.path.join(folder, FILE_NAME)
            if not os.path.exists(path):
                raise FileNotFoundError(
                    f"training resumes at step {state.global_step}, but there is no {path}; give the folder of the "
                    "checkpoint as resume_from, or train from the beginning"
                )
            self.merger.load_state_dict(torch.load(path, weights_only=True))
        if hasattr(optimizer, "accelerator_state"):  # Accelerate's wrapper has no hooks of its own
            optimizer = optimizer.optimizer
        self.merger.attach(optimizer)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the state next to the Trainer's."""
        if self.merger is not None and state.is_world_process_zero:
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            torch.save(self.merger.state_dict(), os.path.join(folder, FILE_NAME))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach, and log what is left."""
        if self.merger is not None:
            self.merger.detach()
            self.merger.flush()
