"""The plan: which layers take part, when a cached one is still right, and what it prints."""

import copy
import gc
import pickle
from unittest import mock

import pytest
import torch
from torch import nn

import inmerge_fast
from benchmarks.nets import mixed_net
from inmerge_fast import MergePlan, merge

MERGE_ALL = {"prob": 1.0, "threshold": -1.0, "seed": 1, "step": 0}


def test_a_plan_prints_what_is_merged_and_why_not():
    plan = MergePlan(mixed_net(), skip_first=1, exclude="1.*")
    assert [(layer.name, layer.layer_id) for layer in plan.layers] == [("3", 3)]
    assert plan.skipped == (
        ("0", "among the first 1 (skip_first=1)"),
        ("1.0", "excluded by '1.*'"),
        ("2", "one filter per group, nothing to pair it with"),
    )
    printed = str(plan)
    assert f"merges 1 layers, 6 filters; path: {plan.path} ({plan.path_reason})" in printed
    assert "3         3        6       2        18  float32" in printed
    assert "skipped 1, excluded by '1.*': 1.0" in printed
    assert repr(plan) == f"MergePlan(layers=1, skipped=3, path='{plan.path}')"


@pytest.mark.interpreted
def test_the_path_and_its_reason(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("INMERGE_INTERPRET", "1")
    plan = MergePlan(nn.Conv2d(3, 4, 3))
    assert (plan.path, plan.path_reason) == ("triton", "interpreted, INMERGE_INTERPRET is set")
    assert MergePlan(nn.Conv2d(3, 4, 3).double()).path_reason.startswith("float64 layers")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    amd = MergePlan(nn.Conv2d(3, 4, 3))
    assert (amd.path, amd.path_reason) == ("eager", "the kernels are not verified on AMD GPUs")


def test_forced_eager_is_said(monkeypatch):
    plan = MergePlan(nn.Conv2d(3, 4, 3))
    assert plan.path_reason != "INMERGE_FORCE_EAGER is set"
    monkeypatch.setenv("INMERGE_FORCE_EAGER", "1")
    assert plan.path_reason == "INMERGE_FORCE_EAGER is set"


@pytest.mark.parametrize(
    ("skip_first", "candidates", "left_out"),
    [(0.6, 16, 10), (0.6, 20, 12), (0.5, 3, 2), (0.0, 5, 0), (0, 5, 0), (4, 5, 4), (0.99, 5, 4), (0.99, 1, 0)],
)  # fmt: skip
def test_skip_first_counts(skip_first, candidates, left_out):
    model = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(candidates)))
    plan = MergePlan(model, skip_first=skip_first)
    assert [layer.layer_id for layer in plan.layers] == list(range(left_out, candidates))


def test_linear_layers_take_part_when_asked_and_do_not_renumber_convolutions():
    plan = MergePlan(mixed_net(), skip_first=0, include_linear=True)
    assert [(layer.name, layer.layer_id) for layer in plan.layers] == [("0", 0), ("1.0", 1), ("1.1", 4), ("3", 3)]


def test_a_plan_outlives_neither_model_nor_tensor():
    plan = MergePlan(mixed_net())
    gc.collect()
    with pytest.raises(ValueError, match="out of date"):
        inmerge_fast.merge_(plan)


def test_a_plan_takes_no_choice_of_layers():
    model = mixed_net()
    plan = MergePlan(model)
    for arguments in ({"skip_first": 0}, {"exclude": "1"}, {"include_linear": True}, {"layer": 1}):
        with pytest.raises(ValueError, match="are set where a MergePlan is built"):
            inmerge_fast.merge_(plan, **arguments)
    assert inmerge_fast.merge_(plan, **MERGE_ALL).merged == inmerge_fast.merge_(model, **MERGE_ALL).merged


def test_a_model_equals_its_layers_one_by_one(device):
    together, apart = mixed_net().to(device), mixed_net().to(device)
    apart.load_state_dict(together.state_dict())
    inmerge_fast.merge_(together, skip_first=0, **MERGE_ALL)
    for index, conv in enumerate([apart[0], apart[1][0], None, apart[3]]):
        if conv is not None:
            inmerge_fast.merge_(conv, layer=index, **MERGE_ALL)
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_seed_governs_an_explicit_draw_and_manual_seed_the_rest():
    conv = nn.Conv2d(4, 32, 3)
    state = torch.get_rng_state()
    inmerge_fast.merge_(conv, seed=1, step=0)
    assert torch.equal(torch.get_rng_state(), state)

    def seeds(count, **arguments):
        return [inmerge_fast.merge_(conv, dry_run=True, **arguments).seed for _ in range(count)]

    torch.manual_seed(5)
    first = seeds(3)
    torch.manual_seed(5)
    assert seeds(3) == first
    assert len(set(first)) == 3
    state = torch.get_rng_state()
    own = seeds(3, generator=torch.Generator().manual_seed(5))
    assert own == first
    assert torch.equal(torch.get_rng_state(), state)
    repeated = inmerge_fast.merge_(conv, dry_run=True, seed=first[0], step=0, prob=0.5)
    assert repeated.seed == first[0]
    assert max(seeds(200)) > 2**63 > min(seeds(200)), "all 64 bits are used"


