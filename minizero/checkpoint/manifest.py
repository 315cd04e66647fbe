"""What the manifest of a checkpoint says, and its frame on disk.

    {"xxh3_128": "<of the bytes of the next line>", "manifest":
    {"format": 2, "tag": "global_step40", …, "files": [{"file": "rank00000.safetensors", "bytes": …, …}, …]}
    }

It carries a checksum of its own, over its exact bytes, and one for every file: a bit that flips anywhere in the folder
is found before anything is used. What it says is checked against this schema before anybody looks at it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import xxhash
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from minizero.checkpoint.files import MANIFEST, SAFE_NAME, CheckpointError
from minizero.dist.boxes import Box, cover_exactly

FORMAT = 2
LONGEST = 1 << 30  # bytes
_FRAME = re.compile(rb'\{"xxh3_128": "([0-9a-f]{32})", "manifest":\n(.*)\n\}\n', re.DOTALL)


def _plain(name: str) -> str:
    if not SAFE_NAME.fullmatch(name):
        raise ValueError(f"file name {name!r} is not a plain name")
    return name


FileName = Annotated[str, AfterValidator(_plain)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Scalar(_Part):
    """Optimizer state that is a 0-d tensor."""

    value: int | float | bool
    dtype: Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "bool"]

    def tensor(self) -> torch.Tensor:
        return torch.tensor(self.value, dtype=getattr(torch, self.dtype))


class ParameterFacts(_Part):
    """shape: of the whole parameter. scalars: optimizer state that is one number for all of it, by key."""

    shape: tuple[NonNegativeInt, ...]
    scalars: dict[str, Scalar | int | float] = {}


class BufferFacts(_Part):
    """A buffer's shape, the file that has it, and whether it belongs to the model's state, or is computed anew."""

    shape: tuple[NonNegativeInt, ...]
    file: FileName
    persistent: bool = True


class FileFacts(_Part):
    """A file of the checkpoint.

    Attributes:
        bytes: its size. xxh3_128, sha256: of its content; one of them is there. boxes: (kind, parameter, box) of what
            it holds of parameters and their optimizer state.
    """

    file: FileName
    bytes: NonNegativeInt
    xxh3_128: str | None = None
    sha256: str | None = None
    boxes: tuple[tuple[str, str, tuple[tuple[NonNegativeInt, NonNegativeInt], ...]], ...]

    @property
    def checksum(self) -> tuple[str, str]:
        """(name, value) of the checksum. Raises CheckpointError where there is none."""
        for name in ("xxh3_128", "sha256"):
            if (value := getattr(self, name)) is not None:
                return name, value
        raise CheckpointError(f"{MANIFEST} has no checksum of {self.file}; legal: xxh3_128, sha256")


class Counters(_Part):
    """Of the run: steps, sequences, skipped steps, passes through the model. The data cursor is `global_samples`."""

    global_steps: NonNegativeInt
    global_samples: NonNegativeInt
    skipped_steps: NonNegativeInt
    micro_steps: NonNegativeInt


class LossScale(_Part):
    """Where dynamic loss scaling was."""

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    steps: NonNegativeInt
    last_overflow: int
    hysteresis_left: int


class Layout(_Part):
    """How the run that saved was laid out. Nothing on disk depends on it but whose random state is whose."""

    pp: PositiveInt
    dp: PositiveInt
    cp: PositiveInt
    tp: PositiveInt
    zero_stage: NonNegativeInt
    precision: str
    micro_batch_size: PositiveInt
    accumulation: PositiveInt

    @property
    def degrees(self) -> tuple[int, int, int, int]:
        return self.pp, self.dp, self.cp, self.tp

    def __str__(self) -> str:
        wide = [f"{axis} {getattr(self, axis)}" for axis in ("pp", "dp", "cp", "tp") if getattr(self, axis) > 1]
        return f"{' x '.join(wide) or '1 rank'}, ZeRO {self.zero_stage}, {self.precision}"


class Manifest(_Part):
    """Everything that a checkpoint holds besides tensors.

    Attributes:
        config_hash: sha256 of the settings. versions: of packages. optimizer: the name of the update.
        model: as HuggingFace's `config.json` has it; None for one that is unknown there.
        scheduler, param_groups: as their objects give them. client_state: the caller's.
    """

    format: Literal[2]
    tag: str
    versions: dict[str, str]
    layout: Layout
    config_hash: str
    model: dict[str, Any] | None = None
    counters: Counters
    scaler: LossScale
    scheduler: dict[str, Any] | None
    optimizer: str
    param_groups: list[dict[str, Any]]
    client_state: dict[str, Any]
    parameters: dict[str, ParameterFacts]
    buffers: dict[str, BufferFacts]
    files: tuple[FileFacts, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by name."""
        return {file.file: file.bytes for file in self.files}

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.sizes.values())

    def boxes(self) -> dict[tuple[str, str], list[tuple[Box, str]]]:
        """(kind, parameter) -> [(box, file that holds it)]."""
        found: dict[tuple[str, str], list[tuple[Box, str]]] = {}
        for file in self.files:
            for kind, name, box in file.boxes:
                found.setdefault((kind, name), []).append((box, file.file))
        return found

    def check_complete(self) -> None:
        """Raise CheckpointError unless the files hold every parameter, and whatever else they hold a part of, once."""
        held = self.boxes()
        for name in self.parameters:
            held.setdefault(("master", name), [])
        for (kind, name), places in held.items():
            if name not in self.parameters:
                raise CheckpointError(f"{kind} of {name} is held, which is no parameter")
            if reason := cover_exactly((box for box, _ in places), self.parameters[name].shape):
                raise CheckpointError(f"{kind} of {name}: {reason}")
        listed = {file.file for file in self.files}
        if unlisted := sorted({facts.file for facts in self.buffers.values()} - listed):
            raise CheckpointError(f"buffers are in {unlisted[0]}, which is no file of the checkpoint")


def framed(body: bytes) -> bytes:
    """What is written as the manifest, of its JSON."""
    return b'{"xxh3_128": "%s", "manifest":\n%s\n}\n' % (xxhash.xxh3_128_hexdigest(body).encode(), body)


def parse(body: bytes, path: Path) -> Manifest:
    """The manifest that JSON says. Raises CheckpointError naming `path` and what in it is wrong."""
    try:
        return Manifest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise CheckpointError(f"{path} is damaged: {_where(first['loc'])}: {first['msg']}") from None


def _where(place: Sequence[Any]) -> str:
    return ".".join(map(str, place)) or "its JSON"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises CheckpointError unless it is there, as it was written."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder")
    if not path.is_file() or path.is_symlink():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}")
    try:
        if (size := path.stat().st_size) > LONGEST:
            raise CheckpointError(f"{path} is damaged: it has {size} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if content.startswith(b'{"format": 1'):
        raise CheckpointError(f"{path} was written by an older version of minizero, whose checkpoints are not readable")
    frame = _FRAME.fullmatch(content)
    if frame is None or xxhash.xxh3_128_hexdigest(frame[2]).encode() != frame[1]:
        raise CheckpointError(f"{path} is damaged: its content is not what its checksum was taken of")
    return parse(frame[2], path)
