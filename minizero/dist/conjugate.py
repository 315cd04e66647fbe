"""Collectives with a backward: each is half of a pair, and its backward is the other half's forward.

The names are Megatron-LM's (Shoeybi et al., arXiv 1909.08053; Korthikanti et al., arXiv 2205.05198):

    operator                  forward          backward         where
    f     copy_to_region      identity         all-reduce       into a tensor-parallel region
    g     reduce_from_region  all-reduce       identity         out of it
    g     gather_sequence     all-gather       reduce-scatter   into it, sequence parallel
    g bar scatter_sequence    reduce-scatter   all-gather       out of it, sequence parallel
          split_sequence      own part         all-gather       where what is whole becomes sequence parallel
          join_sequence       all-gather       own part         where it is whole again
          gather_features     all-gather       own part         the same for the last dim

Into a region, backward starts its sum and a second node, made before it, waits: nodes that were made between the two
(`behind`) run in backward while the sum is on its way.

A parameter used on a part of the sequence gets a part of its gradient: those are summed over the axis before the step.

Shape suffixes: B batch, S sequence, H hidden; dim 1 is the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from minizero.dist.collectives import Communicator
from minizero.dist.sharding import split_sizes
from minizero.utils.forward import is_discarded

SEQUENCE_DIM = 1


@dataclass
class Promise:
    """A gradient on its way, from the node that starts its sum to the one that waits for it."""

    wait: Callable[[], Tensor] | None = None


class _Await(Function):
    """x as it is; backward waits for what its `promise` was given. Its own incoming gradient is empty."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, promise: Promise) -> Tensor:
        ctx.promise = promise
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        wait, ctx.promise.wait = ctx.promise.wait, None
        assert wait is not None
        return wait(), None


class _CopyToRegion(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, unit: str, promise: Promise) -> Tensor:
        ctx.comm, ctx.unit, ctx.promise = comm, unit, promise
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.promise.wait = ctx.comm.all_reduce(grads[0], ctx.unit)
        return None, None, None, None


class _ReduceFromRegion(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, unit: str) -> Tensor:
        return x.view_as(x) if is_discarded(x) else comm.all_reduce(x, unit)()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None


class _Gather(Function):
    """Parts along `dim` to the whole; backward starts a reduce-scatter for `promise`, or, without one, takes its own
    part of a gradient that is whole."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, comm: Communicator, unit: str, sizes: list[int], dim: int, promise: Promise | None
    ) -> Tensor:
        ctx.comm, ctx.unit, ctx.sizes, ctx.dim, ctx.promise = comm, unit, sizes, dim, promise
        return comm.gather_parts(x, sizes, dim, unit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        part = None
        if ctx.promise is None:
            part = grads[0].split(ctx.sizes, dim=ctx.dim)[ctx.comm.rank]
        else:
            ctx.promise.wait = ctx.comm.reduce_parts(grads[0], ctx.sizes, ctx.dim, ctx.unit)
        return part, None, None, None, None, None


class _Scatter(Function):
    """The whole to parts along `dim`, summing over ranks or taking its own part; backward gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, unit: str, sizes: list[int], dim: int, sums: bool) -> Tensor:
        ctx.comm, ctx.unit, ctx.sizes, ctx.dim = comm, unit, sizes, dim
        if sums and not is_discarded(x):
            return comm.reduce_parts(x, sizes, dim, unit)()
        return x.split(sizes, dim=dim)[comm.rank].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.comm.gather_parts(grads[0], ctx.sizes, ctx.dim, ctx.unit), None, None, None, None, None


def nothing() -> None:
    """Makes no nodes."""


def copy_to_region(x_BSH: Tensor, comm: Communicator, unit: str, behind: Callable[[], None] = nothing) -> Tensor:
    """f: x as it is; the gradients of all ranks' uses of it are summed, the nodes that `behind` makes meanwhile."""
    if comm.size == 1:
        behind()
        return x_BSH
    promise = Promise()
    x_BSH = _Await.apply(x_BSH, promise)
    behind()
    return _CopyToRegion.apply(x_BSH, comm, unit, promise)


def reduce_from_region(x_BSH: Tensor, comm: Communicator, unit: str) -> Tensor:
    """g: x {partial over axis} -> the sum over ranks."""
    return _ReduceFromRegion.apply(x_BSH, comm, unit) if comm.size > 1 else x_BSH


def gather_sequence(
    x_BSH: Tensor, comm: Communicator, unit: str, length: int, behind: Callable[[], None] = nothing
) -> Tensor:
    """x[B, S_axis, H] -> x[B, S, H], S = `length`; backward sums the gradients of all ranks' uses, as `copy_to_region`
    does."""
    if comm.size == 1:
        behind()
        return x_BSH
    promise = Promise()
    x_BSH = _Await.apply(x_BSH, promise)
    behind()
    return _Gather.apply(x_BSH, comm, unit, split_sizes(length, comm.size), SEQUENCE_DIM, promise)


def scatter_sequence(x_BSH: Tensor, comm: Communicator, unit: str) -> Tensor:
    """x[B, S, H] {partial over axis} -> the sum's part x[B, S_axis, H]."""
    if comm.size == 1:
        return x_BSH
    sizes = split_sizes(x_BSH.shape[SEQUENCE_DIM], comm.size)
    return _Scatter.apply(x_BSH, comm, unit, sizes, SEQUENCE_DIM, True)


def split_sequence(x_BSH: Tensor, comm: Communicator, unit: str) -> Tensor:
    """x[B, S, H], the same on all ranks -> its part x[B, S_axis, H]."""
    if comm.size == 1:
        return x_BSH
    sizes = split_sizes(x_BSH.shape[SEQUENCE_DIM], comm.size)
    return _Scatter.apply(x_BSH, comm, unit, sizes, SEQUENCE_DIM, False)


def join_sequence(x_BSH: Tensor, comm: Communicator, unit: str, length: int) -> Tensor:
    """x[B, S_axis, H] -> x[B, S, H], S = `length`, for uses that are the same on all ranks."""
    if comm.size == 1:
        return x_BSH
    return _Gather.apply(x_BSH, comm, unit, split_sizes(length, comm.size), SEQUENCE_DIM, None)


def gather_features(x_BSV: Tensor, comm: Communicator, unit: str, sizes: list[int]) -> Tensor:
    """x[B, S, V_axis] -> x[B, S, V], for uses that are the same on all ranks; `sizes` of the parts may differ."""
    return _Gather.apply(x_BSV, comm, unit, sizes, x_BSV.dim() - 1, None) if comm.size > 1 else x_BSV


def gather_rows_of_sequence(x_BLV: Tensor, comm: Communicator, unit: str, sizes: list[int]) -> Tensor:
    """x[B, L_axis, V] -> x[B, S, V], parts behind each other in rank order, for uses that are the same on all ranks."""
    return _Gather.apply(x_BLV, comm, unit, sizes, SEQUENCE_DIM, None) if comm.size > 1 else x_BLV
