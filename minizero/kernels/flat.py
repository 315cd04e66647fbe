"""What a step does to flat buffers before the update: the norm of gradients, and buckets filled from many tensors.

    grad_norm        (Σ g² over all tensors, whether every g is finite): one read
    cast_and_pack    pieces behind each other in one buffer, cast and scaled on the way: one read and one write

Sums are made in a fixed order: per block of `BLOCK` elements in fp32, blocks in float64.

Glossary: x [n] (any float), a tensor, flattened; parts [blocks] (fp32), Σ x² of each block; bucket [n] (any float)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minizero.kernels.backend import Backend, tl, triton, use_triton

BLOCK = 8192


def grad_norm(tensors: Sequence[Tensor], *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """(Σ x² over all elements of all tensors, float64; whether all are finite, bool), both 0-d on their device.

    Squares are added up in fp32, 8192 at a time, in Triton: where such a sum overflows (3.4e38, from |x| = 2e17 if all
    are as large) they count as not finite. Raises ValueError for tensors of several dtypes or devices, for none at all,
    and for what `backend` "triton" cannot run.
    """
    check("grad_norm", tensors)
    if not use_triton(backend, "grad_norm", *tensors):
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        squares = torch.stack([torch.linalg.vector_norm(t, dtype=wide).double().square() for t in tensors]).sum()
    else:
        blocks = [triton.cdiv(tensor.numel(), BLOCK) for tensor in tensors]
        parts = torch.empty(sum(blocks), dtype=torch.float32, device=tensors[0].device)
        for tensor, own in zip(tensors, parts.split(blocks), strict=True):
            if len(own):
                _squares[(len(own),)](tensor.contiguous(), own, tensor.numel(), BLOCK=BLOCK, num_warps=8)
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
            wide = piece.reshape(-1).to(torch.promote_types(piece.dtype, torch.float32))
            bucket[start : start + piece.numel()].copy_(wide * scale)
            start += piece.numel()
        return bucket
    start = 0
    for piece in pieces:
        if piece.numel():
            own = bucket[start : start + piece.numel()]
            blocks = triton.cdiv(piece.numel(), BLOCK)
            _pack[(blocks,)](piece.contiguous(), own, piece.numel(), scale, BLOCK=BLOCK, num_warps=8)
        start += piece.numel()
    torch.autograd.graph.increment_version(bucket)
    return bucket


def check(op: str, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError unless there is a tensor, and all are of one floating dtype on one device."""
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) != 1 or not tensors[0].is_floating_point():
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none"
        raise ValueError(f"{op}: tensors are {found}; legal: at least one, all of one floating dtype on one device")


@triton.jit
def _squares(x_ptr, parts_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < size, other=0.0).to(tl.float32)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(x * x, axis=0))


@triton.jit
def _pack(x_ptr, bucket_ptr, size, scale, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < size, other=0.0).to(tl.float32) * scale
    tl.store(bucket_ptr + place, x.to(bucket_ptr.dtype.element_ty), mask=place < size)
