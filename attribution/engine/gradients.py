"""What the gradient family of methods says about every neuron of a prompt, read from backward passes.

All of them estimate one quantity: how much the log-probability of the answer, log p(w) of the model's own logits at
the last real token, owes to a neuron; that is, by how much log p(w) falls when the neuron's coefficient goes to zero
at every position. The estimate is always coefficient times a slope, summed over positions. With m the coefficients
of an FFN and z = sum_p alpha_{q,p} val_p the values as mixed by attention, the inputs of the two output projections,

    FFN neuron (l, k)               sum_q m_{q,k} slope_{q,k}
    attention neuron (l, j, d, p)   sum_q alpha_{q,p} val_{p,d} slope_{q,j,d}

over query positions q, so that attention neurons add up over p to the effect of the whole dimension (l, j, d). The
kinds differ in the slope alone:

``gradient``
    d log p / dm: gradient x activation, the first order of ablating (Shrikumar et al. 2016, arXiv 1605.01713;
    Molchanov et al. 2017, arXiv 1611.06440; attribution patching toward zero).
``integrated_gradients``
    The mean of d log p / dm while all coefficients of one sublayer, at every position, grow together from zero to
    what they are (Sundararajan et al. 2017, arXiv 1703.01365; for FFN neurons Dai et al. 2022, arXiv 2104.08696, who
    take p(w), not log p(w), and the coefficients of one position).
    Everything after the sublayer runs as the model runs it. The effects of a sublayer add up to log p(w) minus
    log p(w) with the sublayer's neurons at zero, but for the error of the integral, which falls with the square of
    the number of points once they are close enough together. Where a norm follows the sublayer (Gemma 2 and 3,
    OLMo 2) that is out of reach: what the norm passes on hardly depends on the common size of its input until that
    is almost zero, where no practical number of points falls, and the effects are those of ``gradient`` times one
    constant for all sublayers.
``grad_drop``
    GradDrop of AtP* (Kramár et al. 2024, arXiv 2403.00745). A gradient is a sum over paths, and paths that cancel
    hide a neuron. So one layer after the other is dropped from the backward pass (no gradient passes through what
    its attention and FFN write, only past them), and |gradient x activation| is averaged over the L dropped
    layers, divided by L - 1 because a neuron's own layer leaves it nothing. AtP* asks which nodes matter and keeps
    no sign; here a neuron is wanted that raises the answer, so the average takes the sign of the undropped effect.
    That is our departure, as is taking |.| behind the sum over positions, where one neuron is ablated. The other
    half of AtP*, its correction for queries and keys, concerns nodes that are no neurons here. With one layer there
    is nothing to drop: the effect is that of ``gradient``.
``relevance``
    Relevance instead of the gradient, by the rules of RelP (Jafari et al. 2025, arXiv 2508.21258) and, but for
    attention, AttnLRP (Achtibat et al. 2024, arXiv 2402.05602). Every norm's scale is frozen (LN-rule), the
    attention pattern is frozen, so that relevance flows through values alone (AH-rule of Ali et al. 2022,
    arXiv 2202.07304, where AttnLRP halves), an elementwise function passes on f(z) / z instead of its derivative
    (identity rule), each factor of a gated FFN gets half (half rule), linear maps are as they are. What follows the
    logits, log softmax, is differentiated. Given what is frozen the model is linear, so one pass over the weights
    gives every slope, and no graph is needed.

Passes for L layers, per prompt: ``gradient`` one forward and one backward; ``integrated_gradients`` half of
``steps * L`` forwards and backwards per sublayer kind, because each begins and ends at its sublayer; ``grad_drop`` one
forward and (L + 1) / 2 backwards; ``relevance`` one forward and the cost of one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from attribution.engine.projection import model_logits, pull_back
from attribution.engine.trace import last_logits, read_activations, run_plainly, skip_blocks
from attribution.errors import BadInputError
from attribution.models.anatomy import Anatomy, Subkeys, first_tensor, resolve
from attribution.models.norms import Norm, centre, frozen_scale, normalise
from attribution.models.running import run
from attribution.prompts.tokens import TokenBatch
from attribution.records import SublayerKind

if TYPE_CHECKING:
    from attribution.models.model import Model

__all__ = ["CHUNK_TOKENS", "KINDS", "Effects", "Kind", "read_effects"]

Kind: TypeAlias = Literal["gradient", "integrated_gradients", "grad_drop", "relevance"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Tokens in one pass, padding included. A graph keeps every intermediate result: at GPT-2-small size this many tokens
# take 0.65 GB (0.85 GB for grad_drop) more than their forward pass, measured as peak resident memory.
CHUNK_TOKENS = 512

_FORWARD: tuple[SublayerKind, ...] = ("attention", "ffn")


@dataclass(frozen=True)
class Effects:
    """Estimates of how much log p(w) owes to each neuron, in nats; what was not asked for is ``None``.

    Shapes are for L layers, B prompts, N FFN neurons per layer, H heads and P padded positions. Sources at padding
    are exactly zero.

    Attributes:
        ffn: (L, B, N).
        attention: (L, B, H * head_dim, P), by head, then dimension, and source position.
    """

    ffn: Tensor | None
    attention: Tensor | None


def read_effects(
    model: Model,
    batch: TokenBatch,
    answers: Tensor,
    kind: str,
    *,
    steps: int = 20,
    units: Sequence[SublayerKind] = ("ffn", "attention"),
) -> Effects:
    """Return what one kind of estimate says about every neuron of every prompt of a batch.

    Args:
        model: A loaded model.
        batch: Right-padded tokens.
        answers: w, the token id of each prompt's answer, (batch,).
        kind: One of :data:`KINDS`; the module's docstring defines them.
        steps: Points of the integral of ``integrated_gradients``, the midpoints of as many equal intervals: their
            error falls with the square of the number, that of the intervals' ends with the number itself. Other
            kinds take no notice of it.
        units: Kinds of neurons that are wanted. ``integrated_gradients`` costs half as much for one as for both.

    Returns:
        Detached tensors on the model's device, in float32, or in float64 if the model is.

    Raises:
        BadInputError: If the kind is unknown, ``steps`` is not a positive integer, or the model is spread over devices
            or processes and the kind takes backward passes.
    """
    if kind not in KINDS:
        raise BadInputError(f"kind {kind!r} is not an estimate from a backward pass; use one of {', '.join(KINDS)}.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise BadInputError(f"steps {steps!r} is not a number of points of an integral; use 1 or more, such as 20.")
    assert answers.shape == (len(batch.ids),), f"{tuple(answers.shape)} answers for {len(batch.ids)} prompts"
    assert units, "no unit is wanted"
    if model.anatomy.spread and kind != "relevance":
        raise BadInputError(
            f"kind {kind!r} takes backward passes, and model {model.name!r} is spread over devices or processes; load "
            "it on one device, or use a method without backward passes."
        )
    answers = answers.to(model.device)
    # A gradient mode belongs to a thread, on which the model and what visits it in a trace take turns: it is set around
    # whole passes, whatever the caller has set. Tensors made in inference mode can be part of no graph, but the copies
    # of the batch that are made here can.
    with torch.inference_mode(mode=False), torch.enable_grad():
        if kind == "integrated_gradients":
            found = {unit: _integrated(model, batch, answers, unit, steps) for unit in units}
        else:
            one_pass = {"gradient": _gradient, "grad_drop": _grad_drop, "relevance": _relevance}[kind]
            rows = torch.arange(len(batch.ids), device=model.device)
            chunks = [one_pass(model, batch.repeat_rows(part), answers[part], units) for part in _chunks(rows, batch)]
            found = {unit: torch.cat([chunk[unit] for chunk in chunks], dim=1) for unit in units}
    return Effects(ffn=found.get("ffn"), attention=found.get("attention"))


def _chunks(rows: Tensor, batch: TokenBatch) -> Iterator[Tensor]:
    """Yield row numbers of a batch, as many at a time as one pass may hold; at least one."""
    yield from rows.split(max(1, CHUNK_TOKENS // batch.ids.shape[1]))


def _precise(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is if it is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _log_prob(logits: Tensor, answers: Tensor) -> Tensor:
    """Return log p(w) summed over the rows of a batch: rows do not see each other, so its gradient is each row's."""
    return _precise(logits).log_softmax(-1).gather(-1, answers[:, None]).sum()


