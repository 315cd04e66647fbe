"""What a checkpoint of a training run holds, in coordinates that no layout changes.

A checkpoint is a folder: a safetensors file per rank, and a JSON manifest. What a rank's shard holds of a parameter is
written as boxes of the whole parameter (`dist/boxes.py`), each a tensor `kind/parameter@box`. Flat buffers, their
padding, tensor-parallel parts and pipeline stages never reach the disk, so every layout reads what any has written.
Each element is written once: by the first of the ranks that hold it.

    master/…   fp32 (or wider) weights; frozen parameters too, in their own dtype
    <key>/…    the optimizer's state tensors under their own key (exp_avg, momentum_buffer, …)
    buffer/…   the model's buffers, whole
    rng/…      each rank's random state

`save.py` writes, `load.py` reads.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minizero.checkpoint.files import CheckpointError
from minizero.checkpoint.manifest import Layout
from minizero.dist.boxes import Box, Piece, pieces
from minizero.dist.collectives import Communicator
from minizero.dist.sharding import TensorShard
from minizero.zero.flat import FlatGroup
from minizero.zero.optimizer import ZeroOptimizer
from minizero.zero.runtime import ZeroRuntime

STATUS, BUSY = "checkpoint status", b"null"  # what ranks meet for; what one says that has no answer yet


@dataclass(frozen=True)
class Held:
    """A box of one tensor, and this rank's memory of it: a view, in the box's shape."""

    kind: str
    name: str
    piece: Piece
    values: Tensor

    @property
    def key(self) -> str:
        return key_of(self.kind, self.name, self.piece.box)


@dataclass
class TrainingState:
    """Everything that resuming needs, by reference. `comm` is the axis that ZeRO shards over, `world` all ranks.

    Attributes:
        counters: of steps and samples. layout: degrees, stage, batch sizes: what a reader may want to know, and which
            ranks' random states are whose. config_hash: of the settings.
    """

    module: nn.Module
    runtime: ZeroRuntime
    optimizer: ZeroOptimizer
    scheduler: Any
    comm: Communicator
    world: Communicator
    counters: dict[str, int]
    layout: Layout
    config_hash: str

    @property
    def file_name(self) -> str:
        """This rank's file."""
        return file_name(self.world.rank)

    @property
    def is_first_replica(self) -> bool:
        """Whether what every rank of a pipeline stage has is this rank's to write."""
        return self.comm.rank == 0 and (self.runtime.tensor is None or self.runtime.tensor.comm.rank == 0)

    def shards(self) -> dict[str, TensorShard]:
        """What tensor parallelism leaves to this rank of each of its parameters."""
        return {
            name: self.runtime.shard_of(parameter)
            for group in self.runtime.groups
            for name, parameter in zip(group.names, group.parameters, strict=True)
        }

    def updated(self) -> Iterator[tuple[nn.Parameter, str, bool, list[Piece], int]]:
        """What this rank's optimizer updates: (slice, parameter's name, whether this rank writes it, the boxes that it
        consists of, where it begins in the flattened part)."""
        for piece, group, place in self.optimizer.slices:
            rank, span = group.owned_spans()[place]
            shard = self.runtime.shard_of(group.parameters[span.index])
            writes = group.counts and rank == self.comm.rank  # at stage 0 every rank updates everything
            yield piece, group.names[span.index], writes, [*pieces(shard, span.start, span.stop)], span.start

    def frozen(self) -> Iterator[tuple[str, FlatGroup, int, TensorShard]]:
        """(name, group, index in the group, part) of everything that does not train."""
        for group in self.runtime.groups:
            if not group.trainable:
                for index, (name, parameter) in enumerate(zip(group.names, group.parameters, strict=True)):
                    yield name, group, index, self.runtime.shard_of(parameter)

    def held(self) -> Iterator[Held]:
        """What this rank writes of parameters and optimizer state. Raises ValueError for state of another shape."""
        for piece, name, writes, boxes, start in self.updated():
            if not writes:
                continue
            tensors = {"master": piece.detach()}
            for key, value in self.optimizer.state.get(piece, {}).items():
                if isinstance(value, Tensor) and value.dim():
                    if value.shape != piece.shape:
                        raise ValueError(
                            f"optimizer state {key!r} of {name} has shape {tuple(value.shape)}, its slice "
                            f"{tuple(piece.shape)}: only state of one number per element can be saved"
                        )
                    tensors[key] = value
            for kind, flat in tensors.items():
                yield from (Held(kind, name, box, box.within(flat, start)) for box in boxes)
        for name, group, index, shard in self.frozen():
            for span in group.layout.spans[self.comm.rank] if group.counts else ():
                if span.index == index:
                    flat = group.shard[span.offset : span.offset + span.numel]
                    for box in pieces(shard, span.start, span.stop):
                        yield Held("master", name, box, box.within(flat, span.start))

    def scalars(self) -> dict[str, dict[str, Any]]:
        """Parameter -> optimizer state that is one number (Adam's `step`), the same in all its slices.

        A number is kept as it is, a 0-d tensor as its value and dtype.
        """
        found: dict[str, dict[str, Any]] = {}
        for piece, name, *_ in self.updated():
            for key, value in self.optimizer.state.get(piece, {}).items():
                if isinstance(value, Tensor) and value.dim() == 0:
                    kept: Any = {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
                elif isinstance(value, int | float):
                    kept = value
                else:
                    continue
                found.setdefault(name, {})[key] = kept
        return found

    def random_states(self) -> dict[str, Tensor]:
        """Of torch's generators on this rank, by key."""
        device = self.runtime.device
        found = {"rng/cpu": torch.get_rng_state()}
        return found | ({"rng/cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def file_name(rank: int) -> str:
    """The file that rank `rank` wrote."""
    return f"rank{rank:05d}.safetensors"


def key_of(kind: str, name: str, box: Box) -> str:
    """The key of a box in a file: kind/parameter@0:4,8:16."""
    return f"{kind}/{name}@{','.join(f'{low}:{high}' for low, high in box)}"


def everyone(comm: Communicator, device: torch.device, act: Callable[[], Any], *, is_slow: bool = False) -> list[Any]:
    """Run `act` on every rank and return all results (JSON); if one fails, every rank raises what it said.

    Peers of a rank that is not heard of for `dist.timeout` take it for dead, and a disk may take one rank that much
    longer. So what `is_slow`, and calls no collective, runs on a thread, and ranks meet meanwhile to say they live.
    """
    if is_slow and comm.size > 1:
        said = meet_until_all_are_done(comm, device, act)
    else:
        said = comm.gather_bytes(answer_of(act), STATUS, device)
    answers = [json.loads(one) for one in said]
    errors = [f"rank {rank}: {a['error']}" for rank, a in enumerate(answers) if "error" in a]
    if errors:
        raise CheckpointError("; ".join(dict.fromkeys(errors)))
    return [a.get("result") for a in answers]


def answer_of(act: Callable[[], Any]) -> bytes:
    """JSON: the result of `act`, or what it raised."""
    try:
        answer: dict[str, Any] = {"result": act()}
    except CheckpointError as error:
        answer = {"error": str(error)}
    except Exception as error:  # whatever it is: peers wait for an answer
        answer = {"error": f"{type(error).__name__}: {error}"}
    return json.dumps(answer).encode()


def meet_until_all_are_done(comm: Communicator, device: torch.device, act: Callable[[], Any]) -> list[bytes]:
    """Every rank's answer. Ranks meet several times a timeout, and once if all are done before."""
    answer: list[bytes] = []

    def run() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own
        answer.append(answer_of(act))

    thread = threading.Thread(target=run, name=STATUS, daemon=True)  # a rank that leaves does not wait for its disk
    thread.start()
    while True:
        thread.join(comm.timeout / 4)
        said = comm.gather_bytes(answer[0] if answer else BUSY, STATUS, device)
        if BUSY not in said:
            return said
