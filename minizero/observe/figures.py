"""The loss curve of a run, drawn from its metrics: training loss as it was and smoothed, held-out bits per byte.

The two have different units, so the held-out points get a panel of their own, with gzip and xz as the lines to beat.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, BLUE, ORANGE = "#1f2933", "#7b8794", "#2563eb", "#d9480f"


def smooth(values: list[float], reach: int) -> list[float]:
    """Mean over the `reach` values to each side.

    Near the start the window shrinks on both sides, so that the steep first descent is not flattened; near the end
    only on the right, so that the last value is still a mean.
    """
    result = []
    for index in range(len(values)):
        here = min(reach, index)
        window = values[index - here : index + here + 1]
        result.append(sum(window) / len(window))
    return result


def draw_loss_curve(
    records: list[dict[str, Any]], path: str | Path, *, title: str, baselines: dict[str, float] | None = None
) -> Path:
    """Draw a run's records to a PNG and return its path.

    Args:
        records: from `read_metrics`; steps whose loss is null are left out.
        path: the PNG to write; its folder is created.
        title: what was trained, in a line.
        baselines: bits per byte of other compressors on the held-out files, by name.
    """
    from matplotlib.figure import Figure  # costs every rank a second that the one who draws needs

    held_out = [(r["step"], r["validation_bits_per_byte"]) for r in records if "validation_bits_per_byte" in r]
    figure = Figure(figsize=(10, 4.4) if held_out else (7, 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2 if held_out else 1, squeeze=False, width_ratios=[3, 2] if held_out else None)[0]
    _draw_training(panels[0], [(r["step"], r["loss"]) for r in records if r.get("loss") is not None])
    if held_out:
        _draw_held_out(panels[1], held_out, baselines or {})
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw_training(panel: Axes, points: list[tuple[int, float]]) -> None:
    _style(panel, "Training loss", "nats per token")
    if not points:
        return
    steps, losses = (list(column) for column in zip(*points, strict=True))
    smoothed = smooth(losses, len(losses) // 50 + 1)
    panel.plot(steps, losses, color=BLUE, alpha=0.35, linewidth=0.8, label="each step")
    panel.plot(steps, smoothed, color=BLUE, linewidth=1.8, label="smoothed")
    panel.annotate(
        f"{smoothed[-1]:.2f}", (steps[-1], smoothed[-1]), (4, 0), textcoords="offset points", color=BLUE, va="center"
    )
    panel.margins(x=0.02)
    after_descent = losses[len(losses) // 20 :]  # the first steps' loss would squeeze what is worth seeing
    panel.set_ylim(top=max(after_descent) + 0.25 * (max(after_descent) - min(losses)) + 0.05)
    panel.legend(frameon=False, loc="upper right", labelcolor=INK)


def _draw_held_out(panel: Axes, points: list[tuple[int, float]], baselines: dict[str, float]) -> None:
    _style(panel, "Held-out files", "bits per byte")
    steps, values = (list(column) for column in zip(*points, strict=True))
    panel.plot(steps, values, color=ORANGE, linewidth=1.8, marker="o", markersize=5)
    panel.annotate(
        f"{values[-1]:.3f}",
        (steps[-1], values[-1]),
        (0, 9),
        textcoords="offset points",
        color=ORANGE,
        ha="center",
        fontweight="bold",
    )
    for name, value in baselines.items():
        panel.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        panel.annotate(
            f"{name}  {value:.2f}",
            (0, value),
            (4, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=MUTED,
            fontsize=9,
        )
    low, high = min([*values, *baselines.values()]), max([*values, *baselines.values()])
    panel.set_ylim(low - 0.12 * (high - low) - 0.02, high + 0.15 * (high - low) + 0.02)
    panel.margins(x=0.12)


def _style(panel: Axes, title: str, unit: str) -> None:
    panel.set_title(title, loc="left", fontsize=11, color=INK)
    panel.set_xlabel("optimizer step", color=INK)
    panel.set_ylabel(unit, color=INK)
    panel.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(MUTED)
    panel.tick_params(colors=INK, length=3)
