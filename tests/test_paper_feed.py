"""Training images on their way to the network: the same ones whether all fit the device or are read ahead."""

import ctypes
import dataclasses
import json
import mmap
import sys
import threading
import time

import numpy as np
import pytest
import torch
from paper_fixtures import TINY

from benchmarks.paper import bench as benches
from benchmarks.paper import feed as feeds
from benchmarks.paper import protocol, rate
from benchmarks.paper.bench import Bench
from benchmarks.paper.config import BASELINE, Run
from benchmarks.paper.data import load
from benchmarks.paper.feed import Feed, parts_of
from benchmarks.paper.robustness import CORRUPTIONS
from inmerge_fast.demo.train import Schedule, epoch_steps

CPU = torch.device("cpu")


def images(count=50):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 5, 5), dtype=np.uint8))


@pytest.mark.parametrize(
    ("count", "batch", "micro", "ranks"), [(50, 8, 1, 1), (50, 8, 2, 2), (5, 8, 1, 1), (64, 8, 4, 1)]
)
def test_the_order_is_the_one_that_is_trained_in(count, batch, micro, ranks):
    schedule = Schedule(2, 3, 0.1, 0.01, batch, seed=7)
    weight = torch.zeros(1, requires_grad=True)
    for epoch in range(3):
        asked = []

        def loss_at(indices, step, asked=asked):
            asked.append(indices[1 % ranks :: ranks])
            return weight.sum()

        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in epoch_steps(schedule, epoch, count, optimizer, loss_at, None, device=CPU, micro_batches=micro):
            pass
        said = list(parts_of(schedule, epoch, count, micro, 1 % ranks, ranks))
        assert [one.tolist() for one in said] == [one.tolist() for one in asked]


def test_images_that_are_read_ahead_are_the_same(tmp_path):
    np.save(tmp_path / "images.npy", images().numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "images.npy", mmap_mode="c"))
    near, far = Feed(mapped, CPU), Feed(mapped, CPU, room=100)
    assert near.resident
    assert not far.resident
    schedule = Schedule(0, 2, 0.1, 0.01, 8, seed=0)
    for epoch in range(2):
        batches = list(parts_of(schedule, epoch, 50))
        assert len(batches) == 6 > feeds.AHEAD
        far.begin(batches)
        for indices in batches:
            assert torch.equal(far(indices), near(indices))
    far.begin(batches)  # and left in the middle of it
    far.close()
    assert not [thread for thread in threading.enumerate() if thread.daemon and "_read" in thread.name]


def test_reading_goes_on_while_the_network_computes(monkeypatch):
    seen = []
    whole = images()

    class Slow:
        def numel(self):
            return whole.numel()

        def __getitem__(self, indices):
            seen.append(len(indices))
            return whole[indices]

    feed = Feed(Slow(), CPU, room=0)
    feed.begin(list(torch.arange(50).split(5)))
    deadline = time.monotonic() + 30
    while len(seen) <= feeds.AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(seen) == feeds.AHEAD + 1  # the one that waits for room, and no more: memory is bounded
    feed.close()


def test_what_was_not_said_is_refused():
    feed = Feed(images(), CPU, room=0)
    with pytest.raises(RuntimeError, match="begin was not called"):
        feed(torch.arange(5))
    feed.begin([torch.arange(5)])
    with pytest.raises(RuntimeError, match="asked for 4 images where begin said 5"):
        feed(torch.arange(4))
    feed.begin([])
    with pytest.raises(RuntimeError, match="asked for more batches than begin said"):
        feed(torch.arange(4))
    feed.begin([torch.tensor([99])])  # an error of the thread that reads
    with pytest.raises(IndexError):
        feed(torch.arange(1))
    feed.close()


def test_training_does_not_depend_on_where_the_images_are(monkeypatch):
    pytest.importorskip("sklearn")
    before = threading.enumerate()  # other tests may have left some
    recipe = dataclasses.replace(TINY, arm_epochs=1, flip=True, micro_batches=2)
    bench = Bench(load("digits"), CPU, recipe.limit)
    backbone = protocol.train_backbone(recipe, bench, 0)
    digests = []
    for room in (feeds.CPU_BYTES, 0):
        monkeypatch.setattr(feeds, "CPU_BYTES", room)
        digests.append(protocol.run_arm(Run(recipe, BASELINE, 0), bench, backbone)[0]["digests"])
    assert digests[0] == digests[1]
    left = [one for one in threading.enumerate() if one not in before and getattr(one, "_target", None) is not None]
    assert not [one for one in left if not one.name.startswith("inmerge_fast-rank")]  # which stays, and waits for work


