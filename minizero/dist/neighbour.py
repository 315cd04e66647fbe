"""Ranks of one host read slices straight from each other's memory.

One system call (`process_vm_readv`, Linux) copies from the owner's process into the reader's: one copy, where loopback
TCP makes two in the kernel and wakes a thread on either side. Nothing is copied before the receiver waits, so there is
no background thread that competes with the computation. NCCL calls this path shared memory, MPI cross-memory attach.

Nothing is sent to agree on a transfer either. Each rank keeps a **board** in its own memory, which says where the
pieces of a call lie. A receiver looks at its peer's board until the call is there, copies, and marks it on that board
(`process_vm_writev`) as read; the owner waits for the marks before it changes what it gave, or leaves. A look takes
2 us, a small message through gloo 150.

Whether memory can be read is decided once per mesh axis, by trying: every rank reads a secret from every peer's board.
To be read, a process must allow it (`prctl`, see `allow_neighbours`); other processes of the same user may then too.

Glossary (N = ranks, C = CALLS remembered; all int64):
    board   one tensor, whose parts follow
    secret  [2]                 proves that a process number is the rank it is taken for
    offers  [operations, C, 4]  of call number n, in column n % C: n + 1, the unit's hash, address and rows of its table
    marks   [operations, C, N]  n + 1 once rank r has read what it was given in call n; written by rank r
    table   [rows, 3]           receiver, address, bytes of each piece that a call gives
"""

from __future__ import annotations

import ctypes
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minizero.dist.transport import OPERATIONS, Call, Exchange, Messages, Waitable

PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)  # <linux/prctl.h>
LARGEST_COPY = 1 << 30  # bytes; the kernel cuts a single copy off at 2 GiB
CALLS = 256  # that a board remembers of each operation; a call that would overwrite an unread one waits for its readers
WORD = 8  # bytes


@dataclass(frozen=True)
class Patience:
    """How a rank waits for another: `looks` at once, then pauses that double, from `first` to `longest` seconds."""

    looks: int = 50
    first: float = 20e-6
    longest: float = 1e-3


LONG_WAITS = Patience(looks=2, first=50e-6, longest=4e-4)
"""For the ranks of a pipeline, who wait for whole computations: looking takes time from whoever computes."""


@dataclass(frozen=True)
class Places:
    """Where the parts of a rank's board lie in the memory of its process."""

    pid: int
    board: int
    world: int
    operations: int = len(OPERATIONS)

    @staticmethod
    def sizes(world: int, operations: int) -> list[int]:
        """Words of secret, offers and marks."""
        return [2, 4 * operations * CALLS, world * operations * CALLS]

    def offer(self, call: Call) -> int:
        return self.board + WORD * (2 + 4 * (call.operation * CALLS + call.number % CALLS))

    def mark(self, call: Call, reader: int) -> int:
        column = call.operation * CALLS + call.number % CALLS
        return self.board + WORD * (sum(self.sizes(self.world, self.operations)[:2]) + column * self.world + reader)


class Board:
    """What this rank shows its peers, and what they mark on it."""

    def __init__(self, world: int, operations: int = len(OPERATIONS)) -> None:
        sizes = Places.sizes(world, operations)
        self.memory = torch.zeros(sum(sizes), dtype=torch.int64)
        secret, offers, marks = self.memory.split(sizes)
        secret.copy_(torch.frombuffer(bytearray(secrets.token_bytes(2 * WORD)), dtype=torch.int64))
        self.secret = bytes(secret.numpy().tobytes())
        self.offers = offers.view(operations, CALLS, 4)
        self.marks = marks.view(operations, CALLS, world)

    def offer(self, call: Call, table: Tensor) -> None:
        """Show where the pieces of `call` lie. What readers wait for is written last: x86-64 keeps stores in order."""
        row = self.offers[call.operation, call.number % CALLS]
        row[1:] = torch.tensor([call.unit_hash, table.data_ptr(), len(table)])
        row[0] = call.number + 1

    def has_mark(self, call: Call, reader: int) -> bool:
        return self.marks[call.operation, call.number % CALLS, reader].item() == call.number + 1


