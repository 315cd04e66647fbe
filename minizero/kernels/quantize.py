"""Blockwise 8-bit quantization, for what travels or rests (ZeRO++, arXiv 2306.10209): a scale for every block.

    int8   scale = max |x| / 127      q = round(x / scale)                to even at ties, -127 .. 127
    fp8    scale = max |x| / 448      q = float8_e4m3(x / scale)
    back   x = q · scale

A block of zeros has scale 0 and comes back as zeros; so does one with nothing above 1e-35, whose scale fp32 could not
hold exactly. A block with a NaN or an infinity has scale NaN and comes back as
NaN, all of it: what was not finite cannot come back as a number.

Glossary (n elements, G = block): x [n] (any float), q [n] (int8 or float8_e4m3fn), scales [ceil(n / G)] (fp32)
"""

import torch
from torch import Tensor

from minizero.kernels.backend import INTERPRETED, Backend, garbled, tl, triton, use_triton

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
TINIEST = 1e-35
FP8_ARCH = (8, 9)  # the first compute capability that converts to fp8


def quantize_blockwise(
    x: Tensor, block: int = 256, dtype: torch.dtype = torch.int8, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """(q, of the shape of x; scales [blocks]) of x, flattened and cut into blocks of `block` elements.

    Raises ValueError for a dtype that is neither int8 nor float8_e4m3fn, a block that is no power of two from 16 to
    4096, and what `backend` "triton" cannot run (fp8 needs compute capability 8.9; "auto" then takes torch).
    """
    check("quantize_blockwise", block, dtype)
    if not fused(backend, "quantize_blockwise", x, dtype):
        return _quantize_torch(x, block, dtype)
    flat = x.contiguous().view(-1)
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    blocks = triton.cdiv(flat.numel(), block)
    scales = torch.empty(blocks, dtype=torch.float32, device=x.device)
    if blocks:
        many = max(1, 4096 // block)
        _quantize[(triton.cdiv(blocks, many),)](
            flat,
            q,
            scales,
            flat.numel(),
            blocks,
            LARGEST[dtype],
            TINIEST=TINIEST,
            MANY=many,
            BLOCK=block,
            ROUND=dtype == torch.int8,
        )
    return q, scales


def dequantize_blockwise(
    q: Tensor, scales: Tensor, block: int = 256, dtype: torch.dtype = torch.float32, *, backend: Backend = "auto"
) -> Tensor:
    """q · scale of its block, in `dtype` and the shape of q: the inverse of `quantize_blockwise`."""
    check("dequantize_blockwise", block, q.dtype)
    if scales.shape != (-(-q.numel() // block),):
        raise ValueError(
            f"dequantize_blockwise: scales are {tuple(scales.shape)} for {q.numel()} elements in blocks of {block}"
        )
    if not fused(backend, "dequantize_blockwise", scales, q.dtype, dtype):
        wide = q.reshape(-1).float() * scales.repeat_interleave(block)[: q.numel()]
        return wide.to(dtype).view(q.shape)
    x = torch.empty(q.shape, dtype=dtype, device=q.device)
    if q.numel():
        many = max(1, 4096 // block)
        _dequantize[(triton.cdiv(len(scales), many),)](
            q.contiguous().view(-1), scales.contiguous(), x, q.numel(), len(scales), MANY=many, BLOCK=block
        )
    return x


def check(op: str, block: int, dtype: torch.dtype) -> None:
    """Raise ValueError for a dtype or block size that is not there."""
    if dtype not in LARGEST or block not in [1 << power for power in range(4, 13)]:
        raise ValueError(
            f"{op}: dtype {dtype}, block {block}; legal: torch.int8 or torch.float8_e4m3fn, a power of two from 16 to "
            "4096"
        )


def fused(backend: Backend, op: str, x: Tensor, dtype: torch.dtype, *dtypes: torch.dtype) -> bool:
    """As `use_triton`, which knows nothing of fp8, nor of dtypes of what is yet to be made."""
    if not use_triton(backend, op, x):
        return False
    if reason := garbled(dtype, *dtypes):
        raise ValueError(f"{op}: {reason}; backend auto or torch runs it in torch")
    old = dtype == torch.float8_e4m3fn and not INTERPRETED and torch.cuda.get_device_capability(x.device) < FP8_ARCH
    if old and backend == "triton":
        raise ValueError(f"{op}: fp8 needs compute capability {FP8_ARCH}; backend auto or torch runs it in torch")
    return not old


def _quantize_torch(x: Tensor, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1).float()
    blocks = -(-flat.numel() // block)
    padded = flat.new_zeros(blocks, block)
    padded.view(-1)[: flat.numel()] = flat
    highest = padded.abs().amax(dim=1) if blocks else flat.new_empty(0)
    highest = torch.where(highest < TINIEST, 0.0, highest)
    scales = torch.where(highest.isfinite(), highest / LARGEST[dtype], torch.nan)
    inverse = torch.where(highest > 0, LARGEST[dtype] / highest, 0.0)
    values = (padded * inverse.unsqueeze(1)).nan_to_num(0.0, 0.0, 0.0)
    values = values.round().clamp(-127, 127) if dtype == torch.int8 else values.clamp(-448, 448)
    return values.to(dtype).view(-1)[: flat.numel()].view(x.shape), scales


@triton.jit
def _quantize(
    x_ptr, q_ptr, scales_ptr, size, blocks, largest,
    TINIEST: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)[:, None]
    place = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = place < size
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    broken = (x != x) | (tl.abs(x) == float("inf"))
    anywhere = tl.max(broken.to(tl.int32), axis=1, keep_dims=True) > 0
    highest = tl.max(tl.where(broken, 0.0, tl.abs(x)), axis=1, keep_dims=True)
    highest = tl.where(highest < TINIEST, 0.0, highest)
    tl.store(scales_ptr + block, tl.where(anywhere, float("nan"), highest / largest), mask=block < blocks)
    inverse = tl.where((highest > 0.0) & (anywhere == 0), largest / highest, 0.0)
    y = tl.where(broken, 0.0, x) * inverse
    if ROUND:
        y = (y + 12582912.0) - 12582912.0  # 1.5 · 2^23: the sum has no place for a fraction, and rounds to even
    y = tl.minimum(tl.maximum(y, -largest), largest)
    tl.store(q_ptr + place, y.to(q_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize(q_ptr, scales_ptr, x_ptr, size, blocks, MANY: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)[:, None]
    place = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    scale = tl.load(scales_ptr + block, mask=block < blocks, other=0.0)
    q = tl.load(q_ptr + place, mask=place < size, other=0.0).to(tl.float32)
    tl.store(x_ptr + place, (q * scale).to(x_ptr.dtype.element_ty), mask=place < size)
