"""Which layer is cut how: a table of patterns, and its application to a model.

A table maps a pattern of module names (`*` stands for one part of the name) to a style:

    colwise         rows of the weight over the ranks; opens a region
    colwise_kv      the same for keys and values, whose heads are copied where there are fewer than ranks
    colwise_fused   the same for three matrices in one (GPT-2's q, k and v), each cut alike
    rowwise         columns of the weight over the ranks; closes the region
    region          a module whose first input is used by opening layers only (an attention or MLP without norm and
                    residual): it is entered once, where each opening layer would otherwise enter for itself
    vocab           an embedding, by rows
    vocab_head      the output head, by rows; the loss takes the cut logits
    gather_head     the output head, by rows; logits are gathered, for a loss that wants them whole
    heads           our Dropout of attention weights, which each rank has for its heads
    partial         its parameters are whole, but each rank sees a part of what they are used on (norms of heads)
    sequence        the same, with sequence parallel only (norms and our Dropout between regions)
    sequence_begin  the block at whose entry the sequence is cut, with sequence parallel
    sequence_end    a `sequence` module at whose exit it is whole again; without one, the head gathers it

Everything else is whole on every rank. In a module with a `head_dim`, layers are cut by whole heads.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from minizero.dist import conjugate
from minizero.dist.layout import TensorLayout
from minizero.dist.sharding import TensorShard, split_sizes
from minizero.models.dropout import Dropout
from minizero.parallel.foreign import has_causal_loss
from minizero.parallel.random import draw_from
from minizero.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    ShiftedVocabParallelLoss,
    TensorAxis,
    VocabParallelEmbedding,
    VocabParallelLoss,
)
from minizero.utils.forward import in_backward, running

Ranges = tuple[tuple[tuple[int, int], ...], ...]  # per rank, [start, stop) along the cut dim
OPENING = ("colwise", "colwise_kv", "colwise_fused")
HEADS = ("vocab_head", "gather_head")
CUT = (*OPENING, *HEADS, "rowwise", "vocab")
STYLES = (*CUT, "region", "heads", "partial", "sequence", "sequence_begin", "sequence_end")


def apply_plan(model: nn.Module, plan: dict[str, str], axis: TensorAxis) -> TensorLayout:
    """Replace the layers that `plan` names by parallel ones; returns what this rank then holds.

    Raises ValueError naming the pattern that matches nothing, the style that does not exist, or the layer whose heads
    do not divide, with the legal degrees.
    """
    return apply_styles(model, match(model, plan), axis)


def apply_styles(model: nn.Module, styles: dict[str, str], axis: TensorAxis) -> TensorLayout:
    """`apply_plan` once it is known which module has which style."""
    return PlanApplication(model, styles, axis).run()


def match(model: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    """Module name -> style. Raises ValueError for a pattern without a match, or an unknown style."""
    names = [name for name, _ in model.named_modules() if name]
    styles: dict[str, str] = {}
    for pattern, style in plan.items():
        if style not in STYLES:
            raise ValueError(f"tensor-parallel plan: {pattern!r} has style {style!r}; legal: {', '.join(STYLES)}")
        found = [name for name in names if same_parts(name, pattern)]
        if not found:
            raise ValueError(f"tensor-parallel plan: {pattern!r} matches no module of {type(model).__name__}")
        styles.update(dict.fromkeys(found, style))
    return styles


def same_parts(name: str, pattern: str) -> bool:
    """Whether each dotted part of `name` fits that of `pattern`."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


