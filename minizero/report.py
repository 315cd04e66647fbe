"""What a finished run is worth: held-out bits per byte beside compressors, a sample, a figure, and what to try next."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minizero.config import Config
from minizero.data.loader import EvaluationLoader
from minizero.data.prepared import PreparedData
from minizero.dist.together import everyone
from minizero.engine import Engine
from minizero.observe.figures import draw_loss_curve
from minizero.observe.metrics import read_metrics
from minizero.observe.summary import RunSummary, compressed_bits_per_byte, print_summary
from minizero.parallel.pipeline import measured
from minizero.parallel.pipeline.actions import Schedule
from minizero.parallel.pipeline.draw import save
from minizero.parallel.pipeline.simulate import Timeline
from minizero.utils.files import write_atomically
from minizero.zero import unsharded

PROMPT, SAMPLE_TOKENS, TEMPERATURE = "import ", 80, 0.7


def bits_per_byte(engine: Engine, data: PreparedData, config: Config) -> float:
    """Bits that the model needs per byte of the held-out files; collective."""
    batches = EvaluationLoader(
        data.validation,
        sequence_length=config.train.sequence_length,
        batch_size=8,
        stride=config.train.sequence_length // 2,
        dp_rank=engine.dp_rank,
        dp_size=engine.dp_size,
    )
    nats, _ = engine.evaluate(batches)
    return float(nats) / math.log(2) / data.validation.num_bytes


@torch.no_grad()
def complete(engine: Engine, data: PreparedData, config: Config) -> str:
    """A sampled continuation of PROMPT; every rank computes the same one."""
    generator = torch.Generator().manual_seed(config.train.seed)
    tokens = data.tokenizer.encode(PROMPT)
    length, shortest = len(tokens), config.parallel.cp * config.parallel.tp  # a token for every rank
    engine.eval()
    with unsharded(engine.module):
        for _ in range(SAMPLE_TOKENS):
            given = tokens[-config.train.sequence_length :]
            padding = [0] * max(0, shortest - len(given))  # behind what is asked for, which it does not change
            context = torch.tensor([given + padding], device=engine.device)
            logits = last_logits(engine, context, len(given) - 1, data.tokenizer.vocab_size)
            tokens.append(int(torch.multinomial((logits / TEMPERATURE).softmax(0), 1, generator=generator)))
    return data.tokenizer.decode(tokens[length:])


def last_logits(engine: Engine, tokens: Tensor, place: int, vocab_size: int) -> Tensor:
    """What the model says of the token after `place`: fp32 (vocab_size,), on the host, the same on every rank.

    A pretrained model may have more rows than there are tokens; they are left out.
    """
    outputs = engine.infer([{"input_ids": tokens}])
    row = outputs[0][0, place, :vocab_size].float() if outputs else torch.zeros(vocab_size, device=engine.device)
    return (row if engine.pipeline is None else engine.pipeline.from_last(row.contiguous(), "logits")).cpu()


def report(
    engine: Engine, data: PreparedData, config: Config, folder: Path, chief: bool, started: int, seconds: float
) -> None:
    """Evaluate, sample, draw, and print what a person wants to know at the end; collective.

    Compressing a large corpus takes the first rank some time. The others stay: a node without ranks counts as lost.
    """
    quality = bits_per_byte(engine, data, config)
    sample = complete(engine, data, config)
    timeline = None if engine.pipeline is None else engine.pipeline.timeline()
    write = partial(write_report, engine, data, config, folder, started, seconds, quality, sample, timeline)
    everyone(engine.world, engine.device, write if chief else lambda: None, expected=OSError, is_slow=True)


def write_report(
    engine: Engine,
    data: PreparedData,
    config: Config,
    folder: Path,
    started: int,
    seconds: float,
    quality: float,
    sample: str,
    timeline: Timeline | None,
) -> None:
    """Write `summary.json` and the figures, and print it."""
    records = read_metrics(folder / "metrics.jsonl") or [{"step": engine.global_steps, "tokens": 0}]
    records[-1]["validation_bits_per_byte"] = quality
    baselines = compressed_bits_per_byte(data.held_out_text())
    files = {"run folder": str(folder), "metrics": str(folder / "metrics.jsonl")}
    if timeline is not None and engine.pipeline is not None:
        files |= save_timeline(engine.pipeline.schedule, timeline, folder)
    figure = draw_loss_curve(records, folder / "loss.png", title=str(folder), baselines=baselines)
    summary = RunSummary(
        bits_per_byte=quality,
        baselines=baselines,
        held_out_bytes=data.validation.num_bytes,
        parameters=engine.num_parameters(),
        steps=engine.global_steps,
        skipped_steps=engine.skipped_steps,
        timed_steps=engine.global_steps - started,
        seconds=seconds,
        tokens=sum(record["tokens"] for record in records if record["step"] > started),
        layout=layout_in_words(engine),
        memory_bytes=engine.memory_bytes(),
        comm_bytes=records[-1].get("comm_bytes", {}),
        sample=(PROMPT, sample),
        files={**files, "loss curve": str(figure)},
        next_steps=next_steps(config),
    )
    write_atomically(folder / "summary.json", json.dumps(asdict(summary), indent=1))
    print_summary(summary)


def save_timeline(schedule: Schedule, timeline: Timeline, folder: Path) -> dict[str, str]:
    """Write the last step's timeline, and a picture of it below the plan; returns the files by what they are."""
    measured.write(folder / "pipeline.json", schedule, timeline)
    save(folder / "pipeline.svg", measured.planned(schedule, timeline), timeline)
    return {"pipeline": str(folder / "pipeline.svg")}


def layout_in_words(engine: Engine) -> str:
    """`4 processes (dp 2 x tp 2), ZeRO stage 3, bf16`."""
    parallel = engine.settings.parallel
    sizes = {"pp": parallel.pp, "dp": engine.dp_size, "tp": parallel.tp, "cp": parallel.cp}
    degrees = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    axes = f" ({' x '.join(degrees)})" if parallel.pp * parallel.tp * parallel.cp > 1 else ""
    return f"{engine.world_size} processes{axes}, ZeRO stage {engine.settings.zero.stage}, {engine.settings.precision}"


def next_steps(config: Config) -> list[tuple[str, str]]:
    """What to try after a run: (what it does, the command)."""
    folder, stage = config.run.dir, 1 if config.zero.stage == 3 else 3
    return [
        ("train twice as long", f"make train ARGS='--run.dir {folder}-longer --train.steps {2 * config.train.steps}'"),
        ("compare a ZeRO stage", f"make train ARGS='--run.dir {folder}-stage{stage} --zero.stage {stage}'"),
        ("cut each layer over two ranks", f"make train ARGS='--run.dir {folder}-tp2 --parallel.tp 2'"),
        (
            "cut the model into two stages",
            f"make train ARGS='--run.dir {folder}-pp2 --parallel.pp 2 --train.micro_batch_size 1'",
        ),
        ("see every setting", f"{os.path.relpath(sys.executable)} -m minizero.train --help"),
    ]
