"""A pipeline trains as one process does: every schedule, with every other axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from test_tensor_parallel import randomized
from torch import Tensor, nn
from training import relative_error, run_steps, train_with_torch

import minizero
from minizero.config.schema import ModelConfig
from minizero.models import build

VOCAB, LENGTH, STEPS = 19, 15, 10


def make(family: str, layers: int, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    kv_heads = 2 if family == "llama" else None
    config = ModelConfig(
        family=family, hidden_size=24, num_layers=layers, num_heads=4, num_kv_heads=kv_heads, intermediate_size=37, **more
    )
    return randomized(build(config, VOCAB, LENGTH)).to(dtype)


def batches(steps: int, samples: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        tokens = torch.randint(VOCAB, (samples, LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].masked_fill(torch.rand(samples, LENGTH, generator=generator) < 0.2, -100)
        found.append({"input_ids": tokens[:, :-1], "labels": labels})
    return found


def settings(microbatches: int, samples: int, pp: int, schedule: str, **more: Any) -> minizero.Config:
    parallel = {"pp": pp, **more.pop("parallel", {})}
    dp = dist.get_world_size() // (pp * parallel.get("tp", 1) * parallel.get("cp", 1))
    return minizero.Config(
        parallel=parallel,
        pipeline={"schedule": schedule, "microbatches": microbatches, **more.pop("pipeline", {})},
        train={"micro_batch_size": samples // dp // microbatches, "gradient_clipping": 0.5},
        optimizer={"lr": 1e-3, "weight_decay": 0.1},
        dist={"timeout": 30.0},
        **more,
    )


def train(
    family: str, layers: int, steps: int, samples: int, microbatches: int, pp: int, schedule: str, **more: Any
) -> tuple[list[float], list[float]]:
    dtype = more.pop("dtype", torch.float32)
    model = make(family, layers, dtype, **more.pop("model", {}))
    engine, *_ = minizero.initialize(model=model, config=settings(microbatches, samples, pp, schedule, **more))
    return run_steps(engine, batches(steps, samples), microbatches)


def plainly(family: str, layers: int, steps: int, samples: int, **more: Any) -> tuple[list[float], list[float]]:
    return train_with_torch(make(family, layers, **more), batches(steps, samples), 1e-3)


def agree(reports: list[Any], wanted: tuple[list[float], list[float]], bound: float = 2e-6) -> None:
    for losses, norms in reports:
        assert relative_error(losses, wanted[0]) < bound
        assert relative_error(norms, wanted[1]) < bound


@pytest.mark.parametrize("schedule", ("gpipe", "one_f_one_b", "zb_h1", "zb_h2", "interleaved", "zbv", "dualpipe_v"))
def test_two_stages(schedule):
    wanted = plainly("llama", 5, STEPS, 6)
    agree(run_distributed(train, 2, "llama", 5, STEPS, 6, 3, 2, schedule), wanted)
