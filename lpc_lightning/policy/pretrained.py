"""A policy with published weights: a hub name, a local folder, or a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from lpc_lightning.errors import ConfigError, DamagedFileError, UnsupportedPolicyError, one_line
from lpc_lightning.files.integrity import DIGESTS, changed_files
from lpc_lightning.files.json_files import read_json_object
from lpc_lightning.policy.spec import PolicySpec
from lpc_lightning.policy.start_adapter import ADAPTER, base_of, is_adapter, keep_adapter, merge_adapter

if TYPE_CHECKING:
    from peft import PeftModel

LATENT = "latent.safetensors"
"""File of the latent in a folder that `lpc-lightning export` has written."""
ORIGIN = "training.json"
"""File of such a folder with the origin of its checkpoint."""
LATENT_SETTINGS = "lpc"
"""Key of the latent's settings in the `config.json` of such a folder."""
TOKENIZER_TEXTS = ("chat_template.jinja", "tokenizer_config.json")
MODEL_TEXTS = ("config.json", "generation_config.json", ORIGIN, ADAPTER)
"""Files of text that people change by hand, of a tokenizer and of a model. One with another digest is reported, and
used."""


def published_file(path: str, name: str, revision: str = "main") -> Path | None:
    """Return a file of a folder or of a repository on the hub. None if it is absent or out of reach.

    Args:
        path: Folder or hub name.
        name: Name of the file.
        revision: Branch, tag or commit on the hub.
    """
    if Path(path).exists():
        file = Path(path) / name
        return file if file.is_file() else None
    try:
        found = cached_file(path, name, revision=revision)
    except OSError:
        return None
    return None if found is None else Path(found)


