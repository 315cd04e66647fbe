"""Tensor and sequence parallel layers: one matrix product over several ranks.

A **region** is what one f and one g enclose (Shoeybi et al., "Megatron-LM", arXiv 1909.08053): a column-parallel layer,
whatever works on its features one by one (activation, attention heads), a row-parallel layer:

    x[B, S, H] -f-> X W1[H, F_tp] -> act -> W2[F_tp, H] {partial} -g-> y[B, S, H]

With `sequence`, what lies between regions (norms, residuals, dropout) works on S_tp of the sequence, and f and g become
an all-gather and a reduce-scatter: the same bytes, 1/tp of the activations (Korthikanti et al., arXiv 2205.05198).

Nothing is padded: a width or a vocabulary that does not divide is cut into parts that differ by one.

Shape suffixes: B batch, S sequence, H hidden, F features of a rank, V vocabulary (a rank's rows where it says so),
T = B · S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minizero.dist import conjugate
from minizero.dist.collectives import Communicator
from minizero.dist.sharding import TensorShard, split_sizes
from minizero.kernels.backend import Backend, UsesKernels
from minizero.kernels.cross_entropy import gradient, losses_of, statistics
from minizero.parallel.linear import Anchor, anchor, linear
from minizero.parallel.random import draw_from
from minizero.utils.forward import running


@dataclass
class TensorAxis:
    """The tensor-parallel axis as the layers see it.

    Attributes:
        comm: its collectives. sequence: whether regions are sequence parallel. kernels: see `minizero.kernels`.
    """

    comm: Communicator
    sequence: bool = False
    kernels: Backend = "auto"

    @property
    def length(self) -> int:
        """Positions of the running forward's sequence, before it was cut over this axis."""
        forward = running()
        assert forward is not None, "a sequence-parallel layer outside its engine's model"
        return forward.length

    def places(self, length: int, device: torch.device) -> Tensor:
        """int64: which of the positions before the cut this rank holds."""
        whole = torch.arange(self.length, device=device)
        return whole.split(split_sizes(self.length, self.comm.size))[self.comm.rank]

    def enter(self, x_BSH: Tensor, unit: str, opening: Sequence[ColumnParallelLinear]) -> Tensor:
        """Into a region that the layers `opening` open: f, or the all-gather of the sequence."""

        def anchor_weights() -> None:
            for layer in opening:
                layer.anchor = anchor(layer.weight)

        if self.sequence:
            return conjugate.gather_sequence(x_BSH, self.comm, unit, self.length, behind=anchor_weights)
        draw_from("part")
        return conjugate.copy_to_region(x_BSH, self.comm, unit, behind=anchor_weights)

    def leave(self, x_BSH: Tensor, unit: str) -> Tensor:
        """Out of a region: g, or the reduce-scatter of the sequence."""
        if self.sequence:
            return conjugate.scatter_sequence(x_BSH, self.comm, unit)
        draw_from("whole")
        return conjugate.reduce_from_region(x_BSH, self.comm, unit)


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b with the rows of W over the ranks: W[F_tp, H], y[B, S, F_tp].

    Args:
        weight: this rank's [F, H], or [H, F] where `transposed` (GPT-2's Conv1D). bias: this rank's [F], or None.
        axis: the tensor-parallel axis. unit: names its communication.
        enters: whether the layer is its own way into the region; else whoever calls it has entered.
        gather: lengths of all ranks' outputs, to give them whole (a head whose user wants all logits); None: do not.

    Attributes:
        anchor: of the weight, from the region's entry to this layer's forward; a second one in it makes its own.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        axis: TensorAxis,
        unit: str,
        *,
        transposed: bool = False,
        enters: bool = True,
        gather: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.axis, self.unit = axis, unit
        self.transposed, self.enters, self.gather = transposed, enters, gather
        self.anchor: Anchor | None = None

    def forward(self, x_BSH: Tensor) -> Tensor:
        if self.enters:
            x_BSH = self.axis.enter(x_BSH, self.unit, [self])
        hangs_on, self.anchor = self.anchor or anchor(self.weight), None
        y_BSF = linear(x_BSH, self.weight, self.bias, hangs_on, self.transposed)
        return (
            y_BSF if self.gather is None else conjugate.gather_features(y_BSF, self.axis.comm, self.unit, self.gather)
        )


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with the columns of W over the ranks: W[H, F_tp], x[B, S, F_tp]; the bias is added once, after g.

    Args: as of `ColumnParallelLinear`; the bias is whole on every rank.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, axis: TensorAxis, unit: str, *, transposed: bool = False
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.axis, self.unit, self.transposed = axis, unit, transposed

    def forward(self, x_BSF: Tensor) -> Tensor:
        y_BSH = linear(x_BSF, self.weight, None, anchor(self.weight), self.transposed)
        y_BSH = self.axis.leave(y_BSH, self.unit)
        return y_BSH if self.bias is None else y_BSH + self.bias


