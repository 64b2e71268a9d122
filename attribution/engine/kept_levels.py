"""Levels of ranks, kept: made once for the weights of a sublayer, for this process and, on disk, for later ones.

They are stored under a hash of the weights that they are computed from. After an edit of some neurons, only the levels
of these are computed again.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from attribution.models.anatomy import Readout
from attribution.models.gguf import cache_folder
from attribution.records import SublayerKind

__all__ = ["digest_of", "kept_levels"]

# Raised whenever levels are made differently, so that what an older version kept is not used.
_FORMAT = 1
# Numbers that the process keeps: 2**24 in float32 are 64 MiB.
_KEPT_NUMBERS = 2**24
# Logits that are sorted for a sublayer, from which on it takes longer than reading a file.
_WORTH_A_FILE = 2**24


@dataclass(frozen=True)
class _Kept:
    """The levels of one sublayer.

    Attributes:
        levels: The levels, (rows, ranks).
        seen_by: Digest of what its vectors are projected by.
        rows: Digest of each vector.
    """

    levels: Tensor
    seen_by: str
    rows: list[bytes]


class _Recent(OrderedDict[str, _Kept]):
    """What this process keeps: code that is sent to the machine of the weights leaves it here."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Recent, ()


_RECENT = _Recent()


def digest_of(*parts: Tensor | float | str | None) -> str:
    """Return the SHA-256 of tensors and numbers, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{tuple(part.shape)} {part.dtype}\n".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{part!r}\n".encode())
    return digest.hexdigest()


def kept_levels(
    kinds: Sequence[SublayerKind],
    vectors: Sequence[Tensor],
    post_weights: Sequence[Tensor | None],
    readout: Readout,
    make: Callable[[int, Tensor], Tensor],
) -> list[Tensor]:
    """Return the levels of each sublayer, (rows, ranks), in the dtype that they are made in.

    Those of a model that is new are written to the cache. One that shares sublayers of a kind with another is an edited
    copy, whose own are not.

    Args:
        kinds: Of each sublayer.
        vectors: Of each sublayer, (rows, width).
        post_weights: What they are multiplied by on their way to the residual stream, or ``None``.
        readout: The final norm and unembedding.
        make: Sublayer index and some of its rows to their levels.
    """
    norm = readout.norm
    of_readout = digest_of(_FORMAT, readout.unembedding, norm.weight, norm.centred, readout.logit_scale)
    seen_by = [digest_of(of_readout, post_weight) for post_weight in post_weights]
    names = [digest_of(context, each) for context, each in zip(seen_by, vectors, strict=True)]
    shared = {kind for kind, name in zip(kinds, names, strict=True) if name in _RECENT}
    found: list[_Kept] = []
    for sublayer_index, (kind, name) in enumerate(zip(kinds, names, strict=True)):
        kept = _RECENT.get(name)
        if kept is None:
            own, context = vectors[sublayer_index], seen_by[sublayer_index]
            rows = _digests_of_rows(own)
            worth = len(own) * len(readout.unembedding) >= _WORTH_A_FILE and kind not in shared
            levels = _read(name) if worth else None
            if levels is None:
                levels = _made(own, context, rows, partial(make, sublayer_index))
                if worth:
                    _write(name, levels)
            kept = _Kept(levels, context, rows)
        found.append(kept)
    for name, kept in zip(names, found, strict=True):
        _RECENT[name] = kept
        _RECENT.move_to_end(name)
    while len(_RECENT) > 1 and sum(kept.levels.numel() for kept in _RECENT.values()) > _KEPT_NUMBERS:
        _RECENT.popitem(last=False)
    return [kept.levels.to(readout.unembedding.device) for kept in found]


def _digests_of_rows(vectors: Tensor) -> list[bytes]:
    numbers = vectors.detach().cpu().contiguous().view(torch.uint8).numpy()
    return [hashlib.blake2b(row.data, digest_size=16).digest() for row in numbers]


def _made(vectors: Tensor, seen_by: str, rows: list[bytes], make: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the levels of a sublayer; where most rows equal those of a kept one, only the others are computed."""
    for kept in _RECENT.values():
        if kept.seen_by == seen_by and len(kept.rows) == len(rows):
            differs = [place for place, pair in enumerate(zip(kept.rows, rows, strict=True)) if pair[0] != pair[1]]
            if len(differs) < len(rows) // 2:
                changed = torch.tensor(differs, dtype=torch.long, device=vectors.device)
                return kept.levels.to(vectors.device).index_copy(0, changed, make(changed))
    return make(torch.arange(len(vectors), device=vectors.device))


def _file(name: str) -> Path:
    return cache_folder("ranks") / f"{name}.safetensors"


def _read(name: str) -> Tensor | None:
    try:
        return load_file(_file(name))["levels"]
    except (OSError, SafetensorError, KeyError):
        # Not there, or damaged: it is made anew.
        return None


def _write(name: str, levels: Tensor) -> None:
    # A cache that cannot be written to only costs time.
    with suppress(OSError):
        folder = _file(name).parent
        descriptor, part = tempfile.mkstemp(dir=folder, suffix=".part")
        os.close(descriptor)
        try:
            save_file({"levels": levels.cpu().contiguous()}, part)
            os.replace(part, _file(name))
        finally:
            Path(part).unlink(missing_ok=True)
