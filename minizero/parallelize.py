"""One function that makes a model parallel, in one order, before ZeRO shards it.

pipeline split -> tensor and sequence -> expert -> context -> recompute -> ZeRO -> materialize from meta
^ here            ^ here                           ^ here     ^ here       ^ `zero.runtime`

What depends on the whole model (which module has which style, which block is the k-th) is read before the split.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from minizero.config import Config
from minizero.dist.collectives import Communicator
from minizero.dist.layout import PipelineLayout, TensorLayout
from minizero.dist.mesh import WORLD
from minizero.kernels.backend import Backend, obstacle, use_in
from minizero.models.dropout import number_dropouts
from minizero.parallel.context import ContextAxis
from minizero.parallel.context_model import apply_context, refuse_few_heads
from minizero.parallel.foreign import has_causal_loss
from minizero.parallel.pipeline.actions import Schedule, read_csv
from minizero.parallel.pipeline.module import LayerStage, PipelineModule
from minizero.parallel.pipeline.schedules import build
from minizero.parallel.pipeline.simulate import Costs
from minizero.parallel.pipeline.stage import Absent, Stage, StagedModel
from minizero.parallel.pipeline.validate import validate
from minizero.parallel.plan import apply_styles, match
from minizero.parallel.random import RandomStreams, foreign_dropout
from minizero.parallel.recompute import Options
from minizero.parallel.recompute_model import Agree, apply_recompute
from minizero.parallel.tensor import TensorAxis
from minizero.utils.undo import Removable
from minizero.utils.warnings import warn_once
from minizero.zero.units import repeated_children

# transformers' words for ours
FOREIGN_STYLES = {
    "colwise": "colwise",
    "rowwise": "rowwise",
    "colwise_gather_output": "gather_head",
    "replicated_with_grad_allreduce": "partial",
}
GPT2_PLAN = {  # transformers has none for it
    "transformer.wte": "vocab",
    "transformer.h.*.attn.c_attn": "colwise_fused",
    "transformer.h.*.attn.c_proj": "rowwise",
    "transformer.h.*.mlp.c_fc": "colwise",
    "transformer.h.*.mlp.c_proj": "rowwise",
    "transformer.h.*.ln_1": "sequence",
    "transformer.h.*.ln_2": "sequence",
    "transformer.ln_f": "sequence_end",  # what follows it counts on the whole sequence
    "transformer.h.0": "sequence_begin",
    "lm_head": "gather_head",
}


@dataclass
class Parallelized:
    """What a model has become.

    Attributes:
        layout: what tensor parallelism leaves to this rank; None where it has only one.
        recompute: how checkpointed blocks keep what they keep.
        streams: where dropout that is not ours draws from; None: from torch's default generator.
        undo: takes context parallelism and checkpointing off the model again.
        pipeline, stage, schedule: what a pipeline leaves to this rank, and how it runs; None where there is none.
        removed: parameters that other stages have. replaced: parameters that were built, by those of the meta device.
    """

    layout: TensorLayout | None = None
    recompute: Options = field(default_factory=Options)
    streams: RandomStreams | None = None
    undo: list[Removable] = field(default_factory=list)
    pipeline: PipelineLayout | None = None
    stage: Stage | None = None
    schedule: Schedule | None = None
    removed: set[nn.Parameter] = field(default_factory=set)
    replaced: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)


def parallelize(
    model: nn.Module, config: Config, data: Communicator, device: torch.device, microbatches: int
) -> Parallelized:
    """Make `model` parallel in place, and checkpoint what the settings choose; collective.

    Args:
        data: the axis that ZeRO will shard over; those of the other kinds of parallelism are found beside it.
        microbatches: of one step.

    Raises ValueError as `schedule_of`, `split`, `plan_of`, `apply_plan`, `apply_context` and `apply_recompute` say.
    """
    refuse_kernels(config.kernels, device)
    tensor, context, pipeline = data.along("tp"), data.along("cp"), data.along("pp")
    foreign = foreign_dropout(model)
    blocks = dict(enumerate(list(repeated_children(model)) or only_children(model)))
    names = {name for name, _ in model.named_modules()}
    styles = styles_of(model, config) if tensor.size > 1 else {}
    made = split(model, config, data, pipeline, microbatches, device)
    number_dropouts(model)
    if made.stage is not None:
        styles = {name: style for name, style in styles.items() if made.stage.has(name)}
        here = {module for _, module in model.named_modules()}
        blocks = {place: block for place, block in blocks.items() if block[1] in here}
    if tensor.size > 1:
        made.layout = apply_styles(model, styles, TensorAxis(tensor, config.parallel.sequence, config.kernels))
        if made.pipeline is not None:
            made.pipeline.replace(made.layout.parts)
    axis = ContextAxis(context, config.parallel.context, config.kernels)
    refuse_few_heads(model, axis)
    undo = apply_context(model, axis, tensor.size if config.parallel.sequence else 1)
    use_in(model, config.kernels)
    undo += apply_recompute(model, config.recompute, blocks, agreement(tensor, context, device), names)
    if tensor.size * pipeline.size > 1 and foreign:
        warn_once(
            f"{foreign} draws its masks from random streams: they repeat when a block is computed again, but differ "
            "from layout to layout. Those of minizero.models.dropout.Dropout do not."
        )
    made.recompute, made.undo = recompute_options(config, tensor), [*made.undo, *undo][::-1]
    if tensor.size * pipeline.size > 1:  # always, since a function of torch may draw without a module to show for it
        samples = pipeline.rank * data.size + data.rank  # stages draw apart, as ranks with other samples do
        made.streams = RandomStreams(config.train.seed, samples, tensor.rank, device)
    return made


def refuse_kernels(kernels: Backend, device: torch.device) -> None:
    """Raise ValueError where Triton's kernels are asked for, and cannot run; say where a GPU does without them."""
    reason = "" if kernels == "torch" else obstacle(device)
    if reason and kernels == "triton":
        raise ValueError(f"kernels triton: {reason}; legal here: auto, torch")
    if reason and device.type == "cuda":
        warn_once(f"kernels auto: {reason}, so fused operations run in torch")


