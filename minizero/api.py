"""`minizero.initialize`: from a model and its settings to an engine, in DeepSpeed's signatures.

The order is the story: settings -> processes -> mesh -> ranks compare what they were given -> batch sizes -> shards ->
optimizer over the shards -> schedule -> data loader -> engine.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, DistributedSampler

from minizero.config import Config
from minizero.config.effects import without_effect
from minizero.config.load import from_any
from minizero.dist.collectives import Communicator
from minizero.dist.dims import DATA, ParallelDims
from minizero.dist.ledger import CommLedger
from minizero.dist.mesh import DEFAULT_TIMEOUT, WORLD, build_mesh, local_device
from minizero.dist.mesh import init_distributed as join_processes
from minizero.engine import Engine
from minizero.kernels.backend import Backend, chosen
from minizero.models.hf import HuggingFaceNames
from minizero.optim.build import build_optimizer
from minizero.optim.loss_scale import LossScaler
from minizero.optim.schedules import build_schedule
from minizero.parallel.pipeline.module import PipelineModule
from minizero.parallelize import Parallelized, parallelize, refuse_cut
from minizero.utils.forward import ForwardEntry
from minizero.utils.memory import keep_freed_memory
from minizero.utils.warnings import warn_once
from minizero.zero.optimizer import ZeroOptimizer
from minizero.zero.policy import Policy
from minizero.zero.runtime import ZeroRuntime

ConfigSource = Config | dict[str, Any] | str | Path


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Iterable[Any]], torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: ConfigSource | None = None,
    mesh_param: Any = None,
    config_params: ConfigSource | None = None,
) -> tuple[Engine, ZeroOptimizer, Any, Any]:
    """Shard `model` over the ranks and return `(engine, optimizer, dataloader, lr_scheduler)`; collective.

    Args:
        args: a namespace whose `deepspeed_config` names the config file, when `config` is not given.
        model: any module; on the meta device it is initialized shard by shard, and that of `load_hf` filled so.
        optimizer: a torch optimizer over the model's parameters, or a callable that makes one; None builds the
            config's.
        model_parameters: tensors or param groups for the config's optimizer; None means every trainable parameter.
        training_data: a map-style dataset; a loader of micro-batches for this rank is returned. It shuffles by
            `train.seed`, drops an incomplete last batch, and a new epoch needs `loader.sampler.set_epoch`, which
            `train_batch()` without an iterator calls itself.
        lr_scheduler: a scheduler object, or a callable optimizer -> scheduler; None builds the config's.
        config: a `Config`, a DeepSpeed JSON (path or dict), or a minizero TOML/JSON path. `config_params` is its old
            name. distributed_port, dist_init_required: of DeepSpeed's launcher; torchrun's environment takes their
            place. mpu, mesh_param: not available, since degrees are settings.

    Raises ValueError (on every rank) for settings that contradict each other, the model or the world size, and
    CheckpointError for files of `load_hf` that do not fit.
    """
    settings = from_any(one_config(args, config, config_params))
    if model is None:
        raise ValueError("initialize() needs a model")
    if mpu is not None or mesh_param is not None:
        raise ValueError(
            "initialize(mpu=, mesh_param=) is not available: tensor and pipeline degrees are settings (parallel.tp, "
            "parallel.pp)"
        )
    refuse_cut(model)
    pretrained = pretrained_folder(model)
    settings = with_stages_of(model, settings)
    say_what_is_unexpected(settings, optimizer)
    init_distributed(settings.dist.backend, distributed_port=distributed_port, timeout=settings.dist.timeout)
    mesh, comm, device = join(settings, model)
    batch = settings.batch(comm.size // settings.parallel.cp)
    num_parameters = sum(p.numel() for p in model.parameters())  # before they are shared out
    parallel = parallelize(model, settings, comm, device, batch.accumulation)
    runtime = shard(model, settings, comm, device, parallel, filled_later=pretrained is not None)
    kernels = "torch" if settings.zero.offload_optimizer == "cpu" else chosen(settings.kernels, device)
    parameters = current(model_parameters, runtime, parallel.removed)
    inner = make_optimizer(optimizer, model, parameters, settings, kernels)
    leave_out(inner, parallel.removed)
    parallel.removed.clear()  # what other stages have is free to go
    sharded = ZeroOptimizer(
        inner,
        runtime,
        scaler=LossScaler(settings.loss_scale, enabled=settings.precision == "fp16"),
        clip=settings.train.gradient_clipping,
        allow_untested=settings.zero.allow_untested_optimizer,
        kernels=kernels,
        max_skips=settings.train.max_skipped_steps,
    )
    schedule = make_schedule(lr_scheduler, sharded, settings)
    loader = make_loader(training_data, collate_fn, comm.along("dp"), batch.micro_batch_size, settings)
    if dist.get_rank() == 0:
        print(dtype_table(runtime), flush=True)
    entry = ForwardEntry(model, seed=settings.train.seed, recompute=parallel.recompute, streams=parallel.streams)
    entry.hooks += parallel.undo
    engine = Engine(
        module=model,
        optimizer=sharded,
        lr_scheduler=schedule,
        runtime=runtime,
        comm=comm,
        world=comm.along(WORLD),
        mesh=mesh,
        batch=batch,
        config=settings,
        dataloader=loader,
        entry=entry,
        num_parameters=num_parameters,
        stages=parallel,
    )
    if pretrained is not None:
        engine.load_weights(pretrained)
    return engine, sharded, loader, schedule


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int | None = None,
    verbose: bool = True,
    timeout: float | timedelta = DEFAULT_TIMEOUT,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Join the process group that `torchrun` describes in the environment; alone, form a group of one.

    Args:
        dist_backend: "nccl" or "gloo"; None picks nccl where a GPU is visible.
        distributed_port: of the rendezvous, when the environment has no MASTER_PORT.
        timeout: seconds (or a timedelta) after which a collective that a peer never joins is an error.
        init_method, rank, world_size: refused, since they are torchrun's to say. The others are DeepSpeed's, and have
            no meaning here.
    """
    if init_method is not None or rank >= 0 or world_size >= 0:
        raise ValueError("init_distributed(init_method=, rank=, world_size=): torchrun's environment says these")
    if distributed_port is not None:
        os.environ.setdefault("MASTER_PORT", str(distributed_port))
    join_processes(dist_backend, timeout.total_seconds() if isinstance(timeout, timedelta) else timeout)


