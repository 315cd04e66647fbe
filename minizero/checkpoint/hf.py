"""A model from a HuggingFace folder, without its values: they are read by slices, once it is known who keeps what.

Read are `config.json` and safetensors: nothing that could be executed, whoever wrote the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minizero.checkpoint.weights import WeightFiles
from minizero.models import build
from minizero.models.gpt2 import GPT2
from minizero.models.hf import TOKEN_IDS, from_hf
from minizero.models.llama import Llama


def load_hf(folder: str | Path, **changes: Any) -> Llama | GPT2:
    """Our model (`minizero.models`) of a folder with a GPT-2, Llama or Qwen3, on the meta device.

    `minizero.initialize` fills it from the folder, each rank reading the slices that it keeps, in any layout. Values
    are cast to what `precision` says, with masters in fp32.

    Args:
        changes: settings of `[model]` that replace the file's, such as `dropout=0.0`.

    Raises ValueError naming the key, its value and what is legal, for a config of what our models do not have, and
    CheckpointError for a folder without weights in safetensors.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {folder} is no folder of HuggingFace's")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    model = from_config(config, path, changes)
    WeightFiles(Path(folder), model.own_name)  # what is missing or damaged is said here, not when processes have met
    model.pretrained = Path(folder).absolute()
    model.origin = {**model.origin, "_name_or_path": str(model.pretrained)}
    return model


def from_config(config: Any, source: Path, changes: Mapping[str, Any]) -> Llama | GPT2:
    """Our model of what a `config.json` says, on the meta device, with nothing to be filled from.

    Raises ValueError as `load_hf` does; it names `source`.
    """
    try:
        settings, vocab_size, positions = from_hf(config, changes)
        with torch.device("meta"):
            model = build(settings, vocab_size, positions)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    assert isinstance(model, Llama | GPT2)
    model.origin = {name: config[name] for name in (*TOKEN_IDS, "_name_or_path") if name in config}
    return model
