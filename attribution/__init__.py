"""Attribution to single neurons of language models, and tests of it by ablation.

    import attribution as at
    model = at.load("bundled:gpt2")
    at.attribute(model, "The capital of France is", " Paris", k=10)

The names below are imported on first use, so that the pytest plugin costs nothing to those who do not use it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attribution.checks import Check, preflight
    from attribution.claims import Claim, Verdict, judge
    from attribution.errors import AttributionError
    from attribution.evaluation import ablate, evaluate, known_prompts
    from attribution.knowledge import Prompt, load_knowledge
    from attribution.methods import register_method
    from attribution.metrics import Outcome, measure
    from attribution.model import Model, load
    from attribution.queries import QueryRanking, query
    from attribution.ranking import Ranking, attribute
    from attribution.records import AttentionNeuron, FFNNeuron, Head, HeadPosition, Layer

__version__ = "0.1.0"

_HOMES = {
    "AttentionNeuron": "records",
    "AttributionError": "errors",
    "Check": "checks",
    "Claim": "claims",
    "FFNNeuron": "records",
    "Head": "records",
    "HeadPosition": "records",
    "Layer": "records",
    "Model": "model",
    "Outcome": "metrics",
    "Prompt": "knowledge",
    "QueryRanking": "queries",
    "Ranking": "ranking",
    "Verdict": "claims",
    "ablate": "evaluation",
    "attribute": "ranking",
    "evaluate": "evaluation",
    "judge": "claims",
    "known_prompts": "evaluation",
    "load": "model",
    "load_knowledge": "knowledge",
    "measure": "metrics",
    "preflight": "checks",
    "query": "queries",
    "register_method": "methods",
}

__all__ = [
    "AttentionNeuron",
    "AttributionError",
    "Check",
    "Claim",
    "FFNNeuron",
    "Head",
    "HeadPosition",
    "Layer",
    "Model",
    "Outcome",
    "Prompt",
    "QueryRanking",
    "Ranking",
    "Verdict",
    "ablate",
    "attribute",
    "evaluate",
    "judge",
    "known_prompts",
    "load",
    "load_knowledge",
    "measure",
    "preflight",
    "query",
    "register_method",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}.")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
