"""What becomes of a flipped bit: the same state saved by minizero and by torch's DCP, one bit changed, loaded again.

    python -m benchmarks.damage [--flips 300]

A load may raise an error, give back what was saved (the bit did not matter: padding), or give back something else and
say nothing. Bits are drawn over all files of a checkpoint, in proportion to their sizes. One process. Writes
`benchmarks/results/damage.json`.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

import minizero
from benchmarks.interleave import write_result

WIDTH = 48
State = dict[str, Tensor]


def engine() -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 1))
    config = minizero.Config(train={"micro_batch_size": 4}, zero={"stage": 1}, optimizer={"lr": 1e-2})
    made, *_ = minizero.initialize(model=model, config=config)
    step(made)
    return made


def step(made: Any) -> None:
    made.backward(made(torch.ones(4, WIDTH)).mean())
    made.step()


def state_of(made: Any) -> State:
    """Weights and moments, by name and kind."""
    found: State = {}
    for number, (piece, *_) in enumerate(made.optimizer.slices):
        found[f"{number}/master"] = piece.detach().clone()
        found |= {f"{number}/{key}": value.clone() for key, value in made.optimizer.state[piece].items()}
    return found


def minizero_side(folder: Path) -> tuple[State, Callable[[], State]]:
    made = engine()
    saved = state_of(made)
    made.save_checkpoint(folder, tag="one")
    step(made)  # what is loaded must come from the file

    def load() -> State:
        made.load_checkpoint(folder, tag="one")
        return state_of(made)

    return saved, load


def dcp_side(folder: Path) -> tuple[State, Callable[[], State]]:
    saved = state_of(engine())
    dcp.save(dict(saved), checkpoint_id=folder / "one", no_dist=True)

    def load() -> State:
        found = {key: torch.zeros_like(value) for key, value in saved.items()}
        dcp.load(found, checkpoint_id=folder / "one", no_dist=True)
        return found

    return saved, load


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def outcome(load: Callable[[], State], saved: State) -> str:
    try:
        found = load()
    except KeyboardInterrupt:
        raise
    except BaseException:  # DCP's is no Exception
        return "error"
    same = found.keys() == saved.keys() and all(torch.equal(found[key], saved[key]) for key in saved)
    return "harmless" if same else "silently wrong"


def campaign(side: Callable[[Path], tuple[State, Callable[[], State]]], flips: int) -> dict[str, int]:
    folder = Path(tempfile.mkdtemp())
    saved, load = side(folder)
    assert outcome(load, saved) == "harmless"
    files = sorted(path for path in (folder / "one").rglob("*") if path.is_file())
    chance, counts = random.Random(0), Counter({"error": 0, "harmless": 0, "silently wrong": 0})
    for _ in range(flips):
        file = chance.choices(files, weights=[path.stat().st_size for path in files])[0]
        bit = chance.randrange(8 * file.stat().st_size)
        flip(file, bit)
        counts[outcome(load, saved)] += 1
        flip(file, bit)
    shutil.rmtree(folder)
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    minizero.init_distributed("gloo")
    result = {name: campaign(side, options.flips) for name, side in (("minizero", minizero_side), ("dcp", dcp_side))}
    for name, counts in result.items():
        print(f"{name:10} of {options.flips} flipped bits: {', '.join(f'{n} {what}' for what, n in counts.items())}")
    if not options.no_write:
        print("written to", write_result("damage", {"flips": options.flips, **result}))


if __name__ == "__main__":
    main()
