"""GELU and its derivative inside kernels (Hendrycks & Gimpel, arXiv 1606.08415), in fp32.

exact    z Φ(z)                 derivative  Φ(z) + z φ(z)
tanh     z σ(2u)                derivative  σ + z σ (1 - σ) 2u',   u = √(2/π) (z + 0.044715 z³)
"""

from typing import Literal

from minizero.kernels.backend import tl, triton

Approximation = Literal["tanh", "none"]


@triton.jit
def gelu(z, TANH: tl.constexpr):
    """GELU of fp32 values."""
    if TANH:
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_slope(z, TANH: tl.constexpr):
    """Its derivative."""
    if TANH:
        u = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        e = tl.exp(-tl.abs(u))
        larger = 1.0 / (1.0 + e)  # of σ(u) and 1 - σ(u), neither of which is found by subtraction
        smaller = e * larger
        return tl.where(u >= 0.0, larger, smaller) + z * larger * smaller * 1.5957691216057308 * (
            1.0 + 0.134145 * z * z
        )
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


def is_tanh(op: str, approximate: Approximation) -> bool:
    """Raises ValueError for an approximation that torch does not have either."""
    if approximate not in ("tanh", "none"):
        raise ValueError(f"{op}: approximate {approximate!r} does not exist; legal: tanh, none")
    return approximate == "tanh"
