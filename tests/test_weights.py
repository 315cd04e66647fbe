"""Weights from HuggingFace's files: the same values in every layout, read by slices; misfits refused on every rank."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import DistributedError, run_distributed
from safetensors.torch import load_file, save_file
from test_tensor_parallel import BATCH, LENGTH, VOCAB, batches, foreign, make, settings
from torch import nn

import minizero
from minizero.checkpoint import CheckpointError
from minizero.checkpoint.weights import WeightFiles
from minizero.config.schema import ModelConfig
from minizero.dist.sharding import TensorShard
from minizero.models import build

LAYOUTS = [(1, 1, 0), (2, 2, 0), (2, 1, 3), (4, 4, 3), (4, 2, 3), (4, 2, 1)]  # world, tp, stage


def on_meta(name: str) -> nn.Module:
    """`make(name)` without values; transformers' models bare, so that their names are those of their files."""
    with torch.device("meta"):
        if name in ("llama", "gpt2"):
            more: dict[str, Any] = {"num_kv_heads": 2} if name == "llama" else {"family": "gpt2"}
            config = ModelConfig(hidden_size=24, num_layers=2, num_heads=4, intermediate_size=37, **more)
            return build(config, VOCAB, LENGTH)
        return foreign(name)


def save(name: str, folder: Path, shards: bool = False) -> dict[str, torch.Tensor]:
    """Write `name` with values of its own as its library would; returns them."""
    torch.manual_seed(5)
    model: Any = make(name)
    model = getattr(model, "model", model) if name.startswith("hf") else model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    values = {key: value.detach().clone() for key, value in model.named_parameters()}
    if name.startswith("hf"):
        model.save_pretrained(folder, max_shard_size="10KB" if shards else "1GB")
        assert (folder / "model.safetensors.index.json").is_file() == shards
    else:
        save_file(values, folder / "model.safetensors")
    return values


def load(name: str, path: str, tp: int, stage: int, trained: bool, precision: str = "fp32") -> dict[str, Any]:
    """Whole values after loading, masters' values, and what was read: elements per read and parameter."""
    model = on_meta(name)
    config = settings(tp, stage, precision=precision)
    engine, *_ = minizero.initialize(model=model, config=config)
    if trained:  # state of a run before: shards lent, units held
        data = [{k: v.view(engine.dp_size, -1, LENGTH)[engine.dp_rank] for k, v in b.items()} for b in batches(1)]
        loss = engine(**data[0])
        del loss
    largest: Counter[str] = Counter()
    total: Counter[str] = Counter()
    plain = WeightFiles.read

    def recorded(self: WeightFiles, key: str, box: Any) -> torch.Tensor:
        values = plain(self, key, box)
        largest[key] = max(largest[key], values.numel())
        total[key] += values.numel()
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightFiles, "read", recorded)
        engine.load_weights(path)
    parts = {key: parameter.numel() for key, parameter in engine.named_parameters()}
    masters = [
        (group.names[span.index], span.start, view.clone())
        for group in engine.runtime.groups
        for (_, span), view in zip(group.owned_spans(), group.master_views(), strict=True)
    ]
    kept = {
        key: sum(stop - start for start, stop in group.needed(index))
        for group in engine.runtime.groups
        for index, key in enumerate(group.names)
    }
    whole = {key: value.clone() for key, value in engine.runtime.whole_parameters()}
    tensor = engine.runtime.tensor
    cut = {key: None if tensor is None else tensor.shard(p) for key, p in engine.named_parameters()}
    return {
        "whole": whole, "masters": masters, "largest": largest, "total": total, "parts": parts, "kept": kept, "cut": cut
    }  # fmt: skip


@pytest.mark.parametrize(("world", "tp", "stage"), LAYOUTS)
@pytest.mark.parametrize("name", ("hf_llama", "hf_qwen3", "hf_gpt2", "llama", "gpt2"))
def test_every_layout_gets_the_values_of_the_file(tmp_path, name, world, tp, stage):
    if name.startswith("hf"):
        pytest.importorskip("transformers")
    values = save(name, tmp_path, shards=True)
    for report in run_distributed(load, world, name, str(tmp_path), tp, stage, False):
        assert report["whole"].keys() == values.keys()
        assert all(torch.equal(report["whole"][key], values[key]) for key in values)
        for key, start, master in report["masters"]:
            local = values[key] if report["cut"][key] is None else report["cut"][key].cut(values[key])
            assert torch.equal(master, local.flatten()[start : start + master.numel()])


