"""Ranks that die, freeze, go astray or disagree: the others say so in time, and what resumes is the same run, bitwise.

A trial forks its ranks (`faults.py`), kills one at a place drawn from a seed, and runs the job again on what is left.
The long campaigns are in `make soak`; `PYTHONPATH=. python tests/test_faults.py COUNT SEED` writes down one.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faults import EVERY, ON_FIRST_RANK, POINTS, STEPS, Ended, Job, Kill, Nursery, logged

from benchmarks.interleave import write_result
from minizero.checkpoint.inspect import listing

TRIALS = 40
JOBS = {
    "zero1": Job("", stage=1),
    "zero2": Job("", stage=2, model="frozen"),
    "zero3": Job("", stage=3),
    "bf16": Job("", stage=3, precision="bf16"),
    "background": Job("", stage=2, asynchronous=True),
    "clocks apart": Job("", stage=1, skew=3600.0),
    "tp2": Job("", model="llama", tp=2),
    "pp2": Job("", model="llama", pp=2, stage=1),
}
HEARD_WITHIN = 3.0  # seconds from a death to the end of the last survivor, on a loaded machine


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


KNOWN: dict[str, tuple[list[str | None], dict[int, set[str]]]] = {}


def straight(nursery: Nursery, name: str, folder: Path) -> tuple[list[str | None], dict[int, set[str]]]:
    """(end states of the ranks, log of rank 0) of the job that nobody kills."""
    if name not in KNOWN:
        job = replace(JOBS[name], folder=str(folder / f"straight-{name}"))
        ended = nursery.run(job)
        assert [one.code for one in ended] == [0] * job.world, ended[0].words
        KNOWN[name] = [one.state for one in ended], logged(job.folder, 0)
        assert len(KNOWN[name][1]) == STEPS and all(len(said) == 1 for said in KNOWN[name][1].values())
    return KNOWN[name]


def draw(chance: random.Random) -> tuple[str, Kill]:
    """A job, and where in it a rank dies."""
    name = chance.choice(list(JOBS))
    return name, draw_for(name, chance)


def draw_for(name: str, chance: random.Random) -> Kill:
    """Where a rank of a job dies."""
    point = chance.choice(list(POINTS))
    if JOBS[name].model == "llama" and point in ("forward", "backward"):
        point = "in a collective"  # a pipeline has its own backward, and llamas their own blocks
    rank = -1 if chance.random() < 0.2 else chance.randrange(JOBS[name].world)
    if point in ON_FIRST_RANK:
        rank = 0
    nth = chance.randint(1, 9) if point in ("in a collective", "in the file", "forward") else 1
    return Kill(rank, chance.randrange(STEPS), point, nth)


def trial(nursery: Nursery, folder: Path, name: str, kill: Kill, *more: Kill) -> tuple[str, list[Ended]]:
    """What went wrong with a run that is killed, once or more often, and continued; nothing is right. The ends of the
    ranks when it was killed first."""
    job = replace(JOBS[name], folder=tempfile.mkdtemp(dir=folder))
    states, log = straight(nursery, name, folder)
    problem, killed = attempt(nursery, job, kill, states)
    for again in more:
        problem = problem or attempt(nursery, job, again, states)[0]
    if problem:
        return problem, killed
    return finish(nursery, job, states, log, kills=1 + len(more)), killed


def attempt(nursery: Nursery, job: Job, kill: Kill, states: list[str | None]) -> tuple[str, list[Ended]]:
    """What is wrong with how a killed attempt ended, and how it did."""
    killed = nursery.run(job, kill)
    died = [rank for rank, one in enumerate(killed) if one.code == -kill.signal]
    for rank, one in enumerate(killed):
        if died and one.code == 0 and one.state != states[rank]:
            return f"rank {rank} ended well, with another state", killed
        if one.code > 0 and not any(word in one.words for word in ("CollectiveError", "CheckpointError")):
            return f"rank {rank} ended with {one.words[-300:]}", killed
        if one.code != -kill.signal and one.seconds > HEARD_WITHIN:
            return f"rank {rank} ended {one.seconds:.1f} s after the death of {died}", killed
    return "", killed


def finish(nursery: Nursery, job: Job, states: list[str | None], log: dict[int, set[str]], kills: int) -> str:
    """What is wrong with the attempt that nobody kills, or with what all attempts logged."""
    checkpoints = Path(job.folder) / "checkpoints"
    steps = [row["step"] for row in listing(checkpoints) if row["problem"] is None] if checkpoints.is_dir() else []
    again = nursery.run(job)
    if [one.code for one in again] != [0] * job.world:
        return f"it does not continue from {steps}: {again[0].words[-500:]}"
    if [one.state for one in again] != states:
        return f"it continues from {steps} to another end"
    if logged(job.folder, 0) != log:
        return f"it continues from {steps} with other losses"
    done_again = len((Path(job.folder) / "log0").read_text().splitlines()) - STEPS
    interval = EVERY + (EVERY if job.asynchronous else 0)  # the last save may be on its way
    if done_again > kills * interval:
        return f"{done_again} steps were done again after {kills} kills, {EVERY} is the interval of checkpoints"
    shutil.rmtree(job.folder)
    return ""


def test_a_killed_run_continues_bitwise(nursery, tmp_path):
    """Every point at least once, then at random; a trial that kills nobody (its point comes after the end) counts as
    none."""
    chance, happened = random.Random(0), 0
    plans = [(draw(chance)[0], point) for point in POINTS]
    kills = []
    for name, point in plans:
        name = "zero1" if point in ("forward", "backward") and JOBS[name].model == "llama" else name
        kills.append((name, Kill(0 if point in ON_FIRST_RANK else 1, 3, point)))
    kills += [draw(chance) for _ in range(TRIALS - len(kills))]
    for number, (name, kill) in enumerate(kills):
        more = [draw_for(name, chance)] if number % 4 == 3 else []  # continued twice
        problem, ended = trial(nursery, tmp_path, name, kill, *more)
        assert not problem, (name, kill, more, problem)
        happened += any(one.code == -kill.signal for one in ended)
    assert happened > 0.8 * TRIALS


def test_what_a_survivor_says(nursery, tmp_path):
    job = replace(JOBS["zero3"], folder=str(tmp_path / "job"))
    survivor, victim = nursery.run(job, Kill(1, 3, "in a collective", 5))
    assert victim.code == -signal.SIGKILL and survivor.code == 1
    assert "rank 0 in step 3 waits for" in survivor.words and "rank 1 does not answer" in survivor.words


def test_a_frozen_rank_is_heard_of_at_the_timeout(nursery, tmp_path):
    """SIGSTOP: nothing closes, so the collective's deadline is what ends the others; the frozen one is killed last."""
    job = replace(JOBS["zero2"], folder=str(tmp_path / "job"), timeout=2.0)
    began = time.monotonic()
    survivor, frozen = nursery.run(job, Kill(1, 2, "before the update", signal=signal.SIGSTOP))
    assert survivor.code == 1 and "failed after" in survivor.words
    assert frozen.code == -signal.SIGKILL
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("how", ("loop", "lock"))
def test_a_stuck_rank_ends_itself_with_its_stacks(nursery, tmp_path, how):
    """An endless loop, and native code that holds the interpreter's lock: the watchdog is not Python's."""
    job = Job(str(tmp_path / "job"), stage=1, timeout=20.0)
    stuck, other = nursery.run(job, act=f"hang_in_a_{how}")
    assert stuck.code == 1 and "Timeout" in stuck.words and "in hang" in stuck.words
    if how == "loop":
        assert "rank 0: a step (step 1) has taken 1 s, the limit of dist.step_timeout" in stuck.words
        assert "reduce_scatter of" in stuck.words
    assert other.code == 1 and other.seconds < HEARD_WITHIN


