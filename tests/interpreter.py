"""Triton's interpreter, made to compute what a GPU computes, and made to tell what a kernel did.

Kernels run on the CPU when TRITON_INTERPRET=1 is set before they are defined (`conftest.py`). As it comes, the
interpreter is silently wrong where the element type is one that numpy does not have: sums and products of bf16 are
those of bit patterns, rounding to bf16 cuts off, fp8 neither carries nor saturates. `cure` replaces those operations by
ones that go through torch, which rounds to nearest even as the hardware does, and adds what Liger's kernels need of
libdevice.

    with traffic() as seen:            which addresses were read and written, and how often
    with launches() as counts:         which kernels ran
    with program_order(seed):          the programs of every launch in another order
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder

OF_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
STORED_AS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}
FOREIGN = (tl.bfloat16, tl.float8e4nv, tl.float8e5)  # numpy has no such numbers, only their bits
REPLACED = "cast_impl", "create_fp_to_fp", "create_dot", "binary_op", "unary_op"
ORIGINAL = {name: getattr(Builder, name) for name in (*REPLACED, "create_masked_load", "create_masked_store")}


def numbers(data: np.ndarray, dtype: Any) -> Tensor:
    """What the interpreter holds, as a tensor."""
    kind = OF_TORCH[dtype]
    bits = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).copy())
    if kind in STORED_AS:
        bits = bits.view(STORED_AS[kind]).view(kind) if bits.dtype != torch.uint16 else from_uint16(bits, kind)
    return bits.reshape(data.shape)


def from_uint16(bits: Tensor, kind: torch.dtype) -> Tensor:
    return torch.from_numpy(bits.numpy().view(np.int16)).view(kind)


def held(values: Tensor, dtype: Any) -> np.ndarray:
    """The inverse of `numbers`, rounded to `dtype`: to nearest even, and fp8 to the largest number beyond it."""
    kind = OF_TORCH[dtype]
    if kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        largest = torch.finfo(kind).max
        values = torch.where(values.isnan(), values.float(), values.float().clamp(-largest, largest))
    values = values.to(kind)
    bits = values.view(STORED_AS[kind]) if kind in STORED_AS else values
    return bits.numpy().view(interpreter._get_np_dtype(dtype)).reshape(tuple(values.shape))


def cast(self: Any, source: Any, target: Any) -> Any:
    before, after = source.dtype.scalar, target.scalar
    if before not in FOREIGN and after not in FOREIGN:
        return ORIGINAL["cast_impl"](self, source, target)
    if before not in OF_TORCH:  # integers and booleans
        return Handle(held(torch.from_numpy(source.data.astype(np.float64)), after), after)
    values = numbers(source.data, before)
    if after not in OF_TORCH:
        return Handle(values.double().numpy().astype(interpreter._get_np_dtype(after)), after)
    return Handle(held(values, after), after)


def cast_float(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    assert rounding is None or "RTNE" in str(rounding), f"rounding {rounding} is not made here"
    return Handle(held(numbers(source.data, source.dtype.scalar), target.scalar), target.scalar)


def dot(self: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
    """Products in fp32 of 16-bit and 8-bit numbers, which are exact; sums in the dtype of `total`."""
    wide = [numbers(each.data, each.dtype.scalar) for each in (a, b)]
    wide = [each.float() if each.dtype != torch.float64 else each for each in wide]
    product = torch.matmul(*wide).numpy()
    return Handle((product + total.data).astype(total.data.dtype), total.dtype.scalar)


def binary(self: Any, left: Any, right: Any, op: Callable[..., Any]) -> Any:
    """Arithmetic and comparisons of numbers that numpy does not have: in fp32, and rounded."""
    dtype = left.dtype.scalar
    if dtype not in FOREIGN:
        return ORIGINAL["binary_op"](self, left, right, op)
    return rounded(op(*(numbers(each.data, dtype).float().numpy() for each in (left, right))), dtype)


def unary(self: Any, x: Any, op: Callable[..., Any]) -> Any:
    dtype = x.dtype.scalar
    if dtype not in FOREIGN:
        return ORIGINAL["unary_op"](self, x, op)
    return rounded(op(numbers(x.data, dtype).float().numpy()), dtype)


def rounded(values: np.ndarray, dtype: Any) -> Any:
    return Handle(values, tl.int1) if values.dtype == bool else Handle(held(torch.from_numpy(values), dtype), dtype)


def of_libdevice(op: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A stand-in for a libdevice function, correctly rounded."""

    def call(x: Any, *rest: Any, **options: Any) -> Any:
        x = x if isinstance(x, tl.tensor) else interpreter._implicit_cvt(x)
        dtype = x.dtype.scalar
        data = held(op(numbers(np.asarray(x.handle.data), dtype).double()), dtype)
        return tl.tensor(Handle(data, dtype), x.type)

    return call


