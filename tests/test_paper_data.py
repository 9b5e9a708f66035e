"""Data of the paper's experiments: every original layout, and errors that name the file."""

import csv
import hashlib
import os
import sys
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from paper_fixtures import write_chestxray14, write_npz

from benchmarks.paper import chestxray_tables, image_cache
from benchmarks.paper.chestxray import LABELS, load_chestxray14
from benchmarks.paper.data import _say, load

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")


def test_digits_have_three_parts_and_all_classes():
    data = load("digits")
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [1000, 297, 500]
    assert data.train.images.shape[1:] == (1, 8, 8)
    assert data.train.images.max() == 255
    assert all(data.split(name).labels.unique().tolist() == list(range(10)) for name in ("train", "val", "test"))
    with pytest.raises(ValueError, match="size must be 8"):
        load("digits", size=28)


@pytest.mark.parametrize(
    ("shape", "expected"), [((28, 28), (1, 28, 28)), ((28, 28, 3), (3, 28, 28)), ((28, 28, 28), (1, 28, 28, 28))]
)
def test_npz_in_every_shape(tmp_path, shape, expected):
    data = load(str(write_npz(tmp_path / "own.npz", shape=shape)))
    assert data.train.images.shape == (24, *expected)
    assert data.train.images.dtype == torch.uint8
    assert data.task == "multi-class"
    assert data.labels == ("0", "1")
    with np.load(tmp_path / "own.npz") as arrays:
        image = torch.from_numpy(arrays["val_images"][3])
    assert torch.equal(data.val.images[3], image.permute(2, 0, 1) if shape == (28, 28, 3) else image[None])


def test_npz_with_several_labels(tmp_path):
    labels = np.random.default_rng(1).integers(0, 2, (24, 5), dtype=np.uint8)
    path = write_npz(tmp_path / "multi.npz", **{f"{split}_labels": labels for split in ("train", "val", "test")})
    data = load(str(path))
    assert data.task == "multi-label"
    assert data.test.labels.dtype == torch.float32
    assert data.test.labels.tolist() == labels.tolist()


def test_a_file_is_found_below_the_root(tmp_path, monkeypatch):
    write_npz(tmp_path / "own.npz")
    monkeypatch.setenv("INMERGE_DATA", str(tmp_path))
    assert load("own.npz").name == "own"


def test_what_was_understood_is_said(tmp_path, capsys):
    labels = np.eye(3, dtype=np.uint8)[np.arange(24) % 2]
    labels[0] = labels[1] = [0, 0, 1]
    path = write_npz(tmp_path / "own.npz", shape=(3, 28, 20), train_labels=labels, val_labels=labels,
                     test_labels=np.eye(3, dtype=np.uint8)[np.arange(24) % 2])  # fmt: skip
    _say.cache_clear()
    data = load(str(path))
    assert data.train.images.shape == (24, 3, 28, 20)
    assert (data.task, data.dims, data.labels) == ("multi-class", 2, ("0", "1", "2"))
    assert data.train.labels[:4].tolist() == [2, 2, 0, 1]
    with np.load(path) as arrays:
        assert torch.equal(data.val.images, torch.from_numpy(arrays["val_images"]))
    assert data.notes == (
        "images of shape (24, 3, 28, 20) are read as colour images in PyTorch's order, channels first",
        "labels of shape (24, 3), of which each image has one, are read as classes",
        "none or all of the test images have 2: no AUC for it there",
    )
    load(str(path))
    assert capsys.readouterr().err.splitlines() == [f"own: {note}" for note in data.notes]  # once


def test_labels_without_an_auc_are_said(tmp_path):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, (24, 4), dtype=np.uint8)
    path = write_npz(
        tmp_path / "multi.npz", train_labels=labels, val_labels=labels, test_labels=labels | [[0, 1, 0, 0]]
    )
    assert load(str(path)).notes == ("none or all of the test images have 1: no AUC for it there",)


