"""A process that is stuck ends, and says where: while it joins, and in what a loop of the user's own calls."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import DistributedError, run_distributed

import minizero
from minizero.dist import mesh
from minizero.utils.deadline import ends_after


def stuck(*_: Any) -> None:
    """In native code that holds the interpreter's lock, or at least does not look at signals."""
    ctypes.PyDLL(None).sleep(60)


def waiting(*_: Any) -> None:
    time.sleep(60)


def address() -> None:
    dist.destroy_process_group()
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def join(hang: Any) -> None:
    address()
    mesh.agree_on_attempt = hang
    mesh.init_distributed("gloo", timeout=0.3)


def compute(hang: Any, where: str) -> None:
    config = {"train_micro_batch_size_per_gpu": 1, "minizero": {"dist": {"step_timeout": 0.5}}}
    config["optimizer"] = {"type": "SGD", "params": {"lr": 0.1}}
    engine, *_ = minizero.initialize(model=torch.nn.Linear(3, 3), config=config)
    if where == "forward":
        engine.module.register_forward_hook(hang)
    elif where == "backward":
        next(engine.module.parameters()).register_hook(hang)
    else:
        engine.optimizer.step_window = hang
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()


def ending(*call: Any) -> str:
    """What a rank that had to be ended has said."""
    began = time.monotonic()
    with pytest.raises(DistributedError) as caught:
        run_distributed(call[0], 1, *call[1:], timeout=30)
    assert time.monotonic() - began < 20
    assert "the process died: exited with code 1" in caught.value.failures[0]
    return caught.value.failures[0]


def test_a_rank_that_is_stuck_while_it_joins_ends():
    said = ending(join, waiting)
    assert "minizero: rank 0 of 1, joining the job at 127.0.0.1:" in said and "got nowhere in 0.9 s" in said
    assert "in waiting" in said  # the stack
    assert "in stuck" in ending(join, stuck)


@pytest.mark.parametrize("where", ("forward", "backward", "an update"))
def test_a_loop_of_the_users_own_is_watched(where):
    said = ending(compute, waiting, where)
    assert f"rank 0: {where} (step 0) has taken 0.5 s, the limit of dist.step_timeout" in said and "in waiting" in said


def come_alone() -> str:
    address()
    os.environ |= {"WORLD_SIZE": "3"}
    with pytest.raises(ConnectionError) as caught:
        mesh.init_distributed("gloo", timeout=0.5)
    return str(caught.value)


def find_nobody() -> str:
    address()
    os.environ |= {"WORLD_SIZE": "3", "RANK": "1"}
    with pytest.raises(ConnectionError) as caught:
        mesh.init_distributed("gloo", timeout=0.5)
    return str(caught.value)


def test_who_does_not_come_is_said():
    (said,) = run_distributed(come_alone, 1)
    assert said.startswith("rank 0 of 3, joining the job at 127.0.0.1:")
    assert "failed: " in said and "1/3" in said  # torch's own words
    (said,) = run_distributed(find_nobody, 1)
    assert said.startswith("rank 1 of 3, joining the job at 127.0.0.1:") and "failed: " in said


def make_a_group(alone: int) -> str | None:
    if dist.get_rank() != alone:
        return None
    with pytest.raises(ConnectionError) as caught:
        mesh.new_group([0, 1], timeout=0.5)
    return str(caught.value)


@pytest.mark.parametrize("alone", (0, 1))
def test_a_group_that_a_rank_does_not_come_to_is_named(alone):
    said = run_distributed(make_a_group, 2, alone)[alone]
    assert said is not None and said.startswith(f"rank {alone}, making a group of ranks [0, 1], failed: "), said


def test_a_store_in_a_file_is_the_same_error(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 2)
    with pytest.raises(ConnectionError, match="^rank 0 failed: Wait timeout"), mesh.joining("rank 0", 1.0):
        store.wait(["nobody"], timedelta(seconds=0.1))


AGENT = """
import os, signal, subprocess, sys, time
frozen, busy = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
frozen.send_signal(signal.SIGSTOP)
os.waitpid(frozen.pid, os.WUNTRACED)
rank = "from minizero.observe.watchdog import end_stopped_siblings; print(end_stopped_siblings())"
for more in {}, {"TORCHELASTIC_RUN_ID": "1"}:
    print(subprocess.run([sys.executable, "-c", rank], env=os.environ | more, capture_output=True, text=True).stdout)
print([frozen.pid], frozen.poll(), busy.poll())
busy.kill()
"""


def test_a_stopped_sibling_is_ended_and_one_that_runs_is_not():
    """Under torchrun only, whose agent is the parent: elsewhere a sibling may be anybody's."""
    done = subprocess.run([sys.executable, "-c", AGENT], capture_output=True, text=True, timeout=60)
    nobody, ended, (number, *codes) = *done.stdout.split("\n\n")[:2], done.stdout.splitlines()[-1].split()
    assert (nobody, ended, codes) == ("[]", number, ["-9", "None"]), done.stdout + done.stderr


def test_the_outer_deadline_counts(capfd):
    with ends_after(30.0, lambda: "outer"), ends_after(0.05, lambda: "inner"):
        time.sleep(0.3)
    with ends_after(30.0, lambda: "again"):
        pass
    with ends_after(0.05, lambda: "told"):
        time.sleep(0.3)
    sys.stderr.flush()
    assert "told" in capfd.readouterr().err