@dataclass(frozen=True)
class _Site:
    """The neurons of one sublayer in a pass.

    Attributes:
        layer: Its layer.
        unit: Its kind.
        entered: Input of the output projection, as the model shapes it; a part of the graph.
        effect: From slopes, (B, P, neurons), to effects, without the layer axis.
    """

    layer: int
    unit: SublayerKind
    entered: Tensor
    effect: Callable[[Tensor], Tensor]


def _ffn_effect(coefficients: Tensor, slope: Tensor) -> Tensor:
    """Return m * slope summed over positions, (B, N), from (B, P, N)."""
    return (coefficients * slope).sum(1)


def _attention_effect(pattern: Tensor, values: Tensor, slope: Tensor) -> Tensor:
    """Return alpha * val * slope summed over query positions, (B, H * dh, P).

    Args:
        pattern: alpha, (B, H, Q, P).
        values: val, (B, P, H, dh).
        slope: At the mixed values, (B, Q, H * dh).
    """
    by_value = _to_values(pattern, slope.unflatten(-1, values.shape[-2:]))
    return (by_value * values).permute(0, 2, 3, 1).flatten(1, 2)


def _to_values(pattern: Tensor, slope: Tensor) -> Tensor:
    """Pass slopes at mixed values, (B, Q, H, dh), on to the values that were mixed, (B, P, H, dh)."""
    return torch.einsum("bhqp,bqhd->bphd", pattern.to(slope.dtype), slope)


