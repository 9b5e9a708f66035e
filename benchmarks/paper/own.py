"""A network or a data set of one's own: ``package.module:function`` on the command line."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .dataset import SPLITS, DataSet, Split

SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_own(spec: str) -> bool:
    """Whether a name on the command line means a function: ``package.module:function``."""
    return not spec.startswith("timm:") and SPEC.fullmatch(spec) is not None


def function_of(spec: str, argument: str) -> Any:
    """The function that a specification names.

    Args:
        spec: ``package.module:function``, found as ``import`` finds it: in this folder, or installed.
        argument: what it was given for, ``--model`` or ``--data``, for messages.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # a module raises what it likes
        raise ValueError(
            f"{argument} {spec}: {module} cannot be imported ({type(error).__name__}: {error}); it is looked for in "
            "this folder and among what is installed"
        ) from error
    if not callable(found):
        raise ValueError(f"{argument} {spec}: {module} has no function {name}")
    return found


def own_model(spec: str, classes: int, channels: int, dims: int, side: int) -> tuple[nn.Module, int]:
    """A network of one's own, tried on two black images, and the channels that it takes.

    Args:
        spec: names a function that is called with ``classes`` and ``channels`` and gives the network.
        classes: numbers that the network gives per image.
        channels: of the images; grey ones are repeated for a network whose first convolution takes three.
        dims: 2 for images, 3 for volumes.
        side: of the images.

    Raises:
        ValueError: it cannot be made, or does not take the images, or does not give a number per class.
    """
    maker = function_of(spec, "--model")
    try:
        net = maker(classes=classes, channels=channels)
    except Exception as error:
        raise ValueError(
            f"--model {spec}: called with classes={classes} and channels={channels} it raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"--model {spec}: must give a torch.nn.Module, gave {type(net).__name__}")
    convolutions = (m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    first = next(convolutions, None)
    taken = first.in_channels if first is not None and first.in_channels in (channels, 3) else channels
    shape = (2, taken, *[side] * dims)
    was_training = net.training
    try:
        with torch.no_grad():
            out = net.eval()(torch.zeros(shape))
    except Exception as error:
        raise ValueError(
            f"--model {spec}: it does not take images {shape} ({type(error).__name__}: {error}); --size enlarges them"
        ) from error
    if not isinstance(out, torch.Tensor) or out.shape != (2, classes):
        got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(f"--model {spec}: must give logits (2, {classes}) of 2 images, gave {got}")
    return net.train(was_training), taken


def own_data(spec: str) -> DataSet:
    """A data set of one's own.

    Args:
        spec: names a function without arguments that gives a :class:`DataSet`, or a mapping from "train", "val" and
            "test" to what has a length and gives ``(image, label)`` by index, as ``torch.utils.data.Dataset``. An image
            is a PIL image, uint8 ``(H, W)`` or ``(H, W, 3)``, or a tensor ``(channels, [depth,] H, W)``, uint8 or in
            [0, 1]; all of one size. A label is a class from 0 on, or a vector of 0 and 1.

    Raises:
        ValueError: it gives something else; the message names the part and the index.
    """
    found = function_of(spec, "--data")()
    if isinstance(found, DataSet):
        return found
    if not isinstance(found, Mapping) or set(found) != set(SPLITS):
        got = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"--data {spec}: must give a DataSet or a mapping with {', '.join(SPLITS)}, gave {got}")
    train, val, test = (_part(found[name], f"--data {spec}: {name}") for name in SPLITS)
    shapes = {name: part.images.shape[1:] for name, part in zip(SPLITS, (train, val, test), strict=True)}
    kinds = {part.labels.shape[1:] for part in (train, val, test)}
    if len(set(shapes.values())) > 1 or len(kinds) > 1:
        raise ValueError(
            f"--data {spec}: the parts differ: images { ({k: tuple(v) for k, v in shapes.items()}) }, labels "
            f"{sorted(map(tuple, kinds))}"
        )
    multi = train.labels.ndim == 2
    count = train.labels.shape[1] if multi else int(train.labels.max()) + 1
    for name, part in zip(SPLITS, (train, val, test), strict=True):
        if not multi and int(part.labels.max()) >= count:
            raise ValueError(f"--data {spec}: {name} has class {int(part.labels.max())}, train none above {count - 1}")
    total = hashlib.sha256()
    for part in (train, val, test):
        total.update(part.images.numpy().tobytes())
        total.update(part.labels.numpy().tobytes())
    labels = tuple(map(str, range(count)))
    source = f"{spec}, sha256 {total.hexdigest()[:16]}"
    return DataSet(spec.partition(":")[2], "multi-label" if multi else "multi-class", labels, train, val, test, source)


def _part(items: Any, where: str) -> Split:
    images, labels = [], []
    for index, (image, label) in enumerate(_items(items, where)):
        images.append(_pixels(image, f"{where}[{index}]"))
        labels.append(np.asarray(label))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"{where}[{index}]: its image is {tuple(images[-1].shape)}, the first one {tuple(images[0].shape)}: "
                "resize them to one size"
            )
        if labels[-1].size != labels[0].size:
            raise ValueError(f"{where}[{index}]: has {labels[-1].size} labels, the first one {labels[0].size}")
    values = np.stack([one.reshape(-1) for one in labels])
    if not np.array_equal(values, np.round(values)) or (values < 0).any():
        raise ValueError(f"{where}: labels must be classes from 0 on, or vectors of 0 and 1")
    if values.shape[1] == 1:
        return Split(torch.stack(images), torch.from_numpy(values[:, 0].astype(np.int64)))
    if (values > 1).any():
        raise ValueError(f"{where}: labels must be classes from 0 on, or vectors of 0 and 1")
    return Split(torch.stack(images), torch.from_numpy(values.astype(np.float32)))


def _items(items: Any, where: str) -> Iterator[tuple[Any, Any]]:
    if not hasattr(items, "__getitem__") or not hasattr(items, "__len__") or not len(items):
        raise ValueError(f"{where}: must have a length above 0 and items by index, got {type(items).__name__}")
    for index in range(len(items)):
        item = items[index]
        if not isinstance(item, Sequence) or len(item) != 2:
            raise ValueError(f"{where}[{index}]: must be (image, label), got {type(item).__name__}")
        yield item[0], item[1]


def _pixels(image: Any, where: str) -> torch.Tensor:
    """An image as uint8 ``(channels, [depth,] H, W)``."""
    if isinstance(image, torch.Tensor):
        values = image.detach().cpu()
        if values.ndim not in (3, 4):
            raise ValueError(f"{where}: a tensor must be (channels, [depth,] H, W), got {tuple(values.shape)}")
        if values.is_floating_point():
            if not bool(((values >= 0) & (values <= 1)).all()):
                raise ValueError(
                    f"{where}: values must be in [0, 1], got {values.min():g} to {values.max():g}: leave normalising "
                    "out, it is done here"
                )
            values = (values * 255).round().to(torch.uint8)
    else:
        array = np.asarray(image)
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
            raise ValueError(f"{where}: an image must be (H, W) or (H, W, 3), got {array.shape}")
        values = torch.from_numpy(np.array(array))  # a copy: arrays of PIL are read-only
        values = values[None] if values.ndim == 2 else values.permute(2, 0, 1).contiguous()
    if values.dtype != torch.uint8:
        raise ValueError(f"{where}: must be of 8 bits (uint8), or a tensor in [0, 1], got {values.dtype}")
    return values
