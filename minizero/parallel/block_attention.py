"""Attention of some queries to one block of keys, with what is needed to join it with other blocks.

A softmax over all keys can be put together from softmaxes over blocks of them, if each also says the logarithm of the
sum it divided by (Milakov & Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691):

    lse = log Σ_u exp(s_u)      out = Σ_u exp(s_u - lse) v_u      s = scale · q kᵀ
    joined:  lse' = log(exp(lse_1) + exp(lse_2)),   out' = exp(lse_1 - lse') out_1 + exp(lse_2 - lse') out_2

Backward needs only the joined lse: P = exp(s - lse), dv = Pᵀ do, ds = P ∘ (do vᵀ - δ), δ = rowsum(do ∘ out), and so
dq = scale · ds k, dk = scale · dsᵀ q.

On a GPU the kernels of `minizero.kernels.flash_attention` do this; what follows does it in torch. Work goes by tiles of
`ROWS` queries, so that no matrix of all queries by all keys ever exists.

Shape suffixes: B batch, N query heads, M key/value heads, G = N / M, T queries, U keys, D head width, R rows of a tile
(queries of all G heads of a group behind each other).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minizero.kernels.backend import Backend, at_least_fp32
from minizero.kernels.flash_attention import attend as attend_in_triton
from minizero.kernels.flash_attention import attend_backward as attend_backward_in_triton
from minizero.kernels.flash_attention import ranges_of, runs_in_triton

ROWS = 256  # queries of a tile: enough for the matrix products to be efficient


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see.

    Attributes:
        causal: queries and keys are the same positions, and none sees a later one.
        queries_BT, keys_BU: documents; a query sees its own only. None: one document.
    """

    causal: bool = False
    queries_BT: Tensor | None = None
    keys_BU: Tensor | None = None

    def hidden(self, start: int, stop: int, keys: int, device: torch.device) -> Tensor | None:
        """bool, broadcastable to (B, M, G, stop - start, keys): True where queries `start`... may not look."""
        hidden = None
        if self.causal:
            rows_T1 = torch.arange(start, stop, device=device).unsqueeze(-1)
            hidden = (torch.arange(keys, device=device) > rows_T1)[None, None, None]
        if self.queries_BT is not None and self.keys_BU is not None:
            other_BTU = self.queries_BT[:, start:stop, None] != self.keys_BU[:, None, :keys]
            hidden = other_BTU[:, None, None] if hidden is None else hidden | other_BTU[:, None, None]
        return hidden

    def ranges(self, q_BNTD: Tensor, k_BMUD: Tensor) -> tuple[Tensor, Tensor]:
        """The same as a range of keys per query: see `minizero.kernels.flash_attention`."""
        return ranges_of(
            q_BNTD.shape[2],
            k_BMUD.shape[2],
            q_BNTD.device,
            causal=self.causal,
            documents_BT=self.queries_BT,
            documents_BU=self.keys_BU,
        )


