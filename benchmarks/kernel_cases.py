"""What there is to know of every public kernel, for benchmarks: its inputs, its peers, and what it must cost at least.

An `Op` makes inputs (the same ones in every call), runs the kernel or its torch code on them, and names contenders. A
`Case` is an op at one shape with the bytes or operations that cannot be avoided, and the bars.

Bytes are those of the elements, each read or written once: weights, and a number or two per row, are left out.

Shapes: M rows, H columns, T tokens, V vocabulary, B batch, N query heads, K key heads, S positions, D head width,
n elements. Inputs are bf16 where they are timed; masters and moments fp32.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minizero import kernels

Prepare = Callable[..., Callable[[], Any]]
"""Inputs -> the call that is timed."""

BLOCK = 256  # of quantization
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
EPS = 1e-6


class Source:
    """Random tensors of one dtype on one device, the same for every source."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, grad: bool = True, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, dtype=dtype or self.dtype, device=self.device, generator=self.generator)
        return (x if scale == 1.0 else x.mul_(scale)).requires_grad_(grad)

    def weight(self, size: int) -> Tensor:
        """About one."""
        return self.normal(size, grad=False, scale=0.1).add_(1.0).requires_grad_()

    def labels(self, count: int, classes: int) -> Tensor:
        return torch.randint(classes, (count,), device=self.device, generator=self.generator)

    def heads(self, batch: int, heads: int, length: int, width: int) -> Tensor:
        """[B, N, S, D], laid out as a projection leaves it: [B, S, N, D]."""
        return self.normal(batch, length, heads, width, grad=False).transpose(1, 2).requires_grad_()


@dataclass(frozen=True)
class Op:
    """One public kernel.

    Attributes:
        make: (source, *shape) -> inputs, tensors or lists of them; those that require grad are differentiated.
        call: (*inputs, backend=, **options) -> output or outputs.
        plain: what torch.compile is given; None: `call` with backend "torch".
        peers: by name, besides triton, torch and compile.
        expected: (op, fp32 inputs, fp32 gradients) -> what `compared` must be; None: of all that there is.
        compared: outputs and gradients -> what is compared.
        step: a difference that quantized outputs may have, as a share of the largest.
    """

    make: Callable[..., list[Any]]
    call: Callable[..., Any]
    plain: Callable[..., Any] | None = None
    peers: dict[str, Prepare] = field(default_factory=dict)
    expected: Callable[[Any, list[Any], list[Tensor]], list[Tensor]] | None = None
    compared: Callable[[list[Tensor]], list[Tensor]] = list
    step: float = 0.0


@dataclass(frozen=True)
class Measure:
    """What is timed of a case: forward, backward, or both.

    Attributes:
        amount: bytes, or FLOP where `flop`.
        share: bar, of the card's ceiling. rate: bar in TFLOP/s. limit: bar in ms. liger: bar, times as fast as Liger.
        grad: whether a forward alone keeps what backward wants.
    """

    direction: str
    amount: float
    flop: bool = False
    share: float | None = None
    rate: float | None = None
    limit: float | None = None
    liger: float = 1.0
    grad: bool = True


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    op: str
    shape: tuple[int, ...]
    measures: list[Measure]
    skip: dict[str, str] = field(default_factory=dict)  # contender -> why it is not run

    @property
    def label(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))}"


def plainly(function: Callable[..., Any]) -> Prepare:
    """A contender that is a function of the inputs."""
    return lambda *inputs: lambda: function(*inputs)


def liger(name: str, *rest: Any, first: bool = False) -> Prepare:
    """An autograd function of Liger's, called with the inputs and `rest`; `first`: of its outputs only the first."""

    def prepare(*inputs: Any) -> Callable[[], Any]:
        function = getattr(importlib.import_module("liger_kernel.ops"), name)
        return lambda: function.apply(*inputs, *rest)[0] if first else function.apply(*inputs, *rest)

    return prepare


# ---- rotary positions, attention ----


def make_rope(s: Source, batch: int, heads: int, kv_heads: int, length: int, width: int) -> list[Any]:
    angles = torch.rand(1, 1, length, width // 2, device=s.device, generator=s.generator) * 6.0
    q, k = s.heads(batch, heads, length, width), s.heads(batch, kv_heads, length, width)
    return [q, k, angles.cos().to(s.dtype), angles.sin().to(s.dtype)]


def liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Callable[[], Any]:
    """Liger takes the angles of both halves."""
    function = importlib.import_module("liger_kernel.ops").LigerRopeFunction
    both = [torch.cat((x, x), dim=-1).squeeze(1) for x in (cos, sin)]
    return lambda: function.apply(q, k, *both)


def make_attention(s: Source, batch: int, heads: int, kv_heads: int, length: int, width: int) -> list[Any]:
    return [s.heads(batch, heads, length, width), *(s.heads(batch, kv_heads, length, width) for _ in range(2))]


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: kernels.Backend, **options: Any) -> Tensor:
    return kernels.flash_attention(q, k, v, backend=backend, **options)[0]


