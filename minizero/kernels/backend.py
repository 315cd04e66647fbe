"""Where an op runs: as a Triton kernel, or as the torch code that it is proven against.

Every op takes `backend`: "triton" or "torch" for one of them, "auto" for Triton wherever it can run (NVIDIA GPUs of
compute capability 8.0 and newer; fp32, bf16, fp16), and torch elsewhere. What the machine can do is found out once;
what a call's tensors allow is looked at in every call: "auto" never gives a wrong number, "triton" says why it cannot.

With TRITON_INTERPRET=1 in the environment, before minizero is imported, kernels run on the CPU, slowly, in Triton's
interpreter, where "triton" is asked for: that is how the tests run them. (Set to 0, kernels are compiled as usual,
also with a torch without CUDA.)
"""

import importlib
import os
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

Backend = Literal["auto", "triton", "torch"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability: the first with bf16 and asynchronous copies
OLDEST_TRITON = (3, 6)


class _Nothing:
    """Stands for Triton where it is not installed: kernels can be defined, and are never called."""

    def jit(self, function: Any) -> Any:
        return function

    def __getattr__(self, name: str) -> Any:
        return _Nothing()


# Products and sums are fused into one instruction unless the user says otherwise: Triton's default until 3.10.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
triton: Any = _Nothing()
tl: Any = _Nothing()
TROUBLE = ""
if torch.version.cuda is None and "TRITON_INTERPRET" not in os.environ:  # importing it takes a second
    TROUBLE = "this torch is built without CUDA"
else:
    try:
        triton = importlib.import_module("triton")
        tl = importlib.import_module("triton.language")
        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
            TROUBLE = f"Triton {triton.__version__} is older than 3.6"
    except ImportError as error:
        TROUBLE = f"Triton is not installed ({error})"

INTERPRETED = not TROUBLE and bool(triton.knobs.runtime.interpret)
# numpy has no bf16 and no fp8, so Triton's interpreter computes with their bits, and what comes out is garbage.
# tests/interpreter.py puts that right, and says so here; without it such tensors are refused.
CURED = False
FOREIGN = (torch.bfloat16, torch.float8_e4m3fn)


@cache
def obstacle(device: torch.device) -> str:
    """Why Triton kernels cannot run on tensors of `device`; "" where they can."""
    if TROUBLE:
        return TROUBLE
    if INTERPRETED:
        return ""
    if device.type != "cuda":
        return f"tensors are on {device}, and Triton's kernels run on NVIDIA GPUs (or on TRITON_INTERPRET=1)"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"{torch.cuda.get_device_name(device)} has compute capability {capability}; the oldest is {OLDEST}"
    return ""


def garbled(*dtypes: torch.dtype) -> str:
    """Why the interpreter cannot compute in one of `dtypes`; "" where it can, or where there is none."""
    found = [dtype for dtype in dtypes if dtype in FOREIGN] if INTERPRETED and not CURED else []
    return f"Triton's interpreter computes garbage in {found[0]}" if found else ""


def use_triton(backend: Backend, op: str, *tensors: Tensor | None) -> bool:
    """Whether `op` runs as a Triton kernel on these tensors.

    Kernels are launched on the current device, so tensors of another one are for torch (`torch.cuda.set_device`).
    Raises ValueError when "triton" is asked for and cannot run them, naming what stands in the way.
    """
    if backend == "torch":
        return False
    if backend not in ("auto", "triton"):
        raise ValueError(f"{op}: backend {backend!r} does not exist; legal: auto, triton, torch")
    there = [tensor for tensor in tensors if tensor is not None]
    if backend == "auto" and (INTERPRETED or there[0].device.type != "cuda"):
        return False  # nobody wants the interpreter unasked
    device = there[0].device
    reason = obstacle(device) or garbled(*(tensor.dtype for tensor in there))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        reason = reason or f"tensors are on {device}, and the current device is cuda:{torch.cuda.current_device()}"
    for tensor in there:
        if tensor.device != device:
            reason = reason or f"tensors are on {device} and {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            reason = reason or f"a tensor is {tensor.dtype}; Triton's kernels take {names}"
    if reason and backend == "triton":
        raise ValueError(f"{op}: {reason}; backend auto or torch runs it in torch")
    return not reason


def one_dtype(backend: Backend, op: str, *tensors: Tensor) -> bool:
    """Whether all have one dtype, as the kernel of `op` wants. Raises ValueError where not, and "triton" is asked."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 and backend == "triton":
        raise ValueError(f"{op}: tensors are {', '.join(sorted(map(str, dtypes)))}; legal: one dtype, or backend torch")
    return len(dtypes) == 1


@cache
def num_programs(device: torch.device) -> int:
    """How many programs keep `device` busy where each loops over many rows: two for every multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def chosen(backend: Backend, device: torch.device) -> Backend:
    """What "auto" comes to on `device`: "triton" or "torch"."""
    if backend != "auto":
        return backend
    return "torch" if device.type != "cuda" or INTERPRETED or obstacle(device) else "triton"


class UsesKernels:
    """A layer that has the choice, and makes it as `kernels` says."""

    kernels: Backend = "auto"


def use_in(model: nn.Module, backend: Backend) -> None:
    """Tell every layer of `model` that has the choice which implementation to take."""
    for module in model.modules():
        if isinstance(module, UsesKernels):
            module.kernels = backend


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32 if it is a 16-bit tensor, else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def last_dim_contiguous(x: Tensor) -> Tensor:
    """`x`, or a copy of it where neighbours in the last dim are apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """`x` [.., N] as [M, N], N contiguous; a copy only where no view can say that. Rows may overlap (stride 0)."""
    return last_dim_contiguous(x.reshape(-1, x.shape[-1]))


def overlaps(x: Tensor) -> bool:
    """Whether elements of `x` may share memory, as those of an expanded tensor do: then nothing can be in place."""
    reach = 1  # of the dims so far, from the first element to one past the last
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < reach and x.numel():
            return True
        reach += stride * (size - 1)
    return False


def same_shape(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all have one shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"{op}: " + ", ".join(f"{name} is {shape}" for name, shape in shapes.items()) + "; legal: one shape"
        )
