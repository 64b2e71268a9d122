"""Broken on purpose: a model with shuffled weights, the sanity claims, and the suite that has to turn red."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attribution as at
from attribution.claims import bench as workbench
from attribution.claims import judge as claims
from attribution.claims.about_methods import sanity, single_neurons
from attribution.claims.about_methods.common import METHOD, NO_FFN
from attribution.claims.bench import Workbench
from attribution.claims.judge import Status
from attribution.claims.sample import Sample
from attribution.engine.batching import batches_of
from attribution.engine.importance import Candidates, first_order_bound
from attribution.engine.methods import METHODS, Method
from attribution.engine.questions import question_of
from attribution.engine.trace import rerun
from attribution.engine.vectors import vector_table
from attribution.experiments.randomisation import randomised
from attribution.prompts.knowledge import Fact, Knowledge, load_knowledge

# Tests are not a package, so this folder is on the path only while its module is imported.
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1]))
    from suite import module, verdict_of

ON_SANITY, ON_TOP, ON_VALUE = (module(f"test_{name}") for name in ("sanity", "top_neurons", "value_neurons"))
CONTROLS = ON_SANITY.CONTROLS
LOSES_ITS_EFFECT = ON_SANITY.test_broken_scorer_loses_its_effect

PAPER = METHODS[METHOD]
SUBJECTS = ("France", "Italy", "cherry", "dog", "legs", "number", "ripe", "capital")
ANSWERS = ("Paris", "Rome", "four", "red")
KNOWLEDGE = Knowledge(
    tuple(
        Fact("capital", "country_capital", subject, ANSWERS[number % 4], ("The capital of {subject} is",))
        for number, subject in enumerate(SUBJECTS)
    ),
    {"capital": ANSWERS},
)


def _logits(model: at.Model, text: str = "The capital of France is") -> torch.Tensor:
    ((_, batch),) = batches_of(model, [question_of(model, at.Prompt(text, " Paris"))])
    return rerun(model, batch)[0]


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def test_randomised_copy_shuffles_every_parameter_and_leaves_the_model_bit_for_bit(
    representative_model: at.Model,
) -> None:
    module = representative_model.network._module
    originals = {name: tensor.clone() for name, tensor in _tensors(module).items()}
    logits = _logits(representative_model)
    twin = randomised(representative_model)
    shuffled = dict(twin.network._module.named_parameters())
    assert list(shuffled) == [name for name, _ in module.named_parameters()]
    for name, parameter in shuffled.items():
        before, after = originals[name].flatten(), parameter.flatten()
        assert torch.equal(before.sort().values, after.sort().values)
        # No entry of so many stays by chance: about one does.
        assert before.unique().numel() == 1 or (before == after).float().mean() < 0.5
    for name, buffer in twin.network._module.named_buffers():
        assert torch.equal(buffer, originals[name])
    assert torch.isfinite(_logits(twin)).all()
    assert not torch.allclose(_logits(twin), logits, atol=0.1)
    for name, tensor in _tensors(module).items():
        assert torch.equal(tensor, originals[name])
    assert torch.equal(_logits(representative_model), logits)


def test_randomised_copy_shares_no_memory_with_the_model(representative_model: at.Model) -> None:
    def memory(model: at.Model) -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in _tensors(model.network._module).values()}

    twin = randomised(representative_model)
    assert not memory(twin) & memory(representative_model)
    # What attribution reads is the copy's: its own tables, of its own weights.
    tied = {id(parameter) for parameter in representative_model.network._module.parameters()}
    assert len(tied) == len(list(twin.network._module.parameters()))
    for unit in ("ffn", "attention"):
        table, original = vector_table(twin, unit), vector_table(representative_model, unit)
        assert table is not None
        assert original is not None
        for vectors, others in zip(table.vectors, original.vectors, strict=True):
            assert vectors.untyped_storage().data_ptr() in memory(twin)
            assert not torch.equal(vectors, others)
        assert not torch.allclose(table.norms, original.norms)
    assert twin.anatomy.readout.unembedding.untyped_storage().data_ptr() in memory(twin)


def test_randomised_copy_follows_its_seed(model: at.Model) -> None:
    first, again, other = (_logits(randomised(model, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


@pytest.fixture(scope="module")
def bench(model: at.Model) -> Workbench:
    """A tiny model on eight prompts, of which it knows nothing; ablating its best neurons lowers chance."""
    return Workbench(Sample(model, KNOWLEDGE, known=KNOWLEDGE.prompts))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let eight prompts be enough."""
    for name in ("MIN_PROMPTS", "MIN_FLIPPED"):
        monkeypatch.setattr(ON_SANITY, name, len(SUBJECTS))


def _fall(model: at.Model, prompt: at.Prompt, neurons: list[Any]) -> float:
    answer = model.tokenizer.encode(prompt.text + prompt.answer)[-1]
    plain, after = (at.measure(at.ablate(model, prompt, each), answer).logp for each in ([], neurons))
    return plain - after


