"""One small exchange between steps, in which the ranks tell one another what all of them must know.

Whether somebody was told to stop (a signal reaches ranks at different times, and all must end after the same step),
whether the first rank's time is over, and how long each rank was busy with the last step, which shows who is slow.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from types import FrameType

import torch

from minizero.dist.collectives import Communicator

WINDOW = 16  # steps whose fastest counts: noise makes steps slower, never faster
SLOWER = 1.5  # times its peers' median
BY_AT_LEAST = 0.05  # seconds


class StopRequests:
    """What signals have asked for; the loop looks between steps, so that a signal breaks nothing off.

    Attributes:
        received: the first signal, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._process = os.getpid()

    def listen(self, *signals: signal.Signals) -> None:
        """Take these signals. Processes forked later, such as a loader's workers, take no notice of them."""
        for number in signals:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process and not self.received:
            self.received = number


@dataclass(frozen=True)
class Beat:
    """stop: a rank was told to. over: the first rank's time is over. slow: ranks that have just become stragglers."""

    stop: bool
    over: bool
    slow: list[int]


class Stragglers:
    """Finds ranks that are busy longer than their peers, step after step.

    Args:
        peers: ranks that do the same work, group by group.
    """

    def __init__(self, peers: Sequence[Sequence[int]]) -> None:
        self.peers = [group for group in peers if len(group) > 1]
        self._seconds: dict[int, deque[float]] = {}
        self._known: set[int] = set()

    def add(self, seconds: Sequence[float]) -> list[int]:
        """Take each rank's busy seconds of one step; the ranks that have become stragglers with it."""
        for rank, value in enumerate(seconds):
            self._seconds.setdefault(rank, deque(maxlen=WINDOW)).append(value)
        slow = set()
        for group in self.peers:
            fastest = {rank: min(self._seconds[rank]) for rank in group}
            if len(self._seconds[group[0]]) == WINDOW:
                for rank, value in fastest.items():
                    usual = median(other for peer, other in fastest.items() if peer != rank)
                    if value > SLOWER * usual and value - usual > BY_AT_LEAST:
                        slow.add(rank)
        fresh, self._known = sorted(slow - self._known), slow
        return fresh


class Pulse:
    """The exchange. `world` are all ranks; collective."""

    def __init__(self, world: Communicator, device: torch.device, peers: Sequence[Sequence[int]]) -> None:
        self.world, self.device = world, device
        self.stragglers = Stragglers(peers)

    def beat(self, *, stop: bool, over: bool, busy: float | None) -> Beat:
        """What the ranks know together. `busy` are this rank's seconds of the last step; None before the first."""
        row = torch.tensor([float(stop), float(over), busy or 0.0], dtype=torch.float64, device=self.device)
        rows = self.world.gather_rows(row, "pulse").cpu()
        slow = [] if busy is None else self.stragglers.add(rows[:, 2].tolist())
        return Beat(bool(rows[:, 0].any()), bool(rows[0, 1]), slow)
