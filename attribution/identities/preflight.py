"""Preflight: the identities that every number of this package rests on, measured on a loaded model.

A wrong anatomy does not crash, it gives plausible numbers; so does a hook that never fires. :func:`preflight` holds
what is read from a model, what is computed from its weights and what an edit does against each other, in float64, on a
few tokens. The only error left is the model's own rounding, which is bounded in one of three ways:

*exact*. The same arithmetic on the same numbers: bit for bit.

*bound*. What rounding can do to a sum, :func:`attribution.engine.decomposition.rounding` times the sum of its terms'
absolute values, carried through the norms and nonlinearities that follow.

*response*. Where later layers amplify rounding, no bound is tight. The model is run four more times with random signs
of relative changes of every block's input and both projections' inputs, each four times as large as rounding makes a
sum of n terms err in quadratic mean (4 * sqrt(n) * eps of the accumulation + 2 eps of what is stored); the farthest
that this moves a tensor, as an L2 norm, is how far two runs of the same arithmetic may differ in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from attribution.engine.decomposition import IDENTITIES, decomposition_errors, rounding, worst
from attribution.engine.importance import log_prob_increase
from attribution.engine.projection import before_softmax, largest_row_norm, model_logits
from attribution.engine.questions import ids_of, prompt_list
from attribution.engine.trace import Activations, Edits, read_activations, rerun
from attribution.errors import AttributionError, PreflightError
from attribution.identities.edits import EDITS, Trial, differing, edit_errors, logits_of, ratio, zeroing_errors
from attribution.identities.texts import broken_continuations, confused_texts, wrong_beginnings
from attribution.models.anatomy import Anatomy, resolve
from attribution.models.hub import cause_of
from attribution.models.model import Model
from attribution.models.norms import Norm, frozen_scale, normalise
from attribution.models.running import TURN, hooked
from attribution.models.tokenizer import tokens_of
from attribution.prompts.knowledge import Prompt
from attribution.prompts.tokens import TokenBatch, pad

__all__ = ["CHECKS", "Check", "preflight"]

_SENTENCE = "A small cat sat in a garden."
# Tokens of that sentence that are run: enough for attention to have something to choose from.
_LENGTH = 8
# Tokens in the rows that are edited, of which there is one for each layer; the second length leaves padding.
_SHORT, _SHORTER = 3, 2
# How many times the model is shaken, and how hard, in standard deviations of what rounding does to a sum. A direction
# that later layers amplify may miss one draw.
_DRAWS, _DEVIATIONS = 4, 4

_BOUND, _RESPONSE = "times the rounding bound", "times the tolerance"
_ANATOMY = "correct the record of its family in attribution/models/families.py, or use a model of another family"
_TRACING = "use the versions of nnsight and transformers that this package was tested with"


@dataclass(frozen=True)
class _Identity:
    """What a check says.

    Attributes:
        sentence: The identity in words.
        unit: What the measured value counts.
        bound: The largest value with which it holds.
        derivation: Where the bound comes from.
        remedy: What to do when it does not hold.
    """

    sentence: str
    unit: str
    bound: float
    derivation: str
    remedy: str


def _exact(sentence: str, unit: str, remedy: str) -> _Identity:
    return _Identity(sentence, unit, 0, "the same arithmetic on the same numbers agrees bit for bit", remedy)


def _within_bound(sentence: str, terms: str, remedy: str = _ANATOMY) -> _Identity:
    derivation = f"n * eps * (sum of |terms|) for {terms}, and one eps for each result that is stored on the way"
    return _Identity(sentence, _BOUND, 1, derivation, remedy)


def _within_response(sentence: str, remedy: str, otherwise: str = "") -> _Identity:
    derivation = (
        "how far the same model moves when every block's and projection's input is changed by random signs of "
        f"4 * sqrt(n) * eps, n its width{otherwise}"
    )
    return _Identity(sentence, _RESPONSE, 1, derivation, remedy)


def _seen(sentence: str) -> _Identity:
    derivation = (
        "without an edit the same run gives the same logits bit for bit; layers whose value vectors are all zero are "
        "not counted unless all layers' are"
    )
    remedy = f"{_TRACING}, and a model and dtype in which neurons make a difference"
    return _Identity(sentence, "edits that do not", 0, derivation, remedy)


def _edits(name: str, edited: str, output: str, terms: str) -> dict[str, _Identity]:
    return {
        f"{name}_edits_hit": _exact(
            f"in every layer, replacing {edited} replaces them, and nothing else at or before their place",
            "numbers that are not as they should be",
            _TRACING,
        ),
        f"{name}_edits_add": _within_bound(
            f"in every layer, replacing {edited} moves the {output} by exactly what they contribute", terms, _TRACING
        ),
        f"{name}_edits_reach": _seen(f"in every layer, replacing {edited} changes the logits"),
    }


_ATTENTION_TERMS = "n = heads * head_dim + positions (+ width where a norm follows)"
_FFN_TERMS = "n = FFN neurons + 1 (+ width where a norm follows)"
_NORMED_TERMS = "n = 2 * width behind a norm"

CHECKS: Mapping[str, _Identity] = {
    "tokens": _exact(
        "different texts are different tokens, and the model has an embedding of each",
        "texts that are not",
        "put the tokenizer that the model was trained with beside its weights",
    ),
    "continuations": _exact(
        "a prompt with its answer is the prompt's tokens and then the answer's, none of them special, for every "
        "bundled prompt",
        "prompts for which it is not",
        "use a tokenizer that reads a text from left to right, without marks at its end",
    ),
    "beginning": _exact(
        "a text begins with BOS, once, where the tokenizer's settings say so (add_bos_token), and without it where "
        "they deny it",
        "texts that do not",
        "repair the tokenizer (its post-processor, or add_bos_token in tokenizer_config.json): many models are others "
        "without BOS",
    ),
    "null_intervention": _exact(
        "a trace that edits nothing, a trace whose masks are empty and the plain module give the same logits",
        "logits that differ",
        _TRACING,
    ),
    "finite": _Identity(
        "every activation and logit is a finite number",
        "numbers that are not",
        0,
        "none may be",
        "load the model with another dtype: float16 may overflow, and float64 may mask whole rows of padding",
    ),
    "layers": _within_bound(f"{IDENTITIES['layers']}, at every layer and before the final norm", "n = 2 * layers"),
    "heads": _within_bound(IDENTITIES["heads"], _ATTENTION_TERMS),
    "attention_neurons": _within_bound(IDENTITIES["attention_neurons"], _ATTENTION_TERMS),
    "ffn_neurons": _within_bound(IDENTITIES["ffn_neurons"], _FFN_TERMS),
    "all_neurons": _within_bound(IDENTITIES["all_neurons"], "the sums of both sublayers and of 2 * layers"),
    "logits": _within_bound(
        "frozen-norm projection of the final state (+ norm bias, unembedding bias, soft cap, scale) = logits, at every "
        "position and as a rerun has them at the last one",
        _NORMED_TERMS,
    ),
    "layer_importances": _within_bound(
        "layer importances add up to log p(w|final state) - log p(w|embedding)",
        "three rounded sums per layer, each through the gradient of log p, at most twice the longest row of the "
        "unembedding over the frozen scale",
    ),
    "ffn_subkeys": _within_bound("FFN subkeys applied to the normed stream = FFN coefficients", _NORMED_TERMS),
    "value_subkeys": _within_bound("value subkeys applied to the normed stream = attention values", _NORMED_TERMS),
    "batched": _within_response(
        "a prompt in a right-padded batch gives the activations and logits that it gives alone",
        "leave the padding on the right, and the tokenizer's own out",
    ),
    "zeroing_reaches": _seen(
        "in the first, the middle and the last layer, zeroing the strongest FFN neurons or attention dimensions "
        "changes the logits"
    ),
    "zeroed_parameters": _within_response(
        "zeroing neurons' activations = zeroing their value vectors",
        _ANATOMY,
        ", or a quarter of the smallest effect of zeroing if that is less",
    ),
    "last_layer_ffn": _within_bound(
        "ablating last-layer FFN neurons moves the final state by exactly minus their contribution", _FFN_TERMS
    ),
    "last_layer_attention": _within_bound(
        "ablating last-layer attention dimensions moves the attention output, and behind a parallel block the final "
        "state, by exactly minus their contribution",
        _ATTENTION_TERMS,
    ),
    **_edits("coefficient", "FFN coefficients", "FFN output", _FFN_TERMS),
    **_edits("mixed_value", "mixed attention values", "attention output", _ATTENTION_TERMS),
    **_edits("source", "attention neurons at one source position", "attention output", _ATTENTION_TERMS),
}
"""Every check by name, in the order in which they are made."""


@dataclass(frozen=True)
class Check:
    """One identity, measured on one model.

    Attributes:
        name: Its name.
        sentence: What must hold.
        value: What was measured, in the unit of the bound; 0 or more.
        bound: The identity holds while the value is at most this: 1 for values in units of what rounding can do, 0
            for counts.
    """

    name: str
    sentence: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the value is within the bound; NaN is not."""
        return self.value <= self.bound

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "BROKEN"
        return f"{verdict}: {self.name}: {self.sentence} ({self.value:.3g}, at most {self.bound:g})"