def test_a_flipped_bit_in_one_replica_is_found_and_named(nursery, tmp_path):
    for world, named in ((2, "ranks [0, 1] disagree (axis dp)"), (3, "rank [1] differs from 2 others (axis dp)")):
        job = Job(str(tmp_path / f"job{world}"), world=world, stage=2)
        for one in nursery.run(job, act="flip_a_bit"):
            assert one.code == 1 and "ReplicaError" in one.words and named in one.words, one.words
            assert "blocks.1" in one.words
    job = Job(str(tmp_path / "tp"), model="llama", tp=2)
    assert all("model.norm.weight" in one.words for one in nursery.run(job, act="flip_a_bit"))
    job = Job(str(tmp_path / "clean"), world=3, stage=0)
    assert [one.code for one in nursery.run(job, act="check_every_step")] == [0, 0, 0]


@pytest.mark.parametrize("kind", ("config", "code", "seed"))
def test_ranks_that_disagree_are_refused_before_the_first_step(nursery, tmp_path, kind):
    ended = nursery.run(Job(str(tmp_path / "job")), act=f"disagree_on_{kind}")
    wanted = {"config": "optimizer.lr = 0.5", "code": "code of minizero = ", "seed": "train.seed = 7"}[kind]
    for one in ended:
        assert one.code == 1 and "ranks were started with different settings" in one.words and wanted in one.words
        assert one.seconds < 2


