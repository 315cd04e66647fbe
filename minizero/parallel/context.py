"""Context parallel: one sequence over several ranks. Each holds some of its positions; attention brings them together.

**Ring attention** (Liu et al., arXiv 2310.01889): queries stay, key/value blocks go round the ring of ranks, and what a
rank sees of each is joined by online softmax. Behind the computation on one block, the next is on its way. Causal
work would be uneven if ranks held consecutive parts, the last seeing everything and the first only itself; so the
sequence is cut into 2c chunks and rank r holds chunks r and 2c - 1 - r (zig-zag): whatever block comes round, half of
its pairs of chunks are visible.

    rank 0: 0 7   rank 1: 1 6   rank 2: 2 5   rank 3: 3 4          (c = 4)

Backward sends the blocks round again, and behind them the sums of their gradients: a sum begins at the rank after the
block's owner, and comes home after c - 1 hops.

**Ulysses** (Jacobs et al., arXiv 2309.14509): an all-to-all turns "all heads of some positions" into "some heads of all
positions", attention is an ordinary one, and a second all-to-all turns back. Key/value heads are sent to every rank
whose query heads need them. Heads need not divide: ranks then have one more or less.

Both are exact, for grouped-query heads, uneven lengths and packed documents. Bytes per rank and layer (b batch, s
sequence, n query and m key/value heads, d head width, c ranks, e bytes per element):

    ring      forward (c - 1) · 2 b (s/c) m d e;    backward twice that (gradients in at least fp32)
    Ulysses   forward (c - 1)/c · b (s/c) (2n + 2m) d e;    backward the same

Shape suffixes: B batch, N query heads, M key/value heads, S whole sequence, L the positions of a rank, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minizero.dist.collectives import Communicator
from minizero.dist.sharding import split_sizes
from minizero.kernels import Backend, flash_attention
from minizero.kernels.backend import at_least_fp32
from minizero.kernels.flash_attention import runs_in_triton
from minizero.parallel.block_attention import Mask, attend, attend_backward, join
from minizero.utils.forward import running

Method = Literal["ring", "ulysses"]


@dataclass(frozen=True)
class ContextAxis:
    """The context-parallel axis as attention sees it.

    Attributes:
        comm: its collectives. method: how attention brings the parts together. kernels: see `minizero.kernels`.
    """

    comm: Communicator
    method: Method
    kernels: Backend = "auto"

    def positions(self, total: int, rank: int, device: torch.device) -> Tensor:
        """int64 [L]: which of `total` positions `rank` holds, in the order in which it holds them."""
        size = self.comm.size
        if self.method == "ring":
            chunks = torch.arange(total, device=device).split(split_sizes(total, 2 * size))
            return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
        return torch.arange(total, device=device).split(split_sizes(total, size))[rank]

    def attention(self, q_BNLD: Tensor, k_BMLD: Tensor, v_BMLD: Tensor, scale: float, unit: str) -> Tensor:
        """Causal attention of this rank's queries to the whole sequence: (B, N, L, D)."""
        forward = running()
        assert forward is not None and forward.positions_L is not None, "no sequence was cut at the model's entry"
        attention = ring_attention if self.method == "ring" else ulysses_attention
        documents = forward.documents_BS
        return attention(q_BNLD, k_BMLD, v_BMLD, self.comm, forward.total, scale, documents, unit, self.kernels)


class ContextAttention(nn.Module):
    """Takes the place of our models' attention core: (B, N, L, D), (B, M, L, D) twice -> (B, L, N·D)."""

    def __init__(self, axis: ContextAxis, unit: str) -> None:
        super().__init__()
        self.axis, self.unit = axis, unit

    def forward(self, q_BNLD: Tensor, k_BMLD: Tensor, v_BMLD: Tensor, documents: Tensor | None = None) -> Tensor:
        # The model sees documents of its own positions only; the axis knows those of the whole sequence.
        out_BNLD = self.axis.attention(q_BNLD, k_BMLD, v_BMLD, q_BNLD.shape[-1] ** -0.5, self.unit)
        return out_BNLD.transpose(1, 2).flatten(2)


# ---- ring ----


