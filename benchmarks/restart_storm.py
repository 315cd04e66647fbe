"""Ten restarts in a row under torchrun: how many come up, with minizero's rendezvous and with torch's own.

    python -m benchmarks.restart_storm [--world 2 4] [--plans 3]

A job kills itself, one rank drawn from a seed, in each of its first ten attempts; every rank starts after a pause of up
to 0.3 s, drawn too. `torchrun --max-restarts 10` starts it again. An attempt has come up when every rank has joined and
summed a tensor; one that has not costs a restart like any other, so a job whose attempts fail ends before its plan
does. Both sides follow the same plans, one after the other. Writes `benchmarks/results/restart_storm.json`.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.interleave import write_result

RESTARTS = 10
JITTER = 0.3  # seconds
TIMEOUT = 10.0  # seconds, of joining and of collectives
SIDES = ("minizero", "env")


def rank_main(side: str, seed: int, folder: Path) -> None:
    """One rank of one attempt: join, sum, leave word; then one of the ranks dies, and the others wait for their end."""
    import torch
    import torch.distributed as dist

    import minizero

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    time.sleep(random.Random(f"{seed} {attempt} {rank}").random() * JITTER)
    word = folder / f"{attempt}.{rank}"
    try:
        if side == "minizero":
            minizero.init_distributed("gloo", timeout=TIMEOUT)
        else:
            dist.init_process_group("gloo", init_method="env://", timeout=timedelta(seconds=TIMEOUT))
        total = torch.ones(4)
        dist.all_reduce(total)
        assert total.tolist() == [world] * 4
    except Exception as error:
        word.write_text(f"{type(error).__name__}: {error}"[:300])
        raise
    word.write_text("joined")
    if attempt < RESTARTS:
        while len(list(folder.glob(f"{attempt}.*"))) < world:
            time.sleep(0.01)
        if rank == random.Random(f"{seed} {attempt}").randrange(world):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    dist.destroy_process_group()


def storm(side: str, world: int, seed: int) -> dict[str, Any]:
    """How many of the restarts came up, and what the others said."""
    with tempfile.TemporaryDirectory(prefix="minizero-storm-") as name:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(world)]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--max-restarts", str(RESTARTS)]
        job = ["-m", "benchmarks.restart_storm", "--rank", side, "--seed", str(seed), "--folder", name]
        began = time.monotonic()
        done = subprocess.run(
            [*launcher, *job], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        seconds = time.monotonic() - began
        words = [[f.read_text() for f in Path(name).glob(f"{attempt}.*")] for attempt in range(RESTARTS + 1)]
    came_up = [said == ["joined"] * world for said in words]
    return {
        "side": side,
        "world": world,
        "seed": seed,
        "exit_code": done.returncode,
        "seconds": round(seconds, 1),
        "restarts": RESTARTS,
        "came_up": sum(came_up[1:]),
        "first_came_up": came_up[0],
        "said": sorted({one for said in words for one in said if one != "joined"})[:3],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--plans", type=int, default=3)
    parser.add_argument("--rank", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        return rank_main(options.rank, options.seed, options.folder)
    rows = [storm(side, world, seed) for world in options.world for seed in range(options.plans) for side in SIDES]
    totals = {side: sum(row["restarts"] - row["came_up"] for row in rows if row["side"] == side) for side in SIDES}
    for row in rows:
        print("{side:>8}, {world} ranks, plan {seed}: {came_up} of {restarts} came up in {seconds} s".format(**row))
    count = RESTARTS * len(rows) // 2
    print(f"restarts that failed: minizero {totals['minizero']} of {count}, env:// {totals['env']} of {count}")
    print("written to", write_result("restart_storm", {"failed_restarts": totals, "of": count, "storms": rows}))
    return None


if __name__ == "__main__":
    main()
