"""Time of attribution beside a plain forward pass, on the bundled models; never pass or fail.

    pytest benchmarks/test_speed.py

Read the ratios within one group, not the milliseconds: they hold when the machine is another one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import attribution as at

PROMPT, ANSWER = "The capital of France is", " Paris"


@pytest.fixture(scope="module", params=["bundled:gpt2", "bundled:llama"])
def model(request: pytest.FixtureRequest) -> at.Model:
    return at.load(request.param)


def _tokens(model: at.Model) -> Any:
    return torch.tensor([model.tokenizer.encode(PROMPT)])


def test_plain_forward_pass(model: at.Model, benchmark: BenchmarkFixture) -> None:
    benchmark.group = model.name
    ids = _tokens(model)
    with torch.no_grad():
        benchmark(model.network._module, ids)


def test_forward_pass_under_nnsight(model: at.Model, benchmark: BenchmarkFixture) -> None:
    benchmark.group = model.name
    benchmark(at.ablate, model, PROMPT, [])


@pytest.mark.parametrize("unit", ["ffn", "attention", "neuron"])
def test_certified_top_10(model: at.Model, unit: str, benchmark: BenchmarkFixture) -> None:
    benchmark.group = model.name
    ranking = benchmark(at.attribute, model, PROMPT, ANSWER, unit=unit, k=10)
    benchmark.extra_info["scored"] = ranking.exact.scored
    benchmark.extra_info["total"] = ranking.exact.total


@pytest.mark.parametrize("unit", ["ffn", "attention", "neuron"])
def test_score_of_every_neuron(model: at.Model, unit: str, benchmark: BenchmarkFixture) -> None:
    benchmark.group = model.name
    benchmark(at.attribute, model, PROMPT, ANSWER, unit=unit, k=None)
