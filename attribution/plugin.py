"""The pytest plugin: markers, options, model fixtures and the table of verdicts. It only wires.

torch and nnsight are imported inside fixtures, so that a test run which uses none of them pays nothing.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from attribution.chosen_models import (
    DECLARED,
    asked_words,
    chosen_models,
    described,
    entry_by_id,
    fetch,
    id_of,
    left_out_models,
    models_of_the_run,
)
from attribution.collectors import COMPARE, EXHIBIT, LOADED, MEASURED, SAVE, VERDICT, Gate, Report, VerdictTable
from attribution.errors import AttributionError
from attribution.options import add_options, spelled_out
from attribution.registry import declare, entry_of, registry
from attribution.wording import counted

if TYPE_CHECKING:
    from attribution.baselines import ModelFacts
    from attribution.claims import Claim, Verdict
    from attribution.exhibits import Exhibit
    from attribution.knowledge import Knowledge, Prompt
    from attribution.model import Model
    from attribution.workbench import Workbench

__all__: list[str] = []

CLAIM_MARKERS = {
    "identity": "an equality that must hold up to rounding",
    "superiority": "a method does better than a baseline",
    "deletion": "ablating neurons removes the answer",
    "equivalence": "an intervention has no effect, within a stated margin",
    "specificity": "ablating neurons hurts what they are for, and not other things",
    "prediction": "scores predict the effect of ablating single neurons",
    "sufficiency": "the best neurons alone keep the answer",
    "sanity": "a scorer that is broken on purpose loses its effect",
    "planted": "neurons that were made to write an answer are found",
    "reported": "measured and shown, not asserted",
    "knowledge": "a model knows facts of a category",
}
_ABOUT = "about_models"
_RECORDED = pytest.StashKey[set[tuple[str, object]]]()
_FACTS = pytest.StashKey[dict[str, "ModelFacts"]]()
_LOADED = pytest.StashKey[dict[str, str]]()
_OWN_PROMPTS: pytest.StashKey[Knowledge] = pytest.StashKey()


class PluginHooks:
    """Hooks that a suite's conftest.py may implement to choose what runs."""

    @pytest.hookspec(firstresult=True)
    def pytest_attribution_models(self, config: pytest.Config) -> Sequence[str] | None:
        """Return the names of models that tests using ``attribution_model`` run on.

        By default those that ``[tool.attribution.models]`` of pyproject.toml declares, or all registered ones.
        """

    @pytest.hookspec(firstresult=True)
    def pytest_attribution_methods(self, config: pytest.Config) -> Sequence[str] | None:
        """Return the methods that tests using ``attribution_method`` judge; by default the paper's, and every
        registered one that does not come with the package.
        """

    @pytest.hookspec(firstresult=True)
    def pytest_attribution_categories(self, config: pytest.Config) -> Sequence[str] | None:
        """Return the knowledge categories whose prompts are used, and that tests using ``attribution_category`` run on;
        all by default. With --prompts, they are those of the file.
        """


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(PluginHooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Iterator[None]:
    """Read arguments as they are meant, once every option is known."""
    if SAVE in args:
        raise pytest.UsageError(f"{SAVE} came without a name; write {SAVE}=NAME, with the equals sign.")
    # Or argparse would take the path that follows an option without "=" for the name of a baseline.
    if COMPARE in args:
        args[:] = [f"{COMPARE}=" if each == COMPARE else each for each in args]
        # Read already, to find the conftest.py files of the paths.
        early_config.known_args_namespace.file_or_dir = parser.parse_known_args(args).file_or_dir
    yield
    args[:] = spelled_out(args, parser)


def pytest_configure(config: pytest.Config) -> None:
    settings = config.rootpath / "pyproject.toml"
    try:
        config.stash[DECLARED] = declare(settings) if settings.is_file() else []
        if config.option.attribution_prompts is not None:
            from attribution.prompt_files import load_prompts

            config.stash[_OWN_PROMPTS] = load_prompts(Path(config.option.attribution_prompts))
    except AttributionError as error:
        raise pytest.UsageError(str(error)) from None
    for marker in dict.fromkeys(entry.marker for entry in registry().values()):
        names = ", ".join(name for name, entry in registry().items() if entry.marker == marker)
        config.addinivalue_line("markers", f"{marker}: claims about {names}")
    for marker, meaning in CLAIM_MARKERS.items():
        config.addinivalue_line("markers", f"{marker}: {meaning}")
    config.addinivalue_line("markers", f"{_ABOUT}(*names): what is known of these registered models alone")
    revision = config.option.attribution_revision
    about = models_of_the_run(config)
    if revision is not None and len(about) != 1:
        raise pytest.UsageError(
            f"--revision={revision} is of one model, and the run is about {len(about)}; name one by --model=NAME or -m."
        )
    # Workers of a distributed run report to the one process that compares and writes.
    if _is_worker(config):
        return
    config.pluginmanager.register(VerdictTable(), "attribution-verdict-table")
    if config.option.collectonly:
        return
    options = config.option
    if options.attribution_report is not None:
        config.pluginmanager.register(Report(options.attribution_report), "attribution-report")
    given = (
        options.attribution_save,
        options.attribution_compare,
        options.attribution_fail,
        options.attribution_allow,
        options.attribution_update,
    )
    if any(each is not None for each in given):
        try:
            config.pluginmanager.register(Gate(config), "attribution-gate")
        except AttributionError as error:
            raise pytest.UsageError(str(error)) from None


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _gated(config: pytest.Config) -> bool:
    """Say whether the run is saved or compared."""
    return config.option.attribution_save is not None or config.option.attribution_compare is not None


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which models a run is about, if it names any: tests that use none shall not be told of them."""
    chosen = models_of_the_run(config)
    hooks = config.hook.pytest_attribution_models.get_hookimpls()
    named = config.option.attribution_model or config.stash[DECLARED] or hooks
    asked = asked_words(config) & {entry.marker for entry in chosen}
    if not chosen or not (named or asked or _OWN_PROMPTS in config.stash):
        return []
    options = config.option
    return [
        *(f"attribution: {described(entry, options)}" for entry in chosen),
        f"prompts: {_prompts_described(config)}",
    ]


def _prompts_described(config: pytest.Config) -> str:
    from attribution.knowledge import load_knowledge

    own = config.stash.get(_OWN_PROMPTS, None)
    knowledge = own or load_knowledge(categories=_chosen_categories(config))
    facts = len({prompt.fact for prompt in knowledge.prompts})
    whence = config.option.attribution_prompts if own else "bundled"
    most = config.option.attribution_max_prompts
    seed = config.option.attribution_seed
    prompts = counted(len(knowledge.prompts), "prompt")
    return (
        f"{whence}, {prompts} of {counted(facts, 'fact')} in {', '.join(knowledge.words)}"
        + (f"; at most {most} for each model" if most else "")
        + (f"; seed {seed}" if seed else "")
    )


def _chosen_categories(config: pytest.Config) -> list[str]:
    from attribution.knowledge import CATEGORIES

    own = config.stash.get(_OWN_PROMPTS, None)
    if own is not None:
        return list(own.words)
    return list(config.hook.pytest_attribution_categories(config=config) or CATEGORIES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist=loadfile``, give all claims about one model to one worker: they share what was measured."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByModel(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            entry = entry_by_id(nodeid, config)
            return super()._split_scope(nodeid) if entry is None else entry.name

    return ByModel(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch what the tests are about before the first one runs; what cannot be had ends the run in one line."""
    if not _is_worker(session.config) and not session.config.option.collectonly:
        fetch(Counter(name for name in map(_model_of, session.items) if name), session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """Do the same where workers run the tests: once, and with one progress bar."""
    config: pytest.Config = node.config
    found = Counter[str]()
    for file, tests in groupby(ids, key=lambda nodeid: nodeid.partition("::")[0]):
        # Somebody's own test may have a parameter that is called as a model.
        path = config.rootpath / file
        if not path.is_file() or "attribution_" in path.read_text(encoding="utf-8", errors="replace"):
            found.update(entry.name for entry in (entry_by_id(nodeid, config) for nodeid in tests) if entry)
    fetch(found, config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "attribution_model" in metafunc.fixturenames:
        parameters = [
            pytest.param(
                entry.name,
                id=id_of(entry),
                marks=getattr(pytest.mark, entry.marker) if entry.marker else (),
            )
            for entry in chosen_models(metafunc.config)
        ]
        metafunc.parametrize("attribution_model", parameters, indirect=True, scope="session")
    if "attribution_method" in metafunc.fixturenames:
        from attribution.suite.common import judged_methods

        names = metafunc.config.hook.pytest_attribution_methods(config=metafunc.config) or judged_methods()
        metafunc.parametrize("attribution_method", names, scope="session")
    if "attribution_category" in metafunc.fixturenames:
        metafunc.parametrize("attribution_category", _chosen_categories(metafunc.config))


def _model_of(item: pytest.Item) -> str | None:
    """Return the name of the model that a test is about."""
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("attribution_model")


def _about_another_model(item: pytest.Item) -> bool:
    """Say whether a test is marked as being about other models than the one that it would run on."""
    marker = item.get_closest_marker(_ABOUT)
    if marker is None:
        return False
    runs_on = _model_of(item)
    if runs_on is None or not marker.args or not set(marker.args) <= set(registry()):
        raise pytest.UsageError(
            f"{item.nodeid} is marked {_ABOUT}{marker.args}; use attribution_model in it, and name models of: "
            f"{', '.join(registry())}."
        )
    return all(runs_on not in (name, registry()[name].source) for name in marker.args)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out models that need the network, unless ``-m`` or ``--model`` names them: plain pytest needs none."""
    names = left_out_models(config)
    left_out = [item for item in items if _model_of(item) in names or _about_another_model(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


@pytest.fixture(scope="session")
def _attribution_threads(request: pytest.FixtureRequest) -> None:
    """Share the cores among workers: threads that wait for each other on the same ones cost far more than they save."""
    worker: dict[str, Any] | None = getattr(request.config, "workerinput", None)
    if worker is not None:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // worker["workercount"]))


@pytest.fixture(scope="session")
def attribution_model(request: pytest.FixtureRequest, _attribution_threads: None) -> Model:
    """One model after the other of those that the run is about; one that cannot be loaded or trusted is an error."""
    from attribution.checks import preflight
    from attribution.model import load

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
        request.session.shouldfail = f"model {request.param!r} cannot be used"
        pytest.fail(problem, pytrace=False)
    config.stash.setdefault(_LOADED, {})[model.name] = model.described()
    if _gated(config):
        from attribution.baselines import facts_of

        config.stash.setdefault(_FACTS, {})[model.name] = facts_of(model)
    return model


@pytest.fixture(scope="session")
def attribution_bench(request: pytest.FixtureRequest, attribution_model: Model) -> Workbench:
    """The model with its knowledge prompts, and with what was measured on them: tests share what is expensive."""
    from attribution.knowledge import load_knowledge
    from attribution.workbench import Workbench

    config = request.config
    # One progress bar at a time is readable; under xdist there would be one per worker.
    progress = sys.stderr.isatty() and not _is_worker(config)
    knowledge = config.stash.get(_OWN_PROMPTS, None) or load_knowledge(categories=_chosen_categories(config))
    return Workbench(
        attribution_model,
        knowledge,
        max_prompts=config.option.attribution_max_prompts,
        seed=config.option.attribution_seed or 0,
        progress=progress,
    )


@pytest.fixture(scope="session")
def attribution_prompts(request: pytest.FixtureRequest, attribution_bench: Workbench) -> list[Prompt]:
    """The prompts that methods are judged on: one of each fact that the model knows; none at all is an error."""
    name, file = attribution_bench.model.name, request.config.option.attribution_prompts
    which = "bundled prompts" if file is None else f"prompts of {file}"
    others = "give others by --prompts=FILE" if file is None else "give others"
    problem, prompts = "", []
    try:
        prompts = attribution_bench.prompts
    except AttributionError as error:
        problem = f"model {name!r} cannot be asked the {which}: {str(error).removesuffix('.')}, or {others}."
    else:
        if not prompts:
            select = f"python -m attribution select {name}" + ("" if file is None else f" --prompts {file}")
            problem = (
                f"model {name!r} knows none of the {len(attribution_bench.knowledge.prompts)} {which}, so there is "
                f"nothing to ask; see by `{select}` why they fall, and {others} or choose another model."
            )
    if problem:
        pytest.fail(problem, pytrace=False)
    return prompts


@pytest.fixture
def assert_claim(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[[Verdict], None]:
    """Return a function that records a verdict for the table and the gate, and fails unless it is ``supported``.

    A claim that the registry records as not holding for the model is an expected failure while its verdict is the
    recorded one. So is every other, if --attribution-fail leaves verdicts out. A claim of a family that the registry
    does not assert for the model is only recorded, unless --attribution-assert makes it binding.
    """
    from attribution.gate import Policy
    from attribution.report import verdict_row
    from attribution.suite.common import METHOD

    config = request.config
    policy = Policy.of(config.option.attribution_fail, comparing=config.option.attribution_compare is not None)

    def check(verdict: Verdict) -> None:
        __tracebackhide__ = True
        claim = verdict.claim
        # The registry records what was measured of the paper's method, on the bundled prompts and by the first seed.
        measured = (
            claim.method in ("", METHOD) and _OWN_PROMPTS not in config.stash and not config.option.attribution_seed
        )
        recorded = entry_of(verdict.model).not_supported.get(claim.id) if measured else None
        if claim.gated and _gated(config):
            _record_for_the_gate(config, verdict, record_property)
        binding = _is_binding(claim, verdict.model, config)
        record_property(VERDICT, verdict_row(verdict, recorded, asserted=binding))
        loaded = config.stash.get(_LOADED, {}).get(verdict.model)
        if loaded is not None:
            record_property(LOADED, {verdict.model: loaded})
        if not binding:
            return
        status, sentence = verdict.status.value, verdict.sentence()
        if recorded == status:
            pytest.xfail(f"as recorded in the registry: {sentence}")
        if recorded is not None:
            sentence = f"the registry records {recorded!r}, correct it there: {sentence}"
        elif status == "supported":
            return
        if not policy.verdicts:
            pytest.xfail(f"--attribution-fail leaves verdicts out: {sentence}")
        pytest.fail(sentence, pytrace=False)

    return check


def _is_binding(claim: Claim, model: str, config: pytest.Config) -> bool:
    """Say whether a test fails unless the claim is supported on the model."""
    if not claim.asserted or not claim.family or config.option.attribution_assert:
        return claim.asserted
    return _OWN_PROMPTS not in config.stash and claim.family in entry_of(model).asserted


def _record_for_the_gate(
    config: pytest.Config, verdict: Verdict, record_property: Callable[[str, object], None]
) -> None:
    from attribution.baselines import record_of

    __tracebackhide__ = True
    facts = config.stash.get(_FACTS, {}).get(verdict.model)
    if facts is None:
        pytest.fail(
            f"claim {verdict.claim.id!r} is about the model {verdict.model!r}, which the fixture attribution_model did "
            "not load, so no baseline can tell its weights; load it by --model=NAME, or set gated=False.",
            pytrace=False,
        )
    record_property(MEASURED, {"record": record_of(verdict), "facts": asdict(facts)})


@pytest.fixture
def attribution_exhibit(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[[Workbench, Callable[[Workbench], Exhibit]], None]:
    """Return a function that measures an exhibit and records it for the report, once for each model.

    Without a report it does nothing.
    """
    config = request.config
    recorded = config.stash.setdefault(_RECORDED, set())

    def record(bench: Workbench, measure: Callable[[Workbench], Exhibit]) -> None:
        which = bench.model.name, measure
        if config.option.attribution_report is not None and which not in recorded:
            recorded.add(which)
            record_property(EXHIBIT, asdict(measure(bench)))

    return record
