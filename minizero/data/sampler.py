"""Which samples a rank sees at a step: a pure function, so there is no state to save and nothing to agree on.

An epoch is a permutation of all samples, keyed by (seed, epoch). The global batches are consecutive pieces of the
epochs laid end to end, so a batch may hold the end of one epoch and the start of the next: none is dropped. Ranks take
consecutive pieces of a global batch, so the global order is the same for any number of ranks.

The permutation is a Feistel network over the smallest 2^(2k) >= num_samples; a value that lands outside is sent through
again until it is inside (cycle walking; Black & Rogaway, CT-RSA 2002). It takes no memory, however large the corpus.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6


def sample_indices(
    seed: int,
    epoch: int,
    step: int,
    dp_rank: int,
    dp_size: int,
    num_samples: int,
    global_batch_size: int,
    start_sample: int = 0,
) -> NDArray[np.int64]:
    """The samples of `dp_rank` in global batch `step`, counted from the start of `epoch`, where batch 0 begins.

    Args:
        seed: of the order.
        epoch, step: where in the order; `step` may run past the end of the epoch.
        dp_rank, dp_size: which part of the global batch.
        num_samples: in an epoch.
        global_batch_size: samples per step over all ranks.
        start_sample: samples before batch 0.

    Returns int64 indices below `num_samples`, shape (global_batch_size / dp_size,).
    Raises ValueError when the batch does not divide by dp_size, or there are no samples.
    """
    if num_samples < 1 or global_batch_size < 1 or global_batch_size % dp_size:
        raise ValueError(
            f"cannot share {global_batch_size} of {num_samples} samples over {dp_size} ranks: "
            "train.global_batch_size must be a multiple of the data-parallel size, and the corpus hold a sample"
        )
    assert 0 <= dp_rank < dp_size and epoch >= 0 and step >= 0
    local = global_batch_size // dp_size
    first = epoch * num_samples + start_sample + step * global_batch_size + dp_rank * local
    positions = np.arange(first, first + local, dtype=np.int64)
    epochs, places = np.divmod(positions, num_samples)
    indices = np.empty(local, dtype=np.int64)
    for each in np.unique(epochs):
        here = epochs == each
        indices[here] = permute(places[here], num_samples, seed, int(each))
    return indices


def permute(places: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where the keyed permutation of range(size) sends `places`."""
    keys = np.frombuffer(hashlib.sha256(f"{seed}/{epoch}".encode()).digest() * 2, dtype="<u8")[:ROUNDS]
    half = max(((size - 1).bit_length() + 1) // 2, 1)
    values = _feistel(places.astype(np.uint64), half, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of range(4^half): each round adds a hash of one half of the bits to the other."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, (left ^ _mix(right + key)) & mask
    return (left << shift) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer: every bit of the input reaches every bit of the output (arithmetic modulo 2^64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