def test_rates_are_measured_with_the_experiments_own_loop(tmp_path, capsys):
    small = [
        "--device",
        "cpu",
        "--models",
        "resnet18_small",
        "--batches",
        "8",
        "--side",
        "16",
        "--images",
        "24",
        "--no-bf16",
    ]
    written = rate.main([*small, "--out", str(tmp_path)])
    found = json.loads(written.read_text())
    [row] = found["training"].values()
    kinds = {"network", "on the device", "merging as published", "merging, recommended", "read ahead"}
    assert set(row) == {"batch", *kinds}
    assert all(0 < row[kind] < 1e5 for kind in kinds)
    assert all(0 < found["reading"][kind] < 1e7 for kind in ("on the device", "read ahead"))
    assert set(found["corrupting"]) == {*CORRUPTIONS, "noise"}
    name = "".join(filter(str.isalnum, found["environment"]["processor"]))
    assert written.name.replace("-", "") == f"rate.{name}.json"
    with pytest.raises(SystemExit):
        rate.main(["--images", "8"])
    assert "8 do not fill a batch of 128" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="which pages are in memory is asked of Linux")
def test_a_host_alone_can_be_measured(tmp_path, monkeypatch):
    """From the disk is from the disk: of a file that was let go no page is left in memory when reading begins."""
    resident = []

    def epoch_begins(path, forget=rate._forget):
        done = forget(path)
        resident.append(pages_in_memory(path))
        return done

    monkeypatch.setattr(rate, "_forget", epoch_begins)
    assert not rate._forget(in_memory(tmp_path)), "of a file that the system keeps nothing is from the disk"
    resident.clear()
    options = ["--device", "cpu", "--models", "--batches", "--side", "64", "--images", "256", "--out", str(tmp_path)]
    found = json.loads(rate.main(options).read_text())
    assert found["training"] == {}
    assert set(found["reading"]) == {"on the device", "read ahead", "read ahead, disk"}
    assert resident[0] < 0.2, "a share of the file"
    assert found["copied"] == rate.COPIED


def in_memory(folder):
    """A file that is mapped and was looked at, so that its pages stay."""
    path = folder / "kept.bin"
    path.write_bytes(bytes(64 * mmap.PAGESIZE))
    in_memory.kept = np.memmap(path, np.uint8, "r")
    assert in_memory.kept.sum() == 0
    return path


def pages_in_memory(path):
    """Share of a file's pages that the system holds, see mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    pages = np.memmap(path, np.uint8, "r")
    seen = np.zeros(-(-pages.size // mmap.PAGESIZE), np.uint8)
    assert libc.mincore(pages.ctypes.data, pages.size, seen.ctypes.data) == 0, ctypes.get_errno()
    return (seen & 1).mean()


def test_a_rate_is_that_of_the_images_that_were_timed(monkeypatch):
    """A clock of 10 ms per step and 5 s of set-up: 8 images per 10 ms."""
    clock = [0.0]

    def train(model, recipe, bench, schedule, merger):
        clock[0] += 5 + 0.01 * schedule.epochs * schedule.batches(len(bench.data.train))

    monkeypatch.setattr(protocol, "_train", train)
    monkeypatch.setattr(rate.time, "perf_counter", lambda: clock[0])
    recipe = dataclasses.replace(TINY, batch_size=8)
    assert rate.training(recipe, Bench(load("digits"), CPU, 20), None) == pytest.approx(800)


def test_copies_of_large_sets_are_made_once(tmp_path, monkeypatch, capsys):
    """They are the same from the file, of other images others, and a damaged file is made again."""
    monkeypatch.setattr(benches, "CACHE_BYTES", 1000)
    data = load("digits")
    usual = Bench(data, CPU, 96).copies("test", "own", "gaussian_blur", 3)
    made = []
    corrupt = benches.robustness.corrupt
    monkeypatch.setattr(benches.robustness, "corrupt", lambda *given: made.append(given[1]) or corrupt(*given))

    def copies(limit=96, kind="gaussian_blur", level=3, split="test"):
        return Bench(data, CPU, limit, cache=tmp_path / "cache").copies(split, "own", kind, level)

    assert torch.equal(copies(), usual)
    assert torch.equal(copies(), usual)
    assert made == ["gaussian_blur"]
    for changed in ({"limit": 95}, {"kind": "gamma"}, {"level": 4}, {"split": "val"}):
        found = copies(**changed)
        assert found.shape != usual.shape or not torch.equal(found, usual), changed
    assert len(made) == 5
    noisy = Bench(data, CPU, 96, cache=tmp_path / "cache").copies("test", "own", "noise", 0.1)
    assert torch.equal(noisy, benches.robustness.add_noise(Bench(data, CPU, 96).data.test.images, 0.1))
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:200]), lambda path: np.save(path, np.zeros(3))):
        for path in (tmp_path / "cache").glob("copies-gaussian_blur-*.npy"):
            damage(path)
        count = len(made)
        assert torch.equal(copies(), usual)
        assert made[count:] == ["gaussian_blur"]
    (tmp_path / "file").write_text("")
    full = Bench(data, CPU, 96, cache=tmp_path / "file" / "cache")
    assert torch.equal(full.copies("test", "own", "gaussian_blur", 3), usual)
    assert "these copies are made again for every run" in capsys.readouterr().err
    assert not full._copies
