"""When a collective fails: where every rank of the group is. That turns "it hangs" into "rank 3 never came".

The ranks meet in the store that brought them together, which needs no collective. A rank tells its position only when
something has failed, so a healthy run pays nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch.distributed as dist

PATIENCE = 2.0  # seconds that other ranks get to notice the failure too


def where_everyone_is(ranks: Sequence[int], rank: int, here: str) -> str:
    """One line per rank of the group: what it was waiting for, or that it does not answer.

    Args:
        ranks: global ranks of the group, in its order. rank: this one's place among them. here: what it waits for.
    """
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