class NeighbourMemory:
    """The transport: boards and reads.

    Args:
        rank: this one. board: what it shows. peers: where the boards of all ranks are, in rank order.
        timeout: seconds that a peer may take to offer, or to read.
    """

    name = "memory"

    def __init__(self, rank: int, board: Board, peers: Sequence[Places], timeout: float) -> None:
        self.rank = rank
        self.board = board
        self.peers = peers
        self.timeout = timeout
        self.patience = Patience()
        self._lent: dict[tuple[int, int], Lending] = {}  # by operation and column of the board

    def exchange(
        self, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[Tensor]], call: Call
    ) -> Exchange:
        lending = self.lend(outgoing, call)
        arrivals = [Reading(self, call, peer, pieces) for peer, pieces in incoming.items()]
        return Exchange([*arrivals], [lending])

    def lend(self, outgoing: Mapping[int, Sequence[Tensor]], call: Call) -> Lending:
        """Show peers where what `call` gives them lies; the returned waits until they have read it."""
        column = call.operation, call.number % CALLS
        if column in self._lent:
            self._lent.pop(column).wait()
        rows = [(peer, piece.data_ptr(), piece.nbytes) for peer, pieces in outgoing.items() for piece in pieces]
        table = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
        self._lent[column] = lending = Lending(self, call, list(outgoing), (table, outgoing))
        self.board.offer(call, table)
        return lending

    def wait_until(self, there: Callable[[], bool], peer: int, doing: str, timeout: timedelta | None = None) -> None:
        """Return when `there()`, which raises RuntimeError when `peer` is gone. So does this after the timeout."""
        limit = self.timeout if timeout is None else timeout.total_seconds()
        deadline, looks, pause = time.monotonic() + limit, 0, self.patience.first
        while not there():
            looks += 1
            if looks < self.patience.looks:
                os.sched_yield()
                continue
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {peer} did not {doing} within {limit:g} s")
            time.sleep(pause)
            pause = min(2 * pause, self.patience.longest)

    def read(self, peer: int, address: int, target: Tensor) -> None:
        """Fill `target` from `address` of `peer`. Raises RuntimeError when that process cannot be read any more."""
        try:
            read_memory(self.peers[peer].pid, address, target)
        except OSError as error:
            raise self._gone(peer, error) from error

    def mark(self, call: Call, owner: int) -> None:
        """Tell `owner` that this rank has read what it was given in `call`."""
        word = torch.tensor([call.number + 1])
        try:
            copy_memory(LIBC.process_vm_writev, self.peers[owner].pid, self.peers[owner].mark(call, self.rank), word)
        except OSError as error:
            raise self._gone(owner, error) from error

    def is_marked(self, call: Call, reader: int) -> bool:
        """Whether `reader` has read what `call` gave it. Raises RuntimeError when it has not, and is gone."""
        if not self.board.has_mark(call, reader):
            try:
                self.look(reader, Word(self.peers[reader].pid, self.peers[reader].board))
            except RuntimeError:
                if not self.board.has_mark(call, reader):  # else it has marked, and ended, since the first look
                    raise
                return True
        return self.board.has_mark(call, reader)

    def look(self, peer: int, word: Word) -> int:
        """The word of `peer`. Raises RuntimeError when that process cannot be read any more."""
        try:
            return word.read()
        except OSError as error:
            raise self._gone(peer, error) from error

    def _gone(self, peer: int, error: OSError) -> RuntimeError:
        return RuntimeError(f"rank {peer} (process {self.peers[peer].pid}) cannot be read: {error}")


