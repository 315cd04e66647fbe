"""What the kernels compile to, found out without a GPU: registers, spills, shared memory, instructions.

    TRITON_INTERPRET=0 python tests/compiled.py OUT.json [--arch 80,90,100] [--all]

The public ops run on meta tensors, which have shapes and strides and no memory, and every launch is written down
instead of made: so what is compiled has the tiles, warps, flags and alignments that the code itself chose. Triton then
compiles for a GPU that is not there; what came out is read from the PTX and from the machine code.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@dataclass
class Launch:
    """A launch that was not made: the case that wanted it, the kernel, its arguments, its options."""

    case: str
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rsplit('.', 1)[-1]}.{self.kernel.__name__}"


def modules() -> dict[str, Any]:
    """The files of minizero.kernels. (As attributes of the package, functions of the same names hide some.)"""
    return {name.rsplit(".", 1)[1]: each for name, each in sys.modules.items() if name.startswith("minizero.kernels.")}


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches in here are written down; the case is that of `case` when they come."""
    launches: list[Launch] = []
    before = JITFunction.__getitem__

    def write_down(self: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: launches.append(Launch("", self, args, kwargs))

    JITFunction.__getitem__ = write_down
    for module in modules().values():
        module.use_triton = lambda backend, op, *tensors: True
        module.num_programs = lambda device: 2 * MULTIPROCESSORS
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    try:
        yield launches
    finally:
        JITFunction.__getitem__ = before


class Nowhere:
    """Stands for the driver of a GPU: all that compiling asks of it is the architecture."""

    arch = 90

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


# ---- what is compiled ----


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def run(op: Callable[..., Any], *tensors: Any, **options: Any) -> None:
    """Forward, and backward from every output."""
    out = op(*tensors, backend="triton", **options)
    out = [each for each in (out if isinstance(out, tuple) else (out,)) if each.requires_grad]
    torch.autograd.backward(out, [torch.empty_like(each) for each in out])


ROWS = 16400  # whatever is a multiple of 16 may be taken in wider pieces: a number of tokens usually is
NORMS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "rms_norm": lambda x, w: run(kernels.rms_norm, x, w),
    "add_rms_norm": lambda x, w: run(kernels.add_rms_norm, x, empty(*x.shape, dtype=x.dtype), w),
    "layer_norm": lambda x, w: run(kernels.layer_norm, x, w, empty(*w.shape, dtype=w.dtype)),
    "layer_norm_gelu": lambda x, w: run(kernels.layer_norm_gelu, x, w, empty(*w.shape, dtype=w.dtype)),
    "layer_norm_gelu_exact": lambda x, w: run(
        kernels.layer_norm_gelu, x, w, empty(*w.shape, dtype=w.dtype), approximate="none"
    ),
}


def attention(width: int, dtype: torch.dtype = BF16, group: int = 4) -> None:
    q, k, v = (empty(2, heads, 4096, width, dtype=dtype) for heads in (4 * group, 4, 4))
    run(kernels.flash_attention, q, k, v)


def attention_from_projections() -> None:
    """As a model has it: heads beside each other in one projection, the layout of `out` behind it, no lse used."""
    q, k, v = empty(2, 4096, 3, 16, 64).permute(2, 0, 3, 1, 4)
    out, _ = kernels.flash_attention(q, k, v, backend="triton")
    out.transpose(1, 2).reshape(2, 4096, -1).backward(empty(2, 4096, 1024))


def cross_entropy(**options: Any) -> None:
    run(kernels.cross_entropy, empty(8192, 128256), empty(8192, dtype=torch.int64), **options)


def cross_entropy_of_shards() -> None:
    logits, labels, row = empty(8192, 32064), empty(8192, dtype=torch.int64), empty(8192, dtype=FP32)
    statistics(logits, labels, 32064)
    gradient(logits, labels, row, row, row, 32064, 128256, (0.1, 1e-4, 30.0), in_place=True)


def adamw(grad: torch.dtype, parameter: torch.dtype | None) -> None:
    with torch.no_grad():
        master, m, v = (empty(1 << 20, dtype=FP32) for _ in range(3))
        written = None if parameter is None else empty(1 << 20, dtype=parameter)
        step = empty(dtype=FP32)
        kernels.adamw_step(master, m, v, empty(1 << 20, dtype=grad), step, lr=1e-3, parameter=written, backend="triton")


