"""Learning-rate schedules as pure functions of the step, with DeepSpeed's names, defaults and traps.

A schedule maps `iteration` to one learning rate per param group. Iteration -1 is the state before the first `step()`;
the engine calls `step()` once after each optimizer step that was applied. The traps, reproduced because configs in the
wild rely on them: the warm-up types give the minimum to the first *two* steps (iterations -1 and 0), the default
warm-up is logarithmic, `warmup_num_steps` is at least 2, and WarmupDecayLR and WarmupLR ignore the optimizer's own lr
when `warmup_max_lr` is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from minizero.config.schema import SchedulerConfig

PerGroup = float | list[float]


class Schedule:
    """Sets `lr` (OneCycle: also `betas`) of an optimizer's param groups.

    Args:
        optimizer: whose param groups are driven.
        lr_at: iteration -> learning rate per group.
        betas_at: iteration -> `betas` per group, where the schedule cycles momentum.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_at: Callable[[int], list[float]],
        betas_at: Callable[[int], list[tuple[float, float]]] | None = None,
        last_batch_iteration: int = -1,
    ) -> None:
        self.optimizer = optimizer
        self.lr_at = lr_at
        self.betas_at = betas_at
        self.last_batch_iteration = last_batch_iteration
        if last_batch_iteration == -1:
            self._apply()

    def _apply(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
        if self.betas_at is not None:
            for group, betas in zip(self.optimizer.param_groups, self.betas_at(self.last_batch_iteration), strict=True):
                group["betas"] = betas

    def get_lr(self) -> list[float]:
        return self.lr_at(self.last_batch_iteration)

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, iteration: int | None = None) -> None:
        """Move to `iteration`, by default the next one."""
        self.last_batch_iteration = self.last_batch_iteration + 1 if iteration is None else iteration
        self._apply()

    def state_dict(self) -> dict[str, int]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.last_batch_iteration = state["last_batch_iteration"]
        if self.last_batch_iteration >= 0:
            self._apply()


def warmup_fraction(iteration: int, num_steps: int, kind: str) -> float:
    """How much of the warm-up is done, in [0, 1)."""
    return math.log(iteration + 1) / math.log(num_steps) if kind == "log" else iteration / num_steps


def warmup_lr(
    optimizer: torch.optim.Optimizer,
    warmup_min_lr: PerGroup = 0.0,
    warmup_max_lr: PerGroup | None = None,
    warmup_num_steps: int = 1000,
    warmup_type: str = "log",
    last_batch_iteration: int = -1,
    after: Callable[[int], float] = lambda iteration: 1.0,
) -> Schedule:
    """Rise from min to max, then stay (or follow `after`). A max of None is the optimizer's own lr."""
    groups = optimizer.param_groups
    low = per_group(optimizer, warmup_min_lr, "warmup_min_lr")
    own = [group["lr"] for group in groups]
    high = own if warmup_max_lr is None else per_group(optimizer, warmup_max_lr, "warmup_max_lr")
    num_steps = max(2, warmup_num_steps)

    def lr_at(iteration: int) -> list[float]:
        if iteration < 0:
            return low
        warming = iteration < num_steps
        gamma = warmup_fraction(iteration, num_steps, warmup_type) if warming else after(iteration)
        return [small + (big - small) * gamma for small, big in zip(low, high, strict=True)]

    return Schedule(optimizer, lr_at, last_batch_iteration=last_batch_iteration)


def warmup_decay_lr(
    optimizer: torch.optim.Optimizer,
    total_num_steps: int,
    warmup_min_lr: PerGroup = 0.0,
    warmup_max_lr: PerGroup = 0.001,
    warmup_num_steps: int = 1000,
    warmup_type: str = "log",
    last_batch_iteration: int = -1,
) -> Schedule:
    """Warm-up, then linear decay to `warmup_min_lr` at `total_num_steps`."""
    warm = max(2, warmup_num_steps)

    def decay(iteration: int) -> float:
        return max(0.0, (total_num_steps - iteration) / max(1.0, total_num_steps - warm))

    return warmup_lr(
        optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration, after=decay
    )


