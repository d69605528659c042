"""The command `export`: write a checkpoint as a folder that transformers opens, with its latent."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.data.tokenization.chat_template import ChatTemplate
from lpc_lightning.data.tokenization.template import Template
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.errors import ConfigError
from lpc_lightning.files.integrity import DIGESTS, digests_of, write_digests
from lpc_lightning.files.json_files import read_if_whole
from lpc_lightning.files.output_paths import check_folder
from lpc_lightning.files.whole_folders import check_writable
from lpc_lightning.inference.card import SUMMARY, Exported, model_card
from lpc_lightning.inference.checkpoints import run_folder, trained_template
from lpc_lightning.inference.code_biases import BIASES
from lpc_lightning.inference.export_folder import FILES, check_free, replacing
from lpc_lightning.inference.generation import default_generation
from lpc_lightning.inference.local_paths import clean_configs, without_folders
from lpc_lightning.inference.modeling_lpc import InferencePrior, has_own_code, latent_causal_lm, without_latent
from lpc_lightning.inference.opening import inference_prior, load_policy, with_end
from lpc_lightning.latent import PriorMode
from lpc_lightning.policy.lora import merge
from lpc_lightning.policy.pretrained import ORIGIN
from lpc_lightning.policy.spec import dropout_rates, set_dropout_rates
from lpc_lightning.policy.start_adapter import ADAPTER, TRAINED

if TYPE_CHECKING:
    from peft import PeftModel

CARD = "README.md"
"""File of the model card. peft writes one of its own, which it replaces."""
SHARD = "5GB"


def export(
    checkpoint: str,
    output: str,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    prior_mode: PriorMode | None = None,
    code_biases: bool = False,
    adapter: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write a folder that stock transformers opens as the plain policy, and with `trust_remote_code=True` as a model
    that keeps its latent in `forward` and `generate`.

    With it come the tokenizer, a model card (`README.md`) with the settings, the data and the results that lie in the
    run's folder, and a SHA-256 of every other file (`digests.json`).

    An adapter is merged into the weights, or written alone. No license is written: it is yours to state.

    Args:
        checkpoint: A checkpoint, such as `runs/version_0/checkpoints/best.ckpt`.
        output: The folder to write, new or empty. A folder that exists is filled, not replaced.
        dtype: Type of the weights that are written. `auto` is the type they were trained in; the latent always keeps
            its own.
        prior_mode: How the exported model takes z from the prior unless a call sets it: `mean`, `sample`,
            `argmax`, or the number of a code. null: as it was trained.
        code_biases: Write as well what each code adds to the logits (K rows as long as the vocabulary), for servers
            that steer by a code's number.
        adapter: Write the adapter that was trained (`policy.lora`), without the weights of its base model, as a folder
            that peft and servers of LoRA adapters open. It must have been trained on a model folder or hub name, and
            without a latent.
        overwrite: Replace an earlier export. A folder with any other file is refused.
        trust_remote_code: Run Python code that comes with the model or its tokenizer. Read that code first.

    Returns:
        The folder.

    Raises:
        CheckpointError: The checkpoint cannot be read or built.
        UnsupportedPolicyError: Its policy cannot be loaded.
        ConfigError: A setting that this checkpoint cannot have, or a folder that is not free.
        CheckpointWriteError: The folder cannot be written.
    """
    target = Path(os.path.abspath(output))
    check_folder(target, "output")
    target = target.resolve()  # a link to a folder stays, and its folder is written
    check_free(target, overwrite)
    check_writable(target, "output")
    # bfloat16 weights would round the updates of an adapter before a type of more digits is written.
    built = "auto" if dtype in ("auto", "bfloat16") else "float32"
    module, origin = load_policy(checkpoint, built, trust_remote_code=trust_remote_code)
    prior = _prior(module, prior_mode)
    if prior is not None and has_own_code(type(module.policy.causal_lm)):
        raise ConfigError(
            f"checkpoint: found a latent on {type(module.policy.causal_lm).__name__}, whose code comes with the base "
            "model, expected a class of transformers. transformers would open the export by that code, without the "
            "latent. Use the checkpoint itself: `generate`, `alpaca` and `evaluate` open it with --trust_remote_code "
            "true. A policy that was trained without a latent can be exported."
        )
    template = make_template(module.tokenizer, *trained_template(origin))
    plain: Any = trained_adapter(module) if adapter else plain_model(module, template)
    if dtype != "auto":
        plain.to(getattr(torch, dtype))
    del origin["data_folder"]  # a folder of this machine
    origin["path"] = str(Path(checkpoint).absolute().relative_to(run_folder(Path(checkpoint)).parent))
    weights = next(weight for name, weight in plain.named_parameters() if not adapter or ".lora_" in name)
    origin["dtype"] = str(weights.dtype).removeprefix("torch.")
    model: Any = plain if prior is None else latent_causal_lm(plain, prior)
    biases = _biases(model, prior) if code_biases else None
    exported = Exported(
        name=target.name,
        origin=origin,
        template=template,
        adapter=adapter,
        latent=None if prior is None else prior.settings,
        linear=prior is None or _is_linear(model),
        biases=None if biases is None else BIASES,
        results=_results(checkpoint),
    )
    with replacing(target, overwrite) as folder:
        if adapter:
            model.save_pretrained(folder, save_embedding_layers=False)  # or peft asks the hub for the vocabulary
        else:
            _write_model(model, folder)
        if isinstance(template, ChatTemplate) and isinstance(module.tokenizer.chat_template, str):
            module.tokenizer.chat_template = template.published
        module.tokenizer.save_pretrained(folder)
        if biases is not None:
            save_file({"code_biases": biases}, folder / BIASES, metadata={"format": "pt"})
        clean_configs(folder)
        written = sorted({*(file.name for file in folder.iterdir()), CARD, ORIGIN, DIGESTS})
        content = json.dumps({**without_folders(origin), FILES: written}, indent=1)
        (folder / ORIGIN).write_text(content + "\n", encoding="utf-8")
        write_digests(folder, digests_of(file for file in folder.iterdir() if file.name not in (CARD, DIGESTS)))
        (folder / CARD).write_text(model_card(exported), encoding="utf-8")  # without a digest: it is edited
    print(f"Wrote {target}. Read {target / CARD}, and state a license in it before you publish it.")
    base = module.policy_spec.adapter_base
    if adapter and base is not None and Path(base).exists():
        print(
            f"{target / ADAPTER} names the base model by a folder of this machine, {base}. Name a public one instead."
        )
    return target


