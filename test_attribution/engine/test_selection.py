"""The bound never lies, and the certified top k is the one that scoring every neuron gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attribution as at
from attribution.engine import methods, vectors
from attribution.engine.gradients import KINDS
from attribution.engine.importance import Candidates, Streams, first_order_bound, seen_together
from attribution.engine.methods import Method, method_named, register_method, score_candidates
from attribution.engine.questions import question_of
from attribution.engine.ranking import Search, candidates_of_each
from attribution.engine.top_k import top_k, top_k_together
from attribution.engine.vectors import VectorTable
from attribution.errors import BadInputError
from attribution.models.anatomy import Readout
from attribution.models.norms import Norm
from attribution.records import NEURON_UNITS, SublayerKind, Unit

PROJECTED = ("log_prob_increase", "log_prob", "prob_increase")
BOUNDED = (*PROJECTED, "reciprocal_rank", "coefficient_by_rank")
# Derandomised, so that a run of the gate can be repeated; no database, so that nothing is written.
SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, database=None)
COEFFICIENTS = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.5, 30.0, -30.0, 1e3, -1e3, 1e-9]),
    st.floats(-5, 5, allow_subnormal=False),
)


@st.composite
def sets_of_candidates(draw: st.DrawFn, unit: Unit = "ffn") -> Candidates:
    """Draw a random readout with random neurons; small whole numbers now and then, so that ties are exact."""
    layers, rows, width, vocabulary = (draw(st.integers(1, high)) for high in (3, 6, 5, 7))
    positions = draw(st.integers(1, 3)) if unit != "ffn" else 1
    vocabulary += 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    whole_numbers = draw(st.booleans())
    # Weights in float32 are scanned in float32, and must be certified none the less.
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))

    def numbers(*shape: int) -> Tensor:
        if whole_numbers:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    kinds: tuple[SublayerKind, ...] = ("attention", "ffn") if unit == "neuron" else (unit,)  # type: ignore[assignment]
    sublayers = tuple(at.Layer(layer, kind) for layer in range(layers) for kind in kinds)
    vectors = [numbers(rows, width) for _ in sublayers]
    if draw(st.booleans()):
        vectors = [vectors[0]] * len(sublayers)
    if draw(st.booleans()):
        vectors[0] = vectors[0][:1].repeat(rows, 1)
    post_weights = [numbers(width) if draw(st.booleans()) else None for _ in sublayers]
    norm = Norm(numbers(width) if draw(st.booleans()) else None, None, 1e-5, centred=draw(st.booleans()))
    readout = Readout(numbers(vocabulary, width), None, norm, draw(st.sampled_from([1.0, 0.25])), None)
    table = VectorTable(unit, sublayers, tuple(vectors), tuple(post_weights), readout, per_head=1)
    index, sublayer_index, row, position = table.indices(positions)
    coefficient = draw(st.lists(COEFFICIENTS, min_size=len(index), max_size=len(index)))
    return Candidates(
        table=table,
        index=index,
        sublayer_index=sublayer_index,
        row=row,
        position=position,
        coefficient=torch.tensor(coefficient, dtype=torch.float64),
        # A stream many times the size saturates the probabilities.
        streams=Streams(
            numbers(len(sublayers), width).double() * draw(st.sampled_from([0.0, 1.0, 100.0])),
            torch.tensor(draw(st.sampled_from([0.1, 1.0, 7.0])), dtype=torch.float64),
            readout,
        ),
        answer=draw(st.integers(0, vocabulary - 1)),
        total=len(index),
        seed=0,
    )


def _log_prob_by_hand(candidates: Candidates, number: int, *, with_stream: bool, with_neuron: bool) -> float:
    """log p(w|x + c v), in plain Python numbers, with either part left out at will."""
    sublayer_index, row = int(candidates.sublayer_index[number]), int(candidates.row[number])
    readout = candidates.table.readout
    state = torch.zeros(readout.unembedding.shape[1], dtype=torch.float64)
    if with_stream:
        state = state + candidates.streams.states[sublayer_index]
    if with_neuron:
        post_weight = candidates.table.post_weights[sublayer_index]
        vector = candidates.table.vectors[sublayer_index][row].double() * (
            1.0 if post_weight is None else post_weight.double()
        )
        state = state + candidates.coefficient[number] * vector
    if readout.norm.centred:
        state = state - state.mean()
    gamma = 1.0 if readout.norm.weight is None else readout.norm.weight.double()
    logits = (readout.unembedding.double() @ (gamma * state / candidates.scale) * readout.logit_scale).tolist()
    largest = max(logits)
    return logits[candidates.answer] - largest - math.log(sum(math.exp(logit - largest) for logit in logits))


def _score_by_hand(name: str, candidates: Candidates, number: int) -> float:
    if name == "log_prob":
        return _log_prob_by_hand(candidates, number, with_stream=False, with_neuron=True)
    after = _log_prob_by_hand(candidates, number, with_stream=True, with_neuron=True)
    before = _log_prob_by_hand(candidates, number, with_stream=True, with_neuron=False)
    return after - before if name == "log_prob_increase" else math.exp(after) - math.exp(before)


@pytest.mark.parametrize("name", PROJECTED)
@SETTINGS
@given(candidates=sets_of_candidates())
def test_scores_equal_plain_arithmetic(name: str, candidates: Candidates) -> None:
    scores = score_candidates(method_named(name, "ffn"), candidates)
    expected = [_score_by_hand(name, candidates, number) for number in range(len(candidates))]
    assert scores.tolist() == pytest.approx(expected, abs=max(1e-9, candidates.tolerance))


@pytest.mark.parametrize("name", [*BOUNDED, "output_norm"])
@SETTINGS
@given(candidates=sets_of_candidates(), data=st.data())
def test_prompts_that_are_searched_together_get_what_each_gets_alone(
    name: str, candidates: Candidates, data: st.DataObject
) -> None:
    """The same vectors, under other streams, coefficients and answers; kept logits would need no projection."""
    method = method_named(name, "ffn")
    several = [
        replace(
            candidates,
            coefficient=candidates.coefficient.roll(shift) * data.draw(st.sampled_from([1.0, -2.0])),
            streams=replace(candidates.streams, states=candidates.streams.states.roll(shift, -1)),
            answer=data.draw(st.integers(0, len(candidates.table.readout.unembedding) - 1)),
        )
        for shift in range(3)
    ]
    k = data.draw(st.integers(1, len(candidates)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "_KEPT_NUMBERS", 0)
        together = top_k_together(seen_together(several), method, k, with_first_order=True)
        for own, found in zip(several, together, strict=True):
            alone = top_k(own, method, k, with_first_order=True)
            # The last bits depend on what is computed beside them.
            assert found.scores.tolist() == pytest.approx(alone.scores.tolist(), abs=own.tolerance)
            if not _tied_by_a_hair(score_candidates(method, own), own.tolerance):
                assert found.indices.tolist() == alone.indices.tolist()
            assert (found.first_order is None) is (alone.first_order is None)


@pytest.mark.parametrize("name", BOUNDED)
@SETTINGS
@given(candidates=sets_of_candidates())
def test_the_bound_is_never_below_the_score(name: str, candidates: Candidates) -> None:
    method = method_named(name, "ffn")
    assert method.bound is not None
    shortfall = score_candidates(method, candidates) - method.bound(candidates)
    assert float(shortfall.max()) <= candidates.tolerance


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 30.0], ids=["uniform", "spread", "saturated"])
def test_the_margin_covers_float32_at_the_size_of_real_models(sharpness: float) -> None:
    """Sums over 20,000 tokens and 768 coordinates, in float32 and in float64: the first must stay above the second."""
    generator = torch.Generator().manual_seed(0)
    total, width, vocabulary = 400, 768, 20_000
    readout = Readout(
        torch.randn(vocabulary, width, generator=generator),
        None,
        Norm(torch.rand(width, generator=generator) * 3, None, 1e-5, centred=True),
        1.0,
        None,
    )
    vectors = torch.randn(total, width, generator=generator)
    candidates = Candidates(
        table=_table(vectors, readout),
        index=torch.arange(total),
        sublayer_index=torch.zeros(total, dtype=torch.long),
        row=torch.arange(total),
        position=torch.zeros(total, dtype=torch.long),
        coefficient=torch.randn(total, generator=generator, dtype=torch.float64),
        streams=Streams(
            sharpness * torch.randn(1, width, generator=generator, dtype=torch.float64),
            torch.tensor(20.0, dtype=torch.float64),
            readout,
        ),
        answer=3,
        total=total,
        seed=0,
    )
    in_float64 = replace(
        candidates, table=_table(vectors.double(), replace(readout, unembedding=readout.unembedding.double()))
    )
    assert (candidates.table.scan_dtype, in_float64.table.scan_dtype) == (torch.float32, torch.float64)
    bound, exact = (first_order_bound(each, candidates.log_probs) for each in (candidates, in_float64))
    above = (bound - exact) / candidates.reach
    assert (above > 0).all()
    # And it is a margin for rounding, not for anything else.
    assert (above < 1e-3).all()


@pytest.mark.parametrize("name", PROJECTED)
def test_the_bound_meets_the_score_of_a_neuron_that_writes_almost_nothing(name: str) -> None:
    """The bound is the first-order term: a smaller neuron must close the gap faster than it shrinks itself."""
    gaps = []
    for size in (1e-2, 1e-3):
        candidates = _few_candidates(torch.full((4,), size, dtype=torch.float64))
        method = method_named(name, "ffn")
        assert method.bound is not None
        gaps.append((method.bound(candidates) - score_candidates(method, candidates)).max())
    assert gaps[0] > 0
    assert float(gaps[1] / gaps[0]) == pytest.approx(1e-2, rel=0.05)


@pytest.mark.parametrize("unit", NEURON_UNITS)
@pytest.mark.parametrize("name", BOUNDED)
@SETTINGS
@given(data=st.data())
def test_certified_top_k_equals_scoring_every_neuron(name: str, unit: str, data: st.DataObject) -> None:
    candidates = data.draw(sets_of_candidates(unit))
    method = method_named(name, unit)
    k = data.draw(st.integers(1, len(candidates)))
    scores = score_candidates(method, candidates)
    expected = _by_score_then_record(scores.tolist(), candidates.tolerance)[:k]
    selection = top_k(candidates, method, k)
    best, best_scores, certificate = selection.indices, selection.scores, selection.certificate
    assert best_scores.tolist() == pytest.approx(scores[expected].tolist(), abs=candidates.tolerance)
    if not _tied_by_a_hair(scores, candidates.tolerance):
        assert best.tolist() == expected
    assert k <= certificate.scored <= certificate.total == len(candidates)
    assert certificate.scored == certificate.total or certificate.slack > certificate.tolerance


def _by_score_then_record(scores: list[float], tolerance: float) -> list[int]:
    """Largest first; a run of scores, each within the tolerance of the one before, in the order of records."""
    falling = sorted(range(len(scores)), key=lambda number: -scores[number])
    runs = [[falling[0]]]
    for before, after in pairwise(falling):
        if scores[before] - scores[after] > tolerance:
            runs.append([])
        runs[-1].append(after)
    return [number for run in runs for number in sorted(run)]


def _tied_by_a_hair(scores: Tensor, tolerance: float) -> bool:
    """Whether the last bits of some score decide if it is tied with the next."""
    steps = scores.sort().values.diff()
    return bool(((steps > tolerance / 2) & (steps <= 2 * tolerance)).any())


def _table(vectors: Tensor, readout: Readout) -> VectorTable:
    """FFN neurons of one layer."""
    return VectorTable("ffn", (at.Layer(0, "ffn"),), (vectors,), (None,), readout, 1)


def _few_candidates(coefficient: Tensor, *, seed: int = 0, duplicate: bool = False) -> Candidates:
    """FFN neurons of one layer, as many as coefficients, over a vocabulary of eight."""
    generator = torch.Generator().manual_seed(seed)
    total, width = len(coefficient), 6

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    vectors = numbers(1, width).repeat(total, 1) if duplicate else numbers(total, width)
    readout = Readout(numbers(8, width), None, Norm(numbers(width), None, 1e-5, centred=True), 1.0, None)
    return Candidates(
        table=_table(vectors, readout),
        index=torch.arange(total),
        sublayer_index=torch.zeros(total, dtype=torch.long),
        row=torch.arange(total),
        position=torch.zeros(total, dtype=torch.long),
        coefficient=coefficient,
        streams=Streams(
            numbers(1, width),
            torch.tensor(2.0, dtype=torch.float64),
            readout,
        ),
        answer=3,
        total=total,
        seed=seed,
        effects={kind: numbers(total) for kind in KINDS},
    )


@pytest.mark.parametrize("name", PROJECTED)
def test_most_neurons_are_never_scored_yet_the_top_ten_is_exact(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    candidates = _few_candidates(torch.randn(3000, generator=generator, dtype=torch.float64))
    method = method_named(name, "ffn")
    selection, everything = top_k(candidates, method, 10), top_k(candidates, method, None)
    scores, certificate, full = selection.scores, selection.certificate, everything.certificate
    assert selection.indices.tolist() == everything.indices[:10].tolist()
    assert scores.tolist() == pytest.approx(everything.scores[:10].tolist(), abs=candidates.tolerance)
    assert (full.scored, full.total, full.slack) == (3000, 3000, math.inf)
    assert certificate.scored < 1000
    # The certificate's own claim: the worst of the ten beats the best bound among neurons left out.
    assert method.bound is not None
    left_out = method.bound(candidates).sort(descending=True).values[certificate.scored]
    assert certificate.slack == pytest.approx(float(scores[-1] - left_out), abs=1e-12)
    assert certificate.slack > certificate.tolerance > 0


def test_a_probability_may_rise_from_below_what_float64_can_hold() -> None:
    """p(w|x) = e^-800 is 0 in float64, while the neuron multiplies it by e^801: the product is near 1, not NaN."""
    candidates = _few_candidates(torch.tensor([0.0, 1.0], dtype=torch.float64))
    readout = Readout(torch.eye(2, dtype=torch.float64), None, Norm(None, None, 1e-5, centred=False), 1.0, None)
    vectors = torch.tensor([[1.0, 0.0], [801.0, 0.0]], dtype=torch.float64)
    candidates = replace(
        candidates,
        table=_table(vectors, readout),
        streams=Streams(
            torch.tensor([[0.0, 800.0]], dtype=torch.float64),
            torch.tensor(1.0, dtype=torch.float64),
            readout,
        ),
        answer=0,
    )
    selection = top_k(candidates, method_named("prob_increase", "ffn"), 1)
    assert selection.indices.tolist() == [1]
    assert selection.scores.tolist() == pytest.approx([1 / (1 + math.exp(-1))])


def test_a_score_above_every_bound_left_is_what_stops_the_search() -> None:
    """Neurons whose bound is high but whose score is low must not crowd out one that comes later."""
    candidates = _few_candidates(torch.tensor([400.0, 300.0, 200.0, 1.0, 0.5] * 20, dtype=torch.float64))
    method = method_named("log_prob_increase", "ffn")
    everything = top_k(candidates, method, None).indices
    for k in (1, 2, 5):
        assert top_k(candidates, method, k).indices.tolist() == everything[:k].tolist()


@pytest.mark.parametrize("name", BOUNDED)
def test_equal_scores_fall_in_the_order_of_records(name: str) -> None:
    coefficient = torch.tensor([0.5, 1.0, 0.5, 1.0] * 25, dtype=torch.float64)
    candidates = _few_candidates(coefficient, duplicate=True)
    best = top_k(candidates, method_named(name, "ffn"), 60).indices
    scores = score_candidates(method_named(name, "ffn"), candidates)
    expected = sorted(range(100), key=lambda number: (-float(scores[number % 2]), number))
    assert best.tolist() == expected[:60]


def test_neurons_that_write_nothing_tie_in_the_order_of_records() -> None:
    candidates = _few_candidates(torch.zeros(50, dtype=torch.float64))
    for name in (*PROJECTED, "coefficient", "output_norm", "coefficient_by_rank"):
        assert top_k(candidates, method_named(name, "ffn"), 7).indices.tolist() == list(range(7)), name


def test_scoring_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    candidates = _few_candidates(torch.randn(200, generator=generator, dtype=torch.float64))
    for name in sorted(methods.METHODS):
        monkeypatch.undo()
        whole = top_k(candidates, method_named(name, "ffn"), None)
        monkeypatch.setattr("attribution.engine.all_scores._BLOCK_NUMBERS", 8 * 7)
        monkeypatch.setattr("attribution.engine.all_scores._KEPT_BLOCK_NUMBERS", 8 * 7)
        in_blocks = top_k(candidates, method_named(name, "ffn"), None)
        assert in_blocks.indices.tolist() == whole.indices.tolist(), name
        assert in_blocks.scores.tolist() == pytest.approx(whole.scores.tolist(), abs=1e-12), name
        few = top_k(candidates, method_named(name, "ffn"), 9).indices
        assert few.tolist() == whole.indices[:9].tolist(), name


@pytest.mark.parametrize("k", [0, -1, 51])
@pytest.mark.parametrize("name", ["log_prob_increase", "coefficient"])
def test_k_must_lie_between_one_and_the_number_of_neurons(name: str, k: int) -> None:
    candidates = _few_candidates(torch.ones(50, dtype=torch.float64))
    with pytest.raises(BadInputError, match=rf"k = {k} is not between 1 and 50.*choose"):
        top_k(candidates, method_named(name, "ffn"), k)


@pytest.mark.parametrize(
    ("score", "complaint"),
    [
        (lambda candidates: torch.zeros(len(candidates), 1), r"returned \(50, 1\) on cpu.*shape \(50,\)"),
        (lambda candidates: torch.zeros(()), r"returned \(\) on cpu"),
        (lambda candidates: torch.zeros(len(candidates), device="meta"), r"returned \(50,\) on meta.*on cpu"),
        (lambda candidates: [0.0] * len(candidates), "returned list"),
        (lambda candidates: None, "returned NoneType"),
        (lambda candidates: candidates.coefficient * float("nan"), "scored f0-0 as NaN"),
        (lambda candidates: 0 / (candidates.row - 7.0), "scored f0-7 as NaN"),
    ],
    ids=["a column", "a scalar", "another device", "a list", "nothing", "NaN everywhere", "NaN once"],
)
def test_a_method_that_returns_nonsense_is_named(
    monkeypatch: pytest.MonkeyPatch, score: Callable[[Candidates], Tensor], complaint: str
) -> None:
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    register_method("homemade", source="this test")(score)
    candidates = _few_candidates(torch.ones(50, dtype=torch.float64))
    with pytest.raises(BadInputError, match="method 'homemade' " + complaint):
        top_k(candidates, method_named("homemade", "ffn"), 5)


@pytest.mark.parametrize(
    "bound",
    [
        lambda candidates: candidates.coefficient * float("nan"),
        lambda candidates: torch.zeros(len(candidates), 1),
        lambda candidates: [0.0] * len(candidates),
    ],
    ids=["NaN", "a column", "a list"],
)
def test_a_bound_that_is_nonsense_is_named(bound: Callable[[Candidates], Tensor]) -> None:
    candidates = _few_candidates(torch.arange(50, dtype=torch.float64))
    method = Method("homemade", lambda candidates: candidates.coefficient, ("ffn",), "this test", bound=bound)
    with pytest.raises(BadInputError, match="homemade"):
        top_k(candidates, method, 5)


def test_a_bound_below_its_scores_is_named_rather_than_trusted() -> None:
    candidates = _few_candidates(torch.arange(50, dtype=torch.float64))
    method = Method("homemade", lambda c: c.coefficient, ("ffn",), "this test", bound=lambda c: -c.coefficient)
    with pytest.raises(BadInputError, match="homemade"):
        top_k(candidates, method, 5)


def test_a_registered_method_can_be_used_by_name(monkeypatch: pytest.MonkeyPatch, model: at.Model) -> None:
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))

    @at.register_method("first_rows", unit="ffn", source="this test")
    def _first_rows(candidates: Candidates) -> Tensor:
        return -candidates.row.double()

    ranking = at.attribute(model, "The capital of France is", " Paris", method="first_rows", k=4)
    expected = [at.FFNNeuron(0, 0), at.FFNNeuron(1, 0), at.FFNNeuron(2, 0), at.FFNNeuron(0, 1)]
    assert ranking.neurons == expected
    with pytest.raises(BadInputError, match=r"'first_rows' scores the units ffn, not 'attention'"):
        at.attribute(model, "The capital of France is", " Paris", method="first_rows", unit="attention")


@pytest.mark.parametrize(
    "score",
    [
        lambda candidates: candidates.coefficient - candidates.coefficient.mean(),
        lambda candidates: candidates.coefficient.softmax(0),
        lambda candidates: candidates.coefficient.argsort().argsort().double(),
        lambda candidates: torch.rand(len(candidates)),
        lambda candidates: torch.where(
            candidates.coefficient > 0, candidates.coefficient - candidates.coefficient.mean(), -torch.inf
        ),
        lambda candidates: torch.where(candidates.index == 0, torch.inf, candidates.coefficient / len(candidates)),
        lambda candidates: 1e6 + candidates.coefficient - candidates.coefficient.mean(),
        lambda candidates: candidates.coefficient - candidates.coefficient.mean() + 1e7 * (candidates.index == 0),
    ],
    ids=["mean", "softmax", "rank", "draws", "among infinities", "beside infinity", "with an offset", "beside a giant"],
)
@pytest.mark.parametrize("unit", ["ffn", "attention"])
def test_a_method_that_scores_candidates_by_each_other_is_named(
    monkeypatch: pytest.MonkeyPatch, model: at.Model, score: Callable[[Candidates], Tensor], unit: str
) -> None:
    """Blocks are of any size, so such scores would depend on the machine's memory."""
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    register_method("relative", source="this test")(score)
    with pytest.raises(BadInputError, match=r"'relative' scores .* in a block of 64 candidates and .* of 32;"):
        at.attribute(model, "The capital of France is", " Paris", method="relative", unit=unit, k=4)


