"""``InMerge``: merging as a part of a training run, with schedules, checkpoints, several ranks and CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

from ..draw import MAX_STEP, check_word
from ..dynamo import outside_dynamo
from ..layer_similarity import summarise_layer
from ..merge import several_ranks
from ..merge_plan import MergePlan
from ..paths.match import PartnerRule
from ..plan.candidates import unwrap_compiled
from ..plan.filters import check_outside_transforms
from ..plan.plan import Target
from ..stats import MergeStats
from .agreement import check_agreement
from .arguments import InMergeArguments, checked
from .copies import CopiedRun, check_is_no_average, state_of
from .forward import NO_BLOCK, NO_CAPTURE, NO_STEP, ForwardSteps, check_is_called
from .graphs import GraphSteps
from .guard import CollapseGuard
from .hooks import AttachedStep, let_others_go
from .monitor import Logger, Monitor
from .recipe import Threshold
from .run import MergeRun
from .schedules import Schedule
from .silence import Evaluation
from .summary import Preview, RunSummary, preview, summarise
from .untrained import Untrained


class InMerge:
    """In-model merging (arXiv 2502.20516) in a training run: one object, one call per optimizer step.

    Either call :meth:`step` next to ``optimizer.step()``, or :meth:`attach` it to the optimizer once. It counts
    optimizer steps, knows when to merge and how much, does nothing while the model is in evaluation mode, and can be
    saved and resumed to the bit::

        merger = inmerge_fast.InMerge(model, threshold=inmerge_fast.RankBudget(), stop=steps_of_the_run, seed=0)
        for x, y in loader:
            loss(model(x), y).backward()
            optimizer.step()
            merger.step()
            optimizer.zero_grad()

    Args:
        model: the model, possibly compiled, wrapped by ``DistributedDataParallel`` or sharded by ``fully_shard``; or an
            iterable of convolutions, ``Linear`` layers and weights, e.g. the float32 master weights.
        alpha: share of itself that a merged filter keeps, in [0, 1]: a number, a ramp (:func:`inmerge_fast.linear`,
            :func:`inmerge_fast.cosine`), or a function of the step. None is 0.8.
        prob: probability that a filter looks at a partner, in [0, 1]; likewise. None is 0.3.
        threshold: similarity that a pair must exceed, in [-1, 1]; likewise. None is the paper's 0.3. Or a
            dict of one for each layer by name (:meth:`inmerge_fast.Similarity.threshold_for_rate`), or what follows the
            layer: :class:`inmerge_fast.RankBudget`, which is the one to recommend, :class:`inmerge_fast.NoiseThreshold`
            or :class:`inmerge_fast.QuantileThreshold`.
        partner: the partner rule, see :func:`inmerge_fast.merge_`; likewise exclude and include_heads.
        skip_first: see :func:`inmerge_fast.merge_`; or name patterns of the layers to leave out, and no others.
        include_linear: whether ``Linear`` layers take part too.
        include_frozen: whether weights that require no gradient take part too. Without it frozen layers wait until they
            are trained, also where all of them are frozen for a while; layers that are given one by one are meant.
        start: first step that merges.
        stop: first step that does not any more; None for no end.
        every: merge at every ``every``-th step from ``start`` on.
        steps_per_epoch: if given, ``start`` and ``stop`` count epochs of so many optimizer steps: with gradient
            accumulation over k batches that is ``len(loader) // k``. The paper trains 30 epochs plainly and 10 with
            merging: ``start=30, stop=40``.
        seed: seed of the draw, ``0 <= seed < 2**64``, the same on all ranks.
        guard: what stops layers that merging has cost too much; by default ``CollapseGuard()``. With None nothing is
            measured but what ``threshold`` needs, and :meth:`summary` cannot say what merging has cost.
        loggers: functions that get a row of numbers for each observed step, see :class:`inmerge_fast.DictLogger`.
        observe_every: every how many merging steps are observed by loggers. Nothing waits for the numbers: they are
            passed on when the next ones are taken.
        process_group: ranks that train this same model, all of which must construct it; None for all ranks.
        lasting: True for the paper's merging, which stays in the weights. **False for forward-only merging**, which
            lasts for the forward and backward passes of one optimizer step: see :class:`inmerge_fast.merged`. Then
            ``alpha``, ``prob``, ``threshold`` and ``skip_first`` are 0.5, 0.5, -1 (every sampled pair) and 0 unless
            they are given, ``guard`` and ``RankBudget`` have nothing to do, and the model must be the module that the
            training loop calls.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, nothing can be merged, a weight cannot be rewritten in place, or the
            ranks disagree about the recipe.
    """

    def __init__(
        self,
        model: Target,
        *,
        alpha: Schedule | None = None,
        prob: Schedule | None = None,
        threshold: Threshold | None = None,
        partner: PartnerRule = "random",
        skip_first: float | str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        include_linear: bool = False,
        include_frozen: bool = False,
        include_heads: bool = False,
        start: float = 0,
        stop: float | None = None,
        every: int = 1,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        guard: CollapseGuard | Literal["default"] | None = "default",
        loggers: Sequence[Logger] = (),
        observe_every: int = 10,
        process_group: Any = None,
        lasting: bool = True,
    ) -> None:
        parts = checked({name: value for name, value in locals().items() if name in InMergeArguments.__annotations__})
        check_is_no_average(unwrap_compiled(model) if isinstance(model, nn.Module) else model)
        if not isinstance(model, (nn.Module, torch.Tensor)) and isinstance(model, Iterable):
            model = tuple(model)
        self._run: MergeRun = MergeRun(
            unwrap_compiled(model) if isinstance(model, nn.Module) else model,
            parts.selection,
            parts.recipe,
            parts.guard,
            Monitor(parts.loggers),
            parts.observe_every,
            process_group,
        )
        self._forward = None if parts.recipe.lasting else ForwardSteps(self._run, check_is_called(model))
        self._attached: AttachedStep | None = None
        self._evaluation = Evaluation()
        self._graph = GraphSteps(self._run)
        if several_ranks(process_group):
            check_agreement(self._run.described(), process_group)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles get, also those of a model or callback that holds this InMerge.

        A copy has the recipe and goes on from the same step. It plans when it is first used, for the copy of the model;
        it is attached to nothing, and has no loggers.
        """
        return state_of(self._run)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._run = CopiedRun(state)
        self._attached, self._evaluation, self._graph = None, Evaluation(), GraphSteps(self._run)
        # From the state: a copied run that is asked for anything plans, for a model that may not be copied yet.
        self._forward = None if state["recipe"].lasting else ForwardSteps(self._run, state["model"])

    @property
    def plan(self) -> MergePlan:
        """The layers that are merged, printable."""
        return self._run.plan

    @property
    def step_count(self) -> int:
        """Optimizer steps so far; the number of the next one."""
        return self._run.step_count

    @step_count.setter
    def step_count(self, value: int) -> None:
        check_word("step_count", value, MAX_STEP)
        self._run.step_count = int(value)

    @property
    def stopped(self) -> set[str]:
        """Names of layers that the guard has stopped."""
        return self._run.stopped

    # ------------------------------------------------------------------------------------------------------ one step

    @outside_dynamo
    def step(self) -> MergeStats | None:
        """Merge, if this step is one that merges, and count it. Call it once per optimizer step, outside the model.

        In evaluation mode it does nothing, so that it may stand before the forward pass of a loop that validates, too.
        That holds for one process: ranks of which one does nothing would drift apart, so several raise.

        Another InMerge that is attached for the same weights is detached, with a warning. While a CUDA graph is
        captured, the launches are captured that merge what :meth:`prepare` has last set.

        Returns:
            What was merged, read from the device only when looked at; None where nothing merges, and while capturing.

        Raises:
            RuntimeError: it is attached to an optimizer, which calls it already; or one of several ranks is in
                evaluation mode.
            ValueError: a schedule is out of range, or a weight cannot be merged any more; nothing was written then.
        """
        if self._attached is not None:
            raise RuntimeError("this InMerge is attached to an optimizer and steps with it; detach() it first")
        if self._forward is not None:
            raise RuntimeError(NO_STEP)
        if not self._run.step_count:  # a notebook's cell may have attached one before, and steps by hand now
            let_others_go(self.plan.weights(waiting=True))
        if not self._is_training():
            self._skip()
            return None
        self._evaluation.end()
        return self._advance()

    @outside_dynamo  # again, for an optimizer step inside a compiled function
    def _advance(self) -> MergeStats | None:
        """A step that was taken, whatever mode the model is in: whoever asks for it knows that it is training."""
        check_outside_transforms()
        if self._forward is not None:
            self._forward.count()
            return None
        if self._graph.is_capturing():
            self._graph.capture()
            return None
        plan = self._run.plan
        stats = self._run.merge()
        if self._attached is not None and self._run.plan is not plan:
            self._attached.look_again()
        return stats

    def _is_training(self) -> bool:
        model = self._run.model
        if isinstance(model, nn.Module):
            return model.training
        return not isinstance(model, tuple) or all(getattr(item, "training", True) for item in model)

    def _skip(self) -> None:
        if several_ranks(self._run.group):
            raise RuntimeError(
                "step() was called in evaluation mode on one of several ranks, whose replicas drift apart where one "
                "does not merge; call it where the optimizer steps, after model.train(), or attach() it"
            )
        layers = self.plan.layers
        self._evaluation.count(layers[0].weight if layers else None, self.step_count)

    # ------------------------------------------------------------------------------------------------------ monitoring

    def flush(self) -> None:
        """Pass to the loggers what has been observed so far, at the end of the run; waits for the device.

        Also warns (:class:`inmerge_fast.NoEffectWarning`) of a run that had no effect and was too short to be told yet.
        """
        self._run.monitor.flush()
        self._run.plan.paths.follow()
        self._run.plan.effect.end()

    def preview(self) -> Preview:
        """What the next step that merges is expected to do to each layer, for the weights as they are now.

        Prints as a table; says which layers cannot act at all. Compares all pairs of each layer and waits for the
        device; with sharded weights or several ranks all of them must call it. Nothing is changed.

        Raises:
            ValueError: no step merges any more.
        """
        return preview(self._run)

    def summary(self) -> RunSummary:
        """What merging has done to each layer so far: exact totals of all steps, ranks, and a verdict.

        Prints as a table, and :meth:`RunSummary.to_csv` writes it. Takes an eigenvalue decomposition per layer and
        waits for the device; with sharded weights or several ranks all of them must call it. Nothing is changed.
        """
        return summarise(self._run)

    def effective_rank(self) -> dict[str, float]:
        """Effective rank of each layer's filters, now: N if all are orthogonal, 1 if all are alike.

        See :class:`inmerge_fast.LayerSimilarity`. Takes an eigenvalue decomposition per layer and waits for the device;
        with sharded weights all ranks must call it.
        """
        return {
            name: summarise_layer(name, weight, layer.layout, True).effective_rank
            for name, weight, layer in self._run.layers()
        }

    # --------------------------------------------------------------------------------------------------- CUDA graphs

    def prepare(self) -> None:
        """Put the numbers of the next step into device memory and count it, before each replay of a captured step.

        What is captured depends on nothing on the host, so schedules, ``start``, ``stop`` and ``every`` go on under
        replay; at a step that does not merge, the replay draws no filter. Also call it once before capturing, which
        allocates and compiles what is needed, and counts nothing in the end::

            merger.prepare()
            with torch.cuda.graph(graph):
                ...
                merger.step()
            for x, y in loader:
                ...
                merger.prepare()
                graph.replay()

        Raises:
            RuntimeError: the weights take the eager path, whose decisions are drawn on the host.
            ValueError: a weight was moved or replaced after the capture: the graph would still write to the old one.
        """
        if self._forward is not None:
            raise RuntimeError(NO_CAPTURE)
        self._graph.prepare()

    # ------------------------------------------------------------------------------------------------------ optimizer

    def attach(self, optimizer: torch.optim.Optimizer) -> InMerge:
        """Merge after each step of ``optimizer``, so that nothing is left to call, whatever mode the model is in.

        With ``lasting=False``: merge before the first training forward pass of each step, restore before the optimizer
        writes. Micro-batches and closures of a step see the same merge; evaluations, ``state_dict()`` and copies none.

        With gradient accumulation that is once per optimizer step. A step that a ``GradScaler`` skips is not counted
        (where the device decides that, the host waits). Wrapped ones (accelerate, Lookahead, SAM, ...) are followed: a
        step is one that the innermost optimizer takes, and is merged when the outermost call is over. Weights that
        ``optimizer`` does not hold are merged as well, if anything has written to them since the last time.

        Another InMerge that is attached for the same weights is detached, with a warning. Another one tells when they
        go on changing without steps of ``optimizer``. As a context it is detached at the end::

            with inmerge_fast.InMerge(model).attach(optimizer) as merger:
                train()

        Returns:
            Itself.

        Raises:
            TypeError: not an optimizer.
            ValueError: the optimizer does not update these weights, e.g. because it holds copies of them; or PyTorch
                calls no hooks after its steps, and nothing inside it can be followed.
            RuntimeError: it is attached already.
        """
        if self._attached is not None:
            raise RuntimeError("this InMerge is attached already; of several optimizers attach to the last one to step")
        before = None if self._forward is None else self._forward.before_write
        self._attached = AttachedStep(optimizer, lambda: self.plan, self._advance, self.detach, before)
        if self._forward is None:
            self._run.untrained = Untrained(self.plan, self._attached.held, type(optimizer).__name__)
        else:
            self._forward.attach(self._attached)
        return self

    def merged(self) -> AbstractContextManager[MergeStats | None]:
        """Forward-only merging without :meth:`attach`: merge for a block, restore at its end, and count the step.

        For ``lasting=False``. All forward and backward passes of one optimizer step belong into the block, and the
        optimizer step after it. If the block raises, the weights are restored and the step is not counted.

        Returns:
            A context manager that gives what was merged; None at a step that does not merge.

        Raises:
            RuntimeError: ``lasting`` is True, or it is attached.
        """
        if self._forward is None or self._attached is not None:
            raise RuntimeError(NO_BLOCK)
        return self._forward.merged()

    @property
    def attached(self) -> bool:
        """Whether it steps with an optimizer."""
        return self._attached is not None

    def detach(self) -> None:
        """Undo :meth:`attach`; does nothing where it is not attached."""
        attached, self._attached = self._attached, None
        if attached is not None:
            self._run.untrained = None
            attached.remove()
            if self._forward is not None:
                self._forward.detach()

    def __enter__(self) -> InMerge:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on bit-identically, as plain data (``torch.load(weights_only=True)``).

        Functions given as schedules are not in it; the resumed run must construct with the same ones.
        """
        return self._run.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, keep: Sequence[str] = ()) -> None:
        """Go on where :meth:`state_dict` was taken; seed, schedules, ``start``, ``stop`` and ``every`` come from it.

        Where they are not what this InMerge was constructed with, a warning says so. Call it on all ranks.

        Args:
            state: what :meth:`state_dict` has returned.
            keep: arguments that stay what they were constructed with, e.g. ``["threshold", "stop"]``; of ``start`` and
                ``stop`` that is the optimizer step.

        Raises:
            ValueError: the state is of other layers or of another version, or a schedule was a function and is none
                now, or the other way round. Nothing has changed then.
        """
        self._run.load_state_dict(state, keep)

    def __repr__(self) -> str:
        return f"InMerge(layers={len(self.plan.layers)}, step_count={self.step_count}, {self._run.recipe.shown()})"
