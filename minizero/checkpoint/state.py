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

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minizero.checkpoint.files import CheckpointError
from minizero.checkpoint.manifest import Layout
from minizero.dist import together
from minizero.dist.boxes import Box, Piece, pieces
from minizero.dist.collectives import Communicator
from minizero.dist.sharding import TensorShard
from minizero.zero.flat import FlatGroup
from minizero.zero.optimizer import ZeroOptimizer
from minizero.zero.runtime import ZeroRuntime

everyone = partial(together.everyone, expected=CheckpointError)


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
