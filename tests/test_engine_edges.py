"""What scripts do at the edges: partial windows, failing forwards, models used again, DeepSpeed's rarer arguments."""

from __future__ import annotations

import argparse
import gc
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import DistributedError, run_distributed
from torch import nn
from toys import Toy, batches, make, train_plainly
from training import micro_batches, relative_error, settings, train, whole_weights

import minizero
from minizero.zero.policy import Policy

# ---- windows ----


def flush_a_partial_window(stage: int) -> tuple[float, int, int]:
    """Three of four micro-batches, then the end of the data."""
    engine, *_ = minizero.initialize(model=make("toy"), config=settings(stage, 2, 4))
    parts = micro_batches(*batches(1)[0], 4)
    data = iter(parts[:3])
    with pytest.raises(StopIteration):
        engine.train_batch(data)
    with pytest.raises(RuntimeError, match="3 micro-batches already in the window: call engine.flush"):
        engine.train_batch(iter(parts))
    engine.flush()
    engine.flush()  # an empty window is nothing to do
    return engine.get_global_grad_norm(), engine.global_steps, engine.global_samples


def test_a_partial_window_is_the_mean_over_what_there_was():
    model = make("toy")
    tokens, labels = batches(1)[0]
    model(tokens[:12], labels[:12]).backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1e9))
    for stage in (0, 2, 3):
        found, steps, samples = run_distributed(flush_a_partial_window, 2, stage)[0]
        assert found == pytest.approx(norm, rel=1e-6)
        assert (steps, samples) == (1, 12)


class FailsInEval(Toy):
    def forward(self, tokens, labels):
        if not self.training:
            raise KeyError("on purpose")
        return super().forward(tokens, labels)


def fail_between_micro_batches(stage: int) -> float:
    torch.manual_seed(0)
    engine, *_ = minizero.initialize(model=FailsInEval(), config=settings(stage, 2, 2))
    first, second = micro_batches(*batches(1)[0], 2)
    engine.backward(engine(*first))
    engine.step()
    with pytest.raises(KeyError):
        engine.eval_batch(iter([first, second]))
    assert engine.module.training  # as it was before
    engine.backward(engine(*second))
    engine.step()
    return engine.get_global_grad_norm()


def test_a_forward_that_fails_costs_no_gradients():
    expected = run_distributed(train, 2, "toy", 0, 1, 2)[0].norms[0]
    for stage in (0, 1, 2, 3):
        assert run_distributed(fail_between_micro_batches, 2, stage)[0] == pytest.approx(expected, rel=1e-6)


def save_between_backward_and_step(folder: str) -> None:
    engine, *_ = minizero.initialize(model=make("toy"), config=settings(2, 2))
    engine.backward(engine(*batches(1)[0]))
    engine.save_checkpoint(folder)


def test_no_checkpoint_before_the_step(tmp_path):
    with pytest.raises(DistributedError, match="in the middle of an accumulation window") as caught:
        run_distributed(save_between_backward_and_step, 2, str(tmp_path))
    assert len(caught.value.failures) == 2


def load_with_gradients_held(folder: str) -> list[float]:
    engine, *_ = minizero.initialize(model=make("toy"), config=settings(1, 2))
    data = batches(3)
    engine.train_batch(iter([data[0]]))
    engine.save_checkpoint(folder)
    losses = [float(engine.train_batch(iter([data[1]])))]
    engine.backward(engine(*data[2]))  # never stepped with
    engine.load_checkpoint(folder)
    return [*losses, float(engine.train_batch(iter([data[1]]))), engine.get_global_grad_norm()]


def test_loading_drops_gradients_from_before(tmp_path):
    first, again, norm = run_distributed(load_with_gradients_held, 2, str(tmp_path))[0]
    assert first == again
    assert norm == pytest.approx(run_distributed(train, 2, "toy", 0, 2)[0].norms[1], rel=0.5)


def plain_backward(stage: int) -> None:
    engine, *_ = minizero.initialize(model=make("toy"), config=settings(stage, 2))
    engine(*batches(1)[0]).backward()
    engine.step()


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_loss_backward_is_refused_by_name(stage):
    with pytest.raises(DistributedError, match=r"engine\.backward\(loss\)"):
        run_distributed(plain_backward, 2, stage)


def nested_no_sync() -> list[bool]:
    engine, *_ = minizero.initialize(model=make("toy"), config=settings(2, 1))
    with engine.no_sync():
        with engine.no_sync():
            pass
        inside = engine._synchronize
    return [inside, engine._synchronize]


