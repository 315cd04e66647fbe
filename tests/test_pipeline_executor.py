"""The executor keeps what the schedule counts, sends what the closed form says, and fails on all ranks at once."""

from __future__ import annotations

import os
import re
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import DistributedError, run_distributed
from test_pipeline_engine import LENGTH, agree, batches, make, plainly, settings
from torch import Tensor, nn
from torch.nn import functional as F
from training import refused_everywhere, relative_error, run_steps

import minizero
from minizero import LayerSpec, PipelineModule
from minizero.parallel.pipeline.actions import Action, Kind, write_csv
from minizero.parallel.pipeline.schedules import build

WIDTH = 12


class Block(nn.Module):
    """Saves the same bytes wherever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 17), nn.Linear(17, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def loss_fn(x: Tensor, target: Tensor) -> Tensor:
    return (x * target).sum() / len(x)


def engine_of_blocks(pp: int, schedule: str, counts: int, layers: int, **pipeline: Any) -> Any:
    model = PipelineModule([LayerSpec(Block) for _ in range(layers)], loss_fn=loss_fn, partition_method="uniform")
    config = minizero.Config(
        parallel={"pp": pp},
        pipeline={"schedule": schedule, "microbatches": counts, **pipeline},
        train={"micro_batch_size": 2},
        dist={"timeout": 5.0},
    )
    return minizero.initialize(model=model, config=config)[0]


def microbatches(counts: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(2, 5, WIDTH, generator=generator) for _ in range(2)) for _ in range(counts)]


# ---- activations ----


class Alive:
    """Bytes of what autograd has saved and not let go of, without parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.saved: dict[int, tuple[Any, int, int]] = {}  # by tensor object: a weak reference, its storage, its bytes

    def pack(self, tensor: Tensor) -> Tensor:
        held = tensor.detach()  # an object of the graph's own: who else refers to `tensor` does not count
        parameters = {p.untyped_storage()._cdata for p in self.model.parameters()}
        if tensor.untyped_storage()._cdata not in parameters:
            storage = tensor.untyped_storage()
            self.saved[id(held)] = weakref.ref(held), storage._cdata, storage.nbytes()
        return held

    def total(self) -> int:
        self.saved = {key: found for key, found in self.saved.items() if found[0]() is not None}
        return sum({storage: nbytes for _, storage, nbytes in self.saved.values()}.values())


def run_and_watch(pp: int, schedule: str, counts: int) -> tuple[list[int], int, int, list[str]]:
    """(bytes kept after each action, most passes held, passes held at the end, actions)."""
    chunks = 2 if schedule in ("interleaved", "zbv", "dualpipe_v") else 1
    engine = engine_of_blocks(pp, schedule, counts, 2 * pp * chunks)
    executor = engine.pipeline.executor
    alive, kept = Alive(engine.module), []
    plain = executor._act

    def act(*arguments: Any) -> None:
        plain(*arguments)
        kept.append(alive.total())

    executor._act = act
    with torch.autograd.graph.saved_tensors_hooks(alive.pack, lambda tensor: tensor):
        engine.train_batch(iter(microbatches(counts)))
    return kept, executor.in_flight, len(executor._passes), [str(event.action) for event in executor.events]


@pytest.mark.parametrize(
    "schedule", ("gpipe", "one_f_one_b", "interleaved", "zb_h1", "zb_h2", "zbv", "dualpipe_v", "zb_auto")
)
def test_activations_live_as_long_as_the_schedule_says(schedule):
    pp, counts = 3, 7
    planned = build(schedule, pp, counts)
    for rank, (kept, in_flight, left, actions) in enumerate(run_distributed(run_and_watch, pp, pp, schedule, counts)):
        assert tuple(actions) == planned.order[rank]
        assert in_flight == planned.peak_in_flight[rank] and left == 0
        bytes_of: dict[int, int] = {}  # of a pass, by chunk: from the first F of each
        bytes_after_b: dict[int, int] = {}  # the loss may be gone then
        held: dict[tuple[int, int], int] = {}
        for text, now in zip(actions, kept, strict=True):
            action = Action.parse(text)
            if action.kind is Kind.F:
                bytes_of.setdefault(action.chunk, now - sum(held.values()))
                held[action.chunk, action.microbatch] = bytes_of[action.chunk]
            elif action.kind in (Kind.BW, Kind.W):
                del held[action.chunk, action.microbatch]
            else:
                rest = now - sum(held.values()) + held[action.chunk, action.microbatch]
                held[action.chunk, action.microbatch] = bytes_after_b.setdefault(action.chunk, rest)
                is_last = planned.virtual_stages[rank, action.chunk] == planned.stages - 1
                assert rest < bytes_of[action.chunk] if is_last else rest == bytes_of[action.chunk]
            assert now == sum(held.values()), (rank, text)
        assert min(bytes_of.values()) > 2 * 5 * WIDTH * 4 and kept[-1] == 0


