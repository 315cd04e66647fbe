"""Norms, gates, GELU behind a bias, rotary positions: kernels beside float64, torch, textbook formulas and Liger."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import interpreter
import pytest
import torch
from kernel_checks import (
    STRIDE,
    Op,
    beyond_int32,
    close,
    compiles,
    error,
    every_dtype,
    oracle,
    parity,
    randn,
    refused_by_name,
    run,
    same_in_any_order,
    sees,
    triton_run,
)
from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
from liger_kernel.ops.geglu import LigerGELUMulFunction
from liger_kernel.ops.layer_norm import LigerLayerNormFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from minizero import kernels
from minizero.kernels import (
    add_rms_norm,
    backend,
    bias_gelu,
    geglu,
    layer_norm,
    layer_norm_gelu,
    norm,
    rms_norm,
    rope,
    swiglu,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of exp(1000) and the like

EPS = 1e-5
WIDE = norm.WIDEST_FORWARD + 5


class Case(NamedTuple):
    """An op over rows, its inputs (`rows` of them are as x is, others are vectors), and who else computes it."""

    op: Op
    rows: int
    vectors: int
    textbook: Op
    liger: Op | None = None


def textbook_norm(x: Tensor, weight: Tensor, bias: Tensor | float, center: bool) -> Tensor:
    if center:
        x = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt() * weight + bias


def textbook_gelu(x: Tensor, tanh: bool) -> Tensor:
    if tanh:
        return x / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * (1 - torch.erfc(x / math.sqrt(2)) / 2)


def textbook_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, EPS), total


CASES = {
    "rms_norm": Case(
        lambda x, w, **o: rms_norm(x, w, EPS, **o),
        1,
        1,
        lambda x, w: F.rms_norm(x, w.shape, w, EPS),
        lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False, None),
    ),
    "layer_norm": Case(
        lambda x, w, b, **o: layer_norm(x, w, b, EPS, **o),
        1,
        2,
        lambda x, w, b: textbook_norm(x, w, b, True),
        lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS),
    ),
    "layer_norm without bias": Case(
        lambda x, w, **o: layer_norm(x, w, None, EPS, **o), 1, 1, lambda x, w: textbook_norm(x, w, 0.0, True)
    ),
    "add_rms_norm": Case(
        lambda x, r, w, **o: add_rms_norm(x, r, w, EPS, **o),
        2,
        1,
        textbook_add,
        lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False),
    ),
    "layer_norm_gelu": Case(
        lambda x, w, b, **o: layer_norm_gelu(x, w, b, EPS, **o),
        1,
        2,
        lambda x, w, b: textbook_gelu(textbook_norm(x, w, b, True), True),
    ),
    "layer_norm_gelu exact without bias": Case(
        lambda x, w, **o: layer_norm_gelu(x, w, None, EPS, approximate="none", **o),
        1,
        1,
        lambda x, w: textbook_gelu(textbook_norm(x, w, 0.0, True), False),
    ),
    "swiglu": Case(swiglu, 2, 0, lambda g, u: g / (1 + torch.exp(-g)) * u, LigerSiLUMulFunction.apply),
    "geglu": Case(geglu, 2, 0, lambda g, u: textbook_gelu(g, True) * u, LigerGELUMulFunction.apply),
    "geglu exact": Case(
        lambda g, u, **o: geglu(g, u, approximate="none", **o), 2, 0, lambda g, u: textbook_gelu(g, False) * u
    ),
    "bias_gelu": Case(bias_gelu, 1, 1, lambda x, b: textbook_gelu(x + b, True)),
    "bias_gelu exact": Case(
        lambda x, b, **o: bias_gelu(x, b, approximate="none", **o), 1, 1, lambda x, b: textbook_gelu(x + b, False)
    ),
}
NORMS = [name for name in CASES if "norm" in name]
every_case = pytest.mark.parametrize("name", CASES)


def inputs(case: Case, *shape: int, shift: float = 0.5) -> list[Tensor]:
    rows = [randn(*shape, seed=seed, scale=1.5, shift=shift) for seed in range(case.rows)]
    return rows + [randn(shape[-1], seed=10 + seed, shift=0.5) for seed in range(case.vectors)]


# ---- parity ----


@every_case
@every_dtype
@pytest.mark.parametrize("shape", [(5, 7), (3, 15), (1, 17), (37, 100), (2, 3, 333), (1, 256)], ids=str)
def test_kernels_are_as_exact_as_torch_and_liger(name, dtype, shape):
    case = CASES[name]
    parity(case.op, inputs(case, *shape), dtype, rivals=[case.liger] if case.liger else [])


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    ("dtype", "columns"),
    [(torch.float32, WIDE), (torch.bfloat16, WIDE), (torch.float16, norm.WIDEST_BACKWARD + 3)],
    ids=str,
)
def test_rows_too_wide_for_registers(name, dtype, columns):
    """Five rows: a program of backward has two, and adds to its partial sums."""
    case = CASES[name]
    parity(case.op, inputs(case, 5, columns), dtype)


@pytest.mark.parametrize("name", [name for name in CASES if name not in NORMS])
def test_rows_of_several_programs(name):
    """And, behind a bias, programs of several tiles."""
    case = CASES[name]
    parity(case.op, inputs(case, 20, 5001), torch.bfloat16, "transposed")


@pytest.mark.parametrize("name", NORMS)
@every_dtype
def test_programs_of_several_tiles(name, dtype):
    """Backward's programs add up what their rows, of which the last has too few, give to the weights."""
    case = CASES[name]
    parity(case.op, inputs(case, 150, 100), dtype)


