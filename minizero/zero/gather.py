"""Stage 3: when parameters are whole.

A pass over the model (one forward of the root, or one backward) follows a **plan**: the units in the order of the first
forward, agreed over the ranks; backward runs it in reverse. Before a unit computes, every plan entry up to it is
gathered, also those this rank skipped, so a rank that took another branch still joins the same collectives; the next
entry is prefetched. What is left of the plan when a forward ends is caught up with.

Who releases what:
- a unit's forward ends, also by an exception -> released, unless backward has begun to use it;
- a unit's last gradient has arrived -> released; with frozen parameters also its input gradients must be out, since
  their computation still reads weights after the last trainable gradient;
- held units (the root, and any whose parameters were seen used outside their own forward) stay whole from the root's
  forward to the end of backward.

Backward makes a unit whole where it enters the unit's part of the graph: at the gradients of its outputs, or at any
other node of its forward that the loss depends on (`graph.py`).

Recompute, evaluation and generation are ordinary users: a recomputed forward finds its unit whole and in backward, so
it neither gathers nor releases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from minizero.dist.collectives import CollectiveError, Communicator
from minizero.utils.autograd import MadeBy, next_node
from minizero.utils.operands import operands
from minizero.zero.unit import State, Unit


class ParameterGatherer:
    """Drives `Unit.gather` and `Unit.release` from module hooks.

    Args:
        units: root first.
        comm: the data-parallel axis.
        prefetch: gather one plan entry ahead.
        watch_reads: after the first forward, a read of a sharded parameter is an error instead of a promotion.
        on_order: called once with the agreed forward order.
    """

    def __init__(
        self,
        units: list[Unit],
        comm: Communicator,
        *,
        prefetch: bool,
        watch_reads: bool,
        on_order: Callable[[list[Unit]], None],
    ) -> None:
        self.root = units[0]
        self.units = units
        self.comm = comm
        self.prefetch = prefetch
        self.watch_reads = watch_reads
        self.on_order = on_order
        self.plan = units[1:]
        self.backward_active = False
        self._position = {unit: index for index, unit in enumerate(self.plan)}
        self._cursor: int | None = None  # next entry of the running pass; None outside a pass
        self._first_order: list[Unit] | None = []  # recorded during the first forward
        self._suspended = False
        self._made_by: MadeBy[Unit] = MadeBy()
        self._began: dict[Unit, int] = {}  # number of the next autograd node when the unit's forward began
        self._watcher: ReadWatcher | None = None
        self.hooks = list(self._register_hooks())

    # ---- hooks ----

    def _register_hooks(self) -> Iterator[RemovableHandle]:
        yield self.root.module.register_forward_pre_hook(self._before_root)
        yield self.root.module.register_forward_hook(self._after_root, always_call=True)
        for unit in self.units[1:]:
            yield unit.module.register_forward_pre_hook(self._before_unit(unit), with_kwargs=True)
            yield unit.module.register_forward_hook(self._after_unit(unit), always_call=True)
        root_parameters = {p for group in self.root.groups for p in group.parameters}
        for module in self.root.module.modules():
            if module is not self.root.module and root_parameters & set(module.parameters(recurse=False)):
                yield module.register_forward_pre_hook(self._before_part_of_root)

    def _before_root(self, module: nn.Module, args: Any) -> None:
        if self._suspended or self.backward_active:
            return
        self._cursor = 0
        for unit in self.units:
            if unit.held:
                unit.gather()
        if self.prefetch and self.plan:
            self.plan[0].gather()
        for unit in self.units:
            if unit.held:
                unit.finish_gather()
        if self._first_order is not None or self.watch_reads:
            self._watcher = ReadWatcher(self._stray_read)
            self._watcher.__enter__()

    def _after_root(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._watcher is not None:
            self._watcher.__exit__(None, None, None)
            self._watcher = None
        if self._suspended or self.backward_active or self._cursor is None:
            return
        failed = output is None
        if not failed:
            self._advance(len(self.plan))
            self._agree_on_order()
            self.comm.settle()
        self._cursor = None
        if failed:
            with suppress(CollectiveError):  # what failed is raised already
                self.release_all()
        elif not requires_grad(output):
            self.release_all()

    def _before_part_of_root(self, module: nn.Module, args: Any) -> None:
        if not self._suspended:
            self.root.make_whole()  # a part of the model called on its own

    def _before_unit(self, unit: Unit) -> Callable[..., None]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._suspended:
                return
            if not self.backward_active and self._first_order is not None and unit not in self._first_order:
                self._first_order.append(unit)
            if self.backward_active and torch.is_grad_enabled():
                unit.in_backward = True  # a checkpointed block is computed again: its backward follows
            self._make_whole_in_order(unit)
            if unit.has_frozen and torch.is_grad_enabled():
                self._watch_input_gradients(unit, (args, kwargs))
            if torch.is_grad_enabled() and not self.backward_active:
                self._began[unit] = next_node()

        return before

    def _after_unit(self, unit: Unit) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if self._suspended:
                return
            if unit in self._began:
                self._made_by.add(self._began.pop(unit), next_node(), unit)
            if torch.is_grad_enabled() and (outputs := differentiable(output)):
                register_multi_grad_hook(outputs, lambda _: self._before_backward(unit), mode="any")
            if not unit.held and not unit.in_backward:
                with suppress(CollectiveError) if output is None else nullcontext():
                    unit.release()

        return after

    def _watch_input_gradients(self, unit: Unit, inputs: Any) -> None:
        tensors = differentiable(inputs)
        if not tensors:
            return
        unit.open_inputs += 1

        def inputs_done(_: Any) -> None:
            unit.open_inputs -= 1
            self.release_if_done(unit)

        register_multi_grad_hook(tensors, inputs_done, mode="all")

    def _before_backward(self, unit: Unit) -> None:
        if self._suspended:
            return
        if not self.backward_active:
            raise RuntimeError(
                "at ZeRO stage 3 gradients are computed by engine.backward(loss), not by loss.backward()"
            )
        unit.in_backward = True
        self._make_whole_in_order(unit)

    @property
    def suspended(self) -> bool:
        """Inside `whole`."""
        return self._suspended

    # ---- passes ----

    def begin_backward(self, edges: list[tuple[Any, Any]]) -> None:
        """A pass over the graph's `edges` (see `graph.edges_behind`) begins."""
        self.backward_active = True
        for node, unit in self._made_by.entries(edges):
            node.register_prehook(self._enter(unit))
        self._cursor = 0
        for unit in self.units:
            if unit.held:
                unit.make_whole()
        if self.prefetch and self.plan:
            self._entry(0).gather()

    def _enter(self, unit: Unit) -> Callable[..., None]:
        return lambda _: self._before_backward(unit)

    def end_backward(self) -> None:
        if not self._suspended:
            self._advance(len(self.plan))
        self.unwind()

    def unwind(self) -> None:
        """Back to rest, wherever a pass ended or broke off: everything sharded."""
        self.backward_active = False
        self._cursor = None
        self._began.clear()
        self.release_all()

    def forget_graphs(self) -> None:
        """After a step: no backward pass goes through what was computed before it."""
        self._made_by.clear()

    def release_all(self) -> None:
        for unit in self.units:
            unit.in_backward = False
            unit.open_inputs = 0
            if not self._suspended:
                unit.release()

    def release_if_done(self, unit: Unit) -> None:
        """After a gradient: free the unit if nothing of this backward pass can read it any more."""
        if (
            self.backward_active
            and not unit.pending
            and unit.open_inputs <= 0
            and not unit.held
            and not self._suspended
        ):
            unit.in_backward = False
            unit.release()

    @contextmanager
    def whole(self, units: Sequence[Unit]) -> Iterator[None]:
        """These units whole inside, and nothing gathered or released by hooks; all sharded again after it.

        May be nested, when the outermost counts. One unit after the other: peers remember a number of calls only.
        """
        if self._suspended:
            yield
            return
        for unit in units:
            unit.make_whole()
        self.comm.settle()
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False
            self.unwind()

    # ---- the plan ----

    def _make_whole_in_order(self, unit: Unit) -> None:
        """Join every collective of the plan up to `unit`, prefetch the next, and wait for `unit`."""
        if self._cursor is not None and self._place(unit) >= self._cursor:
            self._advance(self._place(unit))
            unit.gather()
            self._cursor = self._place(unit) + 1
        unit.gather()  # a second use in this pass, or outside any pass
        if self.prefetch and self._cursor is not None and self._cursor < len(self.plan):
            self._entry(self._cursor).gather()
        unit.finish_gather()

    def _advance(self, stop: int) -> None:
        """Gather and drop the plan entries before `stop` that this rank skipped."""
        while self._cursor is not None and self._cursor < stop:
            skipped = self._entry(self._cursor)
            self._cursor += 1
            skipped.gather()
            if not skipped.held and not skipped.in_backward:
                skipped.release()

    def join_gathers_up_to(self, unit: Unit) -> None:
        """Before `unit` is reduced: take part in its gather, also if this rank did not use it."""
        if self.backward_active and not self._suspended and unit in self._position:
            self._advance(self._place(unit) + 1)

    def _entry(self, index: int) -> Unit:
        return self.plan[-1 - index] if self.backward_active else self.plan[index]

    def _place(self, unit: Unit) -> int:
        index = self._position[unit]
        return len(self.plan) - 1 - index if self.backward_active else index

    def _agree_on_order(self) -> None:
        """After the first forward: its order on rank 0 becomes the plan; units it skipped keep their place."""
        if self._first_order is None:
            return
        used = self._first_order + [unit for unit in self.plan if unit not in self._first_order]
        order = torch.tensor([self.units.index(unit) for unit in used], device=self.root.device)
        if len(used):
            self.comm.broadcast(order, 0, "order of the first forward")
        self.plan = [self.units[index] for index in order.tolist()]
        self._position = {unit: index for index, unit in enumerate(self.plan)}
        self._first_order = None
        self.on_order(self.plan)

    # ---- parameters read outside their unit's forward ----

    def _stray_read(self, parameter: nn.Parameter) -> None:
        """During the first forward, a unit whose parameters others read is held whole like the root from then on."""
        unit = next((u for u in self.units for g in u.groups if any(p is parameter for p in g.parameters)), None)
        if unit is None or unit.state is State.WHOLE:
            return
        if self._first_order is None:
            name = next(n for g in unit.groups for n, p in zip(g.names, g.parameters, strict=True) if p is parameter)
            raise RuntimeError(f"parameter {name} of unit {unit.name} was read while it is sharded")
        unit.held = True
        unit.make_whole()


