"""Every setting of minizero, once: its name, type, default and meaning.

Why one typed schema: a misspelt key must be an error, a value must say where it came from, and `--help`
must be able to list everything. So the schema is data; reading files and command lines lives in
`load.py`, and the translation of DeepSpeed's key names in `deepspeed.py`, the only file that knows them.

A setting whose feature is not built yet is refused here, with the legal values, and never ignored.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from minizero.config import optimizers
from minizero.config.batch import BatchSizes, solve
from minizero.config.schedules import check_params

Dtype = Literal["fp32", "bf16", "fp16"]


class Section(BaseModel):
    """A group of settings: unknown keys are errors, and each field's docstring is its help text.

    Strict: "8" is not a number, true is not 1, and nan and inf are no settings.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_assignment=True, use_attribute_docstrings=True
    )


class RunConfig(Section):
    dir: str = "runs/quickstart"
    """Folder that receives the resolved config, `metrics.jsonl`, checkpoints and figures."""


class RopeScalingConfig(Section):
    type: Literal["none", "llama3"] = "none"
    """`llama3`: slow rotary waves are stretched, as in Llama 3.1, for sequences longer than those first trained on."""
    factor: float = Field(8.0, ge=1)
    """By how much waves are stretched."""
    low_freq_factor: float = Field(1.0, gt=0)
    """A wave that turns less often than this in the original length is stretched by all of `factor`."""
    high_freq_factor: float = Field(4.0, gt=0)
    """One that turns more often than this stays as it is; between the two it is a mixture."""
    original_max_position_embeddings: int = Field(8192, ge=1)
    """The original length: tokens of a sequence before the waves were stretched."""

    @model_validator(mode="after")
    def _low_is_below_high(self) -> RopeScalingConfig:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor {self.low_freq_factor} is not below {self.high_freq_factor}, the high")
        return self


