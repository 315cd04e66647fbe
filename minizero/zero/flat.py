"""One flat buffer behind the parameters of a unit, and the shard of it that this rank keeps.

All stages use the same layout; a stage only decides what stays allocated between uses.

Glossary (N = data-parallel ranks, S = shard elements, dtype in brackets):
    flat     [N * S] (compute)       every parameter is a view into it while the unit is whole. At stage 3 its
                                     *storage* is emptied between uses and filled again in place, because autograd
                                     keeps views of it (a linear layer saves its transposed weight)
    shard    [S]     (compute)       the part this rank keeps: a view of `flat`, or its own tensor at stage 3
    master   [S] or [N * S] (fp32)   what the optimizer updates: `shard` itself where that is fp32 (or fp64) already,
                                     else a wider copy. Whole at stage 0, where no optimizer state is sharded
    grad     [S] or [N * S] (accumulation dtype)  the reduced gradient; lives from the first reduction to the step
    nan      []      (compute)       what a parameter points at, expanded to its shape, while it is sharded: a stray
                                     read is NaN, a write raises, and no memory is held
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from minizero.dist.layout import PipelineLayout, TensorLayout
from minizero.dist.sharding import FlatLayout, Span
from minizero.zero.policy import Policy


class FlatGroup:
    """The parameters of one unit that share dtype, trainability, and how tensor and pipeline parallelism share them.

    Attributes:
        counts: whether this rank's squares enter the global norm: of copies on several ranks, only the first's do.
        sums_over: the tensor-parallel ranks whose gradients are parts of one sum. ties: the pipeline ranks.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        rank: int,
        world: int,
        device: torch.device,
        policy: Policy,
        tensor: TensorLayout | None = None,
        pipeline: PipelineLayout | None = None,
    ) -> None:
        self.names = tuple(parameters)
        self.parameters = tuple(parameters.values())
        self.rank = rank
        self.trainable = self.parameters[0].requires_grad
        self.dtype = policy.dtype_of(self.parameters[0].dtype)
        self.layout = FlatLayout(tuple(p.numel() for p in self.parameters), world)
        self.accumulation_dtype = policy.accumulation_of(self.dtype)
        self.reduce_dtype = policy.reduce_dtype or self.dtype
        self.frees_whole = policy.shards_parameters and world > 1
        self.owned_ranks = (rank,) if policy.shards_optimizer else tuple(range(world))
        self.grad: Tensor | None = None
        self.is_published = False  # what computes has the updated masters already
        self.counts = True
        self.sums_over: tuple[int, ...] = (0,)
        if tensor is not None:
            self.counts = tensor.copies(self.parameters[0])[0] == tensor.comm.rank
            self.sums_over = tensor.sums_over(self.parameters[0])
        self.ties: tuple[int, ...] = (0,)
        if pipeline is not None:
            self.ties = pipeline.ranks_of(self.parameters[0])
            self.counts &= self.ties[0] == pipeline.comm.rank
        self.nothing = float("nan") if self.dtype.is_floating_point else 0
        self.nan = torch.full((), self.nothing, dtype=self.dtype, device=device)
        self._allocate(device, policy)

    def _allocate(self, device: torch.device, policy: Policy) -> None:
        size = self.layout.shard_size
        self.flat = torch.zeros(self.layout.padded_size, dtype=self.dtype, device=device)
        self.shard = self.flat[self.rank * size : (self.rank + 1) * size]
        self._views = tuple(
            self.flat[offset : offset + p.numel()].view(p.shape)
            for offset, p in zip(self.layout.offsets, self.parameters, strict=True)
        )
        if self.frees_whole:
            self.shard = host_tensor(self.shard) if policy.offload_parameters else self.shard.clone()
            self._empty_storage()
        self.master: Tensor | None = None
        if self.trainable:
            owned = self.shard if policy.shards_optimizer else self.flat
            wide = torch.promote_types(self.dtype, torch.float32)
            if policy.offload_optimizer:
                self.master = host_tensor(owned, dtype=wide)
            else:
                self.master = owned if self.dtype == wide else owned.to(wide)

    # ---- values in and out ----

    def load(self, index: int, value: Tensor) -> None:
        """Take `value` (whole, any float dtype) as the value of parameter `index`, master included."""
        value_flat = value.detach().reshape(-1)
        for start, stop in self.needed(index):
            self.load_range(index, start, value_flat[start:stop])

    def values(self) -> list[Tensor]:
        """Every tensor that holds this rank's values, before any is gathered."""
        held = self.shard if self.frees_whole else self.flat
        apart = self.master is not None and self.master.untyped_storage()._cdata != held.untyped_storage()._cdata
        return [held, self.master] if apart and self.master is not None else [held]

    def needed(self, index: int) -> list[tuple[int, int]]:
        """Which elements [start, stop) of the flattened parameter this rank keeps any copy of."""
        if not self.frees_whole:
            return [(0, self.layout.sizes[index])]
        return [(span.start, span.stop) for span in self._spans(self.rank, index)]

    def load_range(self, index: int, start: int, values: Tensor) -> None:
        """Take `values` as the elements from `start` of flattened parameter `index`: one range of `needed`."""
        if not self.frees_whole:
            offset = self.layout.offsets[index] + start
            self.flat[offset : offset + values.numel()].copy_(values)
        else:
            for span in self._spans(self.rank, index):
                copy_overlap(self.shard[span.offset : span.offset + span.numel], span.start, values, start)
        for (_, span), target in zip(self.owned_spans(), self.master_views(), strict=True):
            if span.index == index:
                copy_overlap(target, span.start, values, start)

    def _spans(self, rank: int, index: int) -> list[Span]:
        return [span for span in self.layout.spans[rank] if span.index == index]

    def owned_spans(self) -> list[tuple[int, Span]]:
        """(rank whose shard it is, span) of everything this rank updates, in flat order."""
        if not self.trainable:
            return []
        return [(rank, span) for rank in self.owned_ranks for span in self.layout.spans[rank]]

    def master_views(self) -> list[Tensor]:
        """1-D views of the master weights, one per owned span."""
        return [] if self.master is None else self._views_of(self.master)

    def grad_views(self) -> list[Tensor]:
        """1-D views of the reduced gradient, one per owned span."""
        return [] if self.grad is None else self._views_of(self.grad)

    def _views_of(self, buffer: Tensor) -> list[Tensor]:
        first = self.owned_ranks[0]
        views = []
        for rank, span in self.owned_spans():
            begin = (rank - first) * self.layout.shard_size + span.offset
            views.append(buffer[begin : begin + span.numel])
        return views

    # ---- gradients ----

    def grad_shard(self) -> Tensor:
        """[S] this rank's part of the reduced gradient, allocated (zeroed, for the padding) on first use."""
        if self.grad is None:
            numel = self.layout.shard_size * len(self.owned_ranks)
            self.grad = torch.zeros(numel, dtype=self.accumulation_dtype, device=self.flat.device)
        if len(self.owned_ranks) == 1:
            return self.grad
        return self.grad[self.rank * self.layout.shard_size : (self.rank + 1) * self.layout.shard_size]

    def publish_master(self) -> int:
        """Copy updated masters back into what computes, where they are not the same memory.

        Returns the bytes that crossed between devices.
        """
        if self.master is None:
            return 0
        target = self._published()
        if target.data_ptr() != self.master.data_ptr() and not self.is_published:
            target.copy_(self.master, non_blocking=True)
        self.is_published = False
        return target.nbytes if target.device != self.master.device else 0

    def _published(self) -> Tensor:
        """[S] or [N * S] (compute): what follows the master."""
        assert self.master is not None
        return self.shard if self.master.numel() == self.shard.numel() else self.flat

    def stretch(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(master, gradient, what follows the master) of owned spans [first, last), as whole stretches.

        The third is None where it is the master itself.
        """
        assert self.master is not None and self.grad is not None
        views = self.master_views()
        begin = views[first].storage_offset() - self.master.storage_offset()
        end = begin + sum(view.numel() for view in views[first:last])
        narrow = self._published()
        same = narrow.data_ptr() == self.master.data_ptr()
        return self.master[begin:end], self.grad[begin:end], None if same else narrow[begin:end]

    # ---- whole and sharded ----

    def fill_own_slice(self) -> Tensor:
        """Give `flat` its memory back, with this rank's slice in place; the caller gathers the other slices."""
        if self.frees_whole:
            self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.itemsize)
            size = self.layout.shard_size
            self.flat[self.rank * size : (self.rank + 1) * size].copy_(self.shard, non_blocking=True)
        return self.flat

    def point_at_whole(self) -> None:
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.data = view

    def point_at_nothing(self) -> None:
        """Free the whole buffer; parameters keep their shape but read as NaN."""
        self.nan.fill_(self.nothing)  # zero_() and fill_() of an expanded tensor do not raise, they write the scalar
        for parameter in self.parameters:
            parameter.data = self.nan.expand(parameter.shape)
        self._empty_storage()

    def _empty_storage(self) -> None:
        self.flat.untyped_storage().resize_(0)


