"""The match kernels on a GPU, at real sizes: which partners, how exact, and the same every time."""

import numpy as np
import pytest
import torch
from oracle import MATCH_BAND, MATCH_BAND_16_BITS, assert_is_matched
from test_match import adversarial
from torch import nn

import inmerge_fast
from benchmarks.nets import resnet50, vgg19
from inmerge_fast import MergePlan
from inmerge_fast.draw import priorities, priority_keys
from inmerge_fast.paths.pairs import filters_of

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

SEED, STEP = 3, 4
BANDS = {torch.float32: MATCH_BAND, torch.bfloat16: MATCH_BAND_16_BITS, torch.float16: MATCH_BAND_16_BITS}


def plan_of(net, dtype=torch.float32):
    """A network whose filters have something in common, so that similarities reach from 0 to 1."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = net()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                weight = module.weight
                weight.add_(
                    weight.std() * torch.rand(len(weight), 1, 1, 1, device="cuda") * torch.randn_like(weight[:1])
                )
    model = model.to(dtype)
    return MergePlan(model, skip_first=10), model  # the plan does not keep it alive


def similarities(plan, index):
    filters = filters_of(plan.weights()[index], plan.layers[index].layout, exact=True)
    (units,) = filters.units()
    return units @ units.T


def keyed_similarity(best):
    """The similarity in the upper half of a packed pair."""
    key = (best >> 32).to(torch.int32)
    return torch.where(key < 0, key ^ 0x7FFFFFFF, key).view(torch.float32)


@pytest.mark.parametrize("net", [vgg19, resnet50])
@pytest.mark.parametrize("dtype", list(BANDS))
def test_nearest_partners_and_their_similarities_are_those_of_float64(net, dtype):
    plan, _model = plan_of(net, dtype)
    launcher = plan.paths.triton.launcher(plan.weights())
    launcher.find_partners(SEED, STEP, prob=0.3, partner="nearest", threshold=0.0)
    sampled = launcher.slot_of(launcher.calls + 1).partner[: launcher.rows] >= 0
    found, measured = launcher.found_partners(), keyed_similarity(launcher.matcher.best)
    largest_error = 0.0
    for index, (start, end) in enumerate(zip(plan.rows.start[:-1].tolist(), plan.rows.start[1:].tolist(), strict=True)):
        exact = similarities(plan, index)
        rows = sampled[start:end].nonzero()[:, 0]
        taken = found[start:end][rows] - start
        own = exact[rows, taken]
        best = exact.fill_diagonal_(-2)[rows].amax(1)
        assert ((taken >= 0) & (taken < end - start) & (taken != rows)).all()
        assert (best - own).max().item() <= BANDS[dtype], plan.names[index]
        largest_error = max(largest_error, (measured[start:end][rows].double() - own).abs().max().item())
    print(f"{net.__name__} {dtype}: largest error of a similarity {largest_error:.1e}")
    assert largest_error <= BANDS[dtype]


@pytest.mark.parametrize("net", [vgg19, resnet50])
def test_similar_partners_are_the_ones_of_highest_priority(net):
    (plan, _model), threshold = plan_of(net), 0.2
    launcher = plan.paths.triton.launcher(plan.weights())
    launcher.run(SEED, STEP, prob=0.3, alpha=0.8, threshold=threshold, dry_run=True, partner="similar")
    partners = launcher.slot_of(launcher.calls).partner[: launcher.rows].cpu().numpy()
    coins, _ = plan.draw(SEED, STEP, 0.3)
    with_partner = 0
    for index, (start, end) in enumerate(zip(plan.rows.start[:-1].tolist(), plan.rows.start[1:].tolist(), strict=True)):
        exact = similarities(plan, index).fill_diagonal_(-2).cpu().numpy()
        rows = coins[start:end].nonzero()[0]
        key = priority_keys(SEED, STEP, plan.layers[index].layer_id, rows)[:, None]
        rank = priorities(key, np.arange(end - start)) * 2**31 + (2**31 - 1 - np.arange(end - start))
        sure = np.where(exact[rows] > threshold + MATCH_BAND, rank, -1)
        maybe = np.where(exact[rows] > threshold - MATCH_BAND, rank, -1)
        taken = np.where(partners[start:end][rows] >= 0, partners[start:end][rows] - start, -1)
        own = np.where(taken >= 0, maybe[np.arange(len(rows)), np.maximum(taken, 0)], -1)
        assert (own >= sure.max(1)).all()  # nobody who surely qualifies ranks higher
        assert ((own >= 0) | (taken < 0)).all()  # and who was taken may qualify
        with_partner += (taken >= 0).sum()
    assert with_partner > 100


@pytest.mark.parametrize("rule", ["nearest", "similar"])
def test_every_launch_finds_the_same(rule):
    plan, _model = plan_of(resnet50)
    launcher = plan.paths.triton.launcher(plan.weights())
    first = None
    for _ in range(20):
        launcher.find_partners(SEED, STEP, prob=1.0, partner=rule, threshold=0.1)
        best = launcher.matcher.best.clone()
        first = best if first is None else first
        assert torch.equal(best, first)


@pytest.mark.parametrize("rule", ["nearest", "similar"])
@pytest.mark.parametrize("filters", [2, 3, 63, 64, 65, 257, 2048])
def test_adversarial_filters_of_any_number(rule, filters):
    before = adversarial(filters, 65, seed=filters)
    weight = before.cuda()
    call = {"seed": 1, "step": 2, "prob": 0.5, "alpha": 0.75, "threshold": 0.1}
    inmerge_fast.merge_(weight, partner=rule, **call)
    assert_is_matched(before, weight, rule, layer=0, **call)


def test_partner_rules_can_be_captured_and_other_streams_wait():
    weight = torch.randn(128, 64, device="cuda") + torch.randn(1, 64, device="cuda")
    twin = weight.clone()
    call = {"prob": 0.5, "threshold": 0.2, "partner": "nearest", "seed": 7, "step": 8}
    plan = MergePlan(weight)
    inmerge_fast.merge_(plan, dry_run=True, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inmerge_fast.merge_(plan, **call)
    with (
        pytest.raises(RuntimeError, match="which a CUDA graph cannot capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        inmerge_fast.merge_(plan, **call | {"partner": "similar"})
    graph.replay()
    inmerge_fast.merge_(twin, **call)
    assert torch.equal(weight, twin)
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        inmerge_fast.merge_(plan, **call | {"step": 9})
    inmerge_fast.merge_(twin, **call | {"step": 9})
    torch.cuda.synchronize()
    assert torch.equal(weight, twin)
