"""What an engine does when its model is cut into pipeline stages: whole steps, never a single forward.

The engine hands a step's batches to the executor, which runs the schedule; losses meet in the optimizer's window on the
rank of the last virtual stage, and reach every rank with the step's one small exchange.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minizero.config import Config
from minizero.dist.collectives import Communicator
from minizero.dist.links import Links
from minizero.parallel.pipeline.actions import Action, Kind
from minizero.parallel.pipeline.executor import Executor
from minizero.parallel.pipeline.simulate import Event, Timeline
from minizero.parallelize import Parallelized
from minizero.utils.forward import History, forward_of
from minizero.zero.runtime import ZeroRuntime


class Pipelined:
    """The pipeline of one engine.

    Args:
        executor: of this rank. comm: the pipeline axis. device: of the tensors.
    """

    def __init__(self, executor: Executor, comm: Communicator, device: torch.device) -> None:
        self.executor, self.comm, self.device = executor, comm, device
        self.schedule = executor.schedule
        self.last_rank = self.schedule.placement[-1][0]

    @classmethod
    def of(
        cls,
        stages: Parallelized,
        runtime: ZeroRuntime,
        config: Config,
        call: Callable[[Any], Any],
        seed_of: Callable[[Any], tuple[Tensor, Tensor]],
        history: History,
    ) -> Pipelined:
        """The pipeline of what a model has become; see `Executor` for `call` and `seed_of`.

        `history` tells whose forward it is that others' checkpoints compute again in backward.
        """
        assert stages.stage is not None and stages.schedule is not None and stages.pipeline is not None
        comm = stages.pipeline.comm
        executor = Executor(
            stages.schedule,
            stages.stage,
            Links(comm, runtime.device),
            runtime,
            comm.ledger,
            call=call,
            seed_of=seed_of,
            gather=config.pipeline.gather,
            reduce_each=config.zero.accumulation == "sharded",
            around_backward=lambda: forward_of(history),
        )
        return cls(executor, comm, runtime.device)

    def train(self, batches: Sequence[Any]) -> None:
        """Forward and backward of all microbatches of one step."""
        self.executor.train(batches)

    def infer(self, batches: Sequence[Any], of_output: Callable[[Any], Any] = lambda output: output) -> list[Any]:
        """`of_output` of the model's outputs on the rank of the last virtual stage; an empty list on the others."""
        return self.executor.infer(batches, of_output)

    def from_last(self, tensor: Tensor, what: str) -> Tensor:
        """The value that `tensor` has on the rank of the last virtual stage, on every rank; its shape is the same."""
        self.comm.broadcast(tensor, self.last_rank, what)
        return tensor

    def seconds(self) -> dict[str, float]:
        """What this rank computed for in the last training step, by phase."""
        found = {"forward": 0.0, "backward": 0.0}
        for event in self.executor.events:
            found["forward" if event.action.kind is Kind.F else "backward"] += event.stop - event.start
        return found

    def timeline(self) -> Timeline:
        """When every action of the last training step ran, on every rank; collective over the pipeline axis.

        Seconds from the first start on any rank. Ranks of one host share a clock; over several hosts their rows may be
        shifted against each other.
        """
        own = [[str(event.action), event.start, event.stop] for event in self.executor.events]
        rows = self.comm.gather_bytes(json.dumps(own).encode(), "timeline", self.device)
        events = [
            [Event(Action.parse(name), start, stop) for name, start, stop in json.loads(row.decode())] for row in rows
        ]
        began = min((row[0].start for row in events if row), default=0.0)
        return Timeline(
            f"{self.schedule.name}, measured",
            tuple(tuple(Event(e.action, e.start - began, e.stop - began) for e in row) for row in events),
        )