@every_dtype
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_one_column_of_a_root_mean_square(name, dtype):
    """ε as large as the squares: with a small one the gradient is what cancellation leaves."""
    ops = {
        "rms_norm": lambda x, w, **o: rms_norm(x, w, 0.5, **o),
        "add_rms_norm": lambda x, r, w, **o: add_rms_norm(x, r, w, 0.5, **o),
    }
    parity(ops[name], inputs(CASES[name], 6, 1), dtype)


@every_dtype
@pytest.mark.parametrize("name", [name for name in CASES if "norm" not in name])
def test_one_column(name, dtype):
    case = CASES[name]
    parity(case.op, inputs(case, 6, 1), dtype)


@every_dtype
@pytest.mark.parametrize("name", [name for name in CASES if "layer_norm" in name])
def test_one_column_is_its_own_mean(name, dtype):
    """What is left is the bias; torch leaves noise where these numbers cancel."""
    case = CASES[name]
    exact = run(case.op, inputs(case, 6, 1), dtype, torch.float64, backend="torch")
    for result, value in run(case.op, inputs(case, 6, 1), dtype, dtype, backend="triton").items():
        torch.testing.assert_close(value, exact[result].to(dtype), atol=1e-6, rtol=4e-3, msg=result)


@every_case
@pytest.mark.parametrize("shape", [(0, 100), (2, 0, 100), (0, WIDE)], ids=str)
def test_no_rows(name, shape):
    case = CASES[name]
    found = run(case.op, inputs(case, *shape), torch.bfloat16, torch.bfloat16, backend="triton")
    assert found["output 0"].shape == shape
    for number in range(case.vectors):
        assert torch.equal(found[f"gradient {case.rows + number}"], torch.zeros(shape[-1], dtype=torch.bfloat16))


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "columns apart": ((100, 9), lambda x: x.t()),
    "a slice of columns": ((9, 107), lambda x: x[:, 3:103]),
    "every second row": ((18, 100), lambda x: x[::2]),
    "one row expanded": ((1, 100), lambda x: x.expand(9, 100)),
    "positions before samples": ((4, 3, 100), lambda x: x.transpose(0, 1)),
    "one element expanded": ((3, 1), lambda x: x.expand(3, 100)),
    "one dim": ((100,), lambda x: x),
}


@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_rows(name, layout):
    case = CASES[name]
    shape, view = LAYOUTS[layout]
    rows = [randn(*shape, seed=seed, shift=0.5) for seed in range(case.rows)]
    vectors = [randn(200, seed=10 + seed) for seed in range(case.vectors)]  # every second element, as rows are views

    def op(*given: Tensor, **options: Any) -> Any:
        return case.op(*map(view, given[: case.rows]), *(v[::2] for v in given[case.rows :]), **options)

    if layout == "one element expanded" and name in NORMS:  # a norm of equal numbers has no gradient to speak of
        rows = [randn(3, 100, seed=seed) for seed in range(case.rows)]
    parity(op, rows + vectors, torch.bfloat16)


@pytest.mark.parametrize("op", [swiglu, geglu])
def test_halves_of_one_projection_are_not_copied(op):
    """Bytes say so: both halves are read where they lie, in forward and in backward."""
    both = randn(6, 666).bfloat16()
    parity(lambda x, **o: op(*x.chunk(2, dim=-1), **o), [both], torch.bfloat16)
    gate, up = (half.requires_grad_() for half in both.chunk(2, dim=-1))
    with interpreter.traffic() as seen:
        y = op(gate, up, backend="triton")
        y.backward(torch.ones_like(y))
    assert seen.read(both) == 2 * both.nbytes
    assert seen.written(both) == 0


@every_case
@every_dtype
@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced"])
def test_layouts_of_incoming_gradients(name, dtype, kind):
    case = CASES[name]
    parity(case.op, inputs(case, 9, 100), dtype, kind)


@pytest.mark.parametrize("name", NORMS)
def test_a_sum_of_outputs_is_its_own_start_of_backward(name):
    case = CASES[name]
    summed: Op = lambda *x, **o: case.op(*x, **o)[0].sum() if "add" in name else case.op(*x, **o).sum()  # noqa: E731
    given = [x.double().requires_grad_() for x in inputs(case, 9, 100)]
    exact = torch.autograd.grad(summed(*given, backend="torch"), given)
    given = [x.float().detach().requires_grad_() for x in given]
    found = torch.autograd.grad(summed(*given, backend="triton"), given)
    for one, other in zip(found, exact, strict=True):
        assert error(one, other) < 2e-6


