"""How often claims err: the simulation of it, on effects whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import attribution as at
from attribution.claims import error_rates as power
from attribution.claims import judge as claims
from attribution.claims.about_models import curves, layers, neurons
from attribution.claims.bench import Workbench
from attribution.claims.error_rates import error_rates
from attribution.claims.judge import Claim, Evidence, Status
from attribution.claims.sample import Sample
from attribution.gate import stored_run
from attribution.prompts.knowledge import CATEGORIES, load_knowledge

# Tests are not a package, so this folder is on the path only while its module is imported.
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1]))
    from suite import module, verdict_of

FACTS, SAMPLES = 120, 400


@pytest.fixture
def _fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "RESAMPLES", 499)


def _evidence(effects: np.ndarray, baselines: np.ndarray | None = None) -> Evidence:
    names = tuple(map(str, range(len(effects))))
    return Evidence(names, names, tuple(effects), None if baselines is None else tuple(baselines))


def _claim(test: str, threshold: float, comparisons: int = 1) -> Claim:
    return Claim("c", "a sentence", "ours", "an effect", test, threshold, "a control", comparisons=comparisons)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_fewer_resamples")
def test_power_is_that_of_theory_for_normal_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "_POWER_SAMPLES", SAMPLES)
    effects = np.random.default_rng(0).normal(0, 1, 2000)
    effects = (effects - effects.mean()) / effects.std() + 0.25
    rates = error_rates(_claim("above", 0), _evidence(effects), facts=FACTS, samples=SAMPLES)
    # One fact more, about as bad as the worst of so many, widens the interval.
    worst = -stats.norm.ppf(1 / FACTS)
    expected = stats.norm.sf(1.96 + worst / FACTS**0.5 - 0.25 * FACTS**0.5)
    assert rates.power == pytest.approx(expected, abs=3 * (expected * (1 - expected) / SAMPLES) ** 0.5 + 0.01)


@pytest.mark.usefixtures("_fewer_resamples")
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


@pytest.mark.usefixtures("_fewer_resamples")
def test_ratio_is_shifted_to_its_edge_by_its_denominators() -> None:
    rng = np.random.default_rng(2)
    before = rng.uniform(0.2, 1, 400)
    evidence = _evidence(before * rng.uniform(0.9, 1, 400), before)
    rates = error_rates(_claim("above", 0.9), evidence, facts=FACTS, samples=SAMPLES)
    assert rates.false_positive <= 0.05
    assert rates.power > 0.9


@pytest.mark.usefixtures("_fewer_resamples")
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


def test_family_of_claims_errs_no_more_than_one_claim_does() -> None:
    """Seven false claims judged together: the chance that any is supported stays at that of one."""
    rng = np.random.default_rng(4)
    claim = _claim("above", 0, comparisons=7)
    families, facts = 200, 80
    effects = rng.normal(0, 1, (families * 7, facts))
    low, high = claims.interval(effects, np.ones_like(effects), claim.confidence)
    supported = [claims.decide(claim, *ends) is Status.SUPPORTED for ends in zip(low, high, strict=True)]
    assert np.reshape(supported, (families, 7)).any(1).mean() <= 0.05


def _extreme_claim(effect_bounds: str, threshold: float, test: str = "above") -> Claim:
    return Claim("c", "a sentence", "ours", "an effect", test, threshold, "a control", effect_bounds=effect_bounds)  # type: ignore[arg-type]


@pytest.mark.parametrize("hits", [0, 3, 60, 97, 100])
def test_share_with_one_fact_more_has_the_interval_of_clopper_and_pearson(hits: int) -> None:
    effects = np.repeat([1.0, 0.0], [hits, 100 - hits])
    low, high = claims.with_one_more(effects, np.ones(100), 0.95, "share")
    exact = stats.binomtest(hits, 100).proportion_ci(0.95, "exact")
    assert (float(low), float(high)) == pytest.approx((exact.low, exact.high), abs=0.004)


@pytest.mark.usefixtures("_fewer_resamples")
@pytest.mark.parametrize("rare", [0.002, 0.01])
def test_rare_facts_that_a_bootstrap_misses_do_not_make_a_false_claim_supported(rare: float) -> None:
    """Nearly all facts lose all, a few lose nothing: most samples hold none of the few."""
    kept = int(2000 * rare)
    evidence = _evidence(np.repeat([1.0, 0.0], [2000 - kept, kept]), np.ones(2000))
    claim = _extreme_claim("fall", 1 - rare)
    drawn = np.random.default_rng(0).random((200, FACTS)) >= rare
    ends = claims.bootstrap(drawn.astype(float), np.ones(drawn.shape), claim.confidence, resamples=499)
    assert np.mean(ends[0] > claim.threshold) > 0.2
    rates = error_rates(claim, evidence, facts=FACTS, samples=SAMPLES)
    assert rates.false_positive <= 0.05


def test_worlds_are_just_false() -> None:
    rng = np.random.default_rng(5)
    before = rng.uniform(0.2, 1, 300)
    numerators = before * rng.uniform(0.85, 1, 300)
    worlds = dict(power._false_worlds(_extreme_claim("fall", 0.9), numerators, before, 0.9, 1))
    assert set(worlds) == {"shifted", "tilted", "mixed"}
    for world in worlds.values():
        assert world.frequencies.sum() == pytest.approx(1)
        effect = (world.frequencies @ world.numerators) / (world.frequencies @ world.denominators)
        assert effect == pytest.approx(0.9)
    # Moved down, shares of 0 would be less than nothing.
    shares, ones = np.repeat([0.0, 1.0], [9, 91]), np.ones(100)
    assert set(dict(power._false_worlds(_extreme_claim("share", 0.5), shares, ones, 0.5, 1))) == {"tilted", "mixed"}


MODELS = ["bundled:gpt2", pytest.param("bundled:llama", marks=pytest.mark.exhaustive)]
BASELINE = Path(__file__).resolve().parents[2] / ".attribution" / "bundled.json"


@pytest.mark.parametrize("model", MODELS)
def test_every_claim_of_the_suite_is_supported_in_at_most_5_percent_of_samples_where_it_is_false(model: str) -> None:
    """By what the bundled models measured, with as few facts as the claim can be decided by."""
    measured = [each for each in stored_run.loads(BASELINE.read_text(encoding="utf-8")).verdicts if each.model == model]
    rates = {each.claim.id: power.rates_of(each, samples=SAMPLES) for each in measured if each.evidence is not None}
    assert len(rates) > 100
    assert {name: each.false_positive for name, each in rates.items() if each.false_positive > power.LIMIT} == {}


@pytest.mark.parametrize("model", MODELS)
def test_claims_about_models_are_supported_in_at_most_5_percent_of_samples_where_they_are_false(model: str) -> None:
    """They belong to no baseline, so they are measured here: all that is surveyed but the sums over every neuron."""
    bench = Workbench(Sample(at.load(model), load_knowledge(), max_prompts=300))
    on_layers, on_neurons, on_queries = (module(f"test_{name}") for name in ("layers", "neurons", "queries"))
    categories = [{"attribution_category": category} for category in CATEGORIES]
    asked: dict[Callable[..., None], list[dict[str, str]]] = {
        on_layers.test_layers_raise_the_answer_over_another: [{"kind": kind} for kind in ("attention", "ffn")],
        on_layers.test_top_layers_lie_in_the_deeper_half: categories,
        on_layers.test_related_categories_share_more_than_unrelated_ones: [{"part": part} for part in layers.PARTS],
        on_neurons.test_prompts_of_a_category_share_neurons: [
            {**each, "side": side} for each, side in product(categories, neurons.SIDES)
        ],
        on_neurons.test_value_neurons_raise_words_of_their_category: [{**each, "kind": "ffn"} for each in categories],
        on_neurons.test_increase_of_probability_picks_deeper_neurons_than_that_of_log_probability: [{}],
        on_queries.test_attention_value_neurons_are_woken_by_lower_layers_than_ffn_ones: [{}],
        on_queries.test_query_neurons_that_are_no_value_neurons_lie_below_those_that_are: [{}],
        on_queries.test_a_piece_of_the_curve_is_nearly_a_line: [{"piece": piece} for piece in curves.PIECES],
    }
    verdicts = [verdict_of(test, bench, **each) for test, parameters in asked.items() for each in parameters]
    rates = {each.claim.id: power.rates_of(each, samples=SAMPLES) for each in verdicts}
    assert len(rates) == 33
    assert {name: each.false_positive for name, each in rates.items() if each.false_positive > power.LIMIT} == {}
