"""ZeRO around one model: its units, and what drives them in forward and backward.

All stages run this same code (Rajbhandari et al., "ZeRO", arXiv 1910.02054). What differs is decided once, in `Policy`:

    stage 0   gradients are reduce-scattered and gathered again; every rank updates everything
    stage 1   gradients stay whole until the boundary; each rank updates its shard; parameters are gathered
    stage 2   gradients are reduced into shards as each unit finishes backward
    stage 3   parameters too are kept as shards, and gathered per unit around each use
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minizero.dist.collectives import Communicator, sum_in_order
from minizero.dist.layout import PipelineLayout, TensorLayout
from minizero.dist.sharding import TensorShard
from minizero.zero.flat import FlatGroup, total_bytes
from minizero.zero.gather import ParameterGatherer
from minizero.zero.graph import edges_behind, leaves_of
from minizero.zero.materialize import initial_values, move_off_meta
from minizero.zero.policy import Policy
from minizero.zero.reduce import GradientReducer
from minizero.zero.unit import Unit
from minizero.zero.units import find_units

# Finds the runtime of a model for `unsharded(model)` and `GatheredParameters(params)`, which DeepSpeed's users call
# without an engine at hand. Both ends are weak: a table is no reason for a model to stay.
RUNTIMES: WeakKeyDictionary[nn.Module, ref[ZeroRuntime]] = WeakKeyDictionary()


def runtime_of(model: nn.Module) -> ZeroRuntime | None:
    """The runtime that shards `model`, if one does."""
    found = RUNTIMES.get(model)
    return found() if found is not None else None


class ZeroRuntime:
    """Shards `model` over `comm` in place.

    Args:
        model: any module; parameters on meta are initialized here, others are taken from the axis' rank 0.
        comm: the data-parallel axis.
        policy: stage, dtypes, overlap.
        seed: of the initialization of meta parameters.
        tensor: what tensor parallelism did to the model, where it did. pipeline: what is left of it to this stage.
        filled_later: leave meta parameters at zero, since whoever makes the engine reads their values from files.

    Raises ValueError when the model has no trainable parameter (a stage of it may have none), one that cannot be
    initialized, or an engine already.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        policy: Policy,
        device: torch.device,
        seed: int = 0,
        tensor: TensorLayout | None = None,
        pipeline: PipelineLayout | None = None,
        filled_later: bool = False,
    ) -> None:
        if pipeline is None and not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"{type(model).__name__} has no trainable parameter")
        if runtime_of(model) is not None:
            raise ValueError(f"this {type(model).__name__} has an engine already; engine.destroy() sets it free")
        self.model = model
        self.comm = comm
        self.policy = policy
        self.device = device
        self.replaced = move_off_meta(model, device)  # optimizers may still hold the parameters of the meta device
        uninitialized = set(self.replaced.values())
        self.tensor = tensor
        if tensor is not None:
            tensor.replace(self.replaced)
            self.replaced |= tensor.parts  # optimizers may hold the whole ones too
        self.pipeline = pipeline
        if pipeline is not None:
            pipeline.replace(self.replaced)
        tied = set(pipeline.ties) if pipeline is not None else set()
        self.units = [Unit(spec, comm, device, policy, tensor, pipeline) for spec in find_units(model, tied)]
        self._load(uninitialized, seed, filled_later)
        self.gatherer: ParameterGatherer | None = None
        self.reducer = GradientReducer(self.units, policy, self._unit_done, self._before_reduce)
        if policy.shards_parameters and comm.size > 1:
            self.gatherer = ParameterGatherer(
                self.units,
                comm,
                prefetch=policy.prefetch and not comm.check,  # checks need one order of gathers and reductions
                watch_reads=policy.watch_reads,
                on_order=self.reducer.set_forward_order,
            )
        self._guards = list(self._guard_state_dict())
        RUNTIMES[model] = ref(self)

    @property
    def groups(self) -> list[FlatGroup]:
        return [group for unit in self.units for group in unit.groups]

    def locate(self) -> dict[nn.Parameter, tuple[Unit, FlatGroup, int]]:
        """Parameter -> (unit, group, index in the group)."""
        return {
            parameter: (unit, group, index)
            for unit in self.units
            for group in unit.groups
            for index, parameter in enumerate(group.parameters)
        }

    def _load(self, uninitialized: set[nn.Parameter], seed: int, filled_later: bool) -> None:
        places = self.locate()
        initializers = self.tensor.initializers if self.tensor is not None else {}
        drawn = set() if filled_later else uninitialized
        for parameter, value in initial_values(self.model, drawn, self.device, seed, initializers):
            _, group, index = places[parameter]
            group.load(index, value if self.tensor is None else self.tensor.shard(parameter).cut(value))
        for parameter, (unit, group, index) in places.items():
            if parameter not in uninitialized:
                value = parameter.detach().contiguous()
                self.comm.broadcast(value, 0, unit.name)
                group.load(index, value)
                parameter.data = group.nan.expand(parameter.shape)
        self._agree_on_ties()
        for unit in self.units:
            unit.finish_loading()

    def _agree_on_ties(self) -> None:
        """Parameters that several pipeline stages use begin as the first of those ranks has them."""
        if self.pipeline is None:
            return
        for group in (group for group in self.groups if len(group.ties) > 1):
            for values in group.values():
                first = group.ties[0] == self.pipeline.comm.rank
                own = values if first else torch.zeros_like(values)
                values.copy_(self.pipeline.comm.sum_among(group.ties, own, f"{', '.join(group.names)}, tied"))

    # ---- backward ----

    def begin_backward(self, loss: Tensor, *, boundary: bool, sync: bool) -> None:
        edges = edges_behind(loss)
        self.reducer.begin(leaves_of(edges), boundary=boundary, sync=sync)
        if self.gatherer is not None:
            self.gatherer.begin_backward(edges)

    def end_backward(self) -> None:
        self.reducer.end()
        if self.gatherer is not None:
            self.gatherer.end_backward()

    def unwind(self) -> None:
        """A forward broke off: back to rest. The gradients of finished backwards stay."""
        if self.gatherer is not None:
            self.gatherer.unwind()

    def abort(self) -> None:
        """A backward broke off: back to rest, gradients of the window dropped."""
        self.reducer.abort()
        self.unwind()
        self.drop_gradients()

    def _unit_done(self, unit: Unit) -> None:
        if self.gatherer is not None:
            self.gatherer.release_if_done(unit)

    def _before_reduce(self, unit: Unit) -> None:
        if self.gatherer is not None:
            self.gatherer.join_gathers_up_to(unit)

    # ---- a pipeline's step (`parallel.pipeline.executor.Storage`) ----

    def whole(self, modules: Sequence[nn.Module] | None) -> AbstractContextManager[None]:
        """Whole parameters of `modules` and of the root unit, or of the model, inside; collective."""
        if self.gatherer is None:
            return nullcontext()
        return self.gatherer.whole(self.units if modules is None else [self.units[0], *self._units_of(modules)])

    def reduce_early(self, modules: Sequence[nn.Module]) -> None:
        """Start to reduce the units that are made of `modules`, whose gradients are complete; collective."""
        self.reducer.reduce_early(set(self._units_of(modules)))

    def _units_of(self, modules: Sequence[nn.Module]) -> list[Unit]:
        inside = {part for module in modules for part in module.modules()}
        return [unit for unit in self.units[1:] if unit.module in inside]

    # ---- step ----

    def finish_gradients(self) -> None:
        """Reduced gradients of everything, wherever the last backward left them."""
        self.reducer.flush(everything=self.pipeline is not None)
        self._sum_over_tensor_axis()
        self._sum_over_stages()
        if not self.policy.shards_optimizer:
            for unit in self.units:
                unit.spread_gradients()
            for unit in self.units:
                unit.finish_refresh()

    def _sum_over_tensor_axis(self) -> None:
        """Complete the gradients of which tensor-parallel ranks have a part each (copies, sequence parallel)."""
        if self.tensor is None or self.tensor.comm.size == 1:
            return
        comm = self.tensor.comm
        for unit in self.units:
            for group in unit.groups:
                if group.trainable and len(group.sums_over) > 1:
                    rows = comm.gather_rows(group.grad_shard(), f"{unit.name}, parts of gradients")
                    group.grad_shard().copy_(sum_in_order([rows[rank] for rank in group.sums_over]))

    def _sum_over_stages(self) -> None:
        """Complete the gradients of parameters that several pipeline stages use (tied embeddings)."""
        if self.pipeline is None:
            return
        for unit in self.units:
            for group in unit.groups:
                if group.trainable and len(group.ties) > 1:
                    shard = group.grad_shard()
                    shard.copy_(self.pipeline.comm.sum_among(group.ties, shard, f"{', '.join(group.names)}, tied"))

    def refresh(self) -> int:
        """After the optimizer: parameters follow their masters. Returns the bytes that crossed between devices."""
        if self.gatherer is not None:
            self.gatherer.unwind()
            self.gatherer.forget_graphs()
        moved = sum(unit.refresh() for unit in self.units)
        for unit in self.units:
            unit.finish_refresh()
        self.comm.settle()  # a rank that ends after its last step must not take away what others still read
        return moved

    def drop_gradients(self) -> None:
        for unit in self.units:
            unit.drop_gradients()

    @property
    def has_local_gradients(self) -> bool:
        """Whether any parameter holds a gradient that was not reduced."""
        return any(unit.has_local_gradients for unit in self.units)

    def detach(self) -> None:
        """Take the hooks off the model. Below stage 3 it may then be given to another engine."""
        for handle in [*self.reducer.hooks, *self._guards, *(self.gatherer.hooks if self.gatherer else [])]:
            handle.remove()
        self.drop_gradients()
        if self.gatherer is None:
            RUNTIMES.pop(self.model, None)

    # ---- whole parameters ----

    def unsharded(self) -> AbstractContextManager[None]:
        """Whole parameters inside, on every rank; collective."""
        return self.whole(None)

    @contextmanager
    def modified(self, source: int | None) -> Iterator[None]:
        """Whole parameters inside; afterwards the values that dp rank `source` left there replace the old ones."""
        with self.unsharded():
            yield
            if source is not None:
                for parameter, (unit, group, index) in self.locate().items():
                    value = parameter.detach().contiguous()
                    self.comm.broadcast(value, source, unit.name)
                    parameter.detach().copy_(value)
                    group.load(index, value)

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole value in compute dtype), one unit in memory at a time; collective. Copy what you keep."""
        for unit in self.units:
            was_sharded = unit.frees_whole and (self.gatherer is None or not self.gatherer.suspended)
            unit.make_whole()
            for group in unit.groups:
                for name, parameter in zip(group.names, group.parameters, strict=True):
                    value = parameter.detach()
                    yield name, value if self.tensor is None else self.tensor.whole(parameter, value, unit.name)
            if was_sharded:
                unit.release()
        self.comm.settle()

    def _guard_state_dict(self) -> Iterator[RemovableHandle]:
        def refuse(module: nn.Module, prefix: str, keep_vars: bool) -> None:
            if self.gatherer is not None and any(unit.state.name != "WHOLE" for unit in self.units):
                raise RuntimeError(
                    "state_dict() of a model whose parameters are sharded (ZeRO stage 3) would save NaN. Use "
                    "engine.save_checkpoint(dir), engine.save_16bit_model(dir), or `with minizero.unsharded(model):`"
                )

        for module in self.model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                yield module.register_state_dict_pre_hook(refuse)

    # ---- what is held where ----

    def shard_of(self, parameter: nn.Parameter) -> TensorShard:
        """What tensor parallelism leaves to this rank of `parameter`."""
        if self.tensor is not None:
            return self.tensor.shard(parameter)
        return TensorShard(tuple(parameter.shape), -1, ((),), 0)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held now: parameters (shards, whole buffers, wide masters) and gradients (reduced, and whole)."""
        groups = self.groups
        parameters = total_bytes([t for group in groups for t in (group.flat, group.shard)])
        masters = total_bytes([t for group in groups for t in (group.flat, group.shard, group.master)]) - parameters
        gradients = [group.grad for group in groups] + [p.grad for p in self.model.parameters()]
        local = [tensor for unit in self.units for tensor in unit.local_gradients]
        return {"parameters": parameters, "masters": masters, "gradients": total_bytes([*gradients, *local])}
