"""B and W together are backward: the same gradients, the same work, and nothing communicated twice."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from harness import run_distributed
from test_tensor_parallel import LENGTH, VOCAB, axis, make
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from minizero.config.schema import ModelConfig
from minizero.models import build
from minizero.parallel.pipeline.split_backward import Root, WeightHalf, backward_inputs
from minizero.parallel.plan import apply_plan
from minizero.parallel.recompute import checkpoint_block
from minizero.parallel.tensor import TensorAxis


class Doubled(torch.autograd.Function):
    """A foreign Function with a weight; counts how often its backward runs."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        Doubled.calls += 1
        x, weight = ctx.saved_tensors
        return grads[0] * weight * 2, (grads[0] * x * 2).flatten(0, -2).sum(0)


class Stage(nn.Module):
    """Norms, a residual, a bias-free and a biased layer, attention, and one of the hard cases."""

    def __init__(self, kind: str, width: int = 6) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 15), nn.Linear(15, width, bias=False)
        self.qkv, self.scale = nn.Linear(width, 3 * width), nn.Parameter(torch.randn(width))
        if kind == "frozen":
            self.up.weight.requires_grad_(False)
            self.norm.requires_grad_(False)
        if kind == "weight norm":
            nn.utils.parametrizations.weight_norm(self.up)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + (checkpoint_block(self.mlp, x) if self.kind == "checkpointed" else self.mlp(x))
        if self.kind == "foreign":
            x = Doubled.apply(x, self.scale) + self.scale.exp()
        if self.kind == "twice":
            x = x + self.mlp(x) * self.scale + self.down(self.up(self.scale.square()))
        if self.kind == "shared rib":
            rib = self.scale.exp()  # one node that two of the spine hang on
            x = torch.addcmul((x * rib).tanh() * rib, rib, rib)
        if self.kind == "ribs that meet":
            meets = (self.scale * 2).sin()
            x = (x * meets.exp()).tanh() * meets.square() + self.norm.weight
        if self.kind == "several outputs":
            return x, x.square().mean(), x.detach(), (self.scale * self.norm.weight).sum()
        if self.kind == "not along the inputs":
            return x + self.norm(self.scale)[None, None]
        if self.kind == "inputs unused":
            return self.scale.exp().expand(2, 5, 6)
        return x


KINDS = (
    "plain",
    "frozen",
    "weight norm",
    "checkpointed",
    "foreign",
    "twice",
    "shared rib",
    "ribs that meet",
    "several outputs",
    "not along the inputs",
    "inputs unused",
)


def roots_of(outputs: Any, seed: int = 1) -> list[Root]:
    """A gradient for every output that has one."""
    generator = torch.Generator().manual_seed(seed)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    made = [(out, torch.randn(out.shape, generator=generator, dtype=out.dtype)) for out in outputs]
    return [(get_gradient_edge(out), gradient) for out, gradient in made if out.requires_grad]


def run_stage(kind: str, split: bool, with_inputs: bool = True) -> tuple[Any, list[Any]]:
    """(gradient of the input, gradients of the parameters)."""
    torch.manual_seed(0)
    stage = Stage(kind)
    x = torch.randn(2, 5, 6, requires_grad=with_inputs)
    parameters = [p for p in stage.parameters() if p.requires_grad]
    for _ in range(2):  # the second adds to what the first left
        roots = roots_of(stage(x))
        if split:
            half = backward_inputs(roots, [x])
            before = None if x.grad is None else x.grad.clone()
            half.run()
            assert before is None or torch.equal(before, x.grad)
        else:
            torch.autograd.backward([edge for edge, _ in roots], [gradient for _, gradient in roots])
    return x.grad, [p.grad for p in parameters]