@pytest.mark.parametrize(("world", "tp", "stage"), ((2, 2, 0), (4, 2, 3), (4, 4, 3)))
@pytest.mark.parametrize("name", ("hf_llama", "hf_gpt2", "llama"))
def test_a_rank_reads_its_part_and_never_more(tmp_path, name, world, tp, stage):
    if name.startswith("hf"):
        pytest.importorskip("transformers")
    values = save(name, tmp_path)
    for report in run_distributed(load, world, name, str(tmp_path), tp, stage, False):
        assert sum(report["parts"].values()) < sum(value.numel() for value in values.values())
        for key, part in report["parts"].items():
            assert report["largest"][key] <= part
            assert report["total"][key] == report["kept"][key]
    assert stage == 0 or any(report["kept"][key] < report["parts"][key] for key in values) or world == tp


@pytest.mark.parametrize(
    ("shape", "dim", "ranges"),
    (
        ((7, 3), -1, ()),
        ((9,), 0, ((1, 3), (4, 6), (7, 9))),
        ((9, 2), 0, ((0, 1), (3, 5), (8, 9))),
        ((5, 9), 1, ((0, 2), (3, 5), (8, 9))),
        ((3, 4, 5), 1, ((1, 3),)),
        ((3, 4, 5), 2, ((0, 1), (3, 5))),
    ),
)
def test_any_range_of_a_part_is_read_alone(tmp_path, shape, dim, ranges):
    whole = torch.randn(shape)
    save_file({"w": whole}, tmp_path / "w.safetensors")
    shard = TensorShard(shape, dim, ((), ranges), 1)
    part = shard.cut(whole).flatten()
    files, sizes = WeightFiles(tmp_path / "w.safetensors"), []
    plain = files.read
    files.read = lambda name, box: sizes.append(plain(name, box).numel()) or plain(name, box)
    for start in range(part.numel()):
        for stop in range(start + 1, part.numel() + 1):
            sizes.clear()
            assert torch.equal(files.read_part("w", shard, start, stop), part[start:stop])
            assert sum(sizes) == stop - start


def test_one_file_values_are_cast_and_a_running_forward_does_not_keep_old_ones(tmp_path):
    values = save("llama", tmp_path)
    for report in run_distributed(load, 4, "llama", str(tmp_path / "model.safetensors"), 2, 3, True, "bf16"):
        assert all(torch.equal(report["whole"][key], values[key].bfloat16()) for key in values)
        for key, start, master in report["masters"]:
            local = report["cut"][key].cut(values[key]).flatten()
            assert master.dtype == torch.float32 and torch.equal(master, local[start : start + master.numel()])


def train_on(path: str, tp: int, stage: int) -> list[float]:
    engine, *_ = minizero.initialize(model=on_meta("llama"), config=settings(tp, stage))
    engine.load_weights(path)
    losses = []
    for batch in batches(3):
        size = BATCH // engine.dp_size
        rows = slice(engine.dp_rank * size, (engine.dp_rank + 1) * size)
        losses.append(float(engine.train_batch(iter([{key: value[rows] for key, value in batch.items()}]))))
    return losses


def test_training_goes_on_from_loaded_weights(tmp_path):
    save("llama", tmp_path)
    (expected,) = run_distributed(train_on, 1, str(tmp_path), 1, 0)
    for losses in run_distributed(train_on, 4, str(tmp_path), 2, 3):
        assert losses == pytest.approx(expected, rel=1e-4)


def logits_of(path: str, tp: int, stage: int) -> torch.Tensor:
    engine, *_ = minizero.initialize(model=on_meta("hf_llama"), config=settings(tp, stage))
    engine.load_weights(path)
    with torch.no_grad():
        return engine(input_ids=batches(1)[0]["input_ids"]).logits


def test_a_model_built_on_meta_computes_what_the_saved_one_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    save("hf_llama", tmp_path, shards=True)
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(batches(1)[0]["input_ids"]).logits
    for found in run_distributed(logits_of, 4, str(tmp_path), 2, 3):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# ---- tied names ----


