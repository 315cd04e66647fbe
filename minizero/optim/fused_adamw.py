"""AdamW over whole stretches of flat buffers, by `minizero.kernels.adamw_step`.

To whoever looks at it, it is torch's AdamW: param groups, and a state of `step`, `exp_avg` and `exp_avg_sq` for every
slice of a parameter. The moments of slices that lie behind each other are views of one buffer, so one launch updates
all of them, scales their gradients and writes the 16-bit parameters on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minizero.kernels import Backend, adamw_step

OPTIONS = ("lr", "betas", "eps", "weight_decay")
"""What `adamw_step` can do; an AdamW with other arguments stays torch's."""


class FusedAdamW(torch.optim.AdamW):
    """See the module; `step_over` takes the place of `step`. Arguments are those of torch's, as far as `OPTIONS`."""

    def __init__(self, params: Any, kernels: Backend = "auto", **options: Any) -> None:
        super().__init__(params, **options)
        self.kernels = kernels
        # (exp_avg, exp_avg_sq, step) of a whole stretch, by the first of its slices.
        self._stretches: dict[nn.Parameter, tuple[Tensor, Tensor, Tensor]] = {}

    def step_over(
        self,
        pieces: Sequence[nn.Parameter],
        options: dict[str, Any],
        master: Tensor,
        grad: Tensor,
        scale: Tensor,
        narrow: Tensor | None,
    ) -> None:
        """One update of `pieces`, which lie behind each other in `master`.

        Args:
            options: the param group of all of them. master: [n] fp32. grad: [n]. scale: of the gradient, 0-d.
            narrow: [n], takes the rounded master, or None.
        """
        m, v, step = self._state_of(pieces, master)
        chosen = {name: options[name] for name in OPTIONS}
        adamw_step(master, m, v, grad, step, scale=scale, parameter=narrow, backend=self.kernels, **chosen)

    def _state_of(self, pieces: Sequence[nn.Parameter], master: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(exp_avg, exp_avg_sq, step) of the whole stretch; made, or laid behind each other, where they are not yet."""
        states: list[dict[str, Any]] = [self.state[piece] for piece in pieces]
        known = self._stretches.get(pieces[0])
        if known is not None and all(state.get("step") is known[2] for state in states):
            return known
        m, v = torch.zeros_like(master), torch.zeros_like(master)
        counts = {float(state["step"]) if "step" in state else 0.0 for state in states}
        assert len(counts) == 1, f"slices of one buffer have made {counts} steps"
        step = torch.tensor(counts.pop(), dtype=torch.float32, device=master.device)
        begin = 0
        for piece, state in zip(pieces, states, strict=True):
            for name, whole in (("exp_avg", m), ("exp_avg_sq", v)):
                view = whole[begin : begin + piece.numel()]
                state[name] = view.copy_(state[name]) if name in state else view
            state["step"] = step
            begin += piece.numel()
        self._stretches[pieces[0]] = m, v, step
        return m, v, step
