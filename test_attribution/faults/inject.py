"""Inject faults into the engine and the suite, and see what catches them.

    python test_attribution/faults/inject.py              # every fault of catalogue.py; print the table
    python test_attribution/faults/inject.py --write      # and keep it in docs/faults.md
    python test_attribution/faults/inject.py NAME ...     # some faults, with what was said of each

A fault is a change of a function, as a slip of its author would be: see changes.py. If it cannot be made, that is an
error. Each is made in a process of its own, forked from one that has imported everything. There both bundled models are
loaded and checked by the preflight and, if that finds nothing, judged by the claims that the fault concerns. Red is a
broken identity, a claim that is not supported, or an error that stops the run. Without a fault all must be green.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module, util
from pathlib import Path
from typing import Any

from changes import BrokenFaultError, modules
from fault import Fault

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TABLE = ROOT / "docs" / "faults.md"

MODELS = ("bundled:gpt2", "bundled:llama")
CONTROL = "no fault"
HEADER = """# Faults and what catches them

A suite that is always green proves nothing. Each row is a slip that an author of this package could make, and what
turned red when it was made: an identity of the preflight, a family of claims, or an error that stopped the run. Without
a slip, all of these are green on both bundled models. Where the preflight finds a slip, no claim is judged, as in a
real run; otherwise the claims that the slip concerns are.

A slip is made in one function, or in two that share it. The code is what the function then does instead, given those of
its arguments that the code names: `original()` is its result without the slip, and `original(norm=other)` its result
with another argument. An arrow stands for a change of the function's source.

The claims by definition and by hand, and those of known verdicts and outcomes, are in
`test_faithfulness/test_definitions.py`, known facts in `test_knowledge`, the others in the file of `test_faithfulness`
that has their name.

