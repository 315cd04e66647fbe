"""Which part of a program made which autograd nodes.

Nodes carry the number in which they were made, so what ran between two moments made those numbered between them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
REMEMBERED = 1 << 12  # makers without a step between them; the graphs of older ones are gone
NO_NUMBER = 1 << 63  # leaves have the largest number there is


def next_node() -> int:
    """The number of the next node that this thread makes."""
    number: int = torch.autograd._get_sequence_nr()
    return number


def newest_node() -> int:
    """The number of the node that this thread made last."""
    return next_node() - 1


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

    def of(self, node: Any) -> T | None:
        """Who made `node`; None: nobody known."""
        index = bisect_right(self._begins, node._sequence_nr()) - 1
        return self._ends[index][1] if index >= 0 and node._sequence_nr() < self._ends[index][0] else None

    def entries(self, edges: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, T]]:
        """(node, maker) wherever a pass over `edges` enters a maker's nodes from outside."""
        begins, ends = list(self._begins), list(self._ends)

        def place_of(node: Any) -> int | None:
            number = NO_NUMBER if node is None else node._sequence_nr()
            index = bisect_right(begins, number) - 1
            return index if index >= 0 and number < ends[index][0] else None

        for after, node in edges:
            index = place_of(node)
            if index is not None and place_of(after) != index:
                yield node, ends[index][1]
