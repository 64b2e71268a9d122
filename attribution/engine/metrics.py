"""Metrics after a true rerun: rank, reciprocal rank, probability and log-probability of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attribution.errors import BadInputError

__all__ = [
    "METRICS",
    "Outcome",
    "by_metric",
    "measure",
    "measure_each",
]

METRICS = ("mrr", "prob", "logp")


@dataclass(frozen=True)
class Outcome:
    """How a model answers one prompt.

    Attributes:
        rank: 1-based place of the answer over the full vocabulary; tokens with an equal logit count as ahead of
            it, so that a model that prefers nothing answers nothing.
        mrr: 1 / rank; its mean over prompts is the mean reciprocal rank.
        prob: Probability of the answer, 0 to 1.
        logp: Its natural logarithm, in nats.
    """

    rank: int
    mrr: float
    prob: float
    logp: float


def measure(logits: Tensor, answer_id: int) -> Outcome:
    """Return rank, reciprocal rank, probability and log-probability of an answer.

    Args:
        logits: The model's logits at the last position, (vocabulary,).
        answer_id: The answer's token id.

    Raises:
        BadInputError: If the logits are not a finite vector or the id lies outside it.
    """
    if logits.ndim != 1:
        raise BadInputError(f"logits have shape {tuple(logits.shape)}; give one prompt's, of shape (vocabulary,).")
    if not 0 <= answer_id < len(logits):
        raise BadInputError(f"answer id {answer_id} is not between 0 and {len(logits) - 1}; use the model's tokenizer.")
    return measure_each(logits[None], [answer_id])[0]


def measure_each(logits: Tensor, answer_ids: Sequence[int]) -> list[Outcome]:
    """Return what :func:`measure` says of each prompt.

    Args:
        logits: The model's logits at the last position, (prompts, vocabulary).
        answer_ids: The token id of each answer, which lies in the vocabulary.

    Raises:
        BadInputError: If a logit is not finite.
    """
    if not torch.isfinite(logits).all():
        raise BadInputError(
            "logits hold NaN or infinite numbers; load the model again, or leave out the edit that made them."
        )
    answers = torch.tensor(answer_ids, device=logits.device)[:, None]
    # A logarithm of a rounded softmax would lose everything below 1e-16.
    logps = logits.double().log_softmax(-1).gather(-1, answers)
    ranks = (logits >= logits.gather(-1, answers)).sum(-1)
    return [
        Outcome(rank, 1 / rank, prob, logp)
        for rank, prob, logp in zip(ranks.tolist(), logps.exp()[:, 0].tolist(), logps[:, 0].tolist(), strict=True)
    ]


def by_metric(outcomes: Sequence[Outcome]) -> dict[str, npt.NDArray[np.float64]]:
    """Return what several prompts' outcomes are by each of :data:`METRICS`, (n,) each."""
    return {name: np.array([getattr(each, name) for each in outcomes], dtype=np.float64) for name in METRICS}
