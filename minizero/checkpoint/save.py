"""Saving a training run: every rank writes its own file, rank 0 the manifest, and one rename makes them a checkpoint.

The folder is written under a temporary name and renamed when every rank has reported its file, the files are seen to be
complete, and the manifest is on disk: an interrupted save leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minizero.checkpoint.files import (
    LATEST,
    MANIFEST,
    SAFE_NAME,
    CheckpointError,
    facts_of,
    move_into_place,
    sync_file,
)
from minizero.checkpoint.state import TrainingState, check_complete, everyone
from minizero.utils.files import write_atomically


def save_state(state: TrainingState, folder: Path, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
    """Write `folder/tag`; collective. Raises CheckpointError on every rank when one of them could not write."""
    if not SAFE_NAME.fullmatch(tag):
        raise ValueError(f"checkpoint tag {tag!r}: use letters, digits, '.', '_' and '-' only")
    header = json_header(state, client_state)
    comm, device = state.world, state.runtime.device
    proposals = comm.gather_bytes(f"{uuid.uuid4().hex[:8]} {tag}".encode(), "checkpoint name", device)
    tokens, tags = zip(*(proposal.decode().split(" ", 1) for proposal in proposals), strict=True)
    if len(set(tags)) > 1:
        raise CheckpointError(f"ranks give different tags for one checkpoint: {', '.join(tags)} in rank order")
    temporary = folder / f".{tag}.tmp-{tokens[0]}"

    def write_own_file() -> dict[str, Any]:
        temporary.mkdir(parents=True, exist_ok=True)
        path = temporary / state.file_name
        tensors, entries = own_tensors(state)
        save_file(tensors, path, metadata={"format": "pt"})
        sync_file(path)
        return {
            **facts_of(path),
            "tp": state.tp_rank,
            "pp": state.pp_rank,
            "buffers": {name: list(buffer.shape) for name, buffer in state.module.named_buffers()},
            "entries": entries,
            "optimizer_scalars": optimizer_scalars(state),
        }

    files = everyone(comm, device, write_own_file)

    def commit() -> None:
        if comm.rank == 0:
            check_complete(files)
            write_atomically(temporary / MANIFEST, json.dumps({**header, "files": files}))
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
        "layout": state.layout,
        "stage": state.runtime.policy.stage,
        "counters": state.counters,
        "scaler": state.optimizer.scaler.state_dict(),
        "scheduler": scheduler,
        "optimizer": state.optimizer.rule,
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

    def add(kind: str, name: str, shape: tuple[int, ...], start: int, tensor: Tensor) -> None:
        tensors[f"{kind}/{name}@{start}"] = tensor.detach().cpu().clone()
        place = {"start": start, "stop": start + tensor.numel()}
        entries.append({"kind": kind, "name": name, "shape": list(shape), **place})

    for piece, name, shape, rank, span in state.slices():
        if rank != state.comm.rank:  # at stage 0 every rank updates everything, and writes its part
            continue
        add("master", name, shape, span.start, piece)
        for key, value in state.optimizer.state.get(piece, {}).items():
            if isinstance(value, Tensor) and value.dim():
                add(key, name, shape, span.start, value)
    for name, group, index, parameter in state.frozen():
        for span in group.layout.spans[state.comm.rank]:
            if span.index == index:
                held = group.shard[span.offset : span.offset + span.numel]
                add("master", name, tuple(parameter.shape), span.start, held)
    if state.comm.rank == 0:
        for name, buffer in state.module.named_buffers():
            tensors[f"buffer/{name}"] = buffer.detach().cpu().contiguous().clone()
    tensors["rng/cpu"] = torch.get_rng_state()
    if state.runtime.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(state.runtime.device)
    return tensors, entries


def optimizer_scalars(state: TrainingState) -> dict[str, dict[str, Any]]:
    """Parameter -> optimizer state that is one number (Adam's `step`), the same in all its slices.

    A number is kept as it is, a 0-d tensor as its value and dtype.
    """
    scalars: dict[str, dict[str, Any]] = {}
    for piece, name, *_ in state.slices():
        for key, value in state.optimizer.state.get(piece, {}).items():
            if isinstance(value, Tensor) and value.dim() == 0:
                kept: Any = {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
            elif isinstance(value, int | float):
                kept = value
            else:
                continue
            scalars.setdefault(name, {})[key] = kept
    return scalars
