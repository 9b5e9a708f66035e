"""What every merge is held against: the float64 reference where it is decisive, the float32 reference for values.

A similarity computed in float32 is off by up to 4e-7 (float64 comparison over nine summation orders). A decision may
therefore differ from the float64 reference only where ``|similarity - threshold| <= BAND``; there the filter must be
one of the two possible outcomes, and elsewhere all must agree. :data:`tally` counts how often the band was used.
"""

from dataclasses import dataclass

import torch

from inmerge_fast import draw, reference_merge
from inmerge_fast.reference import filter_of

BAND = 1e-6


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
