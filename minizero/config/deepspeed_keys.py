"""Every key that DeepSpeed knows, in one table, with what becomes of it here.

The contract is DeepSpeed's source, release 0.19, not its documentation, where the two differ. Every key of it stands in
`TABLE` and either *acts*, is *accepted without effect*, or is *refused* when it switches a feature on that would change
what is trained.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter

# ----------------------------------------------------------------------------------------- kinds of values


def whole(value: Any) -> Any:
    """5e8 is an integer, as JSON writers print large ones."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def lower(value: Any) -> Any:
    """Names whose case does not matter."""
    return value.lower() if isinstance(value, str) else value


def steps_or_never(value: Any) -> Any:
    """Infinity, or anything an int64 does not hold, is never; so is null."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return sys.maxsize if value is None or (is_number and value > sys.maxsize) else whole(value)


Int = Annotated[int, BeforeValidator(whole)]
Count = Annotated[int, BeforeValidator(whole), Field(ge=0)]
PositiveInt = Annotated[int, BeforeValidator(whole), Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Device = Annotated[Literal["none", "cpu", "nvme"], BeforeValidator(lower)]
WireDtype = Annotated[Literal["fp32", "fp16", "bf16"], BeforeValidator(lower)]
AnyDtype = Literal["fp32", "fp16", "bf16", "float32", "float16", "bfloat16", "float", "half"]
SHORT_DTYPE = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float": "fp32", "half": "fp16"}


def bare(value: Any) -> Any:
    """torch.float32 is float32."""
    return value.removeprefix("torch.") if isinstance(value, str) else value


# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Key:
    """One setting: what it takes, what becomes of it, and why. `off` holds values that leave a refused feature off."""

    kind: Any
    action: Literal["acts", "ignored", "refused"]
    why: str = ""
    off: tuple[Any, ...] = ()

    @cached_property
    def validator(self) -> TypeAdapter[Any]:
        """Pydantic's validator of `kind`: strict, and nan and infinity are no numbers."""
        return TypeAdapter(self.kind, config=ConfigDict(strict=True, allow_inf_nan=False))


@dataclass(frozen=True)
class Block:
    """A group of settings. With `feature`, the whole group is off unless `switch` is true, and `feature` when on."""

    keys: dict[str, Key | Block] = field(default_factory=dict)
    feature: Key | None = None
    switch: str = "enabled"
    also: type[bool] | None = None  # a bare true/false is taken as well


def acts(kind: Any) -> Key:
    """A setting with the same effect as in DeepSpeed."""
    return Key(kind, "acts")


def ignored(kind: Any, why: str) -> Key:
    """A setting that needs no counterpart here."""
    return Key(kind, "ignored", why)


def refused(kind: Any, why: str, *off: Any) -> Key:
    """A setting that would change what is trained or stored, and is not built."""
    return Key(kind, "refused", why, off)


def unused(names: str, why: str) -> dict[str, Key | Block]:
    """Settings of any kind that have no effect, all for one reason."""
    return {name: ignored(Any, why) for name in names.split()}


def feature(why: str, names: str, switch: str = "enabled", *, harmless: bool = False) -> Block:
    """A group that is refused when switched on, or ignored if it is `harmless`."""
    keys = unused(f"{switch} {names}", why)
    return Block(keys, ignored(Any, why) if harmless else refused(Any, why), switch)


FLAT = "gradients and parameters always lie in flat buffers, one per unit"
UNITS = "parameters are gathered and dropped unit by unit, by a fixed plan"
NVME = "minizero does not offload to NVMe"
REMOVED = "it was removed from DeepSpeed too, and is not built here"
NOT_BUILT = "it is not built here"
RECOMPUTE = "nothing that is computed depends on it"
MONITOR = "metrics go to metrics.jsonl and TensorBoard"

