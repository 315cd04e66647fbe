"""The GPT-2 decoder (Radford et al. 2019): LayerNorm, learned positions, GELU.

Names and layouts of the parameters are those of HuggingFace's `GPT2LMHeadModel`, so weights move either way unchanged;
hence `Conv1D`, which keeps its weight as (in, out), and one `c_attn` for queries, keys and values.

Shape suffixes: B batch, S sequence, H hidden, N heads, D head width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minizero.config.schema import ModelConfig
from minizero.models.dropout import Dropout
from minizero.models.hf import HuggingFaceNames, to_hf
from minizero.models.layers import (
    INIT_STD,
    CausalAttention,
    Embedding,
    LayerNorm,
    Linear,
    SummedCrossEntropy,
    positions_and_documents,
    residual_std,
    split_heads,
)
from minizero.utils.forward import running


class GPT2(nn.Module, HuggingFaceNames):
    """The decoder with its language-model head: see `minizero.models.build` for what goes in and out.

    Learned positions end at `max_sequence_length`; a longer input raises ValueError.
    """

    tensor_plan: ClassVar[dict[str, str]] = {
        "transformer.wte": "vocab",
        "transformer.h.0": "sequence_begin",
        "transformer.h.*.ln_1": "sequence",
        "transformer.h.*.attn.c_attn": "colwise_fused",
        "transformer.h.*.attn.attend.dropout": "heads",
        "transformer.h.*.attn.c_proj": "rowwise",
        "transformer.h.*.attn.resid_dropout": "sequence",
        "transformer.h.*.ln_2": "sequence",
        "transformer.h.*.mlp.c_fc": "colwise",
        "transformer.h.*.mlp.c_proj": "rowwise",
        "transformer.h.*.mlp.dropout": "sequence",
        "transformer.ln_f": "sequence",
        "lm_head": "vocab_head",
    }
    """How layers may be cut over ranks; read by `minizero.parallel.plan`."""

    pipeline_order: ClassVar[tuple[str, ...]] = (
        "transformer.wte",
        "transformer.wpe",
        "transformer.drop",
        "transformer.h",
        "transformer.ln_f",
        "lm_head",
    )
    """Modules that hidden states pass, in order; where a pipeline may cut them."""

    context_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "labels", "position_ids")
    """Arguments whose dim 1 is the sequence; labels are the tokens that follow."""

    hf_base: ClassVar[str] = "transformer"

    def __init__(self, config: ModelConfig, vocab_size: int, max_sequence_length: int) -> None:
        super().__init__()
        if config.num_kv_heads not in (None, config.num_heads):
            raise ValueError(f"model.num_kv_heads = {config.num_kv_heads}: a gpt2 has as many as num_heads")
        if config.head_dim not in (None, config.hidden_size // config.num_heads):
            raise ValueError(f"model.head_dim = {config.head_dim}: a gpt2's heads have hidden_size / num_heads")
        if config.qk_norm:
            raise ValueError("model.qk_norm = true has no effect on a gpt2; legal: false")
        if config.rope_scaling.type != "none":
            raise ValueError(f"model.rope_scaling.type = {config.rope_scaling.type}: a gpt2 has no rotary positions")
        self.settings, self.vocab_size, self.max_sequence_length = config, vocab_size, max_sequence_length
        self.transformer = Transformer(config, vocab_size, max_sequence_length)
        self.lm_head = Linear(config.hidden_size, vocab_size, std=INIT_STD)
        self.loss = SummedCrossEntropy()
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        logits_BSV = self.lm_head(self.transformer(input_ids, position_ids))
        return logits_BSV if labels is None else self.loss(logits_BSV, labels)

    @staticmethod
    def spelled_out(config: ModelConfig) -> ModelConfig:
        """See `HuggingFaceNames.spelled_out`."""
        sizes = {"head_dim": config.head_dim or config.hidden_size // config.num_heads}
        sizes |= {"intermediate_size": mlp_width(config), "num_kv_heads": config.num_kv_heads or config.num_heads}
        return config.model_copy(update=sizes)

    def hf_config(self) -> dict[str, Any]:
        """See `HuggingFaceNames.hf_config`."""
        found = to_hf("gpt2", "GPT2LMHeadModel", self.settings, self.vocab_size, self.max_sequence_length)
        return found | dict(self.origin)


class Transformer(nn.Module):
    """Embeddings, blocks and final norm: tokens to hidden states."""

    def __init__(self, config: ModelConfig, vocab_size: int, max_sequence_length: int) -> None:
        super().__init__()
        self.wte = Embedding(vocab_size, config.hidden_size)
        self.wpe = Embedding(max_sequence_length, config.hidden_size)
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_f = LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        forward, longest = running(), self.wpe.num_embeddings
        length = forward.total if forward is not None and forward.total else input_ids.shape[1]
        if position_ids is None and length > longest:
            raise ValueError(f"the input has {length} tokens, but this gpt2 has positions for {longest}")
        positions, documents_BS = positions_and_documents(input_ids, position_ids)
        x_BSH = self.drop(self.wte(input_ids) + self.wpe(positions))
        for block in self.h:
            x_BSH = block(x_BSH, documents_BS)
        return self.ln_f(x_BSH)


class Block(nn.Module):
    """Attention and MLP, each normed first and added to the residual stream."""

    last_product_is_unread: ClassVar[bool] = True
    """It ends in a matrix product whose value nobody keeps; read by `minizero.parallel.last_product`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BSH: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        x_BSH = x_BSH + self.attn(self.ln_1(x_BSH), documents_BS)
        return x_BSH + self.mlp(self.ln_2(x_BSH))


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.head_dim = hidden // config.num_heads
        self.c_attn = Conv1D(hidden, 3 * hidden)
        self.c_proj = Conv1D(hidden, hidden, std=residual_std(config.num_layers))
        self.attend = CausalAttention(config.attention_dropout, eager=config.attention == "eager")
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x_BSH: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        q_BNSD, k_BNSD, v_BNSD = (split_heads(part, self.head_dim) for part in self.c_attn(x_BSH).chunk(3, dim=-1))
        return self.resid_dropout(self.c_proj(self.attend(q_BNSD, k_BNSD, v_BNSD, documents_BS)))


class MLP(nn.Module):
    """down(gelu(up(x))), with the tanh approximation of GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = mlp_width(config)
        self.c_fc = Conv1D(config.hidden_size, width)
        self.c_proj = Conv1D(width, config.hidden_size, std=residual_std(config.num_layers))
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x_BSH), approximate="tanh")))


def mlp_width(config: ModelConfig) -> int:
    """As given, or 4 H."""
    return config.intermediate_size or 4 * config.hidden_size


class Conv1D(nn.Module):
    """A linear layer with its weight stored as (in, out), the transpose of `nn.Linear`'s."""

    def __init__(self, in_features: int, out_features: int, std: float = INIT_STD) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return F.linear(x_BSH, self.weight.t(), self.bias)
