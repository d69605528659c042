"""Another model than the start policy as the reference."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from lpc_lightning.errors import ConfigError, UnsupportedPolicyError
from lpc_lightning.policy import CausalPolicy, PolicySpec, PretrainedPolicy


def build_other(path: str, policy: PolicySpec, tokenizer: PreTrainedTokenizerBase) -> tuple[CausalPolicy, PolicySpec]:
    """Load another model for the same tokens. The random state stays unchanged.

    Args:
        path: `model.reference_path`.
        policy: Spec of the policy. The model has its type and kernel.
        tokenizer: Tokenizer of the policy's inputs.

    Returns:
        The model and its spec.

    Raises:
        UnsupportedPolicyError: The model does not exist, or is not supported.
        ConfigError: Its tokenizer has another vocabulary.
    """
    spec = PretrainedPolicy(
        path, dtype=policy.dtype, attention=policy.attention, trust_remote_code=policy.trust_remote_code
    )
    spec.upcast = policy.upcast
    try:
        _check_vocabulary(path, spec.load_tokenizer(), tokenizer)
        with torch.random.fork_rng(devices=[]):
            return spec.build(tokenizer), spec
    except UnsupportedPolicyError as error:
        raise UnsupportedPolicyError(f"model.reference_path: {error}") from error


def _check_vocabulary(path: str, found: PreTrainedTokenizerBase, expected: PreTrainedTokenizerBase) -> None:
    ours, theirs = expected.get_vocab(), found.get_vocab()
    if ours == theirs:
        return
    token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    raise ConfigError(
        f"model.reference_path: found another vocabulary in {path} ({len(theirs)} tokens, {token!r} is "
        f"{theirs.get(token, 'missing')}), expected that of the policy ({len(ours)} tokens, {token!r} is "
        f"{ours.get(token, 'missing')}), because both score the same tokens. Take a model of the policy's family."
    )
