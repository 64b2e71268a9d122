"""Fetch a model's files from the Hugging Face hub into the hub client's own cache: whole, verified, of one commit."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as client_logging

from attribution.errors import ModelError

__all__ = ["Fetched", "cause_of", "fetch", "weights_file", "without_weights"]

# In the order in which transformers looks for them: the weights, or the index of their shards.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_INDEX = ".index.json"
# Configs and tokenizers: tokenizer.json, vocab.json, merges.txt, tokenizer.model and what else they are called.
_SETTINGS = {".json", ".model", ".tiktoken", ".txt"}


@dataclass(frozen=True)
class Fetched:
    """A model's files on this machine.

    Attributes:
        folder: Snapshot folder in the hub's cache; read-only.
        commit: The commit that all of them are of.
    """

    folder: Path
    commit: str


@dataclass(frozen=True)
class _Wanted:
    """A model by its names: what the hub is asked for, and what errors call it."""

    name: str
    repo: str
    revision: str | None
    allow_pickle: bool

    @property
    def elsewhere(self) -> str:
        """What to do without the hub."""
        return (
            f"put its files in DIR/{self.name} and pass --models-dir=DIR or set ATTRIBUTION_MODELS=DIR, or choose a "
            "bundled model, by -m bundled or as 'bundled:gpt2'"
        )


def fetch(repo: str, revision: str | None, *, name: str, allow_pickle: bool = False) -> Fetched:
    """Return the folder that holds a model's config, tokenizer and weights; download what the cache lacks.

    The hub is asked once, shortly, for the commit and its list of files; every file is then of that commit. If it
    gives none, a whole copy in the cache is used. Weights come last, so that a copy with weights is whole, and a
    downloaded file is compared with the checksum that the hub has on record before the next one starts. A connection
    that is cut is taken up again by the client, where it was cut, for as long as bytes arrive; if none do, the files
    that are whole stay for the next time.

    HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN and the client's other variables work as always.

    Args:
        repo: Hub id.
        revision: Branch, tag or commit; the default branch when ``None``.
        name: What to call the model in errors.
        allow_pickle: Take pickled weights from a repository without safetensors.

    Raises:
        ModelError: If it cannot be had; one sentence with the way out.
    """
    wanted = _Wanted(name, repo, revision, allow_pickle)
    with _quiet():
        try:
            info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_patience())
        except (HFValidationError, RevisionNotFoundError) as error:
            raise ModelError(_refusal(error, wanted) or cause_of(error)) from None
        except Exception as error:  # As below: many kinds.
            cached = _cached(wanted)
            if cached is None:
                raise ModelError(_refusal(error, wanted) or _unreachable(error, wanted)) from None
            return cached
        return _download(info, wanted)


def weights_file(names: Container[str], *, allow_pickle: bool) -> str | None:
    """Return the file that transformers reads weights by, the weights or an index of shards; ``None`` if it is missing.

    Args:
        names: Names of the files of a folder or repository.
        allow_pickle: Take pickled weights where there are no safetensors.
    """
    return next((each for each in _SAFETENSORS + (_PICKLED if allow_pickle else ()) if each in names), None)


def cause_of(error: Exception) -> str:
    """Return the first sentence of an error of another library, or the status that a server answered with."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code} {response.reason_phrase}"
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".:") if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's notes on retries, tokens and disks from the terminal: what matters of them becomes an error.

    Who has asked for its log by HF_DEBUG or HF_HUB_VERBOSITY gets it.
    """
    level = client_logging.get_verbosity()
    if level == logging.WARNING:
        client_logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        client_logging.set_verbosity(level)


def _patience() -> float:
    """Return how long to wait for the hub, in seconds.

    Short, as it is waited for at each of its addresses in turn, which add up where packets are lost.
    """
    return float(os.environ.get("HF_HUB_ETAG_TIMEOUT", 5))


def _download(info: huggingface_hub.ModelInfo, wanted: _Wanted) -> Fetched:
    files = {each.rfilename: each for each in info.siblings or ()}
    commit = str(info.sha)
    weights = weights_file(files, allow_pickle=wanted.allow_pickle)
    if weights is None:
        where = f"at {wanted.revision or 'the default branch'} of {wanted.repo!r}"
        raise ModelError(without_weights(set(files), wanted.name, where))
    settings = sorted(each for each in files if "/" not in each and Path(each).suffix in _SETTINGS)
    for each in settings:
        if not each.endswith(_INDEX):
            _get(files[each], commit, wanted)
    parts = [weights]
    if weights.endswith(_INDEX):
        parts = _shards(_get(files[weights], commit, wanted), wanted)
        absent = [each for each in parts if each not in files]
        if absent:
            raise ModelError(
                f"model {wanted.name!r} has no {absent[0]} on the hub, which its {weights} names; choose another "
                "revision or model."
            )
    _check_space(sum(files[each].size or 0 for each in parts if _in_cache(each, commit, wanted) is None), wanted)
    paths = [_get(files[each], commit, wanted) for each in parts]
    folder = next(parent for parent in paths[0].parents if parent.name == commit)
    _remember(folder, commit, wanted)
    return Fetched(folder, commit)


def _get(file: huggingface_hub.hf_api.RepoSibling, commit: str, wanted: _Wanted) -> Path:
    """Return a file in the cache, downloaded and verified if it is not there."""
    known = _in_cache(file.rfilename, commit, wanted)
    if known is not None:
        return known
    try:
        path = Path(huggingface_hub.hf_hub_download(wanted.repo, file.rfilename, revision=commit))
        sound = _is_sound(path, file)
    except Exception as raised:  # The client, its transport and the disk raise many kinds; each gets one sentence.
        cause = raised.__cause__ if isinstance(raised, LocalEntryNotFoundError) else None
        error = cause if isinstance(cause, Exception) else raised
        raise ModelError(_refusal(error, wanted) or _cut(error, file.rfilename, wanted)) from None
    if not sound:
        _forget(path)
        raise ModelError(
            f"{file.rfilename} of model {wanted.name!r} arrived from the hub with another checksum than the hub has on "
            "record and was removed; download it again by running this again."
        )
    return path


def _in_cache(file: str, commit: str, wanted: _Wanted) -> Path | None:
    found = huggingface_hub.try_to_load_from_cache(wanted.repo, file, revision=commit)
    return Path(found) if isinstance(found, str) else None


def _is_sound(path: Path, file: huggingface_hub.hf_api.RepoSibling) -> bool:
    """Compare a file with the hub's record: the SHA-256 of a large one, git's own id of a small one."""
    if file.lfs is not None:
        expected, digest = file.lfs.sha256, hashlib.sha256()
    elif file.blob_id is not None:
        expected, digest = file.blob_id, hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        return True
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == expected


def _forget(path: Path) -> None:
    """Remove a file from the cache: the link in the snapshot, and what it leads to."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _shards(index: Path, wanted: _Wanted) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"model {wanted.name!r} has an unreadable {index.name} on the hub ({type(error).__name__}: "
            f"{cause_of(error)}); choose another revision or model."
        ) from None


