"""What the decoders share: layers that know their own initial values, causal attention, and the loss.

Every class that owns parameters has a `reset_parameters()` that draws them from torch's default generator and from
nothing else. So a model built on the meta device can be given its weights one module at a time, in any order.

Layers that are `UsesKernels` take Triton's kernels or torch's code, as was chosen (see `minizero.kernels.backend`).

Shape suffixes: B batch, S sequence, H hidden, N heads, D head width, V vocabulary.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minizero.kernels import Backend, add_rms_norm, cross_entropy, flash_attention, layer_norm, rms_norm
from minizero.kernels.backend import UsesKernels, at_least_fp32
from minizero.kernels.flash_attention import runs_in_triton
from minizero.models.dropout import Dropout
from minizero.utils.forward import running

INIT_STD = 0.02
"""Standard deviation of initial weights (GPT-2, Radford et al. 2019, and most since)."""

IGNORED = -100
"""The label of a position whose prediction does not count."""


def residual_std(num_layers: int) -> float:
    """Standard deviation for a projection into the residual stream, of which a layer has two (GPT-2, section 2.3)."""
    return INIT_STD / (2 * num_layers) ** 0.5


class Linear(nn.Linear):
    """A linear layer whose weights start normal, and its bias at zero.

    `std` of None is in_features^-1/2, which keeps the variance of what passes through.
    """

    def __init__(self, in_features: int, out_features: int, std: float | None = None, bias: bool = False) -> None:
        self.std = in_features**-0.5 if std is None else std  # super().__init__() calls reset_parameters()
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """A lookup table whose rows start normal with a given standard deviation."""

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float = INIT_STD) -> None:
        self.std = std
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class RMSNorm(nn.Module, UsesKernels):
    """x / sqrt(mean(x²) + eps) · weight over the last dim, in at least fp32 (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x_BSH: Tensor, residual_BSH: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The normed x; given a residual stream, (the normed sum, the sum)."""
        if residual_BSH is None:
            return rms_norm(x_BSH, self.weight, self.eps, backend=self.kernels)
        return add_rms_norm(x_BSH, residual_BSH, self.weight, self.eps, backend=self.kernels)


class LayerNorm(nn.LayerNorm, UsesKernels):
    """torch's, over the last dim, by the kernels that were chosen."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.weight, self.bias, self.eps, backend=self.kernels)


class CausalAttention(nn.Module, UsesKernels):
    """softmax(q kᵀ / √D, no position sees a later one, nor another document) v, the heads side by side: (B, S, N·D).

    Keys and values may have fewer heads (M divides N): each serves N / M consecutive query heads
    (grouped-query attention, arXiv 2305.13245).

    Args:
        dropout: probability with which a weight is dropped. eager: compute the (S, S) weights as such; dropout needs
            them, everything else is better off with torch's fused attention, which never holds them.

    A module, so that another way to the same numbers can take its place.
    """

    last_product_is_unread: ClassVar[bool] = True

    def __init__(self, dropout: float = 0.0, eager: bool = False) -> None:
        super().__init__()
        self.eager = eager
        self.dropout = Dropout(dropout, dims=("sample", "head", "query", "key"))

    def forward(self, q_BNSD: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        attend = self._eager if self.eager else self._fused
        return attend(q_BNSD, k_BMSD, v_BMSD, documents_BS).transpose(1, 2).flatten(2)

    def _fused(self, q_BNSD: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, documents_BS: Tensor | None) -> Tensor:
        if runs_in_triton(self.kernels, q_BNSD, k_BMSD, v_BMSD):
            return flash_attention(q_BNSD, k_BMSD, v_BMSD, documents_BT=documents_BS, backend=self.kernels)[0]
        mask = None if documents_BS is None else ~hidden(q_BNSD, documents_BS)
        grouped = q_BNSD.shape[1] != k_BMSD.shape[1]
        return F.scaled_dot_product_attention(
            q_BNSD, k_BMSD, v_BMSD, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )

    def _eager(self, q_BNSD: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, documents_BS: Tensor | None) -> Tensor:
        each = q_BNSD.shape[1] // k_BMSD.shape[1]
        k_BNSD, v_BNSD = (x if each == 1 else x.repeat_interleave(each, dim=1) for x in (k_BMSD, v_BMSD))
        scores_BNSS = (q_BNSD * q_BNSD.shape[-1] ** -0.5) @ k_BNSD.transpose(-1, -2)
        scores_BNSS.masked_fill_(hidden(q_BNSD, documents_BS), float("-inf"))  # in place: the largest tensor there is
        weights_BNSS = at_least_fp32(scores_BNSS).softmax(dim=-1).to(q_BNSD.dtype)
        return self.dropout(weights_BNSS) @ v_BNSD


def hidden(q_BNSD: Tensor, documents_BS: Tensor | None) -> Tensor:
    """bool, (S, S) or (B, 1, S, S): True where a query (row) may not see a key (column)."""
    length = q_BNSD.shape[2]
    later_SS = torch.ones(length, length, dtype=torch.bool, device=q_BNSD.device).triu(1)
    if documents_BS is None:
        return later_SS
    return later_SS | (documents_BS[:, None, :, None] != documents_BS[:, None, None, :])


def positions_and_documents(input_ids: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(positions (S,) or (B, S), documents (B, S) or None) of the tokens that this rank holds.

    Position ids that begin again at 0 begin a new document. Without them positions count from 0, or are those that
    context parallelism left here.
    """
    if position_ids is not None:
        return position_ids, (position_ids == 0).cumsum(dim=-1)
    forward = running()
    if forward is not None and forward.positions_L is not None:
        return forward.positions_L, None
    return torch.arange(input_ids.shape[1], device=input_ids.device), None


def split_heads(x_BSE: Tensor, head_dim: int, norm: nn.Module | None = None) -> Tensor:
    """(B, S, N·D) -> (B, N, S, D), each head normed by `norm`."""
    x_BSND = x_BSE.unflatten(-1, (-1, head_dim))
    return (x_BSND if norm is None else norm(x_BSND)).transpose(1, 2)


class SummedCrossEntropy(nn.Module, UsesKernels):
    """`summed_cross_entropy` as a module: a place for another loss that gives the same numbers."""

    def forward(self, logits_BSV: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
        return summed_cross_entropy(logits_BSV, labels_BS, self.kernels)


def summed_cross_entropy(logits_BSV: Tensor, labels_BS: Tensor, kernels: Backend = "torch") -> tuple[Tensor, Tensor]:
    """(sum of -log p(label) in nats, in at least fp32; number of labels that count, int64), both 0-d.

    A sum and a count, not a mean: only so do ragged micro-batches and ranks add up to exactly the big batch. In Triton
    the logits' memory becomes that of their gradient.
    """
    logits_TV, labels_T = logits_BSV.flatten(0, 1), labels_BS.flatten()
    loss = cross_entropy(logits_TV, labels_T, ignore_index=IGNORED, reduction="sum", in_place=True, backend=kernels)
    return loss, (labels_T != IGNORED).sum()
