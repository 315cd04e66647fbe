"""Which attempt this is: all ranks of one start of a job agree on a name that no earlier start has used.

torchrun keeps its store over restarts. Ranks that put their addresses there under the same keys as the last time meet
the dead: a fast rank reads what its predecessor's peer left, and fails to connect (pytorch issue 135712; with gloo
about every other restart). The count of restarts that torchrun exports does not tell attempts apart, as each node's
agent counts its own. So the ranks of an attempt find one another first:

    rank r    writes a word that it has just made up under `hello/r`, and waits for an answer to that word
    rank 0    answers every word that it sees with the name of the attempt, until each rank has signed under that name

A word that a dead rank left behind is answered too, and nobody reads it.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed import Store

PAUSE = 0.01  # seconds between two looks of rank 0


def agree_on_attempt(store: Store, rank: int, world_size: int, timeout: float) -> str:
    """The name of this attempt; every rank calls it. Raises TimeoutError naming the ranks that did not come."""
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"minizero/hello/{rank}", word)
        store.wait([f"minizero/welcome/{word}"], timedelta(seconds=timeout))
        attempt = store.get(f"minizero/welcome/{word}").decode()
        store.set(f"{attempt}/signed/{rank}", "")
        return attempt
    attempt = f"minizero/{word}"
    answered: dict[int, str] = {}
    missing = set(range(1, world_size))
    deadline = time.monotonic() + timeout
    while missing:
        for other in sorted(missing):
            key = f"minizero/hello/{other}"
            said = store.get(key).decode() if store.check([key]) else None
            if said is not None and answered.get(other) != said:
                store.set(f"minizero/welcome/{said}", attempt)
                answered[other] = said
        missing = {other for other in missing if not store.check([f"{attempt}/signed/{other}"])}
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} of {world_size} did not come within {timeout:g} s")
        time.sleep(PAUSE if missing else 0)
    return attempt
