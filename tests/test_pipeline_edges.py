"""Where a cut could change what is trained: it does not, or says so on every rank."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from safetensors.torch import load_file
from test_pipeline_engine import agree
from torch import Tensor, nn
from torch.nn import functional as F
from training import refused_everywhere, relative_error

import minizero
from minizero import LayerSpec, PipelineModule, TiedLayerSpec
from minizero.config.schema import ModelConfig
from minizero.models import build
from minizero.models.dropout import Dropout

WIDTH, STEPS = 6, 3


def config(pp: int, schedule: str = "one_f_one_b", counts: int = 2, samples: int = 2, **more: Any) -> minizero.Config:
    return minizero.Config(
        parallel={"pp": pp},
        pipeline={"schedule": schedule, "microbatches": counts, **more.pop("pipeline", {})},
        train={"micro_batch_size": samples, "gradient_clipping": 0.0},
        optimizer={"lr": 1e-2},
        dist={"timeout": 8.0},
        **more,
    )


def data(counts: int = 2, samples: int = 2) -> list[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(samples, WIDTH, generator=generator)  # noqa: E731
    return [[(draw(), draw()) for _ in range(counts)] for _ in range(STEPS)]


def run(model: nn.Module, settings: minizero.Config, steps: Any = None) -> tuple[list[float], list[float]]:
    engine, *_ = minizero.initialize(model=model, config=settings)
    return steps_of(engine, steps)


def steps_of(engine: Any, steps: Any = None) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in steps or data(engine.batch.accumulation):
        losses.append(float(engine.train_batch(iter(step))))
        norms.append(engine.get_global_grad_norm())
    return losses, norms


# ---- sequential models ----


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


class AloneInTuple(Block):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x),)


class TakesFirst(Block):
    def forward(self, x: Any) -> Tensor:
        assert isinstance(x, tuple) and len(x) == 1
        return super().forward(x[0])


class Twice(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class TakesTwo(Block):
    def forward(self, x: Any) -> Tensor:
        return super().forward(x[0] + x[1] if isinstance(x, tuple) else x[0])


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += torch.tanh(self.layer(torch.ones_like(x)))  # of what it was given
        return F.relu(x, inplace=True) + self.layer(x * 0.5)


class HandsOn(Block):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(100, WIDTH))

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.table


class TakesTable(Block):
    def forward(self, x: Any) -> Tensor:
        time.sleep(0.05)
        return super().forward(x[0] + x[1][:2] + x[1].mean(0))


class Buffered(Block):
    """Without parameters, and made of a buffer and a plain tensor."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))
        self.shift = torch.ones(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(x * self.temperature, y)


SEQUENCES: dict[str, Any] = {
    "a tuple of one": lambda: [AloneInTuple(), TakesFirst(), Block(), Block()],
    "a tuple of two": lambda: [Block(), Twice(), TakesTwo(), Block()],
    "in place": lambda: [Block(), Block(), InPlace(), Block()],
    "in place, where it turns": lambda: [Block(), InPlace(), InPlace(), Block()],
    "relu in place": lambda: [nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)] * 1 + [Block(), nn.ReLU(inplace=True)],
    "a parameter handed on": lambda: [Block(), HandsOn(), TakesTable(), Block()],
    "buffers": lambda: [LayerSpec(Block), LayerSpec(Buffered), LayerSpec(Buffered), LayerSpec(Block)],
    "a loss with a parameter": lambda: [Block() for _ in range(4)],
    "batch norm": lambda: [Block(), nn.BatchNorm1d(WIDTH), Block(), nn.BatchNorm1d(WIDTH)],
}


def train_sequence(kind: str, pp: int, schedule: str, **more: Any) -> tuple[list[float], list[float]]:
    torch.manual_seed(0)
    loss = Loss() if kind == "a loss with a parameter" else F.mse_loss
    return run(
        PipelineModule(SEQUENCES[kind](), loss_fn=loss, partition_method="uniform"), config(pp, schedule, **more)
    )


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("schedule", ("zb_h1", "zbv"))
def test_a_stage_gets_what_the_one_before_returned(kind, schedule):
    (wanted,) = run_distributed(train_sequence, 1, kind, 1, "gpipe")
    agree(run_distributed(train_sequence, 2, kind, 2, schedule), wanted)
    if kind == "a parameter handed on":
        more = {"zero": {"stage": 3}, "pipeline": {"gather": "microbatch"}, "samples": 2}
        agree(run_distributed(train_sequence, 4, kind, 2, schedule, **more), wanted)


