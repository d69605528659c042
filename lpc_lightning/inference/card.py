"""Model card of an exported policy, for readers without knowledge of the run or this suite."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lpc_lightning.data.tokenization.template import Template
from lpc_lightning.files.markdown import code_span, escape_markdown, markdown_table
from lpc_lightning.inference.local_paths import without_folders
from lpc_lightning.types import Message

PAPER = "[Latent Preference Coding](https://arxiv.org/abs/2505.04993)"
MEASURED = {
    "rewards/accuracies": "pairs whose chosen answer has the higher reward, z from the prompt alone",
    "rewards/margins": "mean reward margin",
    "loss": "loss",
    "latent/codebook_perplexity": "codes in use (perplexity of the mean prior)",
    "latent/prior_entropy": "entropy of the prior for a single prompt, in nats",
    "latent/dead_codes": "codes that are no prompt's likeliest",
}
"""Metrics of `summary.json` in the card, with their descriptions."""
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Exported:
    """Content of a model card."""

    name: str
    """Name of the model."""
    origin: Mapping[str, Any]
    """Origin, see `checkpoint_origin`."""
    template: Template
    """Template of its prompts."""
    adapter: bool = False
    """True if the folder holds an adapter without its base model."""
    latent: Mapping[str, Any] | None = None
    """Settings of its prior. None without a latent."""
    linear: bool = True
    """True if z is a bias on its logits."""
    biases: str | None = None
    """File with the logit biases of each code, if written."""
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Content of the run's `summary.json` and `results.json` files, by path."""


def model_card(model: Exported) -> str:
    """Return the card as Markdown, with the YAML front matter of the hub."""
    latent = [] if model.latent is None else [_steer(model, model.latent), _latent_section(model.latent)]
    parts = [_front(model), _head(model), _use(model), *latent, _training(without_folders(model.origin))]
    parts.append(_results(without_folders(model.results)))
    return "\n\n".join([*parts, _limits(model)]) + "\n"


def _front(model: Exported) -> str:
    tags = ["preference-optimization", re.sub(r"\W", "-", model.origin["algorithm"].lower())]
    if model.latent is not None:
        tags.append("latent-preference-coding")
    lines = [f"library_name: {'peft' if model.adapter else 'transformers'}", "pipeline_tag: text-generation"]
    if (base := _base(model.origin)) and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base) and not Path(base).exists():
        lines.append(f"base_model: {base}")
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    terms = "# license: yours to state. The terms of the base model and of the preference data apply."
    return "\n".join(["---", *lines, terms, "---"])


def _base(origin: Mapping[str, Any]) -> str | None:
    return (origin["policy"].get("init_args") or {}).get("path")


def _head(model: Exported) -> str:
    origin = without_folders(model.origin)
    base = (
        code_span(str(_base(origin)))
        if _base(origin)
        else f"a model with random weights ({code_span(_class(origin['policy']))})"
    )
    merged = "which is this folder" if model.adapter else "which is merged into the weights"
    lora = f" by a low-rank adapter, {merged}" if _lora(origin) else ""
    text = (
        f"# {_text(model.name)}\n\n{base[0].upper()}{base[1:]}, aligned on preference pairs with "
        f"{_text(origin['algorithm'])}{lora}"
    )
    if model.adapter:
        return f"{text}. peft opens it on that model, whose name is in `adapter_config.json`."
    if model.latent is None:
        return f"{text}. A plain model: transformers opens it as it is."
    return (
        f"{text} and {PAPER}: the model infers from each prompt a preference representation z and answers under it, "
        "logits = LMHead(h + z)."
    )


def _lora(origin: Mapping[str, Any]) -> Any:
    return (origin["policy"].get("init_args") or {}).get("lora")


def _use(model: Exported) -> str:
    trust = "" if model.latent is None else ", trust_remote_code=True"
    if model.template.kind == "chat":
        arguments = f", **{model.template.arguments}" if model.template.arguments else ""
        prompt = (
            'messages = [{"role": "user", "content": "What makes a good question?"}]\n'
            "prompt = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True'
            f"{arguments}\n)"
        )
    else:
        text = model.template.render([Message(role="user", content="What makes a good question?")])
        prompt = f'prompt = tokenizer({json.dumps(text)}, return_tensors="pt")'
    opener = "AutoPeftModelForCausalLM" if model.adapter else "AutoModelForCausalLM"
    imports = [f"from transformers import {opener}, AutoTokenizer"]
    if model.adapter:
        imports = [f"from peft import {opener}", "from transformers import AutoTokenizer"]
    parts = [
        "## Use",
        _code(
            *imports,
            "",
            f"folder = {json.dumps(model.name, ensure_ascii=False)}  # where these files are",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            f"model = {opener}.from_pretrained(folder{trust})",
            "",
            prompt,
            "",
            "def answer(**how):",
            "    tokens = model.generate(**prompt, max_new_tokens=256, **how)",
            '    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True)',
            "",
            "print(answer())",
        ),
        *(_dated(model.template.day) if model.template.day else []),
        'Several prompts in a batch are padded on the left (`tokenizer.padding_side = "left"`).',
    ]
    if model.latent is not None:
        parts.append(
            "`trust_remote_code=True` runs `modeling_lpc.py` from this folder; it needs torch, transformers 5 and "
            "safetensors, and nothing of the suite that trained the model. **Without it transformers opens the same "
            "weights as a plain model without a latent (z = 0). That is not the policy that was trained.** Use it only "
            "where remote code is not allowed."
        )
    return "\n\n".join(parts)


