"""Runs a schedule: the actions of this rank in their order, with sends and receives between them.

The executor knows nothing of any schedule. It goes through `transfers.steps`, which puts the transfers between the
actions in an order free of deadlock; posts sends and receives as they come, in the background; and waits for a receive
before the action that needs it. What an action leaves behind is a `Pass`: one microbatch in one chunk from its F to its
BW or W, the one thing that keeps activations, so that what is in memory is what the schedule counts as in flight. Of a
chunk's outputs only the edges into their graph are kept.

A rank that fails tells its neighbours and the first rank (`links.Links.fail`), for whose word all wait in the end, so
every rank of the pipeline raises at once, naming the action in which it broke. A peer that dies or stalls is named
after the timeout, with what this rank waited for.

Gradients end in the parameters' `.grad`, added up over the microbatches, and are reduced as soon as no action of their
chunk is left. Parameters are whole for the step, or around each action (`gather`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge

from minizero.dist.collectives import CollectiveError
from minizero.dist.ledger import CommLedger
from minizero.dist.links import Arrival, Links
from minizero.parallel.pipeline.actions import Action, Kind, Schedule
from minizero.parallel.pipeline.simulate import Event
from minizero.parallel.pipeline.split_backward import WeightHalf, backward, backward_inputs
from minizero.parallel.pipeline.stage import Received, Stage
from minizero.parallel.pipeline.transfers import Receive, Send, Step, Transfer, steps

WINDOW = 64  # microbatches that are inferred at once: a chunk's outputs wait until the next chunk takes them


@dataclass
class Given:
    """What an action starts from: tensors or Nones, and which of them want a gradient.

    Attributes:
        alone: it was one tensor that was not in a tuple.
    """

    tensors: list[Tensor | None]
    wants: list[bool]
    alone: bool


class Storage(Protocol):
    """Where parameters and gradients are kept: what the executor needs of ZeRO."""

    def whole(self, modules: Sequence[nn.Module] | None) -> AbstractContextManager[None]:
        """Whole parameters of these modules (None: all) inside; collective over data-parallel ranks."""
        ...

    def reduce_early(self, modules: Sequence[nn.Module]) -> None:
        """The gradients of these modules are complete: start to reduce them; collective over data-parallel ranks."""
        ...


@dataclass
class Pass:
    """One microbatch in one chunk, from its F to the end of its backward.

    Attributes:
        inputs: what was received. outputs: edges into the graph of what was passed on; None for those that
            need no gradient. seed: the gradient of the loss, where that is the output. half: what B left for W.
    """

    inputs: list[Input | None] = field(default_factory=list)
    outputs: list[GradientEdge | None] = field(default_factory=list)
    seed: Tensor | None = None
    half: WeightHalf | None = None


@dataclass
class Executor:
    """Runs `schedule` on this rank.

    Attributes:
        stage: this rank's chunks. links: to the other ranks of the pipeline. storage: see `Storage`.
        call: calls the model on a microbatch's batch.
        seed_of: takes the model's output at the last virtual stage into account, and says where backward begins: the
            loss, and the gradient there.
        gather: "step" or "microbatch": how long parameters are whole.
        reduce_each: reduce after every backward, not after a chunk's last.
        around_backward: a context for backward passes.
        events: what the last training step computed, and when (seconds of `time.perf_counter`).
        in_flight: the most passes that were held at once in it.
    """

    schedule: Schedule
    stage: Stage
    links: Links
    storage: Storage
    ledger: CommLedger
    call: Callable[[Any], Any]
    seed_of: Callable[[Any], tuple[Tensor, Tensor]]
    gather: str = "step"
    reduce_each: bool = False
    around_backward: Callable[[], AbstractContextManager[Any]] = nullcontext
    events: list[Event] = field(default_factory=list)
    in_flight: int = 0

    def __post_init__(self) -> None:
        self.rank = self.links.comm.rank
        self._passes: dict[tuple[int, int], Pass] = {}  # by chunk and microbatch
        self._arrivals: dict[Action, Arrival] = {}
        self._local: dict[tuple[Kind, int, int], Given] = {}  # what goes to another chunk of this rank
        self._outbox: dict[Action, Tensor | list[Tensor | None]] = {}
        self._training = Row.of(self.schedule, self.rank)
        self._forwards: dict[int, Row] = {}  # by the number of microbatches
        self._left: dict[int, int] = {}  # per chunk: backwards to come in this step
        self._broken: str | None = None

    # ---- runs ----

    def train(self, batches: Sequence[Any]) -> None:
        """Forward and backward of all microbatches; gradients are added up, and reduced where they are complete."""
        whole = self.storage.whole(None) if self.gather == "step" else nullcontext()
        with whole:
            self._run(self._training, batches)

    @torch.no_grad()
    def infer(self, batches: Sequence[Any], of_output: Callable[[Any], Any]) -> list[Any]:
        """`of_output` of the model's output for each batch, on the rank of the last virtual stage.

        An empty list on the others, which hear of it when `of_output` raises.
        """
        outputs = Outputs(of_output)
        with self.storage.whole(None):
            for start in range(0, len(batches), WINDOW):
                some = batches[start : start + WINDOW]
                if len(some) not in self._forwards:
                    self._forwards[len(some)] = Row.of(forwards(self.schedule, len(some)), self.rank)
                self._run(self._forwards[len(some)], some, outputs)
        return outputs.found

    def _run(self, row: Row, batches: Sequence[Any], outputs: Outputs | None = None) -> None:
        if self._broken is not None:
            raise RuntimeError(
                f"this pipeline broke off before, and its ranks are not in step any more: {self._broken}"
            )
        if outputs is None:
            self.events, self.in_flight, self._left = [], 0, dict(row.left)
        doing = "the beginning"
        try:
            for step in row.steps:
                if isinstance(step, Receive):
                    self._arrivals[step.transfer.before] = self.links.receive(step.transfer.source, told(step.transfer))
                elif isinstance(step, Send):
                    self.links.send(step.transfer.target, self._outbox.pop(step.transfer.after), told(step.transfer))
                else:
                    doing = self._name(step)
                    self._act(step, batches, outputs, row)
            self._settle()
        except Exception as error:
            self._break(row, doing, error)
            raise

    def _settle(self) -> None:
        """Return when every rank is through with its row, or raise what one of them failed with.

        The first rank collects the word of all, and then gives its own: who has it knows that all it sent was read.
        """
        others = range(1, self.links.comm.size)
        if self.rank > 0:
            self.links.signal(0, "done")
            self.links.receive(0, "word that all are done,").tensors()
        else:
            for peer in others:
                self.links.receive(peer, "word that it is done,").tensors()
            for peer in others:
                self.links.signal(peer, "all are done")
        for peer in range(self.links.comm.size):
            self.links.arrived(peer, leave=0 if self.rank > 0 else 1)

    def _break(self, row: Row, doing: str, error: Exception) -> None:
        """Tell the neighbours, and the first rank, or as the first rank all; let go of everything."""
        if isinstance(error, CollectiveError):
            reason = str(error)
        else:
            reason = f"pipeline rank {self.rank} failed in {doing}: {type(error).__name__}: {error}"
            error.add_note(f"(in {doing} of pipeline rank {self.rank})")
        self._broken = reason.partition("\n")[0]
        everyone = set(range(self.links.comm.size)) - {self.rank}
        self.links.fail(sorted(everyone if self.rank == 0 else row.peers | {0}), reason)
        for held in (self._passes, self._arrivals, self._local, self._outbox):
            held.clear()

    def _name(self, action: Action) -> str:
        stage = self.schedule.virtual_stages[self.rank, action.chunk]
        return f"action {action} (microbatch {action.microbatch}, virtual stage {stage})"

    # ---- actions ----

    def _act(self, action: Action, batches: Sequence[Any], outputs: Outputs | None, row: Row) -> None:
        given = self._given(action, row)
        whole: AbstractContextManager[None] = nullcontext()
        if self.gather == "microbatch" and outputs is None:
            whole = self.storage.whole(self.stage.modules_of(action.chunk))
        phase = "forward" if action.kind is Kind.F else "backward"
        with whole, self.ledger.phase(phase if outputs is None else "eval"):
            start = time.perf_counter()
            if action.kind is Kind.F:
                self._forward(action, given, batches[action.microbatch], outputs)
            else:
                with self.around_backward():
                    self._backward(action, given)
            if outputs is None:
                self.events.append(Event(action, start, time.perf_counter()))
        if outputs is None and action.kind in (Kind.BW, Kind.W):
            self._left[action.chunk] -= 1
            with self.ledger.phase("backward"):
                self._reduce(action.chunk)

    def _reduce(self, chunk: int) -> None:
        """Reduce what is complete: modules of `chunk` that no chunk with work left has too."""
        if self._left[chunk] and not self.reduce_each:
            return
        others = {
            module
            for other, left in self._left.items()
            if left and other != chunk
            for module in self.stage.modules_of(other)
        }
        self.storage.reduce_early([module for module in self.stage.modules_of(chunk) if module not in others])

    def _given(self, action: Action, row: Row) -> Given | None:
        """What `action` starts from, once it is there; None where it needs nothing from elsewhere."""
        stage = self.schedule.virtual_stages[self.rank, action.chunk]
        arrival = self._arrivals.pop(action, None)
        if arrival is not None:
            found = arrival.tensors()
            self.links.arrived(arrival.source, leave=row.unread[action])
            return Given([t for t, _ in found], [wants for _, wants in found], arrival.is_alone())
        return self._local.pop((action.kind if action.kind is Kind.F else Kind.B, stage, action.microbatch), None)

    def _forward(self, action: Action, given: Given | None, batch: Any, outputs: Outputs | None) -> None:
        inputs = [] if given is None else inputs_of(given)
        received: Received = None
        if given is not None:
            handed = tuple(None if each is None else each.tensor() for each in inputs)
            received = handed[0] if given.alone else handed
        output = self.stage.run(action.chunk, received, lambda: self.call(batch))
        stage = self.schedule.virtual_stages[self.rank, action.chunk]
        last = stage == self.schedule.stages - 1
        if outputs is not None:
            if last:
                outputs.add(output)
            else:
                self._pass_on(Kind.F, action, stage + 1, tensors_of(output), isinstance(output, Tensor))
            return
        made = Pass(inputs)
        if last:
            loss, made.seed = self.seed_of(output)
            made.outputs = [get_gradient_edge(loss)]
        else:
            tensors = tensors_of(output)
            made.outputs = [get_gradient_edge(t) if t is not None and t.requires_grad else None for t in tensors]
            self._pass_on(Kind.F, action, stage + 1, tensors, isinstance(output, Tensor))
        self._passes[action.chunk, action.microbatch] = made
        self.in_flight = max(self.in_flight, len(self._passes))

    def _backward(self, action: Action, given: Given | None) -> None:
        place = action.chunk, action.microbatch
        stage = self.schedule.virtual_stages[self.rank, action.chunk]
        if action.kind is Kind.W:
            half = self._passes.pop(place).half
            assert half is not None
            half.run()
            return
        made = self._passes[place]
        gradients = [made.seed] if given is None else given.tensors
        roots = [(e, g) for e, g in zip(made.outputs, gradients, strict=True) if e is not None and g is not None]
        made.outputs = []
        leaves = [each.leaf for each in made.inputs if each is not None and each.leaf is not None]
        if action.kind is Kind.B:
            made.half = backward_inputs(roots, leaves)
        else:
            del self._passes[place]
            if roots:
                backward(roots, None)
        if stage > 0:
            gradients = [None if each is None else each.gradient for each in made.inputs]
            self._pass_on(Kind.B, action, stage - 1, gradients, alone=False)
        made.inputs = []

    def _pass_on(self, kind: Kind, action: Action, stage: int, tensors: list[Tensor | None], alone: bool) -> None:
        """To virtual stage `stage`, on this rank or another."""
        if self.gather == "microbatch":  # a parameter that is passed on is about to be emptied
            held = {p.untyped_storage()._cdata for m in self.stage.modules_of(action.chunk) for p in m.parameters()}
            tensors = [t.clone() if t is not None and t.untyped_storage()._cdata in held else t for t in tensors]
        if self.schedule.placement[stage][0] == self.rank:
            wants = [tensor is not None and tensor.requires_grad for tensor in tensors]
            kept = [None if tensor is None else tensor.detach() for tensor in tensors]
            self._local[kind, stage, action.microbatch] = Given(kept, wants, alone)
        else:
            only = tensors[0] if alone else None
            self._outbox[action] = tensors if only is None else only


@dataclass(frozen=True)
class Row:
    """One rank's part of a schedule, prepared.

    Attributes:
        steps: see `transfers.steps`. left: per chunk, how many actions end a backward.
        unread: for every action that something is received for: how many lists that were sent to its source before
            that are not known to have arrived there. The source has computed what it sent, so it has received what came
            before that in its own row.
        peers: the ranks that it receives from or sends to.
    """

    steps: tuple[Step, ...]
    left: dict[int, int]
    unread: dict[Action, int]
    peers: set[int]

    @classmethod
    def of(cls, schedule: Schedule, rank: int) -> Row:
        """The row of `rank`."""
        row = steps(schedule)[rank]
        place = [{action: index for index, action in enumerate(actions)} for actions in schedule.actions]
        left = {
            chunk: sum(a.chunk == chunk and a.kind in (Kind.BW, Kind.W) for a in schedule.actions[rank])
            for chunk in range(schedule.chunks)
        }
        sent: dict[int, list[int]] = {peer: [] for peer in range(schedule.ranks)}  # where each is needed there
        coming: dict[Action, Transfer] = {}
        unread: dict[Action, int] = {}
        for step in row:
            if isinstance(step, Send):
                sent[step.transfer.target].append(place[step.transfer.target][step.transfer.before])
            elif isinstance(step, Receive):
                coming[step.transfer.before] = step.transfer
            elif step in coming:
                transfer = coming[step]
                reached = place[transfer.source][transfer.after]
                needed = sent[transfer.source]
                read = next((index for index, at in enumerate(needed) if at > reached), len(needed))
                unread[step] = len(needed) - read
        peers = {transfer.source for transfer in coming.values()} | {peer for peer, lists in sent.items() if lists}
        return cls(row, left, unread, peers)


def forwards(schedule: Schedule, microbatches: int) -> Schedule:
    """The forwards alone of `microbatches`, chunk after chunk: legal for any placement."""
    row = tuple(Action(Kind.F, chunk, m) for chunk in range(schedule.chunks) for m in range(microbatches))
    return Schedule(f"{schedule.name}, forward", microbatches, schedule.placement, (row,) * schedule.ranks)


@dataclass
class Outputs:
    """What is kept of the model's outputs."""

    of_output: Callable[[Any], Any]
    found: list[Any] = field(default_factory=list)

    def add(self, output: Any) -> None:
        self.found.append(self.of_output(output))