ZERO: dict[str, Key | Block] = {
    "stage": acts(Annotated[int, BeforeValidator(whole), Field(ge=0, le=3)]),
    "overlap_comm": acts(bool | None),
    "stage3_prefetch_bucket_size": acts(Count),
    "stage3_gather_16bit_weights_on_model_save": acts(bool),
    "offload_optimizer": Block(
        {
            "device": acts(Device),
            "nvme_path": ignored(str | None, NVME),
            "buffer_count": ignored(Count, NVME),
            "pin_memory": ignored(bool, "host memory is pinned wherever a GPU reads it"),
            "pipeline_read": ignored(bool, NVME),
            "pipeline_write": ignored(bool, NVME),
            "fast_init": ignored(bool, NVME),
            "ratio": refused(Fraction, "the optimizer is offloaded whole or not at all", 1),
            "super_offload": refused(bool, NOT_BUILT, False),
            "cpuadam_cores_perc": ignored(Fraction, "it belongs to super_offload"),
        }
    ),
    "offload_param": Block(
        {
            "device": acts(Device),
            "nvme_path": ignored(str | None, NVME),
            "buffer_count": ignored(Count, NVME),
            "buffer_size": ignored(Count, NVME),
            "max_in_cpu": ignored(Count, NVME),
            "pin_memory": ignored(bool, "host memory is pinned wherever a GPU reads it"),
        }
    ),
    "cpu_offload": acts(bool | None),
    "cpu_offload_param": acts(bool | None),
    "cpu_offload_use_pin_memory": ignored(bool | None, "host memory is pinned wherever a GPU reads it"),
    "contiguous_gradients": ignored(bool, FLAT),
    "reduce_scatter": ignored(bool, "sharded gradients are always reduce-scattered"),
    "reduce_bucket_size": ignored(PositiveInt, "gradients are reduced unit by unit"),
    "use_multi_rank_bucket_allreduce": ignored(bool, "sharded gradients are always reduce-scattered"),
    "allgather_partitions": ignored(bool, "updated parameters are always all-gathered"),
    "allgather_bucket_size": ignored(Count, UNITS),
    "load_from_fp32_weights": ignored(bool, "fp32 masters are always restored from fp32"),
    "elastic_checkpoint": ignored(bool, "it is a legacy of DeepSpeed's own checkpoint format"),
    "sub_group_size": ignored(Count, "the optimizer updates a rank's whole shard at once"),
    "stage3_param_persistence_threshold": ignored(Count, UNITS),
    "stage3_model_persistence_threshold": ignored(Count, UNITS),
    "stage3_max_live_parameters": ignored(Count, UNITS),
    "stage3_max_reuse_distance": ignored(Count, UNITS),
    "stage3_module_granularity_threshold": ignored(Int, UNITS),
    "stage3_use_all_reduce_for_fetch_params": ignored(bool, UNITS),
    "stage3_allgather_sequential": ignored(bool, UNITS),
    "leaf_module": Block(unused("classes names name_suffixes", UNITS)),
    "compute_grad_norm": ignored(bool, "the gradient norm is always known"),
    "ignore_unused_parameters": ignored(bool, "parameters without a gradient are always legal"),
    "legacy_stage1": ignored(bool, "there is one implementation of stage 1"),
    "round_robin_gradients": ignored(bool, "offloaded gradients are copied unit by unit"),
    "parameter_alignment": ignored(bool, "the layout of flat buffers is the same for every stage"),
    "memory_efficient_linear": ignored(bool, "linear layers are not replaced"),
    "pipeline_loading_checkpoint": ignored(bool, "checkpoints are read shard by shard"),
    "override_module_apply": ignored(bool, "modules are not patched"),
    "log_trace_cache_warnings": ignored(bool, "there is no trace cache: " + UNITS),
    "enable_sanity_checks": ignored(bool, "the setting debug.collectives takes its place"),
    "save_muon_momentum_buffer_in_memory": ignored(bool, "Muon is not offered"),
    "grad_hooks": ignored(bool, "gradients are always reduced from hooks"),
    "zero_hpz_partition_size": refused(Count, "secondary shards within a node are not built", 0, 1),
    "zero_quantized_weights": refused(bool, "communication is never quantized", False),
    "zero_quantized_nontrainable_weights": refused(bool, "weights are never quantized", False),
    "zero_quantized_gradients": refused(bool, "communication is never quantized", False),
    "zeropp_loco_param": refused(Any, REMOVED, None),
    "mics_shard_size": refused(Int, REMOVED, -1),
    "mics_hierarchical_params_gather": refused(bool, REMOVED, False),
    "zenflow": refused(Any, NOT_BUILT, None),
}

