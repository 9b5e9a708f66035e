"""A Lightning callback: ``Trainer(callbacks=[InMergeCallback(threshold=...)])``."""

from __future__ import annotations

import importlib.util
import math
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import Unpack

from ..training.arguments import InMergeArguments
from ..training.forward import ForwardSteps
from ..training.inmerge import InMerge
from ..training.monitor import Row, flat
from .common import Blueprint, Part, require

PACKAGES = ("lightning.pytorch", "pytorch_lightning")  # the same code under two names, each with a Callback of its own


def _callback_class() -> Any:
    """What is a Callback in each of the packages that this process uses, or in the first one that is installed."""
    bases = [sys.modules[name].Callback for name in PACKAGES if hasattr(sys.modules.get(name), "Callback")]
    if not bases:
        found = [name for name in PACKAGES if importlib.util.find_spec(name.partition(".")[0]) is not None]
        name = (found or PACKAGES)[0]
        require(name.partition(".")[0].replace("_", "-"), f"{name}:Callback")
        bases = [importlib.import_module(name).Callback]
    return type("Callback", tuple(dict.fromkeys(bases)), {})


_Callback: Any = _callback_class()


class InMergeCallback(_Callback):
    """In-model merging after each optimizer step of a ``lightning.Trainer``, also of ``pytorch_lightning``.

    Gradient accumulation, mixed precision, manual optimization and ``DDPStrategy`` need nothing further; the state goes
    into Lightning's checkpoints. What is observed is logged to the trainer's loggers as ``inmerge/merged``,
    ``inmerge/<layer>/mean_similarity`` and so on, by optimizer step; that of a part as ``inmerge/<part>/merged``.

    A module with several optimizers takes one callback for each part, which names the part and its optimizer::

        InMergeCallback(target="generator", optimizer=0), InMergeCallback(target="discriminator", optimizer=1)

    Args:
        target: the part of the LightningModule that is merged: its name, as in the state dict, or a function of the
            module; None for all of it.
        optimizer: which of the module's optimizers to follow.
        keep: arguments that stay what they are here when training resumes from a checkpoint that has other ones, see
            :meth:`inmerge_fast.InMerge.load_state_dict`.
        **recipe: arguments of :class:`inmerge_fast.InMerge`.

    Attributes:
        merger: the :class:`inmerge_fast.InMerge` of the latest ``fit``. A copy or a pickle of the callback has none.

    Raises:
        TypeError: an argument has the wrong type, or is none.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        target: Part = None,
        optimizer: int = 0,
        keep: Sequence[str] = (),
        **recipe: Unpack[InMergeArguments],
    ) -> None:
        if isinstance(optimizer, bool) or not isinstance(optimizer, int) or optimizer < 0:
            raise TypeError(f"optimizer must be the index of one of the module's optimizers, got {optimizer!r}")
        self._blueprint, self._optimizer = Blueprint(target, keep, recipe), optimizer
        self._saved: Mapping[str, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self._run: tuple[Any, Any] = (lambda: None, None)  # the trainer, weakly, and the module of the merger
        self._followed: Any = None  # the optimizer that the merger is attached to
        self._left_at: int | None = None  # Lightning's step at which it was detached in mid-run
        self.merger: InMerge | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The arguments, and a state that was loaded; not the run, which goes on in the original alone."""
        live = ("_run", "_followed", "_left_at", "merger", "log", "log_dict")  # the last two are the module's
        return {name: value for name, value in self.__dict__.items() if name not in live}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def state_key(self) -> str:
        """What Lightning keeps the state by: the part and its optimizer."""
        return self._generate_state_key(target=self._blueprint.label, optimizer=self._optimizer)

    # --------------------------------------------------------------------------------------------------------- one run

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse an optimizer that there is not."""
        self._let_go()
        if any(type(one).__name__ == "_MockOptimizer" for one in trainer.optimizers):  # Lightning's, for none
            raise ValueError(
                f"configure_optimizers of {type(pl_module).__name__} has returned no optimizer, and InMergeCallback "
                "merges after an optimizer's steps: return the one that trains the weights"
            )
        if len(trainer.optimizers) <= self._optimizer:
            raise ValueError(f"optimizer={self._optimizer}, but the module has {len(trainer.optimizers)} optimizers")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Build the InMerge, or have it go on, and attach it: after the learning rate and batch size finders."""
        self._let_go()
        state = self._saved
        goes_on = self._run[0]() is trainer and self._run[1] is pl_module and trainer.global_step > 0
        if state is None and goes_on and self.merger is not None:
            state = self.merger.state_dict()
        part, tag = self._blueprint.part(pl_module)

        def log(row: Row) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(flat(row, tag), step=row["step"])

        total, epochs = _length(trainer, pl_module)
        self.merger = self._blueprint.merger(part, total, epochs, [log] if trainer.loggers else [])
        self._run, self._saved, self._left_at = (weakref.ref(trainer), pl_module), None, None
        if state is not None:
            self._blueprint.load(self.merger, state)
        elif trainer.global_step > 0:
            self._blueprint.join(self.merger, trainer.global_step // len(trainer.optimizers))
        self._follow(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Follow an optimizer that was replaced, and leave averaged weights alone."""
        # In its last epoch StochasticWeightAveraging sets the averaged weights and takes their statistics, and the
        # optimizer makes a step with no new gradient.
        averaged = getattr(trainer.fit_loop, "_skip_backward", False)
        if averaged and self._left_at is None:
            self._let_go()
            self._left_at = trainer.global_step
        elif not averaged and self._followed is not trainer.optimizers[self._optimizer]:
            self._come_back(trainer)
            self._let_go()
            self._follow(trainer)
        forward = self._forward
        if forward is not None:  # now, since training_step() may call parts of the module, which nobody hears of
            forward.begin()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """With ``lasting=False``: validate the weights as they are, also within an accumulation."""
        if self._forward is not None:
            self._forward.restore()

    @property
    def _forward(self) -> ForwardSteps | None:
        return self.merger._forward if self.merger is not None and self.merger.attached else None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach, and log what is left."""
        self._let_go()
        if self.merger is not None:
            self._come_back(trainer)
            self.merger.flush()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach."""
        self._let_go()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach, where a run has ended before its end."""
        self._let_go()

    def _follow(self, trainer: Any) -> None:
        assert self.merger is not None
        self._followed = trainer.optimizers[self._optimizer]
        self.merger.attach(self._followed)

    def _let_go(self) -> None:
        self._followed = None
        if self.merger is not None:
            self.merger.detach()

    def _come_back(self, trainer: Any) -> None:
        """Count the steps that Lightning has counted while the merger was detached."""
        if self._left_at is not None and self.merger is not None:
            self.merger.step_count += trainer.global_step - self._left_at
            self._left_at = None

    # ----------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        if self._saved is not None:
            return dict(self._saved)
        return {} if self.merger is None else self.merger.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoints: at once, or when training starts."""
        if state_dict and self.merger is not None and self.merger.attached:
            self._blueprint.load(self.merger, state_dict)
        else:
            self._saved = state_dict or None


def _length(trainer: Any, pl_module: Any) -> tuple[float, float | None]:
    """Optimizer steps of the run, infinite if nobody knows, and its epochs; None if they do not tell the steps."""
    # StochasticWeightAveraging has added an epoch in which nothing is trained.
    epochs = next((c.swa_end + 1 for c in trainer.callbacks if hasattr(c, "swa_end")), trainer.max_epochs)
    batches, automatic = trainer.num_training_batches, pl_module.automatic_optimization
    if epochs is not None and epochs > 0 and trainer.max_steps == -1 and math.isfinite(batches):
        factors = _accumulation(trainer, epochs)
        total = sum(math.ceil(batches / factor) for factor in factors)
        # By hand it steps as it likes; once per batch with each optimizer is usual.
        return total, epochs if automatic and len(set(factors)) == 1 else None
    total = trainer.estimated_stepping_batches
    if not automatic and trainer.max_steps > 0:
        total = min(total, trainer.max_steps // len(trainer.optimizers))
    return (total if total > 0 else math.inf), None


def _accumulation(trainer: Any, epochs: int) -> list[int]:
    """Batches per optimizer step in each epoch, which a GradientAccumulationScheduler changes."""
    for callback in trainer.callbacks:
        if hasattr(callback, "get_accumulate_grad_batches"):
            return [callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs)]
    return [trainer.accumulate_grad_batches] * epochs
