"""The engine's contract: DeepSpeed's semantics, exact accumulation, skipped steps, errors."""

from __future__ import annotations

import os
import re
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from faults import Job, build, micro_batches
from harness import DistributedError, run_distributed
from torch import nn
from torch.nn import functional as F
from toys import LENGTH, VOCAB, Toy, batches, make
from training import relative_error, settings, train, whole_weights

import minizero

# ---- DeepSpeed's loop ----


def deepspeed_script(stage: int) -> dict[str, list]:
    """A loop as DeepSpeed's users write it, accumulation 2."""
    import minizero as deepspeed

    config = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 4, "warmup_type": "linear"},
        },
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1000,
    }
    deepspeed.init_distributed()
    model = make("toy")
    engine, optimizer, _, scheduler = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    seen: dict[str, list] = {"boundary": [], "returned": [], "lr": [], "norm": []}
    for tokens, labels in batches(3):
        for micro in range(2):
            rows = slice(8 * micro + 4 * dist.get_rank(), 8 * micro + 4 * dist.get_rank() + 4)
            loss = engine(tokens[rows], labels[rows])
            returned = engine.backward(loss)
            seen["returned"].append(float(returned / loss.detach()))
            seen["boundary"].append(engine.is_gradient_accumulation_boundary())
            engine.step()
        seen["lr"].append(engine.get_lr()[0])
        seen["norm"].append(engine.get_global_grad_norm())
    seen["counters"] = [engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps]
    seen["sizes"] = [
        engine.train_batch_size(),
        engine.train_micro_batch_size_per_gpu(),
        engine.gradient_accumulation_steps(),
        engine.zero_optimization_stage(),
    ]
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
    return seen


@pytest.mark.parametrize("stage", (0, 3))
def test_a_deepspeed_script_runs_with_its_import_changed(stage):
    seen = run_distributed(deepspeed_script, 2, stage)[0]
    assert seen["boundary"] == [False, True] * 3
    assert seen["returned"] == [0.5] * 6
    assert seen["counters"] == [3, 48, 6, 0]
    assert seen["sizes"] == [16, 4, 2, stage]
    assert seen["lr"] == pytest.approx([0.0, 0.00075, 0.0015])  # the trap: iterations -1 and 0 both have the minimum
    assert len(set(seen["norm"])) == 3


NOTES_EXAMPLE = """
// deepspeed_config.json
{
  "train_batch_size": 32,
  "zero_optimization": {
    "stage": 3,
    "offload_optimizer": {"device": "cpu"}
  },
  "activation_checkpointing": {
    "partition_activations": true
  }
}
"""


def train_the_example(path: str) -> list[float]:
    engine, *_ = minizero.initialize(model=make("toy"), config=path)
    assert (engine.train_batch_size(), engine.zero_optimization_stage()) == (32, 3)
    tokens, labels = batches(1)[0]
    return [float(engine.train_batch(iter([(tokens, labels)]))) for _ in range(5)]


def test_a_deepspeed_json_with_a_comment_trains(tmp_path):
    path = tmp_path / "deepspeed_config.json"
    path.write_text(NOTES_EXAMPLE)
    losses = run_distributed(train_the_example, 2, str(path))[0]
    assert losses[-1] < losses[0]


# ---- accumulation ----


class TokenLoss(Toy):
    """Returns (sum, count) over labels that are not ignored."""

    def forward(self, tokens, labels):
        logits = self.head(self.norm(self.run_blocks(self.embed(tokens))))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), (labels != -100).sum()


def ragged_batch(step: int):
    generator = torch.Generator().manual_seed(step)
    tokens, labels = torch.randint(VOCAB, (2, 16, LENGTH), generator=generator)
    labels = labels.masked_fill(
        torch.rand(labels.shape, generator=generator) < torch.linspace(0, 0.9, 16)[:, None], -100
    )
    return tokens, labels


def train_ragged(stage: int, accumulation: int) -> tuple[list, list]:
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    engine, *_ = minizero.initialize(model=TokenLoss(), config=settings(stage, world, accumulation))
    losses, norms = [], []
    for step in range(5):
        parts = [t.view(accumulation, world, -1, LENGTH)[:, rank] for t in ragged_batch(step)]
        losses.append(float(engine.train_batch(iter(zip(*parts, strict=True)))))
        norms.append(engine.get_global_grad_norm())
    return losses, norms


