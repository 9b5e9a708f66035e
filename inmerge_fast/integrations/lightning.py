"""A Lightning callback: ``Trainer(callbacks=[InMergeCallback(threshold=...)])``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

try:
    from lightning import pytorch as pl
except ImportError:  # the same code under its older name
    import pytorch_lightning as pl  # type: ignore[no-redef]

from ..training.inmerge import InMerge
from ..training.monitor import Row, flat
from ..training.recipe import fitted_to


class InMergeCallback(pl.Callback):
    """In-model merging after each optimizer step of a ``lightning.Trainer``.

    Gradient accumulation, mixed precision and ``DDPStrategy`` need nothing further; the state goes into Lightning's
    checkpoints. What is observed is logged to the trainer's loggers as ``inmerge/merged``,
    ``inmerge/<layer>/mean_similarity`` and so on, by optimizer step.

    Args:
        target: the part of the LightningModule that is merged, from the module; None for all of it.
        optimizer: which of the module's optimizers to follow.
        **recipe: arguments of :class:`inmerge_fast.InMerge`.

    Attributes:
        merger: the :class:`inmerge_fast.InMerge`, from the start of ``fit`` on.
    """

    def __init__(self, *, target: Callable[[Any], nn.Module] | None = None, optimizer: int = 0, **recipe: Any) -> None:
        self._target, self._optimizer, self._recipe = target, optimizer, recipe
        self._saved: Mapping[str, Any] | None = None
        self._module: Any = None
        self.merger: InMerge | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Build the InMerge, or go on with it, and attach it."""
        if len(trainer.optimizers) <= self._optimizer:
            raise ValueError(f"optimizer={self._optimizer}, but the module has {len(trainer.optimizers)} optimizers")
        if self.merger is None or self._module is not pl_module:
            self._module = pl_module

            def log(row: Row) -> None:
                for logger in trainer.loggers:
                    logger.log_metrics(flat(row), step=row["step"])

            ends_by_epochs = trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.max_steps == -1
            epochs = trainer.max_epochs if ends_by_epochs else None
            recipe = fitted_to(self._recipe, trainer.estimated_stepping_batches, epochs)
            recipe |= {"loggers": [*self._recipe.get("loggers", ()), log]}
            self.merger = InMerge(pl_module if self._target is None else self._target(pl_module), **recipe)
        if self._saved is not None:
            self.merger.load_state_dict(self._saved)
            self._saved = None
        self.merger.attach(trainer.optimizers[self._optimizer])

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach, and log what is left."""
        if self.merger is not None:
            self.merger.detach()
            self.merger.flush()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach, so that ``fit`` can be called again."""
        if self.merger is not None:
            self.merger.detach()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        return {} if self.merger is None else self.merger.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoints: at once, or before ``fit`` starts, when it does."""
        if state_dict and self.merger is not None and self.merger.attached:
            self.merger.load_state_dict(state_dict)
        else:
            self._saved = state_dict or None
