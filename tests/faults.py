"""Jobs that faults befall: ranks forked from a process that has torch loaded, so that a trial takes less than a second.

    with Nursery() as nursery:
        ended = nursery.run(Job(folder, stage=3), Kill(rank=1, step=2, point="before the rename"))

A job trains a toy for a few steps, saves every other one, and resumes from whatever its folder holds; other things that
ranks may be told to do are in `fault_acts.py`. What became of a rank is in `Ended`: exit code, seconds from the fault
to its end, its last words. Losses go to a log that resumed attempts append to, so two attempts that saw the same step
must have seen the same loss.

The nursery is a process of its own: the test's own process has threads, and must not fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import toys

import minizero
from minizero.checkpoint.save import Retention
from minizero.config.schema import ModelConfig
from minizero.dist import positions
from minizero.models import build as decoder

STEPS, EVERY = 6, 2
VOCAB = 19  # of llamas
DEADLINE = 60.0  # seconds that a trial may take, before it is a hang
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
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
    steps: int = STEPS
    step_timeout: float = 0.0
    deadline: float = DEADLINE
    details: dict[str, Any] = field(default_factory=dict)  # for acts


@dataclass(frozen=True)
class Kill:
    """What happens to `rank` at the `nth` passing of `point` after `step` steps; see `POINTS`.

    rank: -1 arms all, and who comes there first takes the others along. signal: what is sent; or how it hangs, "in a
    loop", or "in a lock": in native code that does not let go of the interpreter. delay: seconds that it comes later.
    after: seconds from the start before which nothing counts.
    """

    rank: int
    step: int
    point: str
    nth: int = 1
    signal: int | str = int(signal.SIGKILL)
    delay: float = 0.0
    after: float = 0.0


@dataclass
class Ended:
    """code: of the process, negative for a signal. seconds: from the fault (or the first end) to this rank's end.

    words: stdout and stderr. state: what the act returned.
    """

    code: int
    seconds: float
    words: str = field(repr=False)
    state: str | None = None

    @property
    def found(self) -> Any:
        """What the act returned, if that was JSON."""
        return json.loads(self.state) if self.state else None


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
POINTS_OF_KILLS = tuple(POINTS)
POINTS |= {
    "before initialize": ("minizero.train", "prepare_together", "before"),
    "in initialize": ("minizero.api", "shard", "before"),
    "at the end of initialize": ("minizero.api", "Engine", "before"),
    "before the load": ("minizero.train", "resume", "before"),
    "in the evaluation": ("minizero.train", "bits_per_byte", "before"),
    "waiting for evaluation data": ("minizero.data.loader", "EvaluationLoader._window", "before"),
    "waiting for data": ("minizero.data.loader", "TokenLoader._batch", "before"),
    "waiting for workers": ("torch.utils.data.dataloader", "_BaseDataLoaderIter.__next__", "before"),
}
IN_A_SAVE = POINTS_OF_KILLS[5:]
ON_FIRST_RANK = ("before the manifest", "after the manifest", "before the rename", "after the rename", "after latest")
ON_FIRST_RANK += ("before pruning", "in pruning")


class Nursery:
    """The process that ranks are forked from."""

    def __enter__(self) -> Nursery:
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{here}", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import faults; faults.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, job: Job, kill: Kill | None = None, act: str = "train") -> list[Ended]:
        """Run `job` to its end or death; `act` names a function, of `fault_acts` or this module, that ranks run."""
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
    importlib.import_module("fault_acts")
    torch.set_num_threads(1)
    positions.PATIENCE = 0.2  # what the dead would say is waited for, and here someone dies in every trial
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def attempt(number: int, job: Job, kill: Kill | None, act: str) -> list[Ended]:
    """Fork the ranks, all in one process group, and wait for them. Those that were stopped are killed last."""
    struck_of(job).unlink(missing_ok=True)
    ranks: dict[int, int] = {}
    for rank in range(job.world):
        leader = next(iter(ranks), 0)
        pid = os.fork()
        if pid == 0:
            be_a_rank(number, rank, leader, job, kill, act)
        ranks[pid] = rank
        with contextlib.suppress(OSError):  # it has done so itself
            os.setpgid(pid, leader or pid)
    leader, ends, stopped = next(iter(ranks)), dict[int, tuple[int, float]](), set[int]()
    deadline = time.monotonic() + job.deadline
    while len(ends) < job.world:
        pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        now = time.monotonic()
        if pid in ranks and os.WIFSTOPPED(status):
            stopped.add(pid)
        elif pid in ranks:
            stopped.discard(pid)
            if not ends:
                deadline = min(deadline, now + job.timeout + AFTER_THE_FIRST)
            ends[ranks[pid]] = os.waitstatus_to_exitcode(status), now
        elif now > deadline or len(stopped) + len(ends) == job.world:
            os.killpg(leader, signal.SIGKILL)
        else:
            time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):  # what ranks have left behind, such as a loader's workers
        os.killpg(leader, signal.SIGKILL)
    struck = float(struck_of(job).read_text()) if struck_of(job).exists() else min(end for _, end in ends.values())
    return [
        Ended(code, end - struck, text_of(words_of(job, rank)), text_of(state_of(job, rank)) or None)
        for rank, (code, end) in sorted(ends.items())
    ]


def text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def words_of(job: Job, rank: int) -> Path:
    return Path(job.folder) / f"words{rank}"


def state_of(job: Job, rank: int) -> Path:
    return Path(job.folder) / f"state{rank}"


def struck_of(job: Job) -> Path:
    return Path(job.folder) / "struck"


def strikes_now(job: Job) -> None:
    """Seconds in `Ended` count from here."""
    struck_of(job).write_text(str(time.monotonic()))


def be_a_rank(number: int, rank: int, leader: int, job: Job, kill: Kill | None, act: str) -> None:
    """A rank's whole life; never returns."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives the nursery
        os.setpgid(0, leader)
        words = os.open(words_of(job, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(words, 1)
        os.dup2(words, 2)
        state_of(job, rank).unlink(missing_ok=True)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.world)}
        if kill is not None and kill.rank in (rank, -1):
            arm(job, kill)
        plain, ahead = time.time, rank * job.skew
        time.time = lambda: plain() + ahead
        store = dist.FileStore(f"{job.folder}/.store{number}", job.world)
        limit = datetime.timedelta(seconds=job.timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world, timeout=limit)
        function = globals().get(act) or getattr(importlib.import_module("fault_acts"), act)
        state_of(job, rank).write_text(function(job))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class Progress:
    """How many steps this process has made, for `arm`."""

    steps = 0


