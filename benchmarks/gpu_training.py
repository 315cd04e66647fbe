"""Whole training steps on one card: minizero with and without its kernels, torch, torch.compile, DeepSpeed.

All train the same model from the same weights on the same batches of random tokens, in bf16 with fp32 masters and
moments, gradients clipped at 1.0, AdamW. Torch's own: the model in bf16, torch.optim's fused AdamW on fp32 masters,
one copy of the gradients to fp32 before it and one of the weights to bf16 behind it.

Every contender is a process of its own. Where they fit on the card together they take turns of a few steps, in
changing order; where they do not, one after the other has the card, several times over. The steps at the beginning of
a turn are not counted. What is cached is given back at the end of a turn, so the peak is that of one contender.

MFU counts 6 N + 12 L H S FLOP per token (N parameters without learned positions, a tied embedding once; L layers,
H hidden, S sequence; causal attention counted as if it were whole) against the dense bf16 peak of the data sheet.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import random
import socket
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import card as cards
from benchmarks.interleave import ratio

Step = Callable[[Tensor, Tensor], Tensor]
"""One training step on (tokens, the tokens that follow) [B, S]: the mean loss."""

CLIP = 1.0
ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
CONTENDERS = ("minizero", "compile", "torch", "minizero-torch", "deepspeed")
PEAK_TFLOP_S = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0}
COMPILE_BAR = 1.15
BATCHES, FIRST_UNTIMED, UNTIMED = 4, 3, 2
LOSSES = 5  # that are compared
AGREE = 0.01


@dataclass(frozen=True)
class Workload:
    """A model and its batch; `together`: all contenders fit on the card at once."""

    name: str
    model: dict[str, Any]
    vocabulary: int
    sequence: int
    batch: int
    together: bool
    turns: int
    mfu_bar: float
    contenders: tuple[str, ...] = CONTENDERS

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


GPT2: dict[str, Any] = {"family": "gpt2", "hidden_size": 768, "num_layers": 12, "num_heads": 12}
LLAMA: dict[str, Any] = {
    "family": "llama",
    "hidden_size": 2048,
    "num_layers": 16,
    "num_heads": 32,
    "num_kv_heads": 8,
    "intermediate_size": 8192,
    "rope_theta": 500000.0,
}
FULL = [
    Workload("gpt2-124m", GPT2, 50304, 1024, 32, together=True, turns=5, mfu_bar=0.50),
    Workload("llama-1.2b", LLAMA, 128256, 4096, 2, together=False, turns=2, mfu_bar=0.55),
]
SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 4}
SMALL_LLAMA = SMALL | {"num_kv_heads": 2, "intermediate_size": 64}
TINY = [  # between them, every contender
    Workload("gpt2-124m", GPT2 | SMALL, 96, 16, 2, True, 2, 0.50, ("minizero", "compile", "deepspeed")),
    Workload("llama-1.2b", LLAMA | SMALL_LLAMA, 96, 16, 2, False, 1, 0.55, ("torch", "minizero-torch")),
]

# ---- the contenders, each in a process of its own ----


def build_torch(model: Any, workload: Workload, compiled: str = "") -> Step:
    masters = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    model.to(torch.bfloat16)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, **ADAMW, fused=True)
    forward = torch.compile(model, dynamic=False, backend=compiled) if compiled else model
    for master in masters:
        master.grad = torch.zeros_like(master)
    gradients = [master.grad for master in masters]

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        loss = mean_of(forward(tokens, labels=labels))
        loss.backward()
        torch._foreach_copy_(gradients, [p.grad for p in parameters])
        torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)
        for parameter in parameters:
            parameter.grad = None
        return loss.detach()

    return step


def build_minizero(model: Any, workload: Workload, kernels: str) -> Step:
    import minizero

    settings = {name: value for name, value in ADAMW.items() if name != "betas"}
    config = {
        "precision": "bf16",
        "kernels": kernels,
        "train": {"micro_batch_size": workload.batch, "gradient_clipping": CLIP},
        "optimizer": {"type": "AdamW", **settings, "params": {"betas": list(ADAMW["betas"])}},
        "log": {"every": 1000000},
    }
    engine, *_ = minizero.initialize(model=model, config=config)

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        loss = engine(tokens, labels=labels)
        engine.backward(loss)
        engine.step()
        return mean_of(loss).detach()

    return step


def build_deepspeed(model: Any, workload: Workload) -> Step:
    import deepspeed

    on_card = cards.device().type == "cuda"
    deepspeed.init_distributed("nccl" if on_card else "gloo", auto_mpi_discovery=False, verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": workload.batch,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},  # at stage 0 it has no fp32 masters for an optimizer of ours
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000000,
    }
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        loss = mean_of(engine(tokens, labels=labels))
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def mean_of(loss: tuple[Tensor, Tensor]) -> Tensor:
    """Our models return a sum and a count."""
    return loss[0] / loss[1]


def build(name: str, model: Any, workload: Workload, on_card: bool) -> Step:
    if name.startswith("minizero"):
        return build_minizero(model, workload, "torch" if name.endswith("torch") else "auto")
    if name == "deepspeed":
        return build_deepspeed(model, workload)
    compiled = "inductor" if on_card else "eager"
    return build_torch(model, workload, compiled if name == "compile" else "")


class Trainer:
    """A contender at work: builds its model, and trains it for so many steps at a time."""

    def __init__(self, workload: Workload, name: str) -> None:
        from minizero.config.schema import ModelConfig
        from minizero.models import build as build_model

        device = cards.device()
        self.cuda = device.type == "cuda"
        torch.manual_seed(0)
        with device:
            model = build_model(ModelConfig(**workload.model), workload.vocabulary, workload.sequence)
        positions = [p.numel() for key, p in model.named_parameters() if "wpe" in key]
        self.parameters = sum(p.numel() for p in model.parameters()) - sum(positions)
        generator = torch.Generator().manual_seed(0)
        shape = BATCHES, workload.batch, workload.sequence + 1
        self.tokens = torch.randint(workload.vocabulary, shape, generator=generator).to(device)
        self.step = build(name, model, workload, self.cuda)
        self.steps = 0

    def one(self) -> Tensor:
        tokens = self.tokens[self.steps % BATCHES]
        self.steps += 1
        return self.step(tokens[:, :-1], tokens[:, 1:])

    def turn(self, count: int) -> dict[str, Any]:
        """A few steps that are not counted, then `count` that are."""
        losses = [self.one() for _ in range(UNTIMED if self.steps else FIRST_UNTIMED)]
        marks = [self.mark()]
        for _ in range(count):
            losses.append(self.one())
            marks.append(self.mark())
        peak = 0
        if self.cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        times = [self.between(one, other) for one, other in zip(marks, marks[1:], strict=False)]
        found = [float(loss) for loss in losses]
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
        return {"milliseconds": times, "losses": found, "peak_bytes": peak, "parameters": self.parameters}

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, one: Any, other: Any) -> float:
        return one.elapsed_time(other) if self.cuda else 1e3 * (other - one)


def serve(workload: Workload, name: str, port: int, log: str, pipe: Any) -> None:
    """The process of a contender: imports at once, builds when it first has the card."""
    with open(log, "w") as file:
        for descriptor in (1, 2):  # peers print as they like
            os.dup2(file.fileno(), descriptor)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    trainer: Trainer | None = None
    try:
        import minizero  # noqa: F401  (takes seconds: behind another contender's turn)

        while (count := pipe.recv()) is not None:
            trainer = trainer or Trainer(workload, name)
            pipe.send(trainer.turn(count))
    except EOFError:
        pass  # nobody is there any more
    except Exception as error:
        traceback.print_exc()
        pipe.send({"failed": cards.reason(error)})


@dataclass
class Contender:
    """The other end of `serve`, and what it has answered."""

    workload: Workload
    name: str
    folder: str
    process: Any = None
    pipe: Any = None
    milliseconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    parameters: int = 0
    failed: str = ""

    def start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        context = mp.get_context("spawn" if cards.device().type == "cuda" else "fork")
        self.pipe, theirs = context.Pipe()
        log = str(Path(self.folder) / f"{self.workload.name}-{self.name}.log")
        self.process = context.Process(target=serve, args=(self.workload, self.name, port, log, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, steps: int, seconds: float) -> None:
        """A turn; a contender that fails, dies or takes longer than `seconds` is out."""
        try:
            self.pipe.send(steps)
            answer = self.pipe.recv() if self.pipe.poll(max(1.0, seconds)) else {"failed": f"{seconds:.0f} s went by"}
        except (EOFError, OSError):
            self.process.join(timeout=10)
            answer = {"failed": f"its process ended with {self.process.exitcode}"}
        if "failed" in answer:
            self.failed = answer["failed"]
            self.stop()
            return
        self.milliseconds += answer["milliseconds"]
        self.losses = self.losses or answer["losses"]
        self.peak_bytes, self.parameters = max(self.peak_bytes, answer["peak_bytes"]), answer["parameters"]

    def stop(self) -> None:
        if self.process is None:
            return
        try:
            self.pipe.send(None)
        except OSError:
            pass
        self.process.join(timeout=1.0 if self.failed else 5.0)
        self.process.kill()
        self.process.join()
        self.process = None


# ---- a race ----


def race(workload: Workload, steps: int, until: float) -> dict[str, Any]:
    """Turns of `steps` steps of every contender, until the clock says `until`."""
    if cards.device().type != "cuda":
        import minizero  # noqa: F401  (once, and forked: on the CPU that can be done)
    with tempfile.TemporaryDirectory() as folder:
        contenders = [Contender(workload, name, folder) for name in workload.contenders]
        try:
            for turn in range(workload.turns):
                take_turn(contenders, turn, steps, until)
        finally:
            for each in contenders:
                each.stop()
        for each in contenders:
            log = Path(folder) / f"{workload.name}-{each.name}.log"
            if each.failed and log.exists():
                print(f"--- {each.name}: {each.failed}\n" + "\n".join(log.read_text().splitlines()[-12:]), flush=True)
    return summarize(workload, contenders)


def take_turn(contenders: list[Contender], turn: int, steps: int, until: float) -> None:
    """Everybody who is still in it: in the given order at first, in another one each time after that."""
    order = [each for each in contenders if not each.failed]
    if turn:
        random.Random(turn).shuffle(order)
    for each in order:
        if each.process is None:
            each.start()
    for each in order:
        have_turn(each, turn, steps, until)


def have_turn(each: Contender, turn: int, steps: int, until: float) -> None:
    left = until - time.time()
    if left < 0:
        each.failed = each.failed or ("" if each.milliseconds else "not run, out of time")
        return
    begin = time.time()
    each.run(steps, left)
    if not each.workload.together:
        each.stop()
    found = each.failed or f"{statistics.median(each.milliseconds):.1f} ms"
    took = time.time() - begin
    print(f"  {each.workload.name} turn {turn + 1}, {each.name}: {found} (took {took:.0f} s)", flush=True)


def summarize(workload: Workload, contenders: list[Contender]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    peak = next((value for key, value in PEAK_TFLOP_S.items() if key in cards.description()["name"]), None)
    reference = first_losses(contenders)
    for each in contenders:
        if not each.milliseconds:
            rows[each.name] = {"failed": each.failed or "not run"}
            continue
        per_second = 1e3 * workload.tokens / statistics.median(each.milliseconds)
        attention = 12 * workload.model["num_layers"] * workload.model["hidden_size"] * workload.sequence
        flop = 6 * each.parameters + attention
        pairs = list(zip(each.losses[:LOSSES], reference, strict=False))
        rows[each.name] = {
            "median_ms": statistics.median(each.milliseconds),
            "min_ms": min(each.milliseconds),
            "max_ms": max(each.milliseconds),
            "tokens_per_second": per_second,
            "mfu": per_second * flop * 1e-12 / peak if peak else None,
            "peak_gib": each.peak_bytes / 2**30,
            "parameters": each.parameters,
            "flop_per_token": flop,
            "losses": each.losses,
            "apart": max(abs(one - other) / other for one, other in pairs),
            "failed_later": each.failed,
            "milliseconds": each.milliseconds,
        }
    measured = {each.name: each.milliseconds for each in contenders if each.milliseconds}
    result = {"tokens_per_step": workload.tokens, "sequence": workload.sequence, "contenders": rows}
    return result | {"times_as_fast_as": speedups(measured), "bars": bars(workload, rows, speedups(measured))}


def first_losses(contenders: list[Contender]) -> list[float]:
    """Torch's, or those of who has any."""
    ranked = sorted(contenders, key=lambda each: each.name != "torch")
    return next((each.losses[:LOSSES] for each in ranked if each.losses), [])


