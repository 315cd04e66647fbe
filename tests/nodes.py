"""Two nodes on one host: network namespaces with a switch between them, whose cables can be cut.

Needs root and `ip`. What a node runs has its own network and shares all else, files and process numbers included, so
ranks must be told not to read each other's memory (`--dist.transport messages`): no cable is in the way of that.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from minizero.utils.processes import descendants


def obstacle() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if not shutil.which("ip"):
        return "no `ip` command (iproute2)"
    if os.geteuid() != 0:
        return "not root: network namespaces cannot be made"
    trial = f"mz{os.getpid()}t"
    made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", trial], capture_output=True)
    return "" if made.returncode == 0 else f"network namespaces cannot be made: {made.stderr.strip()}"


class Nodes:
    """A switch and `count` nodes; node n is 10.77.0.(n+1), on its interface eth0."""

    def __init__(self, count: int, folder: Path) -> None:
        self.name, self.count, self.folder = f"mz{os.getpid()}", count, folder
        self.running: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Nodes:
        switch = f"{self.name}s"
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for n in range(self.count):
            node = f"{self.name}n{n}"
            ip("netns", "add", node)
            ip("-n", switch, *f"link add eth0 netns {node} type veth peer name port{n}".split())
            ip("-n", switch, "link", "set", f"port{n}", "master", "br0", "up")
            ip("-n", node, "addr", "add", f"{address(n)}/24", "dev", "eth0")
            ip("-n", node, "link", "set", "eth0", "up")
            ip("-n", node, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            kill_tree(process)
        for name in (f"{self.name}s", *(f"{self.name}n{n}" for n in range(self.count))):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def run(self, node: int, command: list[str], environment: dict[str, str], cwd: Path) -> subprocess.Popen[str]:
        """Start a command on a node; what it says is in `said(node)`."""
        with open(self.folder / f"node{node}.txt", "a") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", f"{self.name}n{node}", *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                cwd=cwd,
            )
        self.running.append(process)
        return process

    def said(self, node: int) -> str:
        return (self.folder / f"node{node}.txt").read_text()

    def cut(self, node: int) -> None:
        """Pull the cable of a node."""
        ip("-n", f"{self.name}s", "link", "set", f"port{node}", "down")

    def mend(self, node: int) -> None:
        """Put it back."""
        ip("-n", f"{self.name}s", "link", "set", f"port{node}", "up")

    def mute(self, node: int, peer: int) -> None:
        """What a node sends to a peer is lost, and nobody is told; what it is sent arrives."""
        nobody = "lladdr 02:00:00:00:00:01 dev eth0 nud permanent"
        ip("-n", f"{self.name}n{node}", "neigh", "replace", address(peer), *nobody.split())

    def slow(self, node: int, mbit: int) -> None:
        """Make what a node sends slower."""
        shape = f"qdisc replace dev eth0 root tbf rate {mbit}mbit burst 32kbit latency 50ms"
        subprocess.run(["tc", "-n", f"{self.name}n{node}", *shape.split()], check=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def address(node: int) -> str:
    return f"10.77.0.{node + 1}"


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the living ranks under a launcher."""
    found = []
    for pid in descendants(process.pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if b"minizero.train" in words and b"\0LOCAL_RANK=" in environment:
            found.append(pid)
    return found


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Kill a process and all below it, without a warning."""
    for pid in descendants(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Seconds until `condition` held. Raises AssertionError past `seconds`."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)
    return time.monotonic() - begun
