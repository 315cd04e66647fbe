"""Writes the records of `metrics.jsonl` to TensorBoard as well, nested keys as `comm_bytes/dp/all_gather`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


class TensorBoardWriter:
    """Writes each number of a record as a scalar.

    Args:
        folder: receives the event files.
        last_step: a resumed run's last step; events past it, from the run before, are hidden.
    """

    def __init__(self, folder: str | Path, last_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # costs a second that few runs need

        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Write every number in `record`; it must hold `step`."""
        for name, value in _scalars(record):
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()


def _scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)
