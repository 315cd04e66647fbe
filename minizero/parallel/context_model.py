"""Makes a model context parallel: its inputs are cut where they enter, its attention is given the axis.

Every rank of the axis is given the same whole sequences, and keeps its positions of them; what users see is otherwise
unchanged. A loss given as (sum, count) is that of its own tokens, since the engine adds up both. The mean loss of
a transformers model is the whole sequence's on every rank. Logits without labels come back whole, in order.

What a model needs:
- ours say by `context_inputs` which arguments to cut, and have a `CausalAttention` in each layer;
- a transformers model takes part through transformers' attention registry, `position_ids` and `shift_labels`;
- any other says `context_inputs` too (labels being the tokens that follow) and attends through one of those two.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from minizero.dist import conjugate
from minizero.dist.collectives import Communicator
from minizero.models.layers import IGNORED, CausalAttention, positions_and_documents
from minizero.parallel.context import ContextAttention, ContextAxis, HeadPlan
from minizero.parallel.foreign import foreign_decoders, has_causal_loss, is_foreign
from minizero.utils.forward import running
from minizero.utils.undo import Removable, Undo

FOREIGN_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels")
REGISTERED = "minizero_context"  # our name in transformers' attention registry
NOT_BUILT = ("sliding_window", "softcap", "s_aux", "head_mask")  # of transformers' attention interface

# transformers calls a registered function with the attention module alone; this says on which axis it is.
AXES: WeakKeyDictionary[nn.Module, tuple[ContextAxis, str]] = WeakKeyDictionary()


def apply_context(model: nn.Module, axis: ContextAxis, sequence_ranks: int = 1) -> list[Removable]:
    """Make `model` context parallel over `axis`, in place; returns what undoes it.

    Args:
        sequence_ranks: over how many ranks sequence parallelism cuts what this axis leaves to a rank.

    Raises ValueError, saying why, for a model that cannot be.
    """
    if axis.comm.size == 1:
        return []
    undo: list[Removable] = []
    foreign = foreign_decoders(model)
    inputs = FOREIGN_INPUTS if is_foreign(model) else getattr(model, "context_inputs", ())
    if not inputs:
        raise ValueError(
            f"parallel.cp = {axis.comm.size}: {type(model).__name__} does not say which of its arguments hold the "
            "sequence: give its class context_inputs, their names; labels are the tokens that follow"
        )
    cores = [(name, module) for name, module in model.named_modules() if isinstance(module, CausalAttention)]
    if not cores and not foreign:
        raise ValueError(
            f"parallel.cp = {axis.comm.size}: {type(model).__name__} has no attention that can span ranks: it needs "
            "minizero's CausalAttention, or to be a transformers model"
        )
    for name, core in cores:
        refuse_weights_dropout(name, core.dropout.p, axis)
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], ContextAttention(axis, name))
        undo.append(Undo(partial(setattr, parent, name.rpartition(".")[2], core)))
    for name, decoder in foreign:
        undo += join_registry(name, decoder, axis)
    for name, inner in model.named_modules():
        if is_foreign(inner) and inner is not model:
            undo.append(inner.register_forward_pre_hook(partial(refuse_inner_labels, name), with_kwargs=True))
    entry = Entry(model, axis, inputs, is_foreign(model), sequence_ranks)
    undo.append(model.register_forward_pre_hook(entry.cut, with_kwargs=True))
    undo.append(model.register_forward_hook(entry.join, with_kwargs=True))
    return undo


class Entry:
    """Cuts what enters the model, and makes whole what leaves it and is not a part by right."""

    def __init__(
        self, model: nn.Module, axis: ContextAxis, inputs: tuple[str, ...], foreign: bool, sequence_ranks: int
    ) -> None:
        self.axis, self.inputs, self.foreign, self.sequence_ranks = axis, inputs, foreign, sequence_ranks
        self.signature = inspect.signature(model.forward)

    def cut(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Each input's positions of this rank; raises ValueError for one that cannot be cut."""
        bound = self.signature.bind_partial(*args, **kwargs).arguments
        extra = bound.pop(self._rest, {}) if self._rest else {}
        given = {name: value for name, value in {**bound, **extra}.items() if value is not None}
        total = self._length(given)
        forward = running()
        assert forward is not None
        positions_L = self.axis.positions(total, self.axis.comm.rank, device_of(given))
        forward.positions_L, forward.total = positions_L, total
        forward.documents_BS = documents_of(given)
        if self.foreign:
            refuse_uses(module, given, size=self.axis.comm.size)
        if self.foreign and "labels" in given:
            given = shifted(given["labels"]) | given
        for name in given:
            if name in self.inputs:
                given[name] = given[name].index_select(1, positions_L)
        given.pop("attention_mask", None)  # no token sees the padding behind it
        return (), given

    @property
    def _rest(self) -> str:
        """Name of `**kwargs`, where there are any."""
        kinds = {p.kind: name for name, p in self.signature.parameters.items()}
        return kinds.get(inspect.Parameter.VAR_KEYWORD, "")

    def _length(self, given: dict[str, Any]) -> int:
        size = self.axis.comm.size
        for name, value in given.items():
            if (
                isinstance(value, Tensor)
                and value.dim() > 0
                and name not in self.inputs
                and name != "num_items_in_batch"
            ):
                raise ValueError(
                    f"parallel.cp = {size}: cannot tell how to cut the argument {name!r}; those that hold the "
                    f"sequence are {', '.join(self.inputs)}"
                )
        lengths = {name: given[name].shape[1] for name in self.inputs if name in given and given[name].shape[0] > 0}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"parallel.cp = {size}: the inputs' sequences have lengths {lengths or 'unknown'}")
        total = next(iter(lengths.values()))
        if total < size:
            raise ValueError(f"parallel.cp = {size}: a sequence of {total} tokens is shorter; legal: at least {size}")
        if total // size < self.sequence_ranks:  # said by all ranks, also those that would have enough
            raise ValueError(
                f"parallel.cp = {size} leaves {total // size} of {total} tokens to a rank, fewer than parallel.tp = "
                f"{self.sequence_ranks} ranks for parallel.sequence; legal: at least {size * self.sequence_ranks}"
            )
        return total

    def join(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Logits whole and in order where there are no labels; a transformers model's mean loss whole.

        Raises ValueError for another output that would be a part and be taken for the whole.
        """
        if isinstance(output, Tensor) and output.dim() == 3:
            return self._whole(output)
        if not self.foreign:
            return output
        refuse = f"parallel.cp = {self.axis.comm.size}: {type(module).__name__}"
        if not hasattr(output, "keys"):
            raise ValueError(f"{refuse} returns a {type(output).__name__}; legal: return_dict=True")
        parts = [key for key in output if key not in ("loss", "logits", "last_hidden_state", "past_key_values")]
        if parts:
            raise ValueError(f"{refuse} returns {', '.join(parts)}, of which each rank has a part; legal: without them")
        if output.get("loss") is not None:
            output.loss = _SumOfParts.apply(output.loss, self.axis.comm)
            return output
        for key in ("logits", "last_hidden_state"):
            if output.get(key) is not None:
                output[key] = self._whole(output[key])
        return output

    def _whole(self, x_BLV: Tensor) -> Tensor:
        """(B, L, V) of this rank -> (B, S, V) in the sequence's order."""
        forward, comm = running(), self.axis.comm
        assert forward is not None
        held = [self.axis.positions(forward.total, rank, x_BLV.device) for rank in range(comm.size)]
        x_BLV = _ForTheMean.apply(x_BLV, comm.size)
        laid = conjugate.gather_rows_of_sequence(x_BLV, comm, "logits", [len(of_rank) for of_rank in held])
        return laid.index_select(1, torch.cat(held).argsort())


class _ForTheMean(Function):
    """x as it is; its gradient times the ranks, of which each computes the same loss from what is gathered of x.

    A rank's part gets the gradient of one of these losses; the mean over all the ranks then is right.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.size, None


class _SumOfParts(Function):
    """A loss of which each rank has computed a part -> the whole loss, on every rank.

    Its adjoint sums the gradients of all ranks' uses; as every rank holds the same loss, that is `size` times its own.
    The mean over data- and context-parallel ranks then is the gradient of the loss.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, comm: Communicator) -> Tensor:
        ctx.size = comm.size
        return comm.all_reduce(loss, "loss")()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.size, None


