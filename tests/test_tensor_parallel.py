"""One layer over several ranks trains as one process: our models and transformers', odd sizes, every ZeRO stage."""

from __future__ import annotations

from functools import cache
from typing import Any

import interpreter
import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from training import refused_everywhere, relative_error, run_steps, train_with_torch

import minizero
from minizero.config.schema import ModelConfig
from minizero.dist.collectives import Communicator
from minizero.dist.dims import ParallelDims
from minizero.dist.ledger import CommLedger
from minizero.dist.mesh import build_mesh
from minizero.dist.sharding import TensorShard
from minizero.models import build
from minizero.parallel.plan import even
from minizero.parallel.tensor import vocab_parallel_cross_entropy

VOCAB, LENGTH, BATCH = 19, 7, 8


def make(name: str) -> nn.Module:
    """Odd vocabulary, MLP width and length; 4 heads over 2 for keys and values."""
    torch.manual_seed(0)
    if name == "llama":
        config = ModelConfig(hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=37)
        return randomized(build(config, VOCAB, LENGTH))
    if name == "gpt2":
        config = ModelConfig(family="gpt2", hidden_size=24, num_layers=2, num_heads=4, intermediate_size=37)
        return randomized(build(config, VOCAB, LENGTH))
    return randomized(Own()) if name == "own" else Foreign(foreign(name))


def randomized(model: nn.Module) -> nn.Module:
    """No zeros where a block begins as the identity, and biases that matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def foreign(name: str) -> nn.Module:
    import transformers

    common: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "intermediate_size": 37, "max_position_embeddings": 16, "use_cache": False}
    if name == "hf_llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, tie_word_embeddings=True))
    if name == "hf_qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common, head_dim=6))
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=16, n_inner=37, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return randomized(transformers.GPT2LMHeadModel(config))


class Block(nn.Module):
    """A user's own: norm, residual and two biased layers in one module, so it is no region."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 37), nn.Linear(37, 24)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Own(nn.Module):
    """Any other module, with a plan of the user's."""

    plan = {
        "embed": "vocab", "blocks.0": "sequence_begin", "blocks.*.norm": "sequence", "blocks.*.up": "colwise",
        "blocks.*.down": "rowwise", "norm": "sequence_end", "head": "gather_head",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 24, padding_idx=3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, VOCAB)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return loss, (labels != -100).sum()


class Foreign(nn.Module):
    """Gives a transformers model our models' signature, and shows what a plan is read from."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels):
        logits = self.model(input_ids=input_ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return loss, (labels != -100).sum()


def batches(steps: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].masked_fill(torch.rand(BATCH, LENGTH, generator=generator) < 0.2, -100)
        found.append({"input_ids": tokens[:, :-1], "labels": labels})
    return found


@cache
def train_plainly(name: str, steps: int, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    return train_with_torch(make(name).to(dtype), batches(steps), 3e-3)


def settings(tp: int, stage: int = 0, sequence: bool = False, accumulation: int = 1, **more: Any) -> minizero.Config:
    dp = dist.get_world_size() // tp
    return minizero.Config(
        parallel={"tp": tp, "sequence": sequence, **more.pop("parallel", {})},
        zero={"stage": stage},
        train={
            "micro_batch_size": BATCH // dp // accumulation,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.5,
        },
        optimizer={"lr": 3e-3, "weight_decay": 0.1},
        dist={"timeout": 20.0},
        **more,
    )


def train(
    name: str, tp: int, steps: int, dtype: torch.dtype, stage: int = 0, sequence: bool = False, accumulation: int = 1
) -> dict[str, Any]:
    model = make(name).to(dtype)
    target = model.model if isinstance(model, Foreign) else model
    plan = {f"model.{key}": style for key, style in plan_of(target).items()} if target is not model else {}
    plan = Own.plan if name == "own" else plan
    config = settings(tp, stage, sequence, accumulation, parallel={"plan": plan})
    engine, *_ = minizero.initialize(model=model, config=config)
    engine.ledger.reset()
    losses, norms = run_steps(engine, batches(steps), accumulation)
    weights = {n: v.clone() for n, v in engine.runtime.whole_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights, "counts": dict(engine.ledger.counts)}


def plan_of(model: nn.Module) -> dict[str, str]:
    from minizero.parallelize import plan_of as own

    return own(model)


CELLS = [(2, 2, 0), (4, 2, 1), (4, 2, 3), (4, 4, 2), (8, 2, 3)]  # world, tp, stage


@pytest.mark.parametrize("sequence", (False, True))
@pytest.mark.parametrize(("world", "tp", "stage"), CELLS)
@pytest.mark.parametrize("name", ("llama", "gpt2", "own"))
def test_our_models_train_as_one_process(name, world, tp, stage, sequence):
    losses, norms = train_plainly(name, 2, torch.float64)
    for report in run_distributed(train, world, name, tp, 2, torch.float64, stage, sequence):
        assert relative_error(report["losses"], losses) < 1e-10
        assert relative_error(report["norms"], norms) < 1e-10


@pytest.mark.parametrize("name", ("hf_llama", "hf_qwen3", "hf_gpt2"))
@pytest.mark.parametrize(("tp", "sequence"), ((2, False), (2, True), (4, False)))
def test_unmodified_transformers_models_train_as_one_process(name, tp, sequence):
    bound = 1e-10 if name == "hf_gpt2" else 2e-6  # transformers' RMSNorm computes in fp32, also in a float64 model
    losses, norms = train_plainly(name, 2, torch.float64)
    for report in run_distributed(train, 4, name, tp, 2, torch.float64, 3, sequence, 2):
        assert relative_error(report["losses"], losses) < bound
        assert relative_error(report["norms"], norms) < bound


# ---- the loss ----


def cut_cross_entropy(
    smoothing: float, z: float, dtype: torch.dtype, kernels: Any = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss per token, gradient of the whole logits), from each rank's columns of an odd vocabulary."""
    interpreter.cure()
    comm = axis()
    torch.manual_seed(3)
    whole = (5 * torch.randn(11, VOCAB)).to(dtype)
    labels = torch.randint(VOCAB, (11,))
    labels[2] = -100
    ranges = even(VOCAB, comm.size)
    shard = TensorShard((VOCAB, 1), 0, ranges, comm.rank)
    ((start, stop),) = ranges[comm.rank]
    local = whole[:, start:stop].clone().requires_grad_()
    more = dict(label_smoothing=smoothing, z_loss=z, in_place=True, kernels=kernels)
    loss = vocab_parallel_cross_entropy(local * 1.0, labels, comm, shard, **more)
    (loss * torch.arange(1.0, 12.0)).sum().backward()
    return loss.detach(), comm.gather_parts(local.grad, [b - a for ((a, b),) in ranges], 1, "check")


