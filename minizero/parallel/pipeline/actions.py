"""What a pipeline schedule is made of: actions, their order on every rank, and where each part of the model is.

Words. A model is cut into *virtual stages*, in the order in which a microbatch passes through them. A rank holds one or
more of them, its *chunks*, numbered from 0; what a rank holds in all is its *stage*. An *action* is one computation of
one microbatch in one chunk:

    F   forward: takes the output of the virtual stage before, gives the input of the one after
    B   gradient of the chunk's input: takes that of its output, is what the virtual stage before waits for
    W   gradient of the chunk's weights: any time after its B, nobody waits for it
    BW  both in one backward: costs B + W, and the gradient of the input leaves when all of it is done

BW is a kind of its own, not B with W at once behind it: autograd computes both in one walk, which is cheaper than two,
and the gradient of the input then leaves after B + W instead of after B. A schedule says which of the two it means.

*In flight* on a rank are the activations that it must keep: one for each microbatch of each chunk from the start of its
F to the end of its W or BW. (A B may free part of them, so this is a bound; `executor` frees none but the loss's.)
One activation in flight is a whole stage's where a rank holds one chunk, and 1/chunks of it where it holds several.

As text an action is its kind and microbatch, then its chunk unless that is 0: `F3`, `B0.1`, `BW12`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path


class Kind(StrEnum):
    """What an action computes."""

    F = "F"
    B = "B"
    W = "W"
    BW = "BW"


@dataclass(frozen=True, slots=True)
class Action:
    """One computation of one microbatch in one chunk of a rank."""

    kind: Kind
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")

    @classmethod
    def parse(cls, text: str) -> Action:
        """The inverse of `str`."""
        found = re.fullmatch(r"(F|BW|B|W)(\d+)(?:\.(\d+))?", text.strip())
        if not found:
            raise ValueError(f"action {text.strip()!r}: legal are F, B, W or BW, a microbatch, and .chunk: F3, BW0.1")
        return cls(Kind(found[1]), int(found[3] or 0), int(found[2]))


Placement = tuple[tuple[int, int], ...]
"""Virtual stage -> (rank, chunk)."""


def loop_placement(ranks: int, chunks: int = 1) -> Placement:
    """Virtual stages go around the ranks, chunk after chunk: 0 1 2 3, 0 1 2 3."""
    return tuple((rank, chunk) for chunk in range(chunks) for rank in range(ranks))


def v_placement(ranks: int) -> Placement:
    """Down the ranks with chunk 0 and back up with chunk 1, so that rank 0 holds the first and the last."""
    return (*((rank, 0) for rank in range(ranks)), *((rank, 1) for rank in reversed(range(ranks))))


@dataclass(frozen=True)
class Schedule:
    """The order of actions on every rank.

    `placement[v]` is the (rank, chunk) that holds virtual stage v, `actions[rank]` what that rank computes, in order.
    Raises ValueError when the placement does not name every chunk of every rank once; whether the actions are legal
    is for `validate` to say.
    """

    name: str
    microbatches: int
    placement: Placement
    actions: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        if set(self.placement) != set(loop_placement(self.ranks, self.chunks)) or not self.placement:
            raise ValueError(
                f"placement {list(self.placement)} of {len(self.placement)} virtual stages on {self.ranks} ranks: "
                f"every rank must hold the same number of chunks, each once"
            )
        if len(set(self.placement)) != len(self.placement):
            raise ValueError(f"placement {list(self.placement)} names a chunk of a rank twice")

    @property
    def ranks(self) -> int:
        return len(self.actions)

    @property
    def stages(self) -> int:
        """The number of virtual stages."""
        return len(self.placement)

    @property
    def chunks(self) -> int:
        """Chunks per rank."""
        return len(self.placement) // max(self.ranks, 1)

    @cached_property
    def virtual_stages(self) -> dict[tuple[int, int], int]:
        """(rank, chunk) -> virtual stage: the inverse of `placement`."""
        return {place: stage for stage, place in enumerate(self.placement)}

    @cached_property
    def peak_in_flight(self) -> tuple[int, ...]:
        """Per rank, the most activations that it must keep at once (see the top of this module)."""
        return tuple(peak_in_flight(row) for row in self.actions)

    @cached_property
    def order(self) -> tuple[tuple[str, ...], ...]:
        """The actions of every rank as text."""
        return tuple(tuple(map(str, row)) for row in self.actions)


def peak_in_flight(actions: Iterable[Action]) -> int:
    """The most activations that these actions of one rank keep at once."""
    return round(peak_memory(actions, 1.0))


def peak_memory(actions: Iterable[Action], kept: float) -> float:
    """As `peak_in_flight` where of every activation only the share `kept` remains between its B and its W."""
    change = {Kind.F: 1.0, Kind.B: kept - 1.0, Kind.W: -kept, Kind.BW: -1.0}
    held = peak = 0.0
    for action in actions:
        held += change[action.kind]
        peak = max(peak, held)
    return peak


def from_lists(rows: Sequence[Sequence[str]], placement: Placement | None = None, name: str = "own") -> Schedule:
    """A schedule from the text of its actions, one row per rank; without a placement, chunks go around the ranks."""
    actions = tuple(tuple(Action.parse(cell) for cell in row if cell.strip()) for row in rows)
    everything = [action for row in actions for action in row]
    if not everything:
        raise ValueError("a schedule needs at least one action")
    chunks = max(action.chunk for action in everything) + 1
    microbatches = max(action.microbatch for action in everything) + 1
    return Schedule(name, microbatches, placement or loop_placement(len(actions), chunks), actions)


def read_csv(path: str | Path) -> Schedule:
    """A schedule from a CSV file: a row of actions per rank, empty cells ignored.

    An optional first row `placement,0.0,1.0,1.1,0.1` gives the rank.chunk of each virtual stage.
    """
    with Path(path).open(newline="") as file:
        rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    placement = None
    if rows and rows[0][0].strip() == "placement":
        try:
            split = [cell.split(".") for cell in rows.pop(0)[1:] if cell.strip()]
            placement = tuple((int(rank), int(chunk)) for rank, chunk in split)
        except ValueError:
            raise ValueError("placement row: legal cells are rank.chunk, as in placement,0.0,1.0,1.1,0.1") from None
    return from_lists(rows, placement, Path(path).stem)


def write_csv(schedule: Schedule, path: str | Path) -> None:
    """The inverse of `read_csv`."""
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["placement", *(f"{rank}.{chunk}" for rank, chunk in schedule.placement)])
        writer.writerows(schedule.order)
