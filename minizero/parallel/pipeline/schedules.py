"""The schedules, each a function of the number of ranks and microbatches to a `Schedule`.

Every one takes any number of microbatches from 1. The pictures are those of `draw.grid` for F = B = W and no latency,
3 ranks and 4 microbatches unless they say otherwise: a column is a chunk's F, `-` goes on with the action before, `.`
is idle, `F2.1` is microbatch 2 in chunk 1.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from itertools import accumulate

from minizero.parallel.pipeline.actions import (
    Action,
    Kind,
    Placement,
    Schedule,
    loop_placement,
    peak_memory,
    v_placement,
)
from minizero.parallel.pipeline.auto import search
from minizero.parallel.pipeline.simulate import Costs, simulate


class _Row:
    """The actions of one rank while they are written down.

    `repeat(3, "F0 BW1")` adds three times a forward of chunk 0 and a backward of chunk 1, each of the next microbatch
    that this kind and chunk have not had. A `W` without a chunk is that of the oldest B which has not had its W.
    """

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._next: dict[tuple[str, int], int] = defaultdict(int)
        self._owed: deque[Action] = deque()

    def repeat(self, times: int, pattern: str) -> None:
        for _ in range(times):
            for word in pattern.split():
                if word != "W":
                    self._add(Kind(word[:-1]), int(word[-1]))
                elif self._owed:
                    self._add(Kind.W, self._owed[0].chunk)

    def _add(self, kind: Kind, chunk: int) -> None:
        action = Action(kind, chunk, self._next["W" if kind is Kind.W else "F" if kind is Kind.F else "B", chunk])
        self.actions.append(action)
        for letter in kind:
            self._next[letter, chunk] += 1
        if kind is Kind.B:
            self._owed.append(action)
        if kind is Kind.W:
            self._owed.remove(Action(Kind.B, chunk, action.microbatch))


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., arXiv 1811.06965). Keeps m activations.

    rank 0 | F0  F1  F2  F3  .   .   .   .   .   .   BW0 -   BW1 -   BW2 -   BW3 -
    rank 1 | .   F0  F1  F2  F3  .   .   .   BW0 -   BW1 -   BW2 -   BW3 -
    rank 2 | .   .   F0  F1  F2  F3  BW0 -   BW1 -   BW2 -   BW3 -
    """
    _check(ranks, microbatches)
    forward = [Action(Kind.F, 0, index) for index in range(microbatches)]
    backward = [Action(Kind.BW, 0, index) for index in range(microbatches)]
    return _schedule("gpipe", microbatches, loop_placement(ranks), [forward + backward] * ranks)


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """One forward, one backward after p - r forwards to warm up (PipeDream-flush, arXiv 2006.09503).

    The bubble of GPipe with no more than min(p - r, m) activations kept on rank r.

        rank 0 | F0  F1  F2  .   .   .   .   BW0 -   F3  BW1 -   .   BW2 -   .   BW3 -
        rank 1 | .   F0  F1  .   .   BW0 -   F2  BW1 -   F3  BW2 -   .   BW3 -
        rank 2 | .   .   F0  BW0 -   F1  BW1 -   F2  BW2 -   F3  BW3 -
    """
    _check(ranks, microbatches)
    rows = [_one_chunk(microbatches, ranks - rank, None) for rank in range(ranks)]
    return _schedule("one_f_one_b", microbatches, loop_placement(ranks), rows)


def zb_h1(ranks: int, microbatches: int) -> Schedule:
    """1F1B with its W put off until r backwards later: about a third of the bubble, p activations on every rank.

    (Qi et al., arXiv 2401.10241, section 2.2.)

        rank 0 | F0 F1 F2 .  .  B0 W0 F3 B1 W1 B2 W2 B3 W3
        rank 1 | .  F0 F1 .  B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
        rank 2 | .  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3
    """
    _check(ranks, microbatches)
    rows = [_one_chunk(microbatches, ranks - rank, rank) for rank in range(ranks)]
    return _schedule("zb_h1", microbatches, loop_placement(ranks), rows)


def zb_h2(ranks: int, microbatches: int) -> Schedule:
    """More forwards to warm up and W put off further: no bubble but latency when F = B = W, for 2p - 1 activations.

    (Qi et al., arXiv 2401.10241, section 2.3.)

        rank 0 | F0 F1 F2 F3 .  B0 W0 B1 W1 B2 W2 B3 W3
        rank 1 | .  F0 F1 F2 B0 F3 B1 .  B2 W0 B3 W1 W2 W3
        rank 2 | .  .  F0 B0 F1 B1 F2 B2 F3 B3 W0 W1 W2 W3
    """
    _check(ranks, microbatches)
    rows = [_one_chunk(microbatches, 2 * (ranks - rank) - 1, 2 * rank) for rank in range(ranks)]
    return _schedule("zb_h2", microbatches, loop_placement(ranks), rows)


