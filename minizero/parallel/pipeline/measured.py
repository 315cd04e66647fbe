"""Timelines of real runs: kept in a file, and turned into the costs that a plan is made from.

The plan beside a measured timeline is the same schedule simulated with what its own actions took: where the two differ,
ranks waited for something that is not in the schedule (the network, a busy machine, the launch of kernels).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from minizero.parallel.pipeline.actions import Action, Kind, Schedule
from minizero.parallel.pipeline.simulate import Costs, Event, Timeline, simulate


@dataclass(frozen=True)
class Profile(Costs):
    """Costs as measured: `seconds[virtual stage][kind]`."""

    seconds: tuple[dict[Kind, float], ...] = field(default=())

    def durations(self, schedule: Schedule) -> list[dict[Kind, float]]:
        """What each kind of action takes in each virtual stage."""
        return [*self.seconds]


def profile(schedule: Schedule, timelines: Iterable[Timeline]) -> Profile:
    """The median duration of each kind of action in each virtual stage, over the microbatches of all `timelines`."""
    found: list[dict[Kind, list[float]]] = [{} for _ in range(schedule.stages)]
    for timeline in timelines:
        for rank, row in enumerate(timeline.events):
            for event in row:
                stage = schedule.virtual_stages[rank, event.action.chunk]
                found[stage].setdefault(event.action.kind, []).append(event.stop - event.start)
    return Profile(seconds=tuple({kind: median(times) for kind, times in of_stage.items()} for of_stage in found))


def planned(schedule: Schedule, timeline: Timeline) -> Timeline:
    """The schedule simulated with what its own actions took in `timeline`."""
    made = simulate(schedule, profile(schedule, [timeline]))
    return Timeline(f"{schedule.name}, planned from the measured costs", made.events)


def write(path: str | Path, schedule: Schedule, timeline: Timeline) -> None:
    """A run's schedule and timeline as JSON."""
    rows = [[[str(event.action), event.start, event.stop] for event in row] for row in timeline.events]
    tree = {"schedule": schedule.name, "microbatches": schedule.microbatches, "placement": schedule.placement}
    Path(path).write_text(json.dumps(tree | {"seconds": rows}))


def read(path: str | Path) -> tuple[Schedule, Timeline]:
    """The inverse of `write`. Raises ValueError for another file."""
    try:
        tree = json.loads(Path(path).read_text())
        rows = tuple(tuple(Event(Action.parse(n), start, stop) for n, start, stop in row) for row in tree["seconds"])
        placement = tuple((rank, chunk) for rank, chunk in tree["placement"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the timeline of a pipeline ({type(error).__name__}: {error})") from None
    actions = tuple(tuple(event.action for event in row) for row in rows)
    return Schedule(tree["schedule"], tree["microbatches"], placement, actions), Timeline(
        f"{tree['schedule']}, measured", rows
    )