def _visit_site(
    block: Any, layer: int, unit: SublayerKind, anatomy: Anatomy, batch: TokenBatch, points: Tensor | None = None
) -> _Site:
    """Visit one sublayer inside a trace.

    Args:
        block: Traced block.
        layer: Its layer.
        unit: The sublayer.
        anatomy: Its paths.
        batch: The tokens of the trace.
        points: What the coefficients of each row are multiplied by, (B,); the graph then begins there. The effects
            are of the coefficients as they were.
    """
    family = anatomy.family
    values = None
    if unit == "attention":
        values = _precise(anatomy.split_values(resolve(block, family.value_projection).output).detach())
    projection = resolve(block, family.attention_out if unit == "attention" else family.ffn_out)
    entered = projection.input
    # Some families flatten batch and position before the FFN.
    coefficients = entered.detach().reshape(*batch.ids.shape, -1)
    if points is not None:
        scaled = coefficients * points[:, None, None].to(coefficients.dtype)
        entered = scaled.reshape(entered.shape).requires_grad_()
        projection.input = entered
    if values is None:
        return _Site(layer, unit, entered, partial(_ffn_effect, _precise(coefficients)))
    pattern = resolve(block, family.attention).output[1].detach()
    return _Site(layer, unit, entered, partial(_attention_effect, pattern, values))


def _visit_blocks(
    network: Any, anatomy: Anatomy, batch: TokenBatch, units: Sequence[SublayerKind]
) -> tuple[list[_Site], list[Tensor]]:
    """Visit every block inside a trace; the graph begins at the input of the first, as parameters want no gradient.

    Returns:
        The wanted sublayers in forward order, and the residual stream before each block and after the last.
    """
    sites: list[_Site] = []
    streams: list[Tensor] = []
    blocks = anatomy.blocks(network)
    for layer, block in enumerate(blocks):
        stream = block.input
        if layer == 0:
            stream = stream.detach().requires_grad_()
            block.input = stream
        streams.append(stream)
        sites += [_visit_site(block, layer, unit, anatomy, batch) for unit in _FORWARD if unit in units]
    return sites, [*streams, first_tensor(blocks[-1].output)]


