"""Saving and resuming a training run, in coordinates that no layout changes.

A checkpoint is a folder: one safetensors file per data-parallel rank, and a JSON manifest. A file holds what its rank's
shards hold, per parameter, named `kind/parameter@start`: the elements from `start` of the flattened parameter. The flat
buffers and their padding never reach the disk. There is no pickle on any path.

    master/…   fp32 (or wider) weights; frozen parameters too, in their own dtype
    <key>/…    the optimizer's state tensors under their own key (exp_avg, momentum_buffer, …)
    buffer/…   the model's buffers, whole, in rank 0's file
    rng/…      each rank's random state

The folder is written under a temporary name and renamed when every rank has reported its file and the manifest is on
disk: an interrupted save leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minizero.checkpoint.files import (
    LATEST,
    MANIFEST,
    SAFE_NAME,
    CheckpointError,
    check_file,
    facts_of,
    move_into_place,
    read_manifest,
    sync_file,
    write_atomically,
)
from minizero.dist.collectives import Communicator
from minizero.zero.flat import FlatGroup
from minizero.zero.optimizer import ZeroOptimizer
from minizero.zero.runtime import ZeroRuntime


@dataclass
class TrainingState:
    """Everything that resuming needs, by reference."""

    module: nn.Module
    runtime: ZeroRuntime
    optimizer: ZeroOptimizer
    scheduler: Any
    comm: Communicator
    counters: dict[str, int]


# ---- saving ----


def save_state(state: TrainingState, folder: Path, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
    """Write `folder/tag`; collective. Raises CheckpointError on every rank when one of them could not write."""
    if not SAFE_NAME.fullmatch(tag):
        raise ValueError(f"checkpoint tag {tag!r}: use letters, digits, '.', '_' and '-' only")
    header = json_header(state, client_state)
    comm, device = state.comm, state.runtime.device
    token = comm.gather_bytes(uuid.uuid4().hex[:8].encode(), "checkpoint name", device)[0].decode()
    temporary = folder / f".{tag}.tmp-{token}"

    def write_own_file() -> dict[str, Any]:
        temporary.mkdir(parents=True, exist_ok=True)
        path = temporary / f"dp{comm.rank:05d}.safetensors"
        tensors, entries = own_tensors(state)
        save_file(tensors, path, metadata={"format": "pt"})
        sync_file(path)
        return {**facts_of(path), "entries": entries, "optimizer_scalars": optimizer_scalars(state)}

    files = everyone(comm, device, write_own_file)

    def commit() -> None:
        if comm.rank == 0:
            manifest = {**header, "files": files}
            write_atomically(temporary / MANIFEST, json.dumps(manifest))
            move_into_place(temporary, folder / tag)
            if save_latest:
                write_atomically(folder / LATEST, tag)

    everyone(comm, device, commit)


def json_header(state: TrainingState, client_state: dict[str, Any]) -> dict[str, Any]:
    """The manifest without its files. Raises ValueError for what JSON cannot hold."""
    scheduler = state.scheduler.state_dict() if state.scheduler is not None else None
    header = {
        "format": 1,
        "torch": torch.__version__,
        "dp": state.comm.size,
        "stage": state.runtime.policy.stage,
        "counters": state.counters,
        "scaler": state.optimizer.scaler.state_dict(),
        "scheduler": scheduler,
        "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups],
        "client_state": client_state,
    }
    for key, value in header.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key} cannot be saved as JSON ({error}); checkpoints hold no pickled objects") from None
    return header


def own_tensors(state: TrainingState) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """This rank's file: its tensors by key, and their logical coordinates for the manifest."""
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []

    def add(kind: str, name: str, start: int, tensor: Tensor) -> None:
        tensors[f"{kind}/{name}@{start}"] = tensor.detach().cpu().clone()
        entries.append({"kind": kind, "name": name, "start": start, "stop": start + tensor.numel()})

    for _, group, name, start, piece in slices_to_save(state):
        add("master", name, start, piece)
        for key, value in state.optimizer.state.get(piece, {}).items():
            if isinstance(value, Tensor) and value.dim():
                add(key, name, start, value)
        del group
    for name, group, index, _ in frozen_parameters(state.runtime):
        for span in group.layout.spans[state.comm.rank]:
            if span.index == index:
                add("master", name, span.start, group.shard[span.offset : span.offset + span.numel])
    if state.comm.rank == 0:
        for name, buffer in state.module.named_buffers():
            tensors[f"buffer/{name}"] = buffer.detach().cpu().contiguous().clone()
    tensors["rng/cpu"] = torch.get_rng_state()
    if state.runtime.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(state.runtime.device)
    return tensors, entries


def slices_to_save(state: TrainingState) -> Iterator[tuple[int, FlatGroup, str, int, nn.Parameter]]:
    """(rank whose shard, group, parameter name, start, slice) of this rank's own shards, also at stage 0."""
    for piece, group, place in state.optimizer.slices:
        rank, span = group.owned_spans()[place]
        if rank == state.comm.rank:
            yield rank, group, group.names[span.index], span.start, piece


