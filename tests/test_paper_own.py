"""What a fine-tuner brings: a network, data sets, a size, a learning rate, weights of a backbone, other thresholds."""

import dataclasses
import sys
import types

import numpy as np
import pytest
import torch
from paper_fixtures import TINY, write_npz
from torch import nn

from benchmarks.paper.__main__ import main
from benchmarks.paper.bench import Bench
from benchmarks.paper.config import BASELINE, FORWARD, RECOMMENDED, RESEEDED, Arm, Merging, Run
from benchmarks.paper.data import load
from benchmarks.paper.experiments import EXPERIMENTS, FINE_TUNE_ARMS, Options, recipes
from benchmarks.paper.forward_only import recipe_of
from benchmarks.paper.models import build
from benchmarks.paper.own import is_own, own_data
from benchmarks.paper.protocol import run_arm, train_backbone
from inmerge_fast import NoiseThreshold, QuantileThreshold, RankBudget

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")


class Net(nn.Module):
    """A backbone and a head, as users build them."""

    def __init__(self, classes, channels):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.backbone(x).flatten(1))


class Items(torch.utils.data.Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def items(count=24, shape=(1, 20, 20), seed=0, labels=None):
    draws = torch.Generator().manual_seed(seed)
    return Items(torch.rand(count, *shape, generator=draws), labels or [index % 3 for index in range(count)])


@pytest.fixture
def mine(monkeypatch):
    """A module of one's own, importable by name."""
    module = types.ModuleType("mine")
    module.net = Net
    module.data = lambda: {name: items(seed=seed) for seed, name in enumerate(("train", "val", "test"))}
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


def test_a_specification_is_told_from_names_and_paths():
    assert is_own("package.module:function")
    assert not any(map(is_own, ("timm:resnet18", "vgg8", "own.npz", "/data/x.npz", "C:/data", "mod:a.b", "digits")))


def test_ones_own_network_and_data(mine, tmp_path, capsys):
    data = load("mine:data")
    assert (data.name, data.task, data.labels, data.dims) == ("data", "multi-class", ("0", "1", "2"), 2)
    assert data.train.images.dtype == torch.uint8
    wanted = (mine.data()["val"].images * 255).round().byte()
    assert torch.equal(data.val.images, wanted)
    assert load("mine:data", size=32).test.images.shape == (24, 1, 32, 32)
    model = build("mine:net", data, 0)
    assert (model.channels, model.side) == (1, 20)
    main(["sweep-layers", "--quick", "--seeds", "1", "--processes", "1", "--device", "cpu", "--model", "mine:net",
          "--data", "mine:data", "--corruptions", "own", "--out", str(tmp_path)])  # fmt: skip
    assert "| baseline | recomputed | 1 |" in capsys.readouterr().out
    assert (tmp_path / "data-mine_net-quick-strong-decay.jsonl").exists()


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda classes, channels: nn.Linear(3, classes), r"it does not take images \(2, 1, 20, 20\)"),
        (lambda classes, channels: Net(classes + 1, channels), r"must give logits \(2, 3\) of 2 images, gave \(2, 4\)"),
        (lambda classes, channels: "net", "must give a torch.nn.Module, gave str"),
        (lambda classes: None, "called with classes=3 and channels=1 it raised TypeError"),
        (None, "mine has no function net"),
    ],
)
def test_a_network_that_does_not_fit_is_named(mine, net, message):
    mine.net = net
    with pytest.raises(ValueError, match=f"--model mine:net: {message}"):
        build("mine:net", load("mine:data"), 0)


