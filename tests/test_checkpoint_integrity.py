"""Whatever happens to a checkpoint's bytes is found before they are used, by one error that names the file."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from harness import run_distributed
from safetensors.torch import load_file, save_file
from test_checkpoint_layouts import LAYOUTS, start, train

from minizero.checkpoint import CheckpointError
from minizero.checkpoint.files import MANIFEST, prune
from minizero.checkpoint.inspect import diff, listing, verify
from minizero.checkpoint.manifest import framed
from minizero.checkpoint.tensor_file import DTYPES, Entry, TensorFile, hash_file, write_tensors
from minizero.cli import main


def save_two(folder: str) -> None:
    layout = LAYOUTS["dp2-1"]
    engine = start(layout, "llama")
    for step in (1, 2):
        train(engine, layout, step - 1, step)
        engine.save_checkpoint(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with two checkpoints, global_step1 and global_step2, of two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    run_distributed(save_two, 2, str(folder))
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """Those two, to be damaged."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def test_what_is_whole_is_whole(saved):
    for step in (1, 2):
        assert verify(saved / f"global_step{step}").counters.global_steps == step


def test_a_flipped_bit_is_found_in_every_byte_of_the_manifests_frame(copy):
    """Elsewhere at random: row 7 of `matrix.py`."""
    folder, chance = copy / "global_step2", random.Random(0)
    file = folder / MANIFEST
    size = file.stat().st_size
    for byte in (*range(70), *range(size - 4, size)):
        bit = 8 * byte + chance.randrange(8)
        with open(file, "r+b") as opened:
            opened.seek(bit // 8)
            (byte,) = opened.read(1)
            opened.seek(bit // 8)
            opened.write(bytes([byte ^ 1 << bit % 8]))
            opened.flush()
            with pytest.raises(CheckpointError, match=file.name):
                verify(folder)
            opened.seek(bit // 8)
            opened.write(bytes([byte]))
    verify(folder)


def swap(folder: Path, other: Path) -> None:
    one, two = folder / "rank00000.safetensors", folder / "rank00001.safetensors"
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def outgrow(folder: Path, other: Path) -> None:
    with open(folder / "rank00001.safetensors", "ab") as file:
        file.write(b"\0")


DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "truncated": (lambda f, _: os.truncate(f / "rank00001.safetensors", 100), "rank00001.* bytes is 100, the manifest"),
    "longer": (outgrow, "rank00001.* the manifest says"),
    "empty": (lambda f, _: os.truncate(f / "rank00000.safetensors", 0), "rank00000.* bytes is 0"),
    "gone": (lambda f, _: (f / "rank00001.safetensors").unlink(), "rank00001.safetensors is missing"),
    "swapped": (swap, "rank0000..safetensors is damaged"),
    "stale": (lambda f, o: shutil.copy(o / "rank00001.safetensors", f), "rank00001.safetensors is damaged"),
    "stale manifest": (lambda f, o: shutil.copy(o / MANIFEST, f), "rank0000..safetensors is damaged"),
    "extra": (lambda f, _: (f / "rank00002.safetensors").touch(), "rank00002.safetensors does not belong"),
    "no manifest": (lambda f, _: (f / MANIFEST).unlink(), "has no manifest.json"),
    "empty manifest": (lambda f, _: os.truncate(f / MANIFEST, 0), "manifest.json is damaged"),
    "cut manifest": (lambda f, _: os.truncate(f / MANIFEST, 2000), "manifest.json is damaged"),
    "folder": (lambda f, _: ((f / "rank00001.safetensors").unlink(), (f / "rank00001.safetensors").mkdir()), "regular"),
    "link": (
        lambda f, o: (
            (f / "rank00001.safetensors").rename(o.parent / "x"),
            (f / "rank00001.safetensors").symlink_to(o.parent / "x"),
        ),
        "rank00001.safetensors is no regular file",
    ),
    "pipe": (
        lambda f, _: ((f / "rank00001.safetensors").unlink(), os.mkfifo(f / "rank00001.safetensors")),
        "rank00001.safetensors is no regular file",
    ),
    "linked manifest": (
        lambda f, o: ((f / MANIFEST).unlink(), (f / MANIFEST).symlink_to(o / MANIFEST)),
        "has no manifest.json",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(copy, kind):
    act, message = DAMAGE[kind]
    act(copy / "global_step2", copy / "global_step1")
    with pytest.raises(CheckpointError, match=message):
        verify(copy / "global_step2")
    verify(copy / "global_step1")


ESCAPES = (
    "../x",
    "/etc/passwd",
    "a/b",
    "a//b",
    ".",
    "..",
    ".hidden",
    "",
    "a\0b",
    "a\nb",
    "x" * 300,
    "ü",
    "a b",
    7,
    None,
)


@pytest.mark.parametrize("name", ESCAPES, ids=ascii)
def test_names_cannot_leave_the_folder(copy, name):
    folder = copy / "global_step2"
    manifest = json.loads((folder / MANIFEST).read_text())["manifest"]
    manifest["files"][1]["file"] = name
    (folder / MANIFEST).write_bytes(framed(json.dumps(manifest).encode()))
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged: files.1.file: .*(plain name|valid string)"):
        verify(folder)


@pytest.mark.parametrize(
    ("header", "reason"),
    (
        (b"[]", "no table"),
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "a has 4 bytes, but dtype F32"),
        (b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}', "a is of dtype"),
        (b'{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}', "a is of dtype F31"),
        (b'{"a":{"dtype":"U8","shape":[9999999999999],"data_offsets":[0,9999999999999]}}', "have 9999999999999 bytes"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "nobody's"),
        (
            b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}',
            "bytes from 4 of the tensors are nobody's, or b's and others'",
        ),
        (b'{"a":{"dtype":"F32","shape":[1]}}', "its header says"),
        (b'{"a":7}', "its header says 7 of a"),
    ),
)  # fmt: skip
def test_headers_are_believed_only_as_far_as_the_file_goes(tmp_path, header, reason):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=f"x.safetensors cannot be read as safetensors: .*{reason}"):
        TensorFile(path)
    path.write_bytes((1 << 62).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="the header is 4611686018427387904 bytes long, in a file of"):
        TensorFile(path)


@pytest.mark.parametrize("checksum", ("xxh3_128", "sha256"))
def test_files_are_those_of_the_safetensors_library(tmp_path, checksum):
    """Both ways, all dtypes, any strides, odd lengths, nothing at all."""
    torch.manual_seed(0)
    tensors = {code: (torch.randn(3, 5) * 9).to(dtype) for code, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "turned": torch.randn(4, 6).t()[1:]}
    facts = write_tensors(tmp_path / "ours", [Entry(key, value) for key, value in tensors.items()], checksum)
    assert facts[checksum] == hash_file(tmp_path / "ours", checksum)
    assert facts["bytes"] == (tmp_path / "ours").stat().st_size
    found = load_file(tmp_path / "ours")
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "theirs")
    with TensorFile(tmp_path / "theirs") as file:
        assert found.keys() == tensors.keys() == file.places.keys()
        for key, value in tensors.items():
            for other in (found[key], file.read(key)):
                assert other.dtype == value.dtype and other.shape == value.shape
                assert torch.equal(other.double(), value.double())
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "ours", [])


