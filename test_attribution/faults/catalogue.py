"""The faults, subject by subject, in the order in which data flows."""

from __future__ import annotations

from fault import Fault
from slips import (
    ablation,
    anatomy,
    experiments,
    gradients,
    importance,
    judging,
    metrics,
    norms,
    prompts,
    queries,
    ranking,
    suite,
    trace,
)

FAULTS: tuple[Fault, ...] = (
    *anatomy.FAULTS,
    *norms.FAULTS,
    *trace.FAULTS,
    *importance.FAULTS,
    *ranking.FAULTS,
    *prompts.FAULTS,
    *ablation.FAULTS,
    *metrics.FAULTS,
    *experiments.FAULTS,
    *queries.FAULTS,
    *gradients.FAULTS,
    *judging.FAULTS,
    *suite.FAULTS,
)
