"""Whole training through the kernels: models, vocabulary-parallel loss, ring attention, optimizer, in any layout.

The ranks run them in the interpreter. `--kernels triton` must then be the same training as torch alone, to the bound of
every layout in fp32, and take the kernels, all of them.
"""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import interpreter
import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from test_layouts import RECOMPUTE, VOCAB, Cell
from test_layouts import batches as some_batches
from test_tensor_parallel import randomized
from torch import Tensor, nn
from training import refused_everywhere, relative_error, run_steps, train_with_torch

import minizero
from minizero.cli import main
from minizero.config.schema import ModelConfig
from minizero.models import build
from minizero.optim.fused_adamw import FusedAdamW
from minizero.parallel.block_attention import Mask, attend, attend_backward
from minizero.parallel.context import ring_attention

LENGTH, BATCH, STEPS = 9, 4, 2
CELLS: tuple[Any, ...] = (  # and ranks: few, since each interprets its kernels
    ((1, False, "none", 0, "none", "llama"), 1),
    ((1, False, "none", 3, "full", "gpt2"), 2),
    ((2, False, "none", 1, "none", "llama"), 2),
    pytest.param((2, True, "ring", 2, "selective", "llama"), 4, marks=pytest.mark.soak),  # half a minute
    ((1, False, "ulysses", 1, "none", "gpt2"), 2),
)


def make(family: str) -> nn.Module:
    """4 heads of width 6, of 2 key heads in a llama."""
    torch.manual_seed(0)
    config = ModelConfig(
        family=family,
        hidden_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2 if family == "llama" else None,
        intermediate_size=37,
    )
    return randomized(build(config, VOCAB, LENGTH))


def batches(steps: int) -> list[dict[str, Tensor]]:
    return some_batches(steps, BATCH, LENGTH)


def train_plainly(family: str) -> tuple[list[float], list[float]]:
    """torch alone, in fp32."""
    return train_with_torch(make(family), batches(STEPS), 1e-3)


def settings(cell: Cell, **more: Any) -> minizero.Config:
    tp, sequence, context, stage, recompute, _ = cell
    cp = 1 if context == "none" else 2
    return minizero.Config(
        parallel={"tp": tp, "sequence": sequence, "cp": cp, "context": "ring" if cp == 1 else context},
        recompute=RECOMPUTE[recompute],
        zero={"stage": stage},
        train={"micro_batch_size": BATCH * tp * cp // dist.get_world_size(), "gradient_clipping": 0.5},
        optimizer={"lr": 1e-3, "weight_decay": 0.1},
        dist={"timeout": 60.0},
        **more,
    )


def train(cell: Cell, steps: int, **more: Any) -> Any:
    engine, *_ = minizero.initialize(model=make(cell[-1]), config=settings(cell, **more))
    return run_steps(engine, batches(steps))


def train_in_triton(cell: Cell, steps: int, **more: Any) -> Any:
    """(losses and norms, what was launched, whether what computes is the rounded masters after the last step)."""
    interpreter.cure()
    with interpreter.launches() as launched:
        engine, *_ = minizero.initialize(model=make(cell[-1]), config=settings(cell, kernels="triton", **more))
        before = [group.master.clone() for group in engine.runtime.groups]
        found = run_steps(engine, batches(steps))
    follows = [
        torch.equal(
            (group.shard if group.master.numel() == group.shard.numel() else group.flat), group.master.to(group.dtype)
        )
        and not torch.equal(group.master, first)
        for group, first in zip(engine.runtime.groups, before, strict=True)
    ]
    return found, launched, all(follows)


@pytest.mark.parametrize(("cell", "world"), CELLS, ids=lambda value: str(value).replace(" ", ""))
def test_kernels_train_as_torch_does(cell, world):
    losses, norms = train_plainly(cell[-1])
    reports = run_distributed(train_in_triton, world, cell, STEPS, timeout=150)
    for (found, found_norms), launched, follows in reports:
        assert follows
        assert relative_error(found, losses) < 2e-6
        assert relative_error(found_norms, norms) < 2e-6
        norm = "norm._forward_rows"
        wanted = {norm, "flash_attention._forward", "flash_attention._backward_keys", "adamw._adamw", "flat._squares"}
        wanted |= {"gated._forward", "gated._backward", "rope._rope"} if cell[-1] == "llama" else set()
        wanted |= {"cross_entropy._whole"} if cell[0] == 1 else {"cross_entropy._statistics", "cross_entropy._gradient"}
        assert wanted <= set(launched), wanted - set(launched)


@pytest.mark.parametrize(
    ("precision", "tp", "stage"),
    (
        ("bf16", 2, 2),
        ("fp16", 1, 3),
        *(pytest.param(*cell, marks=pytest.mark.soak) for cell in (("fp16", 2, 1), ("bf16", 1, 0))),
    ),
)
def test_sixteen_bits_stay_as_near_as_torch(precision, tp, stage):
    """As near to fp32 as torch in 16 bits, or within a rounding of bf16, 2^-8, which either may be lucky with.

    Masters are apart from what computes here, whole on each of two ranks at stage 0, of a shard of its own at stage 3.
    """
    cell = (tp, False, "none", stage, "none", "llama")
    losses, _ = train_plainly("llama")
    scale = {"loss_scale": {"initial_power": 8}} if precision == "fp16" else {}
    more = {"precision": precision, **scale}
    eager, *_ = run_distributed(train, 2, cell, STEPS, kernels="torch", **more)
    fused, *_ = run_distributed(train_in_triton, 2, cell, STEPS, **more, timeout=120)
    assert fused[2]
    assert relative_error(fused[0][0], losses) < max(1.5 * relative_error(eager[0], losses), 2**-8)


def resume_in_triton(folder: str) -> Any:
    """A step, a checkpoint, two more; then again from the checkpoint; with torch's AdamW from it too.

    Two, since the moments of the first show in the loss of the second.
    """
    interpreter.cure()
    cell = (1, False, "none", 1, "none", "llama")
    found = []
    for kernels, first in (("triton", True), ("triton", False), ("torch", False)):
        engine, *_ = minizero.initialize(model=make("llama"), config=settings(cell, kernels=kernels))
        assert isinstance(engine.optimizer.inner, FusedAdamW) == (kernels == "triton")
        if first:
            run_steps(engine, batches(3)[:1])
            engine.save_checkpoint(folder)
        else:
            engine.load_checkpoint(folder)
        found.append(run_steps(engine, batches(3)[1:]))
        steps = {float(state["step"]) for state in engine.optimizer.state.values()}
        assert steps == {3.0}
    return found


def test_a_checkpoint_resumes_bitwise_and_in_torchs_optimizer(tmp_path):
    for through, again, in_torch in run_distributed(resume_in_triton, 2, str(tmp_path / "run"), timeout=120):
        assert through == again
        assert relative_error(in_torch[0], through[0]) < 2e-6


def groups_and_frozen() -> Any:
    """Two param groups with other decay, a frozen parameter: stretches end where options change."""
    interpreter.cure()
    results = []
    for kernels in ("torch", "triton"):
        model = make("llama")
        model.model.norm.weight.requires_grad_(False)
        wide = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
        thin = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
        groups = [{"params": wide, "weight_decay": 0.3}, {"params": thin, "weight_decay": 0.0, "lr": 1e-2}]
        config = settings((1, False, "none", 2, "none", "llama"), kernels=kernels)
        engine, *_ = minizero.initialize(model=model, model_parameters=groups, config=config)
        results.append(run_steps(engine, batches(2)))
    return results


def test_param_groups_keep_their_options():
    for eager, fused in run_distributed(groups_and_frozen, 2, timeout=120):
        assert relative_error(fused[0], eager[0]) < 2e-6 and relative_error(fused[1], eager[1]) < 2e-6


@pytest.mark.parametrize("documents", (False, True))
def test_ring_attention_of_blocks_is_attention(documents):
    """In one process, whole and by `attend` of blocks: forward, backward, in 16 bits too."""
    generator = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(2, 4, 45, 24, generator=generator) for _ in range(2))
    k, v = (torch.randn(2, 2, 45, 24, generator=generator) for _ in range(2))
    ids = torch.arange(45).div(11, rounding_mode="floor").expand(2, -1) if documents else None
    found = []
    for kernels, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = ring_attention(*leaves, None, 45, 24**-0.5, ids, kernels=kernels)
        found.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for exact, fused in zip(*found, strict=True):
        assert (exact - fused).norm() / exact.norm() < 1e-6