@dataclass(frozen=True)
class Ring:
    """Who holds which chunk, and which pairs of chunks are visible: integers only.

    Attributes:
        size: ranks. total: positions of the whole sequence.
    """

    size: int
    total: int

    def chunks(self, rank: int) -> tuple[int, int]:
        """The two chunks of `rank`, in its order."""
        return rank, 2 * self.size - 1 - rank

    def places(self, rank: int) -> tuple[slice, slice]:
        """Where its two chunks lie in what `rank` holds."""
        sizes = split_sizes(self.total, 2 * self.size)
        first, second = (sizes[chunk] for chunk in self.chunks(rank))
        return slice(0, first), slice(first, first + second)

    def length(self, rank: int) -> int:
        """Positions that `rank` holds."""
        return self.places(rank)[1].stop

    def owner(self, rank: int, step: int) -> int:
        """Whose block `rank` has after `step` hops."""
        return (rank - step) % self.size

    def visible(self, rank: int, owner: int) -> Iterator[tuple[slice, slice, bool]]:
        """(queries of `rank`, keys of `owner`, whether they are one chunk) of each pair that causality allows.

        Own pairs come with the diagonal first, so that every query has seen a key when blocks are joined.
        """
        for query, query_place in zip(self.chunks(rank), self.places(rank), strict=True):
            for key, key_place in zip(reversed(self.chunks(owner)), reversed(self.places(owner)), strict=True):
                if key <= query and query_place.start < query_place.stop and key_place.start < key_place.stop:
                    yield query_place, key_place, key == query

    def work(self, rank: int) -> float:
        """Pairs of positions that `rank` computes, over all blocks."""
        total = 0.0
        for step in range(self.size):
            for queries, keys, diagonal in self.visible(rank, self.owner(rank, step)):
                rows, columns = queries.stop - queries.start, keys.stop - keys.start
                total += rows * (rows + 1) / 2 if diagonal else rows * columns
        return total


