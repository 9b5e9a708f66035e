"""The demo's loader: files in MedMNIST format, and what it says about those it cannot use."""

import io
import re
import zipfile

import numpy as np
import pytest
import torch

from inmerge_fast.demo.data import load_npz
from inmerge_fast.demo.npz import read_npz


def medmnist(size=(28, 28), classes=2, counts=(12, 4, 6)):
    rng, arrays = np.random.default_rng(0), {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, *size), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % classes)[:, None]
    return arrays


def labels(count, width=14, dtype=np.uint8):
    """Labels of a multi-label set; the first one is never there."""
    there = np.add.outer(np.arange(count), np.arange(width)) % 3 == 1
    return (there & (np.arange(width) > 0)).astype(dtype)


def multi_label(size=(28, 28), width=14, dtype=np.uint8):
    arrays = medmnist(size)
    for split, count in (("train", 12), ("val", 4), ("test", 6)):
        arrays[f"{split}_labels"] = labels(count, width, dtype)
    return arrays


def load(path, **limits):
    return load_npz(path, **{"max_train": 100, "max_test": 100, "seed": 0, **limits})


@pytest.mark.parametrize(
    ("size", "shape", "words"),
    [
        ((28, 28), (1, 28, 28), "28x28 grey"),
        ((28, 28, 3), (3, 28, 28), "28x28 RGB"),
        ((64, 64, 3), (3, 28, 28), "64x64 RGB, resized to 28x28"),
        ((8, 40), (1, 16, 28), "8x40 grey, resized to 16x28"),
        ((16, 16, 16), (1, 16, 16, 16), "16x16x16 grey"),
        ((28, 28, 28), (1, 16, 16, 16), "28x28x28 grey, resized to 16x16x16"),
        ((64, 64, 64), (1, 16, 16, 16), "64x64x64 grey, resized to 16x16x16"),
        (
            (20, 8, 16),
            (1, 16, 16, 16),
            "20x8x16 grey, resized to 16x16x16; images of shape (12, 20, 8, 16) are read as grey volumes of 20 slices "
            "of 8 x 16",
        ),
    ],
)
def test_reads_grey_rgb_and_volumes(tmp_path, size, shape, words):
    np.savez(tmp_path / "set.npz", **medmnist(size, classes=3))
    data = load(tmp_path / "set.npz")
    assert (data.name, data.classes) == ("set.npz", 3)
    assert data.train_x.shape == (12, *shape)
    assert data.test_x.shape == (6, *shape)
    assert data.train_x.dtype == torch.float32
    assert data.train_x.mean().item() == pytest.approx(0, abs=1e-5)
    assert data.train_x.std().item() == pytest.approx(1, abs=1e-5)
    assert data.train_y.tolist() == [0, 1, 2] * 4
    assert data.test_y.tolist() == [0, 1, 2] * 2
    noun = "volumes" if len(shape) == 4 else "images"
    assert (data.noun, data.dims) == (noun, len(shape) - 1)
    assert data.details == f"12 training and 6 test {noun}, 3 classes, {words}; the validation {noun} are not used"


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, ">i4", np.int64, np.uint64])
@pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
def test_reads_classes_of_every_integer_type(tmp_path, dtype, shape):
    arrays = medmnist(classes=3)
    for split in ("train", "val", "test"):
        arrays[f"{split}_labels"] = arrays[f"{split}_labels"].astype(dtype).reshape(shape)
    np.savez(tmp_path / "set.npz", **arrays)
    data = load(tmp_path / "set.npz")
    assert data.train_y.dtype == torch.int64
    assert data.train_y.tolist() == [0, 1, 2] * 4
    assert (data.multi_label, data.labels_each, data.measure) == (False, 1, "accuracy")


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
@pytest.mark.parametrize("width", [2, 14])
@pytest.mark.parametrize("size", [(28, 28), (28, 28, 3), (28, 28, 28)])
def test_reads_several_labels(tmp_path, size, width, dtype):
    np.savez(tmp_path / "set.npz", **multi_label(size, width, dtype))
    data = load(tmp_path / "set.npz")
    assert data.train_y.dtype == data.test_y.dtype == torch.float32
    assert np.array_equal(data.train_y.numpy(), labels(12, width))
    assert np.array_equal(data.test_y.numpy(), labels(6, width))
    assert (data.multi_label, data.classes, data.labels_each, data.measure) == (True, width, width, "label accuracy")
    # Every label but the first is there in a third of the images.
    blind = 100 * (1 - (width - 1) / width / 3)
    assert f"{width} labels per {data.noun[:-1]}" in data.details
    assert f"; answering each label with its commoner value gives a label accuracy of {blind:.2f} %;" in data.details


