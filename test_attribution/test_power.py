"""How often claims err: the simulation of it, on effects whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from attribution import claims, power
from attribution.claims import Claim, Evidence, Status
from attribution.power import error_rates

FACTS, SAMPLES = 120, 400


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RESAMPLES", 499)


def _evidence(effects: np.ndarray, baselines: np.ndarray | None = None) -> Evidence:
    names = tuple(map(str, range(len(effects))))
    return Evidence(names, names, tuple(effects), None if baselines is None else tuple(baselines))


def _claim(test: str, threshold: float, comparisons: int = 1) -> Claim:
    return Claim("c", "a sentence", "ours", "an effect", test, threshold, "a control", comparisons=comparisons)  # type: ignore[arg-type]


def test_power_is_that_of_theory_for_normal_effects() -> None:
    effects = np.random.default_rng(0).normal(0, 1, 2000)
    effects = (effects - effects.mean()) / effects.std() + 0.25
    rates = error_rates(_claim("above", 0), _evidence(effects), facts=FACTS, samples=SAMPLES)
    expected = stats.norm.sf(1.96 - 0.25 * FACTS**0.5)
    assert rates.power == pytest.approx(expected, abs=3 * (expected * (1 - expected) / SAMPLES) ** 0.5 + 0.01)


@pytest.mark.parametrize("shape", ["normal", "skewed", "outliers", "shares"])
@pytest.mark.parametrize(("test", "threshold"), [("above", 0.0), ("above", 0.9), ("within", 0.3)])
def test_claim_at_its_edge_is_supported_in_at_most_5_percent_of_samples(
    shape: str, test: str, threshold: float
) -> None:
    rng = np.random.default_rng(1)
    effects = {
        "normal": lambda: rng.normal(0.2, 1, 600),
        "skewed": lambda: rng.exponential(1, 600) ** 2,
        "outliers": lambda: np.where(rng.random(600) < 0.97, 0.99, 0.1) + rng.normal(0, 0.01, 600),
        "shares": lambda: rng.integers(0, 2, 600).astype(float),
    }[shape]()
    # Two claims in the family: at the very edge of a margin, two one-sided tests at 5% err in 5% of samples.
    rates = error_rates(_claim(test, threshold, comparisons=2), _evidence(effects), facts=FACTS, samples=SAMPLES)
    assert rates.false_positive <= 0.05


def test_ratio_is_shifted_to_its_edge_by_its_denominators() -> None:
    rng = np.random.default_rng(2)
    before = rng.uniform(0.2, 1, 400)
    evidence = _evidence(before * rng.uniform(0.9, 1, 400), before)
    rates = error_rates(_claim("above", 0.9), evidence, facts=FACTS, samples=SAMPLES)
    assert rates.false_positive <= 0.05
    assert rates.power > 0.9


@pytest.mark.parametrize("fault", ["the interval is ignored", "not significant counts as no effect"])
def test_judge_that_errs_is_seen(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def lenient(claim: Claim, low: float, high: float) -> Status:
        if fault == "the interval is ignored":
            return Status.SUPPORTED if (low + high) / 2 > claim.threshold else Status.REFUTED
        return Status.SUPPORTED if low < 0 < high else Status.REFUTED

    monkeypatch.setattr(power, "decide", lenient)
    effects = np.random.default_rng(3).normal(0, 1, 400)
    claim = _claim("above", 0) if fault == "the interval is ignored" else _claim("within", 0.05)
    assert error_rates(claim, _evidence(effects), facts=FACTS, samples=SAMPLES).false_positive > 0.3


def test_family_of_claims_errs_no_more_than_one_claim_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven false claims judged together: the chance that any is supported stays at that of one."""
    # As many resamples as the judge draws: an end that leaves out 0.4% cannot be read off a few hundred.
    monkeypatch.setattr(claims, "RESAMPLES", 9999)
    rng = np.random.default_rng(4)
    claim = _claim("above", 0, comparisons=7)
    families, facts = 200, 80
    effects = rng.normal(0, 1, (families * 7, facts))
    low, high = claims.interval(effects, np.ones_like(effects), claim.confidence)
    supported = [claims.decide(claim, *ends) is Status.SUPPORTED for ends in zip(low, high, strict=True)]
    assert np.reshape(supported, (families, 7)).any(1).mean() <= 0.05
