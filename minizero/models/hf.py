"""HuggingFace's `config.json` and our settings of a model, both ways: one table per `model_type`.

What a config asks for and our models do not have is refused: ignored, it would give a model that computes something
else. Keys that change nothing of what is computed (caches, initial values, names of tasks) are not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from pydantic import ValidationError

from minizero.config.problems import explain
from minizero.config.schema import ModelConfig, RopeScalingConfig

REQUIRED = object()
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
FLOATS = ("float32", "bfloat16", "float16", "float64")
OUTSIDE = ("rope_theta", "original_max_position_embeddings")  # rotary settings that may also stand beside their table
COMPUTED = re.compile(r"(.*\.)?(h\.\d+\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq)")
"""Masks and frequencies that older versions of transformers saved beside the weights."""


@dataclass(frozen=True)
class Key:
    """Where `config.json` has a setting: its spellings, of which we write the first, and what its absence means."""

    names: tuple[str, ...]
    default: Any = REQUIRED


@dataclass(frozen=True)
class Kind:
    """One `model_type`.

    Attributes:
        settings: of ours, for this kind. keys: our setting -> its key; `vocab_size` and `positions` too.
        fixed: key -> the values that our model is built for; the first is what its absence means.
    """

    settings: dict[str, Any]
    keys: dict[str, Key]
    fixed: dict[str, tuple[Any, ...]]


LLAMA_KEYS = {
    "vocab_size": Key(("vocab_size",)),
    "positions": Key(("max_position_embeddings",)),
    "hidden_size": Key(("hidden_size",)),
    "num_layers": Key(("num_hidden_layers",)),
    "num_heads": Key(("num_attention_heads",)),
    "num_kv_heads": Key(("num_key_value_heads",), None),
    "head_dim": Key(("head_dim",), None),
    "intermediate_size": Key(("intermediate_size",)),
    "norm_eps": Key(("rms_norm_eps",), 1e-6),
    "tie_embeddings": Key(("tie_word_embeddings",), False),
}
LLAMA_FIXED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "use_sliding_window": (False, None),
}
KINDS = {
    "gpt2": Kind(
        settings={"family": "gpt2"},
        keys={
            "vocab_size": Key(("vocab_size",)),
            "positions": Key(("n_positions", "max_position_embeddings")),
            "hidden_size": Key(("n_embd", "hidden_size")),
            "num_layers": Key(("n_layer", "num_hidden_layers")),
            "num_heads": Key(("n_head", "num_attention_heads")),
            "intermediate_size": Key(("n_inner",), None),
            "norm_eps": Key(("layer_norm_epsilon",), 1e-5),
            "tie_embeddings": Key(("tie_word_embeddings",), True),
            "dropout": Key(("resid_pdrop",), 0.1),
            "attention_dropout": Key(("attn_pdrop",), 0.1),
        },
        fixed={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
        },
    ),
    "llama": Kind({"family": "llama"}, LLAMA_KEYS, LLAMA_FIXED | {"sliding_window": (None,)}),
    "qwen3": Kind(  # its `sliding_window` says nothing while `use_sliding_window` is false
        {"family": "llama", "qk_norm": True}, LLAMA_KEYS | {"head_dim": Key(("head_dim",), 128)}, LLAMA_FIXED
    ),
}


class HuggingFaceNames:
    """What a model of ours, whose parameters have HuggingFace's names, knows of its counterpart there.

    Attributes:
        hf_base: the decoder below the head, which the files of a bare decoder leave out of every name.
        pretrained: the folder whose weights `minizero.initialize` will fill the model with; None: none, or done.
        origin: what its `config.json` had beside the settings: token ids, and the folder, as `_name_or_path`.
    """

    hf_base: ClassVar[str]
    pretrained: Path | None = None
    origin: Mapping[str, Any] = MappingProxyType({})

    def hf_config(self) -> dict[str, Any]:
        """The model as `config.json` has it."""
        raise NotImplementedError

    @staticmethod
    def spelled_out(config: ModelConfig) -> ModelConfig:
        """`config` with what None stands for in this family."""
        raise NotImplementedError

    def own_name(self, name: str) -> str | None:
        """The parameter that a file calls `name`; None for what is computed here, and not read."""
        if COMPUTED.fullmatch(name):
            return None
        return name if name.startswith((f"{self.hf_base}.", "lm_head.")) else f"{self.hf_base}.{name}"


# ---- from HuggingFace ----


def from_hf(config: Any, changes: Mapping[str, Any] = MappingProxyType({})) -> tuple[ModelConfig, int, int]:
    """(settings, vocabulary size, longest sequence) of a `config.json`; `changes` are settings that replace its own.

    Raises ValueError naming the key, its value and what is legal, for whatever our models do not have.
    """
    if not isinstance(config, dict):
        raise ValueError("no table of keys and values")
    kind = KINDS.get(str(config.get("model_type")))
    if kind is None:
        raise refused("model_type", config.get("model_type"), ", ".join(KINDS))
    for name, legal in kind.fixed.items():
        if name in config and config[name] not in legal:
            raise refused(name, config[name], " or ".join(map(repr, legal)))
    refuse_others(config)
    found = {setting: value_of(config, key) for setting, key in kind.keys.items()}
    sizes = [found.pop(setting) for setting in ("vocab_size", "positions")]
    for setting, size in zip(("vocab_size", "positions"), sizes, strict=True):
        if type(size) is not int or size < 1:
            raise refused(kind.keys[setting].names[0], size, "a whole number from 1")
    if "dropout" in found:
        embedding = config.get("embd_pdrop", 0.1)
        if embedding != found["dropout"] and "dropout" not in changes:
            ours = "load_hf(folder, dropout=P), or model.dropout = P beside model.pretrained"
            raise refused("embd_pdrop", embedding, f"{found['dropout']}, as resid_pdrop, or {ours}")
    else:
        found |= rotary(config)
    found |= changes
    if found.get("attention_dropout"):
        found.setdefault("attention", "eager")
    try:
        return ModelConfig(**kind.settings, **found), sizes[0], sizes[1]
    except ValidationError as error:
        line = explain(error, ModelConfig)[0]
        setting = line.partition(":")[0]
        is_theirs = setting in kind.keys and setting not in changes
        raise ValueError(f"{kind.keys[setting].names[0]} ({line})" if is_theirs else line) from None


def refused(key: str, value: Any, legal: str) -> ValueError:
    """The error that a config's key has a value that our models do not have."""
    return ValueError(f"{key} is {value!r}; legal here: {legal}")


