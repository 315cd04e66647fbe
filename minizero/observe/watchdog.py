"""A deadline for a rank's steps and saves.

A collective has its own deadline (`dist.timeout`), which ends those who wait for a peer. The peer itself may compute
without end, wait for a disk, or hold the interpreter's lock in native code: past `dist.step_timeout` its process says
where it is, and ends. One that is stopped (SIGSTOP) cannot: ranks of `minizero.train` that end
because it did not answer take it along, since torchrun's agent would give it half a minute before the restart.
"""

from __future__ import annotations

import os
import signal
from contextlib import AbstractContextManager, suppress

from minizero.dist.ledger import CommLedger
from minizero.utils.deadline import ends_after
from minizero.utils.processes import all_processes


class Watchdog:
    """Watches one thing at a time.

    Args:
        ledger: whose step and latest collectives are shown. rank: of this process.
        seconds: the deadline; 0 watches nothing.
    """

    def __init__(self, ledger: CommLedger, rank: int, seconds: float) -> None:
        self.ledger, self.rank, self.seconds = ledger, rank, seconds

    def watch(self, what: str) -> AbstractContextManager[None]:
        """Inside, the process ends when `seconds` have passed. What is watched already stays under its own deadline."""
        return ends_after(self.seconds, lambda: self._words(what))

    def _words(self, what: str) -> str:
        calls = "\n  ".join(self.ledger.last) or "none"
        return (
            f"rank {self.rank}: {what} (step {self.ledger.step}) has taken {self.seconds:g} s, the limit of "
            f"dist.step_timeout; this process ends. Its latest collectives, newest last:\n  {calls}"
        )


def end_stopped_siblings() -> list[int]:
    """Kill the ranks of this node that are stopped; their process numbers. For a rank that ends because of a peer.

    Under torchrun only, where siblings are ranks. Who is stopped by a debugger is in another state, and stays.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    stopped = [one for one, (state, parent) in all_processes().items() if state == "T" and parent == os.getppid()]
    for one in stopped:
        with suppress(ProcessLookupError):  # a sibling was faster
            os.kill(one, signal.SIGKILL)
    return stopped
