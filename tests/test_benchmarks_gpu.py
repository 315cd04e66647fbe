"""The benchmarks that need a card: their own logic, run without one, and what they must not let pass."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import card as cards
from benchmarks import gpu_training, kernel_cases, kernel_parity
from benchmarks import kernels as kernel_benchmark
from minizero import kernels

ROOT = Path(__file__).parent.parent
PUBLIC = sorted(set(kernels.__all__) - {"Backend"})
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 240
"""For a dry run, which takes 10 to 20 alone on two cores."""

no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="with a card these measure it")


def dry(module: str, *arguments: str) -> str:
    """What a script prints that is started as a user does, without the variables of this test run."""
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before, "a dry run writes nothing"
    return done.stdout


@pytest.mark.soak
def test_dry_run_of_kernels_names_them_all() -> None:
    lines = dry("benchmarks.kernels", "--dry").splitlines()
    for name in PUBLIC:
        table = [line for line in lines if line.startswith(f"{name} ")]
        assert table, name
        assert all(" us [" in line and "times as fast as: " in line for line in table), table
    assert any(line.strip().startswith("sdpa-cudnn: ") for line in lines), "what cannot run is a line with the reason"
    assert lines[-1] == f"dry run: {lines[-1].split()[2]} rows of {len(PUBLIC)} kernels, 0 broken"


@pytest.mark.soak
@no_card
def test_dry_run_of_everything_without_a_card() -> None:
    lines = dry("benchmarks.gpu").splitlines()
    assert lines[0].startswith("no NVIDIA GPU on this machine"), lines[0]
    for name in PUBLIC:
        assert any(line.startswith(f"{name} ") and "2 of 2 held" in line for line in lines), name
    summary = "\n".join(lines[lines.index("== summary") :])
    for name in (*gpu_training.CONTENDERS, "gpt2-124m", "llama-1.2b", "kernels: done"):
        assert name in summary, name
    assert lines[-1] == "dry run: 4 parts, 0 broken"


ACCIDENTS = """
import os, time
from dataclasses import replace
from benchmarks import card, gpu_training as gt

def build(name, *given):
    if name == "compile":
        raise ValueError("no compiler")
    if name == "deepspeed":
        os._exit(3)
    return whole(name, *given)

