"""The card that a benchmark runs on: found, described, timed on, and without one stood in for by the CPU.

A repetition is timed by two CUDA events on the stream. Before it the L2 cache is written over, and the card is given
something to wait for, so that the host has queued all of the repetition when the first event passes: what is timed is
the card's work, not how fast Python launches it. (An op that waits for the card itself pays for that.)

    python -m benchmarks.X          on a card: measures. Without one: says so, checks its own logic, exits with 0.
    python -m benchmarks.X --dry    tiny sizes, nothing written; without a card in Triton's interpreter, by wall clock.
"""

from __future__ import annotations

import gc
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 1 << 28
AHEAD_CYCLES = 1_000_000
"""What the card waits before a repetition: about half a millisecond, longer than any op here takes to be launched."""


def start(dry: bool) -> bool:
    """Decide whether this is a dry run, and make ready for it. Call it before minizero or Triton is imported."""
    found = device().type == "cuda"
    if not found:
        if not dry:
            print("no NVIDIA GPU on this machine: nothing to measure, so this is a dry run on the CPU", flush=True)
        interpret()
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    return dry or not found


def interpret() -> None:
    """Triton's kernels run on the CPU from here on, and compute there what a GPU computes."""
    os.environ |= {"TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    tests = str(Path(__file__).parent.parent / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    from interpreter import cure

    cure()


def device() -> torch.device:
    """The NVIDIA card, if there is one."""
    return torch.device("cuda" if torch.version.cuda is not None and torch.cuda.is_available() else "cpu")


class Card:
    """A stopwatch for `device`: the card's own events, or on the CPU the wall clock."""

    def __init__(self, where: torch.device) -> None:
        self.device = where
        self.cuda = where.type == "cuda"
        if self.cuda:
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=where)
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def milliseconds(self, prepare: Callable[[], Any], run: Callable[[Any], Any]) -> float:
        """Of run(prepare()), without what `prepare` takes, in a cold cache."""
        given = prepare()
        if not self.cuda:
            begin = time.perf_counter()
            run(given)
            return 1e3 * (time.perf_counter() - begin)
        self.flush.zero_()
        torch.cuda._sleep(AHEAD_CYCLES)
        self.events[0].record()
        result = run(given)
        self.events[1].record()
        self.events[1].synchronize()
        del result
        return self.events[0].elapsed_time(self.events[1])

    def ceilings(self, repetitions: int = 20) -> dict[str, float]:
        """What the card reaches at best: GB/s of a copy, read and write counted, and TFLOP/s of a bf16 product."""
        count, size = (1 << 30, 8192) if self.cuda else (1 << 16, 64)
        source = torch.ones(count, dtype=torch.bfloat16, device=self.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        copies = self._median(lambda _: target.copy_(source), repetitions)
        products = self._median(lambda _: a @ b, repetitions)
        return {"copy_gb_s": 4e-6 * count / copies, "matmul_tflop_s": 2e-9 * size**3 / products}

    def _median(self, run: Callable[[Any], Any], repetitions: int) -> float:
        times = [self.milliseconds(lambda: None, run) for _ in range(repetitions + 3)]
        return statistics.median(times[3:])

    def free(self, failed: bool = False) -> None:
        """Give back memory that nothing holds; what has failed may hold some in a circle."""
        if not self.cuda:
            return
        if failed:
            gc.collect()
        torch.cuda.empty_cache()

    def lost(self) -> bool:
        """Whether an earlier error has made the card useless to this process."""
        try:
            if self.cuda:
                torch.cuda.synchronize()
        except Exception:
            return True
        return False


def name() -> str:
    """Of the card, for file names: h200, h100_80gb_hbm3, .."""
    full = torch.cuda.get_device_name() if device().type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "_", full.lower().replace("nvidia", "")).strip("_")


def description() -> dict[str, Any]:
    """The card and the versions that matter to its kernels; beside `interleave.environment`."""
    found: dict[str, Any] = {"name": "CPU, interpreted"}
    if device().type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    for package in ("triton", "liger-kernel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
