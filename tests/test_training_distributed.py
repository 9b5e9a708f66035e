"""``InMerge`` on several ranks: agreement, replicas that stay bit-equal, weights sharded by ``fully_shard``."""

import gc
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from inmerge_fast import CollapseGuard, InMerge, MergePlan, QuantileThreshold, RankBudget
from inmerge_fast.training import rank_watch
from inmerge_fast.training.distributed import ShardedPlan

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def net():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Conv2d(4, 7, 3), nn.Conv2d(7, 6, 1), nn.Conv2d(6, 8, 1, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def assert_equal_on_all_ranks(model):
    for parameter in model.parameters():
        copies = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, parameter.detach())
        assert all(torch.equal(copies[0], copy) for copy in copies[1:])


def _replicas_stay_bit_equal(rank, world):
    """1,000 steps on different data, with a quantile threshold and a guard that stops layers."""
    torch.manual_seed(0)
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    merger = InMerge(
        model, threshold=QuantileThreshold(0.1, every=100), prob=0.5, skip_first=1, guard=CollapseGuard(0.2),
    ).attach(optimizer)  # fmt: skip
    torch.manual_seed(rank + 1)  # different data and a different global generator on each rank
    for _ in range(1000):
        optimizer.zero_grad()
        model(torch.randn(1, 2, 7, 7)).square().mean().backward()
        optimizer.step()
    assert merger.step_count == 1000
    assert_equal_on_all_ranks(model)
    states = [None] * world
    dist.all_gather_object(states, merger.state_dict())
    assert all(state == states[0] for state in states)


def _what_one_rank_alone_sees_decides_nothing(rank, deferred=False):
    """Unlike machines may measure and count differently: the others take what the first rank has found.

    With ``deferred`` it is measured as on an accelerator, in the background; the CPU weights stand in for its.
    """
    original = rank_watch.RankCost.price, rank_watch.may_defer, MergePlan.totals
    rank_watch.may_defer = lambda device: deferred
    if rank > 0:
        rank_watch.RankCost.price = lambda self, *a: 100.0
        MergePlan.totals = lambda self: original[2](self) + 1000 * rank
    try:
        for settings in (
            {"threshold": RankBudget(0.3), "stop": 100},
            {"threshold": -0.5, "guard": CollapseGuard(0.1)},
        ):
            torch.manual_seed(0)
            model = net()
            merger = InMerge(model, prob=0.5, skip_first=0, **settings)
            for _ in range(100):
                merger.step()
            assert_equal_on_all_ranks(model)
            seen = [None] * dist.get_world_size()
            watch = merger._run.watch
            dist.all_gather_object(
                seen, (sorted(merger.stopped), {name: vars(ledger) for name, ledger in watch.ledgers.items()})
            )
            assert all(other == seen[0] for other in seen)
            assert merger.stopped or "stop" in settings, "the guard must have acted, or this tests nothing"
    finally:
        rank_watch.RankCost.price, rank_watch.may_defer, MergePlan.totals = original


def _ranks_that_disagree_raise(rank):
    for argument, name in (
        ({"seed": rank}, "seed: 0 on rank 0, 1 on rank 1"),
        ({"prob": lambda step: 0.1 + 0.1 * rank}, "prob"),
        ({"skip_first": rank}, "layers"),
        ({"stop": 10 + rank}, "start, stop and every"),
    ):
        with pytest.raises(ValueError, match=f"the ranks disagree about {name}"):
            InMerge(net(), **argument)
    group = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    InMerge(net(), seed=rank, process_group=group)  # different models on different ranks


def _the_mode_of_one_rank_decides_nothing(rank):
    """One rank is left in evaluation mode after its validation."""
    for attached in (True, False):
        torch.manual_seed(0)
        model = DistributedDataParallel(net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        merger = InMerge(model, prob=0.5, threshold=-0.5, skip_first=0, guard=None)
        if attached:
            merger.attach(optimizer)
        for step in range(20 if attached else 4):
            if rank == 1 and step == (10 if attached else 3):
                model.eval()
            optimizer.zero_grad()
            model(torch.randn(1, 2, 7, 7)).square().mean().backward()
            optimizer.step()
            if not attached and model.training:
                merger.step()
        if attached:
            assert merger.step_count == 20
            assert_equal_on_all_ranks(model)
        elif rank == 1:
            with pytest.raises(RuntimeError, match="in evaluation mode on one of several ranks"):
                merger.step()
        dist.barrier()


def _a_layer_that_is_frozen_on_all_ranks_waits_on_all(rank):
    for settings in (
        {"threshold": QuantileThreshold(0.3, every=10)},
        {"threshold": RankBudget(0.5), "stop": 60},
        {"threshold": -0.5, "guard": CollapseGuard(0.1)},
    ):
        torch.manual_seed(0)
        model = net()
        model.requires_grad_(False)
        merger = InMerge(model, prob=0.5, skip_first=0, **settings)
        for step in range(60):
            if step == 5:
                model[:3].requires_grad_(True)
            if step == 30:
                model[3].requires_grad_(True)
                model[1].requires_grad_(False)
            merger.step()
        assert_equal_on_all_ranks(model)
        counted = merger._run.counted_by_layer()
        assert counted["0"][1] > 0
        assert counted["3"][1] > 0
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, merger.state_dict())
        assert all(state == states[0] for state in states)


