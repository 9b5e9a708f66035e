"""torchxrayvision, the real one: its classifiers take merging, and its data sets are read in their own layouts."""

import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torchvision_ops

torchvision_ops.declare()
xrv = pytest.importorskip("torchxrayvision")
Image = pytest.importorskip("PIL.Image")

from benchmarks.paper import xrays  # noqa: E402
from benchmarks.paper.__main__ import main  # noqa: E402
from benchmarks.paper.data import load  # noqa: E402
from benchmarks.paper.dataset import MissingDataError  # noqa: E402
from inmerge_fast import InMerge, MergePlan, merge_  # noqa: E402

LABELS = xrays.LABELS
SIZE = 16
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(xrays, "default_folder", lambda: tmp_path / "cache")


def grey(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((SIZE, SIZE), value, np.uint8)).save(path)


@pytest.fixture
def nih(tmp_path):
    """Twelve patients with two images each: image i is grey with value 10 i, and has the findings that i picks."""
    folder = tmp_path / "nih"
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position"
    rows = [header]
    for index in range(24):
        name = f"{1 + index // 2:08d}_{index % 2:03d}.png"
        grey(folder / "images" / name, 10 * index)
        found = "|".join([LABELS[index % 14], LABELS[(index + 3) % 14]]) if index % 4 else "No Finding"
        rows.append(f"{name},{found},0,{1 + index // 2},58,M,{'PA' if index % 3 else 'AP'}")
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture
def chexpert(tmp_path):
    folder = tmp_path / "CheXpert-v1.0-small"
    findings = ["No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
                "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
                "Fracture", "Support Devices"]  # fmt: skip
    rows = [",".join(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *findings])]
    for index in range(20):
        path = (
            f"CheXpert-v1.0-small/train/patient{index:05d}/study1/view1_{'lateral' if index == 19 else 'frontal'}.jpg"
        )
        grey(folder.parent / path, 10 * index)
        labels = ["" if (index + place) % 3 else str((index + place) % 2) for place in range(14)]
        labels[0] = ""
        labels[8] = "-1" if index == 2 else labels[8]
        view = "Lateral," if index == 19 else "Frontal,PA"
        rows.append(",".join([path, "Male", "60", view, *labels]))
    (folder / "train.csv").write_text("\n".join(rows))
    return folder


def everything(data):
    parts = (data.train, data.val, data.test)
    return torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])


