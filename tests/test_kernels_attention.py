"""Flash attention beside float64, a mask drawn from the definition, torch's own attention."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    Op,
    beyond_int32,
    compiles,
    error,
    every_dtype,
    gradients_are_derivatives,
    oracle,
    parity,
    randn,
    refused_by_name,
    run,
    same_in_any_order,
    sees,
    triton_run,
)
from torch import Tensor
from torch.nn import functional as F

from minizero.kernels import flash_attention
from minizero.kernels.flash_attention import WIDEST, ranges_of, runs_in_triton
from minizero.parallel.block_attention import Mask, attend

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of -inf - -inf behind a mask

# ---- who sees what, from the definition ----


def visible(
    queries: int,
    keys: int,
    causal: bool = True,
    window: int = 0,
    documents_BT: Tensor | None = None,
    documents_BU: Tensor | None = None,
) -> Tensor:
    """[B or 1, T, U]: whether query t sees key u. Queries are the last of the positions."""
    place, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None, :]
    seen = torch.ones(1, queries, keys, dtype=torch.bool)
    if causal:
        seen = seen & (key <= place)
    if window:
        seen = seen & (place - key < window)
    if documents_BT is not None:
        of_keys = documents_BT if documents_BU is None else documents_BU
        seen = seen & (documents_BT[:, :, None] == of_keys[:, None, :])
    return seen


def textbook(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """One softmax over a whole matrix; what sees nothing has out 0 and lse -inf."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("bntd,bnud->bntu", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    p = torch.where(seen.any(dim=-1)[:, None, :, None], scores.softmax(dim=-1), 0.0)
    return torch.einsum("bntu,bnud->bntd", p, v), scores.logsumexp(dim=-1)


def documents_of(batch: int, length: int, often: float = 0.05, seed: int = 0) -> Tensor:
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)).lt(often).cumsum(1)


