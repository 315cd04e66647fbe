"""The models against transformers' on the same weights, and what they promise to ZeRO: names, units, initial values."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from minizero.config.schema import ModelConfig
from minizero.models import MODELS, build
from minizero.zero.materialize import initial_values, move_off_meta
from minizero.zero.units import find_units

VOCAB, LENGTH, BATCH = 97, 17, 2
LLAMA3 = {"type": "llama3", "factor": 3.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0}
LLAMA3 |= {"original_max_position_embeddings": LENGTH - 1}
"""Of waves of 6, 23 and more tokens one stays, one is a mixture, the others are stretched."""
SIZES = {
    "llama": {"hidden_size": 42, "num_layers": 3, "num_heads": 3, "intermediate_size": 57, "rope_theta": 500.0},
    "llama-gqa": {"hidden_size": 60, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "norm_eps": 1e-3},
    "llama-mqa": {"hidden_size": 30, "num_layers": 2, "num_heads": 3, "num_kv_heads": 1},
    "llama-wide": {"hidden_size": 36, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 14},
    "llama-3.1": {"hidden_size": 42, "num_layers": 2, "num_heads": 3, "rope_scaling": LLAMA3},
    "llama-qwen3": {"hidden_size": 35, "num_layers": 2, "num_heads": 3, "head_dim": 8, "qk_norm": True},
    "gpt2": {"hidden_size": 39, "num_layers": 3, "num_heads": 3, "norm_eps": 1e-3},
    "gpt2-wide": {"hidden_size": 20, "num_layers": 1, "num_heads": 4, "intermediate_size": 33},
}


def settings(name: str, tied: bool) -> ModelConfig:
    return ModelConfig(family=name.split("-")[0], tie_embeddings=tied, **SIZES[name])


def reference(config: ModelConfig, model: nn.Module) -> nn.Module:
    """transformers' model of the same shape."""
    if config.family == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCAB,
                n_positions=LENGTH,
                n_embd=config.hidden_size,
                n_layer=config.num_layers,
                n_head=config.num_heads,
                n_inner=config.intermediate_size,
                layer_norm_epsilon=config.norm_eps,
                tie_word_embeddings=config.tie_embeddings,
            )
        )
    kind, rope = "Qwen3" if config.qk_norm else "Llama", {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling.type == "llama3":
        rope |= {"rope_type": "llama3", **config.rope_scaling.model_dump(exclude={"type"})}
    return getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(
            vocab_size=VOCAB,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads or config.num_heads,
            head_dim=config.head_dim or config.hidden_size // config.num_heads,
            intermediate_size=model.model.layers[0].mlp.up_proj.out_features,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            rope_parameters=rope,
        )
    )


class WideRMSNorm(nn.RMSNorm):
    """transformers' RMSNorm rounds to fp32 whatever it is given; in float64 the comparison needs one that does not."""


def without_rounding_norms(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm | Qwen3RMSNorm):
                norm = WideRMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=child.weight.dtype)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