def say_what_is_unexpected(settings: Config, optimizer: Any) -> None:
    """Warn of settings without effect, and of an optimizer that nobody asked for."""
    for line in without_effect(settings):
        warn_once(line)
    if optimizer is None and "optimizer" not in settings.model_fields_set:
        warn_once(f"no optimizer was given: training with {settings.optimizer.type} at lr {settings.optimizer.lr}")


def pretrained_folder(model: nn.Module) -> Path | None:
    """Where the model's values are to be read, once: another engine will find those that it has by then.

    Raises ValueError where a model of `load_hf` is a part of `model`, whose names are not those of the files.
    """
    for name, part in model.named_modules():
        if name and isinstance(part, HuggingFaceNames) and part.pretrained is not None:
            raise ValueError(f"{name} came from load_hf, and cannot be filled inside another module; legal: by itself")
    if not isinstance(model, HuggingFaceNames):
        return None
    folder, model.pretrained = model.pretrained, None
    return folder


def shard(
    model: nn.Module,
    settings: Config,
    comm: Communicator,
    device: torch.device,
    parallel: Parallelized,
    filled_later: bool,
) -> ZeroRuntime:
    """ZeRO over what parallelism left of the model; knows every parameter that made way for another."""
    policy = Policy.from_config(settings, device, comm.size)
    runtime = ZeroRuntime(
        model, comm, policy, device, settings.train.seed, parallel.layout, parallel.pipeline, filled_later
    )
    runtime.replaced |= {old: runtime.replaced.get(new, new) for old, new in parallel.replaced.items()}
    return runtime


