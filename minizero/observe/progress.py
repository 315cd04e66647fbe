"""Progress of a run: a bar with step, loss, tokens/s and time left on a terminal, a plain line now and then elsewhere.

A log file or a CI page is not a terminal: a bar there becomes thousands of lines, so every few seconds one line.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Shows how far a run is. A context manager, so that an exception leaves the terminal usable.

    Args:
        total_steps: the step at which the run ends.
        start_step: steps done before (a resumed run).
        time_limit: seconds after which the run will stop, if it has such a limit; bounds the time left.
        interval: seconds between plain lines.
        console: where to show it; standard output by default.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        time_limit: float | None = None,
        interval: float = 5.0,
        console: Console | None = None,
    ) -> None:
        self.total_steps, self.start_step = total_steps, start_step
        self.time_limit, self.interval = time_limit, interval
        self.console = console or Console()
        self._started = self._last_line = time.monotonic()
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        if self.console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TextColumn("{task.fields[text]}"))
            self._bar = RichProgress(*columns, console=self.console, expand=True)
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, text="starting")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show that `step` is done; `loss` in nats per token, `tokens_per_second` over all ranks."""
        now = time.monotonic()
        left = format_duration(self._seconds_left(step, now - self._started))
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {left} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif now - self._last_line >= self.interval or step in (self.start_step + 1, self.total_steps):
            self._last_line = now
            self.console.print(f"step {step}/{self.total_steps}  {text}", highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def _seconds_left(self, step: int, elapsed: float) -> float:
        done = max(step - self.start_step, 1)
        left = elapsed / done * (self.total_steps - step)
        return left if self.time_limit is None else min(left, max(self.time_limit - elapsed, 0.0))


def format_duration(seconds: float) -> str:
    """`5 s`, `3:07` or `2:03:07`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"
