"""How a model is called on a batch, and where its loss is in what it returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Loss = Tensor | tuple[Tensor, Tensor]
"""A mean, or a pair (sum over tokens, number of tokens)."""


def arguments(batch: Any) -> tuple[Any, dict[str, Any]]:
    """How a model is called on a batch: a dict's items by name, a tuple's by place, anything else as it is."""
    if isinstance(batch, dict):
        return (), batch
    return (batch if isinstance(batch, tuple | list) else (batch,)), {}


def checked(loss: Loss) -> tuple[Tensor, Any]:
    """(value, token count or None) of a loss. Raises ValueError for what backward cannot begin at."""
    value, tokens = loss if isinstance(loss, tuple) else (loss, None)
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:
        raise ValueError(
            "backward needs a 0-d loss that depends on trainable parameters, or a pair (loss sum, token count)"
        )
    return value, tokens


def loss_and_count(output: Any) -> Tensor:
    """float64 [2]: the loss in a model's output, and the tokens behind it, or 1 for a mean."""
    loss = loss_of(output)
    value, count = loss if isinstance(loss, tuple) else (loss, torch.ones(()))
    if value.dim() != 0:
        raise ValueError(f"the model returned a loss of shape {tuple(value.shape)}; an evaluation needs a 0-d loss")
    return torch.stack([value.detach().double(), count.double().to(value.device)])


def loss_of(output: Any) -> Loss:
    """The loss in a model's output: itself, a (sum, count) pair, `.loss`, or `["loss"]`."""
    if isinstance(output, Tensor):
        return output
    if (
        isinstance(output, tuple)
        and len(output) == 2
        and all(isinstance(part, Tensor) and part.dim() == 0 for part in output)
    ):
        return output
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, dict):
        loss = output.get("loss")
    if loss is None:
        raise ValueError(
            f"the model returned {type(output).__name__}; train_batch needs a 0-d loss, (sum, count), or .loss"
        )
    return loss
