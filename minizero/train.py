"""The main job, top to bottom: settings, data, processes, model, engine, loop, report.

    torchrun --standalone --nproc-per-node 2 -m minizero.train launch/configs/quickstart.toml --zero.stage 3

Everything a run leaves is in `run.dir`: `config.json` (each value with its origin), `tokenizer.json`, `metrics.jsonl`,
`checkpoints/`, `loss.png`, `summary.json`. Run again, it continues from its newest checkpoint; so it does after
SIGTERM, before which all ranks finish the same step and save it.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn

import minizero
from minizero.checkpoint import CheckpointError
from minizero.checkpoint.export import copy_tokenizer
from minizero.config import Config
from minizero.config.load import Resolved, help_text, load, save_resolved
from minizero.data.corpus import open_corpus
from minizero.data.loader import Batch, TokenLoader
from minizero.data.prepared import PreparedData, cache_key, prepare
from minizero.data.tokenizer import Tokenizer
from minizero.dist.dims import ParallelDims
from minizero.models import build
from minizero.observe.metrics import MetricsWriter
from minizero.observe.progress import Progress
from minizero.observe.pulse import Pulse, StopRequests
from minizero.observe.watchdog import end_stopped_siblings
from minizero.pretrained import Start, start_from
from minizero.report import bits_per_byte, report
from minizero.run_folder import (
    INTERRUPTED,
    REQUEUE,
    checkpoint_folder,
    finish_save,
    finished_steps,
    save,
    say_finished,
)
from minizero.utils.files import write_atomically
from minizero.zero.optimizer import NonFiniteError
from minizero.zero.replicas import ReplicaError

EXPECTED = (ValueError, OSError, CheckpointError, minizero.CollectiveError, FloatingPointError, ReplicaError)
HEAD_START = 4.0  # seconds in which rank 0 says what all ranks have to say


def main(arguments: list[str] | None = None, requests: StopRequests | None = None) -> int:
    """Run the job; returns the exit code. What can be expected to go wrong is one message, without a traceback.

    `requests` are signals that end it after the step at hand, with a checkpoint, and with `REQUEUE` as its exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(f"usage: torchrun --nproc-per-node N -m minizero.train CONFIG [--a.b VALUE ...]\n\n{help_text()}")
        return 0 if arguments else 2
    path, overrides = (None, arguments) if arguments[0].startswith("--") else (arguments[0], arguments[1:])
    try:
        return run(load(path, overrides), requests or StopRequests())
    except EXPECTED as error:
        stopped = "".join(f"\n(process {one} was stopped, and is killed)" for one in end_stopped_siblings())
        return fail(f"{type(error).__name__}: {error}{stopped}", 1)
    except KeyboardInterrupt:
        return fail("interrupted; the same command continues from the newest checkpoint, if there is one yet", 130)


