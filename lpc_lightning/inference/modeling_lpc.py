"""Causal language model that answers under a latent z inferred from its prompt: logits = LMHead(h + z).

Latent Preference Coding (Gong et al., ICML 2025, arXiv 2505.04993). This file needs only torch, safetensors and
transformers. It is part of every exported folder, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works without the project that trained it. It is
one file, so that whoever allows remote code has one file to read.

Letters: B prompts in a batch, q tokens of a call, d hidden width, V vocabulary, K codes. h_x (B, d) is the last hidden
state (after the final norm, what enters the LM head) at the last token of a prompt.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LogitsProcessor, PreTrainedModel
from transformers.utils import cached_file, logging

logger: Any = logging.get_logger(__name__)

LATENT_FILE = "latent.safetensors"
"""File of the latent's tensors. Stock transformers ignores it and opens the folder as the plain policy."""
DIGESTS_FILE = "digests.json"
"""File with the SHA-256 of the files beside it, by name."""
CONFIG_KEY = "lpc"
"""Key of the latent's settings in `config.json`."""
CACHES = ("past_key_values", "cache_params")
"""Names of caches in a model's outputs."""
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Options of `from_pretrained` that locate a file."""
PRIOR = "latent_prior"
"""Name of the latent among a model's children."""
MARK = "filled_under_latent"
"""Attribute of a cache that was filled by a latent model."""
HEAD_ROWS = 8192
"""Rows of the head that are converted to float32 at a time. A whole copy of a large head takes gigabytes."""
LINEAR_TOLERANCE = 0.02
"""Relative tolerance of the linearity check. Rounding in bfloat16 stays below it."""


# The prior


