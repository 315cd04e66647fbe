"""Picks the optimizer class, and refuses those that flat slices would change.

ZeRO hands an optimizer 1-D slices of parameters. That is the same training only if the update of one element depends on
no other element: true for the classes listed here, false for those that look at a matrix's rows or a tensor's norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch

from minizero.config.schema import OptimizerConfig
from minizero.optim.lion import Lion

ELEMENT_WISE: dict[str, type[torch.optim.Optimizer]] = {
    "Lion": Lion,
    **{
        name: getattr(torch.optim, name)
        for name in (
            "Adam",
            "AdamW",
            "SGD",
            "Adagrad",
            "Adadelta",
            "Adamax",
            "ASGD",
            "NAdam",
            "RAdam",
            "RMSprop",
            "Rprop",
        )
    },
}


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The element-wise optimizer called `name` (case does not matter). Raises ValueError with the legal names."""
    by_lower = {key.lower(): cls for key, cls in ELEMENT_WISE.items()}
    if name.lower() not in by_lower:
        why = (
            " is not element-wise, and slices of parameters would change its updates"
            if hasattr(torch.optim, name)
            else ""
        )
        raise ValueError(f"optimizer.type {name!r}{why or ' is not known'}; legal: {', '.join(ELEMENT_WISE)}")
    return by_lower[name.lower()]


def build_optimizer(config: OptimizerConfig, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """The configured optimizer over `parameters` (tensors or groups). Raises ValueError naming a wrong argument."""
    cls = optimizer_class(config.type)
    arguments = {"lr": config.lr, "weight_decay": config.weight_decay, **config.params}
    legal = set(inspect.signature(cls).parameters) - {"params"}
    if config.weight_decay == 0.0 and "weight_decay" not in legal:  # Rprop has none
        del arguments["weight_decay"]
    if unknown := sorted(set(arguments) - legal):
        names = ", ".join(sorted(legal))
        raise ValueError(f"optimizer.params: {cls.__name__} takes no {', '.join(unknown)}; legal: {names}")
    if "fused" in legal and not {"fused", "foreach", "capturable", "differentiable", "maximize"} & set(arguments):
        arguments["fused"] = True
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    try:
        return cls(parameters, **arguments)
    except TypeError as error:
        raise ValueError(f"optimizer.params for {cls.__name__}: {error}") from error
