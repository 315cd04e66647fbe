"""Boxes: any range of any part, as boxes of the whole, back again; and whether boxes make up a whole."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minizero.dist.boxes import (
    boxes_of_range,
    cover_exactly,
    inside,
    overlap,
    part_of,
    pieces,
    shape_of,
    size_of,
    whole_box,
)
from minizero.dist.sharding import TensorShard, split_sizes

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def cut_at(points: list[int]) -> list[tuple[int, int]]:
    return list(zip(points, points[1:], strict=False))


@st.composite
def layouts(draw, shape):
    """[(shard, start, stop)] of every rank of some layout of a parameter: tensor-parallel parts, cut by ZeRO."""
    ranks, found = draw(st.integers(1, 3)), []
    cut = draw(st.integers(-1, len(shape) - 1))
    if cut < 0:
        shards = [TensorShard(shape, -1, ((),), 0)]
    else:
        fused = draw(st.sampled_from([n for n in (1, 2, 3) if shape[cut] % n == 0]))  # as q, k and v in one matrix
        block, ranges = shape[cut] // fused, []
        for rank in range(ranks):
            sizes = split_sizes(block, ranks)
            low = sum(sizes[:rank])
            ranges.append(tuple((b * block + low, b * block + low + sizes[rank]) for b in range(fused)))
        shards = [TensorShard(shape, cut, tuple(ranges), rank) for rank in range(ranks)]
    for shard in shards:
        size = torch.Size(shard.local_shape).numel()
        points = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
        found += [(shard, start, stop) for start, stop in cut_at(points)]
    return found


@given(st.data())
def test_what_one_layout_holds_another_gets(data):
    """Boxes of the saving layout are cut out of parts; the loading layout puts its parts together from them alone."""
    shape = data.draw(SHAPES)
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    held = []
    for shard, start, stop in data.draw(layouts(shape)):
        flat = shard.cut(whole).reshape(-1)[start:stop]
        held += [(piece.box, piece.within(flat, start).clone()) for piece in pieces(shard, start, stop)]
    assert cover_exactly([box for box, _ in held], shape) is None
    for shard, start, stop in data.draw(layouts(shape)):
        wanted = shard.cut(whole).reshape(-1)[start:stop]
        found = torch.full((2 * wanted.numel() + 3,), -1)[3::2][: wanted.numel()]  # neither contiguous nor at 0
        for piece in pieces(shard, start, stop):
            for box, values in held:
                if (both := overlap(piece.box, box)) is not None:
                    part_of(piece.within(found, start), inside(both, piece.box)).copy_(
                        part_of(values, inside(both, box))
                    )
        assert torch.equal(found, wanted)


@given(st.data())
def test_a_range_is_few_boxes_in_order(data):
    shape = data.draw(SHAPES)
    size = torch.Size(shape).numel()
    start, stop = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    boxes = list(boxes_of_range(start, stop, shape))
    whole = torch.arange(size).view(shape)
    assert torch.cat([part_of(whole, box).reshape(-1) for box in boxes] or [whole.new_empty(0)]).tolist() == list(
        range(start, stop)
    )
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


@given(SHAPES, st.data())
def test_overlaps_are_what_both_hold(shape, data):
    def box():
        return tuple(
            data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda p: p[0] < p[1])) for n in shape
        )

    one, other = box(), box()
    elements = [set(product(*(range(a, b) for a, b in each))) for each in (one, other)]
    both = overlap(one, other)
    assert (set(product(*(range(a, b) for a, b in both))) if both is not None else set()) == elements[0] & elements[1]
    assert size_of(one) == len(elements[0]) and shape_of(whole_box(shape)) == shape


@pytest.mark.parametrize(
    ("boxes", "reason"),
    (
        ([((0, 2), (0, 3))], None),
        ([((0, 1), (0, 3)), ((1, 2), (0, 2)), ((1, 2), (2, 3))], None),
        ([((0, 1), (0, 3)), ((1, 2), (0, 2))], "5 of 6 elements"),
        ([((0, 2), (0, 2)), ((1, 2), (1, 3)), ((0, 1), (2, 3))], r"\(1, 2\), \(1, 2\).* held twice"),
        ([((0, 2), (0, 3)), ((0, 2), (0, 3))], "held twice"),
        ([((0, 2), (0, 4))], "no box of shape"),
        ([((0, 2), (-1, 2))], "no box of shape"),
        ([((0, 2),)], "no box of shape"),
        ([], "0 of 6 elements"),
    ),
)
def test_boxes_that_do_not_make_up_the_whole_are_found(boxes, reason):
    found = cover_exactly(boxes, (2, 3))
    if reason is None:
        assert found is None
    else:
        assert re.search(reason, found)


def test_scalars_and_nothing():
    assert cover_exactly([()], ()) is None
    assert "held twice" in cover_exactly([(), ()], ())
    assert cover_exactly([], (0, 3)) is None
    assert list(pieces(TensorShard((0, 3), -1, ((),), 0), 0, 0)) == []
