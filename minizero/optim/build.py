"""Builds the configured optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from minizero.config.optimizers import ARGUMENTS, TORCH, canonical_name
from minizero.config.schema import OptimizerConfig
from minizero.optim.lion import Lion

ELEMENT_WISE: dict[str, type[torch.optim.Optimizer]] = {
    "Lion": Lion,
    **{name: getattr(torch.optim, name) for name in TORCH},
}


def build_optimizer(config: OptimizerConfig, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """The configured optimizer over `parameters` (tensors or groups). Raises ValueError naming a wrong argument."""
    name = canonical_name(config.type)
    legal = ARGUMENTS[name]
    arguments = {"lr": config.lr, "weight_decay": config.weight_decay, **config.params}
    if "weight_decay" not in legal:
        del arguments["weight_decay"]
    if "fused" in legal and not {"fused", "foreach", "capturable", "differentiable", "maximize"} & set(arguments):
        arguments["fused"] = True
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    try:
        return ELEMENT_WISE[name](parameters, **arguments)
    except TypeError as error:
        raise ValueError(f"optimizer.params for {name}: {error}") from error
