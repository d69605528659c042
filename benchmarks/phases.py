"""Where the time of our step goes, part by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lpc_lightning.policy import causal, logprobs

PARTS = (
    "data",
    "reference",
    "backbone forward",
    "head forward",
    "latent and loss",
    "backbone backward",
    "head backward",
    "optimizer",
    "other",
)
"""`backbone backward` is all of backward but the head's: the latent's networks, which are small, are in it. `other` is
metrics, logging and the trainer itself."""


class Phases:
    """Times the parts of each step by wrapping the calls that make them up.

    A part's time is its own: what a nested part takes is taken off the outer one.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        """Seconds of each step by part."""
        self._now: dict[str, float] = {}
        self._stack: list[str] = []
        self._mark = self._start = self._end = 0.0

    def watch(self, trainer: Trainer, module: LightningModule) -> None:
        """Wrap what makes up a step of `module`."""
        policy: Any = module.policy
        self._wrap(policy, "states", "backbone forward")
        if module.reference is not None:
            self._wrap(module.reference, "logps", "reference")
        self._wrap(module, "training_terms", "latent and loss")
        self._wrap(causal.BatchForward, "logps", "head forward")
        self._wrap(causal.BatchForward, "logps_per_code", "head forward")
        self._wrap_backward(logprobs._TokenLogps)
        self._wrap(trainer.strategy, "backward", "backbone backward")
        for optimizer in trainer.optimizers:
            self._wrap(optimizer, "zero_grad", "optimizer")
        self._wrap(module, "configure_gradient_clipping", "optimizer")
        # The optimizer's step runs the closure (forward and backward) inside: those take their own time off.
        self._wrap(trainer.strategy, "training_step", "other")
        self._wrap(trainer.strategy, "optimizer_step", "optimizer")

    def start_step(self) -> None:
        """The step's batch has arrived."""
        self._start = self._clock()
        self._now = dict.fromkeys(PARTS, 0.0)
        self._now["data"] = self._start - self._end if self._end else 0.0

    def end_step(self) -> None:
        """The step is over."""
        self._end = self._clock()
        known = sum(seconds for part, seconds in self._now.items() if part != "data")
        self._now["other"] += self._end - self._start - known
        self.steps.append(self._now)

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        # The reference is one part, whatever runs inside it.
        if "reference" in self._stack:
            yield
            return
        self._book()
        self._stack.append(name)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def _book(self) -> None:
        now = self._clock()
        if self._stack and self._now:
            self._now[self._stack[-1]] += now - self._mark
        self._mark = now

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        setattr(owner, name, self._timed(getattr(owner, name), part))

    def _wrap_backward(self, function: Any) -> None:
        function.backward = staticmethod(self._timed(function.backward, "head backward"))

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(call)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self._part(part):
                return call(*arguments, **options)

        return timed

    @staticmethod
    def _clock() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
