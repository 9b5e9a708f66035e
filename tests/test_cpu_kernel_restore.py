"""The CPU kernel keeps the filters that it merges, and puts them back to the bit."""

import cpu_kernel
import numpy as np
import pytest
import torch
from cpu_kernel import DTYPES, layer_of, similar_filters
from oracle import assert_same_bits
from torch import nn

import inmerge_fast
from inmerge_fast.paths import cpu


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    return cpu_kernel.use(monkeypatch)


def merged(weights, layers, kept, **arguments):
    """A kernel that has merged ``weights``."""
    merger = cpu.CpuMerge(layers, weights, np.cumsum([0, *(layer.layout.filters for layer in layers)]))
    merger.run(5, 3, **{"prob": 0.5, "alpha": 0.5, "thresholds": 0.5, "dry_run": False} | arguments, kept=kept)
    return merger


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_filter_is_what_it_was(dtype, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weights = [similar_filters(700, 900, dtype=dtype, seed=1), similar_filters(80, 50, dtype=dtype, seed=2)]
    layers = [layer_of(weight, layer_id=index) for index, weight in enumerate(weights)]
    before = [weight.clone() for weight in weights]
    kept = [bytearray()]
    merger = merged(weights, layers, kept)
    assert all(
        not torch.equal(weight.nan_to_num(), old.nan_to_num()) for weight, old in zip(weights, before, strict=True)
    )
    merger.restore(*kept[1])
    for weight, old in zip(weights, before, strict=True):
        assert_same_bits(weight, old)


def test_strided_filters_and_those_of_groups():
    conv = nn.ConvTranspose2d(6, 10, 3, groups=2).to(memory_format=torch.channels_last)
    before = conv.weight.detach().clone()
    plan = inmerge_fast.MergePlan(conv)
    kept = [bytearray()]
    merger = merged(plan.weights(), plan.layers, kept, thresholds=-1.0, prob=1.0)
    assert not torch.equal(conv.weight, before)
    merger.restore(*kept[1])
    assert_same_bits(conv.weight.detach(), before)


def test_memory_is_used_again_where_it_has_room():
    weight = similar_filters(40, 30)
    first, second = [bytearray()], [bytearray(10)]
    merged([weight], [layer_of(weight)], first, thresholds=-1.0, prob=1.0)
    spare = first[1][3]
    assert len(spare) == 40 * 30 * 4
    again = [spare]
    merged([weight], [layer_of(weight)], again, thresholds=-1.0, prob=0.5)
    assert again[1][3] is spare
    merged([weight], [layer_of(weight)], second, thresholds=-1.0, prob=0.5)
    assert second[1][3] is not second[0]


def test_memory_has_room_for_other_draws_of_the_same_prob_and_for_no_more():
    weight = similar_filters(2000, 30)
    layer, every = layer_of(weight), 2000 * 30 * 4
    spare, rooms = bytearray(), set()
    for seed in range(20):
        kept = [spare]
        merger = cpu.CpuMerge([layer], [weight], np.array([0, 2000]))
        merger.run(seed, 0, prob=0.5, alpha=0.5, thresholds=-1.0, dry_run=False, kept=kept)
        merger.restore(*kept[1])
        spare = kept[1][3]
        rooms.add(len(spare))
    assert len(rooms) == 1, "it was made again, which costs more than the merge"
    assert 0.5 * every < rooms.pop() < 0.5 * 1.25 * every
    kept = [spare]
    merged([weight], [layer], kept, thresholds=-1.0, prob=0.95)
    assert not kept[0]
    assert len(kept[1][3]) == every


def test_what_was_only_measured_keeps_nothing(kernel):
    weight, kept = similar_filters(40, 30), [bytearray()]
    merged([weight], [layer_of(weight)], kept, thresholds=-1.0, dry_run=True)
    assert kept == [bytearray()]


@pytest.mark.parametrize("wrong", [[], [b""], [bytearray(), bytearray()], bytearray(), 3])
def test_what_is_no_list_with_a_bytearray_is_refused(wrong):
    weight = similar_filters(40, 30)
    before = weight.clone()
    with pytest.raises(TypeError, match="kept must be a list with a bytearray"):
        merged([weight], [layer_of(weight)], wrong, thresholds=-1.0)
    assert_same_bits(weight, before)


def test_what_does_not_fit_the_layers_is_refused():
    weight, kept = similar_filters(40, 30), [bytearray()]
    merger = merged([weight], [layer_of(weight)], kept, thresholds=-1.0)
    after = weight.clone()
    counts, rows, passed, old = kept[1]
    count = int(np.frombuffer(counts, np.int64)[0])
    index = np.frombuffer(rows, np.int32)
    for wrong in (
        (bytearray(np.int64(count + 1).tobytes()), rows, passed, old),
        (bytearray(np.int64(-1).tobytes()), rows, passed, old),
        (bytearray(), rows, passed, old),
        (counts, rows[:-4], passed, old),
        (counts, np.where(index == index[-1], 40, index).astype(np.int32).tobytes(), passed, old),
        (counts, (-1 - index).astype(np.int32).tobytes(), passed, old),
        (counts, rows, passed[:-1], old),
        (counts, rows, passed, old[: count * 30 * 4 - 1]),
    ):
        with pytest.raises(ValueError, match=r"fit the layers|bytes instead of"):
            merger.restore(*wrong)
        assert_same_bits(weight, after)
