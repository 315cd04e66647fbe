"""Looking at checkpoints without a process group: what is there, whether it is whole, where two differ.

Whole tensors are put together one at a time, so a checkpoint of any size can be looked at on a small machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minizero.checkpoint.files import LATEST, CheckpointError, check_presence, steps_in
from minizero.checkpoint.load import Reader, check_content, find_checkpoint
from minizero.checkpoint.manifest import Manifest, read_manifest
from minizero.checkpoint.tensor_file import DTYPES
from minizero.dist.boxes import whole_box


def resolve(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, what `latest` names in it, or in its `checkpoints` (a run).

    Raises CheckpointError where there is none.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).is_file() and (found := find_checkpoint(folder, None)) is not None:
            return found
    read_manifest(path)
    return path


def verify(path: Path) -> Manifest:
    """The manifest of `path`, once every byte of it is seen to be what was written.

    Raises CheckpointError naming the file that is not, or the tensor of which elements are missing.
    """
    manifest = read_manifest(path)
    check_presence(path, manifest.sizes)
    manifest.check_complete()
    for file in manifest.files:
        check_content(path, file)
    return manifest


def listing(folder: Path) -> list[dict[str, Any]]:
    """A row per checkpoint in `folder` (or in a run's `checkpoints`), the newest first; what is wrong with it, if so.

    Looks at manifests and sizes only.
    """
    inner = folder / "checkpoints"
    folder = inner if inner.is_dir() else folder
    latest = find_checkpoint(folder, None)
    numbered = [path for _, path in steps_in(folder)]
    others = sorted(path.parent for path in folder.glob("[!.]*/manifest.json") if path.parent not in numbered)
    rows = []
    for path in [*numbered, *others]:
        row: dict[str, Any] = {"tag": path.name, "latest": path == latest}
        try:
            manifest = read_manifest(path)
            check_presence(path, manifest.sizes)
            row |= {"step": manifest.counters.global_steps, "bytes": manifest.bytes}
            row |= {"layout": manifest.layout.model_dump(), "problem": None}
        except CheckpointError as error:
            row["problem"] = str(error)
        rows.append(row)
    return rows


def describe(path: Path) -> dict[str, Any]:
    """What a manifest says, and of every parameter the shape, and the kinds of tensors that are kept of it."""
    manifest = read_manifest(path)
    kinds: dict[str, list[str]] = {name: [] for name in manifest.parameters}
    for kind, name in manifest.boxes():
        kinds[name].append(kind)
    said = manifest.model_dump(mode="json", exclude={"files": {"__all__": {"boxes"}}, "parameters": True})
    parameters = {
        name: {"shape": list(facts.shape), "kinds": kinds[name]} for name, facts in manifest.parameters.items()
    }
    return {"path": str(path), **said, "bytes": manifest.bytes, "parameters": parameters}


def whole_tensor(reader: Reader, manifest: Manifest, kind: str, name: str) -> Tensor:
    """All of `kind` of parameter `name`, in the dtype it was saved in."""
    shape = manifest.parameters[name].shape
    value = torch.empty(shape, dtype=dtype_of(reader, kind, name))
    reader.fill(value, kind, name, whole_box(shape))
    return value


def dtype_of(reader: Reader, kind: str, name: str) -> torch.dtype:
    """The dtype in which `kind` of `name` was saved; float32 of what has no elements."""
    for box, file in reader.boxes.get((kind, name), []):
        return DTYPES[reader.place(kind, name, box, file).dtype]
    return torch.float32


def diff(one: Path, other: Path) -> list[str]:
    """A line for everything in which two checkpoints differ, whatever their layouts; random states are left out."""
    manifests = [read_manifest(path) for path in (one, other)]
    lines = []
    for key in ("counters", "optimizer", "param_groups", "scheduler", "scaler", "client_state"):
        said = [m.model_dump(exclude={"counters": {"micro_steps"}})[key] for m in manifests]  # those follow the layout
        if said[0] != said[1]:
            lines.append(f"{key}: {said[0]} | {said[1]}")
    with Reader(one, manifests[0]) as a, Reader(other, manifests[1]) as b:
        for kind, name in sorted(a.boxes.keys() | b.boxes.keys()):
            only = next((path for path, reader in ((other, a), (one, b)) if (kind, name) not in reader.boxes), None)
            if only is not None:
                lines.append(f"{kind} of {name}: only in {only}")
                continue
            values = [whole_tensor(r, m, kind, name) for r, m in ((a, manifests[0]), (b, manifests[1]))]
            if line := difference(*values):
                lines.append(f"{kind} of {name}: {line}")
        for name in sorted(manifests[0].buffers.keys() & manifests[1].buffers.keys()):
            files = [r.file(m.buffers[name].file) for r, m in ((a, manifests[0]), (b, manifests[1]))]
            if line := difference(*[file.read(f"buffer/{name}") for file in files]):
                lines.append(f"buffer {name}: {line}")
    for name in sorted(manifests[0].parameters.keys() & manifests[1].parameters.keys()):
        scalars = [m.parameters[name].model_dump()["scalars"] for m in manifests]
        if scalars[0] != scalars[1]:
            lines.append(f"optimizer state of {name}: {scalars[0]} | {scalars[1]}")
    return lines


def difference(one: Tensor, other: Tensor) -> str | None:
    """How two tensors differ; None where they are the same, bit by bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{one.dtype} {list(one.shape)} | {other.dtype} {list(other.shape)}"
    if torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
        return None
    gap = (one.double() - other.double()).abs()
    return f"{int((gap > 0).sum())} of {gap.numel()} elements differ, by up to {gap.max().item():.3e}"
