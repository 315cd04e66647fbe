"""A matrix product whose backward is in two halves, so that communication fits between them.

Autograd runs the nodes that are ready in the reverse of the order in which they were made. A layer uses that:

    made in forward       await -> anchor of W -> enter the region -> product
    run in backward       product: dx = dy W; keeps x and dy
                          enter:   starts to sum dx over ranks
                          anchor:  dW = dyᵀ x, while the sum is on its way
                          await:   waits for it

(`dist/conjugate.py` has the nodes that enter and await.) The **anchor** is a node between the product and its weight.
No value goes through it: the product reads the weight in its own forward, when the parameter is whole for sure.

Shape suffixes: T tokens (all leading dims), H inputs, F outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minizero.parallel.deferral import weight_gradient


@dataclass
class Stash:
    """What the product's backward leaves for the anchor's: the weight half, not computed yet."""

    compute: Callable[[], Tensor] | None = None

    def take(self) -> Callable[[], Tensor]:
        compute, self.compute = self.compute, None
        assert compute is not None, "an anchor runs after the product that hangs on it"
        return compute


@dataclass
class Anchor:
    """Where one product hangs on its weight.

    Attributes:
        token: [0], differentiable where the weight is. stash: see `Stash`; apart from the token, which knows the graph
            that holds the stash.
    """

    token: Tensor
    stash: Stash


def anchor(weight: Tensor) -> Anchor:
    """An anchor for one use of `weight`; made before what shall run before its gradient in backward."""
    stash = Stash()
    return Anchor(_Anchor.apply(weight, stash), stash)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, hangs_on: Anchor, transposed: bool = False) -> Tensor:
    """x[.., H] Wᵀ + b -> y[.., F].

    Args:
        weight: [F, H], or [H, F] where `transposed`. bias: [F] or None. hangs_on: a fresh anchor of `weight`.
    """
    return _Linear.apply(x, weight.detach(), bias, hangs_on.token, hangs_on.stash, transposed)


class _Anchor(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, stash: Stash) -> Tensor:
        ctx.weight, ctx.stash = weight, stash
        ctx.set_materialize_grads(False)
        return torch.empty(0, dtype=weight.dtype, device=weight.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return weight_gradient(ctx.weight, ctx.stash.take()), None


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor, stash: Stash, transposed: bool
    ) -> Tensor:
        ctx.stash, ctx.transposed = stash, transposed
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        transposed = ctx.transposed
        dy = grads[0].to(weight.dtype)  # it differs under autocast only, which has not seen this product
        dx = (dy @ (weight.t() if transposed else weight)) if ctx.needs_input_grad[0] else None
        db = dy.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[2] else None
        if ctx.needs_input_grad[3]:
            x = x.detach()  # what waits for its turn must not keep the graph
            ctx.stash.compute = lambda: weight_half(x.to(dy.dtype), dy, transposed)
        return dx, None, db, None, None, None


def weight_half(x: Tensor, dy: Tensor, transposed: bool) -> Tensor:
    """dW from x[.., H] and dy[.., F]: [F, H], or [H, F] where `transposed`."""
    x_TH, dy_TF = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return x_TH.t() @ dy_TF if transposed else dy_TF.t() @ x_TH
