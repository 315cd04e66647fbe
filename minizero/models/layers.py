"""What the decoders share: layers that know their own initial values, causal attention, and the loss.

Every class that owns parameters has a `reset_parameters()` that draws them from torch's default generator and from
nothing else. So a model built on the meta device can be given its weights one module at a time, in any order.

Shape suffixes: B batch, S sequence, H hidden, N heads, D head width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dim, in at least fp32 (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x_BSH: Tensor) -> Tensor:
        wide_BSH = at_least_fp32(x_BSH)
        scale_BS1 = torch.rsqrt(wide_BSH.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide_BSH * scale_BS1).to(x_BSH.dtype)


def causal_attention(q_BNSD: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √D, no position sees a later one) v, the heads side by side: shape (B, S, N·D).

    Keys and values may have fewer heads (M divides N): each serves N / M consecutive query heads
    (grouped-query attention, arXiv 2305.13245).
    """
    grouped = q_BNSD.shape[1] != k_BMSD.shape[1]
    out_BNSD = F.scaled_dot_product_attention(
        q_BNSD, k_BMSD, v_BMSD, dropout_p=dropout, is_causal=True, enable_gqa=grouped
    )
    return out_BNSD.transpose(1, 2).flatten(2)


def split_heads(x_BSE: Tensor, head_dim: int) -> Tensor:
    """(B, S, N·D) -> (B, N, S, D)."""
    return x_BSE.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class SummedCrossEntropy(nn.Module):
    """`summed_cross_entropy` as a module: a place for another loss that gives the same numbers."""

    def forward(self, logits_BSV: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
        return summed_cross_entropy(logits_BSV, labels_BS)


def summed_cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of -log p(label) in nats, in at least fp32; number of labels that count, int64), both 0-d.

    A sum and a count, not a mean: only so do ragged micro-batches and ranks add up to exactly the big batch.
    """
    logits_TV, labels_T = at_least_fp32(logits_BSV).flatten(0, 1), labels_BS.flatten()
    loss = F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED, reduction="sum")
    return loss, (labels_T != IGNORED).sum()


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32 if it is a 16-bit tensor, else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
