"""Counts what is communicated, so that theory is checked instead of cited.

Each collective is entered once, by the function that runs it, with two sizes in bytes:

    payload  the logical buffer: S for an all-gather (its output), a reduce-scatter (its input), an all-reduce
    wire     what the chosen algorithm makes this rank send: (N-1)/N S for a gather or scatter over N ranks

The closed forms of the ZeRO paper (arXiv 1910.02054, section 7) are in payload; (N-1)/N of it goes on the wire.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

LAST_CALLS = 16  # that a watchdog shows


@dataclass
class Count:
    """Calls, payload bytes and wire bytes of one kind of communication."""

    calls: int = 0
    payload: int = 0
    wire: int = 0

    def add(self, other: Count) -> None:
        self.calls += other.calls
        self.payload += other.payload
        self.wire += other.wire


@dataclass
class CommLedger:
    """Calls and bytes by (axis, operation, phase, unit). One per engine; the engine names step and phase.

    Attributes:
        step: optimizer steps made. waited: seconds spent waiting for peers so far. last: the latest calls, newest last.
        asked: in which step a call failed, and where every rank was then.
    """

    counts: dict[tuple[str, str, str, str], Count] = field(default_factory=dict)
    current_phase: str = "init"
    step: int = 0
    waited: float = 0.0
    last: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_CALLS))
    asked: tuple[int, str] = (-1, "")
    _taken: dict[tuple[str, str], int] = field(default_factory=dict)

    def record(self, axis: str, operation: str, unit: str, payload: int, wire: int) -> None:
        key = (axis, operation, self.current_phase, unit)
        self.counts.setdefault(key, Count()).add(Count(1, payload, wire))

    def add_wire(self, axis: str, operation: str, unit: str, wire: int) -> None:
        """More wire bytes of a call that is entered already."""
        self.counts[axis, operation, self.current_phase, unit].wire += wire

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything communicated inside belongs to phase `name` (forward, backward, step, ...)."""
        outer, self.current_phase = self.current_phase, name
        try:
            yield
        finally:
            self.current_phase = outer

    def total(
        self,
        *,
        axis: str | None = None,
        operation: str | None = None,
        phase: str | None = None,
        unit: str | None = None,
    ) -> Count:
        """The sum over every entry that matches the given names."""
        wanted = (axis, operation, phase, unit)
        result = Count()
        for key, count in self.counts.items():
            if all(want is None or want == have for want, have in zip(wanted, key, strict=True)):
                result.add(count)
        return result

    def take(self) -> dict[str, dict[str, int]]:
        """{axis: {operation: payload bytes}} since the last `take`: what one step's metrics line reports."""
        now: dict[tuple[str, str], int] = {}
        for (axis, operation, _, _), count in self.counts.items():
            now[axis, operation] = now.get((axis, operation), 0) + count.payload
        since: dict[str, dict[str, int]] = {}
        for (axis, operation), payload in now.items():
            if fresh := payload - self._taken.get((axis, operation), 0):
                since.setdefault(axis, {})[operation] = fresh
        self._taken = now
        return since

    def reset(self) -> None:
        self.counts.clear()
        self._taken.clear()
