"""Random numbers of dropout that is not ours, where a model is cut over tensor-parallel ranks.

Such dropout draws from torch's default generator. Ranks must agree on the mask of a tensor that all of them hold, and
must not on those of their parts. So a forward draws from two streams (Megatron-LM's "CUDA RNG tracker"): **whole**, the
same on all tensor-parallel ranks, and **part**, different on each; layers switch where a region begins and ends.

Both are seeded anew for each forward from (seed, number of the forward, rank), so there is nothing to save: a resumed
run draws what the uninterrupted one would have drawn. Outside the model the default generator is the caller's.

These masks repeat exactly when a block is computed again. They are not the same in every layout: for that, use
`minizero.models.dropout.Dropout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minizero.utils.forward import running

Name = Literal["whole", "part"]
State = tuple[Name, dict[Name, Tensor]]


class RandomStreams:
    """Two streams behind torch's default generator of `device`.

    Args:
        seed: of the run. data_rank: tells apart ranks that see other tokens. tensor_rank: those with other parts.
    """

    def __init__(self, seed: int, data_rank: int, tensor_rank: int, device: torch.device) -> None:
        self.seed, self.data_rank, self.tensor_rank, self.device = seed, data_rank, tensor_rank, device
        self.forwards = 0
        self._active: Name = "whole"
        self._waiting: dict[Name, Tensor] = {}  # states of the streams that are not drawn from now
        self._callers: Tensor | None = None

    def begin(self) -> None:
        """A forward begins: seed both streams, draw from `whole`."""
        self._callers = self._get()
        base = (self.seed * 1_000_003 + self.forwards) * 1_000_003 + self.data_rank
        generators = {
            "part": torch.Generator(self.device).manual_seed(hash((base, 1 + self.tensor_rank)) & (1 << 62) - 1),
            "whole": torch.Generator(self.device).manual_seed(hash((base, 0)) & (1 << 62) - 1),
        }
        self.forwards += 1
        self._active = "whole"
        self._waiting = {"part": generators["part"].get_state()}
        self._set(generators["whole"].get_state())

    def end(self) -> None:
        """The forward is over: the default generator is the caller's again."""
        if self._callers is not None:
            self._set(self._callers)
            self._callers = None

    def use(self, name: Name) -> None:
        """Draw from `name` from now on."""
        if name != self._active:
            self._waiting[self._active] = self._get()
            self._set(self._waiting.pop(name))
            self._active = name

    def state(self) -> State:
        """What `restored` needs; the active stream's own state is the default generator's."""
        return self._active, dict(self._waiting)

    @contextmanager
    def restored(self, state: State) -> Iterator[None]:
        """Inside, the streams are as `state` says; the caller restores the default generator."""
        before = self.state()
        self._active, self._waiting = state[0], dict(state[1])
        try:
            yield
        finally:
            self._active, self._waiting = before

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
