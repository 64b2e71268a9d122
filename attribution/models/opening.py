"""Open a model of transformers under nnsight: its weights, its tokenizer, its placement on devices."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from attribution.errors import ModelError
from attribution.models.tokenizer import check_tokenizer

__all__ = [
    "SPREAD",
    "open_elsewhere",
    "open_network",
    "wrap",
]


SPREAD = ("auto", "tensor_parallel")
"""Devices that are several: all that this process has, or one of each process."""

# What modules return follows from these settings, which a config may have for other uses. Fused attention kernels do
# not return attention weights; "eager" does.
_SETTLED = {
    "return_dict": True,
    "use_cache": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "_attn_implementation": "eager",
}
# Buffers of older versions of transformers, which newer ones compute: masks, positions, angles.
_HARMLESS = re.compile(
    r"(attn|attention)\.(masked_)?bias$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.position_ids$"
)


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
        ModelError: If weights are missing, which transformers would fill with random numbers, are left over, or do not
            fit; or the tokenizer is of no use.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # transformers makes an empty tokenizer of a folder that has none.
    check_tokenizer(tokenizer, str(folder))
    # Reading a folder is short: its bar would only stand in the way of the answer.
    silence, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    if silence:
        logging.disable_progress_bar()
    # Its table of weights that do not fit, in many lines: one sentence of ours says it.
    logging.set_verbosity_error()
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=_settled(AutoConfig.from_pretrained(folder, trust_remote_code=False)),
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=not pickled,
            output_loading_info=True,
            trust_remote_code=False,
            **_placement(device),
        )
    finally:
        logging.set_verbosity(level)
        if silence:
            logging.enable_progress_bar()
    _check_keys(report, _overlooked(folder, module), str(folder))
    on_disk = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if on_disk:
        raise ModelError(
            f"model {str(folder)!r} does not fit: {len(on_disk)} weights, such as {on_disk[0]}, would stay on disk, "
            "where they cannot be read; use a narrower dtype, or machines with more memory."
        )
    module.requires_grad_(requires_grad=False)
    return wrap(module if device in SPREAD else module.to(device), tokenizer)


def _settled(config: Any) -> Any:
    """Return a config, and those inside of it, with what modules return and compute settled."""
    for own in (config, *(getattr(config, name) for name in config.sub_configs)):
        for setting, value in _SETTLED.items():
            setattr(own, setting, value)
    return config


def _overlooked(folder: Path, module: Any) -> list[str]:
    """Return weights in the files that transformers does not report: their names are like those of harmless ones."""
    patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    own = set(module.state_dict())
    found = []
    for file in sorted(files):
        if not (folder / file).is_file():
            continue
        with safe_open(folder / file, framework="pt") as opened:
            names = [name for name in sorted(opened.keys()) if any(re.search(each, name) for each in patterns)]
        found += [name for name in names if not any(known == name or known.endswith(f".{name}") for known in own)]
    return found


def _check_keys(report: Mapping[str, Collection[str]], overlooked: Collection[str], where: str) -> None:
    """Complain of weights that the config asks for and the files lack, and of those that it does not ask for."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"model {where!r} lacks {len(missing)} weights, such as {missing[0]}; download it again or train it whole."
        )
    left = sorted(each for each in {*report["unexpected_keys"], *overlooked} if not _HARMLESS.search(each))
    if left:
        raise ModelError(
            f"model {where!r} has {len(left)} weights that its config.json has no use for, such as {left[0]}: it would "
            "be another model without them; use the config that they were saved with."
        )


def wrap(module: Any, tokenizer: Any) -> Any:
    """Return a module of transformers under nnsight."""
    from nnsight import TransformersModel

    return TransformersModel(module, tokenizer=tokenizer, task="text-generation")