def test_token_counts_make_accumulation_exact():
    torch.manual_seed(0)
    model = TokenLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    losses, norms = [], []
    for step in range(5):
        total, count = model(*ragged_batch(step))
        (total / count).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float((total / count).detach()))
    for world, stage, accumulation in ((1, 0, 4), (2, 1, 2), (2, 2, 4), (4, 3, 2)):
        found = run_distributed(train_ragged, world, stage, accumulation)[0]
        assert relative_error(found[0], losses) < 1e-6
        assert relative_error(found[1], norms) < 1e-6


def train_without_sync(stage: int) -> list:
    """Two micro-batches under no_sync, then a third one that is the boundary, by the caller's word."""
    engine, *_ = minizero.initialize(model=make("toy"), config=settings(stage, 2, 1))
    norms = []
    for tokens, labels in batches(3):
        mine = tokens[dist.get_rank() :: 2], labels[dist.get_rank() :: 2]
        with engine.no_sync():
            for part in (slice(0, 2), slice(2, 4)):
                engine.set_gradient_accumulation_boundary(False)
                engine.backward(engine(mine[0][part], mine[1][part]))
                engine.step()
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(engine(mine[0][4:], mine[1][4:]))
        engine.step()
        norms.append(engine.get_global_grad_norm())
    assert engine.global_steps == 3
    return norms


def test_no_sync_is_legal_at_every_stage():
    runs = [run_distributed(train_without_sync, 2, stage)[0] for stage in range(4)]
    assert all(run == runs[0] for run in runs)


def test_mixed_kinds_of_loss_are_refused():
    with pytest.raises(DistributedError, match="mixes mean losses"):
        run_distributed(mix_losses, 1)


def mix_losses() -> None:
    engine, *_ = minizero.initialize(model=make("toy"), config=settings(0, 1, 2))
    tokens, labels = batches(1)[0]
    engine.backward(engine(tokens, labels))
    engine.backward((engine(tokens, labels), torch.tensor(3)))


# ---- non-finite values ----


def overflow_on_one_rank(stage: int) -> dict:
    engine, *_ = minizero.initialize(
        model=make("toy"),
        config=settings(stage, 2, precision="fp16", loss_scale={"initial_power": 4, "hysteresis": 1}, scheduler=WARMUP),
    )
    tokens, labels = batches(1)[0]
    seen: dict = {"applied": [], "scale": [], "lr": []}
    for step in range(4):
        before = whole_weights(engine.module)
        loss = engine(tokens[:4], labels[:4])
        if step == 1 and dist.get_rank() == 1:
            loss = loss * 1e9
        engine.backward(loss)
        engine.step()
        after = whole_weights(engine.module)
        moved = any(not torch.equal(before[name], after[name]) for name in before)
        seen["applied"].append((engine.was_step_applied(), moved))
        seen["scale"].append(engine.loss_scale)
        seen["lr"].append(engine.get_lr()[0])
    seen["skipped"] = engine.skipped_steps
    return seen


WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-4, "warmup_num_steps": 8, "warmup_type": "linear"}}


@pytest.mark.parametrize("stage", (1, 3))
def test_an_overflow_on_one_rank_skips_the_step_on_all(stage):
    for seen in run_distributed(overflow_on_one_rank, 2, stage):
        assert seen["applied"] == [(True, True), (False, False), (True, True), (True, True)]
        assert seen["scale"] == [16.0, 8.0, 8.0, 8.0]
        assert seen["lr"][0] == seen["lr"][1] < seen["lr"][2]  # the schedule did not move
        assert seen["skipped"] == 1


def nan_loss() -> None:
    engine, *_ = minizero.initialize(model=make("toy"), config=settings(2, 2, train={"max_skipped_steps": 2}))
    tokens, labels = batches(1)[0]
    before = whole_weights(engine.module)
    for step in range(4):
        loss = engine(tokens, labels)
        engine.backward(loss * float("nan") if dist.get_rank() == 1 and step != 1 else loss)
        if step == 3:
            assert engine.skipped_steps == 2 and engine.global_steps == 3
        engine.step()
        after = whole_weights(engine.module)
        assert engine.was_step_applied() == (step == 1)
        assert all(torch.equal(before[name], after[name]) for name in before) == (step != 1)
        before = after


