"""Weight gradients now, or later.

Backward through a matrix product is two products: the input gradient, which the layers before it wait for, and the
weight gradient, which nobody waits for until the step. Our layers compute the second through `weight_gradient`; a
schedule that wants the first alone puts its backward inside `deferring` and runs the second when it has nothing better
to do (Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241, call the two B and W).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# One stack for the process. Not a context variable: on a GPU autograd runs backward in a thread of its own, which sees
# none of those that were set in the thread that called it.
_OPEN: list[Deferred] = []


class Deferred:
    """The weight halves of the backward passes that ran inside one `deferring`."""

    def __init__(self) -> None:
        self._halves: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()

    def __len__(self) -> int:
        return len(self._halves)

    def add(self, weight: Tensor, compute: Callable[[], Tensor]) -> None:
        self._halves.append((weight, compute))

    def run(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, gradient of its shape), in the order of the backward pass; never communicates.

        What a gradient is computed from is freed before it is handed out. A parameter that was used twice comes twice:
        its gradient is the sum.
        """
        while self._halves:
            yield self._run_first()

    @torch.no_grad()
    def _run_first(self) -> tuple[Tensor, Tensor]:
        weight, compute = self._halves.popleft()
        return weight, compute()


@contextmanager
def deferring() -> Iterator[Deferred]:
    """Inside, backward leaves weight gradients to `Deferred.run`: the parameters' `.grad` stays as it is."""
    deferred = Deferred()
    _OPEN.append(deferred)
    try:
        yield deferred
    finally:
        _OPEN.remove(deferred)


def weight_gradient(weight: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
    """What an autograd Function returns as the gradient of `weight`: `compute()`, or None where that is deferred.

    Args:
        weight: as the Function's user gave it. What is no leaf (a weight computed from others) is never deferred, as
            the graph behind it needs the gradient in this pass.
        compute: gives the gradient, in the shape of `weight`; holds what it needs.
    """
    if not _OPEN or not weight.is_leaf:
        return compute()
    _OPEN[-1].add(weight, compute)
    return None