def refuse_uses(model: Any, given: dict[str, Any], size: int) -> None:
    """Raise ValueError for what a transformers model may be asked and a part of a sequence cannot answer."""
    refuse = f"parallel.cp = {size}: {type(model).__name__}"
    for name in ("past_key_values", "logits_to_keep", "output_hidden_states", "output_attentions"):
        value = given.get(name)
        if value is not None and value is not False and not (isinstance(value, int) and value == 0):
            raise ValueError(f"{refuse} was given {name}, which is not available over parts of a sequence")
    labels, mask, ids = given.get("labels"), given.get("attention_mask"), given.get("position_ids")
    if labels is not None and not has_causal_loss(model):
        raise ValueError(
            f"{refuse} computes its loss from labels in its own way, and each rank has a part of the sequence; legal: "
            "the next-token loss of transformers, or no labels and a loss from the logits"
        )
    if mask is None:
        return
    if mask.dim() != 2 or bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError(
            f"{refuse}: attention_mask of shape {tuple(mask.shape)}; legal: (batch, length), 1 for tokens and 0 for "
            "padding behind them"
        )
    if ids is not None and bool((ids[:, 1:] == 0).any()):
        raise ValueError(
            f"{refuse}: position_ids that begin anew say where documents begin, and an attention_mask beside them does "
            "not; legal: one of the two"
        )
    if labels is not None and bool(((shifted(labels)["shift_labels"] != IGNORED) & (mask == 0)).any()):
        raise ValueError(f"{refuse}: a label at padding counts; legal: {IGNORED} there")