def test_tied_weights_come_by_either_name_but_must_agree(tmp_path):
    values = save("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path)
    for report in run_distributed(load, 2, "llama", str(path), 2, 3, False):
        assert torch.equal(report["whole"]["model.embed_tokens.weight"], values["model.embed_tokens.weight"])
    both = tensors | {"model.embed_tokens.weight": tensors["lm_head.weight"].clone()}
    save_file(both, path)
    run_distributed(load, 2, "llama", str(path), 2, 3, False)
    both["lm_head.weight"][-1, -1] += 1  # on the last rank only
    save_file(both, path)
    with pytest.raises(DistributedError, match=r"different values in .*lm_head.weight.*tied here") as caught:
        run_distributed(load, 2, "llama", str(path), 2, 3, False)
    assert len(caught.value.failures) == 2


# ---- what does not fit ----


def spoil(folder: Path, kind: str) -> None:
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    name = "model.layers.1.self_attn.q_proj.weight"
    file = folder / listed["weight_map"][name]
    tensors = load_file(file)
    if kind == "missing":
        del tensors[name], listed["weight_map"][name]
    elif kind == "unknown":
        tensors["model.layers.9.extra"] = torch.zeros(2)
        listed["weight_map"]["model.layers.9.extra"] = file.name
    elif kind == "shape":
        tensors[name] = torch.zeros(24, 23)
    elif kind == "index":
        del tensors[name]
    save_file(tensors, file)
    index.write_text("{" if kind == "json" else json.dumps(listed))
    if kind == "file":
        file.unlink()
    if kind == "outside":
        listed["weight_map"][name] = "../elsewhere.safetensors"
        index.write_text(json.dumps(listed))
    if kind == "damaged":
        file.write_bytes(b"\xff" * 64)
    if kind == "nothing":
        index.unlink()


def refuse(path: str, only_on: int) -> str:
    """The error of `load_weights`, after which the values must be those of before."""
    engine, *_ = minizero.initialize(model=on_meta("hf_llama"), config=settings(2, 3))
    before = {key: value.clone() for key, value in engine.runtime.whole_parameters()}
    is_wrong = only_on < 0 or engine.global_rank == only_on
    try:
        engine.load_weights(path if is_wrong else f"{path}-good")
    except CheckpointError as error:
        assert all(torch.equal(before[key], value) for key, value in engine.runtime.whole_parameters())
        return str(error)
    raise AssertionError("it was loaded")


MISFITS = {
    "missing": r"x lacks model.layers.1.self_attn.q_proj.weight",
    "unknown": r"x has model.layers.9.extra, which LlamaForCausalLM does not have",
    "shape": r"q_proj.weight of shape \(24, 23\), LlamaForCausalLM's has \(24, 24\)",
    "index": r"safetensors lacks model.layers.1.self_attn.q_proj.weight, which .*index.json has in it",
    "json": r"model.safetensors.index.json is damaged",
    "file": r"model-0.*safetensors cannot be read",
    "outside": r"file name '../elsewhere.safetensors' is not a plain name",
    "damaged": r"model-0.*safetensors cannot be read",
    "nothing": r"x is neither a .safetensors file nor a folder with model.safetensors or model.safetensors.index.json",
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_refused_on_every_rank(tmp_path, kind):
    pytest.importorskip("transformers")
    for folder in ("x", "x-good"):
        save("hf_llama", tmp_path / folder, shards=True)
    spoil(tmp_path / "x", kind)
    for only_on in (-1, 1):
        for text in run_distributed(refuse, 4, str(tmp_path / "x"), only_on):
            assert re.search(MISFITS[kind], text), text


def at_a_bad_moment(path: str, kind: str) -> None:
    engine, *_ = minizero.initialize(model=on_meta("llama"), config=settings(1, 3, accumulation=2))
    if kind == "window":
        (batch,) = batches(1)
        engine.backward(engine(**{key: value[:2] for key, value in batch.items()}))
        engine.load_weights(path)
    with minizero.unsharded(engine.module):
        engine.load_weights(path)


@pytest.mark.parametrize(("kind", "message"), (("window", "accumulation window"), ("whole", "inside unsharded")))
def test_a_bad_moment_is_named(tmp_path, kind, message):
    save("llama", tmp_path)
    with pytest.raises(DistributedError, match=message) as caught:
        run_distributed(at_a_bad_moment, 2, str(tmp_path), kind)
    assert len(caught.value.failures) == 2