def test_a_full_disk_leaves_what_was_there(nursery, tmp_path):
    """A limit on the size of files stands for it: the write fails at a byte in the middle, on one rank."""
    job = Job(str(tmp_path / "job"), stage=3)
    for one in nursery.run(job, act="fill_the_disk"):
        assert one.code == 0, one.words
    (row,) = listing(tmp_path / "job" / "checkpoints")
    assert row["step"] == 1 and row["problem"] is None
    assert not list((tmp_path / "job" / "checkpoints").glob(".*"))


def test_a_background_save_that_fails_is_heard_by_all_at_the_next(nursery, tmp_path):
    job = Job(str(tmp_path / "job"), stage=1, asynchronous=True)
    for one in nursery.run(job, act="fail_in_the_background"):
        assert one.code == 0, one.words
    assert [row["tag"] for row in listing(tmp_path / "job" / "checkpoints")] == ["global_step3"]


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


def campaign(count: int, seed: int) -> dict[str, Any]:
    """Run trials of seed `seed` until somebody was killed in `count` of them; what happened."""
    chance, places, failed, slowest, began = random.Random(seed), Counter(), [], 0.0, time.monotonic()
    folder, kills = Path(tempfile.mkdtemp()), 0
    with Nursery() as nursery:
        while kills < count:
            name, kill = draw(chance)
            more = [draw_for(name, chance) for _ in range(chance.choice((0, 0, 0, 1, 2)))]
            problem, ended = trial(nursery, folder, name, kill, *more)
            if problem:
                failed.append(f"{name} {kill} {more}: {problem}")
                print(f"FAILED {failed[-1]}", flush=True)
            if any(one.code == -kill.signal for one in ended):
                kills += 1
                places[f"{kill.point}, {name}"] += 1
                slowest = max([slowest, *(one.seconds for one in ended)])
    shutil.rmtree(folder)
    return {
        "kills": count,
        "seed": seed,
        "failed": failed,
        "bound_95": None if failed else 3 / count,  # the rule of three
        "seconds": time.monotonic() - began,
        "last_survivor_seconds": slowest,
        "places": dict(sorted(places.items())),
    }


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_five_thousand_kills(seed):
    assert not campaign(500, 100 + seed)["failed"]


if __name__ == "__main__":
    found = campaign(int(sys.argv[1]), int(sys.argv[2]))
    print({key: value if key != "places" else len(value) for key, value in found.items()})
    print("written to", write_result("faults", found))
    sys.exit(bool(found["failed"]))
