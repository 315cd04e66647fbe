"""Corpus, tokenizer and shards: nothing lost, nothing silently broken."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minizero.config.schema import DataConfig
from minizero.data import prepared
from minizero.data.corpus import held_out, open_corpus
from minizero.data.prepared import PreparedData, prepare
from minizero.data.shards import TokenStream, write_split
from minizero.data.tokenizer import SEPARATOR, Tokenizer

TEXTS = {f"folder{i % 3}/file{i}.txt": f"def f{i}(x):\n    return x + {i}  # grüße {i}\n" * (i + 1) for i in range(20)}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    for name, text in TEXTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    (root / "empty.txt").touch()
    (root / ".hidden.txt").write_text("not part")
    return root


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(source=str(corpus), dir=str(tmp_path / "data"), vocab_size=300, validation_fraction=0.2)


def texts_of(data: PreparedData) -> dict[str, str]:
    """The documents as they come out again."""
    found = {}
    for stream in (data.train, data.validation):
        for document in stream.documents:
            ids = stream.read(document.offset, document.offset + document.num_tokens)
            found[document.name] = data.tokenizer.decode(ids.tolist())
    return found


# ---------------------------------------------------------------------------------------------------- corpus


def test_stdlib_is_its_own_source_without_tests() -> None:
    names = open_corpus("stdlib").names()
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert names == sorted(names) and len(names) > 400
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data"}


def test_folder_in_sorted_order_without_empty_and_hidden_files(corpus: Path) -> None:
    opened = open_corpus(str(corpus))
    assert list(opened.documents()) == sorted(TEXTS.items())
    assert opened.names() == sorted(TEXTS)


def test_manifest_follows_the_files(corpus: Path) -> None:
    before = open_corpus(str(corpus)).manifest()
    assert open_corpus(str(corpus)).manifest() == before
    name = next(iter(TEXTS))
    (corpus / name).write_text(TEXTS[name] + "more")
    changed = open_corpus(str(corpus)).manifest()
    assert changed != before
    (corpus / "new.txt").write_text("new")
    assert open_corpus(str(corpus)).manifest() not in (before, changed)


def test_held_out_depends_on_the_name_alone() -> None:
    names = [f"module{i}.py" for i in range(2000)]
    chosen = held_out(names, 0.05)
    assert 60 <= len(chosen) <= 140
    assert held_out(names[::-1], 0.05) == chosen
    assert held_out(names[:1000], 0.05) == chosen & set(names[:1000])
    assert held_out(names, 0.2) > chosen


@given(st.sets(st.text(max_size=5), min_size=2, max_size=10), st.floats(0.001, 0.499))
@settings(deadline=None)
def test_both_splits_always_have_a_document(names: set[str], fraction: float) -> None:
    assert 1 <= len(held_out(list(names), fraction)) < len(names)


def test_missing_or_empty_corpus_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data.source '.*nowhere' is not a folder; legal: stdlib, a folder, or datasets:"
    ):
        open_corpus(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has 0 documents that are not empty; at least two"):
        open_corpus(str(tmp_path))
    (tmp_path / "one.txt").write_text("one")
    with pytest.raises(ValueError, match="has 1 documents"):
        open_corpus(str(tmp_path))


def test_a_file_that_is_not_text_is_named(corpus: Path, config: DataConfig) -> None:
    (corpus / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"picture\.png is not UTF-8 text"):
        prepare(config)


@pytest.mark.parametrize("column", ["text", "content"])
def test_datasets_source(tmp_path: Path, column: str) -> None:
    rows = list(TEXTS.values())
    datasets.Dataset.from_dict({column: rows, "other": list(range(len(rows)))}).save_to_disk(tmp_path / "set")
    source = f"datasets:{tmp_path / 'set'}" + ("" if column == "text" else f":{column}")
    data = prepare(DataConfig(source=source, dir=str(tmp_path / "data"), vocab_size=280))
    assert list(dict(sorted(texts_of(data).items())).values()) == rows
    assert prepare(DataConfig(source=source, dir=str(tmp_path / "data"), vocab_size=280)).folder == data.folder


def test_datasets_source_from_plain_files(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in TEXTS.values()]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines))
    assert [text for _, text in open_corpus(f"datasets:{tmp_path / 'set'}").documents()] == list(TEXTS.values())


def test_datasets_errors_name_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.Dataset.from_dict({"body": ["a", "b"], "n": [1, 2]}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="there is no column 'text'; legal: body, n"):
        open_corpus(f"datasets:{tmp_path / 'set'}")
    with pytest.raises(ValueError, match="row 0, column 'n' is not text: 1"):
        list(open_corpus(f"datasets:{tmp_path / 'set'}:n").documents())
    with pytest.raises(ValueError, match=r"datasets:.*nowhere cannot be loaded"):
        open_corpus(f"datasets:{tmp_path / 'nowhere'}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'minizero\[hf\]'"):
        open_corpus(f"datasets:{tmp_path / 'set'}")


# ------------------------------------------------------------------------------------------------- tokenizer

TOKENIZER = Tokenizer.train(TEXTS.values(), 300)


@given(st.text() | st.text(alphabet="<|endoftext|> \n\t\r\x00é\U0001f600"))
@settings(deadline=None, max_examples=200)
def test_round_trip_is_lossless(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)
    assert TOKENIZER.encode_batch([text, "x"])[0] == ids


def test_separator_is_a_token_that_no_text_can_spell(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for tokenizer in (TOKENIZER, Tokenizer.load(tmp_path / "tokenizer.json")):
        text = f"a{SEPARATOR}b"
        assert tokenizer.separator_id not in tokenizer.encode(text) + tokenizer.encode_batch([text])[0]
        assert tokenizer.decode([tokenizer.separator_id]) == SEPARATOR


def test_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    text = "".join(TEXTS.values())
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.vocab_size == TOKENIZER.vocab_size
    assert len(loaded.encode(text)) < len(text.encode()) / 2, "nothing was learnt"


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_broken_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")


# ---------------------------------------------------------------------------------------------------- shards


@given(
    st.lists(st.lists(st.integers(1, 69_999), max_size=9), min_size=1, max_size=6),
    st.sampled_from([1, 3, 7, 1000]),
    st.data(),
)
@settings(deadline=None, max_examples=60)
def test_stream_reads_back_across_files(
    tmp_path_factory: pytest.TempPathFactory, ids: list[list[int]], tokens_per_file: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    documents = [(f"d{i}", 10 * i, tokens) for i, tokens in enumerate(ids)]
    write_split(folder, "train", documents, separator_id=0, vocab_size=70_000, tokens_per_file=tokens_per_file)
    stream = TokenStream(folder, "train")
    stream.verify()
    expected = [0] + [token for tokens in ids for token in [*tokens, 0]]
    assert len(stream) == len(expected)
    assert len(stream.files) == -(-len(expected) // tokens_per_file)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    found = stream.read(start, stop)
    assert found.dtype == np.int64 and found.tolist() == expected[start:stop]
    for document, (name, num_bytes, tokens) in zip(stream.documents, documents, strict=True):
        assert (document.name, document.num_bytes) == (name, num_bytes)
        assert stream.read(document.offset, document.offset + document.num_tokens).tolist() == tokens
    assert stream.num_bytes == sum(10 * i for i in range(len(ids)))


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65_536, 2), (65_537, 4)])
def test_tokens_take_two_bytes_where_they_fit(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    top = vocab_size - 1
    write_split(tmp_path, "train", [("d", 1, [top])], separator_id=0, vocab_size=vocab_size)
    assert (tmp_path / "train-00000.bin").stat().st_size == 3 * itemsize
    assert TokenStream(tmp_path, "train").read(0, 3).tolist() == [0, top, 0]


def test_a_flipped_byte_is_named(config: DataConfig) -> None:
    for split in ("train", "validation"):
        path = prepare(config).folder / f"{split}-00000.bin"
        whole = path.read_bytes()
        path.write_bytes(whole[:7] + bytes([whole[7] ^ 1]) + whole[8:])
        with pytest.raises(ValueError, match=rf"{split}-00000\.bin is damaged .* delete .* and it will be made again"):
            prepare(config)
        prepare(config, verify=False)
        path.write_bytes(whole)


def test_a_cut_or_missing_file_is_named(config: DataConfig) -> None:
    folder = prepare(config).folder
    path = folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-00000\.bin has \d+ bytes instead of \d+"):
        prepare(config, verify=False)
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00000\.bin is missing"):
        prepare(config, verify=False)
    (folder / "train.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"train\.json is not an index of token shards \(format 99, expected 1\)"):
        prepare(config, verify=False)


# --------------------------------------------------------------------------------------------------- prepare


def test_prepared_data_is_the_corpus(config: DataConfig) -> None:
    data = prepare(config)
    assert texts_of(data) == TEXTS
    validation = {document.name for document in data.validation.documents}
    assert validation == held_out(list(TEXTS), 0.2)
    text = "".join(TEXTS[name] for name in sorted(validation)).encode()
    assert data.held_out_text() == text and data.validation.num_bytes == len(text)
    separator = data.tokenizer.separator_id
    for stream in (data.train, data.validation):
        assert (stream.read(0, len(stream)) == separator).sum() == len(stream.documents) + 1
        assert stream.read(0, 1) == stream.read(len(stream) - 1, len(stream)) == separator


def test_the_tokenizer_has_not_seen_the_held_out_text(config: DataConfig, corpus: Path) -> None:
    unseen = sorted(held_out(list(TEXTS), 0.2))[0]
    (corpus / unseen).write_text("zyzzyva " * 500)
    assert len(prepare(config).tokenizer.encode("zyzzyva")) > 4


def test_the_second_call_only_opens(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config)
    monkeypatch.setattr(prepared, "_make", None)
    second = prepare(config)
    assert second.folder == first.folder and second.fingerprint == first.fingerprint


def test_the_key_follows_corpus_and_settings(config: DataConfig, corpus: Path) -> None:
    folders = {prepare(config).folder}
    for change in ({"vocab_size": 310}, {"validation_fraction": 0.3}):
        folders.add(prepare(config.model_copy(update=change)).folder)
    (corpus / "new.txt").write_text("new text")
    folders.add(prepare(config).folder)
    assert len(folders) == 4


def test_prepared_twice_is_the_same(config: DataConfig, tmp_path: Path) -> None:
    again = config.model_copy(update={"dir": str(tmp_path / "again")})
    first, second = prepare(config), prepare(again)
    assert first.folder.name == second.folder.name
    for path in first.folder.iterdir():
        assert path.read_bytes() == (second.folder / path.name).read_bytes(), path.name


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupted(*_: object) -> None:
        raise error("here")

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "write_split", interrupted)
        with pytest.raises(error, match="here"):
            prepare(config)
    assert list(Path(config.dir).iterdir()) == []
    assert texts_of(prepare(config)) == TEXTS


def test_a_killed_preparation_is_not_mistaken_for_a_finished_one(config: DataConfig) -> None:
    folder = prepare(config).folder
    remains = folder.rename(folder.with_name(f".{folder.name}-killed"))
    (remains / "train.json").unlink()
    assert texts_of(prepare(config)) == TEXTS


def test_the_slower_of_two_preparations_takes_the_others(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    write = prepared.write_split

    def overtaken(*arguments: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(prepared, "write_split", write)
            prepare(config)
        write(*arguments)

    monkeypatch.setattr(prepared, "write_split", overtaken)
    data = prepare(config)
    assert texts_of(data) == TEXTS
    assert [path.name for path in Path(config.dir).iterdir()] == [data.folder.name]
