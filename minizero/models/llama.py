"""The Llama decoder (Touvron et al., arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU, grouped-query attention.

With `qk_norm`, that of Qwen3 (arXiv 2505.09388), which norms each head's queries and keys before they are turned; with
`rope_scaling`, that of Llama 3.1 (Grattafiori et al., arXiv 2407.21783), whose slow rotary waves are stretched.
Names and layouts of the parameters are those of HuggingFace's `LlamaForCausalLM` and `Qwen3ForCausalLM`, so weights
move either way unchanged.

Shape suffixes: B batch, S sequence, H hidden, N query heads, M key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minizero.config.schema import ModelConfig
from minizero.kernels import rope, swiglu
from minizero.kernels.backend import UsesKernels
from minizero.models.hf import HuggingFaceNames, to_hf
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


class Llama(nn.Module, HuggingFaceNames):
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
        "model.layers.*.self_attn.q_norm": "partial",
        "model.layers.*.self_attn.k_norm": "partial",
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

    hf_base: ClassVar[str] = "model"

    def __init__(self, config: ModelConfig, vocab_size: int, max_sequence_length: int) -> None:
        super().__init__()
        if config.dropout:
            raise ValueError(f"model.dropout = {config.dropout} has no effect on a llama; legal: 0")
        if config.attention_dropout:
            raise ValueError(f"model.attention_dropout = {config.attention_dropout} has no effect on a llama; legal: 0")
        if (width := head_width(config)) % 2:
            raise ValueError(
                f"model.head_dim (or hidden_size / num_heads) = {width} is odd, but rotary positions turn pairs: "
                "choose sizes that give an even head width"
            )
        self.settings, self.vocab_size, self.max_sequence_length = config, vocab_size, max_sequence_length
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

    @staticmethod
    def spelled_out(config: ModelConfig) -> ModelConfig:
        """See `HuggingFaceNames.spelled_out`."""
        sizes = {"head_dim": head_width(config), "intermediate_size": mlp_width(config)}
        return config.model_copy(update={**sizes, "num_kv_heads": config.num_kv_heads or config.num_heads})

    def hf_config(self) -> dict[str, Any]:
        """See `HuggingFaceNames.hf_config`."""
        config, kind = self.spelled_out(self.settings), "qwen3" if self.settings.qk_norm else "llama"
        architecture = f"{kind.capitalize()}ForCausalLM"
        return to_hf(kind, architecture, config, self.vocab_size, self.max_sequence_length) | dict(self.origin)


class Decoder(nn.Module):
    """Embedding, layers and final norm: tokens to hidden states."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.settings = config
        self.embed_tokens = Embedding(vocab_size, config.hidden_size, std=config.hidden_size**-0.5)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x_BSH = self.embed_tokens(input_ids)
        positions, documents_BS = positions_and_documents(input_ids, position_ids)
        angles = rope_table(positions, rope_frequencies(self.settings, x_BSH.device), x_BSH)
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
        hidden, self.head_dim = config.hidden_size, head_width(config)
        size, kv_size = (self.head_dim * n for n in (config.num_heads, config.num_kv_heads or config.num_heads))
        self.q_proj = Linear(hidden, size)
        self.k_proj = Linear(hidden, kv_size)
        self.v_proj = Linear(hidden, kv_size)
        self.o_proj = Linear(size, hidden, std=0.0)  # a block begins as the identity
        norm = (lambda: RMSNorm(self.head_dim, config.norm_eps)) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()
        self.attend = CausalAttention(eager=config.attention == "eager")

    def forward(self, x_BSH: Tensor, angles: Rope, documents_BS: Tensor | None = None) -> Tensor:
        q_BNSD = split_heads(self.q_proj(x_BSH), self.head_dim, self.q_norm)
        k_BMSD = split_heads(self.k_proj(x_BSH), self.head_dim, self.k_norm)
        q_BNSD, k_BMSD = rope(q_BNSD, k_BMSD, *angles, backend=self.kernels)
        v_BMSD = split_heads(self.v_proj(x_BSH), self.head_dim)
        return self.o_proj(self.attend(q_BNSD, k_BMSD, v_BMSD, documents_BS))


class MLP(nn.Module, UsesKernels):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = mlp_width(config)
        self.gate_proj = Linear(config.hidden_size, width)
        self.up_proj = Linear(config.hidden_size, width)
        self.down_proj = Linear(width, config.hidden_size, std=0.0)  # a block begins as the identity

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_BSH), self.up_proj(x_BSH), backend=self.kernels))


def head_width(config: ModelConfig) -> int:
    """D, as given or hidden_size / num_heads."""
    return config.head_dim or config.hidden_size // config.num_heads


def mlp_width(config: ModelConfig) -> int:
    """As given, or 8/3 of the hidden size, rounded up to 32: three matrices cost what a classic MLP's two of 4H do."""
    return config.intermediate_size or -(-8 * config.hidden_size // (3 * 32)) * 32


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """(E,) fp32: f = theta^(-2d / D) for d = 0, 1, ...; scaled as `llama3` (`apply_scaling` of Meta's llama-models),

        f' = (1 - s) f / factor + s f        s = (L f / 2π - low) / (high - low), at least 0 and at most 1

    where L f / 2π is how often a wave turns within the original length L.
    """
    head_dim, scaling = head_width(config), config.rope_scaling
    f_E = 1.0 / config.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if scaling.type == "none":
        return f_E
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns_E = scaling.original_max_position_embeddings / (2 * math.pi / f_E)
    s_E = ((turns_E - low) / (high - low)).clamp(0, 1)
    return (1 - s_E) * f_E / scaling.factor + s_E * f_E


def rope_table(positions: Tensor, f_E: Tensor, like: Tensor) -> Rope:
    """cos and sin of the angles s · f at `positions` (S,) or (B, S), in the dtype of `like`.

    The angles are in fp32 whatever the dtype (bf16 cannot hold positions beyond 256). They are computed afresh in each
    forward: it is cheap, and a buffer would have to survive the meta device, dtype casts and inference mode.
    """
    positions_BS = positions.to(torch.float32).view(-1, positions.shape[-1])
    angle_B1SE = (positions_BS.unsqueeze(-1) * f_E).unsqueeze(1)
    return angle_B1SE.cos().to(like.dtype), angle_B1SE.sin().to(like.dtype)
