"""Resuming a training run, in any layout: everything is checked before anything is changed, and every rank hears of it.

Each rank reads, of whichever files hold it, the boxes that its own shards consist of: never more than one tensor at a
time. Before that the files' checksums are taken, each by one rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minizero.checkpoint.files import (
    LATEST,
    MANIFEST,
    SAFE_NAME,
    STEP_FOLDER,
    CheckpointError,
    check_presence,
    named_by_latest,
    steps_in,
)
from minizero.checkpoint.manifest import FileFacts, Manifest, Scalar, read_manifest
from minizero.checkpoint.state import TrainingState, everyone, file_name, key_of
from minizero.checkpoint.tensor_file import Place, TensorFile, hash_file
from minizero.dist.boxes import Box, inside, overlap, part_of, pieces
from minizero.utils.warnings import warn_once

OF_THE_MACHINE = ("foreach", "fused", "capturable", "differentiable")  # options of groups: how, not what, is computed


def load_state(
    state: TrainingState,
    folder: Path,
    tag: str | None,
    *,
    optimizer: bool,
    scheduler: bool,
    allow_fallback: bool = False,
) -> tuple[Path | None, Manifest | None]:
    """(path, manifest) of the checkpoint, its values in place; (None, None) when there is none.

    Collective. Raises CheckpointError on every rank, with nothing changed, when the checkpoint is damaged or does not
    fit; it names the newest one that looks whole, which is taken instead only with `allow_fallback`.
    """
    path = agree_on(state, lambda: chosen(folder, tag))
    while path is not None:
        try:
            manifest = verified(state, path, optimizer=optimizer)
            break
        except CheckpointError as error:
            other = agree_on(state, partial(older_whole, path) if tag is None else lambda: None)
            if other is None:
                raise
            if not allow_fallback:
                raise CheckpointError(
                    f"{error}. {other} looks whole: its tag, or allow_fallback, would load it"
                ) from None
            if state.world.rank == 0:
                warn_once(f"{error}. Falling back to {other}")
            path = other
    if path is None:
        return None, None
    with Reader(path, manifest) as reader:
        fill = partial(read_values, state, reader, manifest, optimizer=optimizer)
        everyone(state.world, state.runtime.device, fill, is_slow=True)
    everyone(state.world, state.runtime.device, lambda: read_options(state, manifest, optimizer, scheduler))
    return path, manifest


# ---- which one ----


def agree_on(state: TrainingState, choose: Callable[[], Path | None]) -> Path | None:
    """What `choose` says on the first rank, which looks for all: file systems may show ranks different things."""

    def look() -> str | None:
        found = choose() if state.world.rank == 0 else None
        return None if found is None else str(found)

    agreed = everyone(state.world, state.runtime.device, look)[0]
    return None if agreed is None else Path(agreed)


def find_checkpoint(folder: Path, tag: str | None) -> Path | None:
    """The folder of `tag`, or of what the file `latest` names; None when there is none.

    Raises CheckpointError when what is in that file cannot be a name.
    """
    if tag is not None:
        return folder / str(tag)
    name = named_by_latest(folder)
    if name is None:
        return None
    if not SAFE_NAME.fullmatch(name):
        raise CheckpointError(f"{folder / LATEST} is damaged: it names {name!r}; a tag would say which one is meant")
    return folder / name


def chosen(folder: Path, tag: str | None) -> Path | None:
    """`find_checkpoint`, with a warning when `latest` does not name the newest: a bit of it may be another one."""
    path = find_checkpoint(folder, tag)
    named = STEP_FOLDER.fullmatch(path.name) if path is not None and tag is None else None
    if path is not None and named is not None:
        for step, newer in steps_in(folder)[:1]:
            if step > int(named[1]):
                warn_once(f"{folder / LATEST} names {path.name}, and {newer} is newer: the named one is taken")
    return path


def older_whole(path: Path) -> Path | None:
    """The newest checkpoint before `path`, in the same folder, of which the manifest and the files' sizes are right."""
    named = STEP_FOLDER.fullmatch(path.name)  # perhaps of a folder that is not there
    for step, other in steps_in(path.parent):
        if named is None or step < int(named[1]):
            try:
                manifest = read_manifest(other)
                check_presence(other, manifest.sizes)
            except CheckpointError:
                continue
            return other
    return None


