"""DeepSpeed's JSON: what acts, what has no effect, what is refused; checked against DeepSpeed's own source."""

import base64
import importlib
import inspect
import json
import sys
import warnings

import pytest
import torch

from minizero.config import ConfigError
from minizero.config.deepspeed import dotted_keys, from_deepspeed
from minizero.config.deepspeed_keys import ALIASES, OPTIMIZERS, TABLE, Block, Key
from minizero.config.load import from_any, load
from minizero.optim.build import build_optimizer

BATCH = {"train_micro_batch_size_per_gpu": 2}

EXAMPLE = """// deepspeed_config.json
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

FULL = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 1e4, "warmup_num_steps": 100}},
    "fp16": {
        "enabled": True,
        "loss_scale": 128,
        "initial_scale_power": 12,
        "loss_scale_window": 50,
        "hysteresis": 3,
        "consecutive_hysteresis": True,
        "min_loss_scale": 2,
    },
    "bf16": {"enabled": False},
    "gradient_clipping": 0.5,
    "communication_data_type": "FP32",
    "data_types": {"grad_accum_dtype": "torch.float16"},
    "prescale_gradients": True,
    "gradient_predivide_factor": 2,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "stage3_prefetch_bucket_size": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 5,
    "wall_clock_breakdown": True,
    "tensorboard": {"enabled": True, "output_path": "tb", "job_name": "job"},
    "tensor_parallel": {"autotp_size": 2, "tp": {"tp_size": 2}},
    "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True},
}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_every_acting_key_arrives():
    config = from_deepspeed(FULL)
    train, zero, scale, log = config.train, config.zero, config.loss_scale, config.log
    assert (train.global_batch_size, train.micro_batch_size, train.gradient_accumulation_steps) == (64, 2, 4)
    assert (train.gradient_clipping, config.precision) == (0.5, "fp16")
    assert (config.optimizer.type, config.optimizer.lr, config.optimizer.weight_decay) == ("AdamW", 3e-4, 0.1)
    assert config.optimizer.params == {"betas": [0.9, 0.95], "eps": 1e-7}
    assert config.scheduler.params == {"total_num_steps": 10_000, "warmup_num_steps": 100}
    assert isinstance(config.scheduler.params["total_num_steps"], int)
    assert (scale.static, scale.initial_power, scale.window, scale.minimum) == (128, 12, 50, 2)
    assert (scale.hysteresis, scale.consecutive_hysteresis) == (3, True)
    assert (zero.stage, zero.overlap, zero.prefetch) == (3, True, False)
    assert (zero.offload_optimizer, zero.offload_param) == ("cpu", "cpu")
    assert (zero.reduce_dtype, zero.accumulation_dtype) == ("fp32", "fp16")
    assert (zero.prescale_gradients, zero.gradient_predivide_factor) == (True, 2.0)
    assert zero.gather_16bit_weights_on_model_save and zero.allow_untested_optimizer
    assert (log.every, log.wall_clock_breakdown) == (5, True)
    assert config.parallel.tp == 2
    assert config.recompute.partition_activations and config.recompute.cpu_checkpointing
    assert (log.tensorboard.enabled, log.tensorboard.dir, log.tensorboard.job_name) == (True, "tb", "job")


def test_every_key_that_acts_in_the_table_is_one_that_the_full_example_gives():
    given = {f"{block}.{key}" for block, keys in FULL.items() if isinstance(keys, dict) for key in keys} | set(FULL)
    given |= {"zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device"}
    given |= {"tensor_parallel.tp.tp_size"}
    given |= {"zero_optimization.cpu_offload", "zero_optimization.cpu_offload_param"}  # their own test
    for key in dotted_keys(TABLE):
        rule = Block(TABLE)
        for part in key.split("."):
            rule = rule.keys[part]
        if isinstance(rule, Key) and rule.action == "acts":
            assert key in given, f"{key} acts, and no test gives it"


def test_our_own_settings_in_a_block():
    tree = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}
    config = from_deepspeed({**tree, "minizero": {"debug": {"collectives": True}, "zero": {"prefetch": False}}})
    assert (config.debug.collectives, config.zero.prefetch, config.zero.stage) == (True, False, 2)
    with pytest.raises(ConfigError, match="stage is given in DeepSpeed's words too"):
        from_deepspeed({**tree, "minizero": {"zero": {"stage": 3}}})
    with pytest.raises(ConfigError, match="colectives"):
        from_deepspeed({**tree, "minizero": {"debug": {"colectives": True}}})


def test_auto_and_its_meaning_are_said():
    tree = {
        "train_batch_size": 8,
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    }
    with pytest.warns(UserWarning, match='"auto" names no value here .* bf16.enabled, optimizer.params.lr'):
        from_deepspeed(tree)


def test_three_ways_in_and_comments(tmp_path):
    path = tmp_path / "deepspeed_config.json"
    path.write_text(EXAMPLE)
    config = from_deepspeed(path)
    assert (config.zero.stage, config.zero.offload_optimizer, config.train.global_batch_size) == (3, "cpu", 32)
    encoded = base64.urlsafe_b64encode(EXAMPLE.encode()).decode()
    assert from_deepspeed(encoded) == from_any(encoded) == from_any(path) == load(path).config == config
    assert load(path, ["--zero.stage=2"]).origins["zero.stage"] == "command line"
    assert load(path).origins["zero.offload_optimizer"] == f"file {path}"
    assert load(path).origins["precision"] == "default"


def test_defaults_are_those_of_the_contract():
    config = from_deepspeed(BATCH)
    assert config.train.gradient_clipping == 1.0  # as its source says since 0.19; older releases did not clip
    assert config.zero.accumulation_dtype == "fp32"
    assert (config.zero.stage, config.precision) == (0, "fp32")


@pytest.mark.parametrize(
    ("block", "type_", "weight_decay"),
    [
        ({"type": "Adam"}, "AdamW", 0),
        ({"type": "ADAMW"}, "AdamW", 0),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, "Adam", 0),
        ({"type": "AdamW", "params": {"adam_w_mode": False}}, "AdamW", 0),
        ({"type": "Adam", "params": {"torch_adam": True}}, "AdamW", 0.01),
        ({"type": "Adam", "params": {"torch_adam": True, "adam_w_mode": False}}, "Adam", 0),
        ({"type": "adam", "params": {"weight_decay": 0.3, "torch_adam": True, "lr": "auto"}}, "AdamW", 0.3),
    ],
)
def test_adam_is_which_adam(block, type_, weight_decay):
    config = from_deepspeed({**BATCH, "optimizer": block})
    assert (config.optimizer.type, config.optimizer.weight_decay) == (type_, weight_decay)
    assert not config.optimizer.params


def test_the_learning_rate_left_out_is_the_optimizer_s_own():
    for name in OPTIMIZERS:
        if name != "Lion":
            cls = getattr(torch.optim, name)
            default = cls([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"]
            assert from_deepspeed({**BATCH, "optimizer": {"type": name}}).optimizer.lr == default, name


@pytest.mark.parametrize(
    ("type_", "module", "classes"),
    [("Adam", "adam", ("FusedAdam", "DeepSpeedCPUAdam")), ("Lion", "lion", ("FusedLion", "DeepSpeedCPULion"))],
)
def test_parameters_left_out_are_those_of_deepspeed_s_own_classes(type_, module, classes):
    ours = build_optimizer(from_deepspeed({**BATCH, "optimizer": {"type": type_}}).optimizer, [torch.zeros(1)]).defaults
    for name in classes:
        cls = getattr(importlib.import_module(f"deepspeed.ops.{module}"), name)
        theirs = {key: value.default for key, value in inspect.signature(cls).parameters.items()}
        for key in {"lr", "betas", "eps", "weight_decay"} & set(theirs):
            assert ours[key] == theirs[key], f"{name}: {key}"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, ["train_batch_size", "train_micro_batch_size_per_gpu"]),
        ({"gradient_accumulation_steps": 2}, ["train_batch_size"]),
        ({"train_batch_size": "auto"}, ["train_batch_size", "auto", "give a number"]),
        ({**BATCH, "zero_optimization": {"stage": 4}}, ["zero_optimization.stage: found 4", "<= 3"]),
        ({**BATCH, "zero_optimization": {"stag": 1}}, ["zero_optimization.stag", "zero_optimization.stage"]),
        ({**BATCH, "zero_optimisation": {}}, ["zero_optimisation", "zero_optimization"]),
        ({**BATCH, "overlap_comm": True}, ["overlap_comm", "zero_optimization.overlap_comm"]),
        ({**BATCH, "fp16": {"enabled": True}, "bf16": {"enabled": True}}, ["fp16.enabled", "bf16.enabled"]),
        ({**BATCH, "bfloat16": {}, "bf16": {}}, ["bfloat16", "bf16", "two names"]),
        ({**BATCH, "fp16": {"loss_scale": True}}, ["fp16.loss_scale: found true"]),
        ({**BATCH, "fp16": {"loss_scale": float("inf")}}, ["fp16.loss_scale: found inf"]),
        ({**BATCH, "optimizer": {"type": "OneBitAdam"}}, ["optimizer.type", "OneBitAdam", "compressed"]),
        ({**BATCH, "optimizer": {"type": "Lamb"}}, ["optimizer.type", "norm of whole tensors"]),
        ({**BATCH, "optimizer": {"type": "Muon"}}, ["optimizer.type", "whole matrices"]),
        ({**BATCH, "optimizer": {"type": "Adan"}}, ["optimizer.type", "Adan", "Adam"]),
        ({**BATCH, "optimizer": {"params": {"lr": 1}}}, ["optimizer.type", "required"]),
        (
            {**BATCH, "optimizer": {"type": "Adam", "params": {"max_grad_norm": 1}}},
            ["max_grad_norm", "gradient_clipping"],
        ),
        ({**BATCH, "optimizer": {"type": "Adam", "params": {"beta": 1}}}, ["optimizer.params.beta", "betas"]),
        ({**BATCH, "optimizer": {"type": "Adam", "params": {"lr": "1"}}}, ["optimizer.params.lr: found '1'"]),
        ({**BATCH, "optimizer": {"type": "Adam", "params": {"betas": [0.9]}}}, ["optimizer.params.betas"]),
        ({**BATCH, "optimizer": {"type": "SGD", "params": {"betas": [0.9, 0.9]}}}, ["optimizer.params.betas", "SGD"]),
        ({**BATCH, "scheduler": {"type": "WarmupDecayLR"}}, ["total_num_steps", "required"]),
        ({**BATCH, "scheduler": {"type": "StepLR", "params": {}}}, ["scheduler.type", "StepLR", "WarmupLR"]),
        (
            {**BATCH, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1.5}}},
            ["warmup_num_steps", "1.5"],
        ),
        (
            {**BATCH, "zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            ["offload_optimizer.device", "NVMe"],
        ),
        (
            {**BATCH, "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            ["offload_param.device", "zero_optimization.stage", "needs 3"],
        ),
        (
            {**BATCH, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            ["offload_optimizer.device", "stage 0 found", "needs 1 or 2 or 3"],
        ),
        (
            {**BATCH, "zero_optimization": {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
            ["cpu_offload", "offload_optimizer.device"],
        ),
        ({**BATCH, "zero_optimization": {"zero_quantized_weights": True}}, ["zero_quantized_weights", "refused"]),
        ({**BATCH, "elasticity": {"enabled": True}}, ["elasticity.enabled", "refused"]),
        ({**BATCH, "autotuning": {"enabled": False, "fats": 1}}, ["autotuning.fats", "autotuning.fast"]),
        ({**BATCH, "sparse_gradients": True}, ["sparse_gradients", "refused"]),
        ({**BATCH, "gradient_allreduce_op": "sum"}, ["gradient_allreduce_op", "refused", "mean"]),
        ({**BATCH, "steps_per_print": 0}, ["steps_per_print: found 0"]),
        ({**BATCH, "fp16": 3}, ["fp16: found 3"]),
    ],
)
def test_what_is_wrong_or_refused_is_named(config, says):
    with pytest.raises(ConfigError) as error:
        from_deepspeed(config)
    for text in says:
        assert text in str(error.value)


@pytest.mark.parametrize("text", ['{"train_batch_size": 8,}', '\ufeff{"train_batch_size": 8 , // last\n }'])
def test_json_as_lenient_as_deepspeed_s(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert from_deepspeed(path).train.global_batch_size == 8


@pytest.mark.parametrize("text", ["{,}", '{"train_batch_size": 8,,}', '{"train_batch_size": ,}', '{"scheduler": [,]}'])
def test_a_comma_after_nothing_is_still_an_error(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="line 1"):
        from_deepspeed(path)


def test_a_comma_in_a_text_stays(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"train_batch_size": 8, "tensorboard": {"job_name": "a,}"}}')
    assert from_deepspeed(path).log.tensorboard.job_name == "a,}"


def test_a_config_with_every_key_misspelt_is_still_recognized():
    with pytest.raises(ConfigError, match="did you mean train_batch_size") as error:
        from_any({"train_batch_sze": 8, "zero_optimizaton": {}, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}})
    assert "did you mean zero_optimization?" in str(error.value)
    with pytest.raises(ConfigError, match="did you mean precision"):
        from_any({"precison": "bf16"})


def test_duplicate_keys_are_an_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"train_batch_size": 8, "train_batch_size": 9}')
    with pytest.raises(ConfigError, match="train_batch_size"):
        from_deepspeed(path)


@pytest.mark.parametrize(
    "extra",
    [
        {"autotuning": {"enabled": False}},
        {"sparse_gradients": False},
        {"compile": {"deepcompile": False}},
        {"zero_optimization": {"zero_quantized_weights": False, "zero_hpz_partition_size": 1, "offload_param": None}},
        {"zero_optimization": {"offload_optimizer": {"device": "none"}, "overlap_comm": None, "stage": "auto"}},
        {"fp16": {"enabled": "auto", "loss_scale": "auto"}, "gradient_clipping": "auto", "optimizer": {}},
        {"tensorboard": {}, "wandb": {"enabled": False, "project": "x"}, "amp": {"enabled": False}},
    ],
)
def test_features_that_are_off_are_accepted(extra):
    assert from_deepspeed({**BATCH, **extra}) == from_deepspeed(BATCH)


def test_what_has_no_effect_is_said():
    config = {
        **BATCH,
        "zero_optimization": {"reduce_bucket_size": 5e8, "contiguous_gradients": True},
        "wandb": {"enabled": True},
    }
    with pytest.warns(UserWarning, match="without effect") as caught:
        from_deepspeed(config)
    text = str(caught[0].message)
    assert all(key in text for key in ("zero_optimization.reduce_bucket_size", "contiguous_gradients", "wandb.enabled"))


def test_older_spellings():
    assert from_deepspeed({**BATCH, "zero_optimization": True}).zero.stage == 1
    assert from_deepspeed({**BATCH, "zero_optimization": False}).zero.stage == 0
    old = {"stage": 3, "cpu_offload": True, "cpu_offload_param": True, "prefetch_bucket_size": 0}
    zero = from_deepspeed(
        {**BATCH, "zero_optimization": {**old, "stage3_gather_fp16_weights_on_model_save": True}}
    ).zero
    assert (zero.offload_optimizer, zero.offload_param, zero.prefetch) == ("cpu", "cpu", False)
    assert zero.gather_16bit_weights_on_model_save
    assert from_deepspeed({**BATCH, "bfloat16": {"enabled": True}}).precision == "bf16"


@pytest.mark.parametrize("never", [float("inf"), 10**400, 1e300, None])
def test_steps_per_print_may_be_never(never):
    assert from_deepspeed({**BATCH, "steps_per_print": never}).log.every == sys.maxsize


def known_to_deepspeed():
    """(block, keys) as DeepSpeed's own classes name them, by field name and alias."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime import config as ds
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "hybrid_engine": ds.HybridEngineConfig,
        "tensor_parallel": TPTrainingConfig,
    }
    for block, model in models.items():
        yield block, set(model.model_fields) | {f.alias for f in model.model_fields.values() if f.alias}
    yield "", set(ds._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    yield "zero_optimization", set(ds._REMOVED_ZERO_CONFIG_KEYS)


def test_the_table_knows_every_key_of_the_installed_deepspeed():
    for path, keys in known_to_deepspeed():
        block = Block(TABLE)
        for part in filter(None, path.split(".")):
            block = block.keys[part]
        prefix = f"{path}." if path else ""
        missing = {key for key in keys if ALIASES.get(prefix + key, key) not in block.keys}
        assert not missing, f"{path}: {missing}"


def test_what_is_accepted_is_json():
    config = from_deepspeed(FULL)
    assert type(config).model_validate_json(json.dumps(config.model_dump())) == config


class Asked(dict):
    """A config that notes which keys it is asked for."""

    keys_asked: set[str] = set()

    def get(self, key, default=None):
        self.keys_asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.keys_asked.add(key)
        return super().__contains__(key)


def test_the_table_knows_every_key_that_deepspeed_asks_its_config_for():
    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig(Asked(train_batch_size=1))
    assert {"zero_optimization", "optimizer"} & Asked.keys_asked and len(Asked.keys_asked) > 40
    assert {ALIASES.get(key, key) for key in Asked.keys_asked} <= set(TABLE)
