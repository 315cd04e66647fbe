"""The sharded optimizer step, as named phases: finish reductions, norm, skip or scale, update, gather.

Any element-wise torch optimizer works inside: its param groups are rewritten in place to hold, instead of parameters,
1-D slices of this rank's fp32 masters. Options such as weight decay stay with the slices, and schedulers that were
given the optimizer go on working.

The global norm is one routine for every layout: each rank sums the squares of *its own* slices (rows of 4096 in fp32,
the rows in float64), all ranks gather the sums and add them in rank order; of tensor-parallel copies one counts. The
same exchange carries token counts and losses, so a step has one small collective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minizero.kernels import Backend, grad_norm
from minizero.optim.build import ELEMENT_WISE
from minizero.optim.fused_adamw import FusedAdamW
from minizero.optim.loss_scale import LossScaler
from minizero.utils.warnings import warn_once
from minizero.zero.flat import FlatGroup
from minizero.zero.runtime import ZeroRuntime

NORM_ROW = 4096  # elements summed in fp32 (or wider gradients' dtype) before float64 takes over
MAX_SKIPS = 3  # steps in a row with a loss or gradient that is not finite, once no lower loss scale is left to try


class NonFiniteError(FloatingPointError):
    """Losses or gradients were not finite too often in a row.

    Attributes:
        dp_rank: the first rank, along the axis that ZeRO shards over, where one was not in the last step.
    """

    def __init__(self, message: str, dp_rank: int) -> None:
        super().__init__(message)
        self.dp_rank = dp_rank


@dataclass
class Window:
    """What the micro-batches since the last step add up to, on this rank.

    Attributes:
        loss: sum of the losses: of means, or of token losses.
        tokens: tokens behind those sums; None while losses are means.
        micro_batches: how many there were.
    """

    loss: Tensor | None = None
    tokens: Tensor | None = None
    micro_batches: int = 0

    def add(self, loss: Tensor, tokens: Tensor | None) -> None:
        """Take one micro-batch in. Raises ValueError when means and (sum, count) losses are mixed."""
        if self.micro_batches and (tokens is None) != (self.tokens is None):
            raise ValueError("one accumulation window mixes mean losses with (sum, count) losses; use one kind")
        detached = loss.detach().double()
        self.loss = detached if self.loss is None else self.loss + detached
        if tokens is not None:
            self.tokens = tokens if self.tokens is None else self.tokens + tokens
        self.micro_batches += 1


@dataclass
class StepResult:
    """applied: parameters changed. grad_norm: global, before clipping. loss: mean over the global batch. tokens: its
    size, where losses were given with counts."""

    applied: bool
    grad_norm: float
    loss: float
    tokens: int


@dataclass(frozen=True)
class Total:
    """A window over all ranks.

    Attributes:
        squares: sum of the squares of all gradients; nan where one is not finite. tokens: behind the losses, where
            those were given with counts, `counts_tokens`. losses: their sum, per data-parallel rank.
    """

    squares: float
    tokens: float
    counts_tokens: bool
    losses: list[float]


class ZeroOptimizer(torch.optim.Optimizer):
    """Drives `inner` over this rank's slices.

    Args:
        inner: a torch optimizer over the model's parameters, before its first step; rewritten in place.
        runtime: the model's ZeRO runtime.
        scaler: fp16 loss scaling.
        clip: largest global gradient norm; 0 for none.
        allow_untested: accept an `inner` that is not known to be element-wise.
        kernels: "triton" or "torch", for the norm.
        max_skips: steps in a row that may be skipped because something was not finite, before that is an error.

    Raises ValueError for an optimizer that is not element-wise, has stepped already, or holds foreign parameters.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        runtime: ZeroRuntime,
        *,
        scaler: LossScaler,
        clip: float,
        allow_untested: bool = False,
        kernels: Backend = "torch",
        max_skips: int = MAX_SKIPS,
    ) -> None:
        self.inner = inner
        self.max_skips = max_skips
        self.kernels = kernels
        self.runtime = runtime
        self.scaler = scaler
        self.clip = clip
        self.overflow = False
        self.offloaded_bytes = 0  # moved between host and device by the last step
        self.skips_in_a_row = 0
        self.window = Window()
        refuse_unfit(inner, allow_untested)
        self._shard_param_groups()
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups = inner.param_groups
        self.state = inner.state
        self.is_complete = True
        self._look_closer()

    @property
    def rule(self) -> str:
        """The name of the update; who computes it does not matter to a checkpoint."""
        return "AdamW" if isinstance(self.inner, FusedAdamW) else type(self.inner).__name__

    def _shard_param_groups(self) -> None:
        """Replace each group's parameters by this rank's slices of them, in flat order."""
        self.slices: list[tuple[nn.Parameter, Any, int]] = []  # (slice of a master, its flat group, place in it)
        of_parameter: dict[nn.Parameter, list[nn.Parameter]] = {p: [] for p in self.runtime.locate()}
        for group in self.runtime.groups:
            for place, ((_, span), view) in enumerate(zip(group.owned_spans(), group.master_views(), strict=True)):
                piece = nn.Parameter(view)
                self.slices.append((piece, group, place))
                of_parameter[group.parameters[span.index]].append(piece)
        covered: set[nn.Parameter] = set()
        for param_group in self.inner.param_groups:
            param_group["params"] = [self.runtime.replaced.get(p, p) for p in param_group["params"]]
            if any(p not in of_parameter for p in param_group["params"]):
                raise ValueError("the optimizer holds a parameter that is not part of the model")
            covered |= set(param_group["params"])
            self._move_initial_state(param_group, of_parameter)
            param_group["params"] = [piece for p in param_group["params"] for piece in of_parameter[p]]
        forgotten = [
            n
            for g in self.runtime.groups
            if g.trainable
            for n, p in zip(g.names, g.parameters, strict=True)
            if p not in covered
        ]
        if forgotten:
            warn_once(
                f"{len(forgotten)} trainable parameters are in no param group and stay as they are: {forgotten[:3]}"
            )

    def _move_initial_state(
        self, param_group: dict[str, Any], of_parameter: dict[nn.Parameter, list[nn.Parameter]]
    ) -> None:
        """Adagrad makes its state when it is built; give each slice its own."""
        for parameter in param_group["params"]:
            if self.inner.state.pop(parameter, None) is not None:
                for piece in of_parameter[parameter]:
                    start = torch.full_like(piece, param_group["initial_accumulator_value"])
                    self.inner.state[piece] = {"step": torch.tensor(0.0), "sum": start}

    # ---- the step ----

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        raise RuntimeError("call engine.step(): it knows the accumulation window this step belongs to")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "is_complete"):
            raise RuntimeError("param groups are sharded once, by minizero.initialize: give it all of them")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("the optimizer's state is this rank's shards: engine.save_checkpoint(dir) saves it")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise RuntimeError("the optimizer's state is this rank's shards: engine.load_checkpoint(dir) loads it")

    @torch.no_grad()
    def step_window(self, weight: float = 1.0) -> StepResult:
        """One optimizer step over the window's gradients, times `weight`; the window is empty after it; collective.

        A step in which a loss or a gradient of any rank is not finite is skipped on all. Raises NonFiniteError on
        every rank after `max_skips` such steps in a row; parameters and optimizer state are then untouched.
        """
        window, self.window = self.window, Window()
        self.runtime.finish_gradients()
        total = self._exchange(window)
        divisor = total.tokens if total.counts_tokens else float(self.runtime.comm.size)
        factor = weight * self.runtime.policy.predivide / self.scaler.scale / max(divisor, 1.0)
        norm = math.sqrt(total.squares) * factor if math.isfinite(total.squares) else math.nan
        count = total.tokens if total.counts_tokens else self.runtime.comm.size * max(window.micro_batches, 1)
        is_finite = math.isfinite(norm) and all(map(math.isfinite, total.losses))
        result = StepResult(is_finite, norm, sum(total.losses) / max(count, 1.0), int(total.tokens))
        self._check_finite(result, total.losses)
        self.scaler.update(overflow=not result.applied)
        if result.applied:
            clipped = self.clip / (norm + 1e-6) if self.clip > 0 else 1.0
            self.offloaded_bytes = self._update(factor * min(1.0, clipped))
            self.offloaded_bytes += self.runtime.refresh()
        self.runtime.drop_gradients()
        for piece, _, _ in self.slices:
            piece.grad = None
        return result

    def _exchange(self, window: Window) -> Total:
        """What the window adds up to over all ranks."""
        device = self.runtime.device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        tokens = window.tokens.double() if window.tokens is not None else zero
        loss = window.loss if window.loss is not None else zero
        own = [  # a copy of what another rank counts adds nothing, unless it is not finite
            sum((self._squared_norm(g.grad_shard()) * float(g.counts) for g in unit.groups if g.trainable), start=zero)
            for unit in self.runtime.units
        ]
        own += [tokens.to(device), loss.to(device)]
        rows = self.runtime.comm.gather_rows(torch.stack(own), "norm, tokens and loss").cpu()
        squares = [math.fsum(column) for column in rows[:, :-2].T.tolist()]
        if self.runtime.tensor is not None:
            parts = torch.tensor(squares, dtype=torch.float64, device=device)
            squares = [math.fsum(c) for c in self.runtime.tensor.comm.gather_rows(parts, "norm").T.tolist()]
        squares_here = math.fsum(squares) if all(map(math.isfinite, squares)) else math.nan
        total = Total(squares_here, math.fsum(rows[:, -2].tolist()), window.tokens is not None, rows[:, -1].tolist())
        return total if self.runtime.pipeline is None else self._over_stages(total, window)

    def _squared_norm(self, values: Tensor) -> Tensor:
        if self.kernels == "triton" and values.dtype != torch.float64:
            return grad_norm([values], backend="triton")[0]
        return squared_norm(values)

    def _over_stages(self, total: Total, window: Window) -> Total:
        """The whole pipeline's: norms of all stages; tokens and losses of the last one, which alone has any."""
        assert self.runtime.pipeline is not None
        numbers = [total.squares, total.tokens, float(window.tokens is not None), *total.losses]
        row = torch.tensor(numbers, dtype=torch.float64, device=self.runtime.device)
        columns = self.runtime.pipeline.comm.gather_rows(row, "norm, tokens and loss of all stages").T.tolist()
        squares, tokens, counts, *losses = columns
        return Total(sum(squares), sum(tokens), any(counts), [sum(of_rank) for of_rank in losses])

    def _check_finite(self, result: StepResult, losses: list[float]) -> None:
        """Count skipped steps. Raises NonFiniteError, and drops the gradients, when there were too many in a row."""
        self.overflow = not result.applied
        self.skips_in_a_row = 0 if result.applied else self.skips_in_a_row + 1
        if self.skips_in_a_row < self.max_skips or not self.scaler.exhausted:
            self._look_closer()
            return
        self.runtime.drop_gradients()
        bad_losses = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        units = self.runtime.units
        own = torch.tensor([float(unit.own_is_finite) for unit in units], device=self.runtime.device)
        finite_UR = self.runtime.comm.gather_rows(own, "whose gradients are finite").T.tolist()
        bad = [
            (rank, unit.name)
            for unit, of_ranks in zip(units, finite_UR, strict=True)
            for rank, is_finite in enumerate(of_ranks)
            if not is_finite
        ]
        found = f"the loss is {losses[bad_losses[0]]} on data-parallel rank {bad_losses}" if bad_losses else ""
        if bad:
            found += f"{'; ' if found else ''}first such unit: {bad[0][1]}, on data-parallel rank {bad[0][0]}"
        elsewhere = "the losses and these ranks' own gradients are finite; their sum, or another stage or part, is not"
        raise NonFiniteError(
            f"loss or gradients were not finite {self.skips_in_a_row} steps in a row: {found or elsewhere}. Nothing "
            "was updated in those steps." + (" bf16 needs no loss scale." if self.scaler.dynamic else ""),
            bad_losses[0] if bad_losses else bad[0][0] if bad else 0,
        )

    def _look_closer(self) -> None:
        """Have ranks look at their own gradients, before they are summed, in a step that may be the last one."""
        for unit in self.runtime.units:
            unit.checks_own, unit.own_is_finite = self.skips_in_a_row + 1 >= self.max_skips, True

    def _update(self, factor: float) -> int:
        """Scale this rank's gradients and let the inner optimizer update its slices; bytes moved between devices."""
        if isinstance(self.inner, FusedAdamW):
            return self._update_stretches(self.inner, factor)
        moved = 0
        for group in self.runtime.groups:
            if group.grad is not None and group.master is not None:
                group.grad = group.grad.to(group.master.dtype)  # before it is scaled down, out of fp16's range
                group.grad.mul_(factor)
        views = {id(group): group.grad_views() for group in self.runtime.groups if group.grad is not None}
        for piece, group, place in self.slices:
            gradient = views[id(group)][place]
            piece.grad = gradient.to(device=piece.device, dtype=piece.dtype)
            moved += piece.grad.nbytes if piece.device != gradient.device else 0
        self.inner.step()
        return moved

    def _update_stretches(self, inner: FusedAdamW, factor: float) -> int:
        """The same where whole stretches of a flat group are updated at once, and followed by what computes."""
        scale = torch.tensor(factor, dtype=torch.float32, device=self.runtime.device)
        for group, first, pieces, options in self._stretches():
            if group.grad is not None:
                master, grad, narrow = group.stretch(first, first + len(pieces))
                inner.step_over(pieces, options, master, grad, scale, narrow)
        for group in self.runtime.groups:
            group.is_published = group.grad is not None and self._covers(group)
        return 0

    def _stretches(self) -> Iterator[tuple[FlatGroup, int, list[nn.Parameter], dict[str, Any]]]:
        """(flat group, place of the first slice in it, slices behind each other, their param group)."""
        options_of = {piece: options for options in self.inner.param_groups for piece in options["params"]}
        stretch: tuple[FlatGroup, int, list[nn.Parameter], dict[str, Any]] | None = None
        for piece, group, place in self.slices:
            options = options_of.get(piece)
            follows = stretch is not None and stretch[0] is group and stretch[3] is options
            if stretch is not None and not (follows and place == stretch[1] + len(stretch[2])):
                yield stretch
                stretch = None
            if options is not None:
                stretch = stretch or (group, place, [], options)
                stretch[2].append(piece)
        if stretch is not None:
            yield stretch

    def _covers(self, group: FlatGroup) -> bool:
        """Whether every slice of `group` is in a param group, and so was written."""
        known = {piece for options in self.inner.param_groups for piece in options["params"]}
        return all(piece in known for piece, owner, _ in self.slices if owner is group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the running window and its gradients."""
        self.window = Window()
        self.runtime.drop_gradients()


def squared_norm(values: Tensor) -> Tensor:
    """Sum of squares as a float64 scalar."""
    rows, wide = values.numel() // NORM_ROW, torch.promote_types(values.dtype, torch.float32)
    head, tail = values[: rows * NORM_ROW].view(rows, NORM_ROW), values[rows * NORM_ROW :]
    whole = torch.linalg.vector_norm(head, dim=1, dtype=wide).double().square().sum()
    return whole + torch.linalg.vector_norm(tail, dtype=wide).double().square()


def refuse_unfit(inner: torch.optim.Optimizer, allow_untested: bool) -> None:
    """Raise ValueError for an optimizer that has stepped, or whose updates flat slices would change."""
    name = type(inner).__name__
    if any(not isinstance(inner, torch.optim.Adagrad) or state["step"] > 0 for state in inner.state.values()):
        raise ValueError(f"{name} has optimizer state already; give minizero an optimizer before its first step")
    if type(inner) in (*ELEMENT_WISE.values(), FusedAdamW):
        return
    if not allow_untested:
        raise ValueError(
            f"{name} is not known to be element-wise, and ZeRO hands it 1-D slices; legal: {', '.join(ELEMENT_WISE)}. "
            "If each element's update depends on no other element, set zero.allow_untested_optimizer."
        )
    warn_once(f"{name} gets 1-D slices of parameters: its update of an element must depend on no other element")