@pytest.mark.parametrize(
    "score",
    [
        lambda candidates: torch.where(candidates.coefficient > 0, candidates.coefficient, -torch.inf),
        lambda candidates: torch.zeros(len(candidates)),
        lambda candidates: (1e6 + candidates.coefficient).float(),
        lambda candidates: candidates.coefficient.bfloat16(),
        lambda candidates: candidates.index % 7,
        lambda candidates: candidates.coefficient.mul_(0.5),
        lambda candidates: (
            candidates.update.float() @ candidates.update[0].new_ones(()).float().expand(candidates.update.shape[1])
        ),
    ],
    ids=["masked", "zeros", "float32 with an offset", "bfloat16", "integers", "in place", "projected in float32"],
)
def test_a_method_that_scores_each_candidate_alone_is_taken(
    monkeypatch: pytest.MonkeyPatch, model: at.Model, score: Callable[[Candidates], Tensor]
) -> None:
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    register_method("honest", source="this test")(score)
    assert len(at.attribute(model, "The capital of France is", " Paris", method="honest", unit="ffn", k=4)) == 4


def test_every_method_of_the_package_scores_each_candidate_alone(model: at.Model) -> None:
    question = question_of(model, at.Prompt("The capital of France is", " Paris"))
    for method in methods.METHODS.values():
        for unit in method.units:
            (found,) = candidates_of_each(model, [question], {unit: [method]}, Search(steps=2))
            methods.check_blocks(method, found[unit])


