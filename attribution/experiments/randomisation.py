"""A copy of a model whose weights are shuffled: what an attribution finds there, it did not learn from the model."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from attribution.models.anatomy import read_anatomy
from attribution.models.model import Model
from attribution.models.opening import wrap
from attribution.models.running import TURN

__all__ = ["randomised"]


def randomised(model: Model, seed: int = 0) -> Model:
    """Return a copy of a model with the entries of every parameter shuffled.

    Embeddings, norms, biases and the matrices of all layers and of the unembedding: within each tensor, the entries
    change places at random, so that their distribution stays and what they say is lost (after the model parameter
    randomisation test of Adebayo et al. 2018). Weights that are tied stay tied. Buffers, such as the frequencies of
    rotary embeddings, are not learnt and stay.

    Args:
        model: A loaded model; it is not touched. The copy shares no tensor with it and needs as much memory.
        seed: Seed of the shuffle.
    """
    with TURN:
        twin = copy.deepcopy(model.network._module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return replace(model, network=wrap(twin, model.tokenizer), anatomy=read_anatomy(twin, model.name))
