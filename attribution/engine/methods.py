"""The table of attribution methods: the eight of the paper (its Table 2), the wider field's, and random neurons.

A method maps :class:`~attribution.engine.importance.Candidates` to one score each; larger is more important. Every
score must depend on its own candidate alone, because candidates are scored in blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from attribution.engine.importance import Candidates, first_order, first_order_bound, log_prob_increase
from attribution.errors import BadInputError
from attribution.records import NEURON_UNITS, UNITS, Unit, unit_named

__all__ = [
    "METHODS",
    "Method",
    "Passes",
    "Rising",
    "Score",
    "bound_candidates",
    "check_blocks",
    "checked",
    "method_named",
    "register_method",
    "score_candidates",
]

Score: TypeAlias = Callable[[Candidates], Tensor]

# Candidates that are scored in blocks of two sizes, and the share of the scores' spread by which these may differ.
_CHECKED_TOGETHER, _SAME = 64, 1e-3


@dataclass(frozen=True)
class Passes:
    """A number of passes through the model, for one prompt and one kind of sublayer.

    Attributes:
        number: How many.
        per: What the number is multiplied by.
    """

    number: float
    per: tuple[Literal["layer", "step"], ...] = ()

    def of(self, layers: int, steps: int) -> float:
        """Return the number for a model of so many layers and a path of so many steps."""
        return self.number * prod({"layer": layers, "step": steps}[each] for each in self.per)

    def __str__(self) -> str:
        return f"{self.number:g}" + "".join(f" x {each}s" for each in self.per)


@dataclass(frozen=True)
class Rising:
    """A score that rises with the importance over some distribution, so that whatever brackets one brackets the other.

    Attributes:
        score: Increases of log p(w), (n,), and log p(w) itself over that distribution, to scores, (n,).
        uniform: Whether the distribution is the uniform one; that of the candidate's stream if not.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    uniform: bool = False


@dataclass(frozen=True)
class Method:
    """One attribution method.

    Attributes:
        name: What users and claims call it.
        score: Candidates to scores, (n,).
        units: Units that it can score.
        source: Where it comes from.
        forward: Forward passes.
        backward: Backward passes.
        effects: The kind of backward pass whose result it finds in ``candidates.effects``, if any.
        bound: Candidates to upper bounds on their scores, (n,), much cheaper than the scores; lets the top k be
            found without scoring all. ``None`` if there is none.
        floor: Candidates to lower bounds on their scores, (n,): what is below the k best of these need not be scored.
        first_order: Candidates to the first-order terms of their scores, (n,), for the ranking to show beside them.
        rising: What the score makes of an importance, if that is all it depends on; lets all candidates of many prompts
            be scored in one sweep over the vectors.
    """

    name: str
    score: Score
    units: tuple[Unit, ...]
    source: str
    forward: Passes = Passes(1)
    backward: Passes = Passes(0)
    effects: str | None = None
    bound: Score | None = None
    first_order: Score | None = None
    rising: Rising | None = None
    floor: Score | None = None

    @property
    def built_in(self) -> bool:
        """Whether it comes with this package; the suite judges every other method as it judges the paper's."""
        return self.score.__module__ == __name__


ONE_PASS, NO_PASS = Passes(1), Passes(0)
METHODS: dict[str, Method] = {}