BROKEN = {
    "missing key": ({"val_labels": None}, "val_labels missing"),
    "wrong dtype": ({"test_images": np.zeros((24, 28, 28), np.float32)}, "test_images must be uint8, got float32"),
    "label out of range": ({"test_labels": np.full((24, 1), 7, np.uint8)}, "test_labels out of range"),
    "labels of too few": ({"val_labels": np.zeros((3, 1), np.uint8)}, "24 val_images but 3 val_labels"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_npz_is_named(tmp_path, kind):
    replaced, message = BROKEN[kind]
    path = write_npz(tmp_path / "broken.npz", **replaced)
    with pytest.raises(ValueError, match=message) as error:
        load(str(path))
    assert str(path) in str(error.value)


def test_truncated_npz_is_named(tmp_path):
    path = write_npz(tmp_path / "broken.npz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"broken\.npz: is not an npz archive"):
        load(str(path))


@pytest.fixture
def info(monkeypatch):
    """MedMNIST's table of one set, as its package gives it; the MD5 is filled in by the test."""
    entry = {"url": "https://example.org/tinymnist.npz", "MD5": "", "label": {"0": "normal", "1": "pneumonia"}}
    module = types.ModuleType("medmnist.info")
    module.INFO = {"tinymnist": entry}
    monkeypatch.setitem(sys.modules, "medmnist", types.ModuleType("medmnist"))
    monkeypatch.setitem(sys.modules, "medmnist.info", module)
    return entry


def test_medmnist_by_name_checks_the_md5(tmp_path, info):
    path = write_npz(tmp_path / "tinymnist.npz")
    info["MD5"] = hashlib.md5(path.read_bytes()).hexdigest()
    data = load("tinymnist", root=tmp_path)
    assert data.labels == ("normal", "pneumonia")
    assert info["MD5"] in data.source
    write_npz(path, count=25)
    with pytest.raises(ValueError, match=r"tinymnist\.npz: MD5 is \w+, MedMNIST's file has \w+; delete it"):
        load("tinymnist", root=tmp_path)


def test_medmnist_says_which_file_to_put_where(tmp_path, info, monkeypatch):
    def fail(url, target):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(
        ValueError, match=r"could not be downloaded .*fetch https://example\.org/tinymnist\.npz"
    ) as error:
        load("tinymnist", root=tmp_path)
    assert str(tmp_path / "tinymnist.npz") in str(error.value)
    with pytest.raises(ValueError, match=r"size of tinymnist must be one of \(28, 64, 128, 224\)"):
        load("tinymnist", size=32, root=tmp_path)
    with pytest.raises(ValueError, match="must be digits, a folder, an .npz file or one of tinymnist"):
        load("nomnist", root=tmp_path)


def test_medmnist_names_need_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "medmnist.info", None)
    with pytest.raises(ValueError, match="pip install --no-deps medmnist"):
        load("pneumoniamnist")


def test_names_of_the_real_package():
    info = pytest.importorskip("medmnist.info", reason="needs the medmnist package").INFO
    assert all(len(entry["MD5"]) == 32 and {"url", "label"} <= set(entry) for entry in info.values())


def test_real_pneumoniamnist():
    folder = os.environ.get("INMERGE_DATA")
    if not folder or not (Path(folder) / "pneumoniamnist.npz").exists():
        pytest.skip("set INMERGE_DATA to a folder that holds pneumoniamnist.npz")
    data = load("pneumoniamnist.npz", root=folder)
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [4708, 524, 624]
    assert data.train.labels.unique().tolist() == [0, 1]


@pytest.mark.parametrize("kaggle", [False, True])
@pytest.mark.parametrize("new_table", [False, True])
def test_chestxray14_in_all_its_forms(tmp_path, kaggle, new_table):
    folder = tmp_path / "nih"
    names = write_chestxray14(folder, kaggle=kaggle, new_table=new_table)
    data = load_chestxray14(folder, size=16, cache=tmp_path / "cache")
    assert data.task == "multi-label"
    assert data.labels == LABELS
    assert data.train.images.shape[1:] == (1, 16, 16)
    assert len(data.test) == 12
    assert len(data.train) + len(data.val) == 36
    assert len(data.val) >= 36 / 8
    # Every image with its own labels: the first of the test set is image 36, without a finding; the next has two.
    assert data.test.labels[0].sum() == 0
    assert set(np.flatnonzero(data.test.labels[1])) == {37 % 14, (37 * 5) % 14}
    path = next(folder.rglob(names[37]))
    with Image.open(path) as image:
        expected = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(data.test.images[1, 0], expected)


def test_chestxray14_splits_by_patient(tmp_path):
    folder = tmp_path / "nih"
    write_chestxray14(folder, kaggle=False, new_table=False)
    parts = chestxray_tables.read_splits(folder).entries
    patients = {split: {entry.patient for entry in entries} for split, entries in parts.items()}
    assert patients["val"]
    assert not patients["train"] & patients["val"]
    assert all(len(entries) == 4 * len(patients[split]) for split, entries in parts.items())


def test_chestxray14_is_decoded_once(tmp_path, monkeypatch):
    folder = tmp_path / "nih"
    write_chestxray14(folder, kaggle=False, new_table=False)
    first = load_chestxray14(folder, size=16, cache=tmp_path / "cache")
    monkeypatch.setattr(image_cache, "read_grey", None)
    again = load_chestxray14(folder, size=16, cache=tmp_path / "cache")
    assert torch.equal(first.train.images, again.train.images)


def test_chestxray14_with_folds(tmp_path):
    folder = tmp_path / "nih"
    names = write_chestxray14(folder, kaggle=True, new_table=True)
    (folder / "Data_Entry_2017_v2020.csv").unlink()
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Image Index", *LABELS, "fold"])
        for index, name in enumerate(names):
            writer.writerow(
                [name, *(int(index % 14 == k) for k in range(14)), ("train", "val", "test")[index // 4 % 3]]
            )
    data = load_chestxray14(folder, size=16, cache=tmp_path / "cache")
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [16, 16, 16]
    assert data.val.labels.argmax(1).tolist() == [index % 14 for index in range(48) if index // 4 % 3 == 1]


def _rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


CHEST_DAMAGE = {
    "unknown label": (lambda f: _rewrite(f / "Data_Entry_2017.csv", "No Finding", "Broken Rib"),
                      r"Data_Entry_2017\.csv: row 2 \(00000001_000\.png\) has unknown labels: Broken Rib"),
    "no column": (lambda f: _rewrite(f / "Data_Entry_2017.csv", "Patient ID", "Person"),
                  r"Data_Entry_2017\.csv: has no column 'Patient ID'"),
    "cut row": (lambda f: (f / "Data_Entry_2017.csv").write_text("Image Index,Finding Labels,Patient ID\na.png"),
                r"Data_Entry_2017\.csv: row 2 is cut off"),
    "no list": (lambda f: (f / "test_list.txt").unlink(), r"test_list\.txt: there is no such file"),
    "unlisted": (lambda f: (f / "test_list.txt").write_text("x.png"), r"test_list\.txt: 1 images have no row"),
    "no image": (lambda f: (f / "images/00000002_001.png").unlink(), "1 of 48 listed images are missing.*00000002_001"),
    "broken image": (lambda f: (f / "images/00000002_001.png").write_bytes(b"\x89PNG"), r"002_001\.png: cannot be dec"),
    "no table": (lambda f: (f / "Data_Entry_2017.csv").unlink(), "holds neither Data_Entry_2017.csv"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHEST_DAMAGE)
def test_broken_chestxray14_is_named(tmp_path, kind):
    folder = tmp_path / "nih"
    write_chestxray14(folder, kaggle=False, new_table=False)
    damage, message = CHEST_DAMAGE[kind]
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_chestxray14(folder, size=16, cache=tmp_path / "cache")
    assert not list(tmp_path.rglob("*.part"))


def test_missing_chestxray14_says_what_to_put_where(tmp_path):
    with pytest.raises(ValueError, match="put NIH ChestX-ray14 there: Data_Entry_2017.csv"):
        load("chestxray14", root=tmp_path)