def flat(dtype: torch.dtype) -> None:
    pieces = [empty(1 << 20, dtype=dtype).detach(), empty(768, dtype=dtype).detach()]
    kernels.grad_norm(pieces, backend="triton")
    kernels.cast_and_pack(pieces, empty(1 << 21).detach(), backend="triton")


def quantize(dtype: torch.dtype, of: torch.dtype = BF16) -> None:
    q, scales = kernels.quantize_blockwise(empty(1 << 20, dtype=of).detach(), dtype=dtype, backend="triton")
    kernels.dequantize_blockwise(q, scales, dtype=of, backend="triton")


def rope(width: int, in_place: bool) -> None:
    q, k = (empty(2, 4096, heads, width).transpose(1, 2) for heads in (32, 8))
    angles = [torch.empty(1, 1, 4096, width // 2, dtype=BF16, device="meta") for _ in range(2)]
    with torch.no_grad():
        kernels.rope(q, k, *angles, in_place=in_place, backend="triton")
    run(kernels.rope, q, k, *angles)


def norms(ops: str, columns: int, dtype: torch.dtype = BF16) -> dict[str, Callable[[], None]]:
    shape = f"{columns} {str(dtype).removeprefix('torch.')}"
    return {
        f"{op} {shape}": lambda op=op: NORMS[op](empty(ROWS, columns, dtype=dtype), empty(columns, dtype=dtype))
        for op in ops.split()
    }


def cases(everything: bool) -> dict[str, Callable[[], None]]:
    """By name, what launches kernels. Of norms and widths of heads `make test` takes the ones at the limits."""
    every = " ".join(NORMS)
    found = {
        **norms("rms_norm layer_norm_gelu", 768),
        **norms("add_rms_norm", 4096),
        **norms(every, norm.WIDEST_BACKWARD),
        **norms("add_rms_norm layer_norm_gelu_exact", norm.WIDEST_FORWARD),
        **norms("add_rms_norm layer_norm_gelu_exact", 65536),
        "swiglu": lambda: run(kernels.swiglu, empty(8192, 14336), empty(8192, 14336)),
        "geglu": lambda: run(kernels.geglu, *empty(8192, 2 * 14336).chunk(2, dim=1)),
        "bias_gelu": lambda: run(kernels.bias_gelu, empty(8192, 3072), empty(3072)),
        "rope 128": lambda: rope(128, in_place=True),
        "cross_entropy": cross_entropy,
        "cross_entropy with all": lambda: cross_entropy(label_smoothing=0.1, z_loss=1e-4, softcap=30.0, in_place=True),
        "cross_entropy of shards": cross_entropy_of_shards,
        "adamw bf16": lambda: adamw(BF16, BF16),
        "flat bf16": lambda: flat(BF16),
        "quantize int8": lambda: quantize(torch.int8),
        "quantize fp8": lambda: quantize(torch.float8_e4m3fn),
        "attention 64": lambda: attention(64),
        "attention 128": lambda: attention(128),
        "attention 256": lambda: attention(256),
        "attention 64 fp32": lambda: attention(64, FP32),
        "planted atomic": lambda: planted_atomic[(64,)](empty(1024, dtype=FP32), empty(1, dtype=FP32), BLOCK=1024),
        "planted spill": lambda: planted_spill[(64,)](
            empty(1 << 16), empty(1 << 16), 1 << 16, BLOCK=16384, num_warps=1
        ),
        "planted narrow": lambda: planted_narrow[(64,)](empty(1 << 16), empty(1 << 16), 1 << 16, 1 << 16, BLOCK=1024),
    }
    if not everything:
        return found
    for columns in (768, 1024, 2048, 4096, 8192, 16384, 65536):
        found |= norms(every, columns)
    for columns in (4096, 8192, 16384, 65536):
        found |= norms(every, columns, FP32)
    return found | {
        "geglu exact": lambda: run(kernels.geglu, empty(8192, 14336), empty(8192, 14336), approximate="none"),
        "swiglu fp32": lambda: run(kernels.swiglu, empty(8192, 4096, dtype=FP32), empty(8192, 4096, dtype=FP32)),
        "bias_gelu exact": lambda: run(kernels.bias_gelu, empty(8192, 3072), empty(3072), approximate="none"),
        "rope 64": lambda: rope(64, in_place=False),
        "adamw fp32": lambda: adamw(FP32, None),
        "flat fp32": lambda: flat(FP32),
        "quantize int8 fp32": lambda: quantize(torch.int8, FP32),
        "attention 32": lambda: attention(32),
        "attention 80": lambda: attention(80),
        "attention 64 fp16": lambda: attention(64, torch.float16),
        "attention 64 one group": lambda: attention(64, group=1),
        "attention of projections": attention_from_projections,
        "attention 128 fp32": lambda: attention(128, FP32),
        "attention 256 fp32": lambda: attention(256, FP32),
    }


# ---- planted defects: each must be found ----


@triton.jit
def planted_atomic(x_ptr, sum_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.atomic_add(sum_ptr, tl.sum(x, axis=0))


@triton.jit
def planted_spill(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """A row of 16384 in the registers of one warp: 512 numbers in 255 registers."""
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, x / tl.sum(x * x, axis=0), mask=offset < size)


@triton.jit
def planted_narrow(x_ptr, y_ptr, size, stride, BLOCK: tl.constexpr):
    """Neighbouring lanes read far apart."""
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset * stride, mask=offset < size, other=0.0)
    tl.store(y_ptr + offset, x, mask=offset < size)


# ---- compiling and reading ----


def compiled(launch: Launch, arch: int) -> dict[str, Any]:
    """One launch, compiled for `arch`, and what it became."""
    driver.active.arch = arch
    made = launch.kernel.warmup(*launch.args, grid=(1,), **launch.kwargs)
    ptx = made.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        read = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", read)
    assert usage is not None, read[:2000]

    def count(pattern: str, text: str) -> int:
        return len(re.findall(pattern, text))

    return {
        "case": launch.case,
        "kernel": launch.name,
        "arch": arch,
        "threads": 32 * made.metadata.num_warps,
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "spills": count(r"\b(?:STL|LDL)\b", read),
        "shared": made.metadata.shared,
        "wide_loads": count(r"\bLDG[\w.]*\.128\b", read),  # LDGSTS is one as well: straight into shared memory
        "loads": count(r"\bLDG", read),
        "wide_stores": count(r"\bSTG[\w.]*\.128\b", read),
        "mma": count(r"\bmma\.sync", ptx),
        "wgmma": count(r"\bwgmma\.mma_async", ptx),
        "tcgen05": count(r"\btcgen05\.mma", ptx),
        "atomics": count(r"\b(?:atom|red)\.", ptx),
        "dots": "tl.dot" in sources(launch.kernel),
        "element_bits": max(each.element_size() * 8 for each in launch.args[:1]),
    }


def sources(kernel: Any) -> str:
    """The text of a kernel and of the functions of minizero that it calls."""
    text = inspect.getsource(kernel.fn)
    inner = [kernel.fn.__globals__.get(name) for name in re.findall(r"\b(\w+)\(", text)]
    return text + "".join(sources(each) for each in inner if isinstance(each, JITFunction) and each is not kernel)


def all_kernels() -> list[str]:
    """Names of all jitted functions that no other one calls."""
    functions = {
        f"{name}.{each.__name__}": each
        for name, module in modules().items()
        for each in vars(module).values()
        if isinstance(each, JITFunction) and each.__module__ == module.__name__
    }
    called = {name for each in functions.values() for name in re.findall(r"\b(\w+)\(", inspect.getsource(each.fn))} - {
        each.__name__ for each in functions.values() if each.__name__ in ("_forward", "_backward")
    }
    return sorted(name for name, each in functions.items() if each.__name__ not in called)


def launches_of(everything: bool) -> list[Launch]:
    found: list[Launch] = []
    with recorded() as launches:
        for name, case in cases(everything).items():
            case()
            for launch in launches:
                launch.case = name
            found += launches
            launches.clear()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", default="80,90,100")
    parser.add_argument("--all", action="store_true", help="every size, not only those at the limits")
    options = parser.parse_args()
    driver.set_active(Nowhere())
    launches = launches_of(options.all)
    work = [(launch, int(arch)) for arch in options.arch.split(",") for launch in launches]
    work = [(launch, arch) for launch, arch in work if "fp8" not in launch.case or arch >= 89]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        WORK.extend(work)
        with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
            records = pool.map(compile_one, range(len(work)), chunksize=1)
    options.out.write_text(json.dumps({"kernels": all_kernels(), "records": records}, indent=1))


WORK: list[tuple[Launch, int]] = []  # for the processes forked off it: kernels cannot be pickled


def compile_one(index: int) -> dict[str, Any]:
    return compiled(*WORK[index])


if __name__ == "__main__":
    main()