class InferencePrior(nn.Module):
    """z = f(h_x; mode): the part of a latent space that inference needs. Each kind is a subclass.

    Attributes:
        settings: JSON values: `kind`, `prior_mode`, and `num_codes` with a codebook.
        codebook: (K, d), or None.
        num_codes: K if z can be a single code, else None.
    """

    kinds: ClassVar[dict[str, type[InferencePrior]]] = {}
    num_codes: int | None = None
    codebook: Any

    def __init_subclass__(cls, kind: str) -> None:
        InferencePrior.kinds[kind] = cls

    def __init__(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors; see `of`."""
        super().__init__()
        self.settings = dict(settings)
        self.register_parameter("codebook", None)

    @staticmethod
    def of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> InferencePrior:
        """Create the prior of a kind.

        Args:
            settings: `kind`, `prior_mode` and, with a codebook, `num_codes`.
            tensors: Weights by name. They are copied.

        Raises:
            ValueError: The kind is unknown, or its tensors do not match.
        """
        kind = settings.get("kind")
        if kind not in InferencePrior.kinds:
            raise ValueError(f"latent: found kind {kind!r}, expected one of {', '.join(InferencePrior.kinds)}.")
        try:
            prior = InferencePrior.kinds[kind](settings, tensors)
        except KeyError as error:
            raise ValueError(f"latent: found {', '.join(tensors)}, expected {error} as well ({kind} latent).") from None
        if surplus := set(tensors) - set(prior.state_dict()):
            raise ValueError(f"latent: found {', '.join(sorted(surplus))}, which a {kind} latent does not have.")
        return prior

    @property
    def width(self) -> int:
        """Width d of z and of a hidden state."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def log_prior(self, prompt: Tensor) -> Tensor | None:
        """Return log-probabilities (B, K) of the codes given h_x (B, d). None without a distribution over codes."""
        return None

    def depends_on_prompt(self, mode: str | int | None, code_weights: Tensor | None) -> bool:
        """Return whether `forward` with these arguments depends on h_x."""
        return code_weights is None and not isinstance(self.settings["prior_mode"] if mode is None else mode, int)

    def forward(self, prompt: Tensor, mode: str | int | None = None, code_weights: Tensor | None = None) -> Tensor:
        """Compute z in the type of the weights, without autocast.

        Args:
            prompt: (B, d) h_x, on any device: the last layer and the LM head of a model may be on different ones.
            mode: How z is taken from the prior: `mean`, `sample`, `argmax`, or the number of a code. None: by the
                settings.
            code_weights: (K,) or (B, K) weights over the codebook instead of the prior. They are not normalized.

        Returns:
            (B, d), on the device of the weights.

        Raises:
            ValueError: This kind of latent does not have the mode or the weights.
        """
        prompt = prompt.to(self.device)
        with torch.autocast(prompt.device.type, enabled=False):
            if code_weights is None:
                return self._taken(prompt, self.settings["prior_mode"] if mode is None else mode)
            if mode is not None:
                raise ValueError("found both prior_mode and code_weights, expected one: either stands for z.")
            return self._mixed(code_weights, prompt.shape[0])

    def _taken(self, prompt: Tensor, mode: str | int) -> Tensor:
        raise NotImplementedError

    def _mixed(self, weights: Tensor, rows: int) -> Tensor:
        if self.codebook is None:
            raise ValueError(f"code_weights: a latent of kind {self.settings['kind']} has no codebook to weigh.")
        codes = self.codebook.shape[0]
        if weights.shape not in ((codes,), (rows, codes)):
            raise ValueError(
                f"code_weights: found shape {tuple(weights.shape)}, expected ({codes},), one weight a code, or "
                f"({rows}, {codes}), a row for each prompt."
            )
        return weights.to(self.codebook).expand(rows, -1) @ self.codebook

    def _mode_error(self, mode: object, expected: str) -> ValueError:
        return ValueError(f"prior_mode: found {mode!r}, expected {expected}.")


class _Network(nn.Module):
    """Network of two layers on states scaled to unit root mean square."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        super().__init__()
        self.first, self.second = (_Affine(tensors, f"{name}.{layer}") for layer in ("first", "second"))

    def forward(self, prompt: Tensor) -> Tensor:
        """Map (B, d) to (B, outputs), in float32 or wider."""
        kind = self.first.weight.dtype
        normal = nn.functional.rms_norm(prompt.to(kind), prompt.shape[-1:])
        output = self.second(nn.functional.gelu(self.first(normal)))
        return output.to(torch.promote_types(kind, torch.float32))


class _Affine(nn.Module):
    """Linear layer that no quantization replaces: libraries look for `nn.Linear`, and the latent is small."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        super().__init__()
        self.weight, self.bias = _copied(tensors[f"{name}.weight"]), _copied(tensors[f"{name}.bias"])

    def forward(self, states: Tensor) -> Tensor:
        """Map (B, inputs) to (B, outputs)."""
        return nn.functional.linear(states, self.weight, self.bias)


def _copied(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone())


class DiscretePrior(InferencePrior, kind="discrete"):
    """z = c E, with c from p(code given x) = softmax(MLP(h_x))."""

    modes: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {
        "mean": lambda log_prior: log_prior.exp(),
        "sample": lambda log_prior: _one_hot(torch.multinomial(log_prior.exp(), 1)[:, 0], log_prior),
        "argmax": lambda log_prior: _one_hot(log_prior.argmax(-1), log_prior),
    }

    def __init__(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See `InferencePrior.of`."""
        super().__init__(settings, tensors)
        self.codebook = _copied(tensors["codebook"])
        self.prior = _Network(tensors, "prior")
        self.num_codes = self.codebook.shape[0]

    @property
    def width(self) -> int:
        """Width d of z and of a hidden state."""
        return self.codebook.shape[1]

    def log_prior(self, prompt: Tensor) -> Tensor:
        """Return log-probabilities (B, K) of the codes given h_x (B, d)."""
        with torch.autocast(prompt.device.type, enabled=False):
            return self.prior(prompt).log_softmax(-1)

    def _taken(self, prompt: Tensor, mode: str | int) -> Tensor:
        log_prior = self.log_prior(prompt)
        if isinstance(mode, int) and not isinstance(mode, bool) and 0 <= mode < log_prior.shape[1]:
            weights = _one_hot(torch.full(prompt.shape[:1], mode, device=prompt.device), log_prior)
        elif mode in self.modes:
            weights = self.modes[str(mode)](log_prior)
        else:
            expected = f"one of {', '.join(self.modes)}, or the number of a code from 0 to {log_prior.shape[1] - 1}"
            raise self._mode_error(mode, expected)
        return weights.to(self.codebook.dtype) @ self.codebook


def _one_hot(codes: Tensor, like: Tensor) -> Tensor:
    return nn.functional.one_hot(codes, like.shape[-1]).to(like.dtype)


class GaussianPrior(InferencePrior, kind="gaussian"):
    """z = c E, with c ~ Normal(mean, std) from MLP(h_x)."""

    def __init__(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See `InferencePrior.of`."""
        super().__init__(settings, tensors)
        self.codebook = _copied(tensors["codebook"])
        self.prior = _Network(tensors, "prior")

    @property
    def width(self) -> int:
        """Width d of z and of a hidden state."""
        return self.codebook.shape[1]

    def _taken(self, prompt: Tensor, mode: str | int) -> Tensor:
        mean, log_std = self.prior(prompt).chunk(2, dim=-1)
        if mode == "sample":
            mean = mean + log_std.exp() * torch.randn_like(mean)
        elif mode != "mean":
            raise self._mode_error(mode, "mean or sample: a Gaussian latent has no codes")
        return mean.to(self.codebook.dtype) @ self.codebook


class DeterministicPrior(InferencePrior, kind="mlp"):
    """z = MLP(h_x), the same for every mode."""

    def __init__(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See `InferencePrior.of`."""
        super().__init__(settings, tensors)
        self._take(tensors)

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        self.network = _Network(tensors, "network")

    @property
    def width(self) -> int:
        """Width d of z and of a hidden state."""
        return self.network.first.weight.shape[1]

    def _taken(self, prompt: Tensor, mode: str | int) -> Tensor:
        if mode not in DiscretePrior.modes:
            expected = f"{', '.join(DiscretePrior.modes)} (the same here): this latent has no codes"
            raise self._mode_error(mode, expected)
        return self._z(prompt)

    def _z(self, prompt: Tensor) -> Tensor:
        return self.network(prompt)


class VectorPrior(DeterministicPrior, kind="vector"):
    """One z for all prompts."""

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        self.vector = _copied(tensors["vector"])

    @property
    def width(self) -> int:
        """Width d of z and of a hidden state."""
        return self.vector.shape[0]

    def depends_on_prompt(self, mode: str | int | None, code_weights: Tensor | None) -> bool:
        """Return false."""
        return False

    def _z(self, prompt: Tensor) -> Tensor:
        return self.vector.expand(prompt.shape[0], -1)


# The model


@contextmanager
def _hooked(
    decoder: nn.Module, leave: Callable[[Tensor], None], head: nn.Module, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Call `leave` with the decoder's output states. Replace the head's output after that by the result of `change`.

    The modules are shared with other models. The hooks exist only within the block and act only in this thread, so that
    the threads of a server do not affect each other.
    """
    thread = threading.get_ident()

    def behind(module: nn.Module, inputs: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            leave(output[0])  # may call the head, which has no hook yet
            handles.append(head.register_forward_hook(after))

    def after(module: nn.Module, inputs: Any, logits: Tensor) -> Tensor | None:
        return change(logits) if threading.get_ident() == thread else None

    handles = [decoder.register_forward_hook(behind)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def head_product(head: nn.Module, z: Tensor, kind: torch.dtype) -> Tensor:
    """Compute W z (N, V) of z (N, d), without the head's bias, in float32 or wider.

    LMHead(h + z) is computed as LMHead(h) + W z. In 16 bits, the sum h + z would be rounded by about as much as the
    whole effect of a code.

    Args:
        head: The module of the LM head.
        z: (N, d).
        kind: Type of the states that enter the head.
    """
    exact = torch.promote_types(kind, torch.float32)
    if type(head) is nn.Linear and type(head.weight) is nn.Parameter and not head.weight.is_meta:
        with torch.autocast(head.weight.device.type, enabled=False):
            at = z.to(head.weight.device, exact)
            return torch.cat([at @ rows.to(exact).T for rows in head.weight.split(HEAD_ROWS)], dim=-1)
    # Quantized, sharded or offloaded weights: the head's own code, in its own type.
    rows = head(torch.cat([torch.zeros_like(z[:1]), z]).to(kind)).to(exact)
    return rows[1:] - rows[0]


class _Steering:
    """z of one forward pass, inferred from the states that leave the decoder. W z is added to the head's output."""

    def __init__(
        self, head: nn.Module, z: Tensor | None, z_logits: Tensor | None, infer: Callable[[Tensor], Tensor]
    ) -> None:
        self.head, self.z, self.z_logits, self.infer, self.added = head, z, z_logits, infer, False

    def leave(self, states: Tensor) -> None:
        if self.z is None:
            self.z = self.infer(states)
        rows, _, width = states.shape
        if self.z.shape not in ((width,), (rows, width)):
            raise ValueError(
                f"z: found shape {tuple(self.z.shape)}, expected ({rows}, {width}), a row for each prompt, or "
                f"({width},)."
            )
        self.z = self.z.expand(rows, -1)
        if self.z_logits is None:
            self.z_logits = head_product(self.head, self.z, states.dtype)

    def add(self, logits: Tensor) -> Tensor:
        assert self.z_logits is not None
        self.added = True
        return logits + self.z_logits[:, None].to(logits.device)


Stock: Any = object
"""The stock model class comes next in a method's resolution order; it is known only at run time."""


class LatentGenerationMixin(Stock):
    """Base class that `latent_causal_lm` puts before a stock model class.

    Attributes:
        latent_prior: Map from h_x to z.
        stock: The stock model class.
        forward_names: Arguments of the stock `forward`, in order.
    """

    latent_prior: InferencePrior
    stock: type[PreTrainedModel]
    forward_names: tuple[str, ...]

    def latent_forward(
        self,
        *args: Any,
        z: Tensor | None = None,
        prior_mode: str | int | None = None,
        code_weights: Tensor | None = None,
        prompt_end: Tensor | None = None,
        rows_per_prompt: int = 1,
        z_logits: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the stock model's `forward`, with logits LMHead(h + z) in float32 or wider.

        Without `z`, it is inferred at the last token of each row that the attention mask shows (left or right padding),
        which is right where a row is a prompt. Give `prompt_end` where a row holds an answer behind its prompt. Several
        rows without a mask give a warning.

        Args:
            args: The stock model's arguments.
            z: (B, d) or (d,) latent to answer under, such as an earlier call's `outputs.z`.
            prior_mode: How z is taken from the prior: `mean`, `sample`, `argmax`, or a code's number. None: the model's
                own setting.
            code_weights: (K,) or (B, K) weights over the codes instead of the prior.
            prompt_end: (B,) column, among this call's tokens, of the last token of each prompt.
            rows_per_prompt: Number of consecutive rows with the same prompt and the same z (beams).
            z_logits: (B, V) `outputs.z_logits` of an earlier call with this `z`. None: it is computed from `z`.
            kwargs: The stock model's arguments.

        Returns:
            The stock model's outputs, with `z` (B, d) among them.

        Raises:
            ValueError: Arguments contradict each other, or the end of the prompt is unknown.
        """
        given = dict(zip(self.forward_names[: len(args)], args, strict=True)) | kwargs
        as_dict = given.pop("return_dict", None)
        if z is not None and (prior_mode is not None or code_weights is not None):
            raise ValueError("found z and prior_mode or code_weights, expected one: z is what these would infer.")
        if z is None and prompt_end is None:
            _check_prompts(given)

        def infer(states: Tensor) -> Tensor:
            end = prompt_end
            if end is None:
                mask = given.get("attention_mask")
                self._report_missing_mask(mask, len(states), prior_mode, code_weights)
                end = _last_shown(mask, *states.shape[:2])
            prompt = states[torch.arange(len(states), device=states.device), end.to(states.device)]
            weights = code_weights
            if weights is not None and weights.dim() == 2:
                weights = weights[::rows_per_prompt]
            inferred = self.latent_prior(prompt[::rows_per_prompt], prior_mode, weights)
            return inferred.repeat_interleave(rows_per_prompt, dim=0)

        head = self.get_output_embeddings()
        steering = _Steering(head, z, z_logits, infer)
        with _hooked(self.get_decoder(), steering.leave, head, steering.add):
            outputs = super().forward(**given, return_dict=True)
        if not steering.added:
            raise RuntimeError(
                f"{type(self).__name__}: its forward did not call its LM head, so that z was not added (some fused "
                "losses do that). Ask for logits instead of a loss."
            )
        outputs["z"] = steering.z
        outputs.z_logits = steering.z_logits  # an attribute: no element of the outputs as a tuple
        for name in CACHES:
            if (cache := outputs.get(name)) is not None:
                setattr(cache, MARK, True)
        return outputs if (self.config.return_dict if as_dict is None else as_dict) else outputs.to_tuple()

    @torch.no_grad()
    def infer_z(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prior_mode: str | int | None = None,
        code_weights: Tensor | None = None,
    ) -> Tensor:
        """Infer z (B, d) of prompts (B, q), padded left or right; see `latent_forward` for the arguments."""
        self._report_missing_mask(attention_mask, len(input_ids), prior_mode, code_weights)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        places = {}
        if "position_ids" in self.forward_names:
            places["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)  # as `generate` counts them
        states = self.get_decoder()(input_ids=input_ids, attention_mask=mask, use_cache=False, **places)[0]
        prompt = states[torch.arange(len(states), device=states.device), _last_shown(mask, *states.shape[:2])]
        return self.latent_prior(prompt, prior_mode, code_weights)

    def _report_missing_mask(
        self, mask: Tensor | None, rows: int, mode: str | int | None, code_weights: Tensor | None
    ) -> None:
        if mask is None and rows > 1 and self.latent_prior.depends_on_prompt(mode, code_weights):
            logger.warning_once(
                "attention_mask: found none for several rows, and neither z nor prompt_end. z is read at the last "
                "column, which is right for prompts of one length. For padded prompts pass their mask. To score an "
                "answer pass prompt_end, the column of its prompt's last token. lm-eval's own model `hf` passes "
                "neither: use `lpc-lightning evaluate`, or the plain model at z = 0."
            )

    def logits_processor(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prior_mode: str | int | None = None,
        code_weights: Tensor | None = None,
    ) -> LatentLogitsProcessor:
        """Return the latent of these prompts as a logits processor. With it, the stock model answers as this one does.

        Not so under a repetition penalty (`repetition_penalty`, also of the generation config): transformers applies it
        before the processor, to logits without z.

        See `infer_z` for the arguments.

        Raises:
            ValueError: The head is not linear, so that z is no bias on the logits.
        """
        return LatentLogitsProcessor(
            self.logit_biases(self.infer_z(input_ids, attention_mask, prior_mode, code_weights))
        )

    def code_biases(self) -> Tensor:
        """Return (K, V) what each code adds to the logits: a server steers by a code's number without any hidden state.

        Raises:
            ValueError: The latent has no codes, or the head is not linear.
        """
        if self.latent_prior.num_codes is None:
            raise ValueError(f"code_biases: a latent of kind {self.latent_prior.settings['kind']} has no codes.")
        return self.logit_biases(self.latent_prior.codebook)

    @torch.no_grad()
    def logit_biases(self, z: Tensor) -> Tensor:
        """Map z (N, d) to LMHead(z) (N, V), without the head's own bias and with the scale of the family's logits.

        Raises:
            ValueError: The head is not linear.
        """
        probe = torch.ones_like(z[:1])
        zero, unit, *biases = self._logits(torch.cat([torch.zeros_like(probe), probe, z]))
        # A soft cap is visible at large values. A linear head stays linear, here up to logits of about 1000.
        far = 2.0 ** torch.log2(1000 / (unit - zero).abs().max()).round()
        apart = (self._logits(far * probe)[0] - zero - far * (unit - zero)).abs().max()
        if apart > LINEAR_TOLERANCE * far * (unit - zero).abs().max():
            raise ValueError(
                f"logits of {type(self).__name__}: found a head that is not linear (a soft cap?), expected LMHead(h + "
                "z) = LMHead(h) + LMHead(z). A bias on the logits cannot stand for z here: use this model's own "
                "forward and generate."
            )
        return torch.stack(biases) - zero

    def _logits(self, z: Tensor) -> Tensor:
        """Return logits (N, V), float32 or wider, that the model's own code makes of W z, for z (N, d)."""
        head, products = self.get_output_embeddings(), []
        # Offloaded embeddings are on the meta device, and take a token from any other one.
        place = z.device if self.device.type == "meta" else self.device
        token = torch.zeros(1, 1, dtype=torch.long, device=place)
        with _hooked(
            self.get_decoder(),
            lambda states: products.append(head_product(head, z, states.dtype)),
            head,
            lambda logits: products[0][None].to(logits.device),
        ):
            outputs = super().forward(
                input_ids=token, attention_mask=torch.ones_like(token), use_cache=False, return_dict=True
            )
        logits: Tensor = outputs.logits[0]
        return logits

    # Generation: z is inferred at prefill and kept

    def latent_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        z: Tensor | None = None,
        prior_mode: str | int | None = None,
        code_weights: Tensor | None = None,
        prompt_end: Tensor | None = None,
        rows_per_prompt: int = 1,
        z_logits: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the stock model's inputs, and the latent's. Without a z yet, the prompt ends where the input ends."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if z is None and prompt_end is None:
            tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
            prompt_end = _last_shown(kwargs.get("attention_mask"), *tokens.shape[:2]).to(tokens.device)
        latent = {"z": z, "prior_mode": prior_mode, "code_weights": code_weights, "prompt_end": prompt_end}
        return {**inputs, **latent, "rows_per_prompt": rows_per_prompt, "z_logits": z_logits}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        latent = {"z": outputs["z"], "z_logits": outputs.z_logits}
        return updated | latent | {"prior_mode": None, "code_weights": None, "prompt_end": None}

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        for name in ("z", "code_weights"):
            value = model_kwargs.get(name)
            if value is not None and value.dim() == 1:  # rows are repeated; one vector for all prompts is not a row
                assert input_ids is not None
                model_kwargs[name] = value.expand(input_ids.shape[0], -1)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _beam_search(self, input_ids: Tensor, *args: Any, generation_config: Any, **kwargs: Any) -> Any:
        beams = generation_config.num_beams
        return super()._beam_search(
            input_ids, *args, generation_config=generation_config, rows_per_prompt=beams, **kwargs
        )

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "assisted decoding: its first pass holds guesses behind the prompt, where z would be inferred. Expected "
            "greedy search, sampling or beams; or the stock model with this one's `logits_processor`."
        )

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        scale = generation_config.guidance_scale
        if scale not in (None, 1):
            raise NotImplementedError(
                f"guidance_scale: found {scale}, expected none or 1: the second pass of guidance has another prompt. "
                "Leave it out; or use the stock model with this one's `logits_processor`, which adds z after guidance."
            )
        return super()._get_logits_processor(generation_config, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raise an error: continuous batching is not supported.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "continuous batching: it packs the tokens of many prompts into one row, where one z cannot serve them all. "
            "Expected `generate` on a batch; or the stock model with this one's `logits_processor`."
        )

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        return False  # the hooks of a pass are new ones each time: torch.compile would compile each time

    # Files

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the class by the stock class that it is made from: it has no name to be found under."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _empty_view, (self.stock,), *state

    def plain_causal_lm(self) -> PreTrainedModel:
        """Return the stock model without the latent. All weights are shared. Its config does not name the latent."""
        plain = _view(self, self.stock, without=PRIOR)
        plain.config = without_latent(plain.config)
        return plain

    def save_pretrained(
        self, save_directory: str | Path, state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Write a folder that opens both ways: stock as the plain model, with `trust_remote_code=True` as this one.

        Args:
            save_directory: The folder.
            state_dict: Weights to write in place of the model's own, the latent's among them.
            kwargs: As in transformers.

        Raises:
            ValueError: The model holds an adapter, its class is code that came with its weights, or the call asks to
                push to the hub.
        """
        if has_own_code(self.stock):
            raise ValueError(
                f"save_pretrained: found {self.stock.__name__}, whose code comes with its weights, expected a class of "
                "transformers. The folder would open by that code, without the latent. `plain_causal_lm` returns the "
                "model without its latent, which can be saved."
            )
        if any(".base_layer." in name for name in self.state_dict()):
            raise ValueError("save_pretrained: found an adapter in the model, expected it merged into the weights.")
        if kwargs.get("push_to_hub"):
            raise ValueError("save_pretrained: found push_to_hub, expected a local save; `push_to_hub` does both.")
        folder, plain = Path(save_directory), self.plain_causal_lm()
        plain.config.auto_map = {"AutoModelForCausalLM": f"{Path(__file__).stem}.{LatentCausalLM.__name__}"}
        setattr(plain.config, CONFIG_KEY, self.latent_prior.settings)
        state = self.state_dict() if state_dict is None else state_dict
        latent = {name: tensor for name, tensor in state.items() if name.startswith(f"{PRIOR}.")}
        weights = {name: tensor for name, tensor in state.items() if name not in latent}
        plain.save_pretrained(folder, state_dict=weights, **kwargs)
        tensors = {name.removeprefix(f"{PRIOR}."): tensor.contiguous() for name, tensor in latent.items()}
        save_file(tensors, folder / LATENT_FILE, metadata={"format": "pt"})
        shutil.copyfile(__file__, folder / Path(__file__).name)
        # A file of an earlier export, such as a table of its codes, does not belong to these weights.
        written = sorted([folder / LATENT_FILE, *folder.glob("model*.safetensors")])
        digests = {file.name: _digest(file) for file in written}
        (folder / DIGESTS_FILE).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See `LatentCausalLM.from_pretrained`."""
        return LatentCausalLM.from_pretrained(*args, **kwargs)


def latent_causal_lm(causal_lm: PreTrainedModel, prior: InferencePrior) -> PreTrainedModel:
    """Create a model that answers under the latent. It shares all weights with `causal_lm`, which is not changed.

    Its `forward` and `generate` are the stock ones, and take `z`, `prior_mode`, `code_weights` and `prompt_end` as well
    (see `LatentGenerationMixin.latent_forward`). `generate` infers z at the end of its input, unless it is given one,
    and keeps it for the whole answer, with and without a KV cache. Beams of one prompt share a sampled z; sequences
    returned for one prompt under sampling have each their own.

    Args:
        causal_lm: A decoder-only model of transformers, with or without adapter layers. The latent of one that has a
            latent is left out.
        prior: From h_x to z. It moves to the LM head's device, unless the head's weights are offloaded.

    Returns:
        An instance of a subclass of `type(causal_lm)`.

    Raises:
        ValueError: The latent is not as wide as the model's hidden states.
    """
    if isinstance(causal_lm, LatentGenerationMixin):
        causal_lm = causal_lm.plain_causal_lm()
    head = causal_lm.get_output_embeddings().weight
    if prior.width != head.shape[1]:
        raise ValueError(f"latent: found a z of width {prior.width}, expected {head.shape[1]}, the policy's.")
    stock: Any = type(causal_lm)
    view = _view(causal_lm, _latent_class(stock))
    # Offloaded weights are on the meta device until they are used. A prior there would lose its values.
    view.latent_prior = prior if head.is_meta else prior.to(head.device)
    return view


@functools.cache
def _latent_class(stock: Any) -> Any:
    space = {
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` that answers under a latent: see `latent_causal_lm`.",
        "forward": _with_signature(LatentGenerationMixin.latent_forward, stock.forward),
        "prepare_inputs_for_generation": _with_signature(
            LatentGenerationMixin.latent_inputs_for_generation, stock.prepare_inputs_for_generation
        ),
        "stock": stock,
        "forward_names": tuple(inspect.signature(stock.forward).parameters)[1:],
        "config_class": stock.config_class,
    }
    return type(f"Latent{stock.__name__}", (LatentGenerationMixin, stock), space)


def _empty_view(stock: Any) -> Any:
    kind = _latent_class(stock)
    return kind.__new__(kind)


def _with_signature(latent: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """Add the stock function's arguments to the signature of `latent`. transformers reads the signature."""
    own = [p for p in inspect.signature(latent).parameters.values() if p.kind is p.KEYWORD_ONLY]
    theirs = list(inspect.signature(stock).parameters.values())
    rest = [p for p in theirs if p.kind is p.VAR_KEYWORD]

    @functools.wraps(latent)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return latent(self, *args, **kwargs)

    order = [*(p for p in theirs if p not in rest), *own, *rest]
    method.__signature__ = inspect.Signature(order)  # type: ignore[attr-defined]
    return method


def _view(model: Any, kind: Any, without: str | None = None) -> Any:
    """Copy only the module object, as `kind`. Parameters, buffers, children and config are shared with `model`."""
    view = kind.__new__(kind)
    # accelerate puts a forward of its own on an instance, which would hide the view's; the children keep theirs.
    own = {name: value for name, value in vars(model).items() if name not in ("forward", "_old_forward", "_hf_hook")}
    hooks = {name: copy.copy(value) for name, value in own.items() if name.endswith(("_hooks", "_with_kwargs"))}
    children = {name: child for name, child in model._modules.items() if name != without}
    view.__dict__ |= own | hooks | {"_modules": children}
    view.generation_config = copy.deepcopy(view.generation_config)
    return view


class LatentLogitsProcessor(LogitsProcessor):
    """Logits processor that adds LMHead(z) to the scores, for a stock model whose head is linear.

    The result is log-probabilities. Greedy search and sampling are not affected by that. Beam search sums
    log-probabilities, which must be normalized again after the bias.
    """

    def __init__(self, bias: Tensor) -> None:
        """Keep the bias.

        Args:
            bias: (V,) for all rows, or (B, V), a row for each prompt; each serves all sequences of its prompt.
        """
        self.bias = bias

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Map scores (rows, V) to log-probabilities (rows, V).

        Raises:
            ValueError: There are not as many sequences for each prompt as for any other.
        """
        bias, rows = self.bias.to(scores), scores.shape[0]
        if bias.dim() == 2:
            if rows % bias.shape[0]:
                raise ValueError(
                    f"logits processor: found {rows} rows, expected a multiple of {bias.shape[0]} prompts."
                )
            bias = bias.repeat_interleave(rows // bias.shape[0], dim=0)
        return (scores + bias).log_softmax(-1)


class LatentCausalLM:
    """Loader named by `auto_map` in an exported `config.json`: loads the stock model and adds its latent."""

    @staticmethod
    def from_pretrained(path: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Open an exported folder or hub repository.

        Args:
            path: Folder, or name on the hub.
            args: As in transformers.
            config: The config, where it is loaded already.
            kwargs: As in transformers (`dtype`, `device_map`, `revision` ...). The latent keeps its own type.

        Returns:
            See `latent_causal_lm`; with `output_loading_info=True`, and the loading information of transformers.

        Raises:
            ValueError: A safetensors file does not have the SHA-256 in `digests.json`, if there is that file.
        """
        for name in ("trust_remote_code", "_from_auto"):
            kwargs.pop(name, None)
        loaded = AutoModelForCausalLM.from_pretrained(path, *args, config=config, trust_remote_code=False, **kwargs)
        causal_lm, *info = loaded if isinstance(loaded, tuple) else (loaded,)
        _check_weights(path, {name: kwargs[name] for name in HUB if name in kwargs})
        model = latent_causal_lm(causal_lm, load_prior(path, causal_lm.config, **kwargs))
        return (model, *info) if info else model

    @staticmethod
    def register_for_auto_class(auto_class: Any = None) -> None:
        """Nothing to do: `save_pretrained` writes `auto_map` by itself."""

    @staticmethod
    def _from_config(config: Any, **kwargs: Any) -> Any:
        raise ValueError("from_config: a latent is trained and has no other start, expected from_pretrained.")


def has_own_code(causal_lm: type[PreTrainedModel]) -> bool:
    """Return whether a class of models is code that came with their weights. `save_pretrained` writes it with them."""
    return causal_lm._auto_class is not None


def without_latent(config: Any) -> Any:
    """Return a copy of a config without the settings of a latent and without the loader of this file.

    A model that was opened from an exported folder has both. A folder that holds them needs the latent's files as well.
    """
    config = copy.deepcopy(config)
    vars(config).pop(CONFIG_KEY, None)
    own = f"{Path(__file__).stem}."
    loaders = vars(config).pop("auto_map", None) or {}
    # The hub's name stands before the loader of a model that was opened from there: `name--modeling_lpc.Class`.
    if others := {name: code for name, code in loaders.items() if not str(code).rpartition("--")[2].startswith(own)}:
        config.auto_map = others
    return config


def load_prior(path: str | Path, config: Any, **hub: Any) -> InferencePrior:
    """Load the latent of a model.

    Args:
        path: Folder, or name on the hub.
        config: The model's config.
        hub: Where to look, as in transformers; other options are ignored.

    Raises:
        ValueError: The config has no settings of a latent.
    """
    settings = getattr(config, CONFIG_KEY, None)
    if settings is None:
        raise ValueError(f"{path}: found no `{CONFIG_KEY}` in config.json, expected the settings of a latent.")
    where = {name: hub[name] for name in HUB if name in hub}
    file: Any = cached_file(path, LATENT_FILE, **where)
    return InferencePrior.of(settings, load_file(file))


def _check_weights(path: str | Path, where: Mapping[str, Any]) -> None:
    """Compare the weights with their digests. A folder or repository without digests is not checked."""
    try:
        file: Any = cached_file(path, DIGESTS_FILE, **where)
    except OSError:
        return
    folder = Path(file).parent
    for name, digest in json.loads(Path(file).read_text(encoding="utf-8")).items():
        weights = folder / name
        if name.endswith(".safetensors") and weights.is_file() and _digest(weights) != digest:
            raise ValueError(
                f"{weights} does not have the SHA-256 in {DIGESTS_FILE}, expected the content that was written. Copy "
                f"or download it again. If you have changed it yourself, remove its line from {DIGESTS_FILE}."
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_prompts(given: Mapping[str, Any]) -> None:
    cache: Any = given.get("past_key_values")
    if getattr(cache, MARK, False) and cache.get_seq_length() > 0:
        raise ValueError(
            "z: found none, and a cache that was filled under a latent. To go on with an answer, pass the z it began "
            "with (z=outputs.z); to answer a new prompt behind the cached text, pass prompt_end, the column of that "
            "prompt's last token among the new ones."
        )
    if given.get("labels") is not None:
        raise ValueError(
            "labels: found neither z nor prompt_end beside them, expected one: z would be inferred at the end of the "
            "answer that it is to predict. prompt_end is the column of each prompt's last token."
        )


def _last_shown(mask: Tensor | None, rows: int, tokens: int) -> Tensor:
    """Return (B,) the last unmasked column of each row. The mask may begin with columns of a cache."""
    if mask is None:
        return torch.full((rows,), tokens - 1)
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask: found {mask.dim()} dimensions, expected 2, to see where each prompt ends; or pass "
            "prompt_end or z."
        )
    shown = mask[:, -tokens:] != 0
    return (shown.long() * torch.arange(1, tokens + 1, device=mask.device)).argmax(-1)
