"""The main job, top to bottom: settings, data, processes, model, engine, loop, report.

    torchrun --standalone --nproc-per-node 2 -m minizero.train launch/configs/quickstart.toml --zero.stage 3

Everything a run leaves is in `run.dir`: `config.json` (each value with its origin), `metrics.jsonl`, `checkpoints/`,
`loss.png`, `summary.json`. Run again, it continues from its newest checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn

import minizero
from minizero.checkpoint import CheckpointError
from minizero.checkpoint.files import LATEST, prune, write_atomically
from minizero.config import Config, ConfigError
from minizero.config.load import Resolved, help_text, load, read_resolved, save_resolved
from minizero.data.corpus import open_corpus
from minizero.data.loader import EvaluationLoader, TokenLoader
from minizero.data.prepared import PreparedData, cache_key, prepare
from minizero.models import build
from minizero.observe.figures import draw_loss_curve
from minizero.observe.metrics import MetricsWriter, read_metrics
from minizero.observe.progress import Progress
from minizero.observe.summary import RunSummary, compressed_bits_per_byte, print_summary

PROMPT, SAMPLE_TOKENS, TEMPERATURE = "import ", 80, 0.7
MAY_CHANGE = ("run.", "checkpoint.", "log.", "debug.", "dist.", "train.time_limit", "train.eval_every")
EXPECTED = (ValueError, CheckpointError, minizero.CollectiveError, FloatingPointError)


def main(arguments: list[str] | None = None) -> int:
    """Run the job; returns the exit code. What can be expected to go wrong is one message, without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(f"usage: torchrun --nproc-per-node N -m minizero.train CONFIG [--a.b VALUE ...]\n\n{help_text()}")
        return 0 if arguments else 2
    signal.signal(signal.SIGTERM, interrupt)
    path, overrides = (None, arguments) if arguments[0].startswith("--") else (arguments[0], arguments[1:])
    try:
        run(load(path, overrides))
    except EXPECTED as error:
        return fail(f"{type(error).__name__}: {error}", 1)
    except KeyboardInterrupt:
        return fail("interrupted; the same command continues from the newest checkpoint", 130)
    return 0


def fail(message: str, code: int) -> int:
    """Print `message`: every rank that has one of its own says it, but what all say is said once, by rank 0."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or message.startswith("CollectiveError"):
        print(f"minizero: {message}", file=sys.stderr, flush=True)
    return code


def interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a run as Ctrl-C does."""
    raise KeyboardInterrupt


def run(resolved: Resolved) -> None:
    """Train as `resolved` says, from the beginning or from the newest checkpoint."""
    config = resolved.config
    folder = Path(config.run.dir)
    checkpoints = checkpoint_folder(config)
    if finished := finished_steps(folder, config):
        if os.environ.get("RANK", "0") == "0":
            print(f"{folder} is finished ({finished} steps). To train anew, pass --run.dir OTHER; to train on, more")
            print("--train.steps and --checkpoint.resume latest.")
        return
    data = prepare_together(config)
    minizero.init_distributed(config.dist.backend, timeout=config.dist.timeout)
    with torch.device("meta"):
        model = build(config.model, data.tokenizer.vocab_size, config.train.sequence_length)
    if config.log.tensorboard.dir is None:
        config.log.tensorboard.dir = str(folder / "tensorboard")
    engine, *_ = minizero.initialize(model=model, model_parameters=parameter_groups(model, config), config=config)
    engine.log.quiet = True
    if checkpoints is not None:
        engine.load_checkpoint(checkpoints)
    chief = dist.get_rank() == 0
    if chief:
        folder.mkdir(parents=True, exist_ok=True)
        save_resolved(resolved, folder / "config.json")
    began = time.perf_counter()
    train(engine, data, config, folder, chief)
    report(engine, data, config, folder, chief, time.perf_counter() - began)
    engine.destroy()
    dist.destroy_process_group()