def _by_hand(bench: Workbench, prompt: at.Prompt, control: str) -> list[Any]:
    if control == "sign flip":
        return list(at.attribute(bench.model, prompt, k=None).neurons[-10:])
    if control == "label shuffle":
        place = ANSWERS.index(prompt.answer.strip())
        return list(at.attribute(bench.model, prompt.text, f" {ANSWERS[(place + 1) % 4]}").neurons)
    return list(at.attribute(randomised(bench.model), prompt).neurons)


@pytest.mark.parametrize("control", CONTROLS)
def test_effect_is_half_of_the_fall_minus_that_of_the_control(bench: Workbench, few: None, control: str) -> None:
    verdict = verdict_of(LOSES_ITS_EFFECT, bench, control=control)
    whole = [_fall(bench.model, each, at.attribute(bench.model, each).neurons) for each in bench.prompts]
    left = [_fall(bench.model, each, _by_hand(bench, each, control)) for each in bench.prompts]
    assert verdict.evidence is not None
    # Differences of float32 log-probabilities, as in a single rerun.
    expected = [each / 2 - rest for each, rest in zip(whole, left, strict=True)]
    assert list(verdict.evidence.effects) == pytest.approx(expected, abs=2e-4)
    assert verdict.note == f"{sum(left) / sum(whole):.1%} of the fall is left"
    # In a random model the best neurons of two answers may overlap; nothing says that they do not.
    assert verdict.status is Status.SUPPORTED or control == "label shuffle"


@pytest.mark.parametrize("control", CONTROLS)
def test_control_that_breaks_nothing_refutes_the_claim(
    bench: Workbench, few: None, monkeypatch: pytest.MonkeyPatch, control: str
) -> None:
    """The same neurons as unbroken: half of the effect minus all of it."""
    best = [tuple(at.attribute(bench.model, each).neurons) for each in bench.prompts]
    intact = [replace(each, lowest=top) for each, top in zip(single_neurons.samples(bench, METHOD), best, strict=True)]
    monkeypatch.setattr(single_neurons, "samples", lambda bench, method: intact)
    monkeypatch.setattr(sanity, "randomised", lambda model, seed: model)
    monkeypatch.setattr(bench.sample, "swapped", list(KNOWLEDGE.prompts))
    verdict = verdict_of(LOSES_ITS_EFFECT, bench, control=control)
    assert verdict.status is Status.REFUTED
    assert verdict.note == "100.0% of the fall is left"
    assert verdict.effect < 0


@pytest.mark.parametrize("control", CONTROLS)
def test_method_without_an_effect_has_none_to_lose(bench: Workbench, few: None, control: str) -> None:
    verdict = verdict_of(LOSES_ITS_EFFECT, bench, attribution_method="random", control=control)
    assert verdict.status is not Status.SUPPORTED


@pytest.mark.parametrize("control", CONTROLS)
def test_model_that_knows_nothing_is_short_of_prompts(model: at.Model, control: str) -> None:
    bench = Workbench(Sample(model, KNOWLEDGE, known=[]))
    verdict = verdict_of(LOSES_ITS_EFFECT, bench, control=control)
    assert (verdict.status, verdict.n) == (Status.UNDECIDED, 0)
    assert verdict.needed == (50 if control == "sign flip" else 300)


def test_method_that_scores_no_ffn_neurons_is_not_asserted(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "attention_only", replace(PAPER, name="attention_only", units=("attention",)))
    verdict = verdict_of(LOSES_ITS_EFFECT, bench, attribution_method="attention_only", control="sign flip")
    assert not verdict.claim.asserted
    assert NO_FFN.reason in verdict.note


# The whole suite on a trained model. Of Table 2's baselines, |m| knows which neurons are active, though not what for:
# any active neurons beat a baseline that does not know even that, such as |v|.
PROMPTS = 60
CLAIMS: dict[str, Callable[[Workbench, str], at.Verdict]] = {
    "top 10": lambda bench, method: verdict_of(
        ON_TOP.test_zeroing_the_top_10_hurts_more_than_a_baselines_top_10,
        bench,
        attribution_method=method,
        baseline="coefficient",
        metric="logp",
    ),
    "value neurons": lambda bench, method: verdict_of(
        ON_VALUE.test_zeroing_value_neurons_removes_the_answer, bench, attribution_method=method, metric="prob"
    ),
}


@pytest.fixture(scope="module")
def trained() -> Workbench:
    """The bundled GPT-2 on sixty facts; read-only."""
    return Workbench(Sample(at.load("bundled:gpt2"), load_knowledge(), max_prompts=PROMPTS))


