"""Ablation and gradients by hooks on the plain model: what the engine says of them must be the same.

One prompt runs alone and unpadded through the model's own modules, without tracing. What the engine makes of the same
prompt in a batch may differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from attribution.claims.bench import Workbench
from attribution.claims.measured import Exact
from attribution.engine.ablation import ablate
from attribution.engine.decomposition import worst
from attribution.engine.questions import Question
from attribution.engine.ranking import attribute
from attribution.engine.trace import read_activations
from attribution.models.anatomy import first_tensor, resolve
from attribution.models.model import Model
from attribution.models.running import TURN, hooked
from attribution.prompts.knowledge import Prompt
from attribution.prompts.tokens import pad
from attribution.records import AttentionNeuron, Component, FFNNeuron, Head, SublayerKind

__all__ = ["ABLATIONS", "BACKWARD", "difference_of_ablations", "difference_of_scores", "tolerance"]

ABLATIONS = ("zero", "mean", "resample", "at one source position")
"""What is ablated by hand: three kinds at all positions, and zero as read by the last position alone."""

BACKWARD = ("gradient_x_activation", "integrated_gradients", "atp_star")
"""Methods whose backward passes are made by hand. RelP is none of the model's gradients."""

# Neurons of each unit that are ablated together.
_ABLATED = 10
# Points on the path of integrated gradients.
_STEPS = 3

_Site: TypeAlias = tuple[int, SublayerKind]
_Hook: TypeAlias = Callable[[Tensor], Tensor]


def _prompts(bench: Workbench) -> tuple[list[Prompt], list[Question]]:
    """Return the shortest and the longest prompt: one of them is padded in a batch."""
    by_length = sorted(range(len(bench.sample.questions)), key=lambda place: len(bench.sample.questions[place].ids))
    indices = by_length[:1] + by_length[1:][-1:]
    return [bench.prompts[place] for place in indices], [bench.sample.questions[place] for place in indices]


def tolerance(model: Model) -> float:
    """Return the share of an effect that rounding may move: the root of epsilon, half of the digits.

    How far later layers amplify rounding has no tight bound. A wrong place or sign moves all of an effect.
    """
    return float(torch.finfo(model.anatomy.readout.unembedding.dtype).eps ** 0.5)


def _sites(model: Model) -> list[_Site]:
    units: tuple[SublayerKind, SublayerKind] = ("attention", "ffn")
    return [(layer, unit) for layer in range(model.anatomy.layers) for unit in units]


def _entering(model: Model, hooks: Mapping[_Site, _Hook]) -> AbstractContextManager[None]:
    """Replace what enters output projections, (position, neurons), in the plain model."""
    family, blocks = model.anatomy.family, model.anatomy.blocks(model.network._module)

    def replace(_: nn.Module, inputs: tuple[Tensor, ...], hook: _Hook) -> tuple[Tensor, ...]:
        entered, *others = inputs
        return (hook(entered.reshape(-1, entered.shape[-1])).reshape(entered.shape), *others)

    return hooked(
        (
            resolve(blocks[layer], family.ffn_out if unit == "ffn" else family.attention_out),
            partial(replace, hook=hook),
        )
        for (layer, unit), hook in hooks.items()
    )


def _log_probs(model: Model, ids: Sequence[int], hooks: Mapping[_Site, _Hook]) -> Tensor:
    """Return the log-probabilities after a prompt, (vocabulary,)."""
    with _entering(model, hooks):
        logits: Tensor = model.network._module(**pad([ids], device=model.device).inputs()).logits
    return logits[0, -1].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _inputs(model: Model, ids: Sequence[int]) -> dict[_Site, Tensor]:
    """Return what enters each output projection, (position, neurons)."""
    found: dict[_Site, Tensor] = {}

    def keep(entered: Tensor, site: _Site) -> Tensor:
        found[site] = entered
        return entered

    with torch.no_grad():
        _log_probs(model, ids, {site: partial(keep, site=site) for site in _sites(model)})
    return found


def _columns(model: Model, records: Sequence[Component]) -> dict[_Site, list[int]]:
    """Return the inputs of output projections that records stand for."""
    columns: dict[_Site, list[int]] = {}
    for record in records:
        if isinstance(record, FFNNeuron):
            columns.setdefault((record.layer, "ffn"), []).append(record.index)
            continue
        assert isinstance(record, AttentionNeuron | Head)
        dims = range(model.anatomy.head_dim) if isinstance(record, Head) else [record.dim]
        own = [record.head * model.anatomy.head_dim + dim for dim in dims]
        columns.setdefault((record.layer, "attention"), []).extend(own)
    return columns


def _put(entered: Tensor, columns: list[int], values: Tensor) -> Tensor:
    changed = entered.clone()
    changed[:, columns] = values.to(entered.dtype)
    return changed