def test_the_module_named_merge_is_not_shadowed():
    assert merge.merge_ is inmerge_fast.merge_


def test_a_share_of_layers_rounds_half_up():
    model = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(5)))
    assert [layer.layer_id for layer in MergePlan(model, skip_first=0.5).layers] == [3, 4]


def test_layers_of_an_iterable_are_numbered_and_named_by_their_place():
    shared, last = nn.Conv2d(2, 2, 1), torch.randn(4, 9)
    plan = MergePlan([shared, shared, last])
    assert [(layer.name, layer.layer_id) for layer in plan.layers] == [("0: Conv2d", 0), ("2: Tensor", 2)]
    assert plan.skipped == (("1: Conv2d", "shares its weight with 0: Conv2d and goes with it"),)


class Deformable(nn.Module):
    """As torchvision's DeformConv2d keeps its weight."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.Parameter(torch.zeros(6))


def test_weights_that_are_not_known_as_filters_are_named_and_not_absent():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), Deformable())
    model.kernels = nn.ParameterList([torch.randn(5, 4, 1, 1), torch.randn(3)])
    model.tokens = nn.Parameter(torch.zeros(1, 5, 4))  # one row for all
    model.scale = nn.Parameter(torch.ones(8, 1, 1))  # a gain for each channel
    model.attention, model.lazy = nn.MultiheadAttention(4, 2), nn.LazyConvTranspose1d(3, 2)
    plan = MergePlan(model, skip_first=0, exclude="lazy")
    assert plan.names == ["0", "1"]
    assert plan.skipped[1:] == (
        ("2.weight", "(6, 4, 3, 3) of a Deformable, which is no convolution of PyTorch; merge the tensor itself"),
        ("kernels.0", "(5, 4, 1, 1) of a ParameterList, which is no convolution of PyTorch; merge the tensor itself"),
    )
    assert "2.weight" in str(plan)
    inmerge_fast.merge_(model[2].weight)  # as it says


def test_complex_convolutions_are_left_out_with_the_reason():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3, dtype=torch.complex64))
    before = model[1].weight.detach().clone()
    plan = MergePlan(model, skip_first=0)
    assert plan.names == ["0"]
    assert plan.skipped == (("1", "complex, and similarities that are complex exceed no threshold"),)
    inmerge_fast.merge_(model, skip_first=0, threshold=-1, prob=1)
    assert torch.equal(model[1].weight, before)
    with pytest.raises(ValueError, match="no layer of this Conv2d can be merged: .*complex"):
        inmerge_fast.merge_(model[1])


def test_a_plan_says_that_its_tensor_is_gone():
    plan = MergePlan(torch.randn(4, 9))
    gc.collect()
    with pytest.raises(ValueError, match="Tensor: its weight is gone; keep a reference"):
        plan.weights()


def test_tied_layers_can_be_excluded_by_either_name():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[2].weight = model[1].weight
    plan = MergePlan(model, skip_first=0, exclude="2")
    assert ("2", "shares its weight with 1 and goes with it") in plan.skipped


def test_names_do_not_show_wrappers():
    inner = mixed_net()
    inner[1] = torch.compile(inner[1], backend="eager")
    names = ["0", "1.0", "3"]
    for model in (inner, torch.optim.swa_utils.AveragedModel(mixed_net()), torch.compile(nn.DataParallel(mixed_net()))):
        assert [layer.name for layer in MergePlan(model, skip_first=0).layers] == names
    conv = torch.compile(nn.Conv2d(2, 4, 3), backend="eager")
    assert inmerge_fast.merge_(conv, **MERGE_ALL).merged == 4


def test_plans_cannot_be_copied_and_statistics_can():
    conv = nn.Conv2d(2, 4, 3)
    with pytest.raises(TypeError, match="a MergePlan belongs to the memory of its target"):
        copy.deepcopy(MergePlan(conv))
    stats = inmerge_fast.merge_(conv, **MERGE_ALL)
    assert pickle.loads(pickle.dumps(stats)).layers == stats.layers


def test_a_drawn_seed_repeats_the_call_and_uses_both_words():
    before = torch.randn(32, 9)
    weight, again = before.clone(), before.clone()
    stats = inmerge_fast.merge_(weight, threshold=-1.0, prob=0.5)
    inmerge_fast.merge_(again, threshold=-1.0, prob=0.5, seed=stats.seed, step=stats.step)
    assert torch.equal(weight, again)
    assert not torch.equal(weight, before)
    seeds = [inmerge_fast.merge_(weight, dry_run=True).seed for _ in range(8)]
    assert len({seed >> 32 for seed in seeds}) == len({seed & 0xFFFFFFFF for seed in seeds}) == 8


@pytest.mark.parametrize("value", ["1", "0", "", None])
def test_an_environment_that_tests_put_in_place_of_the_real_one_is_asked(value, monkeypatch):
    monkeypatch.setenv("INMERGE_FORCE_EAGER", "1")
    plan = MergePlan(nn.Conv2d(3, 4, 3))
    with mock.patch("os.environ", {} if value is None else {"INMERGE_FORCE_EAGER": value}):
        assert (plan.path_reason == "INMERGE_FORCE_EAGER is set") == (value == "1")
