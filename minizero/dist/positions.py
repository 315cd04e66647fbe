"""When a collective fails: where every rank of the group is. That turns "it hangs" into "rank 3 never came".

The ranks meet in the store that brought them together, which needs no collective. A rank tells its position only when
something has failed, so a healthy run pays nothing. The store may be behind a cable that was cut: its client then waits
for ever, whatever its timeout. So it is asked from a thread, which a rank that has to end leaves behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch.distributed as dist

PATIENCE = 2.0  # seconds that other ranks get to notice the failure too
STORE_ANSWERS = 3.0  # seconds that the store has for all of it


def where_everyone_is(ranks: Sequence[int], rank: int, here: str) -> str:
    """One line per rank of the group: what it was waiting for, or that it does not answer.

    Args:
        ranks: global ranks of the group, in its order. rank: this one's place among them. here: what it waits for.
    """
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(_ask(ranks, rank, here)), daemon=True, name="positions")
    asking.start()
    asking.join(STORE_ANSWERS)
    return answers[0] if answers else "  where the others are cannot be asked: the store's host does not answer"


def _ask(ranks: Sequence[int], rank: int, here: str) -> str:
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"minizero/position/{ranks[rank]}", here)
        keys = {place: f"minizero/position/{number}" for place, number in enumerate(ranks) if place != rank}
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not all(store.check([key]) for key in keys.values()):
            time.sleep(0.05)
        told = {place: store.get(key).decode() for place, key in keys.items() if store.check([key])}
    except RuntimeError as error:  # the store went away with the rank that held it
        return f"  where the others are cannot be asked: {error}"
    told[rank] = here
    silent = "does not answer: it died, or computes something else"
    return "\n".join(f"  rank {place} {told.get(place, silent)}" for place in range(len(ranks)))
