"""Step time and peak memory of ZeRO 0-3 against DDP, FSDP2 and DeepSpeed: same model, same batches, interleaved.

    python -m benchmarks.zero_step [--rounds 15] [--steps 3] [--only minizero-1,deepspeed-1]

Two ranks with one thread each on one host, gloo. By default minizero's slices are then read from the neighbour's
memory; the `-tcp` rows send them as messages over loopback, as everything of the peers is sent. Writes
`benchmarks/results/zero_step.json`.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

from benchmarks import peers
from benchmarks.interleave import Contender, interleave, ratio, write_result

WORLD = 2
CONTENDERS = {
    "compute": peers.build_compute,
    "ddp": peers.build_ddp,
    "fsdp2-keep": partial(peers.build_fsdp2, reshard=False),
    "fsdp2-reshard": partial(peers.build_fsdp2, reshard=True),
    **{f"deepspeed-{stage}": partial(peers.build_deepspeed, stage=stage) for stage in range(4)},
    **{f"minizero-{stage}": partial(peers.build_minizero, stage=stage) for stage in range(4)},
    **{f"minizero-{stage}-tcp": partial(peers.build_minizero, stage=stage, transport="messages") for stage in range(4)},
}
BARS = [  # (ours, peer, largest ratio of step times)
    ("minizero-0", "ddp", 0.95),
    ("minizero-1", "deepspeed-1", 0.65),
    ("minizero-2", "deepspeed-2", 0.65),
    ("minizero-3", "deepspeed-3", 0.60),
    ("minizero-3", "fsdp2-reshard", 0.70),
]
BARS += [(f"{ours}-tcp", peer, limit) for ours, peer, limit in BARS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--steps", type=int, default=3, help="steps per round and contender; their median counts")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="comma-separated contenders")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    contenders = [Contender(name, CONTENDERS[name], WORLD) for name in options.only.split(",")]
    interleave(contenders, options.rounds, options.steps)
    result = summarize({c.name: c for c in contenders}, options.rounds, BARS)
    show(result)
    if not options.no_write:
        print("written to", write_result("zero_step", result))


def summarize(contenders: dict[str, Contender], rounds: int, wanted: list[tuple[str, str, float]]) -> dict[str, Any]:
    rows = {
        name: {
            "median_ms": statistics.median(c.milliseconds),
            "min_ms": min(c.milliseconds),
            "max_ms": max(c.milliseconds),
            "peak_mib": c.peak_bytes / 2**20,
            "milliseconds": c.milliseconds,
        }
        for name, c in contenders.items()
    }
    bars = []
    for ours, peer, limit in wanted:
        if ours in contenders and peer in contenders:
            measured = ratio(contenders[ours].milliseconds, contenders[peer].milliseconds)
            memory = contenders[ours].peak_bytes / contenders[peer].peak_bytes
            held = {"held": measured["low"] <= limit, "median_held": measured["median"] <= limit}
            bars.append({"ours": ours, "peer": peer, "limit": limit, **measured, **held, "memory": memory})
    return {"rounds": rounds, "world": WORLD, "contenders": rows, "bars": bars}


def show(result: dict[str, Any]) -> None:
    for name, row in result["contenders"].items():
        print(
            f"{name:15} {row['median_ms']:7.1f} ms  [{row['min_ms']:.1f}, {row['max_ms']:.1f}]"
            f"  peak {row['peak_mib']:.0f} MiB"
        )
    for bar in result["bars"]:
        verdict = "held" if bar["median_held"] else "reached by the interval" if bar["held"] else "MISSED"
        print(
            f"{bar['ours']} / {bar['peer']}: {bar['median']:.3f} [{bar['low']:.3f}, {bar['high']:.3f}] "
            f"(bar {bar['limit']}: {verdict}), memory {bar['memory']:.2f}"
        )


if __name__ == "__main__":
    main()