def _effects(sites: Sequence[_Site], slopes: Sequence[Tensor], batch: TokenBatch) -> list[Tensor]:
    """Return each sublayer's effects from slopes as the model shapes them."""
    return [
        site.effect(_precise(slope).reshape(*batch.ids.shape, -1)) for site, slope in zip(sites, slopes, strict=True)
    ]


def _by_unit(sites: Sequence[_Site], effects: Sequence[Tensor]) -> dict[str, Tensor]:
    """Stack effects over layers, per unit."""
    return {
        unit: torch.stack([effect for site, effect in zip(sites, effects, strict=True) if site.unit == unit])
        for unit in {site.unit for site in sites}
    }


def _gradient(model: Model, batch: TokenBatch, answers: Tensor, units: Sequence[SublayerKind]) -> dict[str, Tensor]:
    """Return gradient x activation of each wanted unit."""

    def visit(network: Any, saved: dict[str, Any]) -> None:
        sites, _ = _visit_blocks(network, model.anatomy, batch, units)
        log_prob = _log_prob(last_logits(network, model.anatomy, batch), answers)
        slopes = torch.autograd.grad(log_prob, [site.entered for site in sites])
        saved.update(_by_unit(sites, _effects(sites, slopes, batch)))

    return run(model, batch.inputs(), visit)


def _grad_drop(model: Model, batch: TokenBatch, answers: Tensor, units: Sequence[SublayerKind]) -> dict[str, Tensor]:
    """Return the signed GradDrop average of each wanted unit.

    No layer need be dropped in a pass of its own. With layer d dropped, the slope at the stream after d passes
    unchanged to the stream before it: above d nothing changes, and below d the slopes are those of that stream, led
    on from there. So one graph serves all, and the pass for d covers the layers below d alone.
    """
    layers = model.anatomy.layers
    if layers == 1:
        return _gradient(model, batch, answers, units)

    def visit(network: Any, saved: dict[str, Any]) -> None:
        sites, streams = _visit_blocks(network, model.anatomy, batch, units)
        log_prob = _log_prob(last_logits(network, model.anatomy, batch), answers)
        targets = [site.entered for site in sites] + streams[1:]
        slopes = torch.autograd.grad(log_prob, targets, retain_graph=True)
        undropped = _effects(sites, slopes[: len(sites)], batch)
        after = slopes[len(sites) :]
        # Dropping a layer below the neuron's own, of which there are as many as its number, changes nothing.
        sums = [effect.abs() * site.layer for site, effect in zip(sites, undropped, strict=True)]
        for dropped in range(1, layers):
            below = [site for site in sites if site.layer < dropped]
            entered = [site.entered for site in below]
            slopes = torch.autograd.grad(streams[dropped], entered, after[dropped], retain_graph=True)
            # Sites are in forward order: those below come first.
            for total, effect in zip(sums, _effects(below, slopes, batch), strict=False):
                total += effect.abs()
        signed = [effect.sign() * total / (layers - 1) for effect, total in zip(undropped, sums, strict=True)]
        saved.update(_by_unit(sites, signed))

    return run(model, batch.inputs(), visit)


