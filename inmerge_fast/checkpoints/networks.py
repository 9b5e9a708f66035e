"""Which state dicts a checkpoint holds, what they are called in it, and their keys without what wrappers put there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..plan.candidates import INSERTED
from .stand_ins import StandIn

# What people call the weights in a checkpoint, best first: the network as trained, its averages, then parts of several.
KNOWN = (
    "model", "state_dict", "model_state_dict", "model_state", "net", "network", "network_weights", "net_state_dict",
    "weights", "params", "parameters", "module", "ema", "model_ema", "ema_state_dict", "state_dict_ema", "params_ema",
    "ema_model", "teacher", "student", "generator", "encoder", "backbone",
)  # fmt: skip
NO_NETWORK = re.compile(r"optim|opt(_|$)|.*optimi[sz]er|.*schedule|(.*_)?scaler$|(.*_)?(grads?|gradients)$", re.I)
MOMENT = re.compile(
    r"(?:.*\.)?(?:exp_avg|exp_avg_sq|max_exp_avg_sq|exp_inf|momentum_buffer|square_avg|grad_avg|acc_delta|sum_of_squares"
    r"|master_param|exp_avg_sq_row|exp_avg_sq_col|prev_grad|fp32_from_fp16)"
)
LEAVES = {"weight", "bias", "kernel", "scale", "running_mean", "running_var", "num_batches_tracked", "gamma", "beta",
          "moving_mean", "moving_variance", "mean", "var", "w", "b"}  # fmt: skip
FILTERS_LAST = re.compile(r".+/kernel(:0)?")  # names of TensorFlow and JAX, whose filters are the last axis
DEEPEST = 12
COUNTERS = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel, beside the keys that begin with "module."


@dataclass(frozen=True)
class Network:
    """The weights of one network in a file.

    Attributes:
        entry: where they lie in it, keys joined by dots; empty for the file itself.
        tensors: by key, without what wrappers insert (:func:`unwrapped`).
        skipped: ``(key, reason)`` of what is no tensor that PyTorch can hold.
        layouts: ``(groups, transposed)`` of convolutions by key, where the file says so.
        optimizer: how many tensors of an optimizer lay between the weights and were left out.
    """

    entry: str
    tensors: dict[str, torch.Tensor]
    skipped: tuple[tuple[str, str], ...] = ()
    layouts: Mapping[str, tuple[int, bool]] = field(default_factory=dict)
    optimizer: int = 0

    @property
    def filter_elements(self) -> int:
        """Elements of tensors that look like weights of convolutions."""
        return sum(t.numel() for t in self.tensors.values() if t.dim() >= 3 and not t.is_nested)


def unwrapped(keys: Sequence[str]) -> dict[str, str]:
    """Each key without what wrappers insert: ``_orig_mod.`` and the like anywhere, ``module.`` before all of them.

    A wrapper's own counters are left out. Keys stay as they are where two would become the same.
    """
    found = {key: ".".join(part for part in key.split(".") if part not in INSERTED) or key for key in keys}
    while True:
        inner = {key: short for key, short in found.items() if short not in COUNTERS}
        if not inner or not all(short.startswith("module.") and short != "module." for short in inner.values()):
            break
        found = {key: short.removeprefix("module.") for key, short in inner.items()}
    return found if len(set(found.values())) == len(found) else {key: key for key in keys}


def networks_in(content: object) -> list[Network]:
    """The networks in what a file holds, the one that is meant when nobody chooses first.

    Tensors that an optimizer keeps (Adam's moments have the shapes of the weights) belong to no network. First comes
    what holds weights of convolutions, then what has a name of :data:`KNOWN`, then what has the most elements.
    """
    found = [network for network in _walk(content, "", frozenset()) if network.tensors or network.skipped]
    return sorted(found, key=_rank)


def _rank(network: Network) -> tuple[bool, int, int]:
    parts = network.entry.split(".")
    known = min((KNOWN.index(part) for part in parts if part in KNOWN), default=len(KNOWN))
    weights = network.filter_elements
    return weights == 0, known, -(weights or sum(t.numel() for t in network.tensors.values() if not t.is_nested))


def choose(networks: Sequence[Network], entry: str | None) -> Network:
    """The network of this entry; the first if it is None. An entry that holds several gives all of them as one.

    Raises:
        ValueError: there is no such entry.
    """
    if entry is None:
        return networks[0]
    for network in networks:
        if network.entry == entry:
            return network
    below = [network for network in networks if network.entry.startswith(f"{entry}.")]
    if not below:
        there = ", ".join(repr(network.entry) for network in networks)
        raise ValueError(f"there is no entry {entry!r} with weights in it; there are {there}")
    tensors: dict[str, torch.Tensor] = {}
    skipped: list[tuple[str, str]] = []
    layouts: dict[str, tuple[int, bool]] = {}
    for network in sorted(below, key=lambda one: one.entry):
        inner = network.entry.removeprefix(f"{entry}.")
        tensors |= {f"{inner}.{key}": value for key, value in network.tensors.items()}
        layouts |= {f"{inner}.{key}": value for key, value in network.layouts.items()}
        skipped += [(f"{inner}.{key}", reason) for key, reason in network.skipped]
    return Network(entry, tensors, tuple(skipped), layouts, sum(network.optimizer for network in below))


def _walk(node: object, path: str, above: frozenset[int]) -> Iterator[Network]:
    if id(node) in above or len(above) > DEEPEST:  # a pickle may hold itself
        return
    above |= {id(node)}
    if isinstance(node, StandIn):
        layouts: dict[str, tuple[int, bool]] = {}
        tensors = dict(_module_tensors(node, "", layouts, frozenset()))
        if tensors:
            yield _network(path, tensors, layouts)
            return
        node = node.attributes
    children = dict(_children(node))
    if (
        not children
        or "param_groups" in children
        or all(isinstance(value, Mapping) and "step" in value for value in children.values())
    ):  # an optimizer's state
        return
    own, rest = {}, {}
    for key, value in children.items():
        if is_array(value):
            own[key] = _filters_first(value) if FILTERS_LAST.fullmatch(key) else value
        elif isinstance(value, Mapping) and value and set(value) <= LEAVES and all(map(is_array, value.values())):
            own |= {
                f"{key}.{leaf}": _filters_first(one) if leaf == "kernel" else one for leaf, one in value.items()
            }  # a tree of modules instead of dotted keys
        elif not NO_NETWORK.match(key):
            rest[key] = value
    if own:
        yield _network(path, own, {})
    for key, value in rest.items():
        yield from _walk(value, f"{path}.{key}" if path else key, above)


def _filters_first(value: Any) -> Any:
    """A kernel ``(*kernel, in, out)`` of TensorFlow or JAX as ``(out, in, *kernel)``; what is no kernel as it is."""
    if getattr(value, "ndim", 0) < 3:
        return value
    if isinstance(value, np.ndarray):
        return np.moveaxis(value, (-1, -2), (0, 1))
    return torch.moveaxis(value, (-1, -2), (0, 1))


def _children(node: object) -> Iterator[tuple[str, object]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield str(key), value
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield str(index), value


def is_array(value: object) -> bool:
    """Whether a value is a tensor, or stands for one."""
    return isinstance(value, (torch.Tensor, np.ndarray)) or (
        isinstance(value, StandIn) and value.name.endswith(("Parameter", "Tensor"))
    )


def _network(path: str, own: Mapping[str, object], layouts: Mapping[str, tuple[int, bool]]) -> Network:
    kept = {key: value for key, value in own.items() if not _is_moment(key)}
    moments = len(own) - len(kept)
    short = unwrapped(list(kept))
    kept = {key: kept[key] for key in short}
    tensors: dict[str, torch.Tensor] = {}
    skipped = []
    for key, value in kept.items():
        tensor = as_tensor(value)
        if isinstance(tensor, str):
            skipped.append((short[key], tensor))
        else:
            tensors[short[key]] = tensor
    layouts = {short[key]: value for key, value in layouts.items() if key in short}
    return Network(path, tensors, tuple(skipped), layouts, moments)


def _is_moment(key: str) -> bool:
    first, dot, _ = key.partition(".")
    return bool(MOMENT.fullmatch(key) or (dot and NO_NETWORK.match(first)))


def as_tensor(value: object) -> torch.Tensor | str:
    """A tensor, or why there is none."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, StandIn):
        return f"is a {value.name}, without values"
    assert isinstance(value, np.ndarray)
    try:  # a copy: it may be read-only, or in the other byte order
        return torch.from_numpy(np.array(value, value.dtype.newbyteorder("="), order="C"))
    except TypeError:
        return f"is a NumPy array of {value.dtype}"


def _module_tensors(
    module: StandIn, prefix: str, layouts: dict[str, tuple[int, bool]], above: frozenset[int]
) -> Iterator[tuple[str, object]]:
    """Parameters and buffers of a pickled module by their names in its state dict, and what its convolutions are."""
    if id(module) in above:
        return
    attributes = module.attributes
    if module.name.startswith("__torch__."):  # TorchScript keeps all of them as attributes
        parts: Mapping[str, object] = attributes
    else:
        parts = {}
        for kind in ("_parameters", "_buffers", "_modules"):
            inner = attributes.get(kind)
            parts |= inner if isinstance(inner, Mapping) else {}
    for key, value in parts.items():
        if is_array(value):
            yield f"{prefix}{key}", value
            groups, transposed = attributes.get("groups"), attributes.get("transposed")
            if key == "weight" and isinstance(groups, int) and isinstance(transposed, bool):
                layouts[f"{prefix}{key}"] = groups, transposed
        elif isinstance(value, StandIn):
            yield from _module_tensors(value, f"{prefix}{key}.", layouts, above | {id(module)})
