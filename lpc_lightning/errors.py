"""Errors that do not belong to one part of the package."""


class ConfigError(ValueError):
    """Raised when a configuration value is invalid. The message names the setting, the value and what was expected."""


class DamagedFileError(ValueError):
    """Raised when a file does not have the content that was written. The message names the file and the difference."""


class CheckpointError(ValueError):
    """Raised when a checkpoint is missing, damaged or of another form, or does not fit the model that loads it."""


class UnsupportedPolicyError(ValueError):
    """Raised when a model is missing or unsupported."""


def one_line(error: BaseException) -> str:
    """Return the text of an error without line breaks, for an error that quotes it."""
    return " ".join(str(error).split())
