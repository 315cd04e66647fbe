"""The function that ranks run in most ZeRO tests: train a toy, report what happened."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import DistributedError, run_distributed
from torch import Tensor
from toys import BATCH, LENGTH, batches, make

import minizero


@dataclass
class Report:
    """losses and norms per step, whole final weights, the ledger's counts, bytes of state, units."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[Any, Any] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    applied: list[bool] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


def settings(stage: int, world: int, accumulation: int = 1, **changes: Any) -> minizero.Config:
    """AdamW 3e-3 with decay and clipping over a global batch of 16; `changes` are nested dicts merged on top."""
    tree: dict[str, Any] = {
        "zero": {"stage": stage},
        "train": {"micro_batch_size": BATCH // world // accumulation, "gradient_accumulation_steps": accumulation},
        "optimizer": {"lr": 3e-3, "weight_decay": 0.1},
        "dist": {"timeout": 20.0},
    }
    tree["train"]["gradient_clipping"] = 0.5
    for section, value in changes.items():
        if isinstance(value, dict):
            tree[section] = {**tree.get(section, {}), **value}
        else:
            tree[section] = value
    return minizero.Config(**tree)


def micro_batches(tokens: Tensor, labels: Tensor, accumulation: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of a global batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    split = [t.view(accumulation, world, -1, LENGTH)[:, rank] for t in (tokens, labels)]
    return list(zip(*split, strict=True))


def whole_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    with minizero.unsharded(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(
    name: str, stage: int, steps: int, accumulation: int = 1, *, dtype: torch.dtype | None = None, **changes: Any
) -> Report:
    model = make(name)
    if dtype is not None:
        model = model.to(dtype)
    config = settings(stage, dist.get_world_size(), accumulation, **changes)
    engine, *_ = minizero.initialize(model=model, config=config)
    report = Report()
    engine.ledger.reset()
    for tokens, labels in batches(steps):
        report.losses.append(float(engine.train_batch(iter(micro_batches(tokens, labels, accumulation)))))
        report.norms.append(engine.get_global_grad_norm())
        report.applied.append(engine.was_step_applied())
    report.counts = dict(engine.ledger.counts)
    report.memory = engine.memory_bytes()
    report.weights = whole_weights(model)
    return report


def run_steps(engine: Any, batches: list[dict[str, Tensor]], accumulation: int = 1) -> tuple[list[float], list[float]]:
    """(losses, norms) of a step per global batch, of which each data-parallel rank takes its part."""
    losses, norms = [], []
    for batch in batches:
        parts = {k: v.view(accumulation, engine.dp_size, -1, *v.shape[1:])[:, engine.dp_rank] for k, v in batch.items()}
        micro = [{key: part[index] for key, part in parts.items()} for index in range(accumulation)]
        losses.append(float(engine.train_batch(iter(micro))))
        norms.append(engine.get_global_grad_norm())
    return losses, norms


def train_with_torch(
    model: torch.nn.Module, batches: list[dict[str, Tensor]], lr: float, micro_batches: int = 1
) -> tuple[list[float], list[float]]:
    """(losses, norms) of torch alone, AdamW and clipping as `settings` have them.

    In fp32 a sum over micro-batches rounds otherwise than one over the whole batch.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    losses, norms = [], []
    for batch in batches:
        total, count = 0.0, (batch["labels"] != -100).sum()
        for index in range(micro_batches):
            part, _ = model(**{key: value.chunk(micro_batches)[index] for key, value in batch.items()})
            part.backward()
            total += part.detach().double()
        for parameter in model.parameters():
            parameter.grad /= count
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total / count))
    return losses, norms


def refused_everywhere(function: Any, world: int, message: str, *arguments: Any) -> None:
    """Every rank of `world` raises an error that `message` matches, in time."""
    with pytest.raises(DistributedError, match=message) as caught:
        run_distributed(function, world, *arguments, timeout=30)
    assert len(caught.value.failures) == world
    assert all(re.search(message, text) for text in caught.value.failures.values())


def relative_error(found: list[float], wanted: list[float]) -> float:
    assert len(found) == len(wanted)
    return max(abs(f - w) / abs(w) for f, w in zip(found, wanted, strict=True))