def preflight(model: Model, prompts: str | Prompt | Sequence[str | Prompt] | None = None) -> list[Check]:
    """Check the identities that attribution rests on; run it once per loaded model before anything is believed.

    The weights, the model's state and torch's random numbers are left as they are. Costs about sixteen forward
    passes over a few tokens each.

    Args:
        model: A loaded model.
        prompts: What to run; the beginning of a fixed sentence by default. The first tokens of the longest are run
            as well, so that there are several lengths and something short to edit. Layer importances are added up for
            the first.

    Returns:
        One check for each name of ``CHECKS``, all of them within their bounds.

    Raises:
        PreflightError: On the first identity that does not hold: which, what was measured, the bound and how it is
            derived, what to do.
        BadInputError: If a prompt cannot be used.
    """
    checks = []
    for name, value in _measure(model, _rows(model, prompts)):
        identity = CHECKS[name]
        check = Check(name, identity.sentence, value, identity.bound)
        if not check.holds:
            raise PreflightError(
                f"model {model.name!r} breaks the identity {name!r} ({identity.sentence}): measured {value:.4g} "
                f"{identity.unit}, where at most {identity.bound:g} is allowed ({identity.derivation}); "
                f"{identity.remedy}."
            )
        checks.append(check)
    return checks


def _rows(model: Model, prompts: str | Prompt | Sequence[str | Prompt] | None) -> list[list[int]]:
    """Return the tokens of the prompts, then two short beginnings of the longest."""
    context = model.anatomy.context
    if prompts is None:
        # Any tokenizer makes something of the sentence; what is too short repeats.
        sentence = tokens_of(model.tokenizer, _SENTENCE)
        rows = [(sentence * _LENGTH)[: min(_LENGTH, context or _LENGTH)]]
    else:
        texts = [item.text if isinstance(item, Prompt) else item for item in prompt_list(prompts)]
        rows = [ids_of(model, text) for text in texts]
    beginning = (max(rows, key=len) * _SHORT)[:_SHORT]
    return [*rows, beginning, beginning[:_SHORTER]]


