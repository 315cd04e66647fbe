"""Reads DeepSpeed's JSON. This file and its table, `deepspeed_keys.py`, are the only ones that know its key names.

One warning lists the keys that were accepted without effect. Keys that DeepSpeed does not know are errors at every
level; DeepSpeed itself ignores them at the top.

A block `"minizero": {...}` may hold settings of ours that DeepSpeed has no name for, such as `debug` and `dist`.

`gradient_clipping` left out means 1.0, as in DeepSpeed's source since 0.19 (older releases: off). Three differences, on
purpose. Gradients are summed in fp32 unless `data_types.grad_accum_dtype` says otherwise
(DeepSpeed: in the model's dtype). `steps_per_print` left out means 10, as its documentation says (source: never).
`"auto"` means the default everywhere, also at the top level, where DeepSpeed expects a launcher to have filled it in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from minizero.config.batch import BatchSizes
from minizero.config.build import build
from minizero.config.deepspeed_keys import (
    ALIASES,
    NO_OPTIMIZER,
    NVME,
    ONLY_DEEPSPEED,
    OPTIMIZERS,
    SHORT_DTYPE,
    TABLE,
    Block,
    Fraction,
    Key,
    NotNegative,
    acts,
    whole,
)
from minizero.config.errors import ConfigError
from minizero.config.files import decode_base64, read_tree
from minizero.config.problems import describe, found, legal, nearest
from minizero.config.schedules import PARAMS
from minizero.config.schema import Config
from minizero.utils.warnings import warn_once

Tree = dict[str, Any]


# ------------------------------------------------------------------------------------------------- reading


def from_deepspeed(source: Tree | str | Path) -> Config:
    """The settings of a DeepSpeed config: a dict, a path to JSON with comments, or a base64-urlsafe JSON string.

    Raises ConfigError with one line per problem.
    """
    tree = source if isinstance(source, dict) else _read(source)
    translated = translate(tree)
    train = translated.get("train", {})
    if train.get("global_batch_size") is None and train.get("micro_batch_size") is None:
        keys = ("train_batch_size", "train_micro_batch_size_per_gpu")
        auto = [key for key in keys if tree.get(key) == "auto"]
        why = f'{" and ".join(auto)} "auto" names no size' if auto else "no batch size is given"
        raise ConfigError(f"{why}: give a number for train_batch_size or train_micro_batch_size_per_gpu, or both")
    return build(translated)


def _read(source: str | Path) -> Tree:
    decoded = decode_base64(source) if isinstance(source, str) else None
    return decoded if decoded is not None else read_tree(Path(source))


class Reader:
    """One walk over a config: what acts, what has no effect, and what is wrong.

    Attributes:
        acting: dotted DeepSpeed key -> value, for the keys that act.
        without_effect: a line per key that was accepted without effect.
        problems: a line per mistake.
    """

    def __init__(self, tree: Tree) -> None:
        self.acting: Tree = {}
        self.without_effect: list[str] = []
        self.problems: list[str] = []
        self._block(tree, Block(TABLE), "")

    def get(self, key: str, default: Any = None) -> Any:
        return self.acting.get(key, default)

    def contradiction(self, *keys: str, why: str) -> None:
        self.problems.append(f"{' and '.join(keys)} contradict each other: {why}")

    def _block(self, tree: Any, block: Block, path: str) -> None:
        """Read a group of settings."""
        if tree is None or tree == "auto" or (tree is False and block.feature):
            return
        if not isinstance(tree, dict):
            self.problems.append(f"{path}: found {found(tree)}; legal: an object of settings")
            return
        prefix = f"{path}." if path else ""
        known = dict(self._known(tree, block, prefix))
        if block.feature is not None:
            switched_on = tree.get(block.switch, False) not in (False, "auto", None)
            if switched_on:
                self._key(tree[block.switch], block.feature, f"{prefix}{block.switch}")
            return
        for name, value in known.items():
            rule = block.keys[name]
            if isinstance(rule, Key):
                self._key(value, rule, prefix + name)
            elif rule.also is bool and isinstance(value, bool):
                self.acting[f"{prefix}{name}.stage"] = int(value)  # DeepSpeed's oldest form: true is stage 1
            else:
                self._block(value, rule, prefix + name)

    def _known(self, tree: Tree, block: Block, prefix: str) -> Iterator[tuple[str, Any]]:
        """(current name, value) of each key; unknown ones and two spellings of one are problems."""
        spelled: dict[str, str] = {}
        for name, value in tree.items():
            current = ALIASES.get(f"{prefix}{name}", name)
            if not isinstance(name, str) or current not in block.keys:
                hint = near_key(str(name), prefix, list(block.keys))
                self.problems.append(f"{prefix}{name}: DeepSpeed has no such key; {hint}")
            elif current in spelled:
                self.contradiction(prefix + spelled[current], prefix + name, why="they are two names of one setting")
            else:
                spelled[current] = name
                yield current, value

    def _key(self, value: Any, rule: Key, path: str) -> None:
        """Read one setting."""
        if isinstance(value, str) and value == "auto":
            return
        try:
            value = rule.validator.validate_python(value)
        except ValidationError:
            self.problems.append(f"{path}: found {found(value)}; legal: {describe(rule.kind)}")
            return
        if rule.action == "acts":
            self.acting[path] = value
        elif rule.action == "ignored":
            self.without_effect.append(f"{path} ({rule.why})")
        elif value not in rule.off:
            off = f"; legal: {' or '.join(found(v) for v in rule.off)}" if rule.off else "; legal: false"
            self.problems.append(f"{path}: found {found(value)}, refused: {rule.why}{off}")


def near_key(name: str, prefix: str, siblings: list[str]) -> str:
    """The nearest known key: that name in another block, else one like it in this block, else the block's few."""
    elsewhere = [key for key in dotted_keys(TABLE) if key.rpartition(".")[2] == name]
    if elsewhere and len(elsewhere) < 4:
        return f"did you mean {' or '.join(elsewhere)}?"
    hint = nearest(f"{prefix}{name}", [prefix + key for key in siblings])
    return hint if hint.startswith("did you mean") or len(siblings) < 9 else f"{len(siblings)} keys are known here"


