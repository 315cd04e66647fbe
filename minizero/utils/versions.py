"""Versions of what is installed."""

from __future__ import annotations

from importlib import metadata


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed, as minizero itself may be, run from its source."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
