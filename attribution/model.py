"""Load a model by name: bundled, from a folder, or from the Hugging Face hub, all through the same code."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from attribution.anatomy import Anatomy, read_anatomy
from attribution.errors import AttributionError, BadInputError, ModelError
from attribution.families import family_of
from attribution.records import NEURON_UNITS, Unit
from attribution.registry import BUNDLED, entry_of, registry
from attribution.trace import open_network
from attribution.vectors import VectorTable

__all__ = ["Model", "load"]


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model, read-only.

    Attributes:
        name: The name it was loaded by.
        network: The model under nnsight.
        anatomy: Sizes, weights and module paths.
        tokenizer: Its tokenizer.
    """

    name: str
    network: Any = field(repr=False)
    anatomy: Anatomy
    tokenizer: Any = field(repr=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.anatomy.readout.unembedding.device

    def described(self) -> str:
        """Return in words what was loaded."""
        return f"{self.name}: {str(self.anatomy.readout.unembedding.dtype).removeprefix('torch.')} on {self.device}"

    @cached_property
    def _tables(self) -> dict[Unit, VectorTable]:
        return {unit: VectorTable.of(unit, self.anatomy) for unit in NEURON_UNITS}

    def table(self, unit: Unit) -> VectorTable | None:
        """Return the vectors of a unit's neurons; ``None`` for heads and layers, whose vectors depend on the prompt."""
        return self._tables.get(unit)


def load(
    name: str,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    remote: bool = False,
    models_dir: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
) -> Model:
    """Load a model.

    Args:
        name: ``"bundled:gpt2"`` or ``"bundled:llama"``; a registered name such as ``"gpt2"``; a hub id
            ``"org/name"``; or a folder in the layout of ``save_pretrained``.
        device: Where the weights go.
        dtype: Type of the weights. Scores are computed in float64 whatever it is.
        revision: Branch, tag or commit on the hub.
        remote: Machines that hold the weights elsewhere; not supported yet.
        models_dir: Folder of model folders, looked in before the hub: ``models_dir/gpt2`` and so on; the
            environment variable ``ATTRIBUTION_MODELS`` when ``None``.

    Raises:
        ModelError: If the model cannot be found or loaded.
        UnsupportedModelError: If its architecture has no anatomy.
    """
    if remote:
        raise BadInputError(f"remote={remote!r} is not supported yet; load the model here with remote=False.")
    if not isinstance(name, str) or not name.strip():
        raise BadInputError(f"model name {name!r} is not a name; use {', '.join(registry())} or a folder.")
    source = _find(name, models_dir)
    device = device or "cpu"
    dtype = dtype or entry_of(name).dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        family_of(config, name)
        network = open_network(source, dtype=dtype, device=device, revision=revision)
    except AttributionError:
        raise
    except Exception as error:  # Hub clients, safetensors and transformers raise many kinds; each gets one sentence.
        raise ModelError(_why_not(name, source, error)) from None
    return Model(name, network, read_anatomy(network._module, name), network.tokenizer)


def _why_not(name: str, source: str, error: Exception) -> str:
    """Return one sentence on why a model cannot be loaded, with what to do."""
    cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
    if Path(source).is_dir():
        return (
            f"model {name!r} cannot be loaded from the folder {source!r} ({cause}); it must hold config.json, "
            "model.safetensors and a tokenizer, as save_pretrained writes them."
        )
    return (
        f"model {name!r} cannot be loaded from the hub as {source!r} ({cause}); go online (and log in if it is gated), "
        f"put its files in DIR/{name} and pass --models-dir=DIR or set ATTRIBUTION_MODELS=DIR, or choose a bundled "
        "model."
    )


def _find(name: str, models_dir: str | os.PathLike[str] | None) -> str:
    """Return the folder or hub id that a name stands for."""
    entries = registry()
    if name.startswith(BUNDLED):
        if name not in entries:
            bundled = ", ".join(entry for entry in entries if entry.startswith(BUNDLED))
            raise ModelError(f"model {name!r} is not bundled; use one of {bundled}.")
        folder = entries[name].folder
        if not folder.is_dir():
            raise ModelError(f"model {name!r} is missing from {folder}; reinstall the package or train it again.")
        return str(folder)
    directory = models_dir or os.environ.get("ATTRIBUTION_MODELS")
    if directory:
        local = Path(directory) / name
        if local.is_dir():
            return str(local)
        if name in entries:
            raise ModelError(
                f"model {name!r} is not in the models folder {str(directory)!r}; put its files in {local}, or leave "
                "--models-dir and ATTRIBUTION_MODELS out to use the hub."
            )
    if Path(name).is_dir():
        return name
    if name in entries:
        return entries[name].source
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.count("/") == 0:
        raise ModelError(
            f"model {name!r} is neither a folder nor a known name; use {', '.join(entries)}, a folder, or a hub id "
            "such as 'org/name'."
        )
    return name
