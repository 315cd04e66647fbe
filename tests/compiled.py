"""What the kernels compile to, found out without a GPU: registers, spills, shared memory, instructions.

    TRITON_INTERPRET=0 python tests/compiled.py OUT.json [--arch 80,90,100] [--all]

The public ops run on meta tensors, which have shapes and strides and no memory, and every launch is written down
instead of made: so what is compiled has the tiles, warps, flags and alignments that the code itself chose. Triton then
compiles for a GPU that is not there, and the result is read from the PTX and from the machine code.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minizero import kernels
from minizero.kernels import norm
from minizero.kernels.cross_entropy import gradient, statistics

BF16, FP32 = torch.bfloat16, torch.float32
PROCESSES = 2
MULTIPROCESSORS = 132  # of an H100: how many rows a program of backward gets depends on it
TOKENS = 16400  # of norms: a multiple of 16, as it usually is

Case = Callable[[], Any]


# ---- cases: by name, what launches kernels ----


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def run(op: Callable[..., Any], *tensors: Any, **options: Any) -> None:
    """Forward, and backward from every output."""
    out = op(*tensors, backend="triton", **options)
    out = [each for each in (out if isinstance(out, tuple) else (out,)) if each.requires_grad]
    torch.autograd.backward(out, [torch.empty_like(each) for each in out])


NORMS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "rms_norm": lambda x, w: run(kernels.rms_norm, x, w),
    "add_rms_norm": lambda x, w: run(kernels.add_rms_norm, x, torch.empty_like(x, requires_grad=True), w),
    "layer_norm": lambda x, w: run(kernels.layer_norm, x, w, torch.empty_like(w)),
    "layer_norm_gelu": lambda x, w: run(kernels.layer_norm_gelu, x, w, torch.empty_like(w)),
    "layer_norm_gelu_exact": lambda x, w: run(kernels.layer_norm_gelu, x, w, torch.empty_like(w), approximate="none"),
}


def norms(ops: str, columns: int, dtype: torch.dtype = BF16) -> dict[str, Case]:
    shape = f"{columns} {str(dtype).removeprefix('torch.')}"
    return {
        f"{op} {shape}": lambda op=op: NORMS[op](empty(TOKENS, columns, dtype=dtype), empty(columns, dtype=dtype))
        for op in ops.split()
    }


def rope(width: int) -> None:
    q, k = (empty(2, 4096, heads, width).transpose(1, 2) for heads in (32, 8))
    angles = [torch.empty(1, 1, 4096, width // 2, dtype=BF16, device="meta") for _ in range(2)]
    with torch.no_grad():
        kernels.rope(q, k, *angles, in_place=True, backend="triton")
    run(kernels.rope, q, k, *angles)


def cross_entropy(**options: Any) -> None:
    run(kernels.cross_entropy, empty(8192, 128256), empty(8192, dtype=torch.int64), **options)


def cross_entropy_of_shards() -> None:
    logits, labels, factor = empty(8192, 32064), empty(8192, dtype=torch.int64), empty(8192, dtype=FP32)
    with torch.no_grad():
        whole = statistics(logits, labels, 32064, backend="triton")
        gradient(logits, labels, whole, factor, 32064, 128256, (0.1, 1e-4, 30.0), in_place=True, backend="triton")


def attention(width: int, dtype: torch.dtype = BF16, group: int = 4) -> None:
    q, k, v = (empty(2, heads, 4096, width, dtype=dtype) for heads in (4 * group, 4, 4))
    run(kernels.flash_attention, q, k, v)


def attention_of_projections() -> None:
    """As in a model: heads beside each other in one projection, and a window."""
    q, k, v = empty(2, 4096, 3, 16, 64).permute(2, 0, 3, 1, 4)
    out, _ = kernels.flash_attention(q, k, v, window=1024, backend="triton")
    out.transpose(1, 2).reshape(2, 4096, -1).backward(empty(2, 4096, 1024))


def adamw(grad: torch.dtype, parameter: torch.dtype | None) -> None:
    with torch.no_grad():
        state = [empty(1 << 20, dtype=dtype) for dtype in (FP32, FP32, FP32, grad)]
        written = None if parameter is None else empty(1 << 20, dtype=parameter)
        kernels.adamw_step(*state, empty(dtype=FP32), lr=1e-3, parameter=written, backend="triton")


def flat(dtype: torch.dtype) -> None:
    piece = empty(1 << 20, dtype=dtype).detach()
    kernels.grad_norm([piece], backend="triton")
    kernels.cast_and_pack([piece], empty(1 << 21).detach(), scale=0.5, backend="triton")


def quantize(dtype: torch.dtype, of: torch.dtype = BF16) -> None:
    q, scales = kernels.quantize_blockwise(empty(1 << 20, dtype=of).detach(), dtype=dtype, backend="triton")
    kernels.dequantize_blockwise(q, scales, dtype=of, backend="triton")


def limits(arch: int) -> dict[str, Case]:
    """Every kernel, at the sizes that come closest to the limits, and what must be found wanting."""
    planted = {
        "planted atomic": lambda: planted_atomic[(64,)](empty(1024), empty(1, dtype=FP32), BLOCK=1024),
        "planted spill": lambda: planted_spill[(64,)](
            empty(1 << 16), empty(1 << 16), 1 << 16, BLOCK=16384, num_warps=1
        ),
        "planted narrow": lambda: planted_narrow[(64,)](empty(1 << 16), empty(1 << 16), 1 << 16, 1 << 16, BLOCK=1024),
    }
    found = {
        **norms("layer_norm_gelu", norm.WIDEST_BACKWARD),
        **norms("layer_norm_gelu_exact", norm.WIDEST_FORWARD),
        **norms("add_rms_norm", 65536),
        "swiglu": lambda: run(kernels.swiglu, empty(8192, 14336), empty(8192, 14336)),
        "bias_gelu": lambda: run(kernels.bias_gelu, empty(8192, 3072), empty(3072)),
        "rope 128": lambda: rope(128),
        "cross_entropy": lambda: cross_entropy(label_smoothing=0.1, z_loss=1e-4, softcap=30.0, in_place=True),
        "cross_entropy of shards": cross_entropy_of_shards,
        "attention 64": lambda: attention(64),
        "attention 128": lambda: attention(128),
        "attention 256": lambda: attention(256),
        "adamw": lambda: adamw(BF16, BF16),
        "flat": lambda: flat(BF16),
        "quantize int8": lambda: quantize(torch.int8),
    }
    return found | planted


def usual(arch: int) -> dict[str, Case]:
    """The limits, and for one architecture what is used most besides."""
    if arch != 90:
        return limits(arch)
    return limits(arch) | {
        **norms("add_rms_norm layer_norm_gelu", 768),
        **norms("add_rms_norm", norm.WIDEST_BACKWARD),
        **norms("add_rms_norm", norm.WIDEST_FORWARD),
        **norms("layer_norm_gelu", 65536),
        "geglu": lambda: run(kernels.geglu, *empty(8192, 2 * 14336).chunk(2, dim=1)),
        "attention 64 fp32": lambda: attention(64, FP32),
        "quantize fp8": lambda: quantize(torch.float8_e4m3fn),
    }


def every(arch: int) -> dict[str, Case]:
    """All flags, dtypes and sizes that make a difference."""
    found = usual(90) if arch >= 89 else limits(arch)  # conversions to fp8 came with 8.9
    for columns in (768, 2048, 4096, 8192, 16384, 65536):
        found |= norms(" ".join(NORMS), columns)
        found |= norms("add_rms_norm layer_norm_gelu", columns, FP32)
    for width in (16, 32, 80):
        found[f"attention {width}"] = lambda width=width: attention(width)
    for width in (64, 128, 256):
        found[f"attention {width} fp32"] = lambda width=width: attention(width, FP32)
    return found | {
        "swiglu fp32": lambda: run(kernels.swiglu, empty(8192, 4096, dtype=FP32), empty(8192, 4096, dtype=FP32)),
        "geglu exact": lambda: run(kernels.geglu, empty(8192, 14336), empty(8192, 14336), approximate="none"),
        "bias_gelu exact": lambda: run(kernels.bias_gelu, empty(8192, 3072), empty(3072), approximate="none"),
        "rope 64": lambda: rope(64),
        "cross_entropy plain": cross_entropy,
        "attention 64 fp16": lambda: attention(64, torch.float16),
        "attention 64 ungrouped": lambda: attention(64, group=1),
        "attention of projections": attention_of_projections,
        "adamw fp32": lambda: adamw(FP32, None),
        "flat fp32": lambda: flat(FP32),
        "quantize int8 fp32": lambda: quantize(torch.int8, FP32),
    }


# ---- planted defects: each must be found ----


@triton.jit
def planted_atomic(x_ptr, sum_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.atomic_add(sum_ptr, tl.sum(x, axis=0))


@triton.jit
def planted_spill(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """A row of 16384 in the registers of one warp: 512 numbers a thread, which has 255 registers."""
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, x / tl.sum(x * x, axis=0), mask=offset < size)


@triton.jit
def planted_narrow(x_ptr, y_ptr, size, stride, BLOCK: tl.constexpr):
    """Neighbouring lanes read far apart."""
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset * stride, mask=offset < size, other=0.0)
    tl.store(y_ptr + offset, x, mask=offset < size)


# ---- launches that are not made ----


@dataclass
class Launch:
    case: str
    arch: int
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rsplit('.', 1)[-1]}.{self.kernel.__name__}"

    @property
    def compiled_from(self) -> tuple[Any, ...]:
        """What Triton looks at; the same for two launches that are compiled once."""

        def special(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.dtype, value.data_ptr() % 16 == 0
            if type(value) is int:
                return value == 1, value % 16 == 0, abs(value) >> 31 > 0
            return value if value is None else type(value)

        return (self.arch, self.name, *map(special, self.args), *sorted(self.kwargs.items()))


def modules() -> dict[str, Any]:
    """The files of minizero.kernels. (As attributes of the package, functions of the same names hide some.)"""
    return {name.rsplit(".", 1)[1]: each for name, each in sys.modules.items() if name.startswith("minizero.kernels.")}


def launches_on(arch: int, cases: dict[str, Case]) -> list[Launch]:
    """What the cases would launch on a GPU of this architecture, each once."""
    launches: dict[tuple[Any, ...], Launch] = {}
    case, launch = "", JITFunction.__getitem__

    def write_down(kernel: Any, grid: Any) -> Callable[..., None]:
        def not_launched(*args: Any, **kwargs: Any) -> None:
            found = Launch(case, arch, kernel, args, kwargs)
            launches.setdefault(found.compiled_from, found)

        return not_launched

    for module in modules().values():
        module.use_triton = lambda backend, op, *tensors: True
        module.num_programs = lambda device: 2 * MULTIPROCESSORS
    torch.cuda.get_device_capability = lambda device=None: divmod(arch, 10)
    JITFunction.__getitem__ = write_down
    for case, go in cases.items():  # noqa: B007 - write_down reads it
        go()
    JITFunction.__getitem__ = launch
    return list(launches.values())


# ---- compiling and reading ----


class Nowhere:
    """Stands for the driver of a GPU: all that compiling asks of it is the architecture."""

    arch = 0

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def functions_of(kernel: Any) -> list[Any]:
    """The kernel and the jitted functions that it calls."""
    names = kernel.fn.__code__.co_names
    called = [each for name in names if isinstance(each := kernel.fn.__globals__.get(name), JITFunction)]
    return [kernel, *(each for inner in called for each in functions_of(inner))]


def all_kernels() -> list[str]:
    """Names of all jitted functions of minizero that no other one calls."""
    jitted = {each for module in modules().values() for each in vars(module).values() if isinstance(each, JITFunction)}
    called = {each for kernel in jitted for each in functions_of(kernel)[1:]}
    return sorted(Launch("", 0, each, (), {}).name for each in jitted - called)


def compiled(launch: Launch, disassemble: bool) -> dict[str, Any]:
    """A launch, compiled, and what it became. Disassembling takes as long as compiling; PTX tells nearly as much."""
    driver.active.arch = launch.arch
    made = launch.kernel.warmup(*launch.args, grid=(1,), **launch.kwargs)
    ptx = made.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", *["--dump-sass"] * disassemble, file.name]
        read = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", read)
    assert usage is not None, read[:2000]

    def count(pattern: str, text: str = ptx) -> int:
        return len(re.findall(pattern, text))

    record = {
        "case": launch.case,
        "kernel": launch.name,
        "arch": launch.arch,
        "options": launch.kwargs,
        "bits": 8 * launch.args[0].element_size(),
        "dots": any("dot" in each.fn.__code__.co_names for each in functions_of(launch.kernel)),
        "threads": 32 * made.metadata.num_warps,
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "shared": made.metadata.shared,
        "tensor_memory": getattr(made.metadata, "tmem_size", 0) or 0,
        "wide_loads": count(r"\bld\.global[\w.:]*\.v(?:4\.b32|2\.b64|8\.b32|4\.b64)\b")
        + count(r"\bcp\.async\.cg\.shared\.global .*, 0x10,"),
        "narrow_loads": count(r"\bld\.global[\w.:]*\.b(?:8|16)\b"),
        "narrow_stores": count(r"\bst\.global[\w.:]*\.b(?:8|16)\b"),
        "mma": count(r"\bmma\.sync"),
        "wgmma": count(r"\bwgmma\.mma_async"),
        "tcgen05": count(r"\btcgen05\.mma"),
        "atomics": count(r"\b(?:atom|red)\."),
    }
    if disassemble:
        record["local"] = count(r"\b(?:STL|LDL)\b", read)
        record["LDG.128"] = count(r"\bLDG[\w.]*\.(?:128|256)\b", read)  # LDGSTS as well: straight into shared memory
    return record


WORK: list[Launch] = []  # for the processes that are forked off: kernels cannot be sent


def compile_one(index: int, disassemble: bool) -> dict[str, Any]:
    return compiled(WORK[index], disassemble)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", default="80,90,100")
    parser.add_argument("--all", action="store_true", help="every size, and machine code read besides PTX")
    options = parser.parse_args()
    driver.set_active(Nowhere())
    for arch in map(int, options.arch.split(",")):
        WORK.extend(launches_on(arch, (every if options.all else usual)(arch)))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
            records = pool.starmap(compile_one, [(index, options.all) for index in range(len(WORK))], chunksize=1)
    options.out.write_text(json.dumps({"kernels": all_kernels(), "records": records}, indent=1))


if __name__ == "__main__":
    main()