def sdpa(backend: SDPBackend) -> Prepare:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return plainly(call)


def first_group(tensors: list[Tensor]) -> list[Tensor]:
    """[out, q's, k's, v's]: of the first sample, those of the first key head and its query heads."""
    kv_heads = min(x.shape[1] for x in tensors)
    return [x[:1, : x.shape[1] // kv_heads] for x in tensors]


def expect_attention(op: Op, inputs: list[Any], gradients: list[Tensor]) -> list[Tensor]:
    """Heads do not know of each other, and the matrix of all of them is too large."""
    do, *qkv = first_group([gradients[0], *inputs])
    leaves = detached(qkv)
    return results(lambda: op.call(*leaves, backend="torch"), leaves, [do])


# ---- cross-entropy ----


def make_logits(s: Source, tokens: int, vocabulary: int) -> list[Any]:
    return [s.normal(tokens, vocabulary, scale=2.0), s.labels(tokens, vocabulary)]


def cross_entropy(logits: Tensor, labels: Tensor, *, backend: kernels.Backend, **options: Any) -> Tensor:
    """Summed, in place."""
    options = {"reduction": "sum", "in_place": True} | options
    return kernels.cross_entropy(logits, labels, backend=backend, **options)


def plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


LOOKED_AT = 1024  # rows of the gradient of logits


def first_rows(tensors: list[Tensor]) -> list[Tensor]:
    """[loss, gradient of the first rows]."""
    return [tensors[0], *(x[:LOOKED_AT] for x in tensors[1:])]


def expect_cross_entropy(op: Op, inputs: list[Any], gradients: list[Tensor]) -> list[Tensor]:
    logits, labels = inputs
    with torch.no_grad():
        parts = zip(logits.split(LOOKED_AT), labels.split(LOOKED_AT), strict=True)
        loss = sum(op.call(*part, backend="torch").double() for part in parts)
    leaves = detached([logits[:LOOKED_AT], labels[:LOOKED_AT]])
    return [loss, *results(lambda: op.call(*leaves, backend="torch"), leaves, gradients)[1:]]


def make_head(s: Source, tokens: int, hidden: int, vocabulary: int) -> list[Any]:
    weight = s.normal(vocabulary, hidden, grad=False, scale=hidden**-0.5).requires_grad_()
    return [s.normal(tokens, hidden), weight, s.labels(tokens, vocabulary)]


def plain_head(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Without fusion."""
    return F.cross_entropy(F.linear(x, weight).float(), labels)


# ---- the optimizer, and flat buffers ----


def make_adamw(s: Source, size: int) -> list[Any]:
    master, m, v = (s.normal(size, grad=False, dtype=torch.float32, scale=scale) for scale in (1.0, 0.1, 0.1))
    step = torch.full((), 3.0, device=s.device)
    return [master, m, v.square_(), s.normal(size, grad=False), step, master.to(s.dtype)]


def adamw(*inputs: Tensor, backend: kernels.Backend) -> list[Tensor]:
    *state, parameter = inputs
    kernels.adamw_step(*state, **ADAMW, parameter=parameter, backend=backend)
    return [*inputs[:3], parameter]


def plain_adamw(master: Tensor, m: Tensor, v: Tensor, grad: Tensor, step: Tensor, parameter: Tensor) -> list[Tensor]:
    """With the step count left on the device, as torch.compile wants it."""
    (beta1, beta2), lr = ADAMW["betas"], ADAMW["lr"]
    step += 1
    g = grad.float()
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    master.mul_(1 - lr * ADAMW["weight_decay"])
    master.sub_(lr / (1 - beta1**step) * m / ((v / (1 - beta2**step)).sqrt() + ADAMW["eps"]))
    parameter.copy_(master)
    return [master, m, v, parameter]


def torch_fused_adamw(
    master: Tensor, m: Tensor, v: Tensor, grad: Tensor, step: Tensor, parameter: Tensor
) -> Callable[[], Any]:
    """torch.optim's fused AdamW in fp32, and the casts before and after it."""
    weight = torch.nn.Parameter(master)
    weight.grad = torch.empty_like(master)
    optimizer = torch.optim.AdamW([weight], **ADAMW, fused=True)
    optimizer.state[weight] = {"step": step, "exp_avg": m, "exp_avg_sq": v}

    def run() -> list[Tensor]:
        weight.grad.copy_(grad)
        optimizer.step()
        parameter.copy_(weight.detach())
        return [master, m, v, parameter]

    return run


def pieces_of(size: int) -> list[int]:
    """`size` in 16 parts, no two alike."""
    parts = [size * (index + 1) // 136 for index in range(15)]
    return [*parts, size - sum(parts)]


def make_pieces(s: Source, size: int) -> list[Any]:
    return [[s.normal(part, grad=False) for part in pieces_of(size)]]


def foreach_norm(tensors: list[Tensor]) -> Callable[[], Any]:
    return lambda: torch.stack(torch._foreach_norm(tensors)).double().square().sum()


def make_bucket(s: Source, size: int) -> list[Any]:
    """fp32 pieces, and a bucket of the dtype."""
    pieces = [s.normal(part, grad=False, dtype=torch.float32) for part in pieces_of(size)]
    return [pieces, torch.zeros(size, dtype=s.dtype, device=s.device)]


def foreach_copy(pieces: list[Tensor], bucket: Tensor) -> Callable[[], Any]:
    parts = list(bucket.split([piece.numel() for piece in pieces]))

    def run() -> Tensor:
        torch._foreach_copy_(parts, pieces)
        return bucket

    return run


def quantize(x: Tensor, *, backend: kernels.Backend, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    return kernels.quantize_blockwise(x, BLOCK, dtype, backend=backend)


def back(tensors: list[Tensor]) -> list[Tensor]:
    """[what q and scales stand for, scales]."""
    q, scales = tensors
    return [q.to(scales.dtype) * scales.repeat_interleave(BLOCK)[: q.numel()], scales]


def make_quantized(s: Source, size: int) -> list[Any]:
    """q, scales, and an empty tensor of the dtype that is wanted."""
    q = torch.randint(-127, 128, (size,), device=s.device, generator=s.generator).to(torch.int8)
    scales = s.normal(-(-size // BLOCK), grad=False, dtype=torch.float32).abs_()
    return [q, scales, torch.empty(0, dtype=s.dtype, device=s.device)]


def dequantize(q: Tensor, scales: Tensor, like: Tensor, *, backend: kernels.Backend) -> Tensor:
    return kernels.dequantize_blockwise(q, scales, BLOCK, like.dtype, backend=backend)


OPS: dict[str, Op] = {
    "rms_norm": Op(
        lambda s, rows, columns: [s.normal(rows, columns), s.weight(columns)],
        lambda x, w, **options: kernels.rms_norm(x, w, EPS, **options),
        peers={"liger": liger("LigerRMSNormFunction", EPS, 0.0, "llama", False)},
    ),
    "layer_norm": Op(
        lambda s, rows, columns: [s.normal(rows, columns), s.weight(columns), s.normal(columns)],
        lambda x, w, b, **options: kernels.layer_norm(x, w, b, EPS, **options),
        peers={"liger": liger("LigerLayerNormFunction", EPS)},
    ),
    "add_rms_norm": Op(
        lambda s, rows, columns: [s.normal(rows, columns), s.normal(rows, columns), s.weight(columns)],
        lambda x, residual, w, **options: kernels.add_rms_norm(x, residual, w, EPS, **options),
        peers={"liger": liger("LigerFusedAddRMSNormFunction", EPS)},
    ),
    "layer_norm_gelu": Op(
        lambda s, rows, columns: [s.normal(rows, columns), s.weight(columns), s.normal(columns)],
        lambda x, w, b, **options: kernels.layer_norm_gelu(x, w, b, EPS, **options),
    ),
    "bias_gelu": Op(
        lambda s, rows, columns: [s.normal(rows, columns), s.normal(columns)],
        kernels.bias_gelu,
    ),
    "swiglu": Op(
        lambda s, rows, columns: [s.normal(rows, columns), s.normal(rows, columns)],
        kernels.swiglu,
        peers={"liger": liger("LigerSiLUMulFunction")},
    ),
    "geglu": Op(
        lambda s, rows, columns: [s.normal(rows, columns), s.normal(rows, columns)],
        kernels.geglu,
        peers={"liger": liger("LigerGELUMulFunction")},
    ),
    "rope": Op(make_rope, kernels.rope, peers={"liger": liger_rope}),
    "cross_entropy": Op(
        make_logits,
        cross_entropy,
        plain=plain_cross_entropy,
        peers={"liger": liger("LigerCrossEntropyFunction", None, -100, 0.0, 0.0, "sum", first=True)},
        expected=expect_cross_entropy,
        compared=first_rows,
    ),
    "linear_cross_entropy": Op(
        make_head,
        kernels.linear_cross_entropy,
        plain=plain_head,
        peers={"liger": liger("LigerFusedLinearCrossEntropyFunction", first=True)},
    ),
    "flash_attention": Op(
        make_attention,
        attention,
        peers={"sdpa-flash": sdpa(SDPBackend.FLASH_ATTENTION), "sdpa-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION)},
        expected=expect_attention,
        compared=first_group,
    ),
    "adamw_step": Op(make_adamw, adamw, plain=plain_adamw, peers={"torch-fused": torch_fused_adamw}),
    "grad_norm": Op(
        make_pieces,
        lambda tensors, **options: kernels.grad_norm(tensors, **options)[0],
        peers={"foreach": foreach_norm},
    ),
    "cast_and_pack": Op(make_bucket, kernels.cast_and_pack, peers={"foreach": foreach_copy}),
    "quantize_blockwise": Op(lambda s, size: [s.normal(size, grad=False)], quantize, compared=back, step=1.01 / 127.0),
    "dequantize_blockwise": Op(make_quantized, dequantize),
}


def missing() -> list[str]:
    """Public kernels that nobody made an op of."""
    return sorted(set(kernels.__all__) - {"Backend"} - set(OPS))


# ---- running them ----


def flat(outputs: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


def detached(inputs: Any, dtype: torch.dtype | None = None) -> Any:
    """Copies, laid out alike, that require grad where the originals do; floating ones in `dtype`."""

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        wanted = dtype if dtype is not None and x.is_floating_point() else x.dtype
        return x.detach().to(wanted, copy=True).requires_grad_(x.requires_grad)

    return torch.utils._pytree.tree_map(copy, inputs)


def differentiated(inputs: Any) -> list[Tensor]:
    return [x for x in flat(inputs) if x.requires_grad]


def results(run: Callable[[], Any], inputs: Any, gradients: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of the inputs that have one."""
    outputs, leaves = flat(run()), differentiated(inputs)
    found = outputs + (list(torch.autograd.grad(outputs, leaves, gradients)) if leaves else [])
    return [x.detach() for x in found]


def gradients_of(outputs: list[Tensor], inputs: Any) -> list[Tensor]:
    """Random gradients of the outputs, each laid out like an input of its shape, if there is one; 1 for a loss."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    gradients = []
    for x in outputs:
        like = next((leaf for leaf in differentiated(inputs) if leaf.shape == x.shape), x).detach()
        gradient = torch.empty_like(like, dtype=x.dtype)
        gradients.append(gradient.normal_(generator=generator) if x.dim() else gradient.fill_(1.0))
    return gradients


def error_of(found: list[Tensor], expected: list[Tensor]) -> float:
    """Of the worst tensor: its largest difference beside its largest value, or that of their norms; inf for a nan."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if not other.numel():
            continue
        apart = one.to(other.dtype) - other
        for size in (lambda x: x.abs().max(), lambda x: torch.linalg.vector_norm(x)):
            share = float(size(apart)) / (float(size(other)) or 1.0)
            worst = max(worst, share if math.isfinite(share) else math.inf)
    return worst


# ---- what is measured ----

M, H, INTERMEDIATE, V, PARAMETERS = 16384, 4096, 14336, 128256, 1 << 28
FULL: dict[str, list[tuple[int, ...]]] = {
    "rms_norm": [(M, H), *(((M * H) // width, width) for width in (1024, 2048, 8192, 16384, 32768, 65536))],
    "layer_norm": [(M, H), *(((M * H) // width, width) for width in (1024, 16384, 65536))],
    "add_rms_norm": [(M, H), *(((M * H) // width, width) for width in (1024, 16384, 65536))],
    "layer_norm_gelu": [(M, H), (1024, 65536)],
    "bias_gelu": [(M, INTERMEDIATE)],
    "swiglu": [(M, INTERMEDIATE)],
    "geglu": [(M, INTERMEDIATE)],
    "rope": [(2, 32, 8, 8192, 128)],
    "cross_entropy": [(M, V), (M, 50304)],
    "linear_cross_entropy": [(M, H, V)],
    "flash_attention": [
        (2, 32, 8, 8192, 128), (4, 32, 8, 4096, 128), (1, 32, 8, 16384, 128), (8, 32, 8, 2048, 128),
        (4, 32, 8, 4096, 64), (16, 12, 12, 1024, 64), (1, 32, 8, 16384, 64), (8, 32, 32, 2048, 64),
    ],
    "adamw_step": [(PARAMETERS,)],
    "grad_norm": [(PARAMETERS,)],
    "cast_and_pack": [(PARAMETERS,)],
    "quantize_blockwise": [(PARAMETERS,)],
    "dequantize_blockwise": [(PARAMETERS,)],
}  # fmt: skip
TINY: dict[str, list[tuple[int, ...]]] = {
    "rope": [(1, 4, 2, 8, 16)],
    "cross_entropy": [(8, 96)],
    "linear_cross_entropy": [(8, 16, 96)],
    "flash_attention": [(1, 4, 2, 32, 16)],
    **dict.fromkeys(("adamw_step", "grad_norm", "cast_and_pack"), [(4096,)]),
    **dict.fromkeys(("quantize_blockwise", "dequantize_blockwise"), [(4096,)]),
}
ELEMENTWISE = {  # bytes per element of forward and backward
    "rms_norm": (4, 6),
    "layer_norm": (4, 6),
    "add_rms_norm": (8, 8),
    "layer_norm_gelu": (4, 6),
    "bias_gelu": (4, 6),
    "swiglu": (6, 10),
    "geglu": (6, 10),
}
FLAT = {  # bytes per element
    "adamw_step": 28.0,
    "grad_norm": 2.0,
    "cast_and_pack": 6.0,
    "quantize_blockwise": 3.0 + 4.0 / BLOCK,
    "dequantize_blockwise": 3.0 + 4.0 / BLOCK,
}


def cases(tiny: bool) -> list[Case]:
    """Of every op its first shape, then the others."""
    found = []
    for op in OPS:
        for shape in TINY.get(op, [(8, 64)]) if tiny else FULL[op]:
            found.append(Case(op, shape, measures(op, shape), skipped(op, shape)))
    seen: set[str] = set()
    first = [case for case in found if case.op not in seen and not seen.add(case.op)]
    return first + [case for case in found if case not in first]


def skipped(op: str, shape: tuple[int, ...]) -> dict[str, str]:
    """Contenders that a shape is too large for."""
    if op != "flash_attention" or shape[3] <= 2048:
        return {}
    gib = 2 * shape[0] * shape[1] * shape[3] ** 2 / 2**30
    return dict.fromkeys(("torch", "compile"), f"one matrix of all queries by all keys takes {gib:.0f} GiB")


def measures(op: str, shape: tuple[int, ...]) -> list[Measure]:
    """Bytes and operations, and the bars."""
    if op in ELEMENTWISE:
        elements = float(shape[0] * shape[1])
        forward, backward = (each * elements for each in ELEMENTWISE[op])
        bars = {"swiglu": (0.95, 0.92)} | dict.fromkeys(("rms_norm", "layer_norm", "add_rms_norm"), (0.95, 0.88))
        one, other = bars.get(op, (None, None))
        twice = 2.0 if op in ("rms_norm", "layer_norm", "add_rms_norm") else 1.0
        return [Measure("forward", forward, share=one), Measure("backward", backward, share=other, liger=twice)]
    if op in FLAT:
        return [Measure("forward", FLAT[op] * shape[0], share=0.95 if op == "adamw_step" else None)]
    if op == "rope":
        batch, heads, kv_heads, length, width = shape
        amount = 4.0 * batch * (heads + kv_heads) * length * width
        return [Measure("forward", amount), Measure("backward", amount)]
    if op == "cross_entropy":
        logits = float(shape[0] * shape[1])
        together = Measure("forward+backward", 4.0 * logits, share=0.90, liger=2.0)
        return [together, Measure("forward", 2.0 * logits, grad=False)]
    if op == "linear_cross_entropy":
        product = 2.0 * shape[0] * shape[1] * shape[2]
        together = Measure("forward+backward", 3.0 * product, flop=True, limit=82.0 if shape == (M, H, V) else None)
        return [together, Measure("forward", product, flop=True, grad=False)]
    batch, heads, _, length, width = shape
    product = 2.0 * batch * heads * length**2 * width  # two products, causal: half of each
    bars = (500.0, 380.0) if width == 128 and length >= 4096 else (None, None)
    return [
        Measure("forward", product, flop=True, rate=bars[0]),
        Measure("backward", 2.5 * product, flop=True, rate=bars[1]),
    ]
