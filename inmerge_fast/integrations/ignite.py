"""A handler for Ignite's engines and MONAI's trainers: ``InMergeHandler(model, optimizer, ...).attach(trainer)``."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from ..effect import callers_level
from ..thresholds import check_count
from ..training.arguments import InMergeArguments
from ..training.inmerge import InMerge
from ..training.monitor import Row, flat
from .common import Blueprint, Part, require

require("pytorch-ignite", "ignite.engine:Engine", "ignite.engine:Events.TERMINATE")

from ignite.engine import Engine, Events  # noqa: E402

EVALUATORS = {"Evaluator", "evaluate_step"}  # a class of MONAI's, and what create_supervised_evaluator() calls


class InMergeHandler:
    """In-model merging at each optimizer step of an Ignite engine, or of a trainer of MONAI.

    Accumulation, mixed precision and DDP need nothing further. It is saved and resumed as everything else is, by name:
    ``Checkpoint({"trainer": trainer, "model": model, "optimizer": optimizer, "inmerge": handler}, ...)``, MONAI's
    ``CheckpointSaver(save_dict=...)`` and ``CheckpointLoader(load_dict=...)``. What was observed last stands in
    ``engine.state.metrics`` as ``inmerge/merged``, ``inmerge/mean_similarity`` and so on, where Ignite's loggers and
    MONAI's ``StatsHandler`` find it; that of a part as ``inmerge/<part>/merged``. For single layers, give ``loggers``.

    A trainer of MONAI is asked for what it trains: ``train_handlers=[InMergeHandler(threshold=...)]``. One that has
    several networks takes a handler for each, with its network and optimizer.

    With ``lasting=False`` weights are merged while the engine's function runs: between iterations, as where they are
    averaged, they are as they were, and a backward pass of what the function has returned raises.

    After an exception that another handler raises again it stays attached until the next run of the engine begins.

    Args:
        model: what the engine calls, possibly compiled or wrapped by ``DistributedDataParallel``; None for the
            ``network`` of a trainer of MONAI.
        optimizer: what the engine steps; None for the ``optimizer`` of a trainer of MONAI.
        target: the part of the model that is merged: its name, as in the state dict, or a function of the model; None
            for all of it.
        accumulation_steps: iterations per optimizer step, from which the length of a run is told; None for what a
            trainer of MONAI says, or 1.
        keep: arguments that stay what they are here when training resumes from a checkpoint that has other ones, see
            :meth:`inmerge_fast.InMerge.load_state_dict`.
        **recipe: arguments of :class:`inmerge_fast.InMerge`.

    Attributes:
        merger: the :class:`inmerge_fast.InMerge` of the latest run. A copy or a pickle of the handler has none.

    Raises:
        TypeError: an argument has the wrong type, or is none.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        target: Part = None,
        accumulation_steps: int | None = None,
        keep: Sequence[str] = (),
        **recipe: Unpack[InMergeArguments],
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be the module that the engine calls, got {type(model).__name__}")
        if accumulation_steps is not None:
            check_count("accumulation_steps", accumulation_steps)
        self._blueprint = Blueprint(target, keep, recipe, type(self).__name__)
        self._given, self._accumulation = (model, optimizer), accumulation_steps
        self._saved: Mapping[str, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self._engine: Any = lambda: None  # weakly: the engine holds this handler
        self._begins, self._began_at = False, 0
        self.merger: InMerge | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The arguments, and a state that was loaded; not the run, which goes on in the original alone."""
        live = ("_engine", "_begins", "_began_at", "merger")
        return {name: value for name, value in self.__dict__.items() if name not in live}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def attach(self, engine: Engine) -> None:
        """Have ``engine`` merge when it runs.

        Raises:
            TypeError: not an engine.
            ValueError: it is attached to an engine already; or the engine evaluates, or does not say what it trains.
        """
        if not isinstance(engine, Engine):
            raise TypeError(f"engine must be an ignite.engine.Engine, got {type(engine).__name__}")
        if self._engine() is not None:
            which = "this engine" if self._engine() is engine else "another engine"
            raise ValueError(f"this InMergeHandler is attached to {which} already; make one for each")
        kinds = {kind.__name__ for kind in type(engine).__mro__}
        if EVALUATORS & (kinds | {getattr(engine._process_function, "__name__", "")}):
            raise ValueError(
                "the engine evaluates a model, and merging is a part of training: attach it to the trainer"
            )
        if "Workflow" not in kinds and None in self._given:  # MONAI's do not have them yet when they attach handlers
            self._trained(engine)
        self._engine, self._begins = weakref.ref(engine), True  # without waiting for a start: the engine may be running
        engine.add_event_handler(Events.STARTED, self._on_started)
        # Not at the start, where other handlers may only just load a checkpoint.
        engine.add_event_handler(Events.EPOCH_STARTED, self._on_epoch)
        engine.add_event_handler(Events.ITERATION_STARTED, self._on_iteration)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._on_iteration_end)
        engine.add_event_handler(Events.TERMINATE, self._on_terminate)
        engine.add_event_handler(Events.COMPLETED, self._on_end)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._on_exception)

    def _trained(self, engine: Engine) -> tuple[nn.Module, Any]:
        found: list[Any] = []
        for name, given, attribute in zip(("model", "optimizer"), self._given, ("network", "optimizer"), strict=True):
            value = getattr(engine, attribute, None) if given is None else given
            if value is None:
                raise ValueError(
                    f"{type(engine).__name__} has no {attribute} to ask for: give InMergeHandler the {name} that it "
                    f"trains{' with' if name == 'optimizer' else ''}, as InMergeHandler(model, optimizer, ...)"
                )
            found.append(value)
        return found[0], found[1]

    # --------------------------------------------------------------------------------------------------------- one run

    def _on_started(self, engine: Engine) -> None:
        self._let_go()
        self._begins = True

    def _on_epoch(self, engine: Engine) -> None:
        if self._begins:
            self._begin(engine, engine.state.iteration)
        elif self.merger is not None and not self.merger.attached:  # another handler has dealt with an exception
            self.merger.attach(self._trained(engine)[1])

    def _begin(self, engine: Engine, done: int) -> None:
        self._begins = False
        model, optimizer = self._trained(engine)
        part, tag = self._blueprint.part(model)
        state, before = self._saved, self.merger
        if state is None and done and before is not None:
            state = before.state_dict()

        engine_now = self._engine

        def note(row: Row) -> None:
            numbers = flat(row | {"layers": {}}, tag)
            engine_now().state.metrics.update({f"{tag}/step": row["step"], **numbers})

        total, epochs = self._length(engine)
        self.merger = self._blueprint.merger(part, total, epochs, [note])
        if state is not None:
            self._blueprint.load(self.merger, state)
        elif done:
            self._blueprint.join(self.merger, self._steps(engine, done))
        self._saved = None
        self._stand_around_iterations(engine)
        _end_others(self, engine)
        self.merger.attach(optimizer)
        self._began_at = self.merger.step_count
        _RUNS.add(self)

    def _stand_around_iterations(self, engine: Engine) -> None:
        """Last at an iteration's start and first at its end: whoever averages weights there reads the parameters."""
        for event, ours, end in (
            (Events.ITERATION_STARTED, self._on_iteration, True),
            (Events.ITERATION_COMPLETED, self._on_iteration_end, False),
        ):
            entries = engine._event_handlers[event]
            own = [entry for entry in entries if entry[0] == ours]
            others = [entry for entry in entries if entry[0] != ours]
            engine._event_handlers[event] = others + own if end else own + others  # anew: it may be gone through now

    def _on_iteration(self, engine: Engine) -> None:
        if self._begins:  # attached in the midst of an epoch
            self._begin(engine, engine.state.iteration - 1)
        # Now, since the engine's function may call parts of the model, which nobody hears of.
        if self.merger is not None and self.merger.attached and self.merger._forward is not None:
            self.merger._forward.begin()

    def _on_iteration_end(self, engine: Engine) -> None:
        state = engine.state
        if self.merger is not None and self.merger._forward is not None:
            self.merger._forward.restore()
        if self.merger is not None and state.epoch_length and state.iteration % state.epoch_length == 0:
            self.merger._run.monitor.flush()  # before the epoch's metrics are reported

    def _on_terminate(self, engine: Engine) -> None:
        if engine.should_terminate == "skip_completed":
            self._on_end(engine)

    def _on_end(self, engine: Engine) -> None:
        self._let_go()
        if self.merger is None:
            return
        self.merger.flush()
        if self.merger.step_count == self._began_at and engine.state.iteration:
            warnings.warn(
                "the engine that InMergeHandler is attached to has run, and the optimizer has made no step: attach it "
                "to the engine that trains, with the optimizer that this one steps",
                UserWarning,
                stacklevel=callers_level(),
            )

    def _on_exception(self, engine: Engine, error: BaseException) -> None:
        self._let_go()
        listening = [getattr(entry[0], "__self__", None) for entry in engine._event_handlers[Events.EXCEPTION_RAISED]]
        if listening[-1] is self and all(isinstance(one, InMergeHandler) for one in listening):
            raise error  # as Ignite does where nobody listens; others decide for themselves

    def _let_go(self) -> None:
        _RUNS.discard(self)
        if self.merger is not None:
            self.merger.detach()

    # ---------------------------------------------------------------------------------------------------------- length

    def _per_step(self, engine: Engine) -> int:
        steps: int = getattr(engine, "accumulation_steps", 1)
        return self._accumulation or steps

    def _steps(self, engine: Engine, iterations: int) -> int:
        """Optimizer steps of so many iterations."""
        per_step, length = self._per_step(engine), engine.state.epoch_length
        if hasattr(engine, "accumulation_steps") and length:  # MONAI's steps at the end of each epoch, too
            epochs, rest = divmod(iterations, length)
            return epochs * math.ceil(length / per_step) + rest // per_step
        # MONAI's trainer of GANs steps one of its two optimizers several times.
        is_discriminator = getattr(engine, "d_optimizer", None) is self._trained(engine)[1]
        return iterations // per_step * (getattr(engine, "d_train_steps", 1) if is_discriminator else 1)

    def _length(self, engine: Engine) -> tuple[float, float | None]:
        """Optimizer steps of the run, infinite if nobody knows, and its epochs; None if they are not what ends it."""
        state = engine.state
        iterations = getattr(state, "max_iters", None)  # older releases have none
        if iterations is not None:
            return self._steps(engine, iterations), None
        if state.max_epochs is None or state.epoch_length is None:
            return math.inf, None
        return self._steps(engine, state.max_epochs * state.epoch_length), state.max_epochs

    # ----------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        if self._saved is not None:
            return dict(self._saved)
        return {} if self.merger is None else self.merger.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """From a checkpoint: at once, or when the engine begins to train."""
        if state_dict and self.merger is not None and self.merger.attached:
            self._blueprint.load(self.merger, state_dict)
        else:
            self._saved = dict(state_dict) or None


_RUNS: weakref.WeakSet[InMergeHandler] = weakref.WeakSet()  # whose merger is attached


def _end_others(handler: InMergeHandler, engine: Engine) -> None:
    """Refuse a second handler for the same weights in one run; what an exception has left of another run ends."""
    assert handler.merger is not None
    weights = {id(w) for w in handler.merger.plan.weights(waiting=True)}
    for other in list(_RUNS):
        if other.merger is None or weights.isdisjoint(map(id, other.merger.plan.weights(waiting=True))):
            continue
        if other._engine() is engine:
            raise ValueError(
                "this engine has two InMergeHandlers for the same weights, which would merge twice per step; give each "
                "its part of the model, as target="
            )
        other._let_go()
