"""``PAPER_TABLES.md``: how to run the paper's own tables, what they cost, and what each row would need.

Work is counted, from the network and the protocol; time is that work over a rate that was measured on a GPU: of the
whole training loop by ``benchmarks.paper.rate``, or of a training step alone by ``benchmarks.bench_training``.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import result_files

from . import robustness
from .chestxray import LABELS
from .experiments import EXPERIMENTS, Options
from .models import PUBLISHED as NETWORKS
from .published import CHESTXRAY14, MEDMNIST
from .tables import table
from .trained import PUBLISHED, merges_of, read

PAGE = "PAPER_TABLES.md"
SIDE, MODEL = 224, "vgg19"
WEIGHTS = "vgg19-dcbb9e9d.pth"  # torchvision's name of the file
BACKBONE_EPOCHS, ARM_EPOCHS, BATCH = 30, 10, 64
POWER, LEVEL = 0.84, 1.96  # normal quantiles: of seeing a gain that is there (80 %), and of a two-sided 5 %
SEEDS = 8
READ = ("read ahead", "read ahead, disk")
KINDS = ("network", "on the device", "merging as published", "merging, recommended", "read ahead")  # see rate.py


@dataclass(frozen=True)
class Plan:
    """A table of the paper.

    Attributes:
        data: its name on the command line.
        title: of the data set.
        images: training, validation and test images.
        classes: classes or labels.
        channels: of the images as they are stored.
    """

    data: str
    title: str
    images: tuple[int, int, int]
    classes: int
    channels: int = 3

    @property
    def is_chest(self) -> bool:
        """Whether it is the table of ChestX-ray14."""
        return self.data == "chestxray14"

    @property
    def experiment(self) -> str:
        """Its experiment."""
        return "table-chestxray14" if self.is_chest else "table-medmnist"

    @property
    def seeds(self) -> int:
        """Seeds of its command."""
        return 3 if self.is_chest else max(SEEDS, seeds_needed(*self.published))

    @property
    def published(self) -> tuple[float, float, float]:
        """The gain in accuracy that the paper reports and the standard deviations of both arms, in points."""
        (base, sd), (ours, other) = MEDMNIST[self.data]
        return 100 * (ours - base), 100 * sd, 100 * other

    @property
    def command(self) -> str:
        """What to type."""
        where = "--data FOLDER" if self.is_chest else f"--data {self.data}"
        # Of ChestX-ray14 the experiment's own defaults are as published: batch 324, learning rate 0.1.
        usual = f" --backbone-epochs {BACKBONE_EPOCHS} --arm-epochs {ARM_EPOCHS} --batch-size {BATCH} --lr 0.01"
        return (
            f"python -m benchmarks.paper {self.experiment} {where} --size {SIDE} --model {MODEL} --weights {WEIGHTS}"
            f"{'' if self.is_chest else usual} --bf16 --seeds {self.seeds} --corruptions own"
        )


# Counts of MedMNIST v2 (Yang et al. 2023); of ChestX-ray14 by its official lists, whose validation part is split off
# the first by patient.
PLANS = (
    Plan("pathmnist", "PathMNIST", (89_996, 10_004, 7_180), 9),
    Plan("dermamnist", "DermaMNIST", (7_007, 1_003, 2_005), 7),
    Plan("bloodmnist", "BloodMNIST", (11_959, 1_712, 3_421), 8),
    Plan("chestxray14", "ChestX-ray14", (77_872, 8_652, 25_596), len(LABELS), channels=1),
)


@functools.cache
def gigaflops(name: str, classes: int) -> tuple[float, float]:
    """Floating-point operations of one image, forward, and forward and backward, in 1e9; counted, not run."""
    with torch.device("meta"):
        net = NETWORKS[name](classes)
        image = torch.empty(1, 3, SIDE, SIDE)
    with FlopCounterMode(display=False) as forward:
        out = net(image)
    with FlopCounterMode(display=False) as both:
        net(image).sum().backward()
    assert out.shape == (1, classes)
    return forward.get_total_flops() / 1e9, both.get_total_flops() / 1e9


def work(plan: Plan) -> tuple[int, int]:
    """Training images and measured images of one seed, as the experiment is made of them."""
    options = Options(
        data=plan.data, size=SIDE, model=MODEL, backbone_epochs=BACKBONE_EPOCHS, arm_epochs=ARM_EPOCHS,
        batch_size=None if plan.is_chest else BATCH,
    )  # fmt: skip
    trained = measured = 0
    for recipe, arms in EXPERIMENTS[plan.experiment](options).groups:
        steps = plan.images[0] // recipe.batch_size * recipe.batch_size
        trained += steps * (recipe.backbone_epochs + recipe.arm_epochs * sum(not arm.stop for arm in arms))
        each = len(robustness.CORRUPTIONS) * len(recipe.severities) + len(robustness.NOISE_SIGMAS)
        measured += plan.images[2] * (1 + each) * len(arms)  # vgg19 has no batch norm: nothing is measured twice
    return trained, measured


def rates(out: Path) -> list[dict[str, Any]]:
    """What was measured, file by file."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("rate.*.json"))]


