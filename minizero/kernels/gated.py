"""SwiGLU and GeGLU (Shazeer, arXiv 2002.05202): one side of an MLP opens the other. Two reads and one write.

    y = act(gate) · up          act = silu(g) = g σ(g), or gelu
    d_up = dy act(gate)         d_gate = dy up act'(gate)         silu' = σ (1 + g (1 - σ))

Backward keeps gate and up only, and computes the activation again: three reads and two writes.

Glossary: gate, up, y [M, N] (compute), rows of any stride; halves of one projection need no copy.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minizero.kernels.backend import Backend, as_rows, one_dtype, same_shape, tl, triton, use_triton
from minizero.kernels.gelu import Approximation, gelu, gelu_slope, is_tanh

BLOCK = 2048


def swiglu(gate: Tensor, up: Tensor, *, backend: Backend = "auto") -> Tensor:
    """silu(gate) · up, elementwise; both of one shape and dtype.

    Raises ValueError for different shapes, and for what `backend` "triton" cannot run.
    """
    same_shape("swiglu", gate=gate, up=up)
    if not use_triton(backend, "swiglu", gate, up) or not one_dtype(backend, "swiglu", gate, up):
        return F.silu(gate) * up
    return _Gated.apply(gate, up, True, False)


def geglu(gate: Tensor, up: Tensor, *, approximate: Approximation = "tanh", backend: Backend = "auto") -> Tensor:
    """gelu(gate) · up, elementwise; both of one shape and dtype."""
    same_shape("geglu", gate=gate, up=up)
    tanh = is_tanh("geglu", approximate)
    if not use_triton(backend, "geglu", gate, up) or not one_dtype(backend, "geglu", gate, up):
        return F.gelu(gate, approximate=approximate) * up
    return _Gated.apply(gate, up, False, tanh)


@triton.jit
def _place(columns, blocks, BLOCK: tl.constexpr):
    """(row, columns, which of them exist) of this program: rows are cut into `blocks`."""
    program = tl.program_id(0)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return (program // blocks).to(tl.int64), column, column < columns


@triton.jit
def _forward(
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, columns, blocks,
    BLOCK: tl.constexpr, SILU: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    row, column, inside = _place(columns, blocks, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        opened = gate * tl.sigmoid(gate)
    else:
        opened = gelu(gate, TANH)
    tl.store(y_ptr + row * columns + column, (opened * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, dy_stride, gate_stride, up_stride, columns, blocks,
    BLOCK: tl.constexpr, SILU: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    row, column, inside = _place(columns, blocks, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        s = tl.sigmoid(gate)
        opened = gate * s
        slope = s * (1.0 + gate * (1.0 - s))
    else:
        opened = gelu(gate, TANH)
        slope = gelu_slope(gate, TANH)
    place = row * columns + column
    tl.store(d_gate_ptr + place, (dy * up * slope).to(d_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(d_up_ptr + place, (dy * opened).to(d_up_ptr.dtype.element_ty), mask=inside)


def one_shape(*tensors: Tensor) -> list[Tensor]:
    """[M, N] of all; [1, M·N] where all are contiguous, so that short rows make no short programs."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    return [as_rows(tensor) for tensor in tensors]


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, silu: bool, tanh: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.flags = dict(SILU=silu, TANH=tanh)
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        if gate.numel():
            gate, up = one_shape(gate, up)
            rows, columns = gate.shape
            blocks = triton.cdiv(columns, BLOCK)
            _forward[(rows * blocks,)](
                gate, up, y, gate.stride(0), up.stride(0), columns, blocks, BLOCK=BLOCK, **ctx.flags, num_warps=8
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        if gate.numel():
            dy, gate, up = one_shape(grads[0], gate, up)
            rows, columns = gate.shape
            blocks = triton.cdiv(columns, BLOCK)
            _backward[(rows * blocks,)](
                dy, gate, up, d_gate, d_up, dy.stride(0), gate.stride(0), up.stride(0), columns, blocks,
                BLOCK=BLOCK, **ctx.flags, num_warps=8,
            )  # fmt: skip
        return d_gate, d_up, None, None