def _what_one_rank_alone_freezes_is_an_error_there(rank):
    """It is found at the next comparison, and until then nobody waits for a rank that does not come."""
    for settings in (
        {"threshold": QuantileThreshold(0.3, every=3)},
        {"threshold": RankBudget(0.5, every=2), "stop": 60},
        {"threshold": -0.5},
    ):
        for frozen in (slice(0, 1), slice(0, 4)):
            torch.manual_seed(0)
            model = net()
            merger = InMerge(model, prob=0.9, skip_first=0, **settings)
            merger.step()
            model[frozen].requires_grad_(rank != 1)
            for _ in range(3):
                merger.step()
            if rank == 1:
                with pytest.raises(ValueError, match="the ranks disagree about what is merged: at step 2"):
                    merger.step()  # on which the others would wait for ever, had it not ended its process
            dist.barrier()


def sharded(model, mesh, each_layer=True):
    if each_layer:
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model, merger, optimizer, steps):
    generator = torch.Generator().manual_seed(5)
    stats = []
    for _ in range(steps):
        x = torch.randn(2, 2, 7, 7, generator=generator)  # the same on all ranks: gradients are as on one
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        stats.append(merger.step())
    return [(s.sampled, s.passed, s.merged, s.mean_similarity, s.max_similarity) for s in stats]


def _sharded_weights_merge_as_on_one_rank(rank, world):
    """FSDP2 with unevenly divided filters, of which some ranks may have none."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world,))
    for settings in (
        {"threshold": 0.0, "prob": 0.5},
        {"threshold": QuantileThreshold(0.3, every=3), "prob": 0.8, "partner": "nearest"},
        {"threshold": RankBudget(0.3, every=3), "prob": 0.8, "stop": 30},
    ):
        whole = net()
        model = net()
        model.load_state_dict(whole.state_dict())
        sharded(model, mesh, each_layer="partner" in settings)
        group = [dist.new_group([r]) for r in range(world)][rank]
        single = InMerge(whole, skip_first=0, process_group=group, **settings)
        merger = InMerge(model, skip_first=0, **settings)
        assert isinstance(merger.plan, ShardedPlan)
        assert "sharded weights" in str(merger.plan)
        for _ in range(8):
            expected, found = single.step(), merger.step()
            assert (found.sampled, found.merged) == (expected.sampled, expected.merged)
            assert found.layers == expected.layers
        assert found.merged > 0
        for own, other in zip(whole.parameters(), model.parameters(), strict=True):
            assert isinstance(other, DTensor)
            assert torch.equal(own, other.full_tensor())
        assert merger.effective_rank() == single.effective_rank()
        assert merger.summary().rows() == single.summary().rows()
        assert str(merger.preview()) == str(single.preview())
        if world > 2:
            continue  # the mean of more than two equal gradients need not be that gradient, after rounding
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (whole, model)]
        rows = [train(m, i, o, 10) for m, i, o in zip((whole, model), (single, merger), optimizers, strict=True)]
        assert rows[0] == rows[1]
        for own, other in zip(whole.parameters(), model.parameters(), strict=True):
            assert torch.equal(own, other.full_tensor())
    _gathers_one_layer_at_a_time(model, merger)
    _other_shardings_raise(mesh)


def _gathers_one_layer_at_a_time(model, merger):
    """No more than one whole weight exists at any time."""
    gathered = []
    original = DTensor.full_tensor

    def full_tensor(self, **kwargs):
        assert not [t for t in gathered if t.untyped_storage().nbytes()], "the layer before this one is still in memory"
        gathered.append(original(self, **kwargs))
        return gathered[-1]

    DTensor.full_tensor = full_tensor
    try:
        merger.step()
    finally:
        DTensor.full_tensor = original
    assert len(gathered) in (4, 8)  # 8 where all layers are measured anew
    gc.collect()


def _other_shardings_raise(mesh):
    model = net()
    model[2].weight = nn.Parameter(distribute_tensor(model[2].weight.detach(), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"2: the weight is sharded as .*Shard\(dim=1\).*exclude="):
        InMerge(model, skip_first=0)
    assert InMerge(model, skip_first=0, exclude="2", prob=1.0, threshold=-1.0).step().merged == 4 + 7 + 8
    transposed = sharded(nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), mesh)
    with pytest.raises(ValueError, match="filters of a transposed convolution lie along dim 1"):
        InMerge(transposed, skip_first=0)
    unsharded = sharded(net(), mesh)
    merger = InMerge(unsharded, skip_first=0)
    for layer in unsharded:
        if isinstance(layer, nn.Conv2d):
            layer.unshard()
    with pytest.raises(ValueError, match=r"the weight is unsharded now.*model.reshard\(\)"):
        merger.step()
    for layer in unsharded:
        if isinstance(layer, nn.Conv2d):
            layer.reshard()
    assert merger.step() is not None
    frozen = sharded(net(), mesh)
    frozen[1].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(frozen.parameters(), lr=0.1)
    merger = InMerge(frozen, skip_first=0).attach(optimizer)
    assert merger.plan.names == ["0", "2", "3"]
    optimizer.step()
    assert merger.step_count == 1


def _all(rank, world, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    _replicas_stay_bit_equal(rank, world)
    _what_one_rank_alone_sees_decides_nothing(rank)
    _what_one_rank_alone_sees_decides_nothing(rank, deferred=True)
    _the_mode_of_one_rank_decides_nothing(rank)
    _a_layer_that_is_frozen_on_all_ranks_waits_on_all(rank)
    _what_one_rank_alone_freezes_is_an_error_there(rank)
    _ranks_that_disagree_raise(rank)
    _sharded_weights_merge_as_on_one_rank(rank, world)
    dist.barrier()
    os._exit(0)  # see test_distributed.py: teardown has once ended in std::terminate, after everything had passed


@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks(world, tmp_path):
    """Replicas (DDP) and sharded weights (FSDP2); what runs is in the functions above, starting ranks is what costs."""
    mp.spawn(_all, args=(world, tmp_path / "store"), nprocs=world)
