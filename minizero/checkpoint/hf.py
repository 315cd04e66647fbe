"""A model from a HuggingFace folder, without its values: they are read by slices, once it is known who keeps what.

Read are `config.json` and safetensors: nothing that could be executed, whoever wrote the folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minizero.checkpoint.weights import files_behind
from minizero.models import build
from minizero.models.hf import TOKEN_IDS, HuggingFaceNames, from_hf


def load_hf(folder: str | Path, **changes: Any) -> nn.Module:
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
        settings, vocab_size, positions = from_hf(config, changes)
        with torch.device("meta"):
            model = build(settings, vocab_size, positions)
    except ValueError as error:  # JSON's own too
        raise ValueError(f"{path}: {error}") from None
    files_behind(Path(folder))  # what is missing is said here, not when processes have met
    assert isinstance(model, HuggingFaceNames)
    model.pretrained = Path(folder).absolute()
    ids = {name: config[name] for name in TOKEN_IDS if name in config}
    model.origin = {**ids, "_name_or_path": str(model.pretrained)}
    return model