def test_weights_in_fp32_for_rows_in_16_bits():
    """As master weights are: their gradients are not rounded to the dtype of the rows."""
    x, weight, bias, dy = randn(40, 100).bfloat16(), randn(100, seed=1), randn(100, seed=2), randn(40, 100, seed=3)
    dy = dy.bfloat16()

    def gradients(compute: torch.dtype | None, backend: str) -> tuple[Tensor, ...]:
        given = [t.clone() if compute is None else t.to(compute) for t in (x, weight, bias)]
        given = [t.requires_grad_() for t in given]
        y = layer_norm(*given, backend=backend)
        return y, *torch.autograd.grad(y, given, dy.to(y.dtype))

    exact, found = gradients(torch.float64, "torch"), gradients(None, "triton")
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert error(found[0], exact[0]) < 3e-3
    assert error(found[1], exact[1]) < 3e-3
    assert error(found[2], exact[2]) < 5e-7
    assert error(found[3], exact[3]) < 5e-7


@pytest.mark.parametrize("name", ["layer_norm", "layer_norm without bias", "layer_norm_gelu"])
@pytest.mark.parametrize(
    ("of_rows", "of_vectors"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_vectors_may_be_of_other_dtypes_than_rows(name, of_rows, of_vectors):
    """In both backends, and what comes out is of the dtype of the rows."""
    case = CASES[name]
    given = [x.to(of_vectors if number else of_rows) for number, x in enumerate(inputs(case, 5, 100))]

    def everything(compute: torch.dtype | None, backend: str) -> list[Tensor]:
        leaves = [x.to(compute or x.dtype).clone().requires_grad_() for x in given]
        y = case.op(*leaves, backend=backend)
        return [y, *torch.autograd.grad(y, leaves, randn(5, 100, seed=3).to(of_rows).to(y.dtype))]

    exact, eager, found = (everything(*each) for each in ((torch.float64, "torch"), (None, "torch"), (None, "triton")))
    assert [x.dtype for x in found] == [x.dtype for x in eager] == [of_rows, *(x.dtype for x in given)]
    for number, (ours, theirs, true) in enumerate(zip(found, eager, exact, strict=True)):
        close(ours.detach(), true.detach(), theirs.detach(), f"result {number}")


@every_case
def test_results_may_be_written_over(name):
    """As torch's may: what follows is a function of what was written."""
    case = CASES[name]

    def op(*given: Tensor, **options: Any) -> Tensor:
        y = case.op(*given, **options)
        return (y[0] if isinstance(y, tuple) else y).mul_(3.0)

    parity(op, inputs(case, 5, 33), torch.float32)


def test_a_sum_that_backward_needs_may_not_be_written_over():
    x, residual, weight = (each.requires_grad_() for each in inputs(CASES["add_rms_norm"], 5, 33))
    y, total = add_rms_norm(x, residual, weight, backend="triton")
    total.mul_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("columns", [333, WIDE])
def test_what_is_normed_is_the_sum_that_goes_on(columns):
    """Rounded to 16 bits, not as it was before that: backward has nothing but the rounded one."""
    x, residual, weight = randn(3, columns), randn(3, columns, seed=1), randn(columns, seed=2)
    x, residual, weight = x.bfloat16(), residual.bfloat16(), weight.bfloat16()
    y, total = add_rms_norm(x, residual, weight, backend="triton")
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight, backend="triton"))


@pytest.mark.parametrize("columns", [333, WIDE])
def test_a_variance_around_a_mean_far_from_zero(columns):
    """mean(x²) - mean(x)² would be wrong by a tenth here, in fp32."""
    x, weight, bias = randn(3, columns, shift=1000.0), torch.ones(columns), torch.zeros(columns)
    found = layer_norm(x, weight, bias, backend="triton")
    assert error(found, layer_norm(x.double(), weight.double(), bias.double(), backend="torch")) < 1e-4


@pytest.mark.parametrize("name", ["swiglu", "geglu", "geglu exact", "bias_gelu", "bias_gelu exact"])
def test_far_out_nothing_overflows(name):
    """Gates that are shut or open for good: gradients are 0 or 1, not nan."""
    case = CASES[name]
    x = torch.tensor([-3e4, -500.0, -89.0, -20.0, -0.0, 0.0, 20.0, 89.0, 500.0, 3e4])
    other = [torch.ones(10)] if case.rows == 2 else [torch.zeros(10)]
    exact = run(case.op, [x, *other], torch.float32, torch.float64, backend="torch")
    for result, value in run(case.op, [x, *other], torch.float32, torch.float32, backend="triton").items():
        torch.testing.assert_close(value, exact[result].float(), rtol=1e-5, atol=1e-7, msg=result)


@every_case
def test_infinities_and_nan_stay_in_their_rows(name):
    case = CASES[name]
    given = [x.clone() for x in inputs(case, 4, 33)]
    given[0][1, 5], given[0][2, 7] = math.nan, math.inf
    found = run(case.op, given, torch.bfloat16, torch.bfloat16, backend="triton")
    assert not found["output 0"][1].isfinite().all()
    assert found["output 0"][[0, 3]].isfinite().all()
    assert found["gradient 0"][[0, 3]].isfinite().all()
    assert not found["gradient 0"][1].isfinite().all()


