"""Resuming is the same run, bitwise; a damaged checkpoint is named; an interrupted save leaves the last one."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import DistributedError, run_distributed
from safetensors.torch import load_file
from toys import batches, make
from training import micro_batches, settings, whole_weights

import minizero
from minizero.checkpoint import CheckpointError

SCHEDULE = {"type": "WarmupDecayLR", "params": {"total_num_steps": 20, "warmup_num_steps": 3, "warmup_max_lr": 3e-3}}


def build(stage: int, name: str = "frozen", precision: str = "fp32"):
    config = settings(stage, dist.get_world_size(), scheduler=SCHEDULE, precision=precision)
    return minizero.initialize(model=make(name), config=config)[0]


def run(engine, first: int, last: int) -> list:
    found = []
    for tokens, labels in batches(last)[first:]:
        loss = engine.train_batch(iter(micro_batches(tokens, labels, 1)))
        found.append((float(loss), engine.get_global_grad_norm(), engine.get_lr()[0], float(torch.rand(()))))
    return found


def straight_and_resumed(folder: str, stage: int, precision: str) -> tuple[list, list, bool]:
    straight = build(stage, precision=precision)
    run(straight, 0, 4)
    straight.save_checkpoint(folder, client_state={"note": [1, "two"]})
    expected = run(straight, 4, 8)
    torch.manual_seed(99)
    resumed = build(stage, precision=precision)
    path, client_state = resumed.load_checkpoint(folder)
    assert path is not None and path.endswith("global_step4") and client_state == {"note": [1, "two"]}
    assert (resumed.global_steps, resumed.global_samples) == (4, 64)
    found = run(resumed, 4, 8)
    a, b = whole_weights(straight.module), whole_weights(resumed.module)
    return expected, found, all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("stage", "world"), ((0, 2), (1, 1), (1, 2), (2, 4), (3, 2)))
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_resume_is_bitwise_the_same_run(tmp_path, stage, world, precision):
    for expected, found, same in run_distributed(straight_and_resumed, world, str(tmp_path), stage, precision):
        assert found == expected and same


def save_twice(folder: str) -> None:
    engine = build(3)
    run(engine, 0, 1)
    engine.save_checkpoint(folder)
    run(engine, 1, 2)
    engine.save_checkpoint(folder)


def load_only(folder: str) -> str | None:
    return build(3).load_checkpoint(folder)[0]


def test_no_checkpoint_is_none(tmp_path):
    assert run_distributed(load_only, 2, str(tmp_path)) == [None, None]


@pytest.mark.parametrize("damage", ("flip", "truncate", "remove", "manifest", "escape"))
def test_damage_is_found_before_use_and_named(tmp_path, damage):
    run_distributed(save_twice, 2, str(tmp_path))
    folder = tmp_path / "global_step2"
    victim = folder / "dp00001.safetensors"
    if damage == "flip":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 4
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-8])
    elif damage == "remove":
        victim.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][1]["file"] = "../elsewhere"
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DistributedError) as caught:
        run_distributed(load_only, 2, str(tmp_path))
    wanted = "manifest.json" if damage in ("manifest", "escape") else "dp00001.safetensors"
    assert len(caught.value.failures) == 2
    assert all("CheckpointError" in text and wanted in text for text in caught.value.failures.values())


def save_in_vain(folder: str) -> None:
    engine = build(3)
    run(engine, 0, 1)
    engine.save_checkpoint(folder)
    run(engine, 1, 2)
    error = OSError(28, "No space left on device") if dist.get_rank() == 1 else None
    with mock.patch("minizero.checkpoint.state.sync_file", side_effect=error):
        with pytest.raises(CheckpointError, match="rank 1: OSError.*No space left"):
            engine.save_checkpoint(folder)


def test_a_save_that_fails_on_one_rank_leaves_the_previous_one(tmp_path):
    run_distributed(save_in_vain, 2, str(tmp_path))
    assert run_distributed(load_only, 2, str(tmp_path))[0].endswith("global_step1")


def test_another_layout_is_refused(tmp_path):
    run_distributed(save_twice, 2, str(tmp_path))
    with pytest.raises(DistributedError, match="saved by 2 data-parallel ranks, this run has 4"):
        run_distributed(load_only, 4, str(tmp_path))


def export(folder: str, allowed: bool) -> tuple[bool, dict]:
    config = settings(3, 2, precision="bf16", zero={"stage": 3, "gather_16bit_weights_on_model_save": allowed})
    engine = minizero.initialize(model=make("frozen"), config=config)[0]
    return engine.save_16bit_model(folder, "pytorch_model.bin"), whole_weights(engine.module)


def test_whole_16bit_weights(tmp_path):
    saved, weights = run_distributed(export, 2, str(tmp_path), True)[0]
    assert saved
    found = load_file(tmp_path / "pytorch_model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) and found[key].dtype == torch.bfloat16 for key in found)
    assert run_distributed(export, 2, str(tmp_path / "no"), False)[0][0] is False
    assert not (tmp_path / "no").exists()