Written by `python test_attribution/faults/inject.py --write`; `test_attribution/test_faults.py` makes every slip again
and compares.
"""
# Every so manyth fact of the files, and at most so many prompts: with fewer, not all claims used here are supported
# where there is no fault. Exact claims need fewer.
EVERY, EVERY_FOR_EXACT, PROMPTS = 3, 30, 200
# Seconds in which a fault must be caught, on a machine that does other things as well.
LIMIT = 600
PROCESSES = 2
# How families of exact claims are called.
EXACT = ("by definition", "by hand", "is the sum", "known verdicts", "known outcomes")
# What a change raises that is nonsense rather than a slip.
NONSENSE = (BrokenFaultError, NameError, AttributeError, TypeError, SyntaxError, ImportError)

Claims = Callable[[Any], list[Any]]


def claims() -> dict[str, Claims]:
    """Return families of claims by name: a workbench to verdicts.

    A family is one test of the suite with some of its parameters. Left out are those that do not hold for a bundled
    model, or need more prompts: if a claim is not supported without a fault, it catches nothing.
    """
    from attribution.claims.about_methods import single_neurons
    from attribution.claims.about_the_engine import by_hand, recounts
    from attribution.engine.decomposition import IDENTITIES
    from attribution.engine.metrics import METRICS
    from attribution.prompts.knowledge import CATEGORIES

    suite = _module(HERE.parent / "suite.py")
    # What the tests state and measure is made smaller: as few prompts as there are have to decide a claim.
    single_neurons.PROMPTS = 40
    smaller: dict[str, dict[str, Any]] = {
        "test_planted": {"STRENGTHS": (2.0,)},
        "test_query_neurons": {"MIN_PROMPTS": PROMPTS},
        "test_sanity": {"MIN_PROMPTS": PROMPTS, "MIN_FLIPPED": single_neurons.PROMPTS},
        "test_specificity": {"MIN_PROMPTS": PROMPTS, "MIN_PAIRED": PROMPTS // 2},
        "test_top_neurons": {"MIN_PROMPTS": PROMPTS},
        "test_value_neurons": {"MIN_PROMPTS": PROMPTS},
    }
    for name, constants in smaller.items():
        for constant, value in constants.items():
            assert hasattr(suite.module(name), constant)
            setattr(suite.module(name), constant, value)

    def family(name: str, test: str, parameters: Sequence[dict[str, Any]] = ({},)) -> Claims:
        judged = getattr(suite.module(name), test)
        return lambda bench: [suite.verdict_of(judged, bench, **each) for each in parameters]

    def exact(name: str, test: str, parameters: Sequence[dict[str, Any]] = ({},)) -> Claims:
        verdicts = family(name, test, parameters)

        def of_bench(bench: Any) -> list[Any]:
            # If so few prompts are known, the tests would ask all, known or not.
            bench.of_the_engine = bench
            return verdicts(bench)

        return of_bench

    def over(parameter: str, values: Iterable[Any]) -> list[dict[str, Any]]:
        return [{parameter: value} for value in values]

    # The two others are about as good as the method.
    baselines = ("vector_norm", "coefficient", "reciprocal_rank", "output_norm", "coefficient_by_rank")
    cells = [{"baseline": baseline, "metric": metric} for baseline in baselines for metric in ("prob", "logp")]
    cuts = suite.module("test_value_neurons").CUTS
    sets = suite.module("test_specificity").SETS
    planted = over("kind", ("ffn", "attention"))
    return {
        "residual stream is the sum": exact(
            "test_decomposition", "test_residual_stream_is_the_sum_of_its_parts", over("identity", IDENTITIES)
        ),
        "known verdicts": exact(
            "test_definitions", "test_numbers_with_a_known_truth_get_the_verdicts_that_they_should"
        ),
        "known outcomes": exact("test_definitions", "test_logits_with_a_known_answer_are_measured_right"),
        "scores by definition": exact(
            "test_definitions", "test_scores_are_what_they_are_defined_to_be", over("unit", recounts.SCORED_UNITS)
        ),
        "top 10 by definition": exact(
            "test_definitions", "test_rankings_leave_nothing_better_out", over("unit", recounts.SEARCHED_UNITS)
        ),
        "query scores by definition": exact("test_definitions", "test_query_scores_are_what_they_are_defined_to_be"),
        "controls by definition": exact("test_definitions", "test_controls_are_drawn_as_stated"),
        "ablation by hand": exact(
            "test_definitions", "test_ablation_is_what_hooks_on_the_plain_model_do", over("kind", by_hand.ABLATIONS)
        ),
        "scores by hand": exact(
            "test_definitions",
            "test_backward_passes_say_what_gradients_of_the_plain_model_say",
            over("method", by_hand.BACKWARD),
        ),
        "known facts": family(
            "test_known", "test_model_knows_the_facts_of_a_category", over("attribution_category", CATEGORIES)
        ),
        "value neurons cut": family(
            "test_value_neurons", "test_zeroing_value_neurons_removes_the_answer", over("metric", cuts)
        ),
        "random neurons have no effect": family(
            "test_value_neurons",
            "test_zeroing_as_many_random_neurons_has_no_effect",
            [{"metric": "mrr", "seed": 0}],
        ),
        "top 10 beat baselines": family(
            "test_top_neurons", "test_zeroing_the_top_10_hurts_more_than_a_baselines_top_10", cells
        ),
        "query neurons beat random ones": family(
            "test_query_neurons",
            "test_zeroing_query_neurons_hurts_more_than_zeroing_random_ones",
            over("metric", METRICS),
        ),
        "neurons are specific to a fact": family(
            "test_specificity",
            "test_zeroing_a_facts_neurons_hurts_it_more_than_an_unrelated_fact",
            over("chosen", sets),
        ),
        "broken scorers lose their effect": family(
            "test_sanity",
            "test_broken_scorer_loses_its_effect",
            over("control", ("sign flip", "weight randomisation")),
        ),
        "planted neurons are found": family(
            "test_planted", "test_what_was_planted_to_write_the_answer_is_ranked_first", planted
        ),
        "planted neurons are undone": family("test_planted", "test_ablating_what_was_planted_undoes_it", planted),
        "both ends of a chain are found": family("test_planted", "test_both_ends_of_a_planted_chain_are_ranked_first"),
    }


def _module(path: Path) -> Any:
    spec = util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _said(error: Exception) -> tuple[str, str]:
    """Return what an error is called in the table, and what it says."""
    from attribution.errors import PreflightError

    if isinstance(error, NONSENSE):
        raise BrokenFaultError("".join(traceback.format_exception(error))) from error
    found = re.search(r"breaks the identity '(\w+)'", str(error)) if isinstance(error, PreflightError) else None
    return (found[1] if found else type(error).__name__), str(error)


def examine(names: Sequence[str]) -> dict[str, str]:
    """Load, check and judge the models, and return what is red, with what is said of it.

    Args:
        names: The families of claims to judge if the preflight finds nothing; all of them, whatever is found, if it
            is empty.
    """
    from attribution.claims.bench import Workbench
    from attribution.claims.sample import Sample
    from attribution.identities.preflight import preflight
    from attribution.models.loading import load
    from attribution.prompts.knowledge import Knowledge, load_knowledge

    red: dict[str, str] = {}
    models = []

    def note(catcher: str, model: str, said: str) -> None:
        red[f"{catcher} ({model.removeprefix('bundled:')})"] = said

    for name in MODELS:
        try:
            model = load(name)
            models.append(model)
        except Exception as error:
            called, said = _said(error)
            note(f"loading: {called}", name, said)
            continue
        try:
            preflight(model)
        except Exception as error:
            called, said = _said(error)
            note(f"preflight: {called}", name, said)
    if red:
        return red
    knowledge = load_knowledge()
    families = claims()
    for model in models:
        many, few = (
            Workbench(Sample(model, Knowledge(knowledge.facts[::each], knowledge.words), max_prompts=PROMPTS))
            for each in (EVERY, EVERY_FOR_EXACT)
        )
        for family in names or families:
            bench = few if family.endswith(EXACT) else many
            try:
                failed = [each for each in families[family](bench) if each.status.value != "supported"]
            except Exception as error:
                called, said = _said(error)
                note(f"{family}: {called}", model.name, said)
            else:
                if failed:
                    note(family, model.name, failed[0].sentence() + failed[0].note)
        if red and names:
            return red
    return red


def _warm() -> None:
    """Import once what every process needs, but load no model: that starts threads."""
    import torch

    torch.set_num_threads(1)
    for name in ("nnsight", "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"):
        import_module(name)
    list(modules())


def _child(fault: Fault, path: Path) -> None:
    """Make a fault here, and write down what is red."""
    try:
        for change in fault.changes:
            change.apply()
        result: dict[str, Any] = {"red": examine(fault.claims)}
    except BrokenFaultError as error:
        result = {"broken": str(error)}
    except BaseException as error:
        result = {"broken": "".join(traceback.format_exception(error))}
    path.write_text(json.dumps(result), encoding="utf-8")


def inject(faults: Sequence[Fault]) -> dict[str, dict[str, Any]]:
    """Return, for each fault, ``red`` or why it cannot be made, ``broken``, and how long it took, ``seconds``."""
    _warm()
    results: dict[str, dict[str, Any]] = {}
    running: dict[int, tuple[Fault, float]] = {}
    waiting = list(faults)
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < PROCESSES:
                fault = waiting.pop(0)
                path = Path(folder, f"{len(waiting)}.json")
                process = os.fork()
                if process == 0:
                    signal.alarm(LIMIT)
                    _child(fault, path)
                    os._exit(0)
                running[process] = (fault, time.monotonic())
                results[fault.name] = {"path": path}
            process, status = os.wait()
            fault, start = running.pop(process)
            path = results[fault.name]["path"]
            found = json.loads(path.read_text(encoding="utf-8")) if status == 0 else {"broken": f"ended with {status}"}
            results[fault.name] = found | {"seconds": time.monotonic() - start}
    return {fault.name: results[fault.name] for fault in faults}


def _caught_by(red: dict[str, str]) -> str:
    """Return catchers as the table names them: the preflight's with the model, unless both are caught."""
    of: dict[str, list[str]] = {}
    for name in red:
        catcher, _, model = name.rpartition(" (")
        of.setdefault(catcher, []).append(model.rstrip(")"))
    # Claims are judged on the second model only if they hold on the first.
    return "; ".join(
        f"{catcher} ({models[0]})" if len(models) == 1 and catcher.startswith(("loading", "preflight")) else catcher
        for catcher, models in of.items()
    )