def axis() -> Communicator:
    return Communicator(build_mesh(ParallelDims(dist.get_world_size(), tp=dist.get_world_size())), "tp", CommLedger())


@pytest.mark.parametrize(("smoothing", "z"), ((0.0, 0.0), (0.1, 0.0), (0.1, 1e-2)))
@pytest.mark.parametrize(("dtype", "bound"), ((torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 5e-2)))
def test_cross_entropy_of_cut_logits(smoothing, z, dtype, bound):
    torch.manual_seed(3)
    whole = (5 * torch.randn(11, VOCAB)).to(dtype)
    labels = torch.randint(VOCAB, (11,))
    labels[2] = -100
    reference = whole.double().requires_grad_()
    loss = F.cross_entropy(reference, labels, reduction="none", label_smoothing=smoothing)
    loss = loss + z * reference.logsumexp(-1).square() * (labels != -100)
    (loss * torch.arange(1.0, 12.0)).sum().backward()
    for world, kernels in ((2, "torch"), (4, "torch"), (2, "torch" if dtype == torch.float64 else "triton")):
        for found, gradient in run_distributed(cut_cross_entropy, world, smoothing, z, dtype, kernels):
            torch.testing.assert_close(found.double(), loss.detach(), rtol=bound, atol=bound)
            torch.testing.assert_close(gradient.double(), reference.grad, rtol=bound, atol=bound)


def foreign_loss(name: str, tp: int, sequence: bool) -> tuple[list[float], Any, set[int]]:
    """A transformers model as the engine's own: (losses it computed, logits without labels, widths that were sent)."""
    torch.manual_seed(0)
    engine, *_ = minizero.initialize(model=foreign(name).double(), config=settings(tp, 1, sequence))
    losses = []
    for batch in batches(3):
        ids = batch["input_ids"][engine_part(engine)]
        output = engine(input_ids=ids, labels=ids)
        assert (output.logits is None) == (tp > 1)
        engine.backward(output.loss)
        engine.step()
        losses.append(engine.result.loss)
    payloads = {count.payload for key, count in engine.ledger.counts.items() if key[0] == "tp"}
    with torch.no_grad():
        return losses, engine(input_ids=batches(1)[0]["input_ids"]).logits, payloads


@pytest.mark.parametrize("name", ("hf_llama", "hf_qwen3", "hf_gpt2"))
def test_a_transformers_models_own_loss_takes_cut_logits(name):
    losses, logits, _ = run_distributed(foreign_loss, 1, name, 1, False)[0]
    for sequence in (False, True):
        for found, found_logits, payloads in run_distributed(foreign_loss, 4, name, 2, sequence):
            assert relative_error(found, losses) < 2e-6
            torch.testing.assert_close(found_logits, logits, rtol=2e-5, atol=2e-5)
            assert BATCH // 2 * LENGTH * VOCAB * 8 not in payloads  # logits were never gathered while training


# ---- counting ----


