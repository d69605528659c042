"""The value of `--ckpt_path`: a path."""

from __future__ import annotations

from lpc_lightning.errors import ConfigError

WORDS = ("best", "last", "hpc")
"""Words that Lightning takes for a checkpoint of the same run folder."""


def check_checkpoint_path(path: str, root: str | None) -> None:
    """Check that a value can be a path. A word of Lightning cannot name a checkpoint of another run folder.

    Without a checkpoint, Lightning would go on with new weights for `last`.

    Args:
        path: `ckpt_path`.
        root: `trainer.default_root_dir`.

    Raises:
        ConfigError: It is empty, or a word of Lightning.
    """
    if path.strip() and path not in WORDS:
        return
    name = path if path in ("best", "last") else "best"
    raise ConfigError(
        f"ckpt_path: found {path.strip() or 'no path'}, expected the path of a checkpoint, such as "
        f"{root or 'runs'}/version_0/checkpoints/{name}.ckpt. Each command has a new run folder, which holds none."
    )
