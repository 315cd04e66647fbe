"""Joins the processes, and lays the named mesh over them.

The mesh is a torch `DeviceMesh` with the axes of `ParallelDims`. It is made once and handed around as an argument;
nothing in minizero keeps it in a module. Every process group has an explicit timeout: torch's own default of half
an hour turns one dead rank into half an hour of silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from minizero.dist.dims import AXES, ParallelDims
from minizero.dist.rendezvous import agree_on_attempt
from minizero.utils.deadline import ends_after

DEFAULT_TIMEOUT = 120.0  # seconds
WORLD = "world"  # the axis of all ranks
LONGEST_JOINING = 3  # timeouts, one behind the other: a store that is found, ranks that come, a group that connects


def local_device() -> torch.device:
    """The device of this process: its own GPU where one is visible, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def init_distributed(dist_backend: str | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
    """Join the process group that `torchrun` describes in the environment; alone, form a group of one.

    Args:
        dist_backend: "nccl" or "gloo"; None picks nccl where a GPU is visible.
        timeout: seconds after which a collective that a peer never joins is an error.

    Raises ConnectionError when the store or a peer does not come in time.
    """
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    backend = dist_backend or ("nccl" if device.type == "cuda" else "gloo")
    if not dist.is_backend_available(backend) or (backend == "nccl" and device.type != "cuda"):
        legal = "gloo, nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
        raise ValueError(f"dist.backend {backend!r} is not available on this machine; legal here: {legal}")
    limit = timedelta(seconds=timeout)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    with joining(f"rank {rank} of {world_size}, joining the job at {where},", timeout):
        store, rank, world_size = next(iter(dist.rendezvous("env://", rank, world_size, timeout=limit)))
        prefixed = dist.PrefixStore(agree_on_attempt(store, rank, world_size, timeout), store)
        dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world_size, timeout=limit)


@contextmanager
def joining(what: str, timeout: float) -> Iterator[None]:
    """Inside, processes connect with the help of the store. Raises ConnectionError when one does not in time.

    Behind a cable that was cut the store's client waits for ever: then the process ends.
    """
    seconds = LONGEST_JOINING * timeout
    try:
        with ends_after(seconds, lambda: f"{what} got nowhere in {seconds:g} s; this process ends"):
            yield
    except (RuntimeError, OSError) as error:  # a FileStore's timeout has no class of its own
        reason = str(error).partition("\n")[0]
        raise ConnectionError(f"{what} failed: {reason}") from error


def new_group(ranks: list[int], timeout: float, **more: Any) -> dist.ProcessGroup:
    """torch's, with a timeout also where it hangs."""
    with joining(f"rank {dist.get_rank()}, making a group of ranks {ranks},", timeout):
        return dist.new_group(ranks, timeout=timedelta(seconds=timeout), **more)


def build_mesh(dims: ParallelDims, timeout: float = DEFAULT_TIMEOUT) -> DeviceMesh:
    """A `DeviceMesh` with one named axis per parallel kind (`pp`, `dp`, `cp`, `tp`); collective over all ranks.

    Raises ValueError when `dims` was made for another world size.
    """
    if dims.world_size != dist.get_world_size():
        raise ValueError(f"dims are for {dims.world_size} ranks, the process group has {dist.get_world_size()}")
    every_group = sorted({ranks for axis in AXES for ranks in dims.groups(axis)})
    # All ranks create all groups, also those they are not in; axes of the same ranks share one.
    groups = {ranks: new_group(list(ranks), timeout) for ranks in every_group}
    mine = [groups[dims.ranks_along(axis, dist.get_rank())] for axis in AXES]
    grid = torch.arange(dims.world_size).view(*dims.degrees.values())
    device_type = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return DeviceMesh.from_group(mine, device_type, mesh=grid, mesh_dim_names=AXES)


def dims_of(mesh: DeviceMesh) -> ParallelDims:
    """The degrees that `mesh` was built with."""
    degrees = dict(zip(AXES, mesh.mesh.shape, strict=True))
    return ParallelDims(mesh.mesh.numel(), tp=degrees["tp"], pp=degrees["pp"], cp=degrees["cp"])


def group_along(mesh: DeviceMesh | None, axis: str, timeout: float) -> dist.ProcessGroup:
    """The process group of one axis of `mesh`, of several as one ("dp_cp"), or of all ranks ("world").

    Collective over its ranks where several axes have more than one rank: then the group is made here.
    """
    if axis == WORLD:
        return dist.distributed_c10d._get_default_group()
    assert mesh is not None
    dims = dims_of(mesh)
    names = axis.split("_")
    wide = [name for name in names if dims.degrees[name] > 1]
    if len(wide) < 2:
        return mesh.get_group((wide or names)[0])
    ranks = list(dims.ranks_along(axis, dist.get_rank()))
    return new_group(ranks, timeout, use_local_synchronization=True)