class _RingAttention(Function):
    """Saves q, k, v, out and lse of this rank's positions: nothing of other ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BNLD: Tensor,
        k_BMLD: Tensor,
        v_BMLD: Tensor,
        comm: Communicator | None,
        total: int,
        scale: float,
        documents: list[Tensor] | None,
        unit: str,
        kernels: Backend,
    ) -> Tensor:
        rank, ring = (comm.rank if comm else 0), Ring(comm.size if comm else 1, total)
        out_BNLD = lse_BNL = None
        block = [k_BMLD.contiguous(), v_BMLD.contiguous()]
        for step in range(ring.size):
            owner = ring.owner(rank, step)
            arriving = (
                start_shift(comm, block, ring, ring.owner(rank, step + 1), unit) if step + 1 < ring.size else None
            )
            for queries, keys, diagonal in ring.visible(rank, owner):
                mask = mask_of(documents, rank, owner, queries, keys, diagonal)
                q, k, v = q_BNLD[:, :, queries], block[0][:, :, keys], block[1][:, :, keys]
                more, more_lse = attend(q, k, v, scale, mask, kernels)
                if out_BNLD is None or lse_BNL is None:
                    out_BNLD = more.new_empty(q_BNLD.shape)
                    lse_BNL = more.new_empty(q_BNLD.shape[:-1])
                if diagonal:  # a query's first
                    out_BNLD[:, :, queries], lse_BNL[:, :, queries] = more, more_lse
                else:
                    join(out_BNLD[:, :, queries], lse_BNL[:, :, queries], more, more_lse)
            if arriving is not None:
                block = arriving()
        assert out_BNLD is not None and lse_BNL is not None
        out_BNLD = out_BNLD.to(q_BNLD.dtype)
        ctx.save_for_backward(q_BNLD, k_BMLD, v_BMLD, out_BNLD, lse_BNL)
        ctx.comm, ctx.ring, ctx.scale, ctx.documents, ctx.unit = comm, ring, scale, documents, unit
        ctx.kernels = kernels
        return out_BNLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        q_BNLD, k_BMLD, v_BMLD, out_BNLD, lse_BNL = ctx.saved_tensors
        grad_BNLD = grads[0]
        comm, ring, documents, unit = ctx.comm, ctx.ring, ctx.documents, ctx.unit
        rank = comm.rank if comm else 0
        delta_BNL = (at_least_fp32(grad_BNLD) * at_least_fp32(out_BNLD)).sum(-1)
        dq_BNLD = torch.zeros_like(at_least_fp32(q_BNLD))
        own: list[Tensor] = []
        arriving_sums: Callable[[], list[Tensor]] | None = None
        block = [k_BMLD.contiguous(), v_BMLD.contiguous()]
        for step in range(ring.size):
            owner = ring.owner(rank, step)
            arriving = (
                start_shift(comm, block, ring, ring.owner(rank, step + 1), unit) if step + 1 < ring.size else None
            )
            sums = [torch.zeros_like(at_least_fp32(part)) for part in block]
            for queries, keys, diagonal in ring.visible(rank, owner):
                mask = mask_of(documents, rank, owner, queries, keys, diagonal)
                q, k, v = q_BNLD[:, :, queries], block[0][:, :, keys], block[1][:, :, keys]
                grad, lse, delta = (x[:, :, queries] for x in (grad_BNLD, lse_BNL, delta_BNL))
                into = dq_BNLD[:, :, queries], sums[0][:, :, keys], sums[1][:, :, keys]
                attend_backward(q, k, v, grad, lse, delta, ctx.scale, mask, into, ctx.kernels)
            if step == 0:
                own = sums
            else:
                if arriving_sums is not None:  # of the ranks that had this block before
                    sums = [before.add_(here) for before, here in zip(arriving_sums(), sums, strict=True)]
                arriving_sums = start_shift(comm, sums, ring, ring.owner(rank, step + 1), unit)
            if arriving is not None:
                block = arriving()
        if arriving_sums is not None:
            own = [others.add_(here) for others, here in zip(arriving_sums(), own, strict=True)]
        dk_BMLD, dv_BMLD = own
        return (
            dq_BNLD.to(q_BNLD.dtype), dk_BMLD.to(k_BMLD.dtype), dv_BMLD.to(v_BMLD.dtype),
            None, None, None, None, None, None,
        )  # fmt: skip


def start_shift(
    comm: Communicator | None, block: list[Tensor], ring: Ring, owner: int, unit: str
) -> Callable[[], list[Tensor]]:
    """Send `block` on, and start to receive that of `owner`."""
    assert comm is not None
    shapes = [(*part.shape[:2], ring.length(owner), part.shape[3]) for part in block]
    return comm.shift(block, shapes, unit)


def mask_of(documents: list[Tensor] | None, rank: int, owner: int, queries: slice, keys: slice, diagonal: bool) -> Mask:
    """What queries of `rank` may see of the keys of `owner`."""
    if documents is None:
        return Mask(diagonal)
    return Mask(diagonal, documents[rank][:, queries], documents[owner][:, keys])


def ring_attention(
    q_BNLD: Tensor,
    k_BMLD: Tensor,
    v_BMLD: Tensor,
    comm: Communicator | None,
    total: int,
    scale: float,
    documents_BS: Tensor | None = None,
    unit: str = "attention",
    kernels: Backend = "auto",
) -> Tensor:
    """Causal attention of this rank's queries to a sequence of which every rank of `comm` holds two chunks.

    Args:
        q_BNLD, k_BMLD, v_BMLD: of this rank's positions, in zig-zag order; M divides N.
        comm: the ring; None: this rank holds everything.
        total: S. scale: of the scores.
        documents_BS: of the whole sequence in its own order, the same on all ranks: positions of different documents
            do not see each other. In Triton they may not decrease along the sequence.
        kernels: see `minizero.kernels`.

    Returns (B, N, L, D) in the dtype of q. Memory: this rank's part, one more block, and tiles of scores.
    """
    documents = None
    if documents_BS is not None:
        size = comm.size if comm else 1
        chunks = documents_BS.split(split_sizes(total, 2 * size), dim=1)
        documents = [torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1) for rank in range(size)]
    return _RingAttention.apply(q_BNLD, k_BMLD, v_BMLD, comm, total, scale, documents, unit, kernels)


# ---- Ulysses ----


@dataclass(frozen=True)
class HeadPlan:
    """Which heads each rank attends with.

    Attributes:
        queries: [start, stop) per rank. keys: key/value heads per rank; a head may be on several.
    """

    queries: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, size: int) -> HeadPlan:
        """Raises ValueError when there are more ranks than query heads."""
        if num_heads < size:
            raise ValueError(
                f"parallel.cp = {size} with parallel.context ulysses: {num_heads} heads cannot be shared by so many "
                f"ranks; legal: up to {num_heads}, or parallel.context ring"
            )
        group = num_heads // num_kv_heads
        stops = [sum(split_sizes(num_heads, size)[: rank + 1]) for rank in range(size)]
        queries = tuple((start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True))
        keys = tuple((start // group, -(-stop // group)) for start, stop in queries)
        return cls(queries, keys)

    def kv_of_query(self, rank: int, group: int) -> list[int]:
        """For each query head of `rank`, which of its key/value heads it uses."""
        start, stop = self.queries[rank]
        return [head // group - self.keys[rank][0] for head in range(start, stop)]


class _SequenceToHeads(Function):
    """All heads of some positions -> some heads of all positions, of q, k and v at once; backward turns back."""

    @staticmethod
    def forward(
        ctx: Any, q_BNLD: Tensor, k_BMLD: Tensor, v_BMLD: Tensor, comm: Communicator, plan: HeadPlan, total: int,
        unit: str,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.comm, ctx.plan, ctx.total, ctx.unit = comm, plan, total, unit
        ctx.shapes = q_BNLD.shape, k_BMLD.shape
        ranges = (plan.queries, plan.keys, plan.keys)
        parts = [
            [x[:, start:stop] for x, (start, stop) in zip((q_BNLD, k_BMLD, v_BMLD), of_rank, strict=True)]
            for of_rank in zip(*ranges, strict=True)
        ]
        lengths = split_sizes(total, comm.size)
        shapes = [[(*part.shape[:2], length, part.shape[3]) for part in parts[comm.rank]] for length in lengths]
        arrived = comm.all_to_all(parts, shapes, unit)
        return tuple(torch.cat(of_tensor, dim=2) for of_tensor in zip(*arrived, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        comm, plan = ctx.comm, ctx.plan
        lengths = split_sizes(ctx.total, comm.size)
        parts = [list(of_rank) for of_rank in zip(*(grad.split(lengths, dim=2) for grad in grads), strict=True)]
        own = lengths[comm.rank]
        ranges = list(zip(plan.queries, plan.keys, plan.keys, strict=True))
        batch, width = grads[0].shape[0], grads[0].shape[3]
        shapes = [[(batch, stop - start, own, width) for start, stop in of_rank] for of_rank in ranges]
        arrived = comm.all_to_all(parts, shapes, ctx.unit)
        query_shape, key_shape = ctx.shapes
        sums = [grads[0].new_zeros(shape) for shape in (query_shape, key_shape, key_shape)]
        for of_rank, pieces in zip(ranges, arrived, strict=True):
            for total, (start, stop), piece in zip(sums, of_rank, pieces, strict=True):
                total[:, start:stop] += piece
        return (*sums, None, None, None, None)


class _HeadsToSequence(Function):
    """Some heads of all positions -> all heads of some positions; backward turns back."""

    @staticmethod
    def forward(ctx: Any, x_BNSD: Tensor, comm: Communicator, plan: HeadPlan, unit: str) -> Tensor:
        ctx.comm, ctx.plan, ctx.unit, ctx.total = comm, plan, unit, x_BNSD.shape[2]
        lengths = split_sizes(ctx.total, comm.size)
        parts = [[part] for part in x_BNSD.split(lengths, dim=2)]
        batch, _, _, width = x_BNSD.shape
        shapes = [[(batch, stop - start, lengths[comm.rank], width)] for start, stop in plan.queries]
        arrived = comm.all_to_all(parts, shapes, unit)
        return torch.cat([piece for (piece,) in arrived], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        comm, plan = ctx.comm, ctx.plan
        parts = [[grads[0][:, start:stop]] for start, stop in plan.queries]
        mine = parts[comm.rank][0]
        lengths = split_sizes(ctx.total, comm.size)
        shapes = [[(*mine.shape[:2], length, mine.shape[3])] for length in lengths]
        arrived = comm.all_to_all(parts, shapes, ctx.unit)
        return torch.cat([piece for (piece,) in arrived], dim=2), None, None, None


def ulysses_attention(
    q_BNLD: Tensor,
    k_BMLD: Tensor,
    v_BMLD: Tensor,
    comm: Communicator,
    total: int,
    scale: float,
    documents_BS: Tensor | None = None,
    unit: str = "attention",
    kernels: Backend = "auto",
) -> Tensor:
    """`ring_attention` by all-to-alls; ranks hold consecutive parts of the sequence."""
    num_heads, num_kv_heads = q_BNLD.shape[1], k_BMLD.shape[1]
    plan = HeadPlan.of(num_heads, num_kv_heads, comm.size)
    q_BNSD, k_BMSD, v_BMSD = _SequenceToHeads.apply(q_BNLD, k_BMLD, v_BMLD, comm, plan, total, unit)
    kv_of_query = plan.kv_of_query(comm.rank, num_heads // num_kv_heads)
    each = len(kv_of_query) // k_BMSD.shape[1]
    if kv_of_query != [query // each for query in range(len(kv_of_query))]:  # groups of unequal size
        chosen = torch.tensor(kv_of_query, device=q_BNSD.device)
        k_BMSD, v_BMSD = k_BMSD.index_select(1, chosen), v_BMSD.index_select(1, chosen)
    if runs_in_triton(kernels, q_BNSD, k_BMSD, v_BMSD):
        out_BNSD, _ = flash_attention(q_BNSD, k_BMSD, v_BMSD, documents_BT=documents_BS, scale=scale, backend=kernels)
    elif documents_BS is None:
        out_BNSD = F.scaled_dot_product_attention(
            q_BNSD, k_BMSD, v_BMSD, is_causal=True, scale=scale, enable_gqa=q_BNSD.shape[1] != k_BMSD.shape[1]
        )
    else:
        out_BNSD = ring_attention(q_BNSD, k_BMSD, v_BMSD, None, total, scale, documents_BS, unit, kernels)
    return _HeadsToSequence.apply(out_BNSD, comm, plan, unit)