def register_method(
    name: str,
    *,
    unit: Unit | tuple[Unit, ...] = NEURON_UNITS,
    source: str,
    forward: Passes = ONE_PASS,
    backward: Passes = NO_PASS,
    effects: str | None = None,
    bound: Score | None = None,
    first_order: Score | None = None,
    rising: Rising | None = None,
    floor: Score | None = None,
) -> Callable[[Score], Score]:
    """Register the decorated function as a method, so that it can be named everywhere and joins the claims.

    Args:
        name: A name that is not taken.
        unit: The unit, or units, that it can score; one that scores FFN and attention neurons scores both together.
        source: Paper, equation or address that defines it.
        forward: Forward passes that the effects need; one when left out.
        backward: Backward passes that they need; none when left out.
        effects: A kind of :func:`attribution.engine.gradients.read_effects`, if the scores need it.
        bound: Optional upper bound on the scores, never below them, rounding included.
        first_order: Optional first-order term of the scores.
        rising: Optional: what the score makes of an importance, if that is all it depends on.
        floor: Optional lower bound on the scores, never above them, rounding included.

    Raises:
        BadInputError: If the name is taken, a unit is unknown, or effects are asked for of what is no neuron.
    """
    units = tuple(unit_named(each) for each in ([unit] if isinstance(unit, str) else unit))
    if {"ffn", "attention"} <= set(units) and "neuron" not in units:
        units += ("neuron",)
    if effects is not None and not set(units) <= set(NEURON_UNITS):
        raise BadInputError(
            f"method {name!r} asks for effects {effects!r} of the units {', '.join(units)}; only "
            f"{', '.join(NEURON_UNITS)} have them, so leave out the others."
        )

    def register(score: Score) -> Score:
        if name in METHODS:
            raise BadInputError(f"method {name!r} is registered already ({METHODS[name].source}); choose another name.")
        METHODS[name] = Method(
            name, score, units, source, forward, backward, effects, bound, first_order, rising, floor
        )
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
        raise BadInputError(f"method {name!r} scores the units {', '.join(method.units)}, not {unit!r}; use another.")
    return method


def score_candidates(method: Method, candidates: Candidates) -> Tensor:
    """Return a method's scores, checked.

    Raises:
        BadInputError: If the method returns a wrong shape, a wrong device or a NaN.
    """
    return checked(method, method.score(candidates), candidates)


def bound_candidates(method: Method, candidates: Candidates) -> Tensor:
    """Return a method's upper bounds, checked in the same way; an error if it has none."""
    assert method.bound is not None
    return checked(method, method.bound(candidates), candidates, role=" as a bound")


def checked(method: Method, scores: object, candidates: Candidates, *, role: str = "") -> Tensor:
    """Return what a method made of candidates in float64, checked.

    Args:
        method: The method.
        scores: What it returned.
        candidates: What of.
        role: What else than scores it is, for the message.

    Raises:
        BadInputError: If it has a wrong shape, is on a wrong device or holds a NaN.
    """
    expected = candidates.coefficient
    if not isinstance(scores, Tensor) or scores.shape != expected.shape or scores.device != expected.device:
        got = f"{tuple(scores.shape)} on {scores.device}" if isinstance(scores, Tensor) else type(scores).__name__
        raise BadInputError(
            f"method {method.name!r} returned {got}{role} for {len(candidates)} candidates of unit "
            f"{candidates.table.unit!r}; return a tensor of shape ({len(candidates)},) on {expected.device}."
        )
    if torch.isnan(scores).any():
        first = candidates.records(torch.isnan(scores).nonzero()[0])[0]
        raise BadInputError(f"method {method.name!r} scored {first} as NaN{role}; return a number for every candidate.")
    return scores.double()


def check_blocks(method: Method, candidates: Candidates) -> None:
    """Complain of a method whose scores depend on which candidates are scored together.

    A few candidates of all layers are scored in one block, and in two. What rounding may make of other block sizes is
    far less than what a mean, a rank or a softmax over the block does.

    Args:
        method: The method.
        candidates: All candidates of a prompt.

    Raises:
        BadInputError: If a score differs.
    """
    number = min(_CHECKED_TOGETHER, len(candidates))
    places = torch.linspace(0, len(candidates) - 1, number).long().to(candidates.index.device).unique()
    # A fresh copy each time, because some methods change what they are given.
    given = method.score(candidates.take(places))
    whole = checked(method, given, candidates.take(places))
    apart = torch.zeros_like(whole)
    for first in range(2):
        if len(half := places[first::2]):
            apart[first::2] = score_candidates(method, candidates.take(half))
    finite = whole.isfinite() & apart.isfinite()
    # Neither one large score nor a constant that is added to all may hide what the others owe to each other.
    spread = torch.zeros((), dtype=whole.dtype, device=whole.device)
    if finite.any():
        low, high = whole[finite].quantile(whole.new_tensor([0.1, 0.9]))
        kind = given.dtype if given.dtype.is_floating_point else torch.float32
        spread = torch.maximum(_SAME * (high - low), 8 * torch.finfo(kind).eps * whole[finite].abs().max())
    apart_from = torch.where(finite, (whole - apart).abs() > spread, whole != apart)
    if apart_from.any():
        worst = int(apart_from.nonzero()[0])
        (record,) = candidates.records(places[worst][None])
        raise BadInputError(
            f"method {method.name!r} scores {record} {float(whole[worst]):.6g} in a block of {len(places)} candidates "
            f"and {float(apart[worst]):.6g} in a block of {-(-len(places) // 2)}; make every score depend on its own "
            "candidate alone, as blocks may be of any size."
        )


