"""A model on several processes that answer its requests together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import distributed


class SharedRequests(LM):
    """A model that appears to lm-eval as a single process. Each process answers a share and receives all answers.

    lm-eval itself would divide the documents. That has three problems: if a process raises, the others wait for it
    forever; a process without documents raises; and few-shot examples depend on the number of processes. Here every
    process has all documents, an error on one process is raised on all, and scores are those of a single process.
    """

    def __init__(self, lm: LM) -> None:
        """Wrap a model.

        Args:
            lm: The model. Its `rank` and `world_size` are those of torch.distributed. All processes must wrap it.
        """
        super().__init__()
        self.lm = lm

    @property
    def tokenizer_name(self) -> str:
        """The model's `tokenizer_name`."""
        return self.lm.tokenizer_name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Format a conversation with the model's chat template."""
        return self.lm.apply_chat_template(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Answer requests with the model's `loglikelihood`, on all processes."""
        return self._answer_together(self.lm.loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Answer requests with the model's `loglikelihood_rolling`, on all processes."""
        return self._answer_together(self.lm.loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer requests with the model's `generate_until`, on all processes."""
        return self._answer_together(self.lm.generate_until, requests)

    def _answer_together(self, answer: Callable[[list[Instance]], list[Any]], requests: list[Instance]) -> list[Any]:
        shares = divide_requests([request.args[0] for request in requests], self.lm.world_size)
        # A process without a share answers the first request, and the answer is ignored. All processes must call the
        # model, because the call may communicate.
        own_requests = [requests[index] for index in shares[self.lm.rank]] or requests[:1]
        outcome: tuple[list[Any] | None, str]
        error: Exception | None = None
        try:
            outcome = answer(own_requests), ""
        except Exception as raised:
            error, outcome = raised, (None, f"process {self.lm.rank} raised {type(raised).__name__}: {raised}")
        outcomes: list[Any] = [None] * self.lm.world_size
        distributed.all_gather_object(outcomes, outcome)
        if failures := [reason for _, reason in outcomes if reason]:
            raise RuntimeError("; ".join(failures)) from error
        answers: dict[int, Any] = {}
        for share, (share_answers, _) in zip(shares, outcomes, strict=True):
            answers.update(zip(share, share_answers[: len(share)], strict=True))
        return [answers[index] for index in range(len(requests))]


def divide_requests(contexts: Sequence[str], processes: int) -> list[list[int]]:
    """Divide requests among processes: for each process, the indices of its requests.

    Requests with the same context stay together, because a model may read the context once for all of them. Contexts
    are assigned from the longest to the shortest, so that all shares have about the same cost.
    """
    indices: dict[str, list[int]] = {}
    for index, context in enumerate(contexts):
        indices.setdefault(context, []).append(index)
    by_length = sorted(indices, key=len, reverse=True)
    return [
        [index for context in by_length[rank::processes] for index in indices[context]] for rank in range(processes)
    ]
