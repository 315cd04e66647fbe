"""Bytes on the wire against the ledger, and what overlap gains on a slow link.

    python -m benchmarks.wire            # as root: it makes a network namespace of its own

Inside a fresh network namespace only our two ranks talk, so its interface counters are the wire. The same namespace can
be throttled (`tc tbf`), which shows what loopback hides: communication behind computation. Slices travel as messages
here, since neighbours that read each other's memory put nothing on a wire. Writes `benchmarks/results/wire.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.interleave import Contender, interleave, mark_imported, ratio, write_result

WORLD, STEPS = 2, 5
RATES = ("1gbit", "2gbit")


def build(rank: int, world: int, *, stage: int, overlap: bool, prefetch: bool, tell: str = "") -> Any:
    """A training step of the benchmark's GPT; with `tell`, the ledger is written there after every step."""
    import minizero
    from benchmarks import workload

    minizero.init_distributed("gloo")
    mark_imported()
    config = minizero.Config(
        train={"micro_batch_size": workload.BATCH},
        zero={"stage": stage, "overlap": overlap, "prefetch": prefetch},
        optimizer={"lr": 1e-4},
        dist={"transport": "messages"},
    )
    engine, *_ = minizero.initialize(model=workload.build_model(), config=config)
    stream = workload.batches(rank)

    def step() -> None:
        engine.backward(workload.loss_of(engine, *next(stream)))
        engine.step()
        if tell:
            total = engine.ledger.total()
            Path(f"{tell}.{rank}").write_text(json.dumps({"wire": total.wire, "payload": total.payload}))

    return step


def interface_bytes() -> int:
    """Bytes that loopback of this namespace has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    raise RuntimeError("no loopback interface")


def measure_bytes(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for stage in range(4):
        tell = str(folder / f"ledger{stage}")
        contender = Contender(
            f"stage {stage}", partial(build, stage=stage, overlap=False, prefetch=True, tell=tell), WORLD
        )
        contender.start()
        contender.run(2)
        before, counted = interface_bytes(), ledger_bytes(tell)
        contender.run(STEPS)
        sent, claimed = interface_bytes() - before, ledger_bytes(tell) - counted
        contender.stop()
        rows.append({"stage": stage, "wire_bytes": sent, "ledger_bytes": claimed, "ratio": sent / claimed})
    return rows


def ledger_bytes(tell: str) -> int:
    return sum(json.loads(Path(f"{tell}.{rank}").read_text())["wire"] for rank in range(WORLD))


def measure_overlap(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for rate in ("loopback", *RATES):
        if rate != "loopback":
            subprocess.run(
                [
                    "tc",
                    "qdisc",
                    "replace",
                    "dev",
                    "lo",
                    "root",
                    "tbf",
                    "rate",
                    rate,
                    "burst",
                    "256kb",
                    "latency",
                    "400ms",
                ],
                check=True,
            )
        pairs = [
            Contender(
                f"stage {stage} {'on' if on else 'off'}", partial(build, stage=stage, overlap=on, prefetch=on), WORLD
            )
            for stage in (1, 2, 3)
            for on in (False, True)
        ]
        interleave(pairs, rounds, 2, warmup=2)
        for off, on in zip(pairs[::2], pairs[1::2], strict=True):
            rows.append(
                {
                    "link": rate,
                    "stage": int(off.name.split()[1]),
                    "off_ms": statistics.median(off.milliseconds),
                    "on_ms": statistics.median(on.milliseconds),
                    "on_over_off": ratio(on.milliseconds, off.milliseconds),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        command = [sys.executable, "-m", "benchmarks.wire", "--inside", "--rounds", str(options.rounds)]
        raise SystemExit(subprocess.run(["unshare", "--net", *command]).returncode)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    folder = Path("/tmp") / f"minizero-wire-{os.getpid()}"
    folder.mkdir()
    result = {"world": WORLD, "bytes": measure_bytes(folder), "overlap": measure_overlap(options.rounds)}
    for row in result["bytes"]:
        print(f"stage {row['stage']}: wire / ledger = {row['ratio']:.4f}")
    for row in result["overlap"]:
        r = row["on_over_off"]
        print(
            f"{row['link']:>9} stage {row['stage']}: off {row['off_ms']:.0f} ms, on {row['on_ms']:.0f} ms, "
            f"on/off {r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
        )
    print("written to", write_result("wire", result))


if __name__ == "__main__":
    main()
