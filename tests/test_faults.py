"""What ranks say when one of them dies, and when a checkpoint is damaged; how often all goes well is `matrix.py`'s."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest
from faults import EVERY, STEPS, Job, Kill
from torch.utils.data import DataLoader

from minizero.data import outlive_signals


def test_what_a_survivor_says(nursery, tmp_path):
    job = Job(str(tmp_path / "job"), stage=3)
    survivor, victim = nursery.run(job, Kill(1, 3, "in a collective", 5))
    assert victim.code == -signal.SIGKILL and survivor.code == 1
    assert "rank 0 in step 3 waits for" in survivor.words and "rank 1 does not answer" in survivor.words


def test_what_a_stuck_rank_says(nursery, tmp_path):
    job = Job(str(tmp_path / "job"), stage=1, timeout=20.0, step_timeout=1.0)
    stuck, _ = nursery.run(job, Kill(0, 1, "before the update", signal="in a loop"))
    assert "rank 0: a step (step 1) has taken 1 s, the limit of dist.step_timeout" in stuck.words
    assert "reduce_scatter of" in stuck.words and "in hang" in stuck.words


def test_a_damaged_checkpoint_is_passed_over_only_when_asked(nursery, tmp_path):
    job = Job(str(tmp_path / "job"), stage=2)
    nursery.run(job)
    newest = tmp_path / "job" / "checkpoints" / f"global_step{STEPS}"
    with open(newest / "rank00001.safetensors", "r+b") as file:
        file.seek(3000)
        file.write(b"damage")
    for one in nursery.run(job):
        assert one.code == 1 and f"global_step{STEPS - EVERY} looks whole" in one.words
        assert "rank00001.safetensors is damaged" in one.words
    straight_states = [one.state for one in nursery.run(replace(job, folder=str(tmp_path / "straight")))]
    again = nursery.run(replace(job, allow_fallback=True))
    assert [one.state for one in again] == straight_states
    assert "Falling back to" in again[0].words


def pid_later(item: int) -> int:
    time.sleep(0.05)
    return os.getpid()


class Items:
    def __len__(self) -> int:
        return 8

    __getitem__ = staticmethod(pid_later)


@pytest.mark.parametrize("sent", (signal.SIGTERM, signal.SIGUSR1))
def test_a_loaders_worker_outlives_the_signal_and_heeds_its_parent(sent):
    """torchrun signals a rank's whole process group, so a worker gets it from a process that is not its parent."""
    loader = DataLoader(Items(), num_workers=1, worker_init_fn=outlive_signals)
    batches = iter(loader)
    (worker,) = set(next(batches).tolist())
    if os.fork() == 0:
        os.kill(worker, sent)
        os._exit(0)
    os.wait()
    assert {int(pid) for pid in batches} == {worker}
    stuck = iter(loader)
    (worker,) = set(next(stuck).tolist())
    os.kill(worker, signal.SIGTERM)
    stuck._workers[0].join(5)
    assert stuck._workers[0].exitcode == 0
