"""A look needs no weight that could be written to: odd tensors are read by a copy, or skipped with key and reason."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from inmerge_fast import MergePlan, similarity
from inmerge_fast.__main__ import main
from inmerge_fast.inspection import most_alike
from inmerge_fast.inspection.looks import readable

WEIGHT = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))


class Marked(torch.Tensor):
    """A subclass without code of its own."""


class Wrapper(torch.Tensor):
    """A subclass that keeps its values in another tensor, as quantised and sharded ones do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].inner)
        raise NotImplementedError(f"{function} is not written")


def freed():
    weight = WEIGHT.clone()
    weight.untyped_storage().resize_(0)
    return weight


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch is about to drop them, and files have them
        return torch.quantize_per_channel(
            WEIGHT, torch.full((8,), 1e-4), torch.zeros(8, dtype=torch.long), 0, torch.qint32
        )


def sparse_rows():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in beta
        return WEIGHT.view(2, 4, 36).to_sparse_csr()


def huge_and_sparse():
    with torch.sparse.check_sparse_tensor_invariants():  # PyTorch 2.11 warns even where an argument asks for it
        return torch.sparse_coo_tensor(torch.zeros(3, 1, dtype=torch.long), [1.0], (10**4,) * 3)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)])


def channels_last_grad():
    return nn.Parameter(WEIGHT.to(memory_format=torch.channels_last))


# What is read, and what it is read as.
READ = {
    "permuted": (lambda: WEIGHT.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1), WEIGHT),
    "channels_last": (channels_last_grad, WEIGHT),
    "sliced": (lambda: torch.cat([WEIGHT, WEIGHT], 1)[:, :4], WEIGHT),
    "expanded": (lambda: WEIGHT[:, :1].expand(8, 4, 3, 3), WEIGHT[:, :1].expand(8, 4, 3, 3).contiguous()),
    "all one filter": (lambda: WEIGHT[:1].expand(8, 4, 3, 3), WEIGHT[:1].repeat(8, 1, 1, 1)),
    "overlapping": (lambda: WEIGHT.flatten().as_strided((8, 3, 5), (7, 2, 1)),
                    WEIGHT.flatten().as_strided((8, 3, 5), (7, 2, 1)).clone()),
    "reversed by a negative bit": (lambda: torch.complex(WEIGHT, WEIGHT).conj().imag, WEIGHT),
    "negative and dense": (lambda: torch._neg_view(WEIGHT.clone()), -WEIGHT),
    "sparse": (lambda: WEIGHT.to_sparse(), WEIGHT),
    "sparse rows": (sparse_rows, WEIGHT.view(2, 4, 36)),
    "quantised": (quantised, (WEIGHT / 1e-4).round() * 1e-4),
    "float8": (lambda: WEIGHT.to(torch.float8_e4m3fn), WEIGHT.to(torch.float8_e4m3fn).float()),
    "float8, the other": (lambda: WEIGHT.to(torch.float8_e5m2), WEIGHT.to(torch.float8_e5m2).float()),
    "bfloat16": (lambda: WEIGHT.bfloat16(), WEIGHT.bfloat16().float()),
    "float64": (lambda: WEIGHT.double(), WEIGHT.double()),
    "subclass": (lambda: WEIGHT.as_subclass(Marked), WEIGHT),
    "buffer": (lambda: nn.Buffer(WEIGHT.clone()), WEIGHT),
    "computed": (lambda: WEIGHT.clone().requires_grad_() * 2, 2 * WEIGHT),
    "of inference mode": (lambda: torch.inference_mode()(lambda: WEIGHT.clone())(), WEIGHT),
    "seven dimensions": (lambda: WEIGHT.view(8, 4, 3, 3, 1, 1, 1), WEIGHT),
    "NumPy": (lambda: WEIGHT.numpy(), WEIGHT),
}  # fmt: skip
SKIPPED = {
    "no filters": (lambda: torch.empty(0, 3, 2), "has no elements"),
    "no elements": (lambda: torch.empty(8, 0, 3, 3), "has no elements"),
    "integers": (lambda: torch.ones(8, 3, 3, dtype=torch.int8), "has dtype int8; filters are floating-point numbers"),
    "truth": (lambda: torch.ones(8, 3, 3, dtype=torch.bool), "has dtype bool"),
    "complex": (lambda: torch.ones(8, 3, 3, dtype=torch.complex64), "has dtype complex64; filters are real"),
    "meta": (lambda: torch.empty(8, 3, 3, device="meta"), "is on the meta device and has no values"),
    "nested": (nested, "is nested"),
    "freed": (freed, "has no memory: its storage was freed or resized"),
    "wrapper": (lambda: Wrapper(WEIGHT), "Wrapper"),
    "one filter": (lambda: WEIGHT[:1], "has a single filter"),
    "gains": (lambda: torch.ones(8, 1, 1, 1), "one element per filter: a gain, not a filter"),
    "huge": (lambda: torch.ones(1, 1, 1).expand(10**6, 10**3, 10**3), "is expanded to 1000000000000 elements"),
    "huge and sparse": (huge_and_sparse, "has layout sparse_coo and 1000000000000 elements when dense"),
    "lazy": (lambda: nn.UninitializedParameter(), "is not initialised yet"),
    "NumPy objects": (lambda: __import__("numpy").array([{}], object), "is a NumPy array of object"),
}  # fmt: skip


