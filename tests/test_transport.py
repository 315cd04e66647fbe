"""Slices as messages or out of a neighbour's memory: the same bits, the same errors."""

from __future__ import annotations

import os
import re
import subprocess
import time
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from harness import DistributedError, run_distributed
from test_engine import Branches
from toys import batches, make
from training import settings, train

import minizero
from minizero.dist import neighbour
from minizero.dist.collectives import Communicator
from minizero.dist.dims import ParallelDims
from minizero.dist.ledger import CommLedger
from minizero.dist.mesh import build_mesh
from minizero.dist.sharding import FlatLayout
from minizero.dist.transport import Call

MEMORY = {"timeout": 20.0, "transport": "memory"}
MESSAGES = {"timeout": 20.0, "transport": "messages"}


def communicator(kind: str, timeout: float = 20.0) -> Communicator:
    world = dist.get_world_size()
    mesh = build_mesh(ParallelDims(world), timeout)
    return Communicator(mesh, "dp", CommLedger(), transport=kind, timeout=timeout)


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
@pytest.mark.parametrize("world", (2, 4))
def test_training_does_not_depend_on_the_transport(stage, world):
    one, other = (run_distributed(train, world, "toy", stage, 6, 2, dist=kind) for kind in (MESSAGES, MEMORY))
    assert [(r.losses, r.norms) for r in one] == [(r.losses, r.norms) for r in other]
    assert all(torch.equal(other[0].weights[name], value) for name, value in one[0].weights.items())
    for operation in ("all_gather", "reduce_scatter"):  # the ledger counts what crosses between ranks, not how
        assert one[0].counts.keys() == other[0].counts.keys()
        assert all(one[0].counts[key] == other[0].counts[key] for key in one[0].counts if key[1] == operation)


@pytest.mark.parametrize("name", ("adapters", "unused", "twice", "outside", "recomputed", "hf_gpt2"))
@pytest.mark.parametrize("overlap", (False, True))
def test_awkward_models_out_of_memory(name, overlap):
    one, other = (
        run_distributed(train, 2, name, 3, 3, dist=kind, zero={"stage": 3, "overlap": overlap})[0]
        for kind in (MESSAGES, MEMORY)
    )
    assert (one.losses, one.norms) == (other.losses, other.norms)


def train_branches(overlap: bool, prefetch: bool) -> list[float]:
    config = settings(3, 2, zero={"stage": 3, "overlap": overlap, "prefetch": prefetch}, dist=MEMORY)
    engine, *_ = minizero.initialize(model=Branches(), config=config)
    return [float(engine.train_batch(iter([b]))) for b in batches(4)]


def test_branches_do_not_hang():
    runs = [
        run_distributed(train_branches, 2, overlap, prefetch, timeout=30)
        for overlap in (False, True)
        for prefetch in (False, True)
    ]
    assert all(run == runs[0] for run in runs)


def pieces_of_every_size(kind: str) -> list[torch.Tensor]:
    """Shards of one element to 1.2 MB; rank r's are filled with r + 1."""
    comm = communicator(kind)
    gathered = []
    for numel in (1, 7, 65_537, 300_001):
        flat = torch.zeros(comm.size * numel)
        flat[comm.rank * numel : (comm.rank + 1) * numel] = comm.rank + 1
        comm.all_gather(flat, "u").wait()
        gathered.append(flat)
        layout = FlatLayout((2 * numel - 1,), comm.size)
        out = torch.zeros(layout.shard_size)
        piece = torch.arange(2.0 * numel - 1) * (comm.rank + 1)
        comm.reduce_scatter([piece], layout, out, "u", wire_dtype=torch.float32, accumulate=False).wait()
        gathered.append(out)
    comm.settle()
    return gathered


@pytest.mark.parametrize("world", (2, 4))
def test_all_sizes_arrive(world):
    expected = run_distributed(pieces_of_every_size, world, "messages")
    for kind in ("memory", "auto"):
        found = run_distributed(pieces_of_every_size, world, kind)
        assert all(torch.equal(a, b) for f, e in zip(found, expected, strict=True) for a, b in zip(f, e, strict=True))
    for rank, shard in enumerate(expected[0][-2].chunk(world)):
        assert torch.equal(shard, torch.full((300_001,), rank + 1.0))


def test_a_big_piece_is_read_in_parts(monkeypatch):
    monkeypatch.setattr(neighbour, "LARGEST_COPY", 1000)
    source, target = torch.randn(1003), torch.zeros(1003)
    neighbour.read_memory(os.getpid(), source.data_ptr(), target)
    assert torch.equal(source, target)


def write_after(settling: str) -> list[float]:
    """Rank 1 reads late. Rank 0 overwrites what it lent, as soon as it may."""
    comm = communicator("memory")
    flat = torch.full((2,), comm.rank + 1.0)
    work = comm.all_gather(flat, "u")
    if comm.rank == 1:
        time.sleep(0.5)
    work.wait()
    if settling == "settle":
        comm.settle()
    elif settling == "gather_rows":
        comm.gather_rows(torch.zeros(1), "u")
    elif settling == "broadcast":
        comm.broadcast(torch.zeros(1), 0, "u")
    result = flat.clone()
    flat.fill_(-1.0)
    time.sleep(1.0)
    return result.tolist()


@pytest.mark.parametrize("settling", ("settle", "gather_rows", "broadcast"))
def test_what_was_lent_may_be_written_once_settled(settling):
    assert run_distributed(write_after, 2, settling) == [[1.0, 2.0]] * 2


def test_without_settling_a_late_reader_sees_the_new_values():
    assert run_distributed(write_after, 2, "nothing")[1] == [-1.0, 2.0]  # the test above can fail


