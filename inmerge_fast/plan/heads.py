"""Which convolutions are heads: those whose outputs no layer of the model reads, one filter for each class or anchor.

There is no graph to ask, only modules with the widths that they read and write. So a convolution is taken for a head
only where no width in the model can be explained by its outputs; in doubt it is none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.loss import _Loss

HEAD = "a head: no layer reads its outputs (include_heads=True merges it)"

# Where modules that are neither convolutions nor Linears say how many channels they read.
_READS = {"num_features", "num_channels", "normalized_shape", "in_channels", "in_features", "input_size", "embed_dim"}
SPLIT = 8  # narrowest part of outputs that are split (query, key, value, gates), but for halves (mean, variance)
ROUND = 32  # a layer that widens, and ends a body without its Linear, has a multiple of so many filters, or of its read
FLATTENED = 16  # fewest channels that a Linear which is registered before its convolution is taken to flatten


def heads_of(modules: Sequence[tuple[str, nn.Module]]) -> set[int]:
    """Ids of the heads among the convolutions of a model.

    A head has a bias, or nothing at all after it, has several filters in a group, and reads what others have written.
    None that could read it may be in the model: no layer of its width, which may be registered before it; no later
    layer whose width divides its own, as where outputs are split, or shuffled to pixels; no Linear that could flatten
    them; and no later layer that is wider than it and that no single layer before explains, as where outputs are
    concatenated. Nor may a parameter beside layers have its width, as prototypes and position embeddings do, nor may it
    be a query or key beside its value. The width of its classes may be that of the input images, and that of a tail
    which keeps it, if no other layer is as narrow.

    Args:
        modules: names and modules in module order, as ``model.named_modules()`` gives them.
    """
    convs = [(place, m) for place, (_, m) in enumerate(modules) if isinstance(m, _ConvNd)]
    suspects = [
        (place, conv)
        for place, conv in convs[1:]
        if (conv.bias is not None or conv is convs[-1][1]) and conv.out_channels // conv.groups > 1
    ]
    if not suspects:
        return set()
    widths = _Widths(modules)
    if widths.is_lazy:
        return set()
    attending = _attending(modules)
    return {
        id(conv)
        for place, conv in suspects
        if widths.follows(conv, place) and not widths.may_read(conv, place) and id(conv) not in attending
    }


def _attending(modules: Sequence[tuple[str, nn.Module]]) -> set[int]:
    """Ids of convolutions that may be a query and a key: two alike in a module, before one there that keeps the width.

    They are read by a product alone, as in the self-attention of SAGAN and DANet.
    """
    convs = [(path.rpartition(".")[0], m) for path, m in modules if isinstance(m, _ConvNd)]
    alike = Counter((parent, m.in_channels, m.out_channels) for parent, m in convs)
    found, keeping = set(), set()
    for parent, conv in reversed(convs):
        read, own = conv.in_channels, conv.out_channels
        if read == own:
            keeping.add((parent, read))
        elif (parent, read) in keeping and alike[parent, read, own] > 1:
            found.add(id(conv))
    return found


class _Widths:
    """The numbers of channels that the layers of a model read and write, and where.

    Attributes:
        is_lazy: whether a layer has yet to see what it reads.
    """

    def __init__(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        self.is_lazy = False
        self._last_read: dict[int, int] = {}  # the place of the last layer that reads a width
        self._first_write: dict[int, tuple[int, int]] = {}  # where it is written first, and from what
        self._maps: list[tuple[int, int]] = []  # width and place of layers whose width no layer before them writes
        self._flat: list[tuple[int, int]] = []  # the same of Linears, which may flatten
        self._through: dict[int, set[int]] = {}  # what those write that read a width which a layer before them writes
        self._norms: dict[int, int] = {}  # what other modules read that come next after a convolution, by its place
        self._end, latest = -1, -1  # places of the last reader and of the last convolution or Linear so far
        self._beside: set[int] = set()  # sizes of parameters beside layers: what they do with them only forward() knows
        conv_writes: set[int] = set()
        for place, (path, module) in enumerate(modules):
            if isinstance(module, _ConvNd):
                self._pass(module.in_channels, module.out_channels, place, self._maps)
                conv_writes.add(module.out_channels)
                latest = place
            elif isinstance(module, nn.Linear):
                read, latest = module.in_features, place
                is_new = self._pass(read, module.out_features, place, self._flat)
                if is_new and not any(read % width == 0 for width in conv_writes if width >= SPLIT):
                    self._maps.append((read, place))
            elif "parametrizations" not in path and not isinstance(
                module, _Loss
            ):  # their vectors are as wide as a head
                unexplained = self._flat if isinstance(module, nn.RNNBase) else self._maps
                for read in _read_by(module):
                    self._read(read, place, unexplained)
                    self._norms.setdefault(latest, read)
                if module._modules:
                    self._beside.update(
                        *(p.shape for p in module._parameters.values() if p is not None and not nn.parameter.is_lazy(p))
                    )
        self._widths = sorted(self._through)

    def _read(self, width: int, place: int, unexplained: list[tuple[int, int]]) -> bool:
        """Note that the layer at ``place`` reads ``width``; whether no layer before it writes just that."""
        self.is_lazy |= width == 0
        self._last_read[width] = self._end = place
        is_new = width not in self._first_write
        if is_new:
            unexplained.append((width, place))
        return is_new

    def _pass(self, read: int, written: int, place: int, unexplained: list[tuple[int, int]]) -> bool:
        is_new = self._read(read, place, unexplained)
        if not is_new:
            self._through.setdefault(read, set()).add(written)
        self._first_write.setdefault(written, (place, read))
        return is_new

    def follows(self, conv: _ConvNd, place: int) -> bool:
        """Whether layers before ``conv``, the module at ``place``, may have written what it reads, or parts of it."""
        return any(width <= conv.in_channels for width, (at, _) in self._first_write.items() if at < place)

    def may_read(self, conv: _ConvNd, place: int) -> bool:
        """Whether a layer may read the outputs of ``conv``, which is the module at ``place``."""
        own, read = conv.out_channels, conv.in_channels
        if conv.bias is None and self._end > place:
            return True
        if self._norms.get(place, 0) > own:  # as after the last concatenation of a DenseNet, whose width others have
            return True
        if own in self._beside or (own > read and (own % ROUND == 0 or (read >= SPLIT and own % read == 0))):
            return True
        last = self._last_read.get(own, -1)
        if last > place or (last >= 0 and not self._is_narrow_tail(own, read)):
            return True
        if own >= 2 * read and own % read <= SPLIT and self._last_read[read] > place:
            return True
        if any(
            at > place and width < own and (own == 2 * width > 2 or (width >= SPLIT and own % width == 0))
            for width, at in self._last_read.items()
        ):
            return True
        if any(width % own == 0 and (at > place or own >= FLATTENED) for width, at in self._flat):
            return True
        return any(at > place and width > own for width, at in self._maps)

    def _is_narrow_tail(self, own: int, read: int) -> bool:
        """Whether all other layers are wider than this, and its layers, but for the model's first ones, keep it."""
        others = [width for width in self._widths if width != own]
        comes_from = max(read, self._first_write[own][1])
        return bool(others) and own < min(others[0], comes_from) and self._through.get(own, {own}) == {own}


def _read_by(module: nn.Module) -> Iterator[int]:
    """What a module reads that is neither a convolution nor a Linear: what its arguments and own tensors are wide."""
    own = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    names = _READS if own or not module._modules else {"num_features"}  # which timm's networks say of themselves
    for name in names & module.__dict__.keys():
        value = module.__dict__[name]
        if isinstance(value, int):
            yield value
        elif isinstance(value, (tuple, list)) and value and all(isinstance(one, int) for one in value):
            yield from (value[0], math.prod(value))
    for tensor in own:
        if nn.parameter.is_lazy(tensor):
            yield 0
        else:
            yield from (size for size in tensor.shape if size > 1)
