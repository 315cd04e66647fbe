"""Resuming is the same run, bitwise; a damaged checkpoint is named; an interrupted save leaves the last one."""

from __future__ import annotations

import json
import time
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import DistributedError, run_distributed
from safetensors.torch import load_file
from torch import nn
from toys import batches, make
from training import micro_batches, refused_everywhere, settings, whole_weights

import minizero
from minizero.checkpoint import CheckpointError, load, save
from minizero.checkpoint.manifest import FileFacts, Manifest, ParameterFacts, framed
from minizero.optim.build import ELEMENT_WISE

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


def scales(folder: str) -> list[tuple[float, dict]]:
    scale = {"initial_power": 6, "window": 2}
    straight, resumed = (
        minizero.initialize(model=make("toy"), config=settings(1, 2, precision="fp16", loss_scale=scale))[0]
        for _ in range(2)
    )
    run(straight, 0, 5)
    straight.save_checkpoint(folder)
    resumed.load_checkpoint(folder)
    run(straight, 5, 8)
    run(resumed, 5, 8)
    return [(engine.loss_scale, engine.optimizer.scaler.state_dict()) for engine in (straight, resumed)]


def test_the_loss_scale_comes_back(tmp_path):
    for straight, resumed in run_distributed(scales, 2, str(tmp_path)):
        assert straight == resumed and straight[0] > 2.0**7


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
    victim = folder / "rank00001.safetensors"
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
        manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
        manifest["files"][1]["file"] = "../elsewhere"
        (folder / "manifest.json").write_bytes(framed(json.dumps(manifest).encode()))
    with pytest.raises(DistributedError) as caught:
        run_distributed(load_only, 2, str(tmp_path))
    wanted = "manifest.json" if damage in ("manifest", "escape") else "rank00001.safetensors"
    assert len(caught.value.failures) == 2
    assert all("CheckpointError" in text and wanted in text for text in caught.value.failures.values())


def save_in_vain(folder: str) -> None:
    engine = build(3)
    run(engine, 0, 1)
    engine.save_checkpoint(folder)
    run(engine, 1, 2)
    for rank, what, where in (
        (1, "this rank's file", "tensor_file.os.fsync"),
        (0, "manifest.json", "save.write_synced"),
    ):
        error = OSError(28, "No space left on device") if dist.get_rank() == rank else None
        said = f"rank {rank}: no space for .*global_step2: {what} needs .* bytes, .* has .*No space left"
        with mock.patch(f"minizero.checkpoint.{where}", side_effect=error):
            with pytest.raises(CheckpointError, match=said):
                engine.save_checkpoint(folder)


def test_a_save_that_fails_on_one_rank_leaves_the_previous_one(tmp_path):
    run_distributed(save_in_vain, 2, str(tmp_path))
    assert run_distributed(load_only, 2, str(tmp_path))[0].endswith("global_step1")


@pytest.mark.parametrize("named", (b"", b"\xff\xfe", b"../elsewhere", b"/etc", b"x" * 300))
def test_a_damaged_name_of_the_latest_is_refused_on_all(tmp_path, named):
    (tmp_path / "latest").write_bytes(named)
    refused_everywhere(load_only, 2, "rank 0: .*latest is damaged: it names .*a tag would say", str(tmp_path))


def load_one_that_is_gone(folder: str) -> list[str]:
    """`latest` names a step that is not there; an older one is."""
    engine = build(1)
    run(engine, 0, 1)
    engine.save_checkpoint(folder)
    if dist.get_rank() == 0:
        with open(f"{folder}/latest", "w") as file:
            file.write("global_step5")
    dist.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(CheckpointError, match="global_step5 is no folder.*global_step1 looks whole"):
            engine.load_checkpoint(folder)
    return [str(one.message) for one in caught]


def test_an_older_checkpoint_is_not_called_newer(tmp_path):
    assert run_distributed(load_one_that_is_gone, 2, str(tmp_path)) == [[], []]