def inputs(batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int) -> list[Tensor]:
    shapes = (batch, heads, queries, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, width)
    return [randn(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def checked(module: Any, sizes: tuple[int, ...], dtype: torch.dtype, kind: str = "random", **options: Any) -> None:
    """Parity of `module`'s attention, with what the definition makes of it as the truth."""
    scale = options.get("scale")
    seen = visible(*sizes[3:5], **{name: value for name, value in options.items() if name != "scale"})
    truth = partial(textbook, seen=seen, scale=scale)
    parity(partial(module.flash_attention, **options), inputs(*sizes), dtype, kind, truth=truth)


class Kernels:
    flash_attention = staticmethod(flash_attention)


def lengths(dtype: torch.dtype) -> int:
    """Several blocks, the last of them ragged."""
    return 75 if dtype == torch.float32 else 150


# ---- parity ----

MASKS: dict[str, Callable[[int], dict[str, Any]]] = {
    "causal": lambda n: {},
    "all": lambda n: {"causal": False},
    "a window": lambda n: {"window": n // 3},
    "itself": lambda n: {"window": 1},
    "a window that holds all": lambda n: {"window": n + 1},
    "documents": lambda n: {"documents_BT": documents_of(2, n)},
    "documents of every sample": lambda n: {"documents_BT": documents_of(1, n)},
    "documents, not causal": lambda n: {"documents_BT": documents_of(2, n), "causal": False},
    "documents and a window": lambda n: {"documents_BT": documents_of(2, n, 0.03), "window": n // 5},
    "documents of one token": lambda n: {"documents_BT": torch.arange(n)[None]},
}


@every_dtype
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, dtype):
    length = lengths(dtype)
    checked(Kernels, (2, 1, 1, length, length, 16), dtype, **MASKS[name](length))


@every_dtype
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"),
    [(4, 2, 40), (3, 1, 14), (2, 2, 1), (1, 1, 64), (2, 1, 96), (1, 1, WIDEST), (4, 4, 7)],
)
def test_heads_and_their_widths(heads, kv_heads, width, dtype):
    length = lengths(dtype) if width < 64 else 40
    checked(Kernels, (1, heads, kv_heads, length, length, width), dtype)


@every_dtype
@pytest.mark.parametrize(("queries", "keys"), [(17, 100), (1, 70), (64, 128), (70, 33), (40, 1), (7, 15)])
@pytest.mark.parametrize("causal", [True, False])
def test_fewer_queries_than_keys_and_more(queries, keys, causal, dtype):
    """The queries are the last positions: with more of them than keys, the first ones see nothing."""
    checked(Kernels, (1, 2, 1, queries, keys, 16), dtype, causal=causal)


@every_dtype
def test_one_token_sees_itself(dtype):
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs(2, 2, 1, 1, 1, 16))
    out, lse = flash_attention(q, k, v, backend="triton")
    assert torch.equal(out, v.expand_as(out))
    assert error(lse, (q.double() * k.double()).sum(dim=-1) / 4) < 5e-7
    (dv,) = torch.autograd.grad(out.sum(), v)
    assert torch.equal(dv, torch.full_like(v, 2.0))


@every_dtype
def test_documents_of_keys(dtype):
    """The last queries of a packed sequence, among all of its keys; and queries whose document has no keys here."""
    whole = documents_of(2, 90)
    for options in ({}, {"window": 9}, {"causal": False}):
        checked(Kernels, (2, 1, 1, 30, 90, 16), dtype, documents_BT=whole[:, 60:], documents_BU=whole, **options)
    other = torch.tensor([0, 1, 1, 2, 5, 5, 7, 9])[None]
    of_keys = torch.tensor([1, 1, 3, 5, 5, 5, 6, 7, 7, 8])[None]
    for causal in (True, False):
        checked(Kernels, (1, 2, 1, 8, 10, 16), dtype, documents_BT=other, documents_BU=of_keys, causal=causal)


@every_dtype
def test_rows_that_see_nothing(dtype):
    """out 0, lse -inf, gradients 0: no nan anywhere."""
    queries, keys = 50, 20
    leaves = [x.to(dtype).requires_grad_() for x in inputs(1, 2, 1, queries, keys, 16)]
    out, lse = flash_attention(*leaves, backend="triton")
    assert not out[:, :, : queries - keys].any()
    assert (lse[:, :, : queries - keys] == -math.inf).all()
    assert lse[:, :, queries - keys :].isfinite().all()
    gradients = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[0][:, :, : queries - keys].any()


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize(
    "sizes", [(1, 2, 1, 0, 5, 8), (1, 2, 1, 5, 0, 8), (0, 2, 1, 5, 5, 8), (1, 2, 1, 0, 0, 8)], ids=str
)
def test_nothing_to_attend_to(sizes, name):
    found = run(flash_attention, inputs(*sizes), torch.bfloat16, torch.bfloat16, backend=name)
    batch, heads, _, queries, _, width = sizes
    assert torch.equal(found["output 0"], torch.zeros(batch, heads, queries, width, dtype=torch.bfloat16))
    assert torch.equal(found["output 1"], torch.full((batch, heads, queries), -math.inf))
    for number, given_ in enumerate(inputs(*sizes)):
        assert torch.equal(found[f"gradient {number}"], torch.zeros_like(given_, dtype=torch.bfloat16))


@every_dtype
@pytest.mark.parametrize("scale", [0.3, 2.0, -0.5, 0.0])
def test_scales(scale, dtype):
    checked(Kernels, (1, 2, 1, 40, 40, 16), dtype, scale=scale)


@every_dtype
def test_scores_far_apart(dtype):
    """exp never sees more than 0: one key has it all."""
    q, k, v = inputs(1, 2, 1, 40, 40, 16)
    checked(Kernels, (1, 2, 1, 40, 40, 16), dtype, scale=3.0)
    found = run(flash_attention, [100 * q, 100 * k, v], dtype, dtype, backend="triton")
    assert all(x.isfinite().all() for x in found.values())


def test_lse_of_16_bits_is_that_of_fp32():
    """Scores are never rounded to 16 bits: what puts blocks together later needs lse whole."""
    q, k, v = (x.bfloat16() for x in inputs(1, 2, 1, 40, 40, 16))
    _, lse = flash_attention(q, k, v, backend="triton")
    exact = textbook(q.double(), k.double(), v.double(), visible(40, 40))[1]
    assert lse.dtype == torch.float32
    assert error(lse, exact) < 3e-7


@pytest.mark.parametrize("which", [0, 1])
@every_dtype
def test_one_of_the_two_results_is_enough(which, dtype):
    """Backward with no gradient for the other; v has none from lse."""
    q, k, v = inputs(1, 2, 1, 40, 40, 16)
    op = lambda *x, **o: flash_attention(*x, *([v.to(x[0].dtype)] if which else []), **o)[which]  # noqa: E731
    truth = lambda *x: textbook(*x, *([v.to(x[0].dtype)] if which else []), visible(40, 40))[which]  # noqa: E731
    parity(op, [q, k] if which else [q, k, v], dtype, truth=truth)


# ---- layouts ----

LAYOUTS: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[..., tuple[Tensor, ...]]]] = {
    "slices of one projection": (
        ((2, 40, 6 * 14),),
        lambda x: tuple(part.unflatten(-1, (-1, 14)).transpose(1, 2) for part in x.split((56, 14, 14), dim=-1)),
    ),
    "heads last": (((2, 40, 14, 6),), lambda x: x.permute(0, 3, 1, 2).split((4, 1, 1), dim=1)),
    "width apart": (
        ((2, 4, 14, 40), (2, 2, 14, 40), (2, 2, 14, 40)),
        lambda *x: tuple(each.transpose(2, 3) for each in x),
    ),
    "one head expanded": (
        ((2, 4, 40, 14), (2, 1, 40, 14), (2, 1, 40, 14)),
        lambda q, k, v: (q, k.expand(2, 4, 40, 14), v.expand(2, 4, 40, 14)),
    ),
    "one sample expanded": (
        ((1, 2, 40, 14), (2, 2, 40, 14), (1, 2, 40, 14)),
        lambda q, k, v: (q.expand(2, 2, 40, 14), k, v.expand(2, 2, 40, 14)),
    ),
    "one key expanded": (
        ((2, 2, 40, 14), (2, 2, 1, 14), (2, 2, 40, 1)),
        lambda q, k, v: (q, k.expand(2, 2, 40, 14), v.expand(2, 2, 40, 14)),
    ),
    "every second position": (
        ((2, 2, 80, 14), (2, 1, 80, 14), (2, 1, 80, 14)),
        lambda q, k, v: (q[:, :, ::2], k[:, :, ::2], v[:, :, 1::2]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_queries_and_keys(layout):
    shapes, view = LAYOUTS[layout]
    given_ = [randn(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    truth = lambda *x: textbook(*view(*x), visible(40, 40))  # noqa: E731
    parity(lambda *x, **o: flash_attention(*view(*x), **o), given_, torch.bfloat16, truth=truth)


@every_dtype
@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced"])
def test_layouts_of_incoming_gradients(kind, dtype):
    checked(Kernels, (2, 2, 1, 40, 40, 14), dtype, kind)


def test_the_result_lies_as_the_next_projection_wants_it():
    out, _ = flash_attention(*inputs(2, 4, 2, 9, 9, 14), backend="triton")
    assert out.transpose(1, 2).is_contiguous()


def test_results_may_be_written_over_and_backward_says_that_it_needs_them():
    for number in range(2):
        leaves = [x.requires_grad_() for x in inputs(1, 2, 1, 9, 9, 14)]
        results = flash_attention(*leaves, backend="triton")
        plain = results[number].detach().clone()
        results[number].mul_(3.0)
        assert torch.equal(results[number], 3 * plain)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            results[number].sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_lies_around_is_not_looked_at(dtype):
    """The tensors are islands in nan: a missing mask of rows or of columns would let it in."""
    plain = [x.to(dtype) for x in inputs(1, 2, 1, 40, 50, 14)]
    dry = [x.clone().requires_grad_() for x in plain]
    wet = []
    for x in plain:
        sea = torch.full((x.shape[0] + 1, x.shape[1] + 1, x.shape[2] + 70, x.shape[3] + 5), math.nan, dtype=dtype)
        island = sea[: x.shape[0], : x.shape[1], : x.shape[2], 2 : 2 + x.shape[3]]
        island.copy_(x)
        wet.append(island.requires_grad_())
    do = torch.full((1, 3, 100, 20), math.nan, dtype=dtype)[:, :2, :40, :14].fill_(0.5)
    results = []
    for given_, upstream in ((dry, do.contiguous()), (wet, do)):
        out, lse = flash_attention(*given_, backend="triton")
        results.append((out, lse, *torch.autograd.grad((out, lse), given_, (upstream, torch.ones_like(lse)))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# ---- references that are not ours ----


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)])
def test_the_torch_backend_is_torchs_own_attention(name, heads, kv_heads):
    options = MASKS[name](23)
    seen = visible(23, 23, **options)
    own = partial(F.scaled_dot_product_attention, attn_mask=seen[:, None], enable_gqa=True)
    op = partial(flash_attention, **options)
    oracle(lambda *x, **o: op(*x, **o)[0], own, inputs(2, heads, kv_heads, 23, 23, 6))
    oracle(op, partial(textbook, seen=seen), inputs(2, heads, kv_heads, 23, 23, 6))


@every_dtype
def test_kernels_are_torchs_own_attention(dtype):
    given_ = inputs(1, 4, 2, 40, 40, 16)
    own = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    exact = run(own, given_, dtype, torch.float64)
    op = lambda *x, **o: flash_attention(*x, **o)[0]  # noqa: E731
    for name, value in run(op, given_, dtype, dtype, backend="triton").items():
        assert error(value, exact[name]) < {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]


@pytest.mark.parametrize("name", ["causal", "a window", "documents", "documents, not causal"])
def test_gradients_are_derivatives(name):
    gradients_are_derivatives(partial(flash_attention, **MASKS[name](7)), inputs(2, 2, 1, 7, 7, 3))


def test_gradients_are_derivatives_where_rows_see_nothing():
    op: Op = lambda *x, **o: flash_attention(*x, **o)[0]  # noqa: E731 - lse is -inf, and has no differences
    gradients_are_derivatives(op, inputs(1, 2, 1, 6, 4, 3))


@st.composite
def sequences(draw: st.DrawFn) -> dict[str, Any]:
    queries, keys = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    causal = draw(st.booleans())
    options: dict[str, Any] = {"causal": causal, "window": draw(st.integers(0, 14)) if causal else 0}
    if draw(st.booleans()):
        rows = draw(st.sampled_from([1, 3]))
        documents = [
            torch.tensor([sorted(draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))) for _ in range(rows)])
            for n in (queries, keys)
        ]
        options["documents_BT"] = documents[0]
        if queries != keys or draw(st.booleans()):
            options["documents_BU"] = documents[1]
    return {"queries": queries, "keys": keys, **options}


@given(sequences())
@settings(max_examples=150, deadline=None, database=None, derandomize=True)
def test_what_a_query_sees_is_a_range_that_moves_forward(options):
    """Any mix of causality, window and documents: the same as the definition, key by key."""
    queries, keys = options.pop("queries"), options.pop("keys")
    first, stop = ranges_of(queries, keys, torch.device("cpu"), **options)
    key = torch.arange(keys)
    found = (key >= first[..., None]) & (key < stop[..., None])
    assert torch.equal(found, visible(queries, keys, **options).expand_as(found))
    assert first.dtype == stop.dtype == torch.int32
    assert (first.diff(dim=-1) >= 0).all()  # what backward's search for the queries of a block stands on
    assert (stop.diff(dim=-1) >= 0).all()
    assert (first <= stop).all()


# ---- bytes ----


def taken(seen: Tensor, rows: int, columns: int) -> int:
    """Columns [of any row block] that lie in blocks between the first and the last which a block of rows sees."""
    total = 0
    for sample in seen:
        for block in sample.split(rows):
            where = block.any(dim=0).nonzero().flatten()
            if len(where):
                begin, end = int(where[0]) // columns * columns, -(-(int(where[-1]) + 1) // columns) * columns
                total += min(end, sample.shape[1]) - begin
    return total


class Spy:
    """A kernel that notes the blocks it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.blocks = kernel, (0, 0)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.blocks = options["BLOCK_T"], options["BLOCK_U"]
            self.kernel[grid](*args, **options)

        return launch


@pytest.mark.parametrize("name", ["causal", "a window", "documents", "all", "itself"])
def test_blocks_that_nobody_sees_are_not_read(name, monkeypatch):
    """Forward: queries once, and of keys and values just the blocks in the range of a block of queries."""
    length, width = 270, 16
    options = MASKS[name](length)
    seen = visible(length, length, **options).expand(2, length, length)
    leaves = [x.bfloat16().requires_grad_() for x in inputs(2, 1, 1, length, length, width)]
    module = sys.modules["minizero.kernels.flash_attention"]
    spies = [Spy(getattr(module, kernel)) for kernel in ("_forward", "_backward_queries", "_backward_keys")]
    for spy in spies:
        monkeypatch.setattr(module, spy.kernel.fn.__name__, spy)
    q, k, v = leaves
    with interpreter.traffic() as forward:
        out, lse = flash_attention(*leaves, **options, backend="triton")
    do = torch.ones_like(out)
    with interpreter.traffic() as backward:
        gradients = torch.autograd.grad(out, leaves, do)
    assert forward.read(q) == forward.written(out) == q.nbytes
    assert forward.written(lse) == lse.nbytes
    row = width * 2
    assert forward.read(k) == forward.read(v) == taken(seen, *spies[0].blocks) * row
    of_keys = taken(seen, *spies[1].blocks) * row
    of_queries = taken(seen.transpose(1, 2), *reversed(spies[2].blocks)) * row
    assert backward.read(k) <= k.nbytes + of_keys  # the block itself for dk and dv, and others for dq
    assert backward.read(v) <= v.nbytes + of_keys
    assert backward.read(q) <= q.nbytes + of_queries
    assert backward.read(do) <= 2 * do.nbytes + of_queries  # and once more for δ
    assert [backward.written(x) for x in gradients] == [x.nbytes for x in gradients]


# ---- order ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_programs_does_not_matter(dtype):
    length = lengths(dtype)
    options = MASKS["documents of every sample"](length)
    same_in_any_order(triton_run(partial(flash_attention, **options), inputs(1, 2, 1, length, length, 16), dtype))


# ---- huge tensors ----

GOOD = """
from minizero.kernels import flash_attention

def results(module, x):
    x = x.detach().requires_grad_()
    y, lse = module.flash_attention(x, x, x, backend="triton")
    return y, *torch.autograd.grad(y, x, x.detach().contiguous())

ours = sys.modules["minizero.kernels.flash_attention"]
rows, near = far(40)
shapes = [(x[None, None], x[None, :, None], x[:, None, None]) for x in (rows, near)]
for one, other in zip(*shapes):
    same(results(ours, one), results(ours, other))
"""


def test_offsets_beyond_int32(tmp_path):
    """Rows, heads and samples that lie far apart. The same kernels with int32 offsets die of it."""
    plant = 'broken = planted(folder, "flash_attention", (".to(tl.int64)", ""))'
    broken = [f"{plant}\nsame(results(broken, shapes[0][{n}]), results(ours, shapes[1][{n}]))" for n in range(3)]
    beyond_int32(tmp_path, GOOD, broken)


# ---- refusals ----

Q, K = torch.ones(2, 4, 6, 8), torch.ones(2, 2, 6, 8)
D = torch.zeros(2, 6, dtype=torch.int64)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "three dims": (lambda: flash_attention(Q[0], K[0], K[0]), r"q, k, v are \[\(4, 6, 8\)"),
    "heads that do not divide": (lambda: flash_attention(Q[:, :3], K, K), "M dividing N"),
    "no key heads": (lambda: flash_attention(Q, K[:, :0], K[:, :0]), "M dividing N"),
    "keys unlike values": (lambda: flash_attention(Q, K, K[:, :, :5]), "q, k, v are"),
    "another width": (lambda: flash_attention(Q, K[..., :4], K[..., :4]), "q, k, v are"),
    "no width": (lambda: flash_attention(Q[..., :0], K[..., :0], K[..., :0]), "q, k, v are"),
    "other samples": (lambda: flash_attention(Q[:1], K, K), "q, k, v are"),
    "two dtypes": (lambda: flash_attention(Q, K.bfloat16(), K), "float32, torch.bfloat16, torch.float32; legal: one"),
    "a negative window": (lambda: flash_attention(Q, K, K, window=-1), "window = -1, causal = True"),
    "a window around": (lambda: flash_attention(Q, K, K, window=3, causal=False), "window = 3, causal = False"),
    "documents of too few": (lambda: flash_attention(Q, K, K, documents_BT=D[:, :5]), r"documents_BT is \(2, 5\)"),
    "documents without samples": (lambda: flash_attention(Q, K, K, documents_BT=D[0]), r"documents_BT is \(6,\)"),
    "documents of other samples": (lambda: flash_attention(Q, K, K, documents_BT=D[[0, 0, 0]]), "documents_BT is"),
    "documents of keys": (
        lambda: flash_attention(Q[:, :, :3], K, K, documents_BT=D[:, :3]), "3 queries, 6 keys: documents_BU must be"
    ),
    "too many keys' documents": (
        lambda: flash_attention(Q, K, K, documents_BT=D, documents_BU=torch.zeros(2, 7)), r"documents_BU is \(2, 7\)"
    ),
    "documents of keys alone": (lambda: flash_attention(Q, K, K, documents_BU=D), "none of queries"),
    "a head too wide": (
        lambda: flash_attention(*[torch.ones(1, 1, 2, WIDEST + 1)] * 3, backend="triton"), "head width 257; legal: up"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=f"^flash_attention: .*{message}"):
        call()


def test_a_head_too_wide_is_for_torch():
    x = randn(1, 1, 2, WIDEST + 1)
    out, _ = flash_attention(x, x, x)
    assert error(out, textbook(x.double(), x.double(), x.double(), visible(2, 2))[0]) < 1e-6


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_documents_that_decrease_raise(name):
    """The first of a run and the last: what comes back later is not the same document in these kernels."""
    for documents in ([0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]):
        packed = torch.tensor([[0] * 6, documents])
        with pytest.raises(RuntimeError, match="documents decrease along the sequence"):
            flash_attention(Q, K, K, documents_BT=packed, backend=name)
        with pytest.raises(RuntimeError, match="documents decrease along the sequence"):
            flash_attention(Q, K, K, documents_BT=D, documents_BU=packed, backend=name)


def test_what_triton_cannot_run_is_refused_by_name(monkeypatch):
    op = lambda cast, options: flash_attention(*map(cast, (Q, K, K)), **options)  # noqa: E731
    refused_by_name("flash_attention", op, monkeypatch)


def test_heads_that_are_too_wide_are_for_torch(monkeypatch):
    """Also between the blocks of a ring, which have no need of `flash_attention` itself."""
    wide = randn(1, 2, 5, WIDEST + 8)
    with pytest.raises(ValueError, match=f"head width {WIDEST + 8}; legal: up to {WIDEST}"):
        flash_attention(wide, wide, wide, backend="triton")
    with pytest.raises(ValueError, match=f"head width {WIDEST + 8}; legal: up to {WIDEST}"):
        attend(wide, wide, wide, 1.0, Mask(causal=True), "triton")
    on_a_gpu = sys.modules["minizero.kernels.flash_attention"]  # the package's attribute of that name is the function
    monkeypatch.setattr(on_a_gpu, "use_triton", lambda *_: True)
    assert not runs_in_triton("auto", wide, wide, wide)
    assert runs_in_triton("auto", *[wide[..., :WIDEST]] * 3)


# ---- torch.compile ----


@pytest.mark.parametrize("name", ["causal", "a window", "documents"])
def test_torch_compile_traces_the_torch_backend(name):
    compiles(partial(flash_attention, **MASKS[name](9)), inputs(2, 2, 1, 9, 9, 6))


# ---- defects ----


def plainly(module: ModuleType) -> None:
    checked(module, (1, 2, 1, 40, 40, 16), torch.bfloat16)


DEFECTS: dict[str, tuple[tuple[str, str], Callable[[ModuleType], None]]] = {
    "a query sees the key behind it": (
        ("stop = (place_1T + 1).clamp(0, keys)", "stop = (place_1T + 2).clamp(0, keys)"),
        plainly,
    ),
    "a window is one too short": (
        ("(place_1T + 1 - min", "(place_1T + 2 - min"),
        lambda m: checked(m, (1, 2, 1, 40, 40, 16), torch.bfloat16, window=9),
    ),
    "positions count from the first key": (
        ("torch.arange(keys - queries, keys, dtype", "torch.arange(queries, dtype"),
        lambda m: checked(m, (1, 2, 1, 17, 40, 16), torch.bfloat16),
    ),
    "blocks with something hidden are taken without looking": (
        ("        if MASKED:\n", "        if False:\n"),
        plainly,
    ),
    "the gradient of lse is dropped": (
        ("delta -= tl.load(dlse_ptr", "delta -= 0.0 * tl.load(dlse_ptr"),
        plainly,
    ),
    "all heads read the first key head": (
        ("k_ptr += batch * k_batch + head // group * k_head", "k_ptr += batch * k_batch"),
        lambda m: checked(m, (1, 4, 2, 40, 40, 16), torch.bfloat16),
    ),
    "lse in base 2": (
        ("* 0.6931471805599453, float", "* 1.0, float"),
        plainly,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DEFECTS)
def test_a_planted_defect_is_seen(what, tmp_path):
    sees(tmp_path, "flash_attention", *DEFECTS[what])
