"""Images per second of a training as the experiments run it: ``python -m benchmarks.paper.rate``.

The network alone, on one batch that stays where it is; the whole training loop with all images on the device, and with
images read ahead from a file that is mapped; the same with merging. And what the host can do without a network: read,
also what is on the disk alone, and make corrupted copies. Needs PyTorch, NumPy and Pillow; the images are random.
Writes ``benchmarks/paper/results/rate.<device>.json``, or without a network ``rate.<processor>.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import processor
from inmerge_fast import NoEffectWarning
from inmerge_fast.demo.data import require
from inmerge_fast.demo.train import Schedule

from . import feed as feeds
from . import protocol, robustness
from .bench import Bench
from .config import RECOMMENDED, Arm, Merging, Recipe
from .dataset import DataSet, Split
from .experiments import FINE_TUNE_ARMS
from .merging import treatment
from .models import build

RESULTS = Path(__file__).parent / "results"
CLASSES = 9  # of PathMNIST
BATCH = 64  # images that are read at a time, without a network
SETTINGS = {"merging as published": FINE_TUNE_ARMS["paper"].merging, "merging, recommended": RECOMMENDED}
FILE = "images.npy"
COPIED, SEVERITY = 64, 3  # images that are corrupted, and how much
PROBES = 16  # places of a file that are looked at
EPOCHS = 2  # that are timed: those of a longer training without those of a shorter one, which has the same start


def random_data(count: int, side: int, folder: Path, channels: int = 3) -> DataSet:
    """Random images in a mapped file, as those of ChestX-ray14 are."""
    rng = np.random.default_rng(0)
    path = folder / FILE
    file = np.lib.format.open_memmap(path, "w+", np.uint8, (count, channels, side, side))
    for start in range(0, count, 256):
        file[start : start + 256] = rng.integers(0, 256, file[start : start + 256].shape, dtype=np.uint8)
    file.flush()
    del file
    images = torch.from_numpy(np.load(path, mmap_mode="c"))
    part = Split(images, torch.from_numpy(rng.integers(0, CLASSES, count)))
    few = Split(images[:8], part.labels[:8])
    return DataSet("random", "multi-class", tuple(map(str, range(CLASSES))), part, few, few, "random pixels")


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def reading(options: argparse.Namespace, device: torch.device, batch: int) -> dict[str, float]:
    """Images per second that reach the device, in the order of an epoch, with no network behind them."""
    rates = {}
    schedule = Schedule(0, 2, 0.1, 0.1, batch, 0)

    def epoch(feed: feeds.Feed, number: int) -> None:
        parts = list(feeds.parts_of(schedule, number, options.images))
        feed.begin(parts)
        for indices in parts:
            feed(indices)
        feed.close()

    count = schedule.batches(options.images) * batch
    with tempfile.TemporaryDirectory(dir=options.out) as folder:  # the usual place may be in memory
        images = random_data(options.images, options.side, Path(folder)).train.images
        if _forget(Path(folder) / FILE):  # first, as long as no page is mapped
            rates["read ahead, disk"] = count / seconds_of(lambda: epoch(feeds.Feed(images, device, 0), 1), device)
        for name, room in (("on the device", None), ("read ahead", 0)):
            feed = feeds.Feed(images, device, room)
            epoch(feed, 0)
            rates[name] = count / seconds_of(lambda feed=feed: epoch(feed, 1), device)
    return rates


def _forget(path: Path) -> bool:
    """Let the system keep nothing of a file in memory; False where it cannot be asked to, or keeps it all the same.

    No page of it may be mapped.
    """
    if not (hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT")):
        return False
    with open(path, "rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for place in range(0, path.stat().st_size, path.stat().st_size // PROBES):
            try:
                os.preadv(file.fileno(), [bytearray(1)], place, os.RWF_NOWAIT)
            except BlockingIOError:
                continue  # it would have to be read
            except OSError:  # a file system that cannot tell
                return False
            return False
    return True


def corrupting(options: argparse.Namespace) -> dict[str, float]:
    """Corrupted copies per second, by kind, as they are made once for the whole test set before the first measuring."""
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        images = random_data(COPIED, options.side, Path(folder)).train.images.clone()
    robustness.corrupt(images[:1], "jpeg", SEVERITY)  # imports
    for kind in robustness.CORRUPTIONS:
        seconds = seconds_of(lambda kind=kind: robustness.corrupt(images, kind, SEVERITY), torch.device("cpu"))
        rates[kind] = len(images) / seconds
    rates["noise"] = COPIED / seconds_of(
        lambda: robustness.add_noise(images, robustness.NOISE_SIGMAS[-1]), torch.device("cpu")
    )
    return rates


def training(recipe: Recipe, bench: Bench, setting: Merging | None) -> float:
    """Images per second of the training loop, whatever it takes to start it left out."""

    def train(epochs: int) -> float:
        model = build(recipe.model, bench.data, 0)
        protocol._place(model, bench)
        model.net.train()
        schedule = Schedule(0, epochs, 0.01, 0.01, recipe.batch_size, 0)
        steps = epochs * schedule.batches(len(bench.data.train))
        merger = treatment(model.net, Arm(setting), 0, 0, steps)
        return seconds_of(lambda: protocol._train(model, recipe, bench, schedule, merger), bench.device)

    train(1)
    images = EPOCHS * (len(bench.data.train) // recipe.batch_size) * recipe.batch_size
    return images / (train(1 + EPOCHS) - train(1))


def network_alone(recipe: Recipe, bench: Bench, steps: int) -> float:
    """Images per second of forward pass, backward pass and update on one batch."""
    model = build(recipe.model, bench.data, 0)
    protocol._place(model, bench)
    model.net.train()
    optimizer = protocol._optimizer(recipe, model.net)
    unit = bench.data.train.images[: recipe.batch_size].to(bench.device).float() / 255
    labels = bench.data.train.labels[: recipe.batch_size].to(bench.device)

    def work() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            with protocol.autocast(recipe, bench.device):
                logits = model.net(bench.prepare(model, unit))
            bench.loss(logits, labels).backward()
            optimizer.step()

    seconds_of(work, bench.device)
    return steps * recipe.batch_size / seconds_of(work, bench.device)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rates of all networks on a device."""
    device = torch.device(options.device if options.models else "cpu")
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    environment = {**protocol.environment(device), "processor": processor(), "load": load}
    settings = {"on the device": None, **SETTINGS}
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = random_data(options.images, options.side, Path(folder))
        for name, batch in zip(options.models, options.batches, strict=True):
            recipe = Recipe("rate", "random", name, batch_size=batch, flip=True, bf16=options.bf16)
            bench = Bench(data, device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            row: dict[str, Any] = {"batch": batch, "network": network_alone(recipe, bench, options.images // batch)}
            row |= {label: training(recipe, bench, setting) for label, setting in settings.items()}
            row["read ahead"] = training(recipe, Bench(data, device, room=0), None)
            if device.type == "cuda":
                row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            rows[name] = row
            print(name, json.dumps(row), flush=True)
            gc.collect()
    return {
        "side": options.side, "images": options.images, "copied": COPIED, "bf16": options.bf16, "training": rows,
        "reading": reading(options, device, options.batches[0] if options.batches else BATCH),
        "corrupting": corrupting(options), "environment": environment,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the command; gives the file that it wrote."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.rate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="*", default=["vgg19", "resnet18"], help="none: what the host can do "
                        "alone (default: %(default)s)")  # fmt: skip
    parser.add_argument("--batches", nargs="*", type=int, default=[64, 128], help="images per step of each")
    parser.add_argument("--side", type=int, default=224, help="of the images (default: %(default)s)")
    parser.add_argument("--images", type=int, default=2048, help="of an epoch (default: %(default)s)")
    parser.add_argument("--no-bf16", dest="bf16", action="store_false", help="float32, not autocast to bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    if len(options.models) != len(options.batches):
        parser.error(f"argument --batches: {len(options.batches)} for {len(options.models)} models: give one for each")
    if options.images < max(options.batches or [BATCH]):
        parser.error(f"argument --images: {options.images} do not fill a batch of {max(options.batches or [BATCH])}")
    require("PIL", "Pillow")  # of the last thing that is measured
    options.out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # of random weights nothing is alike
        found = measure(options)
    device = found["environment"]["device"]
    where = re.sub(r"[^A-Za-z0-9]+", "-", found["environment"]["processor"] if device == "cpu" else device).strip("-")
    path: Path = options.out / f"rate.{where}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {path}")
    return path


if __name__ == "__main__":
    main()