# ---- whether it may be used ----


def verified(state: TrainingState, path: Path, *, optimizer: bool) -> Manifest:
    """The manifest of `path`, once every file is seen to be what it says, and to fit; collective.

    Raises CheckpointError on every rank.
    """

    read: list[Manifest] = []

    def check() -> dict[str, Any]:
        manifest = read_manifest(path)
        read.append(manifest)
        check_fit(state, path, manifest, optimizer=optimizer)
        if state.world.rank == 0:
            check_presence(path, manifest.sizes)
        for file in manifest.files[state.world.rank :: state.world.size]:
            check_content(path, file)
        return {
            "files": zlib.crc32(repr([(file.file, file.checksum) for file in manifest.files]).encode()),
            "parameter": list(state.shards()),
            "buffer": [name for name, _ in state.module.named_buffers()],
        }

    seen = everyone(state.world, state.runtime.device, check, is_slow=True)
    if len({of_rank["files"] for of_rank in seen}) > 1:
        raise CheckpointError(f"{path / MANIFEST} is not the same for all ranks: is {path.parent} one file system?")
    (manifest,) = read
    for what, held in (("parameter", manifest.parameters), ("buffer", manifest.buffers)):
        if left := sorted(held.keys() - {name for of_rank in seen for name in of_rank[what]}):
            raise CheckpointError(f"{path} is of another model: {what} {left[0]!r} is only in the checkpoint")
    return manifest


def check_content(folder: Path, facts: FileFacts) -> None:
    """Raise CheckpointError unless the file has the checksum that the manifest has of it."""
    name, wanted = facts.checksum
    path = folder / facts.file
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        found = hash_file(path, name)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if found != wanted:
        raise CheckpointError(f"{path} is damaged: {name} is {found}, the manifest says {wanted}")


def check_fit(state: TrainingState, path: Path, manifest: Manifest, *, optimizer: bool) -> None:
    """Raise CheckpointError when the checkpoint is incomplete, or of another model or optimizer."""
    manifest.check_complete()
    ours = state.optimizer.rule
    if optimizer and manifest.optimizer != ours:
        raise CheckpointError(f"{path} holds the state of {manifest.optimizer}, this run has {ours}")
    groups = len(manifest.param_groups), len(state.optimizer.param_groups)
    if optimizer and groups[0] != groups[1]:
        raise CheckpointError(f"{path} has {groups[0]} param groups, this run has {groups[1]}")
    held = {name: facts.shape for name, facts in manifest.parameters.items()}
    check_shapes(path, "parameter", held, {name: shard.shape for name, shard in state.shards().items()})
    buffers = {name: facts.shape for name, facts in manifest.buffers.items()}
    check_shapes(path, "buffer", buffers, {name: tuple(b.shape) for name, b in state.module.named_buffers()})


