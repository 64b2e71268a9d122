"""What a run of pytest is: a worker or the one that writes, on which prompts and categories."""

from __future__ import annotations

import pytest

from attribution.prompts.knowledge import Knowledge

__all__ = ["OWN_PROMPTS", "chosen_categories", "is_gated", "is_worker"]


OWN_PROMPTS: pytest.StashKey[Knowledge] = pytest.StashKey()


def is_worker(config: pytest.Config) -> bool:
    """Say whether this process is a worker of a distributed run."""
    return hasattr(config, "workerinput")


def is_gated(config: pytest.Config) -> bool:
    """Say whether the run is saved or compared."""
    return config.option.attribution_save is not None or config.option.attribution_compare is not None


def chosen_categories(config: pytest.Config) -> list[str]:
    """Return the categories whose prompts are used."""
    from attribution.prompts.knowledge import CATEGORIES

    own = config.stash.get(OWN_PROMPTS, None)
    if own is not None:
        return list(own.words)
    return list(config.hook.pytest_attribution_categories(config=config) or CATEGORIES)
