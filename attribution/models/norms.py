"""Layer norms as data, and the two things attribution asks of them: their scale, and their output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Norm", "centre", "frozen_scale", "normalise"]


@dataclass(frozen=True)
class Norm:
    """One LayerNorm or RMSNorm.

    Attributes:
        weight: (width,), or ``None`` for ones. Families that store weight - 1 (Gemma) have the 1 added.
        bias: (width,), or ``None``.
        eps: What is added to the variance or mean square.
        centred: Whether the mean is subtracted (LayerNorm) or not (RMSNorm).
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool


def centre(vectors: Tensor, norm: Norm) -> Tensor:
    """Subtract each vector's mean, as LayerNorm does and RMSNorm does not."""
    return vectors.sub(vectors.mean(-1, keepdim=True)) if norm.centred else vectors


def frozen_scale(vectors: Tensor, norm: Norm) -> Tensor:
    """Return s, the denominator of a norm at its input.

    Args:
        vectors: (..., width).
        norm: The norm.

    Returns:
        (...,), ``sqrt(var + eps)`` for LayerNorm (biased variance), ``sqrt(mean square + eps)`` for RMSNorm.
    """
    return torch.sqrt(centre(vectors, norm).square().mean(-1) + norm.eps)


def normalise(vectors: Tensor, norm: Norm | None) -> Tensor:
    """Return the norm's output, (..., width), in the dtype of ``vectors``; the vectors themselves for no norm."""
    if norm is None:
        return vectors
    output = centre(vectors, norm) / frozen_scale(vectors, norm)[..., None]
    if norm.weight is not None:
        output = output * norm.weight.to(vectors.dtype)
    return output if norm.bias is None else output + norm.bias.to(vectors.dtype)