def _measure(model: Model, rows: Sequence[Sequence[int]]) -> Iterator[tuple[str, float]]:
    """Yield each check's value as it is asked for: nothing is measured behind a broken identity."""
    anatomy = model.anatomy
    batch = pad(rows, device=model.device)
    yield "tokens", confused_texts(model)
    yield "continuations", broken_continuations(model)
    yield "beginning", wrong_beginnings(model)
    # 1. Tracing changes nothing, and what it reads are numbers.
    clean = _first_run(model, batch)
    yield "null_intervention", _null_intervention(model, batch, clean)
    yield "finite", _not_finite(clean, rows)
    # 2. What is read adds up: to the residual stream, to the logits, to log p.
    yield from decomposition_errors(clean, anatomy, batch.mask).items()
    yield "logits", _logit_error(clean, rerun(model, batch), anatomy, batch)
    yield "layer_importances", _telescoping_error(clean, anatomy, batch)
    # 3. The weights give what is read.
    yield "ffn_subkeys", _ffn_subkey_error(clean, anatomy, batch)
    yield "value_subkeys", _value_subkey_error(clean, anatomy, batch)
    # 4. Padding and company make no more difference than rounding does: how much that is, shaking the model tells.
    with _shaken(model):
        repeated = torch.arange(len(rows), device=model.device).repeat(_DRAWS)
        shaken = read_activations(model, batch.repeat_rows(repeated), positions="all")
    yield "batched", _batching_error(model, rows, clean, shaken)
    moved = logits_of(shaken).unflatten(0, (_DRAWS, len(rows))) - logits_of(clean)
    # 5. Edits do what they say, in every layer, and nothing else.
    trial = Trial.of(model, rows[-2:], moved[:, -2:])
    yield from zeroing_errors(trial)
    for name in EDITS:
        yield from edit_errors(trial, name)


