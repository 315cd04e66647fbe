"""The harness itself: order of results, and each kind of failure named by rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import TESTS_DIR, DistributedError, run_distributed, wait_for_all


def rank_and_sum(offset: int) -> tuple[int, int, dict[str, str]]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return dist.get_rank(), int(total), {name: os.environ[name] for name in names}


def process_and_random_number() -> tuple[int, float, int]:
    return os.getpid(), torch.rand(()).item(), torch.get_num_threads()


def raise_on(rank: int) -> None:
    print(f"hello from {dist.get_rank()}")
    if dist.get_rank() == rank:
        raise RuntimeError("deliberate")
    dist.barrier()


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(120)


def wait_for_a_sleeper(rank: int) -> None:
    sleep_on(rank)
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def exit_with(code: int) -> None:
    sys.exit(code)


def leave_a_mess() -> None:
    os.environ["MESS"] = "left"
    torch.set_default_dtype(torch.float64)


def is_clean() -> bool:
    return "MESS" not in os.environ and torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_results_come_in_rank_order_from_a_group_of_that_size(world_size: int) -> None:
    results = run_distributed(rank_and_sum, world_size, 10)
    total = sum(range(world_size)) + 10 * world_size
    for rank, result in enumerate(results):
        expected = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        assert result == (rank, total, {name: str(value) for name, value in expected.items()})
    assert len(results) == world_size


def test_nobody_begins_before_all_have_connected() -> None:
    store = dist.HashStore()
    first = threading.Thread(target=wait_for_all, args=(store, 2), daemon=True)
    first.start()
    first.join(0.3)
    assert first.is_alive()
    wait_for_all(store, 2)
    first.join(10)
    assert not first.is_alive()


def test_workers_are_reused_with_the_same_seed_and_one_thread() -> None:
    first = run_distributed(process_and_random_number, 2)
    second = run_distributed(process_and_random_number, 2)
    assert first == second
    assert len({pid for pid, _, _ in first} | {os.getpid()}) == 3
    assert {threads for _, _, threads in first} == {1}


def test_a_call_leaves_no_mess_for_the_next() -> None:
    run_distributed(leave_a_mess, 2)
    assert run_distributed(is_clean, 2) == [True, True]


def test_a_raising_rank_is_named_first_with_traceback_and_output() -> None:
    with pytest.raises(DistributedError, match="rank\\(s\\) 1") as caught:
        run_distributed(raise_on, 2, 1)
    failures = caught.value.failures
    assert next(iter(failures)) == 1
    assert "RuntimeError: deliberate" in failures[1] and "in raise_on" in failures[1]
    assert "hello from 1" in failures[1] and "hello from 0" not in failures[1]


def test_a_hanging_rank_is_named_in_time_and_the_pool_goes_on() -> None:
    start = time.monotonic()
    with pytest.raises(DistributedError, match="no answer after") as caught:
        run_distributed(sleep_on, 2, 1, timeout=2.0)
    assert time.monotonic() - start < 6
    assert set(caught.value.failures) == {1}
    assert "in sleep_on" in caught.value.failures[1]
    assert [rank for rank, _, _ in run_distributed(rank_and_sum, 2, 0)] == [0, 1]


def test_ranks_that_wait_for_a_hanging_one_show_their_stacks() -> None:
    with pytest.raises(DistributedError) as caught:
        run_distributed(wait_for_a_sleeper, 4, 2, timeout=2.0)
    assert set(caught.value.failures) == {0, 1, 2, 3}
    assert "in sleep_on" in caught.value.failures[2]
    assert all("in barrier" in caught.value.failures[rank] for rank in (0, 1, 3))


def test_a_killed_rank_is_named_and_replaced() -> None:
    with pytest.raises(DistributedError) as caught:
        run_distributed(die_on, 4, 3)
    assert next(iter(caught.value.failures)) == 3 and "killed by SIGKILL" in caught.value.failures[3]
    assert len(run_distributed(rank_and_sum, 4, 0)) == 4


def test_exiting_is_a_failure() -> None:
    with pytest.raises(DistributedError, match="SystemExit"):
        run_distributed(exit_with, 1, 0)


@pytest.mark.parametrize("world_size", [0, 9])
def test_illegal_world_size(world_size: int) -> None:
    with pytest.raises(ValueError, match="legal: 1 to 8"):
        run_distributed(is_clean, world_size)


def run_a_suite(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on a suite that has the project's conftest but no distributed test."""
    for name in ("conftest.py", "harness.py", "interpreter.py"):
        (folder / name).write_text((TESTS_DIR / name).read_text())
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = soak: long\n")
    (folder / "test_nothing.py").write_text(
        textwrap.dedent("""
        def test_nothing():
            pass
        """)
    )
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_a_whole_suite_without_distributed_calls_fails(tmp_path: Path) -> None:
    whole = run_a_suite(tmp_path)
    assert whole.returncode == 1 and "only 0 distributed calls" in whole.stdout, whole.stdout
    part = run_a_suite(tmp_path, "test_nothing.py")
    assert part.returncode == 0, part.stdout
