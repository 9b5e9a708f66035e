"""What every merge is held against: the float64 reference where it is decisive, the float32 reference for values.

A similarity computed in float32 is off by up to 4e-7 (float64 comparison over nine summation orders). A decision may
therefore differ from the float64 reference only where ``|similarity - threshold| <= BAND``; there the filter must be
one of the two possible outcomes, and elsewhere all must agree. :data:`tally` counts how often the band was used.
"""

from dataclasses import dataclass

import numpy as np
import torch

from inmerge_fast import draw, reference_merge
from inmerge_fast.draw import priorities, priority_keys
from inmerge_fast.reference import filter_of

BAND = 1e-6
# Matrix products are less exact, for up to 4,608 elements: of float32, by a CPU or in tf32x3 (kernels/match.py), and of
# 16 bits by tensor cores.
MATCH_BAND = 5e-6
MATCH_BAND_16_BITS = 3e-5


@dataclass
class Tally:
    pairs: int = 0
    in_band: int = 0
    passed: int = 0


tally = Tally()


def bits(tensor):
    """The tensor's bit patterns, so that NaN equals itself and -0.0 does not equal 0.0."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same_bits(actual, expected, message=""):
    assert torch.equal(bits(actual), bits(expected)), message


def assert_is_reference(
    before, after, *, seed, step, layer, prob, alpha, threshold, groups=1, transposed=False, dry_run=False
):
    """Check one weight after ``merge_`` against the reference; returns (sampled, passed if decisive else None)."""
    before, after = before.detach().cpu(), after.detach().cpu()
    filters = before.shape[1] * groups if transposed else before.shape[0]
    coin, partner = draw(seed, step, layer, filters, prob, groups=groups)
    layout = {"groups": groups, "transposed": transposed}
    exact = reference_merge(
        before, coin, partner, alpha=alpha, threshold=threshold, compute_dtype=torch.float64, **layout
    )
    # The float32 blend of every sampled pair; float64 weights are blended in float64.
    compute_dtype = torch.float64 if before.dtype == torch.float64 else torch.float32
    blended = reference_merge(
        before, coin, partner, alpha=alpha, threshold=-1.0, compute_dtype=compute_dtype, **layout
    ).weight
    decisive = True
    for i in range(filters):
        old = bits(filter_of(before, i, **layout))
        new = bits(filter_of(after, i, **layout))
        if not coin[i]:
            assert torch.equal(new, old), f"filter {i} was not sampled but changed"
            continue
        similarity = exact.similarity[i].item()
        # Threshold -1 merges without comparing; the similarity of a zero filter is exactly 0 in any order.
        exact_anyway = threshold == -1 or similarity == threshold == 0.0
        in_band = not exact_anyway and abs(similarity - threshold) <= BAND
        tally.pairs += 1
        tally.in_band += in_band
        tally.passed += bool(exact.merged[i])
        decisive = decisive and not in_band
        merged = bits(filter_of(blended, i, **layout))
        if dry_run:
            assert torch.equal(new, old), f"filter {i} changed in a dry run"
        elif in_band:
            assert torch.equal(new, old) or torch.equal(new, merged), f"filter {i} is neither old nor merged"
        else:
            expected = merged if exact.merged[i] else old
            assert torch.equal(new, expected), f"filter {i}: similarity {similarity}, threshold {threshold}"
    return int(coin.sum()), int(exact.merged.sum()) if decisive else None


def untouched(model):
    """A check, to call later, that nothing in the model's state has changed since."""
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def check():
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    return check


class PairOracle:
    """All pairs of one weight by brute force in float64: which partners a rule may give a filter."""

    def __init__(self, weight, *, groups=1, transposed=False):
        filters = weight.shape[1] * groups if transposed else weight.shape[0]
        exact = weight.detach().cpu().double()
        rows = torch.stack(
            [filter_of(exact, k, groups=groups, transposed=transposed).flatten() for k in range(filters)]
        )
        squares = (rows * rows).sum(1)
        units = rows / squares.sqrt().clamp(min=1e-8)[:, None]
        self.size = filters // groups
        self.finite = squares.float().isfinite().numpy()
        self.similarity = (units @ units.T).numpy()

    def choices(self, i, rule, *, seed, step, layer, threshold, band):
        """``{partner: similarity}`` of filter ``i``, -1 for none; several where ``band`` leaves it open."""
        first = i - i % self.size
        others = np.array([j for j in range(first, first + self.size) if j != i and self.finite[j]], int)
        if not self.finite[i] or not others.size:
            return {-1: None}
        similarity = self.similarity[i, others]
        if rule == "nearest":
            taken = others[similarity >= similarity.max() - band]
            return {int(j): float(self.similarity[i, j]) for j in taken}
        rank = priorities(priority_keys(seed, step, layer, i), others) * 2**31 + (2**31 - 1 - others)
        sure, maybe = np.ones(others.size, bool), np.zeros(others.size, bool)
        if threshold != -1:
            sure, maybe = similarity > threshold + band, np.abs(similarity - threshold) <= band
        best = rank[sure].max(initial=-1)
        taken = (rank > best) & maybe | (rank == best)
        choices = {int(j): float(self.similarity[i, j]) for j in others[taken]}
        return choices if sure.any() else choices | {-1: None}


def assert_is_matched(
    before, after, rule, *, seed, step, layer, prob, alpha, threshold, groups=1, transposed=False, band=None
):
    """Check one weight after ``merge_(partner=rule)`` row by row; returns how many rows were (sampled, ambiguous)."""
    before, after = before.detach().cpu(), after.detach().cpu()
    filters = before.shape[1] * groups if transposed else before.shape[0]
    layout = {"groups": groups, "transposed": transposed}
    coin, _ = draw(seed, step, layer, filters, prob, groups=groups)
    compute = before.double() if before.dtype == torch.float64 else before.float()
    keep, take = (torch.tensor(share, dtype=compute.dtype) for share in (alpha, 1.0 - alpha))
    ambiguous, pairs = 0, PairOracle(before, **layout)
    if band is None:
        band = MATCH_BAND_16_BITS if before.element_size() == 2 else MATCH_BAND
    for i in range(filters):
        old, new = (filter_of(weight, i, **layout) for weight in (before, after))
        if not coin[i]:
            assert_same_bits(new, old, f"filter {i} was not sampled but changed")
            continue
        choices = pairs.choices(i, rule, seed=seed, step=step, layer=layer, threshold=threshold, band=band)
        outcomes = []
        for j, similarity in choices.items():
            # The merge measures the pair again; the similarity of a zero filter is exactly 0 in any order.
            exact = j == -1 or threshold == -1 or similarity == threshold == 0.0
            in_band = not exact and abs(similarity - threshold) <= BAND
            passes = j != -1 and (threshold == -1 or similarity > threshold)
            if not passes or in_band:
                outcomes.append(old)
            if passes or in_band:
                blend = keep * filter_of(compute, i, **layout) + take * filter_of(compute, j, **layout)
                outcomes.append(blend.to(before.dtype))
        ambiguous += len(outcomes) > 1
        assert any(torch.equal(bits(new), bits(outcome)) for outcome in outcomes), f"filter {i}: {choices}"
    return int(coin.sum()), ambiguous
