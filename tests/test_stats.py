"""Statistics of a call, and the warning when merging has no effect."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import inmerge_fast
from inmerge_fast import NoEffectWarning, draw, reference_merge
from inmerge_fast.effect import NO_EFFECT_CALLS


def test_numbers_are_those_of_the_reference(device):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24)).to(device)
    weights = [conv.weight.detach().cpu().clone() for conv in model[:2]]
    stats = inmerge_fast.merge_(model, skip_first=0, prob=0.5, threshold=0.05, seed=3, step=4)
    for index, (layer, weight) in enumerate(zip(stats.layers, weights, strict=True)):
        coin, partner = draw(3, 4, index, len(weight), 0.5)
        expected = reference_merge(weight, coin, partner, threshold=0.05, compute_dtype=torch.float64)
        seen = expected.similarity[torch.from_numpy(coin)]
        assert (layer.name, layer.filters) == (str(index), len(weight))
        assert (layer.sampled, layer.passed, layer.merged) == (coin.sum(), expected.merged.sum(), expected.merged.sum())
        assert layer.mean_similarity == pytest.approx(seen.mean().item(), abs=1e-7)
        assert layer.max_similarity == pytest.approx(seen.max().item(), abs=1e-6)
    assert stats.sampled == sum(layer.sampled for layer in stats.layers)
    assert stats.merged == stats.passed == sum(layer.merged for layer in stats.layers) > 0
    assert stats.max_similarity == max(layer.max_similarity for layer in stats.layers)
    mean = sum(layer.mean_similarity * layer.sampled for layer in stats.layers) / stats.sampled
    assert stats.mean_similarity == pytest.approx(mean)
    assert (stats.seed, stats.step, stats.dry_run) == (3, 4, False)


def test_every_call_keeps_its_own_numbers(device):
    conv = nn.Conv2d(3, 16, 3).to(device)
    calls = [inmerge_fast.merge_(conv, threshold=0.9, seed=1, step=step) for step in range(8)]  # the slots of a plan
    counts = [int(draw(1, step, 0, 16, 0.3)[0].sum()) for step in range(8)]
    assert [stats.sampled for stats in calls] == counts
    assert len(set(counts)) > 3


def test_a_call_without_samples_has_no_similarity(device):
    stats = inmerge_fast.merge_(torch.randn(4, 9, device=device), prob=0.0)
    assert (stats.sampled, stats.merged) == (0, 0)
    assert math.isnan(stats.mean_similarity)
    assert math.isnan(stats.max_similarity)


def test_printing():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    stats = inmerge_fast.merge_(model, skip_first=1, prob=1.0, threshold=0.5, seed=0, step=0, dry_run=True)
    assert repr(stats) == f"MergeStats(not read yet, seed=0, step=0, path={stats.path!r})"
    assert str(stats).splitlines() == [
        "layer  filters  sampled  passed  merged  mean sim.  max sim.",
        "1            4        4       4       0     1.0000    1.0000",
        "total        4        4       4       0     1.0000    1.0000",
        "skipped 1, among the first 1 (skip_first=1): 0",
        "dry run: nothing was written",
    ]
    assert repr(stats) == f"MergeStats(sampled=4, merged=0, seed=0, step=0, path={stats.path!r})"


def opposite_filters(device):
    """Two filters whose similarity is -0.6: nothing merges at a positive threshold."""
    return torch.tensor([[1.0, 0.0], [-0.6, 0.8]], device=device)


def test_no_effect_warns_once_with_a_threshold_that_would_act(device):
    weight = opposite_filters(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3 * NO_EFFECT_CALLS):
            inmerge_fast.merge_(weight, prob=1.0, threshold=0.3)
            if device.type == "cuda":
                torch.cuda.synchronize()  # the warning waits for an asynchronous copy, the loop does not
    assert [w.category for w in caught] == [NoEffectWarning]
    assert caught[0].filename == __file__, "the warning points at the caller"
    message = str(caught[0].message)
    assert message.startswith(
        "100 calls of merge_ sampled 200 filter pairs and merged none: the largest similarity seen was"
    )
    assert "was -0.6000. A threshold of -0.66" in message
    acting = float(message.split("A threshold of ")[1].split()[0])
    assert inmerge_fast.merge_(weight, prob=1.0, threshold=acting, dry_run=True).passed == 2


def test_the_warning_comes_at_the_hundredth_call_that_sampled():
    weight = opposite_filters("cpu")
    for _ in range(NO_EFFECT_CALLS - 1):
        inmerge_fast.merge_(weight, prob=1.0)
        inmerge_fast.merge_(weight, prob=0.0)  # sampled nothing: does not count
        inmerge_fast.merge_(weight, prob=1.0, dry_run=True)  # was not meant to merge: does not count
    with pytest.warns(NoEffectWarning):
        inmerge_fast.merge_(weight, prob=1.0)


def test_no_warning_where_something_merged(device):
    weight = opposite_filters(device)
    inmerge_fast.merge_(weight, prob=1.0, threshold=-1.0, alpha=1.0)
    for _ in range(2 * NO_EFFECT_CALLS):
        inmerge_fast.merge_(weight, prob=1.0, threshold=0.3)


def test_no_finite_filters_is_said():
    weight = torch.full((2, 2), math.nan)
    for _ in range(NO_EFFECT_CALLS - 1):
        inmerge_fast.merge_(weight, prob=1.0)
    with pytest.warns(NoEffectWarning, match="no sampled pair had finite filters; check the model for NaN and Inf"):
        inmerge_fast.merge_(weight, prob=1.0)


def test_statistics_are_deterministic(device):
    weight = torch.randn(200, 64, device=device)
    calls = [inmerge_fast.merge_(weight, prob=1.0, seed=1, step=0, dry_run=True) for _ in range(5)]
    assert len({stats.layers for stats in calls}) == 1
    assert np.isfinite(calls[0].mean_similarity)


def test_pairs_with_a_non_finite_filter_have_no_similarity(device):
    """2e19 is finite and so is its cosine, but it never merges, and its similarity would mislead."""
    weight = torch.rand(6, 10) + 0.5
    weight[2, 3] = 2e19
    coin, partner = draw(6, 0, 0, 6, 1.0)
    seen = reference_merge(weight, coin, partner, compute_dtype=torch.float64).similarity
    seen = seen[~seen.isnan()]
    assert 0 < len(seen) < 6
    stats = inmerge_fast.merge_(weight.to(device), prob=1.0, seed=6, step=0, dry_run=True)
    assert stats.sampled == 6
    for numbers in (stats, stats.layers[0]):
        assert numbers.mean_similarity == pytest.approx(seen.mean().item(), abs=1e-6)
        assert numbers.max_similarity == pytest.approx(seen.max().item(), abs=1e-6)


def test_a_layer_without_similarities_does_not_hide_the_others(device):
    pair = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    for weights in ([torch.full((2, 2), math.nan), pair], [pair, torch.full((2, 2), math.nan)]):
        stats = inmerge_fast.merge_([weight.to(device) for weight in weights], prob=1.0, dry_run=True)
        assert sorted(map(math.isnan, (layer.max_similarity for layer in stats.layers))) == [False, True]
        assert stats.mean_similarity == pytest.approx(0.6)
        assert stats.max_similarity == pytest.approx(0.6)


def no_effect_message(weight, similarity_at):
    """The warning's text after calls that see the given similarity between the two filters of ``weight``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in range(NO_EFFECT_CALLS + 1):
            cosine = similarity_at(call)
            weight.copy_(torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine * cosine)]]))
            inmerge_fast.merge_(weight, prob=1.0, threshold=0.9)
            if weight.is_cuda:
                torch.cuda.synchronize()
    (warning,) = caught
    return str(warning.message)