def checkpoint_folder(config: Config) -> Path | None:
    """Where to continue from, or None to begin. Raises ConfigError when the run folder holds another run."""
    folder = Path(config.run.dir)
    if config.checkpoint.resume is not None:
        wanted = folder if config.checkpoint.resume == "latest" else Path(config.checkpoint.resume)
        if not (wanted / "checkpoints" / LATEST).is_file():
            raise ConfigError(f"checkpoint.resume: {wanted} holds no checkpoint")
        return wanted / "checkpoints"
    if not (folder / "config.json").is_file():
        return None
    before, now = (flat(c.model_dump()) for c in (read_resolved(folder / "config.json"), config))
    changed = [key for key in now if before.get(key) != now[key] and not key.startswith(MAY_CHANGE)]
    if changed:
        lines = "; ".join(f"{key} was {before.get(key)}, is {now[key]}" for key in changed[:4])
        raise ConfigError(
            f"{folder} holds a run with other settings ({lines}). Pass --run.dir OTHER to begin a new run, or "
            "--checkpoint.resume latest to continue that one with these settings"
        )
    return folder / "checkpoints" if (folder / "checkpoints" / LATEST).is_file() else None


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested settings as {dotted key: value}."""
    found: dict = {}
    for key, value in tree.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def finished_steps(folder: Path, config: Config) -> int:
    """Steps of a run that is over, else 0."""
    summary = folder / "summary.json"
    steps = json.loads(summary.read_text())["steps"] if summary.is_file() else 0
    return steps if steps >= config.train.steps else 0


def prepare_together(config: Config) -> PreparedData:
    """The prepared corpus: one process of each node makes it, the others wait for its folder to appear."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        folder = Path(config.data.dir) / cache_key(config.data, open_corpus(config.data.source))
        while not folder.exists():  # a process that fails to make it ends the job, and torchrun ends this loop
            time.sleep(0.1)
    return prepare(config.data, verify=os.environ.get("LOCAL_RANK", "0") == "0")


def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """Weight decay is for matrices; norms and biases have none."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.optimizer.weight_decay}]
    return groups + ([{"params": vectors, "weight_decay": 0.0}] if vectors else [])


def train(engine: minizero.Engine, data: PreparedData, config: Config, folder: Path, chief: bool) -> None:
    """The loop: one global batch, one line of metrics, now and then a checkpoint or an evaluation."""
    settings, sizes = config.train, engine.batch
    batches = iter(
        TokenLoader(
            data.train,
            sequence_length=settings.sequence_length,
            global_batch_size=sizes.global_batch_size,
            micro_batch_size=sizes.micro_batch_size,
            seed=settings.seed,
            dp_rank=engine.dp_rank,
            dp_size=engine.dp_size,
            start_step=engine.global_steps,
        )
    )
    start, began = engine.global_steps, time.perf_counter()
    metrics = MetricsWriter(folder / "metrics.jsonl", last_step=start) if chief else None
    progress = Progress(settings.steps, start, time_limit=settings.time_limit) if chief else None
    if progress is not None:
        progress.__enter__()
    try:
        while engine.global_steps < settings.steps and not out_of_time(engine, config, began):
            before = time.perf_counter()
            loss = float(engine.train_batch(islice(batches, sizes.accumulation)))
            record = step_record(engine, loss, time.perf_counter() - before)
            if settings.eval_every and engine.global_steps % settings.eval_every == 0:
                record["validation_bits_per_byte"] = bits_per_byte(engine, data, config)
            if metrics is not None and progress is not None:
                metrics.write(record)
                progress.update(engine.global_steps, loss, record["tokens_per_second"])
            if config.checkpoint.every and engine.global_steps % config.checkpoint.every == 0:
                save(engine, folder, config, chief)
    finally:
        if metrics is not None and progress is not None:
            progress.__exit__(None, None, None)
            metrics.close()
    save(engine, folder, config, chief)


def step_record(engine: minizero.Engine, loss: float, seconds: float) -> dict:
    """One line of `metrics.jsonl`."""
    tokens = engine.result.tokens if engine.result else 0
    return {
        "step": engine.global_steps,
        "loss": loss,
        "grad_norm": engine.get_global_grad_norm(),
        "lr": engine.get_lr()[0],
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "comm_bytes": engine.ledger.take(),
        "memory_bytes": engine.memory_bytes(),
    }


def out_of_time(engine: minizero.Engine, config: Config, began: float) -> bool:
    """Whether `train.time_limit` is over; the first rank's clock decides for all."""
    if config.train.time_limit is None:
        return False
    over = torch.tensor([float(time.perf_counter() - began > config.train.time_limit)], device=engine.device)
    return bool(engine.comm.gather_rows(over, "time limit")[0, 0])