def _dated(day: str) -> list[str]:
    return [f"The chat template can write today's date. In training it was {day}."]


def _steer(model: Exported, latent: Mapping[str, Any]) -> str:
    calls = {
        "": f"as exported: prior_mode={json.dumps(latent['prior_mode'])}",
        'prior_mode="mean"': "the mean over the prior",
    }
    if latent["kind"] in ("discrete", "gaussian"):
        calls['prior_mode="sample"'] = "a draw; each returned sequence has its own"
    if latent["kind"] == "discrete":
        last = latent["num_codes"] - 1
        calls['prior_mode="argmax"'] = "the likeliest code"
        calls[f"prior_mode={last}"] = f"one code, here the last of {latent['num_codes']}"
        calls["code_weights=weights"] = "your own mixture: a tensor (K,), or (B, K)"
    parts = [
        "## Steer",
        _code(*_aligned({f"answer({what})": why for what, why in calls.items()})),
        "z is inferred at the last token of the prompt and kept for the whole answer, also over a KV cache, in padded "
        "batches, sampling and beam search. `outputs = model(**prompt)` has it as `outputs.z`; pass it on "
        "(`z=outputs.z`) when you decode by hand. To score an answer that stands behind its prompt, state where the "
        "prompt ends: `model(**tokens, prompt_end=...)`, or z would be read at the end of the answer. lm-eval's own "
        "model `hf` does not, so that its log-likelihood tasks are wrong under the latent. Use `lpc-lightning "
        "evaluate`, or score the plain model (z = 0).",
        *(_as_bias(model, latent) if model.linear else [NOT_LINEAR]),
    ]
    return "\n\n".join(parts)


NOT_LINEAR = (
    "The LM head of this family is not linear (its logits are soft-capped), so that z is no bias on the logits: a "
    "stock model with a logits processor cannot serve it."
)


def _as_bias(model: Exported, latent: Mapping[str, Any]) -> list[str]:
    lines = {
        "steer = model.logits_processor(**prompt)": "LMHead(z) of these prompts",
        "plain = AutoModelForCausalLM.from_pretrained(folder)": "",
        "plain.generate(**prompt, max_new_tokens=256, logits_processor=[steer])": "as `model.generate`",
    }
    if latent["kind"] == "discrete":
        lines["table = model.code_biases()"] = "(K, vocabulary): what each code adds"
    text = (
        "z is a bias on the logits (the LM head is linear): a stock model, or any server that takes a logits "
        "processor, can serve it. Answers differ under a repetition penalty (`repetition_penalty`, also of "
        "`generation_config.json`): transformers applies it before the processor, to logits without z."
    )
    table = [f"`{model.biases}` holds that table."] if model.biases else []
    return [text, _code(*_aligned(lines)), *table]


def _latent_section(latent: Mapping[str, Any]) -> str:
    text = {
        "discrete": f"A codebook of {latent.get('num_codes')} vectors, one for each preference factor. A network "
        "of two "
        "layers reads the hidden state at the prompt's last token and predicts how likely each code is. z comes from "
        "that distribution. The codes have no names: what one of them stands for is found by answering under it.",
        "gaussian": f"A codebook of {latent.get('num_codes')} vectors under continuous weights: a network of two "
        "layers "
        "reads the hidden state at the prompt's last token and gives the weights' mean and deviation.",
        "mlp": "A network of two layers on the hidden state at the prompt's last token: a control without codes.",
        "vector": "One learned vector for all prompts: a control without codes.",
    }[latent["kind"]]
    return f"## What z is\n\n{text} Its weights are in `latent.safetensors`, its settings in `config.json` under `lpc`."


