"""The gate without pytest: stored runs as text and as files, and the comparison of two of them."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import attribution as at
from attribution.__main__ import main
from attribution.claims.judge import Claim, Evidence, Status, Verdict, judge
from attribution.errors import BadInputError
from attribution.gate import comparison as gate
from attribution.gate import stored_run
from attribution.gate.comparison import ROUNDING, Change, Comparison, compare
from attribution.gate.storage import names_in, path_of, prune, read, save, stored_run_named
from attribution.gate.stored_run import StoredRun, dumps, loads, record_of, stored_run_of
from attribution.models.fingerprint import ModelFacts, facts_of
from attribution.report.comparison_text import comparison_lines

CPU = ModelFacts("sha256:" + "0" * 64, None, "float32", "cpu")
EFFECTS = [0.1 * number for number in range(12)]


def _claim(id: str = "top", **changes: Any) -> Claim:
    fields = {"test": "above", "threshold": 0, "min_prompts": 3, "method": "paper", **changes}
    return Claim(id, "a sentence", "ours", "fall in nats", control="none", **fields)


def _measured(effects: Sequence[float] = EFFECTS, claim: Claim | None = None, **changes: Any) -> Verdict:
    """A verdict on the prompts 'city 0 Rome', 'city 1 Rome', ... of as many facts."""
    n = len(effects)
    evidence = Evidence(
        prompts=changes.pop("prompts", tuple(f"city {number:03} Rome" for number in range(n))),
        facts=changes.pop("facts", tuple(f"capital/{number:03}" for number in range(n))),
        effects=tuple(effects),
        baselines=changes.pop("baselines", None),
    )
    divisor = 1.0 if evidence.baselines is None else float(np.mean(evidence.baselines))
    mean = float(np.mean(effects)) / divisor if n else math.nan
    return replace(
        Verdict(claim or _claim(), "m", Status.SUPPORTED, mean, mean - 1, mean + 1, n, n, None, None, evidence),
        **changes,
    )


def _exact(effect: float, n: int = 12, threshold: float = 1) -> Verdict:
    claim = _claim("sum", test="at_most", threshold=threshold, method="")
    return Verdict(claim, "m", Status.SUPPORTED, effect, effect, effect, n, n)


def _run(*verdicts: Verdict, **facts: ModelFacts) -> StoredRun:
    models = {verdict.model: CPU for verdict in verdicts} | facts
    binding = {stored_run.key_of(verdict): verdict.claim.asserted for verdict in verdicts}
    return stored_run_of([record_of(verdict) for verdict in verdicts], models, binding)


def _only(comparison: Comparison) -> Change:
    assert comparison.problems == ()
    (change,) = comparison.changes
    return change


# Stored runs as text


def test_stored_run_read_is_the_stored_run_written() -> None:
    ratio = _measured(baselines=(2.0,) * 12, claim=_claim("ratio", test="within", threshold=0.05, asserted=False))
    nothing = _measured([], _claim("nothing"))
    written = _run(_measured(), _measured(claim=_claim(method="mine"), seed=3), ratio, _exact(0.01234), nothing)
    text = dumps(written)
    # NaN, of what was not measured, is not equal to itself.
    assert repr(loads(text)) == repr(written)
    assert dumps(loads(text)) == text
    assert "nan" not in text.lower()


def test_same_measurements_give_the_same_text_in_any_order() -> None:
    one, other = _measured(), _measured(claim=_claim("other"))
    backwards = _measured(
        EFFECTS[::-1],
        prompts=one.evidence.prompts[::-1],
        facts=one.evidence.facts[::-1],  # type: ignore[union-attr]
    )
    assert dumps(_run(one, other)) == dumps(replace(_run(other, backwards), made=_run(one).made))


def test_text_has_one_line_of_effects_for_each_claim_and_each_list_of_prompts_once() -> None:
    text = dumps(_run(*(_measured(claim=_claim(str(number))) for number in range(5))))
    assert text.count('"city 007 Rome": "capital/007"') == 1
    assert len([line for line in text.splitlines() if line.startswith('   "effects": [0.0,0.1,')]) == 5


@pytest.mark.parametrize("size", [1e-9, 1.0, 3e5])
def test_effects_are_kept_to_six_digits_of_the_largest(size: float) -> None:
    effects = (np.random.default_rng(0).normal(size=50) * size).tolist()
    (verdict,) = loads(dumps(_run(_measured(effects)))).verdicts
    assert verdict.evidence is not None
    largest = max(map(abs, effects))
    assert np.abs(np.subtract(verdict.evidence.effects, effects)).max() <= 5e-6 * largest
    assert len(json.dumps(verdict.evidence.effects)) < 50 * 15


def _text(edit: Callable[[Any], object] | None = None) -> str:
    """A small stored run, edited as if written so: with a checksum that fits."""
    text = dumps(_run(_measured(), _measured(claim=_claim("other")), _exact(0.5)))
    if edit is None:
        return text
    content = json.loads(text)
    edit(content)
    content.pop("checksum")
    return json.dumps(content | {"checksum": stored_run.checksum_of(content)})


def test_stored_run_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    whole = _text().encode()
    # What follows the last brace is a line break.
    for length in [*range(0, len(whole) - 2, 37), len(whole) - 2]:
        (tmp_path / "main.json").write_bytes(whole[:length])
        with pytest.raises(BadInputError, match=r"main.json cannot be used, it is not"):
            read(tmp_path, "main")


def test_stored_run_with_one_changed_character_is_refused_wherever_it_is(tmp_path: Path) -> None:
    whole = _text()
    rng = np.random.default_rng(0)
    for place in rng.integers(len(whole), size=300):
        # A digit for a digit keeps it readable: what fails then is the checksum, or a field that is not known.
        changed = str((int(whole[place]) + 1) % 10) if whole[place].isdigit() else "#"
        if whole[place].isspace():
            continue
        (tmp_path / "main.json").write_text(whole[:place] + changed + whole[place + 1 :])
        with pytest.raises(BadInputError, match="cannot be used"):
            read(tmp_path, "main")


UNREADABLE = {
    "empty": (b"", "is not whole JSON"),
    "random bytes": (bytes(np.random.default_rng(1).integers(0, 256, 5000, dtype=np.uint8)), "is not a text in UTF-8"),
    "another program's": (b'{"machine_info": {}, "benchmarks": []}', "is not a stored run of this package"),
    "a list": (b"[]", "is not a stored run of this package"),
    "a number": (b"1", "is not a stored run of this package"),
    "nested": (b"[" * 100_000, "is nested too deeply"),
    "NaN": (_text().replace("0.5,", "NaN,").encode(), "holds NaN"),
    "Infinity": (_text().replace("0.5,", "-Infinity,").encode(), "holds -Infinity"),
    "infinite": (_text().replace("0.5,", "1e999,").encode(), "holds 1e999"),
    "a field twice": (_text().replace('"made"', '"made": "then", "made"').encode(), "holds 'made' twice"),
    "edited": (_text().replace("0.5,", "0.6,").encode(), "was changed after it was written"),
    "conflict": (_text().replace('"made"', '<<<<<<< HEAD\n"made"').encode(), "is not whole JSON"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_file_that_is_no_whole_stored_run_is_refused_with_a_remedy(case: str, tmp_path: Path) -> None:
    content, why = UNREADABLE[case]
    (tmp_path / "main.json").write_bytes(content)
    with pytest.raises(BadInputError, match=why) as caught:
        read(tmp_path, "main")
    message = str(caught.value)
    assert f"the stored run {tmp_path / 'main.json'} cannot be used" in message
    assert "restore it from version control, or remove it with 'python -m attribution baselines prune main'" in message
    assert "\n" not in message


def _other(content: Any) -> Any:
    return next(record for record in content["claims"] if record["claim"]["id"] == "other")


def _set(place: Callable[[Any], Any], name: str, value: object) -> Callable[[Any], None]:
    return lambda content: place(content).__setitem__(name, value)


FOREIGN = {
    "format": (_set(lambda c: c, "format", "attribution baseline 2"), "has the format 'attribution baseline 2'"),
    "no claims": (_set(lambda c: c, "claims", []), "holds no claims"),
    "no models": (_set(lambda c: c, "models", {}), "does not say which weights 'm' had"),
    "missing key": (lambda c: c.pop("models"), r"does not have the fields of it .*\['models'\]"),
    "missing field": (lambda c: _other(c).pop("seed"), r"does not have the fields of claim 'other' .*\['seed'\]"),
    "unknown field": (_set(_other, "extra", 1), r"does not have the fields of claim 'other' .*\['extra'\]"),
    "field of a claim": (lambda c: _other(c)["claim"].pop("version"), r"claim 'other' .*\['version'\]"),
    "claim is a text": (_set(lambda c: c["claims"], 0, "top"), "does not have the fields of a claim"),
    "test unknown": (_set(lambda c: _other(c)["claim"], "test", "below"), "has 'below' as 'test' of claim 'other'"),
    "flag as a number": (_set(lambda c: _other(c)["claim"], "asserted", 1), "has '1' as 'asserted'"),
    "status unknown": (_set(_other, "status", "fine"), "has 'fine' as 'status'"),
    "n as a text": (_set(_other, "n", "12"), "has '12' as 'n'"),
    "n as a flag": (_set(_other, "n", True), "has 'True' as 'n'"),
    "null effect": (lambda c: _other(c)["effects"].__setitem__(0, None), "as 'effects' of claim 'other'"),
    "effects as a text": (_set(_other, "effects", "0.1"), "has '0.1' as 'effects'"),
    "no effects": (_set(_other, "effects", None), "does not give one effect for each of the 12 prompts"),
    "fewer effects": (lambda c: _other(c)["effects"].pop(), "does not give one effect for each of the 12 prompts"),
    "fewer ratios": (_set(_other, "baselines", [1.0]), "does not give one effect for each of the 12 prompts"),
    "another n": (_set(_other, "n", 11), "does not give one effect for each of the 12 prompts"),
    "no prompts": (_set(_other, "prompts", None), "gives effects but no prompts for claim 'other'"),
    "nothing": (
        lambda c: _other(c).update(prompts=None, effects=None, baselines=None), "gives no effects for claim 'other'"
    ),
    "list of prompts": (_set(_other, "prompts", "abc"), "lacks the list of prompts 'abc' of claim 'other'"),
    "prompts": (_set(lambda c: c["prompts"], "abc", ["city"]), "a list of prompts 'abc' that is not made of"),
    "model": (_set(lambda c: c["models"]["m"], "weights", None), "has 'None' as 'weights' of model 'm'"),
    "versions": (_set(lambda c: c["versions"], "torch", 2), "has versions that are not texts"),
    "binding": (_set(lambda c: c, "binding", ["other"]), "does not say by model and method which claims were binding"),
    "bound": (_set(lambda c: c["binding"]["m"]["paper"], "other", 1), "by true or false which claims were binding"),
    "claim twice": (lambda c: c["claims"].append(copy.deepcopy(_other(c))), r"holds the claim 'other' .* twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_file_of_another_form_is_refused_even_if_its_checksum_fits(case: str, tmp_path: Path) -> None:
    edit, why = FOREIGN[case]
    (tmp_path / "main.json").write_text(_text(edit))
    with pytest.raises(BadInputError, match=why):
        read(tmp_path, "main")


def test_file_of_this_form_is_read() -> None:
    """Without this, the refusals above could come from how the test writes files."""
    assert len(loads(_text(lambda content: content["versions"].update(torch="9.9"))).verdicts) == 3


# What a run must have in common with its stored run

BEFORE = _run(_measured(), _measured(claim=_claim("other")), _exact(0.5))


def _changed(**changes: Any) -> StoredRun:
    return _run(_measured(**changes), _measured(claim=_claim("other")), _exact(0.5))


def _of_model(**changes: Any) -> StoredRun:
    return _run(_measured(), _measured(claim=_claim("other")), _exact(0.5), m=replace(CPU, **changes))


def _prompts(place: int, text: str) -> tuple[str, ...]:
    return tuple(text if number == place else f"city {number:03} Rome" for number in range(12))


OTHERWISE = {
    "missing claim": (
        _run(_measured(), _exact(0.5)),
        "the claim 'other' (paper on m) was not measured, and the stored run has it; run the whole suite",
    ),
    "nothing measured": (
        StoredRun({}, (), "", {}),
        "each of 3 claims, 'sum' (m), 'other' (paper on m), 'top' (paper on m), was not measured",
    ),
    "extra claim": (
        _run(_measured(), _measured(claim=_claim("other")), _exact(0.5), _measured(claim=_claim("new"))),
        "the claim 'new' (paper on m) was measured, and the stored run does not have it",
    ),
    "extra model": (
        _run(_measured(), _measured(claim=_claim("other")), _exact(0.5), _measured(model="large")),
        "the claim 'top' (paper on large) was measured, and the stored run does not have it",
    ),
    "renamed claim, as missing": (
        _changed(claim=_claim("top 10")), "the claim 'top' (paper on m) was not measured, and the stored run has it"
    ),
    "renamed claim, as extra": (
        _changed(claim=_claim("top 10")), "the claim 'top 10' (paper on m) was measured, and the stored run does not"
    ),
    "claim of another method": (
        _changed(claim=_claim(method="mine")), "the claim 'top' (paper on m) was not measured, and the stored run has"
    ),
    "fewer prompts": (
        _changed(effects=EFFECTS[:11]), "lacks 1 of the 12 prompts of the stored run, such as 'city 011 Rome'"
    ),
    "more prompts": (
        _changed(effects=[*EFFECTS, 1.2]), "has 1 prompt that the stored run has not, such as 'city 012 Rome'"
    ),
    "a changed prompt": (
        _changed(prompts=_prompts(3, "town 003 Rome")),
        "lacks 1 of the 12 prompts of the stored run, such as 'city 003 Rome' and has 1 prompt that the stored run has "
        "not, such as 'town 003 Rome'",
    ),
    "another answer": (_changed(prompts=_prompts(3, "city 003 Oslo")), "such as 'city 003 Oslo'"),
    "another fact": (
        _changed(facts=("capital/000",) * 12),
        "counts the prompt 'city 001 Rome' to the fact 'capital/000', and the stored run to 'capital/001'",
    ),
    "fewer prompts of an exact number": (
        _run(_measured(), _measured(claim=_claim("other")), _exact(0.5, n=10)),
        "the claim 'sum' (m) has another number of prompts than in the stored run, 10 instead of 12",
    ),
    "another threshold": (
        _changed(claim=_claim(threshold=-1)), "has another threshold than in the stored run, -1.0 instead of 0.0"
    ),
    "another bound": (
        _run(_measured(), _measured(claim=_claim("other")), _exact(0.5, threshold=1.001)),
        "the claim 'sum' (m) has another threshold than in the stored run, 1.001 instead of 1.0",
    ),
    "another version": (_changed(claim=_claim(version=2)), "another version than in the stored run, 2 instead of 1"),
    "another test": (_changed(claim=_claim(test="within")), "another test than in the stored run, 'within' instead of"),
    "another control": (_changed(claim=replace(_claim(), control="new")), "another control than in the stored run"),
    "another measure": (_changed(claim=replace(_claim(), effect="share")), "another effect than in the stored run"),
    "no longer asserted": (_changed(claim=_claim(asserted=False)), "another asserted than in the stored run"),
    "fewer prompts needed": (_changed(claim=_claim(min_prompts=1)), "another min prompts than in the stored run"),
    "another seed": (_changed(seed=1), "has another seed than in the stored run, 1 instead of None"),
    "a ratio": (_changed(baselines=(1.0,) * 12), "is a ratio in only one of the two runs"),
    "NaN": (_changed(effects=[math.nan, *EFFECTS[1:]]), "has an effect that is NaN or infinite; find out what broke"),
    "infinite": (_changed(effects=[math.inf, *EFFECTS[1:]]), "has an effect that is NaN or infinite"),
    "NaN, exact": (
        _run(_measured(), _measured(claim=_claim("other")), _exact(math.nan)),
        "the claim 'sum' (m) has an effect that is NaN or infinite",
    ),
    "other weights": (
        _of_model(weights="sha256:" + "1" * 64),
        "model 'm' has the weights sha256:111111111111, and the stored run was made with sha256:000000000000",
    ),
    "another dtype": (
        _of_model(dtype="bfloat16", weights="sha256:1"),
        "model 'm' has the dtype 'bfloat16', and the stored run was made with 'float32'; use that, or pass "
        "--attribution-allow=dtype",
    ),
    "no longer binding": (
        replace(BEFORE, binding={**BEFORE.binding, ("m", "paper", "top"): False}),
        "the claim 'top' (paper on m) was binding in the stored run and is only reported in this one; let the registry",
    ),
    "another device": (
        _of_model(device="cuda"),
        "model 'm' has the device 'cuda', and the stored run was made with 'cpu'; use that, or pass "
        "--attribution-allow=device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERWISE)
def test_run_that_differs_from_its_stored_run_in_more_than_its_effects_is_not_comparable(case: str) -> None:
    run, sentence = OTHERWISE[case]
    problems = compare(BEFORE, run).problems
    assert any(sentence in problem for problem in problems), problems
    for problem in problems:
        # One sentence with a remedy.
        assert problem.endswith(".")
        assert ";" in problem
        assert "\n" not in problem


def test_a_claim_that_takes_no_part_in_the_gate_may_not_stop_being_binding_either() -> None:
    known = ("m", "", "top layers")
    before, after = (replace(BEFORE, binding={**BEFORE.binding, known: bound}) for bound in (True, False))
    assert compare(before, before).problems == compare(after, before).problems == ()
    (problem,) = compare(before, after).problems
    assert problem.startswith("the claim 'top layers' (m) was binding in the stored run and is only reported in this")


def test_a_stored_run_of_an_earlier_version_is_compared_and_says_what_it_lacks() -> None:
    earlier = loads(dumps(replace(BEFORE, binding={})))
    assert earlier.binding == {}
    comparison = compare(earlier, BEFORE)
    assert comparison.problems == ()
    assert (
        "stored run 'main' does not say which claims were binding: an earlier version wrote it; update it"
        in comparison_lines(comparison, "main", earlier, BEFORE)
    )


def test_what_differs_is_not_compared_and_the_rest_is() -> None:
    run, _ = OTHERWISE["another threshold"]
    assert [change.after.claim.id for change in compare(BEFORE, run).changes] == ["sum", "other"]
    run, _ = OTHERWISE["other weights"]
    assert compare(BEFORE, run).changes == ()


def _backwards(verdict: Verdict) -> Verdict:
    assert verdict.evidence is not None
    parts = verdict.evidence.prompts, verdict.evidence.facts, verdict.evidence.effects
    return replace(verdict, evidence=Evidence(*(each[::-1] for each in parts)))


@pytest.mark.parametrize(
    "run",
    [
        BEFORE,
        replace(BEFORE, verdicts=(*BEFORE.verdicts[:2], _backwards(BEFORE.verdicts[2]))),
        _changed(claim=replace(_claim(), source="Table 3")),
        _run(_measured(), _measured(claim=_claim("other")), _exact(0.5, threshold=1.00001)),
        replace(BEFORE, made="later", versions={"torch": "9"}),
        _of_model(revision="abc"),
    ],
    ids=[
        "the same",
        "another order of prompts",
        "another citation",
        "a bound computed anew",
        "other versions",
        "another revision",
    ],
)
def test_run_that_measured_the_same_is_unchanged(run: StoredRun) -> None:
    comparison = compare(BEFORE, run)
    assert comparison.problems == ()
    assert [change.kind for change in comparison.changes] == ["unchanged"] * 3


@pytest.mark.parametrize("field", ["dtype", "device"])
def test_what_is_allowed_to_differ_may(field: str) -> None:
    run = _of_model(**{field: "other"}, weights="sha256:1" if field == "dtype" else CPU.weights)
    assert compare(BEFORE, run, allow=[field]).problems == ()
    other = {"dtype": "device", "device": "dtype"}[field]
    assert compare(BEFORE, run, allow=[other]).problems != ()
    # Weights of one dtype can be told apart whatever is allowed.
    assert compare(BEFORE, _of_model(weights="sha256:1"), allow=["dtype", "device"]).problems != ()


def test_claims_with_the_same_problem_share_a_sentence() -> None:
    claims = [_measured(claim=_claim(str(number))) for number in range(20)]
    fewer = [_measured(EFFECTS[:11], claim=_claim(str(number))) for number in range(20)]
    (problem,) = compare(_run(*claims), _run(*fewer)).problems
    assert problem.startswith("each of 20 claims, '0' (paper on m), '1' (paper on m), '10' (paper on m) and 17 more,")


# What counts as worse

RNG = np.random.default_rng(5)
NOISE = RNG.normal(0, 0.05, 60)
START = RNG.normal(0.5, 0.3, 60)


@pytest.mark.parametrize(
    ("test", "before", "after", "kind"),
    [
        ("above", START, START - 0.1 + NOISE, "regressed"),
        ("above", START, START + 0.1 + NOISE, "improved"),
        ("above", START, START + NOISE - NOISE.mean(), "changed"),
        ("within", START, START + 0.1 + NOISE, "regressed"),
        ("within", -START, -START - 0.1 + NOISE, "regressed"),
        ("within", START, START - 0.1 + NOISE, "improved"),
        # Across zero, to about the same distance.
        ("within", START - START.mean() - 0.05, START - START.mean() + 0.05, "changed"),
        ("within", START - START.mean() - 0.05, START - START.mean() + 0.5 + NOISE, "regressed"),
    ],
)
def test_worse_is_what_leads_away_from_the_claim(
    test: str, before: np.ndarray[Any, Any], after: np.ndarray[Any, Any], kind: str
) -> None:
    claim = _claim(test=test)
    change = _only(compare(_run(_measured(before.tolist(), claim)), _run(_measured(after.tolist(), claim))))
    assert change.kind == kind
    assert change.low <= change.worsening <= change.high
    distance = (lambda mean: -mean) if test == "above" else abs
    assert change.worsening == pytest.approx(distance(after.mean()) - distance(before.mean()), abs=1e-6)


def test_effects_that_moved_by_rounding_are_unchanged_and_cost_nothing() -> None:
    shifts = np.full(60, 0.9 * ROUNDING)
    before = _run(_measured(START.tolist()), _measured(START.tolist(), _claim("other")))
    moved = _measured((START - shifts).tolist())
    alone = _only(compare(_run(_measured(START.tolist())), _run(_measured((START - 0.1 + NOISE).tolist()))))
    comparison = compare(before, _run(moved, _measured((START - 0.1 + NOISE).tolist(), _claim("other"))))
    assert [change.kind for change in comparison.changes] == ["regressed", "unchanged"]
    assert comparison.changes[0].low == alone.low
    # With a tolerance of zero nothing is rounding.
    assert _only(compare(_run(_measured(START.tolist())), _run(moved), tolerance=0)).kind == "regressed"


def test_regression_must_exceed_the_tolerance_with_its_whole_interval() -> None:
    before, after = _run(_measured(START.tolist())), _run(_measured((START - 0.1 + NOISE).tolist()))
    change = _only(compare(before, after))
    for tolerance, kind in ((change.low * 0.99, "regressed"), (change.low * 1.01, "changed"), (1.0, "changed")):
        assert _only(compare(before, after, tolerance=tolerance)).kind == kind


def test_ratio_is_compared_in_its_unit() -> None:
    starts = tuple(RNG.uniform(0.5, 1.5, 60).tolist())
    claim = _claim(test="above", threshold=0.9)
    before = [0.95 * start for start in starts]
    after = [(0.90 + noise) * start for start, noise in zip(starts, NOISE, strict=True)]
    was, now = (_measured(effects, claim, baselines=starts) for effects in (before, after))
    change = _only(compare(_run(was), _run(now)))
    assert change.kind == "regressed"
    assert change.worsening == pytest.approx(was.effect - now.effect, abs=1e-6)


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [(0.5, 0.9, "unchanged"), (0.5, 1.1, "regressed"), (1.1, 0.9, "improved"), (1.1, 5.0, "unchanged")],
)
def test_bound_on_an_exact_number_is_kept_or_broken(before: float, after: float, kind: str) -> None:
    change = _only(compare(_run(_exact(before)), _run(_exact(after))))
    assert change.kind == kind
    if kind == "regressed":
        assert change.sentence() == (
            "'sum' (m): fall in nats was 0.5 and is 1.1, where at most 1 is claimed; n = 12 prompts"
        )


def test_claims_that_could_not_be_measured_are_unchanged_only_while_they_cannot() -> None:
    nothing = _measured([]), _exact(math.nan, n=0)
    assert [change.kind for change in compare(_run(*nothing), _run(*nothing)).changes] == ["unchanged"] * 2
    problems = compare(_run(_measured(), _exact(0.5)), _run(*nothing)).problems
    assert [problem.split(")")[0] for problem in problems] == ["the claim 'sum' (m", "the claim 'top' (paper on m"]


def test_every_worsening_counts_where_facts_are_too_few_for_an_interval() -> None:
    before = _run(_measured(START[:9].tolist()))
    after = START[:9].copy()
    after[0] -= 0.01
    change = _only(compare(before, _run(_measured(after.tolist()))))
    assert (change.kind, change.low, change.high) == ("regressed", change.worsening, change.worsening)
    assert _only(compare(before, _run(_measured(after.tolist())), tolerance=0.01)).kind == "changed"


def test_the_same_worsening_of_every_prompt_leaves_no_doubt() -> None:
    before, after = [1.0] * 20, [0.5] * 20
    change = _only(compare(_run(_measured(before)), _run(_measured(after))))
    assert (change.kind, change.low, change.high) == ("regressed", 0.5, 0.5)


def test_prompts_of_one_fact_count_as_one() -> None:
    after = START - 0.02 + NOISE
    alone = _only(compare(_run(_measured(START.tolist())), _run(_measured(after.tolist()))))
    facts = tuple(np.repeat([f"fact {number:02}" for number in range(60)], 4).tolist())
    copied = (_measured(np.repeat(each, 4).tolist(), facts=facts) for each in (START, after))
    four = _only(compare(*map(_run, copied)))
    assert four.after.n == 240
    assert (four.low, four.high) == pytest.approx((alone.low, alone.high), rel=1e-6)


def test_regression_names_claim_method_model_measure_interval_and_the_prompts_hurt_most() -> None:
    after = START - 0.1 + NOISE
    after[17] -= 2
    after[4] -= 1
    sentence = _only(compare(_run(_measured(START.tolist())), _run(_measured(after.tolist())))).sentence()
    for part in (
        f"'top' (paper on m): fall in nats was {START.mean():.4g} and is {after.mean():.4g}, worse by 0.1",
        "n = 60 prompts of 60 facts",
        f"hurt most: 'city 017 Rome' {START[17]:.3g} -> {after[17]:.3g}, 'city 004 Rome' {START[4]:.3g} -> ",
    ):
        assert part in sentence
    assert sentence.count("->") == 4


def test_lines_count_what_became_of_the_claims_and_keep_what_is_only_reported_apart() -> None:
    ids = ("same", "noise", "better", "worse", "reported")
    shifts = (0 * NOISE, NOISE - NOISE.mean(), 0.3 + NOISE, NOISE - 0.3, NOISE - 0.3)
    claims = [_claim(id, asserted=id != "reported") for id in ids]
    before = _run(*(_measured(START.tolist(), claim) for claim in claims))
    after = _run(*(_measured((START + by).tolist(), claim) for claim, by in zip(claims, shifts, strict=True)))
    comparison = compare(before, replace(after, versions={"torch": "9"}))
    assert [change.after.claim.id for change in comparison.of_kind("regressed", asserted=True)] == ["worse"]
    lines = comparison_lines(comparison, "main", before, replace(after, versions={"torch": "9"}))
    assert lines[0] == (
        f"5 of 5 claims of stored run 'main' ({before.made}): 1 unchanged, 1 changed within their intervals, "
        "1 improved, 1 regressed, 1 worse but only reported"
    )
    assert lines[1] == f"made with other versions: torch 9, then {before.versions['torch']}"
    assert [line.split(" (")[0] for line in lines[2:4]] == ["regressed: 'worse'", "worse, only reported: 'reported'"]
    assert lines[4].startswith("to store this run instead: --attribution-save=main --attribution-update")
    assert len(comparison_lines(comparison, "main", before, after)) == 4


def test_surest_regressions_of_each_method_are_told_in_full_and_the_rest_by_name() -> None:
    claims = [_claim(f"{number:02}", method=method) for method in ("mine", "paper") for number in range(20)]
    losses = np.random.default_rng(9).permutation(40)
    before = _run(*(_measured(START.tolist(), claim) for claim in claims))
    after = _run(
        *(
            _measured((START - 0.1 - 0.01 * loss + NOISE).tolist(), claim)
            for claim, loss in zip(claims, losses, strict=True)
        )
    )
    lines = [
        line
        for line in comparison_lines(compare(before, after), "main", before, after)
        if line.startswith("regressed: ")
    ]
    assert len(lines) == 12
    surest = [claims[place].id for place in np.argsort(-losses[:20])[:5]]
    assert [line.split("'")[1] for line in lines[:5]] == surest
    assert lines[5].startswith("regressed: also '")
    assert lines[5].count("(mine on m)") == 15
    assert {line.split("(")[1].split(")")[0] for line in lines[6:]} == {"paper on m"}


# How often the gate errs


def _normal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Changes that all prompts share in part, as those of several metrics do."""
    return np.asarray(rng.normal(size=(1, shape[1])) + rng.normal(size=shape))


