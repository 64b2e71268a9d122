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
    from attribution.claims.judge import Claim, Verdict, judge
    from attribution.engine.ablation import ablate
    from attribution.engine.methods import register_method
    from attribution.engine.metrics import Outcome, measure
    from attribution.engine.queries import QueryRanking, query
    from attribution.engine.ranking import Ranking, attribute
    from attribution.errors import AttributionError
    from attribution.experiments.evaluation import evaluate
    from attribution.experiments.selection_rule import known_prompts
    from attribution.identities.preflight import Check, preflight
    from attribution.models.loading import load
    from attribution.models.model import Model
    from attribution.prompts.knowledge import Prompt, load_knowledge
    from attribution.records import AttentionNeuron, FFNNeuron, Head, HeadPosition, Layer

__version__ = "0.1.0"

_HOMES = {
    "AttentionNeuron": "records",
    "AttributionError": "errors",
    "Check": "identities.preflight",
    "Claim": "claims.judge",
    "FFNNeuron": "records",
    "Head": "records",
    "HeadPosition": "records",
    "Layer": "records",
    "Model": "models.model",
    "Outcome": "engine.metrics",
    "Prompt": "prompts.knowledge",
    "QueryRanking": "engine.queries",
    "Ranking": "engine.ranking",
    "Verdict": "claims.judge",
    "ablate": "engine.ablation",
    "attribute": "engine.ranking",
    "evaluate": "experiments.evaluation",
    "judge": "claims.judge",
    "known_prompts": "experiments.selection_rule",
    "load": "models.loading",
    "load_knowledge": "prompts.knowledge",
    "measure": "engine.metrics",
    "preflight": "identities.preflight",
    "query": "engine.queries",
    "register_method": "engine.methods",
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
