"""What takes a change back: anything with `remove`, as torch's hook handles have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Removable(Protocol):
    """A change that can be taken back."""

    def remove(self) -> None: ...


@dataclass(frozen=True)
class Undo:
    """Takes a change back by calling `act`."""

    act: Callable[[], object]

    def remove(self) -> None:
        self.act()
