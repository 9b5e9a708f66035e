"""``python -m inmerge_fast inspect``: what it reads, what it refuses, and what its pictures show."""

import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from inmerge_fast import similarity
from inmerge_fast.__main__ import main
from inmerge_fast.checkpoints.read import read
from inmerge_fast.inspection import most_alike
from inmerge_fast.inspection.command import load_weights
from inmerge_fast.inspection.outputs import describe, write_pictures

pictures = pytest.importorskip(
    "inmerge_fast.inspection.pictures", reason="needs matplotlib and scipy", exc_type=ImportError
)


def small_net():
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 20, 1), nn.Conv1d(20, 9, 4), nn.Conv3d(2, 6, 2),
        nn.Linear(4, 5),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight[7] = 2 * net[0].weight[3] + 0.01 * torch.randn(3, 3, 3)
    return net


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(small_net().state_dict(), tmp_path / "net.pt")
    return str(tmp_path / "net.pt")


def test_the_command_prints_tables_and_writes_pictures(checkpoint, tmp_path, capsys):
    main(["inspect", checkpoint, "--output", str(tmp_path / "out")])
    text = capsys.readouterr().out
    for name in ("0.weight", "2.weight", "3.weight", "4.weight"):
        assert text.count(f"\n{name} ") == 2
    assert "1.weight" not in text
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"histograms-1.png", "merge-rates.png", "heat-map-0.weight.png", "pairs-0.weight.png"} < set(written)
    assert len(written) == 2 + 2 * 3
    for path in (tmp_path / "out").iterdir():
        assert str(path) in text
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_options(checkpoint, tmp_path, capsys):
    main(["inspect", checkpoint, "--output", str(tmp_path / "out"), "--layer", "3.weight", "--include-linear"])
    assert "\n5.weight " in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "histograms-1.png", "merge-rates.png", "heat-map-3.weight.png", "pairs-3.weight.png",
    }  # fmt: skip
    main(["inspect", checkpoint, "--output", str(tmp_path / "none"), "--no-pictures"])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("content", "entry"),
    [
        (lambda state: state, ""),
        (lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {0: torch.ones(9)}}}, "state_dict"),
        (lambda state: {"trainer": {"model": state}, "lr": torch.tensor(0.1)}, "trainer.model"),
    ],
)
def test_state_dicts_are_found_in_checkpoints(content, entry, tmp_path):
    state = small_net().state_dict()
    torch.save(content(state), tmp_path / "c.ckpt")
    found, title = load_weights(str(tmp_path / "c.ckpt"))
    assert found.tensors.keys() == state.keys()
    assert (f"entry {entry!r}" in title) is bool(entry)


@pytest.mark.parametrize("kind", ["a tree", "a tree of arrays", "an archive"])
def test_kernels_of_jax_and_tensorflow_have_their_filters_last(kind, tmp_path):
    weight = torch.randn(8, 4, 3, 5)
    kernel = weight.permute(2, 3, 1, 0).contiguous()
    tree = {"conv": {"kernel": kernel if kind == "a tree" else kernel.numpy(), "bias": torch.zeros(8)}}
    if kind == "an archive":
        np.savez(tmp_path / "net.npz", **{"net/conv/kernel": kernel.numpy(), "net/dense/kernel": np.zeros((4, 4))})
        network = read(tmp_path / "net.npz").network()
    else:
        torch.save({"params": tree}, tmp_path / "net.pt")
        network = read(tmp_path / "net.pt").network()
    key = next(iter(network.tensors))
    assert torch.equal(network.tensors[key], weight)
    assert similarity(network.tensors).layers[0].filters == 8


@pytest.mark.filterwarnings("ignore")  # PyTorch is about to drop TorchScript
def test_frozen_torchscript_has_no_parameters(tmp_path):
    torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3)).eval())).save(tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"TorchScript module without parameters, as torch\.jit\.freeze makes"):
        read(tmp_path / "net.pt")