def _first_run(model: Model, batch: TokenBatch) -> Activations:
    """Return what a run says of every position.

    Raises:
        PreflightError: If the model does not run at all: transformers checks some settings only then.
    """
    try:
        return read_activations(model, batch, positions="all")
    except (AttributionError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # Whatever the model's own code, transformers or nnsight raise.
        raise PreflightError(
            f"model {model.name!r} does not run ({type(error).__name__}: {cause_of(error)}); correct its config.json, "
            "which has settings that do not belong together, or use another model."
        ) from error


def _null_intervention(model: Model, batch: TokenBatch, clean: Activations) -> float:
    layers = range(model.anatomy.layers)
    zero = torch.zeros((), device=model.device)
    nothing = torch.zeros((), dtype=torch.bool, device=model.device)
    flat, deep = (nothing.expand(1, 1, 1), zero), (nothing.expand(1, 1, 1, 1), zero)
    empty = Edits(dict.fromkeys(layers, flat), dict.fromkeys(layers, flat), dict.fromkeys(layers, deep))
    module, rows = model.network._module, torch.arange(len(batch.last), device=model.device)

    def narrow(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][rows, batch.last][:, None], *inputs[1:])

    unembedding = resolve(module, model.anatomy.family.unembedding)
    with TURN, torch.no_grad():
        plain = module(**batch.inputs()).logits
        # Products of other shapes are rounded otherwise, so the plain module unembeds what a rerun does.
        with hooked([(unembedding, narrow)]):
            last = module(**batch.inputs()).logits[:, 0]
    return (
        differing(logits_of(clean), plain)
        + differing(rerun(model, batch, Edits()), last)
        + differing(rerun(model, batch, empty), last)
    )


def _not_finite(clean: Activations, rows: Sequence[Sequence[int]]) -> int:
    runs = [(clean, row) for row in range(len(rows))]
    return sum(int((~_real(rows, each.name, runs).isfinite()).sum()) for each in fields(Activations))


def _normed(stream: Tensor, norm: Norm | None) -> Tensor:
    """Return what a norm's output is the sum of, in absolute values, as rounding of the norm spreads: (..., width).

    Subtracting the mean and dividing by a scale that is computed from the difference loses more the larger the mean is
    beside the scale.
    """
    if norm is None:
        return stream.abs()
    size = stream.abs()
    if norm.centred:
        size = size + size.mean(-1, keepdim=True)
    size = size / frozen_scale(stream, norm)[..., None]
    size = size * size.square().mean(-1, keepdim=True).sqrt().clamp(min=1)
    if norm.weight is not None:
        size = size * norm.weight.double().abs()
    return size if norm.bias is None else size + norm.bias.double().abs()