def _heavy(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    return np.asarray(rng.standard_t(3, size=shape))


def _few(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """What rounding does to ranks: few prompts change, in both directions."""
    return np.asarray((rng.random(shape) < 0.02) * rng.choice([-0.5, 0.5], size=shape))


def _skewed(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Many small losses, made up for by few large gains: the hardest to tell from a loss."""
    return np.asarray(1 - rng.exponential(size=shape))


@pytest.mark.parametrize("draw", [_normal, _heavy, _few, _skewed])
def test_harmless_changes_turn_at_most_5_percent_of_runs_red(
    draw: Callable[[np.random.Generator, tuple[int, int]], np.ndarray[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 claims on 100 facts, none better or worse on average. The interval is one-sided at 2.5%."""
    monkeypatch.setattr(gate, "RESAMPLES", 999)
    rng = np.random.default_rng(6)
    claims = [_claim(str(number)) for number in range(20)]
    before = _run(*(_measured([0.0] * 100, claim) for claim in claims))
    runs = 100
    red = 0
    for _ in range(runs):
        effects = -draw(rng, (20, 100))
        after = _run(*(_measured(row.tolist(), claim) for row, claim in zip(effects, claims, strict=True)))
        red += bool(compare(before, after, tolerance=0).of_kind("regressed", asserted=True))
    # 11 or more of 100 would have a chance of 1% if the rate were 5%.
    assert stats.binomtest(red, runs, 0.05, alternative="greater").pvalue > 0.01


@pytest.mark.parametrize("claims", [1, 21])
@pytest.mark.parametrize("changed", [1, 3, 4, 6, 12])
def test_few_facts_that_change_by_chance_are_seldom_red(
    changed: int, claims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 facts, of which a few change by the same amount, up or down, alike in all claims."""
    monkeypatch.setattr(gate, "RESAMPLES", 999)
    rng = np.random.default_rng(9)
    every = [_claim(f"{number:02}") for number in range(claims)]
    before = _run(*(_measured([0.0] * 300, claim) for claim in every))
    runs = 120
    red = 0
    for _ in range(runs):
        effects = np.zeros(300)
        effects[rng.choice(300, changed, replace=False)] = rng.choice([-0.5, 0.5], changed)
        after = _run(*(_measured(effects.tolist(), claim) for claim in every))
        red += bool(compare(before, after).of_kind("regressed", asserted=True))
    assert stats.binomtest(red, runs, 0.025, alternative="greater").pvalue > 0.01


@pytest.mark.parametrize(("changed", "kind"), [(5, "changed"), (6, "regressed")])
def test_a_loss_on_fewer_than_six_facts_may_be_chance_however_large(changed: int, kind: str) -> None:
    """All of five get worse by chance once in 32 times, all of six once in 64."""
    effects = np.zeros(300)
    effects[:changed] = -10
    assert _only(compare(_run(_measured([0.0] * 300)), _run(_measured(effects.tolist())))).kind == kind


@pytest.mark.parametrize(
    ("verdict", "possible"),
    [
        (_measured([1e5] * 12), True),
        (_measured([1e200] + [0.5] * 11), False),
        (_measured([-1e307] * 12), False),
        (_measured([0.0, 1.0] * 6, _claim(effect_bounds="share")), True),
        (_measured([0.0, 1.1] * 6, _claim(effect_bounds="share")), False),
        (_measured([-1.0, 1.0] * 6, _claim(effect_bounds="correlation")), True),
        (_measured([-2.0, 1.0] * 6, _claim(effect_bounds="correlation")), False),
        (_measured([0.5] * 12, baselines=(1e7,) * 12), False),
    ],
)
def test_an_effect_that_no_measurement_can_have_is_neither_compared_nor_stored(
    verdict: Verdict, possible: bool, tmp_path: Path
) -> None:
    assert verdict.evidence is not None
    plain = _run(_measured([0.5] * 12, verdict.claim, baselines=verdict.evidence.baselines and (1.0,) * 12))
    if possible:
        assert dumps(_run(verdict))
        assert not compare(_run(verdict), _run(verdict)).problems
        return
    with pytest.raises(BadInputError, match="that no measurement of its kind can have; find out what broke"):
        save(tmp_path, "main", _run(verdict), update=False)
    for before, after in ((_run(verdict), plain), (plain, _run(verdict)), (_run(verdict), _run(verdict))):
        (problem,) = compare(before, after).problems
        assert "that no measurement of its kind can have" in problem


def test_one_harmed_claim_among_many_that_changed_by_chance_is_found() -> None:
    """Power: a loss of 0.3 standard deviations on 400 facts, 6 standard errors; 60 claims changed on few prompts."""
    rng = np.random.default_rng(7)
    claims = [_claim(f"{number:02}") for number in range(61)]
    before = _run(*(_measured([0.0] * 400, claim) for claim in claims))
    found = 0
    for _ in range(20):
        effects = _few(rng, (61, 400))
        effects[0] = -0.3 + rng.normal(size=400)
        after = _run(*(_measured(row.tolist(), claim) for row, claim in zip(effects, claims, strict=True)))
        found += [change.after.claim.id for change in compare(before, after).of_kind("regressed", asserted=True)] == [
            "00"
        ]
    assert found >= 18


def test_interval_of_one_claim_agrees_with_the_t_interval_on_normal_changes() -> None:
    changes = np.random.default_rng(8).normal(0.3, 1, 400)
    change = _only(compare(_run(_measured([0.0] * 400)), _run(_measured((-changes).tolist()))))
    low, high = stats.t.interval(0.95, 399, changes.mean(), stats.sem(changes))
    assert (change.low, change.high) == pytest.approx((low, high), abs=0.01)


def test_comparison_is_the_same_each_time() -> None:
    before, after = _run(_measured(START.tolist())), _run(_measured((START - 0.1 + NOISE).tolist()))
    assert compare(before, after) == compare(before, after)


# Files


def test_stored_run_is_written_once_and_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = tmp_path / ".attribution"
    assert save(folder, "main", BEFORE, update=False)
    written = path_of(folder, "main").read_bytes()
    with pytest.raises(BadInputError, match="stored run 'main' exists and was not replaced; add --attribution-update"):
        save(folder, "main", _changed(effects=[1.0] * 12), update=False)
    assert path_of(folder, "main").read_bytes() == written
    assert not save(folder, "main", _changed(effects=[1.0] * 12), update=True)
    assert repr(read(folder, "main").verdicts) == repr(_changed(effects=[1.0] * 12).verdicts)
    assert names_in(folder) == ["main"]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "main.json"]


def test_update_may_add_claims_and_never_loses_one(tmp_path: Path) -> None:
    save(tmp_path, "main", _run(_measured()), update=False)
    assert not save(tmp_path, "main", BEFORE, update=True)
    with pytest.raises(BadInputError, match=r"was not replaced: it has the claim 'sum' \(m\) that this run did not"):
        save(tmp_path, "main", _run(_measured(), _measured(claim=_claim("other"))), update=True)
    assert len(read(tmp_path, "main").verdicts) == 3


def test_update_does_not_replace_what_it_cannot_read(tmp_path: Path) -> None:
    path_of(tmp_path, "main").write_text("{}")
    with pytest.raises(BadInputError, match="cannot be used"):
        save(tmp_path, "main", BEFORE, update=True)
    assert path_of(tmp_path, "main").read_text() == "{}"


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (StoredRun({}, (), "", {}), "no gated claim was measured"),
        (_changed(effects=[math.nan] * 12), r"claim 'top' \(paper on m\) has an effect that is NaN or infinite"),
        (_run(_exact(math.inf)), "NaN or infinite"),
    ],
)
def test_run_without_numbers_is_not_saved(run: StoredRun, why: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=why):
        save(tmp_path, "main", run, update=True)
    assert names_in(tmp_path) == []


def test_claim_measured_twice_or_without_prompts_makes_no_stored_run() -> None:
    with pytest.raises(BadInputError, match=r"claim 'top' \(paper on m\) was measured twice"):
        _run(_measured(), _measured(EFFECTS[::-1]))
    with pytest.raises(BadInputError, match=r"came without its effect on each prompt; judge it by"):
        _run(replace(_measured(), evidence=None))


def test_record_survives_a_process_boundary() -> None:
    """Only what JSON knows, also where numbers came from numpy."""
    verdict = judge(_claim(), model="m", effects=list(np.array([0.1, 0.2, 0.3])), facts=["a", "b", "c"])
    record = record_of(replace(verdict, effect=np.float64(0.2)))
    assert type(record["effect"]) is float
    sent = stored_run_of([json.loads(json.dumps(record))], {"m": CPU}, {stored_run.key_of(verdict): True})
    assert repr(_run(verdict)) == repr(sent)


@pytest.mark.parametrize("name", ["", "../main", "a/b", ".hidden", "a b", "main\n", "x" * 101, "test.py::test"])
def test_name_that_is_no_file_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot be the name of a stored run; use letters, digits"):
        path_of(tmp_path, name)


def test_name_may_be_left_out_where_there_is_one_stored_run(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"there are 0 \(none\); save one with --attribution-save=NAME"):
        stored_run_named(tmp_path, "")
    save(tmp_path, "main", BEFORE, update=False)
    assert stored_run_named(tmp_path, "") == "main"
    save(tmp_path, "other", BEFORE, update=False)
    with pytest.raises(BadInputError, match=r"there are 2 \(main, other\); name one: --attribution-compare=NAME"):
        stored_run_named(tmp_path, "")
    with pytest.raises(BadInputError, match="there are 2"):
        stored_run_named(tmp_path, "", BEFORE.models.keys())
    path_of(tmp_path, "other").unlink()
    save(tmp_path, "other", _run(_measured(model="another")), update=False)
    assert stored_run_named(tmp_path, "", BEFORE.models.keys()) == "main"
    assert stored_run_named(tmp_path, "", ["another"]) == "other"
    assert stored_run_named(tmp_path, "third") == "third"
    with pytest.raises(BadInputError, match=r"no stored run 'third' in .* \(there: main, other\)"):
        read(tmp_path, "third")


def test_stored_runs_are_listed_with_what_they_hold_and_pruned_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["baselines", "--folder", str(tmp_path)]
    assert main(command) == 0
    assert "no stored runs in" in capsys.readouterr().out
    save(tmp_path, "main", BEFORE, update=False)
    save(tmp_path, "old", BEFORE, update=False)
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        f"main: 3 claims on m (float32, cpu, sha256:000000000000); made {BEFORE.made}; 3 kB"
    )
    path_of(tmp_path, "broken").write_text("{}")
    assert main(command) == 1
    assert "broken: the stored run" in capsys.readouterr().out
    assert main([*command, "prune", "old", "odl"]) == 1
    assert "there is no stored run 'odl'" in capsys.readouterr().err
    assert names_in(tmp_path) == ["broken", "main", "old"]
    assert main([*command, "prune", "old", "broken"]) == 0
    assert names_in(tmp_path) == ["main"]
    with pytest.raises(BadInputError, match="nothing was removed"):
        prune(tmp_path, ["main", "old"])
    assert names_in(tmp_path) == ["main"]


def test_command_line_runs_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "attribution", "baselines"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("no stored runs in .attribution")


# Several writers, and writers that die

WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from attribution.models.fingerprint import ModelFacts
from attribution.gate.stored_run import stored_run_of, record_of
from attribution.claims.judge import Claim, Evidence, Status, Verdict
from attribution.errors import BadInputError
from attribution.gate.storage import read, save

folder, writer = Path(sys.argv[1]), sys.argv[2]

def measured(id):
    evidence = Evidence(tuple(map(str, range(500))), tuple(map(str, range(500))), (0.123456,) * 500)
    claim = Claim(id, "a sentence", "ours", "an effect", "above", 0, "none")
    return Verdict(claim, "m", Status.SUPPORTED, 0.1, 0.1, 0.1, 500, 500, None, None, evidence)

def stored_run(verdicts):
    return stored_run_of([record_of(each) for each in verdicts], {"m": ModelFacts("sha256:0", None, "float32", "cpu")})

"""
ADDING = """
import os, time
# The time between looking at the old stored run and replacing it, in which another writer might come.
os.fsync = lambda handle: time.sleep(0.02)
(folder / f"ready{writer}").touch()
while len(list(folder.glob("ready*"))) < 3:
    time.sleep(0.01)
try:
    print(save(folder, "shared", stored_run([measured(writer)]), update=False))
except BadInputError:
    print(False)
save(folder, f"own{writer}", stored_run([measured(writer)]), update=False)
for number in range(8):
    added = measured(f"{writer}.{number}")
    while True:
        # Whoever came between is seen by the refusal, and not overwritten.
        known = read(folder, "shared").verdicts
        try:
            save(folder, "shared", stored_run([*known, added]), update=True)
            break
        except BadInputError:
            pass
"""


def _start(code: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    # Not from the checkout: the package that is tested is the installed one.
    command = [sys.executable, "-c", WRITER + code, str(folder), *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="a file that somebody reads cannot be replaced there")
def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    writers = [_start(ADDING, tmp_path, str(number)) for number in range(3)]
    first = [writer.communicate(timeout=240)[0].strip() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    # One of them made the stored run; the others were told that it exists.
    assert sorted(first) == ["False", "False", "True"]
    assert names_in(tmp_path) == ["own0", "own1", "own2", "shared"]
    held = {verdict.claim.id for verdict in read(tmp_path, "shared").verdicts}
    assert held == {str(first.index("True"))} | {f"{writer}.{number}" for writer in range(3) for number in range(8)}


DYING = """
import os
point = sys.argv[3]
real = {"fsync": os.fsync, "replace": os.replace}
def wait(*arguments):
    if point == "half":
        path = next(folder.glob("*.tmp"))
        os.truncate(path, path.stat().st_size // 2)
    print("here", flush=True)
    import time
    time.sleep(600)
setattr(os, "replace" if point == "replace" else "fsync", wait)
save(folder, "main", stored_run([measured("old"), measured("new")]), update=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal there")
@pytest.mark.parametrize("point", ["half", "fsync", "replace"])
def test_writer_killed_in_the_middle_leaves_the_old_stored_run_whole(point: str, tmp_path: Path) -> None:
    old = _run(replace(_measured(), claim=_claim("old", method="")))
    save(tmp_path, "main", old, update=False)
    before = path_of(tmp_path, "main").read_bytes()
    writer = _start(DYING, tmp_path, "0", point)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "here\n"
    os.kill(writer.pid, signal.SIGKILL)
    assert writer.wait(timeout=60) == -signal.SIGKILL
    writer.stdout.close()
    assert path_of(tmp_path, "main").read_bytes() == before
    assert names_in(tmp_path) == ["main"]
    # A dead process holds no lock, and its unfinished file is overwritten.
    assert not save(tmp_path, "main", old, update=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "main.json"]


# What tells models apart


def test_weights_are_told_apart_by_one_bit_and_by_dtype_and_not_by_loading(folders: dict[str, Path]) -> None:
    one, again = (at.load(str(folders["gpt2"])) for _ in range(2))
    assert facts_of(one) == facts_of(again)
    assert (facts_of(one).dtype, facts_of(one).device, facts_of(one).revision) == ("float32", "cpu", None)
    half = at.load(str(folders["gpt2"]), dtype=torch.bfloat16)
    assert facts_of(half).dtype == "bfloat16"
    weights = {facts_of(one).weights, facts_of(half).weights, facts_of(at.load(str(folders["llama"]))).weights}
    bias = again.network._module.transformer.h[0].mlp.c_proj.bias
    with torch.no_grad():
        bias[3] = torch.nextafter(bias[3], torch.tensor(math.inf))
    weights.add(facts_of(again).weights)
    assert len(weights) == 4
