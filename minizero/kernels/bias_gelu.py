"""GELU behind a bias: y = gelu(x + b). One read and one write, where two ops read and write twice.

    dx = dy gelu'(x + b)        db = Σ_rows dx

Backward keeps x and b. For db every program adds up its rows in a row of its own; these are summed afterwards.

Glossary (M rows, N columns, P programs per block of columns): x, y, dy, dx [M, N]   b [N]   partial [P, N] (fp32)
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minizero.kernels.backend import Backend, as_rows, num_programs, tl, triton, use_triton
from minizero.kernels.gelu import Approximation, gelu, gelu_slope, is_tanh

ROWS, COLUMNS = 8, 256  # of a tile


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: Approximation = "tanh", backend: Backend = "auto") -> Tensor:
    """gelu(x + bias): x [.., N], bias [N] -> [.., N] in the dtype of x.

    Raises ValueError for shapes that do not fit, and for what `backend` "triton" cannot run.
    """
    if x.dim() == 0 or bias.shape != x.shape[-1:] or bias.numel() == 0:
        raise ValueError(f"bias_gelu: bias is {tuple(bias.shape)} for x {tuple(x.shape)}; legal: x [.., N], bias [N]")
    tanh = is_tanh("bias_gelu", approximate)
    if not use_triton(backend, "bias_gelu", x, bias):
        return F.gelu(x + bias, approximate=approximate).to(x.dtype)
    return _BiasGelu.apply(x, bias, tanh)


@triton.jit
def _forward(
    x_ptr, b_ptr, y_ptr, x_stride, rows, columns, blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(b_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * columns + column, gelu(x, TANH).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy_ptr, x_ptr, b_ptr, dx_ptr, partial_ptr, dy_stride, x_stride, rows, columns, blocks, steps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """`steps` tiles below one another."""
    program = tl.program_id(0)
    stack = (program // blocks).to(tl.int64)
    column = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b = tl.load(b_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    db = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(steps):
        row = (stack * steps + step) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < columns)
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        dx = dy * gelu_slope(x + b, TANH)
        db += dx
        tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    place = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(partial_ptr + stack * columns + place, tl.sum(db, axis=0), mask=place < columns)


class _BiasGelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
        x_MN, bias = as_rows(x), bias.contiguous()
        rows, columns = x_MN.shape
        y = x.new_empty(x.shape)
        if rows:
            blocks = triton.cdiv(columns, COLUMNS)
            _forward[(triton.cdiv(rows, ROWS) * blocks,)](
                x_MN, bias, y, x_MN.stride(0), rows, columns, blocks, ROWS=ROWS, COLUMNS=COLUMNS, TANH=tanh
            )
        ctx.save_for_backward(x_MN, bias)
        ctx.tanh, ctx.shape = tanh, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x_MN, bias = ctx.saved_tensors
        dy_MN = as_rows(grads[0])
        rows, columns = x_MN.shape
        dx_MN = x_MN.new_empty(rows, columns)
        blocks, tiles = triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS)
        steps = triton.cdiv(tiles * blocks, 8 * num_programs(x_MN.device))
        stacks = triton.cdiv(tiles, steps) if rows else 0
        partial = bias.new_empty((stacks, columns), dtype=torch.float32)
        if rows:
            _backward[(stacks * blocks,)](
                dy_MN, x_MN, bias, dx_MN, partial, dy_MN.stride(0), x_MN.stride(0), rows, columns, blocks, steps,
                ROWS=ROWS, COLUMNS=COLUMNS, TANH=ctx.tanh,
            )  # fmt: skip
        return dx_MN.view(ctx.shape), partial.sum(0).to(bias.dtype), None
