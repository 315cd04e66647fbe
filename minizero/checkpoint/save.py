"""Saving a training run: every rank writes its own file, rank 0 the manifest, and one rename makes them a checkpoint.

    agree on a name -> write, fsync -> tell rank 0 name, size and checksum -> manifest, fsync -> rename -> fsync the
    folder -> `latest` -> tell everyone -> prune

An interrupted save leaves the previous checkpoints as they were, whatever the moment: until the rename there is no
folder of the new name, and nothing that is there is ever written to. What it leaves behind has a name that begins with
a dot and goes away with the next save.

A save in the background (`Background`) does all but the first of these on a thread, through a process group that
nothing else uses; one runs at a time. Only the optimizer's update changes what is saved, so the thread writes tensors
from where they are while the next forward and backward run. What it has not come to by the update is copied first, and
that is all that training waits for.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minizero.checkpoint.files import (
    LATEST,
    MANIFEST,
    SAFE_NAME,
    CheckpointError,
    move_into_place,
    prune,
    remove_leftovers,
    write_synced,
)
from minizero.checkpoint.manifest import FORMAT, framed, parse
from minizero.checkpoint.state import TrainingState, everyone
from minizero.checkpoint.tensor_file import Entry, write_tensors
from minizero.checkpoint.weights import persistent_buffers
from minizero.dist.collectives import Communicator
from minizero.models.hf import HuggingFaceNames
from minizero.parallel.foreign import is_foreign
from minizero.utils.files import write_atomically
from minizero.utils.versions import installed
from minizero.utils.warnings import warn_once


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep` (0: all), and those of every `keep_every` steps (0: no others)."""

    keep: int = 0
    keep_every: int = 0


KEEP_ALL = Retention()


