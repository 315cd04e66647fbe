"""Every public kernel, forward and backward apart, beside its peers and beside what the card can do at best.

    python -m benchmarks.kernels [--only rms_norm,swiglu] [--rounds 30] [--dry] [--no-write]

First the card's own ceilings are measured: GB/s of a copy of 2 GiB (read and write counted) and TFLOP/s of a bf16
product of 8192 x 8192. Then, on the same inputs: the Triton kernel, its torch code, torch.compile of that (of the
plain formula, where the torch code is no formula), Liger where it has the op, torch's fused AdamW with the casts
around it, and torch's attention with the flash and the cuDNN backend.

A contender is first compared with the torch code in fp32; one that is wrong is reported and not timed, one that
cannot run (memory, compiler, not installed) is a line with the reason. The others take turns, in an order that
changes from round to round, each time with fresh inputs and a cold cache. Reported are medians, the 10th and 90th
percentile, the rate by the least bytes or operations (`kernel_cases.py`), its share of the ceiling, and the medians of
the rounds' ratios with their 95 % interval. What an op does beyond its kernel (a second kernel, an
allocation, a look at a value) is timed with it where the card has to wait for it.

Results are written after every case, to benchmarks/results/kernels_<card>.json. Without a card: see `card.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import card as cards
from benchmarks.interleave import ratio, write_result

TOLERANCE = 0.03
"""How far from fp32 a contender may be in bf16, as a share: more than any order of rounding, less than a mistake."""


def main() -> None:
    options = arguments()
    dry = cards.start(options.dry)
    from benchmarks import kernel_cases  # kernels are defined on import, for a card or for the interpreter

    card = cards.Card(cards.device())
    wanted = options.only.split(",") if options.only else list(kernel_cases.OPS)
    if unknown := set(wanted) - set(kernel_cases.OPS):
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: legal are {', '.join(kernel_cases.OPS)}")
    book = Book(f"kernels_{cards.name()}", write=not (dry or options.no_write))
    if options.resume:
        book.read()
    else:
        book.result |= {"card": cards.description(), "ceilings": card.ceilings(), "rounds": options.rounds, "rows": []}
    ceilings = book.result["ceilings"]
    print(f"copy {ceilings['copy_gb_s']:.0f} GB/s, bf16 product {ceilings['matmul_tflop_s']:.0f} TFLOP/s", flush=True)
    done = {(row["op"], tuple(row["shape"])) for row in book.result["rows"]}
    for case in kernel_cases.cases(tiny=dry):
        if case.op not in wanted or (case.op, case.shape) in done:
            continue
        if options.until and time.time() > options.until:
            print(f"{case.label}: not run, out of time")
            continue
        book.add(run_case(case, card, 1 if dry else options.rounds, ceilings, dry))
        if card.lost():
            start_again(book)
    finish(book, kernel_cases.missing(), dry)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated kernels")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, to check this script; writes nothing")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--until", type=float, default=0.0, help="seconds since 1970 after which no case is begun")
    parser.add_argument("--resume", action="store_true", help="go on with the results that are there")
    return parser.parse_args()


@dataclass
class Book:
    """The results, on disk after every case."""

    name: str
    write: bool
    result: dict[str, Any] = field(default_factory=dict)

    def read(self) -> None:
        found = json.loads((Path(__file__).parent / "results" / f"{self.name}.json").read_text())
        self.result = {key: value for key, value in found.items() if key != "environment"}

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.result["rows"] += rows
        for row in rows:
            print(line_of(row), flush=True)
        if self.write:
            write_result(self.name, self.result)


def start_again(book: Book) -> None:
    """An illegal access costs a process its card, not the cases that are left."""
    print("the card is lost to this process", flush=True)
    if book.write:
        again = [argument for argument in sys.argv[1:] if argument != "--resume"]
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.kernels", *again, "--resume"])
    raise SystemExit(1)


def finish(book: Book, missing: list[str], dry: bool) -> None:
    rows = book.result["rows"]
    print("\nbars" + (" (of a dry run: they mean nothing)" if dry else ""))
    for row in rows:
        for bar in row["bars"]:
            print(f"  {row['op']} {shown(row['shape'])} {row['direction']}: {bar['text']}")
    if missing:
        print(f"public kernels without a case: {', '.join(missing)}")
    broken = [row for row in rows if "median_ms" not in row["contenders"].get("triton", {})]
    for row in broken:
        print(f"{row['op']} {shown(row['shape'])} {row['direction']}: the kernel was not timed")
    if book.write:
        print("written to", Path(write_result(book.name, book.result)).name)
    if dry:
        print(f"dry run: {len(rows)} rows of {len({row['op'] for row in rows})} kernels, {len(broken)} broken")
        raise SystemExit(1 if broken or missing else 0)


# ---- one case ----


@dataclass
class Field:
    """The contenders of a case that compute what they should, the gradients they are given, and why others do not."""

    usable: dict[str, Callable[..., Any]] = field(default_factory=dict)
    gradients: dict[str, list[Tensor]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def run_case(case: Any, card: cards.Card, rounds: int, ceilings: dict[str, float], dry: bool) -> list[dict[str, Any]]:
    """A row for each of its measures."""
    from benchmarks import kernel_cases

    torch._dynamo.reset()  # it gives up on code that it has compiled for too many shapes
    op = kernel_cases.OPS[case.op]
    entered, inputs = Field(failures=dict(case.skip)), None
    try:
        inputs = op.make(kernel_cases.Source(torch.bfloat16, card.device), *case.shape)
        check(op, inputs, contenders(op, card, dry), entered, card)
    except Exception as error:
        entered.failures["triton"] = cards.reason(error)
        entered.usable.clear()
    rows = []
    for measure in case.measures:
        card.free()
        times = take_turns(measure, inputs, entered, card, rounds)
        rows.append(row_of(case, measure, times, entered, ceilings))
    del inputs
    card.free()
    return rows


def contenders(op: Any, card: cards.Card, dry: bool) -> dict[str, Callable[..., Any]]:
    from benchmarks.kernel_cases import plainly

    plain = op.plain or (lambda *inputs: op.call(*inputs, backend="torch"))
    compiled = torch.compile(plain, dynamic=False, backend="eager" if dry and not card.cuda else "inductor")
    return {
        "triton": plainly(lambda *inputs: op.call(*inputs, backend="triton")),
        "torch": plainly(lambda *inputs: op.call(*inputs, backend="torch")),
        "compile": plainly(compiled),
        **op.peers,
    }


def check(op: Any, inputs: Any, entries: dict[str, Any], entered: Field, card: cards.Card) -> None:
    """Sort the contenders into those that compute what torch does in fp32, and those that do not, or not at all."""
    from benchmarks.kernel_cases import detached, differentiated, error_of, flat, gradients_of

    gradients: list[Tensor] = []
    expected: list[Tensor] | None = None
    for name, prepare in entries.items():
        if name in entered.failures:
            continue
        try:
            copies = detached(inputs)
            outputs = flat(prepare(*copies)())
            if expected is None:  # it takes somebody's outputs to know what gradients they are given
                gradients = gradients_of(outputs, inputs) if differentiated(inputs) else []
                expected = expectation(op, inputs, gradients)
            given = [g.to(x.dtype) for g, x in zip(gradients, outputs, strict=bool(gradients))]
            found = outputs + (list(torch.autograd.grad(outputs, differentiated(copies), given)) if given else [])
            found = [x.detach() for x in found]
            error = error_of(op.compared(found), expected)
        except NoReference:
            raise
        except Exception as problem:
            entered.failures[name] = cards.reason(problem)
        else:
            entered.errors[name] = error
            if error > TOLERANCE + op.step:
                entered.failures[name] = f"wrong: off by {error:.2g} of the largest value"
            else:
                entered.usable[name], entered.gradients[name] = prepare, given
        copies = outputs = given = found = None
        card.free(failed=name in entered.failures)


class NoReference(RuntimeError):
    """There is nothing to compare contenders with."""


def expectation(op: Any, inputs: Any, gradients: list[Tensor]) -> list[Tensor]:
    """What the torch code gives in fp32."""
    from benchmarks.kernel_cases import detached, results

    try:
        wide, wide_gradients = detached(inputs, torch.float32), detached(gradients, torch.float32)
        if op.expected is not None:
            return op.expected(op, wide, wide_gradients)
        return op.compared(results(lambda: op.call(*wide, backend="torch"), wide, wide_gradients))
    except Exception as error:
        raise NoReference(f"no torch code in fp32 to compare with: {cards.reason(error)}") from error


def take_turns(measure: Any, inputs: Any, entered: Field, card: cards.Card, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round, of every contender that gets through."""
    times: dict[str, list[float]] = {name: [] for name in entered.usable}
    failed: dict[str, str] = {}
    for index in range(-2 if card.cuda else 0, rounds):  # the first two warm up
        order = [name for name in times if name not in failed]
        random.Random(index).shuffle(order)
        for name in order:
            try:
                elapsed = once(measure, entered.usable[name], inputs, entered.gradients[name], card)
            except Exception as problem:
                failed[name] = f"{measure.direction}: {cards.reason(problem)}"
            else:
                times[name] += [elapsed] if index >= 0 else []
            if name in failed:
                card.free(failed=True)
    entered.failures |= failed
    return {name: values for name, values in times.items() if name not in failed}