def test_a_module_that_is_not_there_is_named(mine):
    with pytest.raises(ValueError, match=r"--data missing_module:f: missing_module cannot be imported"):
        load("missing_module:f")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (items(shape=(20, 20)), r"train\[0\]: a tensor must be \(channels, \[depth,\] H, W\), got \(20, 20\)"),
        (
            Items(torch.randn(24, 1, 20, 20), [0] * 24),
            r"train\[0\]: values must be in \[0, 1\], .* leave normalising out",
        ),
        (Items([torch.rand(1, 20, 20), torch.rand(1, 21, 20)], [0, 1]), r"train\[1\]: its image is \(1, 21, 20\)"),
        (Items(np.zeros((3, 20, 20), dtype=np.uint16), [0] * 3), r"train\[0\]: must be of 8 bits"),
        (items(labels=[0.5] * 24), "train: labels must be classes from 0 on"),
        (items(labels=[[0, 2]] * 24), "train: labels must be classes from 0 on"),
        (Items([], []), "train: must have a length above 0"),
        ([torch.rand(1, 20, 20)], r"train\[0\]: must be \(image, label\), got Tensor"),
        (items(shape=(3, 20, 20)), "the parts differ"),
        (items(labels=[0, 1] * 12), "val has class 2, train none above 1"),
    ],
)
def test_data_that_cannot_be_used_are_named(mine, train, message):
    whole = mine.data()
    mine.data = lambda: whole | {"train": train}
    with pytest.raises(ValueError, match=f"--data mine:data: {message}"):
        own_data("mine:data")


def test_data_of_several_labels_and_of_other_kinds(mine):
    image = pytest.importorskip("PIL.Image")
    colour = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)
    rows = [(image.fromarray(one), np.array([1, index % 2])) for index, one in enumerate(colour)]
    mine.data = lambda: dict.fromkeys(("train", "val", "test"), rows)
    data = own_data("mine:data")
    assert (data.task, data.channels) == ("multi-label", 3)
    assert torch.equal(data.train.images, torch.from_numpy(colour).permute(0, 3, 1, 2))
    mine.data = lambda: data
    assert own_data("mine:data") is data
    mine.data = lambda: {"train": rows}
    with pytest.raises(ValueError, match="must give a DataSet or a mapping with train, val, test, gave \\['train'\\]"):
        own_data("mine:data")


def test_images_of_a_file_are_resized(tmp_path):
    path = write_npz(tmp_path / "own.npz")
    usual, large, small = (load(str(path), size=size) for size in (None, 64, 7))
    assert large.train.images.shape == (24, 1, 64, 64)
    assert large.source == f"{usual.source}, resized from 28 to 64 px"
    # Averaged where they become smaller, and between its pixels' values where they become larger.
    assert small.val.images.float().std() < 0.3 * usual.val.images.float().std()
    assert (small.val.images.float().mean() - usual.val.images.float().mean()).abs() < 2
    assert large.val.images[3].min() >= usual.val.images[3].min()
    assert load(str(path), size=28).source == usual.source
    volumes = load(str(write_npz(tmp_path / "volumes.npz", shape=(12, 12, 12))), size=16)
    assert volumes.test.images.shape == (24, 1, 16, 16, 16)
    with pytest.raises(ValueError, match=r"of square images, got 64 for long with \(28, 20\)"):
        load(str(write_npz(tmp_path / "long.npz", shape=(28, 20))), size=64)