def value_of(config: dict[str, Any], key: Key) -> Any:
    """The value under any spelling of `key`. Raises ValueError when it is missing, or two spellings disagree."""
    values = {name: config[name] for name in key.names if config.get(name) is not None}
    if len(set(map(repr, values.values()))) > 1:
        raise ValueError(f"{' and '.join(f'{name} = {value!r}' for name, value in values.items())} contradict")
    if not values and key.default is REQUIRED:
        raise ValueError(f"{' or '.join(key.names)} is missing; legal here: a value, since nothing else tells it")
    return next(iter(values.values()), key.default)


def refuse_others(config: dict[str, Any]) -> None:
    """Raise ValueError for what any kind may ask for."""
    dtype = value_of(config, Key(("dtype", "torch_dtype"), FLOATS[0]))
    if str(dtype).removeprefix("torch.") not in FLOATS:
        raise refused("dtype", dtype, ", ".join(FLOATS))
    if config.get("quantization_config"):
        raise refused("quantization_config", config["quantization_config"], "none: weights as they are")
    for layer in config.get("layer_types") or ():
        if layer != "full_attention":
            raise refused("layer_types", config["layer_types"], "'full_attention' for all layers")


def rotary(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, wherever transformers 4 or 5 keep them. Raises ValueError for other scalings."""
    flat, tables = {key: config.get(key) for key in OUTSIDE}, ("rope_parameters", "rope_scaling")
    for name in tables:
        if not (table := config.get(name)):
            continue
        if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
            raise refused(name, table, "one table for all layers")
        kind = table.get("rope_type", table.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise refused(f"{name}.rope_type", kind, "'default' or 'llama3'")
        if table.get("partial_rotary_factor", 1.0) != 1.0:
            raise refused(f"{name}.partial_rotary_factor", table["partial_rotary_factor"], "1.0")
        flat |= {f"{name}.{key}": value for key, value in {**table, "rope_type": kind}.items()}

    def value(key: str, default: Any = REQUIRED) -> Any:
        inside = (f"{name}.{key}" for name in tables)
        return value_of(flat, Key((key, *inside) if key in OUTSIDE else (*inside,), default))

    found = {"rope_theta": value("rope_theta", 10000.0)}
    if value("rope_type", "default") == "default":
        return found
    scaling = {key: value(key) for key in RopeScalingConfig.model_fields if key != "type"}
    return {**found, "rope_scaling": {"type": "llama3", **scaling}}


# ---- to HuggingFace ----


def to_hf(model_type: str, architecture: str, config: ModelConfig, vocab_size: int, positions: int) -> dict[str, Any]:
    """What `config.json` says of a model, in the spellings that every version of transformers reads."""
    kind, values = KINDS[model_type], {**config.model_dump(), "vocab_size": vocab_size, "positions": positions}
    found: dict[str, Any] = {"model_type": model_type, "architectures": [architecture]}
    found |= {key.names[0]: values[setting] for setting, key in kind.keys.items()}
    # The activation by its name; of what else is fixed, absence says the same.
    found |= {name: legal[0] for name, legal in kind.fixed.items() if isinstance(legal[0], str)}
    found |= {"embd_pdrop": config.dropout} if config.family == "gpt2" else {"rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling).type != "none":
        found["rope_scaling"] = {"rope_type": scaling.type, **scaling.model_dump(exclude={"type"})}
    return found | dict.fromkeys(TOKEN_IDS)  # none, where transformers would take those of the first such model
