"""Open a model under nnsight and read its activations, one trace per batch.

With :mod:`attribution.ablation` the only module that imports nnsight. Modules are visited in forward order,
which nnsight requires.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from attribution.anatomy import resolve
from attribution.errors import ModelError
from attribution.tokens import TokenBatch

if TYPE_CHECKING:
    from attribution.model import Model

__all__ = ["Activations", "open_network", "read_activations"]


@dataclass(frozen=True)
class Activations:
    """What one forward pass says about every neuron.

    Shapes are for L layers, B prompts, P padded positions, D width, H heads, N FFN neurons per layer and V
    tokens. With ``positions="last"`` everything but ``values`` is read at the last real token; with
    ``positions="all"`` every query position is kept, as an axis Q (= P) after the batch axis.

    Attributes:
        resid_pre: h^{l-1}, the residual stream before attention, (L, B, [Q,] D).
        attention_output: A^l, with the output projection's bias, (L, B, [Q,] D).
        resid_mid: r^l, between attention and FFN, as it enters the FFN's norm, (L, B, [Q,] D).
        ffn_output: F^l, with the down projection's bias, (L, B, [Q,] D).
        resid_post: h^l, after the FFN, (L, B, [Q,] D).
        coefficients: m^l, the input of the down projection, (L, B, [Q,] N).
        pattern: alpha, attention weights of the query position over source positions, (L, B, H, [Q,] P).
        values: val, each head's values at every source position, bias included, (L, B, P, H, head_dim).
        resid_final: h^{L-1} as it enters the final norm, (B, [Q,] D).
        logits: The model's own logits, (B, [Q,] V).
    """

    resid_pre: Tensor
    attention_output: Tensor
    resid_mid: Tensor
    ffn_output: Tensor
    resid_post: Tensor
    coefficients: Tensor
    pattern: Tensor
    values: Tensor
    resid_final: Tensor
    logits: Tensor


def open_network(source: str, *, dtype: torch.dtype, device: str, revision: str | None) -> Any:
    """Load a causal language model under nnsight, with attention weights visible and gradients off.

    Only safetensors are read and no code from the model's repository is run.

    Args:
        source: Hub id or folder.
        dtype: Type of the weights.
        device: Where they go.
        revision: Branch, tag or commit on the hub.

    Raises:
        ModelError: If weights are missing, which transformers would fill with random numbers.
    """
    from nnsight import TransformersModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    where = {"revision": revision or "main", "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(source, **where)
    if not tokenizer.encode("a"):
        # transformers makes an empty GPT-2 tokenizer of a folder that has none.
        raise ModelError(f"model {source!r} has no tokenizer; put its tokenizer.json beside the weights.")
    # Downloads show their progress; a bar for reading a folder would only stand in the way of the answer.
    silence = Path(source).is_dir() and logging.is_progress_bar_enabled()
    if silence:
        logging.disable_progress_bar()
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            # Fused attention kernels do not return attention weights; "eager" does.
            attn_implementation="eager",
            use_safetensors=True,
            output_loading_info=True,
            **where,
        )
    finally:
        if silence:
            logging.enable_progress_bar()
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ModelError(
            f"model {source!r} lacks {len(names)} weights, such as {names[0]}, in its safetensors; download it again "
            "or train it whole."
        )
    module.requires_grad_(requires_grad=False)
    return TransformersModel(module.to(device), tokenizer=tokenizer, task="text-generation")


def read_activations(model: Model, batch: TokenBatch, *, positions: Literal["last", "all"] = "last") -> Activations:
    """Run a batch once and keep what attribution needs.

    Args:
        model: A loaded model.
        batch: Right-padded tokens.
        positions: Read only each row's last real token, or every position.

    Returns:
        Detached tensors on the model's device.
    """
    import nnsight

    anatomy, family, network = model.anatomy, model.anatomy.family, model.network
    rows = torch.arange(len(batch.last), device=batch.last.device)

    def query(tensor: Tensor, axis: int = 1) -> Tensor:
        """Keep the last real token along ``axis``, the query positions, if only that is wanted."""
        if positions == "all":
            return tensor.detach()
        return tensor.movedim(axis, 1)[rows, batch.last].detach()

    layers: list[dict[str, Tensor]] = []
    final: dict[str, Tensor] = {}
    with network.trace(batch.inputs()):
        layers = nnsight.save([])
        final = nnsight.save({})
        for block in anatomy.blocks(network):
            seen = {"resid_pre": query(block.input)}
            seen["values"] = anatomy.split_values(resolve(block, family.value_projection).output).detach()
            seen["attention_output"] = query(resolve(block, family.attention_out).output)
            seen["pattern"] = query(resolve(block, family.attention).output[1], 2)
            seen["resid_mid"] = query(resolve(block, family.ffn_norm).input)
            ffn_out = resolve(block, family.ffn_out)
            seen["coefficients"] = query(ffn_out.input)
            seen["ffn_output"] = query(ffn_out.output)
            seen["resid_post"] = query(block.output)
            layers.append(seen)
        final["resid_final"] = query(resolve(network, family.final_norm).input)
        final["logits"] = query(resolve(network, family.unembedding).output)
    stacked = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    return Activations(**stacked, **final)
