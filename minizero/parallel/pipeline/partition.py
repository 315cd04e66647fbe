"""Where a sequence of layers is cut into stages: contiguous parts, as even as they can be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

from torch import nn

from minizero.dist.sharding import split_sizes

METHODS = "uniform, parameters, flops, measured, type:REGEX"


def uniform(count: int, parts: int) -> list[range]:
    """`count` layers in `parts` parts whose lengths differ by one at most, the longer ones first."""
    stops = list(accumulate(split_sizes(count, parts)))
    return [range(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def balanced(weights: Sequence[float], parts: int) -> list[range]:
    """Parts, none of them empty, of which the heaviest is as light as can be; of those, the one that fills up early.

    Dynamic programming over (parts, layers): the heaviest part of the best way to cut the first n layers into k.
    """
    count, sums = len(weights), [0.0, *accumulate(weights)]
    best = [[0.0] + [float("inf")] * count]
    cuts: list[list[int]] = [[0] * (count + 1)]
    for part in range(1, parts + 1):
        row, cut = [float("inf")] * (count + 1), [0] * (count + 1)
        for stop in range(part, count + 1):
            for start in range(part - 1, stop):
                heaviest = max(best[-1][start], sums[stop] - sums[start])
                if heaviest <= row[stop]:
                    row[stop], cut[stop] = heaviest, start
        best.append(row)
        cuts.append(cut)
    stops, stop = [], count
    for part in range(parts, 0, -1):
        stops.append(stop)
        stop = cuts[part][stop]
    stops.reverse()
    return [range(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def parameters_of(module: nn.Module) -> float:
    """How many parameters, each once."""
    return float(sum(p.numel() for p in module.parameters()))


def flops_of(module: nn.Module) -> float:
    """Multiply-adds per token in matrix products with weights, forward; lookups cost none.

    Attention's products of activations are left out: blocks that are alike have as many.
    """
    found = 0
    for part in module.modules():
        if not isinstance(part, nn.Embedding):
            found += sum(p.numel() for p in part.parameters(recurse=False) if p.dim() > 1)
    return float(found)


def matching(names: Sequence[str], pattern: str) -> list[float]:
    """1 for each class name in which the regular expression is found, whatever the case, else 0.

    Raises ValueError where none is.
    """
    found = [float(re.search(pattern, name, re.IGNORECASE) is not None) for name in names]
    if not any(found):
        raise ValueError(f"partition method type:{pattern} matches no layer; there are {', '.join(sorted(set(names)))}")
    return found
