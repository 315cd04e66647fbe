"""How flat shards relate to named parameters. Integers only.

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
from math import prod

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


@dataclass(frozen=True)
class ShardSpec:
    """What this rank holds of one logical parameter, in coordinates that no layout changes.

    `box` is the hyper-rectangle [start, stop) per dim that tensor and pipeline parallelism leave to this rank
    (the whole parameter so far); `flat_range` the part of that box, flattened row by row, that ZeRO leaves to it.
    `axes` names the mesh axes that shard it.
    """

    name: str
    global_shape: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    flat_range: tuple[int, int] | None = None
    axes: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Elements held here."""
        if self.flat_range is not None:
            return self.flat_range[1] - self.flat_range[0]
        return prod(stop - start for start, stop in self.box)


def whole_box(shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The box that covers all of `shape`."""
    return tuple((0, size) for size in shape)
