"""The value of `--ckpt_path`, and the template of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.tokenization.templates import TemplateSettings
from lpc_lightning.errors import ConfigError
from lpc_lightning.inference.checkpoints import trained_template

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


def warn_of_template(
    recorded: Mapping[str, Any], settings: TemplateSettings, tokenizer: PreTrainedTokenizerBase, path: str, result: str
) -> None:
    """Warn if pairs get another template than a policy was trained with.

    Args:
        recorded: Entry `template` of its checkpoint or export.
        settings: Template of the data.
        tokenizer: The policy's tokenizer, which decides on `auto`.
        path: Path of the checkpoint or export.
        result: Consequence of another template, as a sentence.

    Raises:
        CheckpointError: The record is not that of a template.
    """
    trained = trained_template({"template": recorded})
    found, expected = (_by_name(each, tokenizer) for each in (settings, trained))
    if changes := [
        f"data.{name} {found[name]} (in training: {expected[name]})" for name in found if found[name] != expected[name]
    ]:
        rank_zero_warn(
            f"template: found {', '.join(changes)} for {path}. {result} Take the settings of training, in config.yaml "
            "of its run."
        )


def _by_name(settings: TemplateSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the settings by their names in `data`. Equal ones are written alike."""
    is_chat = settings.kind == "chat" or (settings.kind == "auto" and bool(tokenizer.chat_template))
    return {
        "template": "chat" if is_chat else "plain",
        "template_kwargs": dict(settings.arguments) if settings.arguments else "null",
        "system_turns": settings.system_turns,
    }