def warmup_cosine_lr(
    optimizer: torch.optim.Optimizer,
    total_num_steps: int,
    warmup_min_ratio: float = 0.0,
    warmup_num_steps: int = 1000,
    cos_min_ratio: float = 0.0001,
    warmup_type: str = "log",
    last_batch_iteration: int = -1,
) -> Schedule:
    """Ratios of the optimizer's own lr: warm-up, then half a cosine down to `cos_min_ratio`."""
    base = [group["lr"] for group in optimizer.param_groups]
    warm = max(2, warmup_num_steps)

    def ratio(iteration: int) -> float:
        if iteration < 0:
            return 0.0
        if iteration < warm:
            return warmup_min_ratio + warmup_fraction(iteration, warm, warmup_type) * (1.0 - warmup_min_ratio)
        progress = min(1.0, (iteration - warm + 1) / max(1, total_num_steps - warm))
        return max(0.0, cos_min_ratio + (1.0 - cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2)

    return Schedule(
        optimizer, lambda iteration: [lr * ratio(iteration) for lr in base], last_batch_iteration=last_batch_iteration
    )


def one_cycle(
    optimizer: torch.optim.Optimizer,
    cycle_min_lr: PerGroup,
    cycle_max_lr: PerGroup,
    decay_lr_rate: float = 0.0,
    cycle_first_step_size: int = 2000,
    cycle_second_step_size: int | None = None,
    cycle_first_stair_count: int = 0,
    cycle_second_stair_count: int | None = None,
    decay_step_size: int = 0,
    cycle_momentum: bool = True,
    cycle_min_mom: float = 0.8,
    cycle_max_mom: float = 0.9,
    decay_mom_rate: float = 0.0,
    last_batch_iteration: int = -1,
) -> Schedule:
    """Up to max, back to min, then decay; the first beta runs the other way (Smith, arXiv 1803.09820)."""
    low, high = per_group(optimizer, cycle_min_lr, "cycle_min_lr"), per_group(optimizer, cycle_max_lr, "cycle_max_lr")
    first = float(cycle_first_step_size)
    second = first if cycle_second_step_size is None else float(cycle_second_step_size)
    total = first + second
    first_stairs = cycle_first_stair_count
    second_stairs = first_stairs if cycle_second_stair_count is None else cycle_second_stair_count

    def height(iteration: int) -> float:
        """Place on the cycle: 0 at its feet, 1 at its peak, in stairs where asked."""
        place = (iteration + 1) % total
        rising = place <= first
        climbed, stairs = (place / first, first_stairs) if rising else ((total - place) / second, second_stairs)
        return math.floor(climbed * stairs + 1e-9) / stairs if stairs > 0 else climbed

    def decayed(iteration: int, rate: float) -> float:
        return 1 + rate * (iteration - total + 1) / decay_step_size if decay_step_size else 1.0

    def lr_at(iteration: int) -> list[float]:
        if iteration == -1:
            return low
        if iteration < total:
            return [small + (big - small) * height(iteration) for small, big in zip(low, high, strict=True)]
        return [small / decayed(iteration, decay_lr_rate) for small in low]

    def betas_at(iteration: int) -> list[tuple[float, float]]:
        if iteration == -1:
            beta = cycle_min_mom  # as DeepSpeed starts; its first step() then jumps to the other end
        elif iteration < total:
            beta = cycle_max_mom - (cycle_max_mom - cycle_min_mom) * height(iteration)
        else:
            beta = cycle_max_mom * decayed(iteration, decay_mom_rate)
        return [(beta, 0.99)] * len(low)

    cycles_momentum = cycle_momentum and "betas" in optimizer.defaults
    return Schedule(optimizer, lr_at, betas_at if cycles_momentum else None, last_batch_iteration)


def lr_range_test(
    optimizer: torch.optim.Optimizer,
    lr_range_test_min_lr: PerGroup = 1e-3,
    lr_range_test_step_size: int = 2000,
    lr_range_test_step_rate: float = 1.0,
    lr_range_test_staircase: bool = False,
    last_batch_iteration: int = -1,
) -> Schedule:
    """Grow without end, to find the largest lr that still trains (Smith, arXiv 1803.09820)."""
    low = per_group(optimizer, lr_range_test_min_lr, "lr_range_test_min_lr")

    def lr_at(iteration: int) -> list[float]:
        if iteration == -1:
            return low
        interval = (iteration + 1) / lr_range_test_step_size
        grown = 1 + lr_range_test_step_rate * (math.floor(interval) if lr_range_test_staircase else interval)
        return [small * grown for small in low]

    return Schedule(optimizer, lr_at, last_batch_iteration=last_batch_iteration)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "WarmupLR": warmup_lr,
    "WarmupDecayLR": warmup_decay_lr,
    "WarmupCosineLR": warmup_cosine_lr,
    "OneCycle": one_cycle,
    "LRRangeTest": lr_range_test,
}


def build_schedule(config: SchedulerConfig, optimizer: torch.optim.Optimizer) -> Schedule | None:
    """The configured schedule, or None. Raises ValueError naming a wrong or missing parameter."""
    if config.type == "none":
        return None
    try:
        return SCHEDULES[config.type](optimizer, **config.params)
    except TypeError as error:
        raise ValueError(f"scheduler.params for {config.type}: {error}") from error


def per_group(optimizer: torch.optim.Optimizer, value: Any, name: str) -> list[float]:
    """One value per param group: a scalar for all, or a list of the right length."""
    count = len(optimizer.param_groups)
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} values for {count} param groups")
    return [float(v) for v in values]
