"""Models in several threads: they take turns, and each gets what it would get alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import attribution as at
from attribution.experiments.edited_copies import zeroed_parameters

QUESTIONS = (
    ("The capital of France is", " Paris"),
    ("The capital of Italy is", " Rome"),
    ("A ripe cherry is", " red"),
    ("The number of legs that a dog has is", " four"),
)


def _work(model: at.Model, number: int) -> Any:
    """Ask one of several things of a model."""
    prompt, answer = QUESTIONS[number % len(QUESTIONS)]
    if number % 5 == 0:
        return [check.value for check in at.preflight(model, prompt)]
    if number % 5 == 1:
        return at.attribute(model, prompt, answer, method="gradient_x_activation", k=3).neurons
    if number % 5 == 2:
        with zeroed_parameters(model, [at.FFNNeuron(1, 2)]) as other:
            return at.ablate(other, prompt, []).tolist()
    if number % 5 == 3:
        return at.query(model, prompt, answer, k=3).neurons
    return at.evaluate(model, [at.Prompt(prompt, answer)], k=2)["logp_after"].tolist()


@pytest.mark.parametrize("families", [("gpt2",), ("gpt2", "llama", "gemma2")], ids=["one model", "several"])
def test_threads_get_what_each_would_get_alone(loaded: Callable[[str], at.Model], families: tuple[str, ...]) -> None:
    models = [loaded(family) for family in families]
    jobs = [(models[number % len(models)], number) for number in range(30)]
    alone = [_work(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: _work(*job), jobs))
    assert together == alone
    # No thread leaves another's settings behind.
    assert torch.is_grad_enabled()
