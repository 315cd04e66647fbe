"""The cure of Triton's interpreter: numbers are those of a GPU, traffic is counted, programs run in any order.

Whatever the other tests of kernels say stands on this.
"""

from __future__ import annotations

import math
from typing import Any

import interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreter import ORIGINAL, Builder, Handle, held, numbers, program_order, traffic
from kernel_checks import error, randn, same_in_any_order
from torch import Tensor
from triton.language.extra import libdevice
from triton.runtime.interpreter import interpreter_builder

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of casts that overflow, which they must

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
OF_TRITON = {torch_: triton_ for triton_, torch_ in interpreter.OF_TORCH.items()}


@triton.jit
def _cast(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < size, other=0.0)
    tl.store(y_ptr + place, x.to(y_ptr.dtype.element_ty), mask=place < size)


@triton.jit
def _dot(a_ptr, b_ptr, c_ptr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M)[:, None], tl.arange(0, K), tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + m * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n)
    total = tl.load(c_ptr + m * N + n)
    tl.store(c_ptr + m * N + n, tl.dot(a, b, total, input_precision="ieee"))


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Sum, difference, product, quotient, larger, negative, x < y: in the dtype of the pointers."""
    place = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + place), tl.load(y_ptr + place)
    tl.store(out_ptr + place, x + y)
    tl.store(out_ptr + size + place, x - y)
    tl.store(out_ptr + 2 * size + place, x * y)
    tl.store(out_ptr + 3 * size + place, x / y)
    tl.store(out_ptr + 4 * size + place, tl.maximum(x, y))
    tl.store(out_ptr + 5 * size + place, -x)
    tl.store(out_ptr + 6 * size + place, tl.where(x < y, x, y))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    _cast[(triton.cdiv(x.numel(), 4096),)](x, y, x.numel(), BLOCK=4096)
    return y


def same(found: Tensor, wanted: Tensor) -> None:
    """Bit for bit, but for the bits of nan."""
    assert found.dtype == wanted.dtype
    nan = wanted.isnan()
    assert torch.equal(found.isnan(), nan)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[wanted.element_size()]
    assert torch.equal(found.view(integers)[~nan], wanted.view(integers)[~nan])


# ---- casts ----


def any_floats() -> Tensor:
    """fp32 of every kind: random bits, ties of bf16 and fp16 and what lies beside, subnormals, infinities, nan."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(1 << 31), 1 << 31, (20000,), generator=generator).int()
    ties = (torch.arange(1 << 16) << 16 | 0x8000).int()
    near = torch.cat((ties - 1, ties + 1))
    halves = torch.randn(5000, generator=generator).half().float().view(torch.int32) | 0x1000
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-40, 3.4028235e38, 3.39e38])
    smooth = torch.randn(5000, generator=generator) * 10.0 ** torch.randint(-9, 9, (5000,), generator=generator)
    return torch.cat((*(bits.view(torch.float32) for bits in (random, ties, near, halves)), special, smooth))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_is_rounded_to_16_bits_as_torch_rounds_it(dtype):
    x = any_floats()
    same(cast(x, dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, E4M3, E5M2], ids=str)
def test_what_is_narrow_is_exact_in_fp32(dtype):
    count = 1 << 16 if dtype.itemsize == 2 else 256
    codes = torch.arange(count).to(torch.int32).to(torch.int16 if dtype.itemsize == 2 else torch.uint8).view(dtype)
    same(cast(codes, torch.float32), codes.float())


@pytest.mark.parametrize(
    ("source", "target"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)], ids=str
)
def test_16_bits_become_other_16_bits(source, target):
    x = any_floats().to(source)
    same(cast(x, target), x.to(target))


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_fp8_is_rounded_to_even_carries_and_saturates(dtype):
    """As the hardware's conversion with saturation to the largest finite number: nan stays nan, infinities do not."""
    largest = torch.finfo(dtype).max
    x = torch.cat((any_floats()[20000:], torch.tensor([7.99, 500.0, -500.0, 1e6, 448.0, 464.0, 465.0, 0.0009765625])))
    wanted = torch.where(x.isnan(), x, x.clamp(-largest, largest)).to(dtype)
    same(cast(x, dtype).float(), wanted.float())
    assert cast(torch.tensor([7.99, 500.0]), E4M3).float().tolist() == [8.0, 448.0]


def test_integers_become_bf16_and_back():
    x = torch.arange(-300, 300)
    same(cast(x.int(), torch.bfloat16), x.bfloat16())
    assert torch.equal(cast(x.bfloat16(), torch.int32), x.bfloat16().int())


def handle(x: Tensor) -> Any:
    dtype = OF_TRITON[x.dtype]
    return Handle(held(x, dtype), dtype)


def values(found: Any) -> Tensor:
    return numbers(found.data, found.dtype.scalar)


def test_without_the_cure_casts_are_wrong():
    """bf16 is cut off; fp8 loses its carry, and wraps around beyond its largest number."""
    x = torch.tensor([1.99999, 1.00001, -1.99999])
    uncured = values(ORIGINAL["cast_impl"](interpreter_builder, handle(x), tl.bfloat16))
    assert uncured.tolist() == [1.9921875, 1.0, -1.9921875]
    assert x.bfloat16().tolist() == [2.0, 1.0, -2.0] == cast(x, torch.bfloat16).tolist()
    x = torch.tensor([7.99, 500.0])
    uncured = values(ORIGINAL["create_fp_to_fp"](interpreter_builder, handle(x), tl.float8e4nv, None))
    assert uncured.float().tolist() != [8.0, 448.0]


