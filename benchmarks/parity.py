"""Correctness as numbers: parity, bitwise stages, payload bytes and state bytes against their closed forms.

    python -m benchmarks.parity

The tests assert the same things; this prints them, and writes `benchmarks/results/parity.json`. The model is the tests'
toy: odd sizes, tied head, clipping, AdamW; the reference is torch alone in one process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.interleave import write_result
from minizero.dist.sharding import FlatLayout
from minizero.zero.units import ROOT, find_units

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from harness import POOL, run_distributed
from toys import make, train_plainly
from training import relative_error, train

STAGES = range(4)


def parity(steps: int = 20) -> list[dict[str, Any]]:
    """Worst relative error of losses and grad norms over 20 steps."""
    losses, norms, _ = train_plainly("toy", steps)
    rows = []
    for world in (1, 2, 4):
        for accumulation in (1, 2, 4):
            for stage in STAGES:
                report = run_distributed(train, world, "toy", stage, steps, accumulation)[0]
                errors = relative_error(report.losses, losses), relative_error(report.norms, norms)
                row = {"world": world, "accumulation": accumulation, "stage": stage}
                rows.append({**row, "loss_error": errors[0], "norm_error": errors[1], "bar": 1e-6})
    return rows


def bitwise(steps: int = 50) -> list[dict[str, Any]]:
    """Whether stages 1 to 3 repeat stage 0 bit by bit: losses, norms and final weights."""
    rows = []
    for precision in ("fp32", "bf16", "fp16"):
        for world in (2, 4):
            for accumulation, where in ((1, "auto"), (4, "sharded"), (4, "local")):
                runs = [
                    run_distributed(
                        train,
                        world,
                        "toy",
                        stage,
                        steps,
                        accumulation,
                        precision=precision,
                        zero={"stage": stage, "accumulation": where},
                    )[0]
                    for stage in STAGES
                ]
                equal = [
                    str((r.losses, r.norms)) == str((runs[0].losses, runs[0].norms))
                    and all(torch.equal(r.weights[k], v) for k, v in runs[0].weights.items())
                    for r in runs
                ]
                row = {"precision": precision, "world": world, "accumulation": accumulation, "where": where}
                rows.append({**row, "steps": steps, "bitwise": all(equal)})
    return rows


def counting() -> list[dict[str, Any]]:
    """Payload per step and state bytes per rank: counted, and by formula (padding included)."""
    rows = []
    for world in (2, 4, 8):
        layouts = {
            u.name: FlatLayout(tuple(p.numel() for p in u.parameters.values()), world) for u in find_units(make("toy"))
        }
        psi = 4 * sum(layout.padded_size for layout in layouts.values())
        root = 4 * layouts[ROOT].padded_size
        formula = {0: 2 * psi, 1: 2 * psi, 2: 2 * psi, 3: 3 * psi - root}
        for stage in STAGES:
            reports = run_distributed(train, world, "toy", stage, 1)
            report, elements = reports[0], sum(p.numel() for p in make("toy").parameters())
            held = sum(r.memory[kind] for r in reports for kind in ("parameters", "masters", "optimizer"))
            moments = 8 * elements * (1 if stage else world)
            sent = sum(
                c.payload for (_, op, _, _), c in report.counts.items() if op in ("all_gather", "reduce_scatter")
            )
            rows.append(
                {
                    "world": world,
                    "stage": stage,
                    "payload_bytes": sent,
                    "payload_formula": formula[stage],
                    "parameter_bytes": report.memory["parameters"],
                    "parameter_formula": psi // world if stage == 3 else psi,
                    "state_bytes_of_all_ranks": held,
                    "state_formula": (psi if stage == 3 else world * psi) + moments,
                }
            )
    return rows


def main() -> None:
    result = {"parity": parity(), "bitwise": bitwise(), "counting": counting()}
    for pool in POOL:
        pool.close()
    worst = max(max(row["loss_error"], row["norm_error"]) for row in result["parity"])
    print(f"parity with one process: {len(result['parity'])} cells, worst relative error {worst:.1e} (bar 1e-6)")
    print(f"stages bitwise equal: {sum(row['bitwise'] for row in result['bitwise'])} of {len(result['bitwise'])} cells")
    exact = [
        row["payload_bytes"] == row["payload_formula"]
        and row["parameter_bytes"] == row["parameter_formula"]
        and row["state_bytes_of_all_ranks"] == row["state_formula"]
        for row in result["counting"]
    ]
    print(f"payload, parameter and model-state bytes equal the formula: {sum(exact)} of {len(exact)} cells")
    print("written to", write_result("parity", result))


if __name__ == "__main__":
    main()
