"""The model and the batches of the step-time comparison: a plain GPT that belongs to none of the contenders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, DEPTH, HEADS, VOCABULARY = 512, 8, 8, 256
BATCH, LENGTH = 2, 128


class Block(nn.Module):
    """Pre-norm attention and MLP, 12 WIDTH^2 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BSH: Tensor) -> Tensor:
        b, s, _ = x_BSH.shape
        q, k, v = self.qkv(self.norm1(x_BSH)).view(b, s, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSH = x_BSH + self.out(mixed.transpose(1, 2).reshape(b, s, WIDTH))
        return x_BSH + self.down(F.gelu(self.up(self.norm2(x_BSH))))


class GPT(nn.Module):
    """25.4 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSH = self.embed(tokens_BS) + self.positions.weight[: tokens_BS.shape[1]]
        for block in self.blocks:
            x_BSH = block(x_BSH)
        return self.head(self.norm(x_BSH))


def build_model() -> GPT:
    torch.manual_seed(0)
    return GPT()


def batches(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    while True:
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]


def loss_of(model: Any, inputs_BS: Tensor, labels_BS: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs_BS).flatten(0, 1), labels_BS.flatten())
