"""MedMNIST-C's package as a source of corruptions: a stand-in of its layout, and the package itself where it is."""

import importlib.util
import random
import sys
import textwrap

import numpy as np
import pytest
import torch
from paper_fixtures import write_npz

from benchmarks.paper import medmnist_c, protocol, robustness
from benchmarks.paper.__main__ import main
from benchmarks.paper.storage import runs_of

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

REGISTRY = '''
import random
import numpy as np

class Darker:
    severity_params = [0.9, 0.7, 0.5, 0.3, 0.1]
    def apply(self, img, severity=-1):
        assert img.mode == "RGB"
        return (np.array(img) * self.severity_params[severity]).astype(np.uint8)

class Noise:
    """Draws from all three generators that the package draws from."""
    def apply(self, img, severity=-1):
        pixels = np.array(img) / 255.0
        noise = np.random.normal(size=pixels.shape) + self.rng.normal() + random.random()
        return (np.clip(pixels + 0.1 * (severity + 1) * noise, 0, 1) * 255).astype(np.uint8)

class Decoded:
    """As the package's motion blur decodes what ImageMagick gives it."""
    def apply(self, img, severity=-1):
        return np.fromstring(img.tobytes(), np.uint8).reshape(*img.size, 3)

class Large:
    def apply(self, img, severity=-1):
        return np.array(img)[: random.randint(10, img.size[0] - 100)]

class Numbers:
    def apply(self, img, severity=-1):
        return np.array(img)[..., 0].astype(np.float32) * 300

class Cut:
    def apply(self, img, severity=-1):
        return np.array(img)[:, :3]

CORRUPTIONS_DS = {
    "pneumoniamnist": {"darker": Darker(), "noise": Noise(), "decoded": Decoded()},
    "pathmnist": {"darker": Darker()},
    "chestmnist": {"darker": Darker()},
    "bloodmnist": {"darker": Darker(), "large": Large()},
    "octmnist": {"cut": Cut(), "numbers": Numbers()},
}
DATASET_RGB = {"pneumoniamnist": False, "pathmnist": True, "chestmnist": False, "bloodmnist": True, "octmnist": False}
'''