def test_safetensors_files_are_read(tmp_path):
    files = pytest.importorskip("safetensors.torch")
    files.save_file(small_net().state_dict(), tmp_path / "net.safetensors")
    assert load_weights(str(tmp_path / "net.safetensors"))[0].tensors.keys() == small_net().state_dict().keys()


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_pickles_that_call_functions_are_refused_and_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": small_net().state_dict(), "extra": Harmful()}, "harmful.pt")
    message = refusal(["harmful.pt"], capsys)
    assert "it asks for pathlib.Path.touch" in message
    assert "can run any code" in message
    assert "save model.state_dict() instead" in message
    Path("old.pt").write_bytes(pickle.dumps(Harmful(), protocol=2))
    assert "old.pt: " in refusal(["old.pt"], capsys)
    assert not Path("harmed").exists()


def test_what_cannot_be_read_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no file 'gone.pt'" in refusal(["gone.pt"], capsys)
    Path("noise.pt").write_bytes(b"no checkpoint at all")
    assert "noise.pt: " in refusal(["noise.pt"], capsys)
    torch.save([1, 2], "list.pt")
    assert "no state dict in it, a list" in refusal(["list.pt"], capsys)
    torch.save({"bias": torch.ones(3)}, "bias.pt")
    assert "no floating-point tensor of 3 dimensions" in refusal(["bias.pt"], capsys)
    torch.save(small_net().state_dict(), "net.pt")
    assert "--layer: no layer 'x'; there are '0.weight'" in refusal(["net.pt", "--layer", "x"], capsys)


def test_timm_models_by_name(monkeypatch, tmp_path, capsys):
    timm = pytest.importorskip("timm", reason="timm is not installed: its absence is tested below")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: small_net())
    main(["inspect", "some_net", "--output", str(tmp_path)])
    assert "timm model some_net" in capsys.readouterr().out


def test_names_without_timm_say_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "for a timm model timm must be installed: pip install timm" in refusal(["resnet34"], capsys)


def test_a_model_object_knows_its_groups_and_transposition(monkeypatch, tmp_path, capsys):
    """What a state dict cannot say; through the path of timm models."""
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(4, 6, 3))
    fake = types.SimpleNamespace(create_model=lambda name, pretrained: net)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.import_module", lambda name: fake)
    main(["inspect", "net", "--output", str(tmp_path)])
    assert (tmp_path / "pairs-0.png").is_file()
    found = similarity(net)
    assert found["0"].groups == 2
    assert found["1"].filters == 6


def test_without_matplotlib_the_table_is_printed_and_the_extra_named(checkpoint, monkeypatch, capsys, tmp_path):
    """Pictures that somebody asked for are an error; those of the default a line."""
    monkeypatch.setitem(sys.modules, "inmerge_fast.inspection.pictures", None)
    monkeypatch.delattr("inmerge_fast.inspection.pictures", raising=False)
    monkeypatch.chdir(tmp_path)
    main(["inspect", checkpoint])
    printed = capsys.readouterr().out
    assert "0.weight" in printed
    assert "no pictures: " in printed
    assert "pip install 'inmerge_fast[plots]'" in printed
    assert not list(tmp_path.glob("similarity-*"))
    for asked in (["--output", "pictures"], ["--layer", "0.weight"]):
        with pytest.raises(SystemExit):
            main(["inspect", checkpoint, *asked])
        captured = capsys.readouterr()
        assert "0.weight" in captured.out
        assert "pip install 'inmerge_fast[plots]'" in captured.err


def test_importing_the_package_imports_neither_matplotlib_nor_scipy():
    command = "import inmerge_fast.inspection.command"
    code = f"import sys; {command}; print({{'matplotlib', 'scipy', 'timm'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[1])  # fmt: skip
    assert done.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------------------------ the pictures


def test_example_pairs_are_the_most_similar_half_as_similar_and_unlike_ones():
    matrix = np.array(
        [[1.0, 0.9, 0.1, 0.44], [0.9, 1.0, -0.02, 0.3], [0.1, -0.02, 1.0, np.nan], [0.44, 0.3, np.nan, 1]]
    )
    assert pictures.example_pairs(matrix) == [(0, 1, 0.9), (0, 3, 0.44), (1, 2, -0.02)]
    assert pictures.example_pairs(np.full((3, 3), np.nan)) == []
    assert len(pictures.example_pairs(np.ones((2, 2)))) == 1


