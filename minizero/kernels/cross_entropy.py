"""Cross-entropy from logits, its gradient, and the part of it that a rank with some of the vocabulary computes.

    c_v = logits, or cap · tanh(logits / cap)       lse = log Σ_v exp(c_v)
    loss = lse - (1 - ε) c_label - ε / V Σ_v c_v + z lse²                    ε smoothing, z of the z-loss
    d loss / d c_v = exp(c_v - lse) (1 + 2 z lse) - ε / V - (1 - ε) [v = label]

In bf16 the gradient is rounded when it is computed, and once more when backward multiplies it by something that is no
power of two. In fp16 a probability times 1 / count would be lost before the loss scale comes: there the gradient is
computed in backward, with all factors in it, and rounded once.

(label smoothing: arXiv 1512.00567; z-loss: PaLM, arXiv 2204.02311; soft cap: Gemma 2, arXiv 2408.00118)

One program per row. It goes along the row once for the statistics, keeping what it has to divide by, and, where a
gradient will be wanted, a second time to write it: the logits are read from memory once, as long as all rows in flight
fit into the L2 cache. In place the gradient takes the logits' memory; the version counter tells autograd that they are
gone, so a graph that saved them raises. Whoever holds some columns of the vocabulary, or some tokens, uses the halves:
`statistics` of columns, which ranks put together; `losses_of` these; and `gradient`.

Glossary (T tokens, V columns here): logits [T, V], any row stride, int64 offsets      labels [T] int64
    highest, total, target, sums [T] (fp32)    max c_v, Σ exp(c_v - max), c_label or 0 where it is elsewhere, Σ c_v
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minizero.kernels.backend import Backend, as_rows, at_least_fp32, overlaps, tl, triton, use_triton

IGNORED = -100
BLOCK = 4096
LOWEST = -3.0e38  # below every finite logit of 16 bits, and yet a number: lowest - lowest is 0
Reduction = Literal["none", "mean", "sum"]


def cross_entropy(
    logits_TV: Tensor,
    labels_T: Tensor,
    *,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: Reduction = "mean",
    in_place: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy in at least fp32: [T] for reduction "none", else 0-d.

    Args:
        logits_TV: floating point. labels_T: int64 in [0, V), or `ignore_index`, whose loss and gradient are 0.
            Others give nan in Triton (looking at them would cost a synchronization), and an IndexError in torch.
        reduction: "mean" is over labels that are not ignored; without any it is nan, as in torch.
        in_place: the logits' memory is used for their gradient, unless rows overlap. Nothing else may read the logits
            afterwards. Without a gradient to compute they stay as they are.

    In Triton backward runs once, since it hands on the memory that it would need again: a second one raises torch's
    RuntimeError of a tensor that was modified. (In fp16 that is so in place; else backward may run again.)

    Raises ValueError for shapes and settings that do not fit, and for what `backend` "triton" cannot run.
    """
    check("cross_entropy", tuple(logits_TV.shape), labels_T, label_smoothing, softcap)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"cross_entropy: reduction {reduction!r} does not exist; legal: none, mean, sum")
    settings = label_smoothing, z_loss, softcap
    if not use_triton(backend, "cross_entropy", logits_TV, labels_T):
        return cross_entropy_torch(logits_TV, labels_T, ignore_index, *settings, reduction)
    scale = torch.ones((), dtype=torch.float32, device=logits_TV.device)
    if reduction == "mean":
        scale = 1.0 / (labels_T != ignore_index).sum().float()
    wanted = torch.is_grad_enabled() and logits_TV.requires_grad
    if wanted and logits_TV.dtype == torch.float16:
        losses_T = scale * _GradientInBackward.apply(logits_TV, labels_T, ignore_index, settings, in_place)
    else:
        losses_T = _CrossEntropy.apply(logits_TV, labels_T, scale, ignore_index, settings, in_place, wanted)
    if reduction == "none":
        return losses_T
    loss = losses_T.sum()
    return loss if reduction == "sum" else torch.where(scale.isinf(), torch.nan, loss)


