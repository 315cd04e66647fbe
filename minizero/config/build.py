"""From a plain tree with minizero's keys to a checked `Config`: where pydantic's complaints become ConfigError."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from minizero.config.errors import ConfigError
from minizero.config.problems import explain, found
from minizero.config.schema import Config

ENDING = ("WarmupDecayLR", "WarmupCosineLR")  # schedules with a last step


def build(tree: dict[str, Any]) -> Config:
    """The `Config` of a tree with minizero's keys. Raises ConfigError naming every wrong key."""
    problems = list(not_json(tree, ""))
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        return Config.model_validate(with_total_steps(tree))
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, Config))) from None


def with_total_steps(tree: dict[str, Any]) -> dict[str, Any]:
    """A schedule that ends somewhere ends with the run, unless `total_num_steps` says otherwise."""
    scheduler, train = tree.get("scheduler"), tree.get("train")
    if not isinstance(scheduler, dict) or not isinstance(train, dict) or "steps" not in train:
        return tree
    params = scheduler.get("params", {})
    if scheduler.get("type") not in ENDING or not isinstance(params, dict) or "total_num_steps" in params:
        return tree
    return {**tree, "scheduler": {**scheduler, "params": {**params, "total_num_steps": train["steps"]}}}


def not_json(node: Any, key: str) -> Iterator[str]:
    """Lines for what JSON could not hold, also in free tables: nan, infinity, half a character, objects."""
    if isinstance(node, dict):
        for name, below in node.items():
            if not isinstance(name, str):
                yield f"{key or 'settings'}: found the key {found(name)}; legal: texts"
                continue
            yield from not_json(below, f"{key}.{name}" if key else name)
    elif isinstance(node, list | tuple):
        for below in node:
            yield from not_json(below, key)
    elif isinstance(node, str) and re.search("[\ud800-\udfff]", node):
        yield f"{key}: found {found(node)}; legal: a text without lone surrogates"
    elif isinstance(node, float) and not math.isfinite(node):
        yield f"{key}: found {node}; legal: a finite number"
    elif not (node is None or isinstance(node, str | int | float)) and not hasattr(node, "model_dump"):
        yield f"{key}: found {found(node)}; legal: numbers, texts, true/false, none, lists and tables"
