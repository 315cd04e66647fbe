"""Which optimizers there are, and the parameters of each: checked when the settings are read, not when training begins.

ZeRO hands an optimizer 1-D slices of parameters. That is the same training only if the update of one element depends on
no other element: true for the optimizers listed here, false for those that look at a matrix's rows or a tensor's norm.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

TORCH = ("Adam", "AdamW", "SGD", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "Lion": ("lr", "betas", "weight_decay"),  # minizero.optim.lion
    **{name: tuple(inspect.signature(getattr(torch.optim, name)).parameters)[1:] for name in TORCH},
}


def canonical_name(type_: str) -> str:
    """The optimizer called `type_`, in whatever case. Raises ValueError with the legal names."""
    by_lower = {name.lower(): name for name in ARGUMENTS}
    if type_.lower() in by_lower:
        return by_lower[type_.lower()]
    is_torch = inspect.isclass(getattr(torch.optim, type_, None)) and type_ != "Optimizer"
    why = "is not element-wise, and slices of parameters would change its updates" if is_torch else "is not known"
    raise ValueError(f"type {type_!r} {why}; legal: {', '.join(ARGUMENTS)}")


def check_params(type_: str, weight_decay: float, params: dict[str, Any]) -> None:
    """Raise ValueError naming a parameter that the optimizer does not take, and those that it does."""
    name = canonical_name(type_)
    legal = ARGUMENTS[name]
    given = [*params, *(["weight_decay"] if weight_decay else [])]  # Rprop has none
    if unknown := sorted(set(given) - set(legal)):
        raise ValueError(f"params: {name} takes no {', '.join(unknown)}; legal: {', '.join(legal)}")
    if "betas" in params:
        betas = params["betas"]
        numbers = isinstance(betas, list | tuple) and all(isinstance(b, int | float) and 0 <= b < 1 for b in betas)
        if not numbers or len(betas) != 2:
            raise ValueError(f"params: betas is {betas!r}; legal: two numbers >= 0 and < 1")
