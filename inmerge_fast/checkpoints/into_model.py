"""The weights of a file in a model: ``load_state_dict`` decides, the head aside; nothing stays random in silence."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .networks import Network
from .read import read

# norm.1 and conv.2 in torchvision's files of DenseNets, from before names of modules could hold no dots.
OLD_DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])")
NAMED = 3


@dataclass(frozen=True)
class Loaded:
    """What became of a file.

    Attributes:
        text: a line for people: how many tensors fitted, from which entry and prefix, and what was left out.
        head: whether the head was loaded, too.
    """

    text: str
    head: bool


@dataclass(frozen=True)
class _Fit:
    """A network of a file under one prefix, as a state dict for the model."""

    entry: str
    prefix: str
    state: dict[str, torch.Tensor]
    head: bool
    left: tuple[str, ...]
    wrong: tuple[str, ...]
    matched: int

    @property
    def where(self) -> str:
        """Entry and prefix, in words; empty for a plain state dict."""
        entry = f", entry {self.entry!r}" if self.entry else ""
        return entry + (f", keys after {self.prefix!r}" if self.prefix else "")


def load_into(model: nn.Module, source: str | Path, *, head: Sequence[str] = (), entry: str | None = None) -> Loaded:
    """Load the weights of a file into a model.

    The file may hold a state dict, or a checkpoint with one or several in it, as :func:`inmerge_fast.checkpoints.read`
    reads them. Its keys are the model's own, or those with one prefix, as ``backbone.`` of a larger model; the rest of
    that model is left out. Files from before ``num_batches_tracked`` and old DenseNets are understood.

    Args:
        model: what to load into; nothing is written unless everything fits.
        source: the file.
        head: names of the modules whose weights are left out, as a whole, if they are not there or are of another
            number of classes.
        entry: which of several networks in the file, or the prefix of its keys; the first that fits if None.

    Raises:
        ValueError: the file cannot be read, or does not fit; the message names keys and shapes.
    """
    fits = [_fit(model, network, head) for network in _networks(source, entry)]
    sound = [fit for fit in fits if not fit.wrong]
    if not sound:
        best = max(fits, key=lambda fit: fit.matched)
        if not best.matched:
            raise ValueError(f"{source}: {_nothing_fits(model, _networks(source, entry))}")
        raise ValueError(f"{source}{best.where}: does not fit this model: {'; '.join(best.wrong)}")
    chosen, *others = sound
    trial = copy.deepcopy(model)  # of what does not fit load_state_dict has written half when it says so
    try:
        trial.load_state_dict(chosen.state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}{chosen.where}: does not fit this model: {reason[:500]}") from error
    model.load_state_dict(chosen.state)
    text = f"{source}{chosen.where}: {chosen.matched} tensors loaded"
    text += "".join(f"; {sentence}" for sentence in chosen.left)
    if others:
        text += f"; {', '.join(repr(fit.entry) for fit in others)} would fit, too"
    return Loaded(text, chosen.head)


def head_of(model: nn.Module, classes: int) -> tuple[str, ...]:
    """Name of the last module that gives one number per class; timm's models say it themselves."""
    about = getattr(model, "pretrained_cfg", None) or {}
    named = about.get("classifier") if isinstance(about, Mapping) else None
    if named:
        return (named,) if isinstance(named, str) else tuple(named)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.dim() > 1
        and len(module.weight) == classes
    ]  # fmt: skip
    return tuple(found[-1:])


def _networks(source: str | Path, entry: str | None) -> tuple[Network, ...]:
    checkpoint = read(source)
    if entry is None:
        return checkpoint.networks
    for network in checkpoint.networks:
        below = {key: one for key, one in network.tensors.items() if key.startswith(f"{entry}.")}
        if below and network.entry != entry:
            return (Network(network.entry, below, network.skipped),)
    return (checkpoint.network(entry),)


def _fit(model: nn.Module, network: Network, head: Sequence[str]) -> _Fit:
    own = model.state_dict()
    of_head = {key: own[key] for key in own if _is_below(key, head)}
    body = {key: own[key] for key in own if key not in of_head}
    tensors = {_renamed(key, own): value for key, value in network.tensors.items()}
    prefix, copies = _prefixes(tensors, body or own)
    state: dict[str, torch.Tensor] = {}
    theirs: dict[str, torch.Tensor] = {}
    outside, wrong = [], []
    if copies and prefix:
        both = ", ".join(map(repr, [prefix, *copies]))
        wrong.append(f"it holds {len(copies) + 1} networks with the model's keys, after {both}: choose one as entry")
    for key, value in tensors.items():
        short = _renamed(key.removeprefix(prefix), own)
        if not key.startswith(prefix) or key.startswith(tuple(copies)):
            outside.append(key)
        elif _is_below(short, head):
            theirs[short] = value
        else:
            state[short] = value
    skipped = {key.removeprefix(prefix): reason for key, reason in network.skipped}
    wrong += _differences(body, state, skipped)
    fits, left, bad = _head_fits(of_head, theirs)
    matched = sum(key in own for key in state) + (len(of_head) if fits else 0)
    state |= theirs if fits else of_head
    wrong += [f"the head: {bad}"] if bad else []
    said = [left] if left else []
    said += [f"{len(outside)} tensors beside it left out: {_some(outside)}"] if outside else []
    return _Fit(network.entry, prefix, state, fits, tuple(said), tuple(wrong), matched)


