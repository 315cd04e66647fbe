"""Reads TOML and JSON into plain trees, with errors that say where.

JSON may hold comments (//, # and /* */) and a comma before a closing bracket, since DeepSpeed's config files do. A key
given twice is an error.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import tomllib
from pathlib import Path
from typing import Any

from minizero.config.errors import ConfigError

STRING = r'"(?:\\.|[^"\\\n])*"'
STRING_OR_COMMENT = re.compile(STRING + r"|//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
# The middle part keeps commas with nothing before them: those stay errors.
STRING_OR_LAST_COMMA = re.compile(STRING + r"|[\[{,:]\s*,|,(?=\s*[\]}])")


def read_tree(path: Path) -> dict[str, Any]:
    """The settings in a .toml or .json file. Raises ConfigError with the file, and the line where there is one."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a byte-order mark
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot read the config file {path}: {reason}") from None
    if path.suffix == ".json":
        return parse_json(text, str(path))
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: malformed TOML: {error}") from None
    raise ConfigError(f"{path}: a config file ends in .toml or .json, found {path.suffix or 'no suffix'!r}")


def read_layers(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """(file, its settings) of `path` and, before it, of the file that its `base` names, and of that one's.

    Paths are relative to the file that names them. Raises ConfigError as `read_tree` does, and for a circle.
    """
    if path.resolve() in above:
        raise ConfigError(f"{path}: base leads back to this file")
    tree = read_tree(path)
    base = tree.pop("base", None)
    if base is None:
        return [(path, tree)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: found {base!r}; legal: the path of a config file to build on")
    return [*read_layers(path.parent / base, (*above, path.resolve())), (path, tree)]


def laid_over(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """`lower` with the values of `upper` in the place of its own, table by table."""
    both = {key: lower[key] for key in lower}
    for key, value in upper.items():
        below = both.get(key)
        both[key] = laid_over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return both


def parse_json(text: str, name: str) -> dict[str, Any]:
    """An object in JSON with comments; `name` stands for the source in errors. inf and nan are left to the schema."""
    text = STRING_OR_COMMENT.sub(_blank_comment, text)
    text = STRING_OR_LAST_COMMA.sub(lambda match: " " if match.group() == "," else match.group(), text)
    try:
        tree = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: malformed JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
        raise ConfigError(f"{name}: JSON that cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: an object {{...}} of settings expected, found a {type(tree).__name__}")
    return tree


def _blank_comment(match: re.Match[str]) -> str:
    """A string stays; a comment turns into blanks, so that line and column of later errors stay right."""
    text = match.group()
    return text if text.startswith('"') else re.sub(r"[^\n]", " ", text)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(f"duplicate key {', '.join(map(repr, twice))}")
    return tree


def decode_base64(text: str) -> dict[str, Any] | None:
    """The JSON in a base64-urlsafe string, or None when it is not one (a path, most likely)."""
    try:
        decoded = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return parse_json(decoded, "base64 config") if decoded.lstrip().startswith(("{", "/", "#")) else None