PRECISION: dict[str, Key | Block] = {
    "fp16": Block(
        {
            "enabled": acts(bool),
            "loss_scale": acts(NotNegative),
            "initial_scale_power": acts(Annotated[int, BeforeValidator(whole), Field(ge=0, le=120)]),
            "loss_scale_window": acts(PositiveInt),
            "hysteresis": acts(PositiveInt),
            "consecutive_hysteresis": acts(bool),
            "min_loss_scale": acts(Positive),
            "auto_cast": ignored(bool, "floating inputs of the model are always cast to its dtype"),
            "fp16_master_weights_and_grads": refused(bool, "masters are fp32", False),
        }
    ),
    "bf16": Block(
        {
            "enabled": acts(bool),
            "immediate_grad_update": ignored(bool, "gradients accumulate as they are produced, always"),
            "check_grad_overflow": ignored(bool, "a gradient that is not finite is always noticed"),
            "bf16_master_weights_and_grads": refused(bool, "masters are fp32", False),
            "bf16_optimizer_states": refused(bool, "optimizer states are fp32", False),
        }
    ),
    "data_types": Block(
        {
            "grad_accum_dtype": acts(Annotated[AnyDtype | None, BeforeValidator(bare)]),
            "param_dtype": refused(str | None, "fp16 and bf16 decide it", None),
            "buffer_dtype": refused(str | None, "buffers keep the dtype they were made in", None),
            "keep_in_fp32_modules": refused(list[str], "every parameter has the dtype that fp16 or bf16 name", []),
        }
    ),
    "torch_autocast": feature(
        "parameters themselves are 16-bit: use bf16 or fp16", "dtype lower_precision_safe_modules"
    ),
    "amp": feature(
        REMOVED, "opt_level cast_model_type patch_torch_functions keep_batchnorm_fp32 master_weights loss_scale"
    ),
}

LOGGING: dict[str, Key | Block] = {
    "steps_per_print": acts(Annotated[int, BeforeValidator(steps_or_never), Field(ge=1)]),
    "wall_clock_breakdown": acts(bool),
    "tensorboard": Block({"enabled": acts(bool), "output_path": acts(str), "job_name": acts(str)}),
    "csv_monitor": feature(MONITOR, "output_path job_name", harmless=True),
    "wandb": feature(MONITOR, "group team project", harmless=True),
    "comet": feature(
        MONITOR,
        "samples_log_interval project workspace api_key experiment_name experiment_key online mode",
        harmless=True,
    ),
    "comms_logger": feature("the ledger always counts communication", "verbose prof_all debug prof_ops", harmless=True),
    "flops_profiler": feature(
        "flops follow from the model's shape",
        "recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
        harmless=True,
    ),
    "memory_breakdown": ignored(bool, "peak memory is in the metrics"),
    "dump_state": ignored(bool, "the resolved settings are written to the run folder"),
    "log_level": ignored(str | None, "Python's logging and warnings decide"),
    "timers": Block({"throughput": Block(unused("enabled synchronized", "throughput is always measured"))}),
}

