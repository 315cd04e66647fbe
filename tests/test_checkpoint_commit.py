"""How a checkpoint comes to be: what is on disk before it has its name, in which order; what a copy is a copy of."""

from __future__ import annotations

import os
import pickle
import re
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from test_checkpoint import build, run
from test_checkpoint_layouts import on_disk
from toys import make
from training import settings

import minizero
from minizero.checkpoint import CheckpointError, files, save, tensor_file
from minizero.checkpoint.inspect import diff, verify
from minizero.checkpoint.save import Retention, prepare
from minizero.utils import files as utils_files


def name_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def record_a_save(folder: str) -> list[str]:
    """What rank 0 asks of the file system, in order, with the token of temporary names left out."""
    engine, calls = build(3), []
    run(engine, 0, 1)
    plain_sync, plain_rename, plain_replace = os.fsync, os.rename, os.replace
    gather = engine.world.gather_bytes

    def told(*arguments: Any) -> Any:
        calls.append("ranks meet")
        return gather(*arguments)

    def sync(descriptor: int) -> None:
        calls.append(f"fsync {name_of(descriptor)}")
        plain_sync(descriptor)

    def rename(one: Any, other: Any) -> None:
        calls.append(f"rename {one} {other}")
        (plain_replace if str(other).endswith("latest") else plain_rename)(one, other)

    engine.world.gather_bytes = told
    with mock.patch.multiple(os, fsync=sync, rename=rename, replace=rename):
        engine.save_checkpoint(folder, retention=Retention(1))
    run(engine, 1, 2)
    with mock.patch.object(save, "prune", lambda *_: calls.append("prune")):
        engine.save_checkpoint(folder, retention=Retention(1))
    return [re.sub(r"\.global_step\d\.tmp-[0-9a-f]+", "TEMPORARY", call).replace(folder, "") for call in calls]


def test_nothing_has_its_name_before_it_is_on_disk(tmp_path):
    first, second = run_distributed(record_a_save, 2, str(tmp_path))
    wanted = [
        "ranks meet",  # on the name
        "ranks meet",  # on sizes
        "ranks meet",  # that there is room
        "fsync /TEMPORARY/rank00000.safetensors",
        "ranks meet",  # when all files are there
        "fsync /TEMPORARY/manifest.json",
        "fsync /TEMPORARY",
        "rename /TEMPORARY /global_step1",
        "fsync ",  # the folder
        "fsync /.latest.tmp",
        "rename /.latest.tmp /latest",
        "fsync ",
        "ranks meet",
    ]
    assert first[: len(wanted)] == wanted
    assert first[len(wanted) :] == [*["ranks meet"] * 4, "prune", "ranks meet"]
    assert "fsync /TEMPORARY/rank00001.safetensors" in second and not any("rename" in call for call in second)


def write_around_updates(folder: str, written: int) -> int:
    """A background save that writes so many tensors of each rank, takes one more, and waits for two more steps."""
    engine = build(2, precision="bf16")
    run(engine, 0, 2)
    client_state = {"batches": [2]}
    engine.save_checkpoint(folder, tag="at_once", client_state=client_state)
    background, began, trained, taken = engine._background, threading.Event(), threading.Event(), []
    plain = background._take

    def take(key: str) -> Any:
        values = plain(key)
        taken.append(key)
        if len(taken) == written + 1:
            began.set()
            assert trained.wait(20)
        return values

    with mock.patch.object(background, "_take", take):
        background.start(prepare(engine._state(), Path(folder), "around", client_state, background=background))
        assert began.wait(20)
        run(engine, 2, 4)
        client_state["batches"].append(4)
        trained.set()
        background.wait()
    return len(taken)


@pytest.mark.parametrize("written", (0, 7))
def test_a_background_save_is_of_the_step_it_was_asked_at(tmp_path, written):
    """Whether a tensor is written from where it lives, or from the copy that an update leaves."""
    assert min(run_distributed(write_around_updates, 2, str(tmp_path), written)) > written + 7
    assert diff(tmp_path / "at_once", tmp_path / "around") == []


def change_a_weight_meanwhile(folder: str, is_updated: bool) -> None:
    """The second rank's, between the save and its thread, and perhaps an update too."""
    engine = build(1)
    run(engine, 0, 1)
    waiting = prepare(engine._state(), Path(folder), "changed", {}, background=engine._background)
    if dist.get_rank() == 1:
        with torch.no_grad():
            engine.optimizer.slices[0][0].mul_(2.0)
    if is_updated:
        run(engine, 1, 2)
    engine._background.start(waiting)
    with pytest.raises(CheckpointError, match="rank 1: master/.* was changed while it was saved; call wait_for"):
        engine.wait_for_checkpoint()
    assert not engine._background._borrowed  # else every update would copy it
    engine.save_checkpoint(folder, tag="after")


