"""Open a policy: a checkpoint of this suite, an exported folder, or any plain model."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.data.tokenization.templates import TemplateSettings, make_template
from lpc_lightning.errors import ConfigError, DamagedFileError, UnsupportedPolicyError, one_line
from lpc_lightning.files.json_files import read_json_object
from lpc_lightning.inference.checkpoints import (
    build_module,
    checkpoint_origin,
    read_checkpoint,
    run_config,
    run_folder,
    trained_template,
)
from lpc_lightning.inference.modeling_lpc import (
    CONFIG_KEY,
    LATENT_FILE,
    InferencePrior,
    latent_causal_lm,
    load_prior,
)
from lpc_lightning.latent import LatentSpace
from lpc_lightning.policy import CausalPolicy, PolicySpec, PretrainedPolicy
from lpc_lightning.policy.pretrained import ORIGIN, published_file
from lpc_lightning.policy.spec import Dtype
from lpc_lightning.policy.start_adapter import is_adapter

DTYPES = get_args(Dtype)
CONVERTING = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64", "64": "float64"}
"""Values of `trainer.precision` that convert all weights of the policy, with the type."""
KINDS = (
    "a checkpoint (runs/version_0/checkpoints/best.ckpt), an exported folder, or a plain model: a folder with "
    "config.json and weights, the folder of an adapter, a GGUF file or a hub name"
)


@dataclass(frozen=True)
class OpenedPolicy:
    """Policy for generation and scoring: in eval mode, without gradients."""

    name: str
    """Short, for tables and folders."""
    kind: Literal["checkpoint", "export", "model"]
    policy: CausalPolicy
    """Plain policy, without the latent."""
    tokenizer: PreTrainedTokenizerBase
    prior: InferencePrior | None = None
    """Map from the prompt to z. None if the policy has no latent."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Origin, for `results.json`: path, algorithm, settings, step. JSON values."""
    template: TemplateSettings = field(default_factory=TemplateSettings)
    """Settings of the template of training."""

    @cached_property
    def causal_lm(self) -> PreTrainedModel:
        """Model that answers under the latent. The plain model if there is no latent."""
        plain = self.policy.causal_lm
        return plain if self.prior is None else latent_causal_lm(plain, self.prior)


def open_policy(
    path: str, dtype: str = "auto", device: str = "auto", name: str | None = None, trust_remote_code: bool = False
) -> OpenedPolicy:
    """Open a policy, and its latent if it has one.

    Args:
        path: A checkpoint, an exported folder, or a plain model: a folder, a GGUF file or a hub name.
        dtype: Type of the weights: `float32`, `bfloat16`, `float16`, `float64`; `auto` is the type that a checkpoint's
            policy was trained in, and the type that other weights are stored in.
        device: Where to put it: `cpu`, `cuda`, `cuda:1` ...; `auto` is the first GPU, or the CPU where there is none.
        name: What to call it; None makes a name from the path.
        trust_remote_code: Run Python code that comes with the model. This replaces the setting in a checkpoint: a file
            from another author must not allow its own code.

    Raises:
        CheckpointError: A checkpoint that cannot be read or built.
        UnsupportedPolicyError: A path that is none of these, or a model that cannot be served.
        ConfigError: No such dtype or device.
    """
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype: found {dtype!r}, expected auto, {', '.join(DTYPES)}.")
    to, opener = _device(device), _open_checkpoint if _is_checkpoint(path) else _open_model
    opened = opener(path, dtype, trust_remote_code)
    opened.policy.requires_grad_(False).eval().to(to)
    if opened.prior is not None:
        opened.prior.requires_grad_(False).eval().to(to)
    origin = opened.origin | {"kind": opened.kind, "dtype": str(opened.policy.causal_lm.dtype).removeprefix("torch.")}
    template = trained_template(origin)
    if opened.kind == "checkpoint" or "training" in origin:  # a plain model ends its answers as published
        model = opened.policy.causal_lm
        model.generation_config = with_end(model.generation_config, make_template(opened.tokenizer, *template).end_id)
    return replace(opened, name=name or opened.name, origin=origin, template=template)