class Number(float):
    """A Python float that a kernel may call `.to(dtype)` on, as it may on a GPU, where it is an fp32 scalar."""

    def to(self, dtype: Any, *rest: Any, **options: Any) -> Any:
        return tl.tensor(Handle(np.array([self], dtype=np.float32), tl.float32), tl.float32).to(dtype)


def cure() -> None:
    """Put everything in place; the first call in a process does. Then minizero's kernels take bf16 and fp8, too."""
    if Builder.create_dot is dot:
        return
    from minizero.kernels import backend

    backend.CURED = True
    gc.set_threshold(50_000, 50, 1000)  # it makes so many objects that a quarter of its time went into looking at them
    Builder.cast_impl = cast
    Builder.create_fp_to_fp = cast_float
    Builder.create_dot = dot
    Builder.binary_op = binary
    Builder.unary_op = unary
    Builder.create_masked_load = watched_load
    Builder.create_masked_store = watched_store
    Builder.set_grid_idx = reordered(Builder.set_grid_idx)
    import triton.language.extra.libdevice as libdevice

    for name in ("tanh", "rsqrt", "erf", "exp", "exp2", "log", "log1p", "expm1", "sqrt"):
        setattr(libdevice, name, of_libdevice(getattr(torch, name)))
    launch = interpreter.GridExecutor.__call__

    def with_numbers(self: Any, *args: Any, **kwargs: Any) -> Any:
        for counts in LAUNCHES:
            name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
            counts[name] = counts.get(name, 0) + 1
        number = lambda value: Number(value) if type(value) is float else value  # noqa: E731
        return launch(self, *map(number, args), **{name: number(value) for name, value in kwargs.items()})

    interpreter.GridExecutor.__call__ = with_numbers
    convert = interpreter._implicit_cvt
    interpreter._implicit_cvt = lambda value: (
        tl.tensor(Handle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
        if isinstance(value, float)
        else convert(value)
    )


# ---- what a kernel did ----


@dataclass
class Traffic:
    """Addresses that kernels touched, one array per access."""

    reads: list[tuple[np.ndarray, int]] = field(default_factory=list)
    writes: list[tuple[np.ndarray, int]] = field(default_factory=list)

    def read(self, *tensors: Tensor) -> int:
        """Bytes read of these tensors, each time that they were."""
        return sum(touched(self.reads, tensor) for tensor in tensors)

    def written(self, *tensors: Tensor) -> int:
        return sum(touched(self.writes, tensor) for tensor in tensors)


def touched(accesses: list[tuple[np.ndarray, int]], tensor: Tensor) -> int:
    begin = tensor.untyped_storage().data_ptr()
    end = begin + tensor.untyped_storage().nbytes()
    return sum(int(((where >= begin) & (where < end)).sum()) * size for where, size in accesses)


WATCHING: list[Traffic] = []


def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
    for seen in WATCHING:
        seen.reads.append((pointers.data[mask.data], pointers.get_element_ty().primitive_bitwidth // 8))
    return ORIGINAL["create_masked_load"](self, pointers, mask, *rest, **options)


def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
    for seen in WATCHING:
        seen.writes.append((pointers.data[mask.data], pointers.get_element_ty().primitive_bitwidth // 8))
    return ORIGINAL["create_masked_store"](self, pointers, value, mask, *rest, **options)


@contextmanager
def traffic() -> Iterator[Traffic]:
    WATCHING.append(Traffic())
    try:
        yield WATCHING[-1]
    finally:
        WATCHING.pop()


LAUNCHES: list[dict[str, int]] = []


@contextmanager
def launches() -> Iterator[dict[str, int]]:
    """How often each kernel is launched, by `file.name`."""
    LAUNCHES.append({})
    try:
        yield LAUNCHES[-1]
    finally:
        LAUNCHES.pop()


ORDERS: list[int] = []


def reordered(set_index: Callable[..., None]) -> Callable[..., None]:
    def place(self: Any, x: int, y: int, z: int) -> None:
        if ORDERS:
            width, height, depth = self.grid_dim
            order = list(range(width * height * depth))
            random.Random(ORDERS[-1]).shuffle(order)
            number = order[(x * height + y) * depth + z]
            x, y, z = number // (height * depth), number // depth % height, number % depth
        set_index(self, x, y, z)

    return place


@contextmanager
def program_order(seed: int) -> Iterator[None]:
    ORDERS.append(seed)
    try:
        yield
    finally:
        ORDERS.pop()


VERSION = triton.__version__
