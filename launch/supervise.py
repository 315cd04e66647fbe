"""Runs a launcher, passes signals on to it, and kills it when it has been without workers for too long.

    python launch/supervise.py LAUNCHER [ARGS ...]

Why: torchrun's agent asks a store on the first node what to do next. When the link to it is cut, the agent waits in the
store's client for ever, and takes no notice of SIGTERM. Its ranks have a deadline of their own (`dist.timeout`), so an
agent whose ranks are all dead, and that does not start new ones, is one that is cut off, or that waits for a node which
does not come back. Either way a scheduler can only help once this process has ended.

Not a shell script: a signal that comes while bash forks may run its trap in the child, or hold both up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

LIMIT = float(os.environ.get("NO_WORKER_LIMIT", "20"))  # seconds without workers, once there were some; > a restart
JOIN_LIMIT = float(os.environ.get("JOIN_LIMIT", "900"))  # seconds before the first ones: all nodes have to come first
SAVED = 75  # the exit code of a run that was stopped and saved
HEARING = 5.0  # seconds for an agent that waits for other nodes, and not for a store that is cut off, to say so
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def has_workers(agent: int) -> bool:
    """Whether a child of `agent` lives. Those that are dead and not yet asked after (state Z) do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended just now
            continue
        if int(parent) == agent and state != "Z":
            return True
    return False


def main(command: list[str]) -> int:
    """Run `command`; its exit code, as a shell would have it, or 1 when it had to be killed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until there is somebody to pass them on to
    agent = subprocess.Popen(command, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON))

    def pass_on(number: int, frame: FrameType | None) -> None:
        if not os.environ.get("SIGNALS_REACH_ALL"):  # else it has it: a second one would break off its waiting
            agent.send_signal(number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    last, allowed = time.monotonic(), JOIN_LIMIT
    while True:
        try:
            code = agent.wait(timeout=1.0)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            pass
        if has_workers(agent.pid):
            last, allowed = time.monotonic(), LIMIT
        elif time.monotonic() - last > allowed:
            text = f"supervise.py: no worker for more than {allowed:g} s; the launcher (process {agent.pid}) is ended"
            print(text, file=sys.stderr, flush=True)
            return ended(agent)


def ended(agent: subprocess.Popen[bytes]) -> int:
    """End `agent`, which may be deaf; 75 if it said so, "saved, try again", and 1 for all else."""
    agent.terminate()
    try:
        return SAVED if agent.wait(HEARING) == SAVED else 1
    except subprocess.TimeoutExpired:
        agent.kill()
        agent.wait()
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