@dataclass
class Save:
    """A save, and everything that it needs.

    Attributes:
        entries: the tensors of this rank's file, those of the running model. facts: what the manifest says of them.
        header: the rest of it.
        comm, device: where ranks meet meanwhile.
    """

    folder: Path
    tag: str
    temporary: Path
    file_name: str
    entries: list[Entry]
    facts: dict[str, Any]
    header: dict[str, Any]
    latest: bool
    retention: Retention
    checksum: str
    comm: Communicator
    device: torch.device

    def run(self) -> None:
        """Write and commit; collective over `comm`. Raises CheckpointError on every rank when one could not write.

        Then nothing of this save is left, and what was there before is as it was.
        """
        try:
            sizes = everyone(self.comm, self.device, lambda: sum(entry.values.nbytes for entry in self.entries))
            everyone(self.comm, self.device, lambda: self._check_room(sum(sizes)) if self.comm.rank == 0 else None)
            files = everyone(self.comm, self.device, self._write, is_slow=True)
            commit = partial(self._commit, files) if self.comm.rank == 0 else lambda: None
            everyone(self.comm, self.device, commit, is_slow=True)
        except CheckpointError:
            if self.comm.rank == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise

    def _check_room(self, needed: int) -> None:
        if needed > (free := free_bytes(self.folder)):
            raise CheckpointError(
                f"no space for {self.folder / self.tag}: it needs {needed} bytes, {self.folder} has {free}"
            )

    def _write(self) -> str:
        """Write this rank's file; what the manifest says of it, as text: only the first rank has use for it."""
        with self._telling_room("this rank's file", sum(entry.values.nbytes for entry in self.entries)):
            self.temporary.mkdir(parents=True, exist_ok=True)
            written = write_tensors(self.temporary / self.file_name, self.entries, self.checksum)
        return json.dumps({**written, **self.facts})

    @contextmanager
    def _telling_room(self, what: str, needed: int) -> Iterator[None]:
        """Inside, a full disk is a CheckpointError with the bytes that `what` needs and those that are there."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise CheckpointError(
                f"no space for {self.folder / self.tag}: {what} needs {needed} bytes, {self.folder} has "
                f"{free_bytes(self.folder)} ({error.strerror})"
            ) from None

    def _commit(self, texts: list[str]) -> None:
        files = [json.loads(text) for text in texts]
        body = json.dumps({**self.header, **merged(files), "files": [of_file(file) for file in files]}).encode()
        parse(body, self.temporary / MANIFEST).check_complete()
        with self._telling_room(MANIFEST, len(body)):
            write_synced(self.temporary / MANIFEST, framed(body))
        move_into_place(self.temporary, self.folder / self.tag)
        if self.latest:
            write_atomically(self.folder / LATEST, self.tag)
        try:
            remove_leftovers(self.folder)
            if self.retention.keep:
                prune(self.folder, self.tag, self.retention.keep, self.retention.keep_every)
        except OSError as error:  # the checkpoint is there, and whole
            warn_once(f"{self.folder}: older checkpoints could not be removed: {error}")


def prepare(
    state: TrainingState,
    folder: Path,
    tag: str,
    client_state: dict[str, Any],
    *,
    latest: bool = True,
    retention: Retention = KEEP_ALL,
    checksum: str = "xxh3_128",
    background: Background | None = None,
) -> Save:
    """What a save of `state` as `folder/tag` will write; collective.

    Args:
        background: where it is going to run while training goes on; None if nothing goes on meanwhile.

    Raises CheckpointError on every rank when one has something that cannot be saved, or a tag that is no plain name, or
    another tag than the others.
    """
    made: dict[str, Any] = {}

    def propose() -> list[str]:
        if not SAFE_NAME.fullmatch(tag):
            raise CheckpointError(f"tag {tag!r}: use letters, digits, '.', '_' and '-' only, no '.' at its beginning")
        made["header"] = json_header(state, tag, client_state)
        made["entries"], made["facts"] = own_entries(state)
        return [uuid.uuid4().hex[:8], tag]

    tokens, tags = zip(*everyone(state.world, state.runtime.device, propose), strict=True)
    if len(set(tags)) > 1:
        raise CheckpointError(f"ranks give different tags for one checkpoint: {', '.join(tags)} in rank order")
    if background is not None:
        made["entries"] = background.borrow(made["entries"])
    return Save(
        folder=folder,
        tag=tag,
        temporary=folder / f".{tag}.tmp-{tokens[0]}",
        file_name=state.file_name,
        **made,
        latest=latest,
        retention=retention,
        checksum=checksum,
        comm=state.world if background is None else background.comm,
        device=state.runtime.device if background is None else torch.device("cpu"),
    )


def json_header(state: TrainingState, tag: str, client_state: dict[str, Any]) -> dict[str, Any]:
    """The manifest without its files, as it is now. Raises CheckpointError for what JSON cannot hold."""
    header = {
        "format": FORMAT,
        "tag": tag,
        "versions": {name: installed(name) or "not installed" for name in ("minizero", "torch")},
        "layout": state.layout.model_dump(),
        "config_hash": state.config_hash,
        "model": hf_config_of(state.module),
        "counters": state.counters,
        "scaler": state.optimizer.scaler.state_dict(),
        "scheduler": state.scheduler.state_dict() if state.scheduler is not None else None,
        "optimizer": state.optimizer.rule,
        "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups],
        "client_state": client_state,
    }
    for key, value in header.items():
        try:
            check_keys(value, (str, int) if key == "scheduler" else (str,))
            header[key] = json.loads(json.dumps(value))  # callers go on changing theirs while a thread writes
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{key} cannot be saved as JSON ({error}); checkpoints hold no pickled objects"
            ) from None
    return header


def check_keys(value: Any, legal: tuple[type, ...]) -> None:
    """Raise TypeError for a key that JSON would make a string of in silence, somewhere in `value`."""
    if isinstance(value, dict):
        for key in value:
            if type(key) not in legal:
                raise TypeError(f"keys must be strings, {key!r} is none")
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            check_keys(part, legal)


def hf_config_of(module: nn.Module) -> dict[str, Any] | None:
    """The model as HuggingFace's `config.json` has it; None where it is neither ours nor one of transformers."""
    if isinstance(module, HuggingFaceNames):
        return module.hf_config()
    if is_foreign(module):
        config: Any = module.config
        return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [type(module).__name__]}
    return None


def own_entries(state: TrainingState) -> tuple[list[Entry], dict[str, Any]]:
    """This rank's file: its tensors, and what the manifest says of them."""
    held = list(state.held())
    entries = [Entry(one.key, one.values) for one in held]
    buffers = dict(state.module.named_buffers()) if state.is_first_replica else {}
    persistent = persistent_buffers(state.module)
    entries += [Entry(f"buffer/{name}", buffer.detach()) for name, buffer in buffers.items()]
    entries += [Entry(key, values) for key, values in state.random_states().items()]
    facts = {
        "boxes": [[one.kind, one.name, [list(side) for side in one.piece.box]] for one in held],
        "parameters": {name: {"shape": list(shard.shape)} for name, shard in state.shards().items()},
        "scalars": state.scalars(),
        "buffers": {n: {"shape": list(b.shape), "persistent": n in persistent} for n, b in buffers.items()},
    }
    return entries, facts


