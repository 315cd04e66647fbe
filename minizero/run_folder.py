"""What is in a run's folder, and what may be done with it: begin, continue, or leave a finished run alone.

`run.dir` holds `config.json` (each value with its origin), `metrics.jsonl`, `checkpoints/`, and at the end `loss.png`
and `summary.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

from minizero.checkpoint.files import LATEST, prune
from minizero.config import Config, ConfigError
from minizero.config.load import read_resolved
from minizero.engine import Engine

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


def save(engine: Engine, corpus: str, folder: Path, config: Config) -> None:
    """Write a checkpoint that names its corpus, if this step has none yet, and remove the oldest; collective."""
    if not (folder / "checkpoints" / f"global_step{engine.global_steps}").exists():
        engine.world.barrier(engine.device)  # all ranks have looked before one of them writes
        engine.save_checkpoint(folder / "checkpoints", client_state={"corpus": corpus})
        if engine.global_rank == 0:
            prune(folder / "checkpoints", config.checkpoint.keep)
