"""A rank's part of a model: one or more chunks of its layers, each of which runs on its own.

`StagedModel` cuts a decoder, ours or one of transformers', that knows nothing of pipelines. Its modules are in an
order: what comes before the blocks (embeddings), the blocks, what comes after them (norm, head). What belongs to other
ranks is taken out, and an `Absent` stands in its place, so names stay as they are. A chunk runs as the model's own
forward, on the whole batch, and the absent modules make it a part:

    before the chunk   an absent embedding gives zeros of the right shape, from which the model makes its masks
                       and rotary tables; an absent block passes its input on; the last one before the chunk gives what
                       was received
    after the chunk    the first absent module ends the forward: its input is the chunk's output

So nothing of the model's own code is copied or assumed but this: hidden states go through the modules in their order,
as first arguments, each block getting the very tensor that the one before it returned (which is checked), and nothing
else that depends on weights goes from one to a later one.

Shape suffixes: B batch, S sequence, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minizero.parallel.foreign import foreign_decoders, is_foreign, without_cache
from minizero.parallel.pipeline.actions import Placement
from minizero.parallel.pipeline.partition import balanced, flops_of, parameters_of, uniform
from minizero.parallel.random import draw_from
from minizero.utils.forward import running
from minizero.utils.undo import Removable

SIDE_OUTPUTS = ("output_router_logits", "output_hidden_states", "output_attentions")
"""What transformers' models may collect from all their layers."""
GPT2_ORDER = ("transformer.wte", "transformer.wpe", "transformer.drop", "transformer.h", "transformer.ln_f")
"""transformers has none for it."""
Ties = dict[nn.Parameter, tuple[int, ...]]
"""Parameter -> the ranks that use it, where there are several."""
Received = Tensor | tuple[Tensor | None, ...] | None
"""What the stage before passed on, as it returned it; None: there is none before."""


class Stage(Protocol):
    """What the executor needs of a rank's part.

    Attributes:
        placement: virtual stage -> (rank, chunk).
    """

    placement: Placement

    def run(self, chunk: int, received: Received, call: Callable[[], Any]) -> Any:
        """What `chunk` makes of what was received (None: it is the model's first).

        `call` calls the whole model on the microbatch's batch. Returns the model's own output from the last virtual
        stage, else a tensor, or a tuple of tensors and Nones, to pass on.
        """
        ...

    def modules_of(self, chunk: int) -> list[nn.Module]:
        """The outermost modules that belong to `chunk`."""
        ...

    def has(self, name: str) -> bool:
        """Whether the module that was called `name` in the whole model is here."""
        ...


@dataclass(frozen=True)
class Piece:
    """One module of the order: its name, where it hangs, and which virtual stage has it."""

    name: str
    parent: nn.Module
    key: str
    stage: int


