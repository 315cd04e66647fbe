"""What a checkpoint of a training run holds, in coordinates that no layout changes.

A checkpoint is a folder: one safetensors file per rank, and a JSON manifest. A file holds what its rank's
shards hold, per parameter, named `kind/parameter@start`: the elements from `start` of the flattened parameter. The flat
buffers and their padding never reach the disk. There is no pickle on any path.

    master/…   fp32 (or wider) weights; frozen parameters too, in their own dtype
    <key>/…    the optimizer's state tensors under their own key (exp_avg, momentum_buffer, …)
    buffer/…   the buffers of the rank's part of the model, whole, in each file of dp rank 0
    rng/…      each rank's random state

The manifest says of every tensor in a file which elements of which parameter it holds, and that parameter's shape.
`save.py` writes, `load.py` reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from minizero.checkpoint.files import CheckpointError
from minizero.dist.collectives import Communicator
from minizero.dist.sharding import Span
from minizero.zero.flat import FlatGroup
from minizero.zero.optimizer import ZeroOptimizer
from minizero.zero.runtime import ZeroRuntime


@dataclass
class TrainingState:
    """Everything that resuming needs, by reference. `comm` is the data-parallel axis, `world` all ranks."""

    module: nn.Module
    runtime: ZeroRuntime
    optimizer: ZeroOptimizer
    scheduler: Any
    comm: Communicator
    world: Communicator
    counters: dict[str, int]

    @property
    def tp_rank(self) -> int:
        return self.runtime.tensor.comm.rank if self.runtime.tensor is not None else 0

    @property
    def pp_rank(self) -> int:
        return self.runtime.pipeline.comm.rank if self.runtime.pipeline is not None else 0

    @property
    def layout(self) -> dict[str, int]:
        """The degrees that a checkpoint of this version is bound to."""
        pp = self.runtime.pipeline.comm.size if self.runtime.pipeline is not None else 1
        return {"pp": pp, "dp": self.comm.size, "tp": self.world.size // self.comm.size // pp}

    @property
    def file_name(self) -> str:
        """This rank's file."""
        return file_name(self.comm.rank, self.tp_rank, self.pp_rank)

    def files_of_part(self, files: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of a manifest's files that hold shards of the same part of the model as this rank's."""
        return [file for file in files if (file["tp"], file.get("pp", 0)) == (self.tp_rank, self.pp_rank)]

    def slices(self) -> Iterator[tuple[nn.Parameter, str, tuple[int, ...], int, Span]]:
        """(slice, parameter's name and shape, rank whose shard it is, span) of what this rank's optimizer updates."""
        for piece, group, place in self.optimizer.slices:
            rank, span = group.owned_spans()[place]
            yield piece, group.names[span.index], tuple(group.parameters[span.index].shape), rank, span

    def frozen(self) -> Iterator[tuple[str, FlatGroup, int, nn.Parameter]]:
        """(name, group, index in the group, parameter) of everything that does not train."""
        for group in self.runtime.groups:
            if not group.trainable:
                for index, (name, parameter) in enumerate(zip(group.names, group.parameters, strict=True)):
                    yield name, group, index, parameter


def file_name(dp_rank: int, tp_rank: int, pp_rank: int = 0) -> str:
    """The file of one rank's shards."""
    stage = f"pp{pp_rank:03d}-" if pp_rank else ""
    return f"{stage}dp{dp_rank:05d}-tp{tp_rank:03d}.safetensors"


def check_complete(files: list[dict[str, Any]]) -> None:
    """Raise CheckpointError unless the files hold every element of every tensor that they hold a part of, once."""
    parts: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for file in files:
        parts.setdefault((file.get("pp", 0), file["tp"]), []).append(file)
    for _, of_part in sorted(parts.items()):
        check_parts(of_part)


def check_parts(files: list[dict[str, Any]]) -> None:
    """`check_complete` for the files of one stage and tensor-parallel rank, whose parameters are its own parts."""
    parts: dict[tuple[str, str], list[tuple[int, int]]] = {}
    shapes: dict[str, list[int]] = {}
    for file in files:
        for entry in file["entries"]:
            parts.setdefault((entry["kind"], entry["name"]), []).append((entry["start"], entry["stop"]))
            if shapes.setdefault(entry["name"], entry["shape"]) != entry["shape"]:
                raise CheckpointError(f"{entry['name']} has two shapes, {shapes[entry['name']]} and {entry['shape']}")
    for (kind, name), ranges in parts.items():
        reached = 0
        for start, stop in sorted(ranges):
            if start != reached:
                raise CheckpointError(
                    f"{kind} of {name}: elements from {min(start, reached)} are missing or held twice"
                )
            reached = stop
        if reached != prod(shapes[name]):
            raise CheckpointError(f"{kind} of {name}: {reached} elements, its shape is {shapes[name]}")


def everyone(comm: Communicator, device: torch.device, act: Callable[[], Any]) -> list[Any]:
    """Run `act` on every rank and return all results (JSON); if one fails, every rank raises what it said."""
    try:
        answer: dict[str, Any] = {"result": act()}
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    answers = [json.loads(a) for a in comm.gather_bytes(json.dumps(answer).encode(), "checkpoint status", device)]
    errors = [f"rank {rank}: {a['error']}" for rank, a in enumerate(answers) if "error" in a]
    if errors:
        raise CheckpointError("; ".join(dict.fromkeys(errors)))
    return [a.get("result") for a in answers]
