"""Sampler and loaders: every sample once an epoch, every held-out token once, whatever the number of ranks."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minizero.data.loader import EvaluationLoader, TokenLoader
from minizero.data.sampler import permute, sample_indices
from minizero.data.shards import TokenStream, write_split

SEEDS = st.integers(0, 2**40)


def stream_of(folder: Path, num_tokens: int) -> TokenStream:
    """A stream whose token i is i + 1 (its ends: 0)."""
    assert num_tokens >= 2
    ids = list(range(2, num_tokens))
    write_split(folder, "train", [("d", 3 * len(ids), ids)], separator_id=0, vocab_size=70_000, tokens_per_file=11)
    return TokenStream(folder, "train")


# --------------------------------------------------------------------------------------------------- sampler


@given(st.integers(1, 300), SEEDS, st.integers(0, 5))
@settings(deadline=None)
def test_permute_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, seed, epoch)) == list(range(size))


@given(st.integers(1, 60), st.integers(1, 40), SEEDS)
@settings(deadline=None)
def test_no_sample_twice_or_lost(num_samples: int, batch: int, seed: int) -> None:
    """Batches laid end to end are whole epochs, each a permutation."""
    steps = math.ceil(3 * num_samples / batch)
    flat = np.concatenate([sample_indices(seed, 0, step, 0, 1, num_samples, batch) for step in range(steps)])
    for epoch in range(3):
        assert sorted(flat[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


@given(st.integers(1, 60), st.integers(1, 6), SEEDS, st.integers(0, 30), st.integers(0, 2))
@settings(deadline=None)
def test_global_order_does_not_depend_on_the_number_of_ranks(
    num_samples: int, unit: int, seed: int, step: int, epoch: int
) -> None:
    batch = 12 * unit
    whole = sample_indices(seed, epoch, step, 0, 1, num_samples, batch)
    assert whole.dtype == np.int64 and whole.shape == (batch,)
    for dp_size in (2, 3, 4, 12):
        parts = [sample_indices(seed, epoch, step, rank, dp_size, num_samples, batch) for rank in range(dp_size)]
        assert all(len(part) == batch // dp_size for part in parts)
        assert np.array_equal(np.concatenate(parts), whole)


@given(st.integers(1, 40), st.integers(1, 10), SEEDS)
@settings(deadline=None)
def test_an_epoch_starts_where_the_one_before_ends(num_samples: int, batch: int, seed: int) -> None:
    steps = -(-2 * num_samples // batch)
    flat = np.concatenate([sample_indices(seed, 0, step, 0, 1, num_samples, batch) for step in range(steps)])
    second = sample_indices(seed, 1, 0, 0, 1, num_samples, num_samples)
    assert np.array_equal(flat[num_samples : 2 * num_samples], second)


def test_order_depends_on_seed_and_epoch() -> None:
    orders = [tuple(permute(np.arange(1000), 1000, seed, epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


@pytest.mark.parametrize("size", [1000, 4097])
def test_order_looks_random(size: int) -> None:
    """Displacements, neighbours and fixed points behave as those of a random permutation (bounds: six sigma)."""
    fixed = 0
    for seed in range(30):
        order = permute(np.arange(size), size, seed, 0)
        correlation = np.corrcoef(np.arange(size), order)[0, 1]
        assert abs(correlation) < 6 / math.sqrt(size)
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 6 / math.sqrt(size)
        fixed += int((order == np.arange(size)).sum())
    assert abs(fixed - 30) < 6 * math.sqrt(30)


def test_huge_corpora_take_no_memory() -> None:
    indices = sample_indices(0, 3, 10**6, 1, 2, 10**12, 8)
    assert len(set(indices)) == 4 and indices.min() >= 0 and indices.max() < 10**12


@pytest.mark.parametrize(("num_samples", "batch", "dp_size"), [(10, 5, 2), (0, 4, 2), (10, 0, 1)])
def test_impossible_batches_are_refused(num_samples: int, batch: int, dp_size: int) -> None:
    with pytest.raises(ValueError, match=r"train\.global_batch_size must be a multiple"):
        sample_indices(0, 0, 0, 0, dp_size, num_samples, batch)


# --------------------------------------------------------------------------------------------------- loaders


def first_tokens(loader: TokenLoader, batches: int) -> list[int]:
    return [int(token) for batch in islice(loader, batches) for token in batch["input_ids"][:, 0]]


def test_labels_are_the_next_tokens(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 50)
    loader = TokenLoader(stream, sequence_length=7, global_batch_size=4, micro_batch_size=2, seed=0)
    whole = torch.from_numpy(stream.read(0, 50))
    for batch in islice(loader, 8):
        inputs_BS, labels_BS = batch["input_ids"], batch["labels"]
        assert inputs_BS.shape == labels_BS.shape == (2, 7) and inputs_BS.dtype == labels_BS.dtype == torch.int64
        for inputs_S, labels_S in zip(inputs_BS, labels_BS, strict=True):
            start = max(int(inputs_S[0]) - 1, 0)
            assert torch.equal(inputs_S, whole[start : start + 7]) and torch.equal(
                labels_S, whole[start + 1 : start + 8]
            )


def test_an_epoch_of_batches_is_every_sample(tmp_path: Path) -> None:
    loader = TokenLoader(
        stream_of(tmp_path, 7 * 12 + 5), sequence_length=7, global_batch_size=4, micro_batch_size=2, seed=3
    )
    assert loader.num_samples == 12
    assert sorted(first_tokens(loader, 6)) == [0, *(7 * i + 1 for i in range(1, 12))]


@given(SEEDS, st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 2]), st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_ranks_and_resumption_follow_the_global_order(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dp_size: int, micro: int, start: int
) -> None:
    stream = stream_of(tmp_path_factory.mktemp("stream"), 60)
    sizes = {"sequence_length": 4, "global_batch_size": 12, "seed": seed}
    whole = first_tokens(TokenLoader(stream, micro_batch_size=12, **sizes), start + 2)[start * 12 :]
    parts: list[list[int]] = [[], []]
    for rank in range(dp_size):
        loader = TokenLoader(
            stream, micro_batch_size=micro, dp_rank=rank, dp_size=dp_size, start_sample=12 * start, **sizes
        )
        mine = first_tokens(loader, 2 * 12 // dp_size // micro)
        parts[0] += mine[: 12 // dp_size]
        parts[1] += mine[12 // dp_size :]
    assert parts[0] + parts[1] == whole


def test_impossible_loaders_are_refused(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 8)
    with pytest.raises(ValueError, match=r"8 tokens, less than one sequence of 8 \+ 1"):
        TokenLoader(stream, sequence_length=8, global_batch_size=1, micro_batch_size=1, seed=0)
    with pytest.raises(ValueError, match="global_batch_size 6 is not a multiple of micro_batch_size 2 x 2"):
        TokenLoader(stream, sequence_length=2, global_batch_size=6, micro_batch_size=2, seed=0, dp_size=2)
    with pytest.raises(ValueError, match="stride 9: legal are 1 ... 8"):
        EvaluationLoader(stream, sequence_length=8, batch_size=1, stride=9)


@given(st.integers(2, 90), st.integers(1, 12), st.integers(1, 4), st.sampled_from([1, 2, 3]), st.data())
@settings(deadline=None, max_examples=80)
def test_evaluation_covers_every_token_once(
    tmp_path_factory: pytest.TempPathFactory,
    num_tokens: int,
    length: int,
    batch: int,
    dp_size: int,
    data: st.DataObject,
) -> None:
    stream = stream_of(tmp_path_factory.mktemp("stream"), num_tokens)
    stride = data.draw(st.integers(1, length))
    whole = stream.read(0, num_tokens).tolist()
    seen: list[int] = []
    for rank in range(dp_size):
        loader = EvaluationLoader(
            stream, sequence_length=length, batch_size=batch, stride=stride, dp_rank=rank, dp_size=dp_size
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        for part in batches:
            assert part["input_ids"].shape == part["labels"].shape == (batch, length)
            for inputs, labels in zip(part["input_ids"].tolist(), part["labels"].tolist(), strict=True):
                counted = [s for s in range(length) if labels[s] != -100]
                if not counted:
                    continue
                first = labels[counted[0]]
                place = first - 1 if first else num_tokens - 1  # of the first counted label in the stream
                context = min(place, length - len(counted) + 1)
                assert counted == list(range(counted[0], counted[0] + len(counted))) and len(counted) <= stride
                assert counted[0] + 1 == context, "all the context that the stream and the window have"
                start = place - counted[0] - 1
                assert inputs[: counted[-1] + 1] == whole[start : place + len(counted) - 1]
                seen += [labels[s] for s in counted]
    assert sorted(seen) == sorted(whole[1:])
