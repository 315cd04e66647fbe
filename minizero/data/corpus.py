"""Where the text comes from: the Python standard library, a folder of text files, or a HuggingFace dataset.

A corpus is a sequence of documents in a fixed order, each with a name that does not depend on the machine (a relative
path, or a row number). Which documents are held out for validation is decided by a hash of that name, so it stays the
same when others come or go.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import datasets

SKIPPED_FOLDERS = {"__pycache__", "site-packages", "test", "tests", "idle_test", "pydoc_data"}
"""Folders of the standard library that are not its own source: tests, what others installed, and pydoc_data, which is
generated documentation (one file of English, which would be more than half of the held-out text)."""

DATASETS_PREFIX = "datasets:"


class Corpus(Protocol):
    """A readable sequence of documents."""

    def manifest(self) -> str:
        """A text that changes when the documents do, and is cheap to make: the cache is keyed by it."""

    def names(self) -> list[str]:
        """The documents' names, sorted."""

    def documents(self) -> Iterator[tuple[str, str]]:
        """(name, text) in the order of `names()`. Raises ValueError naming a document that cannot be read."""


def open_corpus(source: str) -> Corpus:
    """The corpus that `data.source` names: `stdlib`, `datasets:PATH[:COLUMN]`, or a folder.

    Raises ValueError when there is nothing to read.
    """
    corpus: Corpus
    if source == "stdlib":
        corpus = FolderCorpus.scan(Path(sysconfig.get_path("stdlib")), "*.py", SKIPPED_FOLDERS)
    elif source.startswith(DATASETS_PREFIX):
        corpus = DatasetCorpus.load(source.removeprefix(DATASETS_PREFIX))
    elif Path(source).is_dir():
        corpus = FolderCorpus.scan(Path(source))
    else:
        raise ValueError(f"data.source {source!r} is not a folder; legal: stdlib, a folder, or {DATASETS_PREFIX}PATH")
    if len(corpus.names()) < 2:
        raise ValueError(
            f"data.source {source!r} has {len(corpus.names())} documents that are not empty; at least two are needed, "
            "one to train on and one to hold out"
        )
    return corpus


@dataclass(frozen=True)
class FolderCorpus:
    """Files of UTF-8 text, by their paths under `root`."""

    root: Path
    paths: tuple[str, ...]

    @classmethod
    def scan(cls, root: Path, pattern: str = "*", skipped: Set[str] = frozenset()) -> FolderCorpus:
        """Every file below `root` that fits `pattern`, is not empty, and is not hidden or in a `skipped` folder."""
        found = []
        for path in root.rglob(pattern):
            parts = path.relative_to(root).parts
            listed = not any(part in skipped or part.startswith(".") for part in parts)
            if listed and path.is_file() and path.stat().st_size > 0:
                found.append(path.relative_to(root).as_posix())
        return cls(root, tuple(sorted(found)))

    def names(self) -> list[str]:
        return list(self.paths)

    def manifest(self) -> str:
        stats = [(name, (self.root / name).stat()) for name in self.paths]
        return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])

    def documents(self) -> Iterator[tuple[str, str]]:
        for name in self.paths:
            try:
                yield name, (self.root / name).read_bytes().decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.root / name} is not UTF-8 text ({error}): convert it or take it out"
                ) from error


@dataclass(frozen=True)
class DatasetCorpus:
    """The rows of one text column of a HuggingFace dataset's `train` split."""

    dataset: datasets.Dataset
    column: str

    @classmethod
    def load(cls, name: str) -> DatasetCorpus:
        """`PATH[:COLUMN]`: a dataset's name, or a local folder of data files or one written by `save_to_disk`."""
        try:
            import datasets  # an extra: only those who name a dataset need it
        except ImportError as error:
            raise ValueError(f"data.source {DATASETS_PREFIX}{name} needs: pip install 'minizero[hf]'") from error
        path, _, column = name.partition(":")
        try:
            saved = (Path(path) / "state.json").is_file()
            dataset = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, split="train")
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"data.source {DATASETS_PREFIX}{name} cannot be loaded: {error}") from error
        column = column or "text"
        if column not in dataset.column_names:
            legal = ", ".join(dataset.column_names)
            raise ValueError(f"data.source {DATASETS_PREFIX}{name}: there is no column {column!r}; legal: {legal}")
        return cls(dataset, column)

    def names(self) -> list[str]:
        return [f"{row:012d}" for row in range(len(self.dataset))]

    def manifest(self) -> str:
        return json.dumps([self.dataset._fingerprint, self.column, len(self.dataset)])

    def documents(self) -> Iterator[tuple[str, str]]:
        for row, record in enumerate(self.dataset.select_columns(self.column)):
            if not isinstance(record[self.column], str):
                raise ValueError(f"row {row}, column {self.column!r} is not text: {record[self.column]!r}")
            yield f"{row:012d}", record[self.column]


def held_out(names: list[str], fraction: float) -> set[str]:
    """The names whose hash falls below `fraction`; always at least one, and never all (needs two names)."""
    assert len(names) >= 2
    ranked = sorted(names, key=_place)
    below = sum(_place(name) < fraction for name in ranked)
    return set(ranked[: min(max(below, 1), len(ranked) - 1)])


def _place(name: str) -> float:
    """A number in [0, 1) from the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
