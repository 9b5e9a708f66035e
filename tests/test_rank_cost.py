"""What a merge costs: effective rank before and after, against layers that were merged for it."""

import math

import pytest
import torch
from torch import nn

import inmerge_fast
from inmerge_fast import MergePlan, rank_cost
from inmerge_fast.rank_cost import NEVER, LayerLedger, RankCost, Snapshot

KINDS = {
    "more elements than filters": lambda: nn.Conv2d(16, 24, 3),
    "fewer elements than filters": lambda: nn.Conv2d(16, 24, 1),
    "groups": lambda: nn.Conv2d(24, 24, 3, groups=2),
    "groups of few elements": lambda: nn.Conv2d(16, 32, 1, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(12, 24, 3),
    "bfloat16": lambda: nn.Conv2d(16, 24, 3, dtype=torch.bfloat16),
}


def cost_of(module, key=0):
    plan = MergePlan(module)
    return RankCost(Snapshot(plan.weights()[0], plan.layers[0].layout), key)


def rank_of(module):
    return inmerge_fast.similarity(module).layers[0].effective_rank


def rows(module):
    """The filters, as a matrix that shares their memory."""
    weight = module.weight.detach()
    return weight.transpose(0, 1).flatten(1) if isinstance(module, nn.ConvTranspose2d) else weight.flatten(1)


def make_alike(module, i, j, similarity):
    """Give two filters a cosine, by moving the second."""
    filters = rows(module).double()
    x = nn.functional.normalize(filters[i], dim=0)
    y = nn.functional.normalize(filters[j] - (filters[j] @ x) * x, dim=0)
    merged = (similarity * x + math.sqrt(1 - similarity**2) * y) * filters[j].norm()
    with torch.no_grad():
        weight = module.weight.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else module.weight
        weight[j] = merged.view_as(weight[j])


@pytest.mark.parametrize("kind", KINDS)
def test_rank_is_that_of_the_layer(kind):
    module = KINDS[kind]()
    assert cost_of(module).rank == pytest.approx(rank_of(module), rel=1e-6)


@pytest.mark.parametrize("partner", ["random", "similar", "nearest"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_price_of_one_pair_is_half_of_what_merging_it_costs(kind, partner):
    """Both of its filters move."""
    module = KINDS[kind]()
    last = module.out_channels - 1
    make_alike(module, last - 2, last, 0.97)  # in the last group, if there are groups
    cost, before, threshold = cost_of(module), rank_of(module), 0.96
    kept = module.weight.detach().clone()
    price = cost.price(threshold, partner, 0.7)
    assert torch.equal(kept, module.weight), "nothing is written"
    stats = inmerge_fast.merge_(module, alpha=0.7, prob=1.0, threshold=threshold, partner="nearest", seed=0, step=0)
    assert stats.merged == 2
    bits = 1e-2 if kind == "bfloat16" else 1e-4  # the merged filters are rounded
    assert price == pytest.approx(math.log(before / rank_of(module)) / 2, rel=bits)
    assert price > 0


def test_the_price_is_the_mean_of_all_that_can_merge():
    """Every filter with a partner above the threshold merges once, whichever of them that is."""
    module = nn.Conv2d(32, 64, 3)
    with torch.no_grad():
        module.weight += 0.8 * module.weight[:1].clone()
    before = rank_of(module)
    prices = [cost_of(module, key).price(0.2, "random", 0.8) for key in range(8)]
    losses = []
    for step in range(8):
        twin = nn.Conv2d(32, 64, 3)
        twin.load_state_dict(module.state_dict())
        merged = inmerge_fast.merge_(twin, prob=1.0, threshold=0.2, partner="similar", seed=1, step=step).merged
        assert merged == 64
        losses.append(math.log(before / rank_of(twin)) / merged)
    assert sum(prices) / 8 == pytest.approx(sum(losses) / 8, rel=0.05)


@pytest.mark.parametrize("partner", ["random", "nearest", "similar"])
def test_a_threshold_for_a_share_is_the_lowest_that_keeps_it(partner):
    cost = cost_of(nn.Conv2d(16, 40, 3, groups=2))
    assert cost.pairs == 2 * 20 * 19
    for share in (0.1, 0.25, 0.5):
        threshold = cost.threshold_for(share, partner)
        below = math.nextafter(threshold, -1)
        assert cost.share_above(threshold, partner) <= share < cost.share_above(below, partner)
    assert cost.threshold_for(0.0, partner) == NEVER
    assert cost.threshold_for(1.0, partner) == -1.0
    assert cost.share_above(cost.threshold_for(cost.least_share(partner), partner), partner) > 0


@pytest.mark.parametrize("size", [(24, 40), (40, 8)])
def test_filters_that_are_not_finite_have_no_part_in_it(size):
    weight = torch.randn(*size)
    alone = cost_of(weight[3:].clone())
    weight[:3] = torch.tensor([math.nan, math.inf, 2e19])[:, None]
    cost = cost_of(weight)
    assert cost.rank == pytest.approx(alone.rank)
    assert cost.pairs == alone.pairs
    assert cost.threshold_for(0.1, "random") == pytest.approx(alone.threshold_for(0.1, "random"))
    nothing = cost_of(torch.full(size, math.nan))
    assert math.isnan(nothing.rank)
    assert (nothing.pairs, nothing.price(-1.0, "random", 0.8), nothing.share_above(-1.0, "nearest")) == (0, None, 0.0)
    assert nothing.threshold_for(1.0, "random") == NEVER


def test_a_price_is_none_where_nothing_can_merge_and_nothing_where_merging_does_nothing():
    cost = cost_of(torch.randn(20, 30))
    assert cost.price(1.0, "random", 0.8) is None
    assert cost.price(NEVER, "nearest", 0.8) is None
    assert cost.price(-1.0, "random", 1.0) == pytest.approx(0.0, abs=1e-12)


def test_of_large_layers_a_part_stands_for_the_rest(monkeypatch):
    torch.manual_seed(2)
    weight = torch.randn(512, 600) + 0.5 * torch.randn(1, 600)
    whole = cost_of(weight)
    share, price = whole.share_above(0.25, "random"), whole.price(0.25, "random", 0.8)
    for limit, kept in (("MOST_FILTERS", 128), ("MOST_VALUES", 128)):
        with monkeypatch.context() as patch:
            patch.setattr(rank_cost, limit, kept)
            part = cost_of(weight)
            assert part.pairs == kept * (kept - 1)
            assert part.share_above(0.25, "random") == pytest.approx(share, rel=0.1)
            assert price < part.price(0.25, "random", 0.8) < 1.25 * price  # it errs on the dear side


def test_a_ledger_charges_merges_with_the_mean_price():
    module = nn.Conv2d(16, 24, 3)
    make_alike(module, 3, 9, 0.9)
    cost = cost_of(module)
    price = cost.price(0.8, "random", 0.8)
    ledger = LayerLedger(24, 24.0, 24.0, 0, 0)
    assert [ledger.is_due(count) for count in (0, 2, 3)] == [False, False, True]
    assert LayerLedger(2, 2.0, 2.0, 0, 0).is_due(1)
    ledger.charge(cost, 10, 0.8, "random", 0.8)  # the first price is for all before it, too
    assert ledger.spent == pytest.approx(10 * price)
    assert (ledger.price, ledger.merged, ledger.rank) == (price, 10, cost.rank)
    ledger.price = 3 * price
    ledger.charge(cost, 14, 0.8, "random", 0.8)
    assert ledger.spent == pytest.approx(10 * price + 4 * 2 * price)
    assert ledger.lost == pytest.approx(1 - math.exp(-ledger.spent))
    ledger.charge(cost, 14, 1.0, "random", 0.8)
    assert ledger.price is None
    spent = ledger.spent
    ledger.charge(cost, 15, 1.0, "random", 0.8)  # nothing is above the threshold, then or now
    assert ledger.spent == pytest.approx(spent + cost.price(cost.threshold_for(1 / 8, "random"), "random", 0.8))


@pytest.mark.parametrize("elements", [9, 1])
def test_filters_that_cancel_each_other_out_cost_everything(elements):
    """Not NaN, which no guard would find above its limit."""
    weight = torch.ones(2, elements, 1, 1)
    weight[1] = -1.0
    layer = MergePlan([weight]).layers[0]
    cost = RankCost(Snapshot(weight, layer.layout), 0)
    assert cost.price(-1.0, "nearest", 0.5) == math.inf
    ledger = LayerLedger(2, 1.0, 1.0, 0, 0)
    ledger.charge(cost, 2, -1.0, "nearest", 0.5)
    assert ledger.lost == 1.0