class ChunkEnd(Exception):
    """Ends a forward where its chunk does; holds the chunk's output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Absent(nn.Module):
    """In the place of a module that other ranks have, or another chunk of this one; with its plain attributes.

    Attributes:
        place: in the order. stands_for: the class of the module, for who counts what repeats.
    """

    def __init__(self, owner: StagedModel, place: int, module: nn.Module) -> None:
        super().__init__()
        plain = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str)}
        self.__dict__.update(plain)  # a model may ask an embedding for its size, or a block for its kind of attention
        self.place, self.stands_for = place, type(module)
        if isinstance(weight := getattr(module, "weight", None), Tensor):  # or for its dtype and shape
            self.weight = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
        self._meet = owner.meet

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._meet(self, args[0] if args else next(iter(kwargs.values())))


class StagedModel:
    """This rank's chunks of `model`, which is cut in place.

    Args:
        rank: along the pipeline axis.
        placement: virtual stage -> (rank, chunk).
        method: how blocks are shared out: uniform, parameters or flops.

    Attributes:
        ties: parameters that several ranks use. removed: parameters that this rank does not have any more.
        sequence: hidden states between the blocks are this rank's part of the sequence.
        undo: what puts settings of the model back.

    Raises ValueError for a model without an order, with fewer blocks than virtual stages, or whose stages share
    parameters in a way that cannot be kept.
    """

    def __init__(self, model: nn.Module, rank: int, placement: Placement, method: str) -> None:
        self.model, self.rank, self.placement = model, rank, placement
        self.sequence = False
        self._running: tuple[int, Received] | None = None  # virtual stage, what was received
        self._passing: Any = None  # what the last module of the order returned
        self.pieces = pieces_of(model, len(placement), method)
        refuse_left_over(model, self.pieces)
        self.undo: list[Removable] = [without_cache(decoder) for _, decoder in foreign_decoders(model)]
        before = dict(model.named_parameters())
        users = ranks_of_parameters(model, self.pieces, placement)
        self.ties: Ties = {p: ranks for p, ranks in users.items() if len(ranks) > 1}
        self._keeps = self._kept_places()
        self._absent = {
            place: Absent(self, place, model.get_submodule(piece.name)) for place, piece in enumerate(self.pieces)
        }
        for place, piece in enumerate(self.pieces):
            if place not in self._keeps:
                piece.parent._modules[piece.key] = self._absent[place]
        here = set(model.parameters())
        self.removed = {p for p in before.values() if p not in here}
        refuse_uses_of(self.removed)
        self.undo += self._watch()
        if is_foreign(model):
            self.undo.append(model.register_forward_pre_hook(refuse_side_outputs, with_kwargs=True))

    def _kept_places(self) -> set[int]:
        """Own pieces, and the first holders of parameters that own pieces share with them.

        A tied weight keeps its name so, and its initial value.
        """
        own = {place for place, piece in enumerate(self.pieces) if self.placement[piece.stage][0] == self.rank}
        held = [set(piece.parent._modules[piece.key].parameters()) for piece in self.pieces]  # type: ignore[union-attr]
        kept = set(own)
        for parameter, ranks in self.ties.items():
            first, *others = (place for place, parameters in enumerate(held) if parameter in parameters)
            if len(held[first]) > 1:
                raise ValueError(
                    f"parallel.pp: {self.pieces[others[-1]].name} shares a parameter with {self.pieces[first].name} on "
                    "another stage, which has others too; legal: shared embeddings, or layers that share on one stage"
                )
            if self.rank in ranks:
                kept.add(first)
        return kept

    # ---- running ----

    def run(self, chunk: int, received: Received, call: Callable[[], Any]) -> Any:
        """See `Stage.run`."""
        stage = self.placement.index((self.rank, chunk))
        with self._only(stage):
            self._running, self._passing = (stage, received), None
            try:
                return call()
            except ChunkEnd as end:
                return end.output
            finally:
                self._running = None

    @contextmanager
    def _only(self, stage: int) -> Iterator[None]:
        """Inside, what does not belong to virtual stage `stage` is absent."""
        others = [place for place in self._keeps if self.pieces[place].stage != stage]
        present = {place: self.pieces[place].parent._modules[self.pieces[place].key] for place in others}
        for place in others:
            self.pieces[place].parent._modules[self.pieces[place].key] = self._absent[place]
        try:
            yield
        finally:
            for place, module in present.items():
                self.pieces[place].parent._modules[self.pieces[place].key] = module

    def meet(self, absent: Absent, given: Any) -> Any:
        """What a forward finds where a module is absent."""
        if self._running is None:
            raise RuntimeError(
                f"{self.pieces[absent.place].name} is on another pipeline stage: call engine.train_batch, "
                "eval_batch or infer, on every rank"
            )
        stage, received = self._running
        if self.pieces[absent.place].stage > stage:
            self._check(absent.place, given)
            raise ChunkEnd(given)
        assert isinstance(received, Tensor), "blocks pass on one tensor"
        hidden = received
        if issubclass(absent.stands_for, nn.Embedding):
            return hidden.new_zeros(*given.shape, hidden.shape[-1])
        last_before = self.pieces[absent.place + 1].stage == stage
        if not last_before:
            return given
        self._passing = hidden
        if self.sequence:
            facts = running()
            assert facts is not None
            facts.length = given.shape[1]
            draw_from("part")
        return hidden

    def _watch(self) -> Iterator[Removable]:
        """Hooks that see that a block gets what the one before it returned, itself: else a cut would change it."""
        blocks = [place for place in range(len(self.pieces)) if self._is_block(place)]
        for place in [*blocks, *(last + 1 for last in blocks[-1:])]:
            if place in self._keeps:
                module = self.model.get_submodule(self.pieces[place].name)
                if place > blocks[0]:
                    yield module.register_forward_pre_hook(
                        partial(self._entered, place), with_kwargs=True, prepend=True
                    )
                if place in blocks:
                    yield module.register_forward_hook(self._left)

    def _is_block(self, place: int) -> bool:
        return isinstance(self.pieces[place].parent, nn.ModuleList)

    def _entered(self, place: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._running is not None:
            self._check(place, args[0] if args else next(iter(kwargs.values())))

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        self._passing = output

    def _check(self, place: int, given: Any) -> None:
        if given is not self._passing:
            raise ValueError(
                f"parallel.pp: {self.pieces[place].name} is not given what {self.pieces[place - 1].name} returned, but "
                "something made of it, which a pipeline cannot cut; legal: models that hand on the tensor itself"
            )

    def modules_of(self, chunk: int) -> list[nn.Module]:
        """See `Stage.modules_of`."""
        stage = self.placement.index((self.rank, chunk))
        found = [piece.parent._modules[piece.key] for piece in self.pieces if piece.stage == stage]
        return [module for module in found if module is not None]

    def has(self, name: str) -> bool:
        """See `Stage.has`."""
        for place, piece in enumerate(self.pieces):
            if name == piece.name or name.startswith(f"{piece.name}."):
                return place in self._keeps
        return True


# ---- the order of a model ----


def order_of(model: Any) -> tuple[str, ...]:
    """Names of the modules that hidden states pass, in order; one of them is the list of blocks.

    Raises ValueError for a model that has no such order.
    """
    if own := getattr(model, "pipeline_order", None):
        return own
    config = getattr(model, "config", None)
    for asked in SIDE_OUTPUTS:
        if getattr(config, asked, False):
            raise ValueError(
                f"parallel.pp: {type(model).__name__} is to give {asked}, of which a stage has its own only"
            )
    if not is_foreign(model) or config is None:
        raise ValueError(
            f"parallel.pp: {type(model).__name__} says nothing of its order; legal: minizero.PipelineModule, a decoder "
            "of minizero or transformers, or a model with `pipeline_order`, the names of its embeddings, list of "
            "blocks, norm and head"
        )
    base = model.base_model_prefix
    plan = getattr(config, "base_model_pp_plan", None) or ()
    inner = GPT2_ORDER if config.model_type == "gpt2" else tuple(f"{base}.{name}" for name in plan)
    if not inner:
        raise ValueError(f"parallel.pp: transformers has no pipeline plan for {type(model).__name__}")
    heads = [name for name, child in model.named_children() if name != base and any(True for _ in child.parameters())]
    return (*inner, *heads)


def pieces_of(model: nn.Module, stages: int, method: str) -> list[Piece]:
    """Every module of the order, blocks one by one, with its virtual stage."""
    names = [*order_of(model)]
    lists = [name for name in names if isinstance(model.get_submodule(name), nn.ModuleList)]
    if len(lists) != 1:
        raise ValueError(f"parallel.pp: the order of {type(model).__name__} has {len(lists)} lists of blocks; legal: 1")
    middle = names.index(lists[0])
    blocks = dict(model.get_submodule(lists[0]).named_children())
    if len(blocks) < stages:
        raise ValueError(
            f"parallel.pp: {len(blocks)} blocks are fewer than the {stages} stages (ranks x chunks per rank) of the "
            f"schedule; legal: at most {len(blocks)} stages"
        )
    ends = [[model.get_submodule(name) for name in part] for part in (names[:middle], names[middle + 1 :])]
    stage_of = {
        block: stage
        for stage, part in enumerate(cut_blocks([*blocks.values()], ends, stages, method))
        for block in part
    }
    whole = [(name, 0) for name in names[:middle]]
    whole += [(f"{lists[0]}.{key}", stage_of[place]) for place, key in enumerate(blocks)]
    whole += [(name, stages - 1) for name in names[middle + 1 :]]
    return [
        Piece(name, model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], stage)
        for name, stage in whole
    ]


def cut_blocks(blocks: list[nn.Module], ends: list[list[nn.Module]], stages: int, method: str) -> list[range]:
    """Which blocks each virtual stage has; with weights, the modules at both ends count with the first and last block.

    Raises ValueError for a method that does not exist, or needs more than a decoder tells.
    """
    if method == "uniform":
        return uniform(len(blocks), stages)
    measure = {"parameters": parameters_of, "flops": flops_of}.get(method)
    if measure is None:
        raise ValueError(f"pipeline.partition = {method!r}: legal for a decoder are uniform, parameters, flops")
    weights = [measure(block) for block in blocks]
    weights[0] += sum(measure(module) for module in ends[0])
    weights[-1] += sum(measure(module) for module in ends[1])
    return balanced(weights, stages)


def refuse_side_outputs(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Raise ValueError when a transformers model is asked for what its layers leave beside their outputs."""
    for asked in SIDE_OUTPUTS:
        if kwargs.get(asked):
            raise ValueError(f"parallel.pp: {asked} is not available: a stage has that of its own layers only")