def speedups(measured: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """How many times as fast as each of the others minizero is, step by step."""
    ours = measured.get("minizero", [])
    found = {}
    for name, theirs in measured.items():
        if name != "minizero" and ours:
            count = min(len(ours), len(theirs))
            found[name] = ratio(theirs[:count], ours[:count])
    return found


def bars(workload: Workload, rows: dict[str, Any], faster: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Each with its text."""
    ours = rows.get("minizero", {})
    found = []
    if ours.get("mfu") is not None:
        held = ours["mfu"] >= workload.mfu_bar
        found.append({"held": held, "text": f"MFU {ours['mfu']:.1%}, bar {workload.mfu_bar:.0%}"})
    if "compile" in faster:
        held = faster["compile"]["median"] >= COMPILE_BAR
        spread = "{median:.2f} [{low:.2f}, {high:.2f}]".format(**faster["compile"])
        found.append({"held": held, "text": f"{spread} times as fast as torch.compile, bar {COMPILE_BAR}"})
    return found


def lines_of(name: str, result: dict[str, Any]) -> list[str]:
    """The table of one workload."""
    lines = [f"{name}, {result['tokens_per_step']} tokens a step of {result['sequence']} each"]
    for contender, row in result["contenders"].items():
        if "failed" in row:
            lines.append(f"  {contender:15} {row['failed']}")
            continue
        mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
        verdict = "" if row["apart"] <= AGREE else " DIFFERENT"
        lines.append(
            f"  {contender:15} {row['median_ms']:8.1f} ms [{row['min_ms']:.1f}, {row['max_ms']:.1f}]"
            f"  {row['tokens_per_second']:9.0f} tokens/s{mfu}  peak {row['peak_gib']:.1f} GiB"
            f"  first losses apart {row['apart']:.1e}{verdict}"
        )
    for peer, found in result["times_as_fast_as"].items():
        lines.append("  {:.2f} [{:.2f}, {:.2f}] times as fast as ".format(*found.values()) + peer)
    return lines + [f"  {bar['text']}: {'held' if bar['held'] else 'MISSED'}" for bar in result["bars"]]
