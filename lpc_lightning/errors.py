"""An error that is nobody's bug and belongs to no room."""


class ConfigError(ValueError):
    """Settings that no run can have. The message names them, what was found and what was expected."""
