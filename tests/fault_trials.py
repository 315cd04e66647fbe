"""One random trial of each row of the fault matrix (`matrix.py`): what is drawn, and what must come of it.

A trial is given a nursery, a folder and a source of chance, and returns an `Outcome`. What trials have in common (the
same job without a fault, checkpoints to be damaged, a corpus) is made once for each folder, and kept beside them.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fault_acts import SAMPLE, resident
from faults import EVERY, IN_A_SAVE, ON_FIRST_RANK, POINTS_OF_KILLS, STEPS, Ended, Job, Kill, Nursery, logged
from safetensors.torch import save_file
from test_checkpoint_layouts import BATCH, Layout, on_disk, same
from test_data_order import stream_of
from test_train import furnish
from training import relative_error

from minizero.checkpoint import CheckpointError
from minizero.checkpoint.inspect import listing, verify
from minizero.checkpoint.tensor_file import TensorFile
from minizero.data.sampler import sample_indices
from minizero.run_folder import INTERRUPTED, REQUEUE

HEARD_WITHIN = 3.0  # seconds from a death to the end of the last survivor, on a loaded machine


@dataclass(frozen=True)
class Outcome:
    """problem: what went otherwise than it must; "" is right. seconds: until the fault was heard of, where that counts.

    drawn: what kind of trial it was, for counting.
    """

    problem: str = ""
    seconds: float | None = None
    drawn: str = ""


Trial = Callable[[Nursery, Path, random.Random], Outcome]

JOBS = {
    "zero1": Job("", stage=1),
    "zero2 frozen": Job("", stage=2, model="frozen"),
    "zero3": Job("", stage=3),
    "zero3 untied": Job("", stage=3, model="outside"),
    "zero3 bf16": Job("", stage=3, precision="bf16"),
    "zero2 fp16": Job("", stage=2, precision="fp16"),
    "three ranks": Job("", stage=3, world=3, model="adapters"),
    "background": Job("", stage=2, asynchronous=True),
    "background zero3": Job("", stage=3, asynchronous=True, precision="bf16", model="big_embedding"),
    "clocks apart": Job("", stage=1, skew=3600.0),
    "tp2": Job("", model="llama", tp=2),
    "tp2 zero3": Job("", model="llama", world=4, tp=2, stage=3),
    "pp2": Job("", model="llama", pp=2, stage=1),
}
KNOWN: dict[tuple[str, ...], Any] = {}


def once(make: Callable[[Path], Any], folder: Path, *key: str) -> Any:
    """What `make` gives for a folder of its own beside those of the trials; made once."""
    full = (str(folder), *key)
    if full not in KNOWN:
        KNOWN[full] = make(Path(tempfile.mkdtemp(dir=folder)))
    return KNOWN[full]


def straight(nursery: Nursery, job: Job, folder: Path) -> tuple[list[str | None], dict[int, set[str]]]:
    """(end states of the ranks, log of rank 0) of the job that nothing befalls."""

    def make(place: Path) -> Any:
        ended = nursery.run(replace(job, folder=str(place)))
        assert [one.code for one in ended] == [0] * job.world, ended[0].words
        log = logged(str(place), 0)
        assert len(log) == job.steps and all(len(said) == 1 for said in log.values())
        return [one.state for one in ended], log

    return once(make, folder, "straight", json.dumps(asdict(replace(job, folder="", skew=0.0))))


def placed(job: Job, folder: Path, **changes: Any) -> Job:
    """The job in a new folder."""
    return replace(job, folder=tempfile.mkdtemp(dir=folder), **changes)


def clean(job: Job, problem: str) -> str:
    """`problem`; the folder of a trial that went well is removed."""
    if not problem:
        shutil.rmtree(job.folder)
    return problem


def not_all_well(ended: list[Ended]) -> str:
    """What is wrong with ranks that should all have ended well."""
    bad = [f"rank {rank} ended with {one.code}: {one.words[-600:]}" for rank, one in enumerate(ended) if one.code]
    return "; ".join(bad)


# ---- 1, 2: killed ----


def draw_kill(job: Job, chance: random.Random) -> Kill:
    """Where a rank of a job dies; or all of them at once."""
    point = chance.choice(POINTS_OF_KILLS)
    if job.model == "llama" and point in ("forward", "backward"):
        point = "in a collective"  # a pipeline has its own backward, and llamas their own blocks
    rank = -1 if chance.random() < 0.2 else 0 if point in ON_FIRST_RANK else chance.randrange(job.world)
    return Kill(rank, chance.randrange(STEPS), point, draw_nth(point, chance))


def draw_nth(point: str, chance: random.Random) -> int:
    return chance.randint(1, 9) if point in ("in a collective", "in the file", "forward") else 1


def killed(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """Killed once to three times, then continued. Draws again where nobody was killed: the point came after the end."""
    while True:
        name = chance.choice(list(JOBS))
        kills = [draw_kill(JOBS[name], chance) for _ in range(chance.choice((1, 1, 1, 2, 3)))]
        outcome = kill_and_continue(nursery, folder, name, kills)
        if outcome.problem or outcome.seconds is not None:
            return outcome


def killed_in_a_save(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """All ranks at the same moment, while a checkpoint is written; what was there before is whole and is loaded."""
    while True:
        name = chance.choice(list(JOBS))
        point = chance.choice(IN_A_SAVE)
        kill = Kill(-1, chance.randrange(STEPS), point, draw_nth(point, chance), delay=chance.choice((0, 0.002)))
        outcome = kill_and_continue(nursery, folder, name, [kill])
        if outcome.problem or outcome.seconds is not None:
            return outcome


def kill_and_continue(nursery: Nursery, folder: Path, name: str, kills: list[Kill]) -> Outcome:
    """A run that is killed, and continued to its end; without seconds when nobody was killed."""
    states, log = straight(nursery, JOBS[name], folder)
    job, seconds = placed(JOBS[name], folder), None
    for kill in kills:
        ended = nursery.run(job, kill)
        if problem := wrong_with_killed(job, ended, kill, states):
            return Outcome(problem, drawn=f"{name}, {kills}")
        if any(one.code == -kill.signal for one in ended):
            seconds = max([seconds or 0.0, *(one.seconds for one in ended if not is_joining(one))])
    problem = wrong_with_continued(nursery, job, states, log, len(kills))
    return Outcome(clean(job, problem), seconds, f"{name}, {kills[0].point}" if not problem else f"{name}, {kills}")


HEARD = ("CollectiveError", "CheckpointError", "ConnectionError")


def is_joining(one: Ended) -> bool:
    """Whether a rank was making a group, where gloo hears nothing of a death: it waits until the timeout."""
    return "ConnectionError" in one.words and "making a group" in one.words


def wrong_with_killed(job: Job, ended: list[Ended], kill: Kill, states: list[str | None]) -> str:
    died = [rank for rank, one in enumerate(ended) if one.code == -int(kill.signal)]
    for rank, one in enumerate(ended):
        if died and one.code == 0 and one.state != states[rank]:
            return f"rank {rank} ended well, with another state"
        if one.code > 0 and not any(word in one.words for word in HEARD):
            return f"rank {rank} ended with {one.words[-300:]}"
        if one.code < 0 and rank not in died:
            return f"rank {rank} ended with {one.code}"
        if rank not in died and one.seconds > HEARD_WITHIN + (job.timeout if is_joining(one) else 0):
            return f"rank {rank} ended {one.seconds:.1f} s after the death of {died}"
    checkpoints = Path(job.folder) / "checkpoints"
    if (checkpoints / "latest").exists():
        verify(checkpoints / (checkpoints / "latest").read_text())  # raises where it is not whole
    return ""


def wrong_with_continued(
    nursery: Nursery, job: Job, states: list[str | None], log: dict[int, set[str]], kills: int
) -> str:
    """What is wrong with the attempt that nothing befalls, or with what all attempts logged."""
    checkpoints = Path(job.folder) / "checkpoints"
    steps = [row["step"] for row in listing(checkpoints) if row["problem"] is None] if checkpoints.is_dir() else []
    again = nursery.run(job)
    if problem := not_all_well(again):
        return f"it does not continue from {steps}: {problem}"
    if [one.state for one in again] != states:
        return f"it continues from {steps} to another end"
    if logged(job.folder, 0) != log:
        return f"it continues from {steps} with other losses"
    done_again = len((Path(job.folder) / "log0").read_text().splitlines()) - job.steps
    interval = EVERY + (EVERY if job.asynchronous else 0)  # the last save may be on its way
    if done_again > kills * interval:
        return f"{done_again} steps were done again after {kills} kills, {EVERY} is the interval of checkpoints"
    return ""


# ---- 3: frozen ----

FROZEN_AFTER = 1.5  # seconds: both dist.timeout and dist.step_timeout


def frozen(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """Stopped, or stuck in a loop or in native code: it ends with its stacks, the others with what they waited for."""
    name = chance.choice([name for name, job in JOBS.items() if not job.asynchronous and not job.skew])
    job = placed(JOBS[name], folder, timeout=FROZEN_AFTER, step_timeout=FROZEN_AFTER)
    point = chance.choice([point for point in POINTS_OF_KILLS if point != "after the save"])
    if job.model == "llama" and point in ("forward", "backward"):
        point = "in a collective"
    rank = 0 if point in ON_FIRST_RANK else chance.randrange(job.world)
    how = chance.choice((int(signal.SIGSTOP), "in a loop", "in a lock"))
    pruning = point == "in pruning"  # the first pruning of a folder comes with the third save
    step = 4 if pruning else chance.randrange(1, 4)
    drawn = f"{name}, {how}, {point}, step {step}"
    ended = nursery.run(job, Kill(rank, step, point, signal=how))
    struck = [one for one in ended if one.code]
    if not struck:
        return Outcome(f"nothing happened: {[one.code for one in ended]}", drawn=drawn)
    for place, one in enumerate(ended):
        if place == rank and how == int(signal.SIGSTOP):
            continue  # the nursery kills it: in a job that is its agent's to do
        if place == rank and not (one.code == 1 and "Timeout" in one.words and "in hang" in one.words):
            return Outcome(f"rank {rank} is stuck, and ended with {one.code}: {one.words[-500:]}", drawn=drawn)
        if place != rank and not (one.code == 1 and ("CollectiveError" in one.words or "Timeout" in one.words
                                                      or "CheckpointError" in one.words)):  # fmt: skip
            return Outcome(f"rank {place} ended with {one.code}: {one.words[-500:]}", drawn=drawn)
    live = [one.seconds for place, one in enumerate(ended) if place != rank or how != int(signal.SIGSTOP)]
    return Outcome(clean(job, ""), max(live), f"{name}, {how}")


# ---- 4: told to stop ----

INTERRUPTED_AT = {
    "initialize": ("before initialize", "in initialize", "at the end of initialize", "before the load"),
    "a step": ("backward", "in a collective", "before the update", "after the update"),
    "evaluation": ("in the evaluation", "waiting for evaluation data"),
    "data": ("waiting for data",),
    "a save": IN_A_SAVE,
}
LAYOUTS = {
    "zero1": (2, "--zero.stage 1"),
    "zero2": (2, "--zero.stage 2"),
    "zero3": (2, "--zero.stage 3 --precision bf16"),
    "tp2": (2, "--parallel.tp 2 --zero.stage 0"),
    "pp2": (2, "--parallel.pp 2 --zero.stage 1"),
    "three": (3, "--zero.stage 3 --train.global_batch_size 6"),
}


def told_to_stop(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """SIGTERM or SIGUSR1, to one rank or to all and their children, somewhere in `minizero.train`."""
    name, place = chance.choice(list(LAYOUTS)), chance.choice(list(INTERRUPTED_AT))
    point, has_workers = chance.choice(INTERRUPTED_AT[place]), place in ("data", "a step") and chance.random() < 0.6
    if has_workers and place == "data":
        point = "waiting for workers"
    if name == "pp2" and point == "backward":
        point = "in a collective"
    world, more = LAYOUTS[name]
    first = place == "initialize"
    kill = Kill(
        0 if point in ON_FIRST_RANK else -1 if has_workers else chance.choice((-1, *range(world))),
        0 if first else 1 if place in ("a save", "evaluation") else chance.randrange(4),
        point,
        draw_nth(point, chance) if not first else 1,
        chance.choice((int(signal.SIGTERM), int(signal.SIGUSR1))),
        chance.choice((0.0, 0.0, 0.003, 0.02)),
    )
    drawn = f"{place}, {name}{', workers' if has_workers else ''}"
    corpus = once(furnish, folder, "corpus")
    asynchronous = place == "a save" and chance.random() < 0.5

    def job_in(place: Path, *given: str, **details: Any) -> Job:
        shared = ["--data.source", str(corpus / "corpus"), "--data.dir", str(corpus / "data"), "--run.dir", "run"]
        shared += (
            "--model.num_heads 2 --train.eval_every 2 --checkpoint.every 2 --train.steps 6 --dist.timeout 5".split()
        )
        arguments = [str(corpus / "tiny.toml"), *shared, "--precision", "fp32", *more.split(), *given]
        return Job(str(place), world=world, details={"arguments": arguments, **details})

    def reference(place: Path) -> Any:
        ended = nursery.run(job_in(place), act="run_the_job")
        assert not not_all_well(ended) and all(one.found["code"] == 0 for one in ended), ended[0].words
        return [one.found["state"] for one in ended], losses_of(place)

    wanted = once(reference, folder, "job", name)
    job = job_in(Path(tempfile.mkdtemp(dir=folder)), "--checkpoint.asynchronous", str(asynchronous).lower(),
                 workers=has_workers)  # fmt: skip
    problem, seconds = stop_and_continue(nursery, job, kill, wanted)
    return Outcome(
        clean(job, problem), seconds, drawn if not problem else f"{drawn}, {kill}, background {asynchronous}"
    )


def stop_and_continue(nursery: Nursery, job: Job, kill: Kill, wanted: Any) -> tuple[str, float | None]:
    """(what is wrong, seconds from the signal to the last rank's end)."""
    ended, run = nursery.run(job, kill, act="run_the_job"), Path(job.folder) / "run"
    if problem := not_all_well(ended):
        return problem, None
    codes = {one.found["code"] for one in ended}
    if len(codes) > 1 or not codes <= {REQUEUE, 0}:
        return f"exit codes {[one.found['code'] for one in ended]}: {ended[0].words[-500:]}", None
    seconds = max(one.seconds for one in ended)
    if codes == {0}:  # the signal came after the last exchange
        return "" if [one.found["state"] for one in ended] == wanted[0] else "another end", None
    step = json.loads((run / INTERRUPTED).read_text())["step"]
    saved = (run / "checkpoints" / "latest").read_text()
    if saved != f"global_step{step}" or verify(run / "checkpoints" / saved).counters.global_steps != step:
        return f"it stopped after step {step}, and saved {saved}", None
    if [number for number, _ in losses_of(Path(job.folder))] != list(range(1, step + 1)):
        return f"it stopped after step {step}, and metrics.jsonl has other ones", None
    again = nursery.run(replace(job, details={**job.details, "workers": False}), act="run_the_job")
    if problem := not_all_well(again):
        return f"it does not continue: {problem}", None
    if [one.found["state"] for one in again] != wanted[0]:
        return f"it continues from {saved} to another end: {again[0].words[-500:]}", None
    return "" if losses_of(Path(job.folder)) == wanted[1] else f"it continues from {saved} with other losses", seconds


def losses_of(folder: Path) -> list[tuple[int, float]]:
    file = folder / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(row["step"], row["loss"]) for row in rows]


