"""Timelines as pictures: a grid of text, SVG, PNG, and a trace for Perfetto or chrome://tracing.

Each takes one timeline or several under one scale of time, such as a planned one above the measured one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from minizero.parallel.pipeline.actions import Kind
from minizero.parallel.pipeline.simulate import Event, Timeline

COLORS = {Kind.F: "#5b8ec9", Kind.B: "#e8a33d", Kind.W: "#7db87a", Kind.BW: "#d9744f"}
NAMES = {
    Kind.F: "F forward",
    Kind.B: "B gradient of the input",
    Kind.W: "W gradient of the weights",
    Kind.BW: "BW full backward",
}
ROW, GAP, LEFT, WIDTH = 22, 46, 64, 1100
"""SVG pixels: height of a rank, space above a timeline, space for the names of ranks, width of the bars."""


def grid(timeline: Timeline, unit: float | None = None) -> str:
    """One line per rank, one column per `unit` of time (the shortest action unless given).

    A column with `.` is idle, one with `-` goes on with the action before it. Times are rounded to whole columns and
    nothing is left out, so with uneven costs the grid shows the order and only about the time.
    """
    ran = [event for row in timeline.events for event in row]
    unit = unit or min((e.stop - e.start for e in ran if e.stop > e.start), default=1.0)
    first = min((event.start for event in ran), default=0.0)
    rows = []
    for row in timeline.events:
        cells: list[str] = []
        for event in row:
            cells += ["."] * (round((event.start - first) / unit) - len(cells))
            cells += [str(event.action)] + ["-"] * (round((event.stop - event.start) / unit) - 1)
        rows.append(cells)
    width = max((len(cell) for cells in rows for cell in cells), default=1) + 1
    names = [f"rank {index}" for index in range(len(rows))]
    margin = max(map(len, names))
    return "\n".join(
        f"{name:<{margin}} | " + "".join(f"{cell:<{width}}" for cell in cells).rstrip()
        for name, cells in zip(names, rows, strict=True)
    )


def caption(timeline: Timeline) -> str:
    """Its name and what can be read off it."""
    peaks = sorted(set(timeline.peak_in_flight))
    kept = f"{peaks[0]}-{peaks[-1]}" if len(peaks) > 1 else f"{peaks[0]}"
    return f"{timeline.name}: bubble {timeline.bubble:.1%}, makespan {timeline.makespan:.6g}, in flight {kept}"


def svg(*timelines: Timeline) -> str:
    """A Gantt chart; hovering over a bar tells its action and times."""
    scale = WIDTH / (max(timeline.makespan for timeline in timelines) or 1.0)
    height = sum(GAP + ROW * len(timeline.events) for timeline in timelines) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 16}" height="{height}" '
        f'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    top = 0
    for timeline in timelines:
        top += GAP
        parts.append(f'<text x="8" y="{top - 10}" font-size="14">{escape(caption(timeline))}</text>')
        first = _first(timeline)
        for rank, row in enumerate(timeline.events):
            parts.append(f'<text x="8" y="{top + ROW - 7}">rank {rank}</text>')
            parts.append(f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{ROW - 2}" fill="#f0f0f0"/>')
            parts += [_bar(event, LEFT + (event.start - first) * scale, top, scale) for event in row]
            top += ROW
    for index, kind in enumerate(_kinds(timelines)):
        x = LEFT + 210 * index
        parts.append(f'<rect x="{x}" y="{top + 16}" width="14" height="14" fill="{COLORS[kind]}"/>')
        parts.append(f'<text x="{x + 20}" y="{top + 27}">{NAMES[kind]}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _bar(event: Event, x: float, y: int, scale: float) -> str:
    width = (event.stop - event.start) * scale
    text = str(event.action)
    label = (
        f'<text x="{x + width / 2:.2f}" y="{y + ROW - 8}" text-anchor="middle" font-size="10">{text}</text>'
        if width > 6.5 * len(text)
        else ""
    )
    return (
        f'<g><title>{text}: {event.start:.6g} to {event.stop:.6g}</title><rect x="{x:.2f}" y="{y}" width="{width:.2f}" '
        f'height="{ROW - 2}" fill="{COLORS[event.action.kind]}" fill-opacity="{_opacity(event)}" '
        f'stroke="white" stroke-width="0.5"/>{label}</g>'
    )


def png(path: str | Path, *timelines: Timeline) -> None:
    """The same Gantt chart through matplotlib; the suffix of `path` may name any format that it writes."""
    from matplotlib.figure import Figure  # costs every rank a second that the one who draws needs
    from matplotlib.patches import Patch

    rows = sum(len(timeline.events) for timeline in timelines)
    figure = Figure(figsize=(12, 1.2 + 0.28 * rows + 0.7 * len(timelines)), layout="constrained")
    heights = [len(timeline.events) for timeline in timelines]
    panels = figure.subplots(len(timelines), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, timeline in zip(panels, timelines, strict=True):
        first = _first(timeline)
        for rank, row in enumerate(timeline.events):
            axes.barh(
                [rank] * len(row),
                [event.stop - event.start for event in row],
                left=[event.start - first for event in row],
                color=[(COLORS[event.action.kind], _opacity(event)) for event in row],
                edgecolor="white",
                linewidth=0.4,
                height=0.9,
            )
        axes.set_title(caption(timeline), loc="left", fontsize=10)
        axes.set_yticks(range(len(timeline.events)), [f"rank {rank}" for rank in range(len(timeline.events))])
        axes.invert_yaxis()
    panels[-1].set_xlim(0, max((timeline.makespan for timeline in timelines), default=1.0))
    panels[-1].set_xlabel("time")
    handles = [Patch(color=COLORS[kind], label=NAMES[kind]) for kind in _kinds(timelines)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def trace(*timelines: Timeline, microseconds: float = 1000.0) -> str:
    """JSON for Perfetto or chrome://tracing: a process per timeline, a thread per rank.

    `microseconds` says how many a unit of time has; milliseconds are supposed.
    """
    events: list[dict[str, Any]] = []
    for process, timeline in enumerate(timelines):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": timeline.name}})
        first = _first(timeline)
        for rank, row in enumerate(timeline.events):
            name = {"ph": "M", "name": "thread_name", "pid": process, "tid": rank, "args": {"name": f"rank {rank}"}}
            events.append(name)
            for event in row:
                action = event.action
                events.append(
                    {
                        "ph": "X",
                        "name": str(action),
                        "cat": action.kind.value,
                        "pid": process,
                        "tid": rank,
                        "ts": (event.start - first) * microseconds,
                        "dur": (event.stop - event.start) * microseconds,
                        "args": {"chunk": action.chunk, "microbatch": action.microbatch},
                    }
                )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def save(path: str | Path, *timelines: Timeline) -> None:
    """Write the picture that the suffix names: .svg, .png, .json (trace) or .txt (grid)."""
    path = Path(path)
    if path.suffix == ".svg":
        path.write_text(svg(*timelines))
    elif path.suffix == ".png":
        png(path, *timelines)
    elif path.suffix == ".json":
        path.write_text(trace(*timelines))
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(f"{caption(timeline)}\n{grid(timeline)}" for timeline in timelines) + "\n")
    else:
        raise ValueError(f"{path}: legal are .svg, .png, .json (trace) and .txt (grid)")


def _first(timeline: Timeline) -> float:
    return min((event.start for row in timeline.events for event in row), default=0.0)


def _kinds(timelines: Sequence[Timeline]) -> list[Kind]:
    used = {event.action.kind for timeline in timelines for row in timeline.events for event in row}
    return [kind for kind in Kind if kind in used]


def _opacity(event: Event) -> float:
    """Chunks after the first are lighter."""
    return max(1.0 - 0.4 * event.action.chunk, 0.3)
