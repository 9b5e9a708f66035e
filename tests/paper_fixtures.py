"""Small data sets in the original layouts, and a recipe that trains in a second."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.paper import protocol, robustness
from benchmarks.paper.chestxray import LABELS
from benchmarks.paper.config import Recipe

TINY = Recipe(
    "tiny", "digits", "vgg8", backbone_epochs=1, arm_epochs=2, batch_size=32, severities=(3,), limit=96, middle=0.02
)
FORWARD_TINY = dataclasses.replace(TINY, name="forward-only.tiny", arm_epochs=1, limit=64, attack=False)
HEADER_2017 = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
HEADER_2020 = HEADER_2017.rstrip(",").replace("Gender", "Sex")


def write_npz(path: Path, count: int = 24, classes: int = 2, shape: tuple[int, ...] = (28, 28), **replaced) -> Path:
    """A file in MedMNIST's layout; ``replaced`` arrays take the place of generated ones, None leaves a key out."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
    arrays |= replaced
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def write_chestxray14(folder: Path, *, kaggle: bool, new_table: bool, patients: int = 12, images: int = 4) -> list[str]:
    """A data set in the NIH's layout; gives its image names, ``images`` for each patient."""
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows, names = [HEADER_2020 if new_table else HEADER_2017], []
    for patient in range(1, patients + 1):
        for follow in range(images):
            name = f"{patient:08d}_{follow:03d}.png"
            index = len(names)
            place = folder / (f"images_{1 + index % 3:03d}/images" if kaggle else "images")
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (64, 64), dtype=np.uint8)
            image = Image.fromarray(pixels)
            (image.convert("RGBA") if index == 1 else image).save(place / name)
            findings = "No Finding" if index % 3 == 0 else "|".join({LABELS[index % 14], LABELS[(index * 5) % 14]})
            rows.append(
                f"{name},{findings},{follow},{patient},58,M,PA,2682,2749,0.143,0.143" + ("" if new_table else ",")
            )
            names.append(name)
    table = "Data_Entry_2017_v2020.csv" if new_table else "Data_Entry_2017.csv"
    (folder / table).write_text("\n".join(rows) + "\n")
    cut = images * (patients - patients // 4)
    (folder / "train_val_list.txt").write_text("\n".join(names[:cut]) + "\n")
    (folder / "test_list.txt").write_text("\n".join(names[cut:]))
    return names


@pytest.fixture(scope="module", autouse=True)
def few_images():
    """Two corruptions and one level of noise: the others take four fifths of a run this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol.Bench, "corruptions", lambda *_: ("gaussian_noise", "contrast_down"))
        patch.setattr(robustness, "NOISE_SIGMAS", (0.2,))
        yield