def refuse_cut(model: nn.Module) -> None:
    """Raise ValueError for a model of which another engine took stages away."""
    cut = model.is_cut if isinstance(model, PipelineModule) else any(isinstance(m, Absent) for m in model.modules())
    if cut:
        raise ValueError(f"this {type(model).__name__} was cut into pipeline stages by another engine: build it anew")


def split(
    model: nn.Module,
    config: Config,
    data: Communicator,
    pipeline: Communicator,
    microbatches: int,
    device: torch.device,
) -> Parallelized:
    """Pipeline parallel: take from `model` what other ranks have.

    Raises ValueError for a schedule that cannot be run, or a model that cannot be cut so.
    """
    made = Parallelized()
    if pipeline.size == 1:
        if isinstance(model, PipelineModule):
            made.replaced = model.build(seed=config.train.seed)
        return made
    if config.recompute.mode == "budget":
        raise ValueError("recompute.mode budget is not available with parallel.pp > 1; legal: full, selective, none")
    made.schedule = schedule_of(config, pipeline.size, microbatches)
    placement = made.schedule.placement
    if isinstance(model, PipelineModule):

        def agree(seconds: list[float]) -> list[float]:
            row = torch.tensor(seconds, dtype=torch.float64, device=device)
            return data.along(WORLD).gather_rows(row, "seconds of layers")[0].tolist()

        layers = LayerStage(model, pipeline.rank, placement, config.train.seed, agree)
        made.stage, made.removed, made.replaced = layers, layers.removed, layers.replaced
        made.pipeline = PipelineLayout(pipeline, layers.ties)
    else:
        decoder = StagedModel(model, pipeline.rank, placement, config.pipeline.partition)
        decoder.sequence = config.parallel.sequence
        made.stage, made.removed, made.undo = decoder, decoder.removed, decoder.undo
        made.pipeline = PipelineLayout(pipeline, decoder.ties)
    return made


