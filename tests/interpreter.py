"""Cures and instruments for Triton's CPU interpreter (``TRITON_INTERPRET=1``).

- :func:`apply_fixes` makes the interpreter compute what a GPU computes, where the project's kernels would notice.
- :func:`bounds` raises on every access outside the memory of the given tensors.
- :func:`traffic` counts the bytes that a kernel moves.
- :func:`observe` is what the instruments are made of; they can be nested in any order and with ``interleave``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

# ---------------------------------------------------------------------------------------------------------- bfloat16


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits (uint16) of float32 values rounded to the nearest bfloat16, ties to even, as GPUs round.

    The upper half of a float32 is a bfloat16, and half a unit carries into it correctly whatever the exponent:
    subnormals need no care and what is too large becomes infinity. NaN could lose its set bits: all become NVIDIA's.
    """
    word = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = ((word >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    rounded = ((word + half) >> np.uint32(16)).astype(np.uint16)
    is_nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint16(0x7FFF), rounded).reshape(values.shape)


def _expand_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 bits (uint32) of bfloat16 values, which is exact."""
    return np.left_shift(bits.view(np.uint16), 16, dtype=np.uint32)


def _fix_bfloat16() -> None:
    """Triton truncates float32 to bfloat16 and gets subnormals wrong, both ways."""
    convert = interpreter._convert_float

    def convert_float(values, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16 and rounding != ir.ROUNDING_MODE.RTZ:
            return round_to_bfloat16(values)
        if source == tl.bfloat16 and target == tl.float32:
            return _expand_bfloat16(values)
        return convert(values, source, target, rounding)

    interpreter._convert_float = convert_float


def _fix_dot(builder: type) -> None:
    """Triton's ``tl.dot`` multiplies the bits of bfloat16 values as if they were integers."""
    create_dot = builder.create_dot

    def dot(self, left, right, *args, **kwargs):
        operands = [
            interpreter.TensorHandle(_expand_bfloat16(side.data).view(np.float32), tl.float32)
            if side.dtype.scalar == tl.bfloat16
            else side
            for side in (left, right)
        ]
        return create_dot(self, *operands, *args, **kwargs)

    builder.create_dot = dot


# -------------------------------------------------------------------------------------------------------- other cures


def _fix_range() -> None:
    """Triton 3.6 turns the bounds of ``range`` into ints with ``int(array)``; NumPy 2.4 allows that no more."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _fix_operators(builder: type) -> None:
    """Comparisons are bools, and a plain maximum or minimum drops NaN.

    Triton leaves the type of the operands on the result of a comparison; splatting it (``mask & scalar``) then makes
    integers of it, which 3.9 does not take for a mask. And up to 3.7 its maximum keeps NaN, which a GPU's does not.
    """
    binary_op = builder.binary_op

    def typed_binary_op(self, left, right, op):
        result = binary_op(self, left, right, op)
        if result.data.dtype == np.bool_:
            result.dtype = tl.int1
        return result

    builder.binary_op = typed_binary_op
    builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)


def _fix_launch(executor: type) -> None:
    """Launches compute with infinities in silence, like a GPU, and raise what was raised inside the kernel.

    NumPy warns of ``inf - inf``, and the test suite makes errors of warnings. Triton wraps an exception into an
    InterpreterError for every function that it passes through, which hides its type and message.
    """
    launch = executor.__call__

    @functools.wraps(launch)
    def quiet_launch(self, *args, **kwargs):
        with np.errstate(all="ignore"):
            try:
                return launch(self, *args, **kwargs)
            except InterpreterError as error:
                cause: BaseException = error
                while isinstance(cause, InterpreterError) and cause.__cause__ is not None:
                    cause = cause.__cause__
                raise cause from cause.__cause__

    executor.__call__ = quiet_launch


def _patch_once_a_launch() -> None:
    """Triton patches ``triton.language`` again at every call of a device function, half of a small kernel's time.

    With this it does so once per launch, and after the launch takes back all of it, not only the kernel's own share.
    """
    patch = interpreter._patch_lang
    seen_by: dict[Any, set[Any]] = {}  # by function: which of these modules it sees

    class LaunchScope(interpreter._LangPatchScope):
        patched: set[Any] = set()  # noqa: RUF012 - there is one scope

        def restore(self) -> None:
            super().restore()
            self.patched.clear()

    scope = LaunchScope()  # launches do not nest

    def patch_lang(function):
        if function not in seen_by:
            modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
            seen_by[function] = {module for module in modules if module in (tl, tl.core)}
        if not scope.patched or not seen_by[function] <= scope.patched:
            scope._changes.extend(patch(function)._changes)
            scope.patched.update(seen_by[function])
        return scope

    interpreter._patch_lang = patch_lang


def _remember_types() -> None:
    """Triton builds a dictionary of all its types whenever it makes a value."""
    scalar_type = functools.cache(interpreter._get_np_dtype)
    pointer = np.dtype(np.uint64)

    def numpy_type(dtype):
        scalar = dtype.scalar
        return pointer if scalar.is_ptr() else scalar_type(scalar)

    interpreter._get_np_dtype = numpy_type


def _fix_integers() -> None:
    """Integers in [2**31, 2**32) are typed int64 but stored as uint32, so that shifts and conversions go wrong."""
    convert = interpreter._implicit_cvt

    def implicit_cvt(arg):
        value = convert(arg)
        if isinstance(arg, int) and value.dtype == tl.int64:
            value.handle.data = value.handle.data.astype(np.int64)
        return value

    interpreter._implicit_cvt = implicit_cvt


@functools.cache
def apply_fixes() -> None:
    """Cure the interpreter of Triton 3.6 to 3.9, once and for the whole process.

    What it leaves alone: ``tl.fma`` rounds twice up to 3.7; arithmetic on bfloat16 uses the raw bits (kernels convert
    to float32 after loading); ``tl.device_assert`` does nothing; alignment hints are not checked.
    """
    _fix_bfloat16()
    _fix_range()
    _fix_integers()
    _fix_dot(interpreter.InterpreterBuilder)
    _fix_operators(interpreter.InterpreterBuilder)
    _patch_once_a_launch()
    _remember_types()
    _fix_launch(interpreter.GridExecutor)


# ---------------------------------------------------------------------------------------------------------- observers


class Access(NamedTuple):
    """One memory operation of one program, about to happen."""

    op: str  # "load", "store" or "atomic"
    addresses: np.ndarray  # those that the mask lets through, flat, uint64
    size: int  # bytes at each address
    is_scalar: bool  # not a block: one address for the whole program
    order: str | None = None  # of an atomic: "relaxed", "acquire", "release" or "acq_rel"


class Observer:
    """Sees what interpreted kernels do to memory."""

    def access(self, access: Access) -> None:
        """Called before every load, store and atomic; may raise."""

    def barrier(self) -> None:
        """Called at every ``tl.debug_barrier``."""


_observers: list[Observer] = []
_ORDERS = {
    ir.MEM_SEMANTIC.RELAXED: "relaxed",
    ir.MEM_SEMANTIC.ACQUIRE: "acquire",
    ir.MEM_SEMANTIC.RELEASE: "release",
    ir.MEM_SEMANTIC.ACQUIRE_RELEASE: "acq_rel",
}


def _announce(op: str, pointers: Any, mask: Any = None, order: Any = None) -> None:
    addresses = np.asarray(pointers.data, np.uint64)
    is_scalar = addresses.size == 1
    if mask is None:
        addresses = addresses.ravel()
    else:
        addresses = addresses[np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)]
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    access = Access(op, addresses, size, is_scalar, None if order is None else _ORDERS[order])
    for observer in _observers:
        observer.access(access)


@contextlib.contextmanager
def _watched(builder: type) -> Iterator[None]:
    """Make the interpreter announce its memory operations. Unmasked loads and stores pass through the masked ones."""
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas", "create_barrier")
    load, store, rmw, cas, barrier = originals = [builder.__dict__[name] for name in names]

    def watched_load(self, pointers, mask, *args, **kwargs):
        _announce("load", pointers, mask)
        return load(self, pointers, mask, *args, **kwargs)

    def watched_store(self, pointers, value, mask, *args, **kwargs):
        _announce("store", pointers, mask)
        return store(self, pointers, value, mask, *args, **kwargs)

    def watched_rmw(self, op, pointers, value, mask, order, scope):
        _announce("atomic", pointers, mask, order)
        return rmw(self, op, pointers, value, mask, order, scope)

    def watched_cas(self, pointers, compare, value, order, scope):
        _announce("atomic", pointers, None, order)
        return cas(self, pointers, compare, value, order, scope)

    def watched_barrier(self, *args, **kwargs):
        for observer in _observers:
            observer.barrier()
        return barrier(self, *args, **kwargs)

    watched = (watched_load, watched_store, watched_rmw, watched_cas, watched_barrier)
    try:
        for name, function in zip(names, watched, strict=True):
            setattr(builder, name, function)
        yield
    finally:
        for name, function in zip(names, originals, strict=True):
            setattr(builder, name, function)


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Show ``observer`` every memory operation of the kernels launched inside."""
    apply_fixes()
    with contextlib.ExitStack() as stack:
        if not _observers:
            stack.enter_context(_watched(interpreter.InterpreterBuilder))
        _observers.append(observer)
        stack.callback(_observers.remove, observer)
        yield


# ---------------------------------------------------------------------------------------------------- bounds, traffic


class _Memory:
    """The memory of some tensors, each from its first byte to its last."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.spans = sorted(memory_span(tensor) for tensor in tensors if tensor.numel())
        # Views of one storage may overlap: let no tensor end before one that starts before it.
        self.starts = np.array([start for start, _ in self.spans], np.uint64)
        self.ends = np.maximum.accumulate(np.array([end for _, end in self.spans], np.uint64))

    def holds(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Whether all ``size`` bytes at each address belong to one tensor."""
        if not self.spans:
            return np.zeros(addresses.shape, bool)
        place = np.searchsorted(self.starts, addresses, side="right") - 1
        return (place >= 0) & (addresses + np.uint64(size) <= self.ends[np.maximum(place, 0)])


def memory_span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and of the one behind its last."""
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class _BoundsCheck(Observer):
    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.memory = _Memory(tensors)

    def access(self, access: Access) -> None:
        outside = access.addresses[~self.memory.holds(access.addresses, access.size)]
        if outside.size:
            first = int(outside[0])
            near = min(self.memory.spans, key=lambda span: max(span[0] - first, first - span[1]), default=(0, 0))
            raise IndexError(
                f"{access.op} of {access.size} bytes at {outside.size} of {access.addresses.size} addresses outside "
                f"the given tensors; the first is {first:#x}, the nearest tensor lies at {near[0]:#x} to {near[1]:#x}"
            )


def bounds(*tensors: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Kernels launched inside raise IndexError where they load, store or do an atomic outside all of ``tensors``.

    A tensor's memory reaches from its first element to its last one, gaps included. What strays from one of the tensors
    into another is not noticed.
    """
    return observe(_BoundsCheck(tensors))


@dataclass
class Counts:
    """What was moved, masked lanes not counted; atomics are counted apart, one per lane."""

    bytes_loaded: int = 0
    bytes_stored: int = 0
    atomics: int = 0

    def add(self, op: str, addresses: int, size: int) -> None:
        if op == "load":
            self.bytes_loaded += addresses * size
        elif op == "store":
            self.bytes_stored += addresses * size
        else:
            self.atomics += addresses


@dataclass
class Traffic(Counts):
    """Counts of everything, and with ``traffic["name"]`` those of a named group of tensors."""

    groups: dict[str, Counts] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Counts:
        return self.groups[name]


class _TrafficCount(Observer):
    def __init__(self, groups: dict[str, Iterable[torch.Tensor]]) -> None:
        self.memories = {name: _Memory(tensors) for name, tensors in groups.items()}
        self.traffic = Traffic(groups={name: Counts() for name in groups})

    def access(self, access: Access) -> None:
        self.traffic.add(access.op, access.addresses.size, access.size)
        for name, memory in self.memories.items():
            inside = np.count_nonzero(memory.holds(access.addresses, access.size))
            self.traffic[name].add(access.op, int(inside), access.size)


@contextlib.contextmanager
def traffic(**groups: Iterable[torch.Tensor]) -> Iterator[Traffic]:
    """Count the memory traffic of the kernels launched inside, in total and by named group of tensors.

    Example::

        with traffic(weights=weights, scratch=[scratch]) as moved:
            launch()
        assert moved["weights"].bytes_loaded == 2 * 4 * elements
    """
    count = _TrafficCount(groups)
    with observe(count):
        yield count.traffic
