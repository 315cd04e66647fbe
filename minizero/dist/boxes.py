"""Boxes: which elements of a whole parameter somebody holds, in coordinates that no layout changes.

A rank's part of a parameter is some ranges along one dim (`TensorShard`, tensor parallelism), of which it keeps a range
of the flattened elements (ZeRO). Both depend on the layout. A **box** does not: it is [start, stop) per dim of the
whole parameter. Whatever a layout leaves to a rank is a few boxes, so two layouts meet where their boxes overlap.

    elements [4, 14) of a 3 x 5 matrix           . . . . 1       box 1: row 0, columns 4 ... 4
    are three boxes of it:                       2 2 2 2 2       box 2: row 1, all columns
                                                 3 3 3 3 .       box 3: row 2, columns 0 ... 3
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from minizero.dist.sharding import TensorShard

Box = tuple[tuple[int, int], ...]
"""[start, stop) per dim; of a scalar, the empty tuple."""


@dataclass(frozen=True)
class Piece:
    """A box of a whole parameter, and where it lies in a rank's part of it.

    Attributes:
        box: in the whole. local: in the part. shape: of the part.
    """

    box: Box
    local: Box
    shape: tuple[int, ...]

    def within(self, flat: Tensor, start: int) -> Tensor:
        """A view of the piece, in its shape, in `flat`: the elements of the part from `start` on, flattened."""
        strides = [prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        first = sum(low * stride for (low, _), stride in zip(self.local, strides, strict=True)) - start
        step = flat.stride(0) if flat.numel() > 1 else 1
        return flat.as_strided(
            shape_of(self.local), [stride * step for stride in strides], flat.storage_offset() + first * step
        )


def pieces(shard: TensorShard, start: int, stop: int) -> Iterator[Piece]:
    """The boxes that elements [start, stop) of the flattened part `shard` consist of, each once."""
    shape = shard.local_shape
    for local in boxes_of_range(start, stop, shape):
        if shard.dim < 0:
            yield Piece(local, local, shape)
            continue
        low, high = local[shard.dim]
        reached = 0  # of the part, along the dim that is cut
        for begin, end in shard.ranges[shard.rank]:
            first, last = max(low, reached), min(high, reached + end - begin)
            if first < last:
                shifted = (first + begin - reached, last + begin - reached)
                yield Piece(
                    (*local[: shard.dim], shifted, *local[shard.dim + 1 :]),
                    (*local[: shard.dim], (first, last), *local[shard.dim + 1 :]),
                    shape,
                )
            reached += end - begin


def boxes_of_range(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """Elements [start, stop) of a tensor of `shape`, flattened row by row, as at most 2 dims - 1 boxes, in order."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # the rows that are whole
    if first > last:  # inside one row
        yield from _in_row(last, start, stop, shape)
        return
    yield from _in_row(first - 1, start, first * row, shape)
    if first < last:
        yield ((first, last), *whole_box(shape[1:]))
    yield from _in_row(last, last * row, stop, shape)


def _in_row(number: int, start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    row = prod(shape[1:])
    for box in boxes_of_range(start - number * row, stop - number * row, shape[1:]):
        yield ((number, number + 1), *box)


def overlap(one: Box, other: Box) -> Box | None:
    """The elements of both boxes; None where there are none."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(low < high for low, high in both) else None


def inside(box: Box, outer: Box) -> Box:
    """`box` in the coordinates of `outer`, which holds it."""
    return tuple((low - first, high - first) for (low, high), (first, _) in zip(box, outer, strict=True))


def part_of(tensor: Tensor, box: Box) -> Tensor:
    """A view of the elements of `tensor` in `box`."""
    return tensor[tuple(slice(low, high) for low, high in box)]


def shape_of(box: Box) -> tuple[int, ...]:
    """Sizes of `box` per dim."""
    return tuple(high - low for low, high in box)


def size_of(box: Box) -> int:
    """Elements in `box`."""
    return prod(shape_of(box))


def whole_box(shape: Sequence[int]) -> Box:
    """The box that covers all of `shape`."""
    return tuple((0, size) for size in shape)


def cover_exactly(boxes: Iterable[Box], shape: Sequence[int]) -> str | None:
    """Why `boxes` are not all elements of `shape` once each; None where they are."""
    ordered = sorted(boxes)
    for box in ordered:
        if len(box) != len(shape) or any(not 0 <= low < high <= n for (low, high), n in zip(box, shape, strict=True)):
            return f"{list(box)} is no box of shape {list(shape)}"
    active: list[Box] = []  # those before this one that may still overlap it
    for box in ordered:
        if box:
            active = [other for other in active if other[0][1] > box[0][0]]
        for other in active:
            if (both := overlap(box, other)) is not None:
                return f"elements {list(both)} are held twice"
        active.append(box)
    held, wanted = sum(map(size_of, ordered)), prod(shape)
    return None if held == wanted else f"{held} of {wanted} elements are held"
