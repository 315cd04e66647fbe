"""The language-model head and its loss together: the logits of all tokens never exist at once.

    logits = x Wᵀ       loss = Σ or mean of cross_entropy(logits, labels)
    dx = g W            dW = gᵀ x              g = d loss / d logits

Tokens are taken in chunks. Each chunk's logits are computed, become their own gradient in place, and leave dx and their
part of dW behind: three matrix products, as many as without fusion, and no approximation. The workspace is one chunk of
logits; dW in fp32 where several chunks add to it, `ROWS` rows of what a chunk adds, and at the end dW rounded. The idea
is Liger's (arXiv 2410.10989); cut cross-entropy (arXiv 2411.09009) saves dW's fp32 copy for a fourth product.

In fp16 a probability times 1 / count would be lost before the loss scale comes: there g is without 1 / count, and dx
and dW stay in fp32 until backward brings both.

Glossary (T tokens, C of a chunk, H hidden, V vocabulary): x [T, H], W [V, H], logits, g [C, V] (compute), dx, dW (see
above)
"""

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from minizero.kernels.backend import Backend, use_triton
from minizero.kernels.cross_entropy import IGNORED, check, gradient, losses_and_gradient, losses_of, statistics

WORKSPACE = 1 << 29
"""Bytes of a chunk's logits."""
ROWS = 4096  # of a gradient, that are multiplied, or added to, at once


def linear_cross_entropy(
    x_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    workspace: int = WORKSPACE,
    backend: Backend = "auto",
) -> Tensor:
    """`cross_entropy(x @ weight.T, labels)`, 0-d in at least fp32, with no more than `workspace` bytes of logits.

    Under autocast x and weight are cast first, as they are for a product. Backward runs once, since it hands on the
    memory that it would need again: a second one raises torch's RuntimeError of a tensor that was modified.

    Args: as of `cross_entropy`. x_TH and weight_VH are of one dtype. Labels that are neither in [0, V) nor ignored give
        nan, loss and gradients, in both backends. At least one token is taken at a time.

    Raises ValueError for shapes and settings that do not fit, and for what `backend` "triton" cannot run.
    """
    kind = x_TH.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast:
        narrow = torch.get_autocast_dtype(kind)
        x_TH, weight_VH = (t if t.dtype == torch.float64 else t.to(narrow) for t in (x_TH, weight_VH))
    if x_TH.dim() != 2 or weight_VH.dim() != 2 or x_TH.shape[1] != weight_VH.shape[1] or x_TH.dtype != weight_VH.dtype:
        raise ValueError(
            f"linear_cross_entropy: x is {tuple(x_TH.shape)} {x_TH.dtype}, weight {tuple(weight_VH.shape)} "
            f"{weight_VH.dtype}; legal: [T, H] and [V, H] of one dtype"
        )
    shape = len(x_TH), len(weight_VH)
    check("linear_cross_entropy", shape, labels_T, label_smoothing, softcap)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"linear_cross_entropy: reduction {reduction!r}; legal: mean, sum")
    if workspace <= 0:
        raise ValueError(f"linear_cross_entropy: workspace = {workspace} bytes; legal: more than 0")
    fused = use_triton(backend, "linear_cross_entropy", x_TH, weight_VH, labels_T)
    chunk = max(1, workspace // (len(weight_VH) * x_TH.element_size()))
    chunk = chunk // 128 * 128 or chunk  # whole tiles of the matrix product
    settings = label_smoothing, z_loss, softcap
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (x_TH, weight_VH)]
    with torch.autocast(kind, enabled=False) if autocast else nullcontext():  # products write into what is made here
        return _LinearCrossEntropy.apply(
            x_TH, weight_VH, labels_T, ignore_index, settings, reduction, chunk, fused, *wanted
        )


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, which is not rounded to the dtype of a and b on the way where `total` is wider."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    for rows, part in zip(total.split(ROWS), a.split(ROWS), strict=True):
        if a.is_cuda:
            rows += torch.mm(part, b, out_dtype=total.dtype)
        else:  # where torch has no product of 16 bits that comes out in fp32
            rows.addmm_(part.to(total.dtype), b.to(total.dtype))


class _LinearCrossEntropy(Function):
    """Forward computes loss and gradients; backward multiplies these by that of the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        ignore_index: int,
        settings: tuple[float, float, float],
        reduction: str,
        chunk: int,
        fused: bool,
        needs_x: bool,
        needs_weight: bool,
    ) -> Tensor:
        counted = (labels_T != ignore_index).sum()
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        one = torch.ones((), dtype=wide, device=x_TH.device)
        mean = one / counted.clamp_min(1) if reduction == "mean" else one
        late = x_TH.dtype == torch.float16
        scale, left = (one, mean) if late else (mean, one)  # what is in the gradients now, and what backward brings
        several, vocabulary = len(x_TH) > chunk, len(weight_VH)
        dx_TH = torch.zeros_like(x_TH, dtype=wide if late else None) if needs_x else None
        dw_VH = torch.zeros_like(weight_VH, dtype=wide if late or several else None) if needs_weight else None
        loss = x_TH.new_zeros((), dtype=wide)
        for start in range(0, len(x_TH), chunk):
            x_CH, labels_C = x_TH[start : start + chunk], labels_T[start : start + chunk]
            logits_CV = x_CH @ weight_VH.t()
            g_CV: Tensor | None = None
            if fused:
                g_CV = logits_CV if needs_x or needs_weight else None
                losses_C = losses_and_gradient(logits_CV, labels_C, scale, ignore_index, settings, g_CV)
            else:
                counts_C = labels_C != ignore_index
                whole_4C = statistics(logits_CV, labels_C, 0, settings[2], backend="torch")
                losses_C = losses_of(whole_4C, labels_C, vocabulary, *settings[:2]) * scale
                losses_C = torch.where(counts_C, losses_C, 0.0)
                if needs_x or needs_weight:
                    legal_C = (labels_C >= 0) & (labels_C < vocabulary)
                    factor_C = torch.where(counts_C, torch.where(legal_C, scale, torch.nan), 0.0)
                    g_CV = gradient(logits_CV, labels_C, whole_4C, factor_C, 0, vocabulary, settings, backend="torch")
            loss += losses_C.sum()
            if g_CV is not None and dx_TH is not None:
                add_product(dx_TH[start : start + chunk], g_CV, weight_VH)
            if g_CV is not None and dw_VH is not None:
                add_product(dw_VH, g_CV.t(), x_CH)
        ctx.dtype = x_TH.dtype
        ctx.save_for_backward(dx_TH, dw_VH if dw_VH is None or late else dw_VH.to(x_TH.dtype), left)
        return torch.where(counted > 0, loss * left, torch.nan) if reduction == "mean" else loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        *made, left = ctx.saved_tensors  # raises in a second backward: the first wrote into them
        factor = grads[0] * left
        for each in made:
            for rows in () if each is None else each.split(ROWS):  # widened in parts, as the factor is wide
                rows.copy_(rows.to(factor.dtype) * factor)
        dx_TH, dw_VH = (None if each is None else each.to(ctx.dtype) for each in made)
        return dx_TH, dw_VH, None, None, None, None, None, None, None, None
