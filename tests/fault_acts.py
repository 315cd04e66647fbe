"""What ranks do in the trials of `fault_trials.py`, in processes that the nursery of `faults.py` forks.

An act takes its job, whose `details` say what was drawn, and returns text: JSON, mostly, that the trial judges.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import toys
from faults import VOCAB, Job, Progress, build, hash_of, micro_batches, strikes_now
from test_checkpoint_layouts import AFTER, BATCH, BEFORE, Layout, make, settings
from test_checkpoint_layouts import train as train_steps
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import minizero
from minizero import api, engine, train
from minizero.checkpoint import CheckpointError, save
from minizero.checkpoint.files import MANIFEST
from minizero.checkpoint.manifest import framed
from minizero.data.loader import TokenLoader
from minizero.data.shards import TokenStream
from minizero.data.workers import outlive_signals
from minizero.dist.collectives import Communicator
from minizero.observe.pulse import StopRequests
from minizero.zero.replicas import ReplicaError

SAMPLE = 5  # tokens of a sample of `Reader`


def step(made: Any, job: Job) -> float:
    """One step of the job's own data; its loss."""
    loss = float(made.train_batch(micro_batches(job, made, made.global_steps)))
    Progress.steps = made.global_steps
    return loss


# ---- the main job ----


class Worked(TokenLoader):
    """The same batches, by way of a worker process of torch's DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        batches = Batches(super().__iter__)
        quiet = torch.Generator()  # else it draws a seed from the rank's own, which the run without workers does not
        yield from DataLoader(batches, batch_size=None, num_workers=1, worker_init_fn=outlive_signals, generator=quiet)


class Batches(IterableDataset):
    def __init__(self, make: Any) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        for batch in self.make():
            time.sleep(0.01)  # so that the loop waits for it
            yield batch


def run_the_job(job: Job) -> str:
    """`minizero.train`, from its signals to its exit code; without its report."""
    requests, states, plain = StopRequests(), [], train.step_record
    requests.listen(signal.SIGTERM, signal.SIGUSR1)

    def record(made: Any, loss: float, seconds: float) -> dict:
        Progress.steps = made.global_steps
        return plain(made, loss, seconds)

    train.step_record, train.HEAD_START = record, 0.0
    train.report = lambda made, *_: states.append(hash_of(made))
    if job.details.get("workers"):
        train.TokenLoader = Worked
    slow, onset = job.details.get("slow"), job.details.get("onset", 0)
    if slow == dist.get_rank():
        calls, step_of_job = [], train.step

        def slowly(*given: Any) -> float:
            calls.append(1)
            time.sleep(0.2 if len(calls) > onset else 0.0)
            return step_of_job(*given)

        train.step = slowly
    os.chdir(job.folder)
    code = train.main(job.details["arguments"], requests)
    return json.dumps({"code": code, "state": states[0] if states else None})


# ---- checkpoints ----


def fill_the_disk(job: Job) -> str:
    """Some ranks may write no file beyond a byte drawn from its size; then they may again."""
    details, folder = job.details, f"{job.folder}/checkpoints"
    made = build(job)
    step(made, job)
    made.save_checkpoint(folder)
    made.wait_for_checkpoint()
    size = (Path(folder) / "global_step1" / f"rank{dist.get_rank():05d}.safetensors").stat().st_size
    step(made, job)
    before = hash_of(made)
    plain, limits = save.write_tensors, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def limited(*arguments: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(details["share"] * size), limits[1]))
        try:
            return plain(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    if dist.get_rank() in details["ranks"]:
        save.write_tensors = limited
    said = ""
    try:
        made.save_checkpoint(folder)
        made.wait_for_checkpoint()
    except CheckpointError as error:
        said = str(error)
    save.write_tensors = plain
    unchanged = hash_of(made) == before
    made.world.barrier(made.device)  # the first rank tidies up after it has told the others
    left = [path.name for path in Path(folder).glob(".*")]
    step(made, job)
    made.save_checkpoint(folder)
    made.destroy()
    return json.dumps({"said": said, "left": left, "unchanged": unchanged, "state": hash_of(made)})


def load_damaged(job: Job) -> str:
    """Damage a checkpoint, load it, mend it: as often as `count` says; what went wrong."""
    details, problems = job.details, []
    source, folder = Path(details["saved"]), Path(job.folder) / "checkpoints"
    made, chance = build(job), random.Random(details["seed"])
    if dist.get_rank() == 0:
        shutil.copytree(source, folder)
    made.world.barrier(made.device)
    made.load_checkpoint(folder, tag="global_step4")
    before = hash_of(made)
    for _ in range(details["count"]):
        what, names = {"flips": flipped, "files": spoilt}[details["kind"]](folder, source, chance)
        try:
            made.load_checkpoint(folder, tag="global_step4")
            problems.append(f"{what}: loaded")
        except CheckpointError as error:
            if not any(name in str(error) for name in names) or is_unexpected(error):
                problems.append(f"{what}: {error}")
        if dist.get_rank() == 0:  # the error has come to all: nobody reads any more
            shutil.rmtree(folder)
            shutil.copytree(source, folder)
    if hash_of(made) != before:
        problems.append("the state has changed")
    made.load_checkpoint(folder, tag="global_step4")
    return json.dumps(problems)


def flipped(folder: Path, source: Path, chance: random.Random) -> tuple[str, list[str]]:
    """One bit of any file: half of them in proportion to sizes, half in any file alike."""
    files = sorted((source / "global_step4").iterdir())
    weights = [path.stat().st_size if chance.random() < 0.5 else 10_000 for path in files]
    (file,) = chance.choices(files, weights=weights)
    bit = chance.randrange(8 * file.stat().st_size)
    if dist.get_rank() == 0:
        with open(folder / "global_step4" / file.name, "r+b") as opened:
            opened.seek(bit // 8)
            (byte,) = opened.read(1)
            opened.seek(bit // 8)
            opened.write(bytes([byte ^ 1 << bit % 8]))
    return f"bit {bit} of {file.name}", [file.name]


def spoilt(folder: Path, source: Path, chance: random.Random) -> tuple[str, list[str]]:
    """Whole files that are cut, gone, another's, another step's, or too many."""
    new, old = folder / "global_step4", source / "global_step2"
    names = sorted(path.name for path in (source / "global_step4").iterdir())
    shards = [name for name in names if name != MANIFEST]
    kind = chance.choice(("cut", "empty", "longer", "gone", "swapped", "doubled", "stale", "too many", "no file"))
    name, extra = (
        chance.choice(names),
        chance.choice(("rank00009.safetensors", "x", "model.safetensors", "config.json")),
    )
    one, two = chance.sample(shards, 2)
    size, part = chance.randrange((source / "global_step4" / name).stat().st_size), chance.randint(1, len(names) - 1)
    stale = chance.sample(names, part)
    if dist.get_rank() > 0:
        pass
    elif kind in ("cut", "empty"):
        os.truncate(new / name, size if kind == "cut" else 0)
    elif kind == "longer":
        with open(new / name, "ab") as file:
            file.write(b"\0" * (1 + size))
    elif kind in ("gone", "no file"):
        (new / name).unlink()
        if kind == "no file":
            (new / name).mkdir()
    elif kind == "swapped":
        shutil.copy(source / "global_step4" / one, new / two)
        shutil.copy(source / "global_step4" / two, new / one)
    elif kind == "doubled":
        shutil.copy(new / one, new / two)
    elif kind == "stale":
        for each in stale:
            shutil.copy(old / each, new / each)
    else:
        (new / extra).write_bytes(b"\0" * (size % 100))
    named = {"swapped": shards, "doubled": [two], "stale": shards, "too many": [extra]}.get(kind, [name])
    return f"{kind} ({name}, {one}, {two}, {stale})", named


def load_mutants(job: Job) -> str:
    """Manifests that are wrong in one place, under a right checksum: how many were refused; what else was raised; by
    how many MiB the process grew."""
    details, folder = job.details, Path(job.folder) / "checkpoints"
    shutil.copytree(details["saved"], folder)
    made, chance = build(job), random.Random(details["seed"])
    path = folder / "global_step4" / MANIFEST
    whole = json.loads(path.read_text())["manifest"]
    refused, others, before = 0, [], 0
    for number in range(details["count"] + 20):
        if number == 20:
            refused, before = 0, resident()
        path.write_bytes(framed(json.dumps(mutate(whole, chance)).encode()))
        try:
            made.load_checkpoint(folder, tag="global_step4")
        except CheckpointError as error:
            refused += 1
            others += [str(error)] if is_unexpected(error) else []
        except Exception as error:
            others.append(f"{type(error).__name__}: {error}")
    return json.dumps({"refused": refused, "others": others[:3], "grown": (resident() - before) >> 20})


def is_unexpected(error: CheckpointError) -> bool:
    """Whether it only passes on what nobody foresaw, with the name of its type: ranks tell each other of any error."""
    return re.search(r"rank \d+: \w+(Error|Exception): ", str(error)) is not None


def mutate(value: object, chance: random.Random) -> object:
    """A manifest with one thing in it changed."""
    if chance.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return chance.choice(
            [None, -1, 1 << 70, "", "x", [], {}, [[]], True, 0.5, float("inf"), "rank00000.safetensors"]
        )
    key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
    changed = value.copy()
    if chance.random() < 0.1:
        del changed[key]
    else:
        changed[key] = mutate(value[key], chance)
    return changed


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def begun(job: Job) -> tuple[Any, Layout]:
    layout = Layout(**job.details["layout"])
    config = settings(layout, precision=job.precision)
    return minizero.initialize(model=make(job.details["family"]), config=config)[0], layout


def save_in_a_layout(job: Job) -> str:
    """Train, save, train on: losses and norms of the steps after."""
    made, layout = begun(job)
    train_steps(made, layout, 0, BEFORE)
    made.save_checkpoint(job.details["saved"], tag="saved")
    return json.dumps(train_steps(made, layout, BEFORE, BEFORE + AFTER))


def load_in_a_layout(job: Job) -> str:
    """Load, save again, train on."""
    made, layout = begun(job)
    made.load_checkpoint(job.details["saved"], tag="saved")
    assert (made.global_steps, made.global_samples) == (BEFORE, BEFORE * BATCH)
    made.save_checkpoint(job.folder, tag="again", save_latest=False)
    return json.dumps(train_steps(made, layout, BEFORE, BEFORE + AFTER))


def save_in_the_background(job: Job) -> str:
    """Saves on a thread, one after the other, of which one may fail, or be under way when the process ends."""
    details, folder = job.details, f"{job.folder}/checkpoints"
    made, heard = build(job), None
    with slowed(details["slow"], details["seconds"]), failing(details["fails"], details["place"]) as mend:
        for number in range(job.steps):
            step(made, job)
            try:
                for _ in range(details["saves"]):
                    made.save_checkpoint(folder)
            except CheckpointError as error:
                assert heard is None, error
                heard = [number, str(error)]
                mend()
        if details["leaves"] == "by an error":
            if dist.get_rank() == details["slow"]:
                raise ArithmeticError("on purpose")
            step(made, job)
        elif details["leaves"] == "as the interpreter does":
            for thread in threading.enumerate():
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
        elif heard is None:
            try:
                made.destroy()
            except CheckpointError as error:
                heard = [job.steps, str(error)]
        else:
            made.destroy()
    return json.dumps({"heard": heard, "state": hash_of(made)})


@contextmanager
def slowed(rank: int, seconds: float) -> Iterator[None]:
    """On `rank` a file takes longer, so that the save is still under way when something else happens."""
    plain = save.write_tensors

    def slowly(*arguments: Any) -> Any:
        time.sleep(seconds)
        return plain(*arguments)

    if dist.get_rank() == rank:
        save.write_tensors = slowly
    yield
    save.write_tensors = plain


@contextmanager
def failing(rank: int | None, place: str) -> Iterator[Any]:
    """On `rank` the second save fails at a place; yields what mends it."""
    plain, calls = getattr(save, place), []

    def broken(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(5, "a bad disk")
        return plain(*arguments)

    if dist.get_rank() == rank:
        setattr(save, place, broken)
    yield lambda: setattr(save, place, plain)
    setattr(save, place, plain)


# ---- data ----


class Reader(toys.Toy):
    """Writes down the samples that it is trained on; those of a stream whose token i is i + 1."""

    log: Any = None

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        if self.log is not None:
            self.log([max(int(first) - 1, 0) // SAMPLE for first in input_ids[:, 0]])
        return super().forward(input_ids % toys.VOCAB, labels % toys.VOCAB)


def consume(job: Job) -> str:
    """Train on a stream, or a dataset given to `initialize`, from the newest checkpoint to a step; log the samples."""
    details, stream = job.details, TokenStream(Path(job.details["stream"]), "train")
    torch.manual_seed(0)
    model = Reader()
    data = None
    if details["dataset"]:
        tokens = torch.from_numpy(stream.read(0, len(stream)))
        count = (len(stream) - 1) // SAMPLE
        spans = [slice(i * SAMPLE, (i + 1) * SAMPLE + 1) for i in range(count)]
        data = [{"input_ids": tokens[span][:-1], "labels": tokens[span][1:]} for span in spans]
    sizes = {"micro_batch_size": details["micro"], "gradient_accumulation_steps": details["accumulation"], "seed": 3}
    config = minizero.Config(
        precision=job.precision, zero={"stage": job.stage}, train=sizes, optimizer={"lr": 3e-3},
        dist={"timeout": job.timeout},
    )  # fmt: skip
    made = minizero.initialize(model=model, config=config, training_data=data)[0]
    folder = f"{job.folder}/checkpoints"
    made.load_checkpoint(folder)
    Progress.steps = made.global_steps
    file = open(f"{job.folder}/samples{dist.get_rank()}", "a", buffering=1)
    model.log = lambda ids: print(json.dumps([details["attempt"], made.global_steps, ids]), file=file)
    batches = None if data is not None else iter(stream_loader(made, stream))
    if not Path(folder).exists():
        made.save_checkpoint(folder)
    while made.global_steps < details["until"]:
        made.train_batch(batches)
        Progress.steps = made.global_steps
        if made.global_steps % details["every"] == 0 or made.global_steps == details["until"]:
            made.save_checkpoint(folder)
    return hash_of(made)


def stream_loader(made: Any, stream: TokenStream) -> TokenLoader:
    return TokenLoader(
        stream,
        sequence_length=SAMPLE,
        global_batch_size=made.batch.global_batch_size,
        micro_batch_size=made.batch.micro_batch_size,
        seed=3,
        dp_rank=made.dp_rank,
        dp_size=made.dp_size,
        start_sample=made.global_samples,
    )


def blow_up(job: Job) -> str:
    """In some steps the loss, or the gradient of one parameter, is not finite on one rank; what each step did."""
    details = job.details
    made = build(job, train={
        "micro_batch_size": 4, "gradient_accumulation_steps": job.pp, "max_skipped_steps": details["max_skips"],
        "gradient_clipping": 0.5,
    }, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 9}})  # fmt: skip
    factor = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "spike": 10.0}[details["value"]]
    is_here = made.global_rank == details["rank"]

    def changed(gradient: Tensor) -> Tensor | None:
        return gradient * factor if made.global_steps in details["bad"] else None

    def changed_loss(module: Any, given: Any, output: Tensor) -> Tensor | None:
        return output * factor if made.global_steps in details["bad"] else None

    if is_here and details["where"] == "loss":
        made.module.norm.register_forward_hook(changed_loss)
    elif is_here:
        trainable = [p for p in made.module.parameters() if p.requires_grad]
        trainable[details["place"] % len(trainable)].register_hook(changed)
    loader, found = stream_loader(made, TokenStream(Path(details["stream"]), "train")), []
    vocab = VOCAB if job.model == "llama" else toys.VOCAB
    as_given = (lambda batch: batch) if job.model == "llama" else (lambda batch: (batch["input_ids"], batch["labels"]))
    batches = (as_given({key: value % vocab for key, value in batch.items()}) for batch in loader)
    for number in range(job.steps):
        before, schedule = weights_of(made), made.lr_scheduler.state_dict()
        try:
            train.step(made, loader, batches)
        except FloatingPointError as error:
            samples = [loader.samples(number, rank).tolist() for rank in range(made.dp_size)]
            unchanged = weights_of(made) == before
            return json.dumps({"steps": found, "error": str(error), "samples": samples, "unchanged": unchanged})
        applied = made.was_step_applied()
        moved = weights_of(made) != before if made.optimizer.slices else applied  # a small model may leave a rank none
        found.append(
            [
                applied,
                moved,
                made.lr_scheduler.state_dict() != schedule,
                made.skipped_steps,
                made.get_global_grad_norm(),
            ]
        )
    return json.dumps({"steps": found, "error": None})


def weights_of(made: Any) -> list[Any]:
    """This rank's masters and optimizer state."""
    held = [values.tolist() for group in made.runtime.groups for values in group.values()]
    return held + [
        [value.tolist() for value in made.optimizer.state[piece].values()] for piece, *_ in made.optimizer.slices
    ]


