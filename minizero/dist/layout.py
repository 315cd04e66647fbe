"""What tensor and pipeline parallelism did to a model: written once by `parallelize`, read by initialization,
reduction, the norm, checkpoints and export."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from minizero.dist.collectives import Communicator
from minizero.dist.sharding import TensorShard


@dataclass
class TensorLayout:
    """Side tables of one model.

    Attributes:
        comm: the tensor-parallel axis.
        shards: what this rank holds of each parameter; one that is not in it is whole.
        initializers: module -> the whole module on the meta device whose initializer fills it.
        parts: whole parameter of the model as it was -> this rank's part, which took its place.
        partial: parameters used on a part of the sequence: each rank has a part of their gradient.
    """

    comm: Communicator
    shards: dict[nn.Parameter, TensorShard] = field(default_factory=dict)
    initializers: dict[nn.Module, nn.Module] = field(default_factory=dict)
    parts: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    partial: set[nn.Parameter] = field(default_factory=set)

    def shard(self, parameter: nn.Parameter) -> TensorShard:
        """Of a parameter that is whole too."""
        found = self.shards.get(parameter)
        return found or TensorShard(tuple(parameter.shape), -1, ((),) * self.comm.size, self.comm.rank)

    def replace(self, replaced: dict[nn.Parameter, nn.Parameter]) -> None:
        """Parameters of the meta device made way for others."""
        self.parts = {whole: replaced.get(part, part) for whole, part in self.parts.items()}
        self.shards = {replaced.get(p, p): shard for p, shard in self.shards.items()}
        self.partial = {replaced.get(p, p) for p in self.partial}

    def copies(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The ranks that hold the same part of `parameter` as this one."""
        return tuple(self.shard(parameter).copies)

    def sums_over(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The ranks whose gradients of `parameter` are parts of one sum; only this one where each has all of it."""
        copies = self.copies(parameter)
        is_cut = parameter in self.shards and self.shards[parameter].dim >= 0
        return copies if parameter in self.partial or is_cut else (self.comm.rank,)

    def whole(self, parameter: nn.Parameter, value: Tensor, unit: str) -> Tensor:
        """The whole value of `parameter` from every rank's part; collective over the axis."""
        shard = self.shard(parameter)
        if shard.dim < 0 or self.comm.size == 1:
            return value
        sizes = [sum(stop - start for start, stop in ranges) for ranges in shard.ranges]
        laid = self.comm.gather_parts(value, sizes, shard.dim, unit)
        return shard.join(laid.split(sizes, dim=shard.dim))


@dataclass
class PipelineLayout:
    """What pipeline parallelism left to this rank.

    Attributes:
        comm: the pipeline axis.
        ties: parameters that several of its ranks use, and which: each has a part of their gradient.
    """

    comm: Communicator
    ties: dict[nn.Parameter, tuple[int, ...]] = field(default_factory=dict)

    def replace(self, replaced: dict[nn.Parameter, nn.Parameter]) -> None:
        """Parameters made way for others: parts of them, or those of a real device."""
        self.ties = {replaced.get(p, p): ranks for p, ranks in self.ties.items()}

    def ranks_of(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The ranks that use `parameter`, this one among them."""
        return self.ties.get(parameter, (self.comm.rank,))
