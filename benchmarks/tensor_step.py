"""Forward and backward of tensor-parallel MLPs against torch's DTensor, and against the local share of the work alone.

    python -m benchmarks.tensor_step [--rounds 15] [--steps 5]

Four blocks 512 -> 2048 -> 512 on 512 tokens, fp32, two ranks with one thread each on one host, gloo. The rows with `sp`
shard the sequence between blocks. Slices of minizero are read from the neighbour's memory; `-tcp` rows send them over
loopback, as everything of DTensor is sent. Writes `benchmarks/results/tensor_step.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.interleave import Contender, interleave, mark_imported, write_result
from benchmarks.peers import start
from benchmarks.zero_step import show, summarize

WORLD, WIDTH, HIDDEN, DEPTH, TOKENS = 2, 512, 2048, 4, 512


class MLP(nn.Module):
    """norm, up, gelu, down, residual."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden, bias=False), nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return x_BSH + self.down(F.gelu(self.up(self.norm(x_BSH))))


def build_model(hidden: int = HIDDEN) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(MLP(hidden) for _ in range(DEPTH)))


def stepper(model: nn.Module, x_BSH: Tensor) -> Callable[[], None]:
    from minizero.utils.forward import Forward, forward_of

    def step() -> None:
        with forward_of(Forward(length=TOKENS)):
            model(x_BSH).square().mean().backward()
        model.zero_grad()

    return step


def inputs(tokens: int = TOKENS) -> Tensor:
    return torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()


def build_compute(rank: int, world: int) -> Callable[[], None]:
    """A rank's share of the products, without any communication."""
    start(rank, world)
    mark_imported()
    return stepper(build_model(HIDDEN // world), inputs())


def build_dtensor(rank: int, world: int, *, sequence: bool) -> Callable[[], None]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    start(rank, world)
    mark_imported()
    mesh = init_device_mesh("cpu", (world,))
    if sequence:
        plan: Any = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
    else:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = build_model()
    for block in model:
        parallelize_module(block, mesh, plan)
    return stepper(model, inputs(TOKENS // world if sequence else TOKENS))


def build_minizero(rank: int, world: int, *, sequence: bool, transport: str = "auto") -> Callable[[], None]:
    from minizero.dist.collectives import Communicator
    from minizero.dist.dims import ParallelDims
    from minizero.dist.ledger import CommLedger
    from minizero.dist.mesh import build_mesh
    from minizero.parallel.plan import apply_plan
    from minizero.parallel.tensor import TensorAxis

    start(rank, world)
    mark_imported()
    comm = Communicator(build_mesh(ParallelDims(world, tp=world)), "tp", CommLedger(), transport=transport)
    model = build_model()
    apply_plan(model, {"*.up": "colwise", "*.down": "rowwise", "*.norm": "sequence"}, TensorAxis(comm, sequence))
    return stepper(model, inputs(TOKENS // world if sequence else TOKENS))


CONTENDERS: dict[str, Callable[[int, int], Callable[[], Any]]] = {
    "compute": build_compute,
    "dtensor-tp": partial(build_dtensor, sequence=False),
    "dtensor-sp": partial(build_dtensor, sequence=True),
    "minizero-tp": partial(build_minizero, sequence=False),
    "minizero-sp": partial(build_minizero, sequence=True),
    "minizero-tp-tcp": partial(build_minizero, sequence=False, transport="messages"),
    "minizero-sp-tcp": partial(build_minizero, sequence=True, transport="messages"),
}
BARS = [(f"minizero-{kind}{way}", f"dtensor-{kind}", 0.90) for way in ("", "-tcp") for kind in ("tp", "sp")]
BARS += [("minizero-tp", "compute", 1.2), ("minizero-sp", "compute", 1.2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="steps per round and contender; their median counts")
    options = parser.parse_args()
    contenders = [Contender(name, build, WORLD) for name, build in CONTENDERS.items()]
    interleave(contenders, options.rounds, options.steps)
    result = summarize({c.name: c for c in contenders}, options.rounds, BARS)
    show(result)
    print("written to", write_result("tensor_step", result))


if __name__ == "__main__":
    main()
