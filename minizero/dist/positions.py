"""When a collective fails: where every rank of the group is. That turns "it hangs" into "rank 3 never came".

The ranks meet in the store that brought them together, which needs no collective. A rank tells its position only when
something has failed, so a healthy run pays nothing. Those who fail together hear of each other; who fails later has the
words of all before. Nobody is waited for long, since a rank that stays keeps others from failing, and torchrun from
starting again.

The store may be behind a cable that was cut: its client then waits for ever, whatever its timeout. So it is asked from
a thread, which a rank that has to end leaves behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch.distributed as dist

PATIENCE = 0.5  # seconds without news, of the store or of a rank, after which a rank asks no longer
LIMIT = 2.0  # seconds for all of it
TOLD = "minizero/positions"  # in the store: how many were told, and behind a "/" each one's "rank position"


def where_everyone_is(ranks: Sequence[int], rank: int, here: str) -> str:
    """One line per rank of the group: what it was waiting for, or that it does not answer.

    Args:
        ranks: global ranks of the group, in its order. rank: this one's place among them. here: what it waits for.
    """
    asked = _Asked(ranks, ranks[rank], here)
    began = time.monotonic()
    while asked.thread.is_alive() and time.monotonic() < min(asked.news + PATIENCE, began + LIMIT):
        asked.thread.join(0.02)
    if ranks[rank] not in asked.told:
        return f"  where the others are cannot be asked: {asked.trouble}"
    silent = "does not answer: it died, or computes something else"
    return "\n".join(f"  rank {place} {asked.told.get(number, silent)}" for place, number in enumerate(ranks))


class _Asked:
    """What has been told so far, read by a thread.

    Attributes:
        told: position by global rank; the own one once it is in the store.
        news: when something was last heard. trouble: why nobody can be asked.
    """

    def __init__(self, ranks: Sequence[int], own: int, here: str) -> None:
        self.told: dict[int, str] = {}
        self.news, self.trouble = time.monotonic(), "the store's host does not answer"
        self.thread = threading.Thread(target=self._ask, args=(set(ranks), own, here), daemon=True, name="positions")
        self.thread.start()

    def _ask(self, ranks: set[int], own: int, here: str) -> None:
        try:
            store = dist.distributed_c10d._get_default_store()
            place = store.add(TOLD, 1)
            store.set(f"{TOLD}/{place}", f"{own} {here}")
            read = 0
            while not ranks <= self.told.keys():
                while read < store.add(TOLD, 0):
                    read += 1
                    number, _, position = store.get(f"{TOLD}/{read}").decode().partition(" ")
                    self.told[int(number)], self.news = position, time.monotonic()
                time.sleep(0.02)
        except RuntimeError as error:  # the store went away with the rank that held it
            self.trouble = str(error)