whole, gt.build = gt.build, build
card.start(dry=True)
result = gt.race(gt.TINY[0], 1, time.time() + 200)["contenders"]
late = gt.race(replace(gt.TINY[0], contenders=("minizero",)), 1, 0.0)["contenders"]
assert result["compile"]["failed"] == "ValueError: no compiler", result
assert result["deepspeed"]["failed"] == "its process ended with 3", result
assert len(result["minizero"]["milliseconds"]) == 2, result
assert late["minizero"]["failed"] == "not run, out of time", late
"""


@no_card
def test_contenders_that_fail_or_die_stop_nobody() -> None:
    done = subprocess.run([sys.executable, "-c", ACCIDENTS], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_public_kernel_has_cases() -> None:
    assert kernel_cases.missing() == []
    assert sorted(kernel_parity.SHAPES) == sorted(kernel_cases.OPS) == PUBLIC
    assert {case.op for case in kernel_cases.cases(tiny=False)} == set(PUBLIC)


def test_wrong_kernel_is_reported_and_not_timed() -> None:
    good = kernel_cases.OPS["swiglu"]
    entries = {
        "right": kernel_cases.plainly(lambda gate, up: good.call(gate, up, backend="torch")),
        "wrong": kernel_cases.plainly(lambda gate, up: good.call(gate, up, backend="torch") * 1.05),
        "nan": kernel_cases.plainly(lambda gate, up: good.call(gate, up, backend="torch") * float("nan")),
        "broken": kernel_cases.plainly(lambda gate, up: gate @ up),
    }
    inputs = good.make(kernel_cases.Source(torch.bfloat16, torch.device("cpu")), 8, 64)
    found = kernel_benchmark.Field()
    kernel_benchmark.check(good, inputs, entries, found, cards.Card(torch.device("cpu")))
    assert set(found.usable) == {"right"}
    assert found.failures["wrong"].startswith("wrong: off by 0.05")
    assert found.failures["nan"].startswith("wrong: off by inf")
    assert found.failures["broken"].startswith("RuntimeError: ")


@pytest.mark.parametrize("name", ["swiglu", "rope", "quantize_blockwise", "adamw_step"])
def test_parity_sees_a_small_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(*inputs: Any, backend: str, **options: Any) -> Any:
        found = good.call(*inputs, backend="torch", **options)
        grown = [x * 1.03 if x.is_floating_point() else x for x in kernel_cases.flat(found)]
        return grown if backend == "triton" else found

    good = kernel_cases.OPS[name]
    monkeypatch.setitem(kernel_cases.OPS, name, replace(good, call=spoilt))
    rows = kernel_parity.compare(name, dry=True, device=torch.device("cpu"))
    assert rows and not any(row["held"] for row in rows), rows
    assert f"{name:21} 0 of {len(rows)} held" in kernel_parity.summary(name, rows)


def test_parity_sees_bits_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def trembling(*inputs: Any, backend: str) -> Any:
        calls.append(backend)
        return good.call(*inputs, backend="torch") * (1 + 1e-7 * calls.count("triton"))

    good = kernel_cases.OPS["swiglu"]
    monkeypatch.setitem(kernel_cases.OPS, "swiglu", replace(good, call=trembling))
    row = kernel_parity.compare("swiglu", dry=True, device=torch.device("cpu"))[0]
    assert not row["held"] and row["failed"] == "two runs gave different bits"


def test_rates_and_bars() -> None:
    """1 GB in 0.5 ms where a copy does 2200 GB/s; Liger takes twice as long."""
    measure = kernel_cases.Measure("forward", 1e9, share=0.9, liger=2.0)
    case = kernel_cases.Case("rms_norm", (8, 64), [measure])
    times = {"triton": [0.5] * 5, "liger": [1.0] * 5}
    entered = kernel_benchmark.Field(errors=dict.fromkeys(times, 0.0), failures={"compile": "out of memory"})
    ceilings = {"copy_gb_s": 2200.0, "matmul_tflop_s": 700.0}
    row = kernel_benchmark.row_of(case, measure, times, entered, ceilings)
    assert row["contenders"]["triton"]["rate"] == pytest.approx(2000.0)
    assert [bar["held"] for bar in row["bars"]] == [True, True]
    ceilings["copy_gb_s"], times["liger"] = 2300.0, [0.9] * 5
    missed = kernel_benchmark.row_of(case, measure, times, entered, ceilings)
    assert [bar["held"] for bar in missed["bars"]] == [False, False]
    assert "compile: out of memory" in kernel_benchmark.line_of(missed)
    product = replace(measure, amount=1e12, flop=True, share=None, rate=500.0, limit=82.0)
    texts = [
        bar["text"] for bar in kernel_benchmark.row_of(case, product, {"triton": [4.0]}, entered, ceilings)["bars"]
    ]
    assert texts == ["250 TFLOP/s, bar 500.0: MISSED", "4.0 ms, bar 82.0: held"]


def test_minimum_bytes_of_the_issue() -> None:
    """Bytes per element of forward and backward; 4 per logit for loss and gradient; 28 per parameter."""

    def amounts(op: str, *shape: int) -> list[float]:
        return [measure.amount for measure in kernel_cases.measures(op, shape)]

    assert amounts("rms_norm", 10, 10) == [400.0, 600.0]
    assert amounts("swiglu", 10, 10) == [600.0, 1000.0]
    assert amounts("cross_entropy", 10, 10)[0] == 400.0
    assert amounts("adamw_step", 100) == [2800.0]
    assert amounts("flash_attention", 2, 32, 8, 8192, 128)[0] == pytest.approx(1.0995e12, rel=1e-4)
    assert amounts("linear_cross_entropy", 16384, 4096, 128256)[0] == pytest.approx(6 * 16384 * 4096 * 128256)


def test_mfu_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 of 124 M parameters: 6 N + 12 L H S = 0.8606 GFLOP per token."""
    monkeypatch.setattr(cards, "description", lambda: {"name": "NVIDIA H200"})
    workload = gpu_training.FULL[0]
    ours, theirs = (gpu_training.Contender(workload, name, "") for name in ("minizero", "compile"))
    for each, milliseconds in ((ours, 50.0), (theirs, 60.0)):
        each.milliseconds, each.losses, each.parameters = [milliseconds] * 3, [11.0, 10.9], 123_653_376
    out = gpu_training.Contender(workload, "deepspeed", "", failed="deepspeed is not installed")
    result = gpu_training.summarize(workload, [ours, theirs, out])
    row = result["contenders"]["minizero"]
    assert row["flop_per_token"] == 6 * 123_653_376 + 12 * 12 * 768 * 1024
    assert row["mfu"] == pytest.approx(32768 / 0.050 * row["flop_per_token"] / 989e12)
    assert result["times_as_fast_as"]["compile"]["median"] == pytest.approx(1.2)
    assert [bar["held"] for bar in result["bars"]] == [row["mfu"] >= 0.5, True]
    assert any("deepspeed is not installed" in line for line in gpu_training.lines_of(workload.name, result))
