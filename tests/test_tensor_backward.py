"""Backward of tensor-parallel layers: the sum of the input gradient runs behind the weight gradient, which can wait."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import run_distributed
from test_tensor_parallel import LENGTH, VOCAB, Foreign, Own, axis, batches, make, plan_of, settings
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import relative_error

import minizero
from minizero.dist.collectives import Communicator
from minizero.parallel import linear
from minizero.parallel.deferral import deferring
from minizero.parallel.plan import apply_plan
from minizero.parallel.recompute import checkpoint_block
from minizero.parallel.tensor import TensorAxis
from minizero.utils.forward import Forward, forward_of


def cut(name: str, sequence: bool = False, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any, Communicator]:
    """(model over all ranks, its layout, the axis)."""
    model, comm = make(name).to(dtype), axis()
    inner = model.model if isinstance(model, Foreign) else model
    plan = Own.plan if name == "own" else plan_of(inner)
    if inner is not model:
        plan = {f"model.{key}": style for key, style in plan.items()}
    return model, apply_plan(model, plan, TensorAxis(comm, sequence)), comm


def loss_of(model: nn.Module) -> torch.Tensor:
    (batch,) = batches(1)
    total, count = model(**batch)
    return total / count


# ---- the order ----


def watch_backward(name: str, sequence: bool) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """(what happened in backward, in order; name of each opening layer's weight -> the unit that enters for it)."""
    model, _, _ = cut(name, sequence)
    names = {parameter: key for key, parameter in model.named_parameters()}
    events: list[tuple[str, str]] = []

    def watched(method: Any) -> Any:
        def call(self: Communicator, tensor: torch.Tensor, *args: Any) -> Any:
            unit = args[-1]
            events.append(("start", unit))
            wait = method(self, tensor, *args)
            return lambda: (events.append(("wait", unit)), wait())[1]

        return call

    def weight_gradient(weight: torch.Tensor, compute: Any) -> Any:
        events.append(("weight", names[weight]))
        return compute()

    with pytest.MonkeyPatch.context() as patch:
        with forward_of(Forward()):
            loss = loss_of(model)
        patch.setattr(Communicator, "all_reduce", watched(Communicator.all_reduce))
        patch.setattr(Communicator, "reduce_parts", watched(Communicator.reduce_parts))
        patch.setattr(linear, "weight_gradient", weight_gradient)
        loss.backward()
    enters = {}
    for key, module in model.named_modules():
        if hasattr(module, "enters"):
            enters[names[module.weight]] = key if module.enters else key.rpartition(".")[0]
    return events, enters


@pytest.mark.parametrize("sequence", (False, True))
@pytest.mark.parametrize(
    ("name", "openings", "entries"), (("llama", 2 * 5 + 1, 2 * 2 + 1), ("gpt2", 2 * 2 + 1, 2 * 2 + 1), ("own", 4, 4))
)
def test_weight_gradients_are_computed_while_the_input_gradient_is_summed(name, openings, entries, sequence):
    for events, enters in run_distributed(watch_backward, 2, name, sequence):
        assert len(enters) == openings and len(set(enters.values())) == entries
        for weight, unit in enters.items():
            assert events.index(("start", unit)) < events.index(("weight", weight)) < events.index(("wait", unit))


# ---- deferral ----


def defer(name: str, sequence: bool, dtype: torch.dtype, recomputes: bool) -> list[str]:
    """Names of what was deferred; compares with a backward that defers nothing."""
    model, _, comm = cut(name, sequence, dtype)
    if recomputes:
        for layer in blocks_of(model):
            layer.forward = partial(checkpoint_block, layer.forward)
    with forward_of(Forward()):
        loss_of(model).backward()
    at_once = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    with forward_of(Forward()):
        loss = loss_of(model)
    with deferring() as deferred:
        loss.backward()
    names = {parameter: key for key, parameter in model.named_parameters()}
    late = {key for key, parameter in model.named_parameters() if parameter.grad is None}
    before = {key: count.calls for key, count in comm.ledger.counts.items()}
    seen = []
    for parameter, gradient in deferred.run():
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        seen.append(names[parameter])
    assert before == {key: count.calls for key, count in comm.ledger.counts.items()}
    assert late <= set(seen) and len(deferred) == 0  # an embedding that is the head too has got one of its two
    for key, parameter in model.named_parameters():
        assert parameter.grad.shape == parameter.shape and torch.equal(parameter.grad, at_once[key]), key
    return seen


def blocks_of(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("sequence", (False, True))
@pytest.mark.parametrize(("name", "count"), (("llama", 2 * 7 + 1), ("gpt2", 2 * 4 + 1), ("hf_gpt2", 2 * 4 + 1)))
def test_deferred_gradients_are_the_same_bits(name, count, sequence, dtype):
    for seen in run_distributed(defer, 2, name, sequence, dtype, False):
        assert len(seen) == count


@pytest.mark.parametrize(("name", "count"), (("llama", 2 * 7 + 1), ("gpt2", 2 * 4 + 1)))
def test_what_a_recomputed_block_defers_is_the_same_bits(name, count):
    for seen in run_distributed(defer, 2, name, True, torch.float32, True):
        assert len(seen) == count


# ---- whatever else a layer goes through ----


def gradients(kind: str) -> dict[str, torch.Tensor | None]:
    """`gradients_after` something unusual, in one forward's context, which recomputing needs."""
    with forward_of(Forward()):
        return gradients_after(kind)


def gradients_after(kind: str) -> dict[str, torch.Tensor | None]:
    """Whole gradients of a float64 `Own`, over all ranks where there are several, after something unusual."""
    model: Any = make("own").to(torch.float64)
    layout, sequence = None, kind == "checkpoint"
    for name, parameter in model.named_parameters():
        frozen = {"frozen": "blocks.1.", "frozen weights": "weight", "frozen input": "embed"}.get(kind, "nothing")
        parameter.requires_grad_(frozen not in name)
    comm = axis()
    if comm.size > 1:
        layout = apply_plan(model, Own.plan, TensorAxis(comm, sequence))
    if kind == "checkpoint":
        for block in model.blocks:
            block.forward = recomputed(block.forward)
    if kind == "twice":
        model.blocks.append(model.blocks[1])
    if kind == "evaluated":
        with torch.no_grad():
            loss_of(model)
    loss = loss_of(model)
    if kind == "retained":
        loss.backward(retain_graph=True)
    if kind == "inputs only":
        (gradient,) = torch.autograd.grad(loss, [model.blocks[0].norm.weight], retain_graph=True)
        assert gradient.abs().sum() > 0
    loss.backward()
    found: dict[str, torch.Tensor | None] = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.grad
        if layout is not None and parameter.grad is not None:
            gradient = comm.all_reduce(parameter.grad, name)() if parameter in layout.partial else parameter.grad
            found[name] = layout.whole(parameter, gradient, name)
    return found


def recomputed(forward: Any) -> Any:
    return lambda x: checkpoint(forward, x, use_reentrant=False)


KINDS = ("plain", "frozen", "frozen weights", "frozen input", "checkpoint", "twice", "evaluated", "retained")


@pytest.mark.parametrize("kind", (*KINDS, "inputs only"))
def test_gradients_are_those_of_one_process(kind):
    (expected,) = run_distributed(gradients, 1, kind)
    assert any(value is not None for value in expected.values())
    for found in run_distributed(gradients, 2, kind):
        for name, value in expected.items():
            if value is None:
                assert found[name] is None, name
            else:
                torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


class Mlp(nn.Module):
    """A region that is a ZeRO unit of its own: the region is entered before the unit's weights are gathered."""

    twice = False

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 37), nn.Linear(37, 24)

    def forward(self, x):
        return self.down((torch.tanh(self.up(x / 2)) if self.twice else 0) + torch.tanh(self.up(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers, self.head = (
            nn.Embedding(VOCAB, 24),
            nn.Sequential(Mlp(), Mlp(), Mlp()),
            nn.Linear(24, 1),
        )

    def forward(self, input_ids, labels):
        return self.head(self.layers(self.embed(input_ids))).square().sum(), torch.tensor(labels.numel())


STACK_PLAN = {"layers.*": "region", "layers.*.up": "colwise", "layers.*.down": "rowwise"}


def train_stack(tp: int, stage: int, kind: str) -> list[float]:
    torch.manual_seed(0)
    model = Stack().to(torch.float64)
    if kind == "frozen":
        model.layers[1].requires_grad_(False)
        model.layers[2].up.weight.requires_grad_(False)
    for layer in model.layers:
        layer.twice = kind == "twice"
        if kind == "checkpoint":
            layer.forward = recomputed(layer.forward)
        if kind == "checkpoint_block":
            layer.forward = partial(checkpoint_block, layer.forward)
    config = settings(tp, stage, parallel={"plan": STACK_PLAN}, debug={"collectives": kind == "checked"})
    zero = config.zero.model_copy(update={"overlap": kind == "overlapped"})
    engine, *_ = minizero.initialize(model=model, config=config.model_copy(update={"zero": zero}))
    losses = []
    for batch in batches(4):
        parts = {key: value.view(engine.dp_size, -1, LENGTH)[engine.dp_rank] for key, value in batch.items()}
        losses.append(float(engine.train_batch(iter([parts]))))
    assert not any(unit.held for unit in engine.runtime.units[1:])  # as one would be whose weights were read too early
    return losses


@pytest.mark.parametrize(
    "kind", ("plain", "frozen", "checkpoint", "checked", "checkpoint_block", "twice", "overlapped")
)
@pytest.mark.parametrize("stage", (2, 3))
def test_a_region_that_is_a_unit(stage, kind):
    (expected,) = run_distributed(train_stack, 1, 1, 0, kind)
    assert expected[-1] < expected[0]
    for losses in run_distributed(train_stack, 4, 2, stage, kind):
        assert relative_error(losses, expected) < 1e-10
