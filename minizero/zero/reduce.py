"""When gradients are reduced: in one order that no rank's data can change.

The order is the reverse of the forward pass, root last. A unit is launched when all its gradients have arrived *and*
every unit before it in that order has been launched; what is left when backward ends is launched then, missing
gradients as zeros. So two ranks that took different branches still call the same reductions in the same order.

Which gradients a pass will bring is read from the graph behind the loss before it starts, so a unit is complete the
moment its last one arrives, and a unit that this rank skipped is complete at once. At stage 3 this also rules out
deadlock: a unit is gathered before it is reduced, on every rank, whichever of them used it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import ref

import torch
from torch import Tensor, nn

from minizero.zero.policy import Policy
from minizero.zero.unit import Unit

IN_FLIGHT = 1  # reductions running behind backward: with the unit now in backward, two are whole at once


class GradientReducer:
    """Drives `Unit.reduce` during backward passes.

    Args:
        units: root first.
        policy: overlap, and where micro-batches accumulate.
        on_unit_done: called when a unit has its last gradient of this pass.
        before_reduce: called before a unit is reduced.
    """

    def __init__(
        self,
        units: list[Unit],
        policy: Policy,
        on_unit_done: Callable[[Unit], None],
        before_reduce: Callable[[Unit], None],
    ) -> None:
        self.policy = policy
        self.order = [*reversed(units[1:]), units[0]]
        self.on_unit_done = on_unit_done
        self.before_reduce = before_reduce
        self.active = False
        self._reduces = False
        self._next = 0
        self._in_flight: list[Unit] = []
        self._early: set[Unit] = set()  # reduced before the step, in a pipeline's schedule
        self.hooks = [p.register_post_accumulate_grad_hook(self._hook(unit)) for unit in units for p in unit.trainable]

    def set_forward_order(self, units: list[Unit]) -> None:
        """Take the agreed order of the forward pass (root left out)."""
        root = self.order[-1]
        self.order = [*reversed(units), root]

    def begin(self, used: set[Tensor], *, boundary: bool, sync: bool) -> None:
        """A backward pass that reaches the leaves `used` begins.

        Args:
            boundary: it is the last before the step. sync: it is not inside `no_sync`.
        """
        self.active = True
        self._reduces = sync and (boundary or not self.policy.local_accumulation)
        self._next = 0
        for unit in self.order:
            unit.reduced = False
            unit.pending = {p for p in unit.trainable if p in used}

    def end(self) -> None:
        """The backward pass is over: launch what is left, and wait for everything."""
        for unit in self.order:
            unit.pending = set()
        if self._reduces:
            while self._next < len(self.order):
                self._launch_next()
            self._drain(0)
        self.active = False

    def flush(self, everything: bool = False) -> None:
        """Before a step: reduce what is still held whole (a boundary that fell inside `no_sync`).

        With `everything`, also where this rank happens to hold nothing: in a pipeline no pass has reduced it.
        """
        if everything or any(unit.has_local_gradients for unit in self.order):
            self.launch([unit for unit in self.order if unit not in self._early])
            self._drain(0)
        self._early.clear()

    def reduce_early(self, units: set[Unit]) -> None:
        """Start to reduce these units in the middle of a window, outside any pass; the step reduces the others."""
        self._early |= units
        self.launch([unit for unit in self.order if unit in units])

    def abort(self) -> None:
        """A backward pass broke off: forget it. Messages on the way are not waited for."""
        self.active = False
        self._in_flight = []
        self._early.clear()
        for unit in self.order:
            unit.pending = set()

    def _hook(self, unit: Unit) -> Callable[[Tensor], None]:
        """What a parameter calls when its gradient is there. Weak: the garbage collector does not see into hooks."""
        reducer_ref, unit_ref = ref(self), ref(unit)

        def gradient_arrived(parameter: Tensor) -> None:
            reducer, unit = reducer_ref(), unit_ref()
            assert isinstance(parameter, nn.Parameter)
            if reducer is not None and unit is not None:
                reducer._gradient_arrived(unit, parameter)

        return gradient_arrived

    def _gradient_arrived(self, unit: Unit, parameter: nn.Parameter) -> None:
        if not self.active and not unit.widens(parameter):
            return  # a pipeline's backward: autograd adds up, and `reduce_early` is told when a unit is complete
        if unit.reduced and self.active:
            raise RuntimeError(
                f"unit {unit.name} got a gradient after it was reduced: a re-entrant checkpoint runs backward in "
                "parts. Use torch.utils.checkpoint with use_reentrant=False."
            )
        with torch.no_grad():
            if not self._reduces or self.policy.local_accumulation:
                self._accumulate_locally(unit, parameter)
        unit.pending.discard(parameter)
        if self.active and not unit.pending:
            self.on_unit_done(unit)
            self._advance()

    def _accumulate_locally(self, unit: Unit, parameter: nn.Parameter) -> None:
        # A single micro-batch is reduced as it is; the wide copy begins with the first one that has to wait.
        if not self._reduces or unit.has_wide_sum(parameter):
            unit.keep_local(parameter)

    def _advance(self) -> None:
        """Launch, in order, every unit whose gradients are all here. The root waits for the end."""
        at_once = self.policy.overlap or not self.policy.local_accumulation
        while self._reduces and at_once and self._next < len(self.order) - 1 and not self.order[self._next].pending:
            self._launch_next()
            self._drain(IN_FLIGHT if self.policy.overlap else 0)

    def _launch_next(self) -> None:
        unit = self.order[self._next]
        self._next += 1
        self.before_reduce(unit)
        self.launch([unit])

    def launch(self, units: Sequence[Unit]) -> None:
        """Start to reduce these units, one after the other."""
        for unit in units:
            unit.reduce()
            self._in_flight.append(unit)
            self._drain(IN_FLIGHT)

    def _drain(self, leave: int) -> None:
        while len(self._in_flight) > leave:
            self._in_flight.pop(0).finish_reduce()
