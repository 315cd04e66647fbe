"""Token shards: long arrays of token ids on disk, memory-mapped, with checksums.

A split (`train`, `validation`) is one stream of tokens: the separator, then each document followed by the separator.
On disk it is

    {split}-00000.bin, ...   the stream as little-endian uint16 (uint32 for vocabularies beyond 65,536), cut into files
    {split}.json             dtype, each file's token count and sha256, and the documents' names, offsets and sizes

The index is written last, and `prepare` renames a whole folder into place, so what can be opened is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
TOKENS_PER_FILE = 1 << 27


@dataclass(frozen=True)
class Document:
    """Where a document is: its first token's place in the stream, its tokens, and its size as UTF-8."""

    name: str
    offset: int
    num_tokens: int
    num_bytes: int


def write_split(
    folder: Path,
    split: str,
    documents: Iterable[tuple[str, int, list[int]]],
    separator_id: int,
    vocab_size: int,
    tokens_per_file: int = TOKENS_PER_FILE,
) -> None:
    """Write the split of (name, UTF-8 bytes, token ids) documents into `folder`."""
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    writer = _StreamWriter(folder, split, dtype, tokens_per_file)
    writer.append([separator_id])
    entries = []
    for name, num_bytes, ids in documents:
        entries.append(Document(name, writer.num_tokens, len(ids), num_bytes))
        writer.append([*ids, separator_id])
    index = {
        "format": FORMAT,
        "dtype": dtype.name,
        "files": writer.close(),
        "documents": [list(asdict(entry).values()) for entry in entries],
    }
    write_durably(folder / f"{split}.json", json.dumps(index).encode())


class _StreamWriter:
    """Appends tokens to numbered files of at most `tokens_per_file` tokens."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, tokens_per_file: int) -> None:
        self.folder, self.split, self.dtype, self.tokens_per_file = folder, split, dtype, tokens_per_file
        self.files: list[dict[str, str | int]] = []
        self.pending: list[NDArray] = []
        self.num_pending = self.num_tokens = 0

    def append(self, ids: list[int]) -> None:
        self.num_tokens += len(ids)
        self.num_pending += len(ids)
        self.pending.append(np.asarray(ids, dtype=self.dtype))
        while self.num_pending >= self.tokens_per_file:
            self._write_file()

    def _write_file(self) -> None:
        waiting = np.concatenate(self.pending)
        tokens, rest = waiting[: self.tokens_per_file], waiting[self.tokens_per_file :]
        self.pending, self.num_pending = [rest], len(rest)
        name, data = f"{self.split}-{len(self.files):05d}.bin", tokens.tobytes()
        write_durably(self.folder / name, data)
        self.files.append({"name": name, "num_tokens": len(tokens), "sha256": hashlib.sha256(data).hexdigest()})

    def close(self) -> list[dict[str, str | int]]:
        if self.num_pending:
            self._write_file()
        return self.files


class TokenStream:
    """A split opened for reading; nothing is loaded until it is read.

    Raises ValueError naming a file that is missing, of the wrong size, or of another format; `verify()` reads it all.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        index = _read_index(folder / f"{split}.json")
        self.files: list[dict] = index["files"]
        self.documents = [Document(*entry) for entry in index["documents"]]
        dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self._arrays = [_map_file(folder / file["name"], dtype, file["num_tokens"]) for file in self.files]
        self._ends = np.cumsum([len(array) for array in self._arrays])

    def __len__(self) -> int:
        """Tokens in the stream, separators included."""
        return int(self._ends[-1])

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(document.num_bytes for document in self.documents)

    @property
    def fingerprint(self) -> str:
        """A hash of the stream's content, from the checksums."""
        return hashlib.sha256("".join(file["sha256"] for file in self.files).encode()).hexdigest()

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens start ... stop - 1 of the stream, as int64; also across files."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        pieces = []
        for array, end in zip(self._arrays, self._ends, strict=True):
            first = int(end) - len(array)
            if start < end and stop > first:
                pieces.append(array[max(start - first, 0) : stop - first])
        return np.concatenate(pieces).astype(np.int64) if pieces else np.empty(0, np.int64)

    def verify(self) -> None:
        """Compare every file with its checksum. Raises ValueError naming the first that differs."""
        for file in self.files:
            with open(self.folder / file["name"], "rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != file["sha256"]:
                raise ValueError(
                    f"{self.folder / file['name']} is damaged (its sha256 differs): {_remedy(self.folder)}"
                )


def _read_index(path: Path) -> dict:
    try:
        index = json.loads(path.read_bytes())
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']}, expected {FORMAT}")
        return index
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an index of token shards ({error}): {_remedy(path.parent)}") from error


def _map_file(path: Path, dtype: np.dtype, num_tokens: int) -> NDArray:
    found = path.stat().st_size if path.is_file() else None
    if found != num_tokens * dtype.itemsize:
        state = "is missing" if found is None else f"has {found} bytes instead of {num_tokens * dtype.itemsize}"
        raise ValueError(f"{path} {state}: {_remedy(path.parent)}")
    return np.memmap(path, dtype=dtype, mode="r")


def _remedy(folder: Path) -> str:
    return f"delete {folder} and it will be made again"


def write_durably(path: Path, data: bytes) -> None:
    """Write `data` and wait until it is on the disk, so that a rename after it cannot overtake it."""
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
