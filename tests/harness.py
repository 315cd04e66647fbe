"""Runs a function on several gloo ranks, from inside an ordinary pytest test.

    def all_ranks_sum(value):                       # module level: it is pickled by reference
        ...
        return total

    def test_sum():
        assert run_distributed(all_ranks_sum, 4, 10) == [40, 40, 40, 40]

Why a pool: importing torch costs seconds, so up to `MAX_WORLD_SIZE` worker processes live as long as the test
session. They are forked from a server that has torch imported, so replacing one costs milliseconds. Why so
strict about failures: a distributed test that hangs, or whose rank dies unseen, hides the defect it found. So a
raising rank, a dead rank and a hanging rank are each named in one `DistributedError`, with what the rank printed.
After any failure the workers that took part are killed and replaced: their state can no longer be trusted.

Test code only: this is the one place in the project that uses pickle.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import itertools
import math
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MAX_WORLD_SIZE = 8
GROUP_TIMEOUT = timedelta(seconds=30)
GRACE_AFTER_FAILURE = 5.0
"""Seconds the other ranks get to finish (and to fail with a message of their own) once one rank has failed."""

PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "pytest", "minizero.train", "training"]
"""What the fork server imports: the first step of an optimizer imports torch._dynamo, which takes seconds."""

TESTS_DIR = Path(__file__).resolve().parent
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": os.pathsep.join([str(TESTS_DIR.parent), str(TESTS_DIR)]),
    **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
}


class DistributedError(AssertionError):
    """One or more ranks failed. `failures` maps each failing rank to its text, first failure first."""

    def __init__(self, name: str, world_size: int, failures: dict[int, str]) -> None:
        self.failures = failures
        ranks = ", ".join(map(str, failures))
        parts = [f"{name} failed on rank(s) {ranks} of {world_size}, first failure first"]
        parts += [f"--- rank {rank} ---\n{text}" for rank, text in failures.items()]
        super().__init__("\n".join(parts))


@dataclass(frozen=True)
class Task:
    """What one worker is asked to run as one rank."""

    call: bytes
    """The pickled `(fn, args, kwargs)`."""
    rank: int
    world_size: int
    store_port: int
    run_id: int


@dataclass(frozen=True, order=True)
class Failure:
    """What went wrong on a rank, ordered by when."""

    time: float
    """`time.monotonic`, one clock for all processes. A death counts as 0: it is a cause, hardly ever a consequence."""
    text: str


# ---------------------------------------------------------------------------------------------- worker side


def _serve(connection: Connection, output_path: str) -> None:
    """A worker's life: run tasks until the parent closes its end of the pipe or dies."""
    _redirect_output(output_path)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_exit_with_parent, daemon=True, name="watch-parent").start()
    torch.set_num_threads(1)
    while True:
        try:
            task: Task = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(_run_task(task)))


def _redirect_output(path: str) -> None:
    """Send stdout and stderr, including what C++ prints, to a file that outlives a killed worker."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), write_through=True)


def _exit_with_parent() -> None:
    """No orphans: a worker stuck in a collective must not outlive a killed test session."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _run_task(task: Task) -> bytes | Failure:
    """Returns the pickled result, or what went wrong."""
    failed_at = math.inf
    try:
        with _clean_state(task.rank, task.world_size), _process_group(task):
            try:
                fn, args, kwargs = pickle.loads(task.call)
                return pickle.dumps(fn(*args, **kwargs))
            except BaseException:
                failed_at = time.monotonic()  # before the group is destroyed, which makes the other ranks fail
                raise
    except BaseException:  # SystemExit and pytest's own outcomes are results too, not reasons to lose a worker
        return Failure(min(failed_at, time.monotonic()), traceback.format_exc())


@contextlib.contextmanager
def _clean_state(rank: int, world_size: int) -> Iterator[None]:
    """Each call starts from the same seeds and environment, whatever ran before in this process."""
    environment, cwd = dict(os.environ), os.getcwd()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    torch.manual_seed(0)
    random.seed(0)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)


@contextlib.contextmanager
def _process_group(task: Task) -> Iterator[None]:
    """A fresh default group; the run's prefix keeps its keys apart from every other run's."""
    server = dist.TCPStore("127.0.0.1", task.store_port, is_master=False, timeout=GROUP_TIMEOUT)
    store = dist.PrefixStore(f"run{task.run_id}", server)
    dist.init_process_group("gloo", store=store, rank=task.rank, world_size=task.world_size, timeout=GROUP_TIMEOUT)
    wait_for_all(store, task.world_size)
    try:
        yield
    finally:
        if dist.is_initialized():  # the function may have destroyed it itself
            dist.destroy_process_group()


def wait_for_all(store: dist.Store, world_size: int) -> None:
    """Return when all ranks have connected: who is done at once, and leaves, would break off another's connecting."""
    if store.add("connected", 1) == world_size:
        store.set("everyone", "")
    store.wait(["everyone"])


# ---------------------------------------------------------------------------------------------- parent side