# ---- references that are not ours ----


@every_case
@pytest.mark.parametrize("shape", [(5, 17), (2, 3, 40)], ids=str)
def test_the_torch_backend_is_the_textbook(name, shape):
    case = CASES[name]
    oracle(case.op, case.textbook, inputs(case, *shape))


@every_case
def test_kernels_are_the_textbook(name):
    """Without our torch code in between."""
    case = CASES[name]
    given = inputs(case, 5, 100)
    exact = run(case.textbook, given, torch.float32, torch.float64)
    for result, value in run(case.op, given, torch.float32, torch.float32, backend="triton").items():
        assert error(value, exact[result]) < 1e-6, result


# ---- rotary positions ----


def angles(batch: int, length: int, half: int) -> Tensor:
    return randn(batch, 1, length, half, seed=5, scale=3.0)


def rounded_rope(
    dtype: torch.dtype, angle: Tensor, view: Callable[[Tensor], Tensor] = torch.Tensor.detach, **more: Any
) -> Op:
    """rope whose angles were rounded to `dtype` once, for whoever computes, and are seen through `view`."""
    cos, sin = view(angle.cos().to(dtype)), view(angle.sin().to(dtype))
    return lambda q, k, **o: rope(q, k, cos.to(q.dtype), sin.to(q.dtype), **more, **o)


def liger_rope(dtype: torch.dtype, angle: Tensor) -> Op:
    cos, sin = (torch.cat((t, t), dim=-1)[:, 0].to(dtype) for t in (angle.cos(), angle.sin()))
    return lambda q, k: LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)


@every_dtype
@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ((2, 4, 2, 5, 14, 1), "random"),
        ((2, 4, 2, 5, 14, 1), "expanded"),
        ((2, 4, 2, 5, 14, 1), "transposed"),
        ((2, 3, 1, 3, 40, 2), "random"),
        ((1, 1, 1, 1, 2, 1), "random"),
        ((3, 6, 2, 2, 128, 3), "random"),
        ((1, 5, 5, 4, 6, 1), "sliced"),
    ],
    ids=str,
)
def test_rope_is_as_exact_as_torch_and_liger(sizes, kind, dtype):
    batch, heads, kv_heads, length, width, of_angles = sizes
    q, k = randn(batch, heads, length, width), randn(batch, kv_heads, length, width, seed=1)
    angle = angles(of_angles, length, width // 2)
    rivals = [liger_rope(dtype, angle)] if kind == "random" else []
    parity(rounded_rope(dtype, angle), [q, k], dtype, kind, rivals)


def test_rope_is_transformers():
    def reference(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        whole = torch.cat((angle, angle), dim=-1)[:, 0].double()
        return apply_rotary_pos_emb(q, k, whole.cos(), whole.sin())

    q, k, angle = randn(2, 4, 9, 14), randn(2, 2, 9, 14, seed=1), angles(2, 9, 7).double()
    oracle(rounded_rope(torch.float64, angle), reference, [q, k])
    exact = run(reference, [q, k], torch.float32, torch.float64)
    op = rounded_rope(torch.float32, angle)
    for name, value in run(op, [q, k], torch.float32, torch.float32, backend="triton").items():
        assert error(value, exact[name]) < 3e-7, name


ROPE_LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "projected": ((2, 3, 6, 14), lambda x: (x.transpose(1, 2)[:, :4], x.transpose(1, 2)[:, 4:])),
    "width apart": ((2, 6, 14, 3), lambda x: (x[:, :4].transpose(2, 3), x[:, 4:].transpose(2, 3))),
    "slices of one projection": (
        (2, 3, 90),
        lambda x: (x[..., :56].unflatten(-1, (4, 14)).transpose(1, 2), x[..., 60:88].view(2, 3, 2, 14).transpose(1, 2)),
    ),
    "one head expanded": ((2, 1, 3, 14), lambda x: (x.expand(2, 4, 3, 14), x)),
    "one sample expanded": ((1, 2, 3, 14), lambda x: (x.expand(2, 2, 3, 14), x.expand(2, 2, 3, 14))),
}


ROPE_ANGLES: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
    "dense": (angles(1, 3, 7), lambda x: x),
    "width apart": (angles(2, 7, 3), lambda x: x.transpose(2, 3)),
    "samples expanded": (angles(1, 3, 7), lambda x: x.expand(2, 1, 3, 7)),
    "positions expanded": (angles(2, 1, 7), lambda x: x.expand(2, 1, 3, 7)),
    "slices of a table": (angles(2, 5, 9), lambda x: x[:, :, 1:4, 2:]),
}


@pytest.mark.parametrize(
    ("layout", "of_angles"),
    [(each, "dense") for each in ROPE_LAYOUTS] + [("projected", each) for each in list(ROPE_ANGLES)[1:]],
)
def test_rope_takes_any_strides(layout, of_angles):
    shape, view = ROPE_LAYOUTS[layout]
    angle, view_of_angles = ROPE_ANGLES[of_angles]
    op = rounded_rope(torch.bfloat16, angle, view_of_angles)
    parity(lambda x, **o: op(*view(x), **o), [randn(*shape)], torch.bfloat16)


