"""What a step does to flat buffers before the update: the norm of gradients, and buckets filled from many tensors.

    grad_norm        (Σ g² over all tensors, whether every g is finite): one read
    cast_and_pack    pieces behind each other in one buffer, cast and scaled on the way: one read and one write

Sums are made in a fixed order: per block of `BLOCK` elements in fp32, blocks in float64. A launch takes all tensors of
a list at once, however many there are: a table tells every program which block of which tensor it has.

Glossary: table [programs, 3] int64: address of a tensor's block, elements in it, place of the first in the bucket
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minizero.kernels.backend import Backend, tl, triton, use_triton

BLOCK = 8192


def grad_norm(tensors: Sequence[Tensor], *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """(Σ x² over all elements of all tensors, float64; whether all are finite, bool), both 0-d on their device.

    A square that overflows fp32 (|x| > 1.8e19) counts as not finite. Raises ValueError for tensors of several dtypes or
    devices, for none at all, and for what `backend` "triton" cannot run.
    """
    check("grad_norm", tensors)
    if not use_triton(backend, "grad_norm", *tensors):
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        squares = torch.stack([torch.linalg.vector_norm(t, dtype=wide).double().square() for t in tensors]).sum()
    else:
        pieces = [tensor.contiguous().view(-1) for tensor in tensors]
        table = table_of(pieces)
        parts = torch.empty(len(table), dtype=torch.float32, device=tensors[0].device)
        if len(table):
            _squares[(len(table),)](table, parts, pieces[0].new_empty(1), BLOCK=BLOCK, num_warps=8)
        squares = parts.double().sum()
    return squares, squares.isfinite()


def cast_and_pack(pieces: Sequence[Tensor], bucket: Tensor, *, scale: float = 1.0, backend: Backend = "auto") -> Tensor:
    """Fill the front of `bucket` [n] with the pieces, flattened, times `scale`, in its dtype; returns it.

    Raises ValueError when the pieces are more than the bucket holds, of several dtypes, or none at all.
    """
    check("cast_and_pack", pieces)
    total = sum(piece.numel() for piece in pieces)
    if bucket.dim() != 1 or not bucket.is_contiguous() or total > bucket.numel():
        raise ValueError(
            f"cast_and_pack: {total} elements into a bucket of {tuple(bucket.shape)}, stride {bucket.stride()}"
        )
    if not use_triton(backend, "cast_and_pack", *pieces, bucket):
        start = 0
        for piece in pieces:
            wide = (
                piece.reshape(-1)
                if scale == 1.0
                else piece.reshape(-1).to(torch.promote_types(piece.dtype, torch.float32)) * scale
            )
            bucket[start : start + piece.numel()].copy_(wide)
            start += piece.numel()
        return bucket
    flat = [piece.contiguous().view(-1) for piece in pieces]
    table = table_of(flat)
    if len(table):
        _pack[(len(table),)](table, bucket, flat[0].new_empty(1), scale, BLOCK=BLOCK, num_warps=8)
    return bucket


def check(op: str, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError unless there is a tensor, and all are of one floating dtype on one device."""
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) != 1 or not tensors[0].is_floating_point():
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none"
        raise ValueError(f"{op}: tensors are {found}; legal: at least one, all of one floating dtype on one device")


def table_of(pieces: Sequence[Tensor]) -> Tensor:
    """See the glossary."""
    rows, place = [], 0
    for piece in pieces:
        for start in range(0, piece.numel(), BLOCK):
            size = min(BLOCK, piece.numel() - start)
            rows.append((piece.data_ptr() + start * piece.element_size(), size, place + start))
        place += piece.numel()
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3).to(pieces[0].device)


@triton.jit
def _squares(table_ptr, parts_ptr, like_ptr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    address = tl.load(table_ptr + program * 3).to(tl.pointer_type(like_ptr.dtype.element_ty))
    size = tl.load(table_ptr + program * 3 + 1)
    offset = tl.arange(0, BLOCK)
    x = tl.load(address + offset, mask=offset < size, other=0.0).to(tl.float32)
    tl.store(parts_ptr + program, tl.sum(x * x, axis=0))


@triton.jit
def _pack(table_ptr, bucket_ptr, like_ptr, scale, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    address = tl.load(table_ptr + program * 3).to(tl.pointer_type(like_ptr.dtype.element_ty))
    size = tl.load(table_ptr + program * 3 + 1)
    place = tl.load(table_ptr + program * 3 + 2)
    offset = tl.arange(0, BLOCK)
    x = tl.load(address + offset, mask=offset < size, other=0.0).to(tl.float32) * scale
    tl.store(bucket_ptr + place + offset, x.to(bucket_ptr.dtype.element_ty), mask=offset < size)