def test_nan_losses_are_skipped_on_every_rank_then_name_the_culprit():
    with pytest.raises(DistributedError) as caught:
        run_distributed(nan_loss, 2)
    assert len(caught.value.failures) == 2
    for text in caught.value.failures.values():
        assert re.search(r"2 steps in a row: the loss is nan on data-parallel rank \[1\]; first such unit", text)


def nan_gradient(stage: int, max_skips: int) -> None:
    """From the second rank, in a unit that the first one may keep."""
    engine, *_ = minizero.initialize(
        model=make("toy"), config=settings(stage, 2, train={"max_skipped_steps": max_skips})
    )
    if dist.get_rank() == 1:
        engine.module.blocks[1].norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    for _ in range(max_skips):
        engine.train_batch(iter([batches(1)[0]]))


@pytest.mark.parametrize(("stage", "max_skips"), ((0, 2), (3, 1)))
def test_a_gradient_that_is_not_finite_names_the_rank_that_computed_it(stage, max_skips):
    with pytest.raises(DistributedError, match=r"first such unit: blocks\.1, on data-parallel rank 1\."):
        run_distributed(nan_gradient, 2, stage, max_skips)


def infinite_copy() -> bool:
    """The second rank's copy of what tensor-parallel ranks hold alike, and of which the norm counts the first's."""
    job = Job("", model="llama", tp=2)
    engine = build(job)
    if dist.get_rank() == 1:
        engine.module.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    engine.train_batch(micro_batches(job, engine, 0))
    return engine.was_step_applied()


def test_a_copy_that_is_not_finite_skips_the_step_too():
    assert run_distributed(infinite_copy, 2) == [False, False]