def copy_overlap(target: Tensor, target_start: int, values: Tensor, start: int) -> None:
    """Between parts of one flattened tensor, `target` from `target_start` and `values` from `start`: copy what both
    have."""
    low, high = max(target_start, start), min(target_start + target.numel(), start + values.numel())
    if low < high:
        target[low - target_start : high - target_start].copy_(values[low - start : high - start])


def host_tensor(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of `like` in host memory, pinned where a GPU will read it."""
    host = torch.empty(like.shape, dtype=dtype or like.dtype, device="cpu", pin_memory=torch.cuda.is_available())
    return host.copy_(like)


def group_parameters(
    parameters: dict[str, nn.Parameter], layout: TensorLayout | None, pipeline: PipelineLayout | None = None
) -> list[dict[str, nn.Parameter]]:
    """Split a unit's parameters by (dtype, trainable, which ranks share them), in order of appearance."""
    groups: dict[Hashable, dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        shared = layout is not None and (layout.copies(parameter), layout.sums_over(parameter))
        tied = pipeline is not None and pipeline.ranks_of(parameter)
        groups.setdefault((parameter.dtype, parameter.requires_grad, shared, tied), {})[name] = parameter
    return list(groups.values())


def total_bytes(tensors: Sequence[Tensor | None]) -> int:
    """Bytes of memory behind `tensors`, storages counted once and emptied ones as nothing."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())