def frozen_parameters(runtime: ZeroRuntime) -> Iterator[tuple[str, FlatGroup, int, nn.Parameter]]:
    """(name, group, index in the group, parameter) of everything that does not train."""
    for group in runtime.groups:
        if not group.trainable:
            for index, (name, parameter) in enumerate(zip(group.names, group.parameters, strict=True)):
                yield name, group, index, parameter


def optimizer_scalars(state: TrainingState) -> dict[str, dict[str, float]]:
    """Parameter -> optimizer state that is one number (Adam's `step`), the same in all its slices."""
    scalars: dict[str, dict[str, float]] = {}
    for piece, group, place in state.optimizer.slices:
        name = group.names[group.owned_spans()[place][1].index]
        for key, value in state.optimizer.state.get(piece, {}).items():
            if not (isinstance(value, Tensor) and value.dim()) and value is not None:
                scalars.setdefault(name, {})[key] = float(value)
    return scalars


# ---- loading ----


def load_state(
    state: TrainingState, folder: Path, tag: str | None, *, optimizer: bool, scheduler: bool
) -> tuple[Path | None, dict[str, int], dict[str, Any]]:
    """(path, counters, client_state) of the checkpoint, its values in place; (None, {}, {}) when there is none.

    Everything is checked before anything is changed. Raises CheckpointError on every rank.
    """
    path = find_checkpoint(folder, tag)
    agreed = state.comm.gather_bytes(str(path).encode(), "checkpoint path", state.runtime.device)[0].decode()
    if agreed == "None":
        return None, {}, {}
    path = Path(agreed)

    def check() -> dict[str, Any]:
        manifest = read_manifest(path)
        check_fit(state, path, manifest)
        check_file(path, manifest["files"][state.comm.rank])
        return {}

    everyone(state.comm, state.runtime.device, check)
    manifest = read_manifest(path)
    reader = SliceReader(path, manifest)
    everyone(state.comm, state.runtime.device, lambda: read_values(state, reader, optimizer=optimizer))
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
        return folder / tag
    latest = folder / LATEST
    return folder / latest.read_text().strip() if latest.is_file() else None


def check_fit(state: TrainingState, path: Path, manifest: dict[str, Any]) -> None:
    """Raise CheckpointError when the checkpoint is of another layout or model."""
    if manifest["dp"] != state.comm.size:
        raise CheckpointError(
            f"{path} was saved by {manifest['dp']} data-parallel ranks, this run has {state.comm.size}; "
            "this version resumes in the same layout only"
        )
    if len(manifest["param_groups"]) != len(state.optimizer.param_groups):
        raise CheckpointError(
            f"{path} has {len(manifest['param_groups'])} param groups, this run has {len(state.optimizer.param_groups)}"
        )
    held = {entry["name"] for file in manifest["files"] for entry in file["entries"] if entry["kind"] == "master"}
    wanted = {name for group in state.runtime.groups for name in group.names}
    if missing := sorted(wanted - held) or sorted(held - wanted):
        raise CheckpointError(f"{path} is of another model: parameter {missing[0]!r} is in only one of the two")


class SliceReader:
    """Reads any range of any saved tensor, from whichever rank's file holds it."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.scalars: dict[str, dict[str, float]] = {}
        self.entries: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for file in manifest["files"]:
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

    def tensor(self, rank: int, key: str) -> Tensor:
        with safe_open(self.folder / f"dp{rank:05d}.safetensors", framework="pt") as tensors:
            return tensors.get_tensor(key)


@torch.no_grad()
def read_values(state: TrainingState, reader: SliceReader, *, optimizer: bool) -> None:
    """Fill masters, optimizer state, frozen parameters, buffers and random state."""
    for piece, group, place in state.optimizer.slices:
        _, span = group.owned_spans()[place]
        name = group.names[span.index]
        reader.fill(piece, "master", name, span.start)
        if optimizer:
            slot: dict[str, Any] = state.optimizer.state[piece]
            for key, value in reader.scalars.get(name, {}).items():
                slot[key] = torch.tensor(value) if key == "step" else value
            for kind in reader.kinds_of(name):
                slot[kind] = torch.empty_like(piece)
                reader.fill(slot[kind], kind, name, span.start)
    for name, group, index, parameter in frozen_parameters(state.runtime):
        whole = torch.empty(parameter.numel(), dtype=group.dtype)
        reader.fill(whole, "master", name, 0)
        group.load(index, whole)
    for name, buffer in state.module.named_buffers():
        buffer.copy_(reader.tensor(0, f"buffer/{name}"))
    torch.set_rng_state(reader.tensor(state.comm.rank, "rng/cpu"))
    if state.runtime.device.type == "cuda":
        torch.cuda.set_rng_state(reader.tensor(state.comm.rank, "rng/cuda"), state.runtime.device)


def everyone(comm: Communicator, device: torch.device, act: Callable[[], Any]) -> list[Any]:
    """Run `act` on every rank and return all results (JSON); if one fails, every rank raises what it said."""
    try:
        answer: dict[str, Any] = {"result": act()}
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    answers = [json.loads(a) for a in comm.gather_bytes(json.dumps(answer).encode(), "checkpoint status", device)]
    errors = [f"rank {rank}: {a['error']}" for rank, a in enumerate(answers) if "error" in a]
    if errors:
        raise CheckpointError("; ".join(dict.fromkeys(errors)))
    return [a.get("result") for a in answers]
