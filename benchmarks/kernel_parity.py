"""Whether the kernels compute on this card what they should: each against its torch code in float64.

    python -m benchmarks.kernel_parity [--only rms_norm,rope] [--dry] [--json FILE]

For every public kernel, in fp32, bf16 and fp16, over a few ragged shapes and options: outputs and gradients must be no
further from float64 than those of the torch code in the same dtype, times 1.5, plus a floor of about one rounding of
the largest value. What is run twice must give the same bits. (The tests run the same kernels in Triton's
interpreter, which knows nothing of races, of approximate instructions and of the order in which programs end.)
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import card as cards

SLACK = 1.5
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROWS: list[tuple[Any, ...]] = [(37, 1000), (1, 16), (64, 128), (5, 8193), (3, 20000)]
FLAT: list[tuple[Any, ...]] = [(70001,), (1,), (4096,)]
SHAPES: dict[str, list[tuple[Any, ...]]] = {  # the last item may be a dict of options
    **dict.fromkeys(("rms_norm", "layer_norm", "add_rms_norm"), ROWS),
    **dict.fromkeys(("layer_norm_gelu", "bias_gelu", "geglu"), [*ROWS, (37, 1000, {"approximate": "none"})]),
    "swiglu": ROWS,
    "rope": [(2, 4, 2, 33, 16), (1, 3, 1, 7, 80), (2, 8, 8, 65, 128)],
    "cross_entropy": [
        (33, 1000, {"reduction": "mean"}),
        (33, 1000, {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0, "in_place": False}),
        (9, 50257, {"reduction": "none"}),
    ],
    "linear_cross_entropy": [
        (300, 64, 1000),
        (300, 100, 1003, {"workspace": 300_000, "softcap": 30.0, "label_smoothing": 0.1}),
    ],
    "flash_attention": [
        (2, 4, 2, 100, 64),
        (1, 4, 4, 257, 128),
        (1, 2, 1, 65, 80),
        (1, 2, 2, 130, 256),
        (2, 4, 2, 100, 64, {"causal": False}),
        (2, 4, 1, 300, 128, {"window": 70}),
    ],
    **dict.fromkeys(("adamw_step", "grad_norm", "cast_and_pack", "dequantize_blockwise"), FLAT),
    "quantize_blockwise": [*FLAT, (70001, {"dtype": torch.float8_e4m3fn})],
}
TINY: dict[str, list[tuple[Any, ...]]] = {
    "rope": [(1, 3, 1, 5, 16)],
    "cross_entropy": [(5, 100, {"softcap": 30.0})],
    "linear_cross_entropy": [(5, 20, 100, {"workspace": 400})],
    "flash_attention": [(1, 2, 1, 33, 16)],
    **dict.fromkeys(("adamw_step", "grad_norm", "cast_and_pack"), [(1001,)]),
    **dict.fromkeys(("quantize_blockwise", "dequantize_blockwise"), [(1001,)]),
}
FP8_STEP = 33.0 / 448.0
"""Between the two largest numbers of float8_e4m3fn, as a share of the largest."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated kernels")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, to check this script")
    parser.add_argument("--json", default="", help="write the rows here")
    options = parser.parse_args()
    dry = cards.start(options.dry)
    from benchmarks.kernel_cases import OPS

    rows: list[dict[str, Any]] = []
    for name in options.only.split(",") if options.only else OPS:
        rows += compare(name, dry, cards.device())
        if options.json:
            Path(options.json).write_text(json.dumps(rows))
        else:
            print(summary(name, rows), flush=True)


def compare(name: str, dry: bool, device: torch.device) -> list[dict[str, Any]]:
    """A row for every shape and dtype of one kernel."""
    rows = []
    for entry in TINY.get(name, [(5, 100)]) if dry else SHAPES[name]:
        settings = entry[-1] if isinstance(entry[-1], dict) else {}
        shape = entry[:-1] if settings else entry
        for dtype in (torch.float32, torch.bfloat16) if dry else FLOOR:
            row = {"op": name, "shape": shape, "options": str(settings or ""), "dtype": str(dtype).split(".")[1]}
            try:
                rows.append(row | errors(name, shape, settings, dtype, device))
            except Exception as error:
                rows.append(row | {"held": False, "failed": cards.reason(error)})
    return rows


def errors(
    name: str, shape: tuple[int, ...], settings: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """How far from float64 the torch code and the kernel are, and how far the kernel may be."""
    from benchmarks import kernel_cases as kc

    op = kc.OPS[name]
    compared = op.compared if op.step else list  # all of it, but what quantized numbers stand for
    call = partial(op.call, **settings)
    inputs = op.make(kc.Source(dtype, device), *shape)
    gradients = []
    if kc.differentiated(inputs):
        copies = kc.detached(inputs)
        gradients = kc.gradients_of(kc.flat(call(*copies, backend="torch")), inputs)

    def run(backend: str, wide: bool = False) -> list[torch.Tensor]:
        given, along = (kc.detached(x, torch.float64 if wide else None) for x in (inputs, gradients))
        return compared(kc.results(lambda: call(*given, backend=backend), given, along))

    expected = run("torch", wide=True)
    eager = kc.error_of(run("torch"), expected)
    first, again = run("triton"), run("triton")
    ours = kc.error_of(first, expected)
    step = FP8_STEP if settings.get("dtype") == torch.float8_e4m3fn else op.step
    limit = SLACK * eager + FLOOR[dtype] + step
    same = all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    found = {"eager": eager, "triton": ours, "limit": limit, "held": ours <= limit and same}
    return found if same else found | {"failed": "two runs gave different bits"}


def summary(name: str, rows: list[dict[str, Any]]) -> str:
    """One line for a kernel, and one for each of its rows that is not held."""
    mine = [row for row in rows if row["op"] == name]
    held = sum(row["held"] for row in mine)
    worst = max((row["triton"] / row["limit"] for row in mine if "limit" in row), default=float("nan"))
    lines = [f"{name:21} {held} of {len(mine)} held, at worst {worst:.2f} of what it may be off"]
    for row in mine:
        if not row["held"]:
            text = row.get("failed") or f"off by {row['triton']:.2g}, torch by {row['eager']:.2g}"
            lines.append(f"    {row['dtype']} {'x'.join(map(str, row['shape']))} {row['options']}: {text}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
