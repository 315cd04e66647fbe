"""Attention without the matrix of all queries by all keys (FlashAttention-2, arXiv 2307.08691), forward and backward.

    s = scale · q kᵀ      lse = log Σ_u exp(s_u)      out = Σ_u exp(s_u - lse) v_u
    P = exp(s - lse)      dv = Pᵀ do      ds = P ∘ (do vᵀ - δ)      dq = scale · ds k      dk = scale · dsᵀ q
    δ = rowsum(do ∘ out) - dlse

**What a query sees is a range of keys** [first, stop): causality, a sliding window and packed documents all come to
that, and so does any mix of them. Two int32 numbers per query are all the kernels know of masks. Between the largest
`first` and the smallest `stop` of a block of queries nothing is hidden, so those blocks of keys are taken without
looking; blocks that nobody sees are not taken at all. Ranges may only move forward along the queries, so that the
queries that see a key are a range too, which is what backward over keys is given.

Backward is two kernels, one over blocks of queries for dq and one over blocks of keys for dk and dv, which also adds up
the query heads that share a key head: scores are computed twice, and nothing is added atomically, so the bits are the
same every time.

Glossary (B batch, N query heads, M key heads dividing N, T queries, U keys, D head width, any strides but D's):
    q, out, do [B, N, T, D]   k, v [B, M, U, D]   lse, δ [B, N, T] (fp32)   first, stop [B or 1, T] int32
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from minizero.kernels.backend import (
    INTERPRETED,
    Backend,
    at_least_fp32,
    last_dim_contiguous,
    one_dtype,
    tl,
    triton,
    use_triton,
)

WIDEST = 256  # head width


def flash_attention(
    q_BNTD: Tensor,
    k_BMUD: Tensor,
    v_BMUD: Tensor,
    *,
    causal: bool = True,
    window: int = 0,
    documents_BT: Tensor | None = None,
    documents_BU: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """(softmax(scale · q kᵀ + mask) v, in the dtype of q; lse in fp32), both differentiable.

    Args:
        causal: no key behind a query is seen; the queries are the last T of the U positions.
        window: with causal, a query sees the last `window` keys up to its own position only; 0: all of them.
        documents_BT, documents_BU: integers that do not decrease along the sequence; a query sees the keys of its own
            document. The second is the first where T = U.
        scale: D^-1/2 where not given.

    A query that sees no key has out 0 and lse -inf. Raises ValueError for shapes and settings that do not fit, and for
    what `backend` "triton" cannot run (D up to 256).
    """
    check(q_BNTD, k_BMUD, v_BMUD, causal, window, documents_BT, documents_BU)
    scale = q_BNTD.shape[-1] ** -0.5 if scale is None else scale
    ranges = ranges_of(
        q_BNTD.shape[2], k_BMUD.shape[2], q_BNTD.device, causal=causal, window=window,
        documents_BT=documents_BT, documents_BU=documents_BU,
    )  # fmt: skip
    if not runs_in_triton(backend, q_BNTD, k_BMUD, v_BMUD):
        return attention_torch(q_BNTD, k_BMUD, v_BMUD, ranges, scale)
    return _FlashAttention.apply(q_BNTD, k_BMUD, v_BMUD, *ranges, scale)


def runs_in_triton(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """As `use_triton`, which knows nothing of heads: whether the kernels take these, of whatever layout."""
    if backend == "triton" and q.shape[-1] > WIDEST:
        raise ValueError(f"flash_attention: head width {q.shape[-1]}; legal: up to {WIDEST}, or backend torch")
    fits = q.shape[-1] <= WIDEST and use_triton(backend, "flash_attention", q, k, v)
    return fits and one_dtype(backend, "flash_attention", q, k, v)


def attention_torch(
    q_BNTD: Tensor, k_BMUD: Tensor, v_BMUD: Tensor, ranges: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """The reference, with the matrix: softmax in at least fp32."""
    each = q_BNTD.shape[1] // k_BMUD.shape[1]
    k_BNUD, v_BNUD = (x.repeat_interleave(each, dim=1) for x in (k_BMUD, v_BMUD))
    s_BNTU = at_least_fp32(torch.matmul(q_BNTD, k_BNUD.transpose(-1, -2)) * scale)
    key_U = torch.arange(k_BMUD.shape[2], device=q_BNTD.device)
    first_BT1, stop_BT1 = (x[:, None, :, None] for x in ranges)
    s_BNTU = s_BNTU.masked_fill((key_U < first_BT1) | (key_U >= stop_BT1), float("-inf"))
    lse_BNT = s_BNTU.logsumexp(-1)
    seen_BNT1 = (first_BT1 < stop_BT1).expand(*s_BNTU.shape[:3], 1)
    p_BNTU = torch.where(seen_BNT1, torch.exp(s_BNTU - torch.where(seen_BNT1, lse_BNT.unsqueeze(-1), 0.0)), 0.0)
    return torch.matmul(p_BNTU.to(q_BNTD.dtype), v_BNUD), lse_BNT


def check(
    q_BNTD: Tensor, k_BMUD: Tensor, v_BMUD: Tensor, causal: bool, window: int, documents_BT: Tensor | None,
    documents_BU: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError unless shapes, dtypes and settings fit together."""
    shapes = [tuple(x.shape) for x in (q_BNTD, k_BMUD, v_BMUD)]
    fits = all(len(shape) == 4 for shape in shapes) and shapes[1] == shapes[2]
    fits = fits and shapes[0][0] == shapes[1][0] and shapes[0][3] == shapes[1][3] > 0
    if not fits or shapes[1][1] == 0 or shapes[0][1] % shapes[1][1]:
        raise ValueError(
            f"flash_attention: q, k, v are {shapes}; legal: (B, N, T, D) and twice (B, M, U, D), M dividing N"
        )
    if len({x.dtype for x in (q_BNTD, k_BMUD, v_BMUD)}) > 1:
        raise ValueError(
            f"flash_attention: q, k, v are {q_BNTD.dtype}, {k_BMUD.dtype}, {v_BMUD.dtype}; legal: one dtype"
        )
    if window < 0 or (window and not causal):
        raise ValueError(f"flash_attention: window = {window}, causal = {causal}; legal: 0, or positive with causal")
    if documents_BU is None and documents_BT is not None and shapes[0][2] != shapes[1][2]:
        raise ValueError(f"flash_attention: {shapes[0][2]} queries, {shapes[1][2]} keys: documents_BU must be given")
    for name, documents, length in (("BT", documents_BT, shapes[0][2]), ("BU", documents_BU, shapes[1][2])):
        if documents is not None and tuple(documents.shape) not in ((shapes[0][0], length), (1, length)):
            raise ValueError(
                f"flash_attention: documents_{name} is {tuple(documents.shape)}; legal: {(shapes[0][0], length)}"
            )
    if documents_BT is None and documents_BU is not None:
        raise ValueError("flash_attention: documents of keys, but none of queries (documents_BT)")