# ---- products, sums ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, E4M3, E5M2], ids=str)
def test_products_of_matrices_are_exact_and_summed_in_fp32(dtype):
    a, b, start = randn(16, 32).to(dtype), randn(32, 64, seed=1).to(dtype), randn(16, 64, seed=2)
    c = start.clone()
    _dot[(1,)](a, b, c, M=16, K=32, N=64)
    assert error(c, a.double() @ b.double() + start.double()) < 3e-7


def test_without_the_cure_a_product_of_bf16_is_one_of_bit_patterns():
    a, b, zero = randn(16, 16).bfloat16(), randn(16, 16, seed=1).bfloat16(), torch.zeros(16, 16)
    exact = a.double() @ b.double()
    uncured = values(ORIGINAL["create_dot"](interpreter_builder, *map(handle, (a, b, zero)), None, 0))
    cured = values(Builder.create_dot(interpreter_builder, *map(handle, (a, b, zero)), None, 0))
    assert error(uncured, exact) > 1e6
    assert error(cured, exact) < 3e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_arithmetic_in_16_bits_is_that_of_fp32_rounded(dtype):
    x, y = randn(1024, scale=3.0).to(dtype), randn(1024, seed=1).to(dtype)
    out = torch.empty(7, 1024, dtype=dtype)
    _arithmetic[(1,)](x, y, out, 1024, BLOCK=1024)
    a, b = x.float(), y.float()
    wanted = torch.stack((a + b, a - b, a * b, a / b, torch.maximum(a, b), -a, torch.minimum(a, b))).to(dtype)
    same(out, wanted)


def test_without_the_cure_a_sum_of_bf16_is_one_of_bit_patterns():
    x = torch.ones(4).bfloat16()
    uncured = values(ORIGINAL["binary_op"](interpreter_builder, handle(x), handle(x), np.add))
    assert uncured.tolist() != [2.0] * 4
    assert values(interpreter_builder.create_fadd(handle(x), handle(x))).tolist() == [2.0] * 4


# ---- libdevice, scalars ----


@triton.jit
def _functions(x_ptr, y_ptr, eps, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place)
    tl.store(y_ptr + place, libdevice.tanh(x))
    tl.store(y_ptr + BLOCK + place, libdevice.rsqrt(tl.abs(x) + eps.to(tl.float32)))
    tl.store(y_ptr + 2 * BLOCK + place, tl.zeros([BLOCK], tl.float32) + eps)


def test_libdevice_is_correctly_rounded_and_floats_are_fp32():
    """What Liger's kernels call; and a Python float given to a kernel is an fp32 scalar there."""
    x, y = randn(1024, scale=3.0), torch.empty(3, 1024)
    _functions[(1,)](x, y, 0.1, BLOCK=1024)
    tenth = torch.tensor(0.1)
    same(y[0], x.double().tanh().float())
    same(y[1], (x.abs() + tenth).double().rsqrt().float())
    same(y[2], tenth.expand(1024).contiguous())


# ---- traffic ----


@triton.jit
def _strided(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """Every second element within `size`, once more without a mask for the first."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + 2 * place, mask=place < size, other=0.0)
    tl.store(y_ptr + place, x + tl.load(x_ptr), mask=place < size)


def test_traffic_counts_what_is_behind_no_mask_each_time_and_by_tensor():
    x, y, other = randn(64).half(), torch.empty(32).half(), randn(64).half()
    with traffic() as seen:
        _strided[(2,)](x, y, 21, BLOCK=16)
        with traffic() as inner:
            _strided[(1,)](x, y, 0, BLOCK=16)
    assert seen.read(x) == 2 * (21 + 2) + 2
    assert seen.written(y) == 2 * 21
    assert seen.read(y) == seen.written(x) == seen.read(other) == 0
    assert inner.read(x) == 2
    assert inner.written(y) == 0
    assert not interpreter.WATCHING
    before = len(seen.reads)
    _strided[(2,)](x, y, 21, BLOCK=16)
    assert len(seen.reads) == before


# ---- order ----


@triton.jit
def _number(out_ptr, order_ptr):
    """Who comes when, and who wins a cell that all write."""
    program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    when = tl.load(order_ptr)
    tl.store(order_ptr, when + 1)
    tl.store(out_ptr + program, when)


@triton.jit
def _add_atomically(x_ptr, total_ptr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total_ptr, tl.sum(tl.load(x_ptr + place)))


@triton.jit
def _add_apart(x_ptr, parts_ptr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + place)))


def ranks(seed: int | None) -> list[int]:
    out, clock = torch.full((24,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    if seed is None:
        _number[(4, 3, 2)](out, clock)
    else:
        with program_order(seed):
            _number[(4, 3, 2)](out, clock)
    return out.tolist()


def test_every_program_runs_once_in_another_order():
    orders = [ranks(seed) for seed in (None, 1, 2, 1, None)]
    assert orders[0] == orders[4] == list(range(24))
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert orders[1] == orders[3]
    assert len({tuple(order) for order in orders}) == 3


def test_sums_by_atomics_are_told_from_sums_in_order():
    x = randn(64 * 32, scale=1e3)

    def atomically() -> list[Tensor]:
        total = torch.zeros(1)
        _add_atomically[(64,)](x, total, BLOCK=32)
        return [total]

    def apart() -> list[Tensor]:
        parts = torch.empty(64)
        _add_apart[(64,)](x, parts, BLOCK=32)
        return [parts.sum()]

    same_in_any_order(apart)
    with pytest.raises(AssertionError, match="depends on the order of programs"):
        same_in_any_order(atomically)


def test_a_launch_of_one_program_proves_nothing_about_order():
    with pytest.raises(AssertionError, match="one program has no order"):
        same_in_any_order(lambda: [cast(randn(9), torch.bfloat16)])