def plain():
    return {"0.weight": torch.randn(6, 3, 3, 3), "0.bias": torch.randn(6), "1.weight": torch.randn(5, 6, 3, 3)}


@pytest.mark.parametrize("kind", READ)
def test_what_can_be_read_is_compared_as_it_is(kind):
    make, values = READ[kind]
    odd = make()
    found = similarity(plain() | {"odd": odd})
    assert [layer.name for layer in found.layers] == ["0.weight", "1.weight", "odd"]
    torch.testing.assert_close(found.matrix("odd"), similarity(values).matrix(), rtol=0, atol=1e-6)
    assert found["odd"].elements == values[0].numel()


@pytest.mark.parametrize("kind", SKIPPED)
def test_the_rest_is_skipped_by_its_key_with_the_reason(kind):
    make, reason = SKIPPED[kind]
    found = similarity(plain() | {"odd": make()})
    assert [layer.name for layer in found.layers] == ["0.weight", "1.weight"]
    ((key, why),) = found.skipped
    assert key == "odd"
    assert reason in why


@pytest.mark.parametrize("kind", [kind for kind in [*READ, *SKIPPED] if kind not in ("wrapper", "lazy")])
def test_the_same_in_a_live_module(kind):
    """As its weight, whatever it is: the other layers are compared, and nothing raises."""
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 6, 3))
    make, _ = (READ | SKIPPED)[kind]
    odd = make()
    if not isinstance(odd, torch.Tensor):
        pytest.skip("no module holds one")
    del net[0].weight
    net[0].register_buffer("weight", odd.detach() if kind != "buffer" else odd)
    found = similarity(net)
    assert "1" in [layer.name for layer in found.layers]
    shaped = odd.is_nested or odd.dim() == 4
    if kind in READ and shaped:
        torch.testing.assert_close(found.matrix("0"), similarity(READ[kind][1]).matrix(), rtol=0, atol=1e-6)
    elif kind != "gains":  # a convolution of one channel and 1x1, which merge_ does take
        ((name, why),) = found.skipped
        assert name == "0"
        assert "Tensor" not in name
        assert why


def test_a_look_does_not_depend_on_what_merge_could_write_to():
    conv = nn.Conv2d(4, 8, 3)
    shared = nn.Conv2d(4, 8, 3)
    shared.weight.data = conv.weight.data[:, :, :, :]  # other parameters, the same memory
    assert len(similarity(nn.Sequential(conv, shared)).layers) == 2
    assert similarity([conv.weight.detach()[:, :2], conv.weight.detach()]).layers[0].elements == 18
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3, groups=2))
    held = similarity(MergePlan(net, skip_first=0, include_heads=True))
    assert [layer.groups for layer in held.layers] == [1, 2]


def test_parametrised_weights_are_those_of_the_forward_pass():
    net = nn.Sequential(*(nn.Conv2d(4, 8, 3) for _ in range(4)))
    parametrizations.weight_norm(net[0])
    parametrizations.spectral_norm(net[1]).eval()
    prune.random_unstructured(net[2], "weight", amount=0.5)
    found = similarity(net)
    assert [layer.name for layer in found.layers] == ["0", "1", "2", "3"]
    for index, conv in enumerate(net):
        expected = similarity(conv.weight.detach().clone()).matrix()
        torch.testing.assert_close(found.matrix(str(index)), expected, rtol=0, atol=1e-6)
    state = similarity(net.state_dict())
    names = {layer.name for layer in state.layers}
    assert names == {"0.parametrizations.weight.original1", "1.parametrizations.weight.original", "2.weight_orig",
                     "3.weight"}  # fmt: skip
    # The direction alone, the matrix before it is divided by its norm, and the mask applied: the same similarities.
    for name in names - {"3.weight"}:
        torch.testing.assert_close(state.matrix(name), found.matrix(name[0]), rtol=0, atol=1e-6)
    assert dict(state.skipped)["2.weight_mask"] == "the mask of a pruned weight"
    assert "a gain" in dict(state.skipped)["0.parametrizations.weight.original0"]


