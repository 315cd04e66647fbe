"""From a corpus to a folder of tokens, once: `{data.dir}/{key}/` with tokenizer.json and the shards of both splits.

The key is a hash of the corpus's manifest, the settings and a tokenizer that was there before, so a changed corpus or
vocabulary gets a folder of its own.
The folder is written under a temporary name and renamed when complete: an interruption leaves nothing that could be
mistaken for it, and of several processes that prepare at once one wins and all read the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from minizero.config.schema import DataConfig
from minizero.data.corpus import Corpus, held_out, open_corpus
from minizero.data.shards import FORMAT, TokenStream, write_split
from minizero.data.tokenizer import Tokenizer

DOCUMENTS_AT_ONCE = 256
"""Documents that are tokenized together, on all cores."""


@dataclass(frozen=True)
class PreparedData:
    """A tokenizer and the two splits of its corpus, open for reading."""

    folder: Path
    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream

    @classmethod
    def open(cls, folder: Path, tokenizer: Tokenizer | None = None) -> PreparedData:
        """`tokenizer` is the folder's, if it is known. Raises ValueError naming the file that is missing or broken."""
        tokenizer = tokenizer or Tokenizer.load(folder / "tokenizer.json")
        return cls(folder, tokenizer, TokenStream(folder, "train"), TokenStream(folder, "validation"))

    def verify(self) -> None:
        """Read everything and compare checksums. Raises ValueError naming a damaged file."""
        self.train.verify()
        self.validation.verify()

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens: equal where a training run would read the same data."""
        return hashlib.sha256(f"{self.train.fingerprint}{self.validation.fingerprint}".encode()).hexdigest()

    def held_out_text(self) -> bytes:
        """The held-out documents, one after the other, as they were in the corpus: what other compressors are given."""
        stream = self.validation
        texts = (
            self.tokenizer.decode(stream.read(d.offset, d.offset + d.num_tokens).tolist()) for d in stream.documents
        )
        return "".join(texts).encode()


def prepare(config: DataConfig, tokenizer: Tokenizer | None = None, verify: bool = True) -> PreparedData:
    """The configured corpus as tokens: opened if it is there, else made.

    Any process may call it at any time; where several share `data.dir`, let one go first to save the others the work.

    Args:
        config: the `data` section.
        tokenizer: None: one of `data.vocab_size` tokens, trained on the corpus.
        verify: compare checksums (reads everything); one process of several is enough.

    Raises ValueError for a corpus that is missing, too small or not text, and for damaged files, naming them.
    """
    corpus = open_corpus(config.source)
    folder = Path(config.dir) / cache_key(config, corpus, tokenizer)
    if not folder.exists():
        _make(folder, corpus, config, tokenizer)
    data = PreparedData.open(folder, tokenizer)
    if verify:
        data.verify()
    return data


def cache_key(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer | None) -> str:
    """16 hex digits that change with the corpus, the settings, the tokenizer and the format on disk."""
    vocabulary = config.vocab_size if tokenizer is None else tokenizer.digest
    settings = json.dumps([FORMAT, config.source, vocabulary, config.validation_fraction])
    return hashlib.sha256(f"{settings}\n{corpus.manifest()}".encode()).hexdigest()[:16]


def _make(folder: Path, corpus: Corpus, config: DataConfig, tokenizer: Tokenizer | None) -> None:
    """Write the folder under a temporary name, then rename it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        validation = held_out(corpus.names(), config.validation_fraction)
        if tokenizer is None:
            texts = (text for name, text in corpus.documents() if name not in validation)
            tokenizer = Tokenizer.train(texts, config.vocab_size)
        tokenizer.save(temporary / "tokenizer.json")
        for split in ("train", "validation"):
            documents = _tokenized(corpus, tokenizer, validation, split)
            write_split(temporary, split, documents, tokenizer.separator_id, tokenizer.vocab_size)
        temporary.chmod(0o755)  # mkdtemp's folders are for their owner alone
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenized(
    corpus: Corpus, tokenizer: Tokenizer, validation: set[str], split: str
) -> Iterator[tuple[str, int, list[int]]]:
    """(name, UTF-8 bytes, token ids) of the split's documents, in order."""
    wanted = ((name, text) for name, text in corpus.documents() if (name in validation) == (split == "validation"))
    while some := list(islice(wanted, DOCUMENTS_AT_ONCE)):
        for (name, text), ids in zip(some, tokenizer.encode_batch([text for _, text in some]), strict=True):
            yield name, len(text.encode()), ids