def _integrated(model: Model, batch: TokenBatch, answers: Tensor, unit: SublayerKind, steps: int) -> Tensor:
    """Return integrated gradients of one unit, with the points of the path as rows of a batch."""
    anatomy = model.anatomy
    prompts, positions = batch.ids.shape
    shape = (anatomy.ffn_neurons,) if unit == "ffn" else (anatomy.heads * anatomy.head_dim, positions)
    dtype = torch.promote_types(anatomy.readout.unembedding.dtype, torch.float32)
    sums = torch.zeros(anatomy.layers, prompts, *shape, dtype=dtype, device=model.device)
    # Below the sublayer that is scaled nothing changes on the path: those blocks are run once.
    outputs = run_plainly(model, batch).outputs
    for layer in range(anatomy.layers):
        for part in _chunks(torch.arange(prompts * steps, device=model.device), batch):
            # Row i of all passes is point i % steps of prompt i // steps.
            rows, points = part // steps, (part % steps + 0.5) / steps
            below = partial(skip_blocks, anatomy=anatomy, outputs=outputs[:layer], rows=rows)
            effect = _integrand(model, batch.repeat_rows(rows), answers[rows], (layer, unit), points, below)
            sums[layer].index_add_(0, rows, effect)
    return sums / steps


def _integrand(
    model: Model,
    batch: TokenBatch,
    answers: Tensor,
    sublayer: tuple[int, SublayerKind],
    points: Tensor,
    skip_below: Callable[..., None],
) -> Tensor:
    """Return one sublayer's coefficients times the slopes where they are scaled by each row's point of the path.

    Args:
        model: A loaded model.
        batch: The prompt of each point.
        answers: Its answer, (points,).
        sublayer: Layer and kind of the sublayer that is scaled.
        points: What its coefficients are multiplied by, (points,).
        skip_below: Stands in for the blocks below it, in the network that is traced.
    """
    layer, unit = sublayer

    def visit(network: Any, saved: dict[str, Any]) -> None:
        skip_below(network, width=batch.ids.shape[1])
        block = model.anatomy.blocks(network)[layer]
        site = _visit_site(block, layer, unit, model.anatomy, batch, points)
        log_prob = _log_prob(last_logits(network, model.anatomy, batch), answers)
        (saved["effect"],) = _effects([site], torch.autograd.grad(log_prob, [site.entered]), batch)

    effect: Tensor = run(model, batch.inputs(), visit)["effect"]
    return effect


def _relevance(model: Model, batch: TokenBatch, answers: Tensor, units: Sequence[SublayerKind]) -> dict[str, Tensor]:
    """Return the relevance of each wanted unit: the slopes of the frozen, linear model, from the last layer down.

    In a parallel block both halves read the stream before it; in the others the FFN reads what attention has
    written to.
    """
    anatomy = model.anatomy
    seen = read_activations(model, batch, positions="all", logits=False)
    slope = _relevance_of_final(model, seen.resid_final, batch, answers)
    found: dict[str, list[Tensor]] = {unit: [] for unit in units}
    for layer in reversed(range(anatomy.layers)):
        resid_pre, resid_mid = _precise(seen.resid_pre[layer]), _precise(seen.resid_mid[layer])
        at_ffn = _to_neurons(
            slope,
            seen.ffn_post_scale[layer],
            anatomy.sublayer(layer, "ffn").post_weight,
            anatomy.sublayer(layer, "ffn").vectors,
        )
        read_by_ffn = resid_pre if anatomy.parallel else resid_mid
        from_ffn = _before_ffn(at_ffn, read_by_ffn, anatomy.sublayer(layer, "ffn").input_norm, anatomy.subkeys[layer])
        after_attention = slope if anatomy.parallel else slope + from_ffn
        at_attention = _to_neurons(
            after_attention,
            seen.attention_post_scale[layer],
            anatomy.sublayer(layer, "attention").post_weight,
            anatomy.sublayer(layer, "attention").vectors,
        )
        pattern, values = seen.pattern[layer], _precise(seen.values[layer])
        from_attention = _before_attention(at_attention, resid_pre, pattern, values, layer, anatomy)
        slope = slope + from_ffn + from_attention
        if "ffn" in found:
            found["ffn"].append(_ffn_effect(_precise(seen.coefficients[layer]), at_ffn))
        if "attention" in found:
            found["attention"].append(_attention_effect(pattern, values, at_attention))
    return {unit: torch.stack(effects[::-1]) for unit, effects in found.items()}


