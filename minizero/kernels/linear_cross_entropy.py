"""The language-model head and its loss together: the logits of all tokens never exist at once.

    logits = x Wᵀ       loss = Σ or mean of cross_entropy(logits, labels)
    dx = g W            dW = gᵀ x              g = d loss / d logits

Tokens are taken in chunks. Each chunk's logits are computed, become their own gradient in place, and leave dx and their
part of dW behind: three matrix products, as many as without fusion, and no approximation. The workspace is one chunk of
logits, and dW in fp32 where several chunks add to it. The idea is Liger's (arXiv 2410.10989); cut cross-entropy (arXiv
2411.09009) saves dW's fp32 copy for a fourth product.

Glossary (T tokens, C of a chunk, H hidden, V vocabulary): x [T, H], W [V, H], logits, g [C, V] (compute), dW (fp32)
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from minizero.kernels.backend import Backend, use_triton
from minizero.kernels.cross_entropy import IGNORED, check, gradient, losses_and_gradient, losses_of, statistics

WORKSPACE = 1 << 29
"""Bytes of a chunk's logits."""
ROWS = 4096  # of a gradient, that are multiplied at once


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

    Args: as of `cross_entropy`. x_TH and weight_VH are of one dtype. At least one token is taken at a time.

    Raises ValueError for shapes and settings that do not fit, and for what `backend` "triton" cannot run.
    """
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
    return _LinearCrossEntropy.apply(x_TH, weight_VH, labels_T, ignore_index, settings, reduction, chunk, fused)


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
    ) -> Tensor:
        counted = (labels_T != ignore_index).sum()
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        scale = 1.0 / counted.to(wide) if reduction == "mean" else torch.ones((), dtype=wide, device=x_TH.device)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dx_TH = torch.zeros_like(x_TH) if needs_x else None
        several, vocabulary = len(x_TH) > chunk, len(weight_VH)
        dw_VH = torch.zeros_like(weight_VH, dtype=wide if several else None) if needs_weight else None
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
                    factor_C = torch.where(counts_C, scale, 0.0)
                    g_CV = gradient(logits_CV, labels_C, whole_4C, factor_C, 0, vocabulary, settings, backend="torch")
            loss += losses_C.sum()
            if g_CV is not None and dx_TH is not None:
                torch.mm(g_CV, weight_VH, out=dx_TH[start : start + chunk])
            if g_CV is not None and dw_VH is not None:
                if dw_VH.dtype == g_CV.dtype:
                    dw_VH.addmm_(g_CV.t(), x_CH)
                else:
                    dw_VH += g_CV.t() @ x_CH
        ctx.gradients = dx_TH, None if dw_VH is None else dw_VH.to(weight_VH.dtype)
        return torch.where(counted > 0, loss, torch.nan) if reduction == "mean" else loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: backward has run before, and its gradients have been handed on")
        (dx_TH, dw_VH), ctx.gradients = ctx.gradients, None
        for made in (dx_TH, dw_VH):
            for rows in () if made is None else made.split(ROWS):  # widened in parts, as the factor is wide
                rows.copy_(rows.to(grads[0].dtype) * grads[0])
        return dx_TH, dw_VH, None, None, None, None, None, None
