"""What ``inmerge_fast.checkpoints`` reads, what it refuses and in which words, and that it runs nothing."""

import collections
import importlib
import json
import pathlib
import signal
import subprocess
import sys
import types
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import FILES, NET, OTHER, READ, STATE, Config, Harmful, saved, shards, table
from torch import nn

from inmerge_fast import similarity
from inmerge_fast.__main__ import main
from inmerge_fast.checkpoints.networks import networks_in, unwrapped
from inmerge_fast.checkpoints.read import read

pytest.importorskip("safetensors", reason="writes the files that are read")


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *map(str, arguments)])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("python -m inmerge_fast inspect: error: ")
    assert sum("error:" in line for line in lines) == 1
    return lines[-1]


def expected(name):
    """The tensors of a file that is read: the network's, but where a format keeps less or calls them otherwise."""
    if name == "ad.npy":
        return {"ad": STATE["0.weight"]}
    if name in ("j.pt", "k.pt"):
        return {str(index): value for index, value in enumerate(STATE.values())}
    return {f"model.{key}": value for key, value in STATE.items()} if name == "l.ckpt" else STATE


@pytest.mark.parametrize(("what", "name", "write", "outcome"), FILES, ids=[name for _, name, _, _ in FILES])
def test_each_file_is_read_or_refused_in_one_line_that_says_what_it_is(
    what, name, write, outcome, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    write(path)
    if outcome == READ:
        network = read(path).network()
        assert network.tensors.keys() == expected(name).keys()
        for key, value in expected(name).items():
            torch.testing.assert_close(torch.as_tensor(network.tensors[key]), value, rtol=0, atol=0, check_dtype=False)
        assert similarity(network.tensors, layouts=network.layouts).layers
    else:
        message = refusal([path, "--no-pictures"], capsys)
        assert outcome in message
        assert str(path) in message
    assert not Path("harmed").exists()


def test_the_table_of_formats_is_that_of_the_files_that_are_tried():
    path = Path(__file__).parents[1] / "benchmarks" / "paper" / "FORMATS.md"
    assert path.read_text() == table(), "python tests/checkpoint_files.py remakes it"


# ------------------------------------------------------------------------------------------------------ which network


def test_names_come_before_sizes_and_optimizers_never():
    big = {f"{i}.weight": torch.randn(64, 8, 3, 3) for i in range(9)}
    content = {"teacher": big, "state_dict": STATE, "optimizer": {"m": big}, "G_optimizer": big, "lr_scheduler": big,
               "scaler": big, "opt": big, "grads": big}  # fmt: skip
    assert [network.entry for network in networks_in(content)] == ["state_dict", "teacher"]
    content = {"a": STATE, "b": big}
    assert [network.entry for network in networks_in(content)] == ["b", "a"]
    content = {"model": {"weight": torch.ones(3)}, "features": STATE}
    assert networks_in(content)[0].entry == "features"  # weights of convolutions before a name


@pytest.mark.parametrize(
    "moment",
    ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "exp_inf"],
)
def test_moments_are_no_weights_wherever_they_lie(moment):
    content = {**STATE, f"state.0.weight.{moment}": torch.ones(8, 3, 3, 3), moment: torch.ones(8, 3, 3, 3)}
    (network,) = networks_in(content)
    assert network.tensors.keys() == STATE.keys()
    assert network.optimizer == 2
    assert networks_in({"state": {0: {moment: torch.ones(8, 3, 3, 3)}}}) == []


def test_a_network_whose_name_only_resembles_an_optimizers_is_one():
    names = ["upscaler", "options_net", "optical_flow"]
    assert {network.entry for network in networks_in(dict.fromkeys(names, STATE))} == set(names)


def test_several_networks_are_listed_and_chosen(tmp_path, capsys):
    path = tmp_path / "gan.pt"
    torch.save({"generator": STATE, "discriminator": OTHER, "nets": {"a": STATE, "b": OTHER}}, path)
    main(["inspect", str(path), "--no-pictures"])
    out = capsys.readouterr().out
    assert "entry 'generator'" in out
    assert "for --entry: 'discriminator' (9), 'nets.a' (9), 'nets.b' (9)" in out
    main(["inspect", str(path), "--no-pictures", "--entry", "discriminator"])
    assert "entry 'discriminator'" in capsys.readouterr().out
    assert torch.equal(read(path).network("discriminator").tensors["0.weight"], OTHER["0.weight"])
    both = read(path).network("nets")
    assert torch.equal(both.tensors["b.0.weight"], OTHER["0.weight"])
    assert len(both.tensors) == 18
    assert "no entry 'x' with weights in it; there are 'generator'" in refusal([path, "--entry", "x"], capsys)