class ModelConfig(Section):
    pretrained: str | None = None
    """A folder of HuggingFace's with a GPT-2, Llama or Qwen3: `minizero.train` starts from its weights and tokenizer.
    Settings of `model` are then the folder's; those given must agree with it, except for dropout and attention."""
    family: Literal["llama", "gpt2"] = "llama"
    """Architecture: `llama` (RMSNorm, RoPE, SwiGLU, GQA; Qwen3 with `qk_norm`) or `gpt2` (LayerNorm, learned positions,
    GELU)."""
    hidden_size: int = Field(256, ge=1)
    """Width of the residual stream."""
    num_layers: int = Field(4, ge=1)
    """Number of transformer blocks."""
    num_heads: int = Field(4, ge=1)
    """Attention heads."""
    num_kv_heads: int | None = Field(None, ge=1)
    """Key/value heads (llama): None means as many as `num_heads`."""
    head_dim: int | None = Field(None, ge=1)
    """Width of a head (llama): None means `hidden_size` / `num_heads`."""
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys (llama), as Qwen3 has it."""
    intermediate_size: int | None = Field(None, ge=1)
    """Width of the MLP: None means 4 x hidden (gpt2), or 8/3 x hidden rounded up to 32 (llama)."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies (llama)."""
    rope_scaling: RopeScalingConfig = Field(default_factory=RopeScalingConfig)
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon inside the norms."""
    tie_embeddings: bool = True
    """Share the input embedding with the output head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability behind embeddings, attention and MLP (gpt2)."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of attention weights (gpt2); needs `attention` eager."""
    attention: Literal["fused", "eager"] = "fused"
    """`fused`: torch's attention, which never holds a (length, length) matrix. `eager`: the textbook's, which does."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.attention_dropout and self.attention == "fused":
            raise ValueError(f"attention_dropout {self.attention_dropout} needs attention = eager, found fused")
        return self


class DataConfig(Section):
    source: str = "stdlib"
    """`stdlib` (the Python standard library's own source), a folder of text files, or `datasets:PATH`."""
    dir: str = "runs/data"
    """Folder that caches tokenizer and token shards, keyed by what they were made from."""
    vocab_size: int = Field(4096, ge=257)
    """Size of the byte-level BPE vocabulary trained on the corpus; the tokenizer of `model.pretrained`, where it has
    one, takes its place."""
    validation_fraction: float = Field(0.05, gt=0, lt=0.5)
    """Share of the files held out for validation, chosen by a hash of their path."""


class TrainConfig(Section):
    steps: int = Field(100, ge=1)
    """Optimizer steps to run."""
    seed: int = Field(0, ge=0)
    """Seed of initialization, data order and dropout, which no layout changes."""
    global_batch_size: int | None = Field(None, ge=1)
    """Sequences per optimizer step over all ranks (= micro batch x accumulation x data-parallel size)."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Sequences per rank in one forward pass."""
    gradient_accumulation_steps: int | None = Field(None, ge=1)
    """Forward passes per optimizer step; follows from the other two when left out."""
    sequence_length: int = Field(256, ge=2)
    """Tokens per training sequence."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest global gradient norm (L2); larger ones are scaled down to it. 0 turns clipping off."""
    max_skipped_steps: int = Field(3, ge=1)
    """A step with a loss or gradient that is not finite is skipped; so many in a row end the run (in fp16, once the
    loss scale is at its minimum)."""
    eval_every: int = Field(0, ge=0)
    """Steps between evaluations on the held-out files; 0 means only at the end."""
    time_limit: float | None = Field(None, gt=0)
    """Seconds of training after which the run stops cleanly, wherever it is; None means no limit."""


class OptimizerConfig(Section):
    type: str = "AdamW"
    """Adam, AdamW, SGD, Adagrad, Lion, or any element-wise optimizer of `torch.optim`."""
    lr: float = Field(1e-3, ge=0)
    """Learning rate, before the scheduler."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay: decoupled for AdamW and Lion, as in each optimizer's paper."""
    params: dict[str, Any] = Field(default_factory=dict)
    """The optimizer's other keyword arguments (betas, eps, momentum, ...), as `torch.optim` names them."""

    @field_validator("params")
    @classmethod
    def _each_once(cls, params: dict[str, Any]) -> dict[str, Any]:
        for name in ("lr", "weight_decay"):
            if name in params:
                raise ValueError(f"{name} has its own setting, optimizer.{name}")
        return params

    @model_validator(mode="after")
    def _params_fit_type(self) -> OptimizerConfig:
        optimizers.check_params(self.type, self.weight_decay, self.params)
        return self


class SchedulerConfig(Section):
    type: Literal["none", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"] = "none"
    """Learning-rate schedule, stepped once per optimizer step that was applied."""
    params: dict[str, Any] = Field(default_factory=dict)
    """The schedule's own settings, named as DeepSpeed names them (warmup_num_steps, ...); `total_num_steps` is
    `train.steps` when left out."""

    @model_validator(mode="after")
    def _params_fit_type(self) -> SchedulerConfig:
        check_params(self.type, self.params)
        return self


class LossScaleConfig(Section):
    static: float = Field(0.0, ge=0)
    """Fixed loss scale for fp16; 0 means dynamic."""
    initial_power: int = Field(16, ge=0, le=120)
    """Dynamic scaling starts at 2 to this power."""
    window: int = Field(1000, ge=1)
    """Steps without overflow after which the scale doubles."""
    hysteresis: int = Field(2, ge=1)
    """Overflows that are tolerated before the scale halves."""
    consecutive_hysteresis: bool = False
    """Refill the hysteresis after every step without overflow, not only when the scale doubles."""
    minimum: float = Field(1.0, gt=0)
    """The scale never falls below this."""


class ZeroConfig(Section):
    stage: int = 0
    """0: everything whole. 1: optimizer state sharded. 2: gradients too. 3: parameters too."""
    overlap: bool | Literal["auto"] = "auto"
    """Reduce gradients behind the backward pass; auto means on for CUDA, off for gloo where it costs time."""
    prefetch: bool = True
    """Stage 3: start gathering the next unit while this one computes."""
    accumulation: Literal["auto", "sharded", "local"] = "auto"
    """Where gradients add up between steps: `sharded` reduces every micro-batch into the rank's shard,
    `local` keeps whole gradients and reduces once. auto: local for stages 0 and 1, sharded for 2 and 3."""
    reduce_dtype: Dtype | None = None
    """Dtype of gradients on the wire; None means the parameters' own."""
    accumulation_dtype: Dtype = "fp32"
    """Dtype in which gradients are summed and accumulated."""
    prescale_gradients: bool = False
    """Divide gradients by the data-parallel size before the reduction instead of after it."""
    gradient_predivide_factor: float = Field(1.0, gt=0)
    """Divide gradients by this before the reduction, by the rest of the data-parallel size after it; not with
    `prescale_gradients`."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """`cpu`: keep fp32 masters and moments in pinned host memory and update them there."""
    offload_param: Literal["none", "cpu"] = "none"
    """Stage 3, `cpu`: keep the parameter shards in pinned host memory between uses."""
    gather_16bit_weights_on_model_save: bool = False
    """Stage 3: let `save_16bit_model` gather the whole weights."""
    allow_untested_optimizer: bool = False
    """Accept an optimizer class of your own: it must be element-wise, since it sees flat slices."""

    @field_validator("stage")
    @classmethod
    def _known_stage(cls, stage: int) -> int:
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"stage {stage} does not exist; legal: 0, 1, 2, 3")
        return stage

    @model_validator(mode="after")
    def _only_shards_offload(self) -> ZeroConfig:
        if self.offload_param != "none" and self.stage != 3:
            raise ValueError(f"offload_param = {self.offload_param!r} needs stage 3, found stage {self.stage}")
        return self


class ParallelConfig(Section):
    tp: int = Field(1, ge=1)
    """Tensor-parallel degree."""
    pp: int = Field(1, ge=1)
    """Pipeline-parallel degree."""
    cp: int = Field(1, ge=1)
    """Context-parallel degree: ranks that share each sequence."""
    context: Literal["ring", "ulysses"] = "ring"
    """How context-parallel ranks attend: `ring` passes keys and values round, `ulysses` swaps positions for heads."""
    sequence: bool = False
    """Shard norms and residuals along the sequence (needs tp > 1)."""

    plan: dict[str, str] = Field(default_factory=dict)
    """How layers are cut over tp ranks: module name pattern -> style, for a model that has no table of its own (see
    `minizero.parallel.plan`)."""

    @model_validator(mode="after")
    def _sequence_has_ranks(self) -> ParallelConfig:
        if self.sequence and self.tp == 1:
            raise ValueError("sequence = true needs tp > 1, found tp = 1")
        return self


class PipelineConfig(Section):
    schedule: str = "one_f_one_b"
    """gpipe, one_f_one_b, interleaved, zb_h1, zb_h2, zbv, dualpipe_v, zb_auto, or a CSV file of your own (see
    `minizero pipeline --help`)."""
    chunks: int | None = Field(None, ge=1)
    """interleaved: parts of the model per rank (2 when left out)."""
    microbatches: int | None = Field(None, ge=1)
    """Microbatches per step; the same as `train.gradient_accumulation_steps`."""
    partition: str = "uniform"
    """How a decoder's blocks are shared out: uniform, parameters, flops. A PipelineModule says so itself."""
    gather: Literal["step", "microbatch"] = "step"
    """ZeRO stage 3: parameters are gathered once per step, or for every action of every microbatch."""
    costs: str | None = None
    """zb_auto: what it plans for, as F=18.5,B=18.1,W=9.3,latency=0.6."""
    memory_limit: float | None = Field(None, gt=0)
    """zb_auto: activations of a whole stage that a rank may keep (2 pp when left out); others: refused above it."""


class RecomputeConfig(Section):
    mode: Literal["none", "full", "selective", "budget"] = "none"
    """What is computed again in backward instead of kept. `full`: blocks. `selective`: attention, or chosen modules.
    `budget`: as few blocks as keep activations within `budget`."""
    every: int = Field(1, ge=1)
    """full: only every k-th block."""
    modules: list[str] = Field(default_factory=list)
    """selective: patterns of module names (`*` stands for one part); none means attention between its projections."""
    budget: float | None = Field(None, gt=0)
    """budget: bytes that the blocks of one rank may keep for backward."""
    partition_activations: bool = False
    """Each tensor-parallel rank keeps 1/tp of a checkpointed block's input, and gathers it in backward."""
    cpu_checkpointing: bool = False
    """Keep checkpointed inputs in pinned host memory (GPU runs)."""

    @model_validator(mode="after")
    def _mode_has_what_it_needs(self) -> RecomputeConfig:
        if (self.mode == "budget") != (self.budget is not None):
            raise ValueError(f"mode {self.mode!r} with budget {self.budget}: mode budget and a budget go together")
        if self.modules and self.mode != "selective":
            raise ValueError(f"modules need mode selective, found {self.mode!r}")
        if self.every > 1 and self.mode != "full":
            raise ValueError(f"every = {self.every} needs mode full, found {self.mode!r}")
        return self


class CheckpointConfig(Section):
    every: int = Field(0, ge=0)
    """Steps between checkpoints; 0 means only at the end."""
    resume: str | None = None
    """A run folder, or `latest` for `run.dir`: continue from its newest checkpoint."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints to keep."""
    keep_every: int = Field(0, ge=0)
    """Also keep those whose step is a multiple of this; 0 means none."""
    asynchronous: bool = False
    """Write checkpoints on a thread: a step waits only until its state is copied to host memory."""
    checksum: Literal["xxh3_128", "sha256"] = "xxh3_128"
    """Of every file. xxh3 finds damage, sha256 tampering too, where somebody else keeps the manifest's."""
    allow_fallback: bool = False
    """Continue from the newest whole checkpoint where the last one is damaged; else that is an error."""
    on_error: Literal["stop", "continue"] = "stop"
    """What `minizero.train` does when a checkpoint cannot be written: end, or warn and train on."""


class TensorBoardConfig(Section):
    enabled: bool = False
    """Write scalars for TensorBoard as well as `metrics.jsonl`."""
    dir: str | None = None
    """Folder for the event files; None means `tensorboard` in the run folder."""
    job_name: str = "minizero"
    """Sub-folder of `dir`."""


class LogConfig(Section):
    every: int = Field(10, ge=1)
    """Steps between lines of the engine's own log; in `minizero.train` a bar takes its place, unless
    `log.wall_clock_breakdown` asks for it."""
    wall_clock_breakdown: bool = False
    """Print milliseconds of forward, backward and step with the log line."""
    tensorboard: TensorBoardConfig = Field(default_factory=TensorBoardConfig)


class DistConfig(Section):
    backend: Literal["gloo", "nccl"] | None = None
    """Communication backend; None means nccl where a GPU is visible, else gloo."""
    timeout: float = Field(120.0, gt=0)
    """Seconds after which a collective that a peer never joined is an error."""
    step_timeout: float = Field(3600.0, ge=0)
    """Seconds after which a step, a save or a load (in a loop of your own: a forward, backward or update) ends the
    process with its stacks; 0 means never."""
    check_replicas: int = Field(100, ge=0)
    """Steps between two comparisons of a hash of weights that several ranks hold alike; 0 means never."""
    transport: Literal["auto", "messages", "memory"] = "auto"
    """How slices travel on gloo: as TCP messages, or read from a neighbour's memory (one host, Linux on x86-64). auto:
    memory where every rank can read every other."""


class DebugConfig(Section):
    collectives: bool = False
    """Compare a fingerprint of every collective over its group before running it."""
    recompute: bool = False
    """Compare what checkpointed blocks compute again with the first time, and refuse random numbers that cannot be
    drawn again."""


class Config(Section):
    """All settings. Build one with `minizero.config.load`, or directly: `Config(zero={"stage": 3})`."""

    precision: Dtype = "fp32"
    """Dtype of parameters and gradients in forward and backward; 16-bit ones have fp32 masters."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Of fused operations: `auto` takes Triton's kernels where they run (NVIDIA GPUs), torch's code elsewhere."""
    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    loss_scale: LossScaleConfig = Field(default_factory=LossScaleConfig)
    zero: ZeroConfig = Field(default_factory=ZeroConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig)
    recompute: RecomputeConfig = Field(default_factory=RecomputeConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    dist: DistConfig = Field(default_factory=DistConfig)
    debug: DebugConfig = Field(default_factory=DebugConfig)

    def batch(self, dp_size: int) -> BatchSizes:
        """The batch sizes for `dp_size` data-parallel ranks. Raises ConfigError when they do not work out."""
        train, microbatches = self.train, self.pipeline.microbatches
        return solve(
            train.global_batch_size, train.micro_batch_size, train.gradient_accumulation_steps or microbatches, dp_size
        )

    @model_validator(mode="after")
    def _microbatches_are_accumulation_steps(self) -> Config:
        one, other = self.pipeline.microbatches, self.train.gradient_accumulation_steps
        if one is not None and other is not None and one != other:
            raise ValueError(
                f"pipeline.microbatches {one} and train.gradient_accumulation_steps {other} are the same; give one"
            )
        return self
