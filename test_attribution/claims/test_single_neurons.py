"""The claims that importance predicts effect: each number reached a second way, and each claim seen to fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import attribution as at
from attribution.claims import judge as claims
from attribution.claims.about_methods import single_neurons
from attribution.claims.about_methods.common import METHOD, NO_FFN, rank_correlation
from attribution.claims.about_methods.single_neurons import SampledNeurons
from attribution.claims.bench import Workbench
from attribution.claims.judge import Status
from attribution.claims.sample import Sample
from attribution.engine.batching import batches_of
from attribution.engine.importance import Candidates
from attribution.engine.methods import METHODS, Method
from attribution.engine.metrics import Outcome
from attribution.engine.questions import Question
from attribution.engine.ranking import all_candidates
from attribution.engine.trace import read_activations
from attribution.models.anatomy import resolve
from attribution.prompts.knowledge import Knowledge

# Tests are not a package, so this folder is on the path only while its module is imported.
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1]))
    from suite import module, verdict_of

ON_SINGLE = module("test_single_neurons")
TOTAL = ON_SINGLE.test_importance_predicts_the_total_effect_of_single_neurons
DIRECT = ON_SINGLE.test_importance_beside_the_direct_effect_of_single_neurons
BY_ANOTHER = ON_SINGLE.test_other_scores_beside_the_total_effect_of_single_neurons
SELF_REPAIR = ON_SINGLE.test_later_layers_make_up_for_a_part_of_the_top_10

SUBJECTS = ("France", "Italy", "cherry", "dog", "legs", "number", "ripe", "capital")
ANSWERS = (" Paris", " Rome", " four", " red")
PROMPTS = [at.Prompt(f"The capital of {each} is", ANSWERS[n % 4], "capital") for n, each in enumerate(SUBJECTS)]
LAYERS, FFN = 3, 48
# Sums over the width, float32, of logits no larger than about 20: 32 * 1.2e-7 * 20, for before and after.
FLOAT32 = 2e-4


def _bench(model: at.Model, prompts: list[at.Prompt] = PROMPTS) -> Workbench:
    return Workbench(Sample(model, Knowledge((), {}), known=prompts))


@pytest.fixture(scope="module")
def bench(model: at.Model) -> Workbench:
    """A tiny model on eight prompts. Its answers are chance, which ablating does not mind."""
    return _bench(model)


@pytest.fixture
def samples(bench: Workbench) -> list[SampledNeurons]:
    """One sample for each of the eight prompts."""
    return single_neurons.samples(bench, METHOD)


@pytest.mark.parametrize(
    ("total", "sizes"),
    [(2048, [10, 10, 10, 10]), (300, [10, 10, 0, 10]), (104, [10, 10, 0, 4]), (60, [10, 10, 0, 0]), (7, [7, 0, 0, 0])],
)
def test_sample_holds_the_top_10_and_10_of_each_lower_stratum(total: int, sizes: list[int]) -> None:
    ranks = single_neurons.sampled_ranks(total, seed=5)
    strata = (range(10), range(10, 100), range(100, max(100, total // 4)), range(max(100, total // 4), total))
    assert [sum(rank in stratum for rank in ranks) for stratum in strata] == sizes
    assert len(ranks) == len(set(ranks)) == sum(sizes)
    assert ranks == sorted(ranks)
    assert ranks == single_neurons.sampled_ranks(total, seed=5)
    assert total < 60 or ranks != single_neurons.sampled_ranks(total, seed=6)


def test_every_rank_of_a_stratum_is_drawn_equally_often() -> None:
    draws, total = 2000, 800
    counts = Counter(rank for seed in range(draws) for rank in single_neurons.sampled_ranks(total, seed))
    for stratum in (range(10, 100), range(100, 200), range(200, total)):
        share = 10 / len(stratum)
        # Six standard deviations of a binomial count, of hundreds that are looked at.
        bound = 6 * (draws * share * (1 - share)) ** 0.5
        assert max(abs(counts[rank] - draws * share) for rank in stratum) < bound


def test_samples_follow_the_ranks_of_the_judged_method(bench: Workbench, samples: list[SampledNeurons]) -> None:
    assert len(samples) == len(bench.prompts) == len(PROMPTS)
    for prompt, sample in zip(bench.prompts, samples, strict=True):
        ranking = at.attribute(bench.model, prompt, k=None)
        place = {record: rank for rank, record in enumerate(ranking.neurons)}
        ranks = [place[record] for record in sample.records]
        assert ranks == sorted(ranks)
        assert ranks[:10] == list(range(10))
        assert (sum(10 <= rank < 100 for rank in ranks), sum(rank >= 100 for rank in ranks)) == (10, 10)
        assert list(sample.scores[METHOD]) == pytest.approx([float(ranking.scores[rank]) for rank in ranks], abs=1e-6)
        assert list(sample.lowest) == ranking.neurons[:-11:-1]
    assert samples[0].records != samples[1].records


def test_other_scores_are_those_of_the_same_neurons(bench: Workbench, samples: list[SampledNeurons]) -> None:
    for prompt, sample in zip(bench.prompts[:2], samples, strict=False):
        for name in single_neurons.COMPARED:
            ranking = at.attribute(bench.model, prompt, method=name, k=None)
            scores = dict(zip(ranking.neurons, ranking.scores.tolist(), strict=True))
            assert list(sample.scores[name]) == pytest.approx([scores[record] for record in sample.records], abs=1e-6)


def test_each_prompt_draws_other_ranks_and_not_with_the_numbers_of_the_random_scores(
    bench: Workbench, samples: list[SampledNeurons]
) -> None:
    drawn = set()
    for prompt, question, sample in zip(bench.prompts, bench.sample.questions, samples, strict=True):
        order = at.attribute(bench.model, prompt, k=None).neurons
        ranks = [order.index(record) for record in sample.records]
        assert ranks != single_neurons.sampled_ranks(len(order), question.seed(0))
        drawn.add(tuple(ranks))
    assert len(drawn) == len(PROMPTS)


def test_total_effect_is_what_ablating_the_neuron_alone_takes(bench: Workbench, samples: list[SampledNeurons]) -> None:
    assert max(np.abs(sample.total).max() for sample in samples) > 100 * FLOAT32
    for prompt, sample in zip(bench.prompts, samples, strict=True):
        answer = bench.model.tokenizer.encode(prompt.text + prompt.answer)[-1]
        plain = at.measure(at.ablate(bench.model, prompt, []), answer).logp
        for record, total in zip(sample.records, sample.total, strict=True):
            after = at.measure(at.ablate(bench.model, prompt, [record]), answer).logp
            assert total == pytest.approx(plain - after, abs=FLOAT32)


def test_direct_effect_of_the_last_layer_is_its_total_effect(bench: Workbench, samples: list[SampledNeurons]) -> None:
    """Nothing but the final norm follows, and no later position reads it."""
    compared = 0
    for sample in samples:
        for record, direct, total in zip(sample.records, sample.direct, sample.total, strict=True):
            if record.layer == LAYERS - 1:
                assert direct == pytest.approx(total, abs=FLOAT32)
                compared += 1
    assert compared > 10
    earlier = [
        abs(direct - total)
        for sample in samples
        for record, direct, total in zip(sample.records, sample.direct, sample.total, strict=True)
        if record.layer == 0
    ]
    assert max(earlier) > 100 * FLOAT32


class _Watch:
    """What passes through modules of plain transformers, at the last position."""

    def __init__(self) -> None:
        self.inputs: dict[Any, torch.Tensor] = {}
        self.outputs: dict[Any, torch.Tensor] = {}

    def on(self, name: Any, module: torch.nn.Module) -> Any:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            # Some families flatten batch and position before the FFN.
            self.inputs[name], self.outputs[name] = (
                each.detach().reshape(-1, each.shape[-1])[-1] for each in (inputs[0], output)
            )

        return module.register_forward_hook(hook)


def _logp_without(plain: Any, ids: torch.Tensor, answer: int, final_norm: Any, vector: torch.Tensor) -> float:
    """Log p of the answer when a vector is taken out of the last position's final state, by the model's own code."""

    def hook(_: Any, inputs: Any) -> Any:
        state = inputs[0].clone()
        state[0, -1] -= vector
        return (state, *inputs[1:])

    handle = final_norm.register_forward_pre_hook(hook)
    try:
        logits = plain(ids).logits[0, -1]
    finally:
        handle.remove()
    return float(logits.double().log_softmax(-1)[answer])


def test_direct_effect_is_that_of_the_models_own_readout_in_every_setting(
    representative_model: at.Model, representative_plain: Any
) -> None:
    """Plain transformers run the final norm and all that follows on a state without what the neuron wrote.

    What it wrote is read off the modules: a down projection of its coefficient alone, without the bias, times the
    ratio of the outputs and inputs of a norm that follows, and the family's constant.
    """
    model, plain, family = representative_model, representative_plain, representative_model.anatomy.family
    prompt, answer = PROMPTS[0].text, PROMPTS[0].answer
    ids = torch.tensor([model.tokenizer.encode(prompt)])
    target = model.tokenizer.encode(prompt + answer)[-1]
    watch, blocks, final_norm = _Watch(), list(resolve(plain, family.blocks)), resolve(plain, family.final_norm)
    handles = [watch.on(("down", n), resolve(block, family.ffn_out)) for n, block in enumerate(blocks)]
    if family.ffn_post_norm is not None:
        handles += [watch.on(("norm", n), resolve(block, family.ffn_post_norm)) for n, block in enumerate(blocks)]
    with torch.no_grad():
        logits = plain(ids).logits[0, -1]
        for handle in handles:
            handle.remove()
        question = Question(prompt, answer, tuple(ids[0].tolist()), target)
        ((_, batch),) = batches_of(model, [question])
        candidates = all_candidates(model, [question], batch, {"ffn": []}, seed=0, steps=1)[0]["ffn"]
        some = candidates.take(torch.arange(3, len(candidates), 19))
        found = single_neurons.direct_effects(some, read_activations(model, batch).resid_final[0])
        plainly = float(logits.double().log_softmax(-1)[target])
        expected = []
        for record in some.records(torch.arange(len(some))):
            down = resolve(blocks[record.layer], family.ffn_out)
            alone = torch.zeros_like(watch.inputs["down", record.layer])
            alone[record.index] = watch.inputs["down", record.layer][record.index]
            vector = (down(alone[None]) - down(torch.zeros_like(alone)[None]))[0]
            if family.ffn_post_norm is not None:
                # It has no bias in any family, and what it does to one part of its input it does to all.
                vector = vector * watch.outputs["norm", record.layer] / watch.inputs["norm", record.layer]
            vector = vector * getattr(plain.config, "residual_multiplier", 1.0)
            expected.append(plainly - _logp_without(plain, ids, target, final_norm, vector))
    # Sums over the width in float32, as large as the logits, before and after.
    bound = 8 * 32 * torch.finfo(torch.float32).eps * (1 + float(logits.abs().max()))
    assert found.tolist() == pytest.approx(expected, abs=bound)
    assert max(map(abs, expected)) > 20 * bound
    assert len({record.layer for record in some.records(torch.arange(len(some)))}) == LAYERS


def test_rank_correlation_is_spearmans() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        one, other = generator.integers(0, 12, size=(2, 30)).astype(float)
        assert rank_correlation(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)
    assert rank_correlation(np.arange(5.0), np.arange(5.0) ** 3) == pytest.approx(1)
    assert rank_correlation(np.arange(5.0), np.ones(5)) == 0


@pytest.mark.parametrize(
    ("test", "effect", "scored_by"),
    [(TOTAL, "total", METHOD), (DIRECT, "direct", METHOD), (BY_ANOTHER, "total", "coefficient")],
    ids=["total", "direct", "by coefficient"],
)
def test_effect_of_the_claim_is_the_mean_correlation(
    bench: Workbench,
    samples: list[SampledNeurons],
    test: Callable[..., None],
    effect: str,
    scored_by: str,
) -> None:
    verdict = verdict_of(test, bench, **({"score": scored_by} if scored_by != METHOD else {}))
    expected = [stats.spearmanr(each.scores[scored_by], getattr(each, effect)).statistic for each in samples]
    assert verdict.evidence is not None
    assert list(verdict.evidence.effects) == pytest.approx(expected)
    assert verdict.effect == pytest.approx(np.mean(expected))
    assert verdict.claim.asserted == (test is TOTAL)
    assert verdict.n == len(PROMPTS)


def test_self_repair_is_where_direct_effects_of_the_top_10_exceed_the_total_ones(
    bench: Workbench, samples: list[SampledNeurons]
) -> None:
    verdict = verdict_of(SELF_REPAIR, bench)
    assert verdict.evidence is not None
    assert list(verdict.evidence.effects) == [sum(each.direct[:10]) > sum(each.total[:10]) for each in samples]
    direct, total = (
        sum(sum(each.effect(name)[:10]) / 10 for each in samples) / len(samples) for name in ("direct", "total")
    )
    assert f"direct {direct:.2g}, total {total:.2g} nats a neuron" in verdict.note


def _by_place(candidates: Candidates) -> torch.Tensor:
    return candidates.index.double()


def _faked(
    model: at.Model,
    monkeypatch: pytest.MonkeyPatch,
    total: Callable[[int], float],
    direct: Callable[[int], float],
) -> Workbench:
    """A bench on which the neuron at a place of all scores its place and has these effects."""

    def outcomes(_: Any, questions: Any, variants: Any, progress: Any) -> tuple[list[Outcome], list[int]]:
        falls = [total(record.layer * FFN + record.index) for (record,) in variants]
        return [Outcome(1, 1.0, 1.0, -fall) for fall in falls], [1] * len(falls)

    def direct_effects(candidates: Candidates, _: Any) -> torch.Tensor:
        return torch.tensor([direct(place) for place in candidates.index.tolist()], dtype=torch.float64)

    bench = _bench(model)
    bench.before = {"logp": np.zeros(len(PROMPTS))}
    monkeypatch.setitem(METHODS, "by_place", Method("by_place", _by_place, ("ffn",), "a test"))
    monkeypatch.setattr(single_neurons, "outcomes", outcomes)
    monkeypatch.setattr(single_neurons, "direct_effects", direct_effects)
    monkeypatch.setattr(ON_SINGLE, "MIN_PROMPTS", len(PROMPTS))
    return bench


def _scrambled(place: int) -> float:
    return float(place * 89 % 97)


@pytest.mark.parametrize(
    ("effect_of", "status"),
    [
        (float, Status.SUPPORTED),
        (lambda place: -float(place), Status.REFUTED),
        (_scrambled, Status.REFUTED),
        (lambda place: 1.0, Status.REFUTED),
    ],
    ids=["in order", "reversed", "without order", "all the same"],
)
def test_importance_that_does_not_predict_an_effect_is_refuted(
    loaded: Callable[[str], at.Model],
    monkeypatch: pytest.MonkeyPatch,
    effect_of: Callable[[int], float],
    status: Status,
) -> None:
    # So few prompts decide nothing if one more may be the worst there can be.
    monkeypatch.setattr(claims, "with_one_more", lambda one, other, level, *_: claims.bootstrap(one, other, level))
    total = _faked(loaded("gpt2"), monkeypatch, effect_of, float)
    assert verdict_of(TOTAL, total, attribution_method="by_place").status is status
    assert verdict_of(DIRECT, total, attribution_method="by_place").status is Status.SUPPORTED
    direct = _faked(loaded("gpt2"), monkeypatch, float, effect_of)
    assert verdict_of(TOTAL, direct, attribution_method="by_place").status is Status.SUPPORTED
    assert verdict_of(DIRECT, direct, attribution_method="by_place").status is status


def test_random_scores_predict_nothing(loaded: Callable[[str], at.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = _faked(loaded("gpt2"), monkeypatch, float, float)
    verdict = verdict_of(BY_ANOTHER, bench, attribution_method="by_place", score="random")
    # The mean of 8 correlations over 30 neurons: a standard error of 1 / sqrt(8 * 27).
    assert abs(verdict.effect) < 4 / (len(PROMPTS) * 27) ** 0.5
    assert not verdict.claim.asserted


@pytest.mark.parametrize(("repaired", "status"), [(0.5, Status.SUPPORTED), (-0.5, Status.REFUTED)])
def test_self_repair_has_the_sign_of_what_later_layers_give_back(
    loaded: Callable[[str], at.Model], monkeypatch: pytest.MonkeyPatch, repaired: float, status: Status
) -> None:
    """The top 10 are the last ten places; what later layers do about other neurons must not count."""
    top = LAYERS * FFN - 10

    def total(place: int) -> float:
        return place - (repaired if place >= top else 100.0)

    verdict = verdict_of(SELF_REPAIR, _faked(loaded("gpt2"), monkeypatch, total, float), attribution_method="by_place")
    assert verdict.status is status
    assert verdict.effect == (repaired > 0)


def test_model_that_knows_nothing_is_short_of_prompts(model: at.Model) -> None:
    bench = _bench(model, [])
    verdicts = [
        verdict_of(TOTAL, bench),
        verdict_of(DIRECT, bench),
        verdict_of(BY_ANOTHER, bench, score="random"),
        verdict_of(SELF_REPAIR, bench),
    ]
    assert [(each.status, each.n, each.needed) for each in verdicts] == [(Status.UNDECIDED, 0, 50)] * 4


def test_method_that_scores_no_ffn_neurons_is_not_asserted(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(METHODS[METHOD], name="attention_only", units=("attention",))
    monkeypatch.setitem(METHODS, "attention_only", other)
    for test in (TOTAL, SELF_REPAIR):
        verdict = verdict_of(test, bench, attribution_method="attention_only")
        assert not verdict.claim.asserted
        assert NO_FFN.reason in verdict.note