def fail(message: str, code: int) -> int:
    """Print `message`, which most often all ranks have to say: rank 0 goes first, and torchrun then ends the others.

    A rank that is alone with its trouble is heard some seconds later. What a collective has to say differs by rank.
    """
    if code == 130 and os.environ.get("RANK", "0") != "0":
        return code
    if os.environ.get("RANK", "0") != "0" and not message.startswith("CollectiveError"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(HEAD_START)
    print(f"minizero: {message}", file=sys.stderr, flush=True)
    return code


def leave(code: int) -> NoReturn:
    """End the process once its saves have ended.

    Taking the interpreter apart, with all that torch is, would take another second or two. Peers that wait for this
    rank hear of its end only then, and torchrun starts again only then.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(resolved: Resolved, requests: StopRequests) -> int:
    """Train as `resolved` says, from the beginning or from the newest checkpoint; returns the exit code."""
    config = resolved.config
    folder = Path(config.run.dir)
    checkpoints = checkpoint_folder(config)
    if finished := finished_steps(folder, config):
        if os.environ.get("RANK", "0") == "0":
            say_finished(folder, finished)
        return 0
    pretrained = config.model.pretrained
    start = None if pretrained is None else start_from(pretrained, resolved, checkpoints)
    data = prepare_together(config, start.tokenizer if start is not None else None, requests)
    minizero.init_distributed(config.dist.backend, timeout=config.dist.timeout)
    torch.manual_seed(zlib.crc32(f"{config.train.seed}/{dist.get_rank()}".encode()))  # else every start has its own
    model = start.model if start is not None else new_model(config, data)
    if config.log.tensorboard.enabled and config.log.tensorboard.dir is None:
        config.log.tensorboard.dir = str(folder / "tensorboard")
    engine, *_ = minizero.initialize(model=model, model_parameters=parameter_groups(model, config), config=config)
    engine.log.quiet = not config.log.wall_clock_breakdown  # the progress bar takes the log's place
    resume(engine, data, config, checkpoints)
    loader = training_loader(engine, data, config)  # before the folder: a run that cannot begin leaves none
    chief = dist.get_rank() == 0
    if chief:
        folder.mkdir(parents=True, exist_ok=True)
        save_resolved(resolved, folder / "config.json")
        keep_tokenizer(data, start, folder)
        (folder / INTERRUPTED).unlink(missing_ok=True)
    started, began = engine.global_steps, time.perf_counter()
    is_stopped = train(engine, data, loader, config, folder, chief, requests)
    if is_stopped:
        if chief:
            say_interrupted(engine, folder, requests.received or signal.SIGTERM)
        engine.world.barrier(engine.device)  # agents of other nodes look for the word when their ranks have ended
    else:
        report(engine, data, config, folder, chief, started, time.perf_counter() - began)
    engine.destroy()
    dist.destroy_process_group()
    return REQUEUE if is_stopped else 0


def resume(engine: minizero.Engine, data: PreparedData, config: Config, checkpoints: Path | None) -> None:
    """Load the newest checkpoint, if there is one. Raises ValueError when ranks, or that run, have other data."""
    corpora = engine.world.gather_bytes(data.fingerprint.encode(), "fingerprint of the corpus", engine.device)
    if len(set(corpora)) > 1:
        shown = ", ".join(corpus.decode()[:8] for corpus in corpora)
        raise ValueError(f"ranks read different data (fingerprints {shown}): is data.source the same for all of them?")
    if checkpoints is None:
        return
    path, client_state = engine.load_checkpoint(checkpoints)
    if path is not None and engine.global_rank == 0:
        print(f"continuing from {path}", flush=True)
    if path is not None and client_state.get("corpus") != data.fingerprint and config.checkpoint.resume is None:
        raise ValueError(
            f"{path} was trained on other data: data.source {config.data.source} has changed since. Pass --run.dir "
            "OTHER to begin a new run, or --checkpoint.resume latest to continue with the data as it is"
        )


def prepare_together(config: Config, tokenizer: Tokenizer | None, requests: StopRequests) -> PreparedData:
    """The prepared corpus: one process of each node makes it, the others wait for its folder to appear.

    A process that fails to make it ends the job, and torchrun tells those that wait: they raise KeyboardInterrupt.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        folder = Path(config.data.dir) / cache_key(config.data, open_corpus(config.data.source), tokenizer)
        while not folder.exists():
            if requests.received:
                raise KeyboardInterrupt
            time.sleep(0.1)
    return prepare(config.data, tokenizer, verify=os.environ.get("LOCAL_RANK", "0") == "0")


def new_model(config: Config, data: PreparedData) -> nn.Module:
    """The model of the settings, on the meta device."""
    with torch.device("meta"):
        return build(config.model, data.tokenizer.vocab_size, config.train.sequence_length)


def keep_tokenizer(data: PreparedData, start: Start | None, folder: Path) -> None:
    """Leave the tokenizer in the run's folder, where `minizero export` and a run that continues find it."""
    if start is None or start.tokenizer is None:
        data.tokenizer.save(folder / "tokenizer.json")
    elif start.folder.resolve() != folder.resolve():
        copy_tokenizer(start.folder, folder)


def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """Weight decay is for matrices; norms and biases have none."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.optimizer.weight_decay}]
    return groups + ([{"params": vectors, "weight_decay": 0.0}] if vectors else [])


def training_loader(engine: minizero.Engine, data: PreparedData, config: Config) -> TokenLoader:
    """This rank's batches from the engine's next sample on. Raises ValueError where there is no whole sequence."""
    return TokenLoader(
        data.train,
        sequence_length=config.train.sequence_length,
        global_batch_size=engine.batch.global_batch_size,
        micro_batch_size=engine.batch.micro_batch_size,
        seed=config.train.seed,
        dp_rank=engine.dp_rank,
        dp_size=engine.dp_size,
        start_sample=engine.global_samples,
    )


def train(
    engine: minizero.Engine,
    data: PreparedData,
    loader: TokenLoader,
    config: Config,
    folder: Path,
    chief: bool,
    requests: StopRequests,
) -> bool:
    """The loop: one global batch, one line of metrics, now and then a checkpoint or an evaluation.

    Ends early when its time is over, or a rank was told to stop, which is what it returns: the same on all ranks. A
    signal that comes after the last exchange finds the work done, and changes nothing.
    """
    settings, batches = config.train, iter(loader)
    start, began = engine.global_steps, time.perf_counter()
    saved = start if (folder / "checkpoints").is_dir() else -1  # the step of the newest checkpoint here
    metrics = MetricsWriter(folder / "metrics.jsonl", last_step=start) if chief else None
    progress = Progress(settings.steps, start, time_limit=settings.time_limit) if chief else None
    if progress is not None:
        progress.__enter__()
    pulse, busy = Pulse(engine.world, engine.device, ranks_alike(config)), None
    limit, is_stopped = settings.time_limit or math.inf, False
    try:
        while engine.global_steps < settings.steps:
            beat = pulse.beat(stop=requests.received > 0, over=time.perf_counter() - began > limit, busy=busy)
            if chief:
                say_slow(beat.slow, engine)
            is_stopped = beat.stop
            if beat.stop or beat.over:
                break
            before, waited = time.perf_counter(), engine.ledger.waited
            loss = step(engine, loader, islice(batches, engine.batch.accumulation))
            seconds = time.perf_counter() - before
            busy = seconds - (engine.ledger.waited - waited)
            record = step_record(engine, loss, seconds)
            if settings.eval_every and engine.global_steps % settings.eval_every == 0:
                record["validation_bits_per_byte"] = bits_per_byte(engine, data, config)
            if metrics is not None and progress is not None:
                metrics.write(record)
                progress.update(engine.global_steps, loss, record["tokens_per_second"])
            if config.checkpoint.every and engine.global_steps % config.checkpoint.every == 0:
                save(engine, data.fingerprint, folder, config)
                saved = engine.global_steps
    finally:
        if metrics is not None and progress is not None:
            progress.__exit__(None, None, None)
            metrics.close()
    if engine.global_steps != saved:
        save(engine, data.fingerprint, folder, config)
    finish_save(engine, config)
    return is_stopped


def step(engine: minizero.Engine, loader: TokenLoader, batches: Iterator[Batch]) -> float:
    """One step; its loss. Raises FloatingPointError as the engine does, with the samples that were in it."""
    number = (engine.global_samples - loader.start_sample) // loader.global_batch_size
    try:
        return float(engine.train_batch(batches))
    except NonFiniteError as error:
        samples = loader.samples(number, error.dp_rank // engine.cp_size).tolist()
        raise FloatingPointError(f"{error} Samples of that rank in this step: {samples}") from None


def ranks_alike(config: Config) -> list[list[int]]:
    """Ranks that do the same work: those of one pipeline stage."""
    parallel = config.parallel
    dims = ParallelDims(dist.get_world_size(), tp=parallel.tp, pp=parallel.pp, cp=parallel.cp)
    size = dims.world_size // parallel.pp
    return [list(range(stage * size, (stage + 1) * size)) for stage in range(parallel.pp)]


def say_slow(ranks: list[int], engine: minizero.Engine) -> None:
    """A line about stragglers."""
    if ranks:
        print(
            f"minizero: rank {ranks} computes more slowly than the others do (step {engine.global_steps}): they wait",
            file=sys.stderr,
            flush=True,
        )


def say_interrupted(engine: minizero.Engine, folder: Path, received: int) -> None:
    """Leave word for whoever starts jobs: this one wants to be started again."""
    name = signal.Signals(received).name
    write_atomically(folder / INTERRUPTED, json.dumps({"step": engine.global_steps, "signal": name}))
    print(f"minizero: stopped by {name} after step {engine.global_steps}, which is saved; the same command goes on")


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
        "skipped_steps": engine.skipped_steps,
        "loss_scale": engine.loss_scale,
        "comm_bytes": engine.ledger.take(),
        "memory_bytes": engine.memory_bytes(),
    }


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR2)  # `kill -USR2` a rank that seems to hang: it prints where it is
    asked = StopRequests()
    asked.listen(signal.SIGTERM, signal.SIGUSR1)  # a scheduler's warning is either
    leave(main(requests=asked))