def test_a_parametrisation_that_fails_is_a_reason():
    class Broken(nn.Module):
        def forward(self, weight):
            if torch.is_grad_enabled():
                return weight
            raise RuntimeError("not now")

    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 6, 3))
    with torch.enable_grad():
        nn.utils.parametrize.register_parametrization(net[0], "weight", Broken())
    with torch.no_grad():
        found = similarity(net)
    assert found.skipped == (("0", "its weight cannot be computed: not now"),)


def test_tied_weights_are_compared_once():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    net.stages = nn.ModuleList([net[0], net[1]])
    found = similarity(net.state_dict())
    assert [layer.name for layer in found.layers] == ["0.weight", "1.weight"]
    assert found.skipped[0] == ("stages.0.weight", "shares its weight with 0.weight and goes with it")


def test_depthwise_layers_count_as_what_merge_does_with_them_nothing():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1),
                        nn.Conv2d(8, 8, 5, groups=8), nn.Conv2d(8, 6, 1))  # fmt: skip
    live, saved = similarity(net), similarity(net.state_dict())
    reason = "one filter per group, nothing to pair it with"
    assert [reason_ for _, reason_ in live.skipped] == [reason] * 2
    assert [f"{name}.weight" for name, _ in live.skipped] == [name for name, _ in saved.skipped]
    assert [reason_ for _, reason_ in saved.skipped] == [reason] * 2
    grey = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3))
    assert [layer.name for layer in similarity(grey.state_dict()).layers] == ["0.weight", "1.weight"]
    grey = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1))
    assert [layer.name for layer in similarity(grey.state_dict()).layers] == ["0.weight", "2.weight"]
    by_name = {
        "blocks.0.conv_dw.weight": WEIGHT[:, :1],
        "blocks.1.conv_dw.weight": WEIGHT[:, :1].clone(),
        "stem": WEIGHT,
    }
    assert [layer.name for layer in similarity(by_name).layers] == ["stem"]
    known = {"0.weight": (1, False), "1.weight": (1, False), "2.weight": (1, False)}
    assert len(similarity(grey.state_dict(), layouts=known).layers) == 3


def test_selections_mean_what_they_mean_for_merge():
    net = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(5)))
    for choice in ({"skip_first": 2}, {"skip_first": 0.6}, {"skip_first": ["0", "3"]}, {"exclude": "[12]"},
                   {"skip_first": 1, "exclude": ["4"]}, {"skip_first": "[03]"}):  # fmt: skip
        plan = MergePlan(net, **({"skip_first": 0} | choice))
        live, saved = similarity(net, **choice), similarity(net.state_dict(), **choice)
        assert [layer.name for layer in live.layers] == plan.names
        assert [layer.name for layer in saved.layers] == [f"{name}.weight" for name in plan.names]
        assert dict(live.skipped) == dict(plan.skipped)
    assert [layer.name for layer in similarity(net, layers=["1", "3"]).layers] == ["1", "3"]
    assert [layer.name for layer in similarity(net.state_dict(), layers="3").layers] == ["3.weight"]
    assert [layer.name for layer in similarity(net.state_dict(), layers="3.weight").layers] == ["3.weight"]
    for target in (net, net.state_dict()):
        for choice in ({"layers": "x*"}, {"exclude": "x*"}, {"skip_first": "x*"}):
            with pytest.raises(ValueError, match=r"'x\*' matches no candidate layer"):
                similarity(target, **choice)
    with pytest.raises(ValueError, match="choose among the layers of a model, but the target is a Conv2d"):
        similarity(net[0], layers="0")
    with pytest.raises(TypeError, match="layers must be a name pattern"):
        similarity(net, layers=3)


