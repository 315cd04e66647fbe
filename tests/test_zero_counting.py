"""Promise 2: bytes sent and bytes held are counted while it runs, and equal the closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from toys import make
from training import settings, train

import minizero
from minizero.dist.sharding import FlatLayout
from minizero.zero.units import ROOT, find_units


def unit_sizes(name: str, world: int) -> dict[str, int]:
    """Padded elements per unit."""
    units = find_units(make(name))
    return {u.name: FlatLayout(tuple(p.numel() for p in u.parameters.values()), world).padded_size for u in units}


def payload(report, operation, phase=None):
    """Bytes of an operation's payload per step."""
    matching = [c for (_, op, ph, unit), c in report.counts.items() if op == operation and phase in (None, ph)]
    return sum(c.payload for c in matching)


@pytest.mark.parametrize(
    ("world", "accumulation", "precision"),
    ((2, 1, "fp32"), (2, 2, "bf16"), (4, 1, "bf16"), (4, 2, "fp32"), (8, 2, "bf16")),
)
def test_payload_bytes_are_the_closed_form(world, accumulation, precision):
    """Psi = padded elements x bytes of the compute dtype; a = accumulation; stage 0 gathers fp32 sums."""
    steps = 2
    sizes = unit_sizes("toy", world)
    elements, root = sum(sizes.values()), sizes[ROOT]
    width = 4 if precision == "fp32" else 2
    psi, a = elements * width, accumulation
    expected = {
        0: {"reduce_scatter": psi, "all_gather": elements * 4},
        1: {"reduce_scatter": psi, "all_gather": psi},
        2: {"reduce_scatter": a * psi, "all_gather": psi},
        3: {"reduce_scatter": a * psi, "all_gather": a * (psi + psi - root * width)},  # the root stays for backward
    }
    for stage, operations in expected.items():
        report = run_distributed(train, world, "toy", stage, steps, accumulation, precision=precision)[0]
        for operation, wanted in operations.items():
            assert payload(report, operation) == steps * wanted, (stage, operation)


def test_wire_bytes_are_payload_without_padding_or_own_slice():
    world = 4
    for stage in range(4):
        reports = run_distributed(train, world, "toy", stage, 1)
        elements = sum(sum(p.numel() for p in u.parameters.values()) for u in find_units(make("toy")))
        sent = sum(c.wire for r in reports for (_, op, _, _), c in r.counts.items() if op == "reduce_scatter")
        assert sent == elements * 4 * (world - 1)
        for (_, op, _, _), count in reports[0].counts.items():
            if op == "all_gather":
                assert count.wire == count.payload // world * (world - 1)


@pytest.mark.parametrize("world", (2, 4, 8))
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_model_state_bytes_are_the_closed_form(world, precision):
    """At rest after a step: no gradients; parameters, masters and two moments, whole or 1/N, with padding."""
    sizes = unit_sizes("toy", world)
    elements = sum(sizes.values())
    for stage in range(4):
        reports = run_distributed(train, world, "toy", stage, 1, precision=precision)
        width = 4 if precision == "fp32" else 2
        share = world if stage else 1
        masters = 0 if precision == "fp32" else 4 * elements // share
        true_elements = sum(p.numel() for p in make("toy").parameters())
        assert reports[0].memory["parameters"] == elements * width // (world if stage == 3 else 1)
        assert reports[0].memory["masters"] == masters
        assert reports[0].memory["gradients"] == 0
        moments = sum(r.memory["optimizer"] for r in reports)
        assert moments == 8 * true_elements * (1 if stage else world)  # moments exist for elements, not for padding


def gradients_before_the_step(stage: int) -> list[int]:
    engine, *_ = minizero.initialize(model=make("toy"), config=settings(stage, dist.get_world_size(), 2))
    tokens, found = torch.randint(17, (4, 7)), []
    for _ in range(2):
        engine.backward(engine(tokens, tokens))
        found.append(engine.memory_bytes()["gradients"])
    return found


@pytest.mark.parametrize("world", (2, 4, 8))
def test_gradient_bytes_before_the_step_are_the_closed_form(world):
    """After the first of two micro-batches: whole below stage 2, shards from there. After the last: reduced."""
    whole = 4 * sum(p.numel() for p in make("toy").parameters())
    padded = 4 * sum(unit_sizes("toy", world).values())
    expected = {0: [whole, padded], 1: [whole, padded // world], 2: [padded // world] * 2, 3: [padded // world] * 2}
    for stage, wanted in expected.items():
        assert run_distributed(gradients_before_the_step, world, stage) == [wanted] * world, stage


def watch_memory(stage: int) -> dict[str, list]:
    """States of all units whenever a block computes, in forward and in backward, and their gradients."""
    model = make("big_embedding")
    model.blocks.extend([type(model.blocks[0])() for _ in range(4)])
    engine, *_ = minizero.initialize(model=model, config=settings(stage, dist.get_world_size()))
    whole: list[int] = []
    held: list[int] = []

    def look(*_: object) -> None:
        units = engine.runtime.units
        whole.append(sum(u.state.name != "SHARDED" for u in units if u.name != ROOT))
        held.append(sum(any(p.grad is not None for p in u.trainable) for u in units if u.name != ROOT))

    for block in model.blocks:
        block.down.register_forward_hook(look)
        block.down.register_full_backward_hook(look)
    tokens = torch.randint(17, (8, 7))
    for _ in range(2):
        engine.backward(engine(tokens, tokens))
        engine.step()
    at_rest = [u.state.name for u in engine.runtime.units]
    return {"whole": whole, "gradients": held, "rest": at_rest}


def test_stage_3_holds_at_most_the_root_and_two_units_whole():
    seen = run_distributed(watch_memory, 2, 3)[0]
    assert len(seen["whole"]) == 2 * 2 * 6  # two steps, forward and backward, six blocks
    assert max(seen["whole"]) <= 2
    assert max(seen["gradients"]) <= 2
    assert set(seen["rest"]) == {"SHARDED"}


def test_stage_2_holds_at_most_two_units_of_whole_gradients():
    seen = run_distributed(watch_memory, 2, 2)[0]
    assert max(seen["gradients"]) <= 2
    assert max(run_distributed(watch_memory, 2, 1)[0]["gradients"]) > 2  # stage 1 keeps them: the probe can fail
