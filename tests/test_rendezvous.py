"""Attempts find one another: ranks of one start agree on a name, whatever an earlier start left in the store."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch.distributed as dist

from minizero.dist import positions
from minizero.dist.rendezvous import agree_on_attempt


def attempt(server: dist.TCPStore, world: int, chance: random.Random, dies: set[int] = frozenset()) -> dict[int, str]:
    """The name that each rank got; ranks come at random times, and those that die leave their word behind."""
    found: dict[int, str] = {}
    delays = [chance.random() * 0.1 for _ in range(world)]

    def run(rank: int) -> None:
        time.sleep(delays[rank])
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        if rank in dies:
            store.set(f"minizero/hello/{rank}", f"last word of {rank}")
            return
        try:
            found[rank] = agree_on_attempt(store, rank, world, timeout=0.5 if dies else 10.0)
        except (TimeoutError, RuntimeError) as error:
            found[rank] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_restarts_over_one_store_never_meet_the_last_one():
    server, chance, names = dist.TCPStore("127.0.0.1", 0, is_master=True), random.Random(0), set()
    for number in range(12):
        dies = {chance.randrange(1, 4)} if number % 3 == 1 else set()
        found = attempt(server, 4, chance, dies)
        if dies:
            assert f"ranks {sorted(dies)} of 4 did not come" in found[0]
        else:
            assert len(found) == 4 and len(set(found.values())) == 1
            names.add(found[0])
    assert len(names) == 8


def test_alone_is_at_once():
    store = dist.HashStore()
    assert agree_on_attempt(store, 0, 1, 1.0) != agree_on_attempt(store, 0, 1, 1.0)
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] of 3 did not come within 0.1 s"):
        agree_on_attempt(store, 0, 3, 0.1)


def test_a_store_that_does_not_answer_holds_nobody_up(monkeypatch):
    """Behind a cable that was cut, a store's client waits for ever: the rank must end all the same."""

    class Gone:
        def set(self, key: str, value: str) -> None:
            threading.Event().wait()

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", Gone)
    monkeypatch.setattr(positions, "STORE_ANSWERS", 0.2)
    began = time.monotonic()
    assert "store's host does not answer" in positions.where_everyone_is([0, 1], 1, "waits for a test")
    assert time.monotonic() - began < 5
