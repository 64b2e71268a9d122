"""What the judge and the metrics make of inputs with known answers.

They are the last step between a measurement and what is believed of it, and nothing measured on a model would show
their mistakes. So they get numbers made for the purpose, of which each likely mistake makes something else. The
verdicts on them are put together by hand, see :func:`verdict_by_hand`: a broken judge must not judge itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import stats

from attribution.claims.bench import Workbench
from attribution.claims.judge import Claim, Extremes, Status, Verdict, judge, judge_exact
from attribution.engine.metrics import Outcome, by_metric, measure
from attribution.errors import BadInputError
from attribution.experiments.selection_rule import outranks_rivals

__all__ = ["Mistakes", "mistakes_of_the_judge", "mistakes_of_the_metrics", "verdict_by_hand"]

_NUMBER = 100
# Of the mean of that many numbers of standard deviation 1.
_STANDARD_ERROR = _NUMBER**-0.5
_ALONE = tuple(str(number) for number in range(_NUMBER))
_ONES = (1.0,) * _NUMBER
_SUPPORTED, _REFUTED, _OPEN, _FEW = Status.SUPPORTED, Status.REFUTED, Status.INCONCLUSIVE, Status.UNDECIDED


def _normal(standard_errors: float, *, above: float = 0.0) -> list[float]:
    """Return normal numbers whose mean is so many of its standard errors above something: quantiles, not draws."""
    quantiles = stats.norm.ppf((np.arange(_NUMBER) + 0.5) / _NUMBER)
    return [float(each) for each in quantiles / quantiles.std() + above + standard_errors * _STANDARD_ERROR]


@dataclass(frozen=True)
class _Case:
    """Numbers to judge, and the right verdict on them.

    Attributes:
        what: What the verdict depends on.
        right: The verdict; ``None`` where there must be an error.
        effects: One number per prompt.
        threshold: As in :class:`~attribution.claims.judge.Claim`.
        test: As there.
        min_prompts: As there.
        comparisons: As there.
        effect_bounds: As there.
        facts: What each prompt asks about.
        baselines: What the effects are relative to.
        prompts: What tells the prompts apart.
    """

    what: str
    right: Status | None
    effects: Sequence[float]
    threshold: float = 0
    test: Literal["above", "within"] = "above"
    min_prompts: int = 0
    comparisons: int = 1
    effect_bounds: Extremes = "seen"
    facts: Sequence[str] = _ALONE
    baselines: Sequence[float] | None = None
    prompts: Sequence[str] | None = None

    def verdict(self) -> Status | None:
        """Return what the judge says; ``None`` for an error."""
        claim = Claim(
            id="known",
            sentence=self.what,
            source="ours",
            effect="an effect",
            test=self.test,
            threshold=self.threshold,
            control="none",
            min_prompts=self.min_prompts,
            comparisons=self.comparisons,
            effect_bounds=self.effect_bounds,
        )
        try:
            verdict = judge(
                claim,
                model="none",
                effects=self.effects,
                facts=self.facts,
                baselines=self.baselines,
                prompts=self.prompts,
            )
        except BadInputError:
            return None
        return verdict.status


def _cases() -> list[_Case]:
    sizes = np.linspace(0.1, 1.9, _NUMBER)
    noise = 0.01 * np.array(_normal(0))
    # Four phrasings of each fact say the same, so that a standard error is twice what prompts make of it.
    phrasings = np.repeat(_normal(0)[1::4], 4)
    by_fact = (phrasings - phrasings.mean()) / phrasings.std() + 3 * _STANDARD_ERROR
    # Prompts of two sizes, the small ones with the larger share.
    unequal, shares = np.repeat([1.0, 0.01], _NUMBER // 2), np.repeat([0.5, 1.0], _NUMBER // 2)
    # Half the width of the two intervals: 1.96 standard errors of 0.1 for 95%, 1.64 for 90%; one fact more that is as
    # bad as the worst of these, 2.6 below the mean, adds a quarter of one.
    return [
        _Case("the effect is above", _SUPPORTED, _normal(5)),
        _Case("the effect is below", _REFUTED, _normal(-5)),
        _Case("the threshold is not 0", _REFUTED, _normal(-5, above=1), 1),
        _Case("the interval, not the mean, is above", _OPEN, _normal(1)),
        _Case("95% of the interval", _OPEN, _normal(1.8)),
        _Case("no more than 95% of one claim", _SUPPORTED, _normal(2.4)),
        _Case("as many claims are judged together", _OPEN, _normal(2.4), comparisons=20),
        _Case("fewer prompts than are needed", _FEW, _normal(5), min_prompts=_NUMBER + 1),
        _Case("90% of the interval is inside", _SUPPORTED, _normal(0), 0.2, "within"),
        _Case("an effect that is not seen is not absent", _OPEN, _normal(0), 0.1, "within"),
        _Case("the interval, not the mean, is inside", _OPEN, _normal(1), 0.2, "within"),
        _Case("the effect is above the margin", _REFUTED, _normal(7), 0.2, "within"),
        _Case("the effect is below the margin", _REFUTED, _normal(-7), 0.2, "within"),
        _Case("facts are drawn, not prompts", _OPEN, by_fact.tolist(), facts=[f"{n // 4}" for n in range(100)]),
        _Case(
            "effects are drawn with their own baselines",
            _SUPPORTED,
            (0.95 * sizes + noise).tolist(),
            0.9,
            baselines=sizes.tolist(),
        ),
        _Case(
            "a ratio of means, 0.505, not the mean of ratios, 0.75",
            _REFUTED,
            (unequal * shares).tolist(),
            0.6,
            baselines=unequal.tolist(),
        ),
        # A hundred draws miss 3.6% of the facts altogether in one of forty cases, and 3% in one of twenty.
        _Case(
            "few of the facts that were not drawn may fail", _SUPPORTED, [1.0] * _NUMBER, 0.96, effect_bounds="share"
        ),
        _Case("some of the facts that were not drawn may fail", _OPEN, [1.0] * _NUMBER, 0.97, effect_bounds="share"),
        _Case("few may lose all", _SUPPORTED, [0.0] * _NUMBER, 0.031, "within", effect_bounds="fall", baselines=_ONES),
        _Case("some may lose all", _OPEN, [0.0] * _NUMBER, 0.028, "within", effect_bounds="fall", baselines=_ONES),
        _Case("few may gain nothing", _SUPPORTED, [1.0] * _NUMBER, 0.92, effect_bounds="correlation"),
        _Case("some may be the other way round", _OPEN, [1.0] * _NUMBER, 0.935, effect_bounds="correlation"),
        _Case("an effect is no number", None, [*_normal(5)[1:], math.nan]),
        _Case("an effect is infinite", None, [*_normal(5)[1:], math.inf]),
        _Case("a prompt counts twice", None, _normal(5), prompts=["the same"] * _NUMBER),
        _Case("two prompts of one fact are one number", _FEW, [1.0, 2.0], facts=["a", "a"]),
    ]


_EXACT = {
    ("at most the bound", 1.0, 3): _SUPPORTED,
    ("above the bound", 1.1, 3): _REFUTED,
    ("no number", math.nan, 3): _REFUTED,
    ("nothing was measured", 0.5, 0): _FEW,
}


@dataclass(frozen=True)
class Mistakes:
    """What went wrong with inputs whose answers are known.

    Attributes:
        wrong: Which inputs have a wrong answer.
        cases: How many inputs there are.
    """

    wrong: list[str]
    cases: int


def mistakes_of_the_judge() -> Mistakes:
    """Judge samples whose verdict follows from the normal distribution."""
    return Mistakes(_judged_wrongly(), len(_cases()) + len(_EXACT))


def _judged_wrongly() -> list[str]:
    wrong = [case.what for case in _cases() if case.verdict() is not case.right]
    for (what, effect, n), right in _EXACT.items():
        claim = Claim("known", what, "ours", "a number", "at_most", 1, "none")
        if judge_exact(claim, model="none", effect=effect, n=n, facts=n).status is not right:
            wrong.append(what)
    return wrong


# Logits, answer, rank and probability; the logarithm is compared where no probability can be told from zero.
_OUTCOMES = {
    "the best token": ([math.log(p) for p in (0.5, 0.3, 0.2)], 0, 1, math.log(0.5)),
    "the second of three": ([math.log(p) for p in (0.5, 0.3, 0.2)], 1, 2, math.log(0.3)),
    "the worst of three": ([math.log(p) for p in (0.5, 0.3, 0.2)], 2, 3, math.log(0.2)),
    "logits need not be logarithms": ([5.0, 5.0 + math.log(3)], 0, 2, math.log(0.25)),
    "an equal token is ahead": ([1.0, 1.0], 0, 2, math.log(0.5)),
    "a probability that underflows": ([0.0, -800.0], 1, 2, -800.0),
}
_ABOVE = [float(place) for place in range(20, 0, -1)]
# Logits, answer, rivals and whether the prompt counts as known.
_SELECTED = {
    "tenth, without a rival": (_ABOVE, 9, [], True),
    "eleventh": (_ABOVE, 10, [], False),
    "above its rivals": (_ABOVE, 3, [4, 12], True),
    "below a rival": (_ABOVE, 3, [1, 12], False),
    "its own rival": (_ABOVE, 3, [3], True),
    "equal to a rival": ([1.0, 1.0, 0.0], 0, [1], False),
}


def _close(one: float, other: float) -> bool:
    # Some operations in float64 on numbers of float32.
    return math.isclose(one, other, rel_tol=10 * float(torch.finfo(torch.float32).eps))


def mistakes_of_the_metrics() -> Mistakes:
    """Measure logits whose rank and probability are known, by the metrics and by the selection rule."""
    return Mistakes(_measured_wrongly(), len(_OUTCOMES) + len(_SELECTED) + 1)


def _measured_wrongly() -> list[str]:
    wrong = []
    for what, (logits, answer, rank, logp) in _OUTCOMES.items():
        found = measure(torch.tensor(logits), answer)
        numbers = ((found.mrr, 1 / rank), (found.prob, math.exp(logp)), (found.logp, logp))
        if found.rank != rank or not all(_close(*each) for each in numbers):
            wrong.append(what)
    for what, (logits, answer, rivals, right) in _SELECTED.items():
        if outranks_rivals(torch.tensor(logits), answer, rivals) is not right:
            wrong.append(what)
    columns = by_metric([Outcome(1, 1.0, 0.5, -0.7), Outcome(4, 0.25, 0.1, -2.3)])
    if [columns[name].tolist() for name in ("mrr", "prob", "logp")] != [[1.0, 0.25], [0.5, 0.1], [-0.7, -2.3]]:
        wrong.append("each metric under its name")
    return wrong


def verdict_by_hand(bench: Workbench, claim: Claim, mistakes: Mistakes) -> Verdict:
    """Return the verdict on a claim that there are no mistakes, without the judge."""
    status, number = _REFUTED if mistakes.wrong else _SUPPORTED, float(len(mistakes.wrong))
    note = f"wrong: {'; '.join(mistakes.wrong)}" if mistakes.wrong else ""
    return Verdict(claim, bench.model.name, status, number, number, number, mistakes.cases, mistakes.cases, note=note)