def dotted_keys(block: dict[str, Key | Block], prefix: str = "") -> Iterator[str]:
    """Every key of the table, with the names of its blocks before it."""
    for name, rule in block.items():
        yield prefix + name
        if isinstance(rule, Block):
            yield from dotted_keys(rule.keys, f"{prefix}{name}.")


# --------------------------------------------------------------------------------------------- translating


def translate(tree: Tree) -> Tree:
    """A DeepSpeed config as a tree with minizero's keys, holding only what was given. Raises ConfigError."""
    own = tree.get("minizero", {})  # settings that DeepSpeed has no name for, in ours
    tree = {key: value for key, value in tree.items() if key != "minizero"}
    reader = Reader(tree)
    translated: Tree = {}
    for section in (_train, _precision, _zero, _parallel, _recompute, _log):
        for key, value in section(reader):
            if value is not None:
                _put(translated, key, value)
    if "optimizer" in tree:
        translated["optimizer"] = _optimizer(reader)
    if scheduler := _scheduler(reader):
        translated["scheduler"] = scheduler
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))
    if reader.without_effect:
        warn_once("DeepSpeed settings accepted without effect: " + "; ".join(by_reason(reader.without_effect)))
    if autos := list(dotted_autos(tree)):
        warn_once(f'"auto" names no value here and stands for the default: {", ".join(autos)}')
    return merged(translated, own)


def by_reason(lines: list[str]) -> list[str]:
    """`key (reason)` lines, keys of one reason together."""
    keys: dict[str, list[str]] = {}
    for line in lines:
        key, _, reason = line.partition(" ")
        keys.setdefault(reason, []).append(key)
    return [f"{', '.join(names)} {reason}" for reason, names in keys.items()]


