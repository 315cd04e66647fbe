"""How shards relate to named parameters: flat ones (ZeRO), and ranges along a dim (tensor parallel).

Parameters that are communicated together lie behind each other in one flat buffer, padded at its end so that
it divides into `world` equal shards; rank r owns shard r:

    | p0 ........ | p1 .. | p2 ............ | padding |
    | shard of rank 0        | shard of rank 1        |

A **span** is the part of one parameter inside one shard. Spans are the common currency: collectives send them,
the optimizer updates them, checkpoints store them under the parameter's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ALIGNMENT = 32  # elements: keeps every shard of fp32 and bf16 on a 64-byte boundary


@dataclass(frozen=True)
class Span:
    """Elements [start, stop) of flattened parameter `index`, found at `offset` inside its shard."""

    index: int
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class FlatLayout:
    """`sizes` elements laid behind each other, padded, and cut into `world` equal shards."""

    sizes: tuple[int, ...]
    world: int

    @cached_property
    def shard_size(self) -> int:
        """Elements per rank, padding included."""
        per_rank = -(-sum(self.sizes) // self.world)
        return -(-per_rank // ALIGNMENT) * ALIGNMENT

    @property
    def padded_size(self) -> int:
        return self.shard_size * self.world

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each parameter begins in the flat buffer."""
        return tuple(sum(self.sizes[:i]) for i in range(len(self.sizes)))

    @cached_property
    def spans(self) -> tuple[tuple[Span, ...], ...]:
        """For every rank, the spans of its shard, in order."""
        return tuple(self._spans_of(rank) for rank in range(self.world))

    def _spans_of(self, rank: int) -> tuple[Span, ...]:
        low, high = rank * self.shard_size, (rank + 1) * self.shard_size
        spans = []
        for index, (begin, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            start, stop = max(low, begin), min(high, begin + size)
            if start < stop:
                spans.append(Span(index, start - begin, stop - begin, start - low))
        return tuple(spans)


def split_sizes(size: int, parts: int) -> list[int]:
    """`size` in `parts` pieces as equal as can be, the larger ones first."""
    return [size // parts + (index < size % parts) for index in range(parts)]


@dataclass(frozen=True)
class TensorShard:
    """What one tensor-parallel rank holds of a parameter: some ranges along one dim, laid side by side.

    Attributes:
        shape: of the whole parameter.
        dim: the one that is cut; -1 where the parameter is whole on every rank.
        ranges: [start, stop) along `dim`, per rank. Ranks with equal ranges hold copies.
        rank: this one.
    """

    shape: tuple[int, ...]
    dim: int
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    rank: int

    @property
    def local_shape(self) -> tuple[int, ...]:
        if self.dim < 0:
            return self.shape
        size = sum(stop - start for start, stop in self.ranges[self.rank])
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    @property
    def copies(self) -> list[int]:
        """The ranks that hold what this rank holds."""
        if self.dim < 0:
            return list(range(len(self.ranges)))
        return [rank for rank, ranges in enumerate(self.ranges) if ranges == self.ranges[self.rank]]

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of the whole parameter; a copy, unless it is all of it."""
        if self.dim < 0:
            return whole
        pieces = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges[self.rank]]
        return torch.cat(pieces, dim=self.dim)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole parameter from every rank's part, in rank order."""
        if self.dim < 0:
            return parts[self.rank]
        whole = parts[0].new_empty(self.shape)
        for part, ranges in zip(parts, self.ranges, strict=True):
            sizes = [stop - start for start, stop in ranges]
            for piece, (start, stop) in zip(part.split(sizes, dim=self.dim), ranges, strict=True):
                whole.narrow(self.dim, start, stop - start).copy_(piece)
        return whole