# ---- bytes ----


def sent(pp: int, schedule: str, counts: int, more: dict[str, Any]) -> tuple[int, int, int]:
    """(payload, wire, calls) of sends in one step after the first."""
    engine, *_ = minizero.initialize(model=make("llama", 9), config=settings_of(pp, schedule, counts, more))
    engine.train_batch(iter(split(engine, counts)))
    engine.ledger.reset()
    engine.train_batch(iter(split(engine, counts)))
    total = engine.ledger.total(axis="pp", operation="send")
    return total.payload, total.wire, total.calls


def settings_of(pp: int, schedule: str, counts: int, more: dict[str, Any]) -> minizero.Config:
    return settings(counts, 8, pp, schedule, **more)


def split(engine: Any, counts: int) -> list[dict[str, Tensor]]:
    (batch,) = batches(1, 8)
    parts = {k: v.view(counts, engine.dp_size, -1, LENGTH)[:, engine.dp_rank] for k, v in batch.items()}
    return [{key: part[index] for key, part in parts.items()} for index in range(counts)]


@pytest.mark.parametrize(
    ("pp", "schedule", "world", "more", "length"),
    (
        (2, "one_f_one_b", 2, {}, 15),
        (4, "interleaved", 4, {}, 15),
        (4, "zbv", 4, {}, 15),
        (2, "zb_h1", 4, {}, 15),  # two data-parallel ranks
        (2, "gpipe", 4, {"parallel": {"tp": 2, "sequence": True}}, None),
    ),
)
def test_bytes_sent_are_the_closed_form(pp, schedule, world, more, length):
    """b s h bytes per microbatch for each border between ranks, once forward and once backward."""
    counts = 4
    planned = build(schedule, pp, counts)
    for rank, (payload, wire, calls) in enumerate(run_distributed(sent, world, pp, schedule, counts, more)):
        place = rank // (world // pp)
        borders = 0
        for one, other in zip(planned.placement, planned.placement[1:], strict=False):
            if one[0] != other[0]:
                borders += (one[0] == place) + (other[0] == place)  # activations from one, gradients from the other
        samples = 8 // counts // (2 if world > pp and length else 1)
        positions = length or (8 if rank % 2 == 0 else 7)  # sequence parallel: a rank's part
        assert payload == borders * counts * samples * positions * 24 * 4
        assert calls == borders * counts and wire == payload + calls * 128 * 8


def reduced(stage: int, gather: str, accumulation: str) -> tuple[list[tuple[int, int]], dict[str, int], dict[str, int]]:
    """((actions before, modules) of each early reduction, gathers and reductions per block in one step)."""
    more = {"zero": {"stage": stage, "accumulation": accumulation}, "pipeline": {"gather": gather}}
    engine, *_ = minizero.initialize(model=make("llama", 4), config=settings(4, 8, 2, "interleaved", **more))
    executor, early = engine.pipeline.executor, []
    plain = executor.storage.reduce_early

    def reduce_early(modules: Any) -> None:
        early.append((len(executor.events), len(modules)))
        plain(modules)

    engine.train_batch(iter(split(engine, 4)))
    executor.storage.reduce_early = reduce_early
    engine.ledger.reset()
    engine.train_batch(iter(split(engine, 4)))
    calls = {
        operation: [
            engine.ledger.total(axis="dp", operation=operation, unit=unit.name).calls
            for unit in engine.runtime.units[1:]
        ]
        for operation in ("all_gather", "reduce_scatter")
    }
    return early, *calls.values()


@pytest.mark.parametrize(
    ("stage", "gather", "accumulation", "gathers", "reductions"),
    ((3, "step", "auto", 1, 1), (3, "microbatch", "auto", 8, 1), (2, "step", "sharded", 1, 4)),
)
def test_parameters_are_gathered_and_gradients_reduced_as_often_as_asked(
    stage, gather, accumulation, gathers, reductions
):
    """Two chunks of one block; stage 2's one gather is that of the updated parameters."""
    for early, gathered, scattered in run_distributed(reduced, 4, stage, gather, accumulation):
        assert gathered == [gathers] * 2 and scattered == [reductions] * 2
        actions = 16  # 2 chunks x 4 microbatches x F, BW
        assert len(early) == 2 * reductions
        first = early[reductions - 1] if reductions > 1 else early[0]
        assert first[0] < actions and early[-1][0] == actions  # the second chunk's, as soon as it is through