class ReadWatcher(TorchFunctionMode):
    """Reports every parameter that a torch function is about to read."""

    def __init__(self, report: Callable[[nn.Parameter], None]) -> None:
        super().__init__()
        self.report = report
        self.reporting = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of a property: most, like .shape, read no values, and our own hooks use them
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            reads = name in ("T", "mT", "H", "mH", "real", "imag")
        else:
            reads = name != "__set__"
        if reads and not self.reporting:
            self.reporting = True
            try:
                for tensor in operands((*args, *(kwargs or {}).values())):
                    if isinstance(tensor, nn.Parameter):
                        self.report(tensor)
            finally:
                self.reporting = False
        return func(*args, **(kwargs or {}))


def differentiable(values: Any) -> list[Tensor]:
    """The tensors in a nested structure (dataclass outputs included) that gradients flow through."""
    leaves = tree_leaves(values)
    opened = [
        item for leaf in leaves for item in (vars(leaf).values() if hasattr(leaf, "__dataclass_fields__") else [leaf])
    ]
    return [leaf for leaf in tree_leaves(opened) if isinstance(leaf, Tensor) and leaf.requires_grad]


def requires_grad(output: Any) -> bool:
    """Whether a backward pass may follow from `output`."""
    return torch.is_grad_enabled() and bool(differentiable(output))
