"""Weights that several ranks hold alike must be alike: a flipped bit in one copy trains on, and nobody sees it.

Every copy is summed up as integers, a number per flat group, which any single flipped bit changes. Copies are: at
stages below 3 the whole parameters, on all data-parallel ranks; at every stage what tensor-parallel ranks share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from minizero.dist.collectives import Communicator
from minizero.zero.flat import FlatGroup
from minizero.zero.runtime import ZeroRuntime

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class ReplicaError(RuntimeError):
    """Ranks that should hold the same weights do not."""


def check_replicas(runtime: ZeroRuntime, world: Communicator) -> None:
    """Compare all copies; collective over `world`. Raises ReplicaError on every rank, naming unit and ranks."""
    found = ""
    if not runtime.policy.shards_parameters:
        found = compare(runtime.comm, runtime.groups, [[*range(runtime.comm.size)]] * len(runtime.groups))
    if runtime.tensor is not None and not found:
        copies = [list(runtime.tensor.copies(group.parameters[0])) for group in runtime.groups]
        found = compare(runtime.tensor.comm, runtime.groups, copies)
    said = world.gather_bytes(found.encode(), "replicas", runtime.device)
    lines = [f"seen by rank {rank}: {text.decode()}" for rank, text in enumerate(said) if text]
    if lines:
        raise ReplicaError("weights that ranks hold alike differ, so one of them is damaged:\n  " + "\n  ".join(lines))


def compare(comm: Communicator, groups: Sequence[FlatGroup], copies: Sequence[Sequence[int]]) -> str:
    """What is wrong with the first group whose copies on ranks `copies` of the axis differ; collective over it."""
    if comm.size == 1 or not groups:
        return ""
    sums = torch.stack([total(group.shard if group.frees_whole else group.flat) for group in groups])
    columns = comm.gather_rows(sums, "replicas").T.tolist()
    for group, ranks, column in zip(groups, copies, columns, strict=True):
        of_copies = {rank: column[rank] for rank in ranks}
        (usual, count), *others = Counter(of_copies.values()).most_common()
        if others:
            differ = [rank for rank, value in of_copies.items() if value != usual]
            named = ", ".join(group.names[:3]) + (", ..." if len(group.names) > 3 else "")
            which = (
                f"rank {differ} differs from {count} others" if count > len(differ) else f"ranks {[*ranks]} disagree"
            )
            return f"{named}: {which} (axis {comm.axis})"
    return ""


def total(values: Tensor) -> Tensor:
    """The bits of `values`, added up as integers: 0-d int64."""
    return values.view(INTEGERS[values.element_size()]).sum(dtype=torch.int64)