OTHER: dict[str, Key | Block] = {
    "activation_checkpointing": Block(
        {
            "partition_activations": acts(bool),
            "cpu_checkpointing": acts(bool),
            **unused(
                "contiguous_memory_optimization number_checkpoints synchronize_checkpoint_boundary profile", RECOMPUTE
            ),
        }
    ),
    "checkpoint": Block(
        {
            "tag_validation": ignored(str, "ranks always agree on the tag"),
            "load_universal": ignored(bool, "it belongs to DeepSpeed's own checkpoint format"),
            "use_node_local_storage": refused(bool, "checkpoints need storage that every rank sees", False),
            "parallel_write": Block(unused("pipeline_stage", "every rank writes its own shards")),
            "checkpoint_serialization": ignored(bool, "checkpoints are safetensors"),
            "writer": ignored(dict[str, Any] | None, "checkpoints are written by one writer"),
        }
    ),
    "pipeline": Block(
        {
            **unused(
                "stages partition seed_layers pipe_partitioned grad_partitioned",
                "a PipelineModule says itself how it is cut, and each layer has a seed of its own",
            ),
            "activation_checkpoint_interval": refused(int, 'blocks are chosen by "minizero": {"recompute": ...}', 0),
        }
    ),
    "tensor_parallel": Block(
        {
            "autotp_size": acts(Count),
            "tp": Block(
                {
                    "tp_size": acts(PositiveInt),
                    **unused("tp_grain_size mpu tp_group", "heads are never cut, and the mesh is made here"),
                }
            ),
            **unused(
                "tp_overlap_comm vocab_parallel_lm_head vocab_parallel_ce_backend injection_policy_tuple dtype "
                "partition_config preset_model keep_module_on_host replace_with_kernel_inject",
                "layers are cut by the model's own plan, or parallel.plan",
            ),
        }
    ),
    "expert_parallel": feature(
        NOT_BUILT,
        "autoep_size expert_tensor_parallel_size validate_folding_routing async_split_plan preset_model "
        "moe_layer_pattern expert_pattern router_pattern use_grouped_mm disable_triton_grouped_mm route_norm "
        "route_scale score_apply combine_impl row_weighting_impl gate_up_impl comm_backend comm_num_sm "
        "comm_qp_margin comm_max_tokens_per_rank num_expert_groups num_limited_groups score_func top_k "
        "load_balance_coeff routed_scaling_factor expert_w1 expert_w2 expert_w3 num_experts_attr top_k_attr "
        "has_shared_experts shared_experts_pattern shared_experts_gate_pattern expert_activation",
    ),
    "aio": Block(
        unused("block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds thread_count", NVME)
    ),
    "elasticity": feature(
        "give the batch sizes themselves",
        "max_train_batch_size micro_batch_sizes min_gpus max_gpus num_gpus_per_node model_parallel_size min_time "
        "prefer_larger_batch ignore_non_elastic_batch_info version",
    ),
    "compile": feature(
        "the model runs eagerly",
        "autoep_non_moe free_activation free_activation_threshold offload_activation offload_activation_pin_memory "
        "offload_opt_states double_buffer symmetric_memory debug_log offload_parameters sync_before_reduce "
        "sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors keep_all_input_tensors "
        "passes",
        "deepcompile",
        harmless=True,
    ),
    "autotuning": feature(
        NOT_BUILT,
        "fast results_dir exps_dir overwrite start_profile_step end_profile_step start_step end_step metric_path "
        "metric tuner_type tuner_early_stopping tuner_num_trials arg_mappings max_train_batch_size "
        "min_train_batch_size max_train_micro_batch_size_per_gpu min_train_micro_batch_size_per_gpu "
        "num_tuning_micro_batch_sizes mp_size model_info model_info_path",
    ),
    "hybrid_engine": feature(
        NOT_BUILT,
        "max_out_tokens inference_tp_size release_inference_cache pin_parameters tp_gather_partition_size "
        "enable_cuda_graph",
    ),
    "data_efficiency": feature(NOT_BUILT, "seed data_sampling data_routing"),
    "curriculum_learning": feature(
        REMOVED, "curriculum_type min_difficulty max_difficulty schedule_type schedule_config"
    ),
    "progressive_layer_drop": feature(REMOVED, "theta gamma"),
    "eigenvalue": feature(REMOVED, "verbose max_iter tol stability gas_boundary_resolution layer_name layer_num"),
    "nebula": feature(
        REMOVED, "persistent_storage_path persistent_time_interval num_of_version_in_retention enable_nebula_load"
    ),
    "quantize_training": refused(Any, REMOVED, None, {}, {"enabled": False}),
    "compression_training": refused(Any, REMOVED, None, {}),
    "sparse_attention": refused(Any, REMOVED, None, {}),
    "weight_quantization": refused(Any, "weights are never quantized", None, {}, {"enabled": False}),
    "datastates_ckpt": refused(Any, NOT_BUILT, None, False),
    "sparse_gradients": refused(bool, REMOVED, False),
    "graph_harvesting": refused(bool, REMOVED, False),
    "use_data_before_expert_parallelism": refused(bool, "experts are not sharded", False),
    "sequence_parallel_size": refused(PositiveInt, "sequence parallelism is not built yet", 1),
    "managed_gradient_accumulation": refused(bool, "set the boundary with set_gradient_accumulation_boundary()", True),
    "gradient_allreduce_op": refused(
        Annotated[Literal["mean", "sum"], BeforeValidator(lower)], "gradients are averaged", "mean"
    ),
    "seq_parallel_communication_data_type": ignored(WireDtype | None, "sequence parallelism is not built yet"),
    "disable_allgather": ignored(bool, "updated parameters are always all-gathered"),
    "allgather_size": ignored(Count, UNITS),
    "disable_python_gc": ignored(bool, "Python's garbage collector is left alone"),
    "dataloader_drop_last": ignored(bool, "the loader always drops a last incomplete batch"),
    "vocabulary_size": ignored(PositiveInt | None, "it is a hint only"),
    "zero_force_ds_cpu_optimizer": ignored(bool, "offloaded state is updated by torch's own optimizers"),
}

