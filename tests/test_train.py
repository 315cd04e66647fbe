"""The main job through the real launcher, on a tiny corpus: end to end, resumed, interrupted, misused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from harness import run_distributed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minizero import report, train
from minizero.checkpoint.inspect import diff, listing
from minizero.observe.pulse import StopRequests
from minizero.verify_resume import is_killed_at, metric_differences, random_differences, verify_resume

ROOT = Path(__file__).parents[1]
TINY = """
[model]
hidden_size = 24
num_layers = 2
num_heads = 3
[data]
vocab_size = 300
validation_fraction = 0.3
[train]
steps = 6
sequence_length = 15
global_batch_size = 4
micro_batch_size = 1
[scheduler]
type = "WarmupLR"
params = { warmup_num_steps = 3, warmup_type = "linear" }
[zero]
stage = 3
[checkpoint]
every = 2
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a small corpus and a config."""
    return furnish(tmp_path_factory.mktemp("train"))


def furnish(folder: Path) -> Path:
    (folder / "corpus").mkdir()
    for number in range(12):
        lines = [f"import module_{number * line % 7}\nvalue_{line} = {number} + {line}\n" for line in range(20)]
        (folder / "corpus" / f"file{number}.py").write_text("".join(lines))
    (folder / "tiny.toml").write_text(TINY)
    return folder


def command(place: Path, world: int, *more: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    shared = ["--data.source", str(place / "corpus"), "--data.dir", str(place / "data")]
    return [*launcher, "-m", "minizero.train", str(place / "tiny.toml"), *shared, *more]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(place: Path, world: int, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(place, world, *more), capture_output=True, text=True, timeout=120, cwd=place, env=ENVIRONMENT
    )


def call_main(folder: str, arguments: list[str]) -> tuple[int, str, str]:
    """The job on ranks that live already: (exit code, stdout, stderr) of this one."""
    os.chdir(folder)
    train.HEAD_START, report.SAMPLE_TOKENS = 0.0, 8
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train.main(arguments)
    return code, out.getvalue(), err.getvalue()


def without_launcher(place: Path, world: int, *more: str) -> list[tuple[int, str, str]]:
    """`launch` for what does not depend on torchrun: spares the seconds that importing torch takes."""
    return run_distributed(call_main, world, str(place), command(place, world, *more)[8:])


LAYOUTS = sorted(path.stem for path in (ROOT / "launch" / "configs").glob("*.toml"))
SHRUNK = (
    "--model.hidden_size 32 --model.num_layers 4 --data.vocab_size 300 --data.validation_fraction 0.3 --train.steps 2 "
    "--train.sequence_length 15 --train.eval_every 0 --checkpoint.every 0"
).split()


def run_layout(place: Path, layout: str, world: int, folder: str) -> list[float]:
    """Losses of a config of `launch/configs`, on a small model and corpus."""
    shared = ["--data.source", str(place / "corpus"), "--data.dir", str(place / "data"), "--run.dir", folder]
    arguments = [str(ROOT / "launch" / "configs" / f"{layout}.toml"), *shared, *SHRUNK]
    for code, _, errors in run_distributed(call_main, world, str(place), arguments):
        assert code == 0, errors
    return losses(place / folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layouts_config_gives_the_quickstarts_losses(place, layout):
    if not (place / "reference").exists():
        run_layout(place, "quickstart", 1, "reference")
    world = {"three_axes": 8, "pipeline_tensor": 4}.get(layout, 2)
    found = run_layout(place, layout, world, layout)
    has_timeline = (place / layout / "pipeline.json").is_file() and (place / layout / "pipeline.svg").is_file()
    assert has_timeline == layout.startswith("pipeline")
    assert len(LAYOUTS) == 13 and found == pytest.approx(losses(place / "reference"), rel=1e-5)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_end_to_end_then_again_then_elsewhere(place):
    done = launch(place, 2, "--run.dir", "whole")
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "gzip -9" in done.stdout and "xz -9" in done.stdout
    folder = place / "whole"
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "comm_bytes", "memory_bytes"}
    assert wanted <= record.keys() and record["step"] == 6 and record["tokens"] == 4 * 15
    saved = json.loads((folder / "config.json").read_text())
    assert "command line" in json.dumps(saved) and "tiny.toml" in json.dumps(saved)
    (code, text, _), (_, other, _) = without_launcher(place, 2, "--run.dir", "whole")
    assert code == 0 and "is finished (6 steps)" in text and not other

    ((code, _, errors),) = without_launcher(place, 1, "--run.dir", "one", "--zero.stage", "0")
    assert code == 0, errors
    assert losses(place / "one") == pytest.approx(losses(folder), rel=1e-5)


def test_a_limit_of_time_and_a_changed_config(place):
    limited = ("--run.dir", "limited", "--train.steps", "100000", "--train.time_limit", "1")
    done = [0]
    for _ in range(2):
        assert without_launcher(place, 2, *limited)[0][0] == 0
        lines = (place / "limited" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == list(range(1, len(steps) + 1)) and done[-1] < len(steps) < 100_000  # none lost, none twice
        assert listing(place / "limited")[0]["step"] == steps[-1]
        done.append(len(steps))
    for code, _, errors in without_launcher(place, 2, *limited, "--optimizer.lr", "0.01"):
        assert code != 0
        assert "optimizer.lr was 0.001, is 0.01" in errors and "--run.dir OTHER" in errors


def test_a_verbose_run_in_json_then_other_data(place):
    """The `minizero` verb; TensorBoard and times of the phases; and a corpus that changes under a run."""
    corpus = place / "changing"
    shutil.copytree(place / "corpus", corpus)
    config = (place / "tiny.toml").read_text() + "\n[log]\nwall_clock_breakdown = true\nevery = 3\n"
    (place / "verbose.toml").write_text(f'precision = "fp32"\n{config}[log.tensorboard]\nenabled = true\n')
    more = ["--data.source", str(corpus), "--data.dir", str(place / "data"), "--run.dir", "verbose"]
    command = [sys.executable, "-m", "minizero", "train", str(place / "verbose.toml"), "--nproc", "1", "--json", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=place, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["exit_code"] == 0 and summary["steps"] == 6 and summary["bits_per_byte"] > 0
    assert "--precision" not in summary["command"]  # the file says fp32, also where bf16 would be faster
    assert len(re.findall(r"step=[36] .* forward_ms=\S+ backward_ms=\S+ step_ms=", done.stderr)) == 2
    (event_file,) = (place / "verbose" / "tensorboard" / "minizero").iterdir()
    events = EventAccumulator(str(event_file)).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 7))
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses(place / "verbose"), rel=1e-6)

    (corpus / "file0.py").write_text("import this\n" * 60)
    (place / "verbose" / "summary.json").unlink()
    ((code, _, errors),) = without_launcher(place, 1, *more)
    assert code != 0 and "was trained on other data" in errors


def test_bad_input_is_said_once_by_the_launched_job(place):
    failed = launch(place, 2, "--run.dir", "bad", "--train.global_batch_size", "5")
    assert failed.returncode != 0
    (ours,) = [line for line in failed.stderr.splitlines() if line.startswith("minizero: ")]
    assert "train.global_batch_size 5 = train.micro_batch_size 1" in ours
    assert not (place / "bad").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    (
        (("--zero.stagge", "2"), "zero.stagge"),
        (("--zero.stage", "4"), "stage 4"),
        (("--data.source", "/nowhere/at/all"), "/nowhere/at/all"),
        (("--optimizer.type", "LBFGS"), "LBFGS' is not element-wise"),
        (("--precision", "fp8"), "'fp32', 'bf16', 'fp16'"),
        (("--train.sequence_length", "100000"), "less than one sequence of 100000"),
    ),
)
def test_bad_input_is_one_clear_message(place, more, message):
    if "--data.source" in more:  # the rank that reads it says it; torchrun then ends the others, which wait for it
        results = without_launcher(place, 1, "--run.dir", "bad", *more)
    else:
        results = without_launcher(place, 2, "--run.dir", "bad", *more)
    for code, _, errors in results:
        assert code == 1 and errors.count("minizero: ") == 1 and message in errors
    assert not (place / "bad").exists()


def test_a_killed_run_continues_as_the_same_run(place, tmp_path):
    """By the verb that users have, and that it sees a run which is not the same."""
    data = ["--data.source", str(place / "corpus"), "--data.dir", str(place / "data")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        assert verify_resume(str(place / "tiny.toml"), 2, 6, tmp_path, data) == []
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    lines = (resumed / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[-1]) | {"loss": 0.0}
    (resumed / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(record)]))
    (found,) = metric_differences(straight, resumed)
    assert found.startswith("step 12, loss: ") and found.endswith(" | 0.0")
    ends = [straight / "checkpoints" / f"global_step{step}" for step in (6, 12)]
    assert random_differences(*ends) == [] and diff(*ends) != []


@pytest.mark.parametrize(("named", "is_in_time"), (("global_step2", True), ("global_step4", False)))
def test_a_kill_that_comes_too_late_is_none(tmp_path, named, is_in_time):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text(named)
    process = subprocess.Popen(["sleep", "60"], text=True)
    assert is_killed_at("global_step2", tmp_path, process) == is_in_time and process.poll() == -signal.SIGKILL


def report_on_a_full_disk(folder: str, arguments: list[str]) -> tuple[int, str]:
    """`main` on ranks of which the first one, which writes the report, finds no room for it."""

    def write(*_: Any) -> None:
        time.sleep(0.5)
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", write)
        code, _, errors = call_main(folder, arguments)
    return code, errors


def test_all_ranks_stay_for_the_report(place):
    shared = ["--data.source", str(place / "corpus"), "--data.dir", str(place / "data"), "--train.steps", "1"]
    arguments = [str(place / "tiny.toml"), *shared, "--run.dir", "full"]
    for code, errors in run_distributed(report_on_a_full_disk, 2, str(place), arguments):
        assert code == 1 and "rank 0: [Errno 28] No space left on device" in errors


def call_with_a_late_signal(folder: str, arguments: list[str]) -> int:
    """`main` on a rank that is told to stop when its last step is done already: the second one alone."""
    asked, plain = StopRequests(), train.finish_save

    def late(*given):
        plain(*given)
        asked.received = signal.SIGTERM if os.environ["RANK"] == "1" else 0

    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "finish_save", late)
        return train.main(arguments, asked)


def wait_for_data_in_vain(folder: str, arguments: list[str]) -> tuple[int, float]:
    """`main` on the second rank of a node whose first one has failed: torchrun has told it to stop."""
    os.chdir(folder)
    asked, began = StopRequests(), time.monotonic()
    asked.received = signal.SIGTERM
    return (train.main(arguments, asked) if os.environ["RANK"] == "1" else 0), time.monotonic() - began


def test_who_waits_for_data_can_be_told_to_stop(place):
    """torchrun would kill it 30 s later, and so would every restart."""
    shared = ["--data.source", str(place / "corpus"), "--data.dir", str(place / "nobody's")]
    _, (code, seconds) = run_distributed(wait_for_data_in_vain, 2, str(place), [str(place / "tiny.toml"), *shared])
    assert code == 130 and seconds < 10


def test_a_signal_after_the_last_step_changes_nothing(place):
    shared = ["--data.source", str(place / "corpus"), "--data.dir", str(place / "data"), "--train.steps", "1"]
    arguments = [str(place / "tiny.toml"), *shared, "--run.dir", "late"]
    assert run_distributed(call_with_a_late_signal, 2, str(place), arguments) == [0, 0]
    assert (place / "late" / "summary.json").is_file() and not (place / "late" / "interrupted.json").exists()


def test_leaving_waits_for_a_save_and_for_nothing_else(tmp_path):
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            threading.Thread(target=lambda: (time.sleep(0.5), (tmp_path / "saved").touch())).start()
            threading.Thread(target=time.sleep, args=(60.0,), daemon=True).start()
            train.leave(7)
        os._exit(1)
    began = time.monotonic()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7 and (tmp_path / "saved").exists() and time.monotonic() - began < 20
