"""Rotary positions (RoFormer, arXiv 2104.09864) of queries and keys in one launch, rotate-half as HuggingFace has it.

    y[e] = x[e] cos - x[e + E] sin        y[e + E] = x[e + E] cos + x[e] sin        e < E = D / 2

A rotation's inverse turns the other way: backward is the same kernel with -sin, and nothing but the angles is kept.

Glossary (B batch, N query heads, M key heads, S positions, D head width, E = D / 2):
    q [B, N, S, D], k [B, M, S, D]   any strides but that of D      cos, sin [B or 1, 1, S, E]
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from minizero.kernels.backend import Backend, last_dim_contiguous, overlaps, tl, triton, use_triton


def rope(
    q_BNSD: Tensor, k_BMSD: Tensor, cos_B1SE: Tensor, sin_B1SE: Tensor, *, in_place: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(q, k) turned by their positions' angles; shapes and dtypes stay.

    Args:
        in_place: write over q and k, as no other op of the same graph may read them then. Before anything is written,
            raises RuntimeError for what autograd could not follow, views and leaves that require grad, and ValueError
            for a q or k whose elements share memory.

    Raises ValueError for shapes that do not fit, and for what `backend` "triton" cannot run.
    """
    check(q_BNSD, k_BMSD, cos_B1SE, sin_B1SE)
    fused = use_triton(backend, "rope", q_BNSD, k_BMSD, cos_B1SE, sin_B1SE)
    if in_place:
        requires_grad = any(x.requires_grad for x in (q_BNSD, k_BMSD, cos_B1SE, sin_B1SE))
        check_in_place(q_BNSD, k_BMSD, fused, requires_grad and torch.is_grad_enabled())
    if not fused:
        turned = tuple(rope_torch(x, cos_B1SE, sin_B1SE) for x in (q_BNSD, k_BMSD))
        if not in_place:
            return turned[0], turned[1]
        return q_BNSD.copy_(turned[0]), k_BMSD.copy_(turned[1])
    return _Rope.apply(q_BNSD, k_BMSD, cos_B1SE, sin_B1SE, in_place)


def rope_torch(x_BNSD: Tensor, cos_B1SE: Tensor, sin_B1SE: Tensor) -> Tensor:
    """The reference, in the wider dtype of x and the angles; x's comes out."""
    first, second = x_BNSD.chunk(2, dim=-1)
    turned = first * cos_B1SE - second * sin_B1SE, second * cos_B1SE + first * sin_B1SE
    return torch.cat(turned, dim=-1).to(x_BNSD.dtype)


def check(q_BNSD: Tensor, k_BMSD: Tensor, cos_B1SE: Tensor, sin_B1SE: Tensor) -> None:
    """Raise ValueError unless the shapes are those of the glossary, and D is even."""
    found = [tuple(x.shape) for x in (q_BNSD, k_BMSD, cos_B1SE, sin_B1SE)]
    batch, _, length, width = found[0] if len(found[0]) == 4 else (0, 0, 0, 1)
    angles = [(size, 1, length, width // 2) for size in (1, batch)]
    fits = len(found[1]) == 4 and (found[1][0], *found[1][2:]) == (batch, length, width)
    if not fits or width % 2 or found[2] not in angles or found[3] != found[2]:
        raise ValueError(
            f"rope: q, k, cos, sin are {', '.join(map(str, found))}; legal: (B, N, S, D), (B, M, S, D), and twice "
            "(B or 1, 1, S, D/2), D even"
        )


def check_in_place(q_BNSD: Tensor, k_BMSD: Tensor, fused: bool, in_graph: bool) -> None:
    """Raise what `rope` says, before anything is written: autograd looks at q and k only afterwards."""
    for name, x in (("q", q_BNSD), ("k", k_BMSD)):
        if overlaps(x):
            raise ValueError(f"rope: in place, elements of {name} share memory: {tuple(x.shape)}, strides {x.stride()}")
        if fused and x.stride(-1) != 1:
            raise ValueError(f"rope: in place, the last dim must be contiguous; strides of {name}: {x.stride()}")
        if in_graph and (x._is_view() or (x.is_leaf and x.requires_grad)):
            raise RuntimeError(f"rope: in place, autograd cannot follow {name}: it is a view or a leaf")


@triton.jit
def _turn(
    x_ptr, y_ptr, x_head, y_head, cos, sin, heads, width,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All heads of one tensor at one position."""
    head = tl.arange(0, HEADS)[:, None].to(tl.int64)
    place = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (place < width)
    first = tl.load(x_ptr + head * x_head + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + head * x_head + place + width, mask=inside, other=0.0).to(tl.float32)
    y_ptr += head * y_head + place
    tl.store(y_ptr, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + width, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rope(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr,
    q_batch, q_head, q_place, k_batch, k_head, k_place,
    q_out_batch, q_out_head, q_out_place, k_out_batch, k_out_head, k_out_place,
    cos_batch, cos_place, sin_batch, sin_place,
    length, q_heads, k_heads, width, sign,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One position of one sample."""
    batch = (tl.program_id(0) // length).to(tl.int64)
    place = (tl.program_id(0) % length).to(tl.int64)
    angle = tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + batch * cos_batch + place * cos_place + angle, mask=angle < width, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + batch * sin_batch + place * sin_place + angle, mask=angle < width, other=0.0).to(tl.float32)
    sin *= sign
    _turn(
        q_ptr + batch * q_batch + place * q_place, q_out_ptr + batch * q_out_batch + place * q_out_place,
        q_head, q_out_head, cos, sin, q_heads, width, Q_HEADS, HALF,
    )  # fmt: skip
    _turn(
        k_ptr + batch * k_batch + place * k_place, k_out_ptr + batch * k_out_batch + place * k_out_place,
        k_head, k_out_head, cos, sin, k_heads, width, K_HEADS, HALF,
    )  # fmt: skip


def launch(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """Turn q and k into q_out and k_out, which may be the same memory; `sign` -1.0 turns back."""
    batch, q_heads, length, width = q.shape
    k_heads = k.shape[1]
    if q.numel() + k.numel() == 0:
        return
    strides = [stride for x in (q, k, q_out, k_out) for stride in x.stride()[:3]]
    angles = [
        0 if cos.shape[0] == 1 else cos.stride(0),
        cos.stride(2),
        0 if sin.shape[0] == 1 else sin.stride(0),
        sin.stride(2),
    ]
    _rope[(batch * length,)](
        q, k, q_out, k_out, cos, sin, *strides, *angles, length, q_heads, k_heads, width // 2, sign,
        Q_HEADS=triton.next_power_of_2(max(q_heads, 1)), K_HEADS=triton.next_power_of_2(max(k_heads, 1)),
        HALF=triton.next_power_of_2(width // 2),
    )  # fmt: skip


class _Rope(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
        cos, sin = last_dim_contiguous(cos), last_dim_contiguous(sin)
        ctx.save_for_backward(cos, sin)
        if in_place:
            ctx.mark_dirty(q, k)
            launch(q, k, q, k, cos, sin, 1.0)
            return q, k
        q, k = last_dim_contiguous(q), last_dim_contiguous(k)
        q_out, k_out = torch.empty_like(q), torch.empty_like(k)
        launch(q, k, q_out, k_out, cos, sin, 1.0)
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.saved_tensors
        dq, dk = (last_dim_contiguous(grad) for grad in grads)
        dq_out, dk_out = torch.empty_like(dq), torch.empty_like(dk)
        launch(dq, dk, dq_out, dk_out, cos, sin, -1.0)
        return dq_out, dk_out, None, None, None
