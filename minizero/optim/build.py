"""Builds the configured optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from minizero.config.optimizers import ARGUMENTS, TORCH, canonical_name
from minizero.config.schema import OptimizerConfig
from minizero.kernels import Backend
from minizero.optim.fused_adamw import OPTIONS, FusedAdamW
from minizero.optim.lion import Lion

ELEMENT_WISE: dict[str, type[torch.optim.Optimizer]] = {
    "Lion": Lion,
    **{name: getattr(torch.optim, name) for name in TORCH},
}


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[Any], kernels: Backend = "torch"
) -> torch.optim.Optimizer:
    """The configured optimizer over `parameters` (tensors or groups). Raises ValueError naming a wrong argument.

    With `kernels` "triton", an AdamW that they can step is one.
    """
    name = canonical_name(config.type)
    legal = ARGUMENTS[name]
    arguments = {"lr": config.lr, "weight_decay": config.weight_decay, **config.params}
    if "weight_decay" not in legal:
        del arguments["weight_decay"]
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    if name == "AdamW" and kernels == "triton" and set(arguments) <= set(OPTIONS):
        return FusedAdamW(parameters, kernels, **{"betas": (0.9, 0.999), **arguments})
    if "fused" in legal and not {"fused", "foreach", "capturable", "differentiable", "maximize"} & set(arguments):
        arguments["fused"] = True
    try:
        return ELEMENT_WISE[name](parameters, **arguments)
    except TypeError as error:
        raise ValueError(f"optimizer.params for {name}: {error}") from error