@pytest.mark.parametrize("with_inputs", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_the_halves_are_backward(kind, with_inputs):
    of_x, parameters = run_stage(kind, True, with_inputs)
    expected_x, expected = run_stage(kind, False, with_inputs)
    exact = kind not in ("twice", "shared rib", "ribs that meet")  # uses are summed in another order there
    compare = torch.equal if exact else torch.allclose
    assert (of_x is None) == (expected_x is None) and (of_x is None or torch.equal(of_x, expected_x))
    for found, wanted in zip(parameters, expected, strict=True):
        assert (found is None) == (wanted is None) and (found is None or compare(found, wanted))


def test_what_can_wait_waits():
    """After B, parameters behind C++ nodes have no gradient; those of Python Functions and shared ribs have all."""
    for kind, early in (("plain", set()), ("foreign", {"scale"}), ("shared rib", {"scale"}), ("twice", set())):
        stage, x = Stage(kind), torch.randn(2, 5, 6, requires_grad=True)
        half = backward_inputs(roots_of(stage(x)), [x])
        found = {name for name, p in stage.named_parameters() if p.grad is not None}
        if kind == "twice":
            assert "down.weight" not in found and "up.weight" not in found
        else:
            assert found == early
        half.run()


def test_a_foreign_function_runs_once():
    Doubled.calls = 0
    run_stage("foreign", True)
    assert Doubled.calls == 2


def products(run: Any) -> int:
    with torch.profiler.profile() as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm", "aten::bmm"))


def test_the_work_is_divided_not_repeated():
    torch.manual_seed(0)
    stage, x = Stage("plain"), torch.randn(2, 5, 6, requires_grad=True)
    out = stage(x)
    whole = products(lambda: out.sum().backward())
    roots, halves = roots_of(stage(x)), []
    first = products(lambda: halves.append(backward_inputs(roots, [x])))
    second = products(lambda: halves[0].run())
    assert first + second == whole and second == 3  # one per layer


def test_a_decoder_of_ours_and_its_tied_weight():
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=37)
    model = build(config, VOCAB, LENGTH).double()
    tokens = torch.randint(VOCAB, (2, LENGTH))
    loss, _ = model(tokens, tokens)
    loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    hidden = model.model.embed_tokens(tokens).detach().requires_grad_()
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: hidden)  # as if it came from another stage
    loss, _ = model(tokens, tokens)
    handle.remove()
    backward_inputs([(get_gradient_edge(loss), torch.ones_like(loss))], [hidden]).run()
    model.model.embed_tokens(tokens).backward(hidden.grad)
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-12, atol=1e-14)


def test_what_a_pass_kept_is_free_after_its_w():
    stage, x = Stage("plain"), torch.randn(2, 5, 6, requires_grad=True)
    inner = []
    stage.up.register_forward_hook(lambda module, args, out: inner.append(weakref.ref(out)))
    half: WeightHalf = backward_inputs(roots_of(stage(x)), [x])
    gc.collect()
    assert inner[0]() is not None
    half.run()
    gc.collect()
    assert inner[0]() is None


def tensor_parallel_block(split: bool, sequence: bool) -> tuple[list[Tensor], dict[Any, int], int]:
    comm = axis()
    model = make("own")
    plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
    apply_plan(model, plan, TensorAxis(comm, sequence))
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    roots = roots_of(model.blocks[1](model.blocks[0](x)))
    comm.ledger.reset()
    parameters = [p for block in model.blocks[:2] for p in block.parameters()]
    deferred = 0
    if split:
        half = backward_inputs(roots, [x])
        after_b, deferred = calls(comm), len(half.deferred)
        half.run()
        assert calls(comm) == after_b  # W communicates nothing
    else:
        torch.autograd.backward([edge for edge, _ in roots], [gradient for _, gradient in roots])
    return [x.grad, *(p.grad for p in parameters)], calls(comm), deferred


def calls(comm: Any) -> dict[Any, int]:
    return {key: count.calls for key, count in comm.ledger.counts.items()}


def test_tensor_parallel_layers_split_and_communicate_once():
    whole = run_distributed(tensor_parallel_block, 2, False, False)
    for (found, counts, deferred), (expected, expected_counts, _) in zip(
        run_distributed(tensor_parallel_block, 2, True, False), whole, strict=True
    ):
        assert counts == expected_counts and deferred == 4
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