def test_prefixes_go_only_where_all_have_them_and_no_two_keys_become_one():
    assert unwrapped(["module.a", "module.b"]) == {"module.a": "a", "module.b": "b"}
    assert unwrapped(["n_averaged", "module.module.a"]) == {"module.module.a": "a"}
    assert unwrapped(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}
    assert unwrapped(["a._orig_mod.b", "c"]) == {"a._orig_mod.b": "a.b", "c": "c"}
    assert unwrapped(["_orig_mod.a", "a"]) == {"_orig_mod.a": "_orig_mod.a", "a": "a"}
    assert unwrapped(["n_averaged", "a"]) == {"n_averaged": "n_averaged", "a": "a"}


def test_pickles_that_hold_themselves_end():
    loop = {"model": STATE}
    loop["self"] = loop
    assert [network.entry for network in networks_in(loop)] == ["model"]


# ------------------------------------------------------------------------------------------------ what else a file says


def test_whole_models_say_what_their_convolutions_are(tmp_path):
    torch.save(NET, tmp_path / "net.pt")
    network = read(tmp_path / "net.pt").network()
    assert network.layouts == {"0.weight": (1, False), "2.weight": (2, True)}
    found = similarity(network.tensors, layouts=network.layouts)
    live = similarity(NET)
    assert [layer.groups for layer in found.layers] == [1, 2]
    assert [layer.mean for layer in found.layers] == [layer.mean for layer in live.layers]


def test_classes_are_neither_loaded_nor_run(tmp_path, monkeypatch):
    """Not even those that are there: their ``__setstate__`` could do anything."""
    monkeypatch.setattr(Config, "__setstate__", lambda self, state: pytest.fail("was run"), raising=False)
    torch.save({"model": STATE, "config": Config()}, tmp_path / "c.pt")
    name = f"{Config.__module__}.{Config.__qualname__}"  # of many that are allowed by one name the reader takes any
    with torch.serialization.safe_globals([(type(f"Config{i}", (Config,), {}), name) for i in range(50)]):
        before = torch.serialization.get_safe_globals()
        assert read(tmp_path / "c.pt").network().entry == "model"
        assert set(torch.serialization.get_safe_globals()) == set(before)  # what was allowed is as it was


@pytest.mark.filterwarnings("ignore")  # NumPy is about to drop its matrices
@pytest.mark.parametrize("zipped", [True, False])
def test_what_people_keep_beside_their_weights_is_read(zipped, tmp_path, monkeypatch):
    """Arrays of NumPy's own kinds, types, enumerations; paths as Python 3.13 pickles them."""
    monkeypatch.setattr(pathlib.PosixPath, "__module__", "pathlib._local")
    monkeypatch.setitem(sys.modules, "pathlib._local", pathlib)
    rows = np.zeros(2, dtype=[("a", "i4")])
    kept = {
        "matrix": np.matrix([[1.0]]), "rows": rows.view(np.recarray),
        "mapped": np.memmap(tmp_path / "m", "f4", "w+", 0, 3),
        "none": type(None), "either": int | None, "noted": typing.Annotated[int, 1], "list": list[int],
        "signal": signal.SIGINT, "path": pathlib.PosixPath("a"),
    }  # fmt: skip
    for name, value in kept.items():
        torch.save({"model": STATE, name: value}, tmp_path / "kept.pt", _use_new_zipfile_serialization=zipped)
        assert read(tmp_path / "kept.pt").network().entry == "model", name


def test_the_class_that_stands_in_the_way_of_a_file_without_a_zip_is_named(tmp_path, capsys):
    content = {"module": collections.OrderedDict(STATE), "epoch": 1, "net": nn.Conv2d(3, 8, 3)}
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    message = refusal([tmp_path / "old.pt", "--no-pictures"], capsys)
    assert "an object of the class torch.nn.modules.conv.Conv2d with its source code" in message


def test_addresses_and_parts_of_distributed_checkpoints(tmp_path, capsys):
    message = refusal(["https://example.org/net.pth", "--no-pictures"], capsys)
    assert "https://example.org/net.pth: an address, not a file; download it" in message
    saved(STATE)(tmp_path / "__0_0.distcp")
    message = refusal([tmp_path / "__0_0.distcp", "--no-pictures"], capsys)
    assert f"a part of a distributed checkpoint; name its folder, {tmp_path}" in message


