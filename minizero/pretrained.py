"""A run that starts from HuggingFace's folder (`model.pretrained`): model and tokenizer, and what must agree with them.

A run that continues finds architecture and weights in its checkpoint and the tokenizer beside it: the folder may be
gone by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from minizero.checkpoint.export import TOKENIZER
from minizero.checkpoint.files import MANIFEST, CheckpointError
from minizero.checkpoint.hf import from_config, load_hf
from minizero.checkpoint.inspect import resolve
from minizero.checkpoint.load import older_whole
from minizero.checkpoint.manifest import read_manifest
from minizero.config.load import Resolved
from minizero.config.problems import found
from minizero.data.tokenizer import Tokenizer
from minizero.models.gpt2 import GPT2
from minizero.models.llama import Llama

REPLACEABLE = ("dropout", "attention_dropout", "attention")
"""Settings of `model` that are not of the architecture: where given, they take the place of the folder's."""


@dataclass(frozen=True)
class Start:
    """What a run begins, or goes on, with.

    Attributes:
        model: on the meta device; `minizero.initialize` fills it, or leaves that to a checkpoint.
        tokenizer: None: one is trained on the corpus.
        folder: where the tokenizer's files are.
    """

    model: Llama | GPT2
    tokenizer: Tokenizer | None
    folder: Path


def start_from(folder: str, resolved: Resolved, checkpoints: Path | None) -> Start:
    """The model and tokenizer of `folder`; of the newest readable one of `checkpoints`, where the run continues.

    Raises ValueError for settings that contradict them, naming each, and for what `load_hf` refuses; CheckpointError
    for a folder, or a checkpoint, that is damaged.
    """
    changes = {key: getattr(resolved.config.model, key) for key in REPLACEABLE if is_given(resolved, f"model.{key}")}
    if checkpoints is None:
        source, model = Path(folder), load_hf(folder, **changes)
    else:
        source, model = checkpoints.parent, saved_model(checkpoints, changes)
    if lines := list(contradictions(resolved, model, source)):
        raise ValueError(f"model.pretrained: {'; '.join(lines)}")
    return Start(model, tokenizer_of(source, resolved, model, is_resumed=checkpoints is not None), source)


def is_given(resolved: Resolved, key: str) -> bool:
    """Whether a file or the command line says something of a setting."""
    return resolved.origins[key] != "default"


def saved_model(checkpoints: Path, changes: dict[str, object]) -> Llama | GPT2:
    """The model of the newest checkpoint whose manifest can be read: whether it may be used, loading it will say."""
    path = resolve(checkpoints)
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        if (other := older_whole(path)) is None:
            raise
        path, manifest = other, read_manifest(other)
    return from_config(manifest.model, path / MANIFEST, changes)


def contradictions(resolved: Resolved, model: Llama | GPT2, source: Path) -> Iterator[str]:
    """A line for each setting that was given and is not what the model of `source` has."""
    config = resolved.config
    theirs = model.spelled_out(model.settings)
    for key in resolved.origins:
        section, _, name = key.partition(".")
        top = name.partition(".")[0]
        if section != "model" or top == "pretrained" or not is_given(resolved, key):
            continue
        ours = model.spelled_out(model.settings.model_copy(update={top: getattr(config.model, top)}))
        if attrgetter(name)(ours) != attrgetter(name)(theirs):
            given, legal = (found(attrgetter(name)(settings)) for settings in (config.model, theirs))
            yield f"{key} is {given} ({resolved.origins[key]}), {source} has {legal}"
    if config.train.sequence_length > model.max_sequence_length:
        length, origin = config.train.sequence_length, resolved.origins["train.sequence_length"]
        yield f"train.sequence_length is {length} ({origin}), {source} has {model.max_sequence_length} positions"


def tokenizer_of(folder: Path, resolved: Resolved, model: Llama | GPT2, is_resumed: bool) -> Tokenizer | None:
    """That of `folder`; None where it has none, and `data.vocab_size` asks for one that is trained on the corpus.

    Raises ValueError when neither is there, they contradict each other, or the model has too few rows for the tokens.
    """
    file, size = folder / TOKENIZER, resolved.config.data.vocab_size
    origin, rows = resolved.origins["data.vocab_size"], model.vocab_size
    if not file.is_file():
        if not is_given(resolved, "data.vocab_size"):
            raise ValueError(
                f"model.pretrained: {folder} has no {TOKENIZER}, and to its weights other tokens mean nothing; legal: "
                "the file that AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes, or "
                "data.vocab_size, for a tokenizer that is trained on the corpus"
            )
        if size > rows:
            raise ValueError(f"data.vocab_size is {size} ({origin}), but the model of {folder} has {rows} tokens")
        return None
    tokenizer = Tokenizer.load(file, model.origin.get("eos_token_id"))
    if is_given(resolved, "data.vocab_size") and not is_resumed and size not in (tokenizer.vocab_size, rows):
        raise ValueError(f"data.vocab_size is {size} ({origin}), but {file} has {tokenizer.vocab_size} tokens")
    if tokenizer.vocab_size > rows:
        raise ValueError(f"{file} has {tokenizer.vocab_size} tokens, the model beside it {rows}")
    return tokenizer