@pytest.mark.parametrize("tp", (2, 4))
@pytest.mark.parametrize("sequence", (False, True))
def test_communication_per_layer_is_the_closed_form(tp, sequence):
    counts = run_distributed(train, tp, "llama", tp, 1, torch.float32, 0, sequence)[0]["counts"]
    activations = BATCH * LENGTH * 24 * 4  # b s h, fp32
    in_layers = {}
    for (of_axis, operation, _, unit), count in counts.items():
        if of_axis == "tp" and ".layers." in unit and unit.endswith(("self_attn", "mlp", "o_proj", "down_proj")):
            calls, payload = in_layers.get(operation, (0, 0))
            in_layers[operation] = calls + count.calls, payload + count.payload
    layers = 2
    expected = {"all_reduce": 4} if not sequence else {"all_gather": 4, "reduce_scatter": 4}
    assert in_layers == {op: (n * layers, n * layers * activations) for op, n in expected.items()}


def units_of_a_wide_vocabulary() -> set[str]:
    sizes = {"hidden_size": 8, "num_layers": 2, "num_heads": 4, "intermediate_size": 8, "tie_embeddings": False}
    model = build(ModelConfig(**sizes), 997, LENGTH)
    engine, *_ = minizero.initialize(model=model, config=settings(2, 3))
    return {unit.name for unit in engine.runtime.units}


def test_large_layers_that_are_cut_are_units_of_their_own():
    assert {"model.embed_tokens", "lm_head"} <= run_distributed(units_of_a_wide_vocabulary, 4)[0]


# ---- files and initial values ----


def save_and_resume(folder: str, tp: int, stage: int) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    straight, resumed = (
        minizero.initialize(model=make("llama"), config=settings(tp, stage, sequence=True))[0] for _ in range(2)
    )
    step = [iter([{k: v[engine_part(straight)] for k, v in batch.items()}]) for batch in batches(4)]
    again = [iter([{k: v[engine_part(straight)] for k, v in batch.items()}]) for batch in batches(4)]
    for data in step[:2]:
        straight.train_batch(data)
    straight.save_checkpoint(folder)
    straight.save_16bit_model(folder)
    weights = {name: value.clone() for name, value in straight.runtime.whole_parameters()}
    resumed.load_checkpoint(folder)
    return (
        [float(straight.train_batch(data)) for data in step[2:]],
        [float(resumed.train_batch(data)) for data in again[2:]],
        weights,
    )


def engine_part(engine: minizero.Engine) -> slice:
    size = BATCH // engine.dp_size
    return slice(engine.dp_rank * size, (engine.dp_rank + 1) * size)


def test_resume_and_export(tmp_path):
    expected, found, weights = run_distributed(save_and_resume, 4, str(tmp_path), 2, 1)[0]
    assert expected == found
    exported = load_file(tmp_path / "model.safetensors")
    assert exported.keys() == weights.keys() and all(torch.equal(exported[k], weights[k]) for k in weights)
    assert exported["model.embed_tokens.weight"].shape == (VOCAB, 24)


def built_on_meta(tp: int, sequence: bool) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = build(ModelConfig(hidden_size=24, num_layers=2, num_heads=4, intermediate_size=37), VOCAB, LENGTH)
    engine, *_ = minizero.initialize(model=model, config=settings(tp, 3, sequence))
    return {name: value.clone() for name, value in engine.runtime.whole_parameters()}


def test_initial_values_do_not_depend_on_the_degree():
    whole = run_distributed(built_on_meta, 1, 1, False)[0]
    for world, tp, sequence in ((2, 2, False), (4, 4, True), (4, 2, True)):
        for found in run_distributed(built_on_meta, world, tp, sequence):
            assert found.keys() == whole.keys() and all(torch.equal(found[k], whole[k]) for k in whole)


# ---- bad input ----


def misuse(kind: str) -> None:
    model, plan, tp = make("llama"), {}, 2
    if kind == "heads":
        tp = dist.get_world_size()
    elif kind == "pattern":
        plan = {"model.layers.*.self_attn.qkv": "colwise"}
    elif kind == "style":
        plan = {"lm_head": "diagonal"}
    elif kind == "no plan":
        model = nn.Sequential(nn.Linear(3, 3))
    elif kind == "nowhere to cut":
        model, plan = Own(), {key: style for key, style in Own.plan.items() if style != "sequence_begin"}
    elif kind == "degree":
        tp = 2 if dist.get_world_size() == 3 else 4
    sequence = kind == "nowhere to cut"
    minizero.initialize(model=model, config=settings(tp, 0, sequence, parallel={"plan": plan}))


@pytest.mark.parametrize(
    ("kind", "world", "message"),
    (
        ("heads", 3, r"tp = 3 does not divide the 4 heads of model.layers.0.self_attn.q_proj; legal for it: 1, 2, 4"),
        ("pattern", 2, r"'model.layers.\*.self_attn.qkv' matches no module of Llama"),
        ("style", 2, r"'lm_head' has style 'diagonal'; legal: colwise"),
        ("nowhere to cut", 2, r"parallel.sequence: no module of the plan is a sequence_begin"),
        ("no plan", 2, r"Sequential has no tensor-parallel plan: give one as parallel.plan"),
        ("degree", 3, r"tp 2 x pp 1 x cp 1 = 2 does not divide the world size 3"),
    ),
)
def test_bad_input_is_one_clear_error_on_every_rank(kind, world, message):
    refused_everywhere(misuse, world, message, kind)
