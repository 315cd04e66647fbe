"""Models from HuggingFace's folders and back: bitwise, in every layout, for whoever reads such folders."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import ctranslate2
import pytest
import torch
import transformers
from harness import run_distributed
from safetensors.torch import load_file, save_file
from test_train import TINY, call_main
from torch import Tensor, nn

import minizero
from minizero import cli
from minizero.checkpoint import CheckpointError
from minizero.checkpoint.export import export_hf
from minizero.checkpoint.load import Reader
from minizero.checkpoint.weights import WeightFiles
from minizero.data.tokenizer import SEPARATOR, Tokenizer
from minizero.models.gpt2 import GPT2
from minizero.models.layers import Embedding, Linear
from minizero.models.llama import Llama
from minizero.report import last_logits

TEXTS = ["".join(f"value_{line} = {line * 37 % 101} + module_{line % 7}\n" for line in range(300))]
LENGTH, GREEDY = 48, 16
PROMPT = "value_3 = "
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "zero3": (2, {"zero": {"stage": 3}}),
    "tp2": (2, {"parallel": {"tp": 2}}),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "cp2": (2, {"parallel": {"cp": 2}}),
}
OF_ALL = [layout for layout in LAYOUTS if layout != "cp2"]
KINDS = [(kind, tied) for kind in ("gpt2", "llama", "qwen3") for tied in (True, False)] + [("llama3.1", True)]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.1, "high_freq_factor": 1.0}
LLAMA3 |= {"original_max_position_embeddings": 10}
"""Of waves of 6, 58 and 532 tokens one stays, one is a mixture, one is stretched."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer.train(TEXTS, 301).save(path)
    return path


def theirs(kind: str, tied: bool = True, **more: Any) -> Any:
    """transformers' model with weights that all matter: odd sizes, heads whose width is their own where that exists."""
    torch.manual_seed(3)
    if kind == "gpt2":
        sizes = {"n_embd": 28, "n_layer": 3, "n_head": 4, "n_inner": 37, "n_positions": LENGTH, "bos_token_id": None}
        sizes |= {"vocab_size": 301, "tie_word_embeddings": tied, "eos_token_id": None}
        config = transformers.GPT2Config(**{**sizes, **more})
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        sizes = {"vocab_size": 301, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 37, "max_position_embeddings": LENGTH}
        sizes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}, "tie_word_embeddings": tied}
        if kind == "llama3.1":
            sizes["rope_parameters"] |= LLAMA3
        if kind == "qwen3":
            config = transformers.Qwen3Config(**{**sizes, "head_dim": 10, **more})
        else:
            config = transformers.LlamaConfig(**{**sizes, **more})
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def saved(folder: Path, kind: str, tied: bool = True, **more: Any) -> Any:
    """`theirs`, written to `folder` as transformers writes it, in several shards."""
    model = theirs(kind, tied, **more)
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return model


def start(folder: str, layout: str, **changes: Any) -> Any:
    batch = {"global_batch_size": 4, "gradient_accumulation_steps": 1}
    config = {"train": batch, "optimizer": {"lr": 1e-3}, "dist": {"timeout": 20.0}}
    model = minizero.load_hf(folder, **changes)
    return minizero.initialize(model=model, config=minizero.Config(**config, **LAYOUTS[layout][1]))[0]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- in and out ----


def enter(folder: str, layout: str, checkpoint: str | None, ids: Tensor) -> list[Tensor]:
    """Logits of the model in `folder`, which is saved again as `checkpoint`."""
    engine = start(folder, layout)
    if checkpoint is not None:
        engine.save_checkpoint(checkpoint, tag="as_it_came")
    engine.eval()
    return engine.infer([{"input_ids": ids}])


IN_AND_OUT = [*((kind, tied, layout) for kind, tied in KINDS for layout in OF_ALL), ("llama3.1", True, "cp2")]


@pytest.mark.parametrize(("kind", "tied", "layout"), IN_AND_OUT)
def test_in_with_the_same_logits_and_out_with_the_same_bits(tmp_path, kind, tied, layout):
    model, ids = saved(tmp_path / "in", kind, tied), torch.randint(301, (2, 11))
    with torch.no_grad():
        expected = model(ids).logits
    checkpoint = tmp_path / "run"
    reports = run_distributed(enter, LAYOUTS[layout][0], str(tmp_path / "in"), layout, str(checkpoint), ids)
    found = [logits for report in reports for logits in report]
    assert len(found) == (1 if layout == "pp2" else len(reports))
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    export_hf(checkpoint, tmp_path / "out", max_shard_size="10KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in"))
    before, after = (transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("in", "out"))
    for config in (before, after):
        config.pop("_name_or_path")
    assert after == before