def _check_space(size: int, wanted: _Wanted) -> None:
    cache = Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(next(each for each in (cache, *cache.parents) if each.is_dir())).free
    if size > free:
        raise ModelError(
            f"model {wanted.name!r} needs {size / 1e9:,.1f} GB more in the hub's cache {str(cache)!r}, whose disk has "
            f"{free / 1e9:,.1f} GB left; make room, or set HF_HOME to a folder on another disk."
        )


def _remember(folder: Path, commit: str, wanted: _Wanted) -> None:
    """Write down which commit a branch or tag stands for, where the client looks for it without network.

    Only now that the copy is whole; the client itself writes it before the first file.
    """
    revision = wanted.revision or constants.DEFAULT_REVISION
    if revision == commit:
        return
    reference = folder.parents[1] / "refs" / revision
    try:
        if reference.is_file() and reference.read_text(encoding="utf-8") == commit:
            return
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit, encoding="utf-8")
    except OSError:
        # A cache that many share may be read-only; the model is there all the same.
        return


def _cached(wanted: _Wanted) -> Fetched | None:
    """Return the copy in the cache, if it is whole."""
    config = _in_cache("config.json", wanted.revision or constants.DEFAULT_REVISION, wanted)
    if config is None:
        return None
    folder = config.parent
    weights = weights_file({each.name for each in folder.iterdir() if each.is_file()}, allow_pickle=wanted.allow_pickle)
    if weights is None:
        return None
    if weights.endswith(_INDEX) and not all((folder / each).is_file() for each in _shards(folder / weights, wanted)):
        return None
    return Fetched(folder, folder.name)