def test_one_tensor_of_an_unknown_dtype_does_not_stop_the_others(tmp_path, capsys):
    values = np.random.default_rng(0).standard_normal((4, 3, 3)).astype(np.float32)
    data = values.tobytes()
    header = {"b": {"dtype": "F4", "shape": [8, 2, 2], "data_offsets": [len(data), len(data) + 16]},
              "a": {"dtype": "F32", "shape": [4, 3, 3], "data_offsets": [0, len(data)]}}  # fmt: skip
    text = json.dumps(header).encode()
    path = tmp_path / "f4.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data + bytes(16))
    network = read(path).network()
    assert torch.equal(network.tensors["a"], torch.from_numpy(values))
    assert network.skipped == (("b", "has dtype F4, which PyTorch does not have"),)
    main(["inspect", str(path), "--no-pictures"])
    assert "skipped 1, has dtype F4, which PyTorch does not have: b" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
                                   torch.int8, torch.int64, torch.bool, torch.uint16, torch.complex64])  # fmt: skip
def test_safetensors_of_every_dtype_are_those_of_the_package(dtype, tmp_path):
    from safetensors.torch import load_file, save_file

    save_file({"a": torch.randn(4, 3).to(dtype), "b": torch.zeros(0, 3, dtype=dtype)}, tmp_path / "a.safetensors")
    own, theirs = read(tmp_path / "a.safetensors").network().tensors, load_file(tmp_path / "a.safetensors")
    for key in theirs:
        assert own[key].dtype == dtype
        assert torch.equal(own[key].view(torch.uint8), theirs[key].view(torch.uint8))


def test_safetensors_files_have_their_layers_in_order_again(tmp_path):
    from safetensors.torch import save_file

    save_file({f"layers.{i}.weight": torch.randn(4, 3, 3) for i in range(12)}, tmp_path / "a.safetensors")
    assert list(read(tmp_path / "a.safetensors").network().tensors) == [f"layers.{i}.weight" for i in range(12)]


def test_an_index_cannot_lead_out_of_its_folder_and_lacks_nothing(tmp_path, capsys):
    shards(tmp_path / "net")
    index = tmp_path / "net" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    assert read(index).network().tensors.keys() == STATE.keys()
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "names '../secret.safetensors' as a file beside it" in refusal([index], capsys)
    content["weight_map"]["gone.weight"] = content["weight_map"]["0.weight"]
    index.write_text(json.dumps(content))
    assert "its shards lack 1 of its tensors, as 'gone.weight'" in refusal([index], capsys)


def test_no_permission_and_no_regular_file(tmp_path, capsys, monkeypatch):
    import os

    path = tmp_path / "net.pt"
    torch.save(STATE, path)
    opened = Path.open

    def refuse(self, *arguments, **options):
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)  # root may open everything
    assert f"{path}: cannot be opened: Permission denied" in refusal([path, "--no-pictures"], capsys)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.pt")
        assert "not a regular file" in refusal([tmp_path / "pipe.pt", "--no-pictures"], capsys)
    assert "cannot be opened" in refusal(["x" * 5000 + ".pt", "--no-pictures"], capsys)


@pytest.mark.parametrize("script", [False, True])
@pytest.mark.filterwarnings("ignore")  # PyTorch is about to drop TorchScript
def test_a_damaged_byte_is_found(script, tmp_path, capsys):
    path = tmp_path / "net.pt"
    torch.jit.script(NET).save(path) if script else torch.save(STATE, path)
    content = path.read_bytes()
    at = content.index(STATE["0.weight"].numpy().tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
    assert "it is damaged: BadZipFile: Bad CRC-32" in refusal([path, "--no-pictures"], capsys)


def test_files_may_have_no_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "net.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read(tmp_path / "net.pt").network().tensors["0.weight"], STATE["0.weight"])


# -------------------------------------------------------------------------------------------------- names and packages


def test_names_of_the_hub(monkeypatch, tmp_path, capsys):
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    asked = []

    def download(name, file):
        asked.append((name, file))
        return str(tmp_path / file)

    hub = types.SimpleNamespace(
        list_repo_files=lambda name: ["README.md", "pytorch_model.bin"], hf_hub_download=download
    )
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: hub if name == "huggingface_hub" else
                        None if name == "timm" else real(name))  # fmt: skip
    imported = importlib.import_module
    monkeypatch.setattr("importlib.import_module", lambda name: hub if name == "huggingface_hub" else imported(name))
    main(["inspect", "hf-hub:owner/net", "--no-pictures"])
    assert "9 tensors" in capsys.readouterr().out
    main(["inspect", "timm/net", "--no-pictures"])  # without timm, the file of weights alone
    assert asked == [("owner/net", "pytorch_model.bin"), ("timm/net", "pytorch_model.bin")]
    hub.list_repo_files = lambda name: ["README.md"]
    assert "no file of weights of a usual name in it; it has README.md" in refusal(["hf-hub:owner/net"], capsys)

    def offline(name):
        raise ConnectionError("Cannot reach the hub.\nA long story.")

    hub.list_repo_files = offline
    hub.try_to_load_from_cache = lambda name, file: str(tmp_path / file) if file == "pytorch_model.bin" else None
    main(["inspect", "hf-hub:owner/net", "--no-pictures"])
    assert "9 tensors" in capsys.readouterr().out
    hub.try_to_load_from_cache = lambda name, file: None
    assert "cannot be had from the Hugging Face hub: Cannot reach the hub." in refusal(["hf-hub:owner/net"], capsys)
    hub = None
    assert "needs huggingface_hub: pip install huggingface_hub" in refusal(["hf-hub:owner/net"], capsys)