@pytest.mark.parametrize("is_updated", (False, True))
def test_weights_that_change_while_they_are_saved_are_refused(tmp_path, is_updated):
    run_distributed(change_a_weight_meanwhile, 2, str(tmp_path), is_updated)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after", "latest"]


def save_behind_training(folder: str) -> list[str]:
    """The writer is held back until training has gone on; what the main thread does meanwhile."""
    config = settings(1, dist.get_world_size(), checkpoint={"asynchronous": True, "checksum": "sha256"})
    engine = minizero.initialize(model=make("toy"), config=config)[0]
    run(engine, 0, 1)
    held, plain, order = threading.Event(), save.write_tensors, []

    def slowly(*arguments: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        held.wait(20)
        order.append("written")
        return plain(*arguments)

    with mock.patch.object(save, "write_tensors", slowly):
        engine.save_checkpoint(folder)
        run(engine, 1, 3)
        order.append("trained")
        held.set()
        engine.wait_for_checkpoint()
    engine.save_checkpoint(folder)
    engine.destroy()
    return order


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    assert run_distributed(save_behind_training, 2, str(tmp_path)) == [["trained", "written"]] * 2
    for step in (1, 3):
        assert verify(tmp_path / f"global_step{step}").files[0].sha256 is not None
    assert (tmp_path / "latest").read_text() == "global_step3"


def save_twice_under_one_tag(folder: str) -> None:
    engine = build(1)
    run(engine, 0, 1)
    engine.save_checkpoint(folder, tag="best")
    run(engine, 1, 2)
    engine.save_checkpoint(folder, tag="best")
    if dist.get_rank() == 0:
        with mock.patch.object(files.ctypes, "CDLL", lambda *_, **__: object()):  # where names cannot be swapped
            refuse(engine, folder)
    else:
        refuse(engine, folder)


def refuse(engine: Any, folder: str) -> None:
    run(engine, 2, 3)
    with pytest.raises(CheckpointError, match="best exists, and cannot be replaced in one step here"):
        engine.save_checkpoint(folder, tag="best")


def test_a_tag_that_is_taken_changes_hands_in_one_step(tmp_path):
    run_distributed(save_twice_under_one_tag, 2, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "latest"]
    assert verify(tmp_path / "best").counters.global_steps == 2


def save_where_there_is_no_room(folder: str) -> str:
    engine = build(1)
    run(engine, 0, 1)
    with mock.patch.object(save, "free_bytes", lambda _: 1000):
        with pytest.raises(CheckpointError) as caught:
            engine.save_checkpoint(folder)
    return str(caught.value)


def test_room_is_asked_for_before_anything_is_written(tmp_path):
    for text in run_distributed(save_where_there_is_no_room, 2, str(tmp_path)):
        assert "rank 0: no space for" in text and "bytes" in text and text.endswith("has 1000")
    assert not list(tmp_path.iterdir())


def forbid(*_: Any, **__: Any) -> Any:
    raise AssertionError("something was unpickled")


def save_and_load_without_pickle(folder: str) -> list[str]:
    engine = build(3)
    with mock.patch.multiple(pickle, loads=forbid, load=forbid, Unpickler=forbid):
        with mock.patch.multiple(torch, load=forbid, save=forbid):
            run(engine, 0, 1)
            engine.save_checkpoint(folder)
            resumed = build(2)
            resumed.load_checkpoint(folder)
            run(resumed, 1, 2)
            resumed.save_checkpoint(folder)
            weights = minizero.initialize(
                model=make("frozen"),
                config=settings(3, 2, zero={"stage": 3, "gather_16bit_weights_on_model_save": True}),
            )[0]
            weights.save_16bit_model(folder)
            weights.load_weights(f"{folder}/model.safetensors")
            found = diff(Path(folder) / "global_step1", Path(folder) / "global_step2")
    return found


def test_nothing_is_unpickled(tmp_path):
    """Whole paths, in memory; the files themselves are JSON and tensors, as the library of the format sees them."""
    assert all(any("counters" in line for line in lines) for lines in
               run_distributed(save_and_load_without_pickle, 2, str(tmp_path)))  # fmt: skip
    for path in tmp_path.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not content.startswith((b"\x80", b"PK"))
    whole, _ = on_disk(tmp_path / "global_step2")
    assert whole and all(value.isfinite().all() for value in whole.values())


def test_this_suite_patches_what_is_used():
    """The recordings above would see nothing if these modules did not ask `os`."""
    assert tensor_file.os is os and files.os is os and utils_files.os is os
