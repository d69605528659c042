"""Errors that do not belong to one part of the package."""


class ConfigError(ValueError):
    """Raised when a configuration value is invalid. The message names the setting, the value and what was expected."""