def tiles(num_queries: int, num_keys: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """(first query, one past the last, keys that some of them see) of each tile."""
    for start in range(0, num_queries, ROWS):
        stop = min(start + ROWS, num_queries)
        yield start, stop, min(stop, num_keys) if causal else num_keys


def grouped(x_BNTD: Tensor, num_kv_heads: int) -> Tensor:
    """(B, N, T, D) -> (B, M, G·T, D): the queries of the heads that share a key head, as one matrix."""
    return at_least_fp32(x_BNTD).unflatten(1, (num_kv_heads, -1)).flatten(2, 3)


def scores(q_BMRD: Tensor, k_BMUD: Tensor, scale: float, hidden: Tensor | None, rows: int) -> Tensor:
    """scale · q kᵀ, -inf where hidden: (B, M, R, U), of `rows` queries per head."""
    s_BMRU = torch.matmul(q_BMRD, k_BMUD.transpose(-1, -2)).mul_(scale)
    if hidden is not None:
        s_BMRU.unflatten(2, (-1, rows)).masked_fill_(hidden, float("-inf"))
    return s_BMRU


def attend(
    q_BNTD: Tensor, k_BMUD: Tensor, v_BMUD: Tensor, scale: float, mask: Mask, kernels: Backend = "torch"
) -> tuple[Tensor, Tensor]:
    """(out (B, N, T, D), lse (B, N, T)) in at least fp32; a query that sees no key has out 0 and lse -inf."""
    if runs_in_triton(kernels, q_BNTD, k_BMUD, v_BMUD):
        return attend_in_triton(q_BNTD, k_BMUD, v_BMUD, mask.ranges(q_BNTD, k_BMUD), scale, torch.float32)
    k_BMUD, v_BMUD = at_least_fp32(k_BMUD), at_least_fp32(v_BMUD)
    kv_heads = k_BMUD.shape[1]
    out_BNTD = q_BNTD.new_empty(q_BNTD.shape, dtype=k_BMUD.dtype)
    lse_BNT = q_BNTD.new_empty(q_BNTD.shape[:-1], dtype=k_BMUD.dtype)
    for start, stop, keys in tiles(q_BNTD.shape[2], k_BMUD.shape[2], mask.causal):
        rows = stop - start
        q_BMRD = grouped(q_BNTD[:, :, start:stop], kv_heads)
        hidden = mask.hidden(start, stop, keys, q_BNTD.device)
        p_BMRU = scores(q_BMRD, k_BMUD[:, :, :keys], scale, hidden, rows)
        highest_BMR1 = p_BMRU.amax(-1, keepdim=True)
        highest_BMR1.masked_fill_(highest_BMR1 == float("-inf"), 0.0)
        sum_BMR1 = p_BMRU.sub_(highest_BMR1).exp_().sum(-1, keepdim=True)
        o_BMRD = torch.matmul(p_BMRU, v_BMUD[:, :, :keys]).div_(sum_BMR1.clamp_min(torch.finfo(sum_BMR1.dtype).tiny))
        out_BNTD[:, :, start:stop] = o_BMRD.unflatten(2, (-1, rows)).flatten(1, 2)
        lse_BNT[:, :, start:stop] = (sum_BMR1.log() + highest_BMR1).squeeze(-1).unflatten(2, (-1, rows)).flatten(1, 2)
    return out_BNTD, lse_BNT


def join(out_BNTD: Tensor, lse_BNT: Tensor, more_BNTD: Tensor, more_lse_BNT: Tensor) -> None:
    """Take another block into (out, lse), in place. Each query must have seen a key in the first."""
    joined_BNT = torch.logaddexp(lse_BNT, more_lse_BNT)
    out_BNTD.mul_((lse_BNT - joined_BNT).exp_().unsqueeze(-1))
    out_BNTD.addcmul_(more_BNTD, (more_lse_BNT - joined_BNT).exp_().unsqueeze(-1))
    lse_BNT.copy_(joined_BNT)


def attend_backward(
    q_BNTD: Tensor,
    k_BMUD: Tensor,
    v_BMUD: Tensor,
    grad_BNTD: Tensor,
    lse_BNT: Tensor,
    delta_BNT: Tensor,
    scale: float,
    mask: Mask,
    into: tuple[Tensor, Tensor, Tensor],
    kernels: Backend = "torch",
) -> None:
    """Add this block's gradients to `into` = (dq (B, N, T, D), dk, dv (B, M, U, D)), all in at least fp32.

    Args:
        grad_BNTD: of the joined output. lse_BNT: the joined one. delta_BNT: rowsum(grad ∘ joined output).
        kernels: see `minizero.kernels`.
    """
    if runs_in_triton(kernels, q_BNTD, k_BMUD, v_BMUD):
        ranges = mask.ranges(q_BNTD, k_BMUD)
        more = attend_backward_in_triton(
            q_BNTD, k_BMUD, v_BMUD, grad_BNTD, lse_BNT, delta_BNT, ranges, scale, torch.float32
        )
        for total, part in zip(into, more, strict=True):
            total += part
        return
    k_BMUD, v_BMUD = at_least_fp32(k_BMUD), at_least_fp32(v_BMUD)
    kv_heads = k_BMUD.shape[1]
    dq_BNTD, dk_BMUD, dv_BMUD = into
    for start, stop, keys in tiles(q_BNTD.shape[2], k_BMUD.shape[2], mask.causal):
        rows = stop - start
        q_BMRD, g_BMRD = (grouped(x[:, :, start:stop], kv_heads) for x in (q_BNTD, grad_BNTD))
        lse_BMR1, delta_BMR1 = (grouped(x[:, :, start:stop].unsqueeze(-1), kv_heads) for x in (lse_BNT, delta_BNT))
        hidden = mask.hidden(start, stop, keys, q_BNTD.device)
        p_BMRU = scores(q_BMRD, k_BMUD[:, :, :keys], scale, hidden, rows).sub_(lse_BMR1).exp_()
        dv_BMUD[:, :, :keys] += torch.matmul(p_BMRU.transpose(-1, -2), g_BMRD)
        dp_BMRU = torch.matmul(g_BMRD, v_BMUD[:, :, :keys].transpose(-1, -2))
        ds_BMRU = dp_BMRU.sub_(delta_BMR1).mul_(p_BMRU).mul_(scale)
        dq_BMRD = torch.matmul(ds_BMRU, k_BMUD[:, :, :keys])
        dq_BNTD[:, :, start:stop] += dq_BMRD.unflatten(2, (-1, rows)).flatten(1, 2)
        dk_BMUD[:, :, :keys] += torch.matmul(ds_BMRU.transpose(-1, -2), q_BMRD)