def _log_prob_increase_bound(candidates: Candidates) -> Tensor:
    return candidates.increase_bound


def _log_prob_increase_first_order(candidates: Candidates) -> Tensor:
    return first_order(candidates.probs[candidates.sublayer_index], candidates.update, candidates.answer)


@register_method(
    "log_prob_increase",
    unit=UNITS,
    source="Table 2 a), Eq. 13",
    bound=_log_prob_increase_bound,
    first_order=_log_prob_increase_first_order,
    rising=Rising(lambda increase, _: increase),
)
def _log_prob_increase(candidates: Candidates) -> Tensor:
    """Return log p(w|x+mv) - log p(w|x), in nats."""
    return log_prob_increase(candidates.log_probs[candidates.sublayer_index], candidates.update, candidates.answer)


def _log_prob_bound(candidates: Candidates) -> Tensor:
    # log p(w|mv) is the increase over a uniform distribution, whose log-probability is -log V.
    uniform = torch.zeros_like(candidates.log_probs[:1]).log_softmax(-1)
    return first_order_bound(candidates, uniform) + uniform[0, 0]


@register_method(
    "log_prob", unit=UNITS, source="Table 2 b)", bound=_log_prob_bound, rising=Rising(torch.add, uniform=True)
)
def _log_prob(candidates: Candidates) -> Tensor:
    """Return log p(w|mv), in nats, under the frozen scale."""
    return candidates.update.log_softmax(-1)[:, candidates.answer]


def _as_probability(increase: Tensor, log_prob: Tensor) -> Tensor:
    """p(w|x) * (exp(increase) - 1): an increase of log-probability, as one of probability."""
    # The product keeps the digits of a small increase; the difference holds where p(w|x) underflows. No probability
    # exceeds 1, which a bound on the increase may forget.
    small = log_prob.exp() * torch.expm1(increase.clamp(max=1))
    large = (log_prob + increase).clamp(max=0).exp() - log_prob.exp()
    return torch.where(increase < 1, small, large)


def _log_prob_of_answer(candidates: Candidates) -> Tensor:
    return candidates.log_probs[candidates.sublayer_index, candidates.answer]


def _prob_increase_bound(candidates: Candidates) -> Tensor:
    return _as_probability(_log_prob_increase_bound(candidates), _log_prob_of_answer(candidates))


@register_method(
    "prob_increase",
    unit=UNITS,
    source="Table 2 c)",
    bound=_prob_increase_bound,
    rising=Rising(_as_probability),
)
def _prob_increase(candidates: Candidates) -> Tensor:
    """p(w|x+mv) - p(w|x)."""
    return _as_probability(_log_prob_increase(candidates), _log_prob_of_answer(candidates))


# What takes no projection is its own bound: without one, a method is scored in blocks that a projection would fit.
def _vector_norm(candidates: Candidates) -> Tensor:
    """|v|, the L2 norm of the bare vector."""
    return candidates.of_vector(candidates.table.norms)


register_method("vector_norm", source="Table 2 d)", bound=_vector_norm)(_vector_norm)


