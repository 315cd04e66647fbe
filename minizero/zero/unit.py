"""A unit at run time: a small state machine over its parameters, and the gathering of its gradients.

    SHARDED --gather--> GATHERING --finish--> WHOLE --release--> SHARDED

The verbs are symmetrical and may be repeated: gathering what is whole, or releasing what is sharded, does nothing.
Where nothing is ever freed (stages 0 to 2, or one rank) a unit is WHOLE from birth to end.

Gradients arrive one parameter at a time. `pending` holds the parameters whose gradient the current backward pass still
owes; when it is empty the unit may be reduced.
"""

from __future__ import annotations

from enum import Enum, auto

import torch
from torch import Tensor, nn

from minizero.dist.collectives import Communicator, Work
from minizero.dist.layout import PipelineLayout, TensorLayout
from minizero.zero.flat import FlatGroup, group_parameters
from minizero.zero.policy import Policy
from minizero.zero.units import ROOT, UnitSpec


class State(Enum):
    """Where a unit's parameters are."""

    SHARDED = auto()
    """Parameters read as NaN; this rank holds its shard only."""
    GATHERING = auto()
    """The other ranks' slices are on their way into the whole buffer."""
    WHOLE = auto()
    """Parameters are views of the whole buffer."""


class Unit:
    """One `UnitSpec` with buffers. Collective verbs must be called on every rank in the same order."""

    def __init__(
        self,
        spec: UnitSpec,
        comm: Communicator,
        device: torch.device,
        policy: Policy,
        tensor: TensorLayout | None = None,
        pipeline: PipelineLayout | None = None,
    ) -> None:
        self.name = spec.name
        self.module = spec.module
        self.comm = comm
        self.policy = policy
        self.groups = [
            FlatGroup(
                parameters,
                rank=comm.rank,
                world=comm.size,
                device=device,
                policy=policy,
                tensor=tensor,
                pipeline=pipeline,
            )
            for parameters in group_parameters(spec.parameters, tensor, pipeline)
        ]
        self.frees_whole = policy.shards_parameters and comm.size > 1
        self.state = State.WHOLE
        self.held = spec.name == ROOT  # stays whole from its forward to the end of backward
        self.in_backward = False  # between the gradient of its output and its own last gradient
        self.open_inputs = 0  # forward calls whose input gradients are still to come (units with frozen parameters)
        self.device = device
        self.pending: set[nn.Parameter] = set()
        self.reduced = False
        self.checks_own = False  # whether this rank's own gradients are looked at, before they are summed
        self.own_is_finite = True
        self._gathers: list[Work] = []
        self._reductions: list[Work] = []
        self._local: dict[nn.Parameter, Tensor] = {}  # whole accumulated gradients, wider than the parameter

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [p for group in self.groups if group.trainable for p in group.parameters]

    @property
    def has_frozen(self) -> bool:
        return any(not group.trainable for group in self.groups)

    # ---- parameters ----

    def gather(self) -> None:
        """SHARDED -> GATHERING: start bringing the other ranks' slices in."""
        if self.state is not State.SHARDED:
            return
        self._gathers = [
            self.comm.all_gather(group.fill_own_slice(), self.name, own=group.shard) for group in self.groups
        ]
        self.state = State.GATHERING

    def finish_gather(self) -> None:
        """GATHERING -> WHOLE: wait, and point the parameters at the whole buffer."""
        if self.state is not State.GATHERING:
            return
        for work in self._gathers:
            work.wait()
        self._gathers = []
        self._point_at_whole()

    def _point_at_whole(self) -> None:
        for group in self.groups:
            group.point_at_whole()
        self.state = State.WHOLE

    def make_whole(self) -> None:
        self.gather()
        self.finish_gather()

    def release(self) -> None:
        """-> SHARDED: free the whole buffer, where this stage frees it."""
        if not self.frees_whole or self.state is State.SHARDED:
            return
        self.finish_gather()  # memory that messages are still written to cannot be freed
        for group in self.groups:
            group.point_at_nothing()
        self.state = State.SHARDED

    def finish_loading(self) -> None:
        """After the initial values are in: enter the resting state."""
        if self.frees_whole:
            for group in self.groups:
                group.point_at_nothing()
            self.state = State.SHARDED
        else:
            self._point_at_whole()

    def refresh(self) -> int:
        """After the optimizer: what computes takes over the updated masters (stages 1 and 2 gather them).

        Returns the bytes that crossed between devices.
        """
        moved = 0
        for group in self.groups:
            if group.trainable:
                moved += group.publish_master()
                if self.policy.shards_optimizer and not self.policy.shards_parameters:
                    self._gathers.append(self.comm.all_gather(group.flat, self.name))
        return moved

    def finish_refresh(self) -> None:
        for work in self._gathers:
            work.wait()
        self._gathers = []

    # ---- gradients ----

    def keep_local(self, parameter: nn.Parameter) -> None:
        """Move one micro-batch's whole gradient into the accumulation dtype, where the parameter's is coarser."""
        if parameter.grad is None or not self.widens(parameter):
            return  # autograd itself adds up in the right dtype
        if parameter in self._local:
            self._local[parameter].add_(parameter.grad)
        else:
            self._local[parameter] = parameter.grad.to(self.policy.accumulation_of(parameter.dtype))
        parameter.grad = None

    def widens(self, parameter: nn.Parameter) -> bool:
        """Whether gradients of `parameter` are added up in another dtype than its own."""
        return parameter.dtype != self.policy.accumulation_of(parameter.dtype)

    def has_wide_sum(self, parameter: nn.Parameter) -> bool:
        """Whether earlier micro-batches of this parameter wait here in the accumulation dtype."""
        return parameter in self._local

    def reduce(self) -> None:
        """Start summing this unit's whole gradients over the ranks into their shards; missing ones count as zero."""
        for group in self.groups:
            if not group.trainable:
                continue
            accumulate = group.grad is not None
            work = self.comm.reduce_scatter(
                [self._take_gradient(p) for p in group.parameters],
                group.layout,
                group.grad_shard(),
                self.name,
                wire_dtype=group.reduce_dtype,
                accumulate=accumulate,
            )
            self._reductions.append(work)
        self.reduced = True

    def _take_gradient(self, parameter: nn.Parameter) -> Tensor:
        """The whole local gradient, flattened, and no longer held by the parameter."""
        if parameter in self._local:
            self.keep_local(parameter)
            gradient: Tensor | None = self._local.pop(parameter)
        else:
            gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return self._zero(parameter)
        if gradient.is_sparse:
            raise ValueError(
                f"unit {self.name}: sparse gradients are not supported; build the embedding with sparse=False"
            )
        if self.checks_own:
            self.own_is_finite &= bool(gradient.isfinite().all())
        if self.policy.predivide != 1.0:
            gradient = gradient.div_(self.policy.predivide)
        return gradient.reshape(-1)

    def _zero(self, parameter: nn.Parameter) -> Tensor:
        return torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)

    def finish_reduce(self) -> None:
        for work in self._reductions:
            work.wait()
        self._reductions = []

    def spread_gradients(self) -> None:
        """Stage 0: every rank updates everything, so the reduced slices are gathered (the all-reduce's second half)."""
        self._gathers = [
            self.comm.all_gather(group.grad, self.name)
            for group in self.groups
            if group.grad is not None and len(group.owned_ranks) > 1
        ]

    @property
    def local_gradients(self) -> list[Tensor]:
        return list(self._local.values())

    @property
    def has_local_gradients(self) -> bool:
        return bool(self._local) or any(p.grad is not None for p in self.trainable)

    def drop_gradients(self) -> None:
        for group in self.groups:
            group.grad = None
            for parameter in group.parameters:
                parameter.grad = None
        self._local.clear()
