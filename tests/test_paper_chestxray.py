"""ChestX-ray14: which file is an image, who is in which part, and a cache that never holds another image's pixels."""

import multiprocessing
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("tqdm")

from benchmarks.paper import image_cache  # noqa: E402
from benchmarks.paper.chestxray import KAGGLE, LABELS, load_chestxray14  # noqa: E402
from benchmarks.paper.dataset import Reading  # noqa: E402

NAMES = [f"{1 + i // 2:08d}_{i % 2:03d}.png" for i in range(24)]  # two images of each of twelve patients
TEST_VALUES = list(range(116, 124))


def grey(path, value, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 20), value, np.uint8)).save(path, **options)


def row(name, patient, findings="Mass"):
    return f"{name},{findings},0,{patient},58,M,PA,2682,2749,0.143,0.143"


@pytest.fixture
def nih(tmp_path):
    """The release in small: image i has the value 100 + i; the last 8 are for testing."""
    folder = tmp_path / "nih"
    for index, name in enumerate(NAMES):
        grey(folder / "images" / name, 100 + index)
    findings = ["Mass|Nodule" if index % 3 else "No Finding" for index in range(24)]
    write(folder, [row(name, 1 + i // 2, findings[i]) for i, name in enumerate(NAMES)])
    (folder / "train_val_list.txt").write_text("\n".join(NAMES[:16]))
    (folder / "test_list.txt").write_text("\n".join(NAMES[16:]))
    return folder


def write(folder, rows):
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position,"
    header += "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join([header, *rows]))


def write_folds(folder, rows, header=("Image Index", *LABELS, "fold"), name="labels.csv"):
    (folder / "Data_Entry_2017_v2020.csv").unlink(missing_ok=True)
    (folder / name).write_text("\n".join(",".join(map(str, one)) for one in (header, *rows)))


def fold_rows():
    return [[name, *(int(i % 14 == k) for k in range(14)), ("train", "val", "test")[i // 2 % 3]]
            for i, name in enumerate(NAMES)]  # fmt: skip


def load(folder, **reading):
    return load_chestxray14(folder, size=8, cache=folder.parent / "cache", reading=Reading(**reading))


def values(data):
    return data.test.images[:, 0, 0, 0].tolist()


BESIDE = ["masks", "thumbnails", "resized/images", "images_224/images", "images/masks", ".ipynb_checkpoints", "backup"]


@pytest.mark.parametrize("beside", BESIDE)
def test_images_of_the_same_names_elsewhere_are_not_taken(nih, beside):
    for name in NAMES:
        grey(nih / beside / name, 7)
    assert values(load(nih)) == TEST_VALUES


@pytest.mark.parametrize("beside", ["images_001/images", ".", "images_012/images"])
def test_two_images_of_one_name_in_known_places(nih, beside):
    grey(nih / beside / NAMES[20], 7)
    with pytest.raises(ValueError, match="two images of one name") as error:
        load(nih)
    assert {str(nih / "images" / NAMES[20]), str(nih / beside / NAMES[20])} <= set(
        re.split(" and |: ", str(error.value))
    )


@pytest.mark.parametrize("place", ["images", "kaggle", "."])
def test_every_known_layout(nih, place):
    for index, name in enumerate(NAMES):
        target = nih / (f"{KAGGLE[index % 12]}/images" if place == "kaggle" else place)
        target.mkdir(parents=True, exist_ok=True)
        (nih / "images" / name).rename(target / name)
    assert values(load(nih)) == TEST_VALUES


def test_links_are_followed(nih):
    (nih / "images" / NAMES[17]).rename(nih.parent / "single.png")
    (nih / "images" / NAMES[17]).symlink_to(nih.parent / "single.png")
    (nih / "images").rename(nih.parent / "elsewhere")
    (nih / "images").symlink_to(nih.parent / "elsewhere")
    (nih / "images_001").mkdir()
    (nih / "images_001/images").symlink_to(nih / "images")  # the same files once more
    (nih.parent / "elsewhere/loop").symlink_to(nih)
    (nih / "images" / "circle.png").symlink_to("circle.png")
    (nih.parent / "link").symlink_to(nih)
    assert values(load(nih)) == TEST_VALUES
    assert values(load(nih.parent / "link")) == TEST_VALUES


def test_what_macos_leaves_and_what_no_list_names(nih):
    (nih / "images" / f"._{NAMES[0]}").write_bytes(b"Mac OS X")
    (nih / "__MACOSX").mkdir()
    (nih / "__MACOSX" / f"._{NAMES[0]}").write_bytes(b"Mac OS X")
    (nih / "images" / "readme.txt").write_text("")
    assert not load(nih).notes
    grey(nih / "images" / "00000099_000.png", 1)
    assert load(nih).notes == ("1 images in the folders are in no list and left out: 00000099_000.png",)


def moved(folder, name, to):
    (folder / to).parent.mkdir(parents=True, exist_ok=True)
    (folder / "images" / name).rename(folder / to)


MISSING = {
    "other letters": (lambda f: moved(f, NAMES[3], f"images/{NAMES[3].upper()}"), "there is 00000002_001.PNG: give it"),
    "another format": (lambda f: moved(f, NAMES[3], "images/00000002_001.jpg"), "there is 00000002_001.jpg: give it"),
    "deeper": (lambda f: moved(f, NAMES[3], f"images/images/{NAMES[3]}"), f"there is .*images/images/{NAMES[3]}$"),
    "gone": (lambda f: (f / "images" / NAMES[3]).unlink(), "or beside the table$"),
    "a link to nothing": (lambda f: ((f / "images" / NAMES[3]).unlink(), (f / "images" / NAMES[3]).symlink_to("x")),
                          "a link to nothing$"),
    "a folder": (lambda f: ((f / "images" / NAMES[3]).unlink(), (f / "images" / NAMES[3]).mkdir()), "the table$"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISSING)
def test_missing_images(nih, kind):
    damage, message = MISSING[kind]
    damage(nih)
    with pytest.raises(ValueError, match=f"1 of 24 listed images are missing, the first is {NAMES[3]}.*{message}"):
        load(nih)


def test_images_of_16_bits_need_a_word_where_the_top_bits_are_not_used(nih):
    for index, name in enumerate(NAMES):
        Image.fromarray(np.full((20, 20), (100 + index) * 4095 // 255, np.uint16)).save(nih / "images" / name)
    with pytest.raises(ValueError, match=r"\.png: has pixels of 16 bits, but its largest value is \d+.*--bits 12"):
        load(nih)
    assert values(load(nih, bits=12)) == TEST_VALUES


def append(path, text):
    path.write_text(f"{path.read_text()}\n{text}")


OVERLAPS = {
    "an image in both lists": (lambda f: append(f / "test_list.txt", NAMES[0]),
                               "1 images are in train_val_list.txt and test_list.txt: 00000001_000.png; 1 patients"),
    "an image twice in a list": (lambda f: append(f / "test_list.txt", f"{NAMES[20]}\n{NAMES[21]}"),
                                 "2 images are more than once in test_list.txt: 00000011_000.png, 00000011_001.png"),
    "a patient in both lists": (lambda f: write(f, [row(name, 1 + i % 8) for i, name in enumerate(NAMES)]),
                                r"8 patients are in train_val_list.txt and test_list.txt: 1, 2, 3, \.\.\."),
    "one patient, two spellings": (lambda f: write(f, [row(name, "7.0" if i == 20 else f"{1 + i // 2:03d}")
                                                       for i, name in enumerate(NAMES)]), "1 patients .*: 7"),
    "an image in two folds": (lambda f: write_folds(f, [*fold_rows(), [*fold_rows()[0][:-1], "test"]]),
                              "1 images are in train and test: 00000001_000.png"),
    "an image twice in a fold": (lambda f: write_folds(f, [*fold_rows(), fold_rows()[0]]), "more than once in train"),
    "a patient in two folds, by name": (lambda f: write_folds(f, [[*one[:-1], ("train", "val", "test")[i % 3]]
                                        for i, one in enumerate(fold_rows())]), "4 patients are in train and val"),
    "a patient in two folds, by column": (lambda f: write_folds(f, [["x", *one] for one in fold_rows()],
                                          header=("Patient ID", "Image Index", *LABELS, "fold")),
                                          "1 patients are in train and val and test: x"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OVERLAPS)
def test_what_is_in_two_parts_is_refused_unless_allowed(nih, kind):
    damage, message = OVERLAPS[kind]
    damage(nih)
    with pytest.raises(ValueError, match=message):
        load(nih)
    assert re.search(message, "; ".join(load(nih, allow_overlap=True).notes))


CONTRADICTIONS = {
    "two labels": (lambda f: append(f / "Data_Entry_2017_v2020.csv", row(NAMES[1], 1, "Hernia")), "row 26 contradicts"),
    "two patients": (lambda f: append(f / "Data_Entry_2017_v2020.csv", row(NAMES[1], 5, "Mass|Nodule")), "contradicts"),
    "two labels in folds": (lambda f: write_folds(f, [*fold_rows(), [NAMES[0], *[1] * 14, "train"]]),
                            "rows of 00000001_000.png contradict each other"),
    "nothing and something": (lambda f: append(f / "Data_Entry_2017_v2020.csv", row("x.png", 1, "Mass|No Finding")),
                              r"row 26 \(x.png\) has No Finding beside findings"),
    "no patient": (lambda f: append(f / "Data_Entry_2017_v2020.csv", row("x.png", "")), "row 26 has no Patient ID"),
    "no patient in folds": (lambda f: write_folds(f, [["", *one] for one in fold_rows()],
                            header=("Patient ID", "Image Index", *LABELS, "fold")), "row 2 .* has no Patient ID"),
    "no image": (lambda f: append(f / "Data_Entry_2017_v2020.csv", row("", 1)), "row 26 has no Image Index"),
    "no finding": (lambda f: append(f / "Data_Entry_2017_v2020.csv", row("x.png", 1, "")), "unknown labels: ''"),
    "a shifted row": (lambda f: append(f / "Data_Entry_2017_v2020.csv", row("x.png", 1, "Mass,Nodule")), "more values"),
    "a shifted row of folds": (lambda f: write_folds(f, [*fold_rows()[:-1], [*fold_rows()[-1][:1], 0,
                                                         *fold_rows()[-1][1:]]]), "unknown|more values|has fold"),
    "a column twice": (lambda f: write_folds(f, fold_rows(), header=("Image Index", "Mass", *LABELS[1:], "fold")),
                       "has no column 'Atelectasis'|2 columns 'Mass'"),
    "two tables of folds": (lambda f: (write_folds(f, fold_rows()), write_folds(f, fold_rows(), name="b.csv")),
                            "b.csv and .*labels.csv: both have a column fold"),
    "an unknown image": (lambda f: append(f / "test_list.txt", "a.png\nb.png\nc.png\nd.png"),
                         r"4 images have no row in Data_Entry_2017_v2020.csv: a.png, b.png, c.png, \.\.\."),
    "an empty list": (lambda f: (f / "test_list.txt").write_text("\n"), "test_list.txt: is empty"),
    "a list in UTF-16": (lambda f: (f / "test_list.txt").write_text(NAMES[16], encoding="utf-16"), "read as text"),
    "an empty fold": (lambda f: write_folds(f, [one for one in fold_rows() if one[-1] != "val"]), "fold 'val'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_contradictions_are_errors_whatever_is_allowed(nih, kind):
    damage, message = CONTRADICTIONS[kind]
    damage(nih)
    with pytest.raises(ValueError, match=message):
        load(nih, allow_overlap=True)


def test_stray_tables_are_passed_over(nih):
    write_folds(nih, fold_rows())
    (nih / "a.csv").write_text("")
    (nih / "b.csv").write_bytes("x;\xfc\n1;2\n".encode("latin-1"))
    (nih / "._labels.csv").write_bytes(b"\0\1\2")
    data = load(nih)
    assert values(data) == [100 + i for i in range(24) if i // 2 % 3 == 2]
    (nih / "labels.csv").unlink()
    with pytest.raises(ValueError, match=r"column fold; .*a\.csv: holds no rows; .*b\.csv: cannot be read as a table"):
        load(nih)


def test_images_of_which_nothing_names_the_patient_are_counted(nih):
    rows = fold_rows()
    rows[0][0] = "scan.png"
    (nih / "images" / NAMES[0]).rename(nih / "images" / "scan.png")
    write_folds(nih, rows)
    assert load(nih).notes == ("nothing says who 1 of the images are of: whether one is in two parts was not seen",)


def test_a_byte_order_mark_and_rows_in_no_list(nih):
    (nih / "test_list.txt").write_bytes(b"\xef\xbb\xbf" + (nih / "test_list.txt").read_bytes().replace(b"\n", b"\r\n"))
    append(nih / "Data_Entry_2017_v2020.csv", row("00000099_000.png", 99))
    data = load(nih)
    assert values(data) == TEST_VALUES
    assert data.notes == ("1 images of Data_Entry_2017_v2020.csv are in neither list and left out",)


def test_the_second_table_is_named(nih):
    old = nih / "Data_Entry_2017.csv"
    old.write_text((nih / "Data_Entry_2017_v2020.csv").read_text().replace("Mass|Nodule", "Hernia"))
    data = load(nih)
    assert data.notes == ("labels are those of Data_Entry_2017.csv; Data_Entry_2017_v2020.csv beside it is not used",)
    old.unlink()
    assert load(nih).source != data.source  # other labels are other data


def test_images_with_the_same_pixels_are_counted(nih):
    grey(nih / "images" / NAMES[20], 100, compress_level=0)  # another file, the same pixels as the first image
    notes = load(nih).notes
    assert "1 of the 8 test images are training images too, pixel for pixel" in notes
    assert "1 images occur with different labels" in notes


def test_another_folder_never_gets_the_pixels_of_the_first(nih, monkeypatch):
    other = nih.parent / "equalised"
    for index, name in enumerate(NAMES):
        grey(nih / "images" / name, 100 + index, compress_level=0)
        grey(other / "images" / name, 200 - index, compress_level=0)
        about = (nih / "images" / name).stat()
        os.utime(other / "images" / name, ns=(about.st_atime_ns, about.st_mtime_ns))
        assert (other / "images" / name).stat().st_size == about.st_size
    for table in nih.glob("*.*"):
        (other / table.name).write_bytes(table.read_bytes())
    real = Path.stat

    def at_one_time(path, **options):
        about = real(path, **options)
        values = {key: getattr(about, key) for key in dir(about) if key.startswith("st_")}
        return SimpleNamespace(**values | {"st_ctime_ns": 0})

    monkeypatch.setattr(Path, "stat", at_one_time)  # written within one tick of the file system's clock
    first, second = load(nih), load(other)
    assert values(first) == TEST_VALUES
    assert values(second) == [300 - value for value in TEST_VALUES]
    assert first.source != second.source


def test_a_changed_image_is_decoded_again(nih):
    path = nih / "images" / NAMES[16]
    grey(path, 116, compress_level=0)
    load(nih)
    before = path.stat()
    grey(path, 50, compress_level=0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps the times
    assert path.stat().st_size == before.st_size
    assert values(load(nih)) == [50, *TEST_VALUES[1:]]


def test_a_changed_way_of_decoding_makes_another_cache(nih, monkeypatch):
    load(nih)
    monkeypatch.setattr(image_cache, "DECODING", image_cache.DECODING + 1)
    monkeypatch.setattr(image_cache, "read_grey", lambda path, size, bits: np.full((size, size), 3, np.uint8))
    assert values(load(nih)) == [3] * 8


DAMAGE = {
    "cut to its header": lambda content: content[:150],
    "cut by a byte": lambda content: content[:-1],
    "empty": lambda content: b"",
    "another file": lambda content: b"no array",
    "a damaged header": lambda content: content.replace(b"}", b" ", 1),
    "a flipped bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "another shape": lambda content: content.replace(b"(24, 1, 8, 8)", b"(12, 2, 8, 8)"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_cache_is_made_again_and_named(nih, kind, capfd):
    load(nih)
    [cache] = (nih.parent / "cache").glob("*.npy")
    whole = cache.read_bytes()
    damaged = DAMAGE[kind](whole)
    assert damaged != whole
    cache.write_bytes(damaged)
    assert values(load(nih)) == TEST_VALUES
    assert f"{cache}: is damaged (" in capfd.readouterr().err
    assert cache.read_bytes() == whole


def test_a_size_below_one_is_refused(nih):
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        load_chestxray14(nih, size=0, cache=nih.parent / "cache")


def test_a_cache_without_its_digests_is_made_again(nih):
    load(nih)
    [digests] = (nih.parent / "cache").glob("*.digests")
    digests.unlink()
    assert values(load(nih)) == TEST_VALUES
    assert digests.exists()


def test_a_cache_that_cannot_be_written(nih):
    (nih.parent / "cache").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"cache/chestxray14-8-\w+\.npy: decoded images cannot be written there"):
        load(nih)


def test_two_processes_at_once(nih):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(_load_values, [nih] * 4, chunksize=1)
    assert found == [TEST_VALUES] * 4
    assert sorted(path.suffix for path in (nih.parent / "cache").iterdir()) == [".digests", ".npy"]


def _load_values(folder):
    return values(load(folder))
