"""Weights in safetensors, under the model's own names: what other frameworks read and write.

Written whole by one rank. Read slice by slice: each rank takes of every parameter only what its own part needs, so a
model that was built on the meta device is filled without any rank ever holding a parameter that is cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minizero.checkpoint.files import SAFE_NAME, CheckpointError
from minizero.checkpoint.state import everyone
from minizero.checkpoint.tensor_file import TensorFile
from minizero.dist.boxes import Box, pieces, whole_box
from minizero.dist.collectives import Communicator
from minizero.dist.links import Links
from minizero.dist.sharding import TensorShard
from minizero.models.hf import HuggingFaceNames
from minizero.utils.files import replace_synced
from minizero.zero.runtime import ZeroRuntime

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"  # HuggingFace's: name -> file
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SHOWN = 3  # names in an error message


# ---- writing ----


def save_weights(runtime: ZeroRuntime, module: nn.Module, path: Path) -> None:
    """Write every parameter (tied ones once) and persistent buffer of `module` to `path` from rank 0; collective.

    Units are gathered one at a time; only the first rank of each pipeline stage keeps what passes, and sends it to
    rank 0.
    """
    keeps = runtime.comm.rank == 0 and (runtime.tensor is None or runtime.tensor.comm.rank == 0)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in runtime.whole_parameters():
        if keeps:
            tensors[name] = value.to("cpu", copy=True).contiguous()
    persistent = persistent_buffers(module)
    tensors |= {
        name: b.detach().cpu().contiguous() for name, b in module.named_buffers() if keeps and name in persistent
    }
    if runtime.pipeline is not None and keeps:
        tensors = from_all_stages(tensors, runtime.pipeline.comm, runtime.device)
    if torch.distributed.get_rank() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        replace_synced(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def from_all_stages(tensors: dict[str, Tensor], comm: Communicator, device: torch.device) -> dict[str, Tensor]:
    """On the first stage the tensors of all, those that several have once; collective over the pipeline axis."""
    links = Links(comm, device)
    names = [json.loads(row) for row in comm.gather_bytes(json.dumps([*tensors]).encode(), "names of tensors", device)]
    if comm.rank > 0:
        for name in names[comm.rank]:
            links.send(0, [tensors[name]], name)
        links.arrived(0, leave=0)
        return {}
    found = dict(tensors)
    for stage, of_stage in enumerate(names[1:], start=1):
        for name in of_stage:
            ((value, _),) = links.receive(stage, name).tensors()
            assert value is not None
            found.setdefault(name, value.cpu())
    return found


def persistent_buffers(module: nn.Module) -> set[str]:
    """Names of the buffers that belong to a model's state."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, owner in module.named_modules()
        for name in owner._buffers
        if name not in owner._non_persistent_buffers_set
    }


# ---- reading ----


class WeightFiles:
    """Tensors by name in a safetensors file, or in a folder with `model.safetensors` or HuggingFace's index of several.

    Args:
        path: what the user named. rename: the model's name of what a file calls so; None: it is not wanted.

    Attributes:
        shapes: of every tensor, by the model's name.

    Raises CheckpointError naming the file that is missing, damaged, or without a tensor that the index has in it, and a
    tensor that is there under two names.
    """

    def __init__(self, path: Path, rename: Callable[[str], str | None] = lambda name: name) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[TensorFile, str]] = {}
        for file, keys in files_behind(path).items():
            holder = TensorFile(file)
            if absent := sorted(set(keys) - holder.places.keys()):
                raise CheckpointError(f"{file} lacks {shown(absent)}, which {path / INDEX} has in it")
            for key in keys or holder.places:
                if (name := rename(key)) is None:
                    continue
                if name in self._places:
                    raise CheckpointError(f"{path} has {name} twice: as {self._places[name][1]} and as {key}")
                self.shapes[name] = holder.shape(key)
                self._places[name] = holder, key

    def read(self, name: str, box: Box) -> Tensor:
        """The elements of tensor `name` in `box`, in the file's dtype."""
        holder, key = self._places[name]
        return holder.read(key, box)

    def read_part(self, name: str, shard: TensorShard, start: int, stop: int) -> Tensor:
        """[stop - start] elements [start, stop) of a rank's part of tensor `name`, flattened; nothing else is read."""
        holder, key = self._places[name]
        values = torch.empty(stop - start, dtype=holder.dtype(key))
        for piece in pieces(shard, start, stop):
            piece.within(values, start).copy_(self.read(name, piece.box))
        return values