def device_of(given: dict[str, Any]) -> torch.device:
    """Of the first tensor."""
    return next(value.device for value in given.values() if isinstance(value, Tensor))


def documents_of(given: dict[str, Any]) -> Tensor | None:
    """int (B, S): positions that may see each other, from position ids that begin anew.

    Padding is behind the tokens, which do not see it.
    """
    ids = given.get("position_ids")
    return None if ids is None else positions_and_documents(ids, ids)[1]


def shifted(labels_BS: Tensor) -> dict[str, Tensor]:
    """transformers' own shift, made before the sequence is cut: the next tokens, and how many count.

    Where the caller has given either, that stands.
    """
    next_BS = nn.functional.pad(labels_BS, (0, 1), value=IGNORED)[:, 1:]
    return {"shift_labels": next_BS, "num_items_in_batch": (next_BS != IGNORED).sum()}


# ---- transformers ----


def join_registry(name: str, decoder: Any, axis: ContextAxis) -> list[Removable]:
    """Let a transformers decoder attend over the axis; returns what undoes it. Raises ValueError when it cannot."""
    library: Any = sys.modules["transformers"]
    kind = type(decoder).__name__
    if not getattr(decoder, "_supports_attention_backend", False):
        raise ValueError(
            f"parallel.cp = {axis.comm.size}: {kind} does not attend through transformers' attention registry"
        )
    config = decoder.config
    for reason in mixes_otherwise(decoder):
        raise ValueError(f"parallel.cp = {axis.comm.size}: {kind} {reason}, which context parallelism does not have")
    for setting in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        refuse_weights_dropout(f"{name}.config.{setting}".lstrip("."), getattr(config, setting, 0.0) or 0.0, axis)
    library.AttentionInterface.register(REGISTERED, registered_attention)
    plain = config._attn_implementation
    decoder.set_attn_implementation(REGISTERED)
    for inner, module in decoder.named_modules():
        AXES[module] = (axis, f"{name}.{inner}".strip("."))
    handle = decoder.register_forward_pre_hook(supply_positions, with_kwargs=True)
    return [handle, Undo(lambda: decoder.set_attn_implementation(plain))]


def refuse_inner_labels(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    """A model inside another one would shift labels that are a part of the sequence."""
    if kwargs.get("labels") is not None:
        raise ValueError(
            f"parallel.cp: {name} inside another module was given labels, which it would shift in a part of the "
            "sequence; legal: compute the loss from its logits"
        )


def mixes_otherwise(decoder: Any) -> Iterator[str]:
    """Ways in which a decoder's tokens meet outside the attention registry, or depend on the whole length."""
    config = decoder.config
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        yield f"has layers of type {', '.join(sorted(kinds))}"
    if getattr(config, "attention_chunk_size", None):
        yield f"has attention in chunks of {config.attention_chunk_size}"
    convolution = next((n for n, m in decoder.named_modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    if convolution is not None:
        yield f"has a convolution ({convolution})"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
        yield "has rotary angles that depend on the length of the sequence"


def supply_positions(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Position ids of this rank's part of the sequence, where the caller gives none."""
    forward = running()
    if forward is None or forward.positions_L is None or kwargs.get("position_ids") is not None:
        return None
    if kwargs.get("attention_mask") is not None:
        raise ValueError(f"{type(module).__name__} inside another module was given an attention_mask; legal: none")
    return args, {**kwargs, "position_ids": forward.positions_L.unsqueeze(0)}


def registered_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (B, N, L, D) and (B, M, L, D) -> ((B, L, N, D), no weights).

    Raises ValueError for a kind of attention that context parallelism does not have.
    """
    axis, name = AXES[module]
    asked = [feature for feature in NOT_BUILT if kwargs.get(feature) is not None]
    if attention_mask is not None:
        asked.append("attention_mask")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        asked.append("attention that is not causal")
    if dropout:
        asked.append(f"attention dropout {dropout}")
    if asked:
        raise ValueError(f"parallel.cp = {axis.comm.size}: {name} asks for {', '.join(asked)}, which is not available")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return axis.attention(query, key, value, scale, name).transpose(1, 2), None


def refuse_weights_dropout(name: str, p: float, axis: ContextAxis) -> None:
    """Raise ValueError where attention weights are to be dropped: no rank holds them."""
    if p > 0:
        raise ValueError(
            f"parallel.cp = {axis.comm.size}: {name} has attention dropout {p}; {axis.method} attention never holds "
            "the weights it would drop; legal: 0"
        )


def refuse_few_heads(model: nn.Module, axis: ContextAxis) -> None:
    """Raise ValueError when Ulysses has more ranks than heads; `model` as one tensor-parallel rank has it."""
    if axis.method != "ulysses":
        return
    for _, module in model.named_modules():
        head_dim = getattr(module, "head_dim", None)
        projection: Any = getattr(module, "q_proj", None)
        if head_dim and projection is not None:
            HeadPlan.of(projection.weight.shape[0] // head_dim, 1, axis.comm.size)