def test_weights_of_a_backbone_alone(mine, tmp_path):
    torch.manual_seed(3)
    trained = Net(5, 1)
    files = {"alone": trained.backbone.state_dict(), "named": {f"backbone.{key}": one for key, one
             in trained.backbone.state_dict().items()}}  # fmt: skip
    for name, state in files.items():
        torch.save(state, tmp_path / f"{name}.pt")
        model = build("mine:net", load("mine:data"), 0, tmp_path / f"{name}.pt")
        assert isinstance(model.net, Net)
        assert torch.equal(model.net.backbone[0].weight, trained.backbone[0].weight), name
        assert model.net.head.out_features == 3
        assert "the head starts at random" in model.loaded, model.loaded
    torch.save(nn.Conv2d(1, 9, 3).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: does not fit this model"):
        build("mine:net", load("mine:data"), 0, tmp_path / "other.pt")


def test_the_learning_rate_scales_the_whole_schedule():
    usual, other = recipes(Options()), recipes(Options(lr=0.005))
    for one, two in zip(usual, other, strict=True):
        assert two.high == 0.005
        assert two.middle / two.high == pytest.approx(one.middle / one.high)
        assert two.low / two.high == pytest.approx(one.low / one.high)
        assert one.name != two.name
    for name in ("fine-tune", "mamba", "table-chestxray14"):
        [(recipe, _)] = EXPERIMENTS[name](Options(lr=0.002)).groups
        assert recipe.high == 0.002, name
    lite = Options(model="efficientnet_lite0", lr=0.004, limit=50)
    assert (recipe_of(lite).high, recipe_of(lite).limit) == (0.004, 50)
    assert recipe_of(Options(model="efficientnet_lite0")).high == 0.02


def test_fine_tuning_has_the_settings_that_one_would_ask_for():
    [(recipe, arms)] = EXPERIMENTS["fine-tune"](Options(data="own.npz")).groups
    assert recipe.model == "efficientnet_lite0"
    assert arms == (BASELINE, RESEEDED, *FINE_TUNE_ARMS.values())
    lasting = [arm.merging.limit() for arm in arms if arm.merging is not None and arm.merging.lasting]
    assert lasting == [0.3, RankBudget(0.04), QuantileThreshold(0.02), NoiseThreshold(4.0)]
    assert [arm.label() for arm in arms[6:]] == [  # forward-only merging and what a standard regulariser does instead
        "forward-only merging, alpha 0.5, p 0.5", "noise like forward-only merging, alpha 0.5, p 0.5",
        "noise at the angle of forward-only merging, alpha 0.5, p 0.5",
        "DropConnect 0.2", "Dropout2d 0.2", "forward-only merging, alpha 0.5, p 0.5 + Dropout2d 0.1",
    ]  # fmt: skip
    [(_, fewer)] = EXPERIMENTS["fine-tune"](Options(data="own.npz", arms=("dropout", "paper"))).groups
    assert fewer == (BASELINE, RESEEDED, FINE_TUNE_ARMS["paper"], FINE_TUNE_ARMS["dropout"])
    with pytest.raises(ValueError, match="arms must be of paper, recommended, .* got best"):
        EXPERIMENTS["fine-tune"](Options(arms=("best",)))
    with pytest.raises(ValueError, match="budget is for merging that lasts, and in training alone"):
        EXPERIMENTS["fine-tune"](Options(in_validation=True))
    assert RECOMMENDED.label() == "RankBudget 0.04, alpha 0.8, p 0.3"
    with pytest.raises(ValueError, match="three kinds of threshold"):
        Merging(z=2.0, quantile=0.1)
    with pytest.raises(ValueError, match="budget is for merging that lasts"):
        dataclasses.replace(FORWARD, budget=0.1)


def test_thresholds_that_follow_the_layer_merge_as_they_say():
    """The share that a quantile asks for; with a budget at most a hundredth of those that look, and from the start."""
    bench = Bench(load("digits"), torch.device("cpu"), TINY.limit)
    backbone = train_backbone(TINY, bench, 0)

    def merging(setting):
        return run_arm(Run(TINY, Arm(setting), 0), bench, backbone)[0]["merging"]

    found = merging(Merging(quantile=0.25))
    assert 0.15 < found["passed"] < 0.35
    found = merging(Merging(budget=0.3, skip_first=0.0))
    assert 0 < found["passed"] < 0.02
    assert merging(Merging(quantile=0.0))["per_step"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep-layers", "--lr", "0"], "argument --lr: must be a number above 0, got '0'"),
        (["sweep-layers", "--lr", "nan"], "argument --lr: must be a number above 0, got 'nan'"),
        (["sweep-layers", "--size", "-1"], "argument --size: must be a whole number above 0"),
        (["sweep-layers", "--arms", "paper"], "argument --arms: is for fine-tune"),
        (["fine-tune", "--arms", "best"], "arms must be of paper"),
        (["sweep-layers", "--data", "nowhere.at:all"], "--data nowhere.at:all: nowhere.at cannot be imported"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path), "--root", str(tmp_path), "--device", "cpu", "--processes", "1"])
    assert message in capsys.readouterr().err
