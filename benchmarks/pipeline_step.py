"""Step time of pipelines against torch.distributed.pipelining and DeepSpeed: same model, same batches, interleaved.

    python -m benchmarks.pipeline_step [--worlds 2,4] [--rounds 15] [--steps 3] [--only one_f_one_b]

Eight MLP blocks 256 -> 1024 -> 256, eight microbatches of 4 x 128 vectors, fp32, SGD, one thread per rank on one host,
gloo. Schedules are compared one by one, each with the peers that have it. minizero's activations are read from the
neighbour's memory; `-tcp` rows send them over loopback, as everything of the peers is sent. Every contender first
trains three steps whose losses must be those of plain torch. Beside the times: the bubble of minizero's own timeline,
and that of its schedule simulated with the costs of the same steps. Writes `benchmarks/results/pipeline_step.json`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.interleave import Contender, interleave, mark_imported, write_result
from benchmarks.peers import start
from benchmarks.zero_step import show, summarize

WIDTH, HIDDEN, BLOCKS = 256, 1024, 8
MICROBATCHES, SAMPLES, LENGTH = 8, 4, 128
LR = 1e-3
FIRST_STEPS, PROFILED_STEPS = 3, 9


class Block(nn.Module):
    """x + down(gelu(up(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def build_blocks() -> list[Block]:
    torch.manual_seed(0)
    return [Block() for _ in range(BLOCKS)]


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets) of a whole step, microbatches behind each other along the first dim."""
    generator = torch.Generator().manual_seed(0)
    kept = [torch.randn(2, MICROBATCHES * SAMPLES, LENGTH, WIDTH, generator=generator) for _ in range(4)]
    while True:
        yield from ((both[0], both[1]) for both in kept)


def plain_losses() -> list[float]:
    """Of the first steps, in one process."""
    model, stream, losses = nn.Sequential(*build_blocks()), batches(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(FIRST_STEPS):
        inputs, targets = next(stream)
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def checked(step: Callable[[], float | None], source: int) -> Callable[[], Any]:
    """`step` after its first losses, which rank `source` has, were seen to be right."""
    losses = torch.tensor([step() or 0.0 for _ in range(FIRST_STEPS)], dtype=torch.float64)
    dist.broadcast(losses, source)
    worst = max(abs(found - wanted) / wanted for found, wanted in zip(losses.tolist(), plain_losses(), strict=True))
    assert worst < 1e-5, f"losses {losses.tolist()}, plain torch has {plain_losses()}"

    def counted() -> None:
        step()

    counted.facts = {"first_losses_off_by": worst}  # type: ignore[attr-defined]
    return counted


# ---- torch ----


def build_torch(rank: int, world: int, *, schedule: str) -> Callable[[], Any]:
    """Stages by hand and a schedule over them, as the documentation of torch.distributed.pipelining has it."""
    from torch.distributed import pipelining
    from torch.distributed.pipelining import schedules

    start(rank, world)
    mark_imported()
    kind = {
        "gpipe": schedules.ScheduleGPipe,
        "one_f_one_b": schedules.Schedule1F1B,
        "interleaved": schedules.ScheduleInterleaved1F1B,
        "zbv": schedules.ScheduleZBVZeroBubble,
        "dualpipe_v": schedules.ScheduleDualPipeV,
    }[schedule]
    chunks = 1 if schedule in ("gpipe", "one_f_one_b") else 2
    second = 2 * world - 1 - rank if schedule in ("zbv", "dualpipe_v") else world + rank
    places = [rank, second][:chunks]
    blocks, each = build_blocks(), BLOCKS // (world * chunks)
    modules = [nn.Sequential(*blocks[place * each : (place + 1) * each]) for place in places]
    device = torch.device("cpu")
    stages = [
        pipelining.PipelineStage(module, place, world * chunks, device)
        for module, place in zip(modules, places, strict=True)
    ]
    run = kind(stages[0] if chunks == 1 else stages, MICROBATCHES, loss_fn=F.mse_loss)
    optimizer = torch.optim.SGD([p for module in modules for p in module.parameters()], lr=LR)
    first, last, stream = 0 in places, world * chunks - 1 in places, batches()

    def step() -> float | None:
        inputs, targets = next(stream)
        losses: list[Tensor] = []
        run.step(*([inputs] if first else []), **({"target": targets, "losses": losses} if last else {}))
        optimizer.step()
        optimizer.zero_grad()
        return float(torch.stack(losses).mean()) if last else None

    return checked(step, 0 if schedule in ("zbv", "dualpipe_v") else world - 1)


# ---- DeepSpeed ----


def build_deepspeed(rank: int, world: int) -> Callable[[], Any]:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    torch.set_num_threads(1)
    torch.manual_seed(0)
    deepspeed.init_distributed("gloo", verbose=False)
    mark_imported()
    model = PipelineModule(build_blocks(), num_stages=world, loss_fn=F.mse_loss, partition_method="uniform")
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LR),
        config={
            "train_micro_batch_size_per_gpu": SAMPLES,
            "gradient_accumulation_steps": MICROBATCHES,
            "steps_per_print": 1000000,
            "zero_allow_untested_optimizer": True,
        },
    )
    stream = batches()
    return checked(lambda: float(engine.train_batch(iter(split(*next(stream))))), 0)


def split(inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(SAMPLES), targets.split(SAMPLES), strict=True))


# ---- minizero ----


def build_minizero(rank: int, world: int, *, schedule: str, transport: str = "auto") -> Callable[[], Any]:
    import minizero
    from minizero.parallel.pipeline.measured import profile
    from minizero.parallel.pipeline.simulate import simulate

    torch.set_num_threads(1)
    minizero.init_distributed("gloo")
    mark_imported()
    model = minizero.PipelineModule(build_blocks(), world, F.mse_loss, partition_method="uniform")
    engine, *_ = minizero.initialize(
        model=model,
        config=minizero.Config(
            pipeline={"schedule": schedule, "microbatches": MICROBATCHES},
            train={"micro_batch_size": SAMPLES, "gradient_clipping": 0.0},
            optimizer={"type": "SGD", "lr": LR},
            dist={"transport": transport},
            log={"every": 1000000},
        ),
    )
    stream = batches()
    step = checked(lambda: float(engine.train_batch(iter(split(*next(stream))))), 0)
    timelines = []
    for _ in range(PROFILED_STEPS):
        step()
        timelines.append(engine.pipeline.timeline())
    planned = simulate(engine.pipeline.schedule, profile(engine.pipeline.schedule, timelines))
    step.facts |= {  # type: ignore[attr-defined]
        "simulated_bubble": planned.bubble,
        "measured_bubble": statistics.median(timeline.bubble for timeline in timelines),
        "peak_in_flight": engine.pipeline.schedule.peak_in_flight,
        "planned": rows_of(planned),
        "measured": rows_of(timelines[-1]),
    }
    return step


def rows_of(timeline: Any) -> list[list[tuple[str, float, float]]]:
    return [[(str(event.action), event.start, event.stop) for event in row] for row in timeline.events]


def draw(result: dict[str, Any], path: Path) -> None:
    """Plan beside measurement, of the schedules that show most."""
    from minizero.parallel.pipeline.actions import Action
    from minizero.parallel.pipeline.draw import png
    from minizero.parallel.pipeline.simulate import Event, Timeline

    timelines = []
    for schedule in ("one_f_one_b", "zbv"):
        row = result.get(f"{schedule}-2", {}).get("contenders", {}).get(f"minizero-{schedule}", {})
        for name in ("planned", "measured") if row else ():
            events = tuple(tuple(Event(Action.parse(a), 1e3 * b, 1e3 * e) for a, b, e in rank) for rank in row[name])
            timelines.append(Timeline(f"{schedule}, {name}, ms", events))
    if timelines:
        png(path, *timelines)


OURS_ALONE = ("zb_h1", "zb_h2")
SHARED = ("gpipe", "one_f_one_b", "interleaved", "zbv", "dualpipe_v")


def group(schedule: str) -> tuple[dict[str, Any], list[tuple[str, str, float]]]:
    """What runs beside one another, and the bars: (ours, peer, largest ratio of step times)."""
    ours = {f"minizero-{schedule}": partial(build_minizero, schedule=schedule)}
    if schedule in OURS_ALONE:
        return ours | {"minizero-one_f_one_b": partial(build_minizero, schedule="one_f_one_b")}, []
    ours[f"minizero-{schedule}-tcp"] = partial(build_minizero, schedule=schedule, transport="messages")
    everyone = ours | {f"torch-{schedule}": partial(build_torch, schedule=schedule)}
    bars = [(name, f"torch-{schedule}", 1.0) for name in ours]
    if schedule == "one_f_one_b":
        everyone["deepspeed"] = build_deepspeed
        bars += [(name, "deepspeed", 0.9) for name in ours]
    return everyone, bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="2,4")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--steps", type=int, default=3, help="steps per round and contender; their median counts")
    parser.add_argument("--only", default=",".join((*SHARED, *OURS_ALONE)), help="comma-separated schedules")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    for world in map(int, options.worlds.split(",")):
        for schedule in options.only.split(","):
            builds, bars = group(schedule)
            contenders = [Contender(name, build, world) for name, build in builds.items()]
            print(f"---- {schedule}, {world} ranks")
            interleave(contenders, options.rounds, options.steps)
            found = summarize({c.name: c for c in contenders}, options.rounds, bars) | {"world": world}
            for contender in contenders:
                found["contenders"][contender.name] |= contender.facts
            show(found)
            for name, row in found["contenders"].items():
                if "measured_bubble" in row:
                    print(f"{name}: bubble {row['measured_bubble']:.3f}, simulated {row['simulated_bubble']:.3f}")
            result[f"{schedule}-{world}"] = found
    if not options.no_write:
        path = write_result("pipeline_step", result)
        draw(result, path.with_name("pipeline_measured.png"))
        print("written to", path)


if __name__ == "__main__":
    main()
