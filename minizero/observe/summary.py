"""What a person sees when a run ends: how good, how fast, how much memory, how many bytes, and what to try next."""

from __future__ import annotations

import gzip
import lzma
from dataclasses import dataclass, field

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from minizero.observe.progress import format_duration


@dataclass
class RunSummary:
    """The figures of a finished run. Bits per byte are over the held-out files; bytes are one rank's."""

    bits_per_byte: float
    baselines: dict[str, float]
    """Bits per byte of other compressors on the same files, by name."""
    held_out_bytes: int
    parameters: int
    steps: int
    seconds: float
    tokens: int
    """Tokens trained on in `seconds`, over all ranks."""
    layout: str
    """Processes and ZeRO stage, in words."""
    timed_steps: int | None = None
    """Steps that `seconds` are the time of; None means all. A resumed run has done others before."""
    skipped_steps: int = 0
    """Steps that changed nothing, since fp16 gradients overflowed."""
    memory_bytes: dict[str, int] = field(default_factory=dict)
    comm_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of one step: {axis: {operation: payload bytes}}."""
    sample: tuple[str, str] = ("", "")
    """A prompt and the model's completion."""
    files: dict[str, str] = field(default_factory=dict)
    """What was written where: description -> path."""
    next_steps: list[tuple[str, str]] = field(default_factory=list)
    """What to try: (what it does, the command)."""


def compressed_bits_per_byte(data: bytes) -> dict[str, float]:
    """What `gzip -9` and `xz -9` need for `data`, in bits per byte: the figures a language model must beat."""
    if not data:
        raise ValueError("there are no held-out bytes to compress; hold out more with --data.validation_fraction")
    sizes = {"xz -9": len(lzma.compress(data, preset=9)), "gzip -9": len(gzip.compress(data, compresslevel=9))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def print_summary(summary: RunSummary, console: Console | None = None) -> None:
    """Print the end-of-run report."""
    console = console or Console()
    console.print()
    console.print(Padding(_quality(summary), (0, 0, 1, 0)))
    console.print(Padding(_costs(summary), (0, 0, 1, 0)))
    prompt, completion = summary.sample
    if prompt or completion:
        console.print(Text("A sample from the model", style="bold"))
        console.print(Padding(Text.assemble((prompt, "bold cyan"), completion.rstrip()), (0, 0, 1, 2)))
    console.print(Text("Written", style="bold"))
    for name, path in summary.files.items():
        _print_line(console, f"  {name:<12}{path}")
    console.print(Text("\nTry next", style="bold"))
    for purpose, command in summary.next_steps:
        _print_line(console, f"  {purpose}:")
        _print_line(console, f"    {command}", style="cyan")


def _quality(summary: RunSummary) -> Table:
    """The model among the compressors, best first."""
    table = Table(title=f"Held-out text, {_amount(summary.held_out_bytes)}", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    table.add_column("size beside the model's", justify="right")
    ranking = {"this model": summary.bits_per_byte, **summary.baselines}
    for name, bits in sorted(ranking.items(), key=lambda entry: entry[1]):
        style = "bold green" if name == "this model" else None
        table.add_row(name, f"{bits:.3f}", f"{bits / summary.bits_per_byte:.0%}", style=style)
    return table


def _costs(summary: RunSummary) -> Table:
    """What the run took, and what one rank held and sent."""
    table = Table(title="What it took", title_justify="left", title_style="bold", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("layout", summary.layout)
    table.add_row("parameters", f"{summary.parameters:,}")
    timed = summary.steps if summary.timed_steps is None else summary.timed_steps
    before = f" (after {summary.steps - timed:,} before)" if timed < summary.steps else ""
    table.add_row("training time", f"{format_duration(summary.seconds)} for {timed:,} steps{before}")
    if summary.skipped_steps:
        skipped = f"{summary.skipped_steps:,} of {summary.steps:,} (fp16 overflow)"
        table.add_row("skipped steps", skipped, style="bold red")
    table.add_row("tokens per second", f"{summary.tokens / max(summary.seconds, 1e-9):,.0f}", end_section=True)
    for kind, size in summary.memory_bytes.items():
        table.add_row(f"{kind.replace('_', ' ')}, per rank", _amount(size))
    if summary.memory_bytes:
        table.rows[-1].end_section = True
    for axis, operations in summary.comm_bytes.items():
        for operation, size in operations.items():
            if operation == "gather_rows":  # scalars that ranks agree on
                continue
            table.add_row(f"{operation.replace('_', '-')} over {axis}, per step", _amount(size))
    return table


def _print_line(console: Console, text: str, style: str = "") -> None:
    """Print without wrapping: paths and commands are there to be copied."""
    console.print(Text(text, style=style), soft_wrap=True)


def _amount(size: int) -> str:
    """`512 B`, `1.5 MB`: decimal units, as networks and disks are sold."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