class BadUnit(nn.Module):
    """Finite loss, infinite gradient in one block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == 1:
                x = x + torch.sqrt(block.weight.sum() * 0.0)  # d sqrt at 0 is infinite
        return x.mean()


def infinite_gradients() -> None:
    torch.manual_seed(0)
    engine, *_ = minizero.initialize(model=BadUnit(), config=settings(2, 2))
    for _ in range(5):
        engine.backward(engine(torch.ones(2, 3)))
        engine.step()


def test_gradients_that_stay_infinite_name_the_unit():
    with pytest.raises(DistributedError, match=r"not finite 3 steps in a row: first such unit: blocks\.1, on"):
        run_distributed(infinite_gradients, 2)


# ---- whole parameters ----


def borrow_whole(stage: int) -> bool:
    model = make("toy")
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine, *_ = minizero.initialize(model=model, config=settings(stage, 2))
    tokens, labels = batches(1)[0]
    try:
        with minizero.unsharded(model):
            assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
            model.state_dict()
            raise KeyError("on purpose")
    except KeyError:
        pass
    assert model.blocks[0].up.weight.isnan().all()
    with pytest.raises(RuntimeError, match="save_checkpoint"):
        model.state_dict()
    with pytest.raises(RuntimeError):
        model.blocks[0].up.weight.data.add_(1.0)  # a write into a sharded parameter
    with minizero.zero.GatheredParameters([model.blocks[0].up.weight], modifier_rank=0):
        if dist.get_rank() == 0:
            model.blocks[0].up.weight.data.fill_(0.25)
    with minizero.unsharded(model):
        assert (model.blocks[0].up.weight == 0.25).all()
    with torch.no_grad():
        model.eval()
        first = float(engine(tokens, labels))
    try:
        engine(tokens, labels[:, :2])  # fails inside the loss
    except ValueError:
        pass
    assert {unit.state.name for unit in engine.runtime.units} == {"SHARDED"}
    engine.train_batch(iter([(tokens, labels)]))
    with torch.no_grad():
        return float(engine(tokens, labels)) < first


def test_whole_parameters_for_a_while():
    assert run_distributed(borrow_whole, 2, 3) == [True, True]


def build_on_meta(stage: int) -> dict[str, torch.Tensor]:
    with minizero.zero.Init():
        model = Toy()
    assert model.embed.weight.is_meta
    minizero.initialize(model=model, config=settings(stage, dist.get_world_size()))
    assert model.head.weight is model.embed.weight
    return whole_weights(model)


def test_initialization_does_not_depend_on_the_layout():
    reference = run_distributed(build_on_meta, 1, 0)[0]
    assert all(value.isfinite().all() and value.numel() for value in reference.values())
    assert not torch.equal(reference["blocks.0.up.weight"], reference["blocks.1.up.weight"])
    for world, stage in ((2, 1), (4, 3)):
        for weights in run_distributed(build_on_meta, world, stage):
            assert all(torch.equal(weights[name], value) for name, value in reference.items())


def model_without_initializer() -> None:
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with minizero.zero.Init():
        model = nn.Sequential(Bare(), nn.Linear(3, 3))
    minizero.initialize(model=model, config=settings(3, 2))


# ---- faults ----


class Branches(Toy):
    """Ranks take different branches."""

    def run_blocks(self, x):
        order = (0, 1, 2) if dist.get_rank() == 0 else (0, 2)
        for index in order:
            x = self.blocks[index](x)
        return x


def train_branches(stage: int, prefetch: bool) -> list[float]:
    torch.manual_seed(0)
    config = settings(stage, 2, zero={"stage": stage, "prefetch": prefetch}, dist={"timeout": 5.0})
    engine, *_ = minizero.initialize(model=Branches(), config=config)
    return [float(engine.train_batch(iter([batch]))) for batch in batches(4)]


# Without prefetch a rank that skips a unit joins its gather only because it is about to reduce it.
@pytest.mark.parametrize(("stage", "prefetch"), ((0, True), (2, True), (3, True), (3, False)))
def test_ranks_that_take_different_branches_do_not_hang(stage, prefetch):
    losses = run_distributed(train_branches, 2, stage, prefetch, timeout=30)
    assert losses[0] == losses[1] == run_distributed(train_branches, 2, 1, True)[0]


def swap_collectives() -> None:
    """Same shapes, swapped order: torch's gloo alone returns wrong sums here."""
    engine, *_ = minizero.initialize(model=make("toy"), config=settings(0, 2, debug={"collectives": True}))
    first, second = engine.runtime.units[1:3]
    for unit in (first, second) if dist.get_rank() == 0 else (second, first):
        unit.reduce()
        unit.finish_reduce()


def test_swapped_collectives_are_named_on_every_rank():
    with pytest.raises(DistributedError) as caught:
        run_distributed(swap_collectives, 2)
    assert len(caught.value.failures) == 2
    for text in caught.value.failures.values():
        assert "reduce_scatter of blocks.0" in text and "reduce_scatter of blocks.1" in text
        assert "test_engine.py" in text


class Uneven(Toy):
    """One rank uses a block twice."""

    def run_blocks(self, x):
        for index in (0, 1, 1, 2) if dist.get_rank() == 0 else (0, 1, 2):
            x = self.blocks[index](x)
        return x


def train_unevenly(check: bool) -> None:
    config = settings(3, 2, debug={"collectives": check}, dist={"timeout": 1.5})
    engine, *_ = minizero.initialize(model=Uneven(), config=config)
    engine.train_batch(iter([batches(1)[0]]))


def test_a_unit_used_more_often_on_one_rank_is_named():
    with pytest.raises(DistributedError, match=r"all_gather of blocks\.\d in forward"):
        run_distributed(train_unevenly, 2, True)
    with pytest.raises(DistributedError, match=r"all_gather of blocks\.\d \(forward, axis dp, #\d+\) failed") as caught:
        run_distributed(train_unevenly, 2, False)
    for rank in (0, 1):  # each is told where the other one is
        assert re.search(rf"  rank {1 - rank} in step 0 waits for \w+ of [\w. ]+\(", caught.value.failures[rank])


def different_settings() -> None:
    lr = 1e-3 if dist.get_rank() == 0 else 2e-3
    minizero.initialize(model=make("toy"), config=settings(1, 2, optimizer={"lr": lr}))


def nothing_to_train() -> None:
    minizero.initialize(model=make("toy").requires_grad_(False), config=settings(1, 2))