def test_a_block_without_visible_keys_adds_nothing():
    q, k = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 7, 16)
    mask = Mask(False, torch.full((1, 5), 3), torch.full((1, 7), 2))
    out, lse = attend(q, k, k, 0.25, mask, "triton")
    assert not out.any() and torch.isinf(lse).all()
    into = torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 7, 16), torch.zeros(1, 2, 7, 16)
    attend_backward(q, k, k, q, torch.zeros(1, 2, 5), torch.zeros(1, 2, 5), 0.25, mask, into, "triton")
    assert not any(total.any() for total in into)


def ask_for_triton() -> None:
    import minizero.kernels.backend as backend

    backend.obstacle.cache_clear()
    backend.INTERPRETED = False
    try:
        minizero.initialize(
            model=make("llama"),
            config=minizero.Config(kernels="triton", train={"micro_batch_size": BATCH // dist.get_world_size()}),
        )
    finally:
        backend.INTERPRETED = True
        backend.obstacle.cache_clear()


def test_kernels_that_cannot_run_are_refused_on_every_rank():
    refused_everywhere(ask_for_triton, 2, "kernels triton: tensors are on cpu.*legal here: auto, torch")


def test_a_gpu_without_triton_says_so_once(monkeypatch):
    import minizero.kernels.backend as backend
    from minizero.parallelize import refuse_kernels

    monkeypatch.setattr(backend, "TROUBLE", "Triton is not installed (no module)")
    backend.obstacle.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton is not installed.*run in torch"):
            refuse_kernels("auto", torch.device("cuda"))
        refuse_kernels("torch", torch.device("cuda"))
    finally:
        backend.obstacle.cache_clear()


def test_doctor_runs_every_kernel():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["doctor", "--json"]) == 0
    table = json.loads(out.getvalue())["kernels"]
    assert {"rms_norm", "layer_norm", "add_rms_norm", "layer_norm_gelu", "swiglu", "geglu", "bias_gelu"} <= set(table)
    assert {"rope", "cross_entropy", "linear_cross_entropy", "flash_attention", "adamw_step"} <= set(table)
    assert {"grad_norm", "cast_and_pack", "quantize_blockwise"} <= set(table)
    assert all(row["runs"] == "triton (interpreted)" and row["agrees"] for row in table.values()), table
