"""Training states on disk: safetensors and a JSON manifest, in names, shapes and ranges."""

from minizero.checkpoint.files import CheckpointError

__all__ = ["CheckpointError"]
