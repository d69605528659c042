"""Fixtures: random pairs, tiny policies, naive log-probabilities, and one training step."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

# For the programs that tests start. Their tensors are tiny: a second thread costs more time than it saves, as do
# processes that compile.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# isort: split
from hypothesis import HealthCheck, settings  # first: it asks the garbage collector who refers to its objects

# isort: split
# Before torch: the package sets how long OpenMP's threads spin at a barrier, and the command imports it without garbage
# collection, which halves the time.
import lpc_lightning.__main__  # noqa: F401

# isort: split
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lpc_lightning.algorithms.base import PreferenceModule
from lpc_lightning.data.batching.layouts import Layout, PaddedLayout
from lpc_lightning.data.batching.loading import EvaluationBatches, PreferenceLoader
from lpc_lightning.evaluation.ablation.process import FORKED, MODULES
from lpc_lightning.policy import CausalPolicy, TinyPolicy
from lpc_lightning.types import TokenizedPair

pytest_plugins = ["tests.fixtures.emulated_device", "tests.fixtures.training_runs"]

# Hypothesis first computes tables of Unicode in a new clone, and the machine may be busy. So there is no time limit.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")
torch.set_num_threads(1)  # tensors are tiny: a second thread costs more time than it saves
# A fit imports these when it needs them, which takes seconds in every forked process. The server imports them once. On
# a GPU it must not: bitsandbytes, which they import, would set up CUDA before the fork.
if not torch.cuda.is_available():
    lazy = ["transformers.optimization", "peft", "sklearn.cluster", "sklearn.linear_model", "pandas"]
    FORKED.set_forkserver_preload([*MODULES, *lazy])


def pytest_collection() -> None:
    """Collect tests without the garbage collector. It would search all tests and modules several times."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave what collection made out of later searches."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of several processes first: a worker that takes over late tests then does not repeat their runs."""
    items.sort(key=lambda item: item.get_closest_marker("distributed") is None)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gpt2": {},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0},
}
"""Windows are shorter than the sequences, and soft caps are low enough to change the logits of a tiny model."""


@torch.no_grad()
def _perturb(module: nn.Module, deviation: float = 0.2, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter += deviation * noise.to(parameter.dtype)


class _ExactNorm(nn.Module):
    """A norm of transformers without its cast to float32, which would hide errors below 1e-6."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        name = type(norm).__name__
        self.weight = norm.weight
        self.eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        self.shift = 1.0 if "Gemma" in name else 0.0
        self.centred = "LayerNorm" in name

    def forward(self, states: Tensor) -> Tensor:
        if self.centred:
            states = states - states.mean(-1, keepdim=True)
        return states / (states.square().mean(-1, keepdim=True) + self.eps).sqrt() * (self.shift + self.weight)


def _exact(policy: CausalPolicy) -> CausalPolicy:
    for module in list(policy.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith(("RMSNorm", "CohereLayerNorm")):
                setattr(module, name, _ExactNorm(child))
    return policy


@pytest.fixture(scope="session")
def exact() -> Callable[[CausalPolicy], CausalPolicy]:
    """Return a function that replaces a float64 policy's norms by exact ones, for comparisons to 1e-9."""
    return _exact


@pytest.fixture(scope="session")
def perturb() -> Callable[..., None]:
    """Return a function that adds noise to every parameter. New biases and adapters would be 0."""
    return _perturb


@pytest.fixture(scope="session")
def tiny_spec() -> Callable[..., TinyPolicy]:
    """Return a function that makes the spec of a family's smallest policy, in float64."""

    def spec(family: str = "llama", options: dict[str, Any] | None = None, **policy: Any) -> TinyPolicy:
        size: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "context": 64, "dtype": "float64"}
        return TinyPolicy(family=family, options=FAMILIES[family] | (options or {}), **(size | policy))

    return spec


@pytest.fixture(scope="session")
def tiny(tiny_spec: Callable[..., TinyPolicy]) -> Callable[..., CausalPolicy]:
    """Return a function that builds such a policy with noise on all parameters, and exact norms in float64."""

    def build(family: str = "llama", **policy: Any) -> CausalPolicy:
        built = tiny_spec(family, **policy).build()
        _perturb(built)
        return _exact(built) if built.model.dtype == torch.float64 else built

    return build


@pytest.fixture(scope="session")
def make_pairs() -> Callable[..., list[TokenizedPair]]:
    """Return a function that makes random pairs of given (prompt, chosen, rejected) lengths."""

    def make(lengths: Iterable[tuple[int, int, int]], seed: int = 0, vocabulary: int = 1024) -> list[TokenizedPair]:
        generator = torch.Generator().manual_seed(seed)
        pairs = []
        for number, sizes in enumerate(lengths):
            runs = [torch.randint(3, vocabulary, (size,), generator=generator).tolist() for size in sizes]
            pairs.append(TokenizedPair(f"pair {number}", *runs))
        return pairs

    return make


@pytest.fixture(scope="session")
def naive_logps() -> Callable[[nn.Module, Sequence[TokenizedPair]], Tensor]:
    """Return a function that computes (2B,) log-probabilities from the logits of one unpadded sequence at a time."""

    def logps(model: nn.Module, pairs: Sequence[TokenizedPair]) -> Tensor:
        sequences = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
        sequences += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
        sums = []
        for prompt, answer in sequences:
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0].double()
            by_position = torch.log_softmax(logits, dim=-1)
            sums.append(sum(by_position[len(prompt) + position - 1, token] for position, token in enumerate(answer)))
        return torch.stack(sums)

    return logps


class Step(NamedTuple):
    """Results of a training step."""

    loss: Tensor
    gradients: dict[str, Tensor]
    metrics: dict[str, Tensor]


class _Watch(Callback):
    loss: Tensor
    gradients: dict[str, Tensor]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.loss = outputs["loss"].detach()


@pytest.fixture(scope="session")
def make_trainer() -> Callable[..., Trainer]:
    """Return a function that makes a trainer which writes nothing."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet |= {"enable_progress_bar": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}

    def make(**settings: Any) -> Trainer:
        return Trainer(accelerator="cpu", **(quiet | settings))

    return make


@pytest.fixture(scope="session")
def make_loader() -> Callable[..., PreferenceLoader]:
    """Return a function that makes a loader of pairs, in order."""

    def make(
        pairs: Sequence[TokenizedPair], layout: Layout | None = None, batch_size: int | None = None
    ) -> PreferenceLoader:
        batches = EvaluationBatches(len(pairs), batch_size or len(pairs))
        return PreferenceLoader(pairs, batches, layout or PaddedLayout(pad_id=0))

    return make


@pytest.fixture(scope="session")
def train_step(
    make_trainer: Callable[..., Trainer], make_loader: Callable[..., PreferenceLoader]
) -> Callable[..., Step]:
    """Return a function that takes one training step on all pairs with a real trainer."""

    def step(
        module: PreferenceModule, pairs: Sequence[TokenizedPair], layout: Layout | None = None, **settings: Any
    ) -> Step:
        watch = _Watch()
        trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[watch], **settings)
        trainer.fit(module, make_loader(pairs, layout), make_loader(pairs, layout))
        return Step(watch.loss, watch.gradients, dict(trainer.callback_metrics))

    return step