@dataclass(frozen=True)
class Speed:
    """What a GPU was measured to train, images of the network per second.

    Attributes:
        title: of its column.
        rate: images per second.
        source: what was measured, in words.
    """

    title: str
    rate: float
    source: str


def speeds(gpu: Sequence[dict[str, Any]]) -> list[Speed]:
    """Of every GPU the rate of the training loop, or where that was not measured what a training step takes.

    Args:
        gpu: files of GPUs that ``rate.py`` wrote.
    """
    loops = {one["environment"]["device"]: one["training"][MODEL]["on the device"] for one in gpu}
    found = [
        Speed(
            f"hours, {device}", rate, f"{device}: {rate:,.0f} images/s in the whole training loop, images on the device"
        )
        for device, rate in loops.items()
    ]
    for results in result_files.load():
        if results.bench == "training" and results.on_gpu and results.device not in loops:
            for row in results.pick(net="VGG19", merging="lasting"):
                images, milliseconds = row["batch"][0], row["step_us"] / 1e3
                rate = 1e3 * images / milliseconds
                source = (
                    f"{results.device}: {rate:,.0f} images/s, from a training step of {images} images that lie on the "
                    f"device ({milliseconds:.1f} ms, {row['peak_bytes'] / 2**30:.1f} GiB at most; `{results.path}`)"
                )
                found.append(Speed(f"hours, {results.device}", rate, source))
    return found


def seeds_needed(gain: float, first: float, second: float) -> int:
    """Seeds that see a gain with 80 % at a two-sided 5 %, if arms vary as published and independently."""
    spread = math.hypot(first, second)
    return max(3, math.ceil(((LEVEL + POWER) * spread / gain) ** 2) + 2)  # two more, for Student's t


def write(out: Path) -> Path:
    """Write the page beside a folder of results."""
    measured = rates(out)
    gpu = [one for one in measured if one["environment"]["device"] != "cpu" and MODEL in one["training"]]
    parts = [_head(), _commands(), _costs(gpu, measured), _needs(out), _path(measured, speeds(gpu))]
    target = out.parent / PAGE
    target.write_text("\n".join(parts).rstrip() + "\n")
    print(f"written: {target}")
    return target


def _head() -> str:
    return (
        "# The paper's own tables: how to run them\n\n"
        "Written by `python -m benchmarks.paper report`. None of these has been run here: they need the images, and a "
        "GPU for some hours. All else is in place, and this page says what it costs. The network is the paper's, VGG19 "
        f"with ImageNet weights (torchvision's `{WEIGHTS}`, downloaded by hand) at {SIDE} px, {BACKBONE_EPOCHS} epochs "
        f"of backbone and {ARM_EPOCHS} of every arm, the first ten of its convolutions left out, all as published. It "
        "has no batch norm, so the artefact of stale statistics cannot arise in it, and one evaluation is enough.\n"
    )


def _commands() -> str:
    lines = "\n\n".join(f"# {plan.title}\n{plan.command}" for plan in PLANS)
    return (
        "## Commands\n\n"
        "MedMNIST's names need `pip install --no-deps medmnist`; its files are downloaded, or read from the folder in "
        "the environment variable `INMERGE_DATA`. ChestX-ray14 is a folder in the NIH's layout "
        "([DATA.md](DATA.md)). A killed command goes on where it was; on several GPUs each command can have one, or "
        "`torchrun --nproc-per-node N -m benchmarks.paper ...` shares one.\n\n"
        f"```\n{lines}\n```\n"
    )


