"""Says what is wrong with a setting, in one line: its dotted key, what was found, and what is legal.

Pydantic finds the problems; its own messages name neither the legal values of a union nor the nearest known key.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo


def sub_model(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, or None for a plain setting."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every plain setting below `model` with its dotted key, in the schema's order."""
    for name, field in model.model_fields.items():
        section = sub_model(field)
        if section is None:
            yield prefix + name, field
        else:
            yield from settings(section, f"{prefix}{name}.")


def legal(field: FieldInfo) -> str:
    """What a field takes: "an integer >= 1 or none", "'gloo', 'nccl' or none"."""
    kind = field.annotation
    return describe(Annotated[kind, *field.metadata] if field.metadata else kind)


def describe(kind: Any) -> str:
    """What a type takes, in words."""
    if get_origin(kind) is Annotated:
        inner, *metadata = get_args(kind)
        return describe_union(inner, _bounds(metadata))
    return describe_union(kind, "")


def describe_union(kind: Any, bounds: str) -> str:
    """`describe` for each member of a union; `bounds` belongs to the numbers among them."""
    if get_origin(kind) not in (Union, types.UnionType):
        return _describe_one(kind, bounds)
    parts = [describe(k) if get_origin(k) is Annotated else _describe_one(k, bounds) for k in get_args(kind)]
    return ", ".join(parts[:-1]) + f" or {parts[-1]}"


def _describe_one(kind: Any, bounds: str) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return ", ".join(repr(value) for value in get_args(kind))
    if origin is list:
        return f"a list ({describe(get_args(kind)[0])} each)"
    if origin is dict or kind is dict:
        return "a table of keys and values"
    words = {bool: "true or false", int: f"an integer{bounds}", float: f"a finite number{bounds}", str: "a text"}
    return {**words, type(None): "none"}.get(kind, getattr(kind, "__name__", str(kind)))


def _bounds(metadata: list[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    metadata = [inner for m in metadata for inner in (m.metadata if isinstance(m, FieldInfo) else [m])]
    texts = [f"{sign} {getattr(m, name)}" for m in metadata for name, sign in signs.items() if hasattr(m, name)]
    return f" {' and '.join(texts)}" if texts else ""


def nearest(name: str, known: list[str]) -> str:
    """A sentence that offers the known key most like `name`; else all of them, if few."""
    like = closest(name, known)
    return f"did you mean {like}?" if like else f"known: {', '.join(known)}"


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known key most like `name`, whatever its case; None where none is like it."""
    by_lower = {key.lower(): key for key in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def unknown_key(path: tuple[str, ...], root: type[BaseModel]) -> str:
    """The line for a key that the schema does not have."""
    *parents, name = path
    model: type[BaseModel] = root
    for parent in parents:
        model = sub_model(model.model_fields[parent]) or model
    prefix = "".join(f"{parent}." for parent in parents)
    elsewhere = [key for key, _ in settings(root) if key.rpartition(".")[2] == name]
    known = [prefix + key for key in model.model_fields]
    hint = f"did you mean {elsewhere[0]}?" if elsewhere else nearest(prefix + name, known)
    return f"{prefix}{name}: no such setting; {hint}"


def explain(error: ValidationError, root: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per setting that `error` complains about; `prefix` stands before the dotted keys."""
    lines: dict[str, str] = {}
    for entry in error.errors():
        path, field = _locate(entry["loc"], root)
        key = prefix + ".".join(path)
        if entry["type"] == "extra_forbidden":
            lines.setdefault(key, prefix + unknown_key(path, root))
        elif entry["type"] == "missing":
            lines.setdefault(key, f"{key}: required, and not given")
        elif entry["type"] == "value_error":
            reason = entry["msg"].removeprefix("Value error, ")
            lines.setdefault(key, f"{key}: {reason}" if key else reason)
        elif field is None:
            lines.setdefault(key, f"{key or 'settings'}: a section of settings expected, found {found(entry['input'])}")
        else:
            lines.setdefault(key, f"{key}: found {found(entry['input'])}; legal: {legal(field)}")
    return list(lines.values())


def _locate(loc: tuple[int | str, ...], root: type[BaseModel]) -> tuple[tuple[str, ...], FieldInfo | None]:
    """The dotted path of an error's place and the setting there; what pydantic appends for unions is left off."""
    model: type[BaseModel] | None = root
    path: list[str] = []
    field = None
    for part in loc:
        if model is None:
            break
        path.append(str(part))
        field = model.model_fields.get(str(part))
        model = sub_model(field) if field else None
    return tuple(path), None if model is not None else field


def found(value: Any) -> str:
    """A value for a message: short, and its type where that is the mistake."""
    text = "none" if value is None else "true" if value is True else "false" if value is False else safe_repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def safe_repr(value: Any) -> str:
    """`repr`, also of integers too long for it."""
    try:
        return repr(value)
    except ValueError:
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
