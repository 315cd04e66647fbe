"""Files that are whole or absent: written beside their place, checked, and renamed into it."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

from minizero.utils.files import sync_folder

MANIFEST = "manifest.json"
LATEST = "latest"
SAFE_NAME = re.compile(r"[A-Za-z0-9._-]+")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, incomplete, or does not fit; the message names the file."""


def sync_file(path: Path) -> None:
    """Make the content of `path` survive a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def facts_of(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: name, size in bytes, CRC-32 of its content."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return {"file": path.name, "bytes": path.stat().st_size, "crc32": crc}


def check_file(folder: Path, facts: dict[str, Any]) -> Path:
    """The file that `facts` describes. Raises CheckpointError when it is missing, damaged, or outside the folder."""
    name = str(facts["file"])
    if not SAFE_NAME.fullmatch(name):
        raise CheckpointError(f"{folder / MANIFEST}: file name {name!r} is not a plain name")
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    found = facts_of(path)
    for key in ("bytes", "crc32"):
        if found[key] != facts[key]:
            raise CheckpointError(f"{path} is damaged: {key} is {found[key]}, the manifest says {facts[key]}")
    return path


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder. Raises CheckpointError when there is none or it is no JSON."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict) or found.get("format") != 1:
        raise CheckpointError(f"{path} has an unknown format: {str(found)[:80]}")
    return found


def move_into_place(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its name; one that had the name before goes away after."""
    replaced = temporary.with_name(f"{temporary.name}.old")
    if final.exists():
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_folder(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints (`global_step{N}`) of `folder`, and what interrupted saves left."""
    steps = sorted(folder.glob("global_step*"), key=lambda path: int(path.name.removeprefix("global_step")))
    for path in [*steps[:-keep], *folder.glob(".*.tmp-*")]:
        shutil.rmtree(path)
