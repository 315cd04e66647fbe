"""Metrics on disk, progress, TensorBoard, the figure and the summary."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import math
import os
import random
import signal
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from minizero.observe import (
    MetricsWriter,
    Progress,
    RunSummary,
    TensorBoardWriter,
    compressed_bits_per_byte,
    draw_loss_curve,
    print_summary,
    read_metrics,
)
from minizero.observe.figures import smooth
from minizero.observe.progress import format_duration
from minizero.observe.pulse import StopRequests, Stragglers


def write_steps(path: Path, steps: range, last_step: int = 0, loss: float = 1.0) -> None:
    with MetricsWriter(path, last_step) as writer:
        for step in steps:
            writer.write({"step": step, "loss": loss, "comm_bytes": {"dp": {"all_gather": 8}}})


# ---- metrics ----


def test_each_record_is_one_line_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in (1, 2):
            writer.write({"step": step, "loss": 0.5})
            lines = path.read_text().splitlines()
            assert [json.loads(line) for line in lines][-1] == {"step": step, "loss": 0.5}
            assert len(lines) == step


def test_resuming_drops_the_lines_past_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8), loss=1.0)
    write_steps(path, range(5, 10), last_step=4, loss=2.0)
    records = read_metrics(path)
    assert [record["step"] for record in records] == list(range(1, 10))
    assert [record["loss"] for record in records] == [1.0] * 4 + [2.0] * 5


def test_a_new_run_starts_the_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    write_steps(path, range(1, 3))
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_a_torn_last_line_is_dropped_and_the_file_mended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    path.write_text(path.read_text()[:-9])
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    write_steps(path, range(3, 5), last_step=2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]


def test_a_torn_line_elsewhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step":\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        read_metrics(path)


def test_what_json_cannot_say_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": math.nan, "nested": {"norm": math.inf}})
    assert read_metrics(path) == [{"step": 1, "loss": None, "nested": {"norm": None}}]


def test_no_file_is_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


# ---- progress ----


def shown(terminal: bool, interval: float) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    with Progress(20, start_step=10, console=console, interval=interval) as progress:
        for step in range(11, 21):
            progress.update(step, loss=2.5, tokens_per_second=12345.6)
    return console.file.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    text = shown(terminal=True, interval=0.0)
    last = [line for line in text.replace("\r", "\n").splitlines() if "step" in line][-1]
    assert "20/20" in last and "loss 2.5000" in last and "12,346 tokens/s" in last and "left" in last


def test_a_log_gets_a_plain_line_every_interval() -> None:
    every_step = shown(terminal=False, interval=0.0).splitlines()
    assert every_step[0].startswith("step 11/20  loss 2.5000  12,346 tokens/s")
    assert len(every_step) == 10 and "\x1b" not in "".join(every_step)
    seldom = shown(terminal=False, interval=60.0).splitlines()
    assert [line.split()[1] for line in seldom] == ["11/20", "20/20"]


def test_the_time_left_is_bounded_by_the_time_limit() -> None:
    console = Console(file=io.StringIO(), width=100)
    progress = Progress(10**9, console=console, interval=0.0, time_limit=30.0)
    progress._started -= 10.0
    progress.update(1, 1.0, 1.0)
    assert "20 s left" in console.file.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (59.6, "1:00"), (187, "3:07"), (7387, "2:03:07")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# ---- TensorBoard ----


def test_tensorboard_holds_every_number_by_name(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoardWriter(tmp_path)
    writer.write({"step": 3, "loss": 1.5, "grad_norm": None, "comm_bytes": {"dp": {"all_gather": 64}}})
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["comm_bytes/dp/all_gather", "loss"]
    assert [(event.step, event.value) for event in events.Scalars("comm_bytes/dp/all_gather")] == [(3, 64.0)]


# ---- figure ----


def test_smoothing_follows_a_line_and_averages_the_end() -> None:
    line = [float(x) for x in range(20, 0, -1)]
    assert smooth(line, 4)[:16] == pytest.approx(line[:16])
    assert smooth([0.0, 0.0, 3.0, 0.0, 3.0], 2) == pytest.approx([0.0, 1.0, 1.2, 1.5, 2.0])


def colours(path: Path) -> set[tuple[int, int, int]]:
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    return set(map(tuple, pixels.reshape(-1, 3)))


def test_the_figure_shows_training_and_held_out_loss(tmp_path: Path) -> None:
    records = [{"step": step, "loss": 5.0 / step} for step in range(1, 30)] + [{"step": 30, "loss": None}]
    blue, orange = (0x25, 0x63, 0xEB), (0xD9, 0x48, 0x0F)
    plain = colours(draw_loss_curve(records, tmp_path / "figures" / "plain.png", title="training alone"))
    assert blue in plain and orange not in plain
    records[-1]["validation_bits_per_byte"] = 1.7
    both = draw_loss_curve(records, tmp_path / "both.png", title="with held-out", baselines={"gzip -9": 1.9})
    assert blue in colours(both) and orange in colours(both)


# ---- summary ----


def test_the_compressors_are_gzip_and_xz_at_their_strongest() -> None:
    data = Path(json.__file__).read_bytes() * 3
    expected = {"gzip -9": gzip.compress(data, 9), "xz -9": lzma.compress(data, preset=9)}
    assert compressed_bits_per_byte(data) == {name: 8 * len(c) / len(data) for name, c in expected.items()}
    with pytest.raises(ValueError, match="validation_fraction"):
        compressed_bits_per_byte(b"")


def test_the_summary_ranks_the_model_and_keeps_commands_whole() -> None:
    command = "torchrun --standalone --nproc-per-node 2 -m minizero.train " + "--zero.stage 1 " * 8
    summary = RunSummary(
        bits_per_byte=1.6,
        baselines={"xz -9": 1.57, "gzip -9": 1.91},
        held_out_bytes=1_500_000,
        parameters=3_500_000,
        steps=100,
        seconds=50.0,
        tokens=1_000_000,
        layout="2 processes, ZeRO stage 3",
        memory_bytes={"optimizer_state": 14_000_000},
        comm_bytes={"dp": {"all_gather": 28_000_000}},
        sample=("import ", "os\n[bold]not markup[/bold]"),
        files={"run folder": "runs/quickstart"},
        next_steps=[("another stage", command)],
    )
    console = Console(file=io.StringIO(), width=80, color_system=None)
    print_summary(summary, console)
    text = console.file.getvalue()
    assert text.index("xz -9") < text.index("this model") < text.index("gzip -9")
    for part in ("1.600", "20,000", "14.0 MB", "28.0 MB", "import os", "[bold]not markup[/bold]", command):
        assert part in text


# ---- stragglers ----


def test_a_slow_rank_is_found_and_noise_is_not():
    noise, slow = random.Random(0), Stragglers([[0, 1, 2, 3]])
    assert not any(slow.add([0.1 * noise.uniform(1, 2) for _ in range(4)]) for _ in range(1000))
    found = [slow.add([0.1 * noise.uniform(1, 2) + 0.2 * (rank == 2) for rank in range(4)]) for _ in range(20)]
    assert [2] in found and sum(map(len, found)) == 1  # said once
    assert not any(slow.add([0.1] * 4) for _ in range(20))
    assert [1] in [slow.add([0.1, 0.3, 0.1, 0.1]) for _ in range(20)]


def test_ranks_with_other_work_are_not_compared():
    slow = Stragglers([[0, 1], [2, 3], [4]])
    assert not any(slow.add([0.1, 0.1, 0.5, 0.5, 9.0]) for _ in range(30))
    assert [3] in [slow.add([0.1, 0.1, 0.5, 0.9, 9.0]) for _ in range(20)]


def test_a_signal_is_kept_for_the_loop_and_not_for_children():
    before = signal.getsignal(signal.SIGUSR1)
    requests = StopRequests()
    try:
        requests.listen(signal.SIGUSR1)
        child = os.fork()
        if child == 0:  # as a loader's worker: it lives on
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(7 if requests.received == 0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert requests.received == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.received == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGUSR1, before)