class PretrainedPolicy(PolicySpec):
    """A pretrained model from the hub, a folder, or a GGUF file."""

    def __init__(
        self,
        path: str,
        revision: str = "main",
        tokenizer: str | None = None,
        quantization: Literal["nf4"] | None = None,
        trust_remote_code: bool = False,
        adapter: str | None = None,
        merge_adapter: bool = True,
        **policy: Any,
    ) -> None:
        """Keep the settings.

        Args:
            path: Hub name (`mistralai/Mistral-7B-v0.1`), local folder, or GGUF file (`model.Q4_1.gguf`). The weights of
                a GGUF file are dequantized. The folder of an adapter stands for `adapter` on the base model that its
                adapter_config.json names.
            revision: Branch, tag or commit on the hub. `main` for the folder of an adapter: the revision that its
                adapter_config.json names, if any.
            tokenizer: Hub name or folder of another tokenizer. null: the model's own.
            quantization: `nf4` keeps the frozen weights of the linear layers in 4 bits while an adapter is trained
                (QLoRA, arXiv 2305.14314), with quantized scales, by bitsandbytes. `dtype` is then the type of the
                arithmetic. A checkpoint contains only the adapter. To merge it, load it with null here, which puts it
                onto the unquantized weights.
            trust_remote_code: Run Python code that comes with the model or its tokenizer. If false, a model that needs
                such code is refused. Read the code before you set this, and pin `revision` for a model on the hub.
            adapter: Folder or hub name of a LoRA adapter of peft, from SFT for example. Policy and reference start as
                the model in `path` with this adapter. A tokenizer in its folder is used in place of the model's own.
            merge_adapter: Add the adapter's updates to the weights. false keeps it as it is, frozen under the adapter
                in training (`lora`). With `quantization` this is the only way.
            policy: Settings of `PolicySpec`.

        Raises:
            ConfigError: `quantization` is set without an adapter to train, for a GGUF file, or with an adapter to
                merge; or `merge_adapter` is false without an adapter to train.
        """
        super().__init__(**policy)
        path, adapter = os.fspath(path), None if adapter is None else os.fspath(adapter)
        if adapter is None and is_adapter(path):
            (path, recorded), adapter = base_of(path), path
            revision = recorded if recorded and revision == "main" else revision
        self.adapter, self.merge_adapter = adapter, merge_adapter
        self.path, self.revision, self.quantization = path, revision, quantization
        self.tokenizer = None if tokenizer is None else os.fspath(tokenizer)
        self.trust_remote_code = trust_remote_code
        if quantization is not None and self.lora is None:
            raise ConfigError(
                f"policy.quantization: found {quantization} without an adapter, expected policy.lora, because "
                "quantized weights cannot be trained."
            )
        if quantization is not None and path.endswith(".gguf"):
            raise ConfigError(
                f"policy.quantization: found {quantization} for {path}, whose weights have been quantized before. "
                "Expected a folder or a hub name."
            )

        if adapter is not None and not merge_adapter and self.lora is None:
            raise ConfigError(
                "policy.merge_adapter: found false and no policy.lora, expected an adapter to train above the frozen "
                "one. Set policy.lora, or merge_adapter to true."
            )
        if adapter is not None and merge_adapter and quantization is not None:
            raise ConfigError(
                f"policy.merge_adapter: found true with policy.quantization {quantization}, expected false, because "
                "updates cannot be added to quantized weights."
            )

    def load_config(self) -> PreTrainedConfig:
        """Load the config that is stored with the weights.

        That of a policy with an adapter is without the latent of its base model. The adapter belongs to the plain
        policy, and no latent fits both.
        """
        config: PreTrainedConfig = self._load(AutoConfig)
        if self.adapter is not None and hasattr(config, LATENT_SETTINGS):
            for name in (LATENT_SETTINGS, "auto_map"):  # `auto_map` names the code of the latent
                vars(config).pop(name, None)
        return config

    def load_model(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """Load the weights. Those of a GGUF file are dequantized, and lose their quantization config.

        Raises:
            UnsupportedPolicyError: The model is an encoder-decoder, or the weights or the adapter cannot be loaded.
        """
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedPolicyError(
                f"policy.path: found {self.path} ({config.model_type}), an encoder-decoder, "
                "expected a decoder-only model."
            )
        model = self._load_base(config, dtype)
        if self.adapter is not None:
            self._check_content("policy.adapter", Path(self.adapter), MODEL_TEXTS, weights=True)
        return merge_adapter(model, self.adapter) if self.adapter is not None and self.merge_adapter else model

    def adapt(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """Add the adapter that is trained, and the frozen one that the fit starts from."""
        adapted = super().adapt(model)
        if self.adapter is not None and not self.merge_adapter and not isinstance(adapted, PreTrainedModel):
            keep_adapter(adapted, self.adapter)
        return adapted

    def _load_base(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        # The code of an export adds its latent to the logits. A policy is the plain model, which needs no such code.
        trusted = self.trust_remote_code and not hasattr(config, LATENT_SETTINGS)
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trusted, **self._quantized(dtype)}
        model: PreTrainedModel = self._load(AutoModelForCausalLM, config=config, **options)
        if not self.path.endswith(".gguf"):
            return model
        # transformers refuses to save a model with a quantization config. Move the weights to a model without one.
        del model.config.quantization_config
        clean = AutoModelForCausalLM.from_config(model.config, dtype=dtype, trust_remote_code=self.trust_remote_code)
        clean.load_state_dict(model.state_dict())
        clean.generation_config = model.generation_config
        return clean

    @property
    def start(self) -> str:
        """Path of the model, and its adapter if there is one."""
        if self.adapter is None:
            return self.path
        return f"{self.path} with the adapter {self.adapter} ({'merged' if self.merge_adapter else 'frozen'})"

    @property
    def adapter_base(self) -> str | None:
        """Path of the model. None for a GGUF file, and if the fit starts from another adapter."""
        return None if self.path.endswith(".gguf") or self.adapter is not None else self.path

    @property
    def trained_template(self) -> Mapping[str, Any] | None:
        """See `PolicySpec.trained_template`. The folder of an export records it.

        Raises:
            UnsupportedPolicyError: The record is damaged.
        """
        file = published_file(self.adapter or self.path, ORIGIN, self.revision)
        try:
            return None if file is None else read_json_object(file).get("template")
        except DamagedFileError as error:
            raise UnsupportedPolicyError(f"policy.path: {error} Export the checkpoint again.") from error

    def check_start(self) -> None:
        """Warn if the folder is an export with a latent: training starts from the plain policy in it."""
        if published_file(self.path, LATENT, self.revision) is not None:
            rank_zero_warn(
                f"policy.path: found an export with a latent in {self.path}. A fit starts from its policy at z = 0, "
                "which is also the reference. The latent in the export is not used; `latent` makes a new one. "
                "`--policy TrainedPolicy` keeps it."
            )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer that is stored with the weights or their adapter, or the one in `tokenizer`."""
        name = self.tokenizer
        if name is None and self.adapter is not None and (Path(self.adapter) / "tokenizer_config.json").is_file():
            name = self.adapter
        if name is not None:
            with self._explaining("policy.tokenizer", name, "Expected a tokenizer of transformers."):
                self._check_content("policy.tokenizer", Path(name), TOKENIZER_TEXTS, weights=False)
                return AutoTokenizer.from_pretrained(name, trust_remote_code=self.trust_remote_code)
        return self._load(AutoTokenizer)

    def _quantized(self, dtype: torch.dtype) -> dict[str, BitsAndBytesConfig]:
        if self.quantization is None:
            return {}
        if find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"policy.quantization: found {self.quantization}, which needs bitsandbytes, and it is not installed. "
                "Run `pip install -c constraints.txt -e '.[qlora]'`, or set policy.quantization to null."
            )
        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=self.quantization,
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        }

    def _load(self, kind: Any, **options: Any) -> Any:
        file = Path(self.path)
        name, local = self.path, file.is_dir()
        if file.suffix == ".ckpt" and file.exists():
            raise UnsupportedPolicyError(
                f"policy.path: found the checkpoint {self.path}, expected a folder with config.json and weights. "
                f"`lpc-lightning export --checkpoint {self.path} --output FOLDER` makes one. `fit --policy "
                "TrainedPolicy` starts a new fit from it, and `fit --ckpt_path` resumes the run."
            )
        if file.suffix == ".gguf" and file.is_file():
            name, local, options["gguf_file"] = str(file.parent), True, file.name
        if not local and (file.suffix == ".gguf" or file.is_absolute() or self._is_no_hub_name()):
            of = "" if self.adapter is None else f", the base model of the adapter {self.adapter}"
            raise UnsupportedPolicyError(
                f"policy.path: found no file or folder {self.path}{of}. Expected a folder with config.json and "
                "weights, a GGUF file, or a hub name. `lpc-lightning prepare` makes models/SmolLM2-135M-Instruct "
                "without a hub."
            )
        if file.is_dir() and not (file / "config.json").is_file():
            raise UnsupportedPolicyError(
                f"policy.path: found the folder {self.path} without config.json. Expected a folder with config.json "
                "and weights, a GGUF file, or a hub name."
            )
        if not local:
            options["revision"] = self.revision
        # The config is loaded before the weights, and reports changed files of the model.
        texts = {AutoConfig: MODEL_TEXTS, AutoTokenizer: TOKENIZER_TEXTS}.get(kind, ())
        self._check_content("policy.path", file, texts, weights=kind is AutoModelForCausalLM)
        with self._explaining("policy.path", self.path, "Expected a decoder-only model of transformers."):
            # Without this option transformers asks on the terminal, and runs the model's code after a "y".
            return kind.from_pretrained(name, **{"trust_remote_code": self.trust_remote_code, **options})

    def _is_no_hub_name(self) -> bool:
        """Return true if the path can only be one of this machine. A hub name has one slash at most."""
        return self.path.startswith((".", "models/")) or self.path.count("/") > 1

    @staticmethod
    def _check_content(setting: str, folder: Path, texts: Collection[str], weights: bool) -> None:
        """Compare the files of a folder with their digests, if `export` or `prepare` has written them.

        Args:
            setting: Name of the setting that names the folder.
            folder: The folder.
            texts: Files of text to report if they were changed. Other ones are reported with what they belong to.
            weights: Whether to compare the weights, too.
        """
        if not (folder / DIGESTS).is_file():
            return
        try:
            changed = changed_files(folder, weights=weights)
        except DamagedFileError as error:
            raise UnsupportedPolicyError(f"{setting}: {error}. Export, prepare or copy the folder again.") from error
        if damaged := [name for name in changed if name not in (*TOKENIZER_TEXTS, *MODEL_TEXTS)]:
            raise UnsupportedPolicyError(
                f"{setting}: {folder / damaged[0]} does not have the SHA-256 in {folder / DIGESTS}, expected the "
                "content that was written. Export, prepare or copy the folder again. If you have changed the file "
                f"yourself, remove its line from {DIGESTS}."
            )
        if edited := [name for name in changed if name in texts]:
            rank_zero_warn(
                f"{setting}: {', '.join(edited)} in {folder} changed after the folder was written. If you have not "
                f"changed it, copy the folder again. If you have, remove its line from {DIGESTS}."
            )

    @contextmanager
    def _explaining(self, setting: str, path: str, expected: str) -> Iterator[None]:
        """Turn errors of transformers into one that names the setting."""
        try:
            yield
        except (OSError, ValueError) as error:
            if not self.trust_remote_code and "trust_remote_code" in str(error):
                raise UnsupportedPolicyError(
                    f"{setting}: {path} needs Python code that comes with it, which is not run unless you allow it. "
                    "Read that code, then set policy.trust_remote_code to true (other commands than fit: "
                    "--trust_remote_code), or use a model that transformers supports."
                ) from error
            found = (
                f"could not load {path} in the folder or file"
                if Path(path).exists()
                else f"found no file or folder {path} in {Path.cwd()}, and could not load it from the hub (the hub has "
                "no such name, or is out of reach)"
            )
            reason = one_line(error).rstrip(".")
            raise UnsupportedPolicyError(f"{setting}: {found}: {reason}. {expected}") from error
