"""The parameters of each learning-rate schedule, with DeepSpeed's names and defaults.

They are checked when the settings are read, minutes before the schedule is built. Only the parameters that were given
are passed on, so these defaults serve the check, and the schedules' own take effect.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from minizero.config.problems import explain

NotNegative = Annotated[float, Field(ge=0)]
PerGroup = NotNegative | list[NotNegative]  # one value, or one per param group
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class Params(BaseModel):
    """Parameters that every schedule takes."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    last_batch_iteration: int = Field(-1, ge=-1)


class WarmupLR(Params):
    """From `warmup_min_lr` up to `warmup_max_lr` (None: the optimizer's lr), then constant."""

    warmup_min_lr: PerGroup = 0.0
    warmup_max_lr: PerGroup | None = None
    warmup_num_steps: PositiveInt = 1000
    warmup_type: Literal["log", "linear"] = "log"


class WarmupDecayLR(Params):
    """Warm-up, then a straight line down to `warmup_min_lr` at `total_num_steps`."""

    total_num_steps: PositiveInt
    warmup_min_lr: PerGroup = 0.0
    warmup_max_lr: PerGroup = 0.001
    warmup_num_steps: PositiveInt = 1000
    warmup_type: Literal["log", "linear"] = "log"


class WarmupCosineLR(Params):
    """Ratios of the optimizer's lr: warm-up, then half a cosine down to `cos_min_ratio`."""

    total_num_steps: PositiveInt
    warmup_min_ratio: NotNegative = 0.0
    warmup_num_steps: PositiveInt = 1000
    cos_min_ratio: NotNegative = 0.0001
    warmup_type: Literal["log", "linear"] = "log"


class OneCycle(Params):
    """Up from `cycle_min_lr` to `cycle_max_lr` and back, momentum the other way, then decay."""

    cycle_min_lr: PerGroup
    cycle_max_lr: PerGroup
    decay_lr_rate: NotNegative = 0.0
    cycle_first_step_size: PositiveInt = 2000
    cycle_second_step_size: PositiveInt | None = None
    cycle_first_stair_count: Count = 0
    cycle_second_stair_count: Count | None = None
    decay_step_size: Count = 0
    cycle_momentum: bool = True
    cycle_min_mom: float = Field(0.8, ge=0, lt=1)
    cycle_max_mom: float = Field(0.9, ge=0, lt=1)
    decay_mom_rate: NotNegative = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> OneCycle:
        low, high = self.cycle_min_lr, self.cycle_max_lr
        if isinstance(low, float | int) and isinstance(high, float | int) and low > high:
            raise ValueError(f"cycle_min_lr {low} is larger than cycle_max_lr {high}")
        return self


class LRRangeTest(Params):
    """Grow without end from `lr_range_test_min_lr`."""

    lr_range_test_min_lr: PerGroup = 1e-3
    lr_range_test_step_size: PositiveInt = 2000
    lr_range_test_step_rate: NotNegative = 1.0
    lr_range_test_staircase: bool = False


PARAMS: dict[str, type[Params]] = {
    model.__name__: model for model in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)
}


def check_params(type_: str, params: dict[str, Any]) -> None:
    """Raise ValueError, naming the parameter and the legal ones, when `params` do not fit the schedule `type_`."""
    if type_ == "none":
        if params:
            raise ValueError(f"params given ({', '.join(params)}) but type is 'none'; legal types: {', '.join(PARAMS)}")
        return
    try:
        PARAMS[type_].model_validate(params)
    except ValidationError as error:
        raise ValueError(f"for {type_}: {'; '.join(explain(error, PARAMS[type_], 'scheduler.params.'))}") from None