def changed(fault: Fault) -> str:
    """Return how a fault is made, as a cell of the table; what several functions share is shown once."""
    functions: dict[str, list[str]] = {}
    for change in fault.changes:
        where, _, what = str(change).partition(": ")
        functions.setdefault(what, []).append(where)
    return "; ".join(f"{', '.join(where)}: {what}" for what, where in functions.items()).replace("|", "\\|")


def table(results: dict[str, dict[str, Any]], faults: Sequence[Fault]) -> str:
    """Return faults and what caught them, without figures that vary."""
    rows: dict[bool, list[str]] = {True: [], False: []}
    for fault in faults:
        if fault.name in results:
            red = results[fault.name].get("red", {})
            rows[bool(red)].append(f"| {fault.name} | {changed(fault)} | {_caught_by(red) if red else fault.missed} |")
    lines = [
        f"{len(rows[True])} faults are caught:",
        "",
        "| Fault | Change | Caught by |",
        "|---|---|---|",
        *rows[True],
    ]
    if rows[False]:
        lines += ["", "Not caught:", "", "| Fault | Change | Why |", "|---|---|---|", *rows[False]]
    return "\n".join(lines)


def document(results: dict[str, dict[str, Any]], faults: Sequence[Fault]) -> str:
    """Return docs/faults.md."""
    return f"{HEADER}\n{table(results, faults)}\n"


def main() -> None:
    """Try faults, and print what caught them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults; all when left out")
    parser.add_argument("--write", action="store_true", help="keep the table of all faults in docs/faults.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write there what was found, and the page")
    options = parser.parse_args()
    # Two processes share the cores, and one that has started threads must not fork.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # The faults import numpy and torch, which read that once.
    faults: Sequence[Fault] = import_module("catalogue").FAULTS
    chosen = [fault for fault in faults if not options.names or fault.name in options.names]
    start = time.monotonic()
    # Of some faults, the control is what they concern; where that is nothing but the preflight, all that there is.
    concerned = tuple(dict.fromkeys(claim for fault in chosen for claim in fault.claims)) if options.names else ()
    results = inject([Fault(CONTROL, (), concerned), *chosen])
    if options.json:
        found = {"results": results, "page": document(results, faults)}
        options.json.write_text(json.dumps(found), encoding="utf-8")
    for name, result in results.items():
        if options.names or "broken" in result or (name == CONTROL and result["red"]):
            print(f"{name}: {json.dumps(result, indent=1)}")
    print(table(results, faults))
    print(f"{len(chosen)} faults in {time.monotonic() - start:.0f} s")
    if options.write and not options.names:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(document(results, faults), encoding="utf-8")


if __name__ == "__main__":
    main()
