"""What tells a loaded model apart from another of the same name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attribution.models.model import Model

__all__ = ["ModelFacts", "facts_of"]


@dataclass(frozen=True)
class ModelFacts:
    """What tells a loaded model apart from another of the same name.

    Attributes:
        weights: SHA-256 over names, shapes and bytes of the loaded weights, in their dtype.
        revision: Commit on the hub, if it came from there.
        dtype: Their dtype, such as ``"float32"``.
        device: Type of the device they are on, such as ``"cpu"``.
        quantised: How they were quantised in a GGUF file, as of :class:`Model`; empty if not.
    """

    weights: str
    revision: str | None
    dtype: str
    device: str
    quantised: str = ""


def facts_of(model: Model) -> ModelFacts:
    """Return what tells a loaded model apart, in one pass over its weights."""
    import torch

    network = model.network._module
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        # Weights of every dtype as bytes: numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return ModelFacts(
        weights=f"sha256:{digest.hexdigest()}",
        revision=model.revision or None,
        dtype=str(model.anatomy.readout.unembedding.dtype).removeprefix("torch."),
        device=model.device.type,
        quantised=model.quantised,
    )
