"""Whole weights in one safetensors file, for inference and for other frameworks."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from minizero.zero.runtime import ZeroRuntime


def save_weights(runtime: ZeroRuntime, module: nn.Module, path: Path) -> None:
    """Write every parameter (tied ones once) and persistent buffer of `module` to `path` from rank 0; collective.

    Units are gathered one at a time; only rank 0 keeps what passes.
    """
    writes = torch.distributed.get_rank() == 0
    tensors: dict[str, torch.Tensor] = {}
    for name, value in runtime.whole_parameters():
        if writes:
            tensors[name] = value.to("cpu", copy=True).contiguous()
    if not writes:
        return
    persistent = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, owner in module.named_modules()
        for name in owner._buffers
        if name not in owner._non_persistent_buffers_set
    }
    tensors.update({name: b.detach().cpu().contiguous() for name, b in module.named_buffers() if name in persistent})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(path)
