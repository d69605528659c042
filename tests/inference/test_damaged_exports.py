"""Tests of exports with flipped bits, edited settings and missing files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lpc_lightning.errors import UnsupportedPolicyError
from lpc_lightning.inference.modeling_lpc import LatentCausalLM
from lpc_lightning.inference.opening import open_policy
from lpc_lightning.policy import PretrainedPolicy

pytestmark = pytest.mark.slow


@pytest.fixture
def copied(exported: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of an export that may be damaged."""
    return Path(shutil.copytree(exported["codes"], tmp_path / "copied"))


def flip(file: Path, share: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(share * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_in_an_export_is_refused(copied: Path) -> None:
    for name in ("latent.safetensors", "model.safetensors", "tokenizer.json", "modeling_lpc.py"):
        for share in (0.1, 0.9):
            flip(copied / name, share)
            with pytest.raises(UnsupportedPolicyError, match=rf"^{copied / name} does not have the SHA-256 in"):
                open_policy(str(copied))
            flip(copied / name, share)
    flip(copied / "README.md", 0.5)  # people write a license into it
    assert open_policy(str(copied)).prior is not None
    flip(copied / "tokenizer.json", 0.5)
    with pytest.raises(UnsupportedPolicyError, match=r"policy.tokenizer: .*tokenizer.json does not have the SHA-256"):
        PretrainedPolicy("any", tokenizer=str(copied)).load_tokenizer()


def test_an_edited_config_of_an_export_is_reported(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.warns(UserWarning, match=r"policy.path: config.json in .*copied changed after the folder was written"):
        assert open_policy(str(copied)).policy.causal_lm.config.rms_norm_eps == 0.5


def test_an_export_without_digests_opens(copied: Path) -> None:
    (copied / "digests.json").unlink()
    assert open_policy(str(copied)).prior is not None
    assert LatentCausalLM.from_pretrained(copied).latent_prior is not None


def test_the_model_of_an_export_checks_its_weights(copied: Path, tmp_path: Path) -> None:
    """Without this project, and for a folder that the model has saved itself. The stock model is not checked."""
    LatentCausalLM.from_pretrained(copied).save_pretrained(tmp_path / "again")
    for folder in (copied, tmp_path / "again"):
        for name in ("latent.safetensors", "model.safetensors"):
            flip(folder / name, 0.9)
            with pytest.raises(ValueError, match=rf"{name} does not have the SHA-256 in digests.json"):
                LatentCausalLM.from_pretrained(folder)
            flip(folder / name, 0.9)
        assert LatentCausalLM.from_pretrained(folder).latent_prior is not None


def test_a_folder_without_its_latent_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported["codes"], tmp_path / "out")
    (folder / "latent.safetensors").unlink()
    with pytest.raises(UnsupportedPolicyError, match=r"out is incomplete .*latent\.safetensors"):
        open_policy(str(folder))
    assert AutoModelForCausalLM.from_pretrained(folder) is not None
    (folder / "digests.json").unlink()
    with pytest.raises(UnsupportedPolicyError, match=r"out: found the settings of a latent .* remove `lpc` and `auto_"):
        open_policy(str(folder))


@pytest.mark.parametrize("content", ["", "[]", '{"algorithm": "DPO"'])
def test_export_record_that_is_no_object_is_refused(content: str, copied: Path) -> None:
    (copied / "digests.json").unlink()
    (copied / "training.json").write_text(content)
    with pytest.raises(UnsupportedPolicyError, match=r"training\.json: found .* Export the checkpoint again"):
        open_policy(str(copied))