def test_no_sync_nests():
    assert run_distributed(nested_no_sync, 1)[0] == [False, True]


def scaled_before(stage: int, **zero) -> tuple[list[float], list[float]]:
    report = train("toy", stage, 3, 2, zero={"stage": stage, **zero})
    return report.losses, report.norms


@pytest.mark.parametrize("zero", ({"prescale_gradients": True}, {"gradient_predivide_factor": 3.0}))
def test_dividing_before_the_reduction_changes_rounding_only(zero):
    losses, norms, _ = train_plainly("toy", 3)
    for stage in (0, 3):
        found = run_distributed(scaled_before, 4, stage, **zero)[0]
        assert relative_error(found[0], losses) < 1e-6 and relative_error(found[1], norms) < 1e-6


def tiny_gradients() -> list[float]:
    """How far weights move by gradients that fp16 holds only while they are scaled up."""
    model = nn.Sequential(nn.Linear(16, 4, bias=False))
    config = settings(1, 2, precision="fp16", loss_scale={"initial_power": 16}, optimizer={"type": "SGD", "lr": 1e4})
    config.zero.accumulation_dtype = "fp16"
    config.train.gradient_clipping = 0.0
    config.optimizer.weight_decay = 0.0
    engine, sharded, *_ = minizero.initialize(model=model, config=config)
    before = [piece.detach().clone() for piece, *_ in sharded.slices]
    engine.backward(engine(torch.ones(1, 16)).float().mean() * 1e-7)
    engine.step()
    moved = [old - piece.detach() for old, (piece, *_) in zip(before, sharded.slices, strict=True)]
    return torch.cat(moved).tolist()


def test_gradients_are_unscaled_in_fp32():
    for moved in run_distributed(tiny_gradients, 2):
        assert moved == pytest.approx([1e4 * 1e-7 / 4] * len(moved), rel=1e-2)


def test_what_divides_before_the_reduction():
    cpu = torch.device("cpu")
    for zero, wanted in (({"prescale_gradients": True}, 4.0), ({"gradient_predivide_factor": 3.0}, 3.0), ({}, 1.0)):
        assert Policy.from_config(minizero.Config(zero=zero), cpu, 4).predivide == wanted


# ---- the data loader ----


def loader_after_resume(folder: str, resumed: bool) -> list[float]:
    data = [(tokens, labels) for tokens, labels in zip(*batches(1)[0], strict=True)]
    engine, _, loader, _ = minizero.initialize(
        model=make("toy"), training_data=data, config=settings(1, 2, 1, train={"micro_batch_size": 2})
    )
    assert loader is not None
    if resumed:
        engine.load_checkpoint(folder)
        return [*(float(engine.train_batch()) for _ in range(6)), float(torch.rand(()))]
    losses = []
    for step in range(12):  # three epochs of four batches
        losses.append(float(engine.train_batch()))
        if step == 5:
            engine.save_checkpoint(folder)
    return [*losses[6:], float(torch.rand(()))]


def test_a_resumed_loader_goes_on_where_it_was(tmp_path):
    """And leaves the rank's random state as it is: torch's loader draws from what it is given at every epoch."""
    whole = run_distributed(loader_after_resume, 2, str(tmp_path), False)[0]
    assert run_distributed(loader_after_resume, 2, str(tmp_path), True)[0] == whole


# ---- one model, one engine ----


def use_twice(stage: int) -> bool:
    model = make("toy")
    engine = minizero.initialize(model=model, config=settings(stage, 2))[0]
    with pytest.raises(ValueError, match="has an engine already"):
        minizero.initialize(model=model, config=settings(stage, 2))
    engine.destroy()
    if stage < 3:
        engine = minizero.initialize(model=model, config=settings(stage, 2))[0]
        engine.train_batch(iter([batches(1)[0]]))
    gone = weakref.ref(model)
    del model, engine
    gc.collect()
    return gone() is None


@pytest.mark.parametrize("stage", (1, 3))
def test_a_model_has_one_engine_and_is_freed_with_it(stage):
    assert run_distributed(use_twice, 2, stage) == [True, True]


def optimizer_methods() -> None:
    _, optimizer, *_ = minizero.initialize(model=make("toy"), config=settings(1, 1))
    for call in (optimizer.state_dict, lambda: optimizer.load_state_dict({}), lambda: optimizer.add_param_group({})):
        with pytest.raises(RuntimeError):
            call()


def test_torch_optimizer_methods_that_cannot_hold_are_refused():
    run_distributed(optimizer_methods, 1)


