"""The fixtures: a model, the bench of its claims, and what records and judges their verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from attribution.errors import AttributionError
from attribution.models.registry import entry_of
from attribution.pytest_plugin.chosen_models import models_of_the_run
from attribution.pytest_plugin.outcome import is_binding, outcome_of_claim, stop_run
from attribution.pytest_plugin.recorded import (
    ATTEMPT,
    EXHIBIT,
    LOADED,
    MEASURED,
    VERDICT,
    begin_attempt,
    record,
    show_in_junit,
)
from attribution.pytest_plugin.session import OWN_PROMPTS, chosen_categories, is_gated, is_worker, keep, terminal

if TYPE_CHECKING:
    from attribution.claims.bench import Workbench
    from attribution.claims.exhibits import Exhibit
    from attribution.claims.judge import Verdict
    from attribution.models.fingerprint import ModelFacts
    from attribution.models.model import Model
    from attribution.prompts.knowledge import Prompt

__all__ = [
    "assert_claim",
    "attribution_bench",
    "attribution_exhibit",
    "attribution_model",
    "attribution_prompts",
]

_RECORDED = pytest.StashKey[set[tuple[str, object]]]()
_FACTS = pytest.StashKey[dict[str, "ModelFacts"]]()
_LOADED = pytest.StashKey[dict[str, str]]()


@pytest.fixture(scope="session")
def _attribution_threads(request: pytest.FixtureRequest) -> None:
    """Share the cores among workers: threads that wait for each other on the same ones cost far more than they save.

    All claims about a model are one worker's; the others leave it their cores.
    """
    worker: dict[str, Any] | None = getattr(request.config, "workerinput", None)
    if worker is not None:
        import torch

        busy = min(worker["workercount"], len(models_of_the_run(request.config)) or 1)
        torch.set_num_threads(max(1, torch.get_num_threads() // busy))


@pytest.fixture(scope="session")
def attribution_model(request: pytest.FixtureRequest, _attribution_threads: None) -> Model:
    """One model after the other of those that the run is about; one that cannot be loaded or trusted is an error."""
    from attribution.identities.preflight import preflight
    from attribution.models.loading import load

    config = request.config
    options = config.option
    problem = ""
    try:
        model = load(
            request.param,
            device=options.attribution_device,
            dtype=options.attribution_dtype,
            revision=options.attribution_revision,
            models_dir=options.attribution_models_dir,
            allow_pickle=bool(options.attribution_allow_pickle),
        )
        preflight(model)
    except AttributionError as error:
        problem = str(error)
    if problem:
        # A run that was asked for this model can say nothing without it: one error, not one per test.
        stop_run(request.session, f"model {request.param!r} cannot be used")
        pytest.fail(problem, pytrace=False)
    config.stash.setdefault(_LOADED, {})[model.name] = model.described()
    if is_gated(config):
        from attribution.models.fingerprint import facts_of

        config.stash.setdefault(_FACTS, {})[model.name] = facts_of(model)
    return model


@pytest.fixture(scope="session")
def attribution_bench(request: pytest.FixtureRequest, attribution_model: Model) -> Iterator[Workbench]:
    """The model with its knowledge prompts, and with what was measured on them: tests share what is expensive."""
    from attribution.claims.bench import Workbench
    from attribution.claims.sample import Sample
    from attribution.engine.progress import Progress
    from attribution.prompts.knowledge import load_knowledge

    config = request.config
    stream = terminal(config)
    # One bar at a time is readable; workers may be several.
    lines = stream is None or not stream.isatty() or is_worker(config)
    progress = Progress(shown=stream is not None, stream=stream, lines=lines)
    knowledge = config.stash.get(OWN_PROMPTS, None) or load_knowledge(categories=chosen_categories(config))
    most = config.option.attribution_max_prompts
    sample = Sample(attribution_model, knowledge, max_prompts=most, progress=progress)
    bench = Workbench(sample, seed=config.option.attribution_seed or 0, progress=progress)
    yield bench
    knows = sample.in_words() if "known" in vars(sample) else ""
    keep(config, attribution_model.name, {"spent": bench.spent, "knows": knows})


@pytest.fixture(scope="session")
def attribution_prompts(request: pytest.FixtureRequest, attribution_bench: Workbench) -> list[Prompt]:
    """The prompts that methods are judged on: one of each fact that the model knows; none at all is an error."""
    sample = attribution_bench.sample
    name, file = sample.model.name, request.config.option.attribution_prompts
    which = "bundled prompts" if file is None else f"prompts of {file}"
    others = "give others by --prompts=FILE" if file is None else "give others"
    problem, prompts = "", []
    try:
        prompts = sample.prompts
    except AttributionError as error:
        problem = f"model {name!r} cannot be asked the {which}: {str(error).removesuffix('.')}, or {others}."
    else:
        if not prompts:
            select = f"python -m attribution select {name}" + ("" if file is None else f" --prompts {file}")
            problem = (
                f"model {name!r} knows none of the {len(sample.knowledge.prompts)} {which}, so there is "
                f"nothing to ask; see by `{select}` why they fall, and {others} or choose another model."
            )
    if problem:
        pytest.fail(problem, pytrace=False)
    return prompts


@pytest.fixture
def assert_claim(request: pytest.FixtureRequest) -> Callable[[Verdict], None]:
    """Return a function that records a verdict for the table and the gate, and fails unless it is ``supported``.

    A claim that the registry records as not holding for the model is an expected failure while its verdict is the
    recorded one. So is every other, if --attribution-fail leaves verdicts out. A claim of a family that the registry
    does not assert for the model is only recorded, unless --attribution-assert makes it binding. A claim with fewer
    prompts than it needs is skipped, unless it is binding and --max-prompts is not why there are so few.
    """
    from attribution.claims.about_methods.common import METHOD
    from attribution.pytest_plugin.policy import policy_of
    from attribution.report.verdicts import verdict_row

    config, item = request.config, request.node
    policy = policy_of(config)
    attempt = begin_attempt(item)

    def check(verdict: Verdict) -> None:
        __tracebackhide__ = True
        claim = verdict.claim
        # The registry records what was measured of the paper's method, on the bundled prompts and by the first seed.
        measured = (
            claim.method in ("", METHOD) and OWN_PROMPTS not in config.stash and not config.option.attribution_seed
        )
        recorded = entry_of(verdict.model).not_supported.get(claim.id) if measured else None
        if claim.gated and is_gated(config):
            _record_for_the_gate(item, verdict)
        binding = is_binding(
            claim,
            entry_of(verdict.model),
            assert_all=bool(config.option.attribution_assert),
            bundled_prompts=OWN_PROMPTS not in config.stash,
        )
        record(item, VERDICT, verdict_row(verdict, recorded, asserted=binding))
        show_in_junit(item, verdict, binding=binding)
        if attempt > 1:
            record(item, ATTEMPT, {"claim": claim.id, "attempt": attempt})
        loaded = config.stash.get(_LOADED, {}).get(verdict.model)
        if loaded is not None:
            record(item, LOADED, {verdict.model: loaded})
        outcome = outcome_of_claim(
            verdict.status.value,
            verdict.sentence(),
            binding=binding,
            recorded=recorded,
            policy=policy,
            look=config.option.attribution_max_prompts is not None and not config.option.attribution_assert,
        )
        if outcome.kind == "undecided":
            pytest.skip(outcome.sentence)
        if outcome.kind == "expected failure":
            pytest.xfail(outcome.sentence)
        if outcome.kind == "red":
            pytest.fail(outcome.sentence, pytrace=False)

    return check


def _record_for_the_gate(item: pytest.Item, verdict: Verdict) -> None:
    from attribution.gate.stored_run import record_of

    __tracebackhide__ = True
    facts = item.config.stash.get(_FACTS, {}).get(verdict.model)
    if facts is None:
        pytest.fail(
            f"claim {verdict.claim.id!r} is about the model {verdict.model!r}, which the fixture attribution_model did "
            "not load, so no stored run can tell its weights; load it by --model=NAME, or set gated=False.",
            pytrace=False,
        )
    record(item, MEASURED, {"record": record_of(verdict), "facts": asdict(facts)})


@pytest.fixture
def attribution_exhibit(request: pytest.FixtureRequest) -> Callable[[Workbench, Callable[[Workbench], Exhibit]], None]:
    """Return a function that measures an exhibit and records it for the report, once for each model.

    Without a report it does nothing.
    """
    config = request.config
    recorded = config.stash.setdefault(_RECORDED, set())

    def measured(bench: Workbench, measure: Callable[[Workbench], Exhibit]) -> None:
        which = bench.model.name, measure
        if config.option.attribution_report is not None and which not in recorded:
            recorded.add(which)
            record(request.node, EXHIBIT, asdict(measure(bench)))

    return measured
