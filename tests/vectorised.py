"""What a merge must do, computed for whole layers at once on any device: the oracle for layers of real size on a GPU.

``reference_merge`` goes filter by filter, which takes minutes for the 25,000 filters of a ResNet-50. This is the same
definition on ``(N, D)`` matrices; ``test_vectorised.py`` holds it against the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from oracle import BAND

from inmerge_fast import draw

MIN_NORM = 1e-8


def rows_of(weight, *, groups=1, transposed=False):
    """The filters of a weight as an ``(N, D)`` matrix, elements in their logical order whatever the memory format."""
    weight = weight.detach()
    if not transposed:
        return weight.reshape(len(weight), -1)
    channels, per_group = weight.shape[:2]
    split = weight.reshape(groups, channels // groups, per_group, -1)
    return split.transpose(1, 2).reshape(groups * per_group, -1)


def layout_of(module):
    """``groups`` and ``transposed`` of a module or tensor."""
    return {"groups": getattr(module, "groups", 1), "transposed": getattr(module, "transposed", False)}


def integers(tensor):
    """Bit patterns, on the device, so that NaN equals itself and -0.0 does not equal 0.0."""
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@dataclass(frozen=True)
class Expected:
    """Of every filter: what it was, what it is if it merges, and whether it must, must not or may merge."""

    old: torch.Tensor
    blended: torch.Tensor
    similarity: torch.Tensor  # float64; NaN where the filter was not sampled or one of the pair is not finite
    coin: torch.Tensor
    passed: torch.Tensor
    in_band: torch.Tensor

    @property
    def new(self):
        """The filters after the merge, as the float64 decisions have it."""
        return torch.where(self.passed[:, None], self.blended, self.old)


@torch.no_grad()
def expect(weight, coin, partner, *, alpha, threshold, groups=1, transposed=False):
    """What merging ``weight`` with these draws must give; partners of filters that were not sampled do not matter."""
    old = rows_of(weight, groups=groups, transposed=transposed)
    coin = torch.as_tensor(coin, device=weight.device)
    partner = torch.as_tensor(partner, device=weight.device).long().clamp(min=0)
    keep = torch.tensor(alpha, dtype=torch.float32, device=weight.device)
    take = torch.tensor(1.0 - alpha, dtype=torch.float32, device=weight.device)
    x = old.float()
    blended = (keep * x + take * x[partner]).to(weight.dtype)
    is_finite = (x * x).sum(1).isfinite()
    similarity = similarities(x, partner)
    similarity[~(coin & is_finite & is_finite[partner])] = torch.nan
    if threshold == -1:
        passed, in_band = ~similarity.isnan(), torch.zeros_like(coin)
    else:
        # The similarity of a zero filter is exactly 0 in any order of summation.
        in_band = ((similarity - threshold).abs() <= BAND) & ~((similarity == 0) & (threshold == 0))
        passed = similarity > threshold
    return Expected(old, blended, similarity, coin, passed, in_band)


def similarities(x, partner):
    """Cosine similarity of every row with its partner, in float64."""
    x = x.double()
    norm = x.square().sum(1).sqrt().clamp(min=MIN_NORM)
    return (x * x[partner]).sum(1) / (norm * norm[partner])


def assert_merged(before, after, *, seed, step, layer, prob, alpha, threshold, groups=1, transposed=False):
    """Check one weight after ``merge_``, bit for bit and on its device; returns what was expected of it."""
    layout = {"groups": groups, "transposed": transposed}
    filters = before.shape[1] * groups if transposed else before.shape[0]
    coin, partner = draw(seed, step, layer, filters, prob, groups=groups)
    expected = expect(before, coin, partner, alpha=alpha, threshold=threshold, **layout)
    now = integers(rows_of(after, **layout))
    is_old = (now == integers(expected.old)).all(1)
    is_blended = (now == integers(expected.blended)).all(1)
    decided = torch.where(expected.passed, is_blended, is_old)
    wrong = ~torch.where(expected.in_band, is_old | is_blended, decided)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise AssertionError(
            f"layer {layer} of shape {tuple(before.shape)}: {int(wrong.sum())} of {filters} filters are wrong, the "
            f"first is {first}: sampled {bool(coin[first])}, partner {partner[first]}, similarity "
            f"{float(expected.similarity[first])}, threshold {threshold}, is what it was {bool(is_old[first])}, is the "
            f"blend {bool(is_blended[first])}"
        )
    return expected


def threshold_in_a_gap(similarity):
    """A threshold in the widest gap of the middle half of these similarities, so that no decision is a close call."""
    seen = similarity[~similarity.isnan()].sort().values.cpu().numpy()
    middle = seen[len(seen) // 4 : -(len(seen) // 4) or None]
    widest = int(np.diff(middle).argmax())
    assert middle[widest + 1] - middle[widest] > 4 * BAND, "no gap is wide enough"
    return float(middle[widest] + middle[widest + 1]) / 2