def test_labels_stay_with_their_images(tmp_path):
    arrays = multi_label()
    arrays["train_images"][:] = np.arange(12)[:, None, None] * 20
    np.savez(tmp_path / "set.npz", **arrays)
    data = load(tmp_path / "set.npz", max_train=7)
    levels = np.unique(data.train_x[:, 0, 0, 0].numpy(), return_inverse=True)[1]
    assert levels.tolist() == list(range(7))  # the choice keeps the order
    kept = np.sort(np.random.default_rng(0).permutation(12)[:7])
    assert np.array_equal(data.train_y.numpy(), labels(12)[kept])


def test_channels_and_pixels_keep_their_place(tmp_path):
    arrays = medmnist((28, 28, 3))
    np.savez(tmp_path / "set.npz", **arrays)
    x = load(tmp_path / "set.npz").train_x.double()
    original = torch.from_numpy(arrays["train_images"].astype(np.float64)).permute(0, 3, 1, 2)
    torch.testing.assert_close(x, (original - original.mean()) / original.std(), atol=1e-5, rtol=1e-5)


def test_volumes_are_resized_trilinearly(tmp_path):
    arrays = medmnist((8, 12, 16))
    np.savez(tmp_path / "set.npz", **arrays)
    x = load(tmp_path / "set.npz").train_x
    original = torch.from_numpy(arrays["train_images"].astype(np.float32))[:, None]
    expected = torch.nn.functional.interpolate(original, size=(16, 16, 16), mode="trilinear")
    torch.testing.assert_close(x, (expected - expected.mean()) / expected.std(), atol=1e-5, rtol=1e-5)


def test_shrinking_volumes_treats_every_axis_alike_and_uses_every_voxel(tmp_path):
    arrays, single = medmnist((64, 64, 64)), np.zeros((12, 64, 64, 64), np.uint8)
    single[0, 30:32, 33, 35] = 255  # without antialiasing a voxel in the gaps would be lost
    turned = arrays["train_images"].transpose(0, 3, 1, 2)
    loaded = []
    for name, images in (("set", arrays["train_images"]), ("turned", turned), ("single", single)):
        np.savez(tmp_path / f"{name}.npz", **{**arrays, "train_images": images})
        loaded.append(load(tmp_path / f"{name}.npz").train_x)
    torch.testing.assert_close(loaded[1], loaded[0].permute(0, 1, 4, 2, 3), atol=1e-4, rtol=1e-4)
    assert loaded[2][0].max() > loaded[2][1].max()


def test_large_sets_are_cut_at_random_and_say_so(tmp_path):
    arrays = medmnist(counts=(300, 4, 50), classes=10)
    arrays["train_images"][:] = np.arange(300)[:, None, None] % 256
    np.savez(tmp_path / "set.npz", **arrays)
    one, again, other = (load(tmp_path / "set.npz", max_train=20, max_test=10, seed=seed) for seed in (0, 0, 1))
    assert (len(one.train_x), len(one.train_y), len(one.test_x), len(one.test_y)) == (20, 20, 10, 10)
    assert "a random 20 of the 300 training images" in one.details
    assert "a random 10 of the 50 test images" in one.details
    assert one.classes == 10
    assert torch.equal(one.train_x, again.train_x)
    assert not torch.equal(one.train_x, other.train_x)


def test_a_third_as_many_volumes_are_used(tmp_path):
    np.savez(tmp_path / "set.npz", **medmnist((16, 16, 16), counts=(50, 4, 20)))
    data = load(tmp_path / "set.npz", max_train=90, max_test=30)
    assert (len(data.train_x), len(data.test_x)) == (30, 10)
    assert "a random 30 of the 50 training volumes are used, to stay within two minutes" in data.details
    assert "a random 10 of the 20 test volumes are used" in data.details


