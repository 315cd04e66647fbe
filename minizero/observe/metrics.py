"""`metrics.jsonl`: one JSON object per optimizer step, the record that every figure and summary is drawn from.

A record holds `step` and, for a training run,

    loss               mean over the global batch, in nats per token
    grad_norm          global L2 norm before clipping; null when a step was skipped
    lr                 learning rate of the step
    tokens             tokens that the step trained on, over all ranks
    tokens_per_second  the same by the step's wall-clock time
    comm_bytes         {axis: {operation: payload bytes}} of this rank in this step
    memory_bytes       {kind: bytes} of this rank
    validation_bits_per_byte   only on steps that evaluated

Lines are appended and flushed one by one, so a killed run loses at most the line it was writing. A run that
resumes from step n drops the lines past n first: each step appears once, with what the surviving run did.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any


class MetricsWriter:
    """Appends records to a JSONL file.

    Args:
        path: the file; its folder is created.
        last_step: keep the lines up to this step and drop the rest. 0 starts the file anew.
    """

    def __init__(self, path: str | Path, last_step: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(self.path) if record["step"] <= last_step]
        # Written beside and renamed: an interruption here leaves the old file whole.
        beside = self.path.with_suffix(".tmp")
        beside.write_text("".join(_to_line(record) for record in kept))
        os.replace(beside, self.path)
        self._file = self.path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Infinities and NaN become null, since JSON has no word for them."""
        self._file.write(_to_line(record))
        self._file.flush()

    def close(self) -> None:
        """Close the file; writing afterwards is an error."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every record of the file, in order; an empty list when there is no file.

    A last line that was cut off by a crash is left out. Raises ValueError when any other line is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return records


def _to_line(record: dict[str, Any]) -> str:
    return json.dumps(_without_nonfinite(record), allow_nan=False) + "\n"


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nonfinite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
