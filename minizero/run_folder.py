"""What is in a run's folder, and what may be done with it: begin, continue, or leave a finished run alone.

`run.dir` holds `config.json` (each value with its origin), `tokenizer.json`, `metrics.jsonl`, `checkpoints/`, and at
the end `loss.png` and `summary.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minizero.checkpoint.files import LATEST, CheckpointError
from minizero.checkpoint.save import Retention
from minizero.config import Config, ConfigError
from minizero.config.load import read_resolved
from minizero.engine import Engine

INTERRUPTED = "interrupted.json"  # there while a run was stopped by a signal, and wants to be started again
REQUEUE = 75  # the exit code then: EX_TEMPFAIL of sysexits.h
MAY_CHANGE = ("run.", "checkpoint.", "log.", "debug.", "dist.", "train.time_limit", "train.eval_every")


def checkpoint_folder(config: Config) -> Path | None:
    """Where to continue from, or None to begin. Raises ConfigError when the run folder holds another run."""
    folder = Path(config.run.dir)
    if config.checkpoint.resume is not None:
        wanted = folder if config.checkpoint.resume == "latest" else Path(config.checkpoint.resume)
        if not (wanted / "checkpoints" / LATEST).is_file():
            raise ConfigError(f"checkpoint.resume: {wanted} holds no checkpoint")
        return wanted / "checkpoints"
    if not (folder / "config.json").is_file():
        return None
    before, now = (flat(c.model_dump()) for c in (read_resolved(folder / "config.json"), config))
    changed = [key for key in now if before.get(key) != now[key] and not key.startswith(MAY_CHANGE)]
    if changed:
        lines = "; ".join(f"{key} was {before.get(key)}, is {now[key]}" for key in changed[:4])
        raise ConfigError(
            f"{folder} holds a run with other settings ({lines}). Pass --run.dir OTHER to begin a new run, or "
            "--checkpoint.resume latest to continue that one with these settings"
        )
    return folder / "checkpoints" if (folder / "checkpoints" / LATEST).is_file() else None


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested settings as {dotted key: value}."""
    found: dict = {}
    for key, value in tree.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def finished_steps(folder: Path, config: Config) -> int:
    """Steps of a run that is over, else 0."""
    summary = folder / "summary.json"
    steps = json.loads(summary.read_text())["steps"] if summary.is_file() else 0
    return steps if steps >= config.train.steps else 0


def say_finished(folder: Path, steps: int) -> None:
    """Two lines, instead of a run."""
    print(f"{folder} is finished ({steps} steps). To train anew, pass --run.dir OTHER; to train on, more")
    print("--train.steps and --checkpoint.resume latest.")


def save(engine: Engine, corpus: str, folder: Path, config: Config) -> None:
    """Write a checkpoint that names its corpus, and remove the oldest; collective.

    Where `checkpoint.on_error` is "continue", one that cannot be written is a line on stderr.
    """
    settings = config.checkpoint
    retention = Retention(settings.keep, settings.keep_every)
    finish_save(engine, config)
    with told_or_raised(engine, config):
        engine.save_checkpoint(folder / "checkpoints", client_state={"corpus": corpus}, retention=retention)


def finish_save(engine: Engine, config: Config) -> None:
    """Wait for the checkpoint that is being written, if there is one."""
    with told_or_raised(engine, config):
        engine.wait_for_checkpoint()


@contextmanager
def told_or_raised(engine: Engine, config: Config) -> Iterator[None]:
    """Inside, a checkpoint that cannot be written is what `checkpoint.on_error` says it is."""
    try:
        yield
    except CheckpointError as error:
        if config.checkpoint.on_error == "stop":
            raise
        if engine.global_rank == 0:
            print(f"minizero: training goes on without a checkpoint: {error}", file=sys.stderr, flush=True)
