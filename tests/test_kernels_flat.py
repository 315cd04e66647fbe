"""What works on flat buffers: AdamW, the norm of gradients, packing into buckets, quantization by blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from types import ModuleType
from typing import Any

import interpreter
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    DTYPES,
    beyond_int32,
    bits,
    close,
    error,
    every_dtype,
    randn,
    refused_by_name,
    same_in_any_order,
    sees,
)
from torch import Tensor

from minizero import kernels
from minizero.kernels import (
    adamw,
    adamw_step,
    cast_and_pack,
    dequantize_blockwise,
    flat,
    grad_norm,
    quantize_blockwise,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of 1 / 0 and the like

SIXTEEN = (torch.bfloat16, torch.float16)

# ---- AdamW ----

HYPER: dict[str, dict[str, Any]] = {
    "as it comes": {"lr": 1e-3},
    "with decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)},
    "without momentum": {"lr": 1e-2, "betas": (0.0, 0.0), "eps": 1e-3},
    "hardly moving": {"lr": 0.0, "weight_decay": 0.5},
}
every_hyper = pytest.mark.parametrize("hyper", HYPER.values(), ids=HYPER)


def gradients(size: int, steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(size, seed=step, scale=10.0 ** (step % 3 - 2)).to(dtype) for step in range(1, steps + 1)]


def step_through(
    module: Any, name: str, size: int, grads: list[Tensor], wide: torch.dtype, **options: Any
) -> list[Tensor]:
    """[master, m, v, t] after a step for each gradient."""
    master, m, v = randn(size).to(wide), torch.zeros(size, dtype=wide), torch.zeros(size, dtype=wide)
    t = torch.zeros((), dtype=torch.float32)
    for grad in grads:
        module.adamw_step(master, m, v, grad.to(wide) if wide == torch.float64 else grad, t, backend=name, **options)
    return [master, m, v, t]


def step_through_torch(size: int, grads: list[Tensor], wide: torch.dtype, **options: Any) -> list[Tensor]:
    parameter = torch.nn.Parameter(randn(size).to(wide))
    optimizer = torch.optim.AdamW([parameter], foreach=False, **({"weight_decay": 0.0} | options))
    for grad in grads:
        parameter.grad = grad.to(wide)
        optimizer.step()
    state = optimizer.state[parameter]
    return [parameter.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"]]


def moments_and_all(module: Any, size: int, steps: int, dtype: torch.dtype, **hyper: Any) -> None:
    """Steps of the kernel, and of torch's own optimizer in fp32, beside torch's own in float64."""
    grads = gradients(size, steps, dtype)
    exact = step_through_torch(size, grads, torch.float64, **hyper)
    theirs = step_through_torch(size, grads, torch.float32, **hyper)
    found = step_through(module, "triton", size, grads, torch.float32, **hyper)
    for name, ours, truth, rival in zip(("master", "m", "v", "t"), found, exact, theirs, strict=True):
        close(ours, truth, rival, name)
    start = randn(size)
    if hyper["lr"]:
        moved = [master.double() - start.double() for master in (found[0], exact[0], theirs[0])]
        assert error(moved[0], moved[1]) <= 1.5 * error(moved[2], moved[1]) + 1e-6


@every_hyper
@pytest.mark.parametrize("steps", [1, 7])
def test_the_torch_backend_is_torchs_own_adamw(hyper, steps):
    grads = gradients(100, steps)
    ours = step_through(kernels, "torch", 100, grads, torch.float64, **hyper)
    for one, other in zip(ours, step_through_torch(100, grads, torch.float64, **hyper), strict=True):
        assert error(one, other) < 1e-12


@every_hyper
@every_dtype
@pytest.mark.parametrize(("size", "steps"), [(100, 1), (adamw.BLOCK + 333, 8)])
def test_adamw_is_as_exact_as_torchs_own(hyper, dtype, size, steps):
    moments_and_all(kernels, size, steps, dtype, **hyper)


@pytest.mark.parametrize("size", [0, 1, 15, adamw.BLOCK - 1, adamw.BLOCK, adamw.BLOCK + 1])
def test_sizes(size):
    found = step_through(kernels, "triton", size, gradients(size, 2), torch.float32, lr=1e-2)
    wanted = step_through(kernels, "torch", size, gradients(size, 2), torch.float64, lr=1e-2)
    assert found[3] == 2
    for one, other in zip(found[:3], wanted[:3], strict=True):
        assert error(one, other) < 2e-5


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_parameter_is_the_master_rounded_to_even(name, dtype):
    master, m, v, t = randn(999), torch.zeros(999), torch.zeros(999), torch.zeros(())
    parameter = torch.empty(999, dtype=dtype)
    for grad in gradients(999, 3, torch.bfloat16):
        before = bits(grad).clone()
        adamw_step(master, m, v, grad, t, lr=1e-2, parameter=parameter, backend=name)
        assert torch.equal(bits(parameter), bits(master.to(dtype)))
        assert torch.equal(bits(grad), before)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_a_step_that_is_skipped_changes_nothing(name):
    start = [randn(99), randn(99, seed=1), randn(99, seed=2).square(), torch.tensor(5.0), torch.ones(99).bfloat16()]
    for skip in (True, False):
        master, m, v, t, parameter = (x.clone() for x in start)
        grad = torch.full((99,), math.nan if skip else 1.0)
        adamw_step(master, m, v, grad, t, lr=0.1, skip=torch.tensor(skip), parameter=parameter, backend=name)
        for before, after in zip(start, (master, m, v, t, parameter), strict=True):
            assert torch.equal(before, after) == skip
        assert t == (5 if skip else 6)
        assert master.isfinite().all()


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_multiplies_the_gradient_in_fp32(name, dtype):
    grad, factor = randn(99, seed=1, scale=100.0).to(dtype), torch.tensor(0.37)
    results = []
    for given_, scale in (
        (grad, factor),
        (grad.float() * factor, None),
        (grad.float() * factor, torch.ones(()).double()),
    ):
        master, m, v, t = randn(99), torch.zeros(99), torch.zeros(99), torch.zeros(())
        adamw_step(master, m, v, given_, t, lr=0.1, scale=scale, backend=name)
        results.append((master, m, v))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_what_is_written_is_told_to_autograd(name):
    """Whoever saved it for backward is told that it is gone."""
    master, m, v, t, parameter = randn(9), torch.zeros(9), torch.zeros(9), torch.zeros(()), torch.zeros(9).bfloat16()
    grad, bucket = randn(9, seed=1), torch.zeros(20)
    written, before = (master, m, v, t, parameter, bucket), grad.clone()
    versions = [x._version for x in written]
    adamw_step(master, m, v, grad, t, lr=0.1, parameter=parameter, backend=name)
    cast_and_pack([grad], bucket, backend=name)
    assert all(x._version > version for x, version in zip(written, versions, strict=True))
    assert grad._version == 0 and torch.equal(grad, before)
    factor = torch.ones(20, requires_grad=True)
    product = (factor * bucket).sum()
    cast_and_pack([grad], bucket, backend=name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_a_learning_rate_may_be_a_tensor(name):
    options = dict(weight_decay=0.1, eps=1e-3)
    plain = step_through(kernels, name, 99, gradients(99, 2), torch.float32, lr=0.125, **options)
    found = step_through(kernels, name, 99, gradients(99, 2), torch.float32, lr=torch.tensor(0.125), **options)
    assert all(map(torch.equal, plain, found))


def corrects_for_steps(module: Any) -> None:
    """1 - β^t is exact when it is small, in the first steps, and 1 when it is not. What a step adds is all there is."""
    for start in (0, 1, 10, 1000, 1_000_000):
        results = []
        for name, wide in (("triton", torch.float32), ("torch", torch.float64)):
            master, m, v = (randn(99, seed=seed).to(wide) * (seed > 0) for seed in range(3))
            t = torch.tensor(float(start))
            module.adamw_step(master, m, v.square_(), randn(99, seed=3).to(wide), t, lr=1.0, backend=name)
            results.append((master, t))
        assert error(results[0][0], results[1][0]) < 3e-6, start
        assert results[0][1] == start + 1


def test_the_first_step_and_the_millionth():
    corrects_for_steps(kernels)


def test_adamw_moves_28_bytes_per_element():
    """With a 16-bit gradient and parameter; besides, a program reads three scalars."""
    size = adamw.BLOCK + 333
    master, m, v = randn(size), torch.zeros(size), torch.zeros(size)
    grad, parameter = randn(size).bfloat16(), torch.empty(size, dtype=torch.bfloat16)
    with interpreter.traffic() as seen:
        adamw_step(master, m, v, grad, torch.zeros(()), lr=0.1, parameter=parameter, backend="triton")
    assert [seen.read(x) for x in (master, m, v, grad, parameter)] == [4 * size, 4 * size, 4 * size, 2 * size, 0]
    assert [seen.written(x) for x in (master, m, v, grad, parameter)] == [4 * size] * 3 + [0, 2 * size]
    total = sum(len(where) * width for where, width in seen.reads + seen.writes)
    assert total == 28 * size + 2 * (4 + 4 + 1)
    with interpreter.traffic() as seen:
        adamw_step(master, m, v, grad, torch.zeros(()), lr=0.1, skip=torch.tensor(True), backend="triton")
    assert sum(len(where) * width for where, width in seen.reads + seen.writes) == 2


# ---- the norm of gradients ----


def pieces_of(dtype: torch.dtype) -> list[Tensor]:
    """Of one block, of several, of none; apart in memory, and of no dims."""
    shapes = (flat.BLOCK + 333,), (7, 15), (0,), (1,), (flat.BLOCK,), (3, 0, 2), ()
    dense = [randn(*shape, seed=seed, scale=3.0).to(dtype) for seed, shape in enumerate(shapes)]
    return [*dense, randn(40, 30).to(dtype).t(), randn(9, 50).to(dtype)[:, 3:20], randn(1, 5).to(dtype).expand(4, 5)]


@every_dtype
def test_the_norm_is_the_sum_of_all_squares(dtype):
    """Beside exact arithmetic, and torch's own."""
    pieces = pieces_of(dtype)
    exact = math.fsum(float(x) ** 2 for piece in pieces for x in piece.flatten().tolist())
    squares, finite = grad_norm(pieces, backend="triton")
    assert squares.dtype == torch.float64
    assert float(squares) == pytest.approx(exact, rel=3e-7)
    assert finite.dtype == torch.bool
    assert bool(finite)
    torchs = torch.nn.utils.get_total_norm([piece.float() for piece in pieces])
    assert float(squares.sqrt()) == pytest.approx(float(torchs), rel=1e-6)
    wide, _ = grad_norm([piece.double() for piece in pieces], backend="torch")
    assert float(wide) == pytest.approx(exact, rel=1e-12)


