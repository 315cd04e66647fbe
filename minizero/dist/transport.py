"""How slices travel between gloo ranks: as messages, or read straight from a neighbour's memory.

Both transports answer one call, `exchange`: what this rank gives each peer, and where what it gets goes. The caller
waits for `arrivals` before it reads what it got, and for `departures` before it changes what it gave.

- **messages**: torch's `isend` and `irecv`, over TCP. Works everywhere.
- **memory**: ranks of one host. The addresses travel as a small message; the receiver copies from the owner's memory
  with one system call (`process_vm_readv`, Linux) and answers with a small message. One copy, where loopback TCP
  makes two in the kernel: 51 MB take 6 ms instead of 33 to 55. Nothing is copied before the receiver waits, so there
  is no background thread that competes with the computation. This is the path that NCCL calls shared memory and MPI
  calls cross-memory attach.

Whether memory can be read is decided once per mesh axis, by trying: every rank reads a secret from every peer. Where
it can, `auto` still sends what is smaller than `WORTH_READING`: an offer and an answer cost more than a small message.

Glossary (K = pieces for one peer):
    offer   [2, K] int64   addresses and sizes in bytes of those pieces, as they lie in the owner's process
    answer  [1]    int64   "I have read them"
"""

from __future__ import annotations

import ctypes
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)  # <linux/prctl.h>
LARGEST_READ = 1 << 30  # bytes; the kernel cuts a single read off at 2 GiB
SECRET_BYTES = 16
WORTH_READING = 256 << 10  # bytes; an offer and its answer take about 0.15 ms longer than a message, at 1.2 against 8 GB/s


class Waitable(Protocol):
    """Anything that can be waited for; raises RuntimeError when it failed."""

    def wait(self) -> object: ...


@dataclass
class Exchange:
    """A running exchange: `arrivals` first, then `departures`."""

    arrivals: list[Waitable] = field(default_factory=list)
    departures: list[Waitable] = field(default_factory=list)


class Transport(Protocol):
    """Moves pieces between this rank and its peers."""

    name: str

    def exchange(
        self, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[Tensor]], tag: int
    ) -> Exchange:
        """Start giving `outgoing[peer]` to each peer and getting `incoming[peer]` from it.

        Pieces are 1-D, contiguous and on the host; both sides list them in the same order and sizes. `tag` is the
        same on all ranks; exchanges of one tag are called in one order.
        """
        ...


class Messages:
    """Every piece is a message of torch's gloo backend."""

    name = "messages"

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_process_group_ranks(group)

    def exchange(
        self, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[Tensor]], tag: int
    ) -> Exchange:
        arrivals = [self.receive(piece, peer, tag) for peer, pieces in incoming.items() for piece in pieces]
        departures = [self.send(piece, peer, tag) for peer, pieces in outgoing.items() for piece in pieces]
        return Exchange(arrivals, departures)

    def send(self, tensor: Tensor, peer: int, tag: int) -> Waitable:
        request = dist.isend(tensor, self.ranks[peer], group=self.group, tag=tag)
        assert request is not None
        return request

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Waitable:
        request = dist.irecv(tensor, self.ranks[peer], group=self.group, tag=tag)
        assert request is not None
        return request


class NeighbourMemory:
    """The receiver reads what it is given from its owner's memory; only addresses and answers are messages.

    Args:
        pids: process number of every rank of the group.
        smallest: bytes for one peer below which the pieces themselves are sent.
    """

    name = "memory"

    def __init__(self, messages: Messages, pids: Sequence[int], smallest: int) -> None:
        self.messages = messages
        self.pids = pids
        self.smallest = smallest

    def exchange(
        self, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[Tensor]], tag: int
    ) -> Exchange:
        small_in = {peer: pieces for peer, pieces in incoming.items() if total_bytes(pieces) < self.smallest}
        small_out = {peer: pieces for peer, pieces in outgoing.items() if total_bytes(pieces) < self.smallest}
        running = self.messages.exchange(small_out, small_in, tag)
        for peer in incoming.keys() - small_in.keys():
            running.arrivals.append(self.borrow(peer, incoming[peer], tag))
        for peer in outgoing.keys() - small_out.keys():
            running.departures.append(self.lend(peer, outgoing[peer], tag))
        return running

    def borrow(self, peer: int, targets: Sequence[Tensor], tag: int) -> Reading:
        offer = torch.empty(2, len(targets), dtype=torch.int64)
        return Reading(self, peer, tag, self.messages.receive(offer, peer, tag), offer, targets)

    def lend(self, peer: int, pieces: Sequence[Tensor], tag: int) -> Lending:
        offer = torch.tensor([[p.data_ptr() for p in pieces], [p.nbytes for p in pieces]], dtype=torch.int64)
        answer = torch.empty(1, dtype=torch.int64)
        sent = self.messages.send(offer, peer, tag)
        return Lending(sent, self.messages.receive(answer, peer, tag), (offer, answer, pieces))


