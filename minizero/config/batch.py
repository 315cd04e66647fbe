"""The batch equation: global batch = micro batch x accumulation x data-parallel size.

The data-parallel size comes from the mesh, never from the number of processes: other parallel axes divide it. A
quotient that is not whole is an error here. Rounding it down first and complaining about the rounded numbers misleads.
"""

from __future__ import annotations

from dataclasses import dataclass

from minizero.config.errors import ConfigError


@dataclass(frozen=True)
class BatchSizes:
    """The three batch sizes, all known.

    Attributes:
        global_batch_size: samples per optimizer step over all ranks.
        micro_batch_size: samples per rank in one forward pass.
        accumulation: forward passes per optimizer step.
    """

    global_batch_size: int
    micro_batch_size: int
    accumulation: int


def solve(
    global_batch_size: int | None, micro_batch_size: int | None, accumulation: int | None, dp_size: int
) -> BatchSizes:
    """Fill in what follows from the batch equation; an accumulation that nothing determines is 1.

    Raises ConfigError, with the equation and the nearest legal values, when it cannot hold.
    """
    if global_batch_size is None and micro_batch_size is None:
        raise ConfigError(
            "the batch size is not known: give train.micro_batch_size (samples per rank in one forward pass), "
            "train.global_batch_size (samples per optimizer step over all ranks), or both"
        )
    if global_batch_size is None:
        assert micro_batch_size is not None
        accumulation = accumulation or 1
        return BatchSizes(micro_batch_size * accumulation * dp_size, micro_batch_size, accumulation)
    if micro_batch_size is None:
        accumulation = accumulation or 1
        micro_batch_size, rest = divmod(global_batch_size, accumulation * dp_size)
        if rest or not micro_batch_size:
            raise ConfigError(_no_whole(global_batch_size, "?", accumulation, dp_size))
    if accumulation is None:
        accumulation, rest = divmod(global_batch_size, micro_batch_size * dp_size)
        if rest or not accumulation:
            message = _no_whole(global_batch_size, micro_batch_size, "?", dp_size)
            raise ConfigError(message + _nearest_micro(global_batch_size, micro_batch_size, dp_size))
    if micro_batch_size * accumulation * dp_size != global_batch_size:
        raise ConfigError(_contradiction(global_batch_size, micro_batch_size, accumulation, dp_size))
    return BatchSizes(global_batch_size, micro_batch_size, accumulation)


def _no_whole(global_batch_size: int, micro_batch_size: int | str, accumulation: int | str, dp_size: int) -> str:
    """Why the factor "?" has no whole value, and which global batches would give it one."""
    known = dp_size * (micro_batch_size if isinstance(micro_batch_size, int) else 1)
    known *= accumulation if isinstance(accumulation, int) else 1
    below, above = _multiples_around(global_batch_size, known)
    return (
        f"train.global_batch_size {global_batch_size} = train.micro_batch_size {micro_batch_size} x "
        f"train.gradient_accumulation_steps {accumulation} x data-parallel size {dp_size}: ? would be "
        f"{global_batch_size}/{known}, not a whole number from 1. "
        f"Nearest legal train.global_batch_size: {' or '.join(str(n) for n in (below, above) if n)}"
    )


def _nearest_micro(global_batch_size: int, micro_batch_size: int, dp_size: int) -> str:
    """The divisors of the per-rank batch next to `micro_batch_size`, where the ranks share the batch evenly."""
    per_rank, rest = divmod(global_batch_size, dp_size)
    if rest:
        return ""
    below = next(n for n in range(min(micro_batch_size, per_rank), 0, -1) if per_rank % n == 0)
    above = next((n for n in range(micro_batch_size, per_rank + 1) if per_rank % n == 0), None)
    return f"; or train.micro_batch_size: {below}" + (f" or {above}" if above else "")


def _contradiction(global_batch_size: int, micro_batch_size: int, accumulation: int, dp_size: int) -> str:
    """All three are given and disagree: the equation, and for each the value that the other two call for."""
    product = micro_batch_size * accumulation * dp_size
    fixes = [f"train.global_batch_size: {product}"]
    for name, divisor in (
        ("train.micro_batch_size", accumulation * dp_size),
        ("train.gradient_accumulation_steps", micro_batch_size * dp_size),
    ):
        if global_batch_size % divisor == 0:
            fixes.append(f"{name}: {global_batch_size // divisor}")
    below, above = _multiples_around(global_batch_size, micro_batch_size * dp_size)
    nearest = " or ".join(f"{n} with accumulation {n // (micro_batch_size * dp_size)}" for n in (below, above) if n)
    return (
        "train.global_batch_size = train.micro_batch_size x train.gradient_accumulation_steps x data-parallel size "
        f"does not hold: {global_batch_size} != {micro_batch_size} x {accumulation} x {dp_size} = {product}. "
        f"Change one of {', '.join(fixes)}; nearest global batches of this micro batch: {nearest}. "
        "Or leave one of the three out"
    )


def _multiples_around(value: int, divisor: int) -> tuple[int, int]:
    """The multiples of `divisor` at or below, and above, `value`."""
    below = value // divisor * divisor
    return below, below if below == value else below + divisor
