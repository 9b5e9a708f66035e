"""The kernels of forward-only merging in Triton's interpreter: in every order, watched, and short of memory."""

import pytest
import torch
from oracle import assert_same_bits

from inmerge_fast import MergePlan, draw, reference_merge

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

from interleave import interleaved  # noqa: E402
from interpreter import apply_fixes, bounds  # noqa: E402

from inmerge_fast.paths.path import Call  # noqa: E402
from inmerge_fast.paths.triton.for_now import Keeper  # noqa: E402
from inmerge_fast.paths.triton.launch import Launcher  # noqa: E402

CALL = Call(5, 3, 0.7, 0.25, -1.0)


@pytest.fixture(autouse=True)
def _interpreter():
    apply_fixes()


def weights_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    shapes = ((9, 40), (7, 16), (6, 33))
    return [torch.randn(s, generator=generator).to(d) for s, d in zip(shapes, dtypes, strict=True)]


def keeper_of(weights, *, naive=False, programs=5):
    plan = MergePlan(weights)
    launcher = Launcher(plan.layers, plan.weights(), plan.rows.start)
    launcher.programs = programs
    launcher.row_constants |= {"BLOCK": 16, "STRIDED_BLOCK": 8}
    keeper = Keeper(launcher)
    keeper._blend._constants["NAIVE"] = naive
    return keeper


def expected_of(weights, call=CALL):
    found = []
    for layer, weight in enumerate(weights):
        coin, partner = draw(call.seed, call.step, layer, len(weight), call.prob)
        found.append(reference_merge(weight, coin, partner, alpha=call.alpha, threshold=call.thresholds).weight)
    return found


def tensors_of(keeper, weights):
    launcher = keeper._launcher
    holders = {**vars(launcher), **vars(launcher.slots), **vars(launcher.running), **vars(keeper)}
    held = {name: value for name, value in holders.items() if isinstance(value, torch.Tensor) and value.numel()}
    return held | {f"weight{index}": weight for index, weight in enumerate(weights)}


def interleave(seed, *, naive=False):
    weights = weights_of(seed)
    before, expected = [weight.clone() for weight in weights], expected_of(weights)
    keeper = keeper_of(weights, naive=naive)
    keeper.reserve(1.0)
    with interleaved(seed, tensors=tensors_of(keeper, weights)) as schedule:
        keeper.merge(CALL)
        wrong = sum(not torch.equal(w, e) for w, e in zip(weights, expected, strict=True))
        keeper.restore()
    if not naive:
        for weight, old in zip(weights, before, strict=True):
            assert_same_bits(weight, old)
    return len(schedule.races), wrong


@pytest.mark.parametrize("seed", range(6))
def test_every_order_of_programs_gives_the_same_without_races(seed):
    assert interleave(seed) == (0, 0)


def test_the_detector_notices_partners_that_are_read_where_they_lie():
    races, wrong = map(sum, zip(*(interleave(seed, naive=True) for seed in range(6)), strict=True))
    assert races > 0
    assert wrong > 0


def test_without_enough_memory_filters_are_left_as_they_are():
    weights = weights_of()
    before, expected = [weight.clone() for weight in weights], expected_of(weights)
    keeper = keeper_of(weights)
    keeper.packed = torch.zeros(16 * 25, dtype=torch.int8)
    keeper.reserve = lambda prob: None
    with bounds(*tensors_of(keeper, weights).values()):
        results = keeper.merge(CALL).fetch()
        merged = sum(int((weight != old).any(1).sum()) for weight, old in zip(weights, before, strict=True))
        assert 0 < merged == results.passed.sum() < len(results.passed)
        for weight, old, wanted in zip(weights, before, expected, strict=True):
            for row, (now, was, new) in enumerate(zip(weight, old, wanted, strict=True)):
                assert torch.equal(now, was) or torch.equal(now, new), row
        keeper.restore()
    for weight, old in zip(weights, before, strict=True):
        assert_same_bits(weight, old)


@pytest.mark.parametrize(("prob", "share"), [(0.0, 0.0), (0.3, 0.5), (1.0, 1.0)])
def test_memory_is_enough_for_what_is_sampled_and_not_for_everything(prob, share):
    weights = [torch.randn(400, 4)]
    keeper = keeper_of(weights, programs=400)
    for step in range(2):
        assert keeper.merge(Call(1, step, prob, 0.5, -1.0)).fetch().passed.all()
        keeper.restore()
    assert keeper.packed.numel() <= share * 16 * 400


def test_other_calls_of_the_plan_in_between_change_nothing():
    weights = weights_of()
    before = [weight.clone() for weight in weights]
    keeper = keeper_of(weights)
    keeper.merge(CALL)
    for step in range(30):
        keeper._launcher.run(0, step, prob=0.9, alpha=0.5, threshold=-1.0, dry_run=True)
    keeper.restore()
    for weight, old in zip(weights, before, strict=True):
        assert_same_bits(weight, old)
    after = [weight.clone() for weight in weights]
    keeper.restore()
    for weight, old in zip(weights, after, strict=True):
        assert_same_bits(weight, old)
