"""What ``merge_plan_`` can do beyond ``merge_``: a threshold for each layer."""

import pytest
import torch
from oracle import assert_is_reference, bits

from inmerge_fast import MergePlan
from inmerge_fast.merge import merge_plan_
from inmerge_fast.paths.path import Call

ALPHA, PROB, SEED = 0.75, 0.8, 3
NEVER = 2.0


def some_weights(device):
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 24, generator=generator)
    weights = [common + 1.5 * torch.randn(14, 24, generator=generator) for _ in range(4)]
    weights[3] = weights[3].bfloat16()
    return [weight.to(device) for weight in weights]


def merge(plan, weights, step, thresholds, **options):
    return merge_plan_(plan, weights, Call(SEED, step, PROB, ALPHA, thresholds, **options))


@pytest.mark.parametrize("partner", ["random", "similar"])
def test_every_layer_has_its_own_threshold(device, partner):
    weights = some_weights(device)
    plan = MergePlan(weights)
    for step, thresholds in enumerate([(-1, 0.3, NEVER, 0.25), (-1, 0.3, NEVER, 0.25), (0.2, NEVER, -1, -1)]):
        alone = [weight.clone() for weight in weights]
        before = [weight.clone() for weight in weights]
        stats = merge(plan, weights, step, thresholds, partner=partner)
        for index, threshold in enumerate(thresholds):
            merged = stats.layers[index].merged
            if threshold == NEVER:
                assert torch.equal(bits(weights[index]), bits(before[index]))
                assert merged == 0
                assert stats.layers[index].sampled > 0
                continue
            assert merged > 0
            if partner == "random":
                assert_is_reference(
                    before[index], weights[index], layer=index, seed=SEED, step=step, alpha=ALPHA, prob=PROB,
                    threshold=threshold,
                )  # fmt: skip
            one_plan = MergePlan(alone)
            merge(one_plan, alone, step, float(threshold), partner=partner)
            assert torch.equal(bits(alone[index]), bits(weights[index])), "as with this threshold for all"
            for weight, old in zip(alone, before, strict=True):
                weight.copy_(old)


def test_a_threshold_for_all_overrides_those_of_the_layers(device):
    weights, twins = some_weights(device), some_weights(device)
    plan, twin = MergePlan(weights), MergePlan(twins)
    merge(plan, weights, 0, [NEVER] * 4)
    assert merge(plan, weights, 1, 0.3).merged == merge(twin, twins, 1, 0.3).merged > 0
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(weights, twins, strict=True))


def test_drawing_ahead_changes_nothing(device):
    """Evenly spaced steps are drawn ahead, the same one again and backwards, too: the results are those of one call."""
    weights, twins = some_weights(device), some_weights(device)
    plan = MergePlan(weights)
    kept = []
    for step in (0, 1, 2, 3, 4, 5, 6, 7, 20, 22, 24, 26, 5, 4, 3, 2, 1, 1, 1, 1, 2, 4):
        dry_run = step == 5
        stats = merge(plan, weights, step, 0.1, dry_run=dry_run)
        kept.append((stats, merge(MergePlan(twins), twins, step, 0.1, dry_run=dry_run)))
    for stats, expected in kept[-8:]:
        assert stats.layers == expected.layers
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(weights, twins, strict=True))


def test_only_thresholds_that_differ_are_copied_to_the_device(device):
    weights = some_weights(device)
    plan = MergePlan(weights)
    if plan.path != "triton":
        pytest.skip("the eager path has no layer table")
    launcher = plan.paths.triton.launcher(weights)
    before = launcher.layer_table.clone()
    for step, threshold in enumerate((0.3, 0.2, -1, NEVER)):  # as a ramp gives them
        merge(plan, weights, step, [threshold] * 4)
    assert torch.equal(launcher.layer_table, before)
    merge(plan, weights, 9, [0.3, 0.3, 0.3, 0.2])
    assert not torch.equal(launcher.layer_table, before)
