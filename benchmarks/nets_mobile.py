"""EfficientNet-B0 and ConvNeXt-Tiny with random weights: the networks with depthwise convolutions, see ``nets.py``.

Their stochastic depth is left out: it holds no parameters and does nothing in eval mode.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


class SqueezeExcitation(nn.Module):
    """Scales every channel by what two 1x1 convolutions make of the channel means."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.fc1(x.mean((2, 3), keepdim=True))
        return x * self.fc2(nn.functional.silu(scale)).sigmoid()


class MBConv(nn.Module):
    """Widens by a 1x1, filters each channel by a depthwise convolution, scales the channels, narrows by a 1x1."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = channels * expand
        layers: list[nn.Module] = [_conv_bn(channels, wide, 1)] if expand > 1 else []
        layers += [
            _conv_bn(wide, wide, kernel, stride, groups=wide),
            SqueezeExcitation(wide, channels // 4),
            _conv_bn(wide, out, 1, activation=False),
        ]
        self.block = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x) if self.has_shortcut else self.block(x)


def _conv_bn(
    channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True
) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), *([nn.SiLU(inplace=True)] if activation else []))


def efficientnet_b0(classes: int = 1000) -> nn.Sequential:
    """EfficientNet-B0 (arXiv 1905.11946)."""
    features = [_conv_bn(3, 32, 3, stride=2)]
    channels = 32
    for expand, kernel, stride, out, depth in (
        (1, 3, 1, 16, 1),
        (6, 3, 2, 24, 2),
        (6, 5, 2, 40, 2),
        (6, 3, 2, 80, 3),
        (6, 5, 1, 112, 3),
        (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1),
    ):
        blocks = [MBConv(channels, out, kernel, stride, expand)]
        blocks += [MBConv(out, out, kernel, 1, expand) for _ in range(depth - 1)]
        features.append(nn.Sequential(*blocks))
        channels = out
    features.append(_conv_bn(channels, 1280, 1))
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes)),
        )
    )


class Permute(nn.Module):
    """Reorders the dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(self.dims)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of an NCHW tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A 7x7 depthwise convolution and two Linears, which work on every pixel, with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            Permute(0, 3, 1, 2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer_scale * self.block(x)


def convnext_tiny(classes: int = 1000) -> nn.Sequential:
    """ConvNeXt-Tiny (arXiv 2201.03545)."""
    widths, depths = (96, 192, 384, 768), (3, 3, 9, 3)
    features = [nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0], eps=1e-6))]
    for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if index > 0:
            narrow = widths[index - 1]
            features.append(nn.Sequential(ChannelNorm(narrow, eps=1e-6), nn.Conv2d(narrow, width, 2, stride=2)))
        features.append(nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depth))))
    head = nn.Sequential(ChannelNorm(widths[-1], eps=1e-6), nn.Flatten(), nn.Linear(widths[-1], classes))
    return nn.Sequential(
        OrderedDict(features=nn.Sequential(*features), avgpool=nn.AdaptiveAvgPool2d(1), classifier=head)
    )
