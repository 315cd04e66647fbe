"""Every op once, on a small input, against float64 in torch: what `minizero doctor` shows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minizero import kernels
from minizero.kernels.backend import INTERPRETED, Backend, chosen, obstacle

TOLERANCE = 1e-5
"""Relative error, of norms, that fp32 results may have; what is rounded to 8 bits may be off by a step in places."""

Example = Callable[[Callable[..., Tensor], Backend], Any]


@dataclass(frozen=True)
class Outcome:
    """Of one op. runs: what computed it. error: relative, against float64. agrees: it is within the tolerance."""

    runs: str
    error: float
    agrees: bool


def tensors(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A source of the same random numbers, whatever the device and dtype: call it with a shape."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()


def adamw(x: Callable[..., Tensor], backend: Backend) -> tuple[Tensor, ...]:
    """The state after one step."""
    master, m, grad = (x(3000).detach() for _ in range(3))
    v, step = m.square(), torch.zeros((), device=master.device)
    kernels.adamw_step(master, m, v, grad, step, lr=1e-2, weight_decay=0.1, backend=backend)
    return master, m, v


def there_and_back(x: Callable[..., Tensor], backend: Backend) -> Tensor:
    """Quantized and dequantized."""
    value = x(7, 333).detach()
    q, scales = kernels.quantize_blockwise(value, backend=backend)
    return kernels.dequantize_blockwise(q, scales, backend=backend)


def turned(x: Callable[..., Tensor], backend: Backend) -> tuple[Tensor, ...]:
    """Queries and keys at some angles."""
    angle = x(1, 1, 9, 20).detach()
    return kernels.rope(x(2, 3, 9, 40), x(2, 1, 9, 40), angle.cos(), angle.sin(), backend=backend)


def labels(like: Tensor, vocabulary: int) -> Tensor:
    """One label for each row, the first to be ignored."""
    found = torch.arange(len(like), device=like.device) * 37 % vocabulary
    return found.masked_fill(found == 0, -100)


def loss(x: Callable[..., Tensor], backend: Backend) -> Tensor:
    """With everything that the loss can have."""
    logits = x(9, 777)
    more = dict(label_smoothing=0.1, z_loss=1e-3, softcap=20.0)
    return kernels.cross_entropy(logits, labels(logits, 777), backend=backend, **more)  # type: ignore[arg-type]


def head_and_loss(x: Callable[..., Tensor], backend: Backend) -> Tensor:
    """In two chunks of tokens."""
    hidden, weight = x(9, 32), x(777, 32)
    return kernels.linear_cross_entropy(hidden, weight, labels(hidden, 777), workspace=5 * 777 * 4, backend=backend)


EXAMPLES: dict[str, Example] = {
    "rms_norm": lambda x, b: kernels.rms_norm(x(7, 100), x(100), backend=b),
    "layer_norm": lambda x, b: kernels.layer_norm(x(7, 100), x(100), x(100), backend=b),
    "add_rms_norm": lambda x, b: kernels.add_rms_norm(x(7, 100), x(7, 100), x(100), backend=b),
    "layer_norm_gelu": lambda x, b: kernels.layer_norm_gelu(x(7, 100), x(100), x(100), backend=b),
    "swiglu": lambda x, b: kernels.swiglu(x(7, 333), x(7, 333), backend=b),
    "geglu": lambda x, b: kernels.geglu(x(7, 333), x(7, 333), backend=b),
    "bias_gelu": lambda x, b: kernels.bias_gelu(x(7, 333), x(333), backend=b),
    "rope": turned,
    "cross_entropy": loss,
    "linear_cross_entropy": head_and_loss,
    "flash_attention": lambda x, b: kernels.flash_attention(
        x(2, 4, 77, 40), x(2, 2, 77, 40), x(2, 2, 77, 40), window=50, backend=b
    ),
    "adamw_step": adamw,
    "grad_norm": lambda x, b: kernels.grad_norm([x(3000).detach(), x(10).detach()], backend=b)[0],
    "cast_and_pack": lambda x, b: kernels.cast_and_pack(
        [x(30).detach(), x(5, 7).detach()], x(70).detach(), scale=0.5, backend=b
    ),
    "quantize_blockwise": there_and_back,
}


def check_all(device: torch.device) -> dict[str, Outcome]:
    """Outcomes by op. Raises what a kernel raises."""
    backend = "triton" if INTERPRETED and not obstacle(device) else chosen("auto", device)
    runs = backend if backend == "torch" or not INTERPRETED else "triton (interpreted)"
    found = {}
    for name, example in EXAMPLES.items():
        ours = results(example, device, torch.float32, backend)
        exact = results(example, device, torch.float64, "torch")
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]
        tolerance = 1e-3 if name == "quantize_blockwise" else TOLERANCE
        found[name] = Outcome(runs, max(errors), max(errors) < tolerance)
    return found


def results(example: Example, device: torch.device, dtype: torch.dtype, backend: Backend) -> list[Tensor]:
    """What an example computes, and its gradients where it has some."""
    made: list[Tensor] = []
    source = tensors(device, dtype)

    def keep(*shape: int) -> Tensor:
        made.append(source(*shape))
        return made[-1]

    found = example(keep, backend)
    outputs = list(found) if isinstance(found, tuple) else [found]
    roots = [y for y in outputs if y.requires_grad]
    if not roots:
        return outputs
    inputs = [x for x in made if x.requires_grad]
    gradients = torch.autograd.grad(roots, inputs, [torch.ones_like(y) for y in roots], allow_unused=True)
    return [y.detach() for y in outputs] + [g for g in gradients if g is not None]
