"""Ends a process that is stuck, whatever it is stuck in: a lock, a disk, native code that holds the interpreter.

faulthandler's thread is C and needs no lock: it prints the stacks of all threads and ends the process. `HEAD_START`
seconds before, a thread of ours says what no stack shows. Where only Python is stuck, both are heard; where the
interpreter's lock is held, only the first.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

HEAD_START = 2.0  # seconds for the thread of ours
STDERR = 2  # the descriptor: sys.stderr may be something else
_THE_TIMER = threading.Lock()  # faulthandler has one a process


@contextmanager
def ends_after(seconds: float, words: Callable[[], str]) -> Iterator[None]:
    """Inside, the process says `words` and ends when `seconds` have passed; 0 is never.

    Inside another one nothing changes: that one's deadline counts.
    """
    if not seconds or not _THE_TIMER.acquire(blocking=False):
        yield
        return
    telling = threading.Timer(seconds, lambda: print(f"minizero: {words()}", file=sys.stderr, flush=True))
    telling.daemon = True
    telling.start()
    faulthandler.dump_traceback_later(seconds + HEAD_START, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        telling.cancel()
        _THE_TIMER.release()
