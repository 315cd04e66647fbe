"""Settings that were given and have no effect, because of what other settings say: one line each, for a warning."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from minizero.config.schema import Config


def without_effect(config: Config) -> Iterator[str]:
    """A line for each setting that was given, differs from its default, and cannot act."""
    zero, precision = config.zero, config.precision
    idle: list[tuple[BaseModel, str, str, bool]] = [
        *((config.loss_scale, "loss_scale", key, precision != "fp16") for key in type(config.loss_scale).model_fields),
        (zero, "zero", "prefetch", zero.stage < 3),
        (zero, "zero", "gather_16bit_weights_on_model_save", zero.stage < 3),
        (zero, "zero", "gradient_predivide_factor", zero.prescale_gradients),
        (config.model, "model", "rope_theta", config.model.family != "llama"),
        *(
            (config.model.rope_scaling, "model.rope_scaling", key, config.model.rope_scaling.type == "none")
            for key in type(config.model.rope_scaling).model_fields
            if key != "type"
        ),
        *(
            (config.pipeline, "pipeline", key, config.parallel.pp == 1)
            for key in type(config.pipeline).model_fields
            if key != "microbatches"
        ),
        (config.recompute, "recompute", "partition_activations", config.parallel.tp == 1 or config.parallel.sequence),
        (config.log.tensorboard, "log.tensorboard", "dir", not config.log.tensorboard.enabled),
    ]
    reasons = {
        "loss_scale": f"precision is {precision}, not fp16",
        "zero": f"stage is {zero.stage}",
        "model": f"family is {config.model.family}",
        "model.rope_scaling": "its type is none",
        "pipeline": "parallel.pp is 1",
        "recompute": "inputs that differ on each rank are not partitioned (parallel.sequence)"
        if config.parallel.sequence
        else f"parallel.tp is {config.parallel.tp}",
        "log.tensorboard": "it is not enabled",
    }
    for section, name, key, is_idle in idle:
        default = type(section).model_fields[key].get_default(call_default_factory=True)
        if is_idle and key in section.model_fields_set and getattr(section, key) != default:
            why = "prescale_gradients is true" if key == "gradient_predivide_factor" else reasons[name]
            yield f"{name}.{key} has no effect: {why}"
