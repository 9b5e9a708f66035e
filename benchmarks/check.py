"""The check that all ways of merging do what the reference does, before any of them is timed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

import inmerge_fast
from benchmarks.providers import Provider
from benchmarks.timing import parts_of
from benchmarks.work import REGIMES, SEED, Settings


class Checker:
    """What the reference makes of a plan's weights with recorded draws, to hold providers against.

    Where all pass, where none does, and at a threshold in the widest gap between the similarities in the middle: far
    enough from each (1e-6, 7 times the largest error of a float32 cosine) that rounding cannot change a decision.

    Args:
        plan: whose weights are merged; they are left as they were.
        prob: of the draws.
    """

    @torch.no_grad()
    def __init__(self, plan: inmerge_fast.MergePlan, prob: float = 0.3) -> None:
        self.plan, self._prob = plan, prob
        self._old = [weight.detach().clone() for weight in plan.weights()]
        self._on_host = [weight.cpu() for weight in self._old]
        self._draws = [
            inmerge_fast.draw(SEED, 0, layer.layer_id, layer.layout.filters, prob)
            for layer in plan.layers
        ]  # fmt: skip
        similarities = torch.cat([found.similarity for found in self._references(REGIMES["all pass"])])
        between = threshold_in_gap(similarities[~similarities.isnan()].numpy())
        self._expected = {threshold: self._references(threshold) for threshold in (*REGIMES.values(), between)}

    def _references(self, threshold: float) -> list[inmerge_fast.ReferenceResult]:
        return [
            inmerge_fast.reference_merge(weight, *draw, alpha=Settings.alpha, threshold=threshold)
            for weight, draw in zip(self._on_host, self._draws, strict=True)
        ]

    @torch.no_grad()
    def check_restored(self, provider: Provider) -> None:
        """Raise unless a provider of forward-only merging merges as the reference where all pass, and then restores.

        Raises:
            AssertionError: a merged weight differs by more than :meth:`check` allows, or a restored one in any bit.
        """
        weights, what, threshold = self.plan.weights(), f"{provider.name} {provider.form}".strip(), REGIMES["all pass"]
        try:
            merge, restore = parts_of(provider.prepare(self.plan, Settings(threshold, self._prob), self._draws))
            merge(0)
            self._compare_all(what, threshold, exact=provider.exact)
            restore(0)
            for layer, weight, before in zip(self.plan.layers, weights, self._old, strict=True):
                assert torch.equal(weight, before), f"{what}, layer {layer.name}: not restored"
        finally:
            self._put_back()

    @torch.no_grad()
    def check(self, provider: Provider) -> None:
        """Raise unless the provider does with recorded draws what :func:`inmerge_fast.reference_merge` does.

        Unmerged filters must keep their bits. Merged ones may differ from the reference by the rounding of a blend
        computed in another order (2 units of float32 at the filters' largest element), and by one unit of the weight's
        dtype where that tips its rounding; those of an ``exact`` provider may not.

        Raises:
            AssertionError: it differs.
        """
        what = f"{provider.name} {provider.form}".strip()
        for threshold in self._expected:
            try:
                provider.prepare(self.plan, Settings(threshold, self._prob), self._draws)(0)
                self._compare_all(what, threshold, exact=provider.exact)
            finally:
                self._put_back()

    def _compare_all(self, what: str, threshold: float, *, exact: bool) -> None:
        for layer, weight, before, draw, reference in zip(
            self.plan.layers, self.plan.weights(), self._on_host, self._draws, self._expected[threshold], strict=True
        ):
            _compare(
                f"{what}, layer {layer.name}, threshold {threshold:g}",
                weight.detach().cpu(), before, draw[1], reference, exact=exact,
            )  # fmt: skip

    def _put_back(self) -> None:
        for weight, before in zip(self.plan.weights(), self._old, strict=True):
            weight.copy_(before)


def threshold_in_gap(similarities: npt.NDArray[np.floating]) -> float:
    """The middle of the widest gap between the similarities in the middle half.

    Raises:
        ValueError: there is no gap that rounding could not bridge.
    """
    ordered = np.sort(similarities.astype(np.float64))
    middle = ordered[len(ordered) // 4 : -(len(ordered) // 4) or None]
    gaps = np.diff(middle)
    if gaps.size == 0 or gaps.max() <= 2e-6:
        raise ValueError(f"no threshold tells the {len(ordered)} similarities of this draw apart")
    return float(middle[gaps.argmax()] + gaps.max() / 2)


def _compare(
    what: str,
    new: torch.Tensor,
    old: torch.Tensor,
    partner: npt.NDArray[np.int64],
    reference: inmerge_fast.ReferenceResult,
    *,
    exact: bool,
) -> None:
    """Raise if ``new`` is not the reference's result of ``old``."""
    expected, merged = reference.weight, reference.merged
    if exact or not merged.any():
        same = torch.equal(new, expected)
        assert same, f"{what}: {int((new != expected).flatten(1).any(1).sum())} filters differ from the reference"
        return
    assert torch.equal(new[~merged], old[~merged]), f"{what}: changed a filter that must not change"
    largest = old.flatten(1).float().abs().amax(1)
    scale = torch.maximum(largest, largest[torch.from_numpy(partner)])[merged][:, None]
    wanted = expected[merged].flatten(1).float()
    unit = torch.finfo(torch.float32).eps
    allowed = 2 * unit * scale + torch.finfo(new.dtype).eps * wanted.abs()
    wrong = ((new[merged].flatten(1).float() - wanted).abs() > allowed).any(1)
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {len(wrong)} merged filters are wrong"
