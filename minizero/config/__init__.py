"""Settings: the typed schema, and the readers that fill it."""

from minizero.config.errors import ConfigError
from minizero.config.schema import Config

__all__ = ["Config", "ConfigError"]
