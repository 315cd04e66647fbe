"""One act on every rank, of which all hear how it went: what one rank cannot do, none goes on without.

A rank that fails alone, at its disk say, would leave its peers in their next collective until the timeout. So ranks
meet after the act and tell each other. And a disk may take one rank longer than that timeout, which takes it for dead:
then the act runs on a thread, and ranks meet meanwhile, to say that they live.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import torch

from minizero.dist.collectives import Communicator

STATUS, BUSY = "status", b"null"  # what ranks meet for; what one says that has no answer yet


def everyone(
    comm: Communicator,
    device: torch.device,
    act: Callable[[], Any],
    *,
    expected: type[Exception],
    is_slow: bool = False,
) -> list[Any]:
    """Run `act` on every rank and return all results (JSON), in rank order; collective over `comm`.

    Args:
        device: where ranks meet.
        expected: what failures are raised as, on every rank, with what each failing rank said.
        is_slow: `act` may take a rank much longer than others. It then must call no collective.
    """
    if is_slow and comm.size > 1:
        said = _meet_until_all_are_done(comm, device, lambda: _answer_of(act, expected))
    else:
        said = comm.gather_bytes(_answer_of(act, expected), STATUS, device)
    answers = [json.loads(one) for one in said]
    errors = [f"rank {rank}: {a['error']}" for rank, a in enumerate(answers) if "error" in a]
    if errors:
        raise expected("; ".join(dict.fromkeys(errors)))
    return [a.get("result") for a in answers]


def _answer_of(act: Callable[[], Any], expected: type[Exception]) -> bytes:
    """JSON: the result of `act`, or what it raised."""
    try:
        answer: dict[str, Any] = {"result": act()}
    except expected as error:
        answer = {"error": str(error)}
    except Exception as error:  # whatever it is: peers wait for an answer
        answer = {"error": f"{type(error).__name__}: {error}"}
    return json.dumps(answer).encode()


def _meet_until_all_are_done(comm: Communicator, device: torch.device, answer_of: Callable[[], bytes]) -> list[bytes]:
    """Every rank's answer. Ranks meet several times a timeout, and once if all are done before."""
    answer: list[bytes] = []

    def run() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own
        answer.append(answer_of())

    thread = threading.Thread(target=run, name=STATUS, daemon=True)  # a rank that leaves does not wait for its disk
    thread.start()
    while True:
        thread.join(comm.timeout / 4)
        said = comm.gather_bytes(answer[0] if answer else BUSY, STATUS, device)
        if BUSY not in said:
            return said
