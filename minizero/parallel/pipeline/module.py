"""Sequential models for a pipeline: a list of layers, built where they belong.

    net = minizero.PipelineModule(
        layers=[TiedLayerSpec("embed", Embedding, 50257, 768), *[LayerSpec(Block, 768) for _ in range(12)], ...],
        num_stages=4,
        loss_fn=cross_entropy,
    )

These are DeepSpeed's names. What one layer returns, a tensor or a tuple of tensors, is the next one's only argument. A
`LayerSpec` is a layer that is not built yet. On every rank it first becomes a module on the meta device, so that
parameters can be counted and given to an optimizer; `minizero.initialize` then builds those of the rank's own stages.
Each layer is built under a seed of its own, so its initial values do not depend on which others are.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from minizero.parallel.pipeline.actions import Placement
from minizero.parallel.pipeline.partition import METHODS, balanced, flops_of, matching, parameters_of, uniform
from minizero.parallel.pipeline.stage import ChunkEnd, Received, Ties, refuse_uses_of
from minizero.utils.seeds import module_seed


class LayerSpec:
    """`typename(*args, **kwargs)`, to be built later."""

    def __init__(self, typename: type[nn.Module], *args: Any, **kwargs: Any) -> None:
        if not (isinstance(typename, type) and issubclass(typename, nn.Module)):
            raise ValueError(f"LayerSpec({typename!r}): legal is a class of modules, then its arguments")
        self.typename, self.args, self.kwargs = typename, args, kwargs

    def build(self) -> nn.Module:
        """A new module."""
        return self.typename(*self.args, **self.kwargs)

    def built(self, seed: int) -> nn.Module:
        """A new module in host memory, its initial values drawn under `seed`."""
        with torch.random.fork_rng(), torch.device("cpu"):
            torch.manual_seed(seed)
            return self.build()


class TiedLayerSpec(LayerSpec):
    """A layer that several places share: those with equal `key` are one module.

    Args:
        forward_fn: forward_fn(module, input) in the place of module(input): a head that uses an embedding's weight.
        tied_weight_attr: accepted as DeepSpeed has it; all parameters of the module are shared.
    """

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *args: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        tied_weight_attr: str | Sequence[str] = "weight",
        **kwargs: Any,
    ) -> None:
        super().__init__(typename, *args, **kwargs)
        self.key, self.forward_fn = key, forward_fn
        self.tied_weight_attr = [tied_weight_attr] if isinstance(tied_weight_attr, str) else [*tied_weight_attr]


class Elsewhere(nn.Module):
    """In the place of a layer of another stage, or of one that holds no parameters of its own.

    Attributes:
        stands_for: the class of the layer, for who counts what repeats.
    """

    def __init__(self, stands_for: type) -> None:
        super().__init__()
        self.stands_for = stands_for


class PipelineModule(nn.Module):
    """Layers one after the other, and a loss.

    Args:
        layers: modules, `LayerSpec`s, or functions of one argument.
        num_stages: the pipeline degree; None leaves it to `parallel.pp`.
        loss_fn: loss_fn(output, labels), 0-d mean loss or a pair (sum, count); None: the model returns its output.
        partition_method: uniform, parameters, flops, measured (a forward and backward of each layer on
            `example_input` is timed) or type:REGEX (layers whose class name matches are shared out evenly).
        example_input: what the first layer is given, for measured.

    A batch is a pair (inputs, labels). Raises ValueError for an unknown method or a list without layers.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module | LayerSpec | Callable[[Any], Any]],
        num_stages: int | None = None,
        loss_fn: Callable[[Any, Any], Any] | None = None,
        partition_method: str = "parameters",
        example_input: Any = None,
    ) -> None:
        super().__init__()
        self.specs: list[Any] = [*layers]  # None: on another stage
        if not self.specs:
            raise ValueError("PipelineModule: layers is empty")
        if num_stages is not None and num_stages < 1:
            raise ValueError(f"PipelineModule: num_stages = {num_stages}: must be at least 1")
        if partition_method not in METHODS and not partition_method.startswith("type:"):
            raise ValueError(f"PipelineModule: partition_method = {partition_method!r}; legal: {METHODS}")
        if partition_method == "measured" and example_input is None:
            raise ValueError("PipelineModule: partition_method = 'measured' needs an example_input")
        self.num_stages, self.loss_fn = num_stages, loss_fn
        self.partition_method, self.example_input = partition_method, example_input
        self.tied = nn.ModuleDict()
        self.layers = nn.ModuleList()
        self.parts: list[range] = [range(len(self.specs))]  # the layers of each virtual stage
        self.running: tuple[int, Any] = 0, None  # virtual stage, and what was received
        self.is_cut = False
        self._built: set[str] = set()  # names of the layers that were given memory
        with torch.device("meta"):
            for spec in self.specs:
                self._add(spec)

    def _add(self, spec: Any) -> None:
        if isinstance(spec, TiedLayerSpec):
            if spec.key not in self.tied:
                self.tied[spec.key] = spec.build()
            missing = [name for name in spec.tied_weight_attr if not hasattr(self.tied[spec.key], name)]
            if missing:
                raise ValueError(f"TiedLayerSpec({spec.key!r}): {spec.typename.__name__} has no {', '.join(missing)}")
            self.layers.append(Elsewhere(spec.typename))
        elif isinstance(spec, LayerSpec):
            self.layers.append(spec.build())
        elif isinstance(spec, nn.Module):
            self.layers.append(spec)
        elif callable(spec):
            self.layers.append(Elsewhere(type(spec)))
        else:
            raise ValueError(
                f"PipelineModule: a layer is a {type(spec).__name__}; legal: modules, LayerSpecs, functions"
            )

    # ---- computing ----

    def forward(self, inputs: Any, labels: Any = None) -> Any:
        """The running stage's layers; the loss where they are the last, and the model has one and was given labels.

        Raises RuntimeError when they are a part of the model and no engine runs it.
        """
        stage, received = self.running
        if self.is_cut and stage < 0:
            raise RuntimeError(
                "this PipelineModule is cut over ranks: call engine.train_batch, eval_batch or infer, on every rank"
            )
        x = inputs if stage == 0 else received
        for place in self.parts[stage]:
            x = self._layer(place)(x)
        if stage < len(self.parts) - 1:
            raise ChunkEnd(x)  # hooks on this module see what the model returns, not what passes inside
        return x if self.loss_fn is None or labels is None else self.loss_fn(x, labels)

    def _layer(self, place: int, built: nn.Module | None = None) -> Callable[[Any], Any]:
        """What layer `place` does; with `built` in the place of its module."""
        spec, module = self.specs[place], built or self._module(place)
        if module is None:
            return spec
        forward_fn = getattr(spec, "forward_fn", None)
        return module if forward_fn is None else partial(forward_fn, module)

    # ---- building ----

    def build(self, places: Iterable[int] | None = None, seed: int = 0) -> dict[nn.Parameter, nn.Parameter]:
        """Give the specs at `places` (None: all) memory and initial values; returns new parameters by those of meta."""
        replaced: dict[nn.Parameter, nn.Parameter] = {}
        for place in range(len(self.specs)) if places is None else places:
            spec = self.specs[place]
            if not isinstance(spec, LayerSpec):
                continue
            name = f"tied.{spec.key}" if isinstance(spec, TiedLayerSpec) else f"layers.{place}"
            if name not in self._built:
                self._built.add(name)
                replaced |= fill(self.get_submodule(name), self._first_of(spec).built(module_seed(seed, name)))
        return replaced

    def _first_of(self, spec: LayerSpec) -> LayerSpec:
        """The spec that says how a shared module is built."""
        if not isinstance(spec, TiedLayerSpec):
            return spec
        return next(s for s in self.specs if isinstance(s, TiedLayerSpec) and s.key == spec.key)

    def cut(self, stages: int, agree: Callable[[list[float]], list[float]] = list) -> list[range]:
        """The layers of each of `stages` virtual stages; `agree` makes what was measured the same on all ranks.

        Raises ValueError when there are fewer layers than stages.
        """
        count, method = len(self.specs), self.partition_method
        if count < stages:
            raise ValueError(
                f"parallel.pp: {count} layers are fewer than the {stages} stages (ranks x chunks per rank) of the "
                f"schedule; legal: at most {count} stages"
            )
        if method == "uniform":
            return uniform(count, stages)
        modules = [self._module(place) for place in range(count)]
        if method == "measured":
            return balanced(agree(self.measured()), stages)
        if method.startswith("type:"):
            return balanced(matching([self._class(place) for place in range(count)], method[len("type:") :]), stages)
        measure = parameters_of if method == "parameters" else flops_of
        return balanced([0.0 if module is None else measure(module) for module in modules], stages)

    def measured(self) -> list[float]:
        """Seconds of each layer's forward and backward on the example: the shorter of two."""
        seconds, x = [], self.example_input
        for place in range(len(self.specs)):
            spec = self.specs[place]
            own = copy.deepcopy(spec) if isinstance(spec, nn.Module) else None  # gradients and buffers stay as they are
            layer = self._layer(place, spec.build() if isinstance(spec, LayerSpec) else own)
            times = []
            for _ in range(3):
                began = time.perf_counter()
                given = tree_map(as_leaf, x)
                out = layer(given)
                ends = [t for t in (out if isinstance(out, tuple | list) else (out,)) if needs_gradient(t)]
                if ends:
                    torch.autograd.backward(ends, [torch.ones_like(t) for t in ends])
                times.append(time.perf_counter() - began)
            seconds.append(min(times[1:]))
            x = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, out)
        return seconds

    def _module(self, place: int) -> nn.Module | None:
        spec = self.specs[place]
        if isinstance(spec, TiedLayerSpec):
            return self.tied[spec.key]
        return self.layers[place] if isinstance(spec, LayerSpec | nn.Module) else None

    def _class(self, place: int) -> str:
        spec = self.specs[place]
        return spec.typename.__name__ if isinstance(spec, LayerSpec) else type(spec).__name__


