"""Initial values, the same in every layout.

A model built on the `meta` device has shapes and no memory. Each of its modules is given memory alone, filled by its
own initializer from a generator seeded with (seed, module name), and handed on; a rank keeps its shards of it and the
memory is freed before the next module. So initialization depends neither on the world size nor on the stage, and no
rank ever holds the whole model. A module's initializer is the root's HuggingFace `_init_weights(module)` where it has
one, else the module's own `reset_parameters()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from minizero.utils.seeds import module_seed


def move_off_meta(model: nn.Module, device: torch.device) -> dict[nn.Parameter, nn.Parameter]:
    """Replace meta parameters by memoryless ones on `device`, ties kept; other tensors move there. Returns the
    replacements by what they replace.

    Until they are initialized, those parameters read as NaN.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta:
                if parameter not in replaced:
                    nan = torch.full((), float("nan"), dtype=parameter.dtype, device=device)
                    replaced[parameter] = nn.Parameter(nan.expand(parameter.shape), parameter.requires_grad)
                setattr(module, name, replaced[parameter])
            elif parameter.device != device:
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if not buffer.is_meta and buffer.device != device:
                module._buffers[name] = buffer.to(device)
    return replaced


def initial_values(
    model: nn.Module,
    uninitialized: set[nn.Parameter],
    device: torch.device,
    seed: int,
    initializers: Mapping[nn.Module, nn.Module] = MappingProxyType({}),
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(parameter, its whole initial value), each parameter once, one module's memory at a time.

    A module that holds a part of its parameters is filled by its whole stand-in of `initializers`.

    Raises ValueError naming the module or parameter that has no initializer, or one that left a value unset.
    """
    left = set(uninitialized)
    for name, module in model.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if p in left}
        if own or any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            filled_by = initializers.get(module, module)
            yield from initialize_module(model, name, filled_by, own, device, seed)
            left -= set(own.values())


def initialize_module(
    model: nn.Module, name: str, module: nn.Module, own: dict[str, nn.Parameter], device: torch.device, seed: int
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Give one module memory, run its initializer, hand its values on, and take the memory away again."""
    shared = dict(module.named_parameters(recurse=False))
    for key, parameter in shared.items():  # of the module, or of its whole stand-in
        poison = torch.full(parameter.shape, float("nan"), dtype=parameter.dtype, device=device)
        module._parameters[key] = nn.Parameter(poison, parameter.requires_grad)
    unset: dict[str, tuple[Tensor, int]] = {}  # buffers that the initializer must fill, and their version before it
    for key, buffer in module.named_buffers(recurse=False):
        if buffer.is_meta:
            empty = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
            module._buffers[key] = empty.fill_(float("nan")) if empty.is_floating_point() else empty.zero_()
            unset[key] = empty, empty._version
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(module_seed(seed, name))
            initializer_of(model, name, module)()
        filled = {key: module._parameters[key] for key in own}
    finally:
        module._parameters.update(shared)
    for key, value in [*filled.items(), *module.named_buffers(recurse=False)]:
        assert value is not None
        before, version = unset.get(key, (None, 0))
        untouched = value is before and value._version == version and value.numel() > 0
        if untouched or (value.is_floating_point() and bool(value.isnan().any())):
            raise ValueError(f"{type(module).__name__} {name!r}: its initializer leaves {key!r} unset or NaN")
    for key, value in filled.items():
        assert value is not None
        yield own[key], value.detach()


def initializer_of(model: nn.Module, name: str, module: nn.Module) -> Callable[[], object]:
    """What fills `module`'s own parameters. Raises ValueError naming a module that has nothing of the kind."""
    of_model: Any = getattr(model, "_init_weights", None)
    own: Any = getattr(module, "reset_parameters", None)
    if of_model is not None:
        return lambda: of_model(module)
    if own is not None:
        return own
    raise ValueError(
        f"{type(module).__name__} {name!r} holds parameters on the meta device but has no reset_parameters(): "
        "give it one, or build the model on a real device"
    )