@every_dtype
@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_seen(dtype, name, bad):
    for place in (0, flat.BLOCK, flat.BLOCK + 332):
        pieces = pieces_of(dtype)
        pieces[0][place] = bad
        assert not grad_norm(pieces, backend=name)[1]


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_a_norm_of_nothing_and_one_that_fp32_cannot_hold(name):
    assert grad_norm([torch.empty(0)], backend=name)[0] == 0
    assert bool(grad_norm([torch.empty(0)], backend=name)[1])
    if name == "triton":  # torch is finite here, as long as it is one number
        assert not grad_norm([torch.tensor([2e19])], backend=name)[1]
    squares, finite = grad_norm([torch.full((9000,), 1e17)] * 20, backend=name)  # each block fits, their sum does not
    assert bool(finite)
    assert float(squares) == pytest.approx(9000 * 20 * 1e34, rel=1e-6 if name == "triton" else 1e-4)
    assert float(squares) > torch.finfo(torch.float32).max


def test_a_norm_reads_once():
    pieces = [piece for piece in pieces_of(torch.bfloat16) if piece.is_contiguous()]
    with interpreter.traffic() as seen:
        grad_norm(pieces, backend="triton")
    assert seen.read(*pieces) == sum(piece.nbytes for piece in pieces)
    assert seen.written(*pieces) == 0