def _everywhere(
    model: Model, kind: str, ids: Sequence[int], other: Sequence[int], records: Sequence[Component]
) -> Tensor:
    """Return log-probabilities of a prompt with records replaced at all positions, by hand.

    Args:
        model: A loaded model.
        kind: An ablation kind.
        ids: The prompt.
        other: The other prompt: the only one that can be its donor, and half of what is averaged over.
        records: What is replaced.
    """
    own, others = _inputs(model, ids), _inputs(model, other)
    # Aligned at the last token; what comes before the donor's first takes what it has there.
    indices = (torch.arange(len(ids)) + len(other) - len(ids)).clamp(min=0)
    hooks: dict[_Site, _Hook] = {}
    for site, columns in _columns(model, records).items():
        fillers = {
            "zero": torch.zeros((), device=model.device),
            "mean": torch.cat([own[site], others[site]])[:, columns].double().mean(0),
            "resample": others[site][indices][:, columns],
        }
        hooks[site] = partial(_put, columns=columns, values=fillers[kind])
    with torch.no_grad():
        return _log_probs(model, ids, hooks)


def _at_sources(model: Model, ids: Sequence[int], neurons: Sequence[AttentionNeuron]) -> Tensor:
    """Return log-probabilities of a prompt whose last position takes nothing of some neurons of one layer, by hand."""
    layer = neurons[0].layer
    seen = read_activations(model, pad([ids], device=model.device))

    def take_away(entered: Tensor) -> Tensor:
        changed = entered.clone()
        for each in neurons:
            taken = (
                seen.pattern[layer, 0, each.head, each.position]
                * seen.values[layer, 0, each.position, each.head, each.dim]
            )
            changed[-1, each.head * model.anatomy.head_dim + each.dim] -= taken
        return changed

    with torch.no_grad():
        return _log_probs(model, ids, {(layer, "attention"): take_away})


def _loudest(model: Model, ids: Sequence[int]) -> list[list[Component]]:
    """Return for each layer the FFN neuron and the head dimension that enter most strongly at the last position."""
    found: list[list[Component]] = [[] for _ in range(model.anatomy.layers)]
    for (layer, unit), entered in _inputs(model, ids).items():
        column = int(entered[-1].abs().argmax())
        head, dim = divmod(column, model.anatomy.head_dim)
        found[layer].append(FFNNeuron(layer, column) if unit == "ffn" else AttentionNeuron(layer, head, dim, 0))
    return found


def _loudest_sources(model: Model, ids: Sequence[int]) -> list[list[AttentionNeuron]]:
    """Return for each layer the attention neurons of which the last position takes most, at their source positions."""
    seen = read_activations(model, pad([ids], device=model.device))
    found = []
    for layer in range(model.anatomy.layers):
        taken = torch.einsum("hp,phd->hdp", seen.pattern[layer, 0], seen.values[layer, 0]).abs()
        best = taken.flatten().topk(min(_ABLATED, taken.numel())).indices
        places = torch.stack(torch.unravel_index(best, taken.shape), 1).tolist()
        found.append([AttentionNeuron(layer, *place) for place in places])
    return found


def difference_of_ablations(bench: Workbench, kind: str) -> Exact:
    """Measure how far ablation of a kind of :data:`ABLATIONS` is from what hooks do.

    Ablated are, at all positions, the best neurons of both units with a head, and in every layer by itself the neurons
    that enter most strongly; at one source position, in every layer those of which most is taken.

    Returns:
        The largest difference of log-probabilities as a share of the change by ablation, L2 norms: of its own for the
        best neurons, and of the largest of all layers for those of one layer, which may change next to nothing.
    """
    at_source = kind not in ("zero", "mean", "resample")
    prompts, questions = _prompts(bench)
    if len(prompts) < 2:
        return Exact(0.0, prompts=0, facts=0)
    best = [attribute(bench.model, prompts, unit=unit, k=_ABLATED) for unit in ("ffn", "attention")]
    jobs: list[tuple[int, list[Any]]] = []
    for number, (question, ffn, attention) in enumerate(zip(questions, *best, strict=True)):
        if at_source:
            jobs += [(number, list(each)) for each in _loudest_sources(bench.model, question.ids)]
        else:
            jobs.append((number, [*ffn.neurons, *attention.neurons, Head(0, number % bench.model.anatomy.heads)]))
            jobs += [(number, each) for each in _loudest(bench.model, question.ids)]
    logits = ablate(
        bench.model,
        [prompts[number] for number, _ in jobs],
        [variant for _, variant in jobs],
        kind="zero" if at_source else kind,
        reference=prompts if kind in ("mean", "resample") else None,
        at_source=at_source,
    )
    plain = [_log_probs(bench.model, question.ids, {}) for question in questions]
    errors, changes = torch.zeros(2, len(jobs), dtype=torch.float64).unbind()
    for place, ((number, variant), row) in enumerate(zip(jobs, logits, strict=True)):
        ids, other = questions[number].ids, questions[1 - number].ids
        expected = (
            _at_sources(bench.model, ids, variant) if at_source else _everywhere(bench.model, kind, ids, other, variant)
        )
        found = row.to(expected.device, expected.dtype).log_softmax(-1)
        errors[place] = float((found - expected).norm())
        changes[place] = float((expected - plain[number]).norm())
    whole = torch.tensor([len(variant) > 2 and not at_source for _, variant in jobs])
    shares = errors / torch.where(whole, changes, changes[~whole].max())
    return Exact(worst(shares.tolist()), prompts=len(questions), facts=len(questions))