def test_a_methods_name_can_be_taken_once_and_its_units_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    with pytest.raises(BadInputError, match=r"'random' is registered already.*choose another name"):
        register_method("random", source="this test")(lambda candidates: candidates.coefficient)
    with pytest.raises(BadInputError, match=r"unit 'token'.*ffn, attention"):
        register_method("by_token", unit="token", source="this test")  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match=r"'by_head' asks for effects 'gradient' of the units head; only ffn"):
        register_method("by_head", unit="head", source="this test", effects="gradient")
    assert "by_head" not in methods.METHODS
    assert "by_token" not in methods.METHODS


def test_random_neurons_differ_by_seed_and_by_prompt_but_not_by_run(model: at.Model) -> None:
    def draw(prompt: str, seed: int, unit: str = "ffn") -> list[at.FFNNeuron | at.AttentionNeuron]:
        return at.attribute(model, prompt, " Paris", method="random", k=20, seed=seed, unit=unit).neurons

    france, italy = "The capital of France is", "The capital of Italy is"
    for unit in ("ffn", "attention"):
        assert draw(france, 0, unit) == draw(france, 0, unit)
        assert draw(france, 0, unit) != draw(france, 1, unit)
        assert draw(france, 0, unit) != draw(italy, 0, unit)
        assert len(set(draw(france, 0, unit))) == 20


