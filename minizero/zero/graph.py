"""What a backward pass from a loss will do, read from the autograd graph before it starts.

Two questions: which leaves get a gradient, and through which nodes the pass enters the part of the graph that a unit's
forward made. The outputs of the forward are not the only way in: a unit may have left another tensor behind (an
auxiliary loss, a value kept on the module) that reaches the loss around them.

Nodes carry the number in which they were made, so a forward's nodes are those made between its beginning and its end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
REMEMBERED = 1 << 12  # forwards without a step between them; the graphs of older ones are gone
NO_NUMBER = 1 << 63  # leaves have the largest number there is


def edges_behind(loss: Tensor) -> list[tuple[Any, Any]]:
    """(node, node whose gradient it computes), each edge once; the loss's own node stands behind None."""
    edges = [(None, loss.grad_fn)]
    stack, seen = [loss.grad_fn], {loss.grad_fn}
    while stack:
        node: Any = stack.pop()
        for parent, _ in node.next_functions:
            if parent is None:
                continue
            edges.append((node, parent))
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return edges


def leaves_of(edges: Iterable[tuple[Any, Any]]) -> set[Tensor]:
    """The leaves that the pass will reach."""
    return {node.variable for _, node in edges if hasattr(node, "variable")}


class MadeBy(Generic[T]):
    """Remembers who made which nodes."""

    def __init__(self) -> None:
        self._begins: deque[int] = deque(maxlen=REMEMBERED)
        self._ends: deque[tuple[int, T]] = deque(maxlen=REMEMBERED)

    def add(self, begin: int, end: int, maker: T) -> None:
        """Nodes numbered [begin, end) are `maker`'s; calls come in the order of the numbers."""
        self._begins.append(begin)
        self._ends.append((end, maker))

    def clear(self) -> None:
        self._begins.clear()
        self._ends.clear()

    def entries(self, edges: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, T]]:
        """(node, maker) wherever a pass over `edges` enters a maker's nodes from outside."""
        begins, ends = list(self._begins), list(self._ends)

        def forward_of(node: Any) -> int | None:
            number = NO_NUMBER if node is None else node._sequence_nr()
            index = bisect_right(begins, number) - 1
            return index if index >= 0 and number < ends[index][0] else None

        for after, node in edges:
            index = forward_of(node)
            if index is not None and forward_of(after) != index:
                yield node, ends[index][1]


def next_number() -> int:
    """The number of the next node that this thread makes."""
    with torch.enable_grad():
        made: Any = torch.ones((), requires_grad=True).neg().grad_fn
    return made._sequence_nr() + 1
