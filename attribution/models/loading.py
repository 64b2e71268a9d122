"""Load a model by name: bundled, from a folder, or from the Hugging Face hub, all through the same code."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from attribution.errors import AttributionError, BadInputError, ModelError, UnsupportedModelError
from attribution.models.anatomy import read_anatomy
from attribution.models.families import FAMILIES, family_of
from attribution.models.gguf import SUFFIX, folder_of, quantisation_of
from attribution.models.hub import Fetched, cause_of, fetch, weights_file, without_weights
from attribution.models.model import Model
from attribution.models.opening import SPREAD, open_elsewhere, open_network
from attribution.models.packaged import packaged
from attribution.models.registry import BUNDLED, DTYPES, Entry, entry_of, registry

__all__ = ["load", "locate"]

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


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
            ``"org/name"``; a folder in the layout of ``save_pretrained``; or a GGUF file, or a folder with one. What is
            quantised in a GGUF file is read as plain numbers, once, and kept in the hub's cache.
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
            accelerator as many as a quarter of its free memory is taken to hold. When memory runs out, the rest of a
            call runs in batches of half the size, with a :class:`attribution.engine.batching.SmallerBatchWarning`.

    Raises:
        BadInputError: If an argument cannot be used.
        ModelError: If the model cannot be found, fetched or loaded.
        UnsupportedModelError: If its architecture has no anatomy.
    """
    _check_names(name, revision)
    if batch_tokens is not None and not (type(batch_tokens) is int and batch_tokens > 0):
        raise BadInputError(f"batch_tokens = {batch_tokens!r} is no number of tokens; use 1 or more, or leave it out.")
    if remote and remote != "local":
        return _load_remote(name, remote, device=device, dtype=dtype, revision=revision, tokens=batch_tokens)
    place = device if isinstance(device, str) and device in SPREAD else _device(device)
    kind = _dtype(dtype if dtype is not None else entry_of(name).dtype)
    source = _find(name, models_dir)
    fetched = locate(name, revision=revision, models_dir=models_dir, allow_pickle=allow_pickle)
    folder, commit = fetched.folder, fetched.commit
    try:
        names = {each.name for each in folder.iterdir()}
        _refuse_adapter(names, name)
        _refuse_code(folder, name)
        family_of(AutoConfig.from_pretrained(folder, trust_remote_code=False), name)
        pickled = allow_pickle and weights_file(names, allow_pickle=False) is None
        if weights_file(names, allow_pickle=allow_pickle) is None:
            raise ModelError(without_weights(names, name, f"in the folder {str(folder)!r}"))
        network = open_network(folder, dtype=kind, device=place, pickled=pickled)
    except AttributionError:
        raise
    except Exception as error:  # safetensors and transformers raise many kinds; each gets one sentence.
        raise ModelError(_why_not(name, folder, error, from_hub=bool(commit))) from None
    anatomy = read_anatomy(network._module, name)
    quantised = quantisation_of(folder)
    whence = source.source if isinstance(source, Entry) else str(source)
    begins = _begins(folder)
    return Model(name, network, anatomy, network.tokenizer, whence, commit, remote, batch_tokens, quantised, begins)


def _begins(folder: Path) -> bool | None:
    """Return whether texts should begin with BOS: where there is a tokenizer.json, transformers does not ask."""
    settings = folder / "tokenizer_config.json"
    said = json.loads(settings.read_text(encoding="utf-8")).get("add_bos_token") if settings.is_file() else None
    return said if isinstance(said, bool) else None


def _load_remote(
    name: str,
    remote: bool | str,
    *,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    revision: str | None,
    tokens: int | None,
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
    if not isinstance(source, str):
        where = source.source if isinstance(source, Entry) else str(source)
        raise BadInputError(
            f"model {name!r} is on this machine ({where}), and no other has it; name a model of the hub, or load it "
            "here with remote=False."
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
    return Model(name, network, anatomy, network.tokenizer, source, revision or "", remote, tokens)


def locate(
    name: str,
    *,
    revision: str | None = None,
    models_dir: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
) -> Fetched:
    """Return the folder that holds a model's files, downloaded or converted if need be, without loading it.

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
        what = "comes with packages" if isinstance(source, Entry) else f"is {str(source)!r} on this machine"
        raise BadInputError(
            f"revision {revision!r} would be ignored, as model {name!r} {what}; leave the revision out, or load it "
            "from the hub."
        )
    if isinstance(source, Entry):
        whole = packaged(source)
        return Fetched(folder_of(whole.file, name, sha256=whole.sha256), "")
    file = _gguf_in(source, name)
    return Fetched(source if file is None else folder_of(file, name), "")


def _gguf_in(source: Path, name: str) -> Path | None:
    """Return the GGUF file that a path means; ``None`` for a folder of safetensors."""
    if source.is_file():
        return source
    files = sorted(source.glob(f"*{SUFFIX}"))
    if not files or weights_file({each.name for each in source.iterdir()}, allow_pickle=True) is not None:
        return None
    if len(files) > 1:
        raise ModelError(
            f"model {name!r} is a folder of {len(files)} GGUF files ({', '.join(each.name for each in files)}); name "
            "one of them."
        )
    return files[0]


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


def _refuse_adapter(names: Collection[str], name: str) -> None:
    """Complain of an adapter beside the weights: what is installed decides whether transformers adds it to them."""
    adapter = next((each for each in sorted(names) if each.startswith(("adapter_config.", "adapter_model."))), None)
    if adapter is not None:
        raise ModelError(
            f"model {name!r} has an adapter beside its weights ({adapter}); merge it into them first (merge_and_unload "
            "of peft, then save_pretrained), or remove it."
        )


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


def _find(name: str, models_dir: str | os.PathLike[str] | None) -> Path | str | Entry:
    """Return what a name stands for: a folder or a file, a hub id, or an entry whose weights come with packages."""
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
        for each in (local, local.with_name(local.name + SUFFIX)):
            if each.is_dir() or (each.is_file() and each.suffix == SUFFIX):
                return each
        if name in entries:
            raise ModelError(
                f"model {name!r} is not in the models folder {str(directory)!r}; put its files in {local}, or leave "
                "--models-dir and ATTRIBUTION_MODELS out to use the hub."
            )
    if Path(name).is_dir() or (Path(name).is_file() and name.endswith(SUFFIX)):
        return Path(name)
    if name in entries:
        entry = entries[name]
        return entry if entry.parts else Path(entry.source) if entry.local else entry.source
    if name.endswith(SUFFIX):
        raise ModelError(f"model {name!r} is a GGUF file that is not there; give its path.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.count("/") == 0:
        raise ModelError(
            f"model {name!r} is neither a folder, a GGUF file nor a known name; use {', '.join(entries)}, a folder, a "
            f"file that ends with {SUFFIX}, or a hub id such as 'org/name'."
        )
    return name
