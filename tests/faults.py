"""Jobs that are killed: ranks forked from a process that has torch loaded, so that a trial takes less than a second.

    with Nursery() as nursery:
        trial = nursery.run(Job(folder, stage=3), kill=Kill(rank=1, step=2, point="before the rename"))

A job trains a toy for a few steps, saves every other one, and resumes from whatever its folder holds. What a rank found
is in `Ended`: exit code, seconds from the kill to its end, its last words. Losses go to a log that resumed attempts
append to, so two attempts that saw the same step must have seen the same loss.

The nursery is a process of its own (`python tests/faults.py`): the test's own process has threads, and must not fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import hashlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import toys
from test_layouts import VOCAB

import minizero
from minizero import api
from minizero.checkpoint import CheckpointError, save
from minizero.checkpoint.save import Retention
from minizero.config.schema import ModelConfig
from minizero.dist import positions
from minizero.models import build as decoder
from minizero.zero.optimizer import StepResult

STEPS, EVERY = 6, 2
DEADLINE = 60.0  # seconds that a trial may take, before it is a hang
AFTER_THE_FIRST = 8.0  # seconds that ranks may outlive the first, beyond the collectives' timeout; then they are killed


@dataclass(frozen=True)
class Job:
    """What is trained where. model: of `toys`, or "llama" (which tp and pp need)."""

    folder: str
    world: int = 2
    stage: int = 0
    tp: int = 1
    pp: int = 1
    model: str = "toy"
    asynchronous: bool = False
    precision: str = "fp32"
    timeout: float = 5.0
    allow_fallback: bool = False
    skew: float = 0.0  # seconds by which the clock of each rank is ahead of the one before


@dataclass(frozen=True)
class Kill:
    """SIGKILL for `rank` (-1: all) at the `nth` passing of `point` after `step` steps; see `POINTS`."""

    rank: int
    step: int
    point: str
    nth: int = 1
    signal: int = signal.SIGKILL


@dataclass
class Ended:
    """code: of the process, negative for a signal. seconds: from the first death to this rank's end. words: stderr."""

    code: int
    seconds: float
    words: str = field(repr=False)
    state: str | None = None


# (module, attribute, before or after it runs): where a rank may die
POINTS: dict[str, tuple[str, str, str]] = {
    "forward": ("toys", "Block.forward", "before"),
    "backward": ("minizero.zero.runtime", "ZeroRuntime.end_backward", "before"),
    "in a collective": ("minizero.dist.collectives", "Work.wait", "before"),
    "before the update": ("minizero.zero.optimizer", "ZeroOptimizer._update", "before"),
    "after the update": ("minizero.zero.runtime", "ZeroRuntime.refresh", "after"),
    "before the file": ("minizero.checkpoint.save", "Save._write", "before"),
    "in the file": ("minizero.checkpoint.tensor_file", "_write_all", "after"),
    "after the file": ("minizero.checkpoint.save", "Save._write", "after"),
    "before the manifest": ("minizero.checkpoint.save", "write_synced", "before"),
    "after the manifest": ("minizero.checkpoint.save", "write_synced", "after"),
    "before the rename": ("minizero.checkpoint.save", "move_into_place", "before"),
    "after the rename": ("minizero.checkpoint.save", "move_into_place", "after"),
    "after latest": ("minizero.checkpoint.save", "write_atomically", "after"),
    "before pruning": ("minizero.checkpoint.save", "prune", "before"),
    "in pruning": ("minizero.checkpoint.files", "shutil.rmtree", "before"),
    "after the save": ("minizero.checkpoint.save", "Save.run", "after"),
}
ON_FIRST_RANK = ("before the manifest", "after the manifest", "before the rename", "after the rename", "after latest")
ON_FIRST_RANK += ("before pruning", "in pruning")


class Nursery:
    """The process that ranks are forked from."""

    def __enter__(self) -> Nursery:
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{here}", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, job: Job, kill: Kill | None = None, act: str = "train") -> list[Ended]:
        """Run `job` to its end or death; `act` names a function of this module that the ranks run."""
        assert self._process.stdin is not None and self._process.stdout is not None
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        order = {"job": asdict(job), "kill": asdict(kill) if kill else None, "act": act}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return [Ended(**one) for one in json.loads(self._process.stdout.readline())]


# ---- in the nursery ----


def serve() -> None:
    """Run what comes in on stdin, a line each."""
    warm_up()
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        order = json.loads(line)
        job, kill = Job(**order["job"]), Kill(**order["kill"]) if order["kill"] else None
        print(json.dumps([asdict(one) for one in attempt(number, job, kill, order["act"])]), flush=True)