def cross_entropy_torch(
    logits_TV: Tensor,
    labels_T: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: Reduction,
) -> Tensor:
    """The reference, with torch's own."""
    wide_TV, _ = capped(logits_TV, softcap)
    plain = dict(ignore_index=ignore_index, label_smoothing=label_smoothing)
    if not z_loss:
        return F.cross_entropy(wide_TV, labels_T, reduction=reduction, **plain)  # type: ignore[arg-type]
    counted_T = labels_T != ignore_index
    losses_T = F.cross_entropy(wide_TV, labels_T, reduction="none", **plain)  # type: ignore[arg-type]
    losses_T = losses_T + z_loss * torch.where(counted_T, wide_TV.logsumexp(-1).square(), 0.0)
    return losses_T if reduction == "none" else losses_T.sum() / (counted_T.sum() if reduction == "mean" else 1)


def check(op: str, shape: tuple[int, ...], labels_T: Tensor, label_smoothing: float, softcap: float) -> None:
    """Raise ValueError unless logits are [T, V], labels int64 [T], ε in [0, 1] and the cap not negative."""
    if len(shape) != 2 or tuple(labels_T.shape) != shape[:1] or shape[1] == 0:
        raise ValueError(f"{op}: logits are {shape}, labels {tuple(labels_T.shape)}; legal: [T, V], [T], V > 0")
    if labels_T.dtype != torch.int64:
        raise ValueError(f"{op}: labels are {labels_T.dtype}; legal: torch.int64")
    if not 0.0 <= label_smoothing <= 1.0 or softcap < 0.0:
        raise ValueError(
            f"{op}: label_smoothing = {label_smoothing}, softcap = {softcap}; legal: 0 to 1, and 0 (none) or more"
        )


# ---- kernels ----


@triton.jit
def _capped(x, cap, CAP: tl.constexpr):
    """(cap · tanh(x / cap), its slope); tanh(u) = 2 σ(2u) - 1."""
    slope = 1.0
    if CAP:
        t = 2.0 * tl.sigmoid(2.0 * x / cap) - 1.0
        x = cap * t
        slope = 1.0 - t * t
    return x, slope


@triton.jit
def _row_statistics(
    row_ptr, columns, cap, LOWEST: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, SUMS: tl.constexpr
):
    """(highest, Σ exp(c - highest), Σ c): one look at the highest per block, sums across lanes at the end only."""
    highest = LOWEST
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        x, _ = _capped(x, cap, CAP)
        x = tl.where(column < columns, x, float("-inf"))
        before = highest
        highest = tl.maximum(before, tl.max(x, axis=0))
        total = total * tl.exp(before - highest) + tl.exp(x - highest)
        if SUMS:
            sums += tl.where(column < columns, x, 0.0)
    return highest, tl.sum(total, axis=0), tl.sum(sums, axis=0)


@triton.jit
def _row_gradient(
    row_ptr, out_ptr, columns, label, highest, total, cap, smoothing, vocabulary, z, factor,
    BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """factor · d loss / d logits of a row; `label` outside of its columns: another rank's."""
    weight = (1.0 + 2.0 * z * (highest + tl.log(total))) / total
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        x, slope = _capped(x, cap, CAP)
        g = tl.exp(x - highest) * weight - smoothing / vocabulary
        g = tl.where(column == label, g - (1.0 - smoothing), g) * slope * factor
        tl.store(out_ptr + column, g.to(out_ptr.dtype.element_ty), mask=column < columns)


@triton.jit
def _row_of_zeros(out_ptr, columns, BLOCK: tl.constexpr):
    """The gradient of a row that does not count, whatever is in it."""
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + column, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=column < columns)


