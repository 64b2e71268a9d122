"""What commands share: how a model is loaded, and how text is printed on any terminal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribution.models.registry import DTYPES

if TYPE_CHECKING:
    from attribution.models.model import Model

__all__ = ["add_loading", "load_chosen", "print_text"]


def add_loading(parser: Any) -> None:
    """Add the options that say how a model is loaded."""
    parser.add_argument("--models-dir", type=Path, metavar="DIR", help="folder of model folders, used before the hub")
    parser.add_argument(
        "--device", metavar="DEVICE", help="where the weights go, such as cuda, auto or tensor_parallel (cpu)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (the registered one, or float32)")
    parser.add_argument(
        "--revision", metavar="REVISION", help="branch, tag or commit on the hub (the registered one, or its default)"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pickled weights where a model has no safetensors"
    )


def load_chosen(options: argparse.Namespace) -> Model:
    """Load the model that the options name."""
    from attribution.models.loading import load

    return load(
        options.model,
        device=options.device,
        dtype=options.dtype,
        revision=options.revision,
        models_dir=options.models_dir,
        allow_pickle=options.allow_pickle,
    )


def print_text(text: str) -> None:
    """Print a text on any terminal: what its encoding lacks is written as an escape."""
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
