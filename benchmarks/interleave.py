"""Runs contenders side by side: each is a group of processes that stays alive, and they take turns.

On a shared machine the speed drifts by tens of percent within minutes. So nothing is compared across runs: in every
round each contender runs a few steps, in an order that changes from round to round, while the others block on a pipe;
ratios are taken inside a round, and their median and its 95 % interval (bootstrap) are what is reported.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import platform
import random
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# (rank, world) -> one training step. Its `before` is not timed; one that times only a part of itself has `seconds`.
Build = Callable[[int, int], Callable[[], Any]]


@dataclass
class Contender:
    """A group of `world` processes that build the same thing and run its steps on command.

    Attributes:
        peak_bytes: of a process, beyond its imports. more_bytes: beyond its own peak when it had built. Largest of all.
    """

    name: str
    build: Build
    world: int
    processes: list[Any] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    more_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        context = mp.get_context("spawn")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(self.build, rank, self.world, port, theirs), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(ours)
        self.facts = [pipe.recv() for pipe in self.pipes][0]

    def run(self, steps: int) -> float:
        """Milliseconds per step of the slowest rank, median over `steps`."""
        for pipe in self.pipes:
            pipe.send(steps)
        answers = [pipe.recv() for pipe in self.pipes]
        self.peak_bytes = max(answer["peak_bytes"] for answer in answers)
        self.more_bytes = max(answer["more_bytes"] for answer in answers)
        return statistics.median(max(times) for times in zip(*(a["milliseconds"] for a in answers), strict=True))

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(timeout=20)
            process.kill()


def serve(build: Build, rank: int, world: int, port: int, pipe: Connection) -> None:
    """One process of a contender: build, then run steps until told to stop."""
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    os.environ["MASTER_PORT"] = str(port)
    sys.stdout = open(os.devnull, "w")  # peers print as they like; our table goes through the pipe
    step = build(rank, world)
    imported, built = resident_bytes(), largest_resident_bytes()
    pipe.send(getattr(step, "facts", {}))  # what the build found out about itself, if anything
    while (steps := pipe.recv()) is not None:
        milliseconds = []
        for _ in range(steps):
            if (before := getattr(step, "before", None)) is not None:
                before()
            begin = time.perf_counter()
            step()
            seconds = getattr(step, "seconds", None)
            milliseconds.append(1e3 * (time.perf_counter() - begin if seconds is None else seconds))
        peak = largest_resident_bytes()
        pipe.send(
            {
                "milliseconds": milliseconds,
                "peak_bytes": peak - BASELINE.get("import", imported),
                "more_bytes": peak - built,
            }
        )


BASELINE: dict[str, int] = {}


def mark_imported() -> None:
    """Called by a build once its imports are done: memory is counted from here."""
    BASELINE["import"] = resident_bytes()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def largest_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def interleave(contenders: list[Contender], rounds: int, steps: int, warmup: int = 3) -> None:
    """Start all, warm all up, then `rounds` rounds of `steps` steps each, in a new order every round."""
    for contender in contenders:
        contender.start()
        contender.run(warmup)
    order = list(contenders)
    for index in range(rounds):
        random.Random(index).shuffle(order)
        for contender in order:
            contender.milliseconds.append(contender.run(steps))
        print(f"\rround {index + 1}/{rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for contender in contenders:
        contender.stop()


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median of the paired ratios ours/theirs, with a 95 % bootstrap interval."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(2000))
    return {"median": statistics.median(pairs), "low": medians[50], "high": medians[1949]}


def environment() -> dict[str, Any]:
    """Hardware, versions and commit, written beside every result."""
    model = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    versions = {}
    for package in ("torch", "deepspeed", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n")
    return path
