"""AdamW on flat shards (Loshchilov & Hutter, arXiv 1711.05101): every number is read once and written once.

    g = grad · scale                                  unscaling and clipping, in one factor that lies on the device
    m = β1 m + (1 - β1) g          v = β2 v + (1 - β2) g²
    p = p - lr λ p - lr / (1 - β1^t) · m / (sqrt(v / (1 - β2^t)) + ε)
    parameter = round(p)                              what computes, where that is narrower than the master

28 bytes per element with a 16-bit gradient and parameter, where a separate unscale, update and copy move 40. The step
count t is a tensor, so that a captured graph counts too. A step whose `skip` is set changes nothing, t included.

Glossary ([n], one dim): master, m, v (fp32), grad (fp32 or 16 bits), parameter (16 bits or None); t, scale [] (fp32),
skip [] (bool)
"""

import math

import torch
from torch import Tensor

from minizero.kernels.backend import Backend, tl, triton, use_triton

BLOCK = 2048


def adamw_step(
    master: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
    parameter: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """One step, in place, of [n] elements; `step` is counted up first.

    Args:
        master, m, v: fp32. grad: any floating dtype, left as it is. parameter: takes the rounded master.
        step: steps so far, 0-d, fp32 or float64. scale: 0-d, floating, multiplies the gradient. skip: 0-d bool; where
            true, nothing happens. All of them are on the device of `master`.
        lr: a number, or a 0-d tensor, which is read first: on a GPU that waits for it.

    Raises ValueError for shapes, dtypes and devices that do not fit, and for what `backend` "triton" cannot run.
    """
    tensors = {"master": master, "m": m, "v": v, "grad": grad} | ({} if parameter is None else {"parameter": parameter})
    for name, tensor in tensors.items():
        wide = name not in ("master", "m", "v") or tensor.dtype in (torch.float32, torch.float64)
        if tensor.dim() != 1 or tensor.shape != master.shape or not tensor.is_contiguous() or not wide:
            raise ValueError(
                f"adamw_step: {name} is {tuple(tensor.shape)} {tensor.dtype}, stride {tensor.stride()}; legal: "
                f"contiguous, {tuple(master.shape)}, one dim, master and moments in fp32"
            )
    exact = (torch.float32, torch.float64)
    numbers = [("step", step, exact), ("skip", skip, (torch.bool,))]
    numbers.append(("scale", scale, (*exact, torch.bfloat16, torch.float16)))
    for name, number, legal in numbers:
        if number is not None and (number.dim() or number.dtype not in legal or number.device != master.device):
            raise ValueError(
                f"adamw_step: {name} is {tuple(number.shape)} {number.dtype} on {number.device}; legal: no dims, "
                f"{' or '.join(map(str, legal))}, on {master.device}"
            )
    lr = float(lr)
    if not use_triton(backend, "adamw_step", master, m, v, grad, parameter):
        _reference(master, m, v, grad, step, lr, betas, eps, weight_decay, scale, skip, parameter)
        return
    one = torch.ones((), dtype=torch.float32, device=master.device) if scale is None else scale.float()
    go = torch.zeros((), dtype=torch.bool, device=master.device) if skip is None else skip
    step += ~go
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in betas]
    if master.numel():
        _adamw[(triton.cdiv(master.numel(), BLOCK),)](
            master, m, v, grad, master if parameter is None else parameter, step, one, go,
            master.numel(), lr, betas[1], 1.0 - betas[0], 1.0 - betas[1], *logs, eps, weight_decay,
            BLOCK=BLOCK, WRITE=parameter is not None, num_warps=8,
        )  # fmt: skip
    torch.autograd.graph.increment_version([x for x in (master, m, v, parameter) if x is not None])


def _reference(
    master: Tensor, m: Tensor, v: Tensor, grad: Tensor, step: Tensor, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, scale: Tensor | None, skip: Tensor | None, parameter: Tensor | None,
) -> None:  # fmt: skip
    """The same in torch. With `skip`, everything is computed, and not taken over."""
    before = None if skip is None else [x.clone() for x in (master, m, v, step)]
    step += 1
    g = grad.to(master.dtype)
    if scale is not None:
        g = g * scale
    left1, left2 = (1 - beta ** step.double() for beta in betas)
    master.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    denominator = (v / left2.to(v.dtype)).sqrt_().add_(eps)
    master.sub_((lr / left1).to(master.dtype) * m / denominator)
    if before is not None and skip is not None:
        for x, old in zip((master, m, v, step), before, strict=True):
            x.copy_(torch.where(skip, old, x))
    if parameter is not None:
        rounded = master.to(parameter.dtype)
        parameter.copy_(rounded if skip is None else torch.where(skip, parameter, rounded))


@triton.jit
def _adamw(
    master_ptr, m_ptr, v_ptr, grad_ptr, parameter_ptr, step_ptr, scale_ptr, skip_ptr,
    size, lr, beta2, left_by_beta1, left_by_beta2, log_beta1, log_beta2, eps, weight_decay,
    BLOCK: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    if tl.load(skip_ptr) == 0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        t = tl.load(step_ptr).to(tl.float64)  # 1 - β^t cancels: in fp32 it would be off by 1e-4 in the first steps
        left1 = (1.0 - tl.exp(t * log_beta1)).to(tl.float32)
        left2 = (1.0 - tl.exp(t * log_beta2)).to(tl.float32)
        g = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32) * tl.load(scale_ptr)
        p = tl.load(master_ptr + place, mask=inside, other=0.0)
        m = tl.load(m_ptr + place, mask=inside, other=0.0)
        v = tl.load(v_ptr + place, mask=inside, other=0.0)
        m += left_by_beta1 * (g - m)  # 1 - β, subtracted in float64
        v = beta2 * v + left_by_beta2 * g * g
        p -= lr * weight_decay * p
        p -= lr / left1 * m / (tl.sqrt(v / left2) + eps)
        tl.store(master_ptr + place, p, mask=inside)
        tl.store(m_ptr + place, m, mask=inside)
        tl.store(v_ptr + place, v, mask=inside)
        if WRITE:
            tl.store(parameter_ptr + place, p.to(parameter_ptr.dtype.element_ty), mask=inside)
