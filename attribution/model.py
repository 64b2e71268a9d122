"""Load a model by name: bundled, from a folder, or from the Hugging Face hub, all through the same code."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from attribution.anatomy import Anatomy, read_anatomy
from attribution.errors import AttributionError, BadInputError, ModelError, UnsupportedModelError
from attribution.families import FAMILIES, family_of
from attribution.hub import Fetched, cause_of, fetch, weights_file
from attribution.records import NEURON_UNITS, Unit
from attribution.registry import BUNDLED, DTYPES, entry_of, registry
from attribution.trace import SPREAD, open_elsewhere, open_network
from attribution.vectors import VectorTable

__all__ = ["Model", "load", "locate"]

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


@dataclass
class BatchSize:
    """How many tokens one forward pass holds.

    Attributes:
        tokens: The number, padding included; 0 for what :func:`batch_tokens_for` says.
    """

    tokens: int = 0


# Large enough to keep two cores busy, small enough that what one layer of the bundled models hands to the next stays in
# a processor's cache (half or twice as many took a sixth longer).
CHUNK_TOKENS = 1024
# Of an accelerator's free memory, what a pass may take; the rest is for blocks of scores and for what is not reckoned.
_SHARE_OF_MEMORY = 0.25
_LARGEST_BATCH = 2**15


def _processor(device: torch.device) -> bool:
    # Of weights that are elsewhere nothing is known: what fits there is found out.
    return device.type in ("cpu", "meta")


def batch_tokens_for(anatomy: Anatomy) -> int:
    """Return how many tokens one forward pass is given: a fixed number on a processor, on an accelerator by its memory.

    A pass of one token keeps the values of every layer, and on the way the widest of what one block computes: about
    four times its coefficients and eight times the stream.
    """
    device = anatomy.readout.unembedding.device
    if _processor(device):
        return CHUNK_TOKENS
    free, _ = torch.accelerator.memory.get_memory_info(device)
    numbers = anatomy.layers * anatomy.heads * anatomy.head_dim + 4 * anatomy.ffn_neurons + 8 * anatomy.width
    per_token = numbers * anatomy.readout.unembedding.element_size()
    return int(min(max(_SHARE_OF_MEMORY * free / per_token, 1), _LARGEST_BATCH))


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model, read-only.

    Attributes:
        name: The name it was loaded by.
        network: The model under nnsight.
        anatomy: Sizes, weights and module paths.
        tokenizer: Its tokenizer.
        source: The folder or the hub id that it was loaded from.
        revision: The commit on the hub that was loaded; empty for a folder.
        remote: Where its weights are: here if ``False``; otherwise what :func:`load` was told.
        batch: How many tokens fit one forward pass, see :attr:`batch_tokens`.
    """

    name: str
    network: Any = field(repr=False)
    anatomy: Anatomy
    tokenizer: Any = field(repr=False)
    source: str = ""
    revision: str = ""
    remote: bool | str = False
    batch: BatchSize = field(default_factory=BatchSize, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what the network holds: on the other side it is another one, with weights."""
        kept = ("name", "network", "source", "revision", "batch")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        network = state["network"]
        anatomy = read_anatomy(network._module, state["name"], check=False)
        self.__dict__.update(state, anatomy=anatomy, tokenizer=network.tokenizer, remote=False)

    @cached_property
    def on_site(self) -> Model:
        """The same model for what runs where its weights are, see :func:`attribution.trace.on_site`."""
        return replace(self, remote=False)

    @property
    def batch_tokens(self) -> int:
        """Tokens in one forward pass, padding included: as given, or what memory is taken to hold."""
        return self.batch.tokens or batch_tokens_for(self.anatomy)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.anatomy.readout.unembedding.device

    def described(self) -> str:
        """Return in words what was loaded."""
        dtype = str(self.anatomy.readout.unembedding.dtype).removeprefix("torch.")
        whence = [f"{self.source} at {self.revision}"] if self.revision else []
        if not (whence or self.name.startswith(BUNDLED) or self.source in ("", self.name)):
            whence = [self.source]
        return f"{self.name}: {', '.join([*whence, f'{dtype} on {self.device}'])}"

    @cached_property
    def _tables(self) -> dict[Unit, VectorTable]:
        return {unit: VectorTable.of(unit, self.anatomy) for unit in NEURON_UNITS}

    def table(self, unit: Unit) -> VectorTable | None:
        """Return the vectors of a unit's neurons; ``None`` for heads and layers, whose vectors depend on the prompt."""
        return self._tables.get(unit)


def load(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    remote: bool | str = False,
    models_dir: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
    batch_tokens: int | None = None,
) -> Model:
    """Load a model.

    From the hub come a config, a tokenizer and safetensors of one commit, verified and kept in the hub's cache. Code
    from a model's repository is never run, and there is no switch for it: an architecture that comes as code has no
    anatomy here, so its neurons could not be attributed anyway.

    Args:
        name: ``"bundled:gpt2"`` or ``"bundled:llama"``; a registered name such as ``"gpt2"``; a hub id
            ``"org/name"``; or a folder in the layout of ``save_pretrained``.
        device: Where the weights go; ``"cpu"`` when ``None``. ``"auto"`` spreads them over all accelerators and, if
            they do not hold them, memory (what is left on disk is refused); ``"tensor_parallel"`` over the processes
            that torchrun started, each of which then makes the same calls and gets the same results.
        dtype: Type of the weights, or its name; when ``None``, that of the registry, and float32 for a model that is
            not registered. Scores are computed in float64 whatever it is.
        revision: Branch, tag or commit on the hub; when ``None``, the registered one or else the default branch.
        remote: ``True`` for a model whose weights stay on NDIF: only its config and tokenizer are fetched, and
            :func:`attribution.attribute`, ``query``, ``ablate`` and ``evaluate`` run there as nnsight sessions; the
            address of another server of that kind; or ``"local"`` to load it here and run the same sessions here, sent
            through serialisation.
        models_dir: Folder of model folders, looked in before the hub: ``models_dir/gpt2`` and so on; the
            environment variable ``ATTRIBUTION_MODELS`` when ``None``.
        allow_pickle: Read pickled weights (``pytorch_model.bin``) where there are no safetensors.
        batch_tokens: Tokens in one forward pass, padding included; when ``None``, 1,024 on a processor, and on an
            accelerator as many as a quarter of its free memory is taken to hold. When memory runs out the number is
            halved, with a :class:`attribution.questions.SmallerBatchWarning`.

    Raises:
        BadInputError: If an argument cannot be used.
        ModelError: If the model cannot be found, fetched or loaded.
        UnsupportedModelError: If its architecture has no anatomy.
    """
    _check_names(name, revision)
    if batch_tokens is not None and not (type(batch_tokens) is int and batch_tokens > 0):
        raise BadInputError(f"batch_tokens = {batch_tokens!r} is no number of tokens; use 1 or more, or leave it out.")
    batch = BatchSize(batch_tokens or 0)
    if remote and remote != "local":
        return _load_remote(name, remote, device=device, dtype=dtype, revision=revision, batch=batch)
    place = device if isinstance(device, str) and device in SPREAD else _device(device)
    kind = _dtype(dtype if dtype is not None else entry_of(name).dtype)
    source = _find(name, models_dir)
    fetched = locate(name, revision=revision, models_dir=models_dir, allow_pickle=allow_pickle)
    folder, commit = fetched.folder, fetched.commit
    try:
        _refuse_code(folder, name)
        family_of(AutoConfig.from_pretrained(folder, trust_remote_code=False), name)
        pickled = allow_pickle and weights_file({each.name for each in folder.iterdir()}, allow_pickle=False) is None
        network = open_network(folder, dtype=kind, device=place, pickled=pickled)
    except AttributionError:
        raise
    except Exception as error:  # safetensors and transformers raise many kinds; each gets one sentence.
        raise ModelError(_why_not(name, folder, error, from_hub=bool(commit))) from None
    anatomy = read_anatomy(network._module, name)
    return Model(name, network, anatomy, network.tokenizer, str(source), commit, remote, batch)


def _load_remote(
    name: str,
    remote: bool | str,
    *,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    revision: str | None,
    batch: BatchSize,
) -> Model:
    """Return a model whose weights stay elsewhere, made of its config and tokenizer on the hub."""
    if device is not None or dtype is not None:
        raise BadInputError(
            f"device {device!r} and dtype {dtype!r} would be ignored, as the weights of model {name!r} stay where they "
            "are; leave both out, or load it here with remote=False."
        )
    if isinstance(remote, str) and not remote.startswith(("http://", "https://")):
        raise BadInputError(f"remote={remote!r} is no place of a model; use True, 'local' or an address 'https://...'.")
    source = _find(name, None)
    if isinstance(source, Path):
        raise BadInputError(
            f"model {name!r} is the folder {str(source)!r}, which no other machine has; name a model of the hub, or "
            "load it here with remote=False."
        )
    try:
        network = open_elsewhere(source, revision=revision)
        anatomy = read_anatomy(network._module, name, check=False)
    except AttributionError:
        raise
    except Exception as error:  # As above.
        raise ModelError(
            f"the config and tokenizer of model {name!r} cannot be fetched from the hub ({type(error).__name__}: "
            f"{cause_of(error)}); go online, log in if the model is gated, or load it here with remote=False."
        ) from None
    return Model(name, network, anatomy, network.tokenizer, source, revision or "", remote, batch)


def locate(
    name: str,
    *,
    revision: str | None = None,
    models_dir: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
) -> Fetched:
    """Return the folder that holds a model's files, downloaded if need be, without loading it.

    Args:
        name: See :func:`load`, as for the others.
        revision: Branch, tag or commit on the hub.
        models_dir: Folder of model folders.
        allow_pickle: Take pickled weights where there are no safetensors.

    Raises:
        BadInputError: If an argument cannot be used.
        ModelError: If the model cannot be found or fetched.
    """
    _check_names(name, revision)
    source = _find(name, models_dir)
    if isinstance(source, str):
        asked = revision or entry_of(name).revision or None
        return fetch(source, asked, name=name, allow_pickle=allow_pickle)
    if revision is not None:
        raise BadInputError(
            f"revision {revision!r} would be ignored, as model {name!r} is the folder {str(source)!r}; leave the "
            "revision out, or load it from the hub."
        )
    return Fetched(source, "")


def _check_names(name: object, revision: object) -> None:
    if not isinstance(name, str) or not name.strip():
        raise BadInputError(f"model name {name!r} is not a name; use {', '.join(registry())} or a folder.")
    if revision is not None and (not isinstance(revision, str) or not revision.strip()):
        raise BadInputError(f"revision {revision!r} is not a name; use a branch, tag or commit, or leave it out.")


def _device(given: str | torch.device | None) -> torch.device:
    """Return a device that is there."""
    if given is None:
        return torch.device("cpu")
    there = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        there += [accelerator.type, *(f"{accelerator.type}:{each}" for each in range(torch.accelerator.device_count()))]
    try:
        device = torch.device(given)
        torch.zeros(1, device=device).item()
    except Exception as error:  # Each backend complains in its own way.
        raise BadInputError(
            f"device {str(given)!r} is not one that torch has here ({cause_of(error)}); use one of {', '.join(there)}."
        ) from None
    return device


def _dtype(given: torch.dtype | str) -> torch.dtype:
    """Return a type of weights by itself or by name."""
    named = _DTYPES.get(given) if isinstance(given, str) else given
    if named is None or named not in _DTYPES.values():
        raise BadInputError(f"dtype {given!r} is no type of weights here; use one of {', '.join(_DTYPES)}.")
    return named


def _refuse_code(folder: Path, name: str) -> None:
    """Complain of an architecture that comes as code; where transformers has it too, that is used instead."""
    config, _ = PretrainedConfig.get_config_dict(folder)
    if "auto_map" in config and config.get("model_type") not in FAMILIES:
        raise UnsupportedModelError(
            f"model {name!r} needs code of its own repository (auto_map in its config.json), which is never run; use a "
            f"model of one of the families {', '.join(sorted(FAMILIES))}."
        )


def _why_not(name: str, folder: Path, error: Exception, *, from_hub: bool) -> str:
    """Return one sentence on why a model cannot be loaded, with what to do."""
    cause = f"{type(error).__name__}: {cause_of(error)}"
    if from_hub:
        return (
            f"model {name!r} cannot be loaded from its copy in the hub's cache ({cause}); choose another revision or "
            f"model, or remove {str(folder.parents[1])!r} to download it again."
        )
    return (
        f"model {name!r} cannot be loaded from the folder {str(folder)!r} ({cause}); it must hold config.json, "
        "model.safetensors and a tokenizer, as save_pretrained writes them."
    )


def _find(name: str, models_dir: str | os.PathLike[str] | None) -> Path | str:
    """Return the folder, as a path, or the hub id, as a string, that a name stands for."""
    entries = registry()
    if name.startswith(BUNDLED):
        if name not in entries:
            bundled = ", ".join(entry for entry in entries if entry.startswith(BUNDLED))
            raise ModelError(f"model {name!r} is not bundled; use one of {bundled}.")
        folder = entries[name].folder
        if not folder.is_dir():
            raise ModelError(f"model {name!r} is missing from {folder}; reinstall the package or train it again.")
        return folder
    directory = models_dir or os.environ.get("ATTRIBUTION_MODELS")
    if directory:
        local = Path(directory) / name
        if local.is_dir():
            return local
        if name in entries:
            raise ModelError(
                f"model {name!r} is not in the models folder {str(directory)!r}; put its files in {local}, or leave "
                "--models-dir and ATTRIBUTION_MODELS out to use the hub."
            )
    if Path(name).is_dir():
        return Path(name)
    if name in entries:
        return Path(entries[name].source) if entries[name].local else entries[name].source
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.count("/") == 0:
        raise ModelError(
            f"model {name!r} is neither a folder nor a known name; use {', '.join(entries)}, a folder, or a hub id "
            "such as 'org/name'."
        )
    return name
