"""What every test shares: seeds, one thread, the end of the worker pool, and a guard against a vacuous suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from faults import Nursery

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# torch's store asks the name server who connects to it, 5 s long where an answer is lost: here nobody is asked.
os.environ.setdefault("RES_OPTIONS", "attempts:0")
os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; those that are compiled, in processes without it

import harness
import interpreter
import pytest
import torch

interpreter.cure()

MIN_DISTRIBUTED_CALLS = 200
"""A whole run of the suite that completes fewer distributed calls than this fails: it has lost its subject."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Where ranks are forked that faults befall."""
    from faults import Nursery

    with Nursery() as found:
        yield found


@pytest.fixture(autouse=True, scope="session")
def worker_pool() -> Iterator[None]:
    """Kill the workers when the session ends."""
    yield
    for pool in harness.POOL:
        pool.close()


def is_whole_suite(config: pytest.Config) -> bool:
    """True when nothing on the command line narrows the selection."""
    option = config.option
    narrowed = option.keyword or option.markexpr not in ("", "not soak") or option.collectonly or option.deselect
    narrowed = narrowed or getattr(option, "lf", False) or option.maxfail
    return not narrowed and config.args_source != pytest.Config.ArgsSource.ARGS


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a whole run in which distributed code was hardly run, e.g. because tests skipped themselves."""
    calls = harness.completed_calls()
    if is_whole_suite(session.config) and calls < MIN_DISTRIBUTED_CALLS and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        session.config.stash[TOO_FEW] = calls


TOO_FEW = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many distributed calls ran, and why a run without failures is red."""
    terminalreporter.line(f"distributed calls completed: {harness.completed_calls()}")
    if TOO_FEW in config.stash:
        terminalreporter.line(
            f"FAILED: only {config.stash[TOO_FEW]} distributed calls completed in a whole run of the suite; "
            f"at least {MIN_DISTRIBUTED_CALLS} must (tests/conftest.py)",
            red=True,
        )