def wrong_optimizer() -> None:
    model = make("toy")
    minizero.initialize(model=model, optimizer=torch.optim.LBFGS(model.parameters()), config=settings(1, 2))


@pytest.mark.parametrize(
    ("function", "message"),
    (
        (different_settings, r"rank 1: optimizer.lr = 0.002"),
        (nothing_to_train, "no trainable parameter"),
        (wrong_optimizer, "LBFGS is not known to be element-wise"),
        (model_without_initializer, r"Bare '0' holds parameters on the meta device"),
    ),
)
def test_bad_input_is_one_clear_error_on_every_rank(function, message):
    with pytest.raises(DistributedError, match=message) as caught:
        run_distributed(function, 2, timeout=20)
    assert len(caught.value.failures) == 2
    assert all(re.search(message, text) for text in caught.value.failures.values())


def die() -> None:
    engine, *_ = minizero.initialize(model=make("toy"), config=settings(2, 2))
    for step, (tokens, labels) in enumerate(batches(3)):
        if step == 1 and dist.get_rank() == 1:
            os._exit(7)
        engine.train_batch(iter([(tokens, labels)]))


def test_a_dead_rank_is_an_error_on_the_others_within_seconds():
    with pytest.raises(DistributedError, match=r"rank 0: .* failed after 0\.\d s: a peer died") as caught:
        run_distributed(die, 2, timeout=20)
    assert "CollectiveError" in caught.value.failures[0]


def stall() -> None:
    engine, *_ = minizero.initialize(model=make("toy"), config=settings(3, 2, dist={"timeout": 1.0}))
    if dist.get_rank() == 0:
        engine(*batches(1)[0])
    else:
        time.sleep(4)


def test_a_rank_that_never_comes_is_an_error_within_the_timeout():
    with pytest.raises(
        DistributedError, match=r"rank 0: all_gather of root \(forward, axis dp, #\d+\) failed after \d"
    ) as caught:
        run_distributed(stall, 2, timeout=20)
    assert "rank 1 does not answer: it died, or computes something else" in caught.value.failures[0]


def fail_with_gathers_under_way() -> float:
    """Seconds until the first rank hears that a collective failed, with two others begun that nobody joins."""
    engine, *_ = minizero.initialize(model=make("toy"), config=settings(3, 2, dist={"timeout": 1.5}))
    began = time.monotonic()
    if dist.get_rank() == 0:
        for unit in engine.runtime.units[1:3]:
            unit.gather()
        with mock.patch.object(engine, "_call", side_effect=minizero.CollectiveError("the first to fail")):
            with pytest.raises(minizero.CollectiveError, match="the first to fail"):
                engine(*batches(1)[0])
    return time.monotonic() - began


def test_what_is_under_way_when_a_collective_fails_is_not_waited_for():
    assert run_distributed(fail_with_gathers_under_way, 2)[0] < 1.0


# ---- optimizers and schedules of the user's own ----


@pytest.mark.parametrize("name", ("SGD", "Adagrad", "Lion", "NAdam", "RMSprop", "Adam"))
def test_every_optimizer_trains_alike_in_one_and_four_slices(name):
    one = run_distributed(train, 1, "toy", 0, 4, optimizer={"type": name, "lr": 1e-3, "weight_decay": 0.01})[0]
    four = run_distributed(train, 4, "toy", 3, 4, optimizer={"type": name, "lr": 1e-3, "weight_decay": 0.01})[0]
    # Lion moves by the sign of a sum, which rounding flips for elements near zero
    bound = 1e-3 if name == "Lion" else 1e-6
    assert relative_error(four.losses, one.losses) < bound


def client_objects() -> list[float]:
    model = make("toy")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=3e-3, weight_decay=0.1
    )
    engine, sharded, _, scheduler = minizero.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5),
        config=settings(3, dist.get_world_size()),
    )
    losses = [float(engine.train_batch(iter([b]))) for b in batches(4)]
    assert engine.get_lr() == [3e-3 / 4] * 2 and scheduler.get_last_lr() == engine.get_lr()
    return losses


def test_a_users_optimizer_and_scheduler():
    assert run_distributed(client_objects, 1)[0] == pytest.approx(run_distributed(client_objects, 2)[0], rel=1e-6)