class PlanApplication:
    """One model, its styles by module name, and the axis."""

    def __init__(self, model: nn.Module, styles: dict[str, str], axis: TensorAxis) -> None:
        self.model, self.styles, self.axis = model, styles, axis
        self.size, self.rank = axis.comm.size, axis.comm.rank
        self.layout = TensorLayout(axis.comm)
        self.regions = [name for name, style in styles.items() if style == "region"]

    def run(self) -> TensorLayout:
        for name, style in self.styles.items():
            module = self.model.get_submodule(name)
            if style in CUT:
                holder = self.model.get_submodule(name.rpartition(".")[0])
                setattr(holder, name.rpartition(".")[2], self.parallel_layer(name, style, module, holder))
            elif isinstance(module, Dropout):
                self.place(module, style)
            elif style == "partial" or (style in ("sequence", "sequence_end") and self.axis.sequence):
                self.layout.partial |= set(module.parameters())
                if style == "sequence_end":
                    module.register_forward_hook(self.end_sequence(name))
            elif style == "sequence_begin" and self.axis.sequence:
                module.register_forward_pre_hook(self.cut_sequence(name), with_kwargs=True)
        if self.axis.sequence:
            self.refuse_unlisted()
        for name in self.regions:
            self.model.get_submodule(name).register_forward_pre_hook(self.enter(name), with_kwargs=True)
        for name in dict.fromkeys(name.rpartition(".")[0] for name, style in self.styles.items() if style in OPENING):
            tell_share(self.model.get_submodule(name), self.size)
        self.layout.shards = {p: s for p, s in self.layout.shards.items() if s.dim >= 0}
        return self.layout

    def place(self, dropout: Dropout, style: str) -> None:
        """Tell a dropout which part of the whole tensor it sees."""
        if style == "heads":
            rank = self.rank
            dropout.index_of["head"] = lambda length, device: torch.arange(length, device=device) + rank * length
        elif style == "sequence" and self.axis.sequence:
            dropout.index_of["sequence"] = self.axis.places

    def refuse_unlisted(self) -> None:
        """Raise ValueError for a whole parameter where the sequence is cut: its gradient would be a part of the sum."""
        for begin in (name for name, style in self.styles.items() if style == "sequence_begin"):
            blocks = self.model.get_submodule(begin.rpartition(".")[0])
            for name, parameter in blocks.named_parameters(prefix=begin.rpartition(".")[0]):
                cut = parameter in self.layout.shards and self.layout.shards[parameter].dim >= 0
                if not cut and parameter not in self.layout.partial:
                    raise ValueError(
                        f"parallel.sequence: the plan does not list {name}, which sees a part of the sequence on each "
                        f"rank; legal: '{name.rpartition('.')[0]}': 'sequence', or 'partial' inside a region"
                    )

    # ---- layers ----

    def parallel_layer(self, name: str, style: str, source: Any, holder: nn.Module) -> nn.Module:
        """The layer that takes `source`'s place, with this rank's part of its parameters."""
        refuse_own_forward(name, source, self.size)
        transposed = not isinstance(source, nn.Linear | nn.Embedding)  # GPT-2's Conv1D keeps (in, out)
        rows, columns = (1, 0) if transposed else (0, 1)
        if style == "vocab":
            ranges = even(source.weight.shape[0], self.size)
            weight = self.part(source.weight, 0, ranges)
            start = ranges[self.rank][0][0]
            padding = source.padding_idx
            layer: nn.Module = VocabParallelEmbedding(weight, start, self.axis, name, padding=padding)
        elif style == "rowwise":
            ranges = self.head_ranges(name, source.weight.shape[columns], holder)
            weight = self.part(source.weight, columns, ranges)
            bias = source.bias
            layer = RowParallelLinear(weight, bias, self.axis, name, transposed=transposed)
            if bias is not None and self.axis.sequence:  # it is added to a part of the sequence
                self.layout.partial.add(bias)
        else:
            ranges = self.opening_ranges(name, style, source.weight.shape[rows], holder)
            weight = self.part(source.weight, rows, ranges)
            bias = None if source.bias is None else self.part(source.bias, 0, ranges)
            sizes = [sum(stop - start for start, stop in of_rank) for of_rank in ranges]
            whole_before = style in HEADS and "sequence_end" in self.styles.values()
            layer = ColumnParallelLinear(
                weight,
                bias,
                TensorAxis(self.axis.comm) if whole_before else self.axis,
                name,
                transposed=transposed,
                enters=name.rpartition(".")[0] not in self.regions,
                gather=sizes if style == "gather_head" else None,
            )
            if style == "vocab_head":
                self.cut_logits(weight, sizes, name)
        self.layout.initializers[layer] = source
        return layer

    def opening_ranges(self, name: str, style: str, size: int, holder: nn.Module) -> Ranges:
        if style in HEADS:
            return even(size, self.size)
        if style == "colwise_fused":
            third = self.head_ranges(name, size // 3, holder)
            return tuple(
                tuple((start + k * size // 3, stop + k * size // 3) for k in range(3) for start, stop in of_rank)
                for of_rank in third
            )
        return self.head_ranges(name, size, holder, copies=style == "colwise_kv")

    def head_ranges(self, name: str, size: int, holder: nn.Module, copies: bool = False) -> Ranges:
        """`size` features over the ranks: by heads where the holder has them, else as evenly as can be."""
        head_dim = getattr(holder, "head_dim", None)
        if head_dim is None:
            return even(size, self.size)
        heads = size // head_dim
        if heads % self.size == 0:
            share = size // self.size
            return tuple(((rank * share, (rank + 1) * share),) for rank in range(self.size))
        if copies and self.size % heads == 0:
            owner = [rank * heads // self.size for rank in range(self.size)]
            return tuple(((head * head_dim, (head + 1) * head_dim),) for head in owner)
        legal = [t for t in range(1, heads + 1) if heads % t == 0]
        more = f", or a multiple of {heads}" if copies else ""
        raise ValueError(
            f"parallel.tp = {self.size} does not divide the {heads} heads of {name}; legal for it: "
            f"{', '.join(map(str, legal))}{more}"
        )

    def part(self, whole: nn.Parameter, dim: int, ranges: Ranges) -> nn.Parameter:
        """This rank's part of a parameter, made once, so that tied weights stay tied."""
        if whole not in self.layout.parts:
            shard = TensorShard(tuple(whole.shape), dim, ranges, self.rank)
            self.layout.parts[whole] = nn.Parameter(shard.cut(whole.detach()).contiguous().clone(), whole.requires_grad)
            self.layout.shards[self.layout.parts[whole]] = shard
        return self.layout.parts[whole]

    # ---- hooks ----

    def enter(self, name: str) -> Callable[..., Any]:
        layers = [n for n, style in self.styles.items() if style in OPENING and n.rpartition(".")[0] == name]
        opening = [cast(ColumnParallelLinear, self.model.get_submodule(layer)) for layer in layers]
        return on_first_input(lambda x_BSH: self.axis.enter(x_BSH, name, opening))

    def cut_sequence(self, name: str) -> Callable[..., Any]:
        def cut(x_BSH: Tensor) -> Tensor:
            forward = running()
            assert forward is not None
            if forward.length and not in_backward():
                raise ValueError(f"parallel.sequence: {name}, where the sequence is cut, ran twice in one forward")
            forward.length = x_BSH.shape[1]
            draw_from("part")
            if self.axis.length < self.size:
                raise ValueError(
                    f"parallel.sequence: {self.axis.length} tokens are fewer than parallel.tp = {self.size} ranks"
                )
            return conjugate.split_sequence(x_BSH, self.axis.comm, name)

        return on_first_input(cut)

    def end_sequence(self, name: str) -> Callable[..., Any]:
        def end(module: nn.Module, args: Any, x_BSH: Tensor) -> Tensor:
            draw_from("whole")
            return conjugate.join_sequence(x_BSH, self.axis.comm, name, self.axis.length)

        return end

    def cut_logits(self, weight: nn.Parameter, sizes: list[int], name: str) -> None:
        """The model's loss takes cut logits; who asks for logits themselves gets them whole.

        A transformers model that was given labels then has no logits in its output: a part would be taken for all.
        """
        shard, comm = self.layout.shards[weight], self.axis.comm
        foreign = has_causal_loss(self.model)
        if foreign:
            model: Any = self.model
            model.loss_function = ShiftedVocabParallelLoss(comm, shard, self.axis.kernels)
        else:
            self.model.loss = VocabParallelLoss(comm, shard)

        def gather(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return conjugate.gather_features(output, comm, name, sizes)
            if foreign and not hasattr(output, "keys"):
                raise ValueError(f"parallel.tp: the model returns a {type(output).__name__}; legal: return_dict=True")
            if foreign:
                whole = output.loss is None
                output.logits = conjugate.gather_features(output.logits, comm, name, sizes) if whole else None
            return output

        self.model.register_forward_hook(gather)
        if foreign and self.axis.sequence:
            self.model.register_forward_pre_hook(refuse_hidden_states, with_kwargs=True)


def refuse_hidden_states(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Hidden states between blocks are parts of the sequence."""
    if kwargs.get("output_hidden_states"):
        raise ValueError("parallel.sequence: output_hidden_states would give each rank's part of them; legal: without")


def refuse_own_forward(name: str, source: Any, size: int) -> None:
    """Raise ValueError for a layer that does more than the product or the lookup that takes its place."""
    kind = type(source)
    plain = kind.__name__ == "Conv1D" or getattr(kind, "forward", None) in (nn.Linear.forward, nn.Embedding.forward)
    if not plain or not isinstance(getattr(source, "weight", None), nn.Parameter):
        raise ValueError(
            f"parallel.tp = {size}: {name} is a {kind.__name__} with a forward of its own, which a parallel layer "
            "would not repeat; legal: nn.Linear, nn.Embedding and Conv1D as they are"
        )


def on_first_input(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A forward pre-hook that changes a module's first argument, which may be given as `hidden_states`."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return hook


def tell_share(region: Any, size: int) -> None:
    """Attributes in which transformers' attention modules keep sizes that are now a rank's own."""
    if hasattr(region, "split_size"):  # GPT-2: the width of q, k and v each
        region.split_size //= size
    if hasattr(region, "num_key_value_groups"):  # query heads that share a key/value head here
        region.num_key_value_groups = region.q_proj.weight.shape[0] // region.k_proj.weight.shape[0]


def even(size: int, ranks: int) -> Ranges:
    """`size` over the ranks, parts that differ by at most one. Raises ValueError when some would have none."""
    if size < ranks:
        raise ValueError(f"parallel.tp = {ranks}: {size} features cannot be cut for so many ranks")
    stops = [sum(split_sizes(size, ranks)[: rank + 1]) for rank in range(ranks)]
    return tuple(((stop - length, stop),) for stop, length in zip(stops, split_sizes(size, ranks), strict=True))
