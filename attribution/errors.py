"""The one exception that every complaint of this package derives from."""

from __future__ import annotations

__all__ = [
    "AttributionError",
    "BadInputError",
    "KnowledgeError",
    "ModelError",
    "PreflightError",
    "UnsupportedModelError",
]


class AttributionError(Exception):
    """Base of all errors raised on purpose; its message is one sentence: value, expectation, remedy."""


class BadInputError(AttributionError, ValueError):
    """An argument that cannot be used: a prompt, an answer, a method, a unit, a number."""


class KnowledgeError(AttributionError, ValueError):
    """A knowledge file that breaks a rule; the message starts with ``file:line``."""


class ModelError(AttributionError):
    """A model that cannot be found, cannot be loaded or cannot be trusted."""


class PreflightError(ModelError):
    """A loaded model that breaks an identity which attribution rests on."""


class UnsupportedModelError(ModelError):
    """A model family that :mod:`attribution.models.anatomy` has no record of."""