@triton.jit
def _whole(
    logits_ptr, labels_ptr, losses_ptr, grad_ptr, scale_ptr, stride, grad_stride, columns,
    ignore_index, smoothing, z, cap,
    LOWEST: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, SMOOTHED: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of one row of the whole vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    row_ptr = logits_ptr + row * stride
    out_ptr = grad_ptr + row * grad_stride
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            _row_of_zeros(out_ptr, columns, BLOCK)
    else:
        highest, total, sums = _row_statistics(row_ptr, columns, cap, LOWEST, BLOCK, CAP, SMOOTHED)
        lse = highest + tl.log(total)
        legal = (label >= 0) & (label < columns)
        target = tl.load(row_ptr + label, mask=legal, other=float("nan")).to(tl.float32)
        target, _ = _capped(target, cap, CAP)
        scale = tl.load(scale_ptr)
        loss = (1.0 - smoothing) * (highest - target) + smoothing * (highest - sums / columns) + tl.log(total)
        loss += z * lse * lse
        tl.store(losses_ptr + row, loss * scale)
        if GRADIENT:
            tl.debug_barrier()  # the label's logit was read by all before it is written over
            scale = tl.where(legal, scale, float("nan"))
            _row_gradient(
                row_ptr, out_ptr, columns, label, highest, total, cap, smoothing, columns, z, scale, BLOCK, CAP
            )


@triton.jit
def _statistics(
    logits_ptr, labels_ptr, out_ptr, stride, columns, rows, first, cap,
    LOWEST: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """A row's four numbers over the columns here, which are [first, first + columns) of the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row) - first
    row_ptr = logits_ptr + row * stride
    here = (label >= 0) & (label < columns)
    target = tl.load(row_ptr + label, mask=here, other=0.0).to(tl.float32)
    target, _ = _capped(target, cap, CAP)
    highest, total, sums = _row_statistics(row_ptr, columns, cap, LOWEST, BLOCK, CAP, SUMS)
    tl.store(out_ptr + row, highest)
    tl.store(out_ptr + rows + row, total)
    tl.store(out_ptr + 2 * rows + row, tl.where(here, target, 0.0))
    tl.store(out_ptr + 3 * rows + row, sums)


@triton.jit
def _gradient(
    logits_ptr, labels_ptr, highest_ptr, total_ptr, factor_ptr, grad_ptr, stride, grad_stride, columns, first,
    smoothing, vocabulary, z, cap,
    BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row) - first
    highest = tl.load(highest_ptr + row)
    total = tl.load(total_ptr + row)
    factor = tl.load(factor_ptr + row)
    out_ptr = grad_ptr + row * grad_stride
    if factor == 0.0:
        _row_of_zeros(out_ptr, columns, BLOCK)
    else:
        _row_gradient(
            logits_ptr + row * stride, out_ptr, columns, label, highest, total, cap, smoothing, vocabulary, z, factor,
            BLOCK, CAP,
        )  # fmt: skip


@triton.jit
def _scale_rows(x_ptr, factor_ptr, factor_stride, stride, columns, BLOCK: tl.constexpr):
    """Multiply a row by its factor, in place; a factor of 1 costs nothing."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row * factor_stride).to(tl.float32)
    if factor != 1.0:
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            place = x_ptr + row * stride + column
            x = tl.load(place, mask=column < columns, other=0.0).to(tl.float32) * factor
            tl.store(place, x.to(x_ptr.dtype.element_ty), mask=column < columns)


# ---- launches ----


def block_of(columns: int) -> dict[str, int]:
    """Columns of a block, and warps."""
    block = min(BLOCK, triton.next_power_of_2(columns))
    return dict(BLOCK=block, num_warps=max(1, min(8, block // 256)))


def losses_and_gradient(
    logits_TV: Tensor,
    labels_T: Tensor,
    scale: Tensor,
    ignore_index: int,
    settings: tuple[float, float, float],
    grad_TV: Tensor | None,
) -> Tensor:
    """scale · losses [T] (fp32); their gradient goes into `grad_TV`, which may be the logits' memory."""
    rows, columns = logits_TV.shape
    losses_T = torch.empty(rows, dtype=torch.float32, device=logits_TV.device)
    smoothing, z, cap = settings
    if rows:
        into = logits_TV if grad_TV is None else grad_TV
        _whole[(rows,)](
            logits_TV, labels_T.contiguous(), losses_T, into, scale, logits_TV.stride(0), into.stride(0), columns,
            ignore_index, smoothing, z, cap, LOWEST=LOWEST, CAP=cap > 0, SMOOTHED=smoothing > 0,
            GRADIENT=grad_TV is not None, **block_of(columns),
        )  # fmt: skip
    return losses_T


# ---- the halves: columns [first, first + V) of a vocabulary, in Triton or in torch ----


def statistics(
    logits_TV: Tensor, labels_T: Tensor, first: int, softcap: float = 0.0, sums: bool = True, backend: Backend = "auto"
) -> Tensor:
    """[4, T] (at least fp32): highest, total, target, sums (see above; 0 without `sums`) of the columns here."""
    rows, columns = logits_TV.shape
    if not use_triton(backend, "cross_entropy", logits_TV, labels_T):
        capped_TV, _ = capped(logits_TV, softcap)
        index_T1, here_T1 = local(labels_T, first, columns)
        highest_T1 = capped_TV.amax(-1, keepdim=True).clamp_min(LOWEST)
        target_T1 = torch.where(here_T1, capped_TV.gather(-1, index_T1), 0.0)
        sums_T1 = capped_TV.sum(-1, keepdim=True) if sums else torch.zeros_like(target_T1)
        total_T1 = (capped_TV - highest_T1).exp_().sum(-1, keepdim=True)
        return torch.cat([highest_T1, total_T1, target_T1, sums_T1], dim=-1).t().contiguous()
    logits_TV = as_rows(logits_TV)
    out_4T = torch.empty(4, rows, dtype=torch.float32, device=logits_TV.device)
    if rows:
        _statistics[(rows,)](
            logits_TV, labels_T.contiguous(), out_4T, logits_TV.stride(0), columns, rows, first, softcap,
            LOWEST=LOWEST, CAP=softcap > 0, SUMS=sums, **block_of(columns),
        )  # fmt: skip
    return out_4T


def losses_of(whole_4T: Tensor, labels_T: Tensor, vocabulary: int, label_smoothing: float, z_loss: float) -> Tensor:
    """Losses [T] from the statistics of a whole vocabulary; nan for a label that is not in it."""
    highest_T, total_T, target_T, sums_T = whole_4T
    log_T = total_T.log()  # by differences to the highest: lse - target would cancel
    loss_T = (1 - label_smoothing) * (highest_T - target_T) + log_T + z_loss * (highest_T + log_T).square()
    if label_smoothing:
        loss_T = loss_T + label_smoothing * (highest_T - sums_T / vocabulary)
    return torch.where((labels_T >= 0) & (labels_T < vocabulary), loss_T, torch.nan)


def gradient(
    logits_TV: Tensor,
    labels_T: Tensor,
    whole_4T: Tensor,
    factor_T: Tensor,
    first: int,
    vocabulary: int,
    settings: tuple[float, float, float],
    *,
    in_place: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """factor · d loss / d logits, [T, V] in their dtype, given the statistics of the whole `vocabulary`.

    With `in_place` it is the logits' memory, in Triton, unless rows overlap or lie apart; their version counts up.
    """
    smoothing, z, cap = settings
    rows, columns = logits_TV.shape
    highest_T, total_T = whole_4T[0].contiguous(), whole_4T[1].contiguous()
    if not use_triton(backend, "cross_entropy", logits_TV, labels_T):
        weight_T = (1 + 2 * z * (highest_T + total_T.log())) / total_T * factor_T
        capped_TV, slope_TV = capped(logits_TV, cap)
        index_T1, here_T1 = local(labels_T, first, columns)
        grad_TV = (capped_TV - highest_T.unsqueeze(-1)).exp_().mul_(weight_T.unsqueeze(-1))
        if smoothing:
            grad_TV.sub_((factor_T * smoothing / vocabulary).unsqueeze(-1))
        grad_TV.scatter_add_(-1, index_T1, torch.where(here_T1, (smoothing - 1) * factor_T.unsqueeze(-1), 0.0))
        return (grad_TV if slope_TV is None else grad_TV.mul_(slope_TV)).to(logits_TV.dtype)
    logits_TV = as_rows(logits_TV)
    grad_TV = logits_TV if in_place and not overlaps(logits_TV) else logits_TV.new_empty(rows, columns)
    if rows:
        _gradient[(rows,)](
            logits_TV, labels_T.contiguous(), highest_T, total_T, factor_T.contiguous(), grad_TV, logits_TV.stride(0),
            grad_TV.stride(0), columns, first, smoothing, vocabulary, z, cap, CAP=cap > 0, **block_of(columns),
        )  # fmt: skip
    torch.autograd.graph.increment_version(grad_TV)
    return grad_TV


def capped(logits_TV: Tensor, cap: float) -> tuple[Tensor, Tensor | None]:
    """(capped logits in at least fp32, their slope, which is None for 1)."""
    wide_TV = at_least_fp32(logits_TV)
    if not cap:
        return wide_TV, None
    tanh_TV = torch.tanh(wide_TV / cap)
    return cap * tanh_TV, 1 - tanh_TV.square()


def local(labels_T: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """(places of labels among the columns here, 0 for those elsewhere; whether they are here), both [T, 1]."""
    local_T1 = labels_T.unsqueeze(-1) - first
    here_T1 = (local_T1 >= 0) & (local_T1 < columns)
    return torch.where(here_T1, local_T1, 0), here_T1


def scale_rows_(x_TV: Tensor, factor_T: Tensor) -> Tensor:
    """Multiply each row by its factor, in place; rows whose factor is 1 are not touched."""
    rows, columns = x_TV.shape
    if rows:
        _scale_rows[(rows,)](x_TV, factor_T, factor_T.stride(0), x_TV.stride(0), columns, **block_of(columns))
    torch.autograd.graph.increment_version(x_TV)
    return x_TV


class _CrossEntropy(Function):
    """Losses per token, times `scale`. Forward computes the gradient too; backward multiplies it where it must."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        labels_T: Tensor,
        scale: Tensor,
        ignore_index: int,
        settings: tuple[float, float, float],
        in_place: bool,
        wanted: bool,
    ) -> Tensor:
        rows_TV = as_rows(logits_TV)
        if not wanted:
            return losses_and_gradient(rows_TV, labels_T, scale, ignore_index, settings, None)
        in_place = in_place and not overlaps(rows_TV)
        grad_TV = rows_TV.detach() if in_place else rows_TV.new_empty(rows_TV.shape)
        losses_T = losses_and_gradient(rows_TV, labels_T, scale, ignore_index, settings, grad_TV)
        torch.autograd.graph.increment_version(grad_TV)
        ctx.save_for_backward(grad_TV)
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_TV,) = ctx.saved_tensors  # raises in a second backward: the first counted its version up
        return scale_rows_(grad_TV, grads[0]), None, None, None, None, None, None


class _GradientInBackward(Function):
    """Losses per token. Backward computes the gradient, times what comes in."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        labels_T: Tensor,
        ignore_index: int,
        settings: tuple[float, float, float],
        in_place: bool,
    ) -> Tensor:
        smoothing, z, cap = settings
        whole_4T = statistics(logits_TV, labels_T, 0, cap, smoothing > 0, backend="triton")
        ctx.save_for_backward(logits_TV, labels_T, whole_4T)
        ctx.ignore_index, ctx.settings, ctx.in_place = ignore_index, settings, in_place
        losses_T = losses_of(whole_4T, labels_T, logits_TV.shape[1], smoothing, z)
        return torch.where(labels_T == ignore_index, 0.0, losses_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        logits_TV, labels_T, whole_4T = ctx.saved_tensors
        vocabulary = logits_TV.shape[1]
        factor_T = torch.where((labels_T >= 0) & (labels_T < vocabulary), grads[0], torch.nan)
        factor_T = torch.where(labels_T == ctx.ignore_index, 0.0, factor_T)
        grad_TV = gradient(
            logits_TV, labels_T, whole_4T, factor_T, 0, vocabulary, ctx.settings, in_place=ctx.in_place,
            backend="triton",
        )  # fmt: skip
        return grad_TV, None, None, None, None