def with_end(config: GenerationConfig | None, end_id: int) -> GenerationConfig:
    """Copy a generation config, and let answers also end at the token that ended them in training."""
    config = GenerationConfig() if config is None else copy.deepcopy(config)
    ends = config.eos_token_id
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if end_id not in known:
        config.eos_token_id = [*known, end_id] if known else end_id
    return config


def open_module(
    path: str, device: str = "auto", trust_remote_code: bool = False, dtype: Literal["auto", "float32"] = "auto"
) -> PreferenceModule:
    """Build and load a checkpoint's module with its reference, in eval mode, for preference accuracy.

    Args:
        path: The checkpoint.
        device: See `open_policy`.
        trust_remote_code: See `open_policy`.
        dtype: Type of the weights of the policy and the reference. `auto` is the type that they were trained in.
            `float32` converts from it, so that the reference is still the policy before the first step.

    Raises:
        CheckpointError: The checkpoint cannot be read or built.
        UnsupportedPolicyError: Its policy cannot be loaded.
        ConfigError: No such device.
    """
    to, checkpoint = _device(device), read_checkpoint(Path(path))

    def change(module: PreferenceModule) -> None:
        spec = module.policy_spec
        spec.compile, spec.trust_remote_code = False, trust_remote_code
        spec.frozen_states_gib = 0.0  # sequences are read once
        if spec.quantization is None:
            spec.dtype = _trained_type(checkpoint, spec, Path(path))
            spec.upcast = dtype == "float32"
        elif dtype == "float32":
            spec.dtype = "float32"  # of the arithmetic

    return build_module(checkpoint, Path(path), change).to(to)


def load_policy(
    path: str, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreferenceModule, dict[str, Any]]:
    """Load a checkpoint's module without a reference, on the CPU, and its origin.

    Raises:
        CheckpointError: The checkpoint cannot be read or built.
        UnsupportedPolicyError: Its policy cannot be loaded.
    """
    checkpoint = read_checkpoint(Path(path))

    def change(module: PreferenceModule) -> None:
        module.needs_reference = False  # a copy of the policy that would not be used
        spec = module.policy_spec
        spec.gradient_checkpointing = spec.compile = False
        spec.frozen_states_gib = 0.0
        spec.trust_remote_code = trust_remote_code
        spec.quantization = None  # the adapter can be merged only into full weights
        spec.dtype = dtype if dtype != "auto" else _trained_type(checkpoint, spec, Path(path))  # type: ignore[assignment]

    return build_module(checkpoint, Path(path), change), checkpoint_origin(checkpoint, Path(path))


def _trained_type(checkpoint: dict[str, Any], spec: PolicySpec, path: Path) -> Any:
    """Return the type of the policy's weights in training, which `trainer.precision: bf16-true` changes.

    A checkpoint of an adapter holds only the adapter. peft keeps it in float32 above weights of 16 bits, so that any
    other type is that of the whole model. A checkpoint of a frozen policy holds no weights of it. The run's
    `config.yaml` states the precision.
    """
    dtypes = {tensor.dtype for name, tensor in checkpoint["state_dict"].items() if name.startswith("policy.")}
    if not dtypes:
        return CONVERTING.get(str((run_config(path).get("trainer") or {}).get("precision")), spec.dtype)
    if len(dtypes) > 1 or (spec.lora is not None and dtypes == {torch.float32}):
        return spec.dtype
    return str(dtypes.pop()).removeprefix("torch.")


def _open_checkpoint(path: str, dtype: str, trust_remote_code: bool) -> OpenedPolicy:
    module, origin = load_policy(path, dtype, trust_remote_code)
    prior = None if module.latent is None else inference_prior(module.latent)
    return OpenedPolicy(short_name(path), "checkpoint", module.policy, module.tokenizer, prior, origin)