def lists(kind: str, transport: str) -> Any:
    engine, *_ = minizero.initialize(
        model=make("llama", 9, dtype=torch.bfloat16 if kind == "bf16" else torch.float32),
        config=settings(3, 6, 4, "zbv", dist={"timeout": 20.0, "transport": transport}),
    )
    assert type(engine.pipeline.executor.links.way).__name__ == (
        "LinkMessages" if transport == "messages" else "NeighbourLinks"
    )
    return run_steps(engine, batches(3, 6), 3)


def test_messages_carry_what_memory_does():
    for kind in ("fp32", "bf16"):
        assert run_distributed(lists, 4, kind, "messages") == run_distributed(lists, 4, kind, "memory")


# ---- trouble ----


class Troubled(Block):
    """Does as it is told in the third forward of this rank."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind, self.calls = kind, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        if self.calls == 3:
            if self.kind == "raise":
                raise ArithmeticError("the third forward")
            if self.kind == "die":
                os._exit(7)
            if self.kind == "stall":
                time.sleep(7)
        if self.kind == "dict":
            return {"x": x}
        if self.kind == "complex":
            return x.to(torch.complex64)
        return super().forward(x)


def troubled(kind: str, rank: int, transport: str = "auto") -> None:
    layers = [LayerSpec(Troubled, kind if place == rank else "") for place in range(dist.get_world_size())]
    model = PipelineModule(layers, loss_fn=loss_fn, partition_method="uniform")
    config = minizero.Config(
        parallel={"pp": dist.get_world_size()},
        pipeline={"microbatches": 4},
        train={"micro_batch_size": 2},
        dist={"timeout": 3.0, "transport": transport},
    )
    engine, *_ = minizero.initialize(model=model, config=config)
    before = [p.detach().clone() for p in engine.module.parameters()]
    began = time.monotonic()
    try:
        engine.train_batch(iter(microbatches(4)))
    except Exception as error:
        assert time.monotonic() - began < 12
        assert all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
        with pytest.raises(RuntimeError, match="broke off before"):
            engine.train_batch(iter(microbatches(4)))
        raise error


SAYS = {
    "raise": "failed in action F2 .microbatch 2, virtual stage {rank}.: ArithmeticError: the third forward",
    "dict": "failed in action F0 .*ValueError: a pipeline stage returned a dict; legal: a tensor, or a flat tuple",
    "complex": "failed in action F0 .*torch.complex64 .*cannot be sent; legal",
}


@pytest.mark.parametrize(
    ("kind", "rank", "transport"),
    (  # what the last stage returns is given to the loss, not sent
        *(("raise", rank, way) for rank, way in ((0, "memory"), (1, "memory"), (1, "messages"), (3, "messages"))),
        *(("dict", 1, "memory"), ("dict", 2, "messages"), ("complex", 0, "memory"), ("complex", 1, "messages")),
    ),
)
def test_every_rank_says_where_a_stage_failed(kind, rank, transport):
    with pytest.raises(DistributedError) as caught:
        run_distributed(troubled, 4, kind, rank, transport, timeout=30)
    says = SAYS[kind].format(rank=rank)
    own, others = says.partition(": ")[2], says
    for number, text in caught.value.failures.items():
        assert number == rank or re.search(others, text), text
    assert len(caught.value.failures) == 4 and re.search(own, caught.value.failures[rank])


@pytest.mark.parametrize("transport", ("memory", "messages"))
@pytest.mark.parametrize("kind", ("die", "stall"))
def test_a_peer_that_dies_or_stalls_is_named(kind, transport):
    with pytest.raises(DistributedError) as caught:
        run_distributed(troubled, 3, kind, 1, transport, timeout=30)
    for number in (0, 2):
        text = caught.value.failures[number]
        assert "CollectiveError" in text and "from rank 1" in text, text
        assert "for BW0" in text or "for F2" in text, text  # what it waited for


def alone_in_error(what: str) -> None:
    engine = engine_of_blocks(2, "one_f_one_b", 2, 4)
    batch = microbatches(1)[0]
    if what == "forward":
        engine(*batch)
    elif what == "backward":
        engine.backward(torch.ones((), requires_grad=True))
    elif what == "step":
        engine.step()
    elif what == "no_sync":
        engine.no_sync().__enter__()
    elif what == "boundary":
        engine.set_gradient_accumulation_boundary(True)
    elif what == "module":
        engine.module(*batch)
    elif what == "decoder":
        engine, *_ = minizero.initialize(model=make("llama", 3), config=settings(2, 2, 2, "one_f_one_b"))
        engine.module(torch.zeros(1, 5, dtype=torch.int64))
    elif what == "batches":
        engine.train_batch(iter([tuple(t + dist.get_rank() for t in pair) for pair in microbatches(2)]))


@pytest.mark.parametrize(
    ("what", "says"),
    (
        ("forward", r"parallel.pp = 2: engine\(batch\) is a part of a step.*legal: train_batch"),
        ("backward", r"backward\(loss\) is a part of a step"),
        ("step", r"step\(\) is a part of a step"),
        ("no_sync", r"no_sync\(\) is a part of a step"),
        ("boundary", r"set_gradient_accumulation_boundary\(\) is a part of a step"),
        ("module", "this PipelineModule is cut over ranks: call engine.train_batch"),
        ("decoder", "is on another pipeline stage: call engine.train_batch"),
        ("batches", r"ranks \[1\] were given other batches"),
    ),
)
def test_what_a_pipeline_does_not_do_says_what_to_call(what, says):
    refused_everywhere(alone_in_error, 2, says, what)


# ---- schedules of one's own ----


def train_own(path: str) -> Any:
    return train_blocks("llama", path, 3)


def train_blocks(family: str, schedule: str, counts: int) -> Any:
    engine, *_ = minizero.initialize(model=make(family, 5), config=settings(counts, 6, 2, schedule))
    return run_steps(engine, batches(4, 6), counts)


def test_a_schedule_of_ones_own_runs(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("F0,F1,B0,F2,W0,B1,B2,W2,W1\nF0,B0,F1,W0,BW1,F2,BW2\n")
    agree(run_distributed(train_own, 2, str(path)), plainly("llama", 5, 4, 6, 3))


@pytest.mark.parametrize(
    ("text", "says"),
    (
        ("F0,F1,BW0,BW1,F2,BW2\nF0,BW0,F1,F2,BW2,BW1\n", r"waits for ever|comes before"),
        ("F0,F1,BW0,BW1,F2,BW2\nF0,BW0,F1,BW1,F2\n", r"rank 1, action 4: BW2|B2 is missing"),
        ("F0,BW0\nF0,BW0\n", "is for 2 ranks and 1 microbatches; this run has parallel.pp = 2 and 3 microbatches"),
    ),
)
def test_an_illegal_schedule_is_refused_everywhere(tmp_path, text, says):
    path = tmp_path / "own.csv"
    path.write_text(text)
    refused_everywhere(train_own, 2, says, str(path))


# ---- around training ----


def dropout_and_half(precision: str, pp: int, schedule: str) -> Any:
    more: dict[str, Any] = {"precision": precision}
    if precision == "fp16":
        more["loss_scale"] = {"initial_power": 8}
    model = make("gpt2", 5, dropout=0.2)
    engine, *_ = minizero.initialize(model=model, config=settings(3, 6, pp, schedule, **more))
    return run_steps(engine, batches(6, 6), 3)


@pytest.mark.parametrize("schedule", ("zbv", "one_f_one_b"))
def test_dropout_is_the_same_over_stages(schedule):
    (wanted,) = run_distributed(dropout_and_half, 1, "fp32", 1, "gpipe")
    agree(run_distributed(dropout_and_half, 2, "fp32", 2, schedule), wanted)


@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_sixteen_bits(precision):
    (wanted,) = run_distributed(dropout_and_half, 1, precision, 1, "gpipe")
    for losses, _ in run_distributed(dropout_and_half, 2, precision, 2, "zb_h1"):
        assert relative_error(losses, wanted[0]) < 1e-3  # the same 16-bit operations, summed in another order


def evaluated(pp: int) -> tuple[float, list[float], int, list[int]]:
    engine, *_ = minizero.initialize(model=make("llama", 5), config=settings(2, 4, pp, "gpipe" if pp == 1 else "zbv"))
    loss = engine.eval_batch(iter(split_in(2, 4)))
    total = engine.evaluate(split_in(7, 7))  # more than a step has, and not a multiple
    outputs = engine.infer([{"input_ids": b["input_ids"]} for b in split_in(3, 3)])
    after = run_steps(engine, batches(2, 4), 2)[0]
    return float(loss), [*total.tolist(), *after], len(outputs), [*outputs[0].shape] if outputs else []


def split_in(counts: int, samples: int) -> list[dict[str, Tensor]]:
    (batch,) = batches(1, samples)
    return [{key: value.chunk(counts)[index] for key, value in batch.items()} for index in range(counts)]


def test_evaluation_reaches_every_rank():
    ((loss, numbers, _, shape),) = run_distributed(evaluated, 1, 1)
    reports = run_distributed(evaluated, 2, 2)
    for found, others, _, _ in reports:
        assert relative_error([found, *others], [loss, *numbers]) < 2e-6
    assert [(count, found) for _, _, count, found in reports] == [(3, shape), (0, [])]  # a V ends where it begins


def resume(folder: str, schedule: str, stage: int) -> tuple[Any, Any, dict[str, Tensor], list[str]]:
    more = {"zero": {"stage": stage}}
    straight, *_ = minizero.initialize(
        model=make("llama", 5, tie_embeddings=True), config=settings(3, 6, 2, schedule, **more)
    )
    run_steps(straight, batches(2, 6), 3)
    straight.save_checkpoint(folder)
    path = f"{folder}/weights"
    straight.settings.zero.gather_16bit_weights_on_model_save = True
    straight.save_16bit_model(path)
    expected = run_steps(straight, batches(4, 6)[2:], 3)
    resumed, *_ = minizero.initialize(
        model=make("llama", 5, tie_embeddings=True), config=settings(3, 6, 2, schedule, **more)
    )
    resumed.load_checkpoint(folder)
    found = run_steps(resumed, batches(4, 6)[2:], 3)
    other, *_ = minizero.initialize(
        model=make("llama", 5, tie_embeddings=True), config=settings(3, 6, 2, schedule, **more)
    )
    with torch.no_grad(), minizero.zero.GatheredParameters([*other.module.parameters()], modifier_rank=0):
        for parameter in other.module.parameters():
            parameter.fill_(0.5)
    other.load_weights(f"{path}/model.safetensors")
    loaded = {name: value.clone() for name, value in other.runtime.whole_parameters()}
    return expected, found, loaded, sorted(p.name for p in Path(folder).glob("global_step2/*.safetensors"))


@pytest.mark.parametrize(("schedule", "stage", "world"), (("one_f_one_b", 1, 4), ("zbv", 3, 4), ("zb_h1", 0, 2)))
def test_resuming_is_the_same_run_and_weights_are_whole(tmp_path, schedule, stage, world):
    from safetensors.torch import load_file

    reports = run_distributed(resume, world, str(tmp_path), schedule, stage)
    weights = load_file(tmp_path / "weights" / "model.safetensors")
    names = {name for name, _ in make("llama", 5, tie_embeddings=True).named_parameters()}
    assert set(weights) == names
    for expected, found, loaded, files in reports:
        assert expected == found
        assert all(torch.equal(weights[name], value) for name, value in loaded.items())
        assert len(files) == world
    assert {name for _, _, loaded, _ in reports for name in loaded} == names


def broken_down() -> dict[str, float]:
    engine, *_ = minizero.initialize(
        model=make("llama", 5), config=settings(3, 6, 2, "zb_h1", log={"wall_clock_breakdown": True, "every": 100})
    )
    run_steps(engine, batches(2, 6), 3)
    return dict(engine.log.seconds)


def test_a_step_is_broken_down_into_computing_and_waiting():
    seconds = run_distributed(broken_down, 2)[0]
    assert set(seconds) == {"forward", "backward", "step", "pipeline_wait"} and min(seconds.values()) > 0


def with_own_optimizer() -> Any:
    model = make("llama", 5)
    decayed = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1}]
    groups = [*decayed, {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    engine, *_ = minizero.initialize(model=model, optimizer=optimizer, config=settings(3, 6, 2, "zb_h2"))
    assert sum(p.numel() for p in engine.module.parameters()) < engine.num_parameters()
    return run_steps(engine, batches(4, 6), 3)


def test_an_optimizer_over_the_whole_model():
    agree(run_distributed(with_own_optimizer, 2), plainly("llama", 5, 4, 6, 3))


def timeline_of(path: str) -> tuple[list[list[str]], float, float]:
    engine = engine_of_blocks(2, "zb_h1", 4, 4)
    engine.train_batch(iter(microbatches(4)))
    timeline = engine.pipeline.timeline()
    write_csv(engine.pipeline.schedule, path)
    rows = [[str(event.action) for event in row] for row in timeline.events]
    return rows, min(row[0].start for row in timeline.events), timeline.makespan


def test_the_measured_timeline_is_of_all_ranks(tmp_path):
    planned = build("zb_h1", 2, 4)
    for rows, start, makespan in run_distributed(timeline_of, 2, str(tmp_path / "own.csv")):
        assert tuple(map(tuple, rows)) == planned.order and start == 0.0 and 0 < makespan < 30
