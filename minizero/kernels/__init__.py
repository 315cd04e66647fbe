"""The fused kernels of a language-model trainer, each beside the torch code that it is proven against.

Every op takes `backend`: see `minizero.kernels.backend`. A file is an op: formula, reference, kernel, autograd.
"""

from minizero.kernels.adamw import adamw_step
from minizero.kernels.backend import Backend
from minizero.kernels.bias_gelu import bias_gelu
from minizero.kernels.cross_entropy import cross_entropy
from minizero.kernels.flash_attention import flash_attention
from minizero.kernels.flat import cast_and_pack, grad_norm
from minizero.kernels.gated import geglu, swiglu
from minizero.kernels.linear_cross_entropy import linear_cross_entropy
from minizero.kernels.norm import add_rms_norm, layer_norm, layer_norm_gelu, rms_norm
from minizero.kernels.quantize import dequantize_blockwise, quantize_blockwise
from minizero.kernels.rope import rope

__all__ = [
    "Backend",
    "adamw_step",
    "add_rms_norm",
    "bias_gelu",
    "cast_and_pack",
    "cross_entropy",
    "dequantize_blockwise",
    "flash_attention",
    "geglu",
    "grad_norm",
    "layer_norm",
    "layer_norm_gelu",
    "linear_cross_entropy",
    "quantize_blockwise",
    "rms_norm",
    "rope",
    "swiglu",
]
