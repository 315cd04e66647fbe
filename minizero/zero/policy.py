"""What ZeRO is asked to do, resolved from the settings: the only branches on stage and dtype start here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minizero.config import Config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Policy:
    """A stage is three answers: who keeps parameters, gradients and optimizer state between uses.

    Attributes:
        stage: 0 to 3.
        compute_dtype: floating parameters of fp32 are cast to this; None leaves every dtype as it is.
        reduce_dtype: dtype of gradients on the wire; None means the parameter's own.
        accumulation_dtype: dtype in which gradients are summed; at least the parameter's own precision.
        local_accumulation: keep whole gradients until the boundary, instead of reducing every micro-batch.
        overlap: reduce behind backward.
        prefetch: gather the next unit behind the current one (stage 3).
        predivide: gradients are divided by this before they are reduced.
        offload_optimizer, offload_parameters: keep them in pinned host memory.
        watch_reads: keep watching for reads of sharded parameters after the first forward (debug).
    """

    stage: int = 0
    compute_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    accumulation_dtype: torch.dtype = torch.float32
    local_accumulation: bool = True
    overlap: bool = False
    prefetch: bool = True
    predivide: float = 1.0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    watch_reads: bool = False

    @classmethod
    def from_config(cls, config: Config, device: torch.device, dp_size: int) -> Policy:
        """What the settings mean on this device, for `dp_size` data-parallel ranks."""
        zero = config.zero
        local = zero.accumulation == "local" or (zero.accumulation == "auto" and zero.stage < 2)
        on_gpu = device.type == "cuda"
        return cls(
            stage=zero.stage,
            compute_dtype=None if config.precision == "fp32" else DTYPES[config.precision],
            reduce_dtype=DTYPES[zero.reduce_dtype] if zero.reduce_dtype else None,
            accumulation_dtype=DTYPES[zero.accumulation_dtype],
            local_accumulation=local,
            overlap=on_gpu if zero.overlap == "auto" else zero.overlap,
            prefetch=zero.prefetch,
            predivide=float(dp_size) if zero.prescale_gradients else zero.gradient_predivide_factor,
            offload_optimizer=zero.offload_optimizer == "cpu" and on_gpu,
            offload_parameters=zero.offload_param == "cpu" and on_gpu,
            watch_reads=config.debug.collectives,
        )

    @property
    def shards_optimizer(self) -> bool:
        return self.stage >= 1

    @property
    def shards_parameters(self) -> bool:
        return self.stage >= 3

    def dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype in which a parameter of `dtype` computes."""
        if self.compute_dtype is not None and dtype == torch.float32:
            return self.compute_dtype
        return dtype

    def accumulation_of(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype in which gradients of a `dtype` parameter are summed: never coarser than asked, float64 stays."""
        return (
            torch.promote_types(dtype, self.accumulation_dtype) if dtype == torch.float64 else self.accumulation_dtype
        )