def without_weights(files: Container[str], name: str, where: str) -> str:
    """Return one sentence on a model without weights that may be read.

    Args:
        files: Names of what is there.
        name: What to call the model.
        where: Where its files are.
    """
    pickled = next((each for each in _PICKLED if each in files), None)
    found = f", only pickled ones ({pickled})" if pickled else ""
    remedy = (
        ", or allow pickled weights by allow_pickle=True or --allow-pickle if you trust their author" if pickled else ""
    )
    return (
        f"model {name!r} has no weights in safetensors {where}{found}; choose another revision that has "
        f"model.safetensors, or another model{remedy}."
    )


def _refusal(error: Exception, wanted: _Wanted) -> str | None:
    """Return one sentence on an error whose cause is known, with what to do."""
    model = f"model {wanted.name!r}"
    page = f"{constants.ENDPOINT}/{wanted.repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    log_in = "log in by 'hf auth login' or set HF_TOKEN"
    if isinstance(error, HFValidationError):
        return f"{model} has the hub id {wanted.repo!r}, which the hub does not allow; use one such as 'org/name'."
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{model} has no revision {wanted.revision!r} on the hub; use a branch, tag or commit of {page}, or leave "
            "the revision out."
        )
    if isinstance(error, GatedRepoError):
        return (
            f"{model} is gated on the hub (HTTP {status}); accept its licence on {page}, and {log_in} of an account "
            "that was given access."
        )
    if status in (401, 403):
        return (
            f"{model} is not shown by the hub to this account (HTTP {status}): {wanted.repo!r} is private, gated or "
            f"does not exist; check its id, {log_in}, and accept its licence on {page} if it has one."
        )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return (
            f"{model} is not on the hub as {wanted.repo!r} (HTTP {status}); check its id, or {log_in} if it is private."
        )
    # Errors of the network have no number of the system, or come in the transport's own types.
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return (
            f"{model} cannot be written to the hub's cache {constants.HF_HUB_CACHE!r} ({error.strerror}); make room, "
            "or set HF_HOME to a folder on another disk that can be written to."
        )
    return None


def _unreachable(error: Exception, wanted: _Wanted) -> str:
    offline = isinstance(error, OfflineModeIsEnabled)
    cause = "HF_HUB_OFFLINE is set" if offline else cause_of(error)
    return (
        f"model {wanted.name!r} cannot be fetched, as the hub at {constants.ENDPOINT} cannot be reached ({cause}) and "
        f"its cache {constants.HF_HUB_CACHE!r} has no whole copy of {wanted.repo!r}"
        f"{f' at {wanted.revision}' if wanted.revision else ''}; "
        f"{'unset HF_HUB_OFFLINE and go online' if offline else 'go online'} (and log in if it is gated), "
        f"{wanted.elsewhere}."
    )


def _cut(error: Exception, file: str, wanted: _Wanted) -> str:
    return (
        f"{file} of model {wanted.name!r} did not arrive whole from the hub ({cause_of(error)}); check the connection "
        f"and run this again, which keeps the files that are whole, or {wanted.elsewhere}."
    )