def load_an_older_one(folder: str) -> list[str]:
    engine = build(1)
    for step in (1, 2):
        run(engine, step - 1, step)
        engine.save_checkpoint(folder, save_latest=step == 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path, _ = engine.load_checkpoint(folder)
    assert path.endswith("global_step1")
    return [str(one.message) for one in caught]


def test_an_older_checkpoint_is_not_taken_in_silence(tmp_path):
    """One bit of `latest` may make it name another checkpoint that is there."""
    said, silent = run_distributed(load_an_older_one, 2, str(tmp_path))
    assert not silent and len(said) == 1
    assert "latest names global_step1, and " in said[0] and "global_step2 is newer" in said[0]


def run_optimizer(folder: str, name: str) -> bool:
    config = settings(2, 2, optimizer={"type": name, "lr": 1e-3, "weight_decay": 0.0})
    straight, resumed = (minizero.initialize(model=make("toy"), config=config)[0] for _ in range(2))
    run(straight, 0, 2)
    run(resumed, 0, 1)  # state that loading replaces
    straight.save_checkpoint(folder, tag=name)
    resumed.load_checkpoint(folder, tag=name)
    return [x[:2] for x in run(straight, 2, 4)] == [x[:2] for x in run(resumed, 2, 4)]


def test_the_state_of_every_optimizer_comes_back(tmp_path):
    for name in ELEMENT_WISE:
        assert all(run_distributed(run_optimizer, 2, str(tmp_path), name)), name


def run_milestones(folder: str) -> list[list[float]]:
    """Learning rates of a run and of its continuation, under a schedule whose state has numbers for keys."""

    def build_with_milestones() -> Any:
        def schedule(optimizer: Any) -> Any:
            steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 4], gamma=0.5)
            return torch.optim.lr_scheduler.SequentialLR(
                optimizer, [torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), steps], [1]
            )

        return minizero.initialize(model=make("toy"), config=settings(1, 2), lr_scheduler=schedule)[0]

    straight, resumed = build_with_milestones(), build_with_milestones()
    run(straight, 0, 2)
    straight.save_checkpoint(folder)
    resumed.load_checkpoint(folder)
    return [[lr for _, _, lr, _ in run(engine, 2, 6)] for engine in (straight, resumed)]


def test_a_schedule_whose_state_has_numbers_for_keys_comes_back(tmp_path):
    for straight, resumed in run_distributed(run_milestones, 2, str(tmp_path)):
        assert straight == resumed and len(set(straight)) == 2


def run_in_another_way(folder: str) -> list[tuple[list, bool]]:
    """Saved from an update that is one call, resumed with one that is a loop: the option is not the checkpoint's."""
    found = []
    for fused in (True, False):
        model = make("toy")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        engine = minizero.initialize(model=model, optimizer=optimizer, config=settings(2, 2))[0]
        if fused:
            run(engine, 0, 1)
            engine.save_checkpoint(folder)
        else:
            engine.load_checkpoint(folder)
        found.append(([x[:2] for x in run(engine, 1, 3)], engine.optimizer.param_groups[0]["fused"]))
    return found


def test_how_an_update_is_computed_is_not_the_checkpoints(tmp_path):
    for (saved, _), (resumed, fused) in run_distributed(run_in_another_way, 2, str(tmp_path)):
        assert fused is False and resumed == [pytest.approx(step, rel=1e-6) for step in saved]


def save_and_load_from_a_slow_disk(folder: str) -> list[float]:
    """One rank takes four timeouts to write its file, and four to check it."""
    engine = minizero.initialize(model=make("toy"), config=settings(2, 2, dist={"timeout": 1.0}))[0]
    engine.world = engine.world.apart()  # the workers' own group has more time
    run(engine, 0, 1)
    took = []
    for module, name, act in (
        (save, "write_tensors", lambda: engine.save_checkpoint(folder)),
        (load, "hash_file", lambda: engine.load_checkpoint(folder)),
    ):
        plain = getattr(module, name)

        def late(*given: Any, plain: Any = plain) -> Any:
            time.sleep(4.0 if dist.get_rank() == 1 else 0.0)
            return plain(*given)

        began = time.monotonic()
        with mock.patch.object(module, name, late):
            act()
        took.append(time.monotonic() - began)
    return took


def test_a_slow_disk_is_not_a_dead_rank(tmp_path):
    for took in run_distributed(save_and_load_from_a_slow_disk, 2, str(tmp_path)):
        assert all(4.0 < seconds < 20.0 for seconds in took)


