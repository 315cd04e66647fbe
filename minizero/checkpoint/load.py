"""Resuming a training run: everything is checked before anything is changed, and every rank hears of any trouble."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from minizero.checkpoint.files import LATEST, MANIFEST, CheckpointError, check_file, read_manifest
from minizero.checkpoint.state import TrainingState, check_complete, everyone, file_name


def load_state(
    state: TrainingState, folder: Path, tag: str | None, *, optimizer: bool, scheduler: bool
) -> tuple[Path | None, dict[str, int], dict[str, Any]]:
    """(path, counters, client_state) of the checkpoint, its values in place; (None, {}, {}) when there is none.

    Collective. Raises CheckpointError on every rank, with nothing changed, when the checkpoint is damaged or does not
    fit.
    """
    path = find_checkpoint(folder, tag)
    agreed = state.world.gather_bytes(str(path).encode(), "checkpoint path", state.runtime.device)[0].decode()
    if agreed == "None":
        return None, {}, {}
    path = Path(agreed)

    def check() -> None:
        manifest = read_manifest(path)
        check_fit(state, path, manifest, optimizer=optimizer)
        (own,) = [file for file in manifest["files"] if file["file"] == state.file_name]  # `check_fit` has seen to it
        check_file(path, own)

    everyone(state.world, state.runtime.device, check)
    manifest = read_manifest(path)
    reader = SliceReader(path, state.files_of_part(manifest["files"]))
    everyone(state.world, state.runtime.device, lambda: read_values(state, reader, optimizer=optimizer))
    if optimizer:
        state.optimizer.scaler.load_state_dict(manifest["scaler"])
        for group, saved in zip(state.optimizer.param_groups, manifest["param_groups"], strict=True):
            group.update({key: tuple(v) if isinstance(v, list) else v for key, v in saved.items()})
        state.optimizer.overflow = False
    if scheduler and state.scheduler is not None and manifest["scheduler"] is not None:
        state.scheduler.load_state_dict(manifest["scheduler"])
    return path, manifest["counters"], manifest["client_state"]


def find_checkpoint(folder: Path, tag: str | None) -> Path | None:
    """The folder of `tag`, or of what the file `latest` names; None when there is none."""
    if tag is not None:
        return folder / str(tag)
    latest = folder / LATEST
    return folder / latest.read_text().strip() if latest.is_file() else None


def check_fit(state: TrainingState, path: Path, manifest: dict[str, Any], *, optimizer: bool) -> None:
    """Raise CheckpointError when the checkpoint is incomplete, or of another layout, model or optimizer."""
    layout = state.layout
    if {"pp": 1, **manifest["layout"]} != layout:
        saved, here = (" x ".join(f"{axis} {size}" for axis, size in of.items()) for of in (manifest["layout"], layout))
        raise CheckpointError(
            f"{path} was saved by {saved} ranks, this run has {here}; this version resumes in the same layout only"
        )
    expected = {file_name(dp, tp, pp) for pp, dp, tp in product(*(range(layout[axis]) for axis in ("pp", "dp", "tp")))}
    if {file["file"] for file in manifest["files"]} != expected:
        raise CheckpointError(f"{path / MANIFEST} does not name the files {', '.join(sorted(expected))}")
    check_complete(manifest["files"])
    ours = state.optimizer.rule
    if optimizer and manifest["optimizer"] != ours:
        raise CheckpointError(f"{path} holds the state of {manifest['optimizer']}, this run has {ours}")
    groups = len(manifest["param_groups"]), len(state.optimizer.param_groups)
    if optimizer and groups[0] != groups[1]:
        raise CheckpointError(f"{path} has {groups[0]} param groups, this run has {groups[1]}")
    files = state.files_of_part(manifest["files"])
    held = {e["name"]: tuple(e["shape"]) for file in files for e in file["entries"]}
    wanted = {
        name: tuple(parameter.shape)
        for group in state.runtime.groups
        for name, parameter in zip(group.names, group.parameters, strict=True)
    }
    check_same_shapes(path, "parameter", held, wanted)
    buffers = {name: tuple(shape) for name, shape in manifest.get("buffers", files[0].get("buffers", {})).items()}
    check_same_shapes(path, "buffer", buffers, {n: tuple(b.shape) for n, b in state.module.named_buffers()})


def check_same_shapes(path: Path, what: str, held: dict[str, tuple], wanted: dict[str, tuple]) -> None:
    """Raise CheckpointError naming the first parameter or buffer that is in only one of the two, or has two shapes."""
    for name in sorted(held.keys() | wanted.keys()):
        if name not in held or name not in wanted:
            where = "this run" if name not in held else "the checkpoint"
            raise CheckpointError(f"{path} is of another model: {what} {name!r} is only in {where}")
        if held[name] != wanted[name]:
            raise CheckpointError(f"{path}: {what} {name!r} has shape {held[name]}, this run's has {wanted[name]}")


class SliceReader:
    """Reads any range of any saved tensor, from whichever of the `files` (as the manifest has them) holds it."""

    def __init__(self, folder: Path, files: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.scalars: dict[str, dict[str, Any]] = {}
        self.entries: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for file in files:
            self.scalars.update(file["optimizer_scalars"])
            for entry in file["entries"]:
                places = self.entries.setdefault((entry["kind"], entry["name"]), [])
                places.append((entry["start"], entry["stop"], file["file"]))

    def kinds_of(self, name: str) -> list[str]:
        """The optimizer's state tensors that were saved for parameter `name`."""
        return [kind for kind, owner in self.entries if owner == name and kind != "master"]

    def fill(self, target: Tensor, kind: str, name: str, start: int) -> None:
        """target [stop - start] <- elements [start, stop) of `kind` of parameter `name`."""
        stop, filled = start + target.numel(), 0
        for low, high, file in self.entries.get((kind, name), []):
            first, last = max(low, start), min(high, stop)
            if first < last:
                with safe_open(self.folder / file, framework="pt") as tensors:
                    part = tensors.get_slice(f"{kind}/{name}@{low}")[first - low : last - low]
                target[first - start : last - start].copy_(part)
                filled += last - first
        if filled != target.numel():
            raise CheckpointError(f"{self.folder}: {kind} of {name} lacks elements of [{start}, {stop})")

    def tensor(self, file: str, key: str) -> Tensor:
        with safe_open(self.folder / file, framework="pt") as tensors:
            return tensors.get_tensor(key)


