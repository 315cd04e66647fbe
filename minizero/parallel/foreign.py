"""What is known of transformers' models without importing transformers: who has one has imported it."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from torch import nn

from minizero.utils.undo import Undo


def is_foreign(module: nn.Module) -> bool:
    """Whether `module` is a transformers model; without importing transformers."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(module, library.PreTrainedModel)


def foreign_decoders(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of each transformers decoder in `model`, without its head."""
    return [(n, m) for n, m in model.named_modules() if is_foreign(m) and m.base_model is m]


def has_causal_loss(model: Any) -> bool:
    """Whether `model` is a transformers model that computes the next-token loss from its own logits."""
    return is_foreign(model) and getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss"


def without_cache(decoder: Any) -> Undo:
    """Turn a transformers decoder's cache off: it would be filled for nobody, or a second time in backward."""
    before, decoder.config.use_cache = decoder.config.use_cache, False
    return Undo(partial(setattr, decoder.config, "use_cache", before))
