"""The proof that a schedule computes every microbatch once, in order, and never stops.

`validate` looks at four things and raises at the first that does not hold, naming rank and action, what was expected,
and drawing the actions around it:

1. Every action names a chunk and a microbatch that there are.
2. Every microbatch has, in every chunk, one F and either one BW, or one B and one W.
3. Run in the given order, with every action waiting for what it needs, nothing waits for ever. Needed are: for F the F
   of the virtual stage before; for B and BW the F here and the B or BW of the stage after; for W the B here. Since an
   action only waits for others, where it stops does not depend on how fast any rank is: one run proves it for all.
4. The sends and receives of `steps` are in pairs and come to an end though every send waits for its receive.

What it returns is the peak of activations in flight, per rank, as `actions` defines it.
"""

from __future__ import annotations

from collections import Counter

from minizero.parallel.pipeline.actions import Action, Kind, Schedule
from minizero.parallel.pipeline.simulate import execute, gives, needs
from minizero.parallel.pipeline.transfers import rendezvous, steps

WINDOW = 4
"""Actions drawn on each side of an offending one."""


class ScheduleError(ValueError):
    """A schedule that cannot be run; `rank` and `index` say where in `actions[rank]` it breaks."""

    def __init__(self, message: str, rank: int, index: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.index = index


def validate(schedule: Schedule) -> tuple[int, ...]:
    """Prove the schedule; returns the peak of activations in flight on every rank, or raises ScheduleError."""
    for rank in range(schedule.ranks):
        _check_names(schedule, rank)
    for rank in range(schedule.ranks):
        _check_counts(schedule, rank)
    _check_order(schedule)
    rows = steps(schedule)
    reached = rendezvous(rows)
    for rank, row in enumerate(rows):
        if reached[rank] < len(row):  # steps() rules it out; kept as the proof that it does
            index = sum(isinstance(step, Action) for step in row[: reached[rank]])
            _fail(schedule, rank, index, f"its step {row[reached[rank]]} waits for ever")
    return schedule.peak_in_flight


def _check_names(schedule: Schedule, rank: int) -> None:
    for index, action in enumerate(schedule.actions[rank]):
        if not 0 <= action.chunk < schedule.chunks:
            _fail(schedule, rank, index, f"names chunk {action.chunk}; expected: chunks 0 to {schedule.chunks - 1}")
        if not 0 <= action.microbatch < schedule.microbatches:
            last = schedule.microbatches - 1
            _fail(schedule, rank, index, f"names microbatch {action.microbatch}; expected: microbatches 0 to {last}")


def _check_counts(schedule: Schedule, rank: int) -> None:
    """One F, one B (or BW) and one W (or BW) of every microbatch in every chunk."""
    row = schedule.actions[rank]
    seen: dict[tuple[Kind, int, int], Action] = {}
    for index, action in enumerate(row):
        for place in gives(action.kind, action.chunk, action.microbatch):
            if place in seen:
                what = "is there twice" if seen[place] == action else f"comes on top of {seen[place]}"
                _fail(schedule, rank, index, f"{what}; expected: every F once, and either one BW or one B and one W")
            seen[place] = action
    for microbatch in range(schedule.microbatches):
        for chunk in range(schedule.chunks):
            for kind in (Kind.F, Kind.B, Kind.W):
                if (kind, chunk, microbatch) not in seen:
                    missing = Action(kind, chunk, microbatch)
                    or_full = "" if kind is Kind.F else f" (or {Action(Kind.BW, chunk, microbatch)})"
                    near = [i for i, a in enumerate(row) if (a.chunk, a.microbatch) == (chunk, microbatch)]
                    index = near[-1] if near else len(row)
                    message = f"{missing} is missing; expected: {missing}{or_full} once on this rank"
                    _fail(schedule, rank, index, message, names_action=False)


def _check_order(schedule: Schedule) -> None:
    """Run it; where it stops, blame an action that waits for a later one of its own rank, or else a whole circle."""
    at = Counter(rank for rank, _ in execute(schedule))
    stuck = [rank for rank in range(schedule.ranks) if at[rank] < len(schedule.actions[rank])]
    if not stuck:
        return
    done = {
        place
        for rank, row in enumerate(schedule.actions)
        for action in row[: at[rank]]
        for place in gives(action.kind, schedule.virtual_stages[rank, action.chunk], action.microbatch)
    }
    where = {
        place: (rank, index)
        for rank, row in enumerate(schedule.actions)
        for index, action in enumerate(row)
        for place in gives(action.kind, schedule.virtual_stages[rank, action.chunk], action.microbatch)
    }
    waits: dict[int, tuple[int, int]] = {}
    for rank in stuck:
        action = schedule.actions[rank][at[rank]]
        stage = schedule.virtual_stages[rank, action.chunk]
        missing = [
            place for place in needs(action.kind, stage, action.microbatch, schedule.stages) if place not in done
        ]
        waits[rank] = min((where[place] for place in missing), key=lambda found: found[0] != rank)
        if waits[rank][0] == rank:
            later = schedule.actions[rank][waits[rank][1]]
            _fail(schedule, rank, at[rank], f"comes before {later}; expected: {later} of this rank first")
    rank, path = stuck[0], []
    while rank not in path:
        path.append(rank)
        rank = waits[rank][0]
    circle = path[path.index(rank) :]
    chain = "; ".join(
        f"rank {one} at {schedule.actions[one][at[one]]} waits for {schedule.actions[waits[one][0]][waits[one][1]]}"
        f" of rank {waits[one][0]}"
        for one in circle
    )
    first = min(circle, key=lambda one: (at[one], one))
    other, index = waits[first]
    expected = f"expected: {schedule.actions[other][index]} of rank {other} to run first"
    _fail(schedule, first, at[first], f"waits for ever; {expected}; a circle: {chain}")


def _fail(schedule: Schedule, rank: int, index: int, message: str, names_action: bool = True) -> None:
    row = schedule.actions[rank]
    name = f"{row[index]} " if names_action else ""
    head = f"schedule {schedule.name}, rank {rank}, action {index}: {name}{message}"
    raise ScheduleError(f"{head}\n{neighbourhood(schedule, rank, index)}", rank, index)


def neighbourhood(schedule: Schedule, rank: int, index: int) -> str:
    """The actions around one of `rank`, there and on the ranks beside it, by position; the one is marked."""
    ranks = range(max(rank - 1, 0), min(rank + 2, schedule.ranks))
    places = range(max(index - WINDOW, 0), index + WINDOW + 1)
    cells = {
        each: [str(schedule.actions[each][i]) if i < len(schedule.actions[each]) else "" for i in places]
        for each in ranks
    }
    cells[rank][index - places.start] = f">{cells[rank][index - places.start]}<"
    width = max(len(cell) for row in [*cells.values(), [str(places.stop - 1)]] for cell in row)
    lines = ["position " + " ".join(f"{i:<{width}}" for i in places)]
    lines += [f"rank {each:<3} " + " ".join(f"{cell:<{width}}" for cell in row) for each, row in cells.items()]
    return "\n".join(line.rstrip() for line in lines)