@dataclass
class Worker:
    """One live worker process, its pipe, and the file that holds what it printed."""

    process: Any
    connection: Connection
    output: Path

    def printed(self) -> str:
        """What the worker printed since the last `forget_printed`."""
        text = self.output.read_text(errors="replace").strip()
        return f"\n[printed]\n{text}" if text else ""

    def forget_printed(self) -> None:
        os.truncate(self.output, 0)

    def dump_stacks(self) -> None:
        """Ask faulthandler to append every thread's stack to what the worker printed."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.output.unlink(missing_ok=True)


@dataclass
class Pool:
    """Workers for up to `MAX_WORLD_SIZE` ranks, started when first needed; `calls` counts completed runs."""

    calls: int = 0
    workers: list[Worker] = field(default_factory=list)
    _serial: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="harness-")
        self._context = multiprocessing.get_context("forkserver")
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=GROUP_TIMEOUT)
        self._context.set_forkserver_preload(PRELOADED)
        with _environment(WORKER_ENVIRONMENT):
            multiprocessing.forkserver.ensure_running()

    def run(self, call: bytes, name: str, world_size: int, timeout: float) -> list[Any]:
        """See `run_distributed`; `call` is the pickled `(fn, args, kwargs)`."""
        self._prepare(world_size)
        run_id = next(self._serial)
        workers = self.workers[:world_size]
        for rank, worker in enumerate(workers):
            task = Task(call, rank, world_size, self._store.port, run_id)
            with contextlib.suppress(BrokenPipeError):  # died just now: its sentinel will tell
                worker.connection.send_bytes(pickle.dumps(task))
        results, failures = _collect(workers, timeout)
        if failures:
            self._retire(world_size)
            raise DistributedError(name, world_size, failures)
        self.calls += 1
        return [pickle.loads(results[rank]) for rank in range(world_size)]

    def close(self) -> None:
        """Kill every worker; the pool can still be used afterwards, and starts new ones."""
        self._retire(len(self.workers))

    def _prepare(self, world_size: int) -> None:
        """Have `world_size` live workers, replacing those that died while idle."""
        for worker in [w for w in self.workers if not w.process.is_alive()]:
            worker.kill()
            self.workers.remove(worker)
        while len(self.workers) < world_size:
            self.workers.append(self._start_worker())
        for worker in self.workers[:world_size]:
            worker.forget_printed()

    def _retire(self, count: int) -> None:
        for worker in self.workers[:count]:
            worker.kill()
        del self.workers[:count]

    def _start_worker(self) -> Worker:
        output = Path(self._folder.name) / f"worker{next(self._serial)}.txt"
        output.touch()
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, str(output)), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours, output)


def _collect(workers: list[Worker], timeout: float) -> tuple[dict[int, bytes], dict[int, str]]:
    """Wait for every rank's answer, death or the deadline. Returns (results, failures by time), each by rank."""
    results: dict[int, bytes] = {}
    failures: dict[int, Failure] = {}
    pending = dict(enumerate(workers))
    start = time.monotonic()
    deadline = start + timeout
    while pending and (left := deadline - time.monotonic()) > 0:
        handles = [handle for w in pending.values() for handle in (w.connection, w.process.sentinel)]
        ready = set(wait(handles, timeout=left))
        for rank, worker in list(pending.items()):
            if not ready & {worker.connection, worker.process.sentinel}:
                continue
            del pending[rank]
            answer = _read_answer(worker)
            if isinstance(answer, Failure):
                failures[rank] = answer
                deadline = min(deadline, time.monotonic() + GRACE_AFTER_FAILURE)
            else:
                results[rank] = answer
    texts = {rank: failure.text for rank, failure in sorted(failures.items(), key=lambda item: item[1])}
    texts |= _dump_hanging(pending, time.monotonic() - start)
    return results, {rank: text + workers[rank].printed() for rank, text in texts.items()}


def _read_answer(worker: Worker) -> bytes | Failure:
    """The worker's pickled result or its failure; a death is a failure whose text names the signal."""
    if worker.connection.poll():  # an answer sent just before dying still counts
        with contextlib.suppress(EOFError, ConnectionResetError):
            return pickle.loads(worker.connection.recv_bytes())
    worker.process.join()
    code = worker.process.exitcode
    cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    return Failure(0.0, f"the process died: {cause}")


def _dump_hanging(pending: dict[int, Worker], seconds: float) -> dict[int, str]:
    """Have each rank that has not answered print the stack of all its threads."""
    for worker in pending.values():
        worker.dump_stacks()
    if pending:
        time.sleep(0.3)  # faulthandler writes from a signal handler: give it the time to
    return dict.fromkeys(pending, f"no answer after {seconds:.1f} s, killed")


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the fork server, which keeps what it is started with."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


POOL: list[Pool] = []
"""The session's pool: empty until the first call, then one element."""


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, **kwargs: Any
) -> list[Any]:
    """Run `fn(*args, **kwargs)` on `world_size` gloo ranks and return the results in rank order.

    Each rank has a fresh default process group, RANK/LOCAL_RANK/WORLD_SIZE/LOCAL_WORLD_SIZE in its environment,
    `torch.manual_seed(0)` and one thread. `fn` is a module-level function; arguments and results are pickled.

    Args:
        timeout: seconds for the whole call; a rank that has not answered then is killed and its stack shown.

    Raises:
        DistributedError: a rank raised, died or hung; names each failing rank with its traceback and output.
        ValueError: `world_size` is not in 1..8.
    """
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise ValueError(f"world_size is {world_size}; legal: 1 to {MAX_WORLD_SIZE}")
    if not POOL:
        POOL.append(Pool())
    return POOL[0].run(pickle.dumps((fn, args, kwargs)), fn.__qualname__, world_size, timeout)


def completed_calls() -> int:
    """Distributed calls that succeeded on every rank so far in this session."""
    return POOL[0].calls if POOL else 0
