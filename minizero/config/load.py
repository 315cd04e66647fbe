"""From files, dicts and command lines to one checked `Config`, with the origin of every value.

Later wins: the schema's defaults, then the file (TOML or JSON, in minizero's keys or DeepSpeed's), then `--a.b value`.
A file may name another one in a `base` at its top, which is read before it. All problems are reported at once,
one line each.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from minizero.config import deepspeed
from minizero.config.build import build
from minizero.config.deepspeed_keys import TOP_LEVEL_KEYS
from minizero.config.errors import ConfigError
from minizero.config.files import decode_base64, laid_over, read_layers, read_tree
from minizero.config.problems import closest, found, legal, nearest, settings, sub_model, unknown_key
from minizero.config.schema import Config
from minizero.utils.files import write_atomically

Tree = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Resolved:
    """Settings and where each came from.

    Attributes:
        config: the checked settings.
        origins: dotted key of every setting -> "default", "file NAME" or "command line".
    """

    config: Config
    origins: dict[str, str]


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Resolved:
    """Read a config file, if any, and apply `--a.b value` or `--a.b=value` overrides.

    Raises ConfigError with one line per problem.
    """
    origins = {key: "default" for key, _ in settings(Config)}
    tree: Tree = {}
    for file, layer in read_layers(Path(path)) if path is not None else []:
        tree = _minizero_tree(laid_over(tree, layer), str(file))
        given = tree if _is_deepspeed(layer, str(file)) else layer
        origins.update({key: f"file {file}" for key in _given(given)})
    for key, value in parse_overrides(overrides):
        _put(tree, key.split("."), value)
        origins[_setting_of(key)] = "command line"
    return Resolved(build(tree), origins)


def from_any(config: Config | Tree | str | Path) -> Config:
    """A `Config` from itself, a dict, a file's path, or DeepSpeed's base64 string. Raises ConfigError."""
    if isinstance(config, Config):
        return config
    if isinstance(config, dict):
        return _from_tree(config, "config")
    if isinstance(config, str) and (decoded := decode_base64(config)) is not None:
        return _from_tree(decoded, "base64 config")
    if isinstance(config, str | Path):
        return _from_tree(merged(read_layers(Path(config))), str(config))
    raise ConfigError(f"config: found {found(config)}; legal: a Config, a dict, or the path of a TOML or JSON file")


def _from_tree(tree: Tree, name: str) -> Config:
    return with_name(name, deepspeed.from_deepspeed if _is_deepspeed(tree, name) else build, tree)


def merged(layers: Sequence[tuple[Path, Tree]]) -> Tree:
    """The settings of a file and of those it builds on."""
    tree: Tree = {}
    for _, layer in layers:
        tree = laid_over(tree, layer)
    return tree


def help_text() -> str:
    """Every setting with its type, default and meaning."""
    lines = ["Settings (--a.b VALUE on the command line, [a] b = VALUE in TOML):"]
    for key, field in settings(Config):
        meaning = " ".join((field.description or "").split())
        default = field.get_default(call_default_factory=True)
        lines += ["", f"  --{key}  ({legal(field)}; default {_literal(default)})"]
        lines += [f"      {meaning}"] if meaning else []
    return "\n".join(lines)


def save_resolved(resolved: Resolved, path: str | Path) -> None:
    """Write JSON: dotted key -> value and origin."""
    values = dict(_leaves(resolved.config.model_dump(mode="json")))
    rows = {key: {"value": value, "origin": resolved.origins[key]} for key, value in values.items()}
    write_atomically(Path(path), json.dumps(rows, indent=2, allow_nan=False) + "\n")


def read_resolved(path: str | Path) -> Config:
    """The settings that `save_resolved` wrote. Raises ConfigError when the file is not one of its own."""
    rows = read_tree(Path(path))
    tree: Tree = {}
    for key, row in rows.items():
        if not isinstance(row, dict) or set(row) != {"value", "origin"}:
            raise ConfigError(f"{path}: {key}: found {found(row)}; legal: an object with value and origin")
        _put(tree, key.split("."), row["value"])
    return build(tree)


# ------------------------------------------------------------------------------------------------- command line


def parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each `--a.b value` or `--a.b=value`. Raises ConfigError."""
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"{word!r}: an override is written --section.key VALUE")
        key, equals, text = word[2:].partition("=")
        field = _field_of(key)
        if not equals:
            if not words:
                raise ConfigError(f"{key}: no value given; legal: {legal(field) if field else 'a value'}")
            text = words.pop(0)
        yield key, _parse_value(text, field)


