"""Coordinates, flat layouts and collectives, against naive twins."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from hypothesis import given, settings
from hypothesis import strategies as st

from minizero.dist.collectives import CollectiveError, Communicator, Work
from minizero.dist.dims import AXES, ParallelDims
from minizero.dist.ledger import CommLedger
from minizero.dist.mesh import build_mesh
from minizero.dist.sharding import FlatLayout

degrees = st.integers(1, 4)


@given(degrees, degrees, degrees, degrees)
def test_coordinates_are_a_bijection_and_groups_a_partition(dp, tp, pp, cp):
    world = dp * tp * pp * cp
    dims = ParallelDims(world, tp=tp, pp=pp, cp=cp)
    assert dims.dp == dp
    assert [dims.rank(dims.coordinates(rank)) for rank in range(world)] == list(range(world))
    for axis in AXES:
        groups = dims.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(world))
        assert all(len(group) == dims.degrees[axis] for group in groups)
    assert dims.ranks_along("tp", 0) == tuple(range(tp))  # neighbours


@pytest.mark.parametrize("bad", ({"tp": 3}, {"tp": 0}, {"pp": 2, "cp": 4}))
def test_degrees_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match="does not divide the world size 4|must be at least 1"):
        ParallelDims(4, **bad)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=12), st.integers(1, 9))
def test_spans_hold_every_element_once(sizes, world):
    layout = FlatLayout(tuple(sizes), world)
    flat = torch.full((layout.padded_size,), -1)
    names = torch.arange(sum(sizes))
    flat[: sum(sizes)] = names
    parameters = [names[o : o + s] for o, s in zip(layout.offsets, sizes, strict=True)]
    seen = []
    for rank in range(world):
        shard = flat[rank * layout.shard_size : (rank + 1) * layout.shard_size]
        for span in layout.spans[rank]:
            part = parameters[span.index][span.start : span.stop]
            assert torch.equal(shard[span.offset : span.offset + span.numel], part)
            seen += part.tolist()
    assert seen == names.tolist()
    assert layout.padded_size - sum(sizes) < 32 * world + world


def communicate(sizes: tuple[int, ...], wire: torch.dtype, out: torch.dtype, transport: str) -> dict:
    world, rank = dist.get_world_size(), dist.get_rank()
    comm = Communicator(build_mesh(ParallelDims(world)), "dp", CommLedger(), check=True, transport=transport)
    layout = FlatLayout(sizes, world)
    pieces = [
        torch.randn(size, generator=torch.Generator().manual_seed(100 * rank + i)) for i, size in enumerate(sizes)
    ]
    shard = torch.zeros(layout.shard_size, dtype=out)
    for accumulate in (False, True):
        comm.reduce_scatter(pieces, layout, shard, "u", wire_dtype=wire, accumulate=accumulate).wait()
    flat = torch.zeros(layout.padded_size, dtype=out)
    flat[rank * layout.shard_size : (rank + 1) * layout.shard_size] = shard
    comm.all_gather(flat, "u").wait()
    texts = comm.gather_bytes(b"x" * rank, "u", torch.device("cpu"))
    value = torch.tensor([float(rank)])
    comm.broadcast(value, world - 1, "u")
    return {"flat": flat, "pieces": pieces, "texts": texts, "broadcast": float(value)}


@pytest.mark.parametrize("world", (1, 2, 4, 8))
@pytest.mark.parametrize(("wire", "out"), ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)))
@pytest.mark.parametrize("transport", ("messages", "memory"))
def test_reduce_scatter_sums_in_rank_order(world, wire, out, transport):
    sizes = (7, 1, 250, 15, 0, 33)
    results = run_distributed(communicate, world, sizes, wire, out, transport)
    total = sum(sizes)
    expected = torch.zeros(total, dtype=out)
    for result in results:  # the naive twin: left to right, in the accumulation dtype
        expected = expected + torch.cat(result["pieces"]).to(wire).to(out)
    for result in results:
        assert torch.equal(result["flat"][:total], expected + expected)  # reduced twice, the second time added
        assert result["flat"][total:].abs().sum() == 0
        assert result["texts"] == [b"x" * rank for rank in range(world)]
        assert result["broadcast"] == world - 1


def test_ledger_counts_by_axis_operation_phase_and_unit():
    ledger = CommLedger()
    with ledger.phase("forward"):
        ledger.record("dp", "all_gather", "a", 10, 5)
        ledger.record("dp", "all_gather", "b", 20, 10)
    ledger.record("tp", "all_reduce", "a", 7, 7)
    assert (ledger.total().payload, ledger.total(axis="dp").calls, ledger.total(unit="a").wire) == (37, 2, 12)
    assert ledger.total(phase="forward", operation="all_gather").payload == 30
    assert ledger.take() == {"dp": {"all_gather": 30}, "tp": {"all_reduce": 7}}
    assert ledger.take() == {}


def test_what_fails_when_it_is_posted_is_named_as_what_fails_later():
    def post() -> None:
        raise RuntimeError("Connection closed by peer")

    work = Work("all_gather of blocks.0", lambda here: f"  rank 0 waits for {here}", CommLedger())
    with pytest.raises(CollectiveError, match=r"(?s)all_gather of blocks.0 failed .*closed by peer.*rank 0 waits for"):
        work.posted(post)
