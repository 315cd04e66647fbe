"""What a run shows and keeps: metrics on disk, progress in the terminal, TensorBoard, a figure, a summary.

`metrics.jsonl` is the source of truth: everything else here is drawn from its records and may be deleted.
"""

from minizero.observe.figures import draw_loss_curve
from minizero.observe.metrics import MetricsWriter, read_metrics
from minizero.observe.progress import Progress
from minizero.observe.summary import RunSummary, compressed_bits_per_byte, print_summary
from minizero.observe.tensorboard import TensorBoardWriter

__all__ = [
    "MetricsWriter",
    "Progress",
    "RunSummary",
    "TensorBoardWriter",
    "compressed_bits_per_byte",
    "draw_loss_curve",
    "print_summary",
    "read_metrics",
]