def _open_model(path: str, dtype: str, trust_remote_code: bool) -> OpenedPolicy:
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file() and not is_adapter(path):
        runs = sorted(folder.glob("**/*.ckpt"))
        hint = f" Did you mean {runs[0]}?" if runs else ""
        raise UnsupportedPolicyError(f"{path}: found a folder without config.json, expected {KINDS}.{hint}")
    if not folder.exists() and (folder.is_absolute() or path.startswith(".") or path.count("/") > 1):
        raise UnsupportedPolicyError(f"found no file or folder {path}, expected {KINDS}.")
    spec = PretrainedPolicy(path, trust_remote_code=trust_remote_code)
    try:
        stored = str(spec.load_config().dtype).removeprefix("torch.")
        spec.dtype = dtype if dtype != "auto" else stored if stored in DTYPES else "float32"  # type: ignore[assignment]
        tokenizer = spec.load_tokenizer()
        policy = spec.build(tokenizer)
    except UnsupportedPolicyError as error:  # the commands that open a model have no setting of this name
        raise UnsupportedPolicyError(str(error).removeprefix("policy.path: ")) from error
    origin: dict[str, Any] = {"path": path}
    config = policy.causal_lm.config
    if (record := published_file(path, ORIGIN)) is not None:
        origin["training"] = _training(record)
    elif spec.adapter is not None and published_file(spec.path, LATENT_FILE, spec.revision) is not None:
        rank_zero_warn(
            f"{path}: found an adapter whose base model {spec.path} has a latent. It is opened on the plain policy, "
            "at z = 0. If it was trained with the latent, open the base model with trust_remote_code=True and peft's "
            "PeftModel, and save both as one folder with its merge_and_unload().save_pretrained(FOLDER)."
        )
    settings = getattr(config, CONFIG_KEY, None)
    if settings is None:
        return OpenedPolicy(short_name(path), "model", policy, tokenizer, None, origin)
    prior = _exported_prior(path, config)
    return OpenedPolicy(short_name(path), "export", policy, tokenizer, prior, origin | {"latent": settings})


def _training(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except DamagedFileError as error:
        raise UnsupportedPolicyError(
            f"{error} Export the checkpoint again. Without the file, the folder opens as a model whose template of "
            "training is not known."
        ) from error


def _exported_prior(path: str, config: Any) -> InferencePrior:
    try:
        return load_prior(path, config)
    except (OSError, ValueError, SafetensorError) as error:
        raise UnsupportedPolicyError(
            f"{path}: found the settings of a latent in config.json and no {LATENT_FILE} that fits them "
            f"({one_line(error)}). Export the checkpoint again. To use the policy without its latent, remove "
            f"`{CONFIG_KEY}` and `auto_map` from config.json."
        ) from error


def view_module(module: PreferenceModule, name: str, template: TemplateSettings, latent: bool = True) -> OpenedPolicy:
    """View a built module as an opened policy. The policy is the module's own; the prior is a copy.

    Args:
        module: The module. Its modes and gradients are not changed: call `eval()` before generation.
        name: What to call it.
        template: Settings of the template of training.
        latent: False leaves out the latent.
    """
    prior = inference_prior(module.latent) if latent and module.latent is not None else None
    return OpenedPolicy(name, "checkpoint", module.policy, module.tokenizer, prior, template=template)


def inference_prior(space: LatentSpace) -> InferencePrior:
    """Copy the prior of a trained latent space. Later training does not change the copy."""
    form = space.inference_form()
    return InferencePrior.of({"kind": form.kind, **form.settings}, form.tensors)


def _is_checkpoint(path: str) -> bool:
    return Path(path).suffix == ".ckpt" or (Path(path).is_file() and not path.endswith(".gguf"))


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: found {device!r} ({reason}), expected auto, cpu, cuda, cuda:1 ...") from error


def short_name(path: str) -> str:
    """Return `version_3-best` for runs/version_3/checkpoints/best.ckpt, else the last part of the path."""
    place = Path(os.path.abspath(path)) if Path(path).exists() else Path(path)
    if not _is_checkpoint(path):
        return place.name.removesuffix(".gguf").lstrip(".") or "model"
    run = run_folder(place)
    return (f"{run.name}-{place.stem}" if run.name else place.stem).lstrip(".") or "model"