def randomize(model: nn.Module) -> None:
    """Weights large enough that every term of the forward matters, also biases and norms."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logits_equal_transformers(name: str, tied: bool, dtype: torch.dtype, rtol: float) -> None:
    config = settings(name, tied)
    model = build(config, VOCAB, LENGTH).to(dtype)
    randomize(model)
    theirs = reference(config, model).to(dtype).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    if dtype == torch.float64:
        theirs = without_rounding_norms(theirs)
    input_ids_BS = torch.randint(VOCAB, (BATCH, LENGTH))
    with torch.no_grad():
        ours_BSV, theirs_BSV = model(input_ids_BS), theirs(input_ids_BS).logits
    assert ours_BSV.dtype == dtype
    torch.testing.assert_close(ours_BSV, theirs_BSV, rtol=rtol, atol=rtol * theirs_BSV.abs().max().item())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", SIZES)
def test_parameters_have_the_names_and_shapes_of_transformers(name: str, tied: bool) -> None:
    config = settings(name, tied)
    model = build(config, VOCAB, LENGTH)
    theirs = reference(config, model)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    assert shapes == {key: tuple(p.shape) for key, p in theirs.named_parameters()}
    assert set(model.state_dict()) == set(theirs.state_dict())


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_loss_is_the_sum_over_labels_that_count(name: str) -> None:
    model = build(settings(name, tied=True), VOCAB, LENGTH)
    input_ids_BS, labels_BS = torch.randint(VOCAB, (2, BATCH, LENGTH))
    labels_BS[0, 3:9] = -100
    loss, count = model(input_ids_BS, labels_BS)
    logp_BSV = model(input_ids_BS).log_softmax(-1)
    kept = [(b, s) for b in range(BATCH) for s in range(LENGTH) if labels_BS[b, s] != -100]
    expected = -sum(logp_BSV[b, s, labels_BS[b, s]] for b, s in kept)
    assert count.dtype == torch.int64 and count.shape == () and count.item() == len(kept) == BATCH * LENGTH - 6
    torch.testing.assert_close(loss, expected)
    nothing, none = model(input_ids_BS, torch.full_like(labels_BS, -100))
    assert nothing.item() == 0 and none.item() == 0


def test_loss_of_a_16_bit_model_is_computed_in_fp32() -> None:
    model = build(settings("llama", tied=True), VOCAB, LENGTH).to(torch.bfloat16)
    input_ids_BS = torch.randint(VOCAB, (BATCH, LENGTH))
    logits_BSV = model(input_ids_BS)
    loss, _ = model(input_ids_BS, input_ids_BS)
    assert logits_BSV.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(loss, F.cross_entropy(logits_BSV.float().flatten(0, 1), input_ids_BS.flatten(), reduction="sum"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_position_sees_a_later_token(name: str) -> None:
    model = build(settings(name, tied=False), VOCAB, LENGTH)
    randomize(model)
    input_ids_BS = torch.randint(VOCAB, (1, LENGTH))
    changed_BS = input_ids_BS.clone()
    changed_BS[:, 9:] = (changed_BS[:, 9:] + 1) % VOCAB
    before_BSV, after_BSV = model(input_ids_BS), model(changed_BS)
    torch.testing.assert_close(before_BSV[:, :9], after_BSV[:, :9])
    assert (before_BSV[:, 9:] - after_BSV[:, 9:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_materialized_from_meta_module_by_module(name: str, tied: bool) -> None:
    with torch.device("meta"):
        model = build(settings(name, tied), VOCAB, LENGTH)
    assert all(p.is_meta for p in model.parameters())
    new = move_off_meta(model, torch.device("cpu"))
    values = dict(initial_values(model, set(new.values()), torch.device("cpu"), seed=5))
    for parameter in model.parameters():
        parameter.data = values[parameter].clone()
    logits_BSV = model(torch.randint(VOCAB, (BATCH, LENGTH)))
    assert logits_BSV.isfinite().all()
    again = copy.deepcopy(model)
    assert torch.equal(again(torch.zeros(1, 3, dtype=torch.long)), model(torch.zeros(1, 3, dtype=torch.long)))


def test_gpt2_starts_as_its_paper_says() -> None:
    config = ModelConfig(family="gpt2", hidden_size=192, num_layers=8, num_heads=4)
    for key, parameter in build(config, 400, LENGTH).named_parameters():
        if key.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / 4, rel=0.05), key
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), key
        else:
            assert parameter.unique().numel() == 1, key


def test_llama_blocks_start_as_the_identity() -> None:
    config = ModelConfig(family="llama", hidden_size=192, num_layers=8, num_heads=4)
    for key, parameter in build(config, 400, LENGTH).named_parameters():
        if key.endswith(("o_proj.weight", "down_proj.weight")):
            assert not parameter.any(), key
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(192**-0.5, rel=0.05), key
        else:
            assert parameter.unique().numel() == 1, key


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_block_is_a_zero_unit(name: str) -> None:
    units = find_units(build(settings(name, tied=True), VOCAB, LENGTH))
    blocks = {"llama": "model.layers", "gpt2": "transformer.h"}[name]
    assert [unit.name for unit in units] == ["root", *(f"{blocks}.{i}" for i in range(3))]


def test_trains_after_inference_mode() -> None:
    model = build(settings("llama", tied=True), VOCAB, LENGTH)
    randomize(model)
    input_ids_BS = torch.randint(VOCAB, (BATCH, LENGTH))
    with torch.inference_mode():
        model(input_ids_BS)
    model(input_ids_BS, input_ids_BS)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_default_mlp_widths() -> None:
    llama = build(ModelConfig(hidden_size=100, num_layers=1, num_heads=2), VOCAB, LENGTH)
    gpt2 = build(ModelConfig(family="gpt2", hidden_size=100, num_layers=1, num_heads=2), VOCAB, LENGTH)
    assert llama.model.layers[0].mlp.up_proj.out_features == 288  # 8/3 x 100 = 266.7
    assert gpt2.transformer.h[0].mlp.c_fc.weight.shape == (100, 400)


def test_dropout_acts_only_in_training() -> None:
    config = ModelConfig(family="gpt2", hidden_size=32, num_layers=2, num_heads=2, dropout=0.5)
    model, input_ids_BS = build(config, VOCAB, LENGTH), torch.randint(VOCAB, (BATCH, LENGTH))
    assert not torch.equal(model(input_ids_BS), model(input_ids_BS))
    model.eval()
    assert torch.equal(model(input_ids_BS), model(input_ids_BS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "llama", "dropout": 0.1}, "model.dropout = 0.1"),
        ({"family": "llama", "hidden_size": 45, "num_heads": 3}, "head width"),
        ({"family": "llama", "head_dim": 7}, r"model.head_dim .* = 7 is odd"),
        ({"family": "gpt2", "head_dim": 32}, "model.head_dim = 32"),
        ({"family": "gpt2", "qk_norm": True}, "model.qk_norm = true"),
        ({"family": "gpt2", "rope_scaling": {"type": "llama3"}}, "model.rope_scaling.type = llama3"),
        ({"family": "gpt2", "num_heads": 4, "num_kv_heads": 2}, "model.num_kv_heads = 2"),
    ],
)
def test_settings_that_a_family_does_not_have_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(ModelConfig(**changes), VOCAB, LENGTH)


def test_gpt2_names_an_input_that_is_too_long() -> None:
    model = build(settings("gpt2", tied=True), VOCAB, LENGTH)
    with pytest.raises(ValueError, match=f"{LENGTH + 1} tokens, but this gpt2 has positions for {LENGTH}"):
        model(torch.zeros(1, LENGTH + 1, dtype=torch.long))


def test_every_family_of_the_schema_is_built() -> None:
    assert set(MODELS) == set(ModelConfig.model_fields["family"].annotation.__args__)
