"""Networks by name: the paper's, small ones for 28 px, the sequence models, and any of timm's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks import nets
from inmerge_fast.checkpoints.into_model import head_of, load_into
from inmerge_fast.demo.train import build_net

from .dataset import DataSet
from .imagenet import efficientnet_lite0
from .own import is_own, own_model
from .sequence_models import mamba_small, vit_small

# As torchvision names and registers them, so that its ImageNet weights fit. They take three channels.
PUBLISHED: dict[str, Callable[[int], nn.Module]] = {
    "vgg11": lambda classes: nets.vgg(11, classes),
    "vgg16": lambda classes: nets.vgg(16, classes),
    "vgg19": lambda classes: nets.vgg(19, classes),
    "vgg11_bn": lambda classes: nets.vgg(11, classes, batch_norm=True),
    "vgg16_bn": lambda classes: nets.vgg(16, classes, batch_norm=True),
    "vgg19_bn": lambda classes: nets.vgg(19, classes, batch_norm=True),
    "resnet18": nets.resnet18,
    "resnet34": nets.resnet34,
    "resnet50": nets.resnet50,
    "densenet121": nets.densenet121,
}
SMALL = ("vgg8", "resnet18_small", "vit_small", "mamba_small")  # take the channels that the images have
SMALL_SIDE, PUBLISHED_SIDE = 16, 32  # smallest images they can pool; smaller ones are enlarged
LITE, LITE_SIDE = "efficientnet_lite0", 64  # EfficientNet-Lite0 halves the side five times
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Model:
    """A network and what it takes.

    Attributes:
        net: the network; gives logits ``(N, classes)``.
        channels: colour channels it takes.
        side: side of the images it takes.
        normalisation: ``(means, spreads)`` it was pre-trained with; None for those of the training images.
        loaded: what became of the file of weights, a line; empty for random ones.
    """

    net: nn.Module
    channels: int
    side: int
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    loaded: str = ""


@dataclass(frozen=True)
class Weights:
    """A file of pre-trained weights, and which of several networks in it, or the prefix of its keys."""

    path: Path
    entry: str | None = None


def build(name: str, data: DataSet, seed: int, weights: Weights | str | Path | None = None) -> Model:
    """Build a network with random weights, or pre-trained ones from a file.

    Args:
        name: a key of :data:`PUBLISHED`, one of :data:`SMALL`, ``efficientnet_lite0``, which comes with ImageNet
            weights, ``timm:`` and a name that timm knows, or ``package.module:function``, see
            :func:`benchmarks.paper.own.own_model`.
        data: gives the number of classes, the channels and the size.
        seed: seed of the random weights.
        weights: pre-trained ones, for example torchvision's of ImageNet; the last layer is left out if it is of another
            number of classes.

    Raises:
        ValueError: the name is unknown, the data does not fit it, or the file does not.
    """
    torch.manual_seed(seed)
    classes, side = len(data.labels), data.train.images.shape[-1]
    if data.dims == 3 and name != "vgg8" and not is_own(name):
        raise ValueError(f"model of volumes ({data.name}) must be vgg8 or one of your own, got {name!r}")
    if name in PUBLISHED:
        model = Model(PUBLISHED[name](classes), 3, max(side, PUBLISHED_SIDE))
    elif name == "vgg8":
        model = Model(build_net(data.channels, classes, seed, data.dims), data.channels, max(side, SMALL_SIDE))
    elif name == "resnet18_small":
        net = nets.ResNet(nets.BasicBlock, (2, 2, 2, 2), classes, channels=data.channels, width=16, small_images=True)
        model = Model(net, data.channels, max(side, SMALL_SIDE))
    elif name in ("vit_small", "mamba_small"):
        side = max(side, SMALL_SIDE)
        maker = vit_small if name == "vit_small" else mamba_small
        model = Model(maker(data.channels, classes, side), data.channels, side)
    elif name == LITE:
        model = Model(efficientnet_lite0(classes, seed), 3, max(side, LITE_SIDE))
    elif name.startswith("timm:"):
        model = Model(_from_timm(name.removeprefix("timm:"), classes), 3, max(side, PUBLISHED_SIDE))
    elif is_own(name):
        net, channels = own_model(name, classes, data.channels, data.dims, side)
        model = Model(net, channels, side)
    else:
        raise ValueError(
            f"model must be one of {', '.join([*PUBLISHED, *SMALL, LITE])}, timm:NAME or package.module:function, got "
            f"{name!r}"
        )
    if weights is None:
        return model
    weights = weights if isinstance(weights, Weights) else Weights(Path(weights))
    loaded = _load(model.net, weights, classes)
    return Model(model.net, model.channels, model.side, IMAGENET if model.channels == 3 else None, loaded)


def _load(net: nn.Module, weights: Weights, classes: int) -> str:
    """Load a file into a network, or into what it holds beside its head; gives a line on what became of it."""
    head = head_of(net, classes)
    try:
        return load_into(net, weights.path, head=head, entry=weights.entry).text
    except ValueError:
        body = [key for key in net.state_dict() if not key.startswith(tuple(f"{name}." for name in head))]
        inner = {key.partition(".")[0] for key in body}
        if len(inner) > 1 or not head:
            raise
        name = inner.pop()
        try:
            loaded = load_into(net.get_submodule(name), weights.path, entry=weights.entry)
        except ValueError:
            loaded = None
        if loaded is None:
            raise  # what does not fit the whole network says more
        return f"{loaded.text}, into {name}; the head starts at random"


def _from_timm(name: str, classes: int) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        raise ValueError(
            f"model 'timm:{name}': timm cannot be imported ({error}); install it with --no-deps, and a torchvision "
            "that fits the torch you have, or pip replaces torch"
        ) from error
    if not timm.is_model(name):
        raise ValueError(f"model 'timm:{name}': timm has no such model; see timm.list_models()")
    return timm.create_model(name, pretrained=False, num_classes=classes)