def warm_up() -> None:
    """Load what the first step would."""
    torch.set_num_threads(1)
    positions.PATIENCE = 0.2  # what the dead would say is waited for, and here someone dies in every trial
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def attempt(number: int, job: Job, kill: Kill | None, act: str) -> list[Ended]:
    """Fork the ranks, and wait for all of them."""
    ranks, died = {}, None
    for rank in range(job.world):
        pid = os.fork()
        if pid == 0:
            be_a_rank(number, rank, job, kill, act)
        ranks[pid] = rank
    found: dict[int, Ended] = {}
    deadline = time.monotonic() + DEADLINE
    while len(found) < job.world:
        pid, status = os.waitpid(-1, os.WNOHANG)
        now = time.monotonic()
        if pid in ranks:
            rank = ranks[pid]
            if died is None:
                died, deadline = now, min(deadline, now + job.timeout + AFTER_THE_FIRST)
            words = words_of(job, rank).read_text() if words_of(job, rank).exists() else ""
            state = state_of(job, rank).read_text() if state_of(job, rank).exists() else None
            found[rank] = Ended(os.waitstatus_to_exitcode(status), now - died, words, state)
        elif now > deadline:
            for hanging in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(hanging, signal.SIGKILL)
        else:
            time.sleep(0.002)
    return [found[rank] for rank in range(job.world)]


def words_of(job: Job, rank: int) -> Path:
    return Path(job.folder) / f"words{rank}"


def state_of(job: Job, rank: int) -> Path:
    return Path(job.folder) / f"state{rank}"


def be_a_rank(number: int, rank: int, job: Job, kill: Kill | None, act: str) -> None:
    """A rank's whole life; never returns."""
    code = 1
    try:
        words = os.open(words_of(job, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(words, 1)
        os.dup2(words, 2)
        state_of(job, rank).unlink(missing_ok=True)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.world)}
        if kill is not None and kill.rank in (rank, -1):
            arm(kill)
        plain, ahead = time.time, rank * job.skew
        time.time = lambda: plain() + ahead
        store = dist.FileStore(f"{job.folder}/.store{number}", job.world)
        limit = datetime.timedelta(seconds=job.timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world, timeout=limit)
        state_of(job, rank).write_text(globals()[act](job))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class Progress:
    """How many steps this process has made, for `arm`."""

    steps = 0