class LayerStage:
    """This rank's chunks of a `PipelineModule`, which is cut and built in place; see `stage.Stage`.

    Args:
        rank: along the pipeline axis. placement: virtual stage -> (rank, chunk). seed: of initial values.
        agree: as in `PipelineModule.cut`.

    Attributes:
        ties, removed: as in `stage.StagedModel`. replaced: built parameters by those of the meta device.
    """

    def __init__(
        self,
        model: PipelineModule,
        rank: int,
        placement: Placement,
        seed: int,
        agree: Callable[[list[float]], list[float]] = list,
    ) -> None:
        self.model, self.rank, self.placement = model, rank, placement
        before = set(model.parameters())
        model.parts = model.cut(len(placement), agree)
        rank_of = {place: placement[stage][0] for stage, part in enumerate(model.parts) for place in part}
        users: dict[nn.Parameter, set[int]] = {}
        for place, owner in rank_of.items():
            module = model._module(place)
            for parameter in module.parameters() if module is not None else ():
                users.setdefault(parameter, set()).add(owner)
        if isinstance(model.loss_fn, nn.Module):  # the last layer's
            last = rank_of[len(rank_of) - 1]
            for parameter in model.loss_fn.parameters():
                users.setdefault(parameter, set()).add(last)
            if rank != last:
                model.loss_fn = None
        mine = [place for place, owner in rank_of.items() if owner == rank]
        keys = {spec.key for place in mine if isinstance(spec := model.specs[place], TiedLayerSpec)}
        refuse_shared_objects(model, rank_of)
        for place in rank_of:
            if place not in mine:
                model.layers[place] = Elsewhere(type(model.layers[place]))
                if not isinstance(model.specs[place], TiedLayerSpec):
                    model.specs[place] = None
        for key in [key for key in model.tied if key not in keys]:
            del model.tied[key]
        self.replaced = model.build(mine, seed)
        self.ties: Ties = {
            self.replaced.get(p, p): tuple(sorted(ranks)) for p, ranks in users.items() if len(ranks) > 1
        }
        here = set(model.parameters())
        self.removed = {p for p in before if self.replaced.get(p, p) not in here}
        refuse_uses_of(self.removed)
        model.is_cut, model.running = True, (-1, None)

    def run(self, chunk: int, received: Received, call: Callable[[], Any]) -> Any:
        """See `stage.Stage.run`."""
        self.model.running = self.placement.index((self.rank, chunk)), received
        try:
            return call()
        except ChunkEnd as end:
            return end.output
        finally:
            self.model.running = -1, None

    def modules_of(self, chunk: int) -> list[nn.Module]:
        """See `stage.Stage.modules_of`."""
        part = self.model.parts[self.placement.index((self.rank, chunk))]
        found = [module for place in part if (module := self.model._module(place)) is not None]
        is_last = part.stop == len(self.model.specs)
        return [*found, self.model.loss_fn] if is_last and isinstance(self.model.loss_fn, nn.Module) else found

    def has(self, name: str) -> bool:
        """See `stage.Stage.has`."""
        return any(name == here for here, _ in self.model.named_modules())