def last_step_then_leave(stage: int) -> None:
    """Rank 1 is gone the moment it is done; rank 0 may take its time."""
    engine, *_ = minizero.initialize(model=make("toy"), config=settings(stage, 2, dist=MEMORY))
    settle = engine.comm.settle

    def slowly() -> None:
        if dist.get_rank() == 0:
            time.sleep(0.3)
        settle()

    engine.comm.settle = slowly
    engine.train_batch(iter([batches(1)[0]]))
    if dist.get_rank() == 1:
        os._exit(0)


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_a_rank_that_is_done_may_leave(stage):
    with pytest.raises(DistributedError, match="exited with code 0") as caught:
        run_distributed(last_step_then_leave, 2, stage)
    assert list(caught.value.failures) == [1]


# ---- where memory cannot be read ----


def on_two_hosts(kind: str) -> str:
    host = f"machine {dist.get_rank()}"
    with patch.object(neighbour, "host_identity", lambda: host):
        return communicator(kind).transport.name


def out_of_reach(kind: str) -> str:
    """What a container without the permission sees on one rank."""
    denied = PermissionError(1, "Operation not permitted") if dist.get_rank() == 1 else None
    with patch.object(neighbour, "read_memory", side_effect=denied, wraps=neighbour.read_memory):
        return communicator(kind).transport.name


@pytest.mark.parametrize(
    ("function", "reason"), ((on_two_hosts, "is on another host"), (out_of_reach, "Operation not permitted"))
)
def test_one_rank_that_cannot_read_turns_it_off_for_all(function, reason):
    assert run_distributed(function, 2, "auto") == ["messages", "messages"]
    with pytest.raises(DistributedError, match="legal here: messages, auto") as caught:
        run_distributed(function, 2, "memory")
    assert len(caught.value.failures) == 2
    assert all(reason in text for text in caught.value.failures.values())


def uneven_offers() -> None:
    comm = communicator("memory", timeout=2.0)
    layouts = FlatLayout((100,), 2), FlatLayout((90,), 2)
    out = torch.zeros(layouts[comm.rank].shard_size)
    piece = torch.ones(layouts[comm.rank].sizes[0])
    comm.reduce_scatter([piece], layouts[comm.rank], out, "u", wire_dtype=piece.dtype, accumulate=False).wait()


def test_sizes_that_differ_are_named():
    with pytest.raises(DistributedError) as caught:
        run_distributed(uneven_offers, 2, timeout=20)
    assert re.search(
        r"reduce_scatter of u .* rank \d offers \[\d+\] bytes where \[\d+\] are expected", str(caught.value), re.S
    )


def other_unit() -> None:
    comm = communicator("memory", timeout=5.0)
    comm.all_gather(torch.zeros(2), f"unit {comm.rank}").wait()


def test_units_that_differ_are_named_at_once():
    begin = time.monotonic()
    with pytest.raises(DistributedError, match="is in the same call of another unit than unit") as caught:
        run_distributed(other_unit, 2, timeout=20)
    assert len(caught.value.failures) == 2 and time.monotonic() - begin < 4


def never_join() -> None:
    comm = communicator("memory", timeout=1.0)
    if comm.rank == 0:
        comm.all_gather(torch.zeros(2), "u").wait()
    time.sleep(1.5)


def test_a_rank_that_does_not_join_is_named():
    with pytest.raises(DistributedError, match="rank 1 did not join within 1 s"):
        run_distributed(never_join, 2, timeout=20)


def more_calls_than_a_board_holds() -> bool:
    """Gathers that are not settled between: the lender waits for its readers before it forgets a call."""
    comm = communicator("memory")
    for number in range(2 * neighbour.CALLS + 3):
        flat = torch.full((comm.size,), -1.0)
        flat[comm.rank] = number + comm.rank
        comm.all_gather(flat, "u").wait()
        if flat.tolist() != [number + float(rank) for rank in range(comm.size)]:
            return False
    comm.settle()
    return True


@pytest.mark.parametrize("world", (2, 4))
def test_a_board_is_written_over_only_when_read(world):
    assert run_distributed(more_calls_than_a_board_holds, world) == [True] * world


def die_lending() -> None:
    """Rank 1 offers its memory and dies before it is read."""
    comm = communicator("memory", timeout=5.0)
    work = comm.all_gather(torch.ones(2), "u")
    if comm.rank == 1:
        time.sleep(0.3)  # let the offer leave
        os._exit(7)
    time.sleep(1.5)
    work.wait()
    comm.settle()


def test_a_rank_that_died_is_named():
    with pytest.raises(DistributedError, match=r"rank 0: all_gather of u .*failed.*a peer died") as caught:
        run_distributed(die_lending, 2, timeout=20)
    assert "CollectiveError" in caught.value.failures[0]


def test_a_reader_that_ends_has_either_marked_or_is_named():
    """One that ended after it had read is no failure; one that ended before must not be taken for a reader."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    board = neighbour.Board(2)
    peers = [neighbour.Places(pid, board.memory.data_ptr(), 2) for pid in (os.getpid(), gone.pid)]
    memory = neighbour.NeighbourMemory(0, board, peers, timeout=5.0)
    call = Call(0, "unit", 0)
    lending = memory.lend({1: [torch.zeros(3)]}, call)
    with pytest.raises(RuntimeError, match=f"rank 1 .process {gone.pid}. cannot be read"):
        lending.wait()
    board.marks[call.operation, call.number, 1] = call.number + 1
    lending.wait()
    assert lending.readers == []
    marks = iter((False, True))  # it marks, and ends, between the two looks
    with patch.object(board, "has_mark", lambda *_: next(marks)):
        assert memory.is_marked(call, 1)
