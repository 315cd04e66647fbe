"""Any layout trains as one process does: every pair of features, and a sample of all of them together.

A cell is one choice of each feature. `covering` picks few cells that hold every pair of choices that can go together.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations, product
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

VOCAB, LENGTH, BATCH, STEPS = 19, 15, 8, 10
FEATURES: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 4),
    "sequence": (False, True),
    "context": ("none", "ring", "ulysses"),
    "stage": (0, 1, 2, 3),
    "recompute": ("none", "selective", "full", "partitioned"),
    "family": ("llama", "gpt2"),
}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"mode": "selective"},
    "full": {"mode": "full"},
    "partitioned": {"mode": "full", "partition_activations": True},
}
Cell = tuple[Any, ...]


def legal(cell: dict[str, Any]) -> bool:
    """Sequence parallel needs tensor parallel ranks; partitioning needs inputs that they hold alike."""
    tp = cell.get("tp", 2)
    whole_inputs = tp > 1 and not cell.get("sequence", False)
    return (tp > 1 or not cell.get("sequence", False)) and (cell.get("recompute") != "partitioned" or whole_inputs)


def covering(features: dict[str, tuple[Any, ...]], legal: Callable[[dict[str, Any]], bool]) -> list[Cell]:
    """Cells among which every legal pair of choices occurs, picked greedily."""
    cells = [cell for cell in product(*features.values()) if legal(dict(zip(features, cell, strict=True)))]
    random.Random(0).shuffle(cells)
    found = {cell: pairs(cell, features) for cell in cells[:4000]}
    missing = {pair for cell in cells for pair in pairs(cell, features)}
    chosen = []
    while missing:
        best = max(found, key=lambda cell: len(missing & found[cell]))
        chosen.append(best)
        missing -= found[best]
    return chosen


def pairs(cell: Cell, features: dict[str, tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    return set(combinations(zip(features, cell, strict=True), 2))


CELLS = covering(FEATURES, legal)
SAMPLE = [
    cell
    for cell in random.Random(1).sample(list(product(*FEATURES.values())), 60)
    if legal(dict(zip(FEATURES, cell, strict=True))) and cell not in CELLS
][:8]

QWEN3: list[Cell] = [  # norms of heads see a part of the heads (at tp 4 of copied ones), of the sequence, or of both
    (2, True, "ring", 3, "full", "qwen3"),
    (4, True, "none", 1, "selective", "qwen3"),
    (4, False, "ulysses", 2, "partitioned", "qwen3"),
]


def test_the_cells_hold_every_pair():
    assert 12 <= len(CELLS) <= 24 and len(SAMPLE) == 8
    held = {pair for cell in CELLS for pair in pairs(cell, FEATURES)}
    for (one, ones), (two, twos) in combinations(FEATURES.items(), 2):
        for a, b in product(ones, twos):
            assert (((one, a), (two, b)) in held) == legal({one: a, two: b}), (one, a, two, b)


def make(family: str, dtype: torch.dtype) -> nn.Module:
    """12 heads of width 2: 3 per rank at tp 4, which Ulysses cuts into 2 and 1. Those of a Qwen3 are wider."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 24, "num_layers": 2, "num_heads": 12, "intermediate_size": 37}
    if family == "qwen3":
        config = ModelConfig(**sizes, num_kv_heads=2, head_dim=6, qk_norm=True)
    else:
        config = ModelConfig(family=family, **sizes, num_kv_heads=4 if family == "llama" else None)
    return randomized(build(config, VOCAB, LENGTH)).to(dtype)


def batches(steps: int, batch: int = BATCH, length: int = LENGTH) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        tokens = torch.randint(VOCAB, (batch, length + 1), generator=generator)
        labels = tokens[:, 1:].masked_fill(torch.rand(batch, length, generator=generator) < 0.2, -100)
        found.append({"input_ids": tokens[:, :-1], "labels": labels})
    return found


@cache
def train_plainly(family: str, dtype: torch.dtype, steps: int) -> tuple[list[float], list[float]]:
    """torch alone."""
    return train_with_torch(make(family, dtype), batches(steps), 1e-3)


