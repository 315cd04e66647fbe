"""Warnings that are said once."""

from __future__ import annotations

import warnings
from functools import cache


@cache
def warn_once(message: str) -> None:
    """Warn with `message` unless this process has said it before."""
    warnings.warn(message, stacklevel=3)