@dataclass
class Reading:
    """Pieces of `peer` that are copied into `targets` when they are waited for."""

    transport: NeighbourMemory
    peer: int
    tag: int
    request: Waitable
    offer: Tensor
    targets: Sequence[Tensor]

    def wait(self) -> None:
        self.request.wait()
        pid = self.transport.pids[self.peer]
        for address, nbytes, target in zip(*self.offer.tolist(), self.targets, strict=True):
            if nbytes != target.nbytes:
                raise RuntimeError(f"rank {self.peer} offers {nbytes} bytes where {target.nbytes} are expected")
            try:
                read_memory(pid, address, target)
            except OSError as error:
                raise RuntimeError(f"rank {self.peer} (process {pid}) cannot be read: {error}") from error
        answer = torch.zeros(1, dtype=torch.int64)
        self.transport.messages.send(answer, self.peer, self.tag).wait()


@dataclass
class Lending:
    """Pieces that a peer may still be reading, kept alive until it answers."""

    sent: Waitable
    answered: Waitable
    kept: object

    def wait(self) -> None:
        self.sent.wait()
        self.answered.wait()
        self.kept = None


def total_bytes(pieces: Sequence[Tensor]) -> int:
    """Bytes of what goes to, or comes from, one peer."""
    return sum(piece.nbytes for piece in pieces)


def read_memory(pid: int, address: int, target: Tensor) -> None:
    """Copy `target.nbytes` bytes at `address` of process `pid` into the contiguous host tensor `target`.

    Raises OSError when that process is gone, or this one may not read it.
    """
    done = 0
    while done < target.nbytes:
        size = min(target.nbytes - done, LARGEST_READ)
        here = IoVector(target.data_ptr() + done, size)
        there = IoVector(address + done, size)
        copied = libc().process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if copied <= 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        done += copied


class IoVector(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def libc() -> ctypes.CDLL:
    """The C library that this process runs on, already loaded."""
    library = ctypes.CDLL(None, use_errno=True)
    library.process_vm_readv.restype = ctypes.c_ssize_t
    return library


def choose_transport(
    group: dist.ProcessGroup, wanted: str, everyone: Callable[[bytes], list[bytes]]
) -> Messages | NeighbourMemory:
    """The transport of a gloo group; collective.

    Args:
        wanted: "messages"; "memory", for pieces of any size; or "auto": memory where every rank can read every
            other and the pieces are worth it.
        everyone: gathers each rank's bytes, in rank order.

    Raises ValueError (on every rank) when "memory" is wanted and some rank cannot read another.
    """
    messages = Messages(group)
    if wanted == "messages":
        return messages
    secret = torch.frombuffer(bytearray(secrets.token_bytes(SECRET_BYTES)), dtype=torch.uint8)
    fields = (host_identity(), str(os.getpid()), str(secret.data_ptr()), bytes(secret.tolist()).hex())
    hosts, pids, addresses, values = zip(*(row.decode().split("\n") for row in everyone("\n".join(fields).encode())))
    trouble = ""
    for rank, (pid, address, value) in enumerate(zip(pids, addresses, values, strict=True)):
        trouble = trouble or obstacle(rank, hosts, int(pid), int(address), bytes.fromhex(value))
    reasons = [reason.decode() for reason in everyone(trouble.encode()) if reason]
    if not reasons:
        return NeighbourMemory(messages, [int(pid) for pid in pids], smallest=0 if wanted == "memory" else WORTH_READING)
    if wanted == "memory":
        raise ValueError(f"dist.transport memory: {reasons[0]}; legal here: messages, auto")
    return messages


def obstacle(rank: int, hosts: Sequence[str], pid: int, address: int, secret: bytes) -> str:
    """Why this process cannot read `rank`'s memory; empty when it can."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no process_vm_readv"
    if hosts[rank] != host_identity():
        return f"rank {rank} is on another host, or in another container"
    found = torch.zeros(SECRET_BYTES, dtype=torch.uint8)
    try:
        read_memory(pid, address, found)
    except (OSError, AttributeError) as error:
        return f"the memory of rank {rank} cannot be read ({error})"
    return "" if bytes(found.tolist()) == secret else f"process {pid} is not rank {rank}"


def host_identity() -> str:
    """Equal in two processes only if a process number means the same to both; lets neighbours read this process.

    Yama's default (`kernel.yama.ptrace_scope = 1`) forbids siblings to read each other unless the one read allows it.
    """
    if not sys.platform.startswith("linux"):
        return sys.platform
    libc().prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