@contextmanager
def _dropped(model: Model, layer: int | None) -> Iterator[None]:
    """Let no gradient pass through what a layer writes, only past it."""

    def detach(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        before, after = inputs[0], first_tensor(output)
        past = before + (after - before).detach()
        return (past, *output[1:]) if isinstance(output, tuple) else past

    if layer is None:
        yield
        return
    with TURN, ExitStack() as ends:
        ends.callback(model.anatomy.blocks(model.network._module)[layer].register_forward_hook(detach).remove)
        yield


def _slopes(
    model: Model, question: Question, sites: Sequence[_Site], *, dropped: int | None = None, point: float = 1.0
) -> dict[_Site, Tensor]:
    """Return d log p(w) at what enters output projections, multiplied by a point of the path, (position, neurons)."""
    entered: dict[_Site, Tensor] = {}

    def keep(tensor: Tensor, site: _Site) -> Tensor:
        entered[site] = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        return entered[site] * point

    with torch.enable_grad(), _dropped(model, dropped):
        log_probs = _log_probs(model, question.ids, {site: partial(keep, site=site) for site in sites})
        found = torch.autograd.grad(log_probs[question.answer_id], [entered[site] for site in sites], allow_unused=True)
    # At the scaled input, not at what is scaled.
    return {
        site: torch.zeros_like(entered[site]) if slope is None else slope.double() / point
        for site, slope in zip(sites, found, strict=True)
    }


def _effects(model: Model, question: Question, method: str, unit: SublayerKind) -> Tensor:
    """Return what a method's backward passes say of every neuron of a prompt, by hand, (L, N) or (L, H, dh, P)."""
    anatomy, sites = model.anatomy, [site for site in _sites(model) if site[1] == unit]
    seen = read_activations(model, pad([question.ids], device=model.device), positions="all")
    values, pattern = seen.values[:, 0].double(), seen.pattern[:, 0].double()

    def times_coefficients(slopes: Mapping[_Site, Tensor]) -> Tensor:
        stacked = torch.stack([slopes[site] for site in sites]).double()
        if unit == "ffn":
            return (stacked * seen.coefficients[:, 0].double()).sum(1)
        by_head = stacked.unflatten(-1, (anatomy.heads, anatomy.head_dim))
        return torch.einsum("lhqp,lphd,lqhd->lhdp", pattern, values, by_head)

    whole = times_coefficients(_slopes(model, question, sites))
    if method == "gradient_x_activation" or (method == "atp_star" and anatomy.layers == 1):
        return whole
    if method == "atp_star":
        parts = [times_coefficients(_slopes(model, question, sites, dropped=layer)) for layer in range(anatomy.layers)]
        return whole.sign() * torch.stack(parts).abs().sum(0) / (anatomy.layers - 1)
    points = [(step + 0.5) / _STEPS for step in range(_STEPS)]
    # One sublayer at a time: the others stay as the model makes them.
    paths = [
        {site: slope for each in sites for site, slope in _slopes(model, question, [each], point=point).items()}
        for point in points
    ]
    return torch.stack([times_coefficients(path) for path in paths]).mean(0)


def difference_of_scores(bench: Workbench, method: str, *, k: int) -> Exact:
    """Measure how far the top k scores by a method of :data:`BACKWARD`, and their order, are from gradients by hand.

    Returns:
        The largest difference of the scores of a unit as a share of them, L2 norms.
    """
    prompts, questions = _prompts(bench)
    errors = []
    units: tuple[SublayerKind, SublayerKind] = ("ffn", "attention")
    for unit in units if prompts else ():
        rankings = attribute(bench.model, prompts, unit=unit, method=method, k=k, steps=_STEPS)
        for question, ranking in zip(questions, rankings, strict=True):
            effects = _effects(bench.model, question, method, unit)
            own = torch.stack([effects[_place(neuron)] for neuron in ranking.neurons])
            best = effects.flatten().topk(k).values
            scores = ranking.scores.to(own.device)
            errors += [float((scores - expected).norm() / best.norm()) for expected in (own, best)]
    return Exact(worst(errors), prompts=len(prompts), facts=len(prompts))


def _place(neuron: Any) -> tuple[int, ...]:
    if isinstance(neuron, FFNNeuron):
        return neuron.layer, neuron.index
    return neuron.layer, neuron.head, neuron.dim, neuron.position
