"""Where the bundled models and prompts lie: in the wheel, or in a checkout of the project."""

from __future__ import annotations

from pathlib import Path

from attribution.errors import AttributionError

__all__ = ["fixtures_folder"]


def fixtures_folder(name: str) -> Path:
    """Return the folder of bundled data called ``name`` (``"models"`` or ``"knowledge"``).

    The wheel carries the data inside the package; a checkout keeps it beside the package.

    Raises:
        AttributionError: If neither place has it.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "fixtures" / name, package.parent / "fixtures" / name):
        if candidate.is_dir():
            return candidate
    raise AttributionError(
        f"the bundled folder {name!r} is missing beside {package}; reinstall the package, its data did not come along."
    )