# ---- 6 to 9: checkpoints ----


def full_disk(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """A limit on the size of files stands for it: the write fails at a byte drawn, on some ranks."""
    name = chance.choice(list(JOBS))
    world = JOBS[name].world
    ranks = chance.sample(range(world), chance.randint(1, world))
    job = placed(JOBS[name], folder, details={"ranks": ranks, "share": chance.random()})
    ended = nursery.run(job, act="fill_the_disk")
    problem, checkpoints = not_all_well(ended), Path(job.folder) / "checkpoints"
    for one in ended if not problem else ():
        said = one.found["said"]
        if not any(f"rank {rank}: no space for" in said for rank in ranks) or "needs" not in said or "has" not in said:
            problem = f"it said {said!r}"
        elif one.found["left"]:
            problem = f"left behind: {one.found['left']}"
        elif not one.found["unchanged"]:
            problem = "the state has changed"
    rows = [(row["step"], row["problem"]) for row in listing(checkpoints)] if not problem else []
    if not problem and (rows != [(3, None), (1, None)] or list(checkpoints.glob(".*"))):
        problem = f"there is {[path.name for path in checkpoints.iterdir()]}: {rows}"
    return Outcome(clean(job, problem), drawn=f"{name}, {len(ranks)} of {job.world}")


DAMAGED = {
    "zero1": Job("", stage=1),
    "zero3": Job("", stage=3, model="frozen", precision="bf16"),
    "tp2": Job("", model="llama", tp=2),
    "pp2": Job("", model="llama", pp=2, stage=1),
}
AT_ONCE = 50  # damages to one checkpoint, by ranks that are forked once


def damage(kind: str) -> Trial:
    """Trials that damage a checkpoint, load it, and see it refused by name."""

    def trial(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
        name = chance.choice(list(DAMAGED))
        saved = once(lambda place: saved_by(nursery, DAMAGED[name], place), folder, "saved", name)
        job = placed(DAMAGED[name], folder)
        job = replace(job, details={"saved": str(saved), "seed": chance.random(), "count": AT_ONCE, "kind": kind})
        ended = nursery.run(job, act="load_damaged")
        problem = not_all_well(ended) or "; ".join(said for one in ended for said in one.found[:2])
        return Outcome(clean(job, problem), drawn=name)

    return trial


def saved_by(nursery: Nursery, job: Job, place: Path) -> Path:
    """A folder with two checkpoints, of steps 2 and 4."""
    ended = nursery.run(replace(job, folder=str(place), steps=4))
    assert not not_all_well(ended), ended[0].words
    return place / "checkpoints"


def mutated_manifests(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """Loaded, or refused by the documented error; what is not read may be anything. No growth of memory."""
    saved = once(lambda place: saved_by(nursery, Job("", world=1), place), folder, "saved", "one")
    job = placed(Job("", world=1), folder, details={"saved": str(saved), "seed": chance.random(), "count": MUTANTS})
    (ended,) = nursery.run(job, act="load_mutants")
    problem = not_all_well([ended])
    if not problem:
        found = ended.found
        problem = "; ".join(found["others"])
        problem = problem or (f"grew by {found['grown']} MiB" if found["grown"] > 32 else "")
        problem = problem or (f"{found['refused']} refused" if found["refused"] < MUTANTS // 2 else "")
    return Outcome(clean(job, problem))


MUTANTS = 500  # of one call


def mutated_headers(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """Files whose first bytes were changed: the documented error, or what they claim to hold; no growth of memory."""

    def make(place: Path) -> Path:
        save_file({"a": torch.randn(15, 17), "b": torch.arange(7), "c": torch.ones(())}, place / "x.safetensors")
        open_mutants(place / "x.safetensors", 50, random.Random(0))
        return place / "x.safetensors"

    path, before = once(make, folder, "header"), resident()
    refused = open_mutants(path, MUTANTS, chance)
    grown = (resident() - before) >> 20
    problem = f"grew by {grown} MiB" if grown > 32 else f"{refused} refused" if refused < MUTANTS // 2 else ""
    return Outcome(problem)


def open_mutants(path: Path, count: int, chance: random.Random) -> int:
    """How many of `count` mutants of a file were refused. Whatever else they raise is raised."""
    whole, refused = path.read_bytes(), 0
    length = int.from_bytes(whole[:8], "little")
    mutant = path.with_name("mutant.safetensors")
    for _ in range(count):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            place = chance.randrange(8 + length) if chance.random() < 0.9 else chance.randrange(8)
            content[place] = chance.choice(
                (content[place] ^ 1 << chance.randrange(8), chance.choice(b'0123456789"[]{},:'))
            )
        if chance.random() < 0.1:
            del content[chance.randrange(len(content)) :]
        mutant.write_bytes(content)
        try:
            with TensorFile(mutant) as file:
                for key in file.places:
                    file.read(key)
        except CheckpointError:
            refused += 1
    return refused


def draw_layout(chance: random.Random) -> Layout:
    """Up to four ranks."""
    while True:
        tp, pp, cp, dp = (chance.choice(choices) for choices in ((1, 2), (1, 2), (1, 1, 2), (1, 2, 3, 4)))
        if tp * pp * cp * dp <= 4 and not (pp > 1 and cp > 1):
            break
    accumulation = chance.choice([n for n in (1, 2, 3, 6) if BATCH % (n * dp) == 0 and n >= pp])
    stage = chance.choice((0, 1, 2, 3) if pp == 1 else (0, 1, 2))
    schedule = chance.choice(("one_f_one_b", "zbv")) if pp > 1 and accumulation >= 2 * pp else "one_f_one_b"
    return Layout(tp * pp * cp * dp, stage, tp, pp, cp, accumulation, schedule, tp > 1 and chance.random() < 0.5)


def resharded(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """Saved in one layout, loaded in another: the same bits, and what would have come after."""
    source, target = draw_layout(chance), draw_layout(chance)
    if chance.random() < 0.1:
        target = source
    family, precision = chance.choice(("llama", "llama", "gpt2")), chance.choice(("fp32", "fp32", "bf16"))
    drawn = f"{source} to {target}, {family}, {precision}"
    saved, reports = Path(tempfile.mkdtemp(dir=folder)), []
    for layout, act in ((source, "save_in_a_layout"), (target, "load_in_a_layout")):
        details = {"layout": asdict(layout), "family": family, "saved": str(saved)}
        job = Job(tempfile.mkdtemp(dir=folder), world=layout.world, precision=precision, timeout=30.0, details=details)
        ended = nursery.run(job, act=act)
        if problem := not_all_well(ended):
            return Outcome(problem, drawn=drawn)
        reports.append(ended[0].found)
    tensors, again = on_disk(saved / "saved")[0], on_disk(Path(job.folder) / "again")[0]
    problem = "" if same(tensors, again) else "other bits"
    bound = 2e-6 if precision == "fp32" else 2e-2
    errors = [relative_error(*pair) for pair in zip(*reports, strict=True)]
    if not problem and (max(errors) > bound or (source == target and reports[0] != reports[1])):
        problem = f"the next steps differ by {errors}"
    return Outcome(clean(job, problem), drawn=f"{source.world} to {target.world}" if not problem else drawn)


# ---- 10: data ----


def resumed(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """Stopped once to three times: before the first step, at the end of an epoch, after any step, or killed between the
    micro-batches of one. Every sample once an epoch, in the order of the run that nothing stopped, and its bits."""
    has_dataset = chance.random() < 0.3
    count = 16 if has_dataset else chance.choice((12, 16, 20, 21))
    job = Job("", stage=chance.choice((0, 1, 2, 3)), precision=chance.choice(("fp32", "bf16")))
    micro, accumulation = chance.choice(((2, 2), (1, 4), (4, 1)))
    size, steps = 2 * micro * accumulation, 8
    stream = once(lambda place: stream_at(place, count), folder, "stream", str(count))
    shared = {"stream": str(stream), "micro": micro, "accumulation": accumulation, "dataset": has_dataset, "every": 2}

    def reference(place: Path) -> Any:
        whole = replace(job, folder=str(place), details={**shared, "until": steps, "attempt": 0})
        ended = nursery.run(whole, act="consume")
        assert not not_all_well(ended), ended[0].words
        return [one.state for one in ended], samples_of(place, 2)

    states, order = once(reference, folder, "consume", json.dumps([shared, job.stage, job.precision]))
    if not has_dataset:
        flat = [int(i) for step in range(steps) for i in sample_indices(3, 0, step, 0, 1, count, size)]
        assert [i for step in range(steps) for i in order[step]] == flat
    job, stops, world = placed(job, folder), [], 2
    for attempt in range(chance.randint(1, 3)):
        kind = chance.choice(("first step", "any step", "epoch end", "mid-accumulation"))
        until = 0 if kind == "first step" else chance.randrange(1, steps)
        if kind == "epoch end":
            until = min(count // size * (1 + attempt), steps)
        kill = None
        if kind == "mid-accumulation":
            nth = chance.randint(1, 3 * accumulation)
            kill, until = Kill(chance.choice((-1, 0, 1)), chance.randrange(steps - 1), "forward", nth), steps
        moved = not has_dataset and micro * accumulation % 2 == 0 and chance.random() < 0.2  # to another world
        world = 4 if moved and micro % 2 == 0 else 2
        sizes = {"micro": micro // 2 if world == 4 else micro}
        stops.append(f"{kind}{' on 4' if world == 4 else ''}")
        details = {**shared, **sizes, "until": until, "attempt": attempt}
        ended = nursery.run(replace(job, world=world, details=details), kill, act="consume")
        if kill is None and (problem := not_all_well(ended)):
            return Outcome(f"attempt {attempt} ({stops}): {problem}", drawn=str(stops))
    ended = nursery.run(replace(job, details={**shared, "until": steps, "attempt": 9}), act="consume")
    problem = not_all_well(ended)
    found = samples_of(Path(job.folder), 4)
    if not problem and found != order:
        problem = f"{stops}: samples {found} instead of {order}"
    if not problem and not any("on 4" in stop for stop in stops) and [one.state for one in ended] != states:
        problem = f"{stops}: another end"
    return Outcome(clean(job, problem), drawn=" and ".join(sorted(set(stops))))


def stream_at(place: Path, count: int) -> Path:
    stream_of(place, count * SAMPLE + 1)
    return place


def samples_of(folder: Path, world: int) -> dict[int, list[int]]:
    """Step -> the samples that the last attempt at it was trained on, in rank order."""
    found: dict[int, tuple[int, dict[int, list[int]]]] = {}
    for rank in range(world):
        file = folder / f"samples{rank}"
        for line in file.read_text().splitlines() if file.exists() else ():
            attempt, step, samples = json.loads(line)
            if attempt > found.get(step, (-1, {}))[0]:
                found[step] = attempt, {}
            if attempt == found[step][0]:
                found[step][1].setdefault(rank, []).extend(samples)
    return {step: [i for rank in sorted(ranks) for i in ranks[rank]] for step, (_, ranks) in sorted(found.items())}


# ---- 13: numbers that are none ----


def not_finite(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """NaN or infinity on one rank: no rank makes that step, and too many in a row end the run, naming rank and samples.
    A loss or gradient ten times as large is finite: it is clipped, and nobody skips."""
    name = chance.choice([name for name, job in JOBS.items() if not job.asynchronous and not job.skew])
    stream = once(lambda place: stream_at(place, 40), folder, "stream", "40")
    max_skips, steps = chance.choice((2, 3)), 7
    value = chance.choice(("nan", "inf", "-inf", "spike"))
    base = JOBS[name]
    where = "gradient" if base.model == "llama" else chance.choice(("loss", "gradient"))
    rank, place = chance.randrange(base.world), chance.randrange(100)
    ends = value != "spike" and chance.random() < 0.5
    first = chance.randrange(1, 4)
    bad = list(range(first, first + max_skips)) if ends else sorted(chance.sample(range(steps), max_skips - 1))
    details = {"stream": str(stream), "rank": rank, "bad": bad, "value": value, "where": where, "place": place}
    job = placed(base, folder, steps=steps, details={**details, "max_skips": max_skips})
    drawn = f"{name}, {value}, {where}{', too often' if ends else ''}"
    ended = nursery.run(job, act="blow_up")
    problem = not_all_well(ended)
    scaled = base.precision == "fp16"  # its first scale may overflow all by itself, and its skips do not end a run
    for one in ended if not problem else ():
        problem = problem or wrong_with_skips(one.found, base, rank, bad, value, ends and not scaled, scaled)
    if not problem and len({json.dumps([row[0::3] for row in one.found["steps"]]) for one in ended}) > 1:
        problem = f"ranks did different things: {[one.found['steps'] for one in ended]}"
    return Outcome(clean(job, problem), drawn=drawn)


def wrong_with_skips(found: Any, job: Job, rank: int, bad: list[int], value: str, ends: bool, scaled: bool) -> str:
    """What is wrong with what one rank says of its steps."""
    skipped = 0
    for number, (applied, moved, advanced, counted, _) in enumerate(found["steps"]):
        expected = value == "spike" or number not in bad
        skipped += not applied
        if applied != expected and not (scaled and not applied):
            return f"step {number} was {'applied' if applied else 'skipped'}"
        if moved != applied or advanced != applied or counted != skipped:
            return (
                f"step {number}: applied {applied}, moved {moved}, schedule {advanced}, {counted} skipped of {skipped}"
            )
    if not ends:
        return f"it ended: {found['error']}" if found["error"] else ""
    if found["error"] is None or len(found["steps"]) != bad[-1] or not found["unchanged"]:
        return f"{len(found['steps'])} steps, then {found['error']}"
    dp_rank = rank // job.tp if job.pp == 1 else 0
    named = f"rank {dp_rank}" in found["error"] or f"rank [{dp_rank}]" in found["error"]
    if job.model != "llama" and not (named and str(found["samples"][dp_rank]) in found["error"]):
        return f"rank {dp_rank} with samples {found['samples'][dp_rank]} is not named: {found['error']}"
    return "" if f"{len(bad)} steps in a row" in found["error"] else found["error"]


# ---- 14, 15: ranks that differ ----

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "shift", "broadcast", "gather_rows")


def astray(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """One rank calls something else: with calls compared all are told what and by whom, without it ends all the same.

    Not without: a swapped order, a broadcast into more than is sent, and a shift in an all-reduce's place, whose
    messages are alike.
    """
    checks = chance.random() < 0.7
    world, kind = chance.choice((2, 2, 3)), chance.choice(("shape", "dtype", "operation", "missing", "swapped"))
    at, rank = chance.randrange(3), chance.randrange(world)
    while True:
        calls = [{"operation": chance.choice(OPERATIONS), "unit": f"unit{n}", "size": 4, "dtype": "float32"}
                 for n in range(4)]  # fmt: skip
        ours = calls[at]["operation"]
        other = chance.choice([name for name in OPERATIONS if name != ours])
        is_unseen = kind in ("shape", "dtype") and ours == "broadcast" or kind == "swapped"
        is_unseen = is_unseen or kind == "operation" and {ours, other} == {"all_reduce", "shift"}
        if checks or not is_unseen:
            break
        kind = "operation" if kind == "swapped" else kind
    details = {"check": checks, "calls": calls, "at": at, "kind": kind, "rank": rank, "other": other}
    limit = 2.0 if checks else 1.0
    job = placed(Job("", world=world, stage=chance.choice((0, 1, 2, 3))), folder, timeout=limit, details=details)
    ended = nursery.run(job, act="go_astray")
    problem, theirs = "", f"{ours} of unit{at}"
    for place, one in enumerate(ended):
        if checks and (one.code != 1 or "ranks are about to run different collectives" not in one.words):
            problem = f"rank {place} ended with {one.code}: {(one.state or one.words)[-500:]}"
        elif checks and (f"rank {(rank + 1) % world}: {theirs}" not in one.words or f"rank {rank}: " not in one.words):
            problem = f"the calls are not named: {one.words[-500:]}"
        elif one.code not in (1, -signal.SIGABRT):  # gloo aborts where more comes than there is room for
            problem = f"rank {place} ended with {one.code}: {(one.state or one.words)[-500:]}"
    named = re.compile(r"CollectiveError: rank \d: \w+ of unit\d")
    if not problem and not checks and not any(named.search(one.words) for one in ended):
        problem = f"nobody names a call: {[one.words[-500:] for one in ended]}"
    drawn = f"{kind}, {ours}, {world}{'' if checks else ', unchecked'}"
    return Outcome(clean(job, problem), max(one.seconds for one in ended), drawn)


DIFFERENCES: tuple[tuple[str, Any, str], ...] = (
    ("optimizer.lr", 0.5, "optimizer.lr = 0.5"),
    ("optimizer.weight_decay", 0.25, "optimizer.weight_decay = 0.25"),
    ("train.seed", 7, "train.seed = 7"),
    ("train.gradient_clipping", 0.5, "train.gradient_clipping = 0.5"),
    ("train.max_skipped_steps", 9, "train.max_skipped_steps = 9"),
    ("zero.reduce_dtype", "bf16", "zero.reduce_dtype = bf16"),
    ("debug.collectives", True, "debug.collectives = True"),
    ("dist.transport", "messages", "dist.transport = messages"),
    ("dist.step_timeout", 77.0, "dist.step_timeout = 77.0"),
    ("parallel.tp", 2, "parallel.tp = 2"),
    ("parallel.cp", 2, "parallel.cp = 2"),
    ("checkpoint.checksum", "sha256", "checkpoint.checksum = sha256"),
    ("code", None, "code of minizero = 0123456789abcdef"),
    ("torch", None, "code of torch = 1.0"),
    ("shape", None, "parameter blocks.1.up.weight: (46, 15)"),
    ("dtype", None, "torch.float64"),
    ("trainable", None, "parameter norm.weight: (15,) torch.float32 trainable=False"),
)


def disagreeing(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """One rank with other settings, code or model: refused by all before the first step, with the difference."""
    kind, value, shown = chance.choice(DIFFERENCES)
    world = chance.choice((2, 2, 4))
    rank = chance.randrange(world)
    details = {"kind": kind, "value": value, "rank": rank}
    job = placed(Job("", world=world, stage=chance.choice((0, 1, 2, 3))), folder, details=details)
    ended = nursery.run(job, act="disagree")
    problem = ""
    for place, one in enumerate(ended):
        lines = [line for line in one.words.splitlines() if line.startswith(f"  rank {rank}: ") and shown in line]
        if one.code != 1 or "ranks were started with different settings" not in one.words or not lines:
            problem = f"{kind} of rank {rank}: rank {place} ended with {one.code}: {one.words[-500:]}"
    return Outcome(clean(job, problem), max(one.seconds for one in ended), kind)


# ---- 16, 17, 18 ----


def skewed(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """Clocks up to an hour apart, either way; half of the jobs are killed and go on as well."""
    name = chance.choice([name for name, job in JOBS.items() if not job.skew])
    job = JOBS[name]
    states, log = straight(nursery, job, folder)
    skewed_job = placed(job, folder, skew=chance.choice((-1, 1)) * chance.uniform(60, 3600))
    kills = [draw_kill(job, chance)] if chance.random() < 0.5 else []
    for kill in kills:
        if problem := wrong_with_killed(skewed_job, nursery.run(skewed_job, kill), kill, states):
            return Outcome(problem, drawn=f"{name}, {kill}")
    problem = wrong_with_continued(nursery, skewed_job, states, log, len(kills))
    return Outcome(clean(skewed_job, problem), drawn=f"{name}{', killed' if kills else ''}")


def corrupted(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """A bit flips in one rank's copy of a weight: said by all ranks within the interval, with unit and rank.

    Where an update writes the copy anew from its owner's slice (stages 1 and 2), it has to come between the two.
    """
    world, tp = chance.choice((2, 3, 4)), chance.random() < 0.25
    stage = chance.choice((0, 1, 2, 3) if tp else (0, 1, 2))
    if tp:
        job, name, world = Job("", model="llama", world=2, tp=2, stage=stage), "model.norm.weight", 2
    else:
        names = ("blocks.0.up.weight", "blocks.1.up.weight", "blocks.2.norm.bias", "blocks.0.up.bias", "norm.weight")
        precision = chance.choice(("fp32", "bf16"))
        job, name = Job("", world=world, stage=stage, model="frozen", precision=precision), chance.choice(names)
    every, after, rank = chance.randint(1, 3), chance.randint(1, 3), chance.randrange(world)
    is_still = name in ("blocks.1.up.weight", "norm.weight", "blocks.0.up.bias") and not tp  # it does not train
    healed = not is_still and not (stage == 0 and job.precision == "fp32")
    details = {"name": name, "every": every, "after": after, "rank": rank, "element": chance.randrange(1000)}
    details |= {"bit": chance.randrange(22), "healed": healed}
    ended = nursery.run(placed(job, folder, details=details), act="flip_a_bit")
    problem = not_all_well(ended)
    drawn = f"stage {stage}{', tp' if tp else ''}, {name}"
    whose = f"rank [{rank}] differs" if world > 2 else "ranks [0, 1] disagree"
    unit = name.rpartition(".")[0].removesuffix(".up").removesuffix(".norm") if not tp else name
    for one in ended if not problem else ():
        said = one.found["error"] or ""
        if whose not in said or unit not in said:
            problem = f"{details}: it said {said!r}"
        elif one.found["step"] > after + every:
            problem = f"found in step {one.found['step']}, which is more than {every} after {after}"
    return Outcome(problem, drawn=drawn)


CLEAN_STEPS = 30


def straggling(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """One rank takes 200 ms more from some step on: named within 20 steps. Nobody is before that."""
    world = chance.choice((2, 3))
    rank, onset = chance.randrange(world), chance.choice((0, CLEAN_STEPS, 2 * CLEAN_STEPS))
    corpus = once(furnish, folder, "corpus")
    arguments = [str(corpus / "tiny.toml"), "--data.source", str(corpus / "corpus"), "--data.dir", str(corpus / "data")]
    arguments += f"--run.dir run --train.steps {onset + 20} --checkpoint.every 0 --precision fp32".split()
    arguments += ["--train.global_batch_size", "6"]
    job = placed(Job("", world=world), folder, details={"arguments": arguments, "slow": rank, "onset": onset})
    ended = nursery.run(job, act="run_the_job")
    said = [line for line in ended[0].words.splitlines() if "computes more slowly" in line]
    problem = not_all_well(ended)
    if not problem and [line.partition(" computes")[0] for line in said] != [f"minizero: rank [{rank}]"]:
        problem = f"of rank {rank}, slow from step {onset} on, is said: {said}"
    step = int(said[0].partition("(step ")[2].partition(")")[0]) if not problem else 0
    if not problem and step < onset:
        problem = f"named in step {step}, before it was slow"
    return Outcome(clean(job, problem), drawn=f"{world} ranks, after {onset} steps")


# ---- 19: saves in the background ----


def background_saves(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
    """Saves behind each other, one of which may fail on one rank, and the end of the process while one is written."""
    stage, model = chance.choice((0, 1, 2, 3)), chance.choice(("toy", "frozen", "outside"))
    world = chance.choice((2, 2, 3))
    job = Job("", world=world, stage=stage, model=model, asynchronous=True, steps=4)
    job = replace(job, precision=chance.choice(("fp32", "bf16")))
    place = chance.choice(("write_tensors", "move_into_place", "write_synced"))
    fails = None if chance.random() < 0.4 else 0 if place != "write_tensors" else chance.randrange(world)
    leaves = chance.choice(("", "", "as the interpreter does", "by an error"))
    details = {"fails": fails, "place": place, "leaves": leaves, "slow": chance.randrange(world)}
    details |= {"seconds": chance.choice((0.0, 0.02, 0.1)), "saves": chance.choice((1, 1, 2))}

    def reference(place: Path) -> list[str | None]:
        still = {**details, "fails": None, "leaves": "", "saves": 0}
        ended = nursery.run(
            replace(job, folder=str(place), asynchronous=False, details=still), act="save_in_the_background"
        )
        assert not not_all_well(ended), ended[0].words
        return [one.found["state"] for one in ended]

    states = once(reference, folder, "unsaved", json.dumps(asdict(job)))
    job = placed(job, folder, details=details)
    ended = nursery.run(job, act="save_in_the_background")
    drawn = f"{'fails in ' + place if fails is not None else 'works'}, leaves {leaves or 'well'}"
    problem, checkpoints = "" if leaves == "by an error" else not_all_well(ended), Path(job.folder) / "checkpoints"
    heard = [one.found["heard"] for one in ended if one.code == 0]
    if not problem and any(one != heard[0] for one in heard):
        problem = f"ranks heard different things: {heard}"
    if not problem and heard and fails is not None and (not heard[0] or "a bad disk" not in heard[0][1]
                                                         or f"rank {fails}: " not in heard[0][1]):  # fmt: skip
        problem = f"of the error on rank {fails} all heard {heard[0]}"
    if not problem and heard and fails is None and heard[0]:
        problem = f"all heard {heard[0]}"
    if not problem and leaves == "by an error":
        bad = [one for one in ended if one.code != 1 or one.seconds > 3]
        problem = f"rank ended with {bad[0].code} after {bad[0].seconds:.1f} s: {bad[0].words[-500:]}" if bad else ""
    if not problem and (left := [row for row in listing(checkpoints) if row["problem"]]):
        problem = f"left behind: {left}"
    if not problem and leaves != "by an error" and [one.found["state"] for one in ended] != states:
        problem = "another end"
    again = nursery.run(replace(job, details={}, steps=STEPS), act="train") if not problem else []
    problem = problem or not_all_well(again)
    return Outcome(clean(job, problem), drawn=drawn)


# ---- 21: all of it ----

PACE = 0.1  # seconds that a step of the long job takes more, so that the run that it is compared with is a short one


def soaked(minutes: float, interval: float = 30.0) -> Trial:
    """One long job, and a fault every `interval` seconds: it ends as the one that nothing befell."""

    def trial(nursery: Nursery, folder: Path, chance: random.Random) -> Outcome:
        name = chance.choice([name for name, job in JOBS.items() if job.model != "llama"])
        job = placed(
            JOBS[name], folder, steps=10**9, deadline=20 * interval + 60, step_timeout=3.0, allow_fallback=True,
            details={"pace": PACE},
        )  # fmt: skip
        checkpoints, faults = Path(job.folder) / "checkpoints", 0
        ends = time.monotonic() + 60 * minutes
        while time.monotonic() < ends:
            kill = replace(draw_kill(job, chance), step=0, after=chance.uniform(0.5, 1.5) * interval)
            if not job.asynchronous and chance.random() < 0.3:
                kill = replace(kill, rank=max(kill.rank, 0), signal=chance.choice((int(signal.SIGSTOP), "in a loop")))
            ended, faults = nursery.run(job, kill), faults + 1
            if all(one.code == 0 for one in ended) or any(one.code > 0 and "Error" not in one.words and
                                                          "Timeout" not in one.words for one in ended):  # fmt: skip
                return Outcome(f"after {kill}: {[one.code for one in ended]} {ended[0].words[-500:]}", drawn=name)
            whole = [row for row in listing(checkpoints) if row["problem"] is None]
            if len(whole) > 1 and chance.random() < 0.3:
                damage_newest(checkpoints, chance)
        last = replace(job, steps=max(row["step"] for row in listing(checkpoints)) + 20)
        ended = nursery.run(last)
        if problem := not_all_well(ended):
            return Outcome(problem, drawn=name)
        states, log = straight(nursery, replace(last, details={}, deadline=60 * minutes + 600), folder)
        problem = "" if [one.state for one in ended] == states else "another end"
        problem = problem or ("" if logged(job.folder, 0) == log else "other losses")
        return Outcome(clean(job, problem), drawn=f"{name}, {faults} faults, {last.steps} steps")

    return trial


def damage_newest(checkpoints: Path, chance: random.Random) -> None:
    """One byte of the checkpoint that `latest` names."""
    newest = checkpoints / (checkpoints / "latest").read_text()
    file = chance.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