# ---- buckets ----


@pytest.mark.parametrize("target", DTYPES, ids=str)
@every_dtype
@pytest.mark.parametrize("scale", [1.0, 0.125, 1 / 3])
def test_a_bucket_is_its_pieces_cast(dtype, target, scale):
    """Bit for bit torch.cat of what was scaled in fp32; what lies behind the pieces stays."""
    pieces = pieces_of(dtype)
    wanted = (torch.cat([piece.reshape(-1) for piece in pieces]).float() * scale).to(target)
    for name in ("triton", "torch"):
        bucket = torch.full((len(wanted) + 5,), 7.0, dtype=target)
        assert cast_and_pack(pieces, bucket, scale=scale, backend=name) is bucket
        assert torch.equal(bits(bucket[: len(wanted)]), bits(wanted)), name
        assert (bucket[len(wanted) :] == 7).all()


def test_packing_reads_once_and_writes_once():
    pieces = [piece for piece in pieces_of(torch.float32) if piece.is_contiguous()]
    bucket = torch.empty(sum(piece.numel() for piece in pieces) + 9, dtype=torch.bfloat16)
    with interpreter.traffic() as seen:
        cast_and_pack(pieces, bucket, backend="triton")
    assert seen.read(*pieces) == sum(piece.nbytes for piece in pieces)
    assert seen.written(bucket) == 2 * (len(bucket) - 9)
    assert seen.read(bucket) == 0


