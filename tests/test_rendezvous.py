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


def told_by(pauses: list[float], monkeypatch) -> list[tuple[float, str]]:
    """(seconds, words) of ranks that ask where everyone is, each `pauses[rank]` seconds late; -1 never does."""
    store, found = dist.HashStore(), [(0.0, "")] * len(pauses)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)

    def ask(place: int) -> None:
        time.sleep(pauses[place])
        began = time.monotonic()
        words = positions.where_everyone_is(range(5, 5 + len(pauses)), place, f"waits for {place}")
        found[place] = time.monotonic() - began, words

    threads = [threading.Thread(target=ask, args=(place,)) for place, pause in enumerate(pauses) if pause >= 0]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return found


def test_those_who_fail_together_hear_of_each_other_at_once(monkeypatch):
    monkeypatch.setattr(positions, "PATIENCE", 10.0)
    monkeypatch.setattr(positions, "LIMIT", 10.0)
    found = told_by([0.0, 0.1, 0.2], monkeypatch)
    everyone = "\n".join(f"  rank {place} waits for {place}" for place in range(3))
    assert [words for _, words in found] == [everyone] * 3
    assert max(seconds for seconds, _ in found) < 5


def test_news_is_waited_for_and_silence_is_not(monkeypatch):
    """Each comes within the patience that the one before renewed; the last one's silence ends all of it."""
    monkeypatch.setattr(positions, "PATIENCE", 1.2)
    monkeypatch.setattr(positions, "LIMIT", 30.0)
    found = told_by([0.0, 0.7, 1.4, -1], monkeypatch)
    for _, words in found[:3]:
        assert words.count("waits for") == 3 and words.endswith(
            "  rank 3 does not answer: it died, or computes something else"
        )
    assert found[0][0] > 1.4 and max(seconds for seconds, _ in found) < 15
    monkeypatch.setattr(positions, "LIMIT", 0.4)
    assert told_by([0.0, 1.0, -1], monkeypatch)[0][1].count("does not answer") == 2


def test_who_comes_late_has_the_words_of_those_who_have_gone(monkeypatch):
    first, last = told_by([0.0, 2.0], monkeypatch)
    assert "rank 1 does not answer" in first[1] and "rank 0 waits for 0\n  rank 1 waits for 1" in last[1]


@pytest.mark.parametrize("answers", (False, True))
def test_a_store_that_does_not_answer_holds_nobody_up(monkeypatch, answers):
    """Behind a cable that was cut, a store's client waits for ever: the rank must end all the same."""

    class Gone:
        def add(self, key: str, value: int) -> int:
            threading.Event().wait(0 if answers else None)
            raise RuntimeError("Broken pipe")

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", Gone)
    began = time.monotonic()
    words = positions.where_everyone_is([0, 1], 1, "waits for a test")
    assert words == f"  where the others are cannot be asked: {'Broken pipe' if answers else GONE}"
    assert time.monotonic() - began < 5


GONE = "the store's host does not answer"
