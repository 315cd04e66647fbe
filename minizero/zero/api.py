"""What users call without an engine at hand: whole parameters for a while, and models built without memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minizero.zero.runtime import RUNTIMES, ZeroRuntime, runtime_of


@contextmanager
def unsharded(model: nn.Module) -> Iterator[nn.Module]:
    """Whole parameters inside the block, for generation, export or reading; collective over data-parallel ranks.

    Afterwards, also after an exception, the model is sharded as before; changes made inside are lost at stage 3 (use
    `GatheredParameters(..., modifier_rank=0)` to keep them). Below stage 3, and for models that minizero does not
    know, there is nothing to do.
    """
    runtime = runtime_of(model)
    if runtime is None:
        yield model
        return
    with runtime.unsharded():
        yield model


@contextmanager
def GatheredParameters(
    params: nn.Parameter | Iterable[nn.Parameter],
    modifier_rank: int | None = None,
    fwd_module: nn.Module | None = None,
    enabled: bool = True,
) -> Iterator[None]:
    """DeepSpeed's `zero.GatheredParameters`: `params` are whole inside the block.

    Args:
        params: parameters of one or more initialized models; all of their model's parameters become whole.
        modifier_rank: the data-parallel rank whose changes are kept, on every rank and in the masters; None keeps none.
        fwd_module: accepted and not needed: forwards find their parameters by unit.
        enabled: False makes this a no-op.

    Raises ValueError for parameters built under `Init` that `minizero.initialize` has not filled in yet.
    """
    wanted = [params] if isinstance(params, nn.Parameter) else list(params)
    if enabled and any(parameter.is_meta for parameter in wanted):
        raise ValueError(
            "GatheredParameters of parameters that have no values yet: give their module reset_parameters(), or set "
            "them after minizero.initialize"
        )
    known = {runtime for model in list(RUNTIMES) if (runtime := runtime_of(model)) is not None}
    runtimes = [runtime for runtime in known if enabled and _holds(runtime, wanted)]
    with contexts(runtimes, modifier_rank):
        yield


@contextmanager
def contexts(runtimes: list[ZeroRuntime], modifier_rank: int | None) -> Iterator[None]:
    """`modified` of every runtime, one inside the other."""
    if not runtimes:
        yield
        return
    with runtimes[0].modified(modifier_rank), contexts(runtimes[1:], modifier_rank):
        yield


def _holds(runtime: ZeroRuntime, wanted: list[nn.Parameter]) -> bool:
    places = runtime.locate()
    return any(parameter in places for parameter in wanted)


@contextmanager
def Init(
    module: nn.Module | None = None,
    config_dict_or_path: Any = None,
    config: Any = None,
    enabled: bool = True,
    **unused: Any,
) -> Iterator[None]:
    """DeepSpeed's `zero.Init`: modules built inside take no memory; `minizero.initialize` fills in each rank's shards.

    Values come from each module's own initializer, run then (see `zero.materialize`). What a constructor sets by hand
    after it, such as `nn.init.zeros_(self.out.weight)`, leaves no trace on the meta device and is lost: write it into
    the module's `reset_parameters`, or the model's `_init_weights`. The configurations are not needed here.
    """
    if module is not None:
        raise ValueError(
            "zero.Init(module=...) of a built model has no effect here: pass the model to minizero.initialize"
        )
    if unused.get("remote_device") not in (None, "none", "cpu", "cuda"):
        raise ValueError(f"zero.Init(remote_device={unused['remote_device']!r}) is not available; legal: none, cpu")
    if not enabled:
        yield
        return
    with torch.device("meta"):
        yield