def _passed_on(output: Tensor, entered: Tensor) -> Tensor:
    """Return f(z) / z, the identity rule's slope of an elementwise function; 0 where z is 0 and holds no relevance."""
    return torch.where(entered == 0, torch.zeros_like(output), output / entered)


def _linear(vectors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(
        vectors, weight.to(vectors.dtype), None if bias is None else bias.to(vectors.dtype)
    )


def _relevance_of_final(model: Model, resid_final: Tensor, batch: TokenBatch, answers: Tensor) -> Tensor:
    """Return the slopes of log p(w) at the state before the final norm, zero but at the last token, (B, P, D)."""
    readout = model.anatomy.readout
    rows = torch.arange(len(answers), device=model.device)
    final = _precise(resid_final[rows, batch.last])
    scale = frozen_scale(final, readout.norm)
    uncapped = model_logits(final, scale, replace(readout, softcap=None))
    logits = uncapped if readout.softcap is None else readout.softcap * torch.tanh(uncapped / readout.softcap)
    covector = -logits.softmax(-1)
    covector[rows, answers] += 1
    if readout.softcap is not None:
        covector = covector * _passed_on(logits, uncapped)
    slope = final.new_zeros(resid_final.shape)
    slope[rows, batch.last] = pull_back(covector, scale, readout)
    return slope


def _to_neurons(slope: Tensor, post_scale: Tensor, post_weight: Tensor | None, vectors: Tensor) -> Tensor:
    """Pass slopes at the residual stream, (B, P, D), on to the neurons that write to it, (B, P, neurons)."""
    written = slope * post_scale[..., None].to(slope.dtype)
    if post_weight is not None:
        written = written * post_weight.to(slope.dtype)
    return _linear(written, vectors, None)


def _before_norm(slope: Tensor, entered: Tensor, norm: Norm | None) -> Tensor:
    """Pass slopes at a norm's output on to its input, the scale frozen; centring is linear, and its own transpose."""
    if norm is None:
        return slope
    weighted = slope if norm.weight is None else slope * norm.weight.to(slope.dtype)
    return centre(weighted / frozen_scale(entered, norm)[..., None], norm)


def _before_ffn(slope: Tensor, entered: Tensor, norm: Norm | None, subkeys: Subkeys) -> Tensor:
    """Pass slopes at FFN coefficients, (B, P, N), on to the stream that the FFN reads, (B, P, D)."""
    read = normalise(entered, norm)
    up = _linear(read, subkeys.up, subkeys.up_bias)
    if subkeys.gate is None:
        at_read = (slope * _passed_on(subkeys.activation(up), up)) @ subkeys.up.to(slope.dtype)
    else:
        gate = _linear(read, subkeys.gate, subkeys.gate_bias)
        activated = subkeys.activation(gate)
        half = slope / 2
        at_read = (half * activated) @ subkeys.up.to(slope.dtype)
        at_read = at_read + (half * up * _passed_on(activated, gate)) @ subkeys.gate.to(slope.dtype)
    return _before_norm(at_read, entered, norm)


def _before_attention(
    slope: Tensor, entered: Tensor, pattern: Tensor, values: Tensor, layer: int, anatomy: Anatomy
) -> Tensor:
    """Pass slopes at mixed values, (B, P, H * dh), on to the stream that the attention reads, (B, P, D)."""
    norm = anatomy.sublayer(layer, "attention").input_norm
    weight, bias = anatomy.value_subkeys(layer)
    at_values = _to_values(pattern, slope.unflatten(-1, values.shape[-2:]))
    if anatomy.value_clip is not None:
        unclipped = _linear(normalise(entered, norm), weight, bias).unflatten(-1, values.shape[-2:])
        at_values = at_values * _passed_on(unclipped.clamp(-anatomy.value_clip, anatomy.value_clip), unclipped)
    return _before_norm(at_values.flatten(-2) @ weight.to(slope.dtype), entered, norm)
