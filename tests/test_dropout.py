"""Dropout drops the same elements in every layout, and is a dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from test_tensor_parallel import BATCH, LENGTH, VOCAB, batches, randomized
from torch import nn
from training import relative_error, run_steps

import minizero
from minizero.config.schema import ModelConfig
from minizero.models import build
from minizero.models.dropout import Dropout, hash_samples, number_dropouts
from minizero.parallel.random import RandomStreams
from minizero.utils.forward import Forward, forward_of


def given(step: int = 0, seed: int = 0, samples: int = 64) -> Forward:
    return Forward(seed=seed, step=step, inputs=(torch.arange(samples)[:, None] + torch.zeros(1, 5).long(),))


def masks(p: float = 0.3, **of: int) -> torch.Tensor:
    layer = Dropout(p)
    layer.number = of.pop("number", 7)
    with forward_of(given(**of)):
        return layer(torch.ones(64, 50, 40)) == 0


def test_the_rate_is_p_along_every_dim():
    dropped = masks().double()
    assert abs(float(dropped.mean()) - 0.3) < 0.005
    for dim in range(3):
        others = [d for d in range(3) if d != dim]
        means = dropped.mean(dim=others)
        spread = (0.3 * 0.7 / (dropped.numel() / dropped.shape[dim])) ** 0.5
        assert float((means - 0.3).abs().max()) < 5 * spread


def test_elements_samples_steps_seeds_and_modules_are_independent():
    first = masks().double() - 0.3
    others = [masks(step=1), masks(seed=1), masks(number=8)]
    shifted = [first.roll(1, dims=dim) for dim in range(3)] + [first.roll((1, 1), dims=(1, 2))]
    for other in [*(mask.double() - 0.3 for mask in others), *shifted]:
        correlation = float((first * other).mean()) / 0.21
        assert abs(correlation) < 5 / first.numel() ** 0.5


def test_the_mask_is_a_function_of_the_sample_not_of_its_place():
    layer, x = Dropout(0.5), torch.ones(4, 6, 8)
    tokens = torch.arange(20).view(4, 5)
    with forward_of(Forward(inputs=(tokens,))):
        straight = layer(x)
    with forward_of(Forward(inputs=(tokens.flip(0),))):
        turned = layer(x)
    assert torch.equal(straight, turned.flip(0)) and not torch.equal(straight, turned)


def test_gradients_pass_where_values_do():
    layer, x = Dropout(0.4), torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    with forward_of(Forward(inputs=(torch.arange(3),))):
        y = layer(x)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0).double() / 0.6)
    assert layer.eval()(x) is x and Dropout(0.0)(x) is x


def test_inputs_of_any_dtype_tell_samples_apart():
    for dtype in (torch.int64, torch.int32, torch.float32, torch.bfloat16, torch.float64):
        keys = hash_samples((torch.arange(12).view(4, 3).to(dtype),))
        assert keys.dtype == torch.int32 and len(set(keys.tolist())) == 4
    assert hash_samples((torch.tensor([[1, 2], [2, 1]]),)).unique().numel() == 2
    assert hash_samples((torch.zeros(2, 3), torch.tensor([1, 2]))).unique().numel() == 2


def test_a_batch_that_is_not_on_the_first_dim_is_refused():
    with forward_of(Forward(inputs=(torch.arange(3),))), pytest.raises(ValueError, match="length 6, but .* 3 samples"):
        Dropout(0.5)(torch.ones(6, 2, 2))
    with pytest.raises(ValueError, match=r"got a tensor of shape \(6, 2\)"):
        Dropout(0.5)(torch.ones(6, 2))


def test_outside_an_engine_it_draws_from_torchs_generator():
    layer, x = Dropout(0.5), torch.ones(4, 6, 8)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    assert torch.equal(first, layer(x)) and not torch.equal(first, second)


def test_names_number_the_modules():
    model = nn.ModuleDict({"a": Dropout(0.1), "b": Dropout(0.1)})
    number_dropouts(model)
    assert model["a"].number != model["b"].number != 0


def train(
    attention_dropout: float,
    steps: int,
    stage: int,
    accumulation: int,
    parallel: dict[str, Any],
    recompute: str = "none",
) -> Any:
    torch.manual_seed(0)
    config = ModelConfig(
        family="gpt2", hidden_size=24, num_layers=2, num_heads=4, intermediate_size=37, dropout=0.2,
        attention_dropout=attention_dropout, attention="eager",
    )  # fmt: skip
    model = randomized(build(config, VOCAB, LENGTH)).double()
    dp = dist.get_world_size() // parallel.get("tp", 1) // parallel.get("cp", 1)
    settings = minizero.Config(
        parallel=parallel,
        recompute={"mode": recompute},
        zero={"stage": stage},
        train={"micro_batch_size": BATCH // dp // accumulation, "gradient_accumulation_steps": accumulation},
        optimizer={"lr": 3e-3},
        dist={"timeout": 20.0},
    )
    engine, *_ = minizero.initialize(model=model, config=settings)
    numbers = [module.number for module in model.modules() if isinstance(module, Dropout)]
    assert len(set(numbers)) == len(numbers) > 4
    return run_steps(engine, batches(steps), accumulation)


@pytest.mark.parametrize(
    ("world", "stage", "accumulation", "attention_dropout", "parallel", "recompute"),
    (
        (2, 2, 2, 0.3, {}, "selective"),
        (2, 0, 1, 0.3, {"tp": 2}, "none"),
        (4, 3, 1, 0.3, {"tp": 2, "sequence": True}, "full"),
        (4, 1, 1, 0.3, {"tp": 4}, "selective"),
        (2, 0, 1, 0.0, {"cp": 2}, "full"),
        (8, 3, 1, 0.0, {"cp": 2, "tp": 2, "sequence": True, "context": "ulysses"}, "none"),
    ),
)
def test_training_with_dropout_is_the_same_in_every_layout(
    world, stage, accumulation, attention_dropout, parallel, recompute
):
    losses, norms = run_distributed(train, 1, attention_dropout, 3, 0, 1, {})[0]
    for found, found_norms in run_distributed(
        train, world, attention_dropout, 3, stage, accumulation, parallel, recompute
    ):
        assert relative_error(found, losses) < 1e-10
        assert relative_error(found_norms, norms) < 1e-10


# ---- dropout that is not ours ----


def foreign_gpt2(tp: int, sequence: bool, mode: str, steps: int) -> Any:
    """transformers' GPT-2 with all of its dropout: losses, norms, whole weights, and torch's generator afterwards."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16, "n_inner": 37}
    config = transformers.GPT2Config(**sizes, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).double()
    if mode == "theirs":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    settings = minizero.Config(
        parallel={"tp": tp, "sequence": sequence},
        recompute={"mode": "none" if mode == "theirs" else mode},
        train={"micro_batch_size": 4},
        optimizer={"lr": 3e-3},
        dist={"timeout": 20.0},
    )
    engine, *_ = minizero.initialize(model=model, config=settings)
    torch.manual_seed(5)
    losses = []
    for batch in batches(steps):
        loss = engine(input_ids=batch["input_ids"][:4], labels=batch["input_ids"][:4]).loss
        engine.backward(loss)
        engine.step()
        losses.append(engine.result.loss)
    untouched = torch.rand(1)
    weights = {name: value.clone() for name, value in engine.runtime.whole_parameters()}
    return losses, weights, untouched


