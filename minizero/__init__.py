"""minizero: train models that outgrow one process, and read how.

    engine, optimizer, loader, scheduler = minizero.initialize(model=model, config="ds_config.json")
    loss = engine(batch); engine.backward(loss); engine.step()

`import minizero as deepspeed` runs a script written for DeepSpeed's engine.
"""

from __future__ import annotations

import argparse

from minizero import checkpointing, zero
from minizero.api import init_distributed, initialize
from minizero.checkpoint.hf import load_hf
from minizero.config import Config
from minizero.dist.collectives import CollectiveError
from minizero.dist.dims import ParallelDims
from minizero.engine import Engine
from minizero.parallel.pipeline.module import LayerSpec, PipelineModule, TiedLayerSpec
from minizero.zero import unsharded

__version__ = "0.1.0"


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the arguments that DeepSpeed adds to `parser`, so that its scripts parse as they are."""
    group = parser.add_argument_group("DeepSpeed", "names kept from DeepSpeed")
    group.add_argument("--deepspeed", default=False, action="store_true", help="accepted for compatibility")
    group.add_argument("--deepspeed_config", default=None, type=str, help="path of the DeepSpeed JSON config")
    group.add_argument("--deepscale", default=False, action="store_true", help="old name of --deepspeed")
    group.add_argument("--deepscale_config", default=None, type=str, help="old name of --deepspeed_config")
    return parser


__all__ = [
    "CollectiveError",
    "Config",
    "Engine",
    "LayerSpec",
    "ParallelDims",
    "PipelineModule",
    "TiedLayerSpec",
    "add_config_arguments",
    "checkpointing",
    "init_distributed",
    "initialize",
    "load_hf",
    "unsharded",
    "zero",
]
