"""RMSNorm and LayerNorm, alone, behind a residual sum, or in front of a GELU: one read and one write of the rows.

    rms_norm            y = x̂ w             x̂ = x r        r = (mean(x²) + ε)^-1/2           (arXiv 1910.07467)
    layer_norm          y = x̂ w + b         x̂ = (x - m) r  r = (mean((x - m)²) + ε)^-1/2     (arXiv 1607.06450)
    add_rms_norm        s = x + residual,   y = rms_norm(s)
    layer_norm_gelu     y = gelu(layer_norm(x))

    backward, with g the gradient at x̂ w + b (for GELU: dy · gelu'):
    dx = r (w g - x̂ mean(x̂ w g) [- mean(w g)])      dw = Σ_rows g x̂      db = Σ_rows g

Statistics are in fp32, the variance around a mean that is known by then. A row fits into the registers of one program
up to `WIDEST` columns; wider ones are read twice, in blocks, the second time from cache. For dw and db each program
adds up the rows that it has in a row of its own, and these rows are summed afterwards: no atomics, so the same bits
every time. All that backward keeps is x (or s) and one or two fp32 numbers per row.

Glossary (M rows, N columns, P programs of backward):
    x, residual, dy, ds  [M, N] (compute)   any row stride       w, b  [N]
    mean, rstd           [M] (fp32)         partial_w, partial_b [P, N] (fp32)
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minizero.kernels.backend import (
    Backend,
    as_rows,
    at_least_fp32,
    num_programs,
    one_dtype,
    same_shape,
    tl,
    triton,
    use_triton,
)
from minizero.kernels.gelu import Approximation, gelu, gelu_slope, is_tanh

WIDEST_FORWARD, WIDEST_BACKWARD = 16384, 8192  # columns in registers, without spills; of fp32, half in backward
BLOCK_OF_WIDE = 2048
TILE = 4096  # elements of several short rows that one program takes at once


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: Backend = "auto") -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dim: x [.., N], weight [N] -> [.., N] in the dtype of x.

    Raises ValueError for shapes that do not fit, and for what `backend` "triton" cannot run.
    """
    check(x, weight, None, "rms_norm")
    if not use_triton(backend, "rms_norm", x, weight):
        return rms_norm_torch(x, weight, eps)
    return _Norm.apply(x, None, weight, None, eps, False, False, False)[0]


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5, *, backend: Backend = "auto"
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last dim: x [.., N] -> [.., N] in the dtype of x.

    weight and bias may be of other dtypes than x, wider or narrower.
    """
    check(x, weight, bias, "layer_norm")
    if not use_triton(backend, "layer_norm", x, weight, bias):
        return layer_norm_torch(x, weight, bias, eps)
    return _Norm.apply(x, None, weight, bias, eps, True, False, False)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) of s = x + residual, both [.., N]; s goes on as the residual stream.

    x and residual are of one dtype, which s has too; of two, torch makes what they promote to, and "triton" refuses.
    """
    check(x, weight, None, "add_rms_norm")
    same_shape("add_rms_norm", x=x, residual=residual)
    fused = use_triton(backend, "add_rms_norm", x, residual, weight)
    if not fused or not one_dtype(backend, "add_rms_norm", x, residual):
        total = x + residual
        return rms_norm_torch(total, weight, eps), total
    y, total = _Norm.apply(x, residual, weight, None, eps, False, False, False)
    return y, total


def layer_norm_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    approximate: Approximation = "tanh",
    backend: Backend = "auto",
) -> Tensor:
    """gelu(layer_norm(x)): x [.., N] -> [.., N] in the dtype of x; the normed value is never in memory."""
    check(x, weight, bias, "layer_norm_gelu")
    tanh = is_tanh("layer_norm_gelu", approximate)
    if not use_triton(backend, "layer_norm_gelu", x, weight, bias):
        return F.gelu(layer_norm_torch(x, weight, bias, eps), approximate=approximate)
    return _Norm.apply(x, None, weight, bias, eps, True, True, tanh)[0]


def layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The reference, with torch's own, which takes one dtype: of several, the widest that is at least fp32."""
    if weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = at_least_fp32(x)
    bias = None if bias is None else bias.to(wide.dtype)
    return F.layer_norm(wide, weight.shape, weight.to(wide.dtype), bias, eps).to(x.dtype)


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference: statistics in at least fp32, x̂ rounded to the dtype of x before it meets the weight."""
    wide = at_least_fp32(x)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * (wide * scale).to(x.dtype)).to(x.dtype)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, op: str) -> None:
    """Raise ValueError unless weight and bias are as wide as the rows of x, and these not empty."""
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and (x.dim() == 0 or given.shape != x.shape[-1:] or given.numel() == 0):
            raise ValueError(
                f"{op}: {name} is {tuple(given.shape)} for x {tuple(x.shape)}; legal: x [.., N], {name} [N]"
            )


# ---- kernels ----


@triton.jit
def _forward_rows(
    x_ptr, residual_ptr, w_ptr, b_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    x_stride, residual_stride, rows, columns, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CENTER: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
    GELU: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)  # what the next layer adds to is what is normed here
        tl.store(total_ptr + row * columns + column, total, mask=inside)
        x = total.to(tl.float32)
    if CENTER:
        mean = tl.sum(x, axis=1, keep_dims=True) / columns
        tl.store(mean_ptr + row, mean, mask=row < rows)
        x = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / columns + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = x * rstd * tl.load(w_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(b_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if GELU:
        y = gelu(y, TANH)
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_wide(
    x_ptr, residual_ptr, w_ptr, b_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    x_stride, residual_stride, columns, eps,
    BLOCK: tl.constexpr, CENTER: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
    GELU: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """One row, in blocks: (count, mean, sum of squares around it) joined as in Chan et al. 1979, then the values."""
    row = tl.program_id(0).to(tl.int64)
    mean, squares = 0.0, 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            x += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
            total = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * columns + column, total, mask=inside)
            x = total.to(tl.float32)
        if CENTER:
            count = tl.minimum(columns - start, BLOCK) * 1.0
            here = tl.sum(x, axis=0) / count
            x = tl.where(inside, x - here, 0.0)
            apart = here - mean
            squares += tl.sum(x * x, axis=0) + apart * apart * count * start / (start + count)
            mean += apart * count / (start + count)
        else:
            squares += tl.sum(x * x, axis=0)
    rstd = tl.rsqrt(squares / columns + eps)
    tl.store(rstd_ptr + row, rstd)
    if CENTER:
        tl.store(mean_ptr + row, mean)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        if RESIDUAL:  # the sum again, not what was stored: other threads of this program may not have written yet
            x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
            x += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
            x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
        else:
            x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        y = (x - mean) * rstd * tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            y += tl.load(b_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            y = gelu(y, TANH)
        tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_rows(
    dy_ptr, ds_ptr, x_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_w_ptr, partial_b_ptr,
    dy_stride, ds_stride, x_stride, rows, columns, steps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CENTER: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
    GELU: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """`steps` tiles of ROWS rows, one after the other; what they add to dw and db stays in registers meanwhile."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    there = column < columns
    w = tl.load(w_ptr + column, mask=there, other=0.0).to(tl.float32)
    if BIAS:
        b = tl.load(b_ptr + column, mask=there, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(steps):
        row = (program * steps + step) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & there
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        if CENTER:
            x -= tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        x_hat = tl.where(inside, x * rstd, 0.0)
        if GELU:
            z = x_hat * w
            if BIAS:
                z += b
            g *= gelu_slope(z, TANH)
        dw += g * x_hat
        if BIAS:
            db += g
        g *= w
        dx = g - x_hat * (tl.sum(x_hat * g, axis=1, keep_dims=True) / columns)
        if CENTER:
            dx -= tl.sum(g, axis=1, keep_dims=True) / columns
        dx *= rstd
        if RESIDUAL:
            dx += tl.load(ds_ptr + row * ds_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    place = program * columns + tl.arange(0, BLOCK)
    there = tl.arange(0, BLOCK) < columns
    tl.store(partial_w_ptr + place, tl.sum(dw, axis=0), mask=there)
    if BIAS:
        tl.store(partial_b_ptr + place, tl.sum(db, axis=0), mask=there)


@triton.jit
def _behind_gelu(
    dy_ptr, x_ptr, w_ptr, b_ptr, mean, rstd, column, inside,
    BIAS: tl.constexpr, GELU: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """(g, x_hat, w) of some columns of a row."""
    x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
    x_hat = (x - mean) * rstd
    if GELU:
        z = x_hat * w
        if BIAS:
            z += tl.load(b_ptr + column, mask=inside, other=0.0).to(tl.float32)
        g *= gelu_slope(z, TANH)
    return g, x_hat, w


@triton.jit
def _add_to(partial_ptr, place, inside, value, step):
    """Add to this program's sum, which begins with the first step."""
    if step > 0:
        value += tl.load(partial_ptr + place, mask=inside, other=0.0)
    tl.store(partial_ptr + place, value, mask=inside)


@triton.jit
def _backward_wide(
    dy_ptr, ds_ptr, x_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_w_ptr, partial_b_ptr,
    dy_stride, ds_stride, x_stride, rows, columns, steps,
    BLOCK: tl.constexpr, CENTER: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
    GELU: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """`steps` rows in blocks; what they add to dw and db is kept in this program's rows of the partial sums."""
    program = tl.program_id(0).to(tl.int64)
    for step in range(steps):
        row = program * steps + step
        if row < rows:
            rstd = tl.load(rstd_ptr + row)
            mean = 0.0
            if CENTER:
                mean = tl.load(mean_ptr + row)
            dy_row, x_row = dy_ptr + row * dy_stride, x_ptr + row * x_stride
            sum_g, sum_gx = 0.0, 0.0
            for start in range(0, columns, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = column < columns
                g, x_hat, w = _behind_gelu(dy_row, x_row, w_ptr, b_ptr, mean, rstd, column, inside, BIAS, GELU, TANH)
                sum_gx += tl.sum(g * w * x_hat, axis=0)
                sum_g += tl.sum(g * w, axis=0)
            for start in range(0, columns, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = column < columns
                g, x_hat, w = _behind_gelu(dy_row, x_row, w_ptr, b_ptr, mean, rstd, column, inside, BIAS, GELU, TANH)
                _add_to(partial_w_ptr, program * columns + column, inside, g * x_hat, step)
                if BIAS:
                    _add_to(partial_b_ptr, program * columns + column, inside, g, step)
                dx = g * w - x_hat * (sum_gx / columns)
                if CENTER:
                    dx -= sum_g / columns
                dx *= rstd
                if RESIDUAL:
                    dx += tl.load(ds_ptr + row * ds_stride + column, mask=inside, other=0.0).to(tl.float32)
                tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            tl.debug_barrier()  # what the partial sums hold is read again, for the next row


# ---- launches ----


def shape_of_tile(columns: int, widest: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program's tile; 0 rows: the row is too wide, and taken in blocks."""
    if columns > widest:
        return 0, BLOCK_OF_WIDE, 8
    block = triton.next_power_of_2(columns)
    rows = max(1, min(TILE // block, 16))
    return rows, block, max(1, min(16, rows * block // 512))


class _Norm(Function):
    """(y, s); s is an empty tensor where there is no residual."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        center: bool,
        with_gelu: bool,
        tanh: bool,
    ) -> tuple[Tensor, Tensor]:
        x_MN, weight = as_rows(x), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        residual_MN = None if residual is None else as_rows(residual)
        rows, columns = x_MN.shape
        y = x.new_empty(x.shape)  # in their final shape: autograd lets nobody write into views that are made here
        total = x.new_empty(0 if residual is None else x.shape)
        mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
        flags = dict(CENTER=center, RESIDUAL=residual is not None, BIAS=bias is not None, GELU=with_gelu, TANH=tanh)
        if rows:
            tensors = x_MN, residual_MN, weight, bias, y, total, mean, rstd
            strides = x_MN.stride(0), 0 if residual_MN is None else residual_MN.stride(0)
            tall, block, warps = shape_of_tile(columns, WIDEST_FORWARD)
            if tall:
                _forward_rows[(triton.cdiv(rows, tall),)](
                    *tensors, *strides, rows, columns, eps, ROWS=tall, BLOCK=block, **flags, num_warps=warps
                )
            else:
                _forward_wide[(rows,)](*tensors, *strides, columns, eps, BLOCK=block, **flags, num_warps=warps)
        ctx.save_for_backward(x_MN if residual is None else total, weight, bias, mean, rstd)
        ctx.flags, ctx.shape = flags, x.shape
        if residual is None:
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        residual = ctx.flags["RESIDUAL"]
        x_MN = as_rows(x)
        dy_MN, ds_MN = as_rows(grads[0]), as_rows(grads[1]) if residual else None
        rows, columns = x_MN.shape
        dx_MN = x_MN.new_empty(rows, columns)
        widest = WIDEST_BACKWARD if x_MN.element_size() == 2 else WIDEST_BACKWARD // 2
        tall, block, warps = shape_of_tile(columns, widest)
        steps = triton.cdiv(rows, num_programs(x_MN.device) * max(tall, 1))
        programs = triton.cdiv(rows, steps * max(tall, 1)) if rows else 0
        dw, db = (x_MN.new_empty((programs, columns), dtype=torch.float32) for _ in range(2))
        if rows:
            tensors = dy_MN, ds_MN, x_MN, weight, bias, mean, rstd, dx_MN, dw, db
            strides = dy_MN.stride(0), 0 if ds_MN is None else ds_MN.stride(0), x_MN.stride(0)
            kernel, shape = (_backward_rows, dict(ROWS=tall)) if tall else (_backward_wide, {})
            kernel[(programs,)](
                *tensors, *strides, rows, columns, steps, **shape, BLOCK=block, **ctx.flags, num_warps=warps
            )
        dx = dx_MN.view(ctx.shape)
        return (
            dx, dx if residual else None, dw.sum(0).to(weight.dtype),
            None if bias is None else db.sum(0).to(bias.dtype), None, None, None, None,
        )  # fmt: skip