@pytest.mark.parametrize(
    ("stored", "shape", "words"),
    [
        ((1, 28, 20), (28, 20), "grey images, their one channel first"),
        ((28, 20, 1), (28, 20), "grey images, their one channel last"),
        ((3, 28, 20), (28, 20, 3), "colour images in PyTorch's order, channels first"),
        ((1, 8, 12, 16), (8, 12, 16), "grey volumes, their one channel first"),
        ((8, 12, 16, 1), (8, 12, 16), "grey volumes, their one channel last"),
        ((28, 20), (28, 20), None),
        ((28, 20, 3), (28, 20, 3), None),
        ((12, 12, 12), (12, 12, 12), None),
        ((8, 12, 16), (8, 12, 16), "grey volumes of 8 slices of 12 x 16"),
        ((5, 28, 20), (5, 28, 20), "grey volumes of 5 slices of 28 x 20"),  # or five channels: the reader sees it
    ],
)
def test_axes_are_understood_and_said(tmp_path, stored, shape, words):
    arrays = medmnist(stored)
    np.savez(tmp_path / "set.npz", **arrays)
    found = read_npz(tmp_path / "set.npz")
    for split in ("train", "val", "test"):
        images = arrays[f"{split}_images"]
        expected = np.moveaxis(images, 1, -1) if stored[0] == 3 else images.reshape(len(images), *shape)
        assert np.array_equal(found.arrays[f"{split}_images"], expected)
        assert found.arrays[f"{split}_images"].flags["C_CONTIGUOUS"]
    assert found.notes == ((f"images of shape {(12, *stored)} are read as {words}",) if words else ())
    assert words is None or found.notes[0] in load(tmp_path / "set.npz").details


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64])
def test_one_hot_labels_are_classes(tmp_path, dtype):
    arrays = medmnist(classes=3)
    for split in ("train", "val", "test"):
        arrays[f"{split}_labels"] = np.eye(3, dtype=dtype)[arrays[f"{split}_labels"][:, 0]]
    np.savez(tmp_path / "set.npz", **arrays)
    data = load(tmp_path / "set.npz")
    assert (data.multi_label, data.classes) == (False, 3)
    assert data.train_y.tolist() == [0, 1, 2] * 4
    assert "labels of shape (12, 3), of which each image has one, are read as classes" in data.details
    arrays["val_labels"][0] = 1  # one image with all of them
    np.savez(tmp_path / "set.npz", **arrays)
    assert load(tmp_path / "set.npz").multi_label


def test_images_that_occur_more_than_once_are_counted(tmp_path):
    arrays = medmnist()
    arrays["test_images"][:3] = arrays["train_images"][:3]
    arrays["val_images"][1] = arrays["train_images"][0]  # the label of an even image is 0, here it is 1
    arrays["train_images"][5] = arrays["train_images"][7]
    np.savez(tmp_path / "set.npz", **arrays)
    notes = (
        "1 of the 4 validation images are training images too, pixel for pixel",
        "3 of the 6 test images are training images too, pixel for pixel",
        "1 of the 6 test images are validation images too, pixel for pixel",
        "1 of the 12 training images repeat another of them",
        "1 images occur with different labels",
    )
    assert read_npz(tmp_path / "set.npz").notes == notes
    assert "; ".join(notes) in load(tmp_path / "set.npz").details


def changed(**changes):
    return lambda: {**medmnist(), **changes}


def without(*keys):
    return lambda: {key: value for key, value in medmnist().items() if key not in keys}