def _coefficient(candidates: Candidates) -> Tensor:
    """|m|."""
    return candidates.coefficient.abs()


register_method("coefficient", source="Table 2 e)", bound=_coefficient)(_coefficient)


def _reciprocal_rank_bound(candidates: Candidates) -> Tensor:
    return candidates.of_vector(candidates.table.reciprocal_rank_bounds(candidates.answer))


def _reciprocal_rank_floor(candidates: Candidates) -> Tensor:
    return candidates.of_vector(candidates.table.reciprocal_rank_floors(candidates.answer))


@register_method("reciprocal_rank", source="Table 2 f)", bound=_reciprocal_rank_bound, floor=_reciprocal_rank_floor)
def _reciprocal_rank(candidates: Candidates) -> Tensor:
    """1 / rank(w) in bs(v), whatever the sign of m. Many neurons share rank 1: ties fall by (layer, index)."""
    return candidates.table.reciprocal_ranks(candidates.sublayer_index, candidates.row, candidates.answer)


def _output_norm(candidates: Candidates) -> Tensor:
    """|m| * |v|, the L2 norm of what the candidate writes."""
    return _coefficient(candidates) * _vector_norm(candidates)


register_method("output_norm", unit=UNITS, source="Table 2 g)", bound=_output_norm)(_output_norm)


def _coefficient_by_rank_bound(candidates: Candidates) -> Tensor:
    return _coefficient(candidates) * _reciprocal_rank_bound(candidates)


def _coefficient_by_rank_floor(candidates: Candidates) -> Tensor:
    return _coefficient(candidates) * _reciprocal_rank_floor(candidates)


@register_method(
    "coefficient_by_rank",
    source="Table 2 h)",
    bound=_coefficient_by_rank_bound,
    floor=_coefficient_by_rank_floor,
)
def _coefficient_by_rank(candidates: Candidates) -> Tensor:
    """|m| / rank(w) in bs(v), whatever the sign of m."""
    return _coefficient(candidates) * _reciprocal_rank(candidates)


def _random(candidates: Candidates) -> Tensor:
    """A uniform number per candidate."""
    generator = torch.Generator().manual_seed(candidates.seed)
    draws = torch.rand(candidates.total, generator=generator, dtype=torch.float64)
    return draws.to(candidates.index.device)[candidates.index]


register_method("random", unit=UNITS, source="control: uniform draw without replacement, seeded", bound=_random)(
    _random
)


@register_method(
    "gradient_x_activation",
    source="Shrikumar et al. 2017; of the model's own log p(w), at every position",
    backward=Passes(1),
    effects="gradient",
)
def _gradient_x_activation(candidates: Candidates) -> Tensor:
    """Sum over positions of m times d log p(w) / dm, in nats."""
    return candidates.effects["gradient"]


@register_method(
    "integrated_gradients",
    source="Sundararajan et al. 2017, per sublayer as in Dai et al. 2022; from zero, `steps` points",
    forward=Passes(0.5, ("step", "layer")),
    backward=Passes(0.5, ("step", "layer")),
    effects="integrated_gradients",
)
def _integrated_gradients(candidates: Candidates) -> Tensor:
    """Sum over positions of m times the mean of d log p(w) / dm on the way from 0 to m, in nats."""
    return candidates.effects["integrated_gradients"]


@register_method(
    "atp_star",
    source="Kramar et al. 2024, AtP* for neurons: GradDrop, with the sign of AtP",
    backward=Passes(0.5, ("layer",)),
    effects="grad_drop",
)
def _atp_star(candidates: Candidates) -> Tensor:
    """Attribution patching towards zero, averaged over gradients that skip one layer each, in nats."""
    return candidates.effects["grad_drop"]


@register_method(
    "relp",
    source="Jafari et al. 2025, RelP, with the rules of AttnLRP (Achtibat et al. 2024)",
    backward=Passes(1),
    effects="relevance",
)
def _relp(candidates: Candidates) -> Tensor:
    """Sum over positions of m times the relevance that one unit of it would get, in nats."""
    return candidates.effects["relevance"]
