"""What a backward pass from a loss will do, read from the autograd graph before it starts.

Two questions: which leaves get a gradient, and through which nodes the pass enters the part of the graph that a unit's
forward made. The outputs of the forward are not the only way in: a unit may have left another tensor behind (an
auxiliary loss, a value kept on the module) that reaches the loss around them.

Which nodes a forward made, `utils.autograd.MadeBy` remembers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


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
