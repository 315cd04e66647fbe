"""What recompute saves and what it costs: a Llama's forward and backward in every mode, beside torch's and DeepSpeed's.

    python -m benchmarks.recompute_step [--rounds 11] [--steps 2]

fp32, two ranks with one thread each, gloo. Three groups, each interleaved and compared within itself; ranks of the
first two compute alike and without communication, those of the third are tensor parallel:

    fused   torch's fused attention:  4 layers of 512, 8 heads,  batch 2 x 512 tokens
    eager   materialised attention:   1 layer of 2048, 64 heads, batch 1 x 1024 tokens
    tp      as `fused`, over two tensor-parallel ranks

Bytes are those that autograd keeps for backward, counted once per storage, parameters not counted. Writes
`benchmarks/results/recompute_step.json` and `recompute_pareto.png`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.interleave import Contender, interleave, mark_imported, ratio, write_result
from benchmarks.peers import start

WORLD, VOCAB = 2, 512
SHAPES: dict[str, dict[str, int]] = {
    "fused": {"layers": 4, "hidden": 512, "heads": 8, "batch": 2, "length": 512},
    "eager": {"layers": 1, "hidden": 2048, "heads": 64, "batch": 1, "length": 1024},
}
SHAPES["tp"] = SHAPES["fused"]
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"mode": "selective"},
    "half": {"mode": "full", "every": 2},
    "full": {"mode": "full"},
    "partitioned": {"mode": "full", "partition_activations": True},
}
PLACES = {  # of labels that would lie on one another
    "fused-torch": (-4, 8),
    "fused-deepspeed": (-30, -14),
    "fused-full": (-18, 8),
    "tp-full": (-10, 8),
    "tp-partitioned": (-14, 14),
    "tp-sp-full": (-30, -14),
}
BARS = [
    ("fused-full", "fused-torch", 1.0),
    ("fused-full", "fused-deepspeed", 1.0),
    ("eager-selective", "eager-none", 1.08),
]


def build_model(group: str) -> nn.Module:
    from minizero.config.schema import ModelConfig
    from minizero.models import build

    torch.manual_seed(0)
    shape = SHAPES[group]
    config = ModelConfig(
        hidden_size=shape["hidden"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        attention="eager" if group == "eager" else "fused",
    )
    return build(config, VOCAB, shape["length"])


def stepper(model: nn.Module, group: str, counted: bool = True) -> Callable[[], None]:
    """One forward and backward; `facts` on it hold what the forward keeps, where it is `counted`."""
    from minizero.parallel.activation_memory import SavedBytes

    shape = SHAPES[group]
    tokens = torch.randint(VOCAB, (shape["batch"], shape["length"]), generator=torch.Generator().manual_seed(0))

    def forward() -> Tensor:
        loss, count = model(tokens, tokens)
        return loss / count

    def step() -> None:
        forward().backward()
        model.zero_grad()

    with SavedBytes(without=model.parameters()) as saved:
        forward()
    step.facts = {"saved_bytes": saved.total if counted else None}  # type: ignore[attr-defined]
    return step


def build_minizero(rank: int, world: int, *, group: str, mode: str, sequence: bool = False) -> Callable[[], None]:
    from minizero.config import Config
    from minizero.dist.collectives import Communicator
    from minizero.dist.dims import ParallelDims
    from minizero.dist.ledger import CommLedger
    from minizero.dist.mesh import build_mesh
    from minizero.parallelize import parallelize
    from minizero.utils.forward import ForwardEntry

    start(rank, world)
    mark_imported()
    tp = world if group == "tp" else 1
    config = Config(parallel={"tp": tp, "sequence": sequence}, recompute=MODES[mode])
    model = build_model(group)
    data = Communicator(build_mesh(ParallelDims(world, tp=tp)), "dp", CommLedger())
    parallel = parallelize(model, config, data, torch.device("cpu"))
    ForwardEntry(model, recompute=parallel.recompute)
    return stepper(model, group)


def build_peer(rank: int, world: int, *, group: str, peer: str) -> Callable[[], None]:
    """The same blocks through another system's checkpoint function, as its documentation calls it."""
    start(rank, world)
    if peer == "torch":
        from torch.utils.checkpoint import checkpoint

        run: Any = partial(checkpoint, use_reentrant=False)
    else:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
        deepspeed.checkpointing.configure(None, partition_activations=False)
        run = deepspeed.checkpointing.checkpoint
    mark_imported()
    model = build_model(group)
    for block in model.model.layers:  # type: ignore[union-attr]
        block.forward = partial(checkpointed, run, block.forward)
    return stepper(model, group, counted=False)  # what peers keep is not all seen by autograd's hooks