# ---- ranks that differ ----


def go_astray(job: Job) -> str:
    """All ranks call the same four collectives, but for one rank, which has one of them otherwise."""
    details = job.details
    made = build(job, debug={"collectives": details["check"]}, dist={"timeout": job.timeout})
    step(made, job)
    plan = [dict(call) for call in details["calls"]]
    if made.global_rank == details["rank"]:
        at, kind = details["at"], details["kind"]
        if kind == "shape":
            plan[at]["size"] += 4
        elif kind == "dtype":
            plan[at]["dtype"] = "float64"
        elif kind == "operation":
            plan[at]["operation"] = details["other"]
        elif kind == "missing":
            del plan[at]
        elif kind == "swapped":
            plan[at], plan[at + 1] = plan[at + 1], plan[at]
    strikes_now(job)
    for call in plan:
        communicate(made.comm, **call)
    step(made, job)
    return "nothing happened"


def communicate(comm: Communicator, operation: str, unit: str, size: int, dtype: str) -> None:
    values = torch.ones(size * comm.size, dtype=getattr(torch, dtype))
    if operation == "all_reduce":
        comm.all_reduce(values, unit)()
    elif operation == "all_gather":
        comm.all_gather(values, unit).wait()
    elif operation == "reduce_scatter":
        comm.reduce_parts(values, [size] * comm.size, 0, unit)()
    elif operation == "shift":
        comm.shift([values], [values.shape], unit)()
    elif operation == "broadcast":
        comm.broadcast(values, 0, unit)
    else:
        comm.gather_rows(values, unit)