def forget_package(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "medmnistc"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package medmnistc 9.9 with the parts of the real one that are used."""
    folder = tmp_path / "site" / "medmnistc" / "corruptions"
    folder.mkdir(parents=True)
    for path in (folder.parent / "__init__.py", folder / "__init__.py"):
        path.touch()
    (folder / "registry.py").write_text(textwrap.dedent(REGISTRY))
    about = tmp_path / "site" / "medmnistc-9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: medmnistc\nVersion: 9.9\n")
    forget_package(monkeypatch)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    forget_package(monkeypatch)


def some_images(channels=1, side=16, count=4):
    return torch.randint(60, 196, (count, channels, side, side), generator=torch.Generator().manual_seed(0)).byte()


def test_its_corruptions_are_applied_as_it_does(package):
    assert medmnist_c.names("pneumoniamnist_64") == ("darker", "noise", "decoded")
    assert medmnist_c.names("chestxray14_224") == ("darker",)  # ChestMNIST is made of its images
    for channels, data in ((1, "pneumoniamnist"), (3, "pathmnist")):
        images = some_images(channels)
        for severity, factor in ((1, 0.9), (5, 0.1)):
            out = medmnist_c.corrupt(images, data, "darker", severity)
            assert out.dtype == torch.uint8
            assert torch.equal(out, (images.double() * factor).to(torch.uint8))
    assert torch.equal(medmnist_c.corrupt(some_images(), "pneumoniamnist", "decoded", 1), some_images())


def test_random_ones_repeat_and_leave_the_generators_alone(package):
    images = some_images()
    random.seed(1)
    np.random.seed(2)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(2)
    first = medmnist_c.corrupt(images, "pneumoniamnist", "noise", 3)
    assert (random.random(), np.random.rand()) == expected
    assert torch.equal(first, medmnist_c.corrupt(images, "pneumoniamnist", "noise", 3))
    assert torch.equal(first[:2], medmnist_c.corrupt(images[:2], "pneumoniamnist", "noise", 3))
    assert not torch.equal(first, medmnist_c.corrupt(images, "pneumoniamnist", "noise", 4))


def test_what_cannot_be_used_is_named(package):
    medmnist_c.check(some_images(), "pneumoniamnist")
    with pytest.raises(ValueError, match="no corruptions for 'digits', only for pneumoniamnist, pathmnist"):
        medmnist_c.names("digits")
    with pytest.raises(
        ValueError, match=r"large at severity 1 fails on images of 28x28 \(empty range.*--corruptions own"
    ):
        medmnist_c.check(some_images(3, 28), "bloodmnist")
    with pytest.raises(
        ValueError, match=r"cut at severity 1 fails on images of 28x28 \(it gives images of shape \(28, 3"
    ):
        medmnist_c.check(some_images(1, 28), "octmnist")
    with pytest.raises(ValueError, match=r"takes grey images for this set, got images of shape \(3, 16, 16\)"):
        medmnist_c.check(some_images(3), "pneumoniamnist")
    with pytest.raises(ValueError, match=r"takes coloured images .* \(1, 16, 16\)"):
        medmnist_c.check(some_images(), "pathmnist")
    with pytest.raises(ValueError, match=r"takes grey images .* \(1, 8, 8, 8\)"):
        medmnist_c.check(torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8), "pneumoniamnist")


@pytest.mark.parametrize("how", ["missing", "torchvision does not fit"])
def test_without_the_package_the_error_says_what_to_install(monkeypatch, package, tmp_path, how):
    if how == "missing":
        monkeypatch.setitem(sys.modules, "medmnistc", None)
    else:
        registry = tmp_path / "site" / "medmnistc" / "corruptions" / "registry.py"
        registry.write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(ValueError, match=r"medmnistc cannot be imported .*pip install --no-deps.*ImageMagick"):
        medmnist_c.names("pneumoniamnist")


def run(tmp_path, capsys, data, *more):
    data = write_npz(tmp_path / f"{data}.npz")
    arguments = ["sweep-layers", "--quick", "--data", str(data), "--out", str(tmp_path / "results"), "--device", "cpu"]
    main([*arguments, "--seeds", "1", "--processes", "1", *more])
    return capsys.readouterr().out


def results(tmp_path, recipe):
    runs = runs_of(tmp_path / "results" / f"{recipe}.jsonl")
    return [result for name, result in runs.items() if name.startswith("baseline.") and name.endswith("/test-000")]


def test_an_experiment_uses_it_where_it_is(package, tmp_path, capsys):
    """By default where it has the data set; runs, tables and files say so, and backbones are the same."""
    text = run(tmp_path, capsys, "pneumoniamnist")
    assert "corruptions: those of medmnistc 9.9" in text
    assert "corruptions of medmnistc 9.9 at severities 3;" in text
    (theirs,) = results(tmp_path, "pneumoniamnist-medmnistc-quick-strong-decay")
    assert theirs["corruptions"] == "medmnistc 9.9"
    assert set(theirs["metrics"]["by_corruption"]) == {"darker", "noise", "decoded"}
    flat = [levels["3"]["acc"] for levels in theirs["metrics"]["by_corruption"].values()]
    assert theirs["metrics"]["corrupted"]["acc"] == pytest.approx(np.mean(flat))

    text = run(tmp_path, capsys, "pneumoniamnist", "--corruptions", "own")
    assert "medmnistc" not in text
    (ours,) = results(tmp_path, "pneumoniamnist-quick-strong-decay")
    assert ours["corruptions"] == "own"
    assert set(ours["metrics"]["by_corruption"]) == set(robustness.CORRUPTIONS)
    assert ours["digests"] == theirs["digests"]


def test_what_it_cannot_do_is_said_before_anything_is_trained(package, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(protocol, "train_backbone", None)
    with pytest.raises(SystemExit):
        run(tmp_path, capsys, "octmnist", "--corruptions", "medmnistc")
    assert "cut at severity 1 fails on images of 28x28" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, capsys, "mine", "--corruptions", "medmnistc")
    assert "no corruptions for 'mine'" in capsys.readouterr().err


def test_other_data_and_other_machines_get_our_own(package, tmp_path, capsys, monkeypatch):
    assert "corruptions: our own (medmnistc has no corruptions for 'mine'" in run(tmp_path, capsys, "mine")
    assert "corruptions: our own (medmnistc's cut at severity 1 fails on images" in run(tmp_path, capsys, "octmnist")
    monkeypatch.setitem(sys.modules, "medmnistc", None)
    forget_package(monkeypatch)
    monkeypatch.setitem(sys.modules, "medmnistc", None)
    assert "corruptions: our own (medmnistc cannot be imported" in run(tmp_path, capsys, "pneumoniamnist")


def test_numbers_above_255_are_refused_and_not_cut(package):
    with pytest.raises(
        ValueError, match=r"numbers at severity 3 fails on images of 16x16 \(it gives pixels of .* mode F"
    ):
        medmnist_c.corrupt(some_images(), "octmnist", "numbers", 3)


@pytest.mark.skipif(importlib.util.find_spec("medmnistc") is None, reason="needs the medmnistc package")
def test_the_package_itself():
    images = some_images(side=28)
    for name in medmnist_c.names("pneumoniamnist"):
        copies = [medmnist_c.corrupt(images, "pneumoniamnist", name, severity) for severity in robustness.SEVERITIES]
        changes = [(copy.float() - images.float()).square().mean() for copy in copies]
        assert changes[4] > changes[0] > 0
        assert torch.equal(copies[2], medmnist_c.corrupt(images, "pneumoniamnist", name, 3))