def load_from_before_the_first_step(folder: str) -> int:
    engine = build(1)
    engine.save_checkpoint(folder)
    run(engine, 0, 1)
    engine.load_checkpoint(folder)
    return sum(len(state) for state in engine.optimizer.state.values())


def test_loading_leaves_no_older_moments(tmp_path):
    assert run_distributed(load_from_before_the_first_step, 2, str(tmp_path)) == [0, 0]


class Resized(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, width), nn.Linear(width, 1)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        return self.down(self.up(x)).mean()


def save_then_load_into(folder: str, width: int, kind: str) -> list[bool]:
    engine = minizero.initialize(model=Resized(8), config=settings(1, 2))[0]
    engine.save_checkpoint(folder, tag=7)
    model = Resized(width)
    if kind == "buffer":
        model.seen = torch.zeros(3)
    other = settings(1, 2, optimizer={"type": "SGD" if kind == "optimizer" else "AdamW"})
    engine = minizero.initialize(model=model, config=other)[0]
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=MISFITS[kind]):
        engine.load_checkpoint(folder, tag=7)
    return [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]


MISFITS = {
    "parameter": r"parameter 'down.weight' has shape \(1, 8\), this run's has \(1, 4\)",
    "buffer": r"buffer 'seen' has shape \(2,\), this run's has \(3,\)",
    "optimizer": "holds the state of AdamW, this run has SGD",
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, kind):
    width = 4 if kind == "parameter" else 8
    assert all(map(all, run_distributed(save_then_load_into, 2, str(tmp_path), width, kind)))


def save_under_two_names(folder: str) -> None:
    build(1).save_checkpoint(folder, tag=f"t{dist.get_rank()}")


def test_ranks_must_agree_on_the_tag(tmp_path):
    with pytest.raises(DistributedError, match="different tags for one checkpoint: t0, t1") as caught:
        run_distributed(save_under_two_names, 2, str(tmp_path))
    assert len(caught.value.failures) == 2 and not list(tmp_path.iterdir())


def save_what_cannot_be(folder: str, what: dict[str, Any]) -> None:
    given = what if dist.get_rank() == 1 else {}
    build(1).save_checkpoint(folder, **{"tag": "t", "client_state": {}} | given)


@pytest.mark.parametrize(
    ("what", "said"),
    (
        ({"client_state": {"a": {1, 2}}}, "rank 1: client_state cannot be saved as JSON"),
        ({"client_state": {"a": [{3: 1}]}}, "rank 1: client_state cannot be saved as JSON (keys must be strings, 3 is"),
        ({"tag": "../t"}, "rank 1: tag '../t': use letters, digits"),
    ),
)
def test_what_one_rank_cannot_save_is_refused_on_all(tmp_path, what, said):
    with pytest.raises(DistributedError) as caught:
        run_distributed(save_what_cannot_be, 2, str(tmp_path), what)
    assert len(caught.value.failures) == 2 and all(said in text for text in caught.value.failures.values())
    assert not list(tmp_path.iterdir())


def test_missing_elements_are_found():
    shapes = {"w": ParameterFacts(shape=(2, 3))}
    boxes = [("master", "w", ((0, 1), (0, 3))), ("master", "w", ((1, 2), (0, 3)))]

    def manifest(*held):
        files = tuple(FileFacts(file=f"rank{r}", bytes=0, boxes=(box,)) for r, box in enumerate(held))
        return Manifest.model_construct(parameters=shapes, buffers={}, files=files)

    manifest(*boxes).check_complete()
    for bad in (boxes[:1], boxes[1:], [*boxes, boxes[0]], [*boxes, ("exp_avg", *boxes[0][1:])], []):
        with pytest.raises(CheckpointError, match="of w"):
            manifest(*bad).check_complete()
    with pytest.raises(CheckpointError, match="of v is held, which is no parameter"):
        manifest(*boxes, ("master", "v", ((0, 1),))).check_complete()


def export_in_vain(folder: str) -> None:
    engine = minizero.initialize(model=make("toy"), config=settings(1, 2))[0]
    engine.save_16bit_model(folder)


def test_an_export_that_fails_is_an_error_on_every_rank(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DistributedError, match="rank 0: .*Error") as caught:
        run_distributed(export_in_vain, 2, str(tmp_path / "file"))
    assert len(caught.value.failures) == 2


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
