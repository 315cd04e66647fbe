"""Finds the units of a model: the parameters that are communicated together.

A unit is one transformer block, or whatever repeats in the model at hand:

- each child of an outermost `nn.ModuleList` or `nn.Sequential` whose class occurs there more than once;
- an embedding or a head outside those that is larger than the largest of them, unless it is tied;
- everything else, and every weight that two units share, belongs to the **root** unit.

Units are found, not declared: any `nn.Module` works as it is, HuggingFace models and `nn.TransformerEncoder` included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from torch import nn

ROOT = "root"


@dataclass
class UnitSpec:
    """A unit's name, the module whose forward uses it, and its parameters by full name in registration order."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


def find_units(model: nn.Module, tied: Collection[nn.Parameter] = ()) -> list[UnitSpec]:
    """The units of `model`, root first, then in registration order. Every parameter is in exactly one.

    `tied` are parameters that other pipeline stages use too: each of them has these in its root unit, where they lie
    alike, whatever else is there.
    """
    modules = dict(repeated_children(model))
    modules.update(large_leaves(model, modules))
    owners = owners_of_parameters(model, modules)
    root = UnitSpec(ROOT, model)
    units = {name: UnitSpec(name, module) for name, module in model.named_modules() if name in modules}
    for name, parameter in model.named_parameters():
        owning = owners[parameter]
        alone = len(owning) == 1 and None not in owning and parameter not in tied
        unit = units[next(iter(owning))] if alone else root
        unit.parameters[name] = parameter
    return [root, *(unit for unit in units.values() if unit.parameters)]


def repeated_children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each outermost repeated child of a ModuleList or Sequential.

    A child that is on another pipeline stage counts as what it `stands_for`.
    """
    container = isinstance(module, nn.ModuleList | nn.Sequential)
    classes = Counter(getattr(child, "stands_for", type(child)) for child in module.children())
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        callable_child = not isinstance(child, nn.ModuleList | nn.ModuleDict)  # those have no forward to hook
        if container and callable_child and classes[type(child)] > 1:
            if any(True for _ in child.parameters()):
                yield full, child
        else:
            yield from repeated_children(child, f"{full}.")


def large_leaves(model: nn.Module, units: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Untied matrices of leaves outside `units` that are larger than the largest of them: embeddings, heads."""
    if not units:
        return {}
    largest = max(sum(p.numel() for p in module.parameters()) for module in units.values())
    uses: Counter[nn.Parameter] = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    return {
        name: module
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.dim() == 2
        and not any(name == unit or name.startswith(f"{unit}.") for unit in units)
        and weight.numel() > largest
        and uses[weight] == 1
    }


def owners_of_parameters(model: nn.Module, units: dict[str, nn.Module]) -> dict[nn.Parameter, set[str | None]]:
    """Parameter -> names of the units whose modules hold it; None stands for a module outside all units."""
    owners: dict[nn.Parameter, set[str | None]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        owner = next((unit for unit in units if name == unit or name.startswith(f"{unit}.")), None)
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(owner)
    return owners
