"""The engine's own log: a line every few steps, times of the three phases, TensorBoard scalars. Rank 0 only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from minizero.config.schema import LogConfig
from minizero.observe.tensorboard import TensorBoardWriter

PHASES = ("forward", "backward", "step")


class EngineLog:
    """Prints `step=… loss=… lr=… grad_norm=…` every `config.every` steps, with milliseconds where asked.

    Times are taken after waiting for the device, and only with `wall_clock_breakdown`, since waiting costs overlap.
    """

    def __init__(self, config: LogConfig, *, enabled: bool, quiet: bool = False) -> None:
        self.config = config
        self.enabled = enabled
        self.quiet = quiet
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.tensorboard: TensorBoardWriter | None = None

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        if not (self.enabled and self.config.wall_clock_breakdown):
            yield
            return
        begin = now()
        yield
        self.add(phase, now() - begin)

    def add(self, phase: str, seconds: float) -> None:
        """Enter time that was measured elsewhere; a phase need not be one of the three."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def step(self, engine: Any) -> None:
        """After an optimizer step."""
        if not self.enabled:
            return
        result, step = engine.result, engine.global_steps
        if self.config.tensorboard.enabled:
            if self.tensorboard is None:  # made at the first step, which a resumed run knows only then
                folder = self.config.tensorboard.dir or "tensorboard"
                self.tensorboard = TensorBoardWriter(f"{folder}/{self.config.tensorboard.job_name}", last_step=step - 1)
            scalars = {"loss": result.loss, "lr": engine.get_lr()[0], "grad_norm": result.grad_norm}
            self.tensorboard.write({"step": step, "train": scalars})
        if step % self.config.every or self.quiet:
            return
        line = f"step={step} loss={result.loss:.4f} lr={engine.get_lr()[0]:.3e} grad_norm={result.grad_norm:.4f}"
        if engine.skipped_steps:
            line += f" skipped={engine.skipped_steps}"
        if engine.optimizer.scaler.dynamic:
            line += f" loss_scale={engine.loss_scale:g}"
        if engine.optimizer.offloaded_bytes:
            line += f" offloaded_mib={engine.optimizer.offloaded_bytes / 2**20:.1f}"
        if self.config.wall_clock_breakdown:
            line += "".join(f" {p}_ms={1e3 * s / self.config.every:.1f}" for p, s in self.seconds.items())
            self.seconds = dict.fromkeys(PHASES, 0.0)
        print(line, flush=True)

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()


def now() -> float:
    """Seconds, once the device has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
