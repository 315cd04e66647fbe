"""The one exception that a wrong setting raises."""


class ConfigError(ValueError):
    """A setting is unknown, has a wrong type or value, or contradicts another; the message names its dotted key."""