# ---- quantization ----

FP8 = [torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).float().item() for code in range(256)]
FP8_CODES = [code for code in range(256) if not math.isnan(FP8[code])]


def to_fp8(y: float) -> int:
    """The code of the nearest number there is; of two equally near, the one whose last bit is 0. Not infinite."""
    signed = [code for code in FP8_CODES if (code >= 128) == (math.copysign(1, y) < 0)]
    return min(signed, key=lambda code: (abs(Fraction(FP8[code]) - Fraction(y)), code & 1))


def naive(values: list[float], block: int, dtype: torch.dtype) -> tuple[list[int], list[float]]:
    """(codes, scales), one number at a time; arithmetic in fp32, of which numpy has scalars."""
    largest, codes, scales = np.float32(127 if dtype == torch.int8 else 448), [], []
    for start in range(0, len(values), block):
        own = values[start : start + block]
        if not all(map(math.isfinite, own)):
            scales.append(math.nan)
            codes += [0] * len(own)
            continue
        highest = np.float32(max(abs(x) for x in own))
        scales.append(float(highest / largest))
        inverse = largest / highest if highest else np.float32(0)
        for x in own:
            y = float(np.float32(x) * inverse)
            codes.append(max(-127, min(127, round(y))) if dtype == torch.int8 else to_fp8(max(-448.0, min(448.0, y))))
    return codes, scales


def codes_of(q: Tensor) -> list[int]:
    return (q if q.dtype == torch.int8 else q.view(torch.uint8)).flatten().tolist()


QUANTIZED = pytest.mark.parametrize("into", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])


@every_dtype
@QUANTIZED
@pytest.mark.parametrize(("size", "block"), [(1, 16), (15, 16), (333, 256), (512, 256), (100, 4096), (1000, 16)])
def test_codes_and_scales_are_those_of_plain_python(dtype, into, size, block):
    x = randn(size, scale=3.0).to(dtype)
    if size > 400:
        x[256:300] = 0.0
    codes, scales = naive(x.float().tolist(), block, into)
    for name in ("triton", "torch"):
        q, found = quantize_blockwise(x, block, into, backend=name)
        assert (q.dtype, q.shape, found.dtype) == (into, x.shape, torch.float32)
        assert found.tolist() == scales, name
        assert codes_of(q) == codes, name


@QUANTIZED
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_ties_go_to_even(into, name):
    """A block whose largest is the largest code has scale 1."""
    top = 127.0 if into == torch.int8 else 448.0
    halves = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 3.4999998, 0.49999997]
    between = [(FP8[code] + FP8[code + 1]) / 2 for code in range(0, 126)]
    values = [top, -top] + (halves if into == torch.int8 else between)
    q, scales = quantize_blockwise(torch.tensor(values), 256, into, backend=name)
    assert scales.tolist() == [1.0]
    assert codes_of(q) == naive(values, 256, into)[0]
    if into == torch.int8:
        assert codes_of(q) == [127, -127, 0, 2, 2, 0, -2, -2, 126, -126, 3, 0]