def fill(layer: nn.Module, built: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Give `layer`, of the meta device, the tensors of its twin `built`; returns new parameters by the old ones.

    Hooks, and whatever else was done to the layer, stay; so does which parameters train.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for old, new in zip(layer.modules(), built.modules(), strict=True):
        for name, parameter in new._parameters.items():
            before = old._parameters[name]
            if parameter is not None and before is not None:
                parameter.requires_grad_(before.requires_grad)
                old._parameters[name] = replaced.setdefault(before, parameter)
        old._buffers.update(new._buffers)
        for name, value in vars(new).items():
            if not name.startswith("_") and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                vars(old)[name] = value
    return replaced


def refuse_shared_objects(model: PipelineModule, rank_of: dict[int, int]) -> None:
    """Raise ValueError when one module object was given as layers of two ranks."""
    first: dict[int, int] = {}
    for place, rank in rank_of.items():
        spec = model.specs[place]
        if isinstance(spec, nn.Module) and rank_of[first.setdefault(id(spec), place)] != rank:
            raise ValueError(
                f"PipelineModule: layers {first[id(spec)]} and {place} are one {type(spec).__name__} on two stages; "
                "legal: a TiedLayerSpec"
            )


def as_leaf(leaf: Any) -> Any:
    """A tensor cut off from its graph, differentiable where it can be."""
    return leaf.detach().requires_grad_(leaf.is_floating_point()) if isinstance(leaf, Tensor) else leaf


def needs_gradient(value: Any) -> bool:
    """Whether backward may begin at `value`."""
    return isinstance(value, Tensor) and value.requires_grad