def test_random_draws_do_not_depend_on_the_company_of_other_prompts(model: at.Model) -> None:
    prompts = ["The capital of France is", "A ripe cherry is", "The number of legs that a dog has is"]
    together = at.attribute(model, prompts, " Paris", method="random", k=20)
    for prompt, ranking in zip(prompts, together, strict=True):
        assert ranking.neurons == at.attribute(model, prompt, " Paris", method="random", k=20).neurons


def test_every_neuron_has_the_same_chance_to_be_drawn() -> None:
    counts = torch.zeros(20)
    for seed in range(600):
        drawn = top_k(replace(_few_candidates(torch.ones(20)), seed=seed), method_named("random", "ffn"), 5).indices
        counts[drawn] += 1
    # Binomial: mean 150, standard deviation 10.6. Five deviations.
    assert 97 < counts.min() <= counts.max() < 203


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_a_neurons_score_does_not_depend_on_its_company(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    candidates = _few_candidates(torch.randn(40, generator=generator, dtype=torch.float64), seed=5)
    method = method_named(name, "ffn")
    chosen = torch.tensor([31, 2, 17, 2])
    part = candidates.take(chosen)
    assert len(part) == 4
    assert part.total == 40
    assert part.records(torch.arange(4)) == candidates.records(chosen)
    scores, alone = score_candidates(method, candidates), score_candidates(method, part)
    assert alone.tolist() == pytest.approx(scores[chosen].tolist(), abs=1e-12)