@QUANTIZED
@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_blocks_of_zeros_and_blocks_with_what_is_not_finite(into, name, bad):
    """Zeros come back as zeros; of a block that has a nan or an infinity, all of it comes back as nan."""
    x = randn(4 * 16 + 3)
    x[:16], x[20], x[66] = 0.0, bad, bad
    q, scales = quantize_blockwise(x, 16, into, backend=name)
    back = dequantize_blockwise(q, scales, 16, backend=name)
    assert scales[0] == 0
    assert scales.isnan().tolist() == [False, True, False, False, True]
    assert not back[:16].any()
    assert back.isnan().nonzero().flatten().tolist() == [*range(16, 32), 64, 65, 66]


@QUANTIZED
@pytest.mark.parametrize(
    ("size", "name"),
    [
        *((size, "triton") for size in (3e-39, 1e-37, 1e-30, 1e38)),
        *((size, "torch") for size in (3e-39, 1e-37, 1e-30, 1e38)),
    ],
)
def test_numbers_as_small_and_as_large_as_they_come(into, name, size):
    """Nothing comes back larger than the largest, and zeros as zeros."""
    x = torch.tensor([size, -size, 0.0, size / 3, -0.0])
    back = dequantize_blockwise(*quantize_blockwise(x, 16, into, backend=name), 16, backend=name)
    assert not back[[2, 4]].any()
    assert (back.abs().double() <= size * (1 + 1e-4)).all()
    assert (back.double() - x.double()).abs().max() <= size * (1 + 1e-4)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    st.sampled_from([torch.int8, torch.float8_e4m3fn]),
)
@settings(max_examples=40, deadline=None, database=None, derandomize=True)
def test_what_comes_back_is_within_half_a_step(values, into):
    x = torch.tensor(values)
    q, scales = quantize_blockwise(x, 16, into, backend="triton")
    back = dequantize_blockwise(q, scales, 16, backend="triton").double()
    own = scales.double().repeat_interleave(16)[: len(x)]
    if bool((x.abs() > 1e-30).any()):
        step = own / 2 if into == torch.int8 else torch.maximum(x.double().abs() / 16, own * 2**-10)
        assert ((back - x.double()).abs() <= step * (1 + 1e-5) + 1e-36).all()


@every_dtype
@QUANTIZED
def test_back_in_any_dtype_and_any_layout(dtype, into):
    x = randn(30, 20).to(dtype).t()
    for name in ("triton", "torch"):
        q, scales = quantize_blockwise(x, 16, into, backend=name)
        assert q.shape == x.shape
        assert codes_of(q) == naive(x.flatten().float().tolist(), 16, into)[0]
        back = dequantize_blockwise(q, scales, 16, dtype, backend=name)
        wanted = (q.float().flatten() * scales.repeat_interleave(16)[:600]).to(dtype).view(x.shape)
        assert torch.equal(bits(back), bits(wanted)), name
        turned = dequantize_blockwise(q.t().contiguous().t(), scales.repeat(2)[: len(scales)], 16, dtype, backend=name)
        assert torch.equal(bits(turned), bits(wanted)), name


@QUANTIZED
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_nothing_to_quantize(into, name):
    q, scales = quantize_blockwise(torch.empty(3, 0), 256, into, backend=name)
    assert q.shape == (3, 0)
    assert scales.shape == (0,)
    assert dequantize_blockwise(q, scales, backend=name).shape == (3, 0)


@QUANTIZED
def test_quantizing_reads_once_and_writes_once(into):
    """2 + 1 + 4 / 256 bytes per element of 16 bits."""
    x = randn(40 * 256 + 33).bfloat16()
    with interpreter.traffic() as seen:
        q, scales = quantize_blockwise(x, 256, into, backend="triton")
    assert (seen.read(x), seen.written(q), seen.written(scales)) == (x.nbytes, len(x), 41 * 4)
    assert sum(len(where) * width for where, width in seen.reads + seen.writes) == 3 * len(x) + 41 * 4
    with interpreter.traffic() as seen:
        back = dequantize_blockwise(q, scales, 256, torch.bfloat16, backend="triton")
    assert (seen.read(q), seen.read(scales), seen.written(back)) == (len(x), 41 * 4, back.nbytes)


# ---- order ----


