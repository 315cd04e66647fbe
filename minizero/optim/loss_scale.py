"""Loss scaling for fp16: multiply the loss so that small gradients stay representable, and divide them afterwards.

Dynamic scaling follows DeepSpeed's rules: the scale doubles after `window` steps without overflow; an overflow first
uses up `hysteresis`, then halves the scale, never below `minimum`. (Micikevicius et al., arXiv 1710.03740, section
3.2)
"""

from __future__ import annotations

from minizero.config.schema import LossScaleConfig


class LossScaler:
    """The scale and its history. `enabled` is False outside fp16: the scale is then 1 and never moves."""

    def __init__(self, config: LossScaleConfig, *, enabled: bool) -> None:
        self.config = config
        self.dynamic = enabled and config.static == 0.0
        self.scale = 1.0
        if enabled:
            self.scale = 2.0**config.initial_power if self.dynamic else config.static
        self.steps = 0
        self.last_overflow = -1
        self.hysteresis_left = config.hysteresis

    @property
    def exhausted(self) -> bool:
        """Whether one more overflow would find no lower scale to go to."""
        return not self.dynamic or (self.scale <= self.config.minimum and self.hysteresis_left == 1)

    def update(self, overflow: bool) -> None:
        """After every attempted step: move the scale."""
        if not self.dynamic:
            return
        if overflow:
            if self.hysteresis_left == 1:
                self.scale = max(self.scale / 2.0, self.config.minimum)
            else:
                self.hysteresis_left -= 1
            self.last_overflow = self.steps
        else:
            if self.config.consecutive_hysteresis:
                self.hysteresis_left = self.config.hysteresis
            clean = self.steps - self.last_overflow - 1
            if clean > 0 and clean % self.config.window == 0:
                self.hysteresis_left = self.config.hysteresis
                self.scale *= 2.0
        self.steps += 1

    def state_dict(self) -> dict[str, float | int]:
        return {
            "scale": self.scale,
            "steps": self.steps,
            "last_overflow": self.last_overflow,
            "hysteresis_left": self.hysteresis_left,
        }

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.scale = float(state["scale"])
        self.steps = int(state["steps"])
        self.last_overflow = int(state["last_overflow"])
        self.hysteresis_left = int(state["hysteresis_left"])
