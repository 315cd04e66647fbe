"""The only place that communicates (beneath it `transport.py` and `neighbour.py` move slices between gloo ranks).

A `Communicator` is one mesh axis seen from one rank. Each call says which unit it serves, is entered in the
`CommLedger`, and returns a `Work` whose `wait` gives the result, so that callers may compute meanwhile.

Which algorithm runs is decided here, per backend:

- **gloo**: slices go point to point, straight between the tensors they belong to, and each rank sums what it
  receives **in rank order**. torch's own reduce-scatter on gloo is an all-reduce and a copy, its all-gather
  copies too: twice the bytes and three times the milliseconds. The sum is done in the accumulation dtype,
  whatever travels, and its order depends on nothing but the rank: this is what makes ZeRO's stages bitwise equal.
  On one host the slices do not travel at all: neighbours read each other's memory (`neighbour.py`).
- **nccl**: the library's collectives, on its own stream; torch's caching allocator is told by stream order.

In debug mode every call first compares a fingerprint over the group. Without it a mismatch shows as a timeout,
because each operation and unit has its own message tag; with torch's gloo alone, two same-shaped collectives in swapped
order would return wrong sums.

Glossary (N = ranks on the axis, S = elements of one shard):
    flat    [N * S]  a whole buffer; rank r's shard is flat[r * S : (r + 1) * S]
    pieces  list of 1-D tensors that, laid behind each other and padded, make a whole buffer without building it
    out     [S]      this rank's shard of a reduction, in the accumulation dtype
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from minizero.dist.ledger import CommLedger
from minizero.dist.mesh import DEFAULT_TIMEOUT, group_along, local_device, new_group
from minizero.dist.neighbour import NeighbourMemory, choose_transport
from minizero.dist.positions import where_everyone_is
from minizero.dist.sharding import FlatLayout, split_sizes
from minizero.dist.transport import OPERATIONS, Call, Exchange, Waitable

T = TypeVar("T")
FINGERPRINT_BYTES = 1024


class CollectiveError(RuntimeError):
    """A collective failed or timed out: a peer died, stalled, or called something else."""


@dataclass
class Work:
    """A running collective. `wait` returns when its result may be read, and raises `CollectiveError` if it failed.

    Attributes:
        description: operation, unit, phase, number. where: asks where the group's ranks are, this one being there.
        ledger: counts the seconds that are spent waiting.
    """

    description: str
    where: Callable[[str], str]
    ledger: CommLedger
    requests: list[Waitable] = field(default_factory=list)
    finish: Callable[[], None] | None = None
    started: float = field(default_factory=time.perf_counter)

    def wait(self) -> None:
        """Block until the result may be read."""
        began = time.perf_counter()
        try:
            for request in self.requests:
                request.wait()
        except RuntimeError as error:
            raise self._failure(error) from error
        self.requests = []
        self.ledger.waited += time.perf_counter() - began
        if self.finish is not None:
            finish, self.finish = self.finish, None
            finish()

    def posted(self, post: Callable[[], T]) -> T:
        """What `post` begins for this. Where messages go to a peer that is known to be dead, that fails already."""
        try:
            return post()
        except RuntimeError as error:
            raise self._failure(error) from error

    def _failure(self, error: RuntimeError) -> CollectiveError:
        elapsed = time.perf_counter() - self.started
        return CollectiveError(
            f"{self.description} failed after {elapsed:.1f} s: a peer died, stalled or called something else "
            f"(--debug.collectives true compares every call). Backend: {error}\n{self.where(self.description)}"
        )


class Communicator:
    """The collectives of one mesh axis.

    Args:
        mesh: the named mesh; None for all ranks, before there is one.
        axis: which of its axes, several as one ("dp_cp"), or "world".
        ledger: where calls and bytes are counted.
        check: compare a fingerprint of every call over the group first (debug mode).
        transport: how slices travel on gloo: "messages", "memory", or "auto".
        timeout: seconds that a peer may take to join a call; that of the mesh's groups.
        group: a process group of the axis' ranks; None takes the mesh's.

    Collective over the axis. Raises ValueError when `transport` is "memory" and ranks cannot read each other.
    """

    def __init__(
        self,
        mesh: DeviceMesh | None,
        axis: str,
        ledger: CommLedger,
        *,
        check: bool = False,
        transport: str = "auto",
        timeout: float = DEFAULT_TIMEOUT,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._mesh, self._wanted, self.timeout = mesh, transport, timeout
        self.axis = axis
        self.group = group_along(mesh, axis, timeout) if group is None else group
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        self.ledger = ledger
        self.check = check
        self._ranks = dist.get_process_group_ranks(self.group)
        self._sequence = 0
        self._calls = dict.fromkeys(OPERATIONS, 0)
        self._lent: list[Work] = []  # what peers may still be reading
        self.transport = None
        if self.size > 1 and dist.get_backend(self.group) == "gloo":
            self.transport = choose_transport(
                self.group, transport, lambda row: self.gather_bytes(row, "transport", torch.device("cpu")), timeout
            )
        # Gathers and reductions are each called in one order on all ranks, but not in one order together.
        self._reduce_group = self.group
        if self.transport is None and self.size > 1:
            self._reduce_group = new_group(self._ranks, timeout, use_local_synchronization=True)

    def along(self, axis: str) -> Communicator:
        """The same for another axis of the mesh, with the same ledger; collective over that axis."""
        return Communicator(
            self._mesh, axis, self.ledger, check=self.check, transport=self._wanted, timeout=self.timeout
        )

    def apart(self) -> Communicator:
        """The same ranks in a gloo group and a ledger of their own, for calls from another thread; collective.

        Ranks meet before, since who waits for a group does not hear of a peer's death until the timeout.
        """
        self.barrier(local_device())
        group = new_group(self._ranks, self.timeout, backend="gloo")
        return Communicator(
            self._mesh, self.axis, CommLedger(), transport="messages", timeout=self.timeout, group=group
        )

    def more_boards(self, operations: int) -> NeighbourMemory | None:
        """Memory of the axis' ranks for other calls, of `operations` kinds; None where slices travel as messages.

        Collective over the axis.
        """
        if not isinstance(self.transport, NeighbourMemory):
            return None
        made = choose_transport(
            self.group,
            "memory",
            lambda row: self.gather_bytes(row, "transport", torch.device("cpu")),
            self.timeout,
            operations,
        )
        assert isinstance(made, NeighbourMemory)
        return made

    # ---- whole buffers and shards ----

    def all_gather(self, flat: Tensor, unit: str, own: Tensor | None = None) -> Work:
        """flat[S_axis] -> flat[all]: every rank's shard of `flat` reaches every rank, in place.

        Peers may read this rank's shard until `settle`, also after the work is waited for: it must stay as it is.
        `own` is another copy of it, for a caller that empties `flat` before.
        """
        work = self._begin(
            "all_gather", unit, flat, flat.numel(), flat.dtype, flat.nbytes // self.size * (self.size - 1)
        )
        if self.size == 1:
            return work
        shards = flat.chunk(self.size)
        if self.transport is None:
            work.requests = [dist.all_gather_into_tensor(flat, shards[self.rank], group=self.group, async_op=True)]
            return work
        mine = (shards[self.rank] if own is None else own).cpu()
        host = {peer: torch.empty_like(mine) if flat.is_cuda else shards[peer] for peer in self._peers()}
        running = self._exchange(
            work,
            {peer: [mine] for peer in host},
            {peer: [shard] for peer, shard in host.items()},
            self._call("all_gather", unit),
        )
        work.requests = running.arrivals
        self._lent.append(Work(work.description, work.where, self.ledger, running.departures))
        if flat.is_cuda:
            work.finish = lambda: copy_all(list(host.values()), [shards[peer] for peer in host])
        return work

    def settle(self) -> None:
        """Return when every peer has read what `all_gather` gave it; collective, in the sense that all must wait too.

        Every small exchange below does this first, so what follows it may change parameters.
        """
        while self._lent:
            self._lent.pop(0).wait()

    def reduce_scatter(
        self,
        pieces: Sequence[Tensor],
        layout: FlatLayout,
        out: Tensor,
        unit: str,
        *,
        wire_dtype: torch.dtype,
        accumulate: bool,
    ) -> Work:
        """pieces[all] {partial over axis} -> out[S_axis]: the sum over ranks of each rank's shard.

        Args:
            pieces: whole tensors, flattened, as `layout` lays them; read until the work is waited for.
            out: receives the sum, or has it added when `accumulate`. Padding is left as it is.
            wire_dtype: dtype of what travels; the sum itself is done in `out.dtype`.
        """
        sent = sum(span.numel for peer in self._peers() for span in layout.spans[peer])  # padding is never sent
        wire = sent * wire_dtype.itemsize
        work = self._begin("reduce_scatter", unit, pieces[0], layout.padded_size, wire_dtype, wire)
        if self.size > 1 and self.transport is None:
            return self._reduce_scatter_native(work, pieces, layout, out, wire_dtype, accumulate)
        sources = [piece.reshape(-1).to(wire_dtype) for piece in pieces]
        if self.transport is not None:
            sources = [source.cpu() for source in sources]
        mine = layout.spans[self.rank]
        inbox = {peer: sources[0].new_empty(layout.shard_size) for peer in self._peers()}
        if self.transport is not None:
            running = self._exchange(
                work,
                {peer: [sources[s.index][s.start : s.stop] for s in layout.spans[peer]] for peer in inbox},
                {peer: [box[s.offset : s.offset + s.numel] for s in mine] for peer, box in inbox.items()},
                self._call("reduce_scatter", unit),
            )
            work.requests = [*running.arrivals, *running.departures]

        def sum_in_rank_order() -> None:
            for span in mine:
                target = out[span.offset : span.offset + span.numel]
                parts = [
                    (
                        sources[span.index][span.start : span.stop]
                        if rank == self.rank
                        else inbox[rank][span.offset : span.offset + span.numel]
                    ).to(out.device)
                    for rank in range(self.size)
                ]
                add_up(parts, target, accumulate)

        work.finish = sum_in_rank_order
        return work

    def _reduce_scatter_native(
        self,
        work: Work,
        pieces: Sequence[Tensor],
        layout: FlatLayout,
        out: Tensor,
        wire_dtype: torch.dtype,
        accumulate: bool,
    ) -> Work:
        flat = torch.zeros(layout.padded_size, dtype=wire_dtype, device=out.device)
        for offset, piece in zip(layout.offsets, pieces, strict=True):
            flat[offset : offset + piece.numel()].copy_(piece.reshape(-1))
        shard = torch.empty(layout.shard_size, dtype=wire_dtype, device=out.device)
        work.requests = [dist.reduce_scatter_tensor(shard, flat, group=self._reduce_group, async_op=True)]
        work.finish = lambda: add_up([shard], out, accumulate)
        return work

    # ---- activations: parts of any size, one per rank ----

    def gather_parts(self, part: Tensor, sizes: Sequence[int], dim: int, unit: str) -> Tensor:
        """part[.. D_axis ..] -> whole[.. D ..]: every rank's part, laid side by side along `dim`.

        `sizes` are the parts' lengths along `dim`, in rank order; they may differ.
        """
        shapes = [(*part.shape[:dim], size, *part.shape[dim + 1 :]) for size in sizes]
        whole = prod(part.shape[:dim]) * sum(sizes) * prod(part.shape[dim + 1 :])
        work = self._begin("all_gather", unit, part, whole, part.dtype, part.nbytes * (self.size - 1))
        mine = part.contiguous()
        parts = [mine if rank == self.rank else mine.new_empty(shape) for rank, shape in enumerate(shapes)]
        if self.size > 1 and self.transport is None:
            work.requests = [dist.all_gather(parts, mine, group=self.group, async_op=True)]
            work.wait()
        elif self.transport is not None:
            self._swap(work, {peer: mine for peer in self._peers()}, parts, unit)
        return torch.cat(parts, dim=dim)

    def reduce_parts(self, whole: Tensor, sizes: Sequence[int], dim: int, unit: str) -> Callable[[], Tensor]:
        """whole[.. D ..] {partial over axis} -> part[.. D_axis ..]: this rank's part of the sum, in rank order.

        Call what is returned to wait for it.
        """
        work = self._begin("reduce_scatter", unit, whole, whole.numel(), whole.dtype, 0)
        pieces = [piece.contiguous() for piece in whole.split(list(sizes), dim=dim)]
        if self.size == 1:
            return lambda: pieces[0]
        self.ledger.add_wire(self.axis, "reduce_scatter", unit, whole.nbytes - pieces[self.rank].nbytes)
        mine = pieces[self.rank]
        if self.transport is None:
            out = torch.empty_like(mine)
            work.requests = [dist.reduce_scatter(out, pieces, group=self.group, async_op=True)]

            def native() -> Tensor:
                work.wait()
                return out

            return native
        parts = [mine if rank == self.rank else torch.empty_like(mine) for rank in range(self.size)]
        return self._start_swap(work, {peer: pieces[peer] for peer in self._peers()}, parts, unit, sum_in_order)

    def all_reduce(self, tensor: Tensor, unit: str) -> Callable[[], Tensor]:
        """tensor {partial over axis} -> the sum over ranks, in rank order, a new tensor: call what is returned for it.

        On gloo two ranks swap their tensors whole; more do a reduce-scatter and an all-gather.
        """
        wire = 2 * tensor.nbytes // self.size * (self.size - 1)
        work = self._begin("all_reduce", unit, tensor, tensor.numel(), tensor.dtype, wire)
        if self.size == 1:
            return lambda: tensor
        mine = tensor.contiguous()
        if self.transport is None:
            out = mine.clone()
            work.requests = [dist.all_reduce(out, group=self.group, async_op=True)]

            def native() -> Tensor:
                work.wait()
                return out

            return native
        if self.size == 2:
            parts = [mine if rank == self.rank else torch.empty_like(mine) for rank in range(2)]
            return self._start_swap(work, {peer: mine for peer in self._peers()}, parts, unit, sum_in_order)
        flat = mine.flatten()
        sizes = split_sizes(flat.numel(), self.size)
        pieces = flat.split(sizes)
        own = pieces[self.rank]
        parts = [own if rank == self.rank else torch.empty_like(own) for rank in range(self.size)]
        reduced = self._start_swap(work, {peer: pieces[peer] for peer in self._peers()}, parts, unit, sum_in_order)

        def gathered() -> Tensor:
            total = reduced()
            shares = [total if rank == self.rank else flat.new_empty(size) for rank, size in enumerate(sizes)]
            self._swap(self._work(work.description), {peer: total for peer in self._peers()}, shares, unit)
            return torch.cat(shares).view(tensor.shape)

        return gathered

    def shift(
        self, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]], unit: str
    ) -> Callable[[], list[Tensor]]:
        """Start giving `tensors` to the next rank of the ring; call what is returned for those of the previous one.

        `shapes` are theirs; the dtypes are those of `tensors`, which must stay as they are until the call.
        """
        nbytes = sum(tensor.nbytes for tensor in tensors)
        work = self._begin("shift", unit, tensors[0], nbytes // tensors[0].itemsize, tensors[0].dtype, nbytes)
        outgoing = [tensor.contiguous() for tensor in tensors]
        arrived = [tensor.new_empty(shape) for tensor, shape in zip(tensors, shapes, strict=True)]
        following, previous = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        if self.transport is None:
            sends = [dist.P2POp(dist.isend, t, self._ranks[following], self.group) for t in outgoing]
            receives = [dist.P2POp(dist.irecv, t, self._ranks[previous], self.group) for t in arrived]
            work.requests = [*work.posted(lambda: dist.batch_isend_irecv([*sends, *receives]))]

            def native() -> list[Tensor]:
                work.wait()
                return arrived

            return native
        return self._start_exchange(work, {following: outgoing}, {previous: arrived}, unit, lambda: arrived)

    def all_to_all(
        self, tensors: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Sequence[int]]], unit: str
    ) -> list[list[Tensor]]:
        """tensors[rank] to each rank; returns what each rank gave this one, of `shapes[rank]`, in rank order.

        All tensors have one dtype. The ledger's payload is what this rank holds, its own part included.
        """
        first, mine = tensors[0][0], list(tensors[self.rank])
        payload = sum(tensor.numel() for of_rank in tensors for tensor in of_rank)
        sent = payload * first.itemsize - sum(tensor.nbytes for tensor in mine)
        work = self._begin("all_to_all", unit, first, payload, first.dtype, sent)
        arrived = [
            mine if rank == self.rank else [first.new_empty(shape) for shape in of_rank]
            for rank, of_rank in enumerate(shapes)
        ]
        if self.size == 1:
            return arrived
        if self.transport is None:
            outgoing = [torch.cat([t.reshape(-1) for t in of_rank]) for of_rank in tensors]
            incoming = [torch.cat([t.reshape(-1) for t in of_rank]) for of_rank in arrived]
            work.requests = [dist.all_to_all(incoming, outgoing, group=self.group, async_op=True)]
            work.wait()
            split = [flat.split([t.numel() for t in of_rank]) for flat, of_rank in zip(incoming, arrived, strict=True)]
            return [
                [piece.view(t.shape) for piece, t in zip(pieces, of_rank, strict=True)]
                for pieces, of_rank in zip(split, arrived, strict=True)
            ]
        peers = self._peers()
        outgoing_by_peer = {peer: [t.contiguous() for t in tensors[peer]] for peer in peers}
        return self._start_exchange(work, outgoing_by_peer, {p: arrived[p] for p in peers}, unit, lambda: arrived)()

    def _swap(self, work: Work, outgoing: dict[int, Tensor], parts: list[Tensor], unit: str) -> None:
        self._start_swap(work, outgoing, parts, unit, lambda _: None)()

    def _start_swap(
        self,
        work: Work,
        outgoing: dict[int, Tensor],
        parts: list[Tensor],
        unit: str,
        finish: Callable[[list[Tensor]], T],
    ) -> Callable[[], T]:
        """Give each peer a tensor and fill `parts` (but the own one) from them; call what is returned to wait."""
        return self._start_exchange(
            work,
            {peer: [piece] for peer, piece in outgoing.items()},
            {peer: [parts[peer]] for peer in self._peers()},
            unit,
            lambda: finish(parts),
        )

    def _start_exchange(
        self,
        work: Work,
        outgoing: dict[int, list[Tensor]],
        incoming: dict[int, list[Tensor]],
        unit: str,
        finish: Callable[[], T],
    ) -> Callable[[], T]:
        """Give peers `outgoing` and fill `incoming`, all contiguous, over the host; call what is returned to wait."""
        host = {peer: [t.cpu() if t.is_cuda else t for t in of_peer] for peer, of_peer in incoming.items()}
        running = self._exchange(
            work,
            {peer: [t.cpu().reshape(-1) for t in of_peer] for peer, of_peer in outgoing.items()},
            {peer: [t.view(-1) for t in of_peer] for peer, of_peer in host.items()},
            self._call("exchange", unit),
        )
        work.requests = [*running.arrivals, *running.departures]

        def wait() -> T:
            work.wait()
            for peer, of_peer in incoming.items():
                for target, arrived in zip(of_peer, host[peer], strict=True):
                    if target is not arrived:
                        target.copy_(arrived)
            return finish()

        return wait

    def _exchange(
        self, work: Work, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[Tensor]], call: Call
    ) -> Exchange:
        transport = self.transport
        assert transport is not None
        return work.posted(lambda: transport.exchange(outgoing, incoming, call))

    # ---- point to point (`links.py`) ----

    def sending(self, target: int, what: str, payload: int, extra: int) -> Work:
        """A `Work` for messages to rank `target`, `payload` and `extra` bytes, entered into the ledger."""
        self.ledger.record(self.axis, "send" if payload else "signal", what, payload, payload + extra)
        return self._work(f"rank {self.rank}: sending {what} to rank {target}")

    def receiving(self, source: int, what: str) -> Work:
        """A `Work` for messages from rank `source`, whose ledger counts them."""
        return self._work(f"rank {self.rank}: {what} from rank {source}")

    def sum_among(self, ranks: Sequence[int], tensor: Tensor, unit: str) -> Tensor:
        """tensor {partial over some ranks of the axis} -> their sum, in rank order; called by those ranks alone."""
        self.ledger.record(self.axis, "all_reduce", unit, tensor.nbytes, tensor.nbytes * (len(ranks) - 1))
        work = self._work(f"rank {self.rank}: all_reduce of {unit} among {list(ranks)} (axis {self.axis})")
        mine = tensor.contiguous()
        host = mine.cpu() if dist.get_backend(self.group) == "gloo" else mine
        parts = {rank: host if rank == self.rank else torch.empty_like(host) for rank in ranks}
        peers = [rank for rank in ranks if rank != self.rank]
        operations = [dist.P2POp(dist.isend, host, self._ranks[peer], self.group) for peer in peers]
        operations += [dist.P2POp(dist.irecv, parts[peer], self._ranks[peer], self.group) for peer in peers]
        work.requests = [*work.posted(lambda: dist.batch_isend_irecv(operations))]
        work.wait()
        return sum_in_order([parts[rank] for rank in ranks]).to(tensor.device)

    # ---- small things, always waited for ----

    def broadcast(self, tensor: Tensor, source: int, unit: str) -> None:
        """tensor[source] -> tensor[all]; `source` is a rank on this axis."""
        self.settle()
        work = self._begin(
            "broadcast", unit, tensor, tensor.numel(), tensor.dtype, tensor.nbytes if self.rank == source else 0
        )
        if self.size > 1:
            work.requests = [dist.broadcast(tensor, self._ranks[source], group=self.group, async_op=True)]
        work.wait()

    def gather_rows(self, row: Tensor, unit: str) -> Tensor:
        """row [K] -> [N, K]: each rank's row, in rank order. For scalars that every rank must agree on."""
        self.settle()
        work = self._begin("gather_rows", unit, row, row.numel() * self.size, row.dtype, row.nbytes * (self.size - 1))
        if self.size == 1:
            return row.unsqueeze(0)
        rows = [torch.empty_like(row) for _ in range(self.size)]
        work.requests = [dist.all_gather(rows, row, group=self.group, async_op=True)]
        work.wait()
        return torch.stack(rows)

    def gather_bytes(self, payload: bytes, unit: str, device: torch.device) -> list[bytes]:
        """Each rank's bytes, in rank order; lengths may differ."""
        lengths = self.gather_rows(torch.tensor([len(payload)], device=device), unit)[:, 0].tolist()
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8, device=device)
        if payload:
            padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
        rows = self.gather_rows(padded, unit).cpu()
        return [row[:length].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]

    def barrier(self, device: torch.device) -> None:
        """Return when every rank of the axis has called this."""
        self.gather_rows(torch.zeros(1, device=device), "barrier")

    # ---- bookkeeping ----

    def _peers(self) -> list[int]:
        """The other ranks, nearest following one first, so that not all send to the same one at once."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def _call(self, operation: str, unit: str) -> Call:
        """The next call of `operation`."""
        number, self._calls[operation] = self._calls[operation], self._calls[operation] + 1
        return Call(OPERATIONS.index(operation), unit, number)

    def _begin(self, operation: str, unit: str, tensor: Tensor, numel: int, dtype: torch.dtype, wire: int) -> Work:
        """Enter one operation over `numel` elements of `dtype` into the ledger; in debug mode compare it first."""
        self._sequence += 1
        phase = self.ledger.current_phase
        self.ledger.record(self.axis, operation, unit, numel * dtype.itemsize, wire)
        if self.check and self.size > 1:
            self._compare_fingerprints(
                f"{operation} of {unit} in {phase}, {numel} x {dtype}, #{self._sequence}", tensor.device
            )
        return self._work(f"rank {self.rank}: {operation} of {unit} ({phase}, axis {self.axis}, #{self._sequence})")

    def _work(self, description: str) -> Work:
        def where(here: str) -> str:
            """Asked once a step: calls that were under way fail too, one by one, while the step is given up."""
            step = self.ledger.step
            if self.ledger.asked[0] != step:
                position = f"in step {step} waits for {here.partition(': ')[2]}"
                self.ledger.asked = step, where_everyone_is(self._ranks, self.rank, position)
            return self.ledger.asked[1]

        self.ledger.last.append(description)
        return Work(description, where, self.ledger)

    def _compare_fingerprints(self, fingerprint: str, device: torch.device) -> None:
        """Raise on all ranks when they are about to run different collectives (naming each call's site)."""
        site = call_site()
        row = torch.zeros(FINGERPRINT_BYTES, dtype=torch.uint8)
        text = f"{fingerprint}\n{site}".encode()[:FINGERPRINT_BYTES]
        row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        rows = [torch.empty_like(row).to(device) for _ in range(self.size)]
        work = self._work(f"rank {self.rank}: comparing '{fingerprint}' (axis {self.axis})")
        work.requests = [dist.all_gather(rows, row.to(device), group=self.group, async_op=True)]
        work.wait()
        seen = [bytes(row.cpu().tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]
        prints = [text.partition("\n")[0] for text in seen]
        if len(set(prints)) == 1:
            return
        lines = [f"  rank {rank}: {text.replace(chr(10), ', called from ')}" for rank, text in enumerate(seen)]
        raise CollectiveError("ranks are about to run different collectives:\n" + "\n".join(lines))


def copy_all(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """targets[i] <- sources[i]."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def add_up(parts: Sequence[Tensor], target: Tensor, accumulate: bool) -> None:
    """target = (target +) parts[0] + parts[1] + ..., left to right, in target's dtype."""
    if len(parts) == 2 and not accumulate and parts[0].dtype == target.dtype:
        torch.add(parts[0], parts[1], out=target)
        return
    total = torch.empty_like(target) if accumulate else target
    total.copy_(parts[0])
    for part in parts[1:]:
        total.add_(part)
    if accumulate:
        target.add_(total)


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """parts[0] + parts[1] + ..., left to right: the same bits on every rank. The first is not written to."""
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total.add_(part)
    return total


def call_site() -> str:
    """The innermost frames outside this file, as `file:line in function`."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    shown = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames[-3:]]
    return " < ".join(reversed([key for key, _ in groupby(shown)]))
