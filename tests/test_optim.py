"""Schedules and loss scaling against DeepSpeed's own; Lion against its formula."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from minizero.config.schema import LossScaleConfig, OptimizerConfig, SchedulerConfig
from minizero.optim.build import build_optimizer
from minizero.optim.lion import Lion
from minizero.optim.loss_scale import LossScaler
from minizero.optim.schedules import build_schedule


def adam() -> torch.optim.Optimizer:
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2))]},
        {"params": [torch.nn.Parameter(torch.ones(3))], "lr": 5e-4},
    ]
    return torch.optim.AdamW(groups, lr=2e-3)


SCHEDULES = [
    ("WarmupLR", {}),
    ("WarmupLR", {"warmup_max_lr": 0.1, "warmup_num_steps": 7}),
    ("WarmupLR", {"warmup_min_lr": 0.01, "warmup_max_lr": 0.1, "warmup_num_steps": 7, "warmup_type": "linear"}),
    ("WarmupLR", {"warmup_max_lr": 0.1, "warmup_num_steps": 1}),
    ("WarmupDecayLR", {"total_num_steps": 30, "warmup_num_steps": 5}),
    ("WarmupDecayLR", {"total_num_steps": 20, "warmup_max_lr": 0.3, "warmup_num_steps": 5, "warmup_type": "linear"}),
    ("WarmupCosineLR", {"total_num_steps": 30, "warmup_num_steps": 5}),
    ("WarmupCosineLR", {"total_num_steps": 25, "warmup_min_ratio": 0.1, "warmup_num_steps": 4, "cos_min_ratio": 0.2}),
    ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2, "cycle_first_step_size": 8}),
    (
        "OneCycle",
        {
            "cycle_min_lr": 1e-4,
            "cycle_max_lr": 1e-2,
            "cycle_first_step_size": 6,
            "cycle_second_step_size": 9,
            "decay_step_size": 3,
            "decay_lr_rate": 0.5,
            "decay_mom_rate": 0.1,
        },
    ),
    (
        "OneCycle",
        {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2, "cycle_first_step_size": 8, "cycle_first_stair_count": 4},
    ),
    ("LRRangeTest", {}),
    ("LRRangeTest", {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 5, "lr_range_test_staircase": True}),
]


@pytest.mark.parametrize(("name", "params"), SCHEDULES)
def test_schedules_follow_deepspeeds_step_by_step(name, params):
    ours, theirs = adam(), adam()
    schedule = build_schedule(SchedulerConfig(type=name, params=params), ours)
    reference = getattr(lr_schedules, name)(theirs, **params)
    for step in range(40):
        for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert mine["lr"] == pytest.approx(other["lr"], rel=1e-12, abs=1e-15), step
            assert mine["betas"] == pytest.approx(other["betas"], rel=1e-12), step
        schedule.step()
        reference.step()


def test_a_schedule_resumes():
    first = adam()
    schedule = build_schedule(SchedulerConfig(type="WarmupDecayLR", params={"total_num_steps": 30}), first)
    for _ in range(7):
        schedule.step()
    second = adam()
    resumed = build_schedule(SchedulerConfig(type="WarmupDecayLR", params={"total_num_steps": 30}), second)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.get_last_lr() == schedule.get_last_lr()


@pytest.mark.parametrize("consecutive", (False, True))
@pytest.mark.parametrize("hysteresis", (1, 2, 3))
def test_loss_scale_follows_deepspeeds(hysteresis, consecutive):
    config = LossScaleConfig(
        initial_power=8, window=5, hysteresis=hysteresis, consecutive_hysteresis=consecutive, minimum=2.0
    )
    ours = LossScaler(config, enabled=True)
    theirs = DynamicLossScaler(
        2.0**8, 5, 2.0, hysteresis, consecutive, raise_error_at_min_scale=False, dtype=torch.float32
    )
    draw = random.Random(hysteresis)
    for _ in range(300):
        overflow = draw.random() < 0.2
        if overflow and ours.scale > 2.0:  # at the minimum DeepSpeed's rank-0 message would need a process group
            theirs_message_free_update(theirs, True)
            ours.update(True)
        elif not overflow:
            theirs_message_free_update(theirs, False)
            ours.update(False)
        assert ours.scale == theirs.cur_scale
    restored = LossScaler(config, enabled=True)
    restored.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert restored.state_dict() == ours.state_dict()


def theirs_message_free_update(scaler: DynamicLossScaler, overflow: bool) -> None:
    import deepspeed.runtime.fp16.loss_scaler as module

    module.dist.get_rank = lambda: 1  # no process group here: only its log line asks for the rank
    scaler.update_scale(overflow)


def test_scaling_is_off_outside_fp16():
    scaler = LossScaler(LossScaleConfig(), enabled=False)
    scaler.update(overflow=True)
    assert scaler.scale == 1.0 and scaler.exhausted


def test_lion_is_its_formula():
    weight = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    optimizer = Lion([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.05)
    p, m = weight.detach().clone(), torch.zeros(3, dtype=torch.float64)
    for step in range(5):
        g = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64) * (-1) ** step
        weight.grad = g.clone()
        optimizer.step()
        p = p - 0.1 * (torch.sign(0.9 * m + 0.1 * g) + 0.05 * p)
        m = 0.99 * m + 0.01 * g
        torch.testing.assert_close(weight.detach(), p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    (
        ("LBFGS", {}, "LBFGS' is not element-wise"),
        ("Adamm", {}, "is not known; legal: Lion, Adam"),
        ("SGD", {"betas": [0.9, 0.99]}, "SGD takes no betas"),
        ("AdamW", {"betas": [0.9]}, "legal: two numbers"),
    ),
)
def test_optimizers_that_do_not_fit_are_refused(name, params, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(type=name, params=params)


def test_names_of_optimizers_ignore_case():
    weight = torch.ones(1, requires_grad=True)
    assert type(build_optimizer(OptimizerConfig(type="adamw"), [weight])) is torch.optim.AdamW