def test_the_order_of_programs_does_not_matter():
    x = randn(3 * flat.BLOCK + 5)
    same_in_any_order(lambda: step_through(kernels, "triton", len(x), [x], torch.float32, lr=0.1))
    same_in_any_order(lambda: grad_norm([x, randn(3)[:0], 2 * x], backend="triton"))
    same_in_any_order(lambda: [cast_and_pack([x[:9], x], torch.zeros(2 * len(x)), backend="triton")])
    for into in (torch.int8, torch.float8_e4m3fn):
        same_in_any_order(lambda into=into: quantize_blockwise(x, 256, into, backend="triton"))
        q, scales = quantize_blockwise(x, 256, into, backend="triton")
        same_in_any_order(lambda q=q, scales=scales: [dequantize_blockwise(q, scales, backend="triton")])


# ---- huge tensors ----

LAST_ONLY = """
from triton.runtime import interpreter as triton_interpreter
from minizero.kernels import cast_and_pack, dequantize_blockwise, grad_norm, quantize_blockwise

def last_program_only(executor, builder):
    "A launch runs its last program, which alone touches memory."
    launch, place = executor.__call__, builder.set_grid_idx
    def call(self, *args, **options):
        programs, self.grid = self.grid[0], (1,)
        builder.set_grid_idx = lambda self, x, y, z: setattr(self, "grid_idx", (programs - 1, y, z))
        launch(self, *args, **options)
        builder.set_grid_idx = place
    executor.__call__ = call

last_program_only(triton_interpreter.GridExecutor, triton_interpreter.InterpreterBuilder)
size = (1 << 31) + 4096 + 17
x = buffer[:size] if len(buffer) >= size else torch.empty(size, dtype=bf16)
tail = slice(size - 17, size)
x[tail] = torch.arange(17)
"""
GOOD = """
into = torch.empty(size, dtype=bf16)
cast_and_pack([x], into, scale=2.0, backend="triton")
assert into[tail].tolist() == [2.0 * number for number in range(17)]
into[tail] = 0
q, scales = quantize_blockwise(x, 16, backend="triton")
assert q[tail].tolist()[-1] == 127
dequantize_blockwise(q, scales, 16, bf16, backend="triton")
"""
BROKEN = """
module = planted(folder, "{}", (".to(tl.int64)", ""))
{}
"""
BROKEN_CALLS = {
    "flat": 'module.cast_and_pack([x], torch.empty(size, dtype=bf16), backend="triton")',
    "quantize": 'module.quantize_blockwise(x, 16, backend="triton")',
}


def test_offsets_beyond_int32(tmp_path):
    """More than 2³¹ elements in one buffer. The same kernels with int32 offsets die of it."""
    beyond_int32(tmp_path, LAST_ONLY + GOOD, [BROKEN.format(*each) for each in BROKEN_CALLS.items()])


# ---- refusals ----

