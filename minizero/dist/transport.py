"""How slices travel between gloo ranks: the one call that both ways answer, and the first of them, messages.

`exchange` is told what this rank gives each peer, and where what it gets goes. The caller waits for `arrivals` before
it reads what it got, and for `departures` before it changes what it gave.

- **messages** (here): torch's `isend` and `irecv`, over TCP. Works everywhere.
- **memory** (`neighbour.py`): ranks of one host read the slices from each other's memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

# Each is called in one order on all ranks, but not in one order together. `exchange` stands for those of activations.
OPERATIONS = ("all_gather", "reduce_scatter", "exchange")


class Waitable(Protocol):
    """Anything that can be waited for; raises RuntimeError when it failed."""

    def wait(self) -> object: ...


@dataclass(frozen=True)
class Call:
    """Which exchange this is: the same on all ranks, and never twice.

    Attributes:
        operation: index in `OPERATIONS`. unit: whom it serves. number: of the calls of this operation, from 0.
    """

    operation: int
    unit: str
    number: int

    @property
    def unit_hash(self) -> int:
        """32 bits of the unit's name."""
        return zlib.crc32(self.unit.encode())

    @property
    def tag(self) -> int:
        """The tag of its messages; among themselves they keep their order.

        It holds the unit, so that messages of different units never meet: of different sizes they would abort the
        process inside gloo. gloo's own tags begin at 2**24.
        """
        return self.operation << 22 | self.unit_hash % (1 << 10) << 12 | self.number % (1 << 12)


@dataclass
class Exchange:
    """A running exchange: `arrivals` first, then `departures`."""

    arrivals: list[Waitable] = field(default_factory=list)
    departures: list[Waitable] = field(default_factory=list)


class Transport(Protocol):
    """Moves pieces between this rank and its peers."""

    name: str

    def exchange(
        self, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[Tensor]], call: Call
    ) -> Exchange:
        """Start giving `outgoing[peer]` to each peer and getting `incoming[peer]` from it.

        Pieces are 1-D, contiguous and on the host; both sides list them in the same order and sizes.
        """
        ...


class Messages:
    """Every piece is a message of torch's gloo backend."""

    name = "messages"

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_process_group_ranks(group)

    def exchange(
        self, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[Tensor]], call: Call
    ) -> Exchange:
        arrivals = [self._receive(piece, peer, call.tag) for peer, pieces in incoming.items() for piece in pieces]
        departures = [self._send(piece, peer, call.tag) for peer, pieces in outgoing.items() for piece in pieces]
        return Exchange(arrivals, departures)

    def _send(self, tensor: Tensor, peer: int, tag: int) -> Waitable:
        request = dist.isend(tensor, self.ranks[peer], group=self.group, tag=tag)
        assert request is not None
        return request

    def _receive(self, tensor: Tensor, peer: int, tag: int) -> Waitable:
        request = dist.irecv(tensor, self.ranks[peer], group=self.group, tag=tag)
        assert request is not None
        return request