def settings(cell: Cell, accumulation: int = 1, **more: Any) -> minizero.Config:
    tp, sequence, context, stage, recompute, _ = cell
    cp = 1 if context == "none" else 2
    dp = dist.get_world_size() // tp // cp
    return minizero.Config(
        parallel={"tp": tp, "sequence": sequence, "cp": cp, "context": "ring" if cp == 1 else context},
        recompute=RECOMPUTE[recompute],
        zero={"stage": stage},
        train={
            "micro_batch_size": BATCH // dp // accumulation,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.5,
        },
        optimizer={"lr": 1e-3, "weight_decay": 0.1},
        dist={"timeout": 30.0},
        **more,
    )


def train(cell: Cell, dtype: torch.dtype, steps: int, accumulation: int = 1, **more: Any) -> Any:
    model = make(cell[-1], dtype)
    engine, *_ = minizero.initialize(model=model, config=settings(cell, accumulation, **more))
    return run_steps(engine, batches(steps), accumulation)


def world_of(cell: Cell, dtype: torch.dtype) -> int:
    """Two data-parallel ranks where they fit into eight; in float64 where nobody else shares what ZeRO shards."""
    ranks = cell[0] * (1 if cell[2] == "none" else 2)
    is_shared = ranks == 8 or (dtype == torch.float64 and cell[2] != "none")
    return ranks if is_shared else 2 * ranks


def cases() -> Iterator[Any]:
    """(cell, dtype, bound): float64, which sees more, of every cell; fp32 of some, and of all in the soak."""
    for number, cell in enumerate([*QWEN3, *CELLS, *SAMPLE]):
        name = "-".join(map(str, cell))
        sampled, few = [pytest.mark.soak] * (cell in SAMPLE), [pytest.mark.soak] * (number not in (1, len(QWEN3)))
        yield pytest.param(cell, torch.float64, 1e-10, marks=sampled, id=f"{name}-fp64")
        yield pytest.param(cell, torch.float32, 2e-6, marks=few, id=f"{name}-fp32")


@pytest.mark.parametrize(("cell", "dtype", "bound"), [*cases()])
def test_a_layout_trains_as_one_process(cell, dtype, bound):
    steps = STEPS if dtype == torch.float32 else 2  # float64 sees what is wrong at once
    losses, norms = train_plainly(cell[-1], dtype, steps)
    accumulation = 2 if cell[3] % 2 else 1
    for found, found_norms in run_distributed(train, world_of(cell, dtype), cell, dtype, steps, accumulation):
        assert relative_error(found, losses) < bound
        assert relative_error(found_norms, norms) < bound


SIXTEEN_BITS = (
    (2, False, "none", 3, "partitioned", "llama"),
    (2, True, "none", 2, "full", "gpt2"),
    (1, False, "ring", 3, "selective", "llama"),
    (2, True, "ulysses", 1, "none", "llama"),
)


def each_cell_and_each_precision() -> Iterator[Any]:
    """Every cell in one precision, in turn; in the other one in the soak."""
    for number, (cell, precision) in enumerate(product(SIXTEEN_BITS, ("bf16", "fp16"))):
        is_other = number // 2 % 2 != number % 2
        yield pytest.param(cell, precision, marks=[pytest.mark.soak] * is_other, id=f"{cell}-{precision}")


@pytest.mark.parametrize(("cell", "precision"), [*each_cell_and_each_precision()])
def test_sixteen_bit_layouts_stay_near_one_process(cell, precision):
    """16-bit sums round differently in each layout: the bound is that of one process in 16 bits against fp32."""
    losses, _ = train_plainly(cell[-1], torch.float32, STEPS)
    scale = {"loss_scale": {"initial_power": 8}} if precision == "fp16" else {}
    plain = (1, False, "none", 0, "none", cell[-1])
    ((alone, _),) = run_distributed(train, 1, plain, torch.float32, STEPS, 1, precision=precision, **scale)
    given = (cell, torch.float32, STEPS, 1)
    reports = run_distributed(train, world_of(*given[:2]), *given, precision=precision, **scale)
    assert all(report == reports[0] for report in reports)
    assert relative_error(reports[0][0], losses) < max(2 * relative_error(alone, losses), 5e-3)
