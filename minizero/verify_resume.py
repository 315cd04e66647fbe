"""`minizero verify-resume CONFIG`: whether a run of these settings, killed and continued, is the run that was not.

It trains 2N steps; trains the same again, is killed (all ranks at once, without a warning) once a restart would begin
at the checkpoint of step N, and continues; then compares the two last checkpoints bit by bit, random states included,
and every line of `metrics.jsonl` that does not depend on a clock.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from minizero.checkpoint.files import named_by_latest
from minizero.checkpoint.inspect import diff
from minizero.checkpoint.manifest import read_manifest
from minizero.checkpoint.tensor_file import TensorFile
from minizero.utils.processes import descendants

OF_THE_CLOCK = ("tokens_per_second",)
PAUSE = 0.002  # seconds between two looks for the checkpoint
ATTEMPTS = 3  # at a kill between two checkpoints


def verify_resume(config: str, processes: int, steps: int, folder: Path, overrides: list[str]) -> list[str]:
    """The differences between a run of 2 `steps` and one that was killed after `steps` and continued; none is right.

    Raises RuntimeError when a run fails, or is over too soon after its first checkpoint to be killed.
    """
    straight, resumed = folder / "straight", folder / "resumed"
    train(config, processes, steps, straight, overrides)
    for _ in range(ATTEMPTS):
        if is_killed_at(f"global_step{steps}", resumed, start(config, processes, steps, resumed, overrides)):
            break
        shutil.rmtree(resumed)
    else:
        raise RuntimeError(f"steps {steps + 1} to {2 * steps} are over before anybody could kill the run: ask for more")
    train(config, processes, steps, resumed, overrides)
    ends = [run / "checkpoints" / f"global_step{2 * steps}" for run in (straight, resumed)]
    return [*diff(*ends), *random_differences(*ends), *metric_differences(straight, resumed)]


def command(config: str, processes: int, steps: int, run: Path, overrides: list[str]) -> list[str]:
    """What starts one of the runs."""
    own = {"run.dir": run, "train.steps": 2 * steps, "checkpoint.every": steps, "checkpoint.keep": 2}
    given = [word for key, value in own.items() for word in (f"--{key}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", "minizero.train", config, *overrides, *given]


def start(config: str, processes: int, steps: int, run: Path, overrides: list[str]) -> subprocess.Popen[str]:
    """A run on its way, in a process group of its own."""
    threads = os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    return subprocess.Popen(
        command(config, processes, steps, run, overrides),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )


def train(config: str, processes: int, steps: int, run: Path, overrides: list[str]) -> None:
    """A run to its end."""
    process = start(config, processes, steps, run, overrides)
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run in {run} failed with exit code {process.returncode}:\n{said[-2000:]}")


def is_killed_at(tag: str, run: Path, process: subprocess.Popen[str]) -> bool:
    """Kill a run, all of its processes, as soon as it would continue from `tag`; False if by then it was further.

    Raises RuntimeError when it ended before.
    """
    checkpoints = run / "checkpoints"
    while named_by_latest(checkpoints) is None and process.poll() is None:
        time.sleep(PAUSE)
    if process.poll() is None:
        for pid in descendants(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    named = named_by_latest(checkpoints)
    if named is None:
        said = process.stderr.read() if process.stderr is not None else ""
        raise RuntimeError(f"the run in {run} ended before {tag}:\n{said[-2000:]}")
    return named == tag


def random_differences(one: Path, other: Path) -> list[str]:
    """Ranks whose random states differ. Raises CheckpointError when a file cannot be read."""
    lines = []
    for file in read_manifest(one).files:
        with TensorFile(one / file.file) as a, TensorFile(other / file.file) as b:
            for key in sorted(key for key in a.places if key.startswith("rng/")):
                if a.read(key).tolist() != b.read(key).tolist():
                    lines.append(f"{key} of {file.file}")
    return lines


def metric_differences(one: Path, other: Path) -> list[str]:
    """Steps of which the two runs say different things, and what."""
    runs: list[list[dict[str, Any]]] = []
    for run in (one, other):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        runs.append([{k: v for k, v in json.loads(line).items() if k not in OF_THE_CLOCK} for line in lines])
    if len(runs[0]) != len(runs[1]):
        return [f"metrics.jsonl has {len(runs[0])} lines, and {len(runs[1])}"]
    found = []
    for a, b in zip(*runs, strict=True):
        changed = [key for key in a if key != "comm_bytes" and a[key] != b.get(key)]  # a resumed run communicates more
        found += [f"step {a['step']}, {key}: {a[key]} | {b.get(key)}" for key in changed]
    return found
