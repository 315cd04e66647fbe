"""Checkpointed blocks: the same bits as without, less kept, and a clear word when a block cannot be computed again."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from test_tensor_parallel import BATCH, LENGTH, VOCAB, batches, make, train_plainly
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from training import refused_everywhere, relative_error, run_steps
from training import train as train_a_toy

import minizero
from minizero.config.schema import ModelConfig
from minizero.dist.collectives import Communicator
from minizero.dist.dims import ParallelDims
from minizero.dist.ledger import CommLedger
from minizero.dist.mesh import build_mesh
from minizero.dist.sharding import split_sizes
from minizero.models import build
from minizero.parallel.activation_memory import BlockShape, SavedBytes, block_bytes, shared_bytes
from minizero.parallel.last_product import PRODUCTS
from minizero.parallel.recompute import Options, RecomputeError, checkpoint_block
from minizero.parallel.recompute_model import BlockBytes, ByteBudget
from minizero.parallelize import agreement

# ---- one block ----


class Block(nn.Module):
    """Keyword and nested arguments, several outputs, torch's dropout, a buffer, a frozen parameter."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 15), nn.Linear(15, width)
        self.norm = nn.LayerNorm(width)
        self.norm.bias.requires_grad_(False)
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor, *, scales: dict[str, Any], label: str = "") -> dict[str, Any]:
        hidden = self.drop(F.gelu(self.up(self.norm(x)))) * scales["inner"][0]
        return {"x": x + self.down(hidden), "aux": hidden.square().mean(), "index": hidden.argmax(-1), "label": label}


def loss_of_block(run: Any, block: Block, x: Tensor, scale: Tensor) -> Tensor:
    torch.manual_seed(5)
    out = run(block, x, scales={"inner": [scale, None, 3]}, label="kept")
    assert out["label"] == "kept" and not out["index"].requires_grad
    return out["x"].square().sum() + 0.3 * out["aux"]