def _costs(gpu: Sequence[dict[str, Any]], measured_on: Sequence[dict[str, Any]]) -> str:
    forward, both = gigaflops(MODEL, 9)
    head = ["table", "runs", "trained images", "measured images", "PFLOP", "images on the device", "copies on disk"]
    timed = speeds(gpu)
    head += [one.title for one in timed]
    body = []
    for plan in PLANS:
        trained, measured = (plan.seeds * one for one in work(plan))
        arms = sum(len(arms) for _, arms in EXPERIMENTS[plan.experiment](Options(data=plan.data, model=MODEL)).groups)
        size = plan.channels * SIDE * SIDE / 2**30
        copied = plan.images[2] * (len(robustness.CORRUPTIONS) * 2 + len(robustness.NOISE_SIGMAS))
        gib = f"{plan.images[0] * size:.1f} GiB", f"{copied * size:.0f} GiB"
        row = [plan.title, str(arms * plan.seeds), f"{trained / 1e6:.1f} M", f"{measured / 1e6:.1f} M",
               f"{(trained * both + measured * forward) / 1e6:,.0f}", *gib]  # fmt: skip
        # Measuring is a forward pass, which is that much less work than a training step.
        row += [f"{(trained + measured * forward / both) / one.rate / 3600:.1f}" for one in timed]
        body.append(row)
    parameters = sum(one.numel() for one in _meta_network().parameters())
    peak = [f"{one['training'][MODEL]['peak_gib']:.1f} GiB at most on {one['environment']['device']}" for one in gpu]
    text = (
        f"## What they cost\n\nOne image of {SIDE} px takes VGG19 {forward:.1f} GFLOP forward and {both:.1f} with the "
        "backward pass (counted by `torch.utils.flop_counter`; a multiplication and an addition are two). A seed is a "
        "backbone and then every arm for the same epochs, in both recipes of `table-medmnist`; measuring is the clean "
        f"test images and {len(robustness.CORRUPTIONS) * 2 + len(robustness.NOISE_SIGMAS)} corrupted copies for each "
        "arm.\n\n" + table(head, body)
    )
    text += (
        "\nHours are trained images over the rate at which a GPU trains this network, and measured images by their "
        f"share of the work. Measured: {'; '.join(one.source for one in timed) or 'none'}. Elsewhere: the PFLOP over "
        "what the device sustains. `python -m benchmarks.paper.rate --out benchmarks/paper/results` measures a "
        "device's training loop, data path included, in a minute, and this table then has its column.\n"
    )
    text += (
        "\nThe corrupted copies are made on the CPU once and kept below `XDG_CACHE_HOME` (or `~/.cache`), where every "
        f"run reads them; without room for them each run makes them anew.{_copying(measured_on)}\n"
    )
    memory = 12 * parameters / 2**30
    return text + (
        f"\nMemory: weights, gradients and momentum of {parameters / 1e6:.0f} M parameters are {memory:.1f} GiB, the "
        f"activations of a batch of {BATCH} in bfloat16 some GiB more"
        + (f" ({'; '.join(peak)})" if peak else "")
        + ", and the images if they fit half of what is then free, else they are read ahead.\n"
    )


def _load(host: dict[str, Any]) -> str:
    load = host["environment"]["load"]
    return "–" if load is None else f"{load:.1f}"


def _copying(measured: Sequence[dict[str, Any]]) -> str:
    """How long it takes to make the corrupted copies."""
    text = ""
    for host in measured:
        if not host.get("corrupting") or host["side"] != SIDE:
            continue
        each = {kind: 1 / rate for kind, rate in host["corrupting"].items()}  # seconds of three channels
        noise = each.pop("noise")
        seconds = 2 * sum(each.values()) + len(robustness.NOISE_SIGMAS) * noise
        minutes = (f"{plan.title} {plan.images[2] * seconds * plan.channels / 3 / 60:.0f}" for plan in PLANS)
        environment = host["environment"]
        text += (
            f" Minutes on an {environment['processor']}, threads: {environment['threads']} (load before {_load(host)}; "
            f"measured with {host['copied']} images of random pixels): {', '.join(minutes)}."
        )
    return text