P = torch.zeros(4)
T = torch.zeros(())
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a master of two dims": (lambda: adamw_step(P[None], P, P, P, T, lr=0.1), r"adamw_step: master is \(1, 4\)"),
    "a master of 16 bits": (lambda: adamw_step(P.half(), P, P, P, T, lr=0.1), r"master is \(4,\) torch.float16"),
    "moments of 16 bits": (lambda: adamw_step(P, P, P.bfloat16(), P, T, lr=0.1), r"v is \(4,\) torch.bfloat16"),
    "a gradient of another size": (lambda: adamw_step(P, P, P, P[:3], T, lr=0.1), r"grad is \(3,\)"),
    "a gradient apart": (
        lambda: adamw_step(P, P, P, torch.zeros(8)[::2], T, lr=0.1), r"grad is .* stride \(2,\); legal: contiguous"
    ),
    "a parameter of another size": (lambda: adamw_step(P, P, P, P, T, lr=0.1, parameter=P[:1]), "parameter is"),
    "steps of one dim": (lambda: adamw_step(P, P, P, P, T[None], lr=0.1), r"step is \(1,\) torch.float32 on cpu"),
    "steps in 16 bits": (lambda: adamw_step(P, P, P, P, T.half(), lr=0.1), r"step is \(\) torch.float16 on cpu; legal"),
    "steps elsewhere": (lambda: adamw_step(P, P, P, P, T.to("meta"), lr=0.1), "step is .* on meta; legal: .*, on cpu"),
    "a scale of one dim": (lambda: adamw_step(P, P, P, P, T, lr=0.1, scale=T[None]), r"scale is \(1,\)"),
    "a scale of integers": (lambda: adamw_step(P, P, P, P, T, lr=0.1, scale=T.int()), r"scale is \(\) torch.int32"),
    "a scale elsewhere": (lambda: adamw_step(P, P, P, P, T, lr=0.1, scale=T.to("meta")), "scale is .* on meta"),
    "many skips": (lambda: adamw_step(P, P, P, P, T, lr=0.1, skip=P.bool()), r"skip is \(4,\) torch.bool"),
    "a skip that is a number": (lambda: adamw_step(P, P, P, P, T, lr=0.1, skip=T), "skip is .*legal: no dims, torch"),
    "a skip elsewhere": (lambda: adamw_step(P, P, P, P, T, lr=0.1, skip=T.bool().to("meta")), "skip is .* on meta"),
    "no tensors": (lambda: grad_norm([]), "grad_norm: tensors are none; legal: at least one"),
    "two dtypes": (lambda: grad_norm([P, P.half()]), "torch.float16 on cpu, torch.float32 on cpu"),
    "integers": (lambda: grad_norm([P.int()]), "grad_norm: tensors are torch.int32 on cpu; legal"),
    "nothing to pack": (lambda: cast_and_pack([], P), "cast_and_pack: tensors are none"),
    "pieces of two dtypes": (lambda: cast_and_pack([P, P.half()], P), "cast_and_pack: tensors are"),
    "too much to pack": (lambda: cast_and_pack([P, P], P), r"cast_and_pack: 8 elements into a bucket of \(4,\)"),
    "a bucket of two dims": (lambda: cast_and_pack([P], P[None]), r"a bucket of \(1, 4\)"),
    "a bucket apart": (lambda: cast_and_pack([P], torch.zeros(8)[::2]), r"stride \(2,\)"),
    "an odd block": (lambda: quantize_blockwise(P, 100), "quantize_blockwise: dtype torch.int8, block 100; legal"),
    "a block too small": (lambda: quantize_blockwise(P, 8), "block 8; legal"),
    "a block too large": (lambda: quantize_blockwise(P, 8192), "block 8192; legal"),
    "another dtype": (lambda: quantize_blockwise(P, 16, torch.uint8), "dtype torch.uint8, block 16; legal: torch.in"),
    "fp32 to undo": (lambda: dequantize_blockwise(P, P, 16), "dequantize_blockwise: dtype torch.float32"),
    "scales for other blocks": (
        lambda: dequantize_blockwise(torch.zeros(33, dtype=torch.int8), P, 16), r"scales are \(4,\) for 33 elements in"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call()


Q8, S8 = torch.zeros(4, dtype=torch.int8), torch.zeros(1)
OPS: dict[str, Callable[..., Any]] = {
    "adamw_step": lambda t, o: adamw_step(t(P), t(P), t(P), t(P), T.clone(), lr=0.1, **o),
    "grad_norm": lambda t, o: grad_norm([t(P)], **o),
    "cast_and_pack": lambda t, o: cast_and_pack([t(P)], t(P), **o),
    "quantize_blockwise": lambda t, o: quantize_blockwise(t(P), **o),
    "dequantize_blockwise": lambda t, o: dequantize_blockwise(Q8, t(S8), **o),
}


@pytest.mark.parametrize("name", OPS)
def test_what_triton_cannot_run_is_refused_by_name(name, monkeypatch):
    refused_by_name(name, OPS[name], monkeypatch)


# ---- torch.compile ----


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_torch_compile_traces_norms_and_buckets():
    pieces = [randn(9), randn(3, 4, seed=1)]
    plain, traced = (f(pieces, backend="torch") for f in (grad_norm, compiled(grad_norm)))
    assert all(map(torch.equal, plain, traced))
    half = randn(30).half()
    plain, traced = (
        f(pieces, half.clone(), scale=0.5, backend="torch") for f in (cast_and_pack, compiled(cast_and_pack))
    )
    assert torch.equal(plain, traced)


@QUANTIZED
def test_torch_compile_traces_quantization(into):
    x = randn(50)
    plain, traced = (f(x, 16, into, backend="torch") for f in (quantize_blockwise, compiled(quantize_blockwise)))
    assert torch.equal(bits(plain[0]), bits(traced[0]))
    assert torch.equal(plain[1], traced[1])
    back = compiled(dequantize_blockwise)(*plain, 16, backend="torch")
    assert torch.equal(back, dequantize_blockwise(*plain, 16, backend="torch"))


@pytest.mark.parametrize("skip", [None, torch.tensor(False)], ids=["always", "skip"])
def test_torch_compile_traces_adamw(skip):
    results = []
    for function in (adamw_step, compiled(adamw_step)):
        master, m, v, t = randn(99), torch.zeros(99), torch.zeros(99), torch.zeros(())
        for grad in gradients(99, 3):
            function(master, m, v, grad, t, lr=0.1, scale=torch.tensor(0.5), skip=skip, backend="torch")
        results.append((master, m, v, t))
    for plain, traced in zip(*results, strict=True):
        assert error(traced, plain) < 1e-6


# ---- defects ----


def packs(module: ModuleType) -> None:
    pieces = pieces_of(torch.float32)
    wanted = torch.cat([piece.reshape(-1) for piece in pieces])
    bucket = module.cast_and_pack(pieces, torch.full((len(wanted) + 9000,), 7.0), backend="triton")
    assert torch.equal(bucket[: len(wanted)], wanted)
    assert (bucket[len(wanted) :] == 7).all()


def sums(module: ModuleType) -> None:
    pieces = pieces_of(torch.float32)
    exact = math.fsum(float(x) ** 2 for piece in pieces for x in piece.flatten().tolist())
    assert float(module.grad_norm(pieces, backend="triton")[0]) == pytest.approx(exact, rel=3e-7)


def quantizes(module: ModuleType) -> None:
    values = [127.0, -127.0, 0.5, 1.5, 2.5, 126.5, *randn(250, scale=20.0).tolist(), math.nan, *[1.0] * 30]
    q, scales = module.quantize_blockwise(torch.tensor(values), 16, backend="triton")
    codes, wanted = naive(values, 16, torch.int8)
    assert codes_of(q) == codes
    np.testing.assert_array_equal(scales.numpy(), np.array(wanted, dtype=np.float32))


def steps(module: ModuleType) -> None:
    """Beside our own torch code: a defect here is larger than any rounding."""
    for grads in (gradients(3000, 3), gradients(3000, 1)):
        found = step_through(module, "triton", 3000, grads, torch.float32, lr=1e-2, weight_decay=0.1)
        wanted = step_through(kernels, "torch", 3000, grads, torch.float64, lr=1e-2, weight_decay=0.1)
        assert all(error(one, other) < 2e-5 for one, other in zip(found, wanted, strict=True))


DEFECTS: dict[str, tuple[str, tuple[str, str], Callable[[ModuleType], None]]] = {
    "decay in the gradient": ("adamw", ("p -= lr * weight_decay * p", "m += 0.1 * weight_decay * p"), steps),
    "no correction of the second moment": ("adamw", ("tl.sqrt(v / left2)", "tl.sqrt(v)"), steps),
    "ε below the root": ("adamw", ("(tl.sqrt(v / left2) + eps)", "tl.sqrt(v / left2 + eps)"), steps),
    "powers of β in fp32": (
        "adamw", ("t = tl.load(step_ptr).to(tl.float64)", "t = tl.load(step_ptr)"), corrects_for_steps
    ),
    "what is beyond the end is written": (
        "flat", ("x.to(bucket_ptr.dtype.element_ty), mask=place < size)",
                 "x.to(bucket_ptr.dtype.element_ty), mask=place < size + 1)"), packs
    ),
    "a sum of absolute values": ("flat", ("tl.sum(x * x, axis=0)", "tl.sum(tl.abs(x), axis=0)"), sums),
    "halves away from zero": (
        "quantize", ("y = (y + 12582912.0) - 12582912.0", "y = tl.where(y < 0, tl.ceil(y - 0.5), tl.floor(y + 0.5))"),
        quantizes,
    ),
    "a nan is taken for a zero": (
        "quantize", ('tl.where(anywhere, float("nan"), highest / largest)', "highest / largest"), quantizes
    ),
    "cut off instead of rounded": ("quantize", ("    if ROUND:\n", "    if False:\n"), quantizes),
}  # fmt: skip


@pytest.mark.parametrize("what", DEFECTS)
def test_a_planted_defect_is_seen(what, tmp_path):
    sees(tmp_path, *DEFECTS[what])
