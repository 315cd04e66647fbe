"""`minizero.train` from HuggingFace's folder: transformers' losses in every layout, and out again; resumed, refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from harness import run_distributed
from test_hf import LAYOUTS, LENGTH, OF_ALL, TEXTS, same, saved, tensors_of, write_corpus
from test_train import ENVIRONMENT, call_main, losses

import minizero
from minizero.checkpoint import CheckpointError
from minizero.checkpoint.export import export_hf
from minizero.checkpoint.weights import WeightFiles
from minizero.config.load import load
from minizero.data.loader import TokenLoader
from minizero.data.prepared import PreparedData
from minizero.data.tokenizer import SEPARATOR, Tokenizer
from minizero.pretrained import saved_model, start_from

TINY = """
[data]
validation_fraction = 0.3
[train]
steps = 4
sequence_length = 15
global_batch_size = 4
micro_batch_size = 1
[scheduler]
type = "WarmupLR"
params = { warmup_num_steps = 3, warmup_type = "linear" }
[checkpoint]
every = 1
keep = 9
"""
ROWS, TOKENS = 301, 290


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a corpus, a config, and folders of models with a tokenizer that is not like ours."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_corpus(folder)
    (folder / "tiny.toml").write_text(TINY)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    for kind, more in {"llama": {"tied": False}, "gpt2": none, "llama3.1": {}}.items():
        saved(folder / kind, kind, **more, bos_token_id=0, eos_token_id=1)
        foreign().save_pretrained(folder / kind)
    return folder


def foreign() -> Any:
    """A tokenizer that puts a token before each text, and cuts what is long."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder, alphabet = tokenizers.decoders.ByteLevel(), tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    made.enable_truncation(5)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def arguments(place: Path, kind: str, run: str, *more: str) -> list[str]:
    given = ["--model.pretrained", kind, "--data.source", "corpus", "--data.dir", "data", "--run.dir", run]
    return [str(place / "tiny.toml"), *given, *more]


def options(layout: str) -> list[str]:
    tree = LAYOUTS[layout][1]
    return [
        word for section in tree for key, value in tree[section].items() for word in (f"--{section}.{key}", str(value))
    ]


def train(place: Path, kind: str, run: str, layout: str, *more: str) -> list[float]:
    world = LAYOUTS[layout][0]
    for code, _, errors in run_distributed(
        call_main, world, str(place), arguments(place, kind, run, *options(layout), *more)
    ):
        assert code == 0, errors
    return losses(place / run)