def arm(kill: Kill) -> None:
    """Have this process die where `kill` says."""
    module, path, when = POINTS[kill.point]
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    plain, passed = getattr(owner, name), 0

    def die() -> None:
        nonlocal passed
        if Progress.steps >= kill.step:
            passed += 1
            if passed == kill.nth:
                os.kill(os.getpid(), kill.signal)

    def armed(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            die()
        result = plain(*args, **kwargs)
        if when == "after":
            die()
        return result

    setattr(owner, name, armed)


# ---- what ranks run ----


def build(job: Job, **changes: Any) -> Any:
    """The engine of a job, with settings changed."""
    torch.manual_seed(0)
    if job.model == "llama":
        config = ModelConfig(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=23, tie_embeddings=True)
        model: Any = decoder(config, VOCAB, toys.LENGTH)
    else:
        model = toys.make(job.model)
    dp = job.world // job.tp // job.pp
    settings: dict[str, Any] = {
        "precision": job.precision,
        "parallel": {"tp": job.tp, "pp": job.pp},
        "zero": {"stage": job.stage},
        "train": {"micro_batch_size": toys.BATCH // dp // job.pp, "gradient_accumulation_steps": job.pp},
        "optimizer": {"lr": 3e-3},
        "dist": {"timeout": job.timeout},
        "checkpoint": {"asynchronous": job.asynchronous, "allow_fallback": job.allow_fallback},
    }
    return minizero.initialize(model=model, config=minizero.Config(**(settings | changes)))[0]


def micro_batches(job: Job, engine: Any, step: int) -> Iterator[Any]:
    """This rank's of one step."""
    tokens, labels = toys.batches(step + 1)[step]
    for index in range(job.pp):
        rows = slice(*(((index * engine.dp_size + engine.dp_rank + end) * len(tokens)) // job.pp // engine.dp_size
                       for end in (0, 1)))  # fmt: skip
        pair = tokens[rows], labels[rows]
        yield dict(zip(("input_ids", "labels"), pair, strict=True)) if job.model == "llama" else pair


def train(job: Job) -> str:
    """Train to the end, from wherever the folder's checkpoints are; the hash of everything that a rank then holds."""
    engine = build(job)
    torch.manual_seed(100 + engine.global_rank)  # random states of ranks differ
    engine.load_checkpoint(f"{job.folder}/checkpoints")
    Progress.steps = engine.global_steps
    log = open(f"{job.folder}/log{engine.global_rank}", "a", buffering=1)
    while engine.global_steps < STEPS:
        loss = engine.train_batch(micro_batches(job, engine, engine.global_steps))
        drawn = float(torch.rand(()))
        Progress.steps = engine.global_steps
        print(engine.global_steps, float(loss).hex(), drawn.hex(), file=log)
        if engine.global_steps % EVERY == 0:
            engine.save_checkpoint(f"{job.folder}/checkpoints", retention=Retention(2))
    engine.destroy()
    return hash_of(engine)


def hash_of(engine: Any) -> str:
    """Of this rank's masters, optimizer state, random state and counters."""
    digest = hashlib.sha256()
    for group in engine.runtime.groups:
        for values in group.values():
            digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    for piece, *_ in engine.optimizer.slices:
        for key, value in sorted(engine.optimizer.state[piece].items()):
            digest.update(f"{key} {value.tolist()}".encode())
    digest.update(torch.get_rng_state().numpy().tobytes())
    digest.update(f"{engine.global_steps} {engine.global_samples} {engine.skipped_steps}".encode())
    return digest.hexdigest()


def logged(folder: str, rank: int) -> dict[int, set[str]]:
    """Step -> what the attempts logged of it."""
    found: dict[int, set[str]] = {}
    for line in (Path(folder) / f"log{rank}").read_text().splitlines():
        step, rest = line.split(" ", 1)
        found.setdefault(int(step), set()).add(rest)
    return found


def hang_in_a_loop(job: Job) -> str:
    """The first rank never ends its second step."""

    def hang() -> None:
        while True:
            time.sleep(0.01)

    return stuck_in(job, hang)


def hang_in_a_lock(job: Job) -> str:
    """The same, in native code that does not let go of the interpreter."""

    def hang() -> None:
        ctypes.PyDLL(None).sleep(60)

    return stuck_in(job, hang)


def stuck_in(job: Job, hang: Callable[[], None]) -> str:
    engine = build(job, dist={"timeout": job.timeout, "step_timeout": 1.0})
    engine.train_batch(micro_batches(job, engine, 0))
    if engine.global_rank == 0:
        engine.optimizer.step_window = lambda *_: hang()
    engine.train_batch(micro_batches(job, engine, 1))
    return ""


def flip_a_bit(job: Job) -> str:
    """In the second rank's copy of a weight, after the first step."""
    engine = build(job, dist={"timeout": job.timeout, "check_replicas": 1})
    engine.train_batch(micro_batches(job, engine, 0))
    if engine.global_rank == 1:
        name = "model.norm.weight" if job.model == "llama" else "blocks.1.up.weight"
        dict(engine.named_parameters())[name].detach().view(torch.int32).view(-1)[3] ^= 1
    engine.optimizer.step_window = lambda *_: StepResult(True, 1.0, 1.0, 1)  # an update would spread or heal it
    engine.train_batch(micro_batches(job, engine, 1))
    return ""


def check_every_step(job: Job) -> str:
    engine = build(replace(job, world=job.world), dist={"timeout": job.timeout, "check_replicas": 1})
    for step in range(4):
        engine.train_batch(micro_batches(job, engine, step))
    return ""


def disagree_on_config(job: Job) -> str:
    build(job, **({"optimizer": {"lr": 0.5}} if dist.get_rank() else {}))
    return ""


def disagree_on_seed(job: Job) -> str:
    build(job, train={"seed": 7, "micro_batch_size": 8} if dist.get_rank() else {"micro_batch_size": 8})
    return ""


def disagree_on_code(job: Job) -> str:
    if dist.get_rank():
        api.versions = lambda: {"minizero": "0123456789abcdef"}
    build(job)
    return ""


def fill_the_disk(job: Job) -> str:
    """The second rank may write no file beyond 3000 bytes."""
    engine = build(job)
    engine.train_batch(micro_batches(job, engine, 0))
    engine.save_checkpoint(f"{job.folder}/checkpoints")
    engine.train_batch(micro_batches(job, engine, 1))
    before = hash_of(engine)
    if engine.global_rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    try:
        engine.save_checkpoint(f"{job.folder}/checkpoints")
    except CheckpointError as error:
        assert "rank 1: no space for" in str(error) and "needs" in str(error) and "has" in str(error), error
    else:
        raise AssertionError("there was room")
    assert hash_of(engine) == before
    engine.train_batch(micro_batches(job, engine, 2))
    return ""


def fail_in_the_background(job: Job) -> str:
    """The second rank cannot write its file; then it can."""
    engine = build(job)
    engine.train_batch(micro_batches(job, engine, 0))
    plain = save.write_tensors
    if engine.global_rank == 1:
        save.write_tensors = broken
    engine.save_checkpoint(f"{job.folder}/checkpoints")
    engine.train_batch(micro_batches(job, engine, 1))
    try:
        engine.save_checkpoint(f"{job.folder}/checkpoints")
    except CheckpointError as error:
        assert "rank 1: OSError: [Errno 5] a bad disk" in str(error), error
    else:
        raise AssertionError("nobody heard of it")
    save.write_tensors = plain
    engine.train_batch(micro_batches(job, engine, 2))
    engine.save_checkpoint(f"{job.folder}/checkpoints")
    engine.destroy()
    return ""


def broken(*_: Any) -> Any:
    raise OSError(5, "a bad disk")


if __name__ == "__main__":
    serve()