def dotted_autos(tree: Tree, prefix: str = "") -> Iterator[str]:
    """The keys whose value is "auto"."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from dotted_autos(value, f"{prefix}{key}.")
        elif _is_auto(value):
            yield f"{prefix}{key}"


def merged(tree: Tree, more: Any) -> Tree:
    """`tree` with the settings of `more` in it. Raises ConfigError where the two say the same."""
    if not isinstance(more, dict):
        raise ConfigError(f"minizero: found {found(more)}; legal: an object of minizero's settings")
    result = dict(tree)
    for key, value in more.items():
        if key in result and isinstance(result[key], dict) and isinstance(value, dict):
            result[key] = merged(result[key], value)
        elif key in result:
            raise ConfigError(f"minizero: {key} is given in DeepSpeed's words too")
        else:
            result[key] = value
    return result


Pairs = Iterator[tuple[str, Any]]


def _put(tree: Tree, key: str, value: Any) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value


def _train(reader: Reader) -> Pairs:
    yield "train.global_batch_size", reader.get("train_batch_size")
    yield "train.micro_batch_size", reader.get("train_micro_batch_size_per_gpu")
    yield "train.gradient_accumulation_steps", reader.get("gradient_accumulation_steps")
    yield "train.gradient_clipping", reader.get("gradient_clipping")


def _precision(reader: Reader) -> Pairs:
    fp16, bf16 = reader.get("fp16.enabled", False), reader.get("bf16.enabled", False)
    if fp16 and bf16:
        reader.contradiction("fp16.enabled", "bf16.enabled", why="enable one of them")
    yield "precision", "fp16" if fp16 else "bf16" if bf16 else None
    yield "loss_scale.static", reader.get("fp16.loss_scale")
    yield "loss_scale.initial_power", reader.get("fp16.initial_scale_power")
    yield "loss_scale.window", reader.get("fp16.loss_scale_window")
    yield "loss_scale.hysteresis", reader.get("fp16.hysteresis")
    yield "loss_scale.consecutive_hysteresis", reader.get("fp16.consecutive_hysteresis")
    yield "loss_scale.minimum", reader.get("fp16.min_loss_scale")


def _zero(reader: Reader) -> Pairs:
    stage = reader.get("zero_optimization.stage", 0)
    yield "zero.stage", reader.get("zero_optimization.stage")
    yield "zero.overlap", reader.get("zero_optimization.overlap_comm")
    bucket = reader.get("zero_optimization.stage3_prefetch_bucket_size")
    yield "zero.prefetch", None if bucket is None else bucket > 0
    yield "zero.reduce_dtype", reader.get("communication_data_type")
    accumulation = reader.get("data_types.grad_accum_dtype")
    yield "zero.accumulation_dtype", SHORT_DTYPE.get(accumulation, accumulation)
    yield "zero.prescale_gradients", reader.get("prescale_gradients")
    yield "zero.gradient_predivide_factor", reader.get("gradient_predivide_factor")
    yield "zero.offload_optimizer", _offload(reader, "offload_optimizer", "cpu_offload", stage, (1, 2, 3))
    yield "zero.offload_param", _offload(reader, "offload_param", "cpu_offload_param", stage, (3,))
    gather = reader.get("zero_optimization.stage3_gather_16bit_weights_on_model_save")
    yield "zero.gather_16bit_weights_on_model_save", gather
    yield "zero.allow_untested_optimizer", reader.get("zero_allow_untested_optimizer")


def _offload(reader: Reader, block: str, legacy: str, stage: int, stages: tuple[int, ...]) -> str | None:
    """The device of an offload block, or of the old switch in its place."""
    key, old = f"zero_optimization.{block}.device", f"zero_optimization.{legacy}"
    device = reader.get(key)
    if reader.get(old):
        if device is not None:
            reader.contradiction(old, key, why=f"{legacy} is the old name; leave it out")
        key, device = old, "cpu"
    if device == "nvme":
        reader.problems.append(f"{key}: found 'nvme', refused: {NVME}; legal: 'none', 'cpu'")
    elif device == "cpu" and stage not in stages:
        legal_stages = " or ".join(map(str, stages))
        reader.contradiction(
            key, "zero_optimization.stage", why=f"stage {stage} found, offloading needs {legal_stages}"
        )
    return device


def _parallel(reader: Reader) -> Pairs:
    auto, size = reader.get("tensor_parallel.autotp_size", 0), reader.get("tensor_parallel.tp.tp_size", 1)
    if auto > 1 and size > 1 and auto != size:
        reader.contradiction("tensor_parallel.autotp_size", "tensor_parallel.tp.tp_size", why=f"{auto} and {size}")
    yield "parallel.tp", max(auto, size) if max(auto, size) > 1 else None


def _recompute(reader: Reader) -> Pairs:
    block = "activation_checkpointing"
    yield "recompute.partition_activations", reader.get(f"{block}.partition_activations")
    yield "recompute.cpu_checkpointing", reader.get(f"{block}.cpu_checkpointing")


def _log(reader: Reader) -> Pairs:
    yield "log.every", reader.get("steps_per_print")
    yield "log.wall_clock_breakdown", reader.get("wall_clock_breakdown")
    enabled = reader.get("tensorboard.enabled")
    yield "log.tensorboard.enabled", enabled
    yield "log.tensorboard.dir", reader.get("tensorboard.output_path") or None
    yield "log.tensorboard.job_name", reader.get("tensorboard.job_name", "DeepSpeedJobName" if enabled else None)


def to_deepspeed(config: Config, batch: BatchSizes) -> Tree:
    """The main settings under DeepSpeed's names, for scripts that read `engine.config`."""
    zero, scale = config.zero, config.loss_scale
    return {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": config.train.gradient_clipping,
        "fp16": {"enabled": config.precision == "fp16", "loss_scale": scale.static},
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": {
            "stage": zero.stage,
            "offload_optimizer": {"device": zero.offload_optimizer},
            "offload_param": {"device": zero.offload_param},
            "stage3_gather_16bit_weights_on_model_save": zero.gather_16bit_weights_on_model_save,
        },
        "steps_per_print": config.log.every,
        "wall_clock_breakdown": config.log.wall_clock_breakdown,
    }


# ------------------------------------------------------------------------------- optimizers and schedules


