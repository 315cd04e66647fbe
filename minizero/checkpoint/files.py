"""Folders that are whole or absent: written beside their place, and renamed into it. Nothing is changed in place."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
from pathlib import Path

from minizero.utils.files import sync

MANIFEST = "manifest.json"
LATEST = "latest"
LONGEST_NAME = 200
SAFE_NAME = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}")  # no path, nothing hidden
STEP_FOLDER = re.compile(r"global_step([0-9]+)")
_SWAP_NAMES, _AT_CWD = 2, -100  # renameat2's RENAME_EXCHANGE; AT_FDCWD


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, incomplete, or does not fit; the message names the file."""


def check_presence(folder: Path, sizes: dict[str, int]) -> None:
    """Raise CheckpointError unless `folder` holds files of these names and sizes, a manifest, and nothing else.

    Names that begin with a dot are not looked at: file systems keep their own under such.
    """
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
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None
    for name in names:
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
    sync(temporary)
    if not final.exists():
        os.rename(temporary, final)
        sync(final.parent)
        return
    swap_names(temporary, final)
    sync(final.parent)
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


def prune(folder: Path, newest: str, keep: int, keep_every: int = 0) -> None:
    """Remove all checkpoints (`global_step{N}`) but the newest `keep` and those of every `keep_every` steps.

    Steps after that of `newest`, the tag just written, are of a run that was rolled back: they are somebody's to look
    at, and neither counted nor removed. Nor is what `latest` names, or a link.
    """
    own = STEP_FOLDER.fullmatch(newest)
    past = [(step, path) for step, path in steps_in(folder) if own is None or step <= int(own[1])]
    for step, path in past[keep:]:
        if (keep_every and step % keep_every == 0) or path.name == named_by_latest(folder) or path.is_symlink():
            continue
        doomed = path.with_name(f".{path.name}.tmp-pruned")  # half a checkpoint must not have a checkpoint's name
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def named_by_latest(folder: Path) -> str | None:
    """What the file `latest` says; None where there is none."""
    latest = folder / LATEST
    if not latest.is_file():
        return None
    with open(latest, "rb") as file:
        return file.read(LONGEST_NAME + 1).decode(errors="replace").strip()


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves left in `folder`."""
    for path in folder.glob(".*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