def test_nih_has_every_view_of_every_patient_and_the_labels_in_our_order(nih):
    data = load(f"nih:{nih}", size=SIZE)
    assert data.labels == LABELS
    assert [len(part) for part in (data.train, data.val, data.test)] == [16, 4, 4]  # of 12 patients 8, 2 and 2
    images, labels = everything(data)
    index = (images[:, 0, 0, 0].int() / 10).round().int()
    assert sorted(index.tolist()) == list(range(24))
    for row, i in zip(labels, index.tolist(), strict=True):
        wanted = {i % 14, (i + 3) % 14} if i % 4 else set()
        assert set(row.nonzero().flatten().tolist()) == wanted
    patients = [{i // 2 for i in (part.images[:, 0, 0, 0].int() / 10).round().int().tolist()}
                for part in (data.train, data.val, data.test)]  # fmt: skip
    assert patients[0].isdisjoint(patients[1])
    assert patients[2].isdisjoint(patients[0] | patients[1])


def test_pixels_are_those_that_its_own_class_gives(nih):
    data = load(f"nih:{nih}", size=SIZE)
    own = xrv.datasets.NIH_Dataset(
        str(nih / "images"), str(nih / "Data_Entry_2017_v2020.csv"), views=["PA", "AP"], unique_patients=False
    )
    theirs = np.stack([own[index]["img"] for index in range(len(own))])
    assert (theirs.min(), theirs.max()) == (-1024.0, pytest.approx(823.2157, abs=1e-3))  # of 0 and 230 in 255
    ours = xrays.in_its_units(everything(data)[0]).numpy()
    for image in theirs:
        assert any(np.array_equal(image, one) for one in ours)


def test_chexpert_refuses_what_is_unknown_and_counts_it_as_absent_when_told(chexpert):
    with pytest.raises(ValueError, match=r"\d+ of 247 labels are unknown \(NaN\).*chexpert-zeros:CheXpert-v1.0-small"):
        load(f"chexpert:{chexpert}", size=SIZE)
    data = load(f"chexpert-zeros:{chexpert}", size=SIZE)
    assert "taken for absent" in " ".join(data.notes)
    images, labels = everything(data)
    assert len(images) == 19  # without the lateral view
    assert labels.isfinite().all()
    assert data.labels == tuple(sorted(data.labels))
    assert "Effusion" in data.labels
    own = xrv.datasets.CheX_Dataset(str(chexpert), str(chexpert / "train.csv"), views=["PA"], unique_patients=False)
    count = {label: int(np.nansum(own.labels[:, place])) for place, label in enumerate(own.pathologies)}
    assert {label: int(labels[:, place].sum()) for place, label in enumerate(data.labels)} == count
    assert count["Effusion"] > 0


@pytest.mark.parametrize("kind", ["nih", "chexpert-zeros"])
def test_the_table_of_chestxray14_has_a_row_of_it(kind, nih, chexpert, tmp_path, capsys):
    """From the command line; no path of this machine is in what it leaves. CheXpert has seven of the findings."""
    folder = nih if kind == "nih" else chexpert
    main(["table-chestxray14", "--quick", "--data", f"{kind}:{folder}", "--size", str(SIZE), "--seeds", "1",
          "--device", "cpu", "--processes", "1", "--out", str(tmp_path / "out")])  # fmt: skip
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| **ours**")]
    assert len(rows) == 3  # two baselines and the paper's merging
    assert all(len(re.findall(r"\| 0\.\d{3}|\| 1\.000", row)) >= 1 for row in rows)
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(left) > 3
    for path in left:
        assert ":" not in path.name
        if path.suffix in (".json", ".jsonl", ".md"):
            assert str(tmp_path) not in path.read_text()


def test_what_is_missing_is_named(nih, tmp_path, monkeypatch):
    with pytest.raises(MissingDataError, match="there is no such folder"):
        load("nih:nowhere", root=tmp_path)
    with pytest.raises(ValueError, match=r"holds no train\.csv"):
        load(f"chexpert:{nih}")
    (nih / "images" / "00000001_000.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 24 listed images are missing: 00000001_000\.png"):
        load(f"nih:{nih}", size=SIZE)
    monkeypatch.setattr(xrv, "__version__", "1.4.0")
    with pytest.raises(ValueError, match=r"1\.5 or newer is needed, got 1\.4\.0: pip install"):
        load(f"nih:{nih}", size=SIZE)
    monkeypatch.setitem(__import__("sys").modules, "torchxrayvision", None)
    with pytest.raises(ValueError, match="need torchxrayvision, which cannot be imported.*pip install"):
        load(f"nih:{nih}", size=SIZE)


def trained(data, recipe, by_hand):
    """Three steps of a small DenseNet of theirs, with InMerge attached to the optimizer or called by hand."""
    torch.manual_seed(0)
    model = xrv.models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=14).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    merger, lasting = InMerge(model, **recipe), recipe.get("lasting", True)
    if not by_hand:
        merger.attach(optimizer)
    images, labels = xrays.in_its_units(data.train.images[:4]), data.train.labels[:4]
    for _ in range(3):
        with merger.merged() if by_hand and not lasting else nullcontext():
            torch.nn.functional.binary_cross_entropy_with_logits(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if by_hand and lasting:
            merger.step()
    return model, merger


@pytest.mark.parametrize(
    "recipe",
    [{"threshold": -1.0, "prob": 1.0, "skip_first": 0, "guard": None}, {"lasting": False}],
    ids=["lasting", "forward"],
)
def test_its_densenet_trains_on_its_data_attached_as_by_hand(nih, recipe):
    data = load(f"nih:{nih}", size=SIZE)
    (attached, merger), (by_hand, _) = trained(data, recipe, False), trained(data, recipe, True)
    assert merger.step_count == 3
    assert merger.summary().merged > 0
    assert merger.plan.heads == ()
    for name, value in attached.state_dict().items():
        assert torch.equal(value, by_hand.state_dict()[name]), name


def test_its_resnet_takes_part_with_weights_from_a_file(tmp_path, monkeypatch):
    """Its class always loads weights: here random ones, from where a download would have put them."""
    inner = pytest.importorskip("torchvision").models.resnet50(num_classes=18)
    inner.conv1 = torch.nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    torch.save(inner.state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr(xrv.models, "get_weights", lambda *_, **__: str(tmp_path / "weights.pt"))
    model = xrv.models.ResNet(weights="resnet50-res512-all")
    plan = MergePlan(model)
    assert (len(plan.candidates), len(plan.names), plan.heads) == (53, 21, ())
    assert merge_(plan, threshold=-1.0, seed=0, step=0).merged > 0
