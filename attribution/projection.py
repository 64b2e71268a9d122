"""Before-softmax values: residual vectors seen through the frozen final norm and the unembedding.

One scale s is taken per sentence from the final state and frozen (METHOD: before-softmax values)::

    bs(x) = W_U [ gamma * (x - mean(x)) / s ]      LayerNorm
    bs(x) = W_U [ gamma * x / s ]                  RMSNorm

The norm's bias is left out, so bs is linear: bs(x + v) = bs(x) + bs(v). An ordinary logit lens re-normalises
each vector instead; early layers look flatter here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attribution.anatomy import Readout

__all__ = ["before_softmax", "frozen_scale", "largest_row_norm", "pull_back"]


def _centre(vectors: Tensor, readout: Readout) -> Tensor:
    """Subtract each vector's mean, as LayerNorm does and RMSNorm does not."""
    return vectors.sub(vectors.mean(-1, keepdim=True)) if readout.centred else vectors


def frozen_scale(resid_final: Tensor, readout: Readout) -> Tensor:
    """Return s, the denominator of the final norm at the final state.

    Args:
        resid_final: h^{L-1} before the final norm, (..., width).
        readout: The final norm and unembedding.

    Returns:
        (...,), ``sqrt(var + eps)`` for LayerNorm (biased variance), ``sqrt(mean square + eps)`` for RMSNorm.
    """
    return torch.sqrt(_centre(resid_final, readout).square().mean(-1) + readout.eps)


def before_softmax(vectors: Tensor, scale: Tensor, readout: Readout) -> Tensor:
    """Return bs(x): logits of residual vectors under the frozen norm, without the norm's bias.

    Args:
        vectors: (..., width).
        scale: s, broadcastable to the leading axes of ``vectors``.
        readout: The final norm and unembedding, in the dtype of ``vectors``.

    Returns:
        (..., vocabulary), in nats up to a constant.
    """
    logits: Tensor = (_centre(vectors, readout) * readout.norm_weight / scale[..., None]) @ readout.unembedding.T
    return logits


def pull_back(covectors: Tensor, scale: Tensor, readout: Readout) -> Tensor:
    """Return the transpose of :func:`before_softmax` applied to vectors over the vocabulary.

    ``<pull_back(y), v> = <y, bs(v)>`` for every residual vector v. The centring matrix is symmetric, so it is
    applied last.

    Args:
        covectors: y, (..., vocabulary).
        scale: s, broadcastable to the leading axes.
        readout: The final norm and unembedding, in the dtype of ``covectors``.

    Returns:
        (..., width).
    """
    return _centre(covectors @ readout.unembedding * readout.norm_weight / scale[..., None], readout)


def largest_row_norm(readout: Readout) -> Tensor:
    """Return max over tokens t of |gamma * W_t|: by Cauchy-Schwarz, |bs(v)_t| <= |v| * this / s."""
    norms: Tensor = torch.linalg.vector_norm(readout.unembedding * readout.norm_weight, dim=-1)
    return norms.max()