def checkpointed(run: Any, forward: Any, x_BSH: Tensor, rope: Any, documents: Any = None) -> Tensor:
    """A layer's forward, with its tensors one by one: DeepSpeed looks into no tuples."""
    return run(lambda x, cos, sin: forward(x, (cos, sin), documents), x_BSH, *rope)


def contenders() -> dict[str, Callable[[int, int], Callable[[], Any]]]:
    found: dict[str, Callable[[int, int], Callable[[], Any]]] = {}
    for group, modes in (("fused", ("none", "selective", "half", "full")), ("eager", ("none", "selective", "full"))):
        for mode in modes:
            found[f"{group}-{mode}"] = partial(build_minizero, group=group, mode=mode)
    for peer in ("torch", "deepspeed"):
        found[f"fused-{peer}"] = partial(build_peer, group="fused", peer=peer)
    for mode in ("none", "selective", "full", "partitioned"):
        found[f"tp-{mode}"] = partial(build_minizero, group="tp", mode=mode)
    found["tp-sp"] = partial(build_minizero, group="tp", mode="none", sequence=True)
    found["tp-sp-full"] = partial(build_minizero, group="tp", mode="full", sequence=True)
    return found


def summarize(by_name: dict[str, Contender], rounds: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, contender in by_name.items():
        baseline = by_name[f"{name.partition('-')[0]}-none"]
        kept = contender.facts["saved_bytes"]
        rows[name] = {
            "milliseconds": statistics.median(contender.milliseconds),
            "all_milliseconds": contender.milliseconds,
            "saved_bytes": kept,
            "saved_to_none": None if kept is None else kept / baseline.facts["saved_bytes"],
            "time_to_none": ratio(contender.milliseconds, baseline.milliseconds),
            "peak_bytes": contender.peak_bytes,
        }
    bars = [
        {"ours": ours, "theirs": theirs, "bar": bar, **ratio(by_name[ours].milliseconds, by_name[theirs].milliseconds)}
        for ours, theirs, bar in BARS
    ]
    return {"rounds": rounds, "shapes": SHAPES, "contenders": rows, "ratios": bars}


def draw(result: dict[str, Any], path: Path) -> None:
    """Memory against time, each relative to keeping everything; one panel per group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SHAPES), figsize=(12, 3.6), sharey=True)
    for axis, group in zip(axes, SHAPES, strict=True):
        for name, row in result["contenders"].items():
            of_group, _, mode = name.partition("-")
            if of_group == group:
                time = row["time_to_none"]
                spread = [[max(0.0, time["median"] - time["low"])], [max(0.0, time["high"] - time["median"])]]
                peer = row["saved_to_none"] is None
                height = result["contenders"][f"{group}-full"]["saved_to_none"] if peer else row["saved_to_none"]
                color = "tab:orange" if peer else "tab:blue"
                axis.errorbar(time["median"], height, xerr=spread, fmt="s" if peer else "o", color=color)
                place = PLACES.get(name, (5, 4))
                axis.annotate(mode, (time["median"], height), xytext=place, textcoords="offset points")
        axis.set_title(group)
        axis.set_xlabel("time / none")
        axis.grid(alpha=0.3)
        axis.set_ylim(0, 1.1)
    axes[0].set_ylabel("bytes kept for backward / none")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=2, help="steps per round and contender; their median counts")
    options = parser.parse_args()
    by_name = {name: Contender(name, build, WORLD) for name, build in contenders().items()}
    for group in SHAPES:  # one after the other: together they would not fit into memory
        interleave([c for name, c in by_name.items() if name.startswith(f"{group}-")], options.rounds, options.steps, 1)
    result = summarize(by_name, options.rounds)
    for name, row in result["contenders"].items():
        time, kept = row["time_to_none"], row["saved_bytes"]
        bytes_shown = f"{kept / 2**20:7.1f} MiB kept  {row['saved_to_none']:.2f} x" if kept is not None else ""
        spread = f"[{time['low']:.3f}, {time['high']:.3f}]"
        print(f"{name:18} {row['milliseconds']:7.0f} ms  {time['median']:.3f} {spread} x time  {bytes_shown}")
    for row in result["ratios"]:
        spread = f"[{row['low']:.3f}, {row['high']:.3f}]"
        print(f"{row['ours']} / {row['theirs']}: {row['median']:.3f} {spread}, bar {row['bar']}")
    path = write_result("recompute_step", result)
    draw(result, path.with_name("recompute_pareto.png"))
    print("written to", path)


if __name__ == "__main__":
    main()
