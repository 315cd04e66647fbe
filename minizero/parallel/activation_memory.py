"""What a block keeps for backward: counted while it runs, and as closed forms.

The forms hold for our models in fp32 or fp64 without dropout, and are derived tensor by tensor, as autograd saves them.
Elements per token and block. H is the hidden width; of this rank: h = n·d the width of its n query heads, k = m·d that
of its m key/value heads, i its MLP features. "here" counts tokens of this rank's part of the sequence (all of them
without sequence parallel), the rest counts all tokens:

    Llama                                         GPT-2
    2 norms, each        here                     2 norms, each        here
      input                H                        input                H
      normalized           H                        mean, 1/std          2
      1/rms                1                        output               H  (of all tokens)
      output               H  (of all tokens)
    attention                                     attention
      q, k, v            h + 2k                     q, k, v in one       3h
      output             h                          output               h
      log-sum-exp        n                          log-sum-exp          n
      output as o_proj   h  (a copy with the
      takes it               heads side by side)
    MLP                                           MLP
      gate, its silu,                               before and after
      up, product        4i                         the GELU             2i
    angles: cos and sin  S·d elements, once for all blocks

Eager attention saves the scaled q, k and v repeated to all heads (3h), the weights (n·S), the mask (S² bytes) and its
output for o_proj (h). Selective recompute keeps q, k, v and the output that the next layer takes. A block that is
computed again keeps its input: H here; partitioned over t ranks, H / t.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

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


Mode = Literal["none", "selective", "full", "partitioned"]


@dataclass(frozen=True)
class BlockShape:
    """One block as one rank has it.

    Attributes:
        family: "llama" or "gpt2". eager: whether attention holds its weights.
        batch, length: of all tokens. here: tokens that norms and residuals have on this rank.
        hidden: H. heads, kv_heads, head_dim: n, m, d. mlp: i. ranks: t, for `partitioned`.
    """

    family: str
    batch: int
    length: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    eager: bool = False
    here: int | None = None
    ranks: int = 1

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def block_bytes(shape: BlockShape, mode: Mode, element: int = 4) -> int:
    """Bytes that one block keeps for backward, without what all blocks share (the rotary angles)."""
    tokens, here = shape.tokens, shape.tokens if shape.here is None else shape.here
    hidden, width, kv_width = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if mode == "full":
        return here * hidden * element
    if mode == "partitioned":
        return -(-tokens * hidden // shape.ranks) * element
    is_llama = shape.family == "llama"
    norms = here * (2 * hidden + 1 if is_llama else hidden + 2) + tokens * hidden
    mlp = tokens * (4 if is_llama else 2) * shape.mlp
    qkv = width + 2 * kv_width
    if mode == "selective":
        attention, mask = qkv + width, 0
    elif shape.eager:
        attention, mask = 4 * width + shape.heads * shape.length, shape.length**2
    else:
        copies = is_llama and shape.heads > 1  # of the output, to lay heads side by side
        attention, mask = qkv + width + shape.heads + (width if copies else 0), 0
    return (2 * norms + tokens * attention + mlp) * element + mask


def shared_bytes(shape: BlockShape, element: int = 4) -> int:
    """Bytes that are kept once for all blocks."""
    return shape.length * shape.head_dim * element if shape.family == "llama" else 0