def _optimizer(reader: Reader) -> Tree:
    """DeepSpeed's optimizer block in minizero's form; {} when there is none, or it is wrong."""
    type_ = reader.get("optimizer.type")
    params = {k: v for k, v in (reader.get("optimizer.params") or {}).items() if not _is_auto(v)}
    if type_ is None:
        if params:
            reader.problems.append(f"optimizer.type: required with optimizer.params; legal: {', '.join(OPTIMIZERS)}")
        return {}
    by_lower = {name.lower(): name for name in OPTIMIZERS}
    plain = type_.lower().replace("_", "")
    if plain not in by_lower:
        why = f", refused: {NO_OPTIMIZER[plain]}" if plain in NO_OPTIMIZER else f"; {nearest(type_, list(OPTIMIZERS))}"
        reader.problems.append(f"optimizer.type: found {found(type_)}{why}; legal: {', '.join(OPTIMIZERS)}")
        return {}
    name = by_lower[plain]
    lr, further = OPTIMIZERS[name]
    _check_optimizer_params(reader, name, params, ["lr", "weight_decay", *further.split()])
    weight_decay = 0.0
    if name in ("Adam", "AdamW"):
        # DeepSpeed's Adam is AdamW unless adam_w_mode is false; its AdamW ignores adam_w_mode. torch_adam picks torch's
        # implementation of the same, whose AdamW decays weights by 0.01 where its own decays them by 0.
        name = "AdamW" if name == "AdamW" or params.get("adam_w_mode", True) else "Adam"
        weight_decay = 0.01 if name == "AdamW" and params.get("torch_adam") else 0.0
    rest = {k: v for k, v in params.items() if k not in ("lr", "weight_decay", *ONLY_DEEPSPEED)}
    if name == "Lion":
        rest.setdefault("betas", [0.9, 0.999])  # DeepSpeed's default, not the paper's 0.99 that minizero's Lion has
    found_lr, found_decay = params.get("lr", lr), params.get("weight_decay", weight_decay)
    return {"type": name, "lr": found_lr, "weight_decay": found_decay, "params": rest}


def _check_optimizer_params(reader: Reader, name: str, params: Tree, known: list[str]) -> None:
    """Problems of names and values in optimizer.params."""
    kinds: dict[str, Any] = {
        "lr": NotNegative,
        "weight_decay": NotNegative,
        "eps": NotNegative,
        "momentum": NotNegative,
        "betas": list[Fraction] | tuple[Fraction, Fraction],
        **dict.fromkeys((*ONLY_DEEPSPEED, "amsgrad", "nesterov"), bool | None),
    }
    for key, value in params.items():
        path = f"optimizer.params.{key}"
        if key == "max_grad_norm":
            reader.problems.append(f"{path}: refused, as in DeepSpeed: clipping is the top-level key gradient_clipping")
        elif key not in known:
            reader.problems.append(f"{path}: {name} takes no such parameter; {nearest(str(key), known)}")
        elif key in kinds and not _fits(kinds[key], value):
            reader.problems.append(f"{path}: found {found(value)}; legal: {describe(kinds[key])}")
        elif key == "betas" and len(value) != 2:
            reader.problems.append(f"{path}: found {found(value)}; legal: a list of two numbers")
        elif key == "bias_correction" and value is False:
            reader.problems.append(f"{path}: found false, refused: moments are always corrected; legal: true")
        elif key == "fp32_optimizer_states" and value is False:
            reader.problems.append(f"{path}: found false, refused: optimizer states are fp32; legal: true")
        elif key in ("set_grad_none", "torch_adam"):
            reader.without_effect.append(f"{path} (there is one implementation of each optimizer)")


def _scheduler(reader: Reader) -> Tree:
    """DeepSpeed's scheduler block in minizero's form; {} when there is none, or it is wrong."""
    type_ = reader.get("scheduler.type")
    params = {k: v for k, v in (reader.get("scheduler.params") or {}).items() if not _is_auto(v)}
    if type_ is None:
        if params:
            reader.problems.append(f"scheduler.type: required with scheduler.params; legal: {', '.join(PARAMS)}")
        return {}
    if type_ not in PARAMS:
        reader.problems.append(
            f"scheduler.type: found {found(type_)}; {nearest(type_, list(PARAMS))}; legal: {', '.join(PARAMS)}"
        )
        return {}
    fields = PARAMS[type_].model_fields
    integers = {name for name, field_ in fields.items() if legal(field_).startswith("an integer")}
    return {"type": type_, "params": {k: whole(v) if k in integers else v for k, v in params.items()}}


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"


def _fits(kind: Any, value: Any) -> bool:
    try:
        acts(kind).validator.validate_python(value)
    except ValidationError:
        return False
    return True