@every_dtype
def test_rope_in_place_writes_over_its_inputs(dtype):
    q, k, angle = randn(2, 4, 3, 14), randn(2, 2, 3, 14, seed=1), angles(1, 3, 7)
    apart = run(rounded_rope(dtype, angle), [q, k], dtype, dtype, backend="triton")
    over = rounded_rope(dtype, angle, in_place=True)
    within = run(lambda q, k, **o: over(q.clone(), k.clone(), **o), [q, k], dtype, dtype, backend="triton")
    for name, value in apart.items():
        assert torch.equal(value, within[name]), name
    given = q.to(dtype), k.to(dtype)
    given = tuple(x.clone() for x in given)
    found = over(*given, backend="triton")
    assert [x.data_ptr() for x in found] == [x.data_ptr() for x in given]
    assert torch.equal(given[0], apart["output 0"])


def test_rope_in_place_where_autograd_or_strides_forbid_it():
    q, k, angle = randn(1, 2, 3, 4), randn(1, 2, 3, 4), angles(1, 3, 2)
    over = rounded_rope(torch.float32, angle, in_place=True)
    with pytest.raises(ValueError, match="rope: in place, the last dim must be contiguous"):
        over(q.transpose(2, 3).contiguous().transpose(2, 3), k, backend="triton")
    whole = (q.clone().requires_grad_() * 1, k.clone())
    left = (whole[0] * whole[0]).sum()  # has saved q
    over(*whole, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        left.backward()


REFUSED_IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "a leaf that requires grad": (lambda x: x.clone().requires_grad_(), RuntimeError, "cannot follow {}: it is a"),
    "a view of such a leaf": (lambda x: x.clone().requires_grad_().flatten().view(x.shape), RuntimeError, "follow {}"),
    "a view in a graph": (lambda x: (x.clone().requires_grad_() * 1)[:], RuntimeError, "follow {}"),
    "one head expanded": (lambda x: x[:, :1].clone().expand(x.shape), ValueError, "elements of {} share memory"),
    "heads that overlap": (lambda x: x.flatten().as_strided(x.shape, (24, 3, 4, 1)), ValueError, "elements of {}"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("what", REFUSED_IN_PLACE)
def test_rope_in_place_is_refused_before_anything_is_written(what, which, name):
    view, raised, message = REFUSED_IN_PLACE[what]
    given = {each: randn(1, 2, 3, 4, seed=seed) for seed, each in enumerate("qk")}
    given[which] = view(given[which])
    before = [x.detach().clone() for x in given.values()]
    over = rounded_rope(torch.float32, angles(1, 3, 2), in_place=True)
    with pytest.raises(raised, match=f"rope: in place, .*{message.format(which)}"):
        over(*given.values(), backend=name)
    for x, old in zip(given.values(), before, strict=True):
        assert torch.equal(x.detach(), old)
    if raised is RuntimeError:  # without a graph there is nothing to follow
        with torch.no_grad():
            over(*given.values(), backend=name)
        assert not torch.equal(given[which].detach(), before["qk".index(which)])


def test_rope_of_nothing():
    for batch, length in ((0, 5), (2, 0)):
        q, k = torch.empty(batch, 4, length, 6), torch.empty(batch, 2, length, 6)
        found = run(rounded_rope(torch.float32, angles(1, length, 3)), [q, k], *[torch.float32] * 2, backend="triton")
        assert [tuple(x.shape) for x in found.values()] == [tuple(q.shape), tuple(k.shape)] * 2


def test_rope_keeps_dtypes_when_angles_are_wider():
    q, k, angle = randn(1, 2, 3, 4).bfloat16(), randn(1, 2, 3, 4, seed=1).bfloat16(), angles(1, 3, 2)
    exact = rope(q.double(), k.double(), angle.double().cos(), angle.double().sin(), backend="torch")
    for backend_name in ("triton", "torch"):
        found = rope(q, k, angle.cos(), angle.sin(), backend=backend_name)
        assert [x.dtype for x in found] == [torch.bfloat16] * 2, backend_name
        assert error(found[0], exact[0]) < 3e-3


# ---- bytes ----


def moved(op: Op, given: list[Tensor]) -> tuple[Any, Any, list[Tensor], list[Tensor], list[Tensor]]:
    """(what forward moved, what backward moved, outputs, incoming gradients, gradients)."""
    leaves = [x.requires_grad_() for x in given]
    with interpreter.traffic() as forward:
        outputs = op(*leaves, backend="triton")
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    incoming = [torch.ones_like(y) for y in outputs]
    with interpreter.traffic() as backward:
        gradients = list(torch.autograd.grad(outputs, leaves, incoming))
    return forward, backward, outputs, incoming, gradients


@pytest.mark.parametrize("columns", [100, 4096, 8192])
@pytest.mark.parametrize("name", CASES)
def test_every_row_is_read_once_and_written_once(name, columns):
    """Forward reads the inputs and writes the outputs; backward reads what came in and the rows, and writes gradients.

    Behind a sum, backward reads the sum, not its two terms, and writes one gradient for both.
    """
    case = CASES[name]
    given = [x.bfloat16() for x in inputs(case, 4, columns)]
    forward, backward, outputs, incoming, gradients = moved(case.op, given)
    rows = given[: case.rows]
    size = rows[0].nbytes
    assert [forward.read(x) for x in rows] == [size] * case.rows
    assert [forward.written(y) for y in outputs] == [size] * len(outputs)
    assert sum(forward.read(y) for y in outputs) == 0
    assert [backward.read(dy) for dy in incoming] == [size] * len(incoming)
    if name == "add_rms_norm":
        assert backward.read(*rows) == 0
        assert backward.read(outputs[1]) == size
        assert gradients[0].data_ptr() == gradients[1].data_ptr()
        assert backward.written(gradients[0]) == size
    else:
        assert [backward.read(x) for x in rows] == [size] * case.rows
        assert [backward.written(dx) for dx in gradients[: case.rows]] == [size] * case.rows


def bytes_of(seen: interpreter.Traffic) -> tuple[int, int]:
    return tuple(sum(len(where) * size for where, size in side) for side in (seen.reads, seen.writes))  # type: ignore


def test_totals_are_the_minimum_and_what_every_row_needs_besides():
    """All traffic of an RMSNorm, without anything left out: 2 + 2 bytes forward, 4 + 2 backward; an rstd per row.

    The weight is read once for every program, from cache, and every program leaves a row of partial sums.
    """
    rows, columns = 64, 1000
    given = [randn(rows, columns).bfloat16(), randn(columns, seed=1).bfloat16()]
    forward, backward, *_ = moved(CASES["rms_norm"].op, given)
    tall, _, _ = norm.shape_of_tile(columns, norm.WIDEST_FORWARD)
    programs = -(-rows // tall)
    assert bytes_of(forward) == (rows * columns * 2 + programs * columns * 2, rows * columns * 2 + rows * 4)
    tall, _, _ = norm.shape_of_tile(columns, norm.WIDEST_BACKWARD)
    steps = -(-rows // (backend.num_programs(torch.device("cpu")) * tall))
    programs = -(-rows // (steps * tall))
    assert bytes_of(backward) == (
        rows * columns * 4 + rows * 4 + programs * columns * 2,
        rows * columns * 2 + programs * columns * 4,
    )


def test_wide_rows_are_read_twice_and_written_once():
    """The second time from cache: a row of 16 bits is 32 KB and up."""
    given = [x.bfloat16() for x in inputs(CASES["rms_norm"], 3, WIDE)]
    forward, backward, outputs, incoming, gradients = moved(CASES["rms_norm"].op, given)
    assert forward.read(given[0]) == 2 * given[0].nbytes
    assert forward.written(outputs[0]) == given[0].nbytes
    assert backward.read(given[0]) == backward.read(incoming[0]) == 2 * given[0].nbytes
    assert backward.written(gradients[0]) == given[0].nbytes


def test_rope_reads_once_and_writes_once():
    given = [randn(2, 4, 3, 14).bfloat16(), randn(2, 2, 3, 14, seed=1).bfloat16()]
    forward, backward, outputs, incoming, gradients = moved(rounded_rope(torch.bfloat16, angles(1, 3, 7)), given)
    for x, y, dy, dx in zip(given, outputs, incoming, gradients, strict=True):
        assert forward.read(x) == forward.written(y) == backward.read(dy) == backward.written(dx) == x.nbytes


# ---- order ----


@every_case
def test_the_order_of_programs_does_not_matter(name):
    case = CASES[name]
    same_in_any_order(triton_run(case.op, inputs(case, 80, 100)))


@pytest.mark.parametrize("name", ["layer_norm", "add_rms_norm"])
def test_the_order_of_programs_does_not_matter_to_wide_rows(name):
    case = CASES[name]
    same_in_any_order(triton_run(case.op, inputs(case, 6, WIDE)))


def test_the_order_of_programs_does_not_matter_to_rope():
    same_in_any_order(triton_run(rounded_rope(torch.float32, angles(1, 3, 7)), [randn(2, 2, 3, 14)] * 2))


# ---- huge tensors ----

GOOD = """
from minizero.kernels import rms_norm, layer_norm, swiglu, bias_gelu, rope
weight = torch.ones(100, dtype=bf16)
for op in (
    lambda x: rms_norm(x, weight, backend="triton"),
    lambda x: layer_norm(x, weight, weight, backend="triton"),
    lambda x: swiglu(x, x, backend="triton"),
    lambda x: bias_gelu(x, weight, backend="triton"),
    lambda x: rope(x[:, None, None], x[:, None, None], weight[None, None, None, :50], weight[None, None, None, :50],
                   backend="triton")[0],
    lambda x: rope(x[None, :, None], x[None, :, None], weight[None, None, None, :50], weight[None, None, None, :50],
                   backend="triton")[0],
):
    results = []
    for x in far(100):
        x = x.detach().requires_grad_()
        y = op(x)
        results.append((y, *torch.autograd.grad(y, x, x.detach().reshape(y.shape))))
    same(*results)
def heads(module, x):
    angle = weight[None, None, None, :50]
    return module.rope(x[None, :100, None, :100], x[None, :100, None, :100], angle, angle, backend="triton")[0]

import minizero.kernels.rope
ours = sys.modules["minizero.kernels.rope"]
rows, near = far(16400)
weight = torch.ones(16400, dtype=bf16)
same([rms_norm(rows, weight, backend="triton")], [rms_norm(near, weight, backend="triton")])
"""

BROKEN = """
module = planted(folder, "{}", (".to(tl.int64)", ""))
same([module.{}], [{}])
"""
BROKEN_CALLS = {
    "norm": ["rms_norm(rows, weight, backend='triton')", "rms_norm(rows[:, :99], weight[:99], backend='triton')"],
    "gated": ["swiglu(rows, rows, backend='triton')"],
    "bias_gelu": ["bias_gelu(rows, weight, backend='triton')"],
}


def test_offsets_beyond_int32(tmp_path):
    """The same kernels with int32 offsets die of it."""
    assert 2 * STRIDE > 2**31 > STRIDE
    broken = [
        BROKEN.format(name, call, call.replace("rows", "near"))
        for name, calls in BROKEN_CALLS.items()
        for call in calls
    ]
    heads = '(":, None].to(tl.int64)", ":, None]")'
    broken.append(f'module = planted(folder, "rope", {heads})\nsame([heads(module, rows)], [heads(ours, near)])')
    beyond_int32(tmp_path, GOOD, broken)


# ---- refusals ----

X, W = torch.ones(2, 8), torch.ones(8)
ROPE = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a weight of another width": (lambda: rms_norm(X, torch.ones(7)), r"rms_norm: weight is \(7,\) for x \(2, 8\)"),
    "a weight of two dims": (lambda: rms_norm(X, torch.ones(1, 8)), "rms_norm: weight is"),
    "a bias of another width": (lambda: layer_norm(X, W, torch.ones(1)), r"layer_norm: bias is \(1,\)"),
    "no columns": (lambda: layer_norm(torch.ones(2, 0), torch.ones(0), None), "layer_norm: weight is"),
    "no dims": (lambda: add_rms_norm(torch.ones(()), torch.ones(()), W), "add_rms_norm: weight is"),
    "a residual of another shape": (lambda: add_rms_norm(X, W, W), r"add_rms_norm: x is \(2, 8\), residual is \(8,\)"),
    "an unknown GELU": (lambda: layer_norm_gelu(X, W, W, approximate="sigmoid"), "layer_norm_gelu: approximate 'sig"),
    "an unknown GELU behind a bias": (lambda: bias_gelu(X, W, approximate="erf"), "bias_gelu: approximate 'erf'"),
    "an unknown GELU for a gate": (lambda: geglu(X, X, approximate="quick"), "geglu: approximate 'quick'"),
    "gates of two shapes": (lambda: swiglu(X, X[:1]), r"swiglu: gate is \(2, 8\), up is \(1, 8\)"),
    "gates of two shapes in geglu": (lambda: geglu(X, W), "geglu: gate is"),
    "a bias for no rows": (lambda: bias_gelu(torch.ones(()), W), "bias_gelu: bias is"),
    "a bias too long": (lambda: bias_gelu(X, torch.ones(9)), r"bias_gelu: bias is \(9,\) for x \(2, 8\)"),
    "angles of another length": (lambda: rope(*ROPE[:2], ROPE[2][:, :, :2], ROPE[3]), "rope: q, k, cos, sin are"),
    "angles of other samples": (lambda: rope(*ROPE[:2], *[ROPE[2].expand(2, 1, 3, 2)] * 2), "rope: q, k, cos, sin"),
    "an odd width": (lambda: rope(*[torch.ones(1, 1, 3, 5)] * 2, *ROPE[2:]), "rope: q, k, cos, sin are"),
    "keys of another width": (lambda: rope(ROPE[0], torch.ones(1, 1, 3, 6), *ROPE[2:]), "rope: q, k, cos, sin are"),
    "queries of three dims": (lambda: rope(ROPE[0][0], *ROPE[1:]), "rope: q, k, cos, sin are"),
    "cosines unlike sines": (lambda: rope(*ROPE[:3], ROPE[3][..., :1]), "rope: q, k, cos, sin are"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call()


OPS: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda t, o: rms_norm(t(X), t(W), **o),
    "layer_norm": lambda t, o: layer_norm(t(X), t(W), t(W), **o),
    "add_rms_norm": lambda t, o: add_rms_norm(t(X), t(X), t(W), **o),
    "layer_norm_gelu": lambda t, o: layer_norm_gelu(t(X), t(W), None, **o),
    "swiglu": lambda t, o: swiglu(t(X), t(X), **o),
    "geglu": lambda t, o: geglu(t(X), t(X), **o),
    "bias_gelu": lambda t, o: bias_gelu(t(X), t(W), **o),
    "rope": lambda t, o: rope(*map(t, ROPE), **o),
}


@pytest.mark.parametrize("name", OPS)
def test_what_triton_cannot_run_is_refused_by_name(name, monkeypatch):
    refused_by_name(name, OPS[name], monkeypatch)


MIXED: dict[str, Callable[..., Any]] = {
    "swiglu": lambda o: swiglu(X, X.bfloat16(), **o),
    "geglu": lambda o: geglu(X, X.bfloat16(), **o),
    "add_rms_norm": lambda o: add_rms_norm(X, X.bfloat16(), W, **o),
}


@pytest.mark.parametrize("name", MIXED)
def test_two_dtypes_are_for_torch(name):
    """Nothing is computed in silence by another backend than the one that was asked for."""
    MIXED[name]({"backend": "auto"})
    with pytest.raises(ValueError, match=name):
        MIXED[name]({"backend": "triton"})
    with pytest.raises(ValueError, match="backend 'cuda' does not exist"):
        MIXED[name]({"backend": "cuda"})


def test_auto_is_torch_on_the_cpu():
    """Also where the interpreter could do it."""
    assert kernels.Backend is not None
    with interpreter.traffic() as seen:
        rms_norm(X, W)
        rope(*ROPE)
    assert not seen.reads


# ---- torch.compile ----


@every_case
def test_torch_compile_traces_the_torch_backend(name):
    case = CASES[name]
    compiles(case.op, inputs(case, 3, 17))


def test_torch_compile_traces_rope():
    compiles(rounded_rope(torch.float32, angles(1, 5, 3)), [randn(2, 2, 5, 6), randn(2, 1, 5, 6, seed=1)])


# ---- defects ----

DEFECTS: dict[str, tuple[str, tuple[str, str], Callable[[SimpleNamespace], None]]] = {
    "the mean over the block, not over the columns": (
        "norm",
        ("axis=1, keep_dims=True) / columns + eps", "axis=1, keep_dims=True) / BLOCK + eps"),
        lambda m: parity(lambda x, w, **o: m.rms_norm(x, w, **o), inputs(CASES["rms_norm"], 3, 100), torch.bfloat16),
    ),
    "what is beyond the last column is not hidden from the variance": (
        "norm",
        ("x = tl.where(inside, x - mean, 0.0)", "x = x - mean"),
        lambda m: parity(
            lambda x, w, b, **o: m.layer_norm(x, w, b, **o), inputs(CASES["layer_norm"], 3, 100), torch.bfloat16
        ),
    ),
    "a gradient without its mean term": (
        "norm",
        ("            dx -= tl.sum(g, axis=1, keep_dims=True) / columns\n", "            dx -= 0.0\n"),
        lambda m: parity(
            lambda x, w, b, **o: m.layer_norm(x, w, b, **o), inputs(CASES["layer_norm"], 3, 100), torch.bfloat16
        ),
    ),
    "the residual's own gradient is dropped": (
        "norm",
        ("            dx += tl.load(ds_ptr", "            dx + tl.load(ds_ptr"),
        lambda m: parity(
            lambda x, r, w, **o: m.add_rms_norm(x, r, w, **o), inputs(CASES["add_rms_norm"], 3, 100), torch.bfloat16
        ),
    ),
    "rows are taken to be dense": (
        "gated",
        ("dy_ptr + row * dy_stride", "dy_ptr + row * columns"),
        lambda m: parity(m.swiglu, inputs(CASES["swiglu"], 3, 100), torch.bfloat16, "sliced"),
    ),
    "the same angle backward": (
        "rope",
        ("cos, sin, -1.0)", "cos, sin, 1.0)"),
        lambda m: parity(
            lambda q, k, **o: m.rope(q, k, q[:1, :1, :, :3].detach(), k[:1, :1, :, :3].detach(), **o),
            [randn(2, 2, 5, 6), randn(2, 2, 5, 6, seed=1)],
            torch.bfloat16,
        ),
    ),
    "GELU's slope without the part of its argument": (
        "bias_gelu",
        ("dx = dy * gelu_slope(x + b, TANH)", "dx = dy * gelu_slope(x, TANH)"),
        lambda m: parity(m.bias_gelu, inputs(CASES["bias_gelu"], 3, 100), torch.bfloat16),
    ),
    "all programs add to one row of partial sums": (
        "norm",
        ("tl.store(partial_w_ptr + place, tl.sum(dw, axis=0), mask=there)", "tl.atomic_add(partial_w_ptr + "
         "tl.arange(0, BLOCK), tl.sum(dw, axis=0), mask=there)"),
        lambda m: same_in_any_order(
            triton_run(lambda x, w, **o: m.rms_norm(x, w, **o), inputs(CASES["rms_norm"], 80, 100))
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DEFECTS)
def test_a_planted_defect_is_seen(what, tmp_path, monkeypatch):
    name, change, check = DEFECTS[what]
    if "add to one row" in what:  # sums begin at zero, so that nothing but the order of additions is left to differ
        empty = torch.Tensor.new_empty
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **o: empty(self, *a, **o).zero_())
    sees(tmp_path, name, change, check)
