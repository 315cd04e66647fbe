"""Processes that load data for a rank, and what they do when the rank is told to stop."""

from __future__ import annotations

import os
import signal
import threading

STOPS = {signal.SIGTERM, signal.SIGUSR1}


def outlive_signals(worker: int) -> None:
    """For `DataLoader(worker_init_fn=...)`: a signal that asks the job to stop does not end the workers.

    torchrun passes it on to a rank's whole process group. torch's handler then ends a worker at once, and the rank,
    which has a step to finish and a checkpoint to save, fails for want of data. Only the rank itself can end a worker
    so: torch does that to one that is stuck.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    threading.Thread(target=_await_parent, daemon=True, name="signals").start()


def _await_parent() -> None:
    while signal.sigwaitinfo(STOPS).si_pid != os.getppid():
        pass
    os._exit(0)
