"""From a checkpoint to a folder that HuggingFace's tools load: no process group, no GPU, one tensor at a time.

    model.safetensors, or shards and model.safetensors.index.json     config.json     generation_config.json
    tokenizer.json, tokenizer_config.json, …                          where a tokenizer is known

The checkpoint's manifest says which model it is. The weights are its masters, put together from their boxes and cast
once, whatever the layout that wrote them.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minizero.checkpoint.files import move_into_place, write_synced
from minizero.checkpoint.inspect import resolve, verify
from minizero.checkpoint.load import Reader
from minizero.checkpoint.manifest import BufferFacts, Manifest
from minizero.checkpoint.state import key_of
from minizero.checkpoint.tensor_file import Entry, write_tensors
from minizero.checkpoint.weights import INDEX, WHOLE
from minizero.data.tokenizer import Tokenizer
from minizero.dist.boxes import whole_box
from minizero.models.hf import TOKEN_IDS
from minizero.zero.policy import DTYPES

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""Of whatever kind: copied as they are."""


def export_hf(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    tokenizer: Path | None = None,
) -> list[str]:
    """Write a checkpoint as the new folder `out`; it is whole, or not there. Returns lines on what is in it.

    Args:
        checkpoint: a checkpoint, or a folder of them or of a run, of which the latest is taken.
        dtype: of floating weights, fp32, bf16 or fp16; None: that in which the run computed.
        max_shard_size: of one file, such as 5GB (decimal); a tensor that is larger gets a file of its own.
        tokenizer: a `tokenizer.json` of ours, or a folder with a tokenizer's files; None: that of the run, or of the
            folder that the model was loaded from.

    Raises CheckpointError for a checkpoint that is damaged or not there, and ValueError for what cannot be meant.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype is {dtype!r}; legal: {', '.join(DTYPES)}")
    limit = size_in_bytes(max_shard_size)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists; legal: a folder that does not, or an empty one")
    path = resolve(checkpoint)
    manifest = verify(path)
    config = manifest.model
    origin = (config or {}).pop("_name_or_path", None)  # of the machine that trained, and nobody else's business
    precision = manifest.layout.precision if dtype is None else dtype
    source = tokenizer or known_tokenizer(path, origin)
    temporary = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        lines = [write_weights(temporary, path, manifest, DTYPES[precision], limit)]
        ids = write_tokenizer(temporary, source, config) if source is not None else {}
        if config is not None:
            write_configs(temporary, config | ids, DTYPES[precision])
        move_into_place(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if config is None:
        lines.append("no config.json: the checkpoint is of a model that HuggingFace does not have")
    lines.append(f"tokenizer: {source}" if source is not None else "no tokenizer: none is known; --tokenizer names one")
    return lines


# ---- weights ----


def write_weights(folder: Path, path: Path, manifest: Manifest, dtype: torch.dtype, limit: int) -> str:
    """Write parameters, tied ones once, and persistent buffers, floating ones as `dtype`; returns a line on them."""
    with Reader(path, manifest) as reader:
        entries = [parameter_entry(reader, name, facts.shape, dtype) for name, facts in manifest.parameters.items()]
        entries += [
            buffer_entry(reader, name, facts, dtype) for name, facts in manifest.buffers.items() if facts.persistent
        ]
        shards = split(entries, limit)
        total = sum(entry.values.nbytes for entry in entries)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = WHOLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(folder / file, shard)
            weight_map |= {entry.key: file for entry in shard}
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    name = str(dtype).removeprefix("torch.")
    return f"{path}: {len(entries)} tensors, {total:,} bytes, {name}, in {len(shards)} file{'s' * (len(shards) > 1)}"


def parameter_entry(reader: Reader, name: str, shape: Sequence[int], dtype: torch.dtype) -> Entry:
    """A parameter that is put together when it is written."""
    box, file = next(iter(reader.boxes.get(("master", name), [])), (None, ""))
    if box is not None:  # else it has no elements
        dtype = cast(reader.file(file).dtype(key_of("master", name, box)), dtype)

    def make() -> Tensor:
        values = torch.empty(tuple(shape), dtype=dtype)
        reader.fill(values, "master", name, whole_box(shape))
        return values

    return Entry(name, torch.empty(tuple(shape), dtype=dtype, device="meta"), make)


def buffer_entry(reader: Reader, name: str, facts: BufferFacts, dtype: torch.dtype) -> Entry:
    """A buffer, which one file has whole."""
    file, key = reader.file(facts.file), f"buffer/{name}"
    dtype = cast(file.dtype(key), dtype)
    like = torch.empty(file.shape(key), dtype=dtype, device="meta")
    return Entry(name, like, lambda: file.read(key).to(dtype))


def cast(found: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    """Floating values change their dtype, others keep it."""
    return wanted if found.is_floating_point else found


def split(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """`entries` in their order, in parts of at most `limit` bytes, or of one that is larger."""
    parts: list[list[Entry]] = [[]]
    room = limit
    for entry in entries:
        if entry.values.nbytes > room and parts[-1]:
            parts.append([])
            room = limit
        parts[-1].append(entry)
        room -= entry.values.nbytes
    return parts


def size_in_bytes(text: str) -> int:
    """`5GB` as 5 000 000 000, as HuggingFace counts. Raises ValueError for what is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B|)", text.strip().upper())
    if found is None or not (size := int(float(found[1]) * UNITS[found[2]])):
        raise ValueError(f"max_shard_size is {text!r}; legal: a number of bytes, or one of {', '.join(UNITS)[2:]}: 5GB")
    return size


# ---- what stands beside the weights ----


def write_configs(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """config.json and generation_config.json."""
    config.pop("dtype", None)
    name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**config, "torch_dtype": name})  # all versions of transformers read this name
    ids = {name: config[name] for name in TOKEN_IDS if config.get(name) is not None}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})


def known_tokenizer(path: Path, origin: str | None) -> Path | None:
    """That of the run that `path` is a checkpoint of, or of the folder that the model came from; None: neither."""
    run = path.parent.parent
    if (run / TOKENIZER).is_file():
        return run if (run / TOKENIZER_CONFIG).is_file() else run / TOKENIZER
    return Path(origin) if origin is not None and (Path(origin) / TOKENIZER_CONFIG).is_file() else None


def write_tokenizer(folder: Path, source: Path, config: dict[str, Any] | None) -> dict[str, int]:
    """Copy a tokenizer's files, or write those of one of ours; returns the ids of its special tokens, where ours.

    Raises ValueError when it is none, or has more tokens than the model.
    """
    if (source / TOKENIZER_CONFIG).is_file():
        copy_tokenizer(source, folder)
        return {}
    file = source / TOKENIZER if source.is_dir() else source
    tokenizer = Tokenizer.load(file, (config or {}).get("eos_token_id"))
    if config is not None and tokenizer.vocab_size > config["vocab_size"]:
        raise ValueError(f"{file} has {tokenizer.vocab_size} tokens, the model {config['vocab_size']}")
    shutil.copyfile(file, folder / TOKENIZER)
    if not tokenizer.is_ours:
        return {}
    longest = (config or {}).get("max_position_embeddings", (config or {}).get("n_positions"))
    write_json(folder / TOKENIZER_CONFIG, tokenizer.hf_config(longest))
    return {"bos_token_id": tokenizer.separator_id, "eos_token_id": tokenizer.separator_id}


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files, whatever its kind."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """A new file, for people to read too."""
    write_synced(path, (json.dumps(tree, indent=2) + "\n").encode())
