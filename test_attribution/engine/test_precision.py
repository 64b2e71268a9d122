"""Half precision: weights and activations are rounded, scores are not; what that does to rankings is reported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import attribution as at
from attribution.engine.batching import batches_of
from attribution.engine.methods import method_named
from attribution.engine.questions import question_of
from attribution.engine.ranking import all_candidates
from attribution.engine.top_k import top_k
from attribution.models.registry import registry

K = 10
DTYPES = ("float64", "float32", "bfloat16", "float16")
# Of the top 10, what must be the same as in float64: in float32 all but ties, and in half precision far more than by
# chance, which is below 1%. Measured: see docs/scale.md.
LEAST = {"float32": 0.99, "bfloat16": 0.5, "float16": 0.5}
BUNDLED = [name for name in registry() if name.startswith("bundled:")]
PROMPTS = [prompt for prompt in at.load_knowledge().prompts if prompt.phrasing == 0][::24]


@pytest.fixture(scope="module")
def in_dtype() -> Callable[[str, str], at.Model]:
    kept: dict[tuple[str, str], at.Model] = {}

    def load(name: str, dtype: str) -> at.Model:
        if (name, dtype) not in kept:
            kept[name, dtype] = at.load(name, dtype=dtype)
        return kept[name, dtype]

    return load


@pytest.mark.parametrize("unit", ["ffn", "attention"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", BUNDLED)
def test_rankings_overlap_with_those_in_float64(
    name: str,
    dtype: str,
    unit: str,
    in_dtype: Callable[[str, str], at.Model],
    record_property: Callable[[str, object], None],
) -> None:
    exact, rounded = (at.attribute(in_dtype(name, each), list(PROMPTS), unit=unit, k=K) for each in ("float64", dtype))
    shared = [len(set(one.neurons) & set(other.neurons)) / K for one, other in zip(exact, rounded, strict=True)]
    first = [one.neurons[0] == other.neurons[0] for one, other in zip(exact, rounded, strict=True)]
    overlap = sum(shared) / len(shared)
    record_property("overlap", overlap)
    print(
        f"{name}, {unit}, {dtype}: {overlap:.1%} of the top {K} as in float64 (least {min(shared):.0%}), "
        f"the first the same in {sum(first)} of {len(first)} prompts"
    )
    assert overlap >= LEAST[dtype]


@pytest.mark.parametrize("method", ["log_prob_increase", "prob_increase", "log_prob", "coefficient_by_rank"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BUNDLED)
def test_certified_top_k_is_that_of_scoring_all_in_every_dtype(
    name: str, dtype: str, method: str, in_dtype: Callable[[str, str], at.Model]
) -> None:
    """The bound's margin follows the precision it is computed in, not that of the weights."""
    model, scorer = in_dtype(name, dtype), method_named(method, "ffn")
    questions = [question_of(model, prompt) for prompt in PROMPTS[:3]]
    ((_, batch),) = batches_of(model, questions)
    for candidates in all_candidates(model, questions, batch, {"ffn": [scorer]}, seed=0, steps=1):
        found, every = top_k(candidates["ffn"], scorer, K), top_k(candidates["ffn"], scorer, None)
        assert torch.equal(found.indices, every.indices[:K])
        assert found.certificate.slack > found.certificate.tolerance
        assert found.scores.dtype == torch.float64
        if method == "log_prob_increase":
            assert found.certificate.scored < found.certificate.total
    assert candidates["ffn"].table.scan_dtype == (torch.float64 if dtype == "float64" else torch.float32)
