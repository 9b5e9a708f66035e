"""Real convolutional networks with random weights, for tests and benchmarks: VGG, ResNets, DenseNet, U-Net, 3-D ResNet.

Modules are named and registered as in torchvision (the U-Net, which it does not have, as in its paper), because the
order of registration is the order in which ``merge_`` counts layers. Weights are PyTorch's default initialisation.
EfficientNet and ConvNeXt are in ``nets_mobile.py``.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

VGG_CONVS = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # convolutions of each stage


def vgg(depth: int, classes: int = 1000, hidden: int = 4096, *, batch_norm: bool = False) -> nn.Sequential:
    """VGG11, 16 or 19 (arXiv 1409.1556). ``hidden`` is the width of its classifier: 4096 of them hold 86 % of VGG19."""
    features: list[nn.Module] = []
    channels = 3
    for stage_width, convs in zip((64, 128, 256, 512, 512), VGG_CONVS[depth], strict=True):
        for _ in range(convs):
            features.append(nn.Conv2d(channels, stage_width, 3, padding=1))
            features += [nn.BatchNorm2d(stage_width)] if batch_norm else []
            features.append(nn.ReLU(inplace=True))
            channels = stage_width
        features.append(nn.MaxPool2d(2))
    classifier = nn.Sequential(
        nn.Linear(512 * 7 * 7, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, classes),
    )
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            avgpool=nn.AdaptiveAvgPool2d(7),
            flatten=nn.Flatten(),
            classifier=classifier,
        )
    )


def vgg19(classes: int = 1000, hidden: int = 4096) -> nn.Sequential:
    return vgg(19, classes, hidden)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        # Registered last: in module order a shortcut comes after the convolutions that it bypasses.
        self.downsample = None if (channels, stride) == (width, 1) else _downsample(channels, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out))
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; strides in the 3x3, as torchvision has it ("v1.5")."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None if (channels, stride) == (4 * width, 1) else _downsample(channels, 4 * width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out)).relu()
        out = self.bn3(self.conv3(out))
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


def _downsample(channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class ResNet(nn.Module):
    """ResNet (arXiv 1512.03385) of four stages.

    ``width`` is that of the first stage. For images of about 28 pixels, ``small_images`` replaces the 7x7 stem with
    stride 2 and its pooling by a 3x3 convolution, as is usual for CIFAR and MedMNIST.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, ...],
        classes: int,
        *,
        channels: int = 3,
        width: int = 64,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        for index, depth in enumerate(depths):
            stage_width = width * 2**index
            blocks = []
            for place in range(depth):
                blocks.append(block(channels, stage_width, stride=2 if index > 0 and place == 0 else 1))
                channels = stage_width * block.expansion
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.bn1(self.conv1(x)).relu())
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def resnet18(classes: int = 1000) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), classes)


def resnet34(classes: int = 1000) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), classes)


def resnet50(classes: int = 1000) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), classes)


class DenseLayer(nn.Module):
    """Adds 32 feature maps to those it is given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 128, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(128)
        self.conv2 = nn.Conv2d(128, 32, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        new = self.conv1(self.norm1(x).relu())
        return torch.cat([x, self.conv2(self.norm2(new).relu())], 1)


def densenet121(classes: int = 1000) -> nn.Sequential:
    """DenseNet-121 (arXiv 1608.06993)."""
    features: dict[str, nn.Module] = {
        "conv0": nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        "norm0": nn.BatchNorm2d(64),
        "relu0": nn.ReLU(inplace=True),
        "pool0": nn.MaxPool2d(3, stride=2, padding=1),
    }
    channels = 64
    for index, depth in enumerate((6, 12, 24, 16), start=1):
        layers = {f"denselayer{place + 1}": DenseLayer(channels + 32 * place) for place in range(depth)}
        features[f"denseblock{index}"] = nn.Sequential(OrderedDict(layers))
        channels += 32 * depth
        if index < 4:
            features[f"transition{index}"] = nn.Sequential(
                OrderedDict(
                    norm=nn.BatchNorm2d(channels),
                    relu=nn.ReLU(inplace=True),
                    conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
                    pool=nn.AvgPool2d(2),
                )
            )
            channels //= 2
    features["norm5"] = nn.BatchNorm2d(channels)
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(OrderedDict(features)),
            relu=nn.ReLU(inplace=True),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(channels, classes),
        )
    )


class UNet(nn.Module):
    """U-Net (arXiv 1505.04597) with its 64 to 1024 channels; padded, so that a shortcut fits without being cropped."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = (64, 128, 256, 512, 1024)
        self.down = nn.ModuleList(_double_conv(old, new) for old, new in zip((channels, *widths), widths, strict=False))
        ups, joins = [], []
        for width in reversed(widths[:-1]):
            ups.append(nn.ConvTranspose2d(2 * width, width, 2, stride=2))
            joins.append(_double_conv(2 * width, width))
        self.up, self.join = nn.ModuleList(ups), nn.ModuleList(joins)
        self.head = nn.Conv2d(64, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcuts = []
        for index, down in enumerate(self.down):
            x = down(x if index == 0 else nn.functional.max_pool2d(x, 2))
            shortcuts.append(x)
        shortcuts.pop()  # the deepest level is x itself
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([shortcuts.pop(), up(x)], 1))
        return self.head(x)


def _double_conv(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(inplace=True),
    )


def unet(channels: int = 1, classes: int = 2) -> UNet:
    return UNet(channels, classes)


class VideoBlock(nn.Module):
    """Two 3x3x3 convolutions and a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        conv1 = nn.Conv3d(channels, width, 3, stride, padding=1, bias=False)
        conv2 = nn.Conv3d(width, width, 3, padding=1, bias=False)
        self.conv1 = nn.Sequential(conv1, nn.BatchNorm3d(width), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(conv2, nn.BatchNorm3d(width))
        self.downsample = None
        if (channels, stride) != (width, 1):
            shortcut = nn.Conv3d(channels, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv2(self.conv1(x))
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


def r3d_18(classes: int = 400) -> nn.Sequential:
    """ResNet-18 with 3-D convolutions (arXiv 1711.11248, "R3D")."""
    parts: dict[str, nn.Module] = {
        "stem": nn.Sequential(
            nn.Conv3d(3, 64, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False),
            nn.BatchNorm3d(64),
            nn.ReLU(inplace=True),
        )
    }
    channels = 64
    for index, width in enumerate((64, 128, 256, 512), start=1):
        first = VideoBlock(channels, width, stride=1 if index == 1 else 2)
        parts[f"layer{index}"] = nn.Sequential(first, VideoBlock(width, width, stride=1))
        channels = width
    parts["avgpool"] = nn.AdaptiveAvgPool3d(1)
    parts["flatten"] = nn.Flatten()
    parts["fc"] = nn.Linear(channels, classes)
    return nn.Sequential(OrderedDict(parts))


def mixed_net() -> nn.Sequential:
    """A small net with every kind of layer that a plan tells apart."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4)),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.BatchNorm2d(6),  # what nothing reads is taken for a head
    )
