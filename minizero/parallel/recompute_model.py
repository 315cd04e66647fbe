"""Which parts of a model are checkpointed: its blocks, every k-th of them, chosen modules, or as many as memory needs.

A chosen module keeps its name, parameters and hooks; only its `forward` goes through `checkpoint_block`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from minizero.config.schema import RecomputeConfig
from minizero.models.layers import CausalAttention
from minizero.parallel.activation_memory import SavedBytes
from minizero.parallel.context import ContextAttention
from minizero.parallel.foreign import foreign_decoders, without_cache
from minizero.parallel.plan import same_parts
from minizero.parallel.recompute import Options, PassState, buffers_put_back, checkpoint_block, current_options
from minizero.utils.forward import Forward, running
from minizero.utils.undo import Removable, Undo

Agree = Callable[[list[int]], list[int]]
"""Byte counts of this rank -> the largest of all ranks that must decide alike."""


def apply_recompute(
    model: nn.Module,
    settings: RecomputeConfig,
    blocks: Mapping[int, tuple[str, nn.Module]],
    agree: Agree,
    names: Collection[str],
) -> list[Removable]:
    """Checkpoint what `settings` choose, in place; returns what undoes it.

    Args:
        blocks: (name, module) of the repeated blocks that are here, by their place in the whole model.
        agree: see `Agree`. names: of all modules of the whole model, of which other pipeline stages have some.

    Raises ValueError when there is nothing of the kind in the model.
    """
    if settings.mode == "none":
        return []
    kind = type(model).__name__
    if any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        raise ValueError(
            f"recompute.mode {settings.mode}: {kind} has transformers' gradient checkpointing turned on too; legal: "
            "one of the two"
        )
    if settings.mode == "selective":
        chosen = chosen_modules(model, settings.modules, names)
        foreign = [] if chosen else foreign_attention(model)
        if not chosen and not foreign and not settings.modules:
            raise ValueError(
                f"recompute.mode selective: {kind} has no attention that minizero knows; name modules to compute again "
                "in recompute.modules"
            )
        return [*foreign, *(checkpoint_forward(module, whole=False) for module in chosen)]
    if not blocks and not any(hasattr(part, "stands_for") for part in model.modules()):
        raise ValueError(
            f"recompute.mode {settings.mode}: {kind} has no repeated blocks; name modules and use selective"
        )
    undo: list[Removable] = [without_cache(decoder) for _, decoder in foreign_decoders(model)]
    if settings.mode == "full":
        return [
            *undo,
            *(checkpoint_forward(module) for place, (_, module) in blocks.items() if place % settings.every == 0),
        ]
    assert settings.budget is not None
    budget = ByteBudget(settings.budget, len(blocks), agree)
    deciders = [BudgetedBlock(budget, index, module) for index, (_, module) in blocks.items()]
    return [*undo, *(checkpoint_forward(decider.module, decider) for decider in deciders)]


def chosen_modules(model: nn.Module, patterns: Sequence[str], names: Collection[str]) -> list[nn.Module]:
    """The modules that `patterns` name, our attention cores when there are none.

    Raises ValueError naming a pattern without a match, or two modules one of which holds the other.
    """
    if not patterns:
        return [m for m in model.modules() if isinstance(m, CausalAttention | ContextAttention)]
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        matches = {name: module for name, module in model.named_modules() if same_parts(name, pattern)}
        if not matches and not any(same_parts(name, pattern) for name in names):
            raise ValueError(f"recompute.modules: {pattern!r} matches no module of {type(model).__name__}")
        found |= matches
    for outer, inner in ((a, b) for a in found for b in found if b.startswith(f"{a}.")):
        raise ValueError(f"recompute.modules: {outer} and {inner} inside it are both chosen; legal: one of them")
    return [*found.values()]


def checkpoint_forward(module: Any, decide: Callable[..., bool] | None = None, *, whole: bool = True) -> Undo:
    """Let `module.forward` go through `checkpoint_block`; returns what undoes it.

    Args:
        decide: decide(forward, args, kwargs) says when; None: always.
        whole: the module's inputs are the same on all tensor-parallel ranks.
    """
    forward = module.forward

    @wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or (decide is not None and not decide(forward, args, kwargs)):
            return forward(*args, **kwargs)
        return checkpoint_block(forward, *args, options=options_of(whole), **kwargs)

    module.forward = checkpointed
    return Undo(lambda: module.__dict__.pop("forward", None))


def options_of(whole: bool) -> Options:
    """The engine's; only what all tensor-parallel ranks hold alike may be partitioned over them."""
    options = current_options()
    return options if whole else replace(options, partition=False)


