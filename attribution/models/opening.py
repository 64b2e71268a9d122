"""Open a model of transformers under nnsight: its weights, its tokenizer, its placement on devices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from attribution.errors import ModelError

__all__ = [
    "SPREAD",
    "open_elsewhere",
    "open_network",
    "wrap",
]


SPREAD = ("auto", "tensor_parallel")
"""Devices that are several: all that this process has, or one of each process."""


def open_elsewhere(repo: str, *, revision: str | None) -> Any:
    """Return a model of the hub under nnsight, with its config and tokenizer but without weights."""
    from nnsight import TransformersModel

    return TransformersModel(
        repo, revision=revision, task="text-generation", attn_implementation="eager", trust_remote_code=False
    )


def _placement(device: str | torch.device) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that spread the weights; none for a single device.

    Raises:
        ModelError: If no other process is there.
    """
    if device == "auto":
        return {"device_map": "auto"}
    if device == "tensor_parallel":
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            raise ModelError(
                "device 'tensor_parallel' needs the processes that torchrun starts, and this one is alone; run it "
                "under 'torchrun --nproc-per-node=N', or use another device."
            )
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]), tp_plan="auto")}
    return {}


def open_network(folder: Path, *, dtype: torch.dtype, device: str | torch.device, pickled: bool = False) -> Any:
    """Load a causal language model under nnsight, with attention weights visible and gradients off.

    No code from the model's repository is run.

    Args:
        folder: The model's files.
        dtype: Type of the weights.
        device: Where they go: a device, or one of :data:`SPREAD`.
        pickled: Read pickled weights; otherwise only safetensors.

    Raises:
        ModelError: If weights are missing, which transformers would fill with random numbers, or do not fit.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.encode("a"):
        # transformers makes an empty GPT-2 tokenizer of a folder that has none.
        raise ModelError(f"model {str(folder)!r} has no tokenizer; put its tokenizer.json beside the weights.")
    # Reading a folder is short: its bar would only stand in the way of the answer.
    silence = logging.is_progress_bar_enabled()
    if silence:
        logging.disable_progress_bar()
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            # Fused attention kernels do not return attention weights; "eager" does.
            attn_implementation="eager",
            use_safetensors=not pickled,
            output_loading_info=True,
            trust_remote_code=False,
            **_placement(device),
        )
    finally:
        if silence:
            logging.enable_progress_bar()
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ModelError(
            f"model {str(folder)!r} lacks {len(names)} weights, such as {names[0]}; download it again or train it "
            "whole."
        )
    on_disk = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if on_disk:
        raise ModelError(
            f"model {str(folder)!r} does not fit: {len(on_disk)} weights, such as {on_disk[0]}, would stay on disk, "
            "where they cannot be read; use a narrower dtype, or machines with more memory."
        )
    module.requires_grad_(requires_grad=False)
    return wrap(module if device in SPREAD else module.to(device), tokenizer)


def wrap(module: Any, tokenizer: Any) -> Any:
    """Return a module of transformers under nnsight."""
    from nnsight import TransformersModel

    return TransformersModel(module, tokenizer=tokenizer, task="text-generation")