def test_boxes_are_read_from_anywhere(tmp_path):
    whole = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    write_tensors(tmp_path / "x", [Entry("w", whole)])
    chance = random.Random(0)
    with TensorFile(tmp_path / "x") as file:
        for _ in range(300):
            box = tuple(sorted((chance.randint(0, n), chance.randint(0, n))) for n in whole.shape)
            box = tuple(map(tuple, box))
            wanted = whole[tuple(slice(*side) for side in box)]
            assert torch.equal(file.read("w", box), wanted)
            for target in (torch.empty(wanted.shape, dtype=torch.int64), torch.empty((*wanted.shape, 2))[..., 0]):
                file.read_into(target, "w", box)
                assert torch.equal(target, wanted.to(target.dtype))
        for bad in (((0, 3), (0, 3), (0, 4), (0, 5)), ((0, 1),)):
            with pytest.raises(CheckpointError, match="which has no"):
                file.read("w", bad)
        with pytest.raises(CheckpointError, match="x has no v"):
            file.read("v")


# ---- many checkpoints, and the verbs ----


def test_pruning_keeps_the_newest_and_every_kth(tmp_path):
    for step in (1, 2, 4, 5, 6, 8, 9, 10):
        (tmp_path / f"global_step{step}").mkdir()
    for other in ("best", ".global_step3.tmp-abc", "global_stepx", "latest"):
        (tmp_path / other).mkdir()
    prune(tmp_path, "global_step10", keep=2, keep_every=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["best", "global_stepx", "latest", "global_step4", "global_step8", "global_step9", "global_step10"]
        + [".global_step3.tmp-abc"]
    )


