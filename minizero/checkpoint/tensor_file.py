"""safetensors files, written and read a tensor at a time.

The library's own writer holds a second copy of everything that it writes; its reader maps whole files, which counts as
memory, and checks no sum. Here one tensor passes at a time: hashed on its way out, read by ranges straight into where
it belongs. The format (https://github.com/huggingface/safetensors) is a length, a JSON header, and the tensors' bytes
behind each other, so there is nothing in it that could be executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from minizero.checkpoint.files import CheckpointError
from minizero.dist.boxes import Box, part_of, shape_of, whole_box

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes, as the library has it: no header may take more memory than this
ALIGNMENT = 8  # of the first tensor's bytes
BLOCK = 1 << 20  # bytes that are hashed and written, or read and hashed, together: what a core's cache holds
HASHES: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}


# ---- writing ----


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written: any strides, any device.

    Attributes:
        make: gives the values when it is their turn to be written; `values`, on the meta device, is what they are like.
    """

    key: str
    values: Tensor
    make: Callable[[], Tensor] | None = None


def write_tensors(path: Path, entries: Sequence[Entry], checksum: str = "xxh3_128") -> dict[str, Any]:
    """Write `entries` to `path` and make them survive a power cut; at most one of them is copied, or made, at a time.

    Returns what a manifest says of the file: its name, size in bytes, and `checksum` (a key of `HASHES`) of its bytes.
    """
    entries = sorted(entries, key=lambda entry: -entry.values.element_size())  # so that each is aligned to its dtype
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    reached = 0
    for entry in entries:
        assert entry.key not in header, entry.key
        place = [reached, reached + entry.values.nbytes]
        header[entry.key] = {
            "dtype": CODES[entry.values.dtype], "shape": list(entry.values.shape), "data_offsets": place
        }  # fmt: skip
        reached = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    digest, written = HASHES[checksum](), 0
    with open(path, "xb", buffering=0) as file:
        for part in _parts(text, entries):
            for low in range(0, len(part), BLOCK):
                block = part[low : low + BLOCK]
                digest.update(block)
                _write_all(file, block)
            written += len(part)
        os.fsync(file.fileno())
    return {"file": path.name, "bytes": written, checksum: digest.hexdigest()}


def _parts(text: bytes, entries: Iterable[Entry]) -> Iterator[memoryview]:
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for entry in entries:
        if entry.values.numel():
            yield _bytes_of((entry.values if entry.make is None else entry.make()).detach().cpu().contiguous())


def _write_all(file: Any, part: memoryview) -> None:
    while len(part):
        part = part[file.write(part) :]


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def hash_file(path: Path, checksum: str) -> str:
    """`checksum` of the bytes of `path`, in hexadecimal."""
    digest = HASHES[checksum]()
    block = memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


# ---- reading ----


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file: `start` in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int


class TensorFile:
    """The tensors of one safetensors file, by key.

    Attributes:
        path: of the file. places: of its tensors.

    Raises CheckpointError naming the file, before any memory is taken for a tensor, when the header is not one of
    tensors that lie behind each other and fill the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # closed by `close`
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        try:
            self.places = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _bad(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} cannot be read as safetensors: {why}")

    def _read_header(self) -> dict[str, Place]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise self._bad(f"the header is {length} bytes long, in a file of {size} bytes")
        try:
            header = json.loads(self._file.read(length))
        except (ValueError, RecursionError) as error:
            raise self._bad(f"its header is no JSON: {error}") from None
        if not isinstance(header, dict):
            raise self._bad("its header is no table")
        header.pop("__metadata__", None)
        places, reached = {}, 0
        for key, (start, stop, place) in sorted(
            ((key, self._place(key, said, 8 + length)) for key, said in header.items()), key=lambda item: item[1][:2]
        ):
            if start != reached:
                raise self._bad(f"bytes from {min(start, reached)} of the tensors are nobody's, or {key}'s and others'")
            places[key], reached = place, stop
        if reached != size - 8 - length:
            raise self._bad(f"its tensors have {reached} bytes, the file has {size - 8 - length} for them")
        return places

    def _place(self, key: str, said: Any, first: int) -> tuple[int, int, Place]:
        """(start, stop, place) of tensor `key`, from what the header says of it."""
        try:
            dtype, shape, (start, stop) = said["dtype"], said["shape"], said["data_offsets"]
            numbers_are_whole = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
        except (TypeError, KeyError, ValueError):
            raise self._bad(f"its header says {str(said)[:80]} of {key}") from None
        if not numbers_are_whole or dtype not in DTYPES:
            raise self._bad(f"{key} is of dtype {str(dtype)[:20]} and shape {str(shape)[:80]}")
        if stop - start != prod(shape) * DTYPES[dtype].itemsize:
            raise self._bad(f"{key} has {stop - start} bytes, but dtype {dtype} and shape {shape}")
        return start, stop, Place(dtype, tuple(shape), first + start)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.places[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return DTYPES[self.places[key].dtype]

    def read(self, key: str, box: Box | None = None) -> Tensor:
        """The elements of tensor `key` in `box` (None: all), in the file's dtype."""
        place = self.known(key, box)
        box = whole_box(place.shape) if box is None else box
        depth = next((dim for dim, (low, high) in enumerate(box) if high - low != 1), len(box))
        lies_together = box[depth + 1 :] == whole_box(place.shape)[depth + 1 :]
        rows = box if lies_together else (*box[: depth + 1], *whole_box(place.shape[depth + 1 :]))
        values = torch.empty(shape_of(rows), dtype=DTYPES[place.dtype])
        self._fill(values, place, rows)
        return (
            values if lies_together else part_of(values, (*whole_box(shape_of(rows)[: depth + 1]), *box[depth + 1 :]))
        )

    def read_into(self, target: Tensor, key: str, box: Box) -> None:
        """target <- the elements of tensor `key` in `box`, cast; straight into its memory where that can be."""
        place = self.known(key, box)
        whole = whole_box(place.shape)
        direct = target.dtype == DTYPES[place.dtype] and target.device.type == "cpu" and target.is_contiguous()
        if direct and box[1:] == whole[1:]:
            self._fill(target, place, box)
        else:
            target.copy_(self.read(key, box))

    def known(self, key: str, box: Box | None = None) -> Place:
        """Where tensor `key` is. Raises CheckpointError when it is not there, or has no such box."""
        place = self.places.get(key)
        if place is None:
            raise CheckpointError(f"{self.path} has no {key}")
        if box is not None and (
            len(box) != len(place.shape)
            or any(not 0 <= low <= high <= size for (low, high), size in zip(box, place.shape, strict=True))
        ):
            raise CheckpointError(f"{self.path}: {key} has shape {list(place.shape)}, which has no {list(box)}")
        return place

    def _fill(self, target: Tensor, place: Place, box: Box) -> None:
        """Read `box`, whose elements lie behind each other, into the contiguous `target`."""
        if not target.numel():
            return
        strides = [prod(place.shape[dim + 1 :]) for dim in range(len(place.shape))]
        first = sum(low * stride for (low, _), stride in zip(box, strides, strict=True)) * target.itemsize
        memory, offset = _bytes_of(target), place.start + first
        while len(memory):
            count = os.preadv(self._file.fileno(), [memory[: 1 << 30]], offset)
            if not count:
                raise self._bad("it ended while it was read")
            memory, offset = memory[count:], offset + count
