"""What ranks send each other, derived from the actions and the placement.

The output of an F goes to the rank that holds the next virtual stage, the gradient of a B or BW to the one before;
where that is the same rank (the turn of a V, the ends of one rank's chunks) nothing is sent. `transfers` lists them,
`steps` puts them between the actions. Both take a schedule that `validate` has passed.

The order of `steps` cannot deadlock, even where a send waits for its receive and neither is in the background. Both
are placed by one walk through the whole schedule: whenever an action has run, its transfer takes place at once, on both
ranks, between the actions that they have reached. So there is one order of everything that happens, which every rank
follows, and whatever is first in it can go on. It also puts the sends from one rank to another in the order of the
receives, as transports without tags demand. An executor may do better and post both in the background, as long as it
posts them in this order and waits for a receive before the action that needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minizero.parallel.pipeline.actions import Action, Kind, Schedule
from minizero.parallel.pipeline.simulate import execute


@dataclass(frozen=True, slots=True)
class Transfer:
    """What `after` computes on rank `source` goes to rank `target`, which needs it for `before`.

    `after.kind` tells what it is: an F sends activations, a B or BW the gradient of its input. `before` is an F for
    activations, and for gradients a B or BW.
    """

    source: int
    after: Action
    target: int
    before: Action


@dataclass(frozen=True, slots=True)
class Send:
    """The step of the source."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class Receive:
    """The step of the target."""

    transfer: Transfer


Step = Action | Send | Receive


def transfers(schedule: Schedule) -> tuple[Transfer, ...]:
    """Every transfer, in an order in which they can take place one by one."""
    consumers = _backwards(schedule)
    found = (_transfer(schedule, consumers, rank, action) for rank, action in execute(schedule))
    return tuple(transfer for transfer in found if transfer)


def steps(schedule: Schedule) -> tuple[tuple[Step, ...], ...]:
    """Per rank, its actions with the sends and receives between them, in an order free of deadlock."""
    consumers = _backwards(schedule)
    rows: list[list[Step]] = [[] for _ in range(schedule.ranks)]
    for rank, action in execute(schedule):
        rows[rank].append(action)
        transfer = _transfer(schedule, consumers, rank, action)
        if transfer:
            rows[rank].append(Send(transfer))
            rows[transfer.target].append(Receive(transfer))
    return tuple(map(tuple, rows))


def rendezvous(rows: Sequence[Sequence[Step]]) -> list[int]:
    """Run steps with sends that wait for their receives, one thing at a time per rank; how far each rank gets.

    A rank that does not reach the end of its row waits for a partner who is not there: sends and receives are not in
    pairs, or are in orders that block each other. A receive that comes after the action which needs it stops as well.
    """
    at = [0] * len(rows)
    here: list[set[Action]] = [set() for _ in rows]
    needed: list[set[Action]] = [{s.transfer.before for s in row if isinstance(s, Receive)} for row in rows]
    ready = set(range(len(rows)))
    while ready:
        rank = ready.pop()
        if at[rank] == len(rows[rank]):
            continue
        step = rows[rank][at[rank]]
        if isinstance(step, Action):
            if step in needed[rank] and step not in here[rank]:
                continue
        else:
            other = step.transfer.target if isinstance(step, Send) else step.transfer.source
            partner = rows[other][at[other]] if at[other] < len(rows[other]) else None
            wanted = Receive(step.transfer) if isinstance(step, Send) else Send(step.transfer)
            if partner != wanted:
                continue
            here[step.transfer.target].add(step.transfer.before)
            at[other] += 1
            ready.add(other)
        at[rank] += 1
        ready.add(rank)
    return at


def _backwards(schedule: Schedule) -> dict[tuple[int, int, int], Action]:
    """(rank, chunk, microbatch) -> the B or BW there."""
    return {
        (rank, action.chunk, action.microbatch): action
        for rank, row in enumerate(schedule.actions)
        for action in row
        if action.kind in (Kind.B, Kind.BW)
    }


def _transfer(
    schedule: Schedule, backwards: dict[tuple[int, int, int], Action], rank: int, action: Action
) -> Transfer | None:
    """What goes to another rank once `action` has run."""
    if action.kind is Kind.W:
        return None
    stage = schedule.virtual_stages[rank, action.chunk] + (1 if action.kind is Kind.F else -1)
    if not 0 <= stage < schedule.stages or schedule.placement[stage][0] == rank:
        return None
    target, chunk = schedule.placement[stage]
    if action.kind is Kind.F:
        before = Action(Kind.F, chunk, action.microbatch)
    else:
        before = backwards[target, chunk, action.microbatch]
    return Transfer(rank, action, target, before)
