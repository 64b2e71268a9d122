"""The residual decomposition: what the residual stream is the sum of, down to single neurons plus biases.

Every identity is checked in float64 from what one trace saw, so the only error left is the model's own rounding; errors
are given in units of its bound (:func:`rounding`), so 1 is the most that rounding alone can do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from attribution.engine.trace import Activations
from attribution.models.anatomy import Anatomy

__all__ = ["IDENTITIES", "decomposition_errors", "mix", "rounding", "worst"]

IDENTITIES = {
    "layers": "embedding + attention outputs + FFN outputs = residual stream",
    "heads": "heads + bias = attention output",
    "attention_neurons": "attention neurons + bias = attention output",
    "ffn_neurons": "FFN neurons + bias = FFN output",
    "all_neurons": "embedding + attention neurons + FFN neurons + biases = residual stream",
}
"""Name of each identity and what it says."""

# Intermediate results that are rounded when they are stored between a sublayer's terms and what enters the residual
# stream: the mixed value or product, the projection; in the norm that may follow its scale, weight and output.
_STORED = 8
_SINGLE = torch.finfo(torch.float32).eps


def worst(errors: Iterable[float]) -> float:
    """Return the largest error, 0 for none; NaN if any is, which ``max`` would forget."""
    found = list(errors)
    return math.nan if any(math.isnan(error) for error in found) else max(found, default=0.0)


def rounding(dtype: torch.dtype, terms: int, *, stored: int = _STORED, normed: bool = False) -> float:
    """Return how far rounding can move a sum, relative to the sum of its terms' absolute values.

    A sum of n terms that is accumulated with machine epsilon eps errs by at most n * eps * (sum of |terms|), and every
    result that is stored on the way adds one eps of its own type. Products in half precision accumulate in float32.

    Args:
        dtype: Type of the weights and of what is stored.
        terms: n.
        stored: Results that are stored on the way.
        normed: Whether a norm lies on the way; in many families it computes in float32 even if the weights are float64.

    Returns:
        ``terms * eps(accumulation) + stored * eps(storage)``.
    """
    own = torch.finfo(dtype).eps
    return terms * (_SINGLE if normed else min(own, _SINGLE)) + stored * (max(own, _SINGLE) if normed else own)


def mix(pattern: Tensor, values: Tensor) -> Tensor:
    """Return what the output projection reads: each head's values, weighted by its attention pattern.

    Args:
        pattern: alpha, (batch, head, query position, source position).
        values: val, (batch, source position, head, head_dim).

    Returns:
        (batch, query position, heads * head_dim).
    """
    return torch.einsum("bhqp,bphd->bqhd", pattern, values).flatten(-2)


def _bias(bias: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if bias is None else bias.double().expand_as(like)


def _factor(post_scale: Tensor, post_weight: Tensor | None) -> Tensor:
    """What a vector is multiplied by between a projection and the residual stream, (batch, position, width or 1)."""
    return post_scale.double()[..., None] * (1 if post_weight is None else post_weight.double())


def decomposition_errors(activations: Activations, anatomy: Anatomy, mask: Tensor) -> dict[str, float]:
    """Return each identity's worst error over layers and real positions.

    Neurons and biases are taken as they enter the residual stream: ``coefficient * post_scale * post_weight * vector``
    and ``post_scale * post_weight * bias``, see :class:`~attribution.models.anatomy.Anatomy`.

    Args:
        activations: Read with ``positions="all"``.
        anatomy: The model's anatomy.
        mask: (batch, position), 1 at real tokens.

    Returns:
        Identity to its largest error in units of its rounding bound; above 1 it does not hold.
    """
    real = mask.bool()
    dtype = activations.resid_pre.dtype
    errors: dict[str, list[float]] = {name: [] for name in IDENTITIES}

    def check(name: str, parts: Tensor, magnitude: Tensor, whole: Tensor, relative: float) -> None:
        bound = relative * magnitude + torch.finfo(torch.float64).tiny
        errors[name].append(float(((parts - whole).abs() / bound)[real].max()))

    stream = activations.resid_pre[0].double()
    by_layers, layers_size = stream, stream.abs()
    by_neurons, neurons_size = stream, stream.abs()
    # Each block adds twice to the stream, and each sum is stored.
    additions = 2 * anatomy.layers
    for layer in range(anatomy.layers):
        attention, ffn = activations.attention_output[layer].double(), activations.ffn_output[layer].double()
        own = anatomy.sublayer(layer, "attention")
        vectors = own.vectors.double()
        pattern, values = activations.pattern[layer].double(), activations.values[layer].double()
        per_head = vectors.unflatten(0, (anatomy.heads, anatomy.head_dim))
        # The norm that may follow averages over the width.
        attention_normed = own.post_norm is not None
        attention_terms = anatomy.heads * anatomy.head_dim + mask.shape[1] + attention_normed * anatomy.width
        attention_rounding = rounding(dtype, attention_terms, normed=attention_normed)
        factor = _factor(activations.attention_post_scale[layer], own.post_weight)
        bias = factor * _bias(own.bias, attention)
        # A head's output, sum over source positions p and dimensions d of alpha_p val_p[d] o[d]: once through its
        # mixed value, once through each source position's vector.
        neurons = factor * (mix(pattern, values) @ vectors)
        attention_size = factor.abs() * (mix(pattern, values.abs()) @ vectors.abs()) + bias.abs()
        heads = factor * torch.einsum("bhqp,bphw->bqw", pattern, torch.einsum("bphd,hdw->bphw", values, per_head))
        check("heads", heads + bias, attention_size, attention, attention_rounding)
        check("attention_neurons", neurons + bias, attention_size, attention, attention_rounding)
        own = anatomy.sublayer(layer, "ffn")
        subvalues = own.vectors.double()
        ffn_normed = own.post_norm is not None
        ffn_terms = anatomy.ffn_neurons + 1 + ffn_normed * anatomy.width
        ffn_rounding = rounding(dtype, ffn_terms, normed=ffn_normed)
        factor = _factor(activations.ffn_post_scale[layer], own.post_weight)
        ffn_bias = factor * _bias(own.bias, ffn)
        coefficients = activations.coefficients[layer].double()
        ffn_neurons = factor * (coefficients @ subvalues)
        ffn_size = factor.abs() * (coefficients.abs() @ subvalues.abs()) + ffn_bias.abs()
        check("ffn_neurons", ffn_neurons + ffn_bias, ffn_size, ffn, ffn_rounding)
        by_layers, layers_size = by_layers + attention + ffn, layers_size + attention.abs() + ffn.abs()
        after = activations.resid_post[layer].double()
        check("layers", by_layers, layers_size, after, rounding(dtype, 0, stored=additions))
        by_neurons = by_neurons + neurons + bias + ffn_neurons + ffn_bias
        neurons_size = neurons_size + attention_size + ffn_size
        either = attention_rounding + ffn_rounding + rounding(dtype, 0, stored=additions)
        check("all_neurons", by_neurons, neurons_size, after, either)
    # What enters the final norm must be what the last block wrote.
    check("layers", by_layers, layers_size, activations.resid_final.double(), rounding(dtype, 0, stored=additions))
    return {name: worst(found) for name, found in errors.items()}