def files_behind(path: Path) -> dict[Path, list[str]]:
    """The safetensors files of `path`, and the names to look for in each; no names: all that it holds."""
    if path.is_file() and path.suffix == ".safetensors":
        return {path: []}
    if (path / WHOLE).is_file():  # before the index, as transformers has it
        return {path / WHOLE: []}
    index = path / INDEX
    if not index.is_file():
        if pickled := next((name for name in PICKLED if (path / name).is_file()), None):
            raise CheckpointError(
                f"{path / pickled} is pickled, and reading it may run anything: legal is {WHOLE} or {INDEX}, which "
                "transformers' from_pretrained(...) and then save_pretrained(...) write of it, where it is trusted"
            )
        raise CheckpointError(f"{path} is neither a .safetensors file nor a folder with {WHOLE} or {INDEX}")
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged: {type(error).__name__}: {error}") from error
    files: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not SAFE_NAME.fullmatch(file):
            raise CheckpointError(f"{index}: file name {file!r} is not a plain name")
        files.setdefault(path / file, []).append(name)
    return files


def load_weights(runtime: ZeroRuntime, module: nn.Module, path: Path, world: Communicator) -> None:
    """Fill parameters, masters and persistent buffers of `module` from `path` (see `WeightFiles`); collective.

    Values are cast. Of tied parameters any name may be there. Raises CheckpointError on every rank, with nothing
    changed, when a name is missing or unknown or has another shape, or tied parameters differ.
    """
    names = tied_names(module)
    elsewhere = names_elsewhere(runtime, module, names)
    rename = module.own_name if isinstance(module, HuggingFaceNames) else lambda name: name
    everyone(world, runtime.device, lambda: check_weights(WeightFiles(path, rename), runtime, module, names, elsewhere))
    runtime.unwind()
    runtime.comm.settle()  # peers may still read the shards that change now
    everyone(world, runtime.device, lambda: fill(WeightFiles(path, rename), runtime, module, names))


def tied_names(module: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every name of every parameter."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def names_elsewhere(runtime: ZeroRuntime, module: nn.Module, names: dict[nn.Parameter, list[str]]) -> set[str]:
    """Names of what other pipeline stages hold; collective."""
    if runtime.pipeline is None:
        return set()
    own = [*(name for found in names.values() for name in found), *(name for name, _ in module.named_buffers())]
    rows = runtime.pipeline.comm.gather_bytes(json.dumps(own).encode(), "names of tensors", runtime.device)
    return {name for row in rows for name in json.loads(row)}


def check_weights(
    files: WeightFiles,
    runtime: ZeroRuntime,
    module: nn.Module,
    names: dict[nn.Parameter, list[str]],
    elsewhere: set[str],
) -> None:
    """Raise CheckpointError unless the files hold exactly the model's state, in its shapes."""
    buffers = {name: tuple(buffer.shape) for name, buffer in module.named_buffers()}
    wanted = {name: runtime.shard_of(parameter).shape for parameter, found in names.items() for name in found}
    missing = [" or ".join(found) for found in names.values() if not files.shapes.keys() & set(found)]
    missing += sorted(persistent_buffers(module) & buffers.keys() - files.shapes.keys())
    unknown = sorted(files.shapes.keys() - wanted.keys() - buffers.keys() - elsewhere)
    wanted |= {name: buffers[name] for name in persistent_buffers(module) if name in buffers}
    problems = []
    if missing:
        problems.append(f"lacks {shown(missing)}")
    if unknown:
        problems.append(f"has {shown(unknown)}, which {type(module).__name__} does not have")
    for name in sorted(wanted.keys() & files.shapes.keys()):
        if files.shapes[name] != wanted[name]:
            problems.append(f"has {name} of shape {files.shapes[name]}, {type(module).__name__}'s has {wanted[name]}")
    if problems:
        raise CheckpointError(f"{files.path} {'; it '.join(problems[:SHOWN])}")
    for parameter, found in names.items():
        held = [name for name in found if name in files.shapes]
        for name in held[1:]:
            check_equal(files, held[0], name, runtime.shard_of(parameter))


def check_equal(files: WeightFiles, first: str, second: str, shard: TensorShard) -> None:
    """Raise CheckpointError when two names that are one parameter here have different values."""
    size = prod(shard.local_shape)
    if size and not torch.equal(*(files.read_part(name, shard, 0, size) for name in (first, second))):
        raise CheckpointError(f"{files.path} has different values in {first} and {second}, which are tied here")


@torch.no_grad()
def fill(files: WeightFiles, runtime: ZeroRuntime, module: nn.Module, names: dict[nn.Parameter, list[str]]) -> None:
    """Put what this rank keeps in its place, one range of one parameter in memory at a time."""
    for parameter, (_, group, index) in runtime.locate().items():
        name = next(name for name in names[parameter] if name in files.shapes)
        shard = runtime.shard_of(parameter)
        for start, stop in group.needed(index):
            if start < stop:
                group.load_range(index, start, files.read_part(name, shard, start, stop))
    persistent = persistent_buffers(module)
    for name, buffer in module.named_buffers():
        if name in persistent:
            buffer.copy_(files.read(name, whole_box(buffer.shape)))


def shown(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
