"""Folders that are whole or absent: written beside their place, listed in a manifest, and renamed into it.

    {"xxh3_128": "<of the bytes of the manifest>", "manifest":
    {"format": 2, …, "files": [{"file": …, "bytes": …, "xxh3_128": …}, …]}
    }

The manifest carries a sum of its own, over its exact bytes, and one for every file: a bit that flips anywhere in the
folder is found before anything is used. Nothing is ever changed in place, and nothing is unpickled.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import xxhash

from minizero.utils.files import sync_folder

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 2
SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")  # no path, nothing hidden
LONGEST_MANIFEST = 1 << 30  # bytes
STEP_FOLDER = re.compile(r"global_step([0-9]+)")
_FRAME = re.compile(rb'\{"xxh3_128": "([0-9a-f]{32})", "manifest":\n(.*)\n\}\n', re.DOTALL)
_SWAP_NAMES, _AT_CWD = 2, -100  # renameat2's RENAME_EXCHANGE; AT_FDCWD


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, incomplete, or does not fit; the message names the file."""


# ---- the manifest ----


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """What is written as the manifest."""
    body = json.dumps(manifest).encode()
    return b'{"xxh3_128": "%s", "manifest":\n%s\n}\n' % (xxhash.xxh3_128_hexdigest(body).encode(), body)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder. Raises CheckpointError unless it is there, as it was written."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder")
    if not path.is_file() or path.is_symlink():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}")
    if path.stat().st_size > LONGEST_MANIFEST:
        raise CheckpointError(f"{path} is damaged: {path.stat().st_size} bytes")
    content = path.read_bytes()
    if content[:12] == b'{"format": 1':
        raise CheckpointError(
            f"{path} was written by an older version of minizero, whose checkpoints this one reads not"
        )
    framed = _FRAME.fullmatch(content)
    if framed is None or xxhash.xxh3_128_hexdigest(framed[2]).encode() != framed[1]:
        raise CheckpointError(f"{path} is damaged: its content is not what its checksum was taken of")
    try:
        manifest = json.loads(framed[2])
        files = [(file["file"], file["bytes"]) for file in manifest["files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')!r}; legal here: {FORMAT}")
    for name, size in files:
        if not isinstance(name, str) or not SAFE_NAME.fullmatch(name):
            raise CheckpointError(f"{path}: file name {name!r} is not a plain name")
        if type(size) is not int or size < 0:
            raise CheckpointError(f"{path}: {name} has {size!r} bytes")
    return manifest


def check_presence(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise CheckpointError unless `folder` holds the manifest's files, in their sizes, and nothing else.

    Names that begin with a dot are not looked at: file systems keep their own under such.
    """
    sizes = {file["file"]: file["bytes"] for file in manifest["files"]}
    for name, size in sizes.items():
        path = folder / name
        try:
            found = path.lstat()
        except OSError:
            raise CheckpointError(f"{path} is missing") from None
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is no regular file")
        if found.st_size != size:
            raise CheckpointError(f"{path} is damaged: bytes is {found.st_size}, the manifest says {size}")
    for name in sorted(os.listdir(folder)):
        if name not in sizes and name != MANIFEST and not name.startswith("."):
            raise CheckpointError(f"{folder / name} does not belong to the checkpoint: {MANIFEST} does not name it")


# ---- committing ----


def write_synced(path: Path, content: bytes) -> None:
    """A new file that survives a power cut."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def move_into_place(temporary: Path, final: Path) -> None:
    """Give a finished folder its name, in one step; what had the name before goes away after.

    Raises CheckpointError when the name is taken and the file system cannot swap two names.
    """
    sync_folder(temporary)
    if not final.exists():
        os.rename(temporary, final)
        sync_folder(final.parent)
        return
    swap_names(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(temporary)


def swap_names(one: Path, other: Path) -> None:
    """Exchange what two names stand for, in one step. Raises CheckpointError where that cannot be done."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    code = errno.ENOSYS
    if rename is not None:
        if rename(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _SWAP_NAMES) == 0:
            return
        code = ctypes.get_errno()
    raise CheckpointError(
        f"{other} exists, and cannot be replaced in one step here ({os.strerror(code)}): give another tag, or remove it"
    )


# ---- many checkpoints ----


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """(N, path) of every `global_step{N}` in `folder`, the newest first."""
    found = [
        (int(match[1]), path) for path in folder.glob("global_step*") if (match := STEP_FOLDER.fullmatch(path.name))
    ]
    return sorted(found, reverse=True)


def prune(folder: Path, keep: int, keep_every: int = 0) -> None:
    """Remove all checkpoints (`global_step{N}`) but the newest `keep` and those of every `keep_every` steps.

    And what interrupted saves left.
    """
    remove_leftovers(folder)
    for step, path in steps_in(folder)[keep:]:
        if not keep_every or step % keep_every:
            doomed = path.with_name(f".{path.name}.tmp-pruned")  # half a checkpoint must not have a checkpoint's name
            os.rename(path, doomed)
            shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves left in `folder`."""
    for path in folder.glob(".*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def older_whole(path: Path) -> Path | None:
    """The newest checkpoint before `path`, in the same folder, of which the manifest and the files' sizes are right."""
    steps = steps_in(path.parent)
    of_path = next((step for step, other in steps if other == path), None)
    for step, other in steps:
        if other != path and (of_path is None or step < of_path):
            try:
                check_presence(other, read_manifest(other))
            except CheckpointError:
                continue
            return other
    return None