def test_where_nothing_is_left_every_reason_is_given():
    with pytest.raises(ValueError, match="no layer of this dict can be compared: skipped 2, has dtype int64"):
        similarity({"a": torch.ones(3, 3, 3, dtype=torch.long), "b": torch.ones(4, 3, 3, dtype=torch.long)})
    with pytest.raises(ValueError, match="one filter per group"):
        similarity(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)))
    with pytest.raises(
        ValueError, match=r"no convolution found in this Sequential; it has 1 Linear; Linear layers take"
    ):
        similarity(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.filterwarnings("ignore")  # PyTorch is about to drop TorchScript
def test_what_is_no_model_of_plain_layers_is_told_how_it_is_compared():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 8, 3)))
    with pytest.raises(ValueError, match=r"no convolution found .* is compared as similarity\(model.state_dict\(\)\)"):
        similarity(scripted)
    assert [layer.name for layer in similarity(scripted.state_dict()).layers] == ["0.weight"]
    with pytest.raises(ValueError, match=r"but no floating-point .*; pass one of what it holds: 'state_dict', 'ema'"):
        similarity({"epoch": 3, "state_dict": {"a": WEIGHT}, "ema": nn.Conv2d(4, 8, 3)})


@pytest.mark.parametrize("plain_too", [False, True])
def test_a_lazy_module_does_not_stop_the_others(plain_too):
    lazy = nn.LazyConv2d(8, 3)
    if plain_too:
        found = similarity(nn.Sequential(lazy, nn.Conv2d(8, 8, 3)))
        assert [layer.name for layer in found.layers] == ["1"]
        assert found.skipped == (("0", "is not initialised yet"),)
    else:
        with pytest.raises(ValueError, match="no layer .* can be compared: skipped 1, is not initialised yet: 0"):
            similarity(nn.Sequential(lazy))


def test_weights_may_go_and_come_back_elsewhere():
    net = nn.Sequential(nn.Conv2d(4, 8, 3))
    found = similarity(net)
    net[0].weight.data = torch.randn(8, 4, 3, 3)
    torch.testing.assert_close(found.matrix(), similarity(net).matrix())
    del net
    with pytest.raises(ValueError, match="0: its weight is gone"):
        found.matrix()


def test_nothing_is_pictured_whose_similarities_mean_nothing():
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3))
    found = similarity(net)
    assert found["0"].elements == 1  # merge_ does merge them
    assert most_alike(found) == ["1"]


def test_not_a_number_and_infinity_are_looked_at():
    state = plain()
    state["0.weight"][2, 0, 0, 0] = math.nan
    state["0.weight"][3] = math.inf
    found = similarity(state)
    assert found["0.weight"].finite == 4
    assert found["0.weight"].pairs == 12


def test_tensors_of_a_distributed_class_are_named(tmp_path, capsys):
    distributed = pytest.importorskip("torch.distributed.tensor")
    if not torch.distributed.is_available() or torch.distributed.is_initialized():
        pytest.skip("needs a process group of its own")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 6, 3))
        net[0].weight = nn.Parameter(
            distributed.distribute_tensor(net[0].weight.detach(), mesh, [distributed.Shard(0)])
        )
        for target, name in ((net, "0"), (net.state_dict(), "0.weight")):
            found = similarity(target)
            assert len(found.layers) == 1
            ((key, why),) = found.skipped
            assert key == name
            assert "is a DTensor, of which this process holds a part" in why
        torch.save(net.state_dict(), tmp_path / "sharded.pt")
    finally:
        torch.distributed.destroy_process_group()
    main(["inspect", str(tmp_path / "sharded.pt"), "--no-pictures"])
    assert "is a DTensor, of which this process holds a part; look at the gathered weight: 0.weight" in (
        capsys.readouterr().out
    )


def test_readable_changes_nothing():
    weight = nn.Parameter(WEIGHT.clone())
    version = weight._version
    assert readable(weight).data_ptr() == weight.data_ptr()  # dense: no copy
    assert not readable(weight).requires_grad
    assert weight._version == version
    assert readable("a") == "its weight is a str, not a tensor"


def test_the_command_goes_on_whatever_lies_between_the_weights(tmp_path, capsys):
    odd = {f"odd.{index}": make() for index, (make, _) in enumerate((READ | SKIPPED).values())}
    cannot_be_saved = [
        f"odd.{[*READ, *SKIPPED].index(kind)}" for kind in ("wrapper", "freed", "nested", "huge and sparse")
    ]
    torch.save(plain() | {key: value for key, value in odd.items() if key not in cannot_be_saved}, tmp_path / "net.pt")
    main(["inspect", str(tmp_path / "net.pt"), "--no-pictures", "--skip-first", "0"])
    text = capsys.readouterr().out
    for name in ["0.weight", "1.weight", *(f"odd.{index}" for index in range(len(READ)))]:
        assert f"\n{name} " in text or f" {name}" in text
    assert "Would merging do anything here?" in text
    assert "Tensor" not in text.replace("NumPy", "")
