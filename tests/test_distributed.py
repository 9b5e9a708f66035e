"""Several ranks: no silent drift, and sharded weights are refused instead of losing the merge."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import inmerge_fast

MERGE_ALL = {"prob": 1.0, "threshold": -1.0, "seed": 1, "step": 0}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3))


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_one_rank_needs_no_seed():
    assert inmerge_fast.merge_(net(), prob=1.0, threshold=-1.0).merged == 6


def _replicas_stay_equal(rank):
    torch.manual_seed(0)
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(rank)  # different data and a different global generator on each rank
    for arguments in ({}, {"generator": torch.Generator()}):
        with pytest.raises(ValueError, match="seed is None with more than one torch.distributed rank"):
            inmerge_fast.merge_(model, **arguments)
    merged = 0
    for step in range(50):
        merged += inmerge_fast.merge_(model, prob=0.3, threshold=-0.2, seed=7, step=step).merged
        optimizer.zero_grad()
        model(torch.randn(2, 3, 9, 9)).square().mean().backward()
        optimizer.step()
    assert merged > 0
    assert inmerge_fast.MergePlan(model, skip_first=0).layers[0].name == "0"  # not "module.0"
    for parameter in model.parameters():
        copies = [torch.empty_like(parameter) for _ in range(2)]
        dist.all_gather(copies, parameter.detach())
        assert torch.equal(copies[0], copies[1])


def _fsdp1_shards_raise_and_full_parameters_merge(use_orig_params):
    torch.manual_seed(0)
    model = FullyShardedDataParallel(net(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="flattened weight|has no elements|computed at every forward pass"):
        inmerge_fast.merge_(model, **MERGE_ALL)
    with FullyShardedDataParallel.summon_full_params(model, writeback=True):
        before = model.module[2].weight.detach().clone()
        if use_orig_params:
            assert inmerge_fast.merge_(model, **MERGE_ALL).merged == 6
    with FullyShardedDataParallel.summon_full_params(model):
        assert torch.equal(model.module[2].weight, before) is not use_orig_params


def _two_ranks(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    _replicas_stay_equal(rank)
    for use_orig_params in (True, False):
        _fsdp1_shards_raise_and_full_parameters_merge(use_orig_params)
    dist.barrier()
    # PyTorch's teardown of a process whose FSDP models held a gloo group has once ended in std::terminate (SIGABRT,
    # 1 of some 100 runs), after everything above had passed. A failure above never gets here: mp.spawn reports it.
    os._exit(0)


def test_two_ranks_under_ddp_and_fsdp1(tmp_path):
    """DDP: a missing seed raises, and replicas stay bit-equal. FSDP1: flat shards raise, gathered weights merge."""
    mp.spawn(_two_ranks, args=(tmp_path / "store",), nprocs=2)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("shard", ["root", "layers"])
def test_fsdp2_raises_sharded_and_unsharded(shard):
    model = net()
    mesh = init_device_mesh("cpu", (1,))
    inmerge_fast.merge_(model, **MERGE_ALL)  # its plan is cached now
    if shard == "layers":
        for layer in model:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    before = [p.full_tensor().detach().clone() for p in model.parameters()]
    for unshard in (False, True):
        if unshard:
            model.unshard()
        with pytest.raises(ValueError, match="sharded by fully_shard"):
            inmerge_fast.merge_(model, **MERGE_ALL)
        if not unshard or shard == "layers":
            with pytest.raises((TypeError, ValueError), match="sharded by fully_shard|the weight is a DTensor"):
                inmerge_fast.merge_(model[2], **MERGE_ALL)
    model.reshard()
    assert all(torch.equal(p.full_tensor(), old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("shard", ["root", "layers"])
def test_fsdp2_is_refused_for_a_forward_pass_with_the_cure(shard):
    """Also where a model is sharded later: nothing is merged then, and nothing runs as if it were."""

    def sharded(model):
        for layer in model if shard == "layers" else ():
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    mesh, model = init_device_mesh("cpu", (1,)), net()
    later = inmerge_fast.InMerge(model, lasting=False)
    with inmerge_fast.merged(model, seed=0, step=0):
        pass
    before = [p.detach().clone() for p in model.parameters()]
    sharded(model)
    x = torch.randn(2, *before[0].shape[1:2], 9, 9)
    for unshard in (False, True):
        if unshard:
            model.unshard()
        with pytest.raises(
            ValueError, match=r"sharded \(FSDP2\) cannot be merged .* use DistributedDataParallel, or last"
        ):
            inmerge_fast.InMerge(model, lasting=False)
        with pytest.raises(ValueError, match="sharded by fully_shard, .* whole weights: use DistributedDataParallel"):
            inmerge_fast.merged(model, seed=0, step=0).__enter__()
    model.reshard()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    later.attach(optimizer)
    with pytest.raises(ValueError, match=r"sharded \(FSDP2\) cannot be merged"):
        model(x)
    later.detach()
    for parameter, old in zip(model.parameters(), before, strict=True):  # some are unsharded now
        assert torch.equal(getattr(parameter, "full_tensor", parameter.detach)(), old)
    inmerge_fast.InMerge(sharded(net()), skip_first=0).step()  # lasting merging is the cure
