"""How long a schedule takes, from what its actions cost.

Every rank runs its actions in the given order. An action starts when its rank is free and its input is there; what
another rank computes arrives `latency` after that action has stopped, without keeping either rank busy. From this
follows the start and stop of every action, and from these the rest:

    span of a rank    from the start of its first action to the stop of its last
    cost              the longest span: what a step takes when one follows the other at once
    bubble            (cost - work) / cost, work = m (F + B + W), that of the busiest rank when costs differ
    makespan          from the first start anywhere to the last stop anywhere

These are the definitions behind the bubble rates of "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241, Table 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from minizero.parallel.pipeline.actions import Action, Kind, Schedule, peak_in_flight

Cost = float | Sequence[float]
"""One number for every rank, or one per rank, or one per virtual stage."""


@dataclass(frozen=True)
class Costs:
    """Time of F, B and W of a whole stage, and of a transfer between ranks, in any one unit.

    A stage's cost is shared evenly by its chunks. A sequence gives each rank its own, or, with as many numbers as
    there are virtual stages, each of these its own. A W of 0 stands for a stage whose W is empty.
    """

    F: Cost = 1.0
    B: Cost = 1.0
    W: Cost = 1.0
    latency: float = 0.0

    def __post_init__(self) -> None:
        for name in ("F", "B", "W", "latency"):
            value = getattr(self, name)
            for number in value if isinstance(value, Sequence) else [value]:
                if not 0 <= number < float("inf"):
                    raise ValueError(f"cost {name} = {number}: must be a number from 0")

    @classmethod
    def parse(cls, text: str) -> Costs:
        """From text such as `F=18.5,B=18.1,W=9.3,latency=0.6`; a cost per rank is `F=18/18/18/20`."""
        found: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = (word.strip() for word in part.partition("="))
            if name not in ("F", "B", "W", "latency") or name in found:
                raise ValueError(f"cost {part.strip()!r}: legal are F=, B=, W= and latency=, each once")
            try:
                numbers = tuple(map(float, value.split("/")))
            except ValueError:
                raise ValueError(f"cost {part.strip()!r}: not a number") from None
            if name == "latency" and len(numbers) > 1:
                raise ValueError(f"cost {part.strip()!r}: the latency is one number")
            found[name] = numbers if len(numbers) > 1 else numbers[0]
        return cls(**found)

    def durations(self, schedule: Schedule) -> list[dict[Kind, float]]:
        """What each kind of action takes in each virtual stage."""
        return self.over(schedule.ranks, schedule.chunks, [rank for rank, _ in schedule.placement])

    def over(self, ranks: int, chunks: int, rank_of: Sequence[int]) -> list[dict[Kind, float]]:
        """As `durations`, for virtual stages on the ranks `rank_of`."""
        found = []
        for stage, rank in enumerate(rank_of):
            f, b, w = (_share(name, getattr(self, name), ranks, chunks, stage, rank) for name in "FBW")
            found.append({Kind.F: f, Kind.B: b, Kind.W: w, Kind.BW: b + w})
        return found


def _share(name: str, cost: Cost, ranks: int, chunks: int, stage: int, rank: int) -> float:
    if not isinstance(cost, Sequence):
        return cost / chunks
    if len(cost) == ranks:
        return cost[rank] / chunks
    if len(cost) == ranks * chunks:
        return cost[stage]
    raise ValueError(f"cost {name} has {len(cost)} numbers: legal are 1, one per rank ({ranks}), or {ranks * chunks}")


@dataclass(frozen=True, slots=True)
class Event:
    """An action of one rank and when it ran."""

    action: Action
    start: float
    stop: float


@dataclass(frozen=True)
class Timeline:
    """When every action of every rank ran, planned or measured: `events[rank]`, in order."""

    name: str
    events: tuple[tuple[Event, ...], ...]

    @property
    def spans(self) -> tuple[float, ...]:
        """Per rank, from the start of its first action to the stop of its last."""
        return tuple(row[-1].stop - row[0].start if row else 0.0 for row in self.events)

    @property
    def makespan(self) -> float:
        """From the first start on any rank to the last stop on any."""
        ran = [event for row in self.events for event in row]
        return max((event.stop for event in ran), default=0.0) - min((event.start for event in ran), default=0.0)

    @property
    def bubble(self) -> float:
        """The share of the longest span that is more than the work of the busiest rank."""
        cost = max(self.spans, default=0.0)
        work = max((sum(event.stop - event.start for event in row) for row in self.events), default=0.0)
        return max(cost - work, 0.0) / cost if cost else 0.0

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """Per rank, the most activations kept at once."""
        return tuple(peak_in_flight(event.action for event in row) for row in self.events)


Place = tuple[Kind, int, int]
"""(F or B or W, virtual stage, microbatch): an action wherever it is computed. A BW is its B and its W."""


def needs(kind: Kind, stage: int, microbatch: int, stages: int) -> Iterator[Place]:
    """What must have been computed before: the rules of a pipeline, in one place."""
    if kind is Kind.F:
        if stage > 0:
            yield Kind.F, stage - 1, microbatch
    elif kind is Kind.W:
        yield Kind.B, stage, microbatch
    else:
        yield Kind.F, stage, microbatch
        if stage < stages - 1:
            yield Kind.B, stage + 1, microbatch


def gives(kind: Kind, stage: int, microbatch: int) -> tuple[Place, ...]:
    """What an action computes, as `needs` names it."""
    kinds = (Kind.B, Kind.W) if kind is Kind.BW else (kind,)
    return tuple((each, stage, microbatch) for each in kinds)


def execute(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """The actions in one order in which they can be run, each with its rank; stops early where none can go on."""
    done: set[Place] = set()
    waiting: dict[Place, list[int]] = {}
    at = [0] * schedule.ranks
    ready = list(range(schedule.ranks))[::-1]
    while ready:
        rank = ready.pop()
        while at[rank] < len(schedule.actions[rank]):
            action = schedule.actions[rank][at[rank]]
            stage = schedule.virtual_stages[rank, action.chunk]
            missing = [n for n in needs(action.kind, stage, action.microbatch, schedule.stages) if n not in done]
            if missing:
                waiting.setdefault(missing[0], []).append(rank)
                break
            at[rank] += 1
            yield rank, action
            for place in gives(action.kind, stage, action.microbatch):
                done.add(place)
                ready += waiting.pop(place, [])


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """When each action runs; all costs are 1 and the latency 0 unless given.

    Raises ValueError when the actions wait for each other (`validate` says where).
    """
    costs = costs or Costs()
    durations = costs.durations(schedule)
    free = [0.0] * schedule.ranks
    stops: dict[Place, tuple[float, int]] = {}
    events: list[list[Event]] = [[] for _ in range(schedule.ranks)]
    for rank, action in execute(schedule):
        stage = schedule.virtual_stages[rank, action.chunk]
        start = free[rank]
        for need in needs(action.kind, stage, action.microbatch, schedule.stages):
            stop, source = stops[need]
            start = max(start, stop + (costs.latency if source != rank else 0.0))
        free[rank] = start + durations[stage][action.kind]
        events[rank].append(Event(action, start, free[rank]))
        for place in gives(action.kind, stage, action.microbatch):
            stops[place] = free[rank], rank
    if sum(map(len, events)) < sum(map(len, schedule.actions)):
        raise ValueError(f"schedule {schedule.name}: its actions wait for each other")
    return Timeline(schedule.name, tuple(map(tuple, events)))
