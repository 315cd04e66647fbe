"""Saving and loading 1 GB of training state on two ranks: minizero, torch's DCP over FSDP2, DeepSpeed; interleaved.

    python -m benchmarks.checkpoint_io [--rounds 9] [--folder DIR]

84 M parameters in fp32 with AdamW's two moments, sharded whole (stage 3, FSDP2). minizero takes a checksum of every
byte and syncs every file; DCP syncs files; DeepSpeed does neither. Loading is from a checkpoint of its own kind, which
minizero reads twice: to verify it, and to use it.

    stall    how long training waits for a save in the background: for the call, and where copies are taken later, for
             them. A training step of `ROWS` rows a rank follows each, and competes with the save for two cores.
    through  a save in the background and that step, from the call to the end of the step. step: the step alone.
    more     the peak of a process beyond its own before its first save or load.

Saves take turns with one another, then steps, then loads. Writes `benchmarks/results/checkpoint_io.json`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.interleave import Contender, interleave, mark_imported, ratio, write_result
from benchmarks.peers import ADAMW, deepspeed_json, start

WORLD, WIDTH, DEPTH = 2, 2048, 20
ROWS = 256  # of a rank, in a step
BARS = [  # (ours, peer, largest ratio)
    ("minizero save", "dcp save", 1.0),
    ("minizero stall", "minizero save", 0.1),
    ("minizero load", "dcp load", None),
    ("minizero stall", "dcp stall", None),
    ("minizero through", "dcp through", None),
    ("minizero through", "minizero step", None),
    ("minizero save", "deepspeed save", None),
    ("minizero load", "deepspeed load", None),
]


class Job:
    """What a contender does once a round, in a folder of its own.

    Args:
        save, load: to and from a path; what `save` returns is called before the next one, to wait for it.
        train: forward and backward. step: the update.

    Attributes:
        before: what is not timed. seconds: of a stall; None where the whole call is timed.
    """

    def __init__(self, folder: str, name: str, act: str, save: Any, load: Any, train: Any, step: Any) -> None:
        self.folder, self.act, self.save, self.load = Path(folder) / f"{name} {act}", act, save, load
        self.train, self.step = train, step
        self.count, self.seconds, self.pending = 0, None, None
        for _ in range(4):  # a step's peak grows for a while, as freed memory is not returned
            self.train()
            self.step()
        if act == "load":
            self.save(str(self.folder / "kept"))

    def before(self) -> None:
        """Finish what runs in the background, and remove what was saved."""
        if self.pending is not None:
            self.pending()
        dist.barrier()
        if dist.get_rank() == 0 and self.act != "load":
            shutil.rmtree(self.folder, ignore_errors=True)
        dist.barrier()

    def __call__(self) -> None:
        self.count += 1
        began = time.perf_counter()
        if self.act == "load":
            self.load(str(self.folder / "kept"))
        elif self.act != "step":
            self.pending = self.save(str(self.folder / str(self.count)))
        if self.act == "stall":
            self.seconds = time.perf_counter() - began
        if self.act in ("stall", "through", "step"):
            self.train()
            self.step()


def model() -> nn.Module:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)])


def build_minizero(rank: int, world: int, *, folder: str, act: str) -> Job:
    import minizero
    from minizero.config.load import from_any

    torch.set_num_threads(1)
    minizero.init_distributed("gloo")
    mark_imported()
    config = from_any(deepspeed_json(3) | {"optimizer": ADAMW})
    config.checkpoint.asynchronous = act in ("stall", "through")
    engine, *_ = minizero.initialize(model=model(), config=config)

    def save(path: str) -> Callable[[], None]:
        engine.save_checkpoint(path, tag="state")
        return engine.wait_for_checkpoint

    def train() -> None:
        engine.backward(engine(torch.ones(ROWS, WIDTH)).mean())

    load = partial(engine.load_checkpoint, tag="state")
    job = Job(folder, "minizero", act, save, load, train, engine.step)
    if act == "stall":
        copies = engine._background.give_back

        def timed() -> None:
            began = time.perf_counter()
            copies()
            job.seconds += time.perf_counter() - began

        engine._background.give_back = timed
    return job


def build_dcp(rank: int, world: int, *, folder: str, act: str) -> Job:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    start(rank, world)
    mark_imported()
    net = model()
    mesh = init_device_mesh("cpu", (world,))
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    apart = dist.new_group(backend="gloo")

    def save(path: str) -> Callable[[], None] | None:
        weights, moments = get_state_dict(net, optimizer)
        state = {"model": weights, "optimizer": moments}
        if act in ("stall", "through"):
            return dcp.async_save(state, checkpoint_id=path, process_group=apart).result
        dcp.save(state, checkpoint_id=path)
        return None

    def load(path: str) -> None:
        weights, moments = get_state_dict(net, optimizer)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=path)
        set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def train() -> None:
        net(torch.ones(ROWS, WIDTH)).mean().backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Job(folder, "dcp", act, save, load, train, step)


def build_deepspeed(rank: int, world: int, *, folder: str, act: str) -> Job:
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    mark_imported()
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), **ADAMW["params"], fused=True)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=deepspeed_json(3))

    def save(path: str) -> None:
        engine.save_checkpoint(path, tag="state")

    def train() -> None:
        engine.backward(engine(torch.ones(ROWS, WIDTH)).mean())

    load = partial(engine.load_checkpoint, tag="state")
    return Job(folder, "deepspeed", act, save, load, train, engine.step)


BUILDS = {"minizero": build_minizero, "dcp": build_dcp, "deepspeed": build_deepspeed}
TURNS = [  # those that are compared run side by side; all of them together would not fit into 24 GiB
    ["minizero save", "dcp save", "deepspeed save", "minizero stall", "dcp stall"],
    ["minizero through", "minizero step", "dcp through"],
    ["minizero load", "dcp load", "deepspeed load"],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds, of one save or load each")
    parser.add_argument("--folder", default=None, help="on the disk that is to be measured (default: a temporary one)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    folder = tempfile.mkdtemp(dir=options.folder)
    contenders = []
    try:
        for names in TURNS:
            turn = [
                Contender(name, partial(BUILDS[name.split()[0]], folder=folder, act=name.split()[1]), WORLD)
                for name in names
            ]
            interleave(turn, options.rounds, 1, warmup=1)
            contenders += turn
        result = summarize({c.name: c for c in contenders}, folder) | {"rounds": options.rounds, "world": WORLD}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, row in result["contenders"].items():
        size = f"  {row['bytes'] / 1e6:7.1f} MB" if row["bytes"] else ""
        print(f"{name:16} {row['median_ms']:8.1f} ms  [{row['min_ms']:.1f}, {row['max_ms']:.1f}]  "
              f"peak {row['peak_mib']:.0f} MiB, {row['more_mib']:.0f} more{size}")  # fmt: skip
    for bar in result["bars"]:
        limit = f"limit {bar['limit']}: {'held' if bar['held'] else 'MISSED'}" if bar["limit"] else ""
        print(f"{bar['ours']:16} / {bar['peer']:16} {bar['median']:.3f} [{bar['low']:.3f}, {bar['high']:.3f}]  {limit}")
    if not options.no_write:
        print("written to", write_result("checkpoint_io", result))


def summarize(contenders: dict[str, Contender], folder: str) -> dict[str, Any]:
    rows = {
        name: {
            "median_ms": statistics.median(c.milliseconds),
            "min_ms": min(c.milliseconds),
            "max_ms": max(c.milliseconds),
            "peak_mib": c.peak_bytes / 2**20,
            "more_mib": c.more_bytes / 2**20,
            "bytes": sum(path.stat().st_size for path in (Path(folder) / name).rglob("*") if path.is_file()),
            "milliseconds": c.milliseconds,
        }
        for name, c in contenders.items()
    }
    bars = []
    for ours, peer, limit in BARS:
        measured = ratio(contenders[ours].milliseconds, contenders[peer].milliseconds)
        bars.append(
            {"ours": ours, "peer": peer, "limit": limit, **measured, "held": not limit or measured["low"] <= limit}
        )
    return {"contenders": rows, "bars": bars}


if __name__ == "__main__":
    main()
