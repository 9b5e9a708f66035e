"""What the examples share: their command line, images from a file in MedMNIST format, and a ResNet-18 for them."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate
from torch.utils.data import TensorDataset

QUICK_IMAGES, QUICK_WIDTH = 512, 16


def arguments(description: str | None, given: list[str] | None) -> argparse.Namespace:
    """The options of every example."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="images and labels in MedMNIST format, with one "
                        "class per image (default: scikit-learn's digits, written to that format)")  # fmt: skip
    parser.add_argument("--forward-only", action="store_true", help="merge for the forward and backward pass of each "
                        "step only, instead of in the weights for good")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="images of a micro-batch; two make a step")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="FOLDER", help="checkpoints and logs")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in that folder")
    parser.add_argument("--quick", action="store_true", help="two epochs of few images with a narrow network: seconds")
    options = parser.parse_args(given)
    if options.quick:
        options.epochs, options.batch_size = 2, 16
    options.width = QUICK_WIDTH if options.quick else 64
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def write_digits(path: Path) -> None:
    """scikit-learn's 1797 digits, at 28 px, as MedMNIST's files are: no download, a real stand-in."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images.reshape(-1, 1, 8, 8) * (255 / 16))
    images = interpolate(small, size=(28, 28), mode="bilinear").round().byte()[:, 0].numpy()
    order = np.random.default_rng(0).permutation(len(labels))
    arrays = {}
    for split, chosen in zip(("train", "val", "test"), np.split(order, [1200, 1400]), strict=True):
        arrays |= {f"{split}_images": images[chosen], f"{split}_labels": labels[chosen, None].astype(np.uint8)}
    np.savez(path, **arrays)


def load(options: argparse.Namespace) -> tuple[TensorDataset, TensorDataset, int]:
    """Training images, validation images, and the number of classes.

    Each dataset holds ``(image, label)``: float32 ``(channels, height, width)`` in [-1, 1], and int64.

    Raises:
        ValueError: the images of the file have several labels each.
    """
    path = options.data or options.out / "digits.npz"
    if options.data is None:
        write_digits(path)
    datasets, classes = [], 0
    with np.load(path) as file:
        for split in ("train", "val"):
            images, labels = file[f"{split}_images"], file[f"{split}_labels"]
            if labels.ndim == 2 and labels.shape[1] > 1:
                raise ValueError(f"{path}: each image has {labels.shape[1]} labels, and this example learns classes")
            if options.quick:
                images, labels = images[:QUICK_IMAGES], labels[:QUICK_IMAGES]
            x = torch.from_numpy(images if images.ndim == 4 else images[..., None]).permute(0, 3, 1, 2)
            y = torch.from_numpy(labels.reshape(-1).astype(np.int64))
            datasets.append(TensorDataset(x / 127.5 - 1, y))
            classes = max(classes, int(y.max()) + 1)
    return datasets[0], datasets[1], classes


class Block(nn.Module):
    """Two convolutions and a way round them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Feature maps to feature maps."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample(x)).relu()


def resnet18(channels: int, classes: int, width: int = 64) -> nn.Sequential:
    """A ResNet-18 for small images: torchvision's, with a first convolution of 3x3 and no pooling after it."""
    net = nn.Sequential()
    net.add_module("conv1", nn.Conv2d(channels, width, 3, padding=1, bias=False))
    net.add_module("bn1", nn.BatchNorm2d(width))
    net.add_module("relu", nn.ReLU())
    before = width
    for stage in range(4):
        after = width << stage
        blocks = nn.Sequential(Block(before, after, 1 if stage == 0 else 2), Block(after, after, 1))
        net.add_module(f"layer{stage + 1}", blocks)
        before = after
    net.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("fc", nn.Linear(before, classes))
    return net