def trained_adapter(module: PreferenceModule) -> PeftModel:
    """Return the policy whose `save_pretrained` writes the adapter of training and the name of its base model.

    Raises:
        ConfigError: There is no adapter, a latent belongs to it, or no folder holds the weights of its base model.
    """
    spec, wrapped = module.policy_spec, module.policy.model
    if isinstance(wrapped, PreTrainedModel):
        raise ConfigError("adapter: found a policy whose weights were trained, expected one with policy.lora.")
    if module.latent is not None:
        raise ConfigError(
            "adapter: found a policy with a latent, which the folder of an adapter cannot hold, expected one without. "
            "Without this setting, export writes the merged policy with its latent."
        )
    if spec.adapter_base is None:
        raise ConfigError(
            f"adapter: found an adapter that was trained on {spec.start}. No folder holds these weights, so that the "
            "adapter could not be opened. Expected one that was trained on a model folder or hub name. Without this "
            "setting, export writes the merged policy."
        )
    config = wrapped.peft_config[TRAINED]
    config.base_model_name_or_path, config.revision = spec.adapter_base, getattr(spec, "revision", None)
    return wrapped


def _prior(module: PreferenceModule, mode: PriorMode | None) -> InferencePrior | None:
    if module.latent is None:
        if mode is not None:
            raise ConfigError(f"prior_mode: found {mode!r} for a policy that was trained without a latent.")
        return None
    prior = inference_prior(module.latent)
    if mode is not None:
        try:
            prior(torch.zeros(1, prior.width), mode)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        prior.settings["prior_mode"] = mode
    return prior


def plain_model(module: PreferenceModule, template: Template) -> PreTrainedModel:
    """Return the policy as a plain model: adapter merged, the base model's dropout, and the template's end token.

    Training uses no dropout, so that policy and reference differ only by training. The exported model has the dropout
    of the published base model again, for further training. The latent of a base model that is an export itself is not
    part of it.
    """
    wrapped: Any = module.policy.model
    model = merge(wrapped) if module.policy.has_adapter else wrapped
    model.config = without_latent(model.config)
    if not has_own_code(type(model)):
        vars(model.config).pop("auto_map", None)  # names code of the base model, which the folder will not hold
    published = module.policy_spec.load_config()
    if model.config is model.config.get_text_config():  # also if the published model reads pictures as well
        published = published.get_text_config()
    set_dropout_rates(model.config, dropout_rates(published))
    model.generation_config = with_end(model.generation_config, template.end_id)
    return model


def _write_model(model: PreTrainedModel, folder: Path) -> None:
    """Write weights and configs. The generation config has the values of the base model, and ends with more tokens.

    transformers refuses to save a changed generation config with flags that have no effect, such as a temperature
    without `do_sample`. Many are published with these.
    """
    generation: Any = model.generation_config
    with default_generation(model):
        model.save_pretrained(folder, max_shard_size=SHARD)
    generation.to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True, keys_to_pop=["compile_config"])


def _biases(model: Any, prior: InferencePrior | None) -> torch.Tensor:
    if prior is None:
        raise ConfigError("code_biases: the policy was trained without a latent.")
    try:
        return model.code_biases()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _is_linear(model: Any) -> bool:
    try:
        model.logit_biases(torch.zeros(1, model.latent_prior.width, device=model.device))
    except ValueError:
        return False
    return True


def _results(checkpoint: str) -> dict[str, dict[str, Any]]:
    """Read the result files of the run's folder, by path. Damaged files and files of other forms are left out.

    Beside a checkpoint that is not in a folder `checkpoints`, there may be results of other runs. They are not read.
    """
    path = Path(checkpoint).absolute()
    folder = run_folder(path)
    files = [folder / SUMMARY, *(sorted(folder.glob("**/results.json")) if folder != path.parent else [])]
    found = {str(file.relative_to(folder)): read_if_whole(file, "The model card is without it.") for file in files}
    return {name: content for name, content in found.items() if content and _is_result(content)}


def _is_result(content: Mapping[str, Any]) -> bool:
    """Return whether the entries that a model card reads have its types. The `results.json` of a cell has others."""
    entries = (content.get(name) for name in ("validation_before", "validation_after", "metrics", "origin"))
    if not all(isinstance(entry, dict | None) for entry in entries):
        return False
    return all(isinstance(scores, dict) for scores in (content.get("metrics") or {}).values())