def _training(origin: Mapping[str, Any]) -> str:
    rows: list[tuple[str, Any]] = [("algorithm", f"{_text(origin['algorithm'])}{_settings(origin['settings'])}")]
    latent, data, trainer = origin["latent"], origin["data"], origin["trainer"] or {}
    rows.append(("latent", f"{_class(latent)}{_settings(latent.get('init_args') or {})}" if latent else "none"))
    rows.append(("policy", f"{_class(origin['policy'])}{_settings(origin['policy'].get('init_args') or {})}"))
    unknown = "not known: the checkpoint lay beside no config.yaml"
    rows.append(("data", f"{_class(data)}{_settings(data.get('init_args') or {})}" if data else unknown))
    rows.append(("training pairs", origin["training_pairs"]))
    rows.append(("optimizer steps", origin["step"]))
    rows += [
        (label, _optional(trainer.get(key)))
        for label, key in (("precision", "precision"), ("clipping", "gradient_clip_val"))
    ]
    rows.append(("micro-batches to a step", _optional(trainer.get("accumulate_grad_batches"))))
    rows += [("seed", _optional(origin["seed"])), ("weights exported as", origin["dtype"])]
    rows.append(
        ("made with", ", ".join(f"{name} {version(name)}" for name in ("lpc-lightning", "torch", "transformers")))
    )
    cells = [(name, str(value)) for name, value in rows if value is not None]
    return "\n\n".join(["## Training", markdown_table(("", ""), cells, left=2, escape=str)])


def _results(results: Mapping[str, Mapping[str, Any]]) -> str:
    parts = ["## Results"]
    if validation := results.get(SUMMARY, {}).get("validation_after"):
        before = results[SUMMARY].get("validation_before") or {}
        measured: list[tuple[str, ...]] = [
            (text, _number(before.get(key)), _number(validation[key]))
            for key, text in MEASURED.items()
            if key in validation
        ]
        parts += [
            "On the run's validation pairs, at the end of the run (the checkpoint may be an earlier one of it):",
            markdown_table(("", "before training", "after"), measured, escape=str),
        ]
    for path, found in results.items():
        rows = [
            (_text(task), _text(metric), _number(value), _number(scores.get(_stderr(metric))))
            for task, scores in (found.get("metrics") or {}).items()
            for metric, value in scores.items()
            if "_stderr" not in metric
        ]
        if rows:
            of = (found.get("origin") or {}).get("path")
            parts += [
                f"Benchmarks ({code_span(path)}{f', of {code_span(str(of))}' if of else ''}):",
                markdown_table(("task", "metric", "value", "standard error"), rows, left=2, escape=str),
            ]
    if len(parts) == 1:
        parts.append("None lay in the run's folder when this was exported.")
    return "\n\n".join(parts)


def _stderr(metric: str) -> str:
    name, comma, variant = metric.partition(",")
    return f"{name}_stderr{comma}{variant}"


def _limits(model: Exported) -> str:
    points = [
        "Validation pairs come from the same source as the training pairs. Accuracy on them measures how well these "
        "preferred answers are recognized. It does not measure how good the answers are.",
        "The export checks nothing about safety. Expect the faults of the base model and of the training pairs.",
    ]
    if model.latent is not None:
        points += [
            "z changes the odds of each token by the same factor at every place of an answer. It can therefore change "
            "the choice of words, but not the order of an answer's parts.",
            "A codebook may collapse, or its codes may have one effect. See the results above, and compare answers "
            "under several codes before you read meaning into their numbers.",
            "Assisted decoding and continuous batching are refused, since they hide where a prompt ends. Guidance "
            "(`guidance_scale`) is refused, since its second pass has another prompt.",
        ]
    return "\n".join(["## Limits", "", *(f"- {point}" for point in points)])


def _class(spec: Mapping[str, Any]) -> str:
    return _text(str(spec["class_path"]).rpartition(".")[2])


def _settings(settings: Mapping[str, Any]) -> str:
    """Format settings as ` (beta 0.1, codes 32)`. None and False are left out. A class has its own settings."""
    text = [
        f"{_text(str(name))} {_value(value)}"
        for name, value in settings.items()
        if value is not None and value is not False
    ]
    return f" ({', '.join(text)})" if text else ""


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return (
            f"{_class(value)}{_settings(value.get('init_args') or {})}"
            if "class_path" in value
            else _settings(value).strip()
        )
    return code_span(value) if isinstance(value, str) else _text(json.dumps(value))


def _text(value: str) -> str:
    """Escape a text that is not code. A backtick of its own would begin code."""
    return escape_markdown(value).replace("`", "\\`")


def _optional(value: Any) -> str | None:
    return None if value is None else _text(str(value))


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else _text(str(value))


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _aligned(lines: Mapping[str, str]) -> list[str]:
    """Align the comments of lines of code."""
    width = max(map(len, lines))
    return [f"{line:<{width}}  # {why}" if why else line for line, why in lines.items()]
