"""The last matrix product of a block need not be computed again.

A second pass is run for its graph: backward reads what nodes saved, and nobody reads the block's output. Most blocks
end with a matrix product and a residual sum. The product's node saves its inputs, the sum saves nothing. So nobody
needs the product's value, nor what tensor-parallel ranks would send to sum it up. torch's own checkpoint gains the same
by ending the second pass early ("early stop").

Only a block's author can know that nobody reads the value on the side, so its class must say so: our decoders' blocks
and attention have `last_product_is_unread`, nothing else has. A forward hook inside the block is a reader, and
autocast changes dtypes that a stand-in would not follow: then the pass is run in full. Which product is the last is
learnt from the second pass before; and each time the graph is checked: every node between the product and the block's
outputs must be of a kind that reads no values. Where one is not, all later passes of that block are run in full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from minizero.utils.autograd import newest_node
from minizero.utils.forward import discarded

READ_NO_VALUES = frozenset(
    "AddBackward0 SubBackward0 ViewBackward0 UnsafeViewBackward0 ReshapeAliasBackward0 TransposeBackward0 "
    "AliasBackward0 UnsqueezeBackward0 SqueezeBackward1 CloneBackward0 _ReduceFromRegionBackward "
    "_ScatterBackward".split()
)
PRODUCTS_OF_TORCH = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
NEVER = 0

# Products of a block's second pass; `NEVER` where the last one's value turned out to be needed.
PRODUCTS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def second_pass(module: nn.Module | None, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """`run()`'s tensors, with their graph; the values of those that end in the last product may be anything.

    Args:
        module: the block, by which it is known; None, and those that do not say so: it is computed in full.
    """
    number = PRODUCTS.get(module, -1) if module is not None and may_skip(module) else NEVER
    with ProductCounter(number) if number != NEVER else nullcontext() as products:
        outputs = run()
    if products is None or module is None:
        return outputs
    if products.skipped is None:
        PRODUCTS[module] = products.seen  # 0 where there is none: the same as never
        return outputs
    if is_unread(outputs, products.skipped):
        return outputs
    PRODUCTS[module] = NEVER
    return run()


def may_skip(module: nn.Module) -> bool:
    """Whether the block's last product could be left out at all."""
    if not getattr(module, "last_product_is_unread", False) or torch.is_autocast_enabled("cpu"):
        return False
    if torch.cuda.is_available() and torch.is_autocast_enabled("cuda"):
        return False
    return not any(part._forward_hooks for part in module.modules())


class ProductCounter(TorchFunctionMode):
    """Counts matrix products, and leaves out the computation of number `last`.

    Attributes:
        seen: calls. skipped: number of the autograd node of the one that was left out.
    """

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last, self.seen = last, 0
        self.skipped: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += func in PRODUCTS_OF_TORCH
        if func not in PRODUCTS_OF_TORCH or self.seen != self.last:
            return func(*args, **(kwargs or {}))
        skip = self._skip_linear if func is F.linear else self._skip_matmul
        return skip(*args, **(kwargs or {}))

    def _skip_linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not torch.is_grad_enabled():  # inside a Function of ours, whose node has just been made
            return self._skip(input.new_empty(*input.shape[:-1], weight.shape[0]))
        return self._skip(_UnreadLinear.apply(input, weight, bias))

    def _skip_matmul(self, input: Tensor, other: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or input.dim() < 2 or input.shape[:-2] != other.shape[:-2]:
            return torch.matmul(input, other)
        return self._skip(_UnreadMatmul.apply(input, other))

    def _skip(self, y: Tensor) -> Tensor:
        self.skipped = newest_node() if y.grad_fn is None else y.grad_fn._sequence_nr()
        discarded.append(y.untyped_storage()._cdata)
        return y

    def __exit__(self, *failure: Any) -> None:
        if self.skipped is not None:
            discarded.pop()
        super().__exit__(*failure)


class _UnreadLinear(Function):
    """`F.linear` without its value: only its place in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x, weight), dy = ctx.saved_tensors, grads[0]
        dy_TF, x_TH = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = (dy_TF @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        dw = dy_TF.t() @ x_TH if ctx.needs_input_grad[1] else None
        return dx, dw, dy_TF.sum(dim=0) if ctx.needs_input_grad[2] else None


class _UnreadMatmul(Function):
    """a[.., R, K] b[.., K, C] without its value: only its place in the graph."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a.new_empty(*a.shape[:-1], b.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (a, b), dy = ctx.saved_tensors, grads[0]
        da = dy @ b.transpose(-1, -2) if ctx.needs_input_grad[0] else None
        return da, a.transpose(-1, -2) @ dy if ctx.needs_input_grad[1] else None


def is_unread(outputs: Sequence[Tensor], skipped: int) -> bool:
    """Whether every node between `outputs` and the node numbered `skipped` reads no values."""
    leads: dict[Any, bool] = {}

    def leads_there(node: Any) -> bool:
        """Nodes with smaller numbers were made before, and have nothing to do with it."""
        if node is None or hasattr(node, "variable"):
            return False
        if node not in leads:
            number = node._sequence_nr()
            leads[node] = number == skipped or (
                number > skipped and any([leads_there(below) for below, _ in node.next_functions])
            )
        return leads[node]

    for output in outputs:
        leads_there(output.grad_fn)
    return all(
        node._sequence_nr() == skipped or node.name() in READ_NO_VALUES for node, is_above in leads.items() if is_above
    )
