"""What a block keeps for backward: counted while it runs, and as closed forms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class SavedBytes:
    """Counts the memory behind tensors that autograd saves inside the `with` block, each storage once.

    Args:
        without: tensors whose storage does not count: parameters, or inputs that are kept anyway.

    Attributes:
        storages: bytes by storage. described: (shape, dtype) of what was saved first of each, to derive formulae from.
    """

    def __init__(self, without: Iterable[Tensor] = ()) -> None:
        self._known = {tensor.untyped_storage()._cdata for tensor in without}
        self._held: list[Tensor] = []  # a freed storage's address would be given to another
        self.storages: dict[int, int] = {}
        self.described: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known and storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage.nbytes()
            self.described.append((tuple(tensor.shape), tensor.dtype))
            self._held.append(tensor.detach())
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._hooks.__exit__(*failure)