def once(measure: Any, prepare: Callable[..., Any], inputs: Any, gradients: list[Tensor], card: cards.Card) -> float:
    """Milliseconds of one repetition, on copies of the inputs."""
    from benchmarks.kernel_cases import detached, differentiated, flat

    def fresh() -> tuple[Callable[[], Any], list[Tensor]]:
        copies = detached(inputs)
        return prepare(*copies), differentiated(copies)

    def run_forward(given: tuple[Callable[[], Any], list[Tensor]]) -> Any:
        with torch.set_grad_enabled(measure.grad):
            return given[0]()

    def ready() -> tuple[list[Tensor], list[Tensor]]:
        call, leaves = fresh()
        return flat(call()), leaves

    def run_backward(given: tuple[list[Tensor], list[Tensor]]) -> Any:
        return torch.autograd.grad(*given, gradients)

    if measure.direction == "forward":
        return card.milliseconds(fresh, run_forward)
    if measure.direction == "backward":
        return card.milliseconds(ready, run_backward)
    return card.milliseconds(fresh, lambda given: run_backward((flat(given[0]()), given[1])))


# ---- what comes of it ----


def row_of(
    case: Any, measure: Any, times: dict[str, list[float]], entered: Field, ceilings: dict[str, float]
) -> dict[str, Any]:
    scale, ceiling = (1e-9, ceilings["matmul_tflop_s"]) if measure.flop else (1e-6, ceilings["copy_gb_s"])
    entries: dict[str, Any] = {name: {"failed": why} for name, why in entered.failures.items() if name not in times}
    for name, values in times.items():
        ordered, median = sorted(values), statistics.median(values)
        rate = scale * measure.amount / median
        entries[name] = {
            "median_ms": median,
            "low_ms": ordered[len(ordered) // 10],
            "high_ms": ordered[-1 - len(ordered) // 10],
            "rate": rate,
            "share": rate / ceiling,
            "error": entered.errors[name],
            "milliseconds": [round(value, 5) for value in values],
        }
    peers: dict[str, dict[str, float]] = {}
    if "triton" in times:
        peers = {name: ratio(values, times["triton"]) for name, values in times.items() if name != "triton"}
    row = {
        "op": case.op,
        "shape": list(case.shape),
        "direction": measure.direction,
        "unit": "TFLOP/s" if measure.flop else "GB/s",
        "contenders": entries,
        "times_as_fast_as": peers,
    }
    return row | {"bars": bars_of(measure, entries.get("triton", {}), peers)}


def bars_of(measure: Any, ours: dict[str, Any], peers: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    if "median_ms" not in ours:
        return [{"held": False, "text": f"MISSED: {ours.get('failed', 'not run')}"}]
    ceiling = "the product's rate" if measure.flop else "the copy's rate"
    bars = []
    for limit, found, text in (
        (measure.share, ours["share"], f"{ours['share']:.1%} of {ceiling}, bar {measure.share or 0:.0%}"),
        (measure.rate, ours["rate"], f"{ours['rate']:.0f} TFLOP/s, bar {measure.rate}"),
        (measure.limit and -measure.limit, -ours["median_ms"], f"{ours['median_ms']:.1f} ms, bar {measure.limit}"),
    ):
        if limit is not None:
            bars.append(verdict(found >= limit, text))
    if "liger" in peers:
        found = peers["liger"]
        text = f"{interval(found)} times as fast as Liger, bar {measure.liger}"
        bars.append(verdict(found["median"] >= measure.liger, text, found["high"] >= measure.liger))
    return bars


def verdict(held: bool, text: str, reached: bool = False) -> dict[str, Any]:
    end = "held" if held else "MISSED, the interval reaches it" if reached else "MISSED"
    return {"held": held, "text": f"{text}: {end}"}


def interval(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def shown(shape: Any) -> str:
    return "x".join(map(str, shape))


def line_of(row: dict[str, Any]) -> str:
    """One line of the table, and one for every contender that was not timed."""
    head = f"{row['op']:21} {shown(row['shape']):>17} {row['direction']:17}"
    ours = row["contenders"].get("triton", {})
    text = "not timed"
    if "median_ms" in ours:
        spread = f"{1e3 * ours['median_ms']:9.1f} us [{1e3 * ours['low_ms']:.1f}, {1e3 * ours['high_ms']:.1f}]"
        text = f"{spread:34} {ours['rate']:6.0f} {row['unit']:7} {ours['share']:6.1%}"
    times = "  ".join(f"{name} {interval(found)}" for name, found in row["times_as_fast_as"].items())
    lines = [f"{head} {text}" + (f"  times as fast as: {times}" if times else "")]
    for name, entry in row["contenders"].items():
        if "failed" in entry:
            lines.append(f"    {name}: {entry['failed']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
