"""What a running forward knows about its batch.

Layers deep inside a model need facts that only its entry has seen: which samples these are, how long their sequence is,
which of its positions this rank holds. One object per forward keeps them, so that no module has to hand them down, and
so that a block which is computed again in backward, perhaps after other forwards have begun, sees those of its own.

Shape suffixes: B batch, S positions of the whole sequence, L those that this rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from minizero.utils.autograd import MadeBy, next_node
from minizero.utils.undo import Removable


@dataclass
class Forward:
    """Filled in by the model's entry, read by its layers.

    Attributes:
        seed: of the run. step: optimizer steps before this one.
        inputs: what the samples are told apart by: all tensors given to the model, before anything was cut.
        sample_keys_B: int32, a hash of each sample, made by who first needs it.
        positions_L: int64, where this rank's part lies in the whole sequence; None: it is all of it, in order.
        total: S, where positions_L is given.
        documents_BS: int, equal for positions that may see each other; None: all may.
        length: positions that sequence parallelism cuts.
        recompute: how checkpointed blocks keep what they keep (`parallel.recompute.Options`).
        streams: where dropout that is not ours draws from (`parallel.random.RandomStreams`).
    """

    seed: int = 0
    step: int = 0
    inputs: tuple[Tensor, ...] = ()
    sample_keys_B: Tensor | None = None
    positions_L: Tensor | None = None
    total: int = 0
    documents_BS: Tensor | None = None
    length: int = 0
    recompute: Any = None
    streams: Any = None


# One stack for the process. Not a context variable: on a GPU autograd runs backward, and so what is computed again, in
# a thread of its own, which sees none of those that were set in the thread that called it.
_STACK: list[Forward | History | None] = []


discarded: list[int] = []
"""Storages whose values were left out, while a block is computed again for its graph (`parallel.last_product`)."""


def is_discarded(tensor: Tensor) -> bool:
    """Whether the values of `tensor` are not wanted: what would be computed from them may be left out too."""
    return bool(discarded) and tensor.untyped_storage()._cdata in discarded


def running() -> Forward | None:
    """The forward that this code runs in, or whose backward does, if it is one of an engine's model."""
    top = _STACK[-1] if _STACK else None
    return top.of_running_node() if isinstance(top, History) else top


def in_backward() -> bool:
    """Whether this code runs inside a backward pass: computed again by a checkpoint."""
    return torch._C._current_autograd_node() is not None


class History:
    """The forwards since the last step, by the autograd nodes that they made.

    A block that others compute again (torch's checkpoint) runs inside backward, in no forward of its own. The node that
    asked for it says whose it is.
    """

    def __init__(self) -> None:
        self.made_by: MadeBy[Forward] = MadeBy()

    def of_running_node(self) -> Forward | None:
        node: Any = torch._C._current_autograd_node()
        return None if node is None else self.made_by.of(node)


@contextmanager
def forward_of(forward: Forward | History | None) -> Iterator[None]:
    """Inside, `forward` is the running one, or one of its forwards is, whose backward runs."""
    _STACK.append(forward)
    try:
        yield
    finally:
        _STACK.pop()


def samples(inputs: Any) -> tuple[Tensor, ...]:
    """The tensors in nested arguments that have as many rows as the first of them."""
    found = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    return tuple(tensor for tensor in found if len(tensor) == len(found[0]))


class ForwardEntry:
    """Makes the `Forward` of every call of `model`, with the attributes that all of them share.

    `step` is kept up to date by who counts them. `history` holds those that computed a graph, until the next step.
    """

    def __init__(self, model: nn.Module, **shared: Any) -> None:
        self.step, self.shared = 0, shared
        self.history = History()
        self._begins: list[int] = []  # of the running forwards: the numbers of their first nodes
        self.stale_before = 0  # nodes with smaller numbers were made before the last step
        self.hooks: list[Removable] = [  # what `remove` takes off again
            model.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),  # the last: other hooks are part of the forward
        ]

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        forward = Forward(step=self.step, inputs=samples((args, kwargs)), **self.shared)
        _STACK.append(forward)
        self._begins.append(next_node())
        if not module.training:
            forward.streams = None
        if forward.streams is not None:
            forward.streams.begin(self.step)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        forward, begin = _STACK.pop(), self._begins.pop()
        assert isinstance(forward, Forward)
        if torch.is_grad_enabled():
            self.history.made_by.add(begin, next_node(), forward)
        if forward.streams is not None:
            forward.streams.end()

    def stepped(self, step: int) -> None:
        """Parameters have changed: what was computed before is of no use any more."""
        self.step = step
        self.history.made_by.clear()
        self.stale_before = next_node()