def train_and_speak(folder: str, layout: str, checkpoint: str, prompt: list[int]) -> tuple[list[float], list[int]]:
    """Losses of two steps, after which a checkpoint is written; the tokens that are most likely after `prompt`."""
    engine = start(folder, layout)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(2):
        tokens = torch.randint(301, (4, 10), generator=generator).view(engine.dp_size, -1, 10)[engine.dp_rank]
        losses.append(float(engine.train_batch(iter([{"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}]))))
    engine.save_checkpoint(checkpoint)
    engine.eval()
    spoken = list(prompt)
    for _ in range(GREEDY):
        spoken.append(int(last_logits(engine, torch.tensor([spoken]), len(spoken) - 1, 301).argmax()))
    return losses, spoken[len(prompt) :]


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_what_was_trained_says_the_same_elsewhere(tmp_path, tokenizer, kind, tied):
    saved(tmp_path / "in", kind, tied)
    prompt, first = Tokenizer.load(tokenizer).encode(PROMPT), []
    for layout in OF_ALL:
        run, out = (tmp_path / f"{layout}-{what}" for what in ("run", "out"))
        reports = run_distributed(train_and_speak, LAYOUTS[layout][0], str(tmp_path / "in"), layout, str(run), prompt)
        losses, spoken = reports[0]
        assert losses[0] != losses[1] and losses == pytest.approx(first := first or losses, rel=1e-5)
        assert all(report[1] == spoken for report in reports)
        export_hf(run, out, tokenizer=tokenizer)
        assert not same(tensors_of(out), tensors_of(tmp_path / "in"))
        assert by_transformers(out, prompt) == spoken
        if kind != "llama3.1":  # whose original length CTranslate2's converter does not read
            assert by_ctranslate2(out, prompt) == spoken


def by_transformers(folder: Path, prompt: list[int]) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    given = torch.tensor([prompt])
    more = {"do_sample": False, "min_new_tokens": GREEDY, "max_new_tokens": GREEDY, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    return model.generate(given, attention_mask=torch.ones_like(given), **more)[0, len(prompt) :].tolist()


def by_ctranslate2(folder: Path, prompt: list[int]) -> list[int]:
    converted = str(folder / "ctranslate2")
    ctranslate2.converters.TransformersConverter(str(folder)).convert(converted)
    generator = ctranslate2.Generator(converted, device="cpu", compute_type="float32", intra_threads=1)
    tokens = transformers.AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(prompt)
    more = {"max_length": GREEDY, "sampling_topk": 1, "include_prompt_in_result": False, "end_token": []}
    return generator.generate_batch([tokens], **more)[0].sequences_ids[0]


# ---- what stands in a folder ----


def renamed(tensors: dict[str, Tensor], spelling: str) -> dict[str, Tensor]:
    """The tensors of a model as other versions of transformers wrote them."""
    base = "transformer." if "transformer.wte.weight" in tensors else "model."
    if spelling == "bare":
        tensors = {key.removeprefix(base): value for key, value in tensors.items()}
    if spelling == "head":
        embedding = next(key for key in tensors if key.endswith(("wte.weight", "embed_tokens.weight")))
        tensors["lm_head.weight"] = tensors[embedding].clone()
    extra = {
        "transformer.h.{}.attn.bias": torch.ones(1, 1, LENGTH, LENGTH).tril().bool(),
        "transformer.h.{}.attn.masked_bias": torch.tensor(-1e4),
        "model.layers.{}.self_attn.rotary_emb.inv_freq": torch.zeros(3),
    }
    for key, value in extra.items() if spelling != "head" else ():
        if key.startswith(base):
            name = key.removeprefix(base) if spelling == "bare" else key
            tensors |= {name.format(layer): value.clone() for layer in range(3)}
    return tensors


@pytest.mark.parametrize("spelling", ("bare", "computed", "head"))
@pytest.mark.parametrize("kind", ("gpt2", "llama"))
def test_every_spelling_of_the_names_is_read(tmp_path, kind, spelling):
    saved(tmp_path, kind)
    ids = torch.randint(301, (2, 11))
    ((expected,),) = run_distributed(enter, 1, str(tmp_path), "one", None, ids)
    tensors = renamed(tensors_of(tmp_path), spelling)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    ((found,),) = run_distributed(enter, 1, str(tmp_path), "one", None, ids)
    assert torch.equal(found, expected)


def test_a_tensor_under_two_names_is_refused(tmp_path):
    saved(tmp_path, "gpt2")
    tensors = tensors_of(tmp_path)
    save_file(tensors | {"wpe.weight": torch.zeros(LENGTH, 28)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has transformer.wpe.weight twice: as"):
        WeightFiles(tmp_path, minizero.load_hf(tmp_path).own_name)


SPELLINGS = [
    ("gpt2", {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}, {}),
    ("gpt2", {"max_position_embeddings": "n_positions"}, {"torch_dtype": "torch.float16", "dtype": None}),
    ("llama", {}, {"rope_parameters": None, "rope_theta": 777.0, "rope_scaling": None}),
    ("llama", {}, {"rope_parameters": None, "rope_scaling": {"type": "default", "rope_theta": 777}}),
    ("llama3.1", {}, {"rope_parameters": None, "rope_theta": 777.0, "rope_scaling": LLAMA3}),
    ("llama3.1", {}, {"rope_scaling": LLAMA3, "original_max_position_embeddings": 10}),
    ("qwen3", {}, {"sliding_window": 4096, "use_sliding_window": False, "layer_types": None}),
]


@pytest.mark.parametrize(("kind", "moved", "changes"), SPELLINGS)
def test_every_spelling_of_the_settings_is_read(tmp_path, kind, moved, changes):
    saved(tmp_path, kind)
    expected = minizero.load_hf(tmp_path).settings
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config | {new: config.pop(old) for new, old in moved.items()}))
    model = minizero.load_hf(tmp_path)
    assert model.settings == expected and all(parameter.is_meta for parameter in model.parameters())
    assert model.max_sequence_length == LENGTH and isinstance(model, GPT2 if kind == "gpt2" else Llama)


REFUSALS = [
    ("llama", {"model_type": "mistral"}, "model_type is 'mistral'; legal here: gpt2, llama, qwen3"),
    ("llama", {"model_type": None}, "model_type is None; legal here: gpt2, llama, qwen3"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; legal here: 'silu' or 'swish'"),
    ("llama", {"attention_bias": True}, "attention_bias is True; legal here: False"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True; legal here: False"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout is 0.1; legal here: 0.0 or None"),
    ("llama", {"sliding_window": 4096}, "sliding_window is 4096; legal here: None"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; legal here: 1.0 or None"),
    ("llama", {"hidden_size": 26, "head_dim": None}, "hidden_size 26 is not a multiple of num_heads 4"),
    ("llama", {"hidden_size": None}, "hidden_size is missing; legal here: a value"),
    ("llama", {"hidden_size": "24"}, r"hidden_size \(hidden_size: found '24'; legal: an integer >= 1\)"),
    ("llama", {"rms_norm_eps": -1.0}, r"rms_norm_eps \(norm_eps: found -1.0; legal: a finite number > 0\)"),
    ("llama", {"vocab_size": 0}, "vocab_size is 0; legal here: a whole number from 1"),
    ("llama", {"head_dim": 7}, "head_dim .*= 7 is odd"),
    ("llama", {"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'; legal here: float32, bfloat16, float16, float64"),
    ("llama", {"quantization_config": {"bits": 4}}, r"quantization_config is \{'bits': 4\}; legal here: none"),
    ("llama", {"rope_theta": 5.0}, "rope_theta = 5.0 and rope_parameters.rope_theta = 777.0 contradict"),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling.rope_type is 'linear'; legal here: 'default' or 'llama3'",
    ),
    *(
        ("llama", {"rope_parameters": {"rope_type": kind, "factor": 2.0}}, f"rope_type is '{kind}'; legal here: 'd")
        for kind in ("dynamic", "yarn", "longrope")
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5.0}},
        "rope_parameters.factor or rope_scaling.factor is missing",
    ),
    ("llama3.1", {"rope_scaling": LLAMA3 | {"factor": 2.0}}, "factor = 8.0 and rope_scaling.factor = 2.0 contradict"),
    ("llama3.1", {"rope_scaling": {"type": "default"}}, "rope_type = 'llama3' and rope_scaling.rope_type = 'default'"),
    ("llama3.1", {"original_max_position_embeddings": 11}, r"= 11 and rope_parameters.original\w* = 10 contradict"),
    (
        "llama3.1",
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}},
        "rope_scaling: low_freq_factor 2.0 is not below 1.0, the high",
    ),
    (
        "llama3.1",
        {"rope_parameters": LLAMA3 | {"factor": "8"}},
        "rope_scaling.factor: found '8'; legal: a finite number >= 1",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor is 0.5; legal here: 1.0",
    ),
    (
        "qwen3",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters is .*; legal here: one table for all layers",
    ),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True; legal here: False or None"),
    (
        "qwen3",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "layer_types is .*; legal here: 'full_attention' for all layers",
    ),
    ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'; legal here: 'gelu_new' or"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; legal here: False"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False; legal here: True"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True; legal here: False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True; legal here: False"),
    ("gpt2", {"embd_pdrop": 0.3}, "embd_pdrop is 0.3; legal here: 0.1, as resid_pdrop, or load_hf"),
    ("gpt2", {"attn_pdrop": 1.5}, r"attn_pdrop \(attention_dropout: found 1.5; legal: a finite number >= 0 and < 1\)"),
    ("gpt2", {"hidden_size": 32}, "n_embd = 28 and hidden_size = 32 contradict"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSALS)
def test_what_our_models_do_not_have_is_refused(tmp_path, kind, changes, message):
    saved(tmp_path, kind)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        minizero.load_hf(tmp_path)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        minizero.load_hf(tmp_path)
    saved(tmp_path, "llama")
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"neither a .safetensors file nor a folder with model.safetensors"):
        minizero.load_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is pickled.* save_pretrained"):
        minizero.load_hf(tmp_path)
    for text, message in (("{", "Expecting"), ("[]", "no table of keys and values")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json: {message}"):
            minizero.load_hf(tmp_path)


def test_settings_given_replace_those_of_the_file(tmp_path):
    saved(tmp_path, "gpt2", embd_pdrop=0.3)
    model = minizero.load_hf(tmp_path, dropout=0.0, attention_dropout=0.0)
    assert model.settings.dropout == 0.0 and model.settings.attention == "fused"
    with pytest.raises(ValueError, match="attention_dropout: found 2; legal: a finite number >= 0 and < 1"):
        minizero.load_hf(tmp_path, dropout=0.0, attention_dropout=2)
    with pytest.raises(ValueError, match="drop_out: no such setting; did you mean dropout"):
        minizero.load_hf(tmp_path, dropout=0.0, drop_out=0.0)


# ---- what is held, and when ----


def counted(folder: str, layout: str) -> dict[str, Any]:
    """Of filling a model: elements read at once, elements of this rank's parts, tensors read that were alive."""
    model = minizero.load_hf(folder)
    plain, alive, most = WeightFiles.read, [], [0]
    largest: dict[str, int] = {}

    def recorded(self: WeightFiles, name: str, box: Any) -> Tensor:
        most[0] = max(most[0], sum(one() is not None for one in alive) + 1)
        values = plain(self, name, box)
        alive.append(weakref.ref(values))
        largest[name] = max(largest.get(name, 0), values.numel())
        return values

    def drawn(self: nn.Module) -> None:
        raise AssertionError(f"{type(self).__name__} was given values that nobody keeps")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightFiles, "read", recorded)
        for kind in (Linear, Embedding):
            patch.setattr(kind, "reset_parameters", drawn)
        config = minizero.Config(train={"micro_batch_size": 2}, **LAYOUTS[layout][1])
        engine = minizero.initialize(model=model, config=config)[0]
    groups = [(name, group, index) for group in engine.runtime.groups for index, name in enumerate(group.names)]
    kept = {name: sum(stop - first for first, stop in group.needed(index)) for name, group, index in groups}
    return {"largest": largest, "kept": kept, "alive": most[0]}


@pytest.mark.parametrize("layout", OF_ALL)
def test_no_rank_holds_more_than_its_part_and_one_tensor(tmp_path, layout):
    model = saved(tmp_path, "qwen3")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for report in run_distributed(counted, LAYOUTS[layout][0], str(tmp_path), layout):
        assert report["alive"] == 1
        assert {name for name, kept in report["kept"].items() if kept} == report["largest"].keys()
        assert all(report["largest"][name] <= kept for name, kept in report["kept"].items() if kept)
        assert layout == "one" or sum(report["kept"].values()) < 0.8 * sum(sizes.values())


def save_sharded(folder: str, checkpoint: str, precision: str) -> None:
    config = minizero.Config(train={"micro_batch_size": 2}, zero={"stage": 3}, precision=precision)
    minizero.initialize(model=minizero.load_hf(folder), config=config)[0].save_checkpoint(checkpoint)


def test_an_export_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    model = saved(tmp_path / "in", "llama")
    run_distributed(save_sharded, 2, str(tmp_path / "in"), str(tmp_path / "run"), "fp32")
    plain, made = Reader.fill, []

    def recorded(self: Reader, target: Tensor, *more: Any) -> None:
        assert not any(one() is not None for one in made)
        made.append(weakref.ref(target))
        plain(self, target, *more)

    monkeypatch.setattr(Reader, "fill", recorded)
    export_hf(tmp_path / "run", tmp_path / "out")
    assert len(made) == len(list(model.parameters()))
    assert (tmp_path / "out" / "model.safetensors").is_file() and same(
        tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in")
    )


def fill_once(folder: str) -> bool:
    """Whether a second engine finds the weights that the first one left."""
    engine = start(folder, "one")
    with torch.no_grad():
        engine.module.lm_head.weight.fill_(7.0)
    model = engine.module
    engine.destroy()
    engine = minizero.initialize(model=model, config=minizero.Config(train={"micro_batch_size": 2}))[0]
    return bool((engine.module.lm_head.weight == 7.0).all())


def test_a_model_is_filled_once(tmp_path):
    saved(tmp_path, "llama")
    assert run_distributed(fill_once, 1, str(tmp_path)) == [True]


def inside_another(folder: str) -> str:
    with pytest.raises(ValueError) as caught:
        model = nn.Sequential(minizero.load_hf(folder))
        minizero.initialize(model=model, config=minizero.Config(train={"micro_batch_size": 2}))
    return str(caught.value)


def test_a_model_inside_another_is_refused(tmp_path):
    saved(tmp_path, "llama")
    (text,) = run_distributed(inside_another, 1, str(tmp_path))
    assert re.search(r"0 came from load_hf, and cannot be filled inside another module; legal: by itself", text)


# ---- dtypes ----


@pytest.mark.parametrize(("precision", "dtype"), (("fp32", "bf16"), ("fp32", "fp16"), ("bf16", None), ("bf16", "fp32")))
def test_weights_are_masters_cast_once(tmp_path, precision, dtype):
    saved(tmp_path / "in", "llama")
    run_distributed(save_sharded, 2, str(tmp_path / "in"), str(tmp_path / "run"), precision)
    (line, *_) = export_hf(tmp_path / "run", tmp_path / "out", dtype=dtype)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype or precision]
    expected = {name: value.to(wanted) for name, value in tensors_of(tmp_path / "in").items()}
    assert same(tensors_of(tmp_path / "out"), expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == wanted and str(wanted).removeprefix("torch.") in line


# ---- models of transformers, and others ----


def save_foreign(kind: str, checkpoint: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) if kind == "other" else theirs(kind)
    config = minizero.Config(train={"micro_batch_size": 2}, zero={"stage": 3})
    minizero.initialize(model=model, config=config)[0].save_checkpoint(checkpoint)


@pytest.mark.parametrize("kind", ("gpt2", "llama", "qwen3"))
def test_a_model_of_transformers_goes_out_as_it_is(tmp_path, kind):
    run_distributed(save_foreign, 2, kind, str(tmp_path / "run"))
    export_hf(tmp_path / "run", tmp_path / "out")
    theirs(kind).save_pretrained(tmp_path / "in")
    assert same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in"))
    found, wanted = (transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("out", "in"))
    for config in (found, wanted):
        config.pop("_name_or_path")
        config.pop("transformers_version")
    assert found == wanted


def test_of_another_model_the_weights_go_out_alone(tmp_path):
    run_distributed(save_foreign, 1, "other", str(tmp_path / "run"))
    lines = export_hf(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    names = {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    tensors = tensors_of(tmp_path / "out")
    assert tensors.keys() == names and tensors["1.num_batches_tracked"].dtype == torch.int64
    assert any("no config.json" in line for line in lines) and any("no tokenizer" in line for line in lines)


# ---- runs, tokenizers, the command ----


def write_corpus(folder: Path) -> None:
    """Some files of text, in a folder of their own."""
    (folder / "corpus").mkdir()
    for number in range(12):
        (folder / "corpus" / f"file{number}.py").write_text(TEXTS[0][number * 500 : (number + 1) * 500])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a run of `minizero.train`."""
    folder = tmp_path_factory.mktemp("run")
    write_corpus(folder)
    (folder / "tiny.toml").write_text(TINY)
    arguments = ["tiny.toml", "--data.source", "corpus", "--data.dir", "data", "--run.dir", "run"]
    ((code, _, errors),) = run_distributed(call_main, 1, str(folder), arguments)
    assert code == 0, errors
    return folder


def test_a_run_goes_out_with_its_tokenizer(tmp_path, place, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", str(place / "run"), str(out), "--format", "hf", "--max-shard-size", "20kb"]) == 0
    assert "float32, in 5 files" in (text := capsys.readouterr().out) and str(place / "run/tokenizer.json") in text
    (file,) = (place / "data").glob("*/tokenizer.json")
    ours, theirs = Tokenizer.load(file), transformers.AutoTokenizer.from_pretrained(out)
    sample = f"{TEXTS[0][:200]} ünïcode\t\n  x"
    assert theirs.encode(sample) == ours.encode(sample) and theirs.decode(theirs.encode(sample)) == sample
    assert theirs.convert_tokens_to_ids(SEPARATOR) == theirs.eos_token_id == theirs.bos_token_id == ours.separator_id
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.model_max_length == model.config.max_position_embeddings == 15
    assert len(theirs) == ours.vocab_size == model.config.vocab_size
    assert model.generation_config.eos_token_id == model.config.eos_token_id == ours.separator_id
    again = tmp_path / "again"
    assert cli.main(["checkpoint", "export", str(place / "run" / "checkpoints"), str(again), "--dtype", "bf16"]) == 0
    assert same(tensors_of(again), {name: value.bfloat16() for name, value in tensors_of(out).items()})


def test_the_tokenizer_of_a_models_folder_goes_with_it(tmp_path, place):
    saved(tmp_path / "in", "llama")
    made = transformers.PreTrainedTokenizerFast(tokenizer_file=str(place / "run/tokenizer.json"), eos_token=SEPARATOR)
    made.save_pretrained(tmp_path / "in")
    run_distributed(save_sharded, 1, str(tmp_path / "in"), str(tmp_path / "run"), "fp32")
    lines = export_hf(tmp_path / "run", tmp_path / "out")
    assert lines[-1] == f"tokenizer: {tmp_path / 'in'}"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2) and "_name_or_path" not in config


def refusals(place: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """What is asked -> (arguments, what is said)."""
    run, out = str(place / "run"), str(tmp_path / "out")
    damaged, full = tmp_path / "damaged", tmp_path / "full"
    checkpoint = next(iter(sorted((place / "run" / "checkpoints").glob("global_step*"))))
    shutil.copytree(checkpoint, damaged)
    with open(damaged / "rank00000.safetensors", "r+b") as file:
        file.seek(-5, 2)
        file.write(b"\xff\xfe")
    full.mkdir()
    (full / "file").touch()
    saved(tmp_path / "small", "llama", vocab_size=100)
    run_distributed(save_sharded, 1, str(tmp_path / "small"), str(tmp_path / "small-run"), "fp32")
    tokenizer = ["--tokenizer", str(place / "run" / "tokenizer.json")]
    return {
        "damage": ([str(damaged), out], r"rank00000.safetensors is damaged: xxh3_128 is"),
        "no checkpoint": ([str(tmp_path), out], r"is not a checkpoint: it has no manifest.json"),
        "a full folder": ([run, str(full)], r"full exists; legal: a folder that does not, or an empty one"),
        "a size": (
            [run, out, "--max-shard-size", "5 apples"],
            r"max_shard_size is '5 apples'; legal: .*KB, MB, GB, TB",
        ),
        "no size": ([run, out, "--max-shard-size", "0GB"], r"max_shard_size is '0GB'; legal"),
        "tokens": ([str(tmp_path / "small-run"), out, *tokenizer], r"has 300 tokens, the model 100"),
        "a tokenizer": ([run, out, "--tokenizer", str(tmp_path / "config.json")], r"config.json is not a tokenizer"),
    }


def test_an_export_is_whole_or_not_there(tmp_path, place):
    for arguments, message in refusals(place, tmp_path).values():
        with pytest.raises(SystemExit, match=rf"minizero export: .*{message}"):
            cli.main(["export", *arguments])
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="dtype is 'int8'; legal: fp32, bf16, fp16"):
        export_hf(place / "run", tmp_path / "out", dtype="int8")