def disagree(job: Job) -> str:
    """One rank is started with something else than the others."""
    details, changes = job.details, {}
    if dist.get_rank() == details["rank"]:
        kind, value = details["kind"], details["value"]
        if kind == "code":
            api.versions = lambda: {"minizero": "0123456789abcdef"}
        elif kind == "torch":
            api.versions = lambda: {"torch": "1.0"}
        elif kind == "shape":
            toys.Block.__init__.__defaults__ = (toys.WIDTH,)
            plain = toys.MODELS["toy"]
            toys.MODELS["toy"] = lambda: widened(plain())
        elif kind == "dtype":
            plain = toys.MODELS["toy"]
            toys.MODELS["toy"] = lambda: plain().double()
        elif kind == "trainable":
            plain = toys.MODELS["toy"]
            toys.MODELS["toy"] = lambda: frozen_norm(plain())
        else:
            section, key = kind.split(".")
            changes = {section: {key: value}}
    strikes_now(job)
    build(job, **with_defaults(job, changes))
    return ""


def with_defaults(job: Job, changes: dict[str, Any]) -> dict[str, Any]:
    """`build` replaces whole sections: the job's own settings in them stay."""
    own = {
        "train": {"micro_batch_size": 8}, "dist": {"timeout": job.timeout}, "zero": {"stage": job.stage},
        "optimizer": {"lr": 3e-3},
    }  # fmt: skip
    return {section: own.get(section, {}) | values for section, values in changes.items()}


