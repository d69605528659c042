"""Tests of the layout that a policy needs, and of equal metrics in all layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from transformers import AutoConfig, AutoModelForCausalLM

from lpc_lightning.algorithms import DPO
from lpc_lightning.data import PreferenceDataModule, SyntheticPreferences
from lpc_lightning.data.batching.layouts import PaddedLayout, SharedPrefixLayout
from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.latent import MarginalSpace
from lpc_lightning.policy import PretrainedPolicy
from tests.data.datamodule.conftest import tiny


@pytest.mark.parametrize(
    "latent", [None, lambda: MarginalSpace(num_codes=3, hidden=8, init_logit_std=1.0)], ids=["plain", "marginal"]
)
def test_layouts_give_equal_metrics(latent: Any, tmp_path: Path, perturb: Any) -> None:
    module = DPO(policy=tiny(dtype="float64"), latent=latent and latent())
    output = {}
    for name, layout in {
        "auto": "auto",
        "padded": "padded",
        "wide rows": "shared_prefix",
        "rows": "shared_prefix",
    }.items():
        made = SyntheticPreferences(
            validation_pairs=9,
            batch_size=4,
            layout=layout,
            row_tokens=1000 if name == "wide rows" else 256,
            cache_dir=str(tmp_path),
        )
        trainer = Trainer(accelerator="cpu", precision="64-true", logger=False, enable_progress_bar=False)
        if not output:  # a policy that is not its own reference
            module.configure_model()
            perturb(module.policy, 0.1)
        (output[name],) = trainer.validate(module, datamodule=made, verbose=False)
        kind = PaddedLayout if name == "padded" else SharedPrefixLayout
        assert isinstance(made.val_dataloader().loader.collate_fn, kind)
    assert abs(output["padded"]["val/rewards/margins"]) > 0.01
    for name, metrics in output.items():
        assert metrics == pytest.approx(output["padded"], rel=1e-9, abs=1e-9), name


class TestLayersWithoutMask:
    """In a packed row, the state of a recurrent layer depends on the other answer."""

    @pytest.fixture
    def recurrent(self, tmp_path: Path) -> PretrainedPolicy:
        tokenizer = tiny().load_tokenizer()
        sizes = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
        sizes |= {"lru_width": 16, "attention_window_size": 64, "conv1d_width": 3, "vocab_size": len(tokenizer)}
        # The soft cap is set so high that it has no effect.
        config = AutoConfig.for_model("recurrent_gemma", num_key_value_heads=1, logits_soft_cap=1e8, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "recurrent")
        tokenizer.save_pretrained(tmp_path / "recurrent")
        return PretrainedPolicy(str(tmp_path / "recurrent"))

    def validate(self, policy: PretrainedPolicy, layout: Any, folder: Path) -> PreferenceDataModule:
        made = SyntheticPreferences(validation_pairs=2, batch_size=2, layout=layout, cache_dir=str(folder))
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        trainer.validate(DPO(policy=policy), datamodule=made, verbose=False)
        return made

    def test_shared_prefix_is_refused(self, recurrent: PretrainedPolicy, tmp_path: Path) -> None:
        message = r"data\.layout: found shared_prefix with a policy whose attention kernel or layers take no block mask"
        with pytest.raises(DataError, match=message):
            self.validate(recurrent, "shared_prefix", tmp_path)

    def test_auto_layout_is_padded(self, recurrent: PretrainedPolicy, tmp_path: Path) -> None:
        assert isinstance(self.validate(recurrent, "auto", tmp_path).val_dataloader().loader.collate_fn, PaddedLayout)
