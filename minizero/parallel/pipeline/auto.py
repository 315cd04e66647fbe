"""A search for a schedule that fits given costs and memory, after "Zero Bubble Pipeline Parallelism" (section 3.1).

Two places in a step can leave a rank idle, and for each there is a stock that fills it:

    before its first backward comes back, rank r can run this many forwards:
        lead[r] = 1 + (sum over the ranks q after r of F_q + B_q + 2 latency) / F_r
    after its last B, the gradient still has to travel to rank 0. Rank r fills that time with W, if it saved this many:
        debt[r] = (sum over the ranks q before r of F_q + B_q + 2 latency) / W_r

(The second counts the time by which rank r started later as well, so that all ranks take equally long.) The search
tries some multiples of both. For each, every rank decides as it goes, knowing only what is on its way to it: pay a W if
it owes more than its debt; else a B that is there; F and B in turn where both are; and in a gap that is long enough, or
where memory is full, a W. The shortest schedule is returned.

For 3 ranks and 5 microbatches, F = B = W, no latency and room for 2p - 1 activations, this is found:

    rank 0 | F0 F1 F2 F3 F4 B0 W0 B1 W1 B2 W2 B3 W3 B4 W4
    rank 1 | .  F0 F1 F2 B0 F3 B1 F4 B2 W0 B3 W1 B4 W2 W3 W4
    rank 2 | .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 W0 W1 W2 W3 W4

What is kept after B. A limit on memory counts activations (see `actions`). `kept` is the share of one that still waits
for its W once its B is done. 1 is the safe bound; a transformer block without fused attention keeps 32 sbh of
sbh (34 + 5as/h). The published ZB-2p bubbles need it: for p = 8 the last rank must owe 28 W, which 2p = 16 whole
activations cannot hold.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from minizero.parallel.pipeline.actions import Action, Kind
from minizero.parallel.pipeline.simulate import Costs

NEVER = float("inf")
LEADS = (0, 1, 2)
"""Forwards in addition to the lead."""
DEBTS = (0.0, 0.25, 0.5, 0.8, 0.9, 1.0, 1.1, 1.2)
"""Multiples of the debt."""


def search(ranks: int, microbatches: int, costs: Costs, limit: float, kept: float) -> tuple[tuple[Action, ...], ...]:
    """The actions per rank of the shortest schedule found, which keeps no more than `limit` activations on any rank."""
    stages = costs.over(ranks, 1, range(ranks))
    trips = [stage[Kind.F] + stage[Kind.B] + 2 * costs.latency for stage in stages]
    leads = [1 + _times(sum(trips[rank + 1 :]), stages[rank][Kind.F], microbatches) for rank in range(ranks)]
    debts = [_times(sum(trips[:rank]), stages[rank][Kind.W], microbatches) for rank in range(ranks)]
    guesses = [
        ([int(lead + 1e-9) + more for lead in leads], [round(debt * times) for debt in debts])
        for more in LEADS
        for times in DEBTS
    ]
    best: tuple[float, list[_Rank]] | None = None
    for some_leads, some_debts in guesses:
        row = [_Rank(stages[rank], some_leads[rank], some_debts[rank], limit, kept) for rank in range(ranks)]
        _run(row, microbatches, costs.latency)
        longest = max(rank.free - rank.started for rank in row)
        if best is None or longest < best[0] - 1e-9:
            best = longest, row
    assert best is not None
    return tuple(tuple(rank.actions) for rank in best[1])


def _times(whole: float, part: float, most: int) -> float:
    """How often `part` goes into `whole`, no more than `most` times."""
    return min(whole / part, most) if part else 0.0 if not whole else most


@dataclass
class _Rank:
    """One rank while the search runs: what it has done, and what it may do."""

    cost: dict[Kind, float]
    lead: int
    debt: int
    limit: float
    kept: float
    done: dict[Kind, int] = field(default_factory=lambda: {Kind.F: 0, Kind.B: 0, Kind.W: 0})
    actions: list[Action] = field(default_factory=list)
    arrivals: dict[Kind, list[float]] = field(default_factory=lambda: {Kind.F: [], Kind.B: []})
    free: float = 0.0
    started: float = 0.0
    turn: Kind = Kind.F

    def arrival(self, kind: Kind) -> float:
        """When the input of the next F or B is here; NEVER while nobody has begun to compute it."""
        known, index = self.arrivals[kind], self.done[kind]
        return known[index] if index < len(known) else NEVER

    def decide(self, now: float) -> Kind | None:
        """The next action, or None to wait for what is on its way."""
        running, owed = self.done[Kind.F] - self.done[Kind.B], self.done[Kind.B] - self.done[Kind.W]
        if owed > self.debt:
            return Kind.W
        forward, backward = self.arrival(Kind.F), self.arrival(Kind.B)
        wanted = running < self.lead
        room = running + self.kept * owed + 1 <= self.limit + 1e-9
        may_forward = forward <= now and wanted and room
        if backward <= now and not (may_forward and self.turn is Kind.F):
            return Kind.B
        if may_forward:
            return Kind.F
        gap = min(backward, forward if wanted and room else NEVER) - now
        blocked = forward <= now and wanted and not room
        return Kind.W if owed and (blocked or gap >= self.cost[Kind.W]) else None

    def act(self, kind: Kind, now: float) -> None:
        """Run the next `kind` from now on."""
        if not self.actions:
            self.started = now
        self.actions.append(Action(kind, 0, self.done[kind]))
        self.done[kind] += 1
        self.free = now + self.cost[kind]
        if kind is not Kind.W:
            self.turn = Kind.B if kind is Kind.F else Kind.F


def _run(row: list[_Rank], microbatches: int, latency: float) -> None:
    """Let every rank decide, in order of time, until nothing is left."""
    row[0].arrivals[Kind.F] = [0.0] * microbatches
    moments = [(0.0, 0)]
    while moments:
        now, index = heapq.heappop(moments)
        rank = row[index]
        kind = rank.decide(now) if now >= rank.free else None
        if kind is None:
            continue
        rank.act(kind, now)
        heapq.heappush(moments, (rank.free, index))
        if kind is Kind.F and index == len(row) - 1:
            rank.arrivals[Kind.B].append(rank.free)
        elif kind is not Kind.W and (kind is Kind.F or index > 0):
            other = index + 1 if kind is Kind.F else index - 1
            row[other].arrivals[kind].append(rank.free + latency)
            heapq.heappush(moments, (rank.free + latency, other))
