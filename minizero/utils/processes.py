"""The processes of this machine, as /proc has them; where there is no /proc, none."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def all_processes() -> dict[int, tuple[str, int]]:
    """(state, parent) by process number; of the states, "T" is stopped, "t" held by a debugger, "Z" dead."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended just now
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            found[int(stat.parent.name)] = state, int(parent)
    return found


def descendants(pid: int) -> list[int]:
    """`pid` and all processes below it: torchrun's workers are in sessions of their own."""
    children: dict[int, list[int]] = {}
    for number, (_, parent) in all_processes().items():
        children.setdefault(parent, []).append(number)
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found