@dataclass
class Reading:
    """What `peer` gives in `call`, copied into `targets` when it is waited for."""

    transport: NeighbourMemory
    call: Call
    peer: int
    targets: Sequence[Tensor]

    def wait(self) -> None:
        transport, pieces = self.transport, self.pieces()
        found, wanted = [nbytes for _, nbytes in pieces], [target.nbytes for target in self.targets]
        if found != wanted:
            raise RuntimeError(f"rank {self.peer} offers {found} bytes where {wanted} are expected")
        for (start, _), target in zip(pieces, self.targets, strict=True):
            transport.read(self.peer, start, target)
        transport.mark(self.call, self.peer)

    def pieces(self) -> list[tuple[int, int]]:
        """(address, bytes) of what the peer gives this rank, once it does."""
        transport, call, place = self.transport, self.call, self.transport.peers[self.peer].offer(self.call)
        number = Word(transport.peers[self.peer].pid, place)
        transport.wait_until(lambda: transport.look(self.peer, number) == call.number + 1, self.peer, "join")
        offer = torch.empty(4, dtype=torch.int64)
        transport.read(self.peer, place, offer)
        _, unit, address, rows = offer.tolist()
        if unit != call.unit_hash:
            raise RuntimeError(f"rank {self.peer} is in the same call of another unit than {call.unit}")
        table = torch.empty(rows, 3, dtype=torch.int64)
        transport.read(self.peer, address, table)
        return [(start, nbytes) for rank, start, nbytes in table.tolist() if rank == transport.rank]


@dataclass
class Lending:
    """What this rank gives in `call`, kept alive until the `readers` are done."""

    transport: NeighbourMemory
    call: Call
    readers: list[int]
    kept: object

    def wait(self, timeout: timedelta | None = None) -> None:
        transport = self.transport
        for peer in self.readers:
            transport.wait_until(partial(transport.is_marked, self.call, peer), peer, "read what it was given", timeout)
        self.readers, self.kept = [], None


# ---- lists of any size (`links.py`) ----


class NeighbourLinks:
    """Lists of pieces whose sizes the receiver learns from the first; each target has its own row of the board."""

    def __init__(self, memory: NeighbourMemory) -> None:
        self.memory = memory
        memory.patience = LONG_WAITS

    def send(self, target: int, number: int, pieces: Sequence[Tensor]) -> list[Waitable]:
        """Give list `number` to rank `target`."""
        return [self.memory.lend({target: pieces}, Call(target, "", number))]

    def receive(self, source: int, number: int, label: Tensor) -> Incoming:
        """List `number` of rank `source`, whose first piece goes into `label`."""
        return Incoming(Reading(self.memory, Call(self.memory.rank, "", number), source, [label]))


