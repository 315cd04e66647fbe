"""A pipeline trains as one process does: every schedule, with every other axis."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from test_layouts import covering
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
        family=family,
        hidden_size=24,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=kv_heads,
        intermediate_size=37,
        **more,
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
        dist=more.pop("dist", {"timeout": 30.0}),
        **more,
    )


def train(
    family: str, layers: int, steps: int, samples: int, microbatches: int, pp: int, schedule: str, **more: Any
) -> tuple[list[float], list[float]]:
    dtype = more.pop("dtype", torch.float32)
    model = make(family, layers, dtype, **more.pop("model", {}))
    engine, *_ = minizero.initialize(model=model, config=settings(microbatches, samples, pp, schedule, **more))
    return run_steps(engine, batches(steps, samples), microbatches)


@cache
def plainly(
    family: str, layers: int, steps: int, samples: int, microbatches: int, **more: Any
) -> tuple[list[float], list[float]]:
    return train_with_torch(make(family, layers, **more), batches(steps, samples), 1e-3, microbatches)


def agree(reports: list[Any], wanted: tuple[list[float], list[float]], bound: float = 2e-6) -> None:
    for losses, norms in reports:
        assert relative_error(losses, wanted[0]) < bound
        assert relative_error(norms, wanted[1]) < bound


SCHEDULES: tuple[tuple[str, int | None], ...] = (
    ("gpipe", None),
    ("one_f_one_b", None),
    ("interleaved", 1),
    ("interleaved", 2),
    ("interleaved", 3),
    ("zb_h1", None),
    ("zb_h2", None),
    ("zbv", None),
    ("dualpipe_v", None),
    ("zb_auto", None),
)


def train_each(
    family: str, layers: int, counts: list[int], pp: int, schedule: str, chunks: int | None, steps: int
) -> list[Any]:
    """A run for each number of microbatches, of one sample each."""
    found = []
    for count in counts:
        model = make(family, layers, tie_embeddings=count % 2 == 0)
        config = settings(count, count, pp, schedule, pipeline={"chunks": chunks})
        engine, *_ = minizero.initialize(model=model, config=config)
        found.append(run_steps(engine, batches(steps, count), count))
        engine.destroy()
    return found


@pytest.mark.parametrize(
    ("pp", "steps"),
    ((2, 2), (4, 2), *(pytest.param(pp, STEPS, marks=pytest.mark.soak) for pp in (2, 4))),
)
@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_every_schedule_with_every_number_of_microbatches(schedule, chunks, pp, steps):
    family = "llama" if schedule in ("one_f_one_b", "zb_h1", "interleaved") and chunks != 3 else "gpt2"
    layers = pp * (2 if schedule in ("zbv", "dualpipe_v") else chunks or 1) + 1
    counts = [*range(1, 3 * pp + 1)] if pp == 2 or steps == STEPS else [1, 3, 4, 9]
    reports = run_distributed(train_each, pp, family, layers, counts, pp, schedule, chunks, steps, timeout=240)
    for place, count in enumerate(counts):
        wanted = plainly(family, layers, steps, count, count, tie_embeddings=count % 2 == 0)
        agree([report[place] for report in reports], wanted)


FEATURES: dict[str, tuple[Any, ...]] = {
    "schedule": ("one_f_one_b", "interleaved", "zb_h1", "zbv", "dualpipe_v"),
    "tp": (1, 2),
    "sequence": (False, True),
    "context": ("none", "ring", "ulysses"),
    "stage": (0, 1, 2, 3),
    "gather": ("step", "microbatch"),
    "accumulation": ("auto", "sharded"),
    "recompute": ("none", "selective", "full"),
    "family": ("llama", "gpt2"),
    "tied": (False, True),
}


def legal(cell: dict[str, Any]) -> bool:
    """Sequence parallel needs tensor parallel ranks; only stage 3 gathers, and only shards are reduced into."""
    return (
        (cell.get("tp", 2) > 1 or not cell.get("sequence", False))
        and (cell.get("gather", "step") == "step" or cell.get("stage", 3) == 3)
        and (cell.get("accumulation", "auto") == "auto" or cell.get("stage", 3) >= 2)
    )


CELLS = covering(FEATURES, legal)


def world_of(cell: Any, dtype: torch.dtype) -> int:
    """Two data-parallel ranks where they fit into eight; in float64 where nobody else shares what ZeRO shards."""
    ranks = 2 * cell[1] * (1 if cell[3] == "none" else 2)
    is_shared = ranks == 8 or (dtype == torch.float64 and cell[3] != "none")
    return ranks if is_shared else 2 * ranks


def train_cell(cell: Any, dtype: torch.dtype, steps: int) -> Any:
    schedule, tp, sequence, context, stage, gather, accumulation, recompute, family, tied = cell
    return train(
        family,
        5,
        steps,
        6,
        3,
        2,
        schedule,
        dtype=dtype,
        model={"tie_embeddings": tied},
        parallel={
            "tp": tp,
            "sequence": sequence,
            "cp": 1 if context == "none" else 2,
            "context": "ring" if context == "none" else context,
        },
        pipeline={"gather": gather},
        zero={"stage": stage, "accumulation": accumulation},
        recompute={"mode": recompute, "every": 2 if recompute == "full" else 1},
    )


@pytest.mark.parametrize(
    ("dtype", "steps", "bound"),
    (pytest.param(torch.float32, STEPS, 2e-6, marks=pytest.mark.soak), (torch.float64, 2, 1e-10)),
)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_a_pipeline_goes_with_every_other_axis(cell, dtype, steps, bound):
    family, tied = cell[-2:]
    wanted = plainly(family, 5, steps, 6, 3, dtype=dtype, tie_embeddings=tied)
    agree(run_distributed(train_cell, world_of(cell, dtype), cell, dtype, steps), wanted, bound)


@pytest.mark.parametrize(
    ("pp", "schedule", "layers", "counts", "more"),
    (
        (8, "one_f_one_b", 9, 7, {}),
        (8, "zbv", 17, 3, {"zero": {"stage": 1}}),
        (4, "zb_h1", 7, 5, {"parallel": {"tp": 2}, "zero": {"stage": 2}, "recompute": {"mode": "full"}}),
        (4, "interleaved", 9, 6, {"zero": {"stage": 3}}),
        (4, "dualpipe_v", 9, 4, {"parallel": {"cp": 2}, "model": {"tie_embeddings": True}}),
    ),
)
def test_many_stages_on_eight_ranks(pp, schedule, layers, counts, more):
    samples = 2 * counts
    wanted = plainly("llama", layers, 2, samples, counts, **more.get("model", {}))
    agree(run_distributed(train, 8, "llama", layers, 2, samples, counts, pp, schedule, **more), wanted)
