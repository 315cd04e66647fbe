"""Offloading keeps masters, moments and shards in memory of their own; here, without a GPU, in other host memory.

What a CPU can show: the copies between the two go where they should, and nothing else changes.
"""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
from harness import run_distributed
from toys import make
from training import settings, train

import minizero
from minizero.zero.policy import Policy


def offloaded(stage: int, name: str, precision: str) -> tuple[list, list, bool]:
    """`train`, with a policy that offloads although the device is the CPU."""
    resolve = Policy.from_config

    def resolve_offloaded(*args):
        return replace(resolve(*args), offload_optimizer=True, offload_parameters=stage == 3)

    with patch.object(Policy, "from_config", resolve_offloaded):
        engine, *_ = minizero.initialize(model=make(name), config=settings(stage, 2, precision=precision))
        groups = [group for group in engine.runtime.groups if group.trainable]
        apart = all(group.master.data_ptr() not in (group.flat.data_ptr(), group.shard.data_ptr()) for group in groups)
        report = train(name, stage, 4, precision=precision)
    return report.losses, report.norms, apart


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", (1, 2, 3))
def test_offloading_changes_no_bit(stage, precision):
    base = run_distributed(train, 2, "frozen", stage, 4, precision=precision)[0]
    for losses, norms, apart in run_distributed(offloaded, 2, stage, "frozen", precision):
        assert (losses, norms) == (base.losses, base.norms)
        assert apart


def warns_on_cpu() -> list[str]:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        minizero.initialize(model=make("toy"), config=settings(2, 1, zero={"stage": 2, "offload_optimizer": "cpu"}))
    return [str(warning.message) for warning in caught]


def test_on_a_cpu_there_is_nothing_to_move():
    assert any("nothing to move" in text for text in run_distributed(warns_on_cpu, 1)[0])