def loss_of_transformers(place: Path, folder: Path, step: int) -> float:
    """Of the batch of a step (from 0) of the runs here."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    (prepared,) = {path.parent for path in (place / "data").glob("*/train.json")}
    data = PreparedData.open(prepared, Tokenizer.load(place / "llama" / "tokenizer.json", 1))
    sizes = {"sequence_length": 15, "global_batch_size": 4, "micro_batch_size": 4}
    (batch,) = TokenLoader(data.train, **sizes, seed=0).step(step)
    tokens = torch.cat([batch["input_ids"], batch["labels"][:, -1:]], dim=1)
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


CASES = [*(("llama", layout) for layout in OF_ALL), ("gpt2", "one"), ("gpt2", "tp2"), ("llama3.1", "cp2")]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_a_run_has_transformers_losses_and_starts_with_the_bits_of_the_folder(tmp_path, place, kind, layout):
    run = f"{kind}-{layout}"
    found = train(place, kind, run, layout)
    assert found[0] == pytest.approx(loss_of_transformers(place, place / kind, 0), rel=1e-6)
    for step in (1, 3):  # the warmup's first rates are 0
        export_hf(place / run / "checkpoints" / f"global_step{step}", tmp_path / str(step))
        assert same(tensors_of(tmp_path / str(step)), tensors_of(place / kind)) == (step == 1)
    assert found[3] == pytest.approx(loss_of_transformers(place, tmp_path / "3", 3), rel=1e-6)
    assert found[3] != pytest.approx(loss_of_transformers(place, tmp_path / "1", 3), rel=1e-4)


@pytest.mark.soak  # a minute; that the verb hands on what it is given, and starts a run, test_train sees
def test_the_command_does_it_too(place):
    command = [sys.executable, "-m", "minizero", "train", *arguments(place, "llama", "verb"), "--zero.stage", "3"]
    done = subprocess.run(
        [*command, "--precision", "fp32", "--nproc", "2"],
        capture_output=True, text=True, timeout=120, cwd=place, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(place / "verb")[0] == pytest.approx(loss_of_transformers(place, place / "llama", 0), rel=1e-6)


# ---- what is held ----


def recorded_main(folder: str, given: list[str]) -> dict[str, int]:
    """The most elements that this rank has read of each tensor at once."""
    plain, largest = WeightFiles.read, {}

    def read(self: WeightFiles, name: str, box: Any) -> torch.Tensor:
        values = plain(self, name, box)
        largest[name] = max(largest.get(name, 0), values.numel())
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightFiles, "read", read)
        code, _, errors = call_main(folder, given)
    assert code == 0, errors
    return largest


def test_each_rank_reads_its_part_alone(place):
    sizes = {name: value.numel() for name, value in tensors_of(place / "llama").items()}
    given = arguments(place, "llama", "parts", "--zero.stage", "3", "--train.steps", "1")
    for largest in run_distributed(recorded_main, 2, str(place), given):
        assert sum(largest.values()) < 0.6 * sum(sizes.values())


# ---- continued ----


def test_a_run_goes_on_without_the_folder(tmp_path, place):
    shutil.copytree(place / "llama", place / "gone")
    (place / "gone" / "chat_template.jinja").write_text("{{ messages }}")
    straight = train(place, "gone", "straight", "zero3", "--train.steps", "5")
    train(place, "gone", "begun", "zero3")
    shutil.rmtree(place / "gone")
    resumed = train(place, "gone", "begun", "tp2", "--train.steps", "5", "--checkpoint.resume", "latest")
    assert resumed == pytest.approx(straight, rel=1e-6)
    (last,) = train(place, "gone", "elsewhere", "one", "--train.steps", "6", "--checkpoint.resume", "begun")
    for run in ("begun", "elsewhere"):
        export_hf(place / run, tmp_path / run)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / run / name).read_bytes() == (place / "llama" / name).read_bytes()
        assert (tmp_path / run / "chat_template.jinja").read_text() == "{{ messages }}"
    assert last == pytest.approx(loss_of_transformers(place, tmp_path / "begun", 5), rel=1e-6)
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "begun")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "begun")
    assert (made.eos_token_id, config.eos_token_id, config.max_position_embeddings) == (1, 1, LENGTH)

    checkpoints = place / "begun" / "checkpoints"
    (checkpoints / "global_step5" / "manifest.json").write_text("{")
    assert saved_model(checkpoints, {}).hf_config() == minizero.load_hf(place / "llama").hf_config() | {
        "_name_or_path": str(place / "gone")
    }


# ---- what must agree ----

AGREE = (
    ("llama", "--model.family llama --model.num_heads 4 --model.num_kv_heads 2 --model.rope_theta 777"),
    ("llama", "--model.head_dim 6 --data.vocab_size 290 --model.tie_embeddings false --train.sequence_length 48"),
    ("llama", "--model.attention eager --data.vocab_size 301"),
    ("gpt2", "--model.family gpt2 --model.num_kv_heads 4 --model.head_dim 7 --model.dropout 0.2"),
    ("llama3.1", "--model.rope_scaling.type llama3 --model.rope_scaling.factor 8"),
)


@pytest.mark.parametrize(("kind", "given"), AGREE)
def test_settings_that_repeat_the_folder_or_are_not_the_architectures_are_taken(place, kind, given):
    start = start_from(str(place / kind), load(place / "tiny.toml", given.split()), None)
    assert start.tokenizer is not None and start.model.pretrained == place / kind
    assert start.model.settings.dropout == (0.2 if "dropout" in given else 0.0)
    assert start.model.settings.attention == ("eager" if "eager" in given else "fused")


REFUSALS = {
    "size": (
        "--model.hidden_size 256",
        r"^model.pretrained: model.hidden_size is 256 \(command line\), .*llama has 24$",
    ),
    "all at once": (
        "--model.num_kv_heads none --model.qk_norm true",
        r"model.num_kv_heads is none \(command line\), \S*llama has 2; model.qk_norm is true .* has false$",
    ),
    "family": ("--model.family gpt2", r"model.family is 'gpt2' \(command line\), \S*llama has 'llama'$"),
    "tied": ("--model.tie_embeddings true", r"model.tie_embeddings is true .*has false"),
    "scaling": ("--model.rope_scaling.type llama3", r"model.rope_scaling.type is 'llama3' .* has 'none'"),
    "length": ("--train.sequence_length 49", r"train.sequence_length is 49 \(command line\), .* has 48 positions"),
    "dropout": ("--model.dropout 0.1", r"llama/config.json: model.dropout = 0.1 has no effect on a llama; legal: 0"),
    "tokens": (
        "--data.vocab_size 299",
        r"data.vocab_size is 299 \(command line\), but \S*tokenizer.json has 290 tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_settings_that_contradict_the_folder_are_named(place, name):
    given, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        start_from(str(place / "llama"), load(place / "tiny.toml", given.split()), None)


def test_the_default_length_is_refused_where_positions_end_before_it(place):
    with pytest.raises(ValueError, match=r"train.sequence_length is 256 \(default\), .* has 48 positions"):
        start_from(str(place / "llama"), load(), None)


def spoil(folder: Path, kind: str) -> None:
    path = folder / "config.json"
    if kind == "config":
        path.unlink()
    elif kind == "rows":
        saved(folder, "llama", vocab_size=280)
    elif kind == "separator":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 299}))
    elif kind == "tokenizer":
        (folder / "tokenizer.json").write_text("{")
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "cut":
        file = sorted(folder.glob("*.safetensors"))[1]
        os.truncate(file, file.stat().st_size - 3)


DAMAGE = {
    "config": r"config.json is missing: \S* is no folder of HuggingFace's",
    "rows": r"tokenizer.json has 290 tokens, the model beside it 280",
    "separator": r"tokenizer.json is not a tokenizer: .* no <\|endoftext\|> token, nor one with the id 299",
    "tokenizer": r"tokenizer.json is not a tokenizer",
    "no tokenizer": r"has no tokenizer.json, and to its weights other tokens mean nothing; legal: .* data.vocab_size",
    "cut": r"model-00002\S* cannot be read as safetensors",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_folder_that_is_damaged_is_named(tmp_path, place, kind):
    shutil.copytree(place / "llama", tmp_path / "in")
    spoil(tmp_path / "in", kind)
    with pytest.raises((ValueError, CheckpointError), match=DAMAGE[kind]):
        start_from(str(tmp_path / "in"), load(place / "tiny.toml"), None)


@pytest.mark.parametrize("kind", ("config", "cut"))
def test_every_rank_says_it_and_no_run_is_left(tmp_path, place, kind):
    shutil.copytree(place / "llama", tmp_path / "in")
    spoil(tmp_path / "in", kind)
    for code, _, errors in run_distributed(call_main, 2, str(place), arguments(place, str(tmp_path / "in"), "bad")):
        assert code == 1 and errors.count("minizero: ") == 1 and re.search(DAMAGE[kind], errors)
    assert not (place / "bad").exists()


# ---- tokenizers ----


def test_a_models_tokenizer_adds_nothing_and_cuts_nothing(place):
    made = Tokenizer.load(place / "llama" / "tokenizer.json", [1, 0])
    text = "value_3 = 37 + module_3 </s>"
    assert made.decode(made.encode(text)) == text and made.encode_batch([text]) == [made.encode(text)]
    assert len(made.encode(text)) > 5 and not {0, 1} & set(made.encode(text))
    assert (made.separator_id, made.vocab_size, made.is_ours) == (1, TOKENS, False)
    assert made.digest != Tokenizer.load(place / "llama" / "tokenizer.json", 0).digest


def test_a_folder_without_a_tokenizer_gets_one_of_its_own(tmp_path, place):
    saved(tmp_path / "in", "llama", vocab_size=5000)
    with pytest.raises(ValueError, match=r"data.vocab_size is 5001 \(command line\), but the model of \S* has 5000"):
        start_from(str(tmp_path / "in"), load(place / "tiny.toml", ["--data.vocab_size", "5001"]), None)
    more = ("--data.vocab_size", "4999", "--data.dir", str(tmp_path / "data"))  # more than the corpus fills
    assert len(train(place, str(tmp_path / "in"), "own", "one", *more)) == 4
    again = train(
        place, str(tmp_path / "in"), "own", "one", *more, "--train.steps", "5", "--checkpoint.resume", "latest"
    )
    assert len(again) == 5
    export_hf(place / "own", tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == SEPARATOR


def test_a_tokenizer_alone_goes_out_as_it_is(tmp_path, place):
    shutil.copytree(place / "llama", tmp_path / "in")
    (tmp_path / "in" / "tokenizer_config.json").unlink()
    train(place, str(tmp_path / "in"), "alone", "one", "--train.steps", "1")
    export_hf(place / "alone", tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in names and "tokenizer_config.json" not in names
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 1