@torch.no_grad()
def read_values(state: TrainingState, reader: SliceReader, *, optimizer: bool) -> None:
    """Fill masters, optimizer state, frozen parameters, buffers and random state."""
    for piece, name, _, _, span in state.slices():
        reader.fill(piece, "master", name, span.start)
        if optimizer:
            slot: dict[str, Any] = state.optimizer.state[piece]
            slot.clear()
            for key, kept in reader.scalars.get(name, {}).items():
                is_tensor = isinstance(kept, dict)
                slot[key] = torch.tensor(kept["value"], dtype=getattr(torch, kept["dtype"])) if is_tensor else kept
            for kind in reader.kinds_of(name):
                slot[kind] = torch.empty_like(piece)
                reader.fill(slot[kind], kind, name, span.start)
    for name, group, index, parameter in state.frozen():
        whole = torch.empty(parameter.numel(), dtype=group.dtype)
        reader.fill(whole, "master", name, 0)
        group.load(index, whole)
    for name, buffer in state.module.named_buffers():
        buffer.copy_(reader.tensor(file_name(0, state.tp_rank, state.pp_rank), f"buffer/{name}"))
    torch.set_rng_state(reader.tensor(state.file_name, "rng/cpu"))
    if state.runtime.device.type == "cuda":
        torch.cuda.set_rng_state(reader.tensor(state.file_name, "rng/cuda"), state.runtime.device)
