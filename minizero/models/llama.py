"""The Llama decoder (Touvron et al., arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Names and layouts of the parameters are those of HuggingFace's `LlamaForCausalLM`, so weights move either way unchanged.

Shape suffixes: B batch, S sequence, H hidden, N query heads, M key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from minizero.config.schema import ModelConfig
from minizero.kernels import rope, swiglu
from minizero.kernels.backend import UsesKernels
from minizero.models.layers import (
    CausalAttention,
    Embedding,
    Linear,
    RMSNorm,
    SummedCrossEntropy,
    positions_and_documents,
    split_heads,
)

Rope = tuple[Tensor, Tensor]
"""Cosine and sine of the rotary angles, each (B or 1, 1, S, E) with E = D/2: one angle per pair of elements."""


class Llama(nn.Module):
    """The decoder with its language-model head: see `minizero.models.build` for what goes in and out.

    Rotary positions set no limit of their own, so `max_sequence_length` is only what the model is meant for.
    """

    tensor_plan: ClassVar[dict[str, str]] = {
        "model.embed_tokens": "vocab",
        "model.layers.0": "sequence_begin",
        "model.layers.*.input_layernorm": "sequence",
        "model.layers.*.self_attn": "region",
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.k_proj": "colwise_kv",
        "model.layers.*.self_attn.v_proj": "colwise_kv",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.post_attention_layernorm": "sequence",
        "model.layers.*.mlp": "region",
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
        "model.norm": "sequence",
        "lm_head": "vocab_head",
    }
    """How layers may be cut over ranks; read by `minizero.parallel.plan`."""

    pipeline_order: ClassVar[tuple[str, ...]] = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")
    """Modules that hidden states pass, in order; where a pipeline may cut them."""

    context_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "labels", "position_ids")
    """Arguments whose dim 1 is the sequence; labels are the tokens that follow."""

    def __init__(self, config: ModelConfig, vocab_size: int, max_sequence_length: int) -> None:
        super().__init__()
        if config.dropout:
            raise ValueError(f"model.dropout = {config.dropout} has no effect on a llama; legal: 0")
        if config.attention_dropout:
            raise ValueError(f"model.attention_dropout = {config.attention_dropout} has no effect on a llama; legal: 0")
        if (head_dim := config.hidden_size // config.num_heads) % 2:
            raise ValueError(
                f"model.hidden_size / model.num_heads = {head_dim} is odd, but rotary positions turn pairs: "
                "choose sizes that give an even head width"
            )
        self.max_sequence_length = max_sequence_length
        self.model = Decoder(config, vocab_size)
        self.lm_head = Linear(config.hidden_size, vocab_size)
        self.loss = SummedCrossEntropy()
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        logits_BSV = self.lm_head(self.model(input_ids, position_ids))
        return logits_BSV if labels is None else self.loss(logits_BSV, labels)


class Decoder(nn.Module):
    """Embedding, layers and final norm: tokens to hidden states."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_heads
        self.rope_theta = config.rope_theta
        self.embed_tokens = Embedding(vocab_size, config.hidden_size, std=config.hidden_size**-0.5)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x_BSH = self.embed_tokens(input_ids)
        positions, documents_BS = positions_and_documents(input_ids, position_ids)
        angles = rope_table(positions, self.head_dim, self.rope_theta, x_BSH)
        for layer in self.layers:
            x_BSH = layer(x_BSH, angles, documents_BS)
        return self.norm(x_BSH)


class Layer(nn.Module):
    """Attention and MLP, each normed first and added to the residual stream."""

    last_product_is_unread: ClassVar[bool] = True
    """It ends in a matrix product whose value nobody keeps; read by `minizero.parallel.last_product`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BSH: Tensor, angles: Rope, documents_BS: Tensor | None = None) -> Tensor:
        attended_BSH = self.self_attn(self.input_layernorm(x_BSH), angles, documents_BS)
        normed_BSH, x_BSH = self.post_attention_layernorm(attended_BSH, x_BSH)  # of their sum
        return x_BSH + self.mlp(normed_BSH)


class Attention(nn.Module, UsesKernels):
    """Causal self-attention; `num_kv_heads` key/value heads serve `num_heads` query heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.head_dim = hidden // config.num_heads
        kv_size = self.head_dim * (config.num_kv_heads or config.num_heads)
        self.q_proj = Linear(hidden, hidden)
        self.k_proj = Linear(hidden, kv_size)
        self.v_proj = Linear(hidden, kv_size)
        self.o_proj = Linear(hidden, hidden, std=0.0)  # a block begins as the identity
        self.attend = CausalAttention(eager=config.attention == "eager")

    def forward(self, x_BSH: Tensor, angles: Rope, documents_BS: Tensor | None = None) -> Tensor:
        q_BNSD = split_heads(self.q_proj(x_BSH), self.head_dim)
        k_BMSD = split_heads(self.k_proj(x_BSH), self.head_dim)
        q_BNSD, k_BMSD = rope(q_BNSD, k_BMSD, *angles, backend=self.kernels)
        v_BMSD = split_heads(self.v_proj(x_BSH), self.head_dim)
        return self.o_proj(self.attend(q_BNSD, k_BMSD, v_BMSD, documents_BS))


class MLP(nn.Module, UsesKernels):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.intermediate_size or default_mlp_width(config.hidden_size)
        self.gate_proj = Linear(config.hidden_size, width)
        self.up_proj = Linear(config.hidden_size, width)
        self.down_proj = Linear(width, config.hidden_size, std=0.0)  # a block begins as the identity

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_BSH), self.up_proj(x_BSH), backend=self.kernels))


def default_mlp_width(hidden_size: int) -> int:
    """8/3 of the hidden size, rounded up to 32: three matrices then cost what a classic MLP's two of width 4H do."""
    return -(-8 * hidden_size // (3 * 32)) * 32


def rope_table(positions: Tensor, head_dim: int, theta: float, like: Tensor) -> Rope:
    """cos and sin of angle s / theta^(2d / D) at `positions` (S,) or (B, S), in the dtype of `like`.

    The angles are in fp32 whatever the dtype (bf16 cannot hold positions beyond 256). They are computed afresh in each
    forward: it is cheap, and a buffer would have to survive the meta device, dtype casts and inference mode.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=like.device) / head_dim
    positions_BS = positions.to(torch.float32).view(-1, positions.shape[-1])
    angle_B1SE = (positions_BS.unsqueeze(-1) * (1.0 / theta**exponent)).unsqueeze(1)
    return angle_B1SE.cos().to(like.dtype), angle_B1SE.sin().to(like.dtype)