def save(engine: minizero.Engine, folder: Path, config: Config, chief: bool) -> None:
    """Write a checkpoint, if this step has none yet, and remove the oldest."""
    if not (folder / "checkpoints" / f"global_step{engine.global_steps}").exists():
        engine.comm.barrier(engine.device)  # all ranks have looked before one of them writes
        engine.save_checkpoint(folder / "checkpoints")
        if chief:
            prune(folder / "checkpoints", config.checkpoint.keep)


@torch.no_grad()
def bits_per_byte(engine: minizero.Engine, data: PreparedData, config: Config) -> float:
    """Bits that the model needs per byte of the held-out files; collective."""
    engine.eval()
    total = torch.zeros(1, dtype=torch.float64, device=engine.device)
    for batch in EvaluationLoader(
        data.validation,
        sequence_length=config.train.sequence_length,
        batch_size=8,
        stride=config.train.sequence_length // 2,
        dp_rank=engine.dp_rank,
        dp_size=engine.dp_size,
    ):
        loss_sum, _ = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()})
        total += loss_sum.double()
    engine.train()
    nats = float(engine.comm.gather_rows(total, "held-out loss").sum())
    return nats / math.log(2) / data.validation.num_bytes


@torch.no_grad()
def complete(engine: minizero.Engine, data: PreparedData, config: Config) -> str:
    """A sampled continuation of PROMPT; every rank computes the same one."""
    generator = torch.Generator().manual_seed(config.train.seed)
    tokens = data.tokenizer.encode(PROMPT)
    length = len(tokens)
    engine.eval()
    with minizero.unsharded(engine.module):
        for _ in range(SAMPLE_TOKENS):
            context = torch.tensor([tokens[-config.train.sequence_length :]], device=engine.device)
            logits: Tensor = engine.module(context)[0, -1].float().cpu()
            tokens.append(int(torch.multinomial((logits / TEMPERATURE).softmax(0), 1, generator=generator)))
    return data.tokenizer.decode(tokens[length:])


def report(
    engine: minizero.Engine, data: PreparedData, config: Config, folder: Path, chief: bool, seconds: float
) -> None:
    """Evaluate, sample, draw, and print what a person wants to know at the end."""
    quality = bits_per_byte(engine, data, config)
    sample = complete(engine, data, config)
    if not chief:
        return
    records = read_metrics(folder / "metrics.jsonl")
    records[-1]["validation_bits_per_byte"] = quality
    baselines = compressed_bits_per_byte(data.held_out_text())
    figure = draw_loss_curve(records, folder / "loss.png", title=str(folder), baselines=baselines)
    summary = RunSummary(
        bits_per_byte=quality,
        baselines=baselines,
        held_out_bytes=data.validation.num_bytes,
        parameters=sum(p.numel() for p in engine.module.parameters()),
        steps=engine.global_steps,
        seconds=seconds,
        tokens=sum(record["tokens"] for record in records),
        layout=f"{engine.dp_size} processes, ZeRO stage {config.zero.stage}, {config.precision}",
        memory_bytes=records[-1]["memory_bytes"],
        comm_bytes=records[-1]["comm_bytes"],
        sample=(PROMPT, sample),
        files={"run folder": str(folder), "loss curve": str(figure), "metrics": str(folder / "metrics.jsonl")},
        next_steps=[
            ("train twice as long", f"make train ARGS='--run.dir runs/longer --train.steps {2 * config.train.steps}'"),
            ("compare a ZeRO stage", "make train ARGS='--run.dir runs/stage1 --zero.stage 1'"),
            ("see every setting", "python -m minizero.train --help"),
        ],
    )
    write_atomically(folder / "summary.json", json.dumps(asdict(summary), indent=1))
    print_summary(summary)


if __name__ == "__main__":
    sys.exit(main())