TABLE: dict[str, Key | Block] = {
    "train_batch_size": acts(PositiveInt | None),
    "train_micro_batch_size_per_gpu": acts(PositiveInt | None),
    "gradient_accumulation_steps": acts(PositiveInt | None),
    "optimizer": Block(
        {
            "type": acts(str | None),
            "params": acts(dict[str, Any] | None),
            "legacy_fusion": ignored(bool, "updates are fused where torch can"),
        }
    ),
    "scheduler": Block({"type": acts(str | None), "params": acts(dict[str, Any] | None)}),
    "gradient_clipping": acts(NotNegative),
    "communication_data_type": acts(WireDtype | None),
    "prescale_gradients": acts(bool),
    "gradient_predivide_factor": acts(Positive),
    "zero_allow_untested_optimizer": acts(bool),
    "zero_optimization": Block(ZERO, also=bool),
    **PRECISION,
    **LOGGING,
    **OTHER,
}

ALIASES = {
    "bfloat16": "bf16",
    "zero_optimization.prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "zero_optimization.param_persistence_threshold": "stage3_param_persistence_threshold",
    "zero_optimization.model_persistence_threshold": "stage3_model_persistence_threshold",
    "zero_optimization.max_live_parameters": "stage3_max_live_parameters",
    "zero_optimization.max_reuse_distance": "stage3_max_reuse_distance",
    "zero_optimization.module_granularity_threshold": "stage3_module_granularity_threshold",
    "zero_optimization.use_all_reduce_for_fetch_params": "stage3_use_all_reduce_for_fetch_params",
    "zero_optimization.allgather_sequential": "stage3_allgather_sequential",
    "zero_optimization.gather_16bit_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "tensor_parallel.tensor_parallel": "tp",
    "tensor_parallel.kernel_inject": "replace_with_kernel_inject",
}

TOP_LEVEL_KEYS = frozenset(TABLE) | {alias for alias in ALIASES if "." not in alias}

# DeepSpeed's optimizers and torch's: minizero's name -> (lr when none is given, further parameters).
TORCH = "foreach maximize capturable differentiable fused "
ADAM = "betas eps amsgrad bias_correction set_grad_none adam_w_mode torch_adam fp32_optimizer_states " + TORCH
OPTIMIZERS: dict[str, tuple[float, str]] = {
    "Adam": (1e-3, ADAM),
    "AdamW": (1e-3, ADAM),
    "Adagrad": (1e-2, "eps lr_decay initial_accumulator_value amsgrad fp32_optimizer_states " + TORCH),
    "Lion": (1e-3, "betas set_grad_none fp32_optimizer_states"),
    "SGD": (1e-3, "momentum dampening nesterov " + TORCH),
    "Adadelta": (1.0, "rho eps " + TORCH),
    "Adamax": (2e-3, "betas eps " + TORCH),
    "ASGD": (1e-2, "lambd alpha t0 " + TORCH),
    "NAdam": (2e-3, "betas eps momentum_decay decoupled_weight_decay " + TORCH),
    "RAdam": (1e-3, "betas eps decoupled_weight_decay " + TORCH),
    "RMSprop": (1e-2, "alpha eps centered momentum " + TORCH),
    "Rprop": (1e-2, "etas step_sizes " + TORCH),
}
NO_OPTIMIZER = {
    **dict.fromkeys(("onebitadam", "zerooneadam", "onebitlamb"), "compressed communication is not built"),
    "lamb": "it needs the norm of whole tensors, and ranks hold slices",
    "muon": "it needs whole matrices, and ranks hold slices",
    **dict.fromkeys(("muadam", "muadamw", "musgd"), "it needs the mup package's shapes, and ranks hold slices"),
    "lbfgs": "it is not element-wise, and ranks hold slices",
    "adafactor": "it needs rows and columns of whole matrices, and ranks hold slices",
    "sparseadam": "gradients are dense",
}
ONLY_DEEPSPEED = ("bias_correction", "set_grad_none", "adam_w_mode", "torch_adam", "fp32_optimizer_states")
