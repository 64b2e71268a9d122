"""What the plugin adds to pytest before tests are collected: hooks, options, markers, collectors, the header."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from attribution.errors import AttributionError
from attribution.models.registry import declare, registry
from attribution.pytest_plugin.chosen_models import (
    DECLARED,
    asked_words,
    described,
    models_of_the_run,
)
from attribution.pytest_plugin.collection import ABOUT_MODELS
from attribution.pytest_plugin.collectors import (
    COMPARE,
    GATE,
    REPORT,
    SAVE,
    Gate,
    Report,
    VerdictTable,
)
from attribution.pytest_plugin.hookspecs import PluginHooks
from attribution.pytest_plugin.options import add_options, settle, spelled_out
from attribution.pytest_plugin.session import OWN_PROMPTS, chosen_categories, is_worker, keep_terminal
from attribution.wording import pluralize

__all__ = [
    "pytest_addhooks",
    "pytest_addoption",
    "pytest_configure",
    "pytest_load_initial_conftests",
    "pytest_report_header",
    "pytest_sessionfinish",
]

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


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the hooks of :class:`PluginHooks`."""
    pluginmanager.add_hookspecs(PluginHooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the plugin's options."""
    add_options(parser)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Iterator[None]:
    """Read arguments as they are meant, once every option is known."""
    if SAVE in args:
        raise pytest.UsageError(f"{SAVE} came without a name; write {SAVE}=NAME, with the equals sign.")
    # Or argparse would take the path that follows an option without "=" for the name of a stored run.
    if COMPARE in args:
        args[:] = [f"{COMPARE}=" if each == COMPARE else each for each in args]
        # Read already, to find the conftest.py files of the paths.
        early_config.known_args_namespace.file_or_dir = parser.parse_known_args(args).file_or_dir
    yield
    args[:] = spelled_out(args, parser)


def pytest_configure(config: pytest.Config) -> None:
    """Read what is declared, register markers, and register what gathers verdicts."""
    keep_terminal(config)
    settle(config.option)
    settings = config.rootpath / "pyproject.toml"
    try:
        config.stash[DECLARED] = declare(settings) if settings.is_file() else []
        if config.option.attribution_prompts is not None:
            from attribution.prompts.prompt_files import load_prompts

            config.stash[OWN_PROMPTS] = load_prompts(Path(config.option.attribution_prompts))
    except AttributionError as error:
        raise pytest.UsageError(str(error)) from None
    for marker in dict.fromkeys(entry.marker for entry in registry().values()):
        names = ", ".join(name for name, entry in registry().items() if entry.marker == marker)
        config.addinivalue_line("markers", f"{marker}: claims about {names}")
    for marker, meaning in CLAIM_MARKERS.items():
        config.addinivalue_line("markers", f"{marker}: {meaning}")
    config.addinivalue_line("markers", f"{ABOUT_MODELS}(*names): what is known of these registered models alone")
    revision = config.option.attribution_revision
    about = models_of_the_run(config)
    if revision is not None and len(about) != 1:
        raise pytest.UsageError(
            f"--revision={revision} is of one model, and the run is about {len(about)}; name one by --model=NAME or -m."
        )
    # Workers of a distributed run report to the one process that compares and writes.
    if is_worker(config):
        return
    config.pluginmanager.register(VerdictTable(), "attribution-verdict-table")
    if config.option.collectonly:
        return
    options = config.option
    if options.attribution_report is not None:
        _register(config, Report(options.attribution_report), "attribution-report", REPORT)
    if _asked_of_the_gate(config):
        try:
            _register(config, Gate(config), GATE, ", ".join(_asked_of_the_gate(config)))
        except AttributionError as error:
            raise pytest.UsageError(str(error)) from None


def _asked_of_the_gate(config: pytest.Config) -> list[str]:
    """Return the options of a run that ask something of the gate."""
    names = ("save", "compare", "fail", "allow", "update")
    return [f"--attribution-{name}" for name in names if getattr(config.option, f"attribution_{name}") is not None]


def _register(config: pytest.Config, plugin: object, name: str, asked: str) -> None:
    """Register what an option asks for.

    Raises:
        pytest.UsageError: If it is blocked by its name.
    """
    if config.pluginmanager.register(plugin, name) is None:
        raise pytest.UsageError(
            f"-p no:{name} blocks what {asked} asks for; leave one of the two out, on the command line, in addopts or "
            "in PYTEST_ADDOPTS."
        )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let a run fail that was to be compared or stored, and whose gate somebody took away on the way."""
    config = session.config
    asked = [] if is_worker(config) or config.option.collectonly else _asked_of_the_gate(config)
    if asked and not config.pluginmanager.has_plugin(GATE):
        session.exitstatus = pytest.ExitCode.USAGE_ERROR
        session.shouldfail = f"attribution gate: {', '.join(asked)} asked for it, and something unregistered it"


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which models a run is about, if it names any: tests that use none shall not be told of them."""
    chosen = models_of_the_run(config)
    hooks = config.hook.pytest_attribution_models.get_hookimpls()
    named = config.option.attribution_model or config.stash[DECLARED] or hooks
    asked = asked_words(config) & {entry.marker for entry in chosen}
    if not chosen or not (named or asked or OWN_PROMPTS in config.stash):
        return []
    options = config.option
    return [
        *(f"attribution: {described(entry, options)}" for entry in chosen),
        f"prompts: {_prompts_described(config)}",
    ]


def _prompts_described(config: pytest.Config) -> str:
    from attribution.prompts.knowledge import load_knowledge

    own = config.stash.get(OWN_PROMPTS, None)
    knowledge = own or load_knowledge(categories=chosen_categories(config))
    facts = len({prompt.fact for prompt in knowledge.prompts})
    whence = config.option.attribution_prompts if own else "bundled"
    most = config.option.attribution_max_prompts
    seed = config.option.attribution_seed
    prompts = pluralize(len(knowledge.prompts), "prompt")
    return (
        f"{whence}, {prompts} of {pluralize(facts, 'fact')} in {', '.join(knowledge.words)}"
        + (f"; at most {most} for each model" if most else "")
        + (f"; seed {seed}" if seed else "")
    )
