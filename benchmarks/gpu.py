"""One command for a card: are the kernels right, how fast are they, and what do whole training steps make of them.

    python -m benchmarks.gpu [--steps 4] [--seconds 570] [--parts parity,kernels,gpt2-124m,llama-1.2b] [--dry]

1. parity: every public kernel against float64 on the card (`kernel_parity.py`), in several processes at once.
2. kernels: `python -m benchmarks.kernels`, until half of the time is gone.
3. gpt2-124m and llama-1.2b: training steps beside torch, torch.compile and DeepSpeed (`gpu_training.py`).

All of it takes less than ten minutes: a part that runs out of its time leaves out what it has not begun. Whatever
fails in a part is a line with the reason, and the other parts go on. Results are written after every part, to
benchmarks/results/gpu_<card>.json (and kernels_<card>.json). Without a card: see `card.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import card as cards
from benchmarks import gpu_training, kernel_parity
from benchmarks.interleave import write_result

ROOT = Path(__file__).parent.parent
PARTS = {"parity": 0.20, "kernels": 0.52, "gpt2-124m": 0.70, "llama-1.2b": 0.97}
"""When each must be over, as shares of the time."""


def main() -> None:
    options = arguments()
    begin = time.time()
    dry = cards.start(options.dry)
    workloads = {each.name: each for each in (gpu_training.TINY if dry else gpu_training.FULL)}
    result: dict[str, Any] = {"card": cards.description(), "steps": options.steps}
    wanted = options.parts.split(",")
    if unknown := set(wanted) - set(PARTS):
        raise SystemExit(f"--parts {', '.join(sorted(unknown))}: legal are {', '.join(PARTS)}")
    for part in wanted:
        until = begin + PARTS[part] * options.seconds
        print(f"== {part} ({time.time() - begin:.0f} s gone)", flush=True)
        result[part] = attempt(run_part, part, workloads.get(part), 1 if dry else options.steps, until, dry)
        if not dry:
            write_result(f"gpu_{cards.name()}", result)
    show(result, wanted)
    if dry:
        broken = [part for part in wanted if is_broken(result[part])]
        print(f"dry run: {len(wanted)} parts, {len(broken)} broken")
        raise SystemExit(1 if broken else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="training steps of a turn that are timed")
    parser.add_argument("--seconds", type=float, default=570.0, help="wall time for everything")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, to check this script; writes nothing")
    return parser.parse_args()


def attempt(function: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    try:
        return function(*given)
    except Exception as error:
        print(f"failed: {cards.reason(error)}", flush=True)
        return {"failed": cards.reason(error)}


def run_part(part: str, workload: Any, steps: int, until: float, dry: bool) -> dict[str, Any]:
    if part == "parity":
        return parity(until, dry)
    if part == "kernels":
        return kernels(until, dry)
    return gpu_training.race(workload, steps, until)


def is_broken(found: dict[str, Any]) -> bool:
    """In a dry run, where everything that is tried must work."""
    failed = [row for row in found.get("contenders", {}).values() if "failed" in row]
    rows = [row for row in found.get("rows", []) if not row["held"]]
    return "failed" in found or bool(failed or rows) or found.get("status", 0) != 0


# ---- parts ----


def parity(until: float, dry: bool) -> dict[str, Any]:
    """Rows of `kernel_parity`: kernels are dealt to processes, since compiling them is what takes long."""
    names = list(kernel_parity.SHAPES)
    count = 1 if dry else min(8, os.cpu_count() or 1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for index in range(count):
            path = Path(folder) / f"{index}.json"
            command = [sys.executable, "-m", "benchmarks.kernel_parity", "--json", str(path)]
            command += ["--only", ",".join(names[index::count])] + ["--dry"] * dry
            with open(path.with_suffix(".log"), "w") as log:
                workers.append((path, subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)))
        ends = {path: wait(process, until) for path, process in workers}
        for path, end in ends.items():
            rows += json.loads(path.read_text()) if path.exists() else []
            if end:
                print(f"a process of parity {end}\n{path.with_suffix('.log').read_text()[-1500:]}", flush=True)
    for name in names:
        if not any(row["op"] == name for row in rows):
            rows.append({"op": name, "shape": [], "options": "", "dtype": "none", "held": False, "failed": "no result"})
        print(kernel_parity.summary(name, rows), flush=True)
    return {"rows": rows}


def wait(process: subprocess.Popen[bytes], until: float) -> str:
    """How it ended, if not well."""
    try:
        status = process.wait(timeout=max(1.0, until - time.time()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "ran out of time"
    return f"ended with {status}" if status else ""


def kernels(until: float, dry: bool) -> dict[str, Any]:
    """Prints as it goes; in a dry run it is one kernel, as `benchmarks.kernels --dry` does the rest."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--until", str(until)]
    command += ["--dry", "--only", "rms_norm"] if dry else []
    end = wait(subprocess.Popen(command, cwd=ROOT), until + 45.0)
    name = f"kernels_{cards.name()}.json"
    return {"status": 1, "failed": end} if end else {"status": 0, "results": name}


def show(result: dict[str, Any], wanted: list[str]) -> None:
    """What there is to know at the end, shortest first."""
    print("\n== summary")
    for part in wanted:
        found = result[part]
        if "contenders" in found:
            print("\n".join(gpu_training.lines_of(part, found)))
        elif "rows" in found:
            held = sum(row["held"] for row in found["rows"])
            print(f"parity: {held} of {len(found['rows'])} held")
        else:
            print(f"{part}: {found.get('failed', 'done')}")


if __name__ == "__main__":
    main()
