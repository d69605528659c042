"""A model on several processes, which answer its requests together, as one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import distributed


class SharedRequests(LM):
    """Looks to lm-eval like a single process: each process answers a share of the requests, and gets all answers.

    lm-eval's own way is to share the documents. A process that raises then leaves the others waiting for it, one
    without documents raises, and few-shot examples depend on how many processes there are. Here every process sees
    every document, an error on one is raised on all, and scores are those of one process.
    """

    def __init__(self, lm: LM) -> None:
        """Wrap a model.

        Args:
            lm: The model, which knows its `rank` and `world_size` by torch.distributed. All processes have to wrap it.
        """
        super().__init__()
        self.lm = lm

    @property
    def tokenizer_name(self) -> str:
        """The model's."""
        return self.lm.tokenizer_name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As the model does."""
        return self.lm.apply_chat_template(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """As the model does."""
        return self._together(self.lm.loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """As the model does."""
        return self._together(self.lm.loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """As the model does."""
        return self._together(self.lm.generate_until, requests)

    def _together(self, answer: Callable[[list[Instance]], list[Any]], requests: list[Instance]) -> list[Any]:
        shares = shares_of([request.args[0] for request in requests], self.lm.world_size)
        # A process without a share answers the first request for nothing, so that all of them do call the model.
        mine = [requests[number] for number in shares[self.lm.rank]] or requests[:1]
        outcome: tuple[list[Any] | None, str]
        error: Exception | None = None
        try:
            outcome = answer(mine), ""
        except Exception as raised:
            error, outcome = raised, (None, f"process {self.lm.rank} raised {type(raised).__name__}: {raised}")
        outcomes: list[Any] = [None] * self.lm.world_size
        distributed.all_gather_object(outcomes, outcome)
        if failures := [reason for _, reason in outcomes if reason]:
            raise RuntimeError("; ".join(failures)) from error
        answers: dict[int, Any] = {}
        for share, (found, _) in zip(shares, outcomes, strict=True):
            answers.update(zip(share, found[: len(share)], strict=True))
        return [answers[number] for number in range(len(requests))]


def shares_of(contexts: Sequence[str], processes: int) -> list[list[int]]:
    """Numbers of the requests that each process answers.

    Requests with the same context stay together, since a model may read it once for all of them. Contexts are dealt
    out from the longest to the shortest, so that the shares cost about the same.
    """
    numbers: dict[str, list[int]] = {}
    for number, context in enumerate(contexts):
        numbers.setdefault(context, []).append(number)
    dealt = sorted(numbers, key=len, reverse=True)
    return [[number for context in dealt[rank::processes] for number in numbers[context]] for rank in range(processes)]
