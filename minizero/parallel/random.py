"""Random numbers of dropout that is not ours, where a model is cut over tensor-parallel ranks.

Such dropout draws from torch's default generator. Ranks must agree on the mask of a tensor that all of them hold, and
must not on those of their parts. So a forward draws from two streams (Megatron-LM's "CUDA RNG tracker"): **whole**, the
same on all tensor-parallel ranks, and **part**, different on each; layers switch where a region begins and ends.

`whole` is seeded anew for each forward from (seed, step, number of the forward in the step, data rank), and `part` each
time it is switched to, from where `whole` then is and the rank. A bit of the seed says which of them the generator is.
So there is nothing to save: a resumed run draws what the uninterrupted one would have drawn, and who gives back torch's
generator, as every checkpoint does, gives back both. Outside the model the default generator is the caller's.

These masks repeat exactly when a block is computed again. They are not the same in every layout: for that, use
`minizero.models.dropout.Dropout`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minizero.utils.forward import running

Name = Literal["whole", "part"]
State = Tensor | None
PART = 1 << 32  # the bit of a seed that makes it a part's


class RandomStreams:
    """Two streams behind torch's default generator of `device`.

    Args:
        seed: of the run. data_rank: tells apart ranks that see other tokens. tensor_rank: those with other parts.
    """

    def __init__(self, seed: int, data_rank: int, tensor_rank: int, device: torch.device) -> None:
        self.seed, self.data_rank, self.tensor_rank, self.device = seed, data_rank, tensor_rank, device
        self._forward = (-1, 0)  # step, and number in it, of the last one
        self._whole: Tensor | None = None  # the state of `whole` when `part` was switched to
        self._callers: Tensor | None = None

    def begin(self, step: int) -> None:
        """A forward of `step` begins: draw from `whole`."""
        self._callers, self._whole = self._get(), None
        self._forward = step, self._forward[1] + 1 if self._forward[0] == step else 0
        self._seed(zlib.crc32(f"{self.seed}/{self._forward}/{self.data_rank}".encode()))

    def end(self) -> None:
        """The forward is over: the default generator is the caller's again."""
        if self._callers is not None:
            self._set(self._callers)
            self._callers = self._whole = None

    def use(self, name: Name) -> None:
        """Draw from `name` from now on."""
        if name == "part" and not self._draws_from_part():
            now = zlib.crc32(self._get().numpy().tobytes())
            torch.rand(1, device=self.device)  # the next time `whole` is elsewhere
            self._whole = self._get()
            self._seed(zlib.crc32(f"{now}/{self.tensor_rank}".encode()) | PART)
        elif name == "whole" and self._draws_from_part() and self._whole is not None:
            self._set(self._whole)
            self._whole = None

    def _draws_from_part(self) -> bool:
        seed = torch.cuda.initial_seed() if self.device.type == "cuda" else torch.initial_seed()
        return bool(seed & PART)

    def state(self) -> State:
        """What `restored` needs; the active stream's own state is the default generator's."""
        return self._whole

    @contextmanager
    def restored(self, state: State) -> Iterator[None]:
        """Inside, the streams are as `state` says; the caller restores the default generator."""
        before, self._whole = self._whole, state
        try:
            yield
        finally:
            self._whole = before

    def _seed(self, seed: int) -> None:
        self._set(torch.Generator(self.device).manual_seed(seed).get_state())

    def _get(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def _set(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)


def draw_from(name: Name) -> None:
    """Draw from stream `name` from now on, if the running forward has streams."""
    forward = running()
    if forward is not None and forward.streams is not None:
        forward.streams.use(name)


def foreign_dropout(model: nn.Module) -> str:
    """Name of a module with dropout that is not ours; empty: there is none."""
    for name, module in model.named_modules():
        inner: Any = getattr(module, "attention_dropout", 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            inner = module.p
        if isinstance(inner, float) and inner > 0:
            return name or type(module).__name__
    return ""
