"""Dropout whose mask is the same in every layout.

A generator hands out numbers in the order of the calls, so a mask drawn from one depends on which rank draws it and
what was drawn before. Here each element's fate is a **hash** of what the element is: (seed, step, module, sample, its
place along each dim of the whole tensor). Whoever holds the element, whenever it is computed, decides alike: ranks that
hold copies agree, ranks that hold parts complete one another, a recomputed block repeats itself. And no mask is kept
for backward: it is hashed again.

A sample is told by what the model is given for it, its tokens most often: equal samples of one step share a mask.

The hash is the 32-bit finalizer "lowbias32" (C. Wellons, "Prospecting for Hash Functions", 2018), applied once per dim.

Shape suffixes: B batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from minizero.utils.forward import Forward, running

GOLDEN = 0x9E3779B9  # spreads consecutive counters over 32 bits
Index = Callable[[int, torch.device], Tensor]
"""(length here, device) -> int64 [length]: the places along one dim of the whole tensor that this rank holds."""


class Dropout(nn.Module):
    """Zeroes elements with probability p, and divides the others by 1 - p, in training.

    Args:
        p: probability. dims: what each dim of the input is; the first is always the samples.

    Attributes:
        number: tells this module from others; set from its name by `number_dropouts`.
        index_of: how a dim is cut over tensor-parallel ranks, where it is; see `Index`.

    Outside an engine samples get random keys from torch's default generator: an ordinary dropout.
    """

    def __init__(self, p: float, dims: tuple[str, ...] = ("sample", "sequence", "feature")) -> None:
        super().__init__()
        self.p, self.dims = p, dims
        self.number = 0
        self.index_of: dict[str, Index] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        if x.dim() != len(self.dims):
            raise ValueError(f"Dropout{self.dims} got a tensor of shape {tuple(x.shape)}")
        forward = running()
        keys = self._sample_keys(forward, x)
        for dim, name in enumerate(self.dims[1:-1], start=1):
            keys = extend(keys, self._places(forward, name, x.shape[dim], x.device))
        return _Dropout.apply(x, keys, self._places(forward, self.dims[-1], x.shape[-1], x.device), self.p)

    def _sample_keys(self, forward: Forward | None, x: Tensor) -> Tensor:
        """int32 [B], of this module at this step."""
        if forward is None or not forward.inputs:
            return torch.randint(-(1 << 31), 1 << 31, (x.shape[0],), device=x.device, dtype=torch.int32)
        if forward.sample_keys_B is None:
            forward.sample_keys_B = hash_samples(forward.inputs)
        if len(forward.sample_keys_B) != x.shape[0]:
            raise ValueError(
                f"Dropout: the first dim of its input has length {x.shape[0]}, but the model was given "
                f"{len(forward.sample_keys_B)} samples"
            )
        where = zlib.crc32(f"{forward.seed}/{forward.step}/{self.number}".encode())
        return mix(forward.sample_keys_B.to(x.device) ^ signed(where))

    def _places(self, forward: Forward | None, name: str, length: int, device: torch.device) -> Tensor:
        """int64 [length]: places along dim `name` of the whole tensor."""
        if name in self.index_of:
            places = self.index_of[name](length, device)
        else:
            places = torch.arange(length, device=device)
        if name == "sequence" and forward is not None and forward.positions_L is not None:
            return forward.positions_L.to(device)[places]
        return places


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, places: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(keys, places)
        ctx.p = p
        return x.masked_fill(dropped(keys, places, p), 0.0).div_(1.0 - p)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        keys, places = ctx.saved_tensors
        return grads[0].masked_fill(dropped(keys, places, ctx.p), 0.0).div_(1.0 - ctx.p), None, None, None


def number_dropouts(model: nn.Module) -> None:
    """Give each `Dropout` of `model` a number that depends on its name alone."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.number = zlib.crc32(name.encode())


def hash_samples(inputs: tuple[Tensor, ...]) -> Tensor:
    """int32 [B]: a key per sample, from every bit of its part of each of the `inputs`."""
    keys = hash_rows(inputs[0])
    for tensor in inputs[1:]:
        keys = mix(keys ^ hash_rows(tensor).to(keys.device))
    return keys


def hash_rows(inputs_B: Tensor) -> Tensor:
    """int32 [B], from every bit of each row."""
    flat = inputs_B.detach().reshape(len(inputs_B), -1)
    if flat.is_floating_point():
        flat = flat.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.itemsize])
    flat = flat.long()
    folded = mix((flat ^ (flat >> 32)).to(torch.int32) ^ counter(torch.arange(flat.shape[1], device=flat.device)))
    return mix((folded.long().sum(dim=1) & 0xFFFFFFFF).to(torch.int32))


def dropped(keys: Tensor, places: Tensor, p: float) -> Tensor:
    """bool, keys' shape + (len(places),): the elements that are zeroed."""
    return extend(keys, places) < signed(min(int(p * (1 << 32)), (1 << 32) - 1) ^ (1 << 31))


def extend(keys: Tensor, places: Tensor) -> Tensor:
    """Keys of one more dim: int32 (..., len(places))."""
    return mix(keys.unsqueeze(-1) ^ counter(places))


def counter(places: Tensor) -> Tensor:
    """int32, one well-spread number per place."""
    return ((places * GOLDEN + 1) & 0xFFFFFFFF).to(torch.int32)


def mix(x: Tensor) -> Tensor:
    """lowbias32 of each element (int32, in wrapping arithmetic)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x.mul_(signed(0x21F0AAAD))
    x ^= (x >> 15) & 0x1FFFF
    x *= signed(0xD35A2D97)
    x ^= (x >> 15) & 0x1FFFF
    return x


def signed(word: int) -> int:
    """The int32 with the bits of `word`."""
    return word - (1 << 32) if word >= 1 << 31 else word