def widened(model: Any) -> Any:
    model.blocks[1].up = torch.nn.Linear(toys.WIDTH, 3 * toys.WIDTH + 1)
    return model


def frozen_norm(model: Any) -> Any:
    model.norm.weight.requires_grad_(False)
    return model


def flip_a_bit(job: Job) -> str:
    """In one rank's copy of a weight, after a step; the comparison comes every `every` steps."""
    details = job.details
    made = build(job, dist={"timeout": job.timeout, "check_replicas": details["every"]})

    def flip() -> None:
        if made.global_rank == details["rank"]:
            flat = dict(made.named_parameters())[details["name"]].detach().view(-1)
            view = flat.view(torch.int32 if flat.element_size() == 4 else torch.int16)
            view[details["element"] % len(view)] ^= 1 << details["bit"] % (8 * flat.element_size() - 1)

    plain, at = engine.check_replicas, details["after"]

    def flip_then_check(*given: Any) -> None:
        if made.global_steps >= at:
            flip()
        plain(*given)

    if details["healed"]:  # by the next update: the flip has to come between it and the comparison
        engine.check_replicas = flip_then_check
    try:
        for _ in range(at + details["every"] + 1):
            step(made, job)
            if made.global_steps == at and not details["healed"]:
                flip()
    except ReplicaError as error:
        return json.dumps({"step": made.global_steps, "error": str(error)})
    return json.dumps({"step": made.global_steps, "error": None})
