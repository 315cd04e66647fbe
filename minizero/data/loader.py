"""Batches from a token stream: endless and shuffled to train on, or every token exactly once to evaluate.

Both yield `{"input_ids": int64 (B, S), "labels": int64 (B, S)}`, one micro-batch of this data-parallel rank at a time;
`labels[b, s]` is the token that follows `input_ids[b, s]`, or -100 where none is to be predicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from torch import Tensor

from minizero.data.sampler import sample_indices
from minizero.data.shards import TokenStream

Batch = dict[str, Tensor]
IGNORED = -100


class TokenLoader:
    """The training batches of one rank, without end.

    Sample i is the stream's tokens i·S ... (i+1)·S, the last of them only as a label; documents run into one another
    across their separators. To resume, start at the next sample: the order is a pure function (see `sampler`).

    Args:
        stream: what to read.
        sequence_length: S.
        global_batch_size: sequences per step over all ranks and micro-batches.
        micro_batch_size: sequences per yielded batch; divides global_batch_size / dp_size.
        seed: of the order.
        start_sample: samples consumed before, by batches of any size.

    Raises ValueError when the stream is too short or the batch sizes do not divide.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_sample: int = 0,
    ) -> None:
        if global_batch_size % (micro_batch_size * dp_size):
            raise ValueError(
                f"train.global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
                f"x {dp_size} data-parallel ranks"
            )
        self.num_samples = (len(stream) - 1) // sequence_length
        if self.num_samples < 1:
            raise ValueError(
                f"the {stream.split} split holds {len(stream)} tokens, less than one sequence of "
                f"{sequence_length} + 1: give more text or a smaller train.sequence_length"
            )
        self.stream, self.sequence_length, self.seed = stream, sequence_length, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size, self.start_sample = dp_rank, dp_size, start_sample

    def __iter__(self) -> Iterator[Batch]:
        for step in count():
            yield from self.step(step)

    def step(self, step: int) -> Iterator[Batch]:
        """The micro-batches of one step, counted from `start_sample`."""
        for chunk in self.samples(step, self.dp_rank).reshape(-1, self.micro_batch_size):
            yield self._batch(chunk)

    def samples(self, step: int, dp_rank: int) -> np.ndarray:
        """The samples of `dp_rank` in one step, counted from `start_sample`: int64 [global batch / dp size]."""
        return sample_indices(
            self.seed, 0, step, dp_rank, self.dp_size, self.num_samples, self.global_batch_size, self.start_sample
        )

    def _batch(self, indices: np.ndarray) -> Batch:
        length = self.sequence_length
        tokens_BS = torch.from_numpy(np.stack([self.stream.read(i * length, (i + 1) * length + 1) for i in indices]))
        return {"input_ids": tokens_BS[:, :-1].contiguous(), "labels": tokens_BS[:, 1:].contiguous()}


class EvaluationLoader:
    """Windows over a stream in which each token but the first (a separator) is a label exactly once over all ranks.

    A window of S tokens asks for the last `stride` of its labels, so each has at least S - stride tokens of context
    (as far as the stream reaches back): a smaller stride predicts better and costs more. The sum of the losses over all
    ranks, divided by `stream.num_bytes` and ln 2, is the bits per byte, with every document's end to be predicted too.

    All ranks yield equally many batches, of which some windows may be empty (all labels -100).
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        sequence_length: int,
        batch_size: int,
        stride: int | None = None,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        self.stride = sequence_length if stride is None else stride
        if not 1 <= self.stride <= sequence_length:
            raise ValueError(f"stride {self.stride}: legal are 1 ... {sequence_length}, the sequence length")
        self.stream, self.sequence_length, self.batch_size = stream, sequence_length, batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.num_windows = -(-(len(stream) - 1) // self.stride)

    def __len__(self) -> int:
        """Batches that each rank yields."""
        return -(-self.num_windows // (self.batch_size * self.dp_size))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = (number * self.dp_size + self.dp_rank) * self.batch_size
            windows = [self._window(index) for index in range(first, first + self.batch_size)]
            inputs_BS, labels_BS = (torch.from_numpy(np.stack(part)) for part in zip(*windows, strict=True))
            yield {"input_ids": inputs_BS, "labels": labels_BS}

    def _window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, labels) of the window that predicts tokens index·stride + 1 ... (index + 1)·stride."""
        inputs, labels = np.zeros(self.sequence_length, np.int64), np.full(self.sequence_length, IGNORED, np.int64)
        first = 1 + index * self.stride
        last = min(first + self.stride, len(self.stream))
        if first < last:
            start = max(0, last - 1 - self.sequence_length)
            tokens = self.stream.read(start, last)
            inputs[: len(tokens) - 1] = tokens[:-1]
            labels[first - start - 1 : last - start - 1] = tokens[first - start :]
        return inputs, labels