def check_shapes(path: Path, what: str, held: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError naming the first parameter or buffer of this rank that is not held, or in another shape."""
    for name in sorted(wanted):
        if name not in held:
            raise CheckpointError(f"{path} is of another model: {what} {name!r} is only in this run")
        if held[name] != wanted[name]:
            raise CheckpointError(f"{path}: {what} {name!r} has shape {held[name]}, this run's has {wanted[name]}")


# ---- values ----


class Reader:
    """Reads any box of any saved tensor, from whichever files hold it; those stay open until it is closed."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.boxes = manifest.boxes()
        self._open: dict[str, TensorFile] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._open.values():
            file.close()

    def file(self, name: str) -> TensorFile:
        """The file `name` of the folder."""
        if name not in self._open:
            self._open[name] = TensorFile(self.folder / name)
        return self._open[name]

    def place(self, kind: str, name: str, box: Box, file: str) -> Place:
        """Where `file` has `box` of `kind` of parameter `name`."""
        return self.file(file).known(key_of(kind, name, box))

    def kinds_of(self, name: str) -> list[str]:
        """The optimizer's state tensors that were saved for parameter `name`."""
        return [kind for kind, owner in self.boxes if owner == name and kind != "master"]

    def fill(self, target: Tensor, kind: str, name: str, box: Box) -> None:
        """target <- the elements in `box` of `kind` of parameter `name`."""
        for held, file in self.boxes.get((kind, name), []):
            if (both := overlap(box, held)) is not None:
                part = target if both == box else part_of(target, inside(both, box))
                self.file(file).read_into(part, key_of(kind, name, held), inside(both, held))


@torch.no_grad()
def read_values(state: TrainingState, reader: Reader, manifest: Manifest, *, optimizer: bool) -> None:
    """Fill masters, optimizer state, frozen parameters, buffers and random state."""
    for piece, name, _, boxes, start in state.updated():
        tensors: dict[str, Tensor] = {"master": piece.detach()}
        if optimizer:
            slot: dict[str, Any] = state.optimizer.state[piece]
            slot.clear()
            for key, kept in manifest.parameters[name].scalars.items():
                slot[key] = kept.tensor() if isinstance(kept, Scalar) else kept
            for kind in reader.kinds_of(name):
                slot[kind] = tensors[kind] = torch.empty_like(piece.detach())
        for kind, flat in tensors.items():
            for box in boxes:
                reader.fill(box.within(flat, start), kind, name, box.box)
    for name, group, index, shard in state.frozen():
        for start, stop in group.needed(index):
            values = torch.empty(stop - start, dtype=group.dtype)
            for box in pieces(shard, start, stop):
                reader.fill(box.within(values, start), "master", name, box.box)
            group.load_range(index, start, values)
    for name, buffer in state.module.named_buffers():
        buffer.copy_(reader.file(manifest.buffers[name].file).read(f"buffer/{name}"))
    for key, values in random_states(state, reader, manifest).items():
        if key == "rng/cpu":
            torch.set_rng_state(values)
        elif key == "rng/cuda" and state.runtime.device.type == "cuda":
            torch.cuda.set_rng_state(values, state.runtime.device)


def read_options(state: TrainingState, manifest: Manifest, optimizer: bool, scheduler: bool) -> None:
    """Give back what is no tensor: the loss scale, the options of param groups, the schedule."""
    if optimizer:
        state.optimizer.scaler.load_state_dict(manifest.scaler.model_dump())
        for group, saved in zip(state.optimizer.param_groups, manifest.param_groups, strict=True):
            given = {key: tuple(v) if isinstance(v, list) else v for key, v in saved.items()}
            group.update({key: value for key, value in given.items() if key not in OF_THE_MACHINE})
            if group.get("fused") or group.get("capturable"):  # those read step numbers where they compute
                for piece in group["params"]:
                    slot = state.optimizer.state.get(piece, {})
                    slot.update({k: v.to(piece.device) for k, v in slot.items() if isinstance(v, Tensor)})
        state.optimizer.overflow = False
    if scheduler and state.scheduler is not None and manifest.scheduler is not None:
        state.scheduler.load_state_dict(as_here(manifest.scheduler, state.scheduler.state_dict()))


def as_here(saved: Any, here: Any) -> Any:
    """What JSON has kept, with the numbers for keys and the tuples that this run has there: torch's milestones."""
    if isinstance(saved, dict) and isinstance(here, dict):
        if here and all(type(key) is int for key in here):
            filled = copy(here)  # of its own class, such as Counter
            filled.clear()
            filled.update({int(key): value for key, value in saved.items()})
            return filled
        return {key: as_here(value, here.get(key)) for key, value in saved.items()}
    if isinstance(saved, list) and isinstance(here, list | tuple):
        padded = [*here, *[None] * len(saved)]
        return type(here)(as_here(*both) for both in zip(saved, padded, strict=False))
    return saved


def random_states(state: TrainingState, reader: Reader, manifest: Manifest) -> dict[str, Tensor]:
    """This rank's own where the layout is the same; in another one, states that the first rank's and the rank give."""
    saved, here = manifest.layout.degrees, state.layout.degrees
    rank = state.world.rank if saved == here else 0
    file = reader.file(file_name(rank))
    states = {key: file.read(key) for key in file.places if key.startswith("rng/")}
    if saved != here and state.world.rank:
        for key, values in states.items():
            seed = zlib.crc32(values.numpy().tobytes() + state.world.rank.to_bytes(4, "little"))
            device = torch.device("cpu") if key == "rng/cpu" else state.runtime.device
            if device.type == key.removeprefix("rng/"):
                states[key] = torch.Generator(device).manual_seed(seed).get_state()
    return states
