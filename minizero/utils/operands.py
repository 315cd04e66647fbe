"""The tensors that a torch function is given, for those who watch its calls: it runs at each, so it is short."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def operands(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among `values`, and in the lists and tuples among them (those of `torch.cat`)."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from operands(value)
