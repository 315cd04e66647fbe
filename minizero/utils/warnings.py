"""Warnings that are said once."""

from __future__ import annotations

import os
import warnings
from functools import cache


@cache
def warn_once(message: str) -> None:
    """Warn with `message`, on rank 0 only, unless this process has said it before."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(message, stacklevel=3)
