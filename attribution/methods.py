"""The table of attribution methods: the eight of the paper (its Table 2) and random neurons.

A method maps :class:`~attribution.importance.Candidates` to one score each; larger is more important. Every
score must depend on its own candidate alone, because candidates are scored in blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from attribution.errors import BadInputError
from attribution.importance import UNITS, Candidates, Unit, first_order, log_prob_increase, unit_named

__all__ = ["METHODS", "Method", "Score", "bound_candidates", "method_named", "register_method", "score_candidates"]

Score: TypeAlias = Callable[[Candidates], Tensor]


@dataclass(frozen=True)
class Method:
    """One attribution method.

    Attributes:
        name: What users and claims call it.
        score: Candidates to scores, (n,).
        units: Units that it can score.
        source: Where it comes from.
        bound: Candidates to upper bounds on their scores, (n,), much cheaper than the scores; lets the top k be
            found without scoring all. ``None`` if there is none.
    """

    name: str
    score: Score
    units: tuple[Unit, ...]
    source: str
    bound: Score | None = None


METHODS: dict[str, Method] = {}


def register_method(
    name: str, *, unit: Unit | tuple[Unit, ...] = UNITS, source: str, bound: Score | None = None
) -> Callable[[Score], Score]:
    """Register the decorated function as a method, so that it can be named everywhere and joins the claims.

    Args:
        name: A name that is not taken.
        unit: The unit, or units, that it can score.
        source: Paper, equation or address that defines it.
        bound: Optional upper bound on the scores, never below them.

    Raises:
        BadInputError: If the name is taken or a unit is unknown.
    """
    units = tuple(unit_named(each) for each in ([unit] if isinstance(unit, str) else unit))

    def register(score: Score) -> Score:
        if name in METHODS:
            raise BadInputError(f"method {name!r} is registered already ({METHODS[name].source}); choose another name.")
        METHODS[name] = Method(name, score, units, source, bound)
        return score

    return register


def method_named(name: str, unit: Unit) -> Method:
    """Return a registered method that can score a unit.

    Raises:
        BadInputError: If there is none.
    """
    if name not in METHODS:
        raise BadInputError(
            f"method {name!r} is unknown; use one of {', '.join(sorted(METHODS))}, or register it with "
            "@attribution.register_method."
        )
    method = METHODS[name]
    if unit not in method.units:
        raise BadInputError(f"method {name!r} scores {' and '.join(method.units)} neurons, not unit {unit!r}.")
    return method


def score_candidates(method: Method, candidates: Candidates) -> Tensor:
    """Return a method's scores, checked.

    Raises:
        BadInputError: If the method returns a wrong shape, a wrong device or a NaN.
    """
    return _checked(method, "", method.score(candidates), candidates)


def bound_candidates(method: Method, candidates: Candidates) -> Tensor:
    """Return a method's upper bounds, checked in the same way; an error if it has none."""
    assert method.bound is not None
    return _checked(method, " as a bound", method.bound(candidates), candidates)


def _checked(method: Method, role: str, scores: object, candidates: Candidates) -> Tensor:
    expected = candidates.coefficient
    if not isinstance(scores, Tensor) or scores.shape != expected.shape or scores.device != expected.device:
        got = f"{tuple(scores.shape)} on {scores.device}" if isinstance(scores, Tensor) else type(scores).__name__
        raise BadInputError(
            f"method {method.name!r} returned {got}{role} for {len(candidates)} {candidates.table.unit} neurons; "
            f"return a tensor of shape ({len(candidates)},) on {expected.device}."
        )
    if torch.isnan(scores).any():
        first = candidates.records(torch.isnan(scores).nonzero()[0])[0]
        raise BadInputError(f"method {method.name!r} scored {first} as NaN{role}; return a number for every neuron.")
    return scores.double()


def _log_prob_increase_bound(candidates: Candidates) -> Tensor:
    return first_order(candidates, candidates.log_probs)


@register_method("log_prob_increase", source="Table 2 a), Eq. 13", bound=_log_prob_increase_bound)
def _log_prob_increase(candidates: Candidates) -> Tensor:
    """Return log p(w|x+mv) - log p(w|x), in nats."""
    return log_prob_increase(candidates.log_probs[candidates.layer], candidates.update, candidates.answer)


def _log_prob_bound(candidates: Candidates) -> Tensor:
    # log p(w|mv) is the increase over a uniform distribution, whose log-probability is -log V.
    uniform = torch.zeros_like(candidates.log_probs).log_softmax(-1)
    return first_order(candidates, uniform) + uniform[0, 0]


@register_method("log_prob", source="Table 2 b)", bound=_log_prob_bound)
def _log_prob(candidates: Candidates) -> Tensor:
    """Return log p(w|mv), in nats, under the frozen scale."""
    return candidates.update.log_softmax(-1)[:, candidates.answer]


def _as_probability(candidates: Candidates, increase: Tensor) -> Tensor:
    """p(w|x) * (exp(increase) - 1): an increase of log-probability, as one of probability."""
    log_prob = candidates.log_probs[candidates.layer, candidates.answer]
    # The product keeps the digits of a small increase; the difference holds where p(w|x) underflows. No probability
    # exceeds 1, which a bound on the increase may forget.
    small = log_prob.exp() * torch.expm1(increase.clamp(max=1))
    large = (log_prob + increase).clamp(max=0).exp() - log_prob.exp()
    return torch.where(increase < 1, small, large)


def _prob_increase_bound(candidates: Candidates) -> Tensor:
    return _as_probability(candidates, _log_prob_increase_bound(candidates))


@register_method("prob_increase", source="Table 2 c)", bound=_prob_increase_bound)
def _prob_increase(candidates: Candidates) -> Tensor:
    """p(w|x+mv) - p(w|x)."""
    return _as_probability(candidates, _log_prob_increase(candidates))


@register_method("vector_norm", source="Table 2 d)")
def _vector_norm(candidates: Candidates) -> Tensor:
    """|v|, the L2 norm of the bare vector."""
    return candidates.of_vector(candidates.table.norms)


@register_method("coefficient", source="Table 2 e)")
def _coefficient(candidates: Candidates) -> Tensor:
    """|m|."""
    return candidates.coefficient.abs()


@register_method("reciprocal_rank", source="Table 2 f)")
def _reciprocal_rank(candidates: Candidates) -> Tensor:
    """1 / rank(w) in bs(v), whatever the sign of m. Many neurons share rank 1: ties fall by (layer, index)."""
    return candidates.of_vector(candidates.table.reciprocal_ranks(candidates.answer))


@register_method("output_norm", source="Table 2 g)")
def _output_norm(candidates: Candidates) -> Tensor:
    """|m| * |v|, the L2 norm of what the neuron writes."""
    return _coefficient(candidates) * _vector_norm(candidates)


@register_method("coefficient_by_rank", source="Table 2 h)")
def _coefficient_by_rank(candidates: Candidates) -> Tensor:
    """|m| / rank(w) in bs(v), whatever the sign of m."""
    return _coefficient(candidates) * _reciprocal_rank(candidates)


@register_method("random", source="control: uniform draw without replacement, seeded")
def _random(candidates: Candidates) -> Tensor:
    """A uniform number per neuron."""
    generator = torch.Generator().manual_seed(candidates.seed)
    draws = torch.rand(candidates.total, generator=generator, dtype=torch.float64)
    return draws.to(candidates.index.device)[candidates.index]