class VocabParallelEmbedding(nn.Module):
    """Rows of the table over the ranks: W[V_tp, H]. A token's row is looked up where it is, and g sums what was found.

    Args:
        weight: this rank's rows. start: number of the first. axis, unit: as of `ColumnParallelLinear`.
        padding: the token whose row gets no gradient, or None.
    """

    def __init__(
        self, weight: nn.Parameter, start: int, axis: TensorAxis, unit: str, padding: int | None = None
    ) -> None:
        super().__init__()
        self.weight, self.start = weight, start
        self.axis, self.unit = axis, unit
        here = padding is not None and start <= padding < start + weight.shape[0]
        self.padding = padding - start if padding is not None and here else None

    def forward(self, tokens_BS: Tensor) -> Tensor:
        local_BS = tokens_BS - self.start
        elsewhere_BS = (local_BS < 0) | (local_BS >= self.weight.shape[0])
        x_BSH = F.embedding(local_BS.masked_fill(elsewhere_BS, 0), self.weight, self.padding)
        x_BSH = x_BSH.masked_fill(elsewhere_BS.unsqueeze(-1), 0.0)
        return conjugate.reduce_from_region(x_BSH, self.axis.comm, self.unit)


# ---- the loss, where logits are never gathered ----


class _VocabParallelCrossEntropy(Function):
    """Loss per token, by the halves of `minizero.kernels.cross_entropy`; saves the logits and four numbers each."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        labels_T: Tensor,
        comm: Communicator,
        shard: TensorShard,
        smoothing: float,
        z: float,
        in_place: bool,
        kernels: Backend,
    ) -> Tensor:
        ((first, _),) = shard.ranges[shard.rank]
        own_4T = statistics(logits_TV, labels_T, first, sums=smoothing > 0, backend=kernels)
        parts_R4T = comm.gather_rows(own_4T, "cross entropy")
        highest_RT, total_RT = parts_R4T[:, 0], parts_R4T[:, 1]
        highest_T = highest_RT.amax(dim=0)
        total_T = (total_RT * (highest_RT - highest_T).exp()).sum(dim=0)
        whole_4T = torch.stack([highest_T, total_T, parts_R4T[:, 2].sum(dim=0), parts_R4T[:, 3].sum(dim=0)])
        ctx.save_for_backward(logits_TV, labels_T, whole_4T)
        ctx.first, ctx.vocab, ctx.settings = first, shard.shape[0], (smoothing, z, 0.0)
        ctx.in_place, ctx.kernels = in_place, kernels
        return losses_of(whole_4T, labels_T, shard.shape[0], smoothing, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        logits_TV, labels_T, whole_4T = ctx.saved_tensors  # raises when they were written over before
        factor_T = grads[0].to(whole_4T.dtype)
        grad_TV = gradient(
            logits_TV, labels_T, whole_4T, factor_T, ctx.first, ctx.vocab, ctx.settings,
            in_place=ctx.in_place, backend=ctx.kernels,
        )  # fmt: skip
        return grad_TV, None, None, None, None, None, None, None


def vocab_parallel_cross_entropy(
    logits_TV: Tensor,
    labels_T: Tensor,
    comm: Communicator,
    shard: TensorShard,
    *,
    ignored: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    in_place: bool = False,
    kernels: Backend = "auto",
) -> Tensor:
    """-log softmax(logits)[label] per token, in at least fp32, 0 where the label is `ignored`; never gathers logits.

    Args:
        logits_TV: this rank's columns. labels_T: int64, in the whole vocabulary.
        shard: how the head's rows (the vocabulary) are cut.
        label_smoothing: ε of Szegedy et al. (arXiv 1512.00567): the target is (1 - ε) one-hot + ε / V.
        z_loss: factor of log² Z (PaLM, arXiv 2204.02311).
        in_place: in Triton the gradient may take the logits' memory: nothing else reads them.

    Four numbers per token cross between ranks, in one exchange: the largest logit, Σ exp, the label's logit, Σ of all.
    """
    counted_T = labels_T != ignored
    safe_T = labels_T.masked_fill(~counted_T, 0)
    loss_T = _VocabParallelCrossEntropy.apply(
        logits_TV, safe_T, comm, shard, label_smoothing, z_loss, in_place, kernels
    )
    return loss_T.masked_fill(~counted_T, 0.0)


class ShiftedVocabParallelLoss:
    """transformers' `ForCausalLMLoss` from cut logits: the mean over the labels that count, each the next token.

    Takes the place of a model's `loss_function`; arguments are named as there. What that ignores, this does too.
    """

    __name__ = "ForCausalLMLoss"  # by which `parallel.foreign` knows that a model computes this loss

    def __init__(self, comm: Communicator, shard: TensorShard, kernels: Backend = "auto") -> None:
        self.comm, self.shard, self.kernels = comm, shard, kernels

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
        labels_T = shift_labels.flatten()
        loss_T = vocab_parallel_cross_entropy(
            logits.flatten(0, 1), labels_T, self.comm, self.shard, ignored=ignore_index, kernels=self.kernels
        )
        return loss_T.sum() / ((labels_T != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)


class VocabParallelLoss(nn.Module, UsesKernels):
    """(sum of the losses, number of labels that count) from cut logits: what our models' loss is over whole ones."""

    def __init__(self, comm: Communicator, shard: TensorShard) -> None:
        super().__init__()
        self.comm, self.shard = comm, shard

    def forward(self, logits_BSV: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
        labels_T = labels_BS.flatten()
        loss_T = vocab_parallel_cross_entropy(
            logits_BSV.flatten(0, 1), labels_T, self.comm, self.shard, in_place=True, kernels=self.kernels
        )
        return loss_T.sum(), (labels_T != -100).sum()
