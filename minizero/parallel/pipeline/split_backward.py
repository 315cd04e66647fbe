"""Backward in two halves: input gradients now (B), weight gradients later (W).

The stage before waits for a stage's input gradients; nobody waits for its weight gradients until the step. A schedule
that puts the second kind off has less bubble (Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241). The
halves are cut out of an ordinary autograd graph, whatever operations it holds:

    spine   the nodes between the outputs and the stage's inputs
    rib     an edge from a node of the spine to one that leads to parameters only

B asks autograd for the inputs' gradients alone. A node of the spine then computes no more than what goes on along it
(a matrix product: dy W, and not dyᵀ x), and B notes what came in at each node that has ribs. W runs those nodes once
more with what came in, asking for the ribs alone, and follows the ribs down to their parameters. Gradients end where
autograd always leaves them, in `.grad`, so whoever watches parameters sees no difference.

Some parameters cannot wait, and get their whole gradient in B (`Graph.at_once`):
- those behind nodes of Python Functions, which compute all they can each time they run, and may communicate. Our own
  hand their weight half to `parallel.deferral` then, and W collects it there. A recomputed block is such a node: its W
  is empty;
- those behind a rib on which two nodes of the spine hang: autograd cannot run one of them up to it without the other.

A stage without inputs to differentiate, the first, has an empty B, and all of backward is its W. A hook that a user
puts on an activation runs in both halves where its node has ribs; one that changes the gradient is seen, and refused.
What W does not need stays in memory until it has run: the nodes that it runs hold those below them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from minizero.parallel.deferral import Deferred, deferring

Root = tuple[GradientEdge, Tensor]
"""Where backward begins, and the gradient there."""
Incoming = dict[Any, tuple[Tensor | None, ...]]
"""Node -> the gradients of its outputs."""


@dataclass
class WeightHalf:
    """What W has still to do for one backward pass. It holds the graph, and lets go of it as it runs.

    Attributes:
        incoming: what came in at the nodes with ribs. ribs: these nodes' ribs.
        roots: where backward begins outside the spine: its outputs that depend on parameters alone.
        parameters: the leaves whose gradients are computed here.
        deferred: weight halves of our own Functions.
    """

    incoming: Incoming = field(default_factory=dict)
    ribs: dict[Any, list[Rib]] = field(default_factory=dict)
    roots: list[Root] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    deferred: Deferred = field(default_factory=Deferred)

    def run(self) -> None:
        """Add the gradients of the weights to their `.grad`; may be called once."""
        for weight, gradient in self.deferred.run():
            torch.autograd.backward([get_gradient_edge(weight)], [gradient])
        below, self.roots = self.roots, []
        while self.incoming:
            node, grads = self.incoming.popitem()
            below += run_ribs(node, grads, self.ribs.pop(node))
        if below:
            backward(below, self.parameters)


@dataclass(frozen=True)
class Rib:
    """Where a rib begins, the parameters that wait at its end, and whether no other rib leads to any of them."""

    edge: GradientEdge
    parameters: list[Tensor]
    private: bool


def backward_inputs(roots: Sequence[Root], inputs: Sequence[Tensor]) -> WeightHalf:
    """B: add the gradients of `inputs` to their `.grad`; returns what is left for W.

    Args:
        roots: of the graph of a stage's forward. inputs: leaves of it; those that need no gradient are left alone.
    """
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not roots or not wanted:
        return WholeBackward(roots=[*roots])
    graph = Graph([edge.node for edge, _ in roots], wanted)
    half = WeightHalf(ribs=graph.ribs, parameters=graph.waiting)
    half.roots = [(edge, gradient) for edge, gradient in roots if graph.is_outside(edge.node)]
    handles = [node.register_prehook(noting(node, half.incoming)) for node in graph.ribs]
    try:
        with deferring() as half.deferred:
            backward(roots, [*wanted, *graph.at_once], retain_graph=True)
    finally:
        for handle in handles:
            handle.remove()
    return half


class WholeBackward(WeightHalf):
    """A W that is the whole backward pass."""

    def run(self) -> None:
        roots, self.roots = self.roots, []
        if roots:
            backward(roots, None)


def backward(roots: Sequence[Root], leaves: Sequence[Tensor] | None, retain_graph: bool = False) -> None:
    """Add the gradients of `leaves` (None: of all there are) to their `.grad`."""
    edges, gradients = zip(*roots, strict=True)
    torch.autograd.backward(edges, gradients, inputs=leaves, retain_graph=retain_graph)


def run_ribs(node: Any, grads: tuple[Tensor | None, ...], ribs: Sequence[Rib]) -> list[Root]:
    """Follow `node`'s ribs for the gradients of its outputs; where those that meet others begin, with what comes there.

    Raises RuntimeError where a hook changes the gradients of an activation: it did so in B already.
    """
    roots = [(GradientEdge(node, number), gradient) for number, gradient in enumerate(grads) if gradient is not None]
    if not roots:
        return []
    handle = node.register_prehook(unchanged(grads))
    try:
        shared = [rib for rib in ribs if not rib.private]
        leaves = [leaf for rib in ribs if rib.private for leaf in rib.parameters]
        if leaves:
            backward(roots, leaves, retain_graph=bool(shared))
        if not shared:
            return []
        edges, gradients = zip(*roots, strict=True)
        found = torch.autograd.grad(edges, [rib.edge for rib in shared], gradients, allow_unused=True)
        return [(rib.edge, gradient) for rib, gradient in zip(shared, found, strict=True) if gradient is not None]
    finally:
        handle.remove()


def unchanged(noted: tuple[Tensor | None, ...]) -> Callable[[tuple[Tensor | None, ...]], None]:
    """A hook that raises when what comes in is not what was noted."""

    def compare(grads: tuple[Tensor | None, ...]) -> None:
        for before, now in zip(noted, grads, strict=True):
            if before is not None and now is not None and before.data_ptr() != now.data_ptr():
                raise RuntimeError(
                    "a hook changes the gradient of an activation in a stage whose backward is in two halves, where it "
                    "acts twice; legal: a schedule with BW (gpipe, one_f_one_b, interleaved), or hooks that only look"
                )

    return compare


def noting(node: Any, incoming: Incoming) -> Callable[[tuple[Tensor | None, ...]], None]:
    """A hook that writes down what comes in at `node`."""

    def note(grads: tuple[Tensor | None, ...]) -> None:
        incoming[node] = grads

    return note


class Graph:
    """The graph behind some outputs, cut into spine and ribs.

    Attributes:
        ribs: of each node of the spine that has some that wait.
        waiting: leaves whose gradients W computes. at_once: those whose gradients B does.
    """

    def __init__(self, roots: Sequence[Any], inputs: Sequence[Tensor]) -> None:
        self._inputs = {id(tensor) for tensor in inputs}
        self._in_spine: dict[Any, bool] = {}
        self._leads_to: dict[Any, frozenset[Tensor]] = {}
        self._above: dict[Any, set[Any]] = {}
        for node in from_below(roots):
            self._enter(node)
        edges = {node: self._edges_of(node) for node, inside in self._in_spine.items() if inside}
        waits = {
            node: [] if isinstance(node, BackwardCFunction) else [e for e in found if self._above[e[0]] == {node}]
            for node, found in edges.items()
        }
        at_once = {
            leaf
            for node, found in edges.items()
            for e in found
            if e not in waits[node]
            for leaf in self._leads_to[e[0]]
        }
        outside = [root for root in roots if root is not None and self.is_outside(root)]
        ends = [*(e for found in waits.values() for e in found), *((root, 0) for root in outside)]
        visits = Counter(below for end, _ in ends for below in from_below([end]))
        self.ribs: dict[Any, list[Rib]] = {}
        for node, found in waits.items():
            for end, number in found:
                if leaves := [leaf for leaf in self._leads_to[end] if leaf not in at_once]:
                    private = all(visits[below] < 2 for below in from_below([end]))
                    self.ribs.setdefault(node, []).append(Rib(GradientEdge(end, number), leaves, private))
        waiting = {leaf for end, _ in ends for leaf in self._leads_to[end]}
        self.at_once, self.waiting = [*at_once], [*(waiting - at_once)]

    def is_outside(self, node: Any) -> bool:
        """Whether a root leads to parameters and to no input."""
        return not self._in_spine[node] and bool(self._leads_to[node])

    def _enter(self, node: Any) -> None:
        leaf = getattr(node, "variable", None)
        below = [edge for edge, _ in node.next_functions if edge is not None]
        is_input = leaf is not None and id(leaf) in self._inputs
        self._in_spine[node] = is_input or any(self._in_spine[each] for each in below)
        own = frozenset() if leaf is None or is_input else frozenset((leaf,))
        self._leads_to[node] = own.union(*(self._leads_to[each] for each in below))
        for each in below:
            self._above.setdefault(each, set()).add(node)

    def _edges_of(self, node: Any) -> list[tuple[Any, int]]:
        """The ribs of a node of the spine, each once."""
        edges = dict.fromkeys(node.next_functions)
        return [(b, n) for b, n in edges if b is not None and not self._in_spine[b] and self._leads_to[b]]


def from_below(roots: Sequence[Any]) -> list[Any]:
    """All nodes behind `roots`, each after those that it leads to."""
    order: list[Any] = []
    stack = [(root, False) for root in roots if root is not None]
    seen: set[Any] = set()
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(below, False) for below, _ in node.next_functions if below is not None]
    return order