def of_file(facts: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of one file."""
    return {key: value for key, value in facts.items() if key not in ("parameters", "scalars", "buffers")}


def merged(files: list[dict[str, Any]]) -> dict[str, Any]:
    """What ranks said of parameters and buffers, as one. Raises CheckpointError when they contradict each other."""
    parameters: dict[str, dict[str, Any]] = {}
    buffers: dict[str, dict[str, Any]] = {}
    for file in files:
        for name, facts in file["parameters"].items():
            if parameters.setdefault(name, facts)["shape"] != facts["shape"]:
                raise CheckpointError(f"{name} has two shapes, {parameters[name]['shape']} and {facts['shape']}")
        for name, facts in file["buffers"].items():
            buffers.setdefault(name, {**facts, "file": file["file"]})
    for file in files:
        for name, scalars in file["scalars"].items():
            if parameters[name].setdefault("scalars", scalars) != scalars:
                raise CheckpointError(f"optimizer state of {name}: ranks have {parameters[name]['scalars']}, {scalars}")
    return {"parameters": parameters, "buffers": buffers}


class Background:
    """Runs one save at a time on a thread of its own, of tensors that it borrows from training.

    Args:
        apart: makes the process group that its ranks meet in; called once, on the first save; collective.
    """

    def __init__(self, apart: Callable[[], Communicator]) -> None:
        self._apart = apart
        self._comm: Communicator | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._lock = threading.Lock()  # held by whoever copies
        self._borrowed: dict[str, tuple[Tensor, int]] = {}  # not copied yet: (tensor, its version when it was lent)
        self._copies: dict[str, Tensor] = {}  # not written yet
        # memory stays, and is used again: new memory is touched page by page, which takes longer than a copy
        self._one = torch.empty(0, dtype=torch.uint8)  # for the tensor that is being written
        self._memory: dict[str, Tensor] = {}  # for those that updates did not wait for

    @property
    def comm(self) -> Communicator:
        """Where ranks meet during a save in the background."""
        if self._comm is None:
            self._comm = self._apart()
        return self._comm

    def borrow(self, entries: list[Entry]) -> list[Entry]:
        """The same entries, of which each gives its values when it is written.

        What only the optimizer changes stays where it is until then; the rest is small, and copied now.
        """
        self.give_up()
        for entry in entries:
            if entry.key.startswith(("buffer/", "rng/")):
                self._copies[entry.key] = entry.values.to("cpu", copy=True)
            else:
                self._borrowed[entry.key] = entry.values, entry.values._version
        return [Entry(entry.key, entry.values, partial(self._take, entry.key)) for entry in entries]

    def _take(self, key: str) -> Tensor:
        """A tensor as it was when it was lent; its memory is the next one's. Raises CheckpointError if changed."""
        with self._lock:
            if key in self._copies:
                return self._copies.pop(key)
            values, version = self._borrowed.pop(key)
            if values._version != version:
                raise CheckpointError(f"{key} was changed while it was saved; call wait_for_checkpoint() first")
            if self._one.numel() < values.nbytes:
                self._one = torch.empty(values.nbytes, dtype=torch.uint8)
            return self._one[: values.nbytes].view(values.dtype).view(values.shape).copy_(values.detach())

    def give_back(self) -> None:
        """Copy what is borrowed still: it may be changed after this."""
        with self._lock:
            for key, (values, version) in list(self._borrowed.items()):
                if values._version != version:
                    continue  # for the thread to find: all ranks must hear of it, and this one is about to step
                memory = self._memory.get(key)
                if memory is None or memory.shape != values.shape or memory.dtype != values.dtype:
                    memory = self._memory[key] = torch.empty(values.shape, dtype=values.dtype)
                self._copies[key] = memory.copy_(values)
                del self._borrowed[key]

    def give_up(self) -> None:
        """Forget what is borrowed still: of a save that failed no update has to take copies."""
        with self._lock:
            self._borrowed.clear()
            self._copies.clear()

    def start(self, save: Save) -> None:
        """Begin `save`; the one before must have been waited for."""
        assert self._thread is None

        def run() -> None:
            try:
                save.run()
            except BaseException as error:
                self._failure = error
                print(f"minizero: saving {save.folder / save.tag} failed: {error}", file=sys.stderr, flush=True)
            finally:
                self.give_up()

        self._thread = threading.Thread(target=run, name=f"save {save.tag}")
        self._thread.start()

    def wait(self) -> None:
        """Return when no save runs any more. Raises what the last one raised, on every rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written under `folder`, of which the nearest existing parent is asked."""
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