def _is_below(key: str, modules: Sequence[str]) -> bool:
    return any(key.startswith(f"{name}.") for name in modules)


def _renamed(key: str, own: Mapping[str, object]) -> str:
    return key if key in own else OLD_DENSENET_KEY.sub(r"\1\2", key)


def _prefixes(tensors: Mapping[str, object], own: Mapping[str, object]) -> tuple[str, list[str]]:
    """The prefix after which most keys are the model's, none before others; and those after which as many are."""
    counts: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in own:
                counts[".".join(parts[:start]) + "." * bool(start)] += 1
    most = max(counts.values(), default=0)
    best = sorted((prefix for prefix, count in counts.items() if count == most), key=bool)
    return (best[0], best[1:]) if best else ("", [])


def _differences(
    own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], skipped: Mapping[str, str]
) -> list[str]:
    """What ``load_state_dict`` would refuse, and what it would take although it is no weight, a sentence each."""
    missing = [key for key in own if key not in state and not key.endswith(".num_batches_tracked")]
    wrong = []
    if missing:
        why = next((f" ({skipped[key]})" for key in missing if key in skipped), "")
        wrong.append(f"{len(missing)} of {len(own)} tensors are missing: {_some(missing)}{why}")
    unknown = [key for key in state if key not in own]
    if unknown:
        wrong.append(f"{len(unknown)} tensors are not in the model: {_some(unknown)}")
    both = [(key, state[key], own[key]) for key in state if key in own]
    kinds = {key: kind for key, one, mine in both if (kind := _odd_kind(one, mine))}
    if kinds:
        named = _some([f"{key} {kind}" for key, kind in kinds.items()])
        wrong.append(f"{len(kinds)} tensors are no plain floating-point numbers: {named}")
    both = [(key, one, mine) for key, one, mine in both if key not in kinds]
    shapes = [
        f"{key} {tuple(one.shape)} instead of {tuple(mine.shape)}"
        for key, one, mine in both
        if one.shape != mine.shape and not (one.numel() == mine.numel() == 1)
    ]
    if shapes:
        wrong.append(f"{len(shapes)} tensors have another shape: {_some(shapes)}")
    plain = [(key, one) for key, one, _ in both if one.is_floating_point() and not one.is_meta]
    broken = [key for key, one in plain if one.numel() and not bool(one.float().isfinite().all())]
    if broken:
        wrong.append(f"{len(broken)} tensors hold NaN or infinity: {_some(broken)}")
    return wrong


def _odd_kind(one: torch.Tensor, mine: torch.Tensor) -> str:
    """What keeps the values of a tensor from being copied as they are; empty where nothing does."""
    if one.is_nested:
        return "nested"
    if one.is_meta and not mine.is_meta:
        return "on the meta device, without values"
    if one.layout != mine.layout:
        return str(one.layout).removeprefix("torch.")
    if mine.is_floating_point() and (not one.is_floating_point() or one.is_quantized):
        return str(one.dtype).removeprefix("torch.")
    return ""


def _head_fits(own: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> tuple[bool, str, str]:
    """Whether the file's head is the model's; what to say if it is left out; and why that would be wrong."""
    if not own:
        return True, "", ""
    if theirs.keys() != own.keys():
        what = f"another one: {_some(list(theirs))}" if theirs else "none"
        return False, f"the head starts at random, the file has {what}", ""
    wrong = _differences(own, theirs, {})
    if not wrong:
        return True, "", ""
    classes = {key: (theirs[key].shape[:1], own[key].shape[:1]) for key in own}
    if all(theirs[key].shape[1:] == own[key].shape[1:] for key in own) and all(
        one != two for one, two in classes.values()
    ):
        key = next(iter(own))
        shapes = f"{key} {tuple(theirs[key].shape)}, here {tuple(own[key].shape)}"
        return False, f"the head starts at random, the file's is for another number of classes: {shapes}", ""
    return False, "", "; ".join(wrong)


def _nothing_fits(model: nn.Module, networks: Sequence[Network]) -> str:
    theirs = [key for network in networks for key in network.tensors]
    return (
        f"does not fit this model: none of its {len(theirs)} tensors has a name of the model's; in the file "
        f"{_some(theirs)}, in the model {_some(list(model.state_dict()))}"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