class Input:
    """A tensor that was received, as the stage is given it: no leaf, so it may be changed in place.

    Attributes:
        leaf: stands for the tensor in the graph; None where no gradient is wanted. gradient: once backward was here.
    """

    def __init__(self, tensor: Tensor, wants: bool) -> None:
        self.leaf = torch.zeros((), device=tensor.device, requires_grad=True) if wants else None
        self.gradient: Tensor | None = None
        self._tensor: Tensor | None = tensor

    def tensor(self) -> Tensor:
        """The tensor; may be called once."""
        if self.leaf is not None:
            found: Tensor = _Enter.apply(self.leaf, self)
            return found
        return self.take()

    def take(self) -> Tensor:
        tensor, self._tensor = self._tensor, None
        assert tensor is not None
        return tensor


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, given: Input) -> Tensor:
        ctx.given = given
        return given.take()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.given.gradient = grads[0]
        return torch.zeros((), device=grads[0].device), None


def inputs_of(given: Given) -> list[Input | None]:
    """What a stage was given, to be differentiated where that is wanted."""
    return [
        None if tensor is None else Input(tensor, wants and torch.is_grad_enabled())
        for tensor, wants in zip(given.tensors, given.wants, strict=True)
    ]


def tensors_of(output: Any) -> list[Tensor | None]:
    """What a stage passes on. Raises ValueError for what cannot be sent."""
    found = [*output] if isinstance(output, tuple | list) else [output]
    for item in found:
        if item is not None and not isinstance(item, Tensor):
            raise ValueError(
                f"a pipeline stage returned {'' if item is output else 'a tuple with '}a {type(item).__name__}; legal: "
                "a tensor, or a flat tuple of tensors and Nones"
            )
    return found


def told(transfer: Transfer) -> str:
    """What travels, in words."""
    what = "activations" if transfer.after.kind is Kind.F else "gradients"
    return f"{what} of {transfer.after} for {transfer.before}"
