"""The fault matrix: what may happen to a run, what must come of it, how often that was tried, and how it went.

    PYTHONPATH=. python tests/matrix.py [--rows 1,4] [--soak] [--count N] [--seed N] [--no-write]
    PYTHONPATH=. python tests/matrix.py --merge FILE FILE ...

Most rows are random trials in forked ranks (`fault_trials.py`); what needs real launchers, networks or a copy of the
source is a test elsewhere, which is run by its name. A trial is drawn from (seed, row, number), so that `--rows 4
--first 17 --count 1` is the trial that failed as number 17, and a campaign may be run in parts, with a seed each, that
`--merge` adds up. Writes `benchmarks/results/faults.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fault_trials as trials
from fault_trials import AT_ONCE, FROZEN_AFTER, MUTANTS, Trial
from faults import Nursery
from test_mutants import MUTANTS as OUR_MUTANTS

from benchmarks.interleave import write_result

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """One kind of fault.

    Attributes:
        trial: makes one random trial, or `at_once` of them. count, soak_count, share: trials of the command, of its
            `--soak`, of the normal suite. limit: seconds in which the fault must be heard of.
        tests, soak_tests: pytest's names of tests of this row; the second only with `--soak`.
    """

    number: int
    fault: str
    expected: str
    trial: Trial | None = None
    count: int = 0
    soak_count: int = 0
    share: int = 0
    limit: float | None = None
    at_once: int = 1
    tests: tuple[str, ...] = ()
    soak_tests: tuple[str, ...] = ()


LAUNCH = "tests/test_launch.py::"
MUTANT_TESTS = tuple(f"tests/test_mutants.py::test_a_mutant_is_killed[{name}]" for name in OUR_MUTANTS)
MATRIX = (
    Row(1, "SIGKILL: a rank or all, any step and place", "peers raise; resumed bitwise, lost steps ≤ the interval",
        trials.killed, 300, 5000, 9, trials.HEARD_WITHIN),
    Row(2, "SIGKILL of all ranks at once in a save", "the checkpoint before is whole; resumed bitwise",
        trials.killed_in_a_save, 60, 1000, 3),
    Row(3, "SIGSTOP, endless loop, interpreter's lock held", "all live ranks end by T + 2 s, with stacks",
        trials.frozen, 6, 60, 2, FROZEN_AFTER + 2 + 1,
        tests=(LAUNCH + "test_a_frozen_rank_is_replaced_within_ten_seconds_of_the_timeout",)),
    Row(4, "SIGTERM, SIGUSR1: in start, step, evaluation, data, save", "one step saved by all; resumed bitwise",
        trials.told_to_stop, 20, 200, 3, 5.0,
        tests=(LAUNCH + "test_local_stops_with_75_and_goes_on",)),
    Row(5, "ten restarts in a row", "ten of ten come up",
        tests=(LAUNCH + "test_ten_restarts_in_a_row_come_up[2]",),
        soak_tests=(LAUNCH + "test_ten_restarts_in_a_row_come_up[4]",)),
    Row(6, "disk full at a random byte, on some ranks", "all told bytes needed and there; nothing lost or left over",
        trials.full_disk, 20, 200, 3),
    Row(7, "a flipped bit in any file of a checkpoint", "refused by all, by the file's name; nothing changed",
        trials.damage("flips"), 500, 20_000, 50, at_once=AT_ONCE),
    Row(8, "files cut, empty, gone, swapped, stale, too many", "refused by all, by the file's name; nothing changed",
        trials.damage("files"), 120, 1000, 50, at_once=AT_ONCE),
    Row(9, "resumed in another layout", "state bitwise; next 5 steps within 2e-6 (bf16: 2e-2), in the same one bitwise",
        trials.resharded, 16, 200, 2),
    Row(10, "resumed up to three times, at any place", "each sample once an epoch; bitwise",
        trials.resumed, 30, 300, 2),
    Row(11, "a cable cut, one way, 6 s, slow; a node drained", "ranks end by T + 1 s, agents by T + 30 s; no step lost",
        tests=(LAUNCH + "test_a_cut_cable_ends_every_rank_and_every_agent",
               LAUNCH + "test_a_cable_that_comes_back_in_time_costs_no_step",
               LAUNCH + "test_a_slow_network_changes_nothing_but_the_time",
               LAUNCH + "test_a_drained_first_node_stops_both_and_both_go_on")),
    Row(12, "a node of 1:2 lost, or late", "goes on alone, data order exact; taken in",
        tests=(LAUNCH + "test_a_lost_node_is_done_without", LAUNCH + "test_a_node_that_comes_late_is_taken_in")),
    Row(13, "NaN or infinity on one rank; a spike of ten", "skipped by all; k in a row end it, with rank and samples",
        trials.not_finite, 20, 200, 4),
    Row(14, "one rank calls another shape, dtype, operation, order, or nothing", "all end by T; in check mode at once",
        trials.astray, 25, 250, 5, 2.0),
    Row(15, "one rank with other settings, seed, code or model", "refused before the first step, with the difference",
        trials.disagreeing, 20, 100, 4, 2.0),
    Row(16, "clocks up to an hour apart", "bitwise the same run",
        trials.skewed, 5, 20, 1),
    Row(17, "a flipped bit in one copy of a weight", "named with unit and rank by the next comparison",
        trials.corrupted, 20, 500, 4),
    Row(18, "one rank 200 ms slower", "named within 20 steps; no false alarm",
        trials.straggling, 2, 20, 1),
    Row(19, "saves in the background: errors, many, at the end", "all hear of it by the next; no deadlock",
        trials.background_saves, 30, 500, 3),
    Row(20, "our own code broken on purpose", "each mutant is killed by a test",
        tests=MUTANT_TESTS[::2], soak_tests=MUTANT_TESTS[1::2]),
    Row(21, "a fault every 30 s, for an hour", "ends bitwise as the run without",
        trials.soaked(60), 0, 1),
    Row(22, "mutated headers of tensor files", "the documented error, no growth of memory",
        trials.mutated_headers, 10_000, 100_000, 1000, at_once=MUTANTS),
    Row(23, "mutated manifests, checksum right", "the documented error or a right load, no growth of memory",
        trials.mutated_manifests, 10_000, 100_000, 500, at_once=MUTANTS),
)  # fmt: skip
BY_NUMBER = {row.number: row for row in MATRIX}


@dataclass
class Result:
    """How a row went. skipped: tests that could not run here, and why. kinds: what was drawn how often."""

    trials: int = 0
    failures: list[str] = field(default_factory=list)
    slowest: float | None = None
    seconds: float = 0.0
    skipped: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    seeds: list[int] = field(default_factory=list)

    @property
    def bound(self) -> float | None:
        """Of the share of failures, with 95 % confidence, when there was none: the rule of three."""
        return None if self.failures or not self.trials else min(3 / self.trials, 1.0)

    def add(self, other: Result) -> None:
        self.trials += other.trials
        self.failures += other.failures
        self.seconds += other.seconds
        self.skipped = sorted({*self.skipped, *other.skipped})
        self.kinds.update(other.kinds)
        self.seeds = sorted({*self.seeds, *other.seeds})
        known = [one for one in (self.slowest, other.slowest) if one is not None]
        self.slowest = max(known) if known else None


def fast_folder() -> str | None:
    """Where trials are made: in memory, where there is a file system of it, since they wait for disks most of all."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def run_trials(row: Row, nursery: Nursery, folder: Path, count: int, seed: int, first: int = 0) -> Result:
    """`count` trials of a row, numbered from `first`."""
    assert row.trial is not None
    result, began = Result(seeds=[seed]), time.monotonic()
    for number in range(first, first + -(-count // row.at_once)):
        try:
            outcome = row.trial(nursery, folder, random.Random(f"{seed} {row.number} {number}"))
        except Exception as error:  # a trial's own assertion, or what a checkpoint's reader raises
            outcome = trials.Outcome(f"{type(error).__name__}: {error}")
        problem = outcome.problem
        if not problem and row.limit is not None and (outcome.seconds or 0.0) > row.limit:
            problem = f"heard of after {outcome.seconds:.1f} s"
        if problem:
            result.failures.append(f"--seed {seed} --first {number} ({outcome.drawn}): {problem}")
            print(f"FAILED row {row.number} {result.failures[-1]}", file=sys.stderr, flush=True)
        result.trials += row.at_once
        result.kinds[outcome.drawn] += row.at_once
        if outcome.seconds is not None:
            result.slowest = max(result.slowest or 0.0, outcome.seconds)
    result.seconds = time.monotonic() - began
    return result


def run_tests(names: tuple[str, ...]) -> Result:
    """Tests by their names, in a process of their own."""
    result, began = Result(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "soak or not soak", f"--junitxml={report}", *names]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
        cases = list(xml.parse(report).iter("testcase")) if report.exists() else []
    for case in cases:
        name, skipped = case.get("name"), case.find("skipped")
        if skipped is not None:
            result.skipped.append(f"{name}: {skipped.get('message')}")
            continue
        result.trials += 1
        result.kinds[str(name)] += 1
        for bad in (*case.iter("failure"), *case.iter("error")):
            result.failures.append(f"{name}: {bad.get('message')}")
    if not cases:
        result.failures.append(f"no test ran: {done.stdout[-500:]}{done.stderr[-500:]}")
    result.seconds = time.monotonic() - began
    return result


def report(results: dict[int, Result]) -> str:
    """The table."""
    lines = [
        f"{'row':>3}  {'fault':66} {'trials':>7} {'failed':>6} {'bound':>8} {'heard in':>9} {'limit':>6} {'took':>8}"
    ]
    for number, one in sorted(results.items()):
        row = BY_NUMBER[number]
        bound = f"{100 * one.bound:.3g} %" if one.bound is not None else "-"
        slowest = f"{one.slowest:.2f} s" if one.slowest is not None else ""
        limit = f"{row.limit:g} s" if row.limit is not None else ""
        failed = len(one.failures) if one.trials else "-"
        lines.append(f"{number:>3}  {row.fault:66} {one.trials:>7} {failed:>6} {bound:>8} {slowest:>9} {limit:>6} "
                     f"{one.seconds:>6.0f} s")  # fmt: skip
        lines += [f"     skipped: {reason}" for reason in one.skipped]
        lines += [f"     FAILED: {problem[:300]}" for problem in one.failures]
    return "\n".join(lines)


def as_json(results: dict[int, Result]) -> dict[str, Any]:
    rows = []
    for number, one in sorted(results.items()):
        row = BY_NUMBER[number]
        rows.append({
            "row": number, "fault": row.fault, "expected": row.expected, "trials": one.trials,
            "failures": one.failures, "bound_95": one.bound, "slowest_seconds": one.slowest,
            "limit_seconds": row.limit, "seconds": round(one.seconds, 1), "skipped": one.skipped, "seeds": one.seeds,
            "kinds": dict(sorted(one.kinds.items())),
        })  # fmt: skip
    return {"rows": rows}


def merged(files: list[str]) -> dict[int, Result]:
    """Several reports as one."""
    results: dict[int, Result] = {}
    for file in files:
        for row in json.loads(Path(file).read_text())["rows"]:
            results.setdefault(row["row"], Result()).add(
                Result(
                    row["trials"],
                    row["failures"],
                    row["slowest_seconds"],
                    row["seconds"],
                    row["skipped"],
                    Counter(row["kinds"]),
                    row["seeds"],
                )  # fmt: skip
            )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(str(row.number) for row in MATRIX), help="all of them")
    parser.add_argument("--soak", action="store_true", help="as many trials as a night has time for, and row 21")
    parser.add_argument("--count", type=int, help="trials of each row that has any")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--merge", nargs="+", metavar="FILE", help="add up reports, and run nothing")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--out", default="faults", help="name of the report in benchmarks/results")
    options = parser.parse_args()
    results = merged(options.merge) if options.merge else {}
    rows = [] if options.merge else [BY_NUMBER[int(number)] for number in options.rows.split(",")]
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder, Nursery() as nursery:
        for row in rows:
            result = results[row.number] = Result()
            count = options.count or (row.soak_count if options.soak else row.count)
            if row.trial is not None and count:
                result.add(run_trials(row, nursery, Path(folder), count, options.seed, options.first))
            elif row.trial is not None:
                result.skipped.append("only with --soak")
            tests = row.tests + (row.soak_tests if options.soak else ())
            if tests and not options.count:
                result.add(run_tests(tests))
            print(report({row.number: result}).split("\n", 1)[1], flush=True)
    print(report(results))
    if not options.no_write:
        print("written to", write_result(options.out, as_json(results)))
    return int(any(one.failures for one in results.values()))


if __name__ == "__main__":
    sys.exit(main())
