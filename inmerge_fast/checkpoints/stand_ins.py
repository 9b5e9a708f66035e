"""What stands for objects of unknown classes when a pickle is read: it keeps their attributes and runs nothing."""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from typing import Any

import torch

# What files that mean no harm call in the standard library; everything else that a pickle calls there is refused.
HARMLESS = (
    "array.", "builtins.bytes", "builtins.complex", "builtins.dict", "builtins.frozenset", "builtins.list",
    "builtins.object", "builtins.range", "builtins.slice", "builtins.tuple", "builtins.type", "collections.",
    "copyreg._reconstructor", "datetime.", "decimal.Decimal", "enum.", "fractions.Fraction", "functools.partial",
    "functools.reduce", "http.HTTPStatus", "inspect.", "logging.getLogger", "numpy.random.", "operator.attrgetter",
    "_operator.getitem", "operator.itemgetter", "_operator.or_", "pathlib.Path", "pathlib.Posix", "pathlib.Pure",
    "pathlib.Windows", "pathlib._local.", "random.Random", "re._compile", "signal.Signals", "time.struct_time",
    "types.GenericAlias", "types.SimpleNamespace", "uuid.UUID", "zoneinfo.ZoneInfo",
)  # fmt: skip


class _Kind(type):
    """Makes a stand-in by ``__new__`` alone. To call another one is to run a function that the file names: refused."""

    name: str

    def __call__(cls, *arguments: Any) -> Any:
        if _makes_an_object(cls.name):
            return cls.__new__(cls, *arguments)  # type: ignore[arg-type]
        if cls.name == "builtins.getattr" and len(arguments) == 2:  # how pickles name what lies in a class
            raise pickle.UnpicklingError(f"it asks for {getattr(arguments[0], 'name', '?')}.{arguments[1]}")
        raise pickle.UnpicklingError(f"it calls {cls.name}")


class StandIn(metaclass=_Kind):
    """An object of a class that is not loaded.

    Attributes:
        name: module and name of that class.
        attributes: what the object held.
        arguments: what it was made of.
    """

    name = ""
    attributes: dict[str, Any]
    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any) -> Any:
        """An object without attributes yet."""
        made = object.__new__(cls)
        made.__dict__.update(attributes={}, arguments=arguments)
        return made

    def __setstate__(self, state: object) -> None:
        parts = state if isinstance(state, tuple) else (state,)  # the second holds what lies in slots
        for part in parts:
            if isinstance(part, dict):
                self.attributes.update(part)


class _StandInMapping(StandIn):
    """Makes a dict, since PyTorch's reader fills no others; this kind takes attributes, too."""

    def __new__(cls, *arguments: Any) -> Any:
        """A dict."""
        return OrderedDict()


class _StandInList(StandIn):
    """Makes a list, since PyTorch's reader fills nothing else."""

    def __new__(cls, *arguments: Any) -> Any:
        """A list."""
        return []


FILLED = {"mapping": _StandInMapping, "list": _StandInList}


class StandInTensor(torch.Tensor):
    """A tensor of a class that is not loaded, with the data it was made of.

    Attributes:
        name: module and name of that class.
    """

    name = ""


class StandInWrapper(StandInTensor):
    """A tensor of a class that keeps its values in others, as sharded and packed ones do; nothing can be computed."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{cls.name} keeps its values elsewhere")


def stand_in_for(name: str, *, filled: str = "", tensor: bool = False, wrapper: bool = False) -> type:
    """A class that stands for the one of this name.

    Args:
        name: module and name.
        filled: "mapping" or "list", where objects are filled as one.
        tensor: whether it is a subclass of ``torch.Tensor``.
        wrapper: whether that has its values in other tensors.
    """
    module, _, short = name.rpartition(".")
    body = {"name": name, "__module__": module}
    if tensor or wrapper:
        return type(short, (StandInWrapper if wrapper else StandInTensor,), body)
    return _Kind(short, (FILLED.get(filled, StandIn),), body)


def _makes_an_object(name: str) -> bool:
    """Whether a call of this makes an object of a class, as far as its name tells."""
    module, _, short = name.rpartition(".")
    if name.startswith(HARMLESS):
        return True
    if module.split(".")[0] in sys.stdlib_module_names:
        return False
    return short.lstrip("_")[:1].isupper()
