"""A loaded model: its network under nnsight, its anatomy and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from attribution.models.anatomy import Anatomy, read_anatomy
from attribution.models.registry import BUNDLED

__all__ = [
    "CHUNK_TOKENS",
    "Model",
    "batch_tokens_for",
]


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
        source: The folder, GGUF file, hub id or packages that it was loaded from.
        revision: The commit on the hub that was loaded; empty for a folder.
        remote: Where its weights are: here if ``False``; otherwise what :func:`load` was told.
        tokens_per_pass: Tokens in one forward pass as given; ``None`` for what memory is taken to hold.
        quantised: How its weights were quantised in a GGUF file, such as ``"Q4_1 (211 of 272 tensors)"``; empty if not.
        begins: Whether its texts should begin with BOS, by the settings of its tokenizer; ``None`` if they do not say.
    """

    name: str
    network: Any = field(repr=False)
    anatomy: Anatomy
    tokenizer: Any = field(repr=False)
    source: str = ""
    revision: str = ""
    remote: bool | str = False
    tokens_per_pass: int | None = field(default=None, repr=False)
    quantised: str = ""
    begins: bool | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what the network holds: on the other side it is another one, with weights."""
        kept = ("name", "network", "source", "revision", "tokens_per_pass")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        network = state["network"]
        anatomy = read_anatomy(network._module, state["name"], check=False)
        self.__dict__.update(state, anatomy=anatomy, tokenizer=network.tokenizer, remote=False)

    @property
    def where_weights_are(self) -> Model:
        """The same model as code sees it that already runs where the weights are: nothing is sent anywhere again."""
        return replace(self, remote=False)

    @property
    def batch_tokens(self) -> int:
        """Tokens in one forward pass, padding included: as given, or what memory is taken to hold."""
        return self.tokens_per_pass or batch_tokens_for(self.anatomy)

    def with_batch_tokens(self, tokens: int) -> Model:
        """Return the same model with another number of tokens in one forward pass."""
        return replace(self, tokens_per_pass=tokens)

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
        read = f"{self.quantised} read as {dtype}" if self.quantised else dtype
        return f"{self.name}: {', '.join([*whence, f'{read} on {self.device}'])}"