@pytest.fixture
def sixty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sixty prompts be enough."""
    for each in (ON_TOP, ON_VALUE):
        monkeypatch.setattr(each, "MIN_PROMPTS", PROMPTS)


def _flipped(table_ranges: dict[str, torch.Tensor]) -> Method:
    """The paper's method with its sign flipped, and a bound that spares scoring every neuron.

    -Imp = KL(p || p') - <e_w - p, d>, and by Hoeffding's lemma the divergence is at most range(d)^2 / 8.
    """

    def score(candidates: Candidates) -> torch.Tensor:
        return -PAPER.score(candidates)

    def ranges(candidates: Candidates) -> torch.Tensor:
        table = candidates.table
        if table.unit not in table_ranges:
            found = []
            for sublayer_index, vectors in enumerate(table.vectors):
                rows = torch.arange(len(vectors))
                logits = table.unscaled_logits(torch.full_like(rows, sublayer_index), rows)
                found.append(logits.amax(-1) - logits.amin(-1))
            table_ranges[table.unit] = torch.cat(found)
        return candidates.of_vector(table_ranges[table.unit]) * candidates.coefficient.abs() / candidates.scale

    def bound(candidates: Candidates) -> torch.Tensor:
        reversed_ = replace(candidates, coefficient=-candidates.coefficient)
        return first_order_bound(reversed_, candidates.log_probs) + ranges(candidates) ** 2 / 8

    return Method("flipped", score, PAPER.units, "a test", bound=bound)


def _shuffled(bench: Workbench) -> Method:
    """The paper's method, asked for the next different answer of the same category."""
    encode = bench.model.tokenizer.encode
    other = {
        encode(prompt.answer)[-1]: encode(swapped.answer)[-1]
        for prompt, swapped in zip(
            sorted(bench.sample.knowledge.prompts, key=lambda each: each.text),
            sorted(bench.sample.swapped, key=lambda each: each.text),
            strict=True,
        )
    }

    def asked(candidates: Candidates) -> Candidates:
        return replace(candidates, answer=other[candidates.answer])

    def bound(candidates: Candidates) -> torch.Tensor:
        assert PAPER.bound is not None
        return PAPER.bound(asked(candidates))

    return Method("shuffled", lambda each: PAPER.score(asked(each)), PAPER.units, "a test", bound=bound)


def _ranges(bench: Workbench) -> dict[Any, Any]:
    return {}


def _on_randomised(bench: Workbench) -> Workbench:
    return Workbench(Sample(randomised(bench.model), bench.sample.knowledge))


def _ranked_elsewhere(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Method:
    """The paper's method, ranking on a copy of the model with shuffled weights."""
    method, twin, rank = replace(PAPER, name="elsewhere"), randomised(bench.model), workbench.rank_all

    def rank_all(model: at.Model, questions: Any, wanted: Any, *options: Any, **more: Any) -> Any:
        assert set(wanted) <= {"elsewhere"}, "others were ranked before"
        return rank(twin, questions, wanted, *options, **more)

    monkeypatch.setattr(workbench, "rank_all", rank_all)
    return method


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_are_supported_of_the_unbroken_method(
    monkeypatch: pytest.MonkeyPatch, trained: Workbench, sixty: None, claim: str
) -> None:
    # So few prompts decide nothing if one more may be the worst there can be.
    monkeypatch.setattr(claims, "with_one_more", lambda one, other, level, *_: claims.bootstrap(one, other, level))
    assert CLAIMS[claim](trained, METHOD).status is Status.SUPPORTED


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("broken", CONTROLS)
def test_broken_scorer_turns_the_claims_red(
    trained: Workbench, sixty: None, monkeypatch: pytest.MonkeyPatch, broken: str, claim: str
) -> None:
    CLAIMS["top 10"](trained, METHOD)
    method = {
        "sign flip": lambda: _flipped(trained.once(_ranges)),
        "label shuffle": lambda: _shuffled(trained),
        "weight randomisation": lambda: _ranked_elsewhere(trained, monkeypatch),
    }[broken]()
    monkeypatch.setitem(METHODS, method.name, method)
    verdict = CLAIMS[claim](trained, method.name)
    assert verdict.n == PROMPTS
    assert verdict.status is not Status.SUPPORTED
    # Not for want of prompts: what is left of the effect is not what is claimed.
    assert verdict.effect < CLAIMS[claim](trained, METHOD).low


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("broken", ["model", "labels"])
def test_suite_is_short_of_prompts_that_a_broken_model_knows(
    trained: Workbench, sixty: None, broken: str, claim: str
) -> None:
    """What a model does not know cannot be ablated: the selection of prompts is the first thing that says so."""
    if broken == "model":
        bench = trained.once(_on_randomised)
    else:
        swapped = trained.sample.known_with_swapped_answers
        bench = Workbench(Sample(trained.model, trained.sample.knowledge, known=swapped))
    verdict = CLAIMS[claim](bench, METHOD)
    assert len(trained.sample.known) > 20 * len(bench.sample.known)
    assert verdict.status is Status.UNDECIDED
    assert verdict.needed is not None
    assert verdict.needed >= PROMPTS > verdict.n