def foreign_attention(model: nn.Module) -> list[Undo]:
    """Checkpoint attention in `model`, between its projections, of transformers' decoders; returns what undoes it."""
    undo = []
    decoders = [decoder for _, decoder in foreign_decoders(model)]
    for decoder in decoders:
        library: Any = sys.modules["transformers"]
        masking: Any = sys.modules["transformers.masking_utils"]
        known, masks = library.AttentionInterface._global_mapping, library.AttentionMaskInterface._global_mapping
        plain = decoder.config._attn_implementation
        modeling = sys.modules[type(decoder).__module__]
        attention = known.get(plain) or getattr(modeling, "eager_attention_forward", None)
        if attention is None:
            raise ValueError(
                f"recompute.mode selective: attention {plain!r} of {type(decoder).__name__} is not in transformers' "
                "registry; name modules in recompute.modules"
            )

        def recomputed(module: nn.Module, *args: Any, attention: Any = attention, **kwargs: Any) -> Any:
            return checkpoint_block(attention, module, *args, options=options_of(whole=False), **kwargs)

        name = f"minizero_recomputed_{plain}"
        library.AttentionInterface.register(name, recomputed)
        if plain in masking.ALL_MASK_ATTENTION_FUNCTIONS:
            library.AttentionMaskInterface.register(name, masks[plain])
        decoder.set_attn_implementation(name)
        undo.append(Undo(partial(decoder.set_attn_implementation, plain)))
    return undo


# ---- as many as memory needs ----


@dataclass
class BlockBytes:
    """What one block keeps for backward: everything, or its inputs alone."""

    saved: int
    inputs: int


class ByteBudget:
    """Picks the blocks to compute again, from what the first forward's blocks would keep.

    Backward begins at the last block. If those at the end are kept, they are gone before the first of the others is
    computed again: so the earlier ones are chosen, as few as will do. The most that is held is then

        max(Σ saved of the kept + Σ inputs of the chosen,  Σ inputs of the chosen + saved of the largest chosen)

    Args:
        budget: bytes that the blocks of this rank may keep. agree: see `Agree`.
    """

    def __init__(self, budget: float, num_blocks: int, agree: Agree) -> None:
        self.budget, self.num_blocks, self.agree = budget, num_blocks, agree
        self.measured: dict[int, BlockBytes] = {}
        self.chosen: set[int] | None = None
        self.measured_in: Forward | None = None

    def choose(self) -> set[int]:
        """Raises ValueError when even computing every block again takes more than the budget."""
        flat = [number for i in range(self.num_blocks) for number in self._of(i)]
        blocks = [BlockBytes(*pair) for pair in zip(*[iter(self.agree(flat))] * 2, strict=True)]
        least = None
        for count in range(self.num_blocks + 1):
            again, kept = blocks[:count], blocks[count:]
            inputs = sum(block.inputs for block in again)
            largest = max((block.saved for block in again), default=0)
            most = inputs + max(sum(block.saved for block in kept), largest)
            if most <= self.budget:
                return set(range(count))
            least = most if least is None else min(least, most)
        raise ValueError(
            f"recompute.budget: {self.budget:,.0f} bytes are less than the {least:,} that {self.num_blocks} blocks "
            "keep at the least; legal: as much or more, a smaller micro-batch, or more tensor-parallel ranks"
        )

    def _of(self, index: int) -> tuple[int, int]:
        block = self.measured.get(index, BlockBytes(0, 0))
        return block.saved, block.inputs


class BudgetedBlock:
    """Whether block `index` is computed again: always in the first forward, which measures, then as chosen."""

    def __init__(self, budget: ByteBudget, index: int, module: nn.Module) -> None:
        self.budget, self.index, self.module = budget, index, module

    def __call__(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> bool:
        budget = self.budget
        if budget.chosen is None and budget.measured and running() is not budget.measured_in:
            budget.chosen, budget.measured_in = budget.choose(), None  # another forward begins
        if budget.chosen is not None:
            return self.index in budget.chosen
        budget.measured_in = running()
        if self.index not in budget.measured:
            budget.measured[self.index] = measure(self.module, forward, args, kwargs)
        return True


def measure(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> BlockBytes:
    """Run a block's `forward` once more for its saved bytes; random state is as if it had not run."""
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    cut = tree_map(lambda leaf: leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf,
                   (args, kwargs))  # fmt: skip
    with (
        buffers_put_back(module),
        PassState.now(inputs).restored(),
        SavedBytes(without=module.parameters()) as saved,
    ):
        forward(*cut[0], **cut[1])
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in inputs if t.requires_grad}
    return BlockBytes(saved.total, sum(storages.values()))