def schedule_of(config: Config, ranks: int, microbatches: int) -> Schedule:
    """The schedule that the settings ask for, proven.

    Raises ValueError when there is none of that name, or it is for other ranks or microbatches, or illegal.
    """
    settings = config.pipeline
    if settings.schedule.endswith(".csv"):
        schedule = read_csv(settings.schedule)
        if (schedule.ranks, schedule.microbatches) != (ranks, microbatches):
            raise ValueError(
                f"pipeline.schedule {settings.schedule} is for {schedule.ranks} ranks and {schedule.microbatches} "
                f"microbatches; this run has parallel.pp = {ranks} and {microbatches} microbatches"
            )
    else:
        costs = None if settings.costs is None else Costs.parse(settings.costs)
        schedule = build(settings.schedule, ranks, microbatches, settings.chunks, costs, settings.memory_limit)
    validate(schedule)
    return schedule


def only_children(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of what lists hold in a model in which nothing repeats: one block is a block."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [(f"{name}.{key}", child) for name, module in lists for key, child in module.named_children()]


def styles_of(model: nn.Module, config: Config) -> dict[str, str]:
    """Tensor and sequence parallel: module name -> style, by the settings' plan or the model's own."""
    plan, sequence = config.parallel.plan or plan_of(model), config.parallel.sequence
    if not config.parallel.plan and has_causal_loss(model):
        plan = {name: "vocab_head" if style == "gather_head" else style for name, style in plan.items()}
    if sequence and "sequence_begin" not in plan.values():
        raise ValueError("parallel.sequence: no module of the plan is a sequence_begin, at whose entry it would be cut")
    return match(model, plan)


def recompute_options(config: Config, tensor: Communicator) -> Options:
    """The settings as `checkpoint_block` wants them; with sequence parallel inputs are parts already."""
    settings = config.recompute
    partition = settings.partition_activations and tensor.size > 1 and not config.parallel.sequence
    return Options(partition, tensor if partition else None, settings.cpu_checkpointing, config.debug.recompute)


def agreement(tensor: Communicator, context: Communicator, device: torch.device) -> Agree:
    """The largest of each number over the ranks whose blocks communicate with this one's: they must decide alike.

    Not over data-parallel ranks: in the middle of a forward they have gathers on the way that nobody has read yet.
    """

    def agree(numbers: list[int]) -> list[int]:
        largest = torch.tensor(numbers, device=device)
        for axis in (tensor, context):
            largest = axis.gather_rows(largest, "bytes of blocks").amax(dim=0)
        return largest.tolist()

    return agree


def plan_of(model: Any) -> dict[str, str]:
    """The model's own table: ours carry theirs, transformers' models have one in their config or here.

    Raises ValueError for a model without a table.
    """
    if own := getattr(model, "tensor_plan", None):
        return own
    inner = getattr(model, "config", None)
    if getattr(inner, "model_type", "") == "gpt2":
        return GPT2_PLAN
    base = getattr(inner, "base_model_tp_plan", None)
    if not base:
        raise ValueError(
            f"{type(model).__name__} has no tensor-parallel plan: give one as parallel.plan, a table of module name "
            "patterns (see minizero.parallel.plan)"
        )
    prefix = f"{model.base_model_prefix}."
    plan = {f"{prefix}embed_tokens": "vocab", "lm_head": "gather_head"}
    for pattern, style in base.items():
        if style not in FOREIGN_STYLES:
            raise ValueError(
                f"the plan of {type(model).__name__} has style {style!r} for {pattern}, which is not built"
            )
        is_kv = pattern.endswith(("k_proj", "v_proj"))
        plan[prefix + pattern] = "colwise_kv" if is_kv else FOREIGN_STYLES[style]
        if style == "colwise":  # transformers keeps norms and residuals outside attention and MLP
            plan[f"{prefix}{pattern.rpartition('.')[0]}"] = "region"
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    plan |= {f"{prefix}layers.*.{norm}": "sequence" for norm in norms if norm in present}
    return plan | {f"{prefix}norm": "sequence_end", f"{prefix}layers.0": "sequence_begin"}