BYTES = np.uint8
BROKEN = {
    "missing key": (without("val_labels"), r"not in MedMNIST format: val_labels missing; it holds test_images, .*"),
    "no keys": (lambda: {}, r"train_images, .*, test_labels missing; it holds nothing"),
    "float images": (changed(test_images=np.zeros((6, 28, 28))), r"test_images must be uint8, got float64"),
    "flat images": (changed(train_images=np.zeros((12, 784), BYTES)), r"must have shape .*, got \(12, 784\)"),
    "RGB volumes": (changed(train_images=np.zeros((12, 8, 8, 8, 3), BYTES)), r"must have .* got \(12, 8, 8, 8, 3\)"),
    "RGBA": (changed(val_images=np.zeros((4, 28, 28, 4), BYTES)), r"or \(N, D, H, W\), got \(4, 28, 28, 4\)"),
    "images and volumes": (
        changed(test_images=np.zeros((6, 28, 28, 28), BYTES)),
        r"test_images and train_images differ in shape: \(6, 28, 28, 28\) and \(12, 28, 28\)",
    ),
    "empty": (changed(train_images=np.zeros((0, 28, 28), BYTES)), r"train_images is empty"),
    "splits of two sizes": (
        changed(val_images=np.zeros((4, 32, 32), BYTES)),
        r"val_images and train_images differ in shape: \(4, 32, 32\) and \(12, 28, 28\)",
    ),
    "several labels, a 2": (
        lambda: {**multi_label(), "val_labels": 2 * labels(4)},
        r"val_labels out of range: several labels per image, shape \(4, 14\), must each be 0 or 1, .* 0 and 2",
    ),
    "several labels, a -1": (
        lambda: {**multi_label(), "train_labels": -labels(12, dtype=np.int8)},
        r"train_labels out of range: .* but they lie between -1 and 0",
    ),
    "several labels, all the same": (
        lambda: {**multi_label(), "train_labels": np.tile(labels(1), (12, 1))},
        r"train_labels are the same for every image; there is nothing to learn",
    ),
    "several labels, some splits": (
        changed(test_labels=labels(6)),
        r"test_labels and train_labels differ in shape: \(6, 14\) and \(12,",
    ),
    "several labels, two counts": (
        lambda: {**multi_label(), "test_labels": labels(6, 13)},
        r"test_labels and train_labels differ in shape: \(6, 13\) and \(12, 14\)",
    ),
    "no labels": (changed(train_labels=np.zeros((12, 0), BYTES)), r"must have shape \(N, 1\) .*, got \(12, 0\)"),
    "flat colours": (changed(train_images=np.zeros((12, 784, 3), BYTES)), r"of colours or a side is not clear"),
    "colours first or last": (
        changed(train_images=np.zeros((12, 3, 28, 3), BYTES)),
        r"train_images must have .*got \(12, 3, 28, 3\); whether .* np.moveaxis\(images, 1, -1\)",
    ),
    "RGBA first": (changed(train_images=np.zeros((12, 4, 28, 28), BYTES)), r"must have .*got \(12, 4, 28, 28\); wheth"),
    "two slices": (changed(train_images=np.zeros((12, 2, 28, 28), BYTES)), r"must have .*got \(12, 2, 28, 28\); wheth"),
    "one slice and one channel": (changed(train_images=np.zeros((12, 1, 28, 1), BYTES)), r"got \(12, 1, 28, 1\); whet"),
    "colours in between": (changed(train_images=np.zeros((12, 28, 3, 28), BYTES)), r"got \(12, 28, 3, 28\); whether"),
    "RGB volumes first": (changed(train_images=np.zeros((12, 3, 8, 8, 8), BYTES)), r"got \(12, 3, 8, 8, 8\); whether"),
    "RGB volumes between": (changed(train_images=np.zeros((12, 8, 8, 3, 8), BYTES)), r"got \(12, 8, 8, 3, 8\); whet"),
    "images in [0, 1]": (
        changed(val_images=np.full((4, 28, 28), 0.5)),
        r"uint8, got float64 between 0.5 and 0.5: save \(255 \* images\).round\(\).astype\(np.uint8\)",
    ),
    "images in [0, 255]": (changed(val_images=np.full((4, 28, 28), 99.5)), r"99.5: save images.round\(\).astype"),
    "images around 0": (changed(val_images=np.full((4, 28, 28), -0.5)), r"-0.5: say which values are black and white"),
    "images of 16 bits": (changed(val_images=np.full((4, 28, 28), 999, np.uint16)), r"uint16 between 999 and 999: say"),
    "images with NaN": (changed(val_images=np.full((4, 28, 28), np.nan)), r"float64 with 3136 values that are not fin"),
    "yes and no": (changed(val_images=np.ones((4, 28, 28), bool)), r"got bool: save images.astype\(np.uint8\) \* 255"),
    "[0, 1] cut to uint8": (
        changed(val_images=np.arange(4 * 28 * 28).reshape(4, 28, 28).astype(BYTES) % 2),
        r"val_images hold no value above 1, of 255: made uint8 from \[0, 1\], or masks\? Save",
    ),
    "black images": (changed(val_images=np.zeros((4, 28, 28), BYTES)), r"val_images hold no value above 0, of 255"),
    "labels with NaN": (changed(val_labels=np.full((4, 1), np.nan)), r"float64 with 4 values that are not finite"),
    "whole labels as floats": (changed(val_labels=np.ones((4, 1))), r"float64: save labels.astype\(np.int64\)"),
    "shares as labels": (changed(val_labels=np.full((4, 1), 0.5)), r"float64 with values between whole numbers"),
    "yes and no as labels": (changed(val_labels=np.ones((4, 1), bool)), r"got bool: save labels.astype\(np.uint8\)"),
    "from 1": (changed(train_labels=(np.arange(12) % 2 + 1)[:, None]), r"between 1 and 2: save np.unique\(labels, ret"),
    "one-hot, a class without training images": (
        lambda: {
            **medmnist(),
            **{
                f"{split}_labels": np.eye(3, dtype=BYTES)[np.arange(count) % 2 * 2]
                for split, count in (("train", 12), ("val", 4), ("test", 6))
            },
        },
        r"train_labels out of range: 2 classes must be numbered 0 to 1, but .* 0 and 2",
    ),
    "label maps": (changed(train_labels=np.zeros((12, 2, 2), BYTES)), r"must have shape .*, got \(12, 2, 2\)"),
    "float labels": (changed(val_labels=np.zeros((4, 1))), r"val_labels must be integers, got float64"),
    "counts": (changed(test_labels=np.zeros((5, 1), BYTES)), r"6 test_images but 5 test_labels"),
    "one class": (changed(train_labels=np.zeros((12, 1), BYTES)), r"train_labels holds one class only"),
    "gap": (
        changed(train_labels=(255 * (np.arange(12) % 2)).astype(BYTES)[:, None]),
        r"train_labels out of range: 2 classes must be numbered 0 to 1, but the labels lie between 0 and 255",
    ),
    "negative": (changed(train_labels=(np.arange(12) % 2 - 1)[:, None]), r"train_labels out of range: .* -1 and 0"),
    "unknown class": (
        changed(test_labels=np.full((6, 1), 7, BYTES)),
        r"test_labels out of range: between 7 and 7, but train_labels has classes 0 to 1",
    ),
    "objects": (changed(train_labels=np.array([[None]] * 12)), r"holds arrays that are not plain numbers: .*pickle"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files(tmp_path, kind):
    arrays, message = BROKEN[kind]
    path = tmp_path / "broken.npz"
    np.savez(path, **arrays())
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}"):
        load(path)


def array_bytes():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an npz archive: the file is empty; .*"),
        (b"no archive at all", "is not an npz archive: a text file .*"),
        (b"<!DOCTYPE html><html>", "is not an npz archive: an HTML page .*"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is not an npz archive: a Git LFS pointer .*"),
        (b"PK\x03\x04 cut off", "is not an npz archive: .* cut short; repeat it"),
        (array_bytes(), "is a single array, not an npz archive"),
    ],
)
def test_files_of_another_kind(tmp_path, content, message):
    path = tmp_path / "other.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}$"):
        load(path)


def test_damaged_archive(tmp_path):
    path = tmp_path / "damaged.npz"
    np.savez_compressed(path, **medmnist())
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("train_images.npy")
    content = bytearray(path.read_bytes())
    middle = member.header_offset + member.compress_size // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load(path)


@pytest.mark.parametrize("suffix", ["", ".npy"])
@pytest.mark.parametrize("content", [b"no array", b"\x93NUMPY\x01\x00\x10\x00{'descr': broken\n"])
def test_members_that_are_no_arrays(tmp_path, suffix, content):
    path = tmp_path / "members.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for key in medmnist():
            archive.writestr(key + suffix, content)
    with pytest.raises(ValueError, match=r"members\.npz: damaged"):
        load(path)


def test_arrays_larger_than_memory(tmp_path):
    path = tmp_path / "large.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(path, "w") as archive:
        for key in medmnist():
            archive.writestr(f"{key}.npy", header.getvalue())
    with pytest.raises(ValueError, match=r"large\.npz: does not fit into memory, or is damaged"):
        load(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.npz: there is no such file$"):
        load(tmp_path / "nothing.npz")
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path)