def integer_parameter() -> bool:
    model = make("toy")
    model.codes = nn.Parameter(torch.arange(7, dtype=torch.uint8), requires_grad=False)
    minizero.initialize(model=model, config=settings(3, 2))
    return torch.equal(whole_weights(model)["codes"], torch.arange(7, dtype=torch.uint8))


def test_frozen_integers_are_sharded_too():
    assert run_distributed(integer_parameter, 2) == [True, True]


# ---- meta devices ----


class Buffers(nn.Module):
    def __init__(self, fills: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.fills = fills

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        if self.fills:
            self.mask.fill_(True)


def buffers_on_meta(fills: bool) -> list[bool]:
    with minizero.zero.Init():
        model = nn.Sequential(Buffers(fills), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no values yet"), minizero.zero.GatheredParameters([model[0].weight]):
        pass
    minizero.initialize(model=model, config=settings(3, 2))
    return model[0].mask.tolist()


def test_a_buffer_that_nobody_fills_is_named():
    assert run_distributed(buffers_on_meta, 2, True) == [[True] * 3] * 2
    with pytest.raises(DistributedError, match="Buffers '0': its initializer leaves 'mask' unset") as caught:
        run_distributed(buffers_on_meta, 2, False)
    assert len(caught.value.failures) == 2


# ---- DeepSpeed's names ----


def test_deepspeed_scripts_bring_their_own_local_rank():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    given = minizero.add_config_arguments(parser).parse_args(["--deepspeed", "--deepspeed_config", "x.json"])
    assert (given.deepspeed, given.deepspeed_config, given.deepscale) == (True, "x.json", False)


def deepspeed_arguments() -> dict:
    minizero.init_distributed(
        "gloo", auto_mpi_discovery=False, verbose=False, timeout=timedelta(minutes=1), dist_init_required=True
    )
    with pytest.raises(ValueError, match="torchrun"):
        minizero.init_distributed(rank=0)
    engine, *_ = minizero.initialize(
        model=make("toy"), config={"train_batch_size": 8, "zero_optimization": {"stage": 2}}
    )
    assert engine.config["zero_optimization"]["stage"] == 2 and engine.config["gradient_accumulation_steps"] == 1
    assert engine.local_rank == dist.get_rank()
    assert [name for name, _ in engine.named_parameters()][0] in engine.state_dict()
    engine.backward(engine(*batches(1)[0]))
    engine.step(lr_kwargs=None)
    for wrong in (
        lambda: engine.step(lr_kwargs={"epoch": 1}),
        lambda: engine.save_checkpoint("x", exclude_frozen_parameters=True),
    ):
        with pytest.raises(ValueError, match="not available"):
            wrong()
    with pytest.raises(ValueError, match="mesh_param"):
        minizero.initialize(model=make("toy"), config={"train_batch_size": 8}, mesh_param=(2, 1))
    return engine.config


def test_rarer_arguments_are_taken_or_refused():
    assert run_distributed(deepspeed_arguments, 2)[0]["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize("key", ("transport", "collectives", "tp"))
def test_ranks_that_differ_in_how_they_talk_are_told(key):
    with pytest.raises(DistributedError, match=rf"rank 1: \w+\.{key} = ") as caught:
        run_distributed(different_talk, 2, key, timeout=20)
    assert len(caught.value.failures) == 2


def different_talk(key: str) -> None:
    odd = dist.get_rank() == 1
    changes = {
        "transport": {"dist": {"transport": "memory" if odd else "messages"}},
        "collectives": {"debug": {"collectives": odd}},
        "tp": {"parallel": {"tp": 2 if odd else 1}},
    }
    minizero.initialize(model=make("toy"), config=settings(1, 2, **changes[key]))


def test_settings_without_effect_are_said():
    from minizero.config.effects import without_effect

    config = settings(1, 2, loss_scale={"window": 5}, zero={"stage": 1, "prefetch": False})
    assert [line.split(" has")[0] for line in without_effect(config)] == ["loss_scale.window", "zero.prefetch"]
    assert not list(without_effect(settings(3, 2, precision="fp16", zero={"stage": 3, "prefetch": False})))
    pipelined = settings(0, 2, pipeline={"schedule": "zbv", "microbatches": 1})
    assert [line.split(" has")[0] for line in without_effect(pipelined)] == ["pipeline.schedule"]
    stretched = settings(0, 2, model={"rope_scaling": {"factor": 2.0}})
    assert [line.split(" has")[0] for line in without_effect(stretched)] == ["model.rope_scaling.factor"]