def _logit_error(clean: Activations, last: Tensor, anatomy: Anatomy, batch: TokenBatch) -> float:
    real, readout = batch.mask.bool(), anatomy.readout
    rows = torch.arange(len(batch.last), device=batch.last.device)
    final = torch.cat([clean.resid_final[real], clean.resid_final[rows, batch.last]]).double()
    logits = torch.cat([logits_of(clean)[real], last])
    projected = model_logits(final, frozen_scale(final, readout.norm), readout)
    # By Cauchy-Schwarz no sum of |terms| exceeds this.
    longest = torch.linalg.vector_norm(readout.unembedding, dim=-1, dtype=torch.float64)
    sizes = _normed(final, readout.norm).norm(dim=-1, keepdim=True) * longest
    if readout.bias is not None:
        sizes = sizes + readout.bias.double().abs()
    bounds = rounding(clean.resid_pre.dtype, 2 * anatomy.width, normed=True) * abs(readout.logit_scale) * sizes
    return ratio((projected - logits.double()).abs(), bounds)


def _telescoping_error(clean: Activations, anatomy: Anatomy, batch: TokenBatch) -> float:
    """Return the error of the first prompt's sum, at its last token, for the token that the model puts first."""
    readout, last = anatomy.readout, int(batch.last[0])
    pre, attention, mid, ffn, final = (
        tensor[..., 0, last, :].double()
        for tensor in (
            clean.resid_pre,
            clean.attention_output,
            clean.resid_mid,
            clean.ffn_output,
            clean.resid_final[None],
        )
    )
    scale = frozen_scale(final[0], readout.norm)
    answer = int(logits_of(clean)[0, last].argmax())
    pieces = torch.cat([pre, attention, mid, ffn, final])
    projected = before_softmax(pieces, scale, readout)
    at_pre, of_attention, at_mid, of_ffn, at_final = projected.split(
        [len(piece) for piece in (pre, pre, pre, pre, final)]
    )
    importances = torch.stack(
        [
            log_prob_increase(at_pre.log_softmax(-1), of_attention, answer),
            log_prob_increase(at_mid.log_softmax(-1), of_ffn, answer),
        ]
    )
    whole = at_final[0].log_softmax(-1)[answer] - at_pre[0].log_softmax(-1)[answer]
    # A state that is off by d has its log p off by at most 2 max_t |bs(d)_t|.
    steepest = 2 * largest_row_norm(readout) / scale
    off = rounding(clean.resid_pre.dtype, 0, stored=3) * (pre.abs() + attention.abs() + ffn.abs())
    own = torch.finfo(torch.float64).eps * sum(readout.unembedding.shape) * (1 + projected.abs().max()) * len(pieces)
    return ratio((importances.sum() - whole).abs(), steepest * off.norm(dim=-1).sum() + own)