@functools.cache
def _meta_network() -> torch.nn.Module:
    with torch.device("meta"):
        return NETWORKS[MODEL](9)


def _needs(out: Path) -> str:
    body = []
    for plan in PLANS:
        if plan.is_chest:
            best = CHESTXRAY14["InMerge"][-1]
            body.append([plan.title, f"mean AUROC {best:.3f}, no baseline of its own", "–",
                         "an interval of InMerge minus baseline above 0",
                         f"an interval that ends below 0, or InMerge's own mean clearly below {best:.3f}"])  # fmt: skip
            continue
        (base, _), (ours, _) = MEDMNIST[plan.data]
        gain = plan.published[0]
        confirms, refutes = "a paired interval above 0 that holds", "a paired interval that ends below"
        body.append([
            plan.title, f"accuracy {100 * base:.1f} → {100 * ours:.1f} (+{gain:.1f})",
            str(seeds_needed(*plan.published)), f"{confirms} +{gain:.1f}", f"{refutes} +{gain:.1f}",
        ])  # fmt: skip
    vggs = [line for line in read(out) if "VGG" in line["name"]]
    merges = [f"{merges_of(line[PUBLISHED], PUBLISHED)[0]:.2f} ({line['name']})" for line in vggs]
    text = (
        "## What each row would need\n\n"
        "*seeds*: that see the published gain with 80 % at a two-sided 5 %, if both arms vary as published and "
        f"independently (paired runs vary less); the commands ask for {SEEDS} at least. Beside accuracy: AUC, which no "
        "shift of the threshold moves, the reseeded baseline, which shows what luck moves, and the merges per step."
    )
    if merges:
        text += (
            f" At the paper's setting a trained network of this family merges {', '.join(merges)} filters per step "
            "([trained networks](results/trained-networks.md)): a gain with next to no merge would be luck."
        )
    return f"{text}\n\n{table(['table', 'published', 'seeds', 'would confirm it', 'would refute it'], body)}"


def _path(measured: Sequence[dict[str, Any]], takes: Sequence[Speed]) -> str:
    text = (
        "## Does the data path keep up?\n\n"
        "Images stay uint8; where all fit half of a GPU's free memory they lie there, else a thread reads the batches "
        "that come next from the mapped file into pinned memory while the network computes ([feed.py](feed.py)). "
        "Networks are in channels_last, `--bf16` is autocast, and nothing in a step waits for the device. "
        "`python -m benchmarks.paper.rate` measures all of it, images per second.\n\n"
    )
    hosts = [
        [one["environment"]["processor"], str(one["environment"]["threads"]), _load(one), f"{one['images']:,}",
         *(f"{one['reading'][kind]:,.0f}" if kind in one["reading"] else "–" for kind in READ)]
        for one in measured
        if one["environment"]["device"] == "cpu" and one["side"] == SIDE  # a GPU's are in the table below
    ]  # fmt: skip
    if hosts:
        text += (
            f"What a host without a GPU reads ahead (nothing is pinned or copied to a device), images of {SIDE} px in "
            "colour in the random order of one epoch, one run; *disk*: of a file of which its system holds nothing in "
            "memory"
            + "".join(f". Training takes {one.rate:,.0f} on an {one.title.removeprefix('hours, ')}" for one in takes)
            + ":\n\n"
            + table(["host", "threads", "load before", "images", "in memory", "disk"], hosts)
            + "\n"
        )
    body = [
        [one["environment"]["device"], f"{name}, batch {row['batch']}", *(f"{row[kind]:,.0f}" for kind in KINDS),
         *(f"{one['reading'][kind]:,.0f}" for kind in ("on the device", "read ahead"))]
        for one in measured
        for name, row in one["training"].items()
    ]  # fmt: skip
    if not body:
        return text + "With a network behind it, on a GPU, the data path has not been measured yet.\n"
    head = ["device", "network", "network alone", "training", "merging as published", "merging, recommended",
            "training, read ahead", "feeding alone", "feeding alone, read ahead"]  # fmt: skip
    return text + table(head, body)