@pytest.mark.parametrize("sequence", (False, True))
def test_foreign_dropout_repeats_under_recompute_and_agrees_over_ranks(sequence):
    reports = run_distributed(foreign_gpt2, 2, 2, sequence, "none", 3)
    for mode in ("full", "selective"):
        for (losses, weights, _), (found, again, _) in zip(
            reports, run_distributed(foreign_gpt2, 2, 2, sequence, mode, 3), strict=True
        ):
            assert relative_error(found, losses) < 1e-12
            assert all(torch.allclose(again[key], weights[key], rtol=1e-9, atol=1e-12) for key in weights)
    first, second = reports
    assert first[0] == second[0]
    assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])  # copies have not drifted apart
    torch.manual_seed(5)
    assert torch.equal(first[2], torch.rand(1))  # the caller's generator is the caller's


class Cut(nn.Module):
    """Dropout before a region, inside it and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inside, self.behind = nn.Dropout(0.5), nn.Dropout(0.5), nn.Dropout(0.5)
        self.up, self.down = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.behind(self.down(self.inside(self.up(self.before(x)))))


def masks_by_place() -> dict[str, torch.Tensor]:
    config = minizero.Config(
        parallel={"tp": 2, "plan": {"up": "colwise", "down": "rowwise"}}, train={"micro_batch_size": 4}
    )
    model, found = Cut(), {}
    for name in ("before", "inside", "behind"):
        hook = lambda module, args, out, name=name: found.update({name: out == 0})  # noqa: E731
        getattr(model, name).register_forward_hook(hook)
    engine, *_ = minizero.initialize(model=model, config=config)
    engine(torch.ones(4, 3, 24))
    return found


def test_layers_draw_from_the_stream_of_their_place():
    first, second = run_distributed(masks_by_place, 2)
    assert torch.equal(first["before"], second["before"]) and torch.equal(first["behind"], second["behind"])
    assert not torch.equal(first["inside"], second["inside"])


def streams_drawn() -> dict[str, list[float]]:
    rank = dist.get_rank()
    streams = RandomStreams(seed=3, data_rank=7, tensor_rank=rank, device=torch.device("cpu"))
    drawn: dict[str, list[float]] = {"whole": [], "part": []}
    for _ in range(2):
        streams.begin(step=3)
        for name in ("whole", "part", "whole", "part"):
            streams.use(name)
            drawn[name].append(float(torch.rand(1)))
        streams.end()
    return drawn


def test_streams_agree_where_tensors_are_whole_and_differ_where_they_are_parts():
    first, second = run_distributed(streams_drawn, 2)
    assert first["whole"] == second["whole"] and not set(first["part"]) & set(second["part"])
    everything = [*first["whole"], *first["part"], *second["part"]]
    assert len(set(everything)) == len(everything)


def test_streams_are_given_back_by_whoever_gives_back_torchs_generator():
    """transformers' own checkpointing, which knows nothing of streams."""
    plain, again = (run_distributed(foreign_gpt2, 2, 2, False, mode, 3)[0] for mode in ("none", "theirs"))
    assert relative_error(again[0], plain[0]) < 1e-12
    assert all(torch.allclose(again[1][key], value, rtol=1e-9, atol=1e-12) for key, value in plain[1].items())


def test_a_resumed_run_draws_what_the_other_would_have_drawn():
    def draw(streams: RandomStreams, step: int) -> float:
        streams.begin(step)
        drawn = float(torch.rand(1))
        streams.end()
        return drawn

    straight, resumed = (RandomStreams(1, 0, 0, torch.device("cpu")) for _ in range(2))
    drawn = [draw(straight, step) for step in (0, 0, 1, 1, 2)]
    assert [draw(resumed, step) for step in (1, 1, 2)] == drawn[2:] and len(set(drawn)) == 5


def test_a_checkpoint_that_broke_off_inside_a_part_leaves_no_trace():
    streams = RandomStreams(1, 0, 0, torch.device("cpu"))
    streams.begin(0)
    whole = torch.get_rng_state()
    streams.use("part")
    first = float(torch.rand(1))
    torch.set_rng_state(whole)  # as a checkpoint does before it computes again
    streams.use("part")
    assert float(torch.rand(1)) == first
