"""The models: plain torch decoders with HuggingFace's parameter names, which know nothing of processes or shards."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from minizero.config.schema import ModelConfig
from minizero.models.gpt2 import GPT2
from minizero.models.llama import Llama

MODELS: dict[str, Callable[[ModelConfig, int, int], nn.Module]] = {"llama": Llama, "gpt2": GPT2}


def build(config: ModelConfig, vocab_size: int, max_sequence_length: int) -> nn.Module:
    """The configured model, with freshly initialized weights, or without memory under `torch.device("meta")`.

    Its forward takes `input_ids` (int64) and returns `logits_BSV`. Given `labels` too (the token after each
    input, or -100 where there is none to predict), it returns `(loss_sum, token_count)`.

    Raises ValueError for settings that the family does not have.
    """
    return MODELS[config.family](config, vocab_size, max_sequence_length)
