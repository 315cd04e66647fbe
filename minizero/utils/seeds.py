"""Seeds that depend on what is seeded, and on nothing else: neither on the layout nor on what was drawn before."""

from __future__ import annotations

import hashlib


def module_seed(seed: int, name: str) -> int:
    """A 63-bit seed for the module `name`."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