def _project(
    stream: Tensor, norm: Norm | None, rows: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a projection of the normed stream, and how far rounding can move the model's own."""
    weight = rows.double().T
    projected, sizes = normalise(stream, norm) @ weight, _normed(stream, norm) @ weight.abs()
    if bias is not None:
        projected, sizes = projected + bias.double(), sizes + bias.double().abs()
    return projected, rounding(dtype, 2 * stream.shape[-1] + 1, normed=True) * sizes


def _ffn_subkey_error(clean: Activations, anatomy: Anatomy, batch: TokenBatch) -> float:
    real, dtype = batch.mask.bool(), clean.coefficients.dtype
    stored = rounding(dtype, 0, normed=True)
    read = clean.resid_pre if anatomy.parallel else clean.resid_mid
    errors = []
    for layer, subkeys in enumerate(anatomy.subkeys):
        stream, norm = read[layer][real].double(), anatomy.sublayer(layer, "ffn").input_norm
        up, up_error = _project(stream, norm, subkeys.up, subkeys.up_bias, dtype)
        entered, error = up, up_error
        if subkeys.gate is not None:
            entered, error = _project(stream, norm, subkeys.gate, subkeys.gate_bias, dtype)
        coefficients = subkeys.activation(entered)
        moved = [(subkeys.activation(entered + shift) - coefficients).abs() for shift in (error, -error)]
        # No activation in use exceeds what enters it, but it may be a small difference of numbers as large as that.
        error = torch.maximum(*moved) + stored * entered.abs()
        if subkeys.gate is not None:
            error = error * (up.abs() + up_error) + coefficients.abs() * up_error
            coefficients = coefficients * up
        error = error + stored * coefficients.abs()
        errors.append(ratio((coefficients - clean.coefficients[layer][real].double()).abs(), error))
    return worst(errors)


def _value_subkey_error(clean: Activations, anatomy: Anatomy, batch: TokenBatch) -> float:
    real, clip = batch.mask.bool(), anatomy.value_clip
    errors = []
    for layer in range(anatomy.layers):
        norm = anatomy.sublayer(layer, "attention").input_norm
        rows, bias = anatomy.value_subkeys(layer)
        values, error = _project(clean.resid_pre[layer][real].double(), norm, rows, bias, clean.values.dtype)
        if clip is not None:
            values = values.clamp(-clip, clip)
        traced = clean.values[layer][real].flatten(1)
        errors.append(ratio((values - traced.double()).abs(), error))
    return worst(errors)


def _shaken(model: Model) -> AbstractContextManager[None]:
    """Change every block's input and both projections' inputs at random, as far as rounding may."""
    anatomy, family = model.anatomy, model.anatomy.family
    # Its own numbers, always the same: the verdict does not depend on a seed, and no one else's numbers change.
    generator = torch.Generator().manual_seed(0)

    def shake(terms: int) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            entered, *others = inputs
            size = rounding(entered.dtype, _DEVIATIONS * math.isqrt(terms), stored=2, normed=True)
            signs = torch.randint(2, entered.shape, generator=generator).to(entered.device) * 2 - 1
            return ((entered.double() * (1 + size * signs)).to(entered.dtype), *others)

        return hook

    return hooked(
        (part, shake(terms))
        for block in anatomy.blocks(model.network._module)
        for part, terms in (
            (block, anatomy.width),
            (resolve(block, family.attention_out), anatomy.heads * anatomy.head_dim),
            (resolve(block, family.ffn_out), anatomy.ffn_neurons),
        )
    )


def _batching_error(model: Model, rows: Sequence[Sequence[int]], clean: Activations, shaken: Activations) -> float:
    """Return the error of each activation over all rows and layers: a norm of few numbers may be small by chance."""
    alone = [read_activations(model, pad([ids], device=model.device), positions="all") for ids in rows]
    errors = []
    for name in (each.name for each in fields(Activations)):
        batched = _real(rows, name, [(clean, row) for row in range(len(rows))])
        single = _real(rows, name, [(run, 0) for run in alone])
        draws = [range(first, first + len(rows)) for first in range(0, _DRAWS * len(rows), len(rows))]
        moved = [(_real(rows, name, [(shaken, row) for row in draw]) - batched).norm() for draw in draws]
        errors.append(ratio((batched - single).norm(), torch.stack(moved).max()))
    return worst(errors)


def _real(rows: Sequence[Sequence[int]], name: str, runs: Sequence[tuple[Activations, int]]) -> Tensor:
    """Return one activation of all rows without padding, float64 and flat, each from a row of a run."""
    parts = []
    for ids, (run, row) in zip(rows, runs, strict=True):
        activation: Tensor = getattr(run, name)
        of_row = activation[row, None] if name in ("resid_final", "logits") else activation[:, row]
        length = len(ids)
        parts.append(of_row[:, :, :length, :length] if name == "pattern" else of_row[:, :length])
    return torch.cat([part.double().flatten() for part in parts])