class Incoming:
    """A list that is coming: waited for, its label is there; then `fill` reads the rest."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._rest: list[tuple[int, int]] = []

    def wait(self) -> None:
        first, *self._rest = self._reading.pieces()
        self._reading.transport.read(self._reading.peer, first[0], self._reading.targets[0])

    def fill(self, tensors: Sequence[Tensor]) -> list[Waitable]:
        """What reads the other pieces into `tensors`, and tells the sender so, when it is waited for."""
        return [Filling(self._reading, [address for address, _ in self._rest], tensors)]


@dataclass
class Filling:
    """The pieces behind a label, at `addresses` of the sender, copied into `targets` when they are waited for."""

    reading: Reading
    addresses: list[int]
    targets: Sequence[Tensor]

    def wait(self) -> None:
        reading = self.reading
        for address, target in zip(self.addresses, self.targets, strict=True):
            reading.transport.read(reading.peer, address, target)
        reading.transport.mark(reading.call, reading.peer)


# ---- the system calls ----


def read_memory(pid: int, address: int, target: Tensor) -> None:
    """Copy `target.nbytes` bytes at `address` of process `pid` into the contiguous host tensor `target`.

    Raises OSError when that process is gone, or this one may not read it.
    """
    copy_memory(LIBC.process_vm_readv, pid, address, target)


def copy_memory(way: Any, pid: int, address: int, tensor: Tensor) -> None:
    """`process_vm_readv` or `process_vm_writev` between `tensor` and as many bytes at `address` of process `pid`."""
    done = 0
    while done < tensor.nbytes:
        size = min(tensor.nbytes - done, LARGEST_COPY)
        here = IoVector(tensor.data_ptr() + done, size)
        there = IoVector(address + done, size)
        copied = way(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if copied <= 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        done += copied


class IoVector(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class Word:
    """One int64 at `address` of process `pid`, made once to be looked at often."""

    def __init__(self, pid: int, address: int) -> None:
        self._value = ctypes.c_int64()
        here, there = IoVector(ctypes.addressof(self._value), WORD), IoVector(address, WORD)
        self._call = pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0

    def read(self) -> int:
        """What is there now. Raises OSError as `read_memory`."""
        if LIBC.process_vm_readv(*self._call) != WORD:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return self._value.value


LIBC = ctypes.CDLL(None, use_errno=True)  # the C library that this process runs on, already loaded
if sys.platform.startswith("linux"):
    LIBC.process_vm_readv.restype = LIBC.process_vm_writev.restype = ctypes.c_ssize_t


# ---- whether it may be used ----


def choose_transport(
    group: dist.ProcessGroup,
    wanted: str,
    everyone: Callable[[bytes], list[bytes]],
    timeout: float,
    operations: int = len(OPERATIONS),
) -> Messages | NeighbourMemory:
    """The transport of a gloo group; collective.

    Args:
        wanted: "messages", "memory", or "auto": memory where every rank can read every other.
        everyone: gathers each rank's bytes, in rank order.
        timeout: seconds that a peer may take to join a call.
        operations: kinds of calls that are numbered apart.

    Raises ValueError (on every rank) when "memory" is wanted and some rank cannot read another.
    """
    if wanted == "messages":
        return Messages(group)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    board = Board(world, operations)
    allow_neighbours()
    fields = (host_identity(), str(os.getpid()), str(board.memory.data_ptr()), board.secret.hex())
    hosts, pids, addresses, values = zip(
        *(row.decode().split("\n") for row in everyone("\n".join(fields).encode())), strict=True
    )
    peers = [Places(int(pid), int(address), world, operations) for pid, address in zip(pids, addresses, strict=True)]
    trouble = [obstacle(peer, hosts, peers[peer], bytes.fromhex(value)) for peer, value in enumerate(values)]
    first = next((reason for reason in trouble if reason), "")
    reasons = [reason.decode() for reason in everyone(first.encode()) if reason]
    if not reasons:
        return NeighbourMemory(rank, board, peers, timeout)
    if wanted == "memory":
        raise ValueError(f"dist.transport memory: {reasons[0]}; legal here: messages, auto")
    return Messages(group)


def obstacle(rank: int, hosts: Sequence[str], place: Places, secret: bytes) -> str:
    """Why this process cannot read `rank`'s memory; empty when it can."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return f"{sys.platform} on {platform.machine()}: only linux on x86_64 reads a neighbour's memory"
    if hosts[rank] != host_identity():
        return f"rank {rank} is on another host, or in another container"
    found = torch.zeros(len(secret), dtype=torch.uint8)
    try:
        read_memory(place.pid, place.board, found)
    except OSError as error:
        return f"the memory of rank {rank} cannot be read ({error})"
    return "" if bytes(found.tolist()) == secret else f"process {place.pid} is not rank {rank}"


def host_identity() -> str:
    """Equal in two processes only if a process number means the same to both."""
    if not sys.platform.startswith("linux"):
        return sys.platform
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def allow_neighbours() -> None:
    """Let processes of the same user read this one, from now on.

    Yama's default (`kernel.yama.ptrace_scope = 1`) forbids siblings to read each other unless the one read allows it.
    """
    if sys.platform.startswith("linux"):
        LIBC.prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)
