"""The same GPT, the same batches, trained by each system as its own documentation says.

Every `build_*` returns one training step: forward, backward, gradient clipping at 1.0, AdamW, whatever it communicates.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.interleave import mark_imported
from benchmarks.workload import batches, build_model, loss_of

LR = 1e-4
CLIP = 1.0
ADAMW: dict[str, Any] = {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.01}}


def start(rank: int, world: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))


def finish(step: Callable[[Tensor, Tensor], None], rank: int) -> Callable[[], None]:
    stream = batches(rank)
    return lambda: step(*next(stream))


def build_compute(rank: int, world: int) -> Callable[[], None]:
    """No communication, no clipping: forward, backward, AdamW over half the parameters. The floor of stages 1 to 3."""
    start(rank, world)
    mark_imported()
    model = build_model()
    parameters = list(model.parameters())
    half = torch.optim.AdamW(parameters[: len(parameters) // 2], lr=LR, fused=True)

    def step(inputs: Tensor, labels: Tensor) -> None:
        loss_of(model, inputs, labels).backward()
        half.step()
        model.zero_grad()

    return finish(step, rank)


def build_ddp(rank: int, world: int) -> Callable[[], None]:
    from torch.nn.parallel import DistributedDataParallel

    start(rank, world)
    mark_imported()
    model = DistributedDataParallel(build_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    return finish(partial(torch_step, model, optimizer), rank)


def build_fsdp2(rank: int, world: int, *, reshard: bool) -> Callable[[], None]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    start(rank, world)
    mark_imported()
    mesh = init_device_mesh("cpu", (world,))
    model = build_model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    return finish(partial(torch_step, model, optimizer), rank)


def torch_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> None:
    loss_of(model, inputs, labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()


def build_deepspeed(rank: int, world: int, *, stage: int) -> Callable[[], None]:
    import deepspeed

    torch.set_num_threads(1)
    torch.manual_seed(0)
    deepspeed.init_distributed("gloo", verbose=False)
    mark_imported()
    model = build_model()
    # DeepSpeed's own fused CPU Adam needs a compiler at run time; torch's does the same update.
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW["params"], fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_json(stage))
    return finish(partial(engine_step, engine), rank)


def build_minizero(rank: int, world: int, *, stage: int, transport: str = "auto") -> Callable[[], None]:
    import minizero
    from minizero.config.load import from_any

    torch.set_num_threads(1)
    torch.manual_seed(0)
    minizero.init_distributed("gloo")
    mark_imported()
    config = from_any(deepspeed_json(stage) | {"optimizer": ADAMW})
    config.dist.transport = transport
    engine, *_ = minizero.initialize(model=build_model(), config=config)
    return finish(partial(engine_step, engine), rank)


def deepspeed_json(stage: int) -> dict[str, Any]:
    """The same DeepSpeed JSON for both engines."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000000,
    }


def engine_step(engine: Any, inputs: Tensor, labels: Tensor) -> None:
    engine.backward(loss_of(engine, inputs, labels))
    engine.step()