def test_clustering_makes_similar_filters_neighbours():
    rng = np.random.default_rng(0)
    cluster = rng.permutation(np.repeat(range(4), 6))
    directions = np.linalg.qr(rng.standard_normal((50, 4)))[0].T
    rows = directions[cluster] + 0.03 * rng.standard_normal((24, 50))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    order = pictures.clustered_order(rows @ rows.T)
    assert sorted(order) == list(range(24))
    assert (np.diff(cluster[order]) != 0).sum() == 3
    assert sorted(pictures.clustered_order(np.full((3, 3), np.nan))) == [0, 1, 2]


def test_bars_hold_every_pair_and_curves_are_the_merge_rates():
    net = small_net()
    found = similarity(net)
    (figure,) = pictures.histograms(found)
    for ax, layer in zip(figure.axes, found.layers, strict=True):
        (bars,) = ax.patches
        assert bars.get_data().values.sum() == layer.pairs
        assert ax.get_title().startswith(layer.name)
    left, right = pictures.merge_rates(found).axes[:2]
    for line, layer in zip(left.lines, found.layers, strict=False):
        x, y = line.get_data()
        place = int(np.searchsorted(x, 0.05 - 1e-9))
        assert np.nan_to_num(y[place]) == pytest.approx(layer.share_above(0.05))
    for line, layer in zip(right.lines, found.layers, strict=False):
        assert np.nan_to_num(line.get_data()[1][13000]) == pytest.approx(layer.share_above(0.3, "nearest"))


def test_pairs_are_drawn_divided_by_their_norms_a_tile_per_channel():
    net = small_net()
    found = similarity(net)
    figure = pictures.filter_pairs("0", list(net[0].weight), found.matrix("0"))
    part = figure.subfigs[0]
    assert part.get_suptitle() == f"3 and 7: similarity {found['0'].max:.4f}"
    first, second = (ax.images[0].get_array() for ax in part.axes)
    assert np.abs(first - second).max() < 0.1  # the twin is twice as long
    kernel = (net[0].weight[3] / net[0].weight[3].norm()).detach().numpy()
    np.testing.assert_allclose(first[:3, :3], kernel[0], atol=1e-6)
    assert np.ma.masked_invalid(first)[3].mask.all()  # the gap
    *drawn, bar = figure.subfigs
    [low, high] = bar.axes[0].get_ylim()
    assert {image.get_clim() for part in drawn for ax in part.axes for image in ax.images} == {(low, high)}
    assert 0 < high == -low < 1
    for index, shape in ((2, (12, 1, 1)), (3, (20, 4)), (4, (2, 2, 2, 2))):
        assert pictures.filter_pairs("x", list(net[index].weight), found.matrix(str(index))).subfigs, shape


def test_many_layers_take_several_pages_and_a_colour_bar():
    net = nn.Sequential(*(nn.Conv2d(2, 4, 3) for _ in range(26)))
    found = similarity(net)
    assert [len(figure.axes) for figure in pictures.histograms(found)] == [24, 2]
    assert len(pictures.merge_rates(found).axes) == 3


def test_layers_without_a_finite_pair_are_left_out(tmp_path):
    found = similarity(torch.full((4, 3), float("nan")))
    assert most_alike(found) == []
    assert write_pictures(found, [], tmp_path) == []
    assert "Tensor" in describe(found)


def test_the_demos_own_checkpoint_can_be_inspected(tmp_path, capsys):
    pytest.importorskip("sklearn")
    path = tmp_path / "demo.pt"
    brief = ["--quick", "--epochs", "1", "--backbone-epochs", "1", "--device", "cpu"]
    main([*brief, "--save", str(path)])
    assert f"python -m inmerge_fast inspect {path}" in capsys.readouterr().out
    main(["inspect", str(path), "--no-pictures"])
    assert "\nconv8.weight " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*brief, "--save", str(tmp_path / "gone" / "demo.pt")])
    assert "--save: there is no folder" in capsys.readouterr().err
