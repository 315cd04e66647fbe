"""The data room: corpus -> tokenizer -> token shards -> sampler -> batches, each in its own file."""

from minizero.data.loader import EvaluationLoader, TokenLoader
from minizero.data.prepared import PreparedData, prepare
from minizero.data.workers import outlive_signals

__all__ = ["EvaluationLoader", "PreparedData", "TokenLoader", "outlive_signals", "prepare"]