def _one_chunk(microbatches: int, warmup: int, delay: int | None) -> list[Action]:
    """`warmup` forwards, then backward and forward in turn; W `delay` backwards later, or within BW if None."""
    row = [Action(Kind.F, 0, index) for index in range(min(warmup, microbatches))]
    for index in range(microbatches):
        row.append(Action(Kind.BW if delay is None else Kind.B, 0, index))
        if delay is not None and index >= delay:
            row.append(Action(Kind.W, 0, index - delay))
        if index + warmup < microbatches:
            row.append(Action(Kind.F, 0, index + warmup))
    owed = min(delay or 0, microbatches)
    return row + [Action(Kind.W, 0, index) for index in range(microbatches - owed, microbatches)]


def interleaved(ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """1F1B over several chunks per rank: 1/chunks of its bubble (Narayanan et al., arXiv 2104.04473).

    Microbatches go in rounds of at least p (of all m when there are fewer), as equal as they can be, the longer ones
    first; a round passes through all chunks before the next one starts. So every m is legal, a multiple of p or not.
    Rounds far shorter than p would block: a rank would wait for what it has itself put off. So would rounds that grow:
    rank r warms up with 2 (p - r - 1) + (chunks - 1) times the first round, which must do for all.

    2 ranks, 2 microbatches:

        rank 0 | F0    F1    F0.1  F1.1  .     .     BW0.1 -     .     BW1.1 -     BW0   -     BW1   -
        rank 1 | .     F0    F1    F0.1  BW0.1 -     F1.1  BW1.1 -     BW0   -     BW1   -
    """
    _check(ranks, microbatches)
    if chunks < 1:
        raise ValueError(f"chunks = {chunks}: interleaved needs at least 1 per rank")
    count = max(microbatches // ranks, 1)
    sizes = [microbatches // count + (index < microbatches % count) for index in range(count)]
    starts = [0, *accumulate(sizes)]
    rounds = [range(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    forward = [Action(Kind.F, chunk, m) for group in rounds for chunk in range(chunks) for m in group]
    backward = [Action(Kind.BW, chunk, m) for group in rounds for chunk in reversed(range(chunks)) for m in group]
    rows = []
    for rank in range(ranks):
        warmup = min((chunks - 1) * sizes[0] + 2 * (ranks - 1 - rank), len(forward))
        pairs = zip(forward[warmup:], backward, strict=False)
        steady = [action for pair in pairs for action in pair]
        rows.append(forward[:warmup] + steady + backward[len(forward) - warmup :])
    return _schedule("interleaved", microbatches, loop_placement(ranks, chunks), rows)


def zbv(ranks: int, microbatches: int) -> Schedule:
    """Two chunks in a V with B and W apart: no bubble but latency when F = B = W, for p whole activations.

    (Qi et al., arXiv 2401.10241, section 6.) The pattern needs 2p - 1 microbatches to unfold; with fewer, the actions
    of those that are not there are left out.

    2 ranks, 3 microbatches:

        rank 0 | F0   F1   F2   F0.1 B0.1 W0.1 F1.1 B1.1 W1.1 B0   W0   F2.1 B2.1 W2.1 B1   W1   B2   W2
        rank 1 | .    F0   F0.1 F1   F1.1 B0.1 W0.1 F2   B0   W0   F2.1 B1.1 W1.1 B1   B2.1 B2   W1   W2.1 W2
    """
    _check(ranks, microbatches)
    full = max(microbatches, 2 * ranks - 1)
    rows = []
    for rank in range(ranks):
        row = _Row()
        row.repeat(2 * (ranks - rank) - 1, "F0")
        row.repeat(rank, "F1 F0")
        row.repeat(ranks - rank, "F1 B1 W1")
        row.repeat(full - 2 * ranks + 1 + rank, "F0 B0 W0 F1 B1 W1")
        row.repeat(ranks - rank - 1, "B0 W0 F1 B1 W1")
        row.repeat(rank, "B0 B1")
        row.repeat(ranks - rank, "B0 W0")
        row.repeat(rank, "W1")
        row.repeat(rank, "W0")
        rows.append(row.actions)
    return _schedule("zbv", microbatches, v_placement(ranks), rows)


def dualpipe_v(ranks: int, microbatches: int) -> Schedule:
    """DualPipe folded into a V (DeepSeek-AI, arXiv 2412.19437): F and BW of different chunks side by side.

    What makes it fast is that a neighbouring F and BW may overlap, one computing while the other communicates. Here
    they are one after the other; an executor may run such a pair as one. The pattern needs 2p microbatches to unfold;
    with fewer, the actions of those that are not there are left out.

    2 ranks, 4 microbatches, in order and without the waiting:

        rank 0 | F0 F1 F2 F0.1 B0.1 W0.1 F1.1 F3 BW1.1 F2.1 BW0 BW2.1 F3.1 BW1 BW3.1 B2 W2 B3 W3
        rank 1 | F0 F0.1 F1 F1.1 F2 BW0.1 F2.1 BW0 F3 BW1.1 F3.1 BW1 BW2.1 BW2 B3.1 B3 W3.1 W3
    """
    _check(ranks, microbatches)
    full = max(microbatches, 2 * ranks)
    rows = []
    for rank in range(ranks):
        after, half = ranks - rank - 1, (rank + 1) // 2
        row = _Row()
        row.repeat(2 * after, "F0")
        row.repeat(rank + 1, "F0 F1")
        row.repeat(after, "B1 W F1")
        row.repeat(full - 2 * ranks + rank + 1, "F0 BW1 F1 BW0")
        row.repeat(after, "BW1 F1 BW0")
        row.repeat(half, "BW1 BW0")
        row.repeat((rank + 1) % 2, "BW1 B0")
        row.repeat(half, "B1 B0")
        row.repeat(after, "W B0")
        row.repeat(rank + 1, "W")
        rows.append(row.actions)
    return _schedule("dualpipe_v", microbatches, v_placement(ranks), rows)


def zb_auto(
    ranks: int, microbatches: int, costs: Costs | None = None, memory_limit: float | None = None, kept: float = 1.0
) -> Schedule:
    """The shortest of ZB-H1, ZB-H2 and what `auto` finds for these costs, in a given memory.

    No rank keeps more than `memory_limit` activations, 2p unless given; `kept` is what of one remains between its B and
    its W. One chunk per rank.
    """
    limit = 2 * ranks if memory_limit is None else memory_limit
    _check(ranks, microbatches)
    if not limit >= 1:
        raise ValueError(f"memory_limit = {limit}: must be at least 1")
    if not 0 <= kept <= 1:
        raise ValueError(f"kept = {kept}: must be from 0 (a B frees everything) to 1 (nothing)")
    costs = costs or Costs()
    rows = [search(ranks, microbatches, costs, limit, kept)]
    rows += [made.actions for made in (zb_h1(ranks, microbatches), zb_h2(ranks, microbatches))]
    found = [Schedule("zb_auto", microbatches, loop_placement(ranks), row) for row in rows]
    fitting = [one for one in found if max(peak_memory(row, kept) for row in one.actions) <= limit + 1e-9]
    return min(fitting, key=lambda one: max(simulate(one, costs).spans))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "one_f_one_b": one_f_one_b,
    "interleaved": interleaved,
    "zb_h1": zb_h1,
    "zb_h2": zb_h2,
    "zbv": zbv,
    "dualpipe_v": dualpipe_v,
    "zb_auto": zb_auto,
}
"""By name. All take `ranks, microbatches`; interleaved takes `chunks`, zb_auto `costs`, `memory_limit` and `kept`."""


def build(
    name: str,
    ranks: int,
    microbatches: int,
    chunks: int | None = None,
    costs: Costs | None = None,
    memory_limit: float | None = None,
    kept: float | None = None,
) -> Schedule:
    """The schedule `name`, with those of the options that it takes.

    Raises ValueError when the others do not fit: chunks that it cannot have, or more activations on some rank than
    `memory_limit` whole ones. Costs decide an order only in zb_auto.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r}: legal are {', '.join(SCHEDULES)}")
    if name == "zb_auto":
        schedule = zb_auto(ranks, microbatches, costs, memory_limit, 1.0 if kept is None else kept)
    elif kept is not None:
        raise ValueError(f"kept = {kept} is for zb_auto, not {name}")
    elif name == "interleaved" and chunks is not None:
        schedule = interleaved(ranks, microbatches, chunks)
    else:
        schedule = SCHEDULES[name](ranks, microbatches)
    if chunks not in (None, schedule.chunks):
        raise ValueError(f"chunks = {chunks}: {name} has {schedule.chunks} per rank; any number: interleaved")
    peak = max(schedule.peak_in_flight) / schedule.chunks
    if memory_limit is not None and name != "zb_auto" and peak > memory_limit:
        raise ValueError(f"{name} keeps {peak:g} activations, more than memory_limit = {memory_limit:g}")
    return schedule


def _check(ranks: int, microbatches: int) -> None:
    for name, value in (("ranks", ranks), ("microbatches", microbatches)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")


def _schedule(name: str, microbatches: int, placement: Placement, rows: list[list[Action]]) -> Schedule:
    """The rows without the microbatches that there are not."""
    kept = tuple(tuple(action for action in row if action.microbatch < microbatches) for row in rows)
    return Schedule(name, microbatches, placement, kept)
