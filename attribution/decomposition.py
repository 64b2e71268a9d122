"""The residual decomposition: what the residual stream is the sum of, down to single neurons plus biases.

Every identity is checked in float64 from what one trace saw, so the only error left is the model's own rounding.
A dot product of n terms computed with machine epsilon eps errs by at most n * eps * (sum of |terms|); errors are
given in units of that bound, so 1 is the most that rounding alone can do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attribution.anatomy import Anatomy
from attribution.trace import Activations

__all__ = ["IDENTITIES", "decomposition_errors"]

IDENTITIES = {
    "layers": "embedding + attention outputs + FFN outputs = residual stream",
    "heads": "heads + bias = attention output",
    "attention_neurons": "attention neurons + bias = attention output",
    "ffn_neurons": "FFN neurons + bias = FFN output",
    "all_neurons": "embedding + attention neurons + FFN neurons + biases = residual stream",
}
"""Name of each identity and what it says."""


def _bias(biases: tuple[Tensor | None, ...], layer: int, like: Tensor) -> Tensor:
    bias = biases[layer]
    return torch.zeros_like(like) if bias is None else bias.double().expand_as(like)


def decomposition_errors(activations: Activations, anatomy: Anatomy, mask: Tensor) -> dict[str, float]:
    """Return each identity's worst error over layers and real positions.

    Args:
        activations: Read with ``positions="all"``.
        anatomy: The model's anatomy.
        mask: (batch, position), 1 at real tokens.

    Returns:
        Identity to its largest error in units of its rounding bound; above 1 it does not hold.
    """
    real = mask.bool()
    eps = torch.finfo(activations.resid_pre.dtype).eps
    attention_terms = anatomy.heads * anatomy.head_dim + mask.shape[1]
    worst = dict.fromkeys(IDENTITIES, 0.0)

    def check(name: str, parts: Tensor, magnitude: Tensor, whole: Tensor, terms: int) -> None:
        bound = terms * eps * magnitude + torch.finfo(torch.float64).tiny
        error = float(((parts - whole).abs() / bound)[real].max())
        # max() forgets a NaN on its right; an error that is not a number must stay one.
        worst[name] = error if error != error else max(worst[name], error)

    stream = activations.resid_pre[0].double()
    by_layers, layers_size = stream, stream.abs()
    by_neurons, neurons_size = stream, stream.abs()
    for layer in range(anatomy.layers):
        attention, ffn = activations.attention_output[layer].double(), activations.ffn_output[layer].double()
        vectors, subvalues = anatomy.value_vectors[layer].double(), anatomy.subvalues[layer].double()
        pattern, values = activations.pattern[layer].double(), activations.values[layer].double()
        per_head = vectors.unflatten(0, (anatomy.heads, anatomy.head_dim))
        bias = _bias(anatomy.attention_bias, layer, attention)
        # A head's output, sum over source positions p and dimensions d of alpha_p val_p[d] o[d]: once through its
        # mixed value, once through each source position's vector.
        mixed = torch.einsum("bhqp,bphd->bqhd", pattern, values)
        mixed_size = torch.einsum("bhqp,bphd->bqhd", pattern, values.abs())
        neurons = mixed.flatten(-2) @ vectors
        attention_size = mixed_size.flatten(-2) @ vectors.abs() + bias.abs()
        heads = torch.einsum("bhqp,bphw->bqw", pattern, torch.einsum("bphd,hdw->bphw", values, per_head))
        check("heads", heads + bias, attention_size, attention, attention_terms)
        check("attention_neurons", neurons + bias, attention_size, attention, attention_terms)
        coefficients = activations.coefficients[layer].double()
        ffn_bias = _bias(anatomy.ffn_bias, layer, ffn)
        ffn_neurons = coefficients @ subvalues
        ffn_size = coefficients.abs() @ subvalues.abs() + ffn_bias.abs()
        check("ffn_neurons", ffn_neurons + ffn_bias, ffn_size, ffn, anatomy.ffn_neurons + 1)
        after = activations.resid_post[layer].double()
        by_layers, layers_size = by_layers + attention + ffn, layers_size + attention.abs() + ffn.abs()
        check("layers", by_layers, layers_size, after, 2 * anatomy.layers)
        by_neurons = by_neurons + neurons + bias + ffn_neurons + ffn_bias
        neurons_size = neurons_size + attention_size + ffn_size
        terms = attention_terms + anatomy.ffn_neurons + 2 * anatomy.layers
        check("all_neurons", by_neurons, neurons_size, after, terms)
    return worst