def arm(job: Job, kill: Kill) -> None:
    """Have this process meet with what `kill` says, where it says."""
    module, path, when = POINTS[kill.point]
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    plain, passed, process, begins = getattr(owner, name), 0, os.getpid(), time.monotonic() + kill.after

    def pass_by() -> None:
        nonlocal passed
        if Progress.steps >= kill.step and time.monotonic() >= begins and os.getpid() == process:  # not a worker
            passed += 1
            if passed == kill.nth and kill.delay:
                threading.Timer(kill.delay, strike, (job, kill)).start()
            elif passed == kill.nth:
                strike(job, kill)

    def armed(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            pass_by()
        result = plain(*args, **kwargs)
        if when == "after":
            pass_by()
        return result

    setattr(owner, name, armed)


def strike(job: Job, kill: Kill) -> None:
    if kill.rank < 0 and struck_of(job).exists():
        return
    strikes_now(job)
    if isinstance(kill.signal, str):
        hang(kill.signal)
    elif kill.rank < 0 and os.fork() == 0:  # from a process of its own: workers of this one heed their parent
        os.killpg(0, kill.signal)
        os._exit(0)
    elif kill.rank < 0:
        time.sleep(0.01)
    else:
        os.kill(os.getpid(), kill.signal)


def hang(how: str) -> None:
    if how == "in a lock":
        ctypes.PyDLL(None).sleep(60)
    while True:
        time.sleep(0.01)


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
        "dist": {"timeout": job.timeout, "step_timeout": job.step_timeout},
        "checkpoint": {"asynchronous": job.asynchronous, "allow_fallback": job.allow_fallback},
    }
    return minizero.initialize(model=model, config=minizero.Config(**(settings | changes)))[0]


def micro_batches(job: Job, engine: Any, step: int) -> Iterator[Any]:
    """This rank's of one step."""
    generator = torch.Generator().manual_seed(step)
    tokens, labels = torch.randint(toys.VOCAB, (2, toys.BATCH, toys.LENGTH), generator=generator)
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
    while engine.global_steps < job.steps:
        time.sleep(job.details.get("pace", 0.0))
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
