"""Metrics against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

import attribution as at
from attribution.engine.importance import log_prob_increase
from attribution.errors import BadInputError
from attribution.experiments.selection_rule import outranks_rivals

# Table 1 of arXiv 2312.12141: bs(x), and for each neuron bs(v), bs(x + v) and the probabilities printed for it.
TABLE_1_BASE = [1.0, 2.0, 3.0, 4.0]
TABLE_1_BASE_PROBS = [0.03, 0.09, 0.24, 0.64]
TABLE_1 = {
    "v1": ([1, 1, 1, 3], [2, 3, 4, 7], [0.01, 0.02, 0.05, 0.93]),
    "v2": ([3, 1, 1, 1], [4, 3, 4, 5], [0.20, 0.07, 0.20, 0.53]),
    "v3": ([6, 4, 4, 4], [7, 6, 7, 8], [0.20, 0.07, 0.20, 0.53]),
    "v4": ([6, 2, 2, 2], [7, 4, 5, 6], [0.64, 0.03, 0.09, 0.23]),
    "v5": ([-6, -2, -2, -2], [-5, 0, 1, 2], [0.00, 0.09, 0.24, 0.67]),
}


# Printed with two digits; v4's 0.237 is cut to 0.23, and v5's 0.665 raised to 0.67, where the row then sums to 1.
PRINTED = 0.0075


def test_measure_of_a_distribution_worked_by_hand() -> None:
    # Probabilities 1/10, 2/10, 3/10, 4/10.
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()
    outcome = at.measure(logits, 1)
    assert outcome.rank == 3
    assert outcome.mrr == pytest.approx(1 / 3)
    assert outcome.prob == pytest.approx(0.2)
    assert outcome.logp == pytest.approx(math.log(0.2))
    assert [at.measure(logits, token).rank for token in range(4)] == [4, 3, 2, 1]


def test_adding_a_constant_to_every_logit_changes_nothing() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    moved, still = at.measure(logits + 100, 0), at.measure(logits, 0)
    assert (moved.rank, moved.mrr) == (still.rank, still.mrr)
    assert (moved.prob, moved.logp) == pytest.approx((still.prob, still.logp))


def test_a_tie_counts_against_the_answer() -> None:
    assert at.measure(torch.tensor([5.0, 5.0, 1.0]), 0).rank == 2
    assert at.measure(torch.tensor([5.0, 5.0, 1.0]), 1).rank == 2
    assert at.measure(torch.zeros(50), 7).rank == 50


def test_extreme_logits_keep_the_log_probability_finite() -> None:
    outcome = at.measure(torch.tensor([0.0, 2000.0]), 0)
    assert outcome.logp == -2000.0
    assert outcome.prob == 0.0
    assert at.measure(torch.tensor([0.0, 2000.0]), 1).logp == 0.0
    assert at.measure(torch.tensor([3e38, -3e38]), 1).logp == pytest.approx(-6e38, rel=1e-6)


def test_a_log_probability_far_below_float32_is_not_rounded_away() -> None:
    # log(1 - 1/(1 + e^-30)): a float32 softmax makes it exactly zero.
    assert at.measure(torch.tensor([30.0, 0.0]), 0).logp == pytest.approx(-math.log1p(math.exp(-30)), rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_no_number_is_an_error(value: float) -> None:
    with pytest.raises(BadInputError, match="NaN or infinite"):
        at.measure(torch.tensor([1.0, value, 0.0]), 0)


@pytest.mark.parametrize("answer", [-1, 3, 50_257])
def test_an_answer_outside_the_vocabulary_is_an_error(answer: int) -> None:
    with pytest.raises(BadInputError, match=rf"answer id {answer} is not between 0 and 2; use"):
        at.measure(torch.zeros(3), answer)


def test_logits_of_many_prompts_are_an_error() -> None:
    with pytest.raises(BadInputError, match=r"shape \(2, 3\)"):
        at.measure(torch.zeros(2, 3), 0)


def test_the_selection_rule_wants_the_answer_above_its_rivals_and_in_the_top_ten() -> None:
    logits = torch.arange(30.0)
    assert outranks_rivals(logits, 20, [20, 19, 3])
    assert not outranks_rivals(logits, 19, [19, 3]), "eleventh of the vocabulary"
    assert not outranks_rivals(logits, 28, [28, 29]), "a rival is above it"
    assert outranks_rivals(logits, 28, [28, 27])
    assert outranks_rivals(logits, 29, [29]), "its own word is no rival"
    assert outranks_rivals(logits, 29, [])
    assert not outranks_rivals(torch.tensor([3.0, 3.0, 0.0]), 0, [0, 1]), "a tie is not above"


def test_table_1_of_the_paper_base() -> None:
    base = torch.tensor(TABLE_1_BASE, dtype=torch.float64)
    for token, printed in enumerate(TABLE_1_BASE_PROBS):
        assert at.measure(base, token).prob == pytest.approx(printed, abs=PRINTED)


@pytest.mark.parametrize("neuron", list(TABLE_1))
def test_table_1_of_the_paper(neuron: str) -> None:
    bs_v, bs_sum, printed = TABLE_1[neuron]
    base, update = torch.tensor(TABLE_1_BASE, dtype=torch.float64), torch.tensor(bs_v, dtype=torch.float64)
    assert (base + update).tolist() == bs_sum
    for token in range(4):
        increase = float(log_prob_increase(base.log_softmax(-1), update, token))
        after = at.measure(base + update, token)
        assert increase == pytest.approx(after.logp - at.measure(base, token).logp, abs=1e-12)
        assert after.prob == pytest.approx(printed[token], abs=PRINTED)


def test_table_1s_lesson_a_larger_value_everywhere_is_no_larger_increase() -> None:
    """v3 is v2 plus a constant, so it helps no token more; v4 is twice v2."""
    base = torch.tensor(TABLE_1_BASE, dtype=torch.float64)
    bs_v = torch.tensor([TABLE_1[name][0] for name in ("v2", "v3", "v4", "v5")], dtype=torch.float64)
    v2, v3, v4, v5 = log_prob_increase(base.log_softmax(-1), bs_v, 0).tolist()
    assert v3 == pytest.approx(v2, abs=1e-12)
    assert v4 > v2 > 0 > v5


def test_importance_over_many_rows_is_that_of_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    update = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    each = [float(log_prob_increase(base[row].log_softmax(-1), update[row], 5)) for row in range(4)]
    assert log_prob_increase(base.log_softmax(-1), update, 5).tolist() == pytest.approx(each, abs=1e-12)
