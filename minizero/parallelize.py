"""One function that makes a model parallel, in one order: so far tensor and sequence parallel, before ZeRO shards it.

pipeline split -> tensor and sequence -> expert -> context -> recompute -> ZeRO -> materialize from meta
                  ^ here                                                  ^ `zero.runtime`
"""

from __future__ import annotations

from typing import Any

from torch import nn

from minizero.config import Config
from minizero.dist.collectives import Communicator
from minizero.dist.layout import TensorLayout
from minizero.parallel.plan import apply_plan
from minizero.parallel.tensor import TensorAxis

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


def parallelize(model: nn.Module, config: Config, axis: Communicator) -> TensorLayout | None:
    """Cut `model` over the tensor-parallel axis, in place; None where there is only one rank on it.

    Raises ValueError for a model with dropout, and as `plan_of` and `apply_plan` say.
    """
    if axis.size == 1:
        return None
    refuse_dropout(model, axis.size)
    plan, sequence = config.parallel.plan or plan_of(model), config.parallel.sequence
    if sequence and "sequence_begin" not in plan.values():
        raise ValueError("parallel.sequence: no module of the plan is a sequence_begin, at whose entry it would be cut")
    return apply_plan(model, plan, TensorAxis(axis, sequence))


def refuse_dropout(model: nn.Module, size: int) -> None:
    """Raise ValueError naming a module that would draw masks: ranks must agree on those of whole tensors."""
    for name, module in model.named_modules():
        inner = getattr(module, "attention_dropout", 0.0)
        p = module.p if isinstance(module, nn.Dropout) else inner if isinstance(inner, float) else 0.0
        if p > 0:
            raise ValueError(
                f"parallel.tp = {size}: {name} has dropout {p}, which is not available with tensor parallelism in this "
                "version; legal: 0"
            )


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
    norms = ("input_layernorm", "post_attention_layernorm")
    plan |= {f"{prefix}layers.*.{norm}": "sequence" for norm in norms}
    return plan | {f"{prefix}norm": "sequence_end", f"{prefix}layers.0": "sequence_begin"}