def plainly(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def gradients(run: Any, around: int = 1) -> list[Tensor]:
    torch.manual_seed(0)
    block, x, scale = Block(), torch.randn(3, 5, 7, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    loss = loss_of_block(run, block, x, scale)
    loss.backward()
    after = torch.rand(1)  # the generator ends where it ends without checkpointing
    return [loss.detach(), x.grad, scale.grad, after, *(p.grad for p in block.parameters() if p.requires_grad)]


def nested(function: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint_block(lambda *a, **k: checkpoint_block(function, *a, **k), *args, **kwargs)


def by_torch(function: Any, *args: Any, **kwargs: Any) -> Any:
    return torch_checkpoint(function, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize("run", (checkpoint_block, nested))
def test_a_block_is_bitwise_what_it_is_without(run):
    found = gradients(run)
    for reference in (gradients(plainly), gradients(by_torch)):
        assert len(found) == len(reference)
        assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))


def test_closures_bring_their_tensors_along():
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 7), torch.randn(3, 7)
    outside, listed = torch.randn(7, requires_grad=True), torch.randn(2, 7, requires_grad=True)
    middle = outside * 2  # not a leaf

    def block(value: Tensor) -> Tensor:
        return torch.cat([layer(value).tanh() * middle, listed])

    def results(run: Any) -> list[Tensor]:
        outside.grad, layer.weight.grad, listed.grad = None, None, None
        run(block, x).square().sum().backward(retain_graph=True)
        return [outside.grad, layer.weight.grad, listed.grad]

    assert all(torch.equal(a, b) for a, b in zip(results(checkpoint_block), results(plainly), strict=True))


def test_a_module_that_uses_anothers_parameter():
    class Borrower(nn.Module):
        def __init__(self, lender: nn.Linear) -> None:
            super().__init__()
            self.lenders = [lender]  # hidden from `parameters()`
            self.own = nn.Linear(7, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.own(x) @ self.lenders[0].weight

    lender = nn.Linear(7, 7)
    borrower, x = Borrower(lender), torch.randn(2, 7)
    for _ in range(2):  # the second call is told what the first found
        lender.zero_grad()
        checkpoint_block(borrower, x).sum().backward()
        found = lender.weight.grad
        lender.zero_grad()
        borrower(x).sum().backward()
        assert torch.equal(found, lender.weight.grad)


def test_nothing_to_compute_is_just_a_call():
    x, frozen = torch.randn(2, 3), nn.Linear(3, 3).requires_grad_(False)
    assert not checkpoint_block(frozen, x).requires_grad
    with torch.no_grad():
        assert not checkpoint_block(nn.Linear(3, 3), x).requires_grad


def test_two_backward_passes_and_an_output_that_is_an_input():
    layer, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    same, y = checkpoint_block(lambda value: (value, layer(value)), x)
    (same.sum() + y.sum()).backward(retain_graph=True)
    once = x.grad.clone()
    (same.sum() + y.sum()).backward()
    assert torch.equal(x.grad, 2 * once) and torch.equal(once, 1 + layer.weight.sum(0).expand(2, 3))


def test_autocast_is_given_back():
    layer, x = nn.Linear(16, 16), torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = checkpoint_block(layer, x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()  # a second pass in fp32 would be refused
    assert layer.weight.grad is not None


# ---- the last product ----


class Ending(nn.Module):
    """A block that ends in one of several ways."""

    last_product_is_unread = True  # which is not so for all of them

    def __init__(self, end: str) -> None:
        super().__init__()
        self.end, self.bias = end, end != "no bias"
        self.up, self.down, self.norm = nn.Linear(7, 15), nn.Linear(15, 7, bias=self.bias), nn.LayerNorm(7)

    def forward(self, x: Tensor) -> Any:
        y = self.down(self.up(x).tanh())
        if self.end == "kept by a function":
            return Keeps.apply(y)
        if self.end == "a second output":
            return x + y, y.square()
        if self.end == "from time to time":
            return x + (y if x.detach().sum() > 0 else y.sigmoid())
        ends = {
            "norm": self.norm,
            "tanh": torch.tanh,
            "another product": lambda value: F.linear(value, self.norm.weight[None]),
        }
        return ends[self.end](x + y) if self.end in ends else x + y.view(-1).view(x.shape)


class Keeps(torch.autograd.Function):
    """Reads its input's value in backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.y = y
        return y + 1

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.y


ENDINGS = (
    "sum",
    "no bias",
    "norm",
    "tanh",
    "another product",
    "kept by a function",
    "a second output",
    "from time to time",
)


@pytest.mark.parametrize("end", ENDINGS)
def test_the_last_product_is_left_out_only_where_nobody_reads_it(end):
    def gradients_of(run: Any) -> list[list[Tensor]]:
        torch.manual_seed(0)
        block, found = Ending(end), []
        for _ in range(7):
            x = torch.randn(3, 5, 7, requires_grad=True)
            out = run(block, x)
            sum(part.square().sum() for part in (out if isinstance(out, tuple) else (out,))).backward()
            found.append([x.grad, *(p.grad for p in block.parameters() if p.grad is not None)])
            block.zero_grad()
        return found

    for found, expected in zip(gradients_of(checkpoint_block), gradients_of(plainly), strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_last_product_is_left_out():
    block, x = Ending("sum"), torch.randn(3, 5, 7, requires_grad=True)
    for learnt in (False, True):
        y = checkpoint_block(block, x)
        with torch.profiler.profile() as profile:
            y.sum().backward()
        products = sum(event.count for event in profile.key_averages() if event.key in ("aten::addmm", "aten::mm"))
        assert products == (2 if not learnt else 1) + 4  # forward again, and two gradients of each


def test_a_hook_on_the_last_layer_sees_its_values():
    block, x, seen = Ending("sum"), torch.randn(3, 5, 7, requires_grad=True), []
    block.down.register_forward_hook(lambda module, args, out: seen.append(float(out.detach().sum())))
    for _ in range(3):
        checkpoint_block(block, x).sum().backward()
    assert len(seen) == 6 and len(set(seen)) == 1
    assert block not in PRODUCTS  # memory that was not written may hold the right values by chance


def sums_per_step() -> list[int]:
    """All-reduces in the layers, of each step under full recompute over two tensor-parallel ranks."""
    config = minizero.Config(parallel={"tp": 2}, recompute={"mode": "full"}, train={"micro_batch_size": BATCH})
    engine, *_ = minizero.initialize(model=make("llama"), config=config)
    found = []
    for batch in batches(3):
        engine.ledger.reset()
        engine.train_batch(iter([batch]))
        counts = engine.ledger.counts.items()
        found.append(sum(c.calls for key, c in counts if key[1] == "all_reduce" and ".layers." in key[3]))
    return found


def test_what_would_sum_the_last_product_over_ranks_is_left_out_too():
    """2 layers of 4, and 2 more of a second pass; from the second step on, 1 more."""
    assert run_distributed(sums_per_step, 2)[0] == [12, 10, 10]


def agreed() -> list[int]:
    comm = Communicator(build_mesh(ParallelDims(2, cp=2)), "dp", CommLedger())
    agree = agreement(comm.along("tp"), comm.along("cp"), torch.device("cpu"))
    return agree([10 + dist.get_rank(), 20 - dist.get_rank()])


def test_ranks_that_communicate_decide_from_the_same_numbers():
    assert run_distributed(agreed, 2) == [[11, 20], [11, 20]]


# ---- blocks that cannot be computed again ----


def test_an_argument_changed_in_place_is_refused():
    with pytest.raises(ValueError, match="changes its argument 0 in place"):
        checkpoint_block(lambda x: x.add_(1), torch.randn(3) * torch.ones(3, requires_grad=True))


def test_a_tensor_changed_before_backward_is_an_error():
    x = torch.randn(3)
    y = checkpoint_block(nn.Linear(3, 3), x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_another_shape_in_the_second_pass_is_named():
    calls: list[int] = []

    def unsteady(x: Tensor) -> Tensor:
        calls.append(1)
        return x[: len(calls)] * 2

    y = checkpoint_block(unsteady, torch.randn(3, 2, requires_grad=True))
    with pytest.raises(RecomputeError, match=r"unsteady .* gave \(2, 2\) float32, the first time \(1, 2\) float32"):
        y.sum().backward()


def test_a_tensor_left_on_the_module_is_named():
    class Router(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.auxiliary = self.weight.square().mean()
            return super().forward(x)

    block = nn.Sequential(Router(3, 3), nn.Tanh())
    with pytest.raises(RecomputeError, match="Sequential leaves tensors behind .*results of mean"):
        checkpoint_block(block, torch.randn(2, 3)).sum().backward()


def test_a_hook_that_collects_is_named_and_one_that_detaches_is_not():
    block, x, collected = nn.Linear(3, 3), torch.randn(2, 3), []
    handle = block.register_forward_hook(lambda module, args, out: collected.append(out.square()))
    with pytest.raises(RecomputeError, match="results of square"):
        checkpoint_block(block, x).sum().backward()
    handle.remove()
    block.register_forward_hook(lambda module, args, out: collected.append(out.detach().square()))
    checkpoint_block(block, x).sum().backward()
    assert block.weight.grad is not None


def test_tensors_in_an_object_come_along_and_do_not_go_out():
    @dataclass
    class Box:
        value: Tensor

    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    for _ in range(3):
        x.grad = None
        y = checkpoint_block(lambda box: layer(box.value * 2), Box(x * 1.0))
        y.sum().backward()
        assert torch.equal(x.grad, 2 * layer.weight.sum(0).expand(2, 3))
    with pytest.raises(ValueError, match="returns a Box, into which a checkpoint cannot look"):
        checkpoint_block(lambda value: Box(layer(value)), x)


def test_running_statistics_are_updated_once():
    block, twin, x = nn.BatchNorm1d(3), nn.BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
    for _ in range(3):
        checkpoint_block(block, x).sum().backward()
        twin(x)
    assert all(torch.equal(a, b) for a, b in zip(block.buffers(), twin.buffers(), strict=True))


def test_a_second_derivative_is_refused():
    layer, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(checkpoint_block(layer, x).tanh().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_other_values_in_the_second_pass_are_found_in_debug_mode():
    factor = [2.0]
    x = torch.ones(3, requires_grad=True)
    for options in (Options(), Options(check=True)):
        factor[0] = 2.0
        y = checkpoint_block(lambda value: value * factor[0], x, options=options)
        factor[0] = 2.5
        if not options.check:
            y.sum().backward()
            continue
        with pytest.raises(RecomputeError, match="output 0 differs, by up to 0.5"):
            y.sum().backward()


@pytest.mark.parametrize(
    ("draw", "source"),
    (
        (lambda: random.random(), "Python's random"),
        (lambda: float(np.random.rand()), "numpy.random"),
        (lambda: float(torch.rand(1, generator=torch.Generator().manual_seed(1))), "a torch.Generator of its own"),
    ),
)
def test_untracked_random_numbers_are_found_in_debug_mode(draw, source):
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=f"draws random numbers from {source}"):
        checkpoint_block(lambda value: value * draw(), x, options=Options(check=True))
    checkpoint_block(lambda value: value * torch.rand(3), x, options=Options(check=True)).sum().backward()


# ---- a budget ----


@pytest.mark.parametrize(
    ("budget", "chosen"), ((400, set()), (399, {0}), (330, {0}), (310, {0}), (229, {0, 1}), (130, {0, 1, 2}))
)
def test_a_budget_picks_the_fewest_blocks_that_will_do(budget, chosen):
    found = ByteBudget(budget, 4, lambda numbers: numbers)
    found.measured = {index: BlockBytes(100, 10) for index in range(4)}
    assert found.choose() == chosen


def test_a_budget_below_what_is_possible_names_the_least():
    found = ByteBudget(100, 4, lambda numbers: numbers)
    found.measured = {index: BlockBytes(100, 10) for index in range(4)}
    with pytest.raises(ValueError, match="100 bytes are less than the 130 that 4 blocks keep"):
        found.choose()


# ---- training ----

MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "every second": {"mode": "full", "every": 2},
    "selective": {"mode": "selective"},
    "chosen": {"mode": "selective", "modules": ["*.layers.*.mlp", "*.layers.*.self_attn"]},
    "budget": {"mode": "budget", "budget": 70_000.0},
    "partitioned": {"mode": "full", "partition_activations": True},
    "selective, partitioned where it may be": {"mode": "selective", "partition_activations": True},
    "on the host": {"mode": "full", "cpu_checkpointing": True},
}


def train(
    name: str, mode: str, steps: int, stage: int, accumulation: int, parallel: dict[str, Any], check: bool = False
) -> Any:
    model = make(name).double()
    dp = dist.get_world_size() // parallel.get("tp", 1) // parallel.get("cp", 1)
    config = minizero.Config(
        parallel=parallel,
        recompute=MODES.get(mode, {}),
        zero={"stage": stage},
        train={
            "micro_batch_size": BATCH // dp // accumulation,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.5,
        },
        optimizer={"lr": 3e-3, "weight_decay": 0.1},
        debug={"recompute": check},
        dist={"timeout": 20.0},
    )
    engine, *_ = minizero.initialize(model=model, config=config)
    return run_steps(engine, batches(steps), accumulation)


@pytest.mark.parametrize(
    ("world", "stage", "accumulation", "parallel"),
    (
        (2, 0, 2, {}),
        (2, 3, 2, {}),
        (4, 3, 1, {"tp": 2}),
        (4, 2, 1, {"tp": 2, "sequence": True}),
        (4, 3, 1, {"cp": 2}),
        (4, 3, 1, {"cp": 2, "tp": 2, "sequence": True, "context": "ulysses"}),
    ),
)
@pytest.mark.parametrize("mode", MODES)
def test_training_is_that_of_one_process(mode, world, stage, accumulation, parallel):
    losses, norms = train_plainly("llama", 2, torch.float64)
    for found, found_norms in run_distributed(train, world, "llama", mode, 2, stage, accumulation, parallel, True):
        assert relative_error(found, losses) < 1e-10
        assert relative_error(found_norms, norms) < 1e-10


@pytest.mark.parametrize("name", ("hf_llama", "hf_gpt2"))
@pytest.mark.parametrize("mode", ("full", "selective"))
def test_transformers_models_too(name, mode):
    bound = 1e-10 if name == "hf_gpt2" else 2e-6
    losses, norms = train_plainly(name, 3, torch.float64)
    for found, found_norms in run_distributed(train, 2, name, mode, 3, 3, 1, {}):
        assert relative_error(found, losses) < bound
        assert relative_error(found_norms, norms) < bound


def train_toy(name: str, stage: int, mode: str) -> Any:
    report = train_a_toy(name, stage, 3, 2, recompute=MODES.get(mode, {}))
    return report.losses, report.norms, report.weights


@pytest.mark.parametrize("stage", (0, 3))
@pytest.mark.parametrize("name", ("toy", "frozen", "adapters", "unused", "twice", "outside", "nested"))
def test_every_kind_of_model_is_bitwise_what_it_is_without(name, stage):
    plain, full = (run_distributed(train_toy, 2, name, stage, mode)[0] for mode in ("", "full"))
    assert plain[:2] == full[:2]
    assert all(torch.equal(full[2][key], value) for key, value in plain[2].items())


def destroyed() -> bool:
    model = make("llama")
    for mode in ("full", "selective", ""):
        config = minizero.Config(recompute=MODES.get(mode, {}), train={"micro_batch_size": BATCH})
        engine, *_ = minizero.initialize(model=model, config=config)
        wrapped = [name for name, module in model.named_modules() if "forward" in vars(module)]
        assert bool(wrapped) == bool(mode)
        engine.destroy()
    return not any("forward" in vars(module) for module in model.modules())


def test_a_destroyed_engine_takes_its_checkpointing_along():
    assert run_distributed(destroyed, 1)[0]


# ---- what is kept ----


def kept(mode: str) -> int:
    model = make("llama")
    config = minizero.Config(recompute=MODES.get(mode, {}), train={"micro_batch_size": BATCH})
    engine, *_ = minizero.initialize(model=model, config=config)
    with SavedBytes(without=model.parameters()) as saved:
        engine(**batches(1)[0])
    return saved.total


def kept_by_one_layer(mode: str) -> int:
    model = build(ModelConfig(hidden_size=24, num_layers=1, num_heads=4), VOCAB, LENGTH)
    config = minizero.Config(recompute=MODES.get(mode, {}), train={"micro_batch_size": BATCH})
    engine, *_ = minizero.initialize(model=model, config=config)
    with SavedBytes(without=model.parameters()) as saved:
        engine(**batches(1)[0])
    return saved.total


def test_a_single_layer_is_a_block_too():
    assert run_distributed(kept_by_one_layer, 1, "full")[0] < run_distributed(kept_by_one_layer, 1, "")[0]


def test_more_recompute_keeps_less():
    none, selective, half, full = (
        run_distributed(kept, 1, mode)[0] for mode in ("", "selective", "every second", "full")
    )
    assert full < half < selective < none


def count_block(family: str, eager: bool, mode: str, tp: int, sequence: bool, dtype: torch.dtype) -> tuple[int, int]:
    """(counted, closed form) of a model's two blocks on this rank, uneven MLP and key/value heads copied."""
    torch.manual_seed(0)
    attention = "eager" if eager else "fused"
    kv_heads = 2 if family == "llama" else None
    config = ModelConfig(
        family=family, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=kv_heads, intermediate_size=37,
        attention=attention,
    )  # fmt: skip
    model = build(config, VOCAB, LENGTH).to(dtype)
    recompute = {"none": {}, "partitioned": MODES["partitioned"]}.get(mode) or MODES.get(mode, {})
    parallel = {"tp": tp, "sequence": sequence}
    settings = minizero.Config(parallel=parallel, recompute=recompute, train={"micro_batch_size": 2})
    engine, *_ = minizero.initialize(model=model, config=settings)
    blocks = model.model.layers if family == "llama" else model.transformer.h
    counter = SavedBytes(without=model.parameters())
    blocks[0].register_forward_pre_hook(lambda *_: counter.__enter__() and None)
    blocks[1].register_forward_hook(lambda *_: counter.__exit__(None, None, None))
    engine(**{key: value[:2] for key, value in batches(1)[0].items()})
    rank = dist.get_rank() if tp > 1 else 0
    shape = BlockShape(
        family, batch=2, length=LENGTH, hidden=24, heads=4 // tp, kv_heads=max(1, (kv_heads or 4) // tp), head_dim=6,
        mlp=split_sizes(37, tp)[rank], eager=eager, ranks=tp,
        here=2 * split_sizes(LENGTH, tp)[rank] if sequence else None,
    )  # fmt: skip
    element = torch.finfo(dtype).bits // 8
    return counter.total, 2 * block_bytes(shape, mode, element) + shared_bytes(shape, element)


@pytest.mark.parametrize(
    ("tp", "sequence", "mode"),
    [
        *((1, False, mode) for mode in ("none", "selective", "full")),
        *((2, False, mode) for mode in ("none", "selective", "full", "partitioned")),
        *((2, True, mode) for mode in ("none", "selective", "full")),
        (4, False, "none"), (4, True, "none"), (4, False, "partitioned"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("family", "eager"), (("llama", False), ("llama", True), ("gpt2", False)))
def test_what_blocks_keep_is_the_closed_form(family, eager, mode, tp, sequence):
    for dtype in (torch.float32, torch.float64):
        for counted, formula in run_distributed(count_block, tp, family, eager, mode, tp, sequence, dtype):
            assert counted == formula


# ---- DeepSpeed's names ----


def by_deepspeeds_names(partition: bool) -> list[Tensor]:
    import minizero as deepspeed

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(VOCAB, 24), nn.ModuleList(nn.Linear(24, 24) for _ in range(3))

        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for block in self.blocks:
                x = deepspeed.checkpointing.checkpoint(block, x).tanh()
            return F.cross_entropy((x @ self.embed.weight.t()).flatten(0, 1), labels.flatten())

    torch.manual_seed(0)
    deepspeed.checkpointing.configure(None, partition_activations=partition)
    assert deepspeed.checkpointing.is_configured()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3},
        "activation_checkpointing": {"partition_activations": True},
    }
    engine, *_ = deepspeed.initialize(model=Model().double(), config=config)
    found = []
    for batch in batches(3):
        loss = engine(batch["input_ids"][:2], batch["labels"][:2])
        engine.backward(loss)
        engine.step()
        found.append(loss.detach())
    gathers = {key[3]: 0 for key in engine.ledger.counts if key[1] == "all_gather"}
    for key, count in engine.ledger.counts.items():
        if key[1] == "all_gather":
            gathers[key[3]] += count.calls
    # forward and backward of each step, no more
    assert [gathers[f"blocks.{number}"] for number in range(3)] == [6, 6, 6], gathers
    deepspeed.checkpointing.reset()
    assert not deepspeed.checkpointing.is_configured()
    return found


def test_deepspeeds_checkpointing_under_its_own_names():
    results = run_distributed(by_deepspeeds_names, 2, True)
    assert torch.stack(results[0]).isfinite().all() and results[0][2] < results[0][0]


# ---- bad input ----


def misuse(kind: str) -> None:
    model, recompute = make("llama"), {"mode": "full"}
    if kind == "pattern":
        recompute = {"mode": "selective", "modules": ["model.layers.*.ffn"]}
    elif kind == "nested":
        recompute = {"mode": "selective", "modules": ["model.layers.*", "model.layers.*.mlp"]}
    elif kind == "no blocks":
        model = nn.Sequential(nn.Linear(3, 3))
    elif kind == "no attention":
        model, recompute = nn.Sequential(nn.Linear(3, 3)), {"mode": "selective"}
    minizero.initialize(model=model, config=minizero.Config(recompute=recompute, train={"micro_batch_size": 1}))


@pytest.mark.parametrize(
    ("kind", "message"),
    (
        ("pattern", r"recompute.modules: 'model.layers.\*.ffn' matches no module of Llama"),
        ("nested", r"recompute.modules: model.layers.0 and model.layers.0.mlp inside it are both chosen"),
        ("no blocks", r"recompute.mode full: Sequential has no repeated blocks"),
        ("no attention", r"recompute.mode selective: Sequential has no attention that minizero knows"),
    ),
)
def test_bad_input_is_one_clear_error_on_every_rank(kind, message):
    refused_everywhere(misuse, 2, message, kind)
