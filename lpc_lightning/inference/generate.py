"""The command `generate`: write answers to the terminal and to JSON lines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from lpc_lightning.data import DataError
from lpc_lightning.errors import ConfigError
from lpc_lightning.files.output_paths import check_file, claim_output_file
from lpc_lightning.inference.generation import Answered, Condition, Decoding, answers, likeliest_codes, marked
from lpc_lightning.inference.opening import OpenedPolicy, open_policy
from lpc_lightning.inference.prompts import Prompt, read_prompts, text_prompt
from lpc_lightning.inference.side_by_side import side_by_side
from lpc_lightning.latent import PriorMode
from lpc_lightning.policy.precision import WEIGHTS_ADVICE, warn_of_slow_products

TOP = 5
"""Number of the prior's codes in the output."""


def generate(
    model: str,
    prompt: str | None = None,
    prompts: str | None = None,
    codes: list[int] | None = None,
    prior_mode: PriorMode | None = None,
    code_weights: list[str] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    system: str | None = None,
    output: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Write answers to prompts: under the prior and, side by side, under chosen codes.

    A prompt is put into the template that the model was trained with, else into the tokenizer's chat template where
    there is one. The same prompt gets the same answer with the same settings, whatever is answered beside it; draws are
    the same under every code.

    Args:
        model: A checkpoint (`runs/version_0/checkpoints/best.ckpt`), an exported folder, or any plain model: a folder,
            a hub name or a GGUF file.
        prompt: A prompt as text.
        prompts: A file of prompts in place of `prompt`: `.txt` with one a line, or `.jsonl` with `prompt` as text or
            messages, and perhaps a system text in `system`.
        codes: Numbers of codes to answer under as well, from 0.
        prior_mode: How z is taken from the prior: `mean`, `sample`, `argmax`, or the number of a code. null: the
            model's own setting.
        code_weights: A mixture of the codes to answer under as well: K numbers, used as they are; a JSON file with a
            list of them; or one with lists by name, such as the `code_weights.json` of `adapt`, and a name.
        max_new_tokens: Tokens of an answer at most.
        temperature: Divides the logits before a token is drawn. 0 takes the likeliest token.
        top_p: Draw among the likeliest tokens that together have this probability.
        num_beams: Beams of a beam search.
        seed: Seed of all draws.
        batch_size: Prompts that are answered at a time.
        system: A system text for prompts that have none.
        output: A file for the answers, one JSON object a prompt; answers of an earlier command are replaced.
        dtype: Type of the weights: `auto`, `float32`, `bfloat16` or `float16`.
        device: Where to run: `auto`, `cpu`, `cuda` ...
        trust_remote_code: Run Python code that comes with the model or its tokenizer. Read that code first.

    Raises:
        ConfigError: A setting is invalid or does not fit the model, or `output` is not free for the answers.
        DataError: A file that is read is missing or invalid, or a prompt leaves no room for an answer.
        CheckpointError, UnsupportedPolicyError: The model cannot be opened.
    """
    if output:
        _check_replaceable(Path(output))
    if (prompt is None) == (prompts is None):
        raise ConfigError("prompt: expected either a prompt (--prompt) or a file of prompts (--prompts).")
    if prompt is not None and not prompt.strip():
        raise ConfigError(f"prompt: found {prompt!r}, expected text.")
    prompt_list = [text_prompt(prompt, system)] if prompt is not None else read_prompts(str(prompts), system)
    decoding = Decoding(max_new_tokens, temperature, top_p, num_beams, seed, batch_size)
    with claim_output_file(Path(output), "output") if output else nullcontext():
        opened = open_policy(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        warn_of_slow_products(opened.policy.model.device.type, opened.origin["dtype"], WEIGHTS_ADVICE)
        under = conditions(opened, prior_mode, codes or [], code_weights)
        _report(opened, prompt_list, under, decoding, output)


def _check_replaceable(path: Path) -> None:
    """Check that the file is new, empty, or has the answers of an earlier command."""
    check_file(path, "output")
    if not path.exists() or not path.stat().st_size:
        return
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
    except ValueError:
        first = None
    if not (isinstance(first, dict) and {"model", "answers"} <= set(first)):
        raise ConfigError(f"output: {path} exists and holds no answers of this command. Give another --output.")


def conditions(
    opened: OpenedPolicy, prior_mode: PriorMode | None, codes: Sequence[int], code_weights: Sequence[str] | None
) -> list[Condition]:
    """List the conditions: the prior, the mixture if it is given, and each code.

    Raises:
        ConfigError: The policy does not have the code, or has no codes.
    """
    prior = opened.prior
    if prior is None:
        for name, value in (("codes", codes), ("code_weights", code_weights), ("prior_mode", prior_mode)):
            if value not in (None, []):
                raise ConfigError(f"{name}: {opened.name} has no latent, so that there is nothing to choose.")
        return [Condition("plain")]
    try:
        prior(torch.zeros(1, prior.width, device=opened.policy.model.device), prior_mode)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    chosen = [Condition("prior" if prior_mode is None else f"prior, {prior_mode}", prior_mode)]
    if code_weights is not None:
        chosen.append(Condition("code weights", code_weights=_weights(code_weights, opened)))
    for code in codes:
        if prior.num_codes is None or not 0 <= code < prior.num_codes:
            kind = "has no codes" if prior.num_codes is None else f"has the codes 0 to {prior.num_codes - 1}"
            raise ConfigError(f"codes: found {code}, but the latent of {opened.name} {kind}.")
        chosen.append(Condition(f"code {code}", code))
    return chosen


def _weights(given: Sequence[str], opened: OpenedPolicy) -> tuple[float, ...]:
    codes = opened.prior.num_codes if opened.prior else None
    values: Sequence[object] = given
    try:
        if given[0].endswith(".json"):
            values = _read_weights(given[0], ",".join(given[1:]))  # the command line splits a name at its commas
        weights = tuple(float(value) for value in values)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise DataError(f"code_weights: there is no file {given[0]}.") from None
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"code_weights: found {' '.join(given)} ({error}), expected a list of numbers.") from error
    if len(weights) != codes:
        expected = "but it has no codes" if codes is None else f"expected {codes}, one for each code"
        raise ConfigError(f"code_weights: found {len(weights)} numbers for {opened.name}, {expected}.")
    return weights


def _read_weights(path: str, name: str) -> Sequence[object]:
    """Read the list of a file. A file with several lists needs a name."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if isinstance(content, dict) and name not in content:
        raise ConfigError(f"code_weights: found {name or 'no name'} for {path}, expected one of {', '.join(content)}.")
    if name and not isinstance(content, dict):
        raise ConfigError(f"code_weights: found the name {name} for {path}, which holds no lists by name.")
    return content[name] if isinstance(content, dict) else content


def _report(
    opened: OpenedPolicy,
    prompt_list: Sequence[Prompt],
    under: Sequence[Condition],
    decoding: Decoding,
    output: str | None,
) -> None:
    width = shutil.get_terminal_size().columns
    # Checks the prompts before the file of earlier answers is emptied.
    answered = answers(opened, prompt_list, under, decoding)
    with ExitStack() as stack:
        file = stack.enter_context(Path(output).open("w", encoding="utf-8")) if output else None
        bar = stack.enter_context(
            tqdm(total=len(prompt_list), unit="prompt", disable=len(prompt_list) <= decoding.batch_size)
        )
        for number, answer in enumerate(answered, 1):
            if file is not None:
                file.write(json.dumps({"model": opened.name, **asdict(answer)}, ensure_ascii=False) + "\n")
                file.flush()
            bar.write(_format(answer, number, width))
            bar.update()
    if output:
        print(f"Wrote {output}.")


def _format(answer: Answered, number: int, width: int) -> str:
    lines = [f"Prompt {number}: {answer.prompt[-1]['content']}"]
    if answer.prior is not None:
        lines.append(likeliest_codes(answer.prior, TOP))
    texts = {each.under: marked(each.text, each.finished) for each in answer.answers}
    return "\n".join([*lines, "", side_by_side(texts, width), ""])
