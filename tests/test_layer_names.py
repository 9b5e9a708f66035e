"""Names of layers do not show the wrappers around them, wherever they stand: patterns and checkpoints go on to fit."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    offload_wrapper,
)
from torch.nn.parallel import DistributedDataParallel

from inmerge_fast import InMerge, MergePlan, merge_, similarity

NAMES = ["stem", "body.0.module.conv", "body.1.module.conv", "head.conv"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


class Residual(nn.Module):
    """Has a child called module, and is no wrapper."""

    def __init__(self):
        super().__init__()
        self.module = Block()

    def forward(self, x):
        return x + self.module(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(Residual(), Residual())
        self.head = Block()

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, (Block, Residual)))
    return model


def offloaded(model):
    model.body[1] = offload_wrapper(model.body[1])
    return model


def compiled_in_part(model):
    model.body = torch.compile(model.body, backend="eager")
    model.body._orig_mod[0].module = torch.compile(model.body._orig_mod[0].module, backend="eager")
    return model


def compiled_parallel(model):
    return torch.compile(DistributedDataParallel(torch.compile(checkpointed(model), backend="eager")), backend="eager")


def parallel_in_part(model):
    model.body = DistributedDataParallel(model.body)
    model.head.conv = nn.DataParallel(model.head.conv)
    return model


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(checkpointed(model))


def by_fabric(model):
    lightning = pytest.importorskip("lightning")
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    return fabric.setup(torch.compile(model, backend="eager"))


def fabric_in_part(model):
    lightning = pytest.importorskip("lightning")
    model.body = lightning.Fabric(accelerator="cpu", devices=1).setup_module(model.body)
    return model


def fsdp(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model.body = FullyShardedDataParallel(model.body, use_orig_params=True, device_id=torch.device("cpu"))
    return model


WRAPPINGS = [
    checkpointed, offloaded, compiled_in_part, compiled_parallel, parallel_in_part, averaged, by_fabric, fabric_in_part,
    fsdp,
]  # fmt: skip


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("wrap", WRAPPINGS, ids=lambda wrap: wrap.__name__)
def test_names_do_not_show_wrappers(wrap):
    plain = Net()
    saved = InMerge(plain, skip_first=0).state_dict()
    assert saved["layers"] == NAMES
    model = wrap(Net())
    if wrap is fsdp:
        with torch.distributed.fsdp.FullyShardedDataParallel.summon_full_params(model):
            assert MergePlan(model, skip_first=0).names == NAMES
        return
    assert [layer.name for layer in similarity(model).layers] == NAMES
    plan = MergePlan(model, skip_first="stem", exclude=["body.0.*", "*.1.module.conv"])
    assert plan.names == ["head.conv"]
    assert merge_(plan, prob=1.0, threshold=-1.0).merged == 8
    if wrap is not averaged:
        InMerge(model, skip_first=0).load_state_dict(saved)
        thresholds = similarity(plain).threshold_for_rate(0.1)
        assert InMerge(model, threshold=thresholds, skip_first=0).step() is not None


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("wrap", [checkpointed, offloaded, by_fabric], ids=lambda wrap: wrap.__name__)
def test_where_the_state_dict_hides_a_wrapper_names_are_its_keys(wrap):
    model = wrap(Net())
    keys = [key.removesuffix(".weight") for key in model.state_dict() if key.endswith("weight")]
    assert [key.removeprefix("_orig_mod.") for key in keys] == MergePlan(model, skip_first=0).names


def test_the_same_draw_with_and_without_wrappers():
    plain, wrapped = Net(), Net()
    wrapped.load_state_dict(plain.state_dict())
    checkpointed(wrapped)
    for model in (plain, wrapped):
        merge_(model, prob=0.5, threshold=-1.0, seed=1, step=2, skip_first=0)
    for key, value in plain.state_dict().items():
        assert torch.equal(wrapped.state_dict()[key], value)
