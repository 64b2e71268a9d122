"""Before-softmax values: residual vectors seen through the frozen final norm and the unembedding.

One scale s is taken per sentence from the final state and frozen (METHOD: before-softmax values)::

    bs(x) = c W_U [ gamma * (x - mean(x)) / s ]      LayerNorm
    bs(x) = c W_U [ gamma * x / s ]                  RMSNorm

c is the family's factor on the logits, 1 in most. What is not linear or not the vector's own is left out, so that
bs(x + v) = bs(x) + bs(v): the norm's bias, the unembedding's bias, and the soft cap on the logits of some families.
:func:`model_logits` puts them back. An ordinary logit lens re-normalises each vector instead; early layers look
flatter here.

Every function computes in the dtype of the vectors it is given; weights of another dtype are converted piece by
piece, so that no copy of the unembedding is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attribution.models.anatomy import Readout
from attribution.models.norms import centre, frozen_scale

__all__ = [
    "before_softmax",
    "behind_norm",
    "direction_of",
    "frozen_scale",
    "largest_row_norm",
    "model_logits",
    "pull_back",
]

# Rows of the unembedding that are converted at a time; small enough to stay in the processor's cache.
_CHUNK_ROWS = 1024
# Vectors up to which the order of a product's sides matters.
_FEW = 32


def _chunks(unembedding: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the unembedding in pieces of the wanted dtype, with the tokens that each holds."""
    rows = len(unembedding) if unembedding.dtype == dtype else _CHUNK_ROWS
    for start in range(0, len(unembedding), rows):
        part = slice(start, start + rows)
        yield part, unembedding[part].to(dtype)


def weighted(vectors: Tensor, scale: Tensor, readout: Readout) -> Tensor:
    """Multiply by gamma, divide by the frozen scale, and apply the family's factor."""
    if readout.norm.weight is not None:
        vectors = vectors * readout.norm.weight.to(vectors.dtype)
    return vectors * (readout.logit_scale / scale)[..., None]


def behind_norm(vectors: Tensor, scale: Tensor, readout: Readout) -> Tensor:
    """Return vectors as the frozen final norm leaves them, (..., width): what the unembedding multiplies.

    Args:
        vectors: (..., width).
        scale: s, broadcastable to the leading axes of ``vectors``.
        readout: The final norm, and the family's factor on the logits.
    """
    return weighted(centre(vectors, readout.norm), scale, readout)


def before_softmax(vectors: Tensor, scale: Tensor, readout: Readout) -> Tensor:
    """Return bs(x): logits of residual vectors under the frozen norm, without what is not linear.

    Args:
        vectors: (..., width).
        scale: s, broadcastable to the leading axes of ``vectors``.
        readout: The final norm and unembedding.

    Returns:
        (..., vocabulary), in nats up to a constant.
    """
    normed = behind_norm(vectors, scale, readout)
    if normed.dtype == readout.unembedding.dtype:
        return normed @ readout.unembedding.T
    flat = normed.reshape(-1, normed.shape[-1])
    logits = flat.new_empty(len(flat), len(readout.unembedding))
    for part, rows in _chunks(readout.unembedding, normed.dtype):
        # With few vectors, both cores are kept busy only by the long side.
        logits[:, part] = (rows @ flat.T).T if len(flat) <= _FEW else flat @ rows.T
    return logits.view(*normed.shape[:-1], -1)


def model_logits(resid_final: Tensor, scale: Tensor, readout: Readout) -> Tensor:
    """Return the model's own logits of its final state: bs, with the biases and the soft cap put back.

    Args:
        resid_final: h^{L-1}, (..., width).
        scale: s of that state, (...,).
        readout: The final norm and unembedding.

    Returns:
        (..., vocabulary).
    """
    logits = before_softmax(resid_final, scale, readout)
    constant = torch.zeros((), dtype=logits.dtype, device=logits.device)
    if readout.norm.bias is not None:
        bias = readout.norm.bias.to(logits.dtype)
        constant = torch.cat([rows @ bias for _, rows in _chunks(readout.unembedding, logits.dtype)])
    if readout.bias is not None:
        constant = constant + readout.bias.to(logits.dtype)
    logits = logits + constant * readout.logit_scale
    return logits if readout.softcap is None else readout.softcap * torch.tanh(logits / readout.softcap)


def pull_back(covectors: Tensor, scale: Tensor, readout: Readout) -> Tensor:
    """Return the transpose of :func:`before_softmax` applied to vectors over the vocabulary.

    ``<pull_back(y), v> = <y, bs(v)>`` for every residual vector v. The centring matrix is symmetric, so it is
    applied last.

    Args:
        covectors: y, (..., vocabulary).
        scale: s, broadcastable to the leading axes.
        readout: The final norm and unembedding.

    Returns:
        (..., width).
    """
    pulled = covectors.new_zeros(*covectors.shape[:-1], readout.unembedding.shape[1])
    for part, rows in _chunks(readout.unembedding, covectors.dtype):
        pulled = pulled + covectors[..., part] @ rows
    return centre(weighted(pulled, scale, readout), readout.norm)


def direction_of(readout: Readout, tokens: Tensor | int) -> Tensor:
    """Return the direction u of tokens, float64, (..., width): <u, v> = bs(v)_t for a frozen scale of 1."""
    rows = readout.unembedding[tokens].double()
    return centre(weighted(rows, rows.new_ones(()), readout), readout.norm)


def largest_row_norm(readout: Readout) -> Tensor:
    """Return c max over tokens t of |gamma * W_t|: by Cauchy-Schwarz, |bs(v)_t| <= |v| * this / s."""
    gamma = readout.norm.weight
    largest = [
        torch.linalg.vector_norm(rows if gamma is None else rows * gamma.double(), dim=-1).max()
        for _, rows in _chunks(readout.unembedding, torch.float64)
    ]
    return torch.stack(largest).max() * abs(readout.logit_scale)