def hooked(what: str, pp: int, schedule: str) -> Any:
    torch.manual_seed(0)
    model = PipelineModule([LayerSpec(Block) for _ in range(4)], loss_fn=F.mse_loss, partition_method="uniform")
    seen: list[int] = []
    for layer in model.layers:
        if what == "layers":
            layer.register_forward_hook(lambda module, args, output: seen.append(1))
        if what == "activations":
            layer.layer.register_forward_hook(lambda module, args, out: out.register_hook(lambda g: g * 0.5) and None)
    if what == "root":
        model.register_forward_hook(lambda module, args, output: output * 0.1)
    engine, *_ = minizero.initialize(model=model, config=config(pp, schedule))
    if what == "parameters":
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient * 0.1)
    return *steps_of(engine), len(seen)


@pytest.mark.parametrize("what", ("layers", "root", "parameters"))
def test_hooks_act_once(what):
    ((losses, norms, seen),) = run_distributed(hooked, 1, what, 1, "gpipe")
    reports = run_distributed(hooked, 2, what, 2, "zb_h1")
    agree([report[:2] for report in reports], (losses, norms))
    assert sum(count for *_, count in reports) == seen and (seen > 0) == (what == "layers")


def test_a_hook_that_changes_an_activations_gradient_is_refused_where_it_would_act_twice():
    ((losses, norms, _),) = run_distributed(hooked, 1, "activations", 1, "gpipe")
    agree([report[:2] for report in run_distributed(hooked, 2, "activations", 2, "one_f_one_b")], (losses, norms))
    refused_everywhere(hooked, 2, "a hook changes the gradient of an activation", "activations", 2, "zb_h1")


class Dropped(Block):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = Dropout(0.5, ("sample", "feature"))

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(super().forward(x))


def built_layers(pp: int) -> tuple[set[int], int]:
    """(numbers of the dropouts here, checkpointed layers)."""
    model = PipelineModule([LayerSpec(Dropped) for _ in range(4)], loss_fn=F.mse_loss, partition_method="uniform")
    minizero.initialize(model=model, config=config(pp, recompute={"mode": "full", "every": 2}))
    layers = [module for module in model.modules() if isinstance(module, Dropped)]
    return {layer.dropout.number for layer in layers}, sum("forward" in vars(layer) for layer in layers)


def test_layers_that_are_built_late_are_numbered_and_checkpointed():
    ((numbers, chosen),) = run_distributed(built_layers, 1, 1)
    assert len(numbers) == 4 and chosen == 2
    (first, one), (second, other) = run_distributed(built_layers, 2, 2)
    assert first | second == numbers and (one, other) == (1, 1)


def measured(pp: int, method: str) -> Any:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]
    example = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    model = PipelineModule(layers, loss_fn=F.mse_loss, partition_method=method, example_input=example)
    if dist.get_rank() == 1:
        model.measured = lambda: [1.0, 1.0, 1.0, 9.0]  # each rank has a clock of its own
    return *run(model, config(pp, samples=1), data(2, 1) if pp == 0 else data(2, 2)), model.parts


def test_measuring_changes_nothing_and_all_ranks_take_one_result():
    ((*wanted, _),) = run_distributed(measured, 1, 1, "uniform")
    reports = run_distributed(measured, 4, 2, "measured")
    agree([report[:2] for report in reports], tuple(wanted))
    assert all(parts == reports[0][2] for *_, parts in reports)


def closure(pp: int) -> Any:
    torch.manual_seed(0)
    first = nn.Linear(WIDTH, WIDTH)
    layers = [first, Block(), Block(), lambda x: x @ first.weight.t()]
    return run(PipelineModule(layers, loss_fn=F.mse_loss, partition_method="uniform"), config(pp))


def test_a_function_that_holds_on_to_another_stages_parameter_is_refused():
    refused_everywhere(closure, 2, "a parameter of another stage was used here", 2)