def ranges_of(
    queries: int,
    keys: int,
    device: torch.device,
    *,
    causal: bool,
    window: int = 0,
    documents_BT: Tensor | None = None,
    documents_BU: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(first, stop), int32 [B or 1, T]: query t sees keys first <= u < stop.

    Documents that decrease raise RuntimeError: at once on the CPU, on a GPU when it gets there.
    """
    place_1T = torch.arange(keys - queries, keys, dtype=torch.int32, device=device).unsqueeze(0)
    first = (place_1T + 1 - min(window, keys)).clamp_min(0) if window else torch.zeros_like(place_1T)
    stop = (place_1T + 1).clamp(0, keys) if causal else torch.full_like(place_1T, keys)
    if documents_BT is not None:
        of_keys = documents_BT if documents_BU is None else documents_BU
        for documents in (documents_BT, of_keys):
            ordered = (documents.diff(dim=-1) >= 0).all()
            torch._assert_async(ordered, "flash_attention: documents decrease along the sequence; legal: 0 0 1 1 2")
        rows = max(len(documents_BT), len(of_keys))
        asked, sorted_keys = (x.expand(rows, -1).contiguous() for x in (documents_BT, of_keys))
        first = torch.maximum(first, torch.searchsorted(sorted_keys, asked, out_int32=True))
        stop = torch.minimum(stop, torch.searchsorted(sorted_keys, asked, right=True, out_int32=True))
        stop = torch.maximum(first, stop)
    return first.contiguous(), stop.contiguous()


# ---- kernels ----


@triton.jit
def _block_of(pointer, batch, head, batch_stride, head_stride, row_stride, row, width, rows, D: tl.constexpr):
    """(pointers, mask) of rows `row` of one head: [len(row), D]."""
    column = tl.arange(0, D)
    place = row.to(tl.int64)[:, None] * row_stride + column[None, :]
    inside = (row < rows)[:, None] & (column < width)[None, :]
    return pointer + batch * batch_stride + head * head_stride + place, inside


@triton.jit
def _queries_of(first_ptr, stop_ptr, range_batch, heads, queries, blocks, BLOCK_T: tl.constexpr):
    """(sample, head, queries, which exist, what they see) of this program; the blocks that see most come first."""
    program = tl.program_id(0)
    batch = (program // blocks // heads).to(tl.int64)
    head = (program // blocks % heads).to(tl.int64)
    t = (blocks - 1 - program % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = t < queries
    first = tl.load(first_ptr + batch * range_batch + t, mask=there, other=0)
    stop = tl.load(stop_ptr + batch * range_batch + t, mask=there, other=0)
    return batch, head, t, there, first, stop


@triton.jit
def _take(
    acc, m, total, q, k_ptr, v_ptr, k_row, v_row, first, stop, begin, end, width, keys, qk_scale,
    BLOCK_U: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take keys [begin, end) into (acc, m, total): sums of p v, highest score, and sum of p, in base 2."""
    column = tl.arange(0, D)
    for start in range(begin, end, BLOCK_U):
        u = start + tl.arange(0, BLOCK_U)
        inside = (u < keys)[:, None] & (column < width)[None, :]
        k = tl.load(k_ptr + u.to(tl.int64)[:, None] * k_row + column[None, :], mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
        if MASKED:
            s = tl.where((u[None, :] >= first[:, None]) & (u[None, :] < stop[:, None]), s, float("-inf"))
        highest = tl.maximum(m, tl.max(s, axis=1))
        zero = tl.where(highest == float("-inf"), 0.0, highest)  # nothing seen yet: -inf - -inf is no number
        p = tl.exp2(s - zero[:, None])
        shrink = tl.exp2(m - zero)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        v = tl.load(v_ptr + u.to(tl.int64)[:, None] * v_row + column[None, :], mask=inside, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m = highest
    return acc, m, total


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, first_ptr, stop_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row, range_batch,
    heads, group, queries, keys, width, blocks, scale,
    BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head."""
    batch, head, t, there, first, stop = _queries_of(
        first_ptr, stop_ptr, range_batch, heads, queries, blocks, BLOCK_T
    )  # fmt: skip
    begin = tl.min(tl.where(there, first, keys), axis=0) // BLOCK_U * BLOCK_U
    end = tl.cdiv(tl.max(stop, axis=0), BLOCK_U) * BLOCK_U
    end = tl.maximum(begin, end)
    clear_from = tl.cdiv(tl.max(first, axis=0), BLOCK_U) * BLOCK_U
    clear_to = tl.min(tl.where(there, stop, keys), axis=0) // BLOCK_U * BLOCK_U
    clear_from = tl.minimum(tl.maximum(clear_from, begin), end)
    clear_to = tl.maximum(tl.minimum(clear_to, end), clear_from)

    q_block, q_inside = _block_of(q_ptr, batch, head, q_batch, q_head, q_row, t, width, queries, D)
    q = tl.load(q_block, mask=q_inside, other=0.0)
    k_ptr += batch * k_batch + head // group * k_head
    v_ptr += batch * v_batch + head // group * v_head
    qk_scale = scale * 1.4426950408889634
    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, D], tl.float32)
    acc, m, total = _take(
        acc, m, total, q, k_ptr, v_ptr, k_row, v_row, first, stop, begin, clear_from, width, keys, qk_scale,
        BLOCK_U, D, True, PRECISION,
    )  # fmt: skip
    acc, m, total = _take(
        acc, m, total, q, k_ptr, v_ptr, k_row, v_row, first, stop, clear_from, clear_to, width, keys, qk_scale,
        BLOCK_U, D, False, PRECISION,
    )  # fmt: skip
    acc, m, total = _take(
        acc, m, total, q, k_ptr, v_ptr, k_row, v_row, first, stop, clear_to, end, width, keys, qk_scale,
        BLOCK_U, D, True, PRECISION,
    )  # fmt: skip
    seen = total > 0.0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, (m + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453, float("-inf"))
    out_block, out_inside = _block_of(out_ptr, batch, head, out_batch, out_head, out_row, t, width, queries, D)
    tl.store(out_block, out.to(out_ptr.dtype.element_ty), mask=out_inside)
    tl.store(lse_ptr + (batch * heads + head) * queries + t, lse, mask=there)


@triton.jit
def _delta(
    do_ptr, out_ptr, dlse_ptr, delta_ptr, do_batch, do_head, do_row, out_batch, out_head, out_row,
    heads, queries, width, blocks,
    BLOCK_T: tl.constexpr, D: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch = (program // blocks // heads).to(tl.int64)
    head = (program // blocks % heads).to(tl.int64)
    t = program % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    do_block, inside = _block_of(do_ptr, batch, head, do_batch, do_head, do_row, t, width, queries, D)
    out_block, _ = _block_of(out_ptr, batch, head, out_batch, out_head, out_row, t, width, queries, D)
    do = tl.load(do_block, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(do * tl.load(out_block, mask=inside, other=0.0).to(tl.float32), axis=1)
    place = (batch * heads + head) * queries + t
    if DLSE:
        delta -= tl.load(dlse_ptr + place, mask=t < queries, other=0.0)
    tl.store(delta_ptr + place, delta, mask=t < queries)


@triton.jit
def _probabilities(rows, columns, seen, lse, scale, PRECISION: tl.constexpr):
    """exp(scale · rows columnsᵀ - lse), 0 where not seen: there lse may be -inf."""
    s = tl.dot(rows, tl.trans(columns), input_precision=PRECISION) * (scale * 1.4426950408889634)
    return tl.where(seen, tl.exp2(s - lse * 1.4426950408889634), 0.0)


@triton.jit
def _backward_queries(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, first_ptr, stop_ptr, dq_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row, range_batch,
    heads, group, queries, keys, width, blocks, scale,
    BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head."""
    batch, head, t, there, first, stop = _queries_of(
        first_ptr, stop_ptr, range_batch, heads, queries, blocks, BLOCK_T
    )  # fmt: skip
    begin = tl.min(tl.where(there, first, keys), axis=0) // BLOCK_U * BLOCK_U
    end = tl.max(stop, axis=0)
    q_block, inside = _block_of(q_ptr, batch, head, q_batch, q_head, q_row, t, width, queries, D)
    do_block, _ = _block_of(do_ptr, batch, head, do_batch, do_head, do_row, t, width, queries, D)
    q = tl.load(q_block, mask=inside, other=0.0)
    do = tl.load(do_block, mask=inside, other=0.0)
    row = (batch * heads + head) * queries + t
    lse = tl.load(lse_ptr + row, mask=there, other=0.0)
    delta = tl.load(delta_ptr + row, mask=there, other=0.0)
    column = tl.arange(0, D)
    k_ptr += batch * k_batch + head // group * k_head
    v_ptr += batch * v_batch + head // group * v_head
    dq = tl.zeros([BLOCK_T, D], tl.float32)
    for start in range(begin, end, BLOCK_U):
        u = start + tl.arange(0, BLOCK_U)
        kept = (u < keys)[:, None] & (column < width)[None, :]
        k = tl.load(k_ptr + u.to(tl.int64)[:, None] * k_row + column[None, :], mask=kept, other=0.0)
        v = tl.load(v_ptr + u.to(tl.int64)[:, None] * v_row + column[None, :], mask=kept, other=0.0)
        seen = (u[None, :] >= first[:, None]) & (u[None, :] < stop[:, None])
        p = _probabilities(q, k, seen, lse[:, None], scale, PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_ptr += row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(dq_ptr, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_keys(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, from_ptr, to_ptr, dk_ptr, dv_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row, range_batch,
    heads, group, queries, keys, width, blocks, scale,
    BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key head, from all query heads that share it. Scores are [keys, queries]
    here, as the products want them: turned around, they would go through shared memory."""
    program = tl.program_id(0)
    block = program % blocks
    kv_heads = heads // group
    batch = (program // blocks // kv_heads).to(tl.int64)
    kv_head = (program // blocks % kv_heads).to(tl.int64)
    u = block * BLOCK_U + tl.arange(0, BLOCK_U)
    k_block, inside = _block_of(k_ptr, batch, kv_head, k_batch, k_head, k_row, u, width, keys, D)
    v_block, inside = _block_of(v_ptr, batch, kv_head, v_batch, v_head, v_row, u, width, keys, D)
    k = tl.load(k_block, mask=inside, other=0.0)
    v = tl.load(v_block, mask=inside, other=0.0)
    seen_from = tl.load(from_ptr + batch * range_batch + u, mask=u < keys, other=queries)
    seen_to = tl.load(to_ptr + batch * range_batch + u, mask=u < keys, other=0)
    begin = tl.min(seen_from, axis=0) // BLOCK_T * BLOCK_T
    end = tl.max(seen_to, axis=0)
    dk = tl.zeros([BLOCK_U, D], tl.float32)
    dv = tl.zeros([BLOCK_U, D], tl.float32)
    steps = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_T)
    for step in range(group * steps):  # one loop, not two: what an outer one carries from run to run would spill
        head = kv_head * group + step // tl.maximum(steps, 1)  # loads are begun ahead, also where there is no step
        t = begin + step % tl.maximum(steps, 1) * BLOCK_T + tl.arange(0, BLOCK_T)
        there = t < queries
        q_block, taken = _block_of(q_ptr, batch, head, q_batch, q_head, q_row, t, width, queries, D)
        do_block, taken = _block_of(do_ptr, batch, head, do_batch, do_head, do_row, t, width, queries, D)
        q = tl.load(q_block, mask=taken, other=0.0)
        do = tl.load(do_block, mask=taken, other=0.0)
        row = (batch * heads + head) * queries + t
        lse = tl.load(lse_ptr + row, mask=there, other=0.0)
        delta = tl.load(delta_ptr + row, mask=there, other=0.0)
        seen = (t[None, :] >= seen_from[:, None]) & (t[None, :] < seen_to[:, None])
        p = _probabilities(k, q, seen, lse[None, :], scale, PRECISION)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    column = tl.arange(0, D)
    place = ((batch * kv_heads + kv_head) * keys + u).to(tl.int64)[:, None] * width + column[None, :]
    tl.store(dk_ptr + place, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=inside)


# ---- launches ----


# Queries, keys and stages of a tile of the three kernels, by the head width up to which they hold: such that nothing
# spills and shared memory suffices (see tests). Compute capabilities 9 and 10 have more of it, and groups of four warps
# that multiply 64 rows at a time: 8 warps want 128 rows of their own, or half of them repeats what the others do.
TILES = {
    "227 KB": {
        64: ((128, 128, 3), (128, 64, 2), (64, 128, 2)),
        128: ((128, 64, 3), (128, 64, 2), (32, 128, 2)),
        256: ((128, 32, 2), (128, 32, 2), (32, 32, 2)),
    },
    "99 KB": {
        64: ((128, 64, 3), (128, 64, 2), (64, 128, 2)),
        128: ((128, 32, 3), (128, 32, 2), (32, 64, 2)),
        256: ((64, 32, 2), (32, 32, 2), (32, 32, 2)),
    },
    "fp32": {
        64: ((32, 32, 1), (32, 32, 1), (32, 32, 1)),
        256: ((16, 32, 1), (16, 32, 1), (16, 32, 1)),
    },
}
FORWARD, QUERIES, KEYS = range(3)
TILE_OF_DELTA = 2048  # elements


def tile(kernel: int, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Block sizes, warps and stages of FORWARD, QUERIES or KEYS."""
    large = not INTERPRETED and torch.cuda.get_device_capability(device)[0] in (9, 10)
    table = TILES["fp32" if dtype == torch.float32 else "227 KB" if large else "99 KB"]
    queries, keys, stages = table[min(limit for limit in table if limit >= width)][kernel]
    D = max(16, triton.next_power_of_2(width))
    return dict(BLOCK_T=queries, BLOCK_U=keys, D=D, PRECISION="ieee", num_warps=8, num_stages=stages)


def per_sample(x: Tensor) -> int:
    """The stride from sample to sample; 0 where one row is all of theirs."""
    return 0 if len(x) == 1 else x.stride(0)


def attend(
    q: Tensor, k: Tensor, v: Tensor, ranges: tuple[Tensor, Tensor], scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out in `dtype`, laid out as [B, T, N, D], which is what follows wants; lse)."""
    q, k, v = (last_dim_contiguous(x) for x in (q, k, v))
    batch, heads, queries, width = q.shape
    laid_out = queries * heads * width, width, heads * width, 1  # not by a view: autograd lets nobody write into those
    out = torch.empty_strided((batch, heads, queries, width), laid_out, dtype=dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    options = tile(FORWARD, width, q.dtype, q.device)
    blocks = triton.cdiv(queries, options["BLOCK_T"])
    if q.numel():
        strides = [stride for x in (q, k, v, out) for stride in x.stride()[:3]]
        _forward[(blocks * batch * heads,)](
            q, k, v, out, lse, *ranges, *strides, per_sample(ranges[0]),
            heads, heads // k.shape[1], queries, k.shape[2], width, blocks, scale, **options,
        )  # fmt: skip
    return out, lse


def delta_of(do: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """rowsum(do ∘ out) - dlse: [B, N, T] in fp32."""
    do, out = last_dim_contiguous(do), last_dim_contiguous(out)
    batch, heads, queries, width = do.shape
    delta = torch.empty(batch, heads, queries, dtype=torch.float32, device=do.device)
    D = max(16, triton.next_power_of_2(width))
    rows = TILE_OF_DELTA // D
    blocks = triton.cdiv(queries, rows)
    if do.numel():
        _delta[(blocks * batch * heads,)](
            do, out, delta if dlse is None else dlse.contiguous(), delta, *do.stride()[:3], *out.stride()[:3],
            heads, queries, width, blocks, BLOCK_T=rows, D=D, DLSE=dlse is not None,
        )  # fmt: skip
    return delta


def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    ranges: tuple[Tensor, Tensor],
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in `dtype`, contiguous. lse and δ may be those of more keys than these: ring attention's."""
    q, k, v, do = (last_dim_contiguous(x) for x in (q, k, v, do))
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    dq = torch.empty(q.shape, dtype=dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=dtype, device=q.device) for _ in range(2))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    first, stop = ranges
    strides = [stride for x in (q, k, v, do) for stride in x.stride()[:3]]
    tensors = q, k, v, do, lse.contiguous(), delta.contiguous()
    sizes = heads, heads // kv_heads, queries, keys, width
    options = tile(QUERIES, width, q.dtype, q.device)
    blocks = triton.cdiv(queries, options["BLOCK_T"])
    _backward_queries[(blocks * batch * heads,)](
        *tensors, first, stop, dq, *strides, per_sample(first), *sizes, blocks, scale, **options
    )
    each_key = torch.arange(keys, dtype=torch.int32, device=q.device).expand(len(first), -1).contiguous()
    seen_from, seen_to = (torch.searchsorted(x, each_key, right=True, out_int32=True) for x in (stop, first))
    options = tile(KEYS, width, q.dtype, q.device)
    blocks = triton.cdiv(keys, options["BLOCK_U"])
    _backward_keys[(blocks * batch * kv_heads,)](
        *tensors, seen_from, seen_to, dk, dv, *strides, per_sample(seen_from), *sizes, blocks, scale, **options
    )
    return dq, dk, dv


class _FlashAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = attend(q, k, v, (first, stop), scale, q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, first, stop)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse, first, stop = ctx.saved_tensors
        do, dlse = grads
        if do is None and dlse is None:
            return None, None, None, None, None, None
        do = torch.zeros_like(out) if do is None else do
        delta = delta_of(do, out, dlse)
        return *attend_backward(q, k, v, do, lse, delta, (first, stop), ctx.scale, q.dtype), None, None, None