def _field_of(key: str) -> FieldInfo | None:
    """The schema's field for a dotted key; None inside a free table such as optimizer.params."""
    model: Any = Config
    path = key.split(".")
    for depth, name in enumerate(path):
        field = model.model_fields.get(name)
        if field is None:
            raise ConfigError(unknown_key(tuple(path[: depth + 1]), Config))
        model = sub_model(field)
        if model is None:
            inside = path[depth + 1 :]
            if inside and (field.annotation != dict[str, Any] or "" in inside):
                raise ConfigError(f"{key}: no such setting; did you mean {'.'.join(path[: depth + 1])}?")
            return None if inside else field
    raise ConfigError(
        f"{key}: a section, not a setting; {nearest(key, [f'{key}.{name}' for name in model.model_fields])}"
    )


def _parse_value(text: str, field: FieldInfo | None) -> Any:
    """Text as the setting's own type reads it: a text setting takes it whole, others take JSON, `none` is None."""
    candidates: list[Any] = []
    if text.lower() == "none" and (field is None or type(None) in get_args(field.annotation)):
        candidates.append(None)
    if field is not None and (field.annotation is str or str in get_args(field.annotation)):
        candidates.append(text)
    else:
        candidates += [*_as_json(text), text]
    if field is None:
        return candidates[0]
    annotation: Any = field.annotation
    for value in candidates:
        try:
            return TypeAdapter(annotation, config={"strict": True}).validate_python(value)
        except ValidationError:
            continue
    return candidates[0]  # wrong: the schema says how, with the key


def _as_json(text: str) -> list[Any]:
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):
        return []


def _setting_of(key: str) -> str:
    """The schema's setting that holds a dotted key: optimizer.params.eps -> optimizer.params."""
    return next(name for name, _ in settings(Config) if key == name or key.startswith(f"{name}."))


# ------------------------------------------------------------------------------------------------------- trees


def _minizero_tree(tree: Tree, name: str) -> Tree:
    """A file's tree in minizero's keys, checked, so that an override cannot hide a mistake in the file."""
    if _is_deepspeed(tree, name):
        return with_name(name, deepspeed.translate, tree)
    with_name(name, build, tree)
    return copy.deepcopy(tree)


def with_name(name: str, read: Callable[[Tree], T], tree: Tree) -> T:
    """`read(tree)`, with the source's name before each line of a ConfigError."""
    try:
        return read(tree)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{name}: {line}" for line in str(error).split("\n"))) from None


def _is_deepspeed(tree: Tree, name: str) -> bool:
    """Whether the keys are DeepSpeed's. Raises ConfigError for a mix."""
    own = set(Config.model_fields)
    foreign = [key for key in tree if key in TOP_LEVEL_KEYS and key not in own]
    native = [key for key in tree if key in own and key not in TOP_LEVEL_KEYS]
    if foreign and native:
        raise ConfigError(
            f"{name}: {foreign[0]} is a key of DeepSpeed and {native[0]} one of minizero; use one language"
        )
    if foreign or native:
        return bool(foreign)
    # Nothing decides yet: the known key most like a misspelt one does, so that the error names it.
    known = own | TOP_LEVEL_KEYS
    meant = {closest(key, sorted(known)) for key in tree if isinstance(key, str) and key not in known}
    return bool(meant & (TOP_LEVEL_KEYS - own))


def _given(tree: Tree) -> Iterator[str]:
    """Dotted keys of the settings that a tree gives."""
    for key, _ in settings(Config):
        node: Any = tree
        for part in key.split("."):
            node = node.get(part, _ABSENT) if isinstance(node, dict) else _ABSENT
        if node is not _ABSENT:
            yield key


_ABSENT = object()


def _leaves(dump: Tree) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting in a dumped config."""
    for key, _ in settings(Config):
        node: Any = dump
        for part in key.split("."):
            node = node[part]
        yield key, node


def _put(tree: Tree, path: list[str], value: Any) -> None:
    """Set `tree[a][b] = value`, making the sections on the way."""
    *parents, name = path
    for parent in parents:
        below = tree.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{'.'.join(path)}: {parent} holds {found(below)}, not a table")
        tree = below
    tree[name] = value


def _literal(value: Any) -> str:
    return "none" if value is None else json.dumps(value)
