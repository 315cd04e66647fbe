"""A deadline for what a rank does: past it, the process says where it is and ends, whatever it is stuck in.

A collective has its own deadline (`dist.timeout`), which ends those who wait for a peer. The peer itself may compute
without end, wait for a disk, or hold the interpreter's lock in native code. So each step and each save is watched by
faulthandler's thread, which is C and needs no lock: it prints the stacks of all threads and ends the process. Two
seconds before, a thread of ours says what no stack shows: step and latest collectives. Where only Python is stuck, both
are heard; where the lock is held, only the first.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from minizero.dist.ledger import CommLedger

HEAD_START = 2.0  # seconds for the thread of ours
STDERR = 2  # the descriptor: sys.stderr may be something else


class Watchdog:
    """Watches one thing at a time.

    Args:
        ledger: whose step and latest collectives are shown. rank: of this process.
        seconds: the deadline; 0 watches nothing.
    """

    def __init__(self, ledger: CommLedger, rank: int, seconds: float) -> None:
        self.ledger, self.rank, self.seconds = ledger, rank, seconds
        self._depth = 0

    @contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Inside, the process ends when `seconds` have passed. What is watched already stays under its own deadline."""
        if not self.seconds or self._depth:
            yield
            return
        telling = threading.Timer(self.seconds, self._tell, (what,))
        telling.daemon = True
        telling.start()
        faulthandler.dump_traceback_later(self.seconds + HEAD_START, exit=True, file=STDERR)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            faulthandler.cancel_dump_traceback_later()
            telling.cancel()

    def _tell(self, what: str) -> None:
        calls = "\n  ".join(self.ledger.last) or "none"
        print(
            f"minizero: rank {self.rank}: {what} (step {self.ledger.step}) has taken {self.seconds:g} s, the limit of "
            f"dist.step_timeout; this process ends. Its latest collectives, newest last:\n  {calls}",
            file=sys.stderr,
            flush=True,
        )