def test_paths_that_are_none_are_not_asked_of_the_hub(capsys):
    assert "there is no file 'runs/net'" in refusal(["runs/net"], capsys)


def test_onnx_files_are_read_in_the_order_of_their_graph(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: its absence is tested below")
    torch.manual_seed(0)
    weights = {"z": torch.randn(8, 3, 3, 3), "a": torch.randn(8, 1, 3, 3), "m": torch.randn(8, 2, 3, 3)}
    nodes = [
        onnx.helper.make_node("Conv", ["x", "z"], ["1"]),
        onnx.helper.make_node("Conv", ["1", "a"], ["2"], group=8),
        onnx.helper.make_node("ConvTranspose", ["2", "m"], ["3"], group=2),
    ]
    weights["constant"] = torch.ones(2, 3, 4)
    stored = [onnx.numpy_helper.from_array(value.numpy(), key) for key, value in sorted(weights.items())]
    graph = onnx.helper.make_graph(nodes, "net", [], [], stored)
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "net.bin"))
    network = read(tmp_path / "net.bin").network()
    assert list(network.tensors) == ["z", "a", "m"]
    assert network.layouts == {"z": (1, False), "a": (8, False), "m": (2, True)}
    found = similarity(network.tensors, layouts=network.layouts)
    assert [(layer.name, layer.groups) for layer in found.layers] == [("z", 1), ("m", 2)]
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "net.bin").read_bytes()[:500])
    with pytest.raises(ValueError, match="an ONNX file that cannot be read"):
        read(tmp_path / "cut.onnx")


def test_without_onnx_the_package_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "net.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnx" else real(name))
    assert "to read it onnx must be installed: pip install onnx" in refusal([tmp_path / "net.onnx"], capsys)

    torch.save({f"{i}.weight": torch.randn(4, 3, 3, 3) for i in range(400)}, tmp_path / "many.pt")
    command = f"{sys.executable} -m inmerge_fast inspect {tmp_path / 'many.pt'} --no-pictures | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert "many.pt" in done.stdout
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize(
    ("to", "code", "words"), [("> /dev/full", 1, "standard output: No space left"), (">&-", 0, "")]
)
def test_output_that_nobody_can_write_to(to, code, words, tmp_path):
    saved(STATE)(tmp_path / "net.pt")
    command = f"{sys.executable} -m inmerge_fast inspect {tmp_path / 'net.pt'} --no-pictures {to}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == code
    assert words in done.stderr
    assert done.stderr.count("\n") == bool(words)


def test_who_stops_the_command_sees_no_traceback(tmp_path, monkeypatch, capsys):
    saved(STATE)(tmp_path / "net.pt")

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("inmerge_fast.inspection.command.similarity", stopped)
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(tmp_path / "net.pt"), "--no-pictures"])
    assert end.value.code == 130
    assert capsys.readouterr().err == ""


def test_a_lazy_module_is_not_initialised(tmp_path, capsys):
    torch.save(nn.LazyConv2d(3, 3).state_dict(), tmp_path / "lazy.pt")
    assert "UninitializedParameter, without values: weight, bias" in refusal([tmp_path / "lazy.pt"], capsys)
    saved({"a": nn.LazyConv2d(3, 3).state_dict()["weight"], **STATE})(tmp_path / "some.pt")
    main(["inspect", str(tmp_path / "some.pt"), "--no-pictures"])
    assert "without values: a" in capsys.readouterr().out


def test_harmful_is_what_it_says(tmp_path, monkeypatch):
    """The file of the tests above would do harm where it were loaded as it asks for."""
    monkeypatch.chdir(tmp_path)
    torch.save(Harmful(), "x.pt")
    torch.load("x.pt", weights_only=False)
    assert Path("harmed").exists()