def join(settings: Config, model: nn.Module) -> tuple[DeviceMesh, Communicator, torch.device]:
    """The mesh, the axis that ZeRO shards over and this rank's device, once all ranks have shown that they agree."""
    parallel, timeout = settings.parallel, settings.dist.timeout
    # Compared first, without checks and with plain messages: degrees, and how ranks talk, may be what differs.
    world = Communicator(None, WORLD, CommLedger(), transport="messages", timeout=timeout)
    compare_over_ranks(world, settings, model)
    mesh = build_mesh(ParallelDims(dist.get_world_size(), tp=parallel.tp, pp=parallel.pp, cp=parallel.cp), timeout)
    device = local_device()
    if device.type == "cpu":
        keep_freed_memory()
        if "cpu" in (settings.zero.offload_optimizer, settings.zero.offload_param):
            warn_once("offload to the CPU on a CPU run: everything is in host memory already, there is nothing to move")
        if settings.recompute.cpu_checkpointing:
            warn_once("recompute.cpu_checkpointing on a CPU run: activations are in host memory already")
    comm = Communicator(
        mesh,
        "dp" if parallel.cp == 1 else DATA,
        CommLedger(),
        check=settings.debug.collectives,
        transport=settings.dist.transport,
        timeout=timeout,
    )
    return mesh, comm, device


def one_config(args: Any, config: ConfigSource | None, config_params: ConfigSource | None) -> ConfigSource:
    """The one place the settings were given. Raises ValueError when there is none, or more than one."""
    named = getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)
    given = {"config": config, "config_params": config_params, "args.deepspeed_config": named}
    present = {name: value for name, value in given.items() if value is not None}
    if len(present) != 1:
        found = ", ".join(present) or "nothing"
        raise ValueError(f"initialize() takes its settings from exactly one of {', '.join(given)}; found {found}")
    return next(iter(present.values()))


def compare_over_ranks(comm: Communicator, settings: Config, model: nn.Module) -> None:
    """Raise ValueError on every rank when ranks were given different settings or models, saying what differs."""
    device = local_device()
    lines = [f"{key} = {value}" for key, value in sorted(flatten(settings.model_dump(exclude={"run"})).items())]
    lines += [f"code of {name} = {version}" for name, version in versions().items()]
    shapes = [
        f"parameter {n}: {tuple(p.shape)} {p.dtype} trainable={p.requires_grad}" for n, p in model.named_parameters()
    ]
    digest = hashlib.sha256("\n".join(lines + shapes).encode()).digest()
    if len(set(comm.gather_bytes(digest, "settings digest", device))) == 1:
        return
    everyone = comm.gather_bytes("\n".join(lines + shapes).encode(), "settings", device)
    texts = [set(text.decode().split("\n")) for text in everyone]
    common = set.intersection(*texts)
    rows = [
        f"  rank {rank}: {'; '.join(sorted(text - common)[:5]) or '(nothing more)'}" for rank, text in enumerate(texts)
    ]
    raise ValueError("ranks were started with different settings, models or code:\n" + "\n".join(rows))


@cache
def versions() -> dict[str, str]:
    """What this rank runs: torch's version, Python's, and a hash of minizero's own source."""
    digest = xxhash.xxh3_64()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode())
        digest.update(path.read_bytes())
    return {"torch": torch.__version__, "python": platform.python_version(), "minizero": digest.hexdigest()}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def make_optimizer(
    optimizer: Any, model: nn.Module, model_parameters: Any, settings: Config, kernels: Backend = "torch"
) -> torch.optim.Optimizer:
    """The user's optimizer, or the configured one over `model_parameters`."""
    if isinstance(optimizer, torch.optim.Optimizer):
        if model_parameters is not None:
            raise ValueError(
                "initialize() was given both an optimizer and model_parameters; the optimizer holds its own"
            )
        return optimizer
    parameters = (
        list(model_parameters) if model_parameters is not None else [p for p in model.parameters() if p.requires_grad]
    ) or [{"params": []}]  # a pipeline stage without a trainable parameter
    if callable(optimizer):
        return optimizer(parameters)
    if any(p.dtype == torch.float64 for p in model.parameters()):
        kernels = "torch"  # masters are float64 too, which the kernels do not take
    return build_optimizer(settings.optimizer, parameters, kernels)