def test_the_warning_names_the_largest_similarity_of_all_calls(device):
    for call_of_the_largest in (0, NO_EFFECT_CALLS // 2, NO_EFFECT_CALLS - 1):
        message = no_effect_message(
            torch.zeros(2, 2, device=device), lambda call, at=call_of_the_largest: 0.6 if call == at else -0.3
        )
        assert "was 0.6000. A threshold of 0.5" in message


def test_the_warning_never_proposes_an_invalid_threshold(device):
    message = no_effect_message(torch.zeros(2, 2, device=device), lambda call: -1.0)
    assert "was -1.0000. A threshold of -1.000 would" in message


def test_the_proposed_threshold_is_rounded_down_so_that_it_acts(device):
    message = no_effect_message(torch.zeros(2, 2, device=device), lambda call: 0.0009)
    assert "was 0.0009. A threshold of 0.000 would" in message


def test_calls_are_counted_inside_and_outside_inference_mode(device):
    weight = opposite_filters(device)
    with torch.inference_mode():
        inmerge_fast.merge_(weight, prob=1.0)
    inmerge_fast.merge_(weight, prob=1.0)
    with torch.inference_mode():
        inmerge_fast.merge_(weight, prob=1.0)


def test_numbers_are_fetched_once(device):
    stats = inmerge_fast.merge_(torch.randn(4, 9, device=device), prob=1.0, dry_run=True)
    assert stats.layers is stats.layers