def test_pruning_leaves_what_a_rolled_back_run_has_left(tmp_path):
    """And what `latest` names, and links: each is somebody's, and the newest is the one just written."""
    for step in (20, 40, 50, 60, 90, 100):
        (tmp_path / f"global_step{step}").mkdir()
    (tmp_path / "global_step30").symlink_to("/nowhere")
    (tmp_path / "latest").write_text("global_step40")
    for _ in range(2):
        prune(tmp_path, "global_step60", keep=2)
    assert {path.name for path in tmp_path.glob("global_step*")} == {
        f"global_step{step}" for step in (30, 40, 50, 60, 90, 100)
    }


def test_a_disk_that_cannot_be_read_is_named(copy):
    folder = copy / "global_step1"
    with mock.patch.object(Path, "read_bytes", side_effect=OSError(5, "Input/output error")):
        with pytest.raises(CheckpointError, match="global_step1/manifest.json cannot be read: Input/output error"):
            verify(folder)
        assert [row["problem"] is None for row in listing(copy)] == [False, False]
    with mock.patch("minizero.checkpoint.load.hash_file", side_effect=OSError(5, "Input/output error")):
        with pytest.raises(CheckpointError, match=r"rank0000\d.safetensors cannot be read: Input/output error"):
            verify(folder)


def say(capsys, *arguments: object) -> tuple[int, str]:
    code = main(["checkpoint", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_the_verbs(copy, capsys):
    one, two = copy / "global_step1", copy / "global_step2"
    code, text = say(capsys, "ls", copy)
    assert code == 0 and "* global_step2" in text and "dp 2, ZeRO 1, fp32" in text
    code, text = say(capsys, "inspect", copy, "--json")
    facts = json.loads(text)
    assert code == 0 and facts["counters"]["global_steps"] == 2
    assert facts["parameters"]["model.layers.0.mlp.gate_proj.weight"] == {
        "shape": [37, 24], "kinds": ["master", "exp_avg", "exp_avg_sq"]
    }  # fmt: skip
    assert say(capsys, "inspect", two)[0] == 0
    assert say(capsys, "verify", copy)[1].startswith(f"{two} is whole: 2 files")
    assert say(capsys, "diff", one, one) == (0, "the same\n")
    code, text = say(capsys, "diff", one, two)
    assert code == 1 and "counters" in text and "exp_avg of model.norm.weight: 24 of 24" in text
    os.truncate(two / "rank00001.safetensors", 5)
    code, text = say(capsys, "verify", copy)
    assert code == 1 and "rank00001.safetensors is damaged" in text
    assert "rank00001.safetensors is damaged" in say(capsys, "ls", copy)[1]
    assert "no manifest.json" in json.loads(say(capsys, "verify", copy.parent, "--json")[1])["problem"]
    assert [row["problem"] is None for row in listing(copy)] == [False, True]


def test_layouts_do_not_show_in_a_diff(tmp_path):
    def name(layout: str) -> Path:
        return tmp_path / layout

    for layout in ("one", "dp2-1"):
        run_distributed(save_untrained, LAYOUTS[layout].world, layout, str(tmp_path))
    assert diff(name("one"), name("dp2-1")) == []


def save_untrained(layout: str, folder: str) -> None:
    start(LAYOUTS[layout], "llama").save_checkpoint(folder, tag=layout)
