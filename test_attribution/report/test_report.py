"""The table that ends a run."""

from __future__ import annotations

from dataclasses import replace

from attribution.claims.judge import Claim, Status, Verdict
from attribution.report.verdicts import longest_lines, verdict_row, verdict_table

CLAIM = Claim("top 10", "a sentence", "ours", "an effect", "above", 0, "a control", method="mine")
VERDICT = Verdict(CLAIM, "bundled:gpt2", Status.SUPPORTED, 0.5, 0.25, 0.75, 300, 100)


def _row(recorded: str | None = None, verdict: Verdict = VERDICT, **claim: object) -> dict[str, str]:
    return verdict_row(replace(verdict, claim=replace(verdict.claim, **claim)), recorded)  # type: ignore[arg-type]


def test_asserted_claims_come_first_and_alone_are_counted() -> None:
    refuted = replace(VERDICT, status=Status.REFUTED, note="3+0 passes")
    table = verdict_table([_row(verdict=refuted, id="aside", asserted=False), _row(), _row("refuted", verdict=refuted)])
    lines = table.splitlines()
    assert lines[0].split() == ["model", "claim", "effect", "interval", "n", "verdict", "note"]
    assert lines[2].split() == ["bundled:gpt2", "top", "10", "0.500", "0.250", "..", "0.750", "300", "supported"]
    assert lines[3].endswith("refuted, as recorded  3+0 passes")
    below = lines.index("reported, not asserted")
    assert "aside" in lines[below + 3]
    assert lines[-1] == "1 supported, 1 refuted, 0 inconclusive, 1 reported"


def _counted(n: int, least: int, claim: str) -> dict[str, str]:
    verdict = replace(VERDICT, n=n)
    if n < least:
        verdict = replace(verdict, status=Status.UNDECIDED, needed=least)
    return _row(verdict=verdict, id=claim, min_prompts=least)


def test_too_few_prompts_are_said_of_each_claim_and_once_of_the_model() -> None:
    exact = _row(verdict=replace(VERDICT, model="small"), test="at_most")
    few = [{**_counted(6, least, f"claim {least}"), "model": "small"} for least in (48, 300)]
    lines = verdict_table([exact, *few]).splitlines()
    assert lines[3].endswith("undecided: 6 of 48 prompts")
    assert lines[-2:] == [
        "1 supported, 0 refuted, 0 inconclusive, 2 undecided",
        "nothing can be decided about small: claims about its neurons need 48 to 300 prompts, each of another fact "
        "that it knows, and have 6",
    ]
    lines = verdict_table([_counted(60, 48, "a"), _counted(60, 300, "b")]).splitlines()
    assert lines[-1] == (
        "1 claim is undecided about bundled:gpt2: such claims need 300 prompts, each of another fact that it knows, "
        "and have 60"
    )


def test_models_stand_together_in_the_order_of_their_claims() -> None:
    other = replace(VERDICT, model="bundled:llama")
    rows = [_row(id="b"), _row(verdict=other, id="b"), _row(id="a"), _row(verdict=other, id="a")]
    found = [tuple(line.split()[:2]) for line in verdict_table(rows).splitlines()[2:6]]
    assert found == [(model, claim) for model in ("bundled:gpt2", "bundled:llama") for claim in "ba"]


def test_method_is_named_where_there_are_several() -> None:
    assert "mine" not in verdict_table([_row(), _row(method="")])
    assert "mine" in verdict_table([_row(), _row(method="theirs")])


def test_exact_number_is_followed_by_its_bound() -> None:
    assert "<= 1 " in verdict_table([_row(test="at_most", threshold=1)])


def test_run_that_only_reports_has_no_empty_table_above() -> None:
    assert verdict_table([_row(asserted=False)]).splitlines()[1] == "reported, not asserted"


def test_a_long_run_says_what_took_longest() -> None:
    spent = {"small": {"a": 100.0, "b": 300.0, "c": 2.0}, "large": {"a": 4000.0, "d": 1.0, "e": 0.5, "f": 0.25}}
    assert longest_lines(spent)[1:5] == [
        "What took longest of 1 h 13 min of experiments:",
        "    1 h 7 min   91%  large: a",
        "        5 min    7%  small: b",
        "        2 min    2%  small: a",
    ]
    assert len(longest_lines(spent)) == 7
    assert longest_lines({"small": {"a": 200.0}}) == []
    assert longest_lines({}) == []