def refuse_uses_of(removed: set[nn.Parameter]) -> None:
    """Let backward raise where a parameter that another stage has was used here: its gradient would be lost."""

    def refuse(gradient: Tensor) -> None:
        raise RuntimeError(
            "parallel.pp: a parameter of another stage was used here, by a function that holds on to it; legal: "
            "functions of their arguments, and a TiedLayerSpec for what is shared"
        )

    for parameter in removed:
        if parameter.requires_grad:
            parameter.register_hook(refuse)


def refuse_left_over(model: nn.Module, pieces: Sequence[Piece]) -> None:
    """Raise ValueError naming a parameter that no piece of the order has."""
    for name, _ in model.named_parameters():
        if not any(name.startswith(f"{piece.name}.") for piece in pieces):
            raise ValueError(
                f"parallel.pp: {name} is in none of the modules that {type(model).__name__}'s order names: "
                f"{', '.join(dict.fromkeys(piece.name for piece in pieces))}"
            )


def ranks_of_parameters(
    model: nn.Module, pieces: Sequence[Piece], placement: Placement
) -> dict[nn.Parameter, tuple[int, ...]]:
    """Which ranks have a module that uses each parameter."""
    users: dict[nn.Parameter, set[int]] = {}
    for piece in pieces:
        for parameter in model.get_submodule(piece.name).parameters():
            users.setdefault(parameter, set()).add(placement[piece.stage][0])
    return {parameter: tuple(sorted(ranks)) for parameter, ranks in users.items()}
