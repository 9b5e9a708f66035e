"""A callback for Hugging Face's Trainer: ``Trainer(..., callbacks=[InMergeCallback(threshold=...)])``."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import Any

from torch import nn
from typing_extensions import Unpack

from ..training.arguments import InMergeArguments
from ..training.inmerge import InMerge
from ..training.monitor import Row, flat
from .common import Blueprint, Part, require

require("transformers", "transformers:TrainerCallback", "transformers.trainer_callback:PrinterCallback")
require("accelerate", "accelerate")

from transformers import TrainerCallback  # noqa: E402
from transformers.trainer_callback import PrinterCallback, ProgressCallback  # noqa: E402

KEY = "inmerge_fast"  # in the Trainer's state; the name of the class would have it construct another callback


class StateNow:
    """Stands in the Trainer's state for a callback's, which is read only when the Trainer copies its own to save it."""

    def __init__(self, callback: InMergeCallback) -> None:
        self._callback = weakref.ref(callback)

    def __deepcopy__(self, memo: object) -> dict[str, Any] | None:
        """The state as plain data."""
        callback = self._callback()
        return None if callback is None or callback.merger is None else callback.merger.state_dict()

    def __reduce__(self) -> Any:
        """Pickled, it is plain data too."""
        return _as_it_is, (self.__deepcopy__(None),)

    def is_of(self, callback: InMergeCallback) -> bool:
        """Whether it is the state of ``callback``."""
        return self._callback() is callback


def _as_it_is(state: Any) -> Any:
    return state


class InMergeCallback(TrainerCallback):
    """In-model merging after each optimizer step of a ``transformers.Trainer``.

    Gradient accumulation, mixed precision, DDP and ``hyperparameter_search`` need nothing further. The state is a part
    of the Trainer's own, ``trainer_state.json``: it is saved where, when and by whom that is, and read from wherever
    ``train(resume_from_checkpoint=...)`` finds it. What was observed last is logged by ``Trainer.log`` after each loss
    as ``inmerge/merged``, ``inmerge/<layer>/mean_similarity`` and so on, of the step ``inmerge/step``, to
    ``trainer.state.log_history`` and what ``report_to`` names, but not to the console; that of a part as
    ``inmerge/<part>/merged``.

    The Trainer has no word for a run that an exception has ended: its merger stays attached to the optimizer of that
    run until the next one begins.

    Args:
        target: the part of the model that is merged: its name, as in the state dict, or a function of the model; None
            for all of it.
        keep: arguments that stay what they are here when training resumes from a checkpoint that has other ones, see
            :meth:`inmerge_fast.InMerge.load_state_dict`.
        **recipe: arguments of :class:`inmerge_fast.InMerge`.

    Attributes:
        merger: the :class:`inmerge_fast.InMerge` of the latest ``train``. A copy or a pickle of the callback has none.

    Raises:
        TypeError: an argument has the wrong type, or is none.
        ValueError: an argument is out of range.
    """

    def __init__(self, *, target: Part = None, keep: Sequence[str] = (), **recipe: Unpack[InMergeArguments]) -> None:
        self._blueprint = Blueprint(target, keep, recipe)
        self._forget()

    def _forget(self) -> None:
        self._tag, self._row = "", None  # type: tuple[str, Row | None]
        self._state: Any = None  # the Trainer's, of the run that the merger is of
        self.merger: InMerge | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The arguments alone: the run goes on in the original."""
        return {"_blueprint": self._blueprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # --------------------------------------------------------------------------------------------------------- one run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Build the InMerge, have it go on if training resumes, and attach it."""
        part, self._tag = self._blueprint.part(kwargs["model"])
        _end_interrupted_runs(state, part)
        self._let_go()
        epochs = args.num_train_epochs if args.max_steps <= 0 else None
        self._row, self._state = None, state
        self.merger = self._blueprint.merger(part, state.max_steps, epochs, [self._note])
        key = f"{KEY}: {self._blueprint.label}" if self._blueprint.label else KEY
        saved = state.stateful_callbacks.get(key)
        if isinstance(saved, StateNow) and not saved.is_of(self):
            raise ValueError(
                f"this Trainer has two InMergeCallbacks with target={self._blueprint.label or None!r}, which would "
                "merge twice per step and be saved as one; give each its part by name, as target="
            )
        if saved is not None:
            self._blueprint.load(self.merger, saved)
        elif state.global_step > 0:
            self._blueprint.join(self.merger, state.global_step)
        state.stateful_callbacks[key] = StateNow(self)
        optimizer = kwargs["optimizer"]
        if hasattr(optimizer, "accelerator_state"):  # Accelerate's wrapper has no hooks of its own
            optimizer = optimizer.optimizer
        self.merger.attach(optimizer)
        _RUNS.add(self)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach, and log what is left."""
        self._let_go()
        if self.merger is not None:
            self.merger.flush()

    def _let_go(self) -> None:
        _RUNS.discard(self)
        if self.merger is not None:
            self.merger.detach()

    # ------------------------------------------------------------------------------------------------------ monitoring

    def _note(self, row: Row) -> None:
        self._row = row

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log what was observed last, when the Trainer logs."""
        if self.merger is None or state is not self._state:
            return
        self.merger._run.monitor.flush()  # the Trainer has just waited for the loss
        row, self._row = self._row, None
        trainer = None if row is None else _trainer_of(self)
        if row is None or trainer is None:
            return
        handler = trainer.callback_handler
        everyone = handler.callbacks
        handler.callbacks = [c for c in everyone if not isinstance(c, (PrinterCallback, ProgressCallback))]
        try:
            trainer.log({f"{self._tag}/step": row["step"], **flat(row, self._tag)})
        finally:
            handler.callbacks = everyone


_RUNS: weakref.WeakSet[InMergeCallback] = weakref.WeakSet()  # whose merger is attached


def _end_interrupted_runs(state: Any, part: nn.Module) -> None:
    """Detach what an exception has left attached to these weights: where one run begins, the one before is over."""
    weights = {id(p) for p in part.parameters()}
    for other in list(_RUNS):
        merger = other.merger
        if other._state is not state and merger is not None and weights & {id(w) for w in merger.plan.weights()}:
            other._let_go()


def _trainer_of(callback: InMergeCallback) -> Any:
    """The Trainer that is calling ``callback``, which it does not tell; None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if callback in getattr(getattr(caller, "callback_handler", None), "callbacks", ()):
            return caller
        frame = frame.f_back
    return None