def current(model_parameters: Any, runtime: ZeroRuntime, removed: set[nn.Parameter]) -> list[Any] | None:
    """`model_parameters` (tensors or param groups) with those of the meta device replaced by the model's own.

    Without those that other pipeline stages have.
    """
    if model_parameters is None:
        return None

    def replace(item: Any) -> Any:
        if isinstance(item, dict):
            members = [item["params"]] if isinstance(item["params"], nn.Parameter) else item["params"]
            return {**item, "params": [replace(p) for p in members if p not in removed]}
        return runtime.replaced.get(item, item)

    return [replace(item) for item in model_parameters if isinstance(item, dict) or item not in removed]


def leave_out(optimizer: torch.optim.Optimizer, removed: set[nn.Parameter]) -> None:
    """Take parameters that other pipeline stages have out of an optimizer's groups, which may be left empty."""
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in removed]


def with_stages_of(model: nn.Module, settings: Config) -> Config:
    """The settings with `parallel.pp` as a `PipelineModule` asks. Raises ValueError when they contradict each other."""
    stages = model.num_stages if isinstance(model, PipelineModule) else None
    given = settings.parallel.pp if "pp" in settings.parallel.model_fields_set else None
    if stages is None or stages == given:
        return settings
    if given is not None:
        raise ValueError(f"PipelineModule(num_stages={stages}) and parallel.pp = {given} contradict each other")
    parallel = settings.parallel.model_copy(update={"pp": stages})
    return settings.model_copy(update={"parallel": parallel})


def make_schedule(lr_scheduler: Any, optimizer: ZeroOptimizer, settings: Config) -> Any:
    """The user's schedule (built on the sharded optimizer, when it is a callable), or the configured one."""
    if lr_scheduler is None:
        return build_schedule(settings.scheduler, optimizer)
    is_object = hasattr(lr_scheduler, "step") and not inspect.isclass(lr_scheduler)
    return lr_scheduler if is_object else lr_scheduler(optimizer)


def make_loader(
    dataset: Any, collate_fn: Callable[..., Any] | None, comm: Communicator, micro_batch_size: int, settings: Config
) -> DataLoader[Any] | None:
    """Shuffled micro-batches of `dataset`, if there is one, for this data-parallel rank."""
    if dataset is None:
        return None
    sampler: DistributedSampler[Any] = DistributedSampler(
        dataset, num_replicas=comm.size, rank=comm.rank, shuffle=True, seed=settings.train.seed, drop_last=True
    )
    return DataLoader(
        dataset,
        batch_size=micro_batch_size,
        sampler=sampler,
        collate_fn=collate_fn,
        drop_last=True,
        generator=torch.Generator(),  # each epoch draws from it: from the rank's own state, a resumed run drew more
    )


def dtype_table(runtime: ZeroRuntime) -> str:
    """One line per parameter dtype: in which dtype each thing is kept, sent and summed."""
    rows = ["param      grad       reduce     accumulate master     moments    elements"]
    seen: dict[tuple[str, ...], int] = {}
    for group in runtime.groups:
        master = group.master.dtype if group.master is not None else "frozen"
        kinds = (group.dtype, group.dtype, group.reduce_dtype, group.accumulation_dtype, master, master)
        key = tuple(str(kind).removeprefix("torch.") for kind in kinds)
        seen[key] = seen.get(key, 0) + sum(group.layout.sizes)
    rows += [" ".join(f"{kind:<10}" for kind in key) + f" {count:,}" for key, count in seen.items()]
    layout = f"ZeRO stage {runtime.policy.stage} over {runtime.comm.size} ranks, {len(runtime.units)} units"
    way = f", slices by {runtime.comm.transport.name}" if runtime.comm.transport is not None else ""
    return "\n".join([layout + way, *rows])