class Larger(Block):
    """Than the tied layers, so that these are no units of their own beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH))


def tied_by_size(x: nn.Module, given: Tensor) -> Tensor:
    return given @ x.weight.t() @ x.weight


def two_ties(pp: int, stage: int, debug: bool = False) -> Any:
    torch.manual_seed(0)
    wide = lambda: TiedLayerSpec("wide", nn.Linear, WIDTH, 8, bias=False, forward_fn=tied_by_size)  # noqa: E731
    narrow = lambda: TiedLayerSpec("narrow", nn.Linear, WIDTH, 3, bias=False, forward_fn=tied_by_size)  # noqa: E731
    small = [LayerSpec(nn.Linear, WIDTH, WIDTH, bias=False) for _ in range(2)]
    layers = [wide(), narrow(), *small, LayerSpec(Larger), LayerSpec(Larger), wide(), narrow()]
    model = PipelineModule(layers, loss_fn=F.mse_loss, partition_method="uniform")
    more = {"zero": {"stage": stage}, "debug": {"collectives": debug}}
    losses, norms = run(model, config(pp, **more))
    with minizero.unsharded(model):
        return losses, norms, {name: p.detach().clone() for name, p in model.named_parameters() if "tied" in name}


@pytest.mark.parametrize(("pp", "world", "stage", "debug"), ((2, 2, 0, False), (2, 4, 3, False), (4, 4, 1, True)))
def test_ties_lie_alike_on_stages_that_are_not(pp, world, stage, debug):
    ((*wanted, weights),) = run_distributed(two_ties, 1, 1, 0)
    reports = run_distributed(two_ties, world, pp, stage, debug)
    agree([report[:2] for report in reports], tuple(wanted))
    for *_, tied in reports:
        assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in tied.items())


def tied_values() -> list[float]:
    torch.manual_seed(100 + dist.get_rank())
    settings = ModelConfig(family="gpt2", hidden_size=24, num_layers=4, num_heads=4, tie_embeddings=True)
    model = build(settings, 19, 15)
    minizero.initialize(model=model, config=config(2, zero={"stage": 3}))
    with minizero.unsharded(model):
        return model.transformer.wte.weight.detach().flatten().tolist()


def test_ties_begin_alike_whatever_ranks_were_built_with():
    values = run_distributed(tied_values, 4)
    assert all(value == values[0] for value in values) and len(set(values[0])) > 400


class Sometimes(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x[0, 0] > 0 else x


def skipped(pp: int) -> Any:
    torch.manual_seed(0)
    model = PipelineModule([Sometimes(), Block()], loss_fn=F.mse_loss, partition_method="uniform")
    engine, *_ = minizero.initialize(model=model, config=config(pp, zero={"stage": 2}))
    sign = 1 if engine.dp_rank == 0 else -1
    return steps_of(engine, [[(x.abs() * sign, y) for x, y in step] for step in data()])


def test_a_layer_that_one_data_parallel_rank_skips():
    wanted = run_distributed(skipped, 2, 1)[0]
    agree(run_distributed(skipped, 4, 2), wanted)


def exported(folder: str, pp: int) -> tuple[float, Any]:
    torch.manual_seed(0)
    model = PipelineModule([Block() for _ in range(4)], loss_fn=Loss())
    engine, *_ = minizero.initialize(model=model, config=config(pp))
    steps_of(engine)
    engine.save_16bit_model(folder)
    return None if model.loss_fn is None else float(model.loss_fn.temperature), sorted(
        n for n, _ in model.named_modules()
    )


def test_a_loss_with_a_parameter_is_the_last_stages(tmp_path):
    (_, _), (temperature, _) = run_distributed(exported, 2, str(tmp_path), 2)
    assert float(load_file(Path(tmp_path) / "model.safetensors")["loss_fn.temperature"]) == temperature != 1.0


# ---- decoders ----


class Model(nn.Module):
    """The simplest with an order; subclasses do between blocks what a cut would change."""

    pipeline_order = ("embed", "blocks", "head")
    block: Any = Block

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(self.block() for _ in range(4))

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.head(self.run(self.embed(tokens))), target)

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Scaled(Model):
    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + 0.5 * block(x)
        return x


class KeepsEmbedding(Model):
    def run(self, x: Tensor) -> Tensor:
        first = x
        for block in self.blocks:
            x = block(x) + first
        return x


class InTuples(Model):
    block = AloneInTuple

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)[0]
        return x


class AsksTheEmbedding(Model):
    def run(self, x: Tensor) -> Tensor:
        x += self.embed.weight.shape[0] * torch.ones_like(x)
        return super().run(x.to(self.embed.weight.dtype))


def train_model(name: str, pp: int, schedule: str, again: bool = False) -> Any:
    torch.manual_seed(0)
    model = globals()[name]()
    generator = torch.Generator().manual_seed(0)
    draw = lambda: (torch.randint(9, (2, 3), generator=generator), torch.randn(2, 3, WIDTH, generator=generator))  # noqa: E731
    steps = [[draw() for _ in range(2)] for _ in range(STEPS)]
    engine, *_ = minizero.initialize(model=model, config=config(pp, schedule))
    if again:
        engine.destroy()
        engine, *_ = minizero.initialize(model=model, config=config(pp, schedule))
    return steps_of(engine, steps)


@pytest.mark.parametrize("name", ("Model", "AsksTheEmbedding"))
@pytest.mark.parametrize("schedule", ("zb_h1", "zbv"))
def test_a_model_of_ones_own_with_an_order(name, schedule):
    (wanted,) = run_distributed(train_model, 1, name, 1, "gpipe")
    agree(run_distributed(train_model, 2, name, 2, schedule), wanted)


@pytest.mark.parametrize("name", ("Scaled", "KeepsEmbedding", "InTuples"))
def test_what_is_made_of_a_blocks_output_before_the_next_is_refused(name):
    refused_everywhere(train_model, 2, "is not given what .* returned", name, 2, "one_f_one_b")


def test_a_cut_model_is_not_cut_again():
    refused_everywhere(train_model, 2, "was cut into pipeline stages by another engine", "Model", 2, "gpipe", True)


def side_outputs(pp: int) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = transformers.MixtralConfig(vocab_size=19, intermediate_size=37, output_router_logits=True, **sizes)
    return minizero.initialize(model=transformers.MixtralForCausalLM(settings), config=config(pp))


def test_what_layers_leave_beside_their_outputs_is_refused():
    refused_everywhere(side_outputs, 2, "is to give output_router_logits, of which a stage has its own only", 2)


# ---- evaluation ----


def evaluate_badly(what: str) -> None:
    layers = [Block() for _ in range(4)]
    model = PipelineModule(layers, loss_fn=None if what == "no loss" else F.mse_loss, partition_method="uniform")
    engine, *_ = minizero.initialize(model=model, config=config(dist.get_world_size()))
    batches = data(2)[0]
    if what == "bad label":
        batches = [(x, y[:, :3]) for x, y in batches]
    began = time.monotonic()
    try:
        engine.eval_batch(iter(batches))
    finally:
        assert time.monotonic() - began < 6  # not the timeout


@pytest.mark.parametrize(
    ("what", "says"), (("no loss", "an evaluation needs a 0-d loss"), ("bad label", "size of tensor"))
)
def test_what_fails_in_the_last_stage_of_an_evaluation_reaches_all(what, says):
    refused_everywhere(evaluate_badly, 4, says, what)


def fail_in_backward() -> None:
    layers = [Block() for _ in range(3)]
    model = PipelineModule(layers, loss_fn=F.mse_loss, partition_method="uniform")
    engine, *_ = minizero.initialize(model=model, config=config(3))
    if dist.get_rank() == 0:

        def refuse(gradient: Tensor) -> None:
            raise ArithmeticError("in backward")

        next(iter(model.parameters())).register_hook(refuse)
    began = time.monotonic()
    try:
        engine.train_batch(iter(data(2)[0]))
    finally:
        assert time.monotonic() - began < 6


def test_a_failure_of_the_first_stages_last_action_reaches_all():
    refused_everywhere(fail_in_backward, 3, "in backward")


def many(pp: int) -> tuple[float, int]:
    torch.manual_seed(0)
    model = PipelineModule([Block() for _ in range(4)], loss_fn=F.mse_loss, partition_method="uniform")
    engine, *_ = minizero.initialize(model=model, config=config(pp, "gpipe" if pp == 1 else "interleaved"))
    batches = data(600)[0]
    return float(engine.evaluate(batches)[0]), len(engine.infer(batches[:5]))


def test_an_evaluation_of_many_batches():
    ((wanted, _),) = run_distributed(many, 1, 1)
    reports = run_distributed(many, 2, 2, timeout=90)
    assert relative_error([loss for loss, _ in reports], [wanted, wanted]) < 1e-6
    assert [count for _, count in reports] == [0, 5]


class Masked(Block):
    """Keeps the masks that torch's own dropout draws."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.masks.append(F.dropout(torch.ones(32), 0.5).tolist())
        return super().forward(x)


def drawn() -> list[list[float]]:
    model = PipelineModule([Masked(), Masked()], loss_fn=F.mse_loss, partition_method="uniform")
    engine, *_ = minizero.initialize(model=model, config=config(2, "gpipe"))
    engine.train_batch(iter(data()[0]))
    return next(module.masks for module in model.modules() if isinstance(module, Masked))


def test_stages_draw_apart():
    """Torch's dropout, whose generator every rank has seeded alike."""
    masks = [mask for of_rank in run_distributed(drawn, 2) for mask in of_rank]
    assert len(masks) == 4 and all(one != other for i, one in enumerate(masks) for other in masks[:i])
