"""DeepSpeed's `deepspeed.checkpointing` under its own names, over `parallel.recompute`.

minizero.checkpointing.configure(None, partition_activations=True)
hidden = minizero.checkpointing.checkpoint(block, hidden)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from minizero.config.load import from_any
from minizero.parallel.recompute import DEFAULT, Options, checkpoint_block, current_options
from minizero.utils.warnings import warn_once

_CONFIGURED: dict[str, bool] = {}


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """How `checkpoint` keeps activations from now on; what is not given here, the engine's settings say.

    Args:
        mpu_: not available: degrees are settings. deepspeed_config: a config whose `activation_checkpointing` is read.
        partition_activations: each tensor-parallel rank keeps a part of what all hold alike.
        checkpoint_in_cpu: keep activations in host memory.
        contiguous_checkpointing, num_checkpoints, synchronize, profile: no effect on what is computed; accepted.

    Raises ValueError for an `mpu_`, or a config that is not one.
    """
    if mpu_ is not None:
        raise ValueError("checkpointing.configure(mpu_=...) is not available: set parallel.tp, and pass None")
    if any((contiguous_checkpointing, num_checkpoints, synchronize, profile)):
        warn_once(
            "checkpointing.configure: contiguous_checkpointing, num_checkpoints, synchronize and profile do nothing"
        )
    if deepspeed_config is not None:
        settings = from_any(deepspeed_config).recompute
        _CONFIGURED.update(partition=settings.partition_activations, cpu=settings.cpu_checkpointing)
    given = {"partition": partition_activations, "cpu": checkpoint_in_cpu}
    _CONFIGURED.update({name: value for name, value in given.items() if value is not None})
    DEFAULT[0] = configured(Options())


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, computed again in backward; see `checkpoint_block`. One tensor, or a tuple."""
    return checkpoint_block(function, *args, options=configured(current_options()))


def configured(options: Options) -> Options:
    """`options` with what `configure` was given."""
    partition, cpu = _CONFIGURED.get("partition", options.partition), _CONFIGURED.get("cpu", options.cpu)
    return replace(options, partition=partition, cpu=cpu)


def is_configured() -> bool:
    """Whether `configure` was called."""
    return bool(_CONFIGURED) or DEFAULT[0] != Options()


def reset() -> None:
    """Forget what `configure` set."""
    _CONFIGURED.clear()
    DEFAULT[0] = Options()
