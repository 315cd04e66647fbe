"""What may be cut into stages: sequential models, transformers' decoders; and what may not, said on every rank."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from hypothesis import given
from hypothesis import strategies as st
from test_pipeline_engine import VOCAB, agree, batches, make, settings
from torch import Tensor, nn
from torch.nn import functional as F
from training import refused_everywhere, relative_error, run_steps

import minizero
from minizero import LayerSpec, PipelineModule, TiedLayerSpec
from minizero.parallel.pipeline.partition import balanced, uniform

WIDTH, STEPS = 15, 6


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Split(nn.Module):
    """One tensor to three: one without a gradient, one None."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x), x.detach().argmax(-1), None, x * 2


class PassOn(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, given: Any) -> Any:
        x, index, nothing, y = given
        assert nothing is None and index.dtype == torch.int64
        return x * self.scale, index, None, y  # y goes through untouched


class Join(nn.Module):
    def forward(self, given: Any) -> Tensor:
        x, index, _, y = given
        return x + y + index.unsqueeze(-1)


def head(embedding: nn.Module, x: Tensor) -> Tensor:
    return x @ embedding.weight.t()


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), torch.tensor(labels.numel())


def mean_loss(x: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(x, target)


def layers_of(kind: str) -> tuple[list[Any], Any]:
    if kind == "tied":
        embed = TiedLayerSpec("embed", nn.Embedding, VOCAB, WIDTH)
        last = TiedLayerSpec("embed", nn.Embedding, VOCAB, WIDTH, forward_fn=head)
        return [embed, *(LayerSpec(Block, WIDTH, 17) for _ in range(7)), nn.LayerNorm(WIDTH), last], token_loss
    if kind == "several tensors":
        middle = [LayerSpec(PassOn, WIDTH) for _ in range(5)]
        return [LayerSpec(Block, WIDTH, 7), LayerSpec(Split, WIDTH), *middle, Join()], mean_loss
    if kind == "functions":
        made: list[Any] = [torch.tanh, LayerSpec(nn.Linear, WIDTH, WIDTH), lambda x: x * 0.5] * 3
        return made, mean_loss
    if kind == "frozen":
        made = [LayerSpec(Block, WIDTH, 17) for _ in range(7)]
        return made, mean_loss
    raise AssertionError(kind)


def data(kind: str, steps: int, counts: int, ragged: bool) -> list[list[tuple[Tensor, Tensor]]]:
    """Micro-batches per step; of other lengths each, where `ragged`."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(steps):
        step = []
        for index in range(counts):
            length = 5 + (index * 3 % 4 if ragged else 0)
            if kind == "tied":
                tokens = torch.randint(VOCAB, (2, length + 1), generator=generator)
                step.append((tokens[:, :-1], tokens[:, 1:]))
            else:
                step.append(tuple(torch.randn(2, 2, length, WIDTH, generator=generator).unbind()))
        found.append(step)
    return found


def train_layers(
    kind: str, pp: int, schedule: str, counts: int, method: str, ragged: bool, stage: int = 0
) -> tuple[list[float], list[float]]:
    layers, loss_fn = layers_of(kind)
    example = torch.randn(2, 5, WIDTH) if method == "measured" else None
    model = PipelineModule(layers, num_stages=pp, loss_fn=loss_fn, partition_method=method, example_input=example)
    if kind == "frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(("layers.0.", "layers.1.", "layers.6.down")))
    config = minizero.Config(
        pipeline={"schedule": schedule, "microbatches": counts},
        train={"micro_batch_size": 2, "gradient_clipping": 0.5},
        zero={"stage": stage},
        optimizer={"lr": 1e-3, "weight_decay": 0.1},
        dist={"timeout": 30.0},
    )
    parameters = [p for p in model.parameters() if p.requires_grad]  # as DeepSpeed's users write it
    engine, *_ = minizero.initialize(model=model, model_parameters=parameters, config=config)
    losses, norms = [], []
    for step in data(kind, STEPS, counts, ragged):
        losses.append(float(engine.train_batch(iter(step))))
        norms.append(engine.get_global_grad_norm())
    return losses, norms


@pytest.mark.parametrize(
    ("kind", "pp", "schedule", "counts", "method", "ragged", "stage"),
    (
        ("tied", 2, "one_f_one_b", 3, "parameters", True, 0),
        ("tied", 4, "zb_h1", 5, "uniform", True, 1),
        ("tied", 2, "zbv", 4, "type:Block|Embedding", False, 2),
        ("tied", 4, "interleaved", 7, "flops", True, 3),
        ("several tensors", 2, "gpipe", 3, "uniform", True, 0),
        ("several tensors", 4, "zb_h2", 7, "uniform", True, 3),
        ("several tensors", 4, "dualpipe_v", 5, "uniform", True, 1),
        ("functions", 4, "one_f_one_b", 3, "uniform", False, 2),
        ("frozen", 4, "zb_h1", 4, "uniform", False, 2),
        ("frozen", 2, "zbv", 4, "measured", True, 3),
    ),
)
def test_sequential_models_train_as_one_process(kind, pp, schedule, counts, method, ragged, stage):
    (wanted,) = run_distributed(train_layers, 1, kind, 1, "gpipe", counts, "uniform", ragged)
    agree(run_distributed(train_layers, pp, kind, pp, schedule, counts, method, ragged, stage), wanted)
    assert len(set(wanted[0])) == STEPS


def test_one_process_is_torch():
    """The one process that pipelines are compared with, beside torch alone on the same initial values."""
    (wanted,) = run_distributed(train_layers, 1, "tied", 1, "gpipe", 3, "uniform", True)
    layers, loss_fn = layers_of("tied")
    model = PipelineModule(layers, loss_fn=loss_fn)
    model.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for step in data("tied", STEPS, 3, True):
        pairs = [model(*batch) for batch in step]
        loss = sum(total for total, _ in pairs) / sum(count for _, count in pairs)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert relative_error(wanted[0], losses) < 2e-6


def held_layers(pp: int) -> tuple[list[str], int]:
    layers, loss_fn = layers_of("tied")
    model = PipelineModule(layers, num_stages=pp, loss_fn=loss_fn, partition_method="uniform")
    assert all(p.is_meta for n, p in model.named_parameters() if "8" not in n)  # the LayerNorm was given built
    config = minizero.Config(pipeline={"microbatches": 2}, train={"micro_batch_size": 2})
    engine, *_ = minizero.initialize(model=model, config=config)
    return [name for name, _ in model.named_parameters()], engine.num_parameters()


def test_a_rank_builds_its_own_layers_only():
    reports = run_distributed(held_layers, 2, 2)
    first, last = ({name.partition(".")[2].partition(".")[0] for name in names} for names, _ in reports)
    assert first == {"embed", "1", "2", "3", "4"} and last == {"embed", "5", "6", "7", "8"}
    whole = sum(p.numel() for p in PipelineModule(layers_of("tied")[0]).parameters())
    assert {count for _, count in reports} == {whole}


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.integers(1, 12))
def test_partitions_are_contiguous_and_none_is_lighter(weights, parts):
    parts = min(parts, len(weights))
    found = balanced(weights, parts)
    assert [place for part in found for place in part] == [*range(len(weights))] and all(found)
    heaviest = max(sum(weights[p] for p in part) for part in found)

    def fits(limit: int) -> bool:
        """Greedily, in at most `parts` parts."""
        used, filled = 1, 0
        for weight in weights:
            if weight > limit:
                return False
            if filled + weight > limit:
                used, filled = used + 1, 0
            filled += weight
        return used <= parts

    assert fits(heaviest) and not fits(heaviest - 1)
    even = uniform(len(weights), parts)
    assert max(map(len, even)) - min(map(len, even)) <= 1 and sum(map(len, even)) == len(weights)


# ---- transformers ----


def foreign(name: str, layers: int = 5) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {"vocab_size": VOCAB, "tie_word_embeddings": name in ("gpt2", "qwen3")}
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=24, n_layer=layers, n_head=4, n_positions=32, **common)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        return transformers.GPT2LMHeadModel(config)
    kind = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "qwen3": ("Qwen3Config", "Qwen3ForCausalLM")}[name]
    config = getattr(transformers, kind[0])(
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=37,
        max_position_embeddings=32,
        **common,
    )
    return getattr(transformers, kind[1])(config)


def train_foreign(name: str, pp: int, schedule: str, **more: Any) -> tuple[list[float], list[float]]:
    samples, counts = 6, 3
    engine, *_ = minizero.initialize(model=foreign(name), config=settings(counts, samples, pp, schedule, **more))
    dense = [{"input_ids": b["input_ids"], "labels": b["input_ids"]} for b in batches(2, samples)]
    return run_steps(engine, dense, counts)


@pytest.mark.parametrize("name", ("llama", "gpt2", "qwen3"))
@pytest.mark.parametrize(
    ("world", "pp", "schedule", "more"),
    (
        (2, 2, "one_f_one_b", {}),
        (2, 2, "zbv", {"zero": {"stage": 3}, "pipeline": {"partition": "parameters"}}),
        (4, 4, "zb_h1", {"recompute": {"mode": "full"}}),
        (8, 2, "interleaved", {"parallel": {"tp": 2, "cp": 2, "sequence": True}, "pipeline": {"partition": "flops"}}),
        (4, 2, "one_f_one_b", {"parallel": {"tp": 2}, "recompute": {"mode": "selective"}}),
        (4, 1, "gpipe", {"parallel": {"tp": 2, "cp": 2}}),
    ),
)
def test_unmodified_transformers_decoders(name, world, pp, schedule, more):
    agree(run_distributed(train_foreign, world, name, pp, schedule, **more), alone(name))


@cache
def alone(name: str) -> tuple[list[float], list[float]]:
    (found,) = run_distributed(train_foreign, 1, name, 1, "gpipe")
    return found


# ---- refusals ----


def refuse(kind: str) -> None:
    world = dist.get_world_size()
    model: Any = make("llama", 5)
    pp, schedule, counts, more = world, "one_f_one_b", 2, {}
    if kind == "few blocks":
        model, schedule, more = make("llama", 3), "interleaved", {"pipeline": {"chunks": 2}}
    elif kind == "few layers":
        model = PipelineModule([LayerSpec(nn.Linear, 3, 3)], num_stages=world)
    elif kind == "chunks":
        more = {"pipeline": {"chunks": 3}}
    elif kind == "unknown schedule":
        schedule = "one_f_two_b"
    elif kind == "no order":
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    elif kind == "left over":
        model.extra = nn.Linear(3, 3)
    elif kind == "shared":
        model.model.layers[4].mlp = model.model.layers[0].mlp
    elif kind == "partition":
        more = {"pipeline": {"partition": "measured"}}
    elif kind == "budget":
        more = {"recompute": {"mode": "budget", "budget": 1e9}}
    elif kind == "stages":
        model, more = PipelineModule(layers_of("functions")[0], num_stages=3), {"parallel": {"pp": world}}
    elif kind == "one object":
        layer = nn.Linear(3, 3)
        model = PipelineModule([layer, torch.tanh, layer], num_stages=world, partition_method="uniform")
    minizero.initialize(model=model, config=settings(counts, 2, pp, schedule, **more))


@pytest.mark.parametrize(
    ("kind", "says"),
    (
        ("few blocks", "3 blocks are fewer than the 4 stages .* legal: at most 3"),
        ("few layers", "1 layers are fewer than the 2 stages"),
        ("chunks", "chunks = 3: one_f_one_b has 1 per rank; any number: interleaved"),
        ("unknown schedule", "schedule 'one_f_two_b': legal are gpipe, one_f_one_b"),
        ("no order", "Sequential says nothing of its order; legal: minizero.PipelineModule"),
        ("left over", "extra.weight is in none of the modules that Llama's order names"),
        ("shared", r"model.layers.4 shares a parameter with model.layers.0 on another stage"),
        ("partition", "pipeline.partition = 'measured': legal for a decoder are uniform, parameters, flops"),
        ("budget", "recompute.mode budget is not available with parallel.pp > 1"),
        ("stages", r"PipelineModule\(num_stages=3\) and parallel.pp = 2 contradict"),
        ("one object", "layers 0 and 2 are one Linear on two stages; legal: a TiedLayerSpec"),
    ),
)
def test_what_cannot_be_cut_is_refused_everywhere(kind, says):
    refused_everywhere(refuse, 2, says, kind)


@pytest.mark.parametrize(
    ("arguments", "says"),
    (
        ({"layers": []}, "layers is empty"),
        ({"layers": [torch.tanh], "num_stages": 0}, "num_stages = 0"),
        ({"layers": [torch.tanh], "partition_method": "best"}, "partition_method = 'best'; legal: uniform"),
        ({"layers": [torch.tanh], "partition_method": "measured"}, "needs an example_input"),
        ({"layers": [3]}, "a layer is a int; legal: modules, LayerSpecs, functions"),
        ({"layers": [TiedLayerSpec("e", nn.Embedding, 3, 2, tied_weight_attr="w")]}, "Embedding has no w"),
    ),
)
def test_sequential_models_that_make_no_sense(arguments, says):
    with pytest.raises(ValueError, match=says):
        PipelineModule(**arguments)
    with pytest.raises(ValueError, match="legal is a class of modules"):
        LayerSpec(torch.tanh)
