"""Byte-level BPE (Sennrich et al., arXiv 1508.07909; on bytes as in GPT-2), trained on the corpus itself.

Every byte is in the vocabulary, so any text can be written and read back unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

SEPARATOR = "<|endoftext|>"
"""Stands between documents. Inside a text these characters are ordinary ones."""


class Tokenizer:
    """Text to token ids and back: without loss if it is one of ours, and as well as it can if it came with a model.

    Args:
        eos: what stands between documents where there is no SEPARATOR: a token's id, or several, of which the first is
            taken.

    Raises ValueError where neither is there.
    """

    def __init__(self, backend: Backend, eos: int | list[int] | None = None) -> None:
        backend.encode_special_tokens = True  # a document that spells out the separator must not become one
        backend.no_truncation()  # which may be left in the file of a model's tokenizer
        backend.no_padding()
        self.backend = backend
        self.is_ours = backend.token_to_id(SEPARATOR) is not None
        separator_id = backend.token_to_id(SEPARATOR) if self.is_ours else eos[0] if isinstance(eos, list) else eos
        if separator_id is None or backend.id_to_token(separator_id) is None:
            other = "" if eos is None else f", nor one with the id {eos}"
            raise ValueError(f"the tokenizer has no {SEPARATOR} token{other}")
        self.separator_id: int = separator_id

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `texts`, split by GPT-2's regular expression. A small corpus may not fill `vocab_size`."""
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path, eos: int | list[int] | None = None) -> Tokenizer:
        """Read a `tokenizer.json`. Raises ValueError naming the file when it is missing or broken."""
        try:
            return cls(Backend.from_file(str(path)), eos)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from error

    def save(self, path: Path) -> None:
        self.backend.save(str(path))

    def hf_config(self, longest: int | None) -> dict[str, Any]:
        """What `tokenizer_config.json` says beside the file of `save`, for a model of up to `longest` tokens."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SEPARATOR,
            "eos_token": SEPARATOR,
            "unk_token": SEPARATOR,  # nothing is unknown to bytes, but CTranslate2 asks, and GPT-2's says this
            "clean_up_tokenization_spaces": False,  # else decoding would change text
            **({} if longest is None else {"model_max_length": longest}),
        }

    @cached_property
    def vocab_size(self) -> int:
        """Token ids are 0 ... vocab_size - 1, if not all of them."""
        return 1 + max(self.backend.get_vocab().values())

    @property
    def digest(self) -> str:
        """A hash of all that decides which tokens a corpus becomes."""
        return hashlib.sha256(f"{self.separator_id} {self.backend.to_str()}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """As `encode`, on all cores."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text; ids that cut a character in two give the replacement character there."""
        return self.backend.decode(ids, skip_special_tokens=False)
