"""One prompt explained from the command line: text, JSON and page say what the library measures."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import attribution as at
from attribution.__main__ import main
from attribution.engine.methods import METHODS
from attribution.experiments.explanation import Explanation, explain
from attribution.models.registry import entry_of, registry
from attribution.report.explanation_page import render_page
from attribution.report.explanation_text import ASCII, UNICODE, glyphs_for, render_text, sections_of

PROMPT, ANSWER, K = "The capital of France is", " Paris", 6


@dataclass(frozen=True)
class Run:
    """What a command did."""

    status: int
    out: str
    err: str


def _run(*arguments: str, encoding: str = "utf-8") -> Run:
    """Run a command on a terminal of an encoding."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding=encoding), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(arguments)
    out.flush()
    return Run(status, out.buffer.getvalue().decode(encoding), err.getvalue())  # type: ignore[attr-defined]


@pytest.fixture(scope="module", params=["bundled:gpt2", "bundled:llama"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundled(name: str) -> at.Model:
    return at.load(name)


@pytest.fixture(scope="module")
def network(name: str) -> Any:
    """The same model in plain transformers."""
    return AutoModelForCausalLM.from_pretrained(entry_of(name).folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reader(name: str) -> Any:
    """Its tokenizer."""
    return AutoTokenizer.from_pretrained(entry_of(name).folder)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page") / "page.html"


@pytest.fixture(scope="module")
def run(name: str, page_file: Path) -> Run:
    return _run("explain", PROMPT, ANSWER, "--model", name, "-k", str(K), "--json", "--html", str(page_file))


@pytest.fixture(scope="module")
def data(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.out)
    return found


@pytest.fixture(scope="module")
def explanation(bundled: at.Model) -> Explanation:
    return explain(bundled, PROMPT, ANSWER, k=K)


def _neuron(fields: dict[str, int]) -> Any:
    return at.AttentionNeuron(**fields) if "head" in fields else at.FFNNeuron(**fields)


def test_json_is_all_there_is_on_standard_output(run: Run, data: dict[str, Any], page_file: Path) -> None:
    assert run.status == 0
    assert (data["prompt"], data["answer"], data["answer_given"]) == (PROMPT, ANSWER, True)
    assert f"wrote {page_file}" in run.err


def test_top_predictions_are_those_of_plain_transformers(data: dict[str, Any], network: Any, reader: Any) -> None:
    ids = reader.encode(PROMPT)
    with torch.no_grad():
        logps = network(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    expected = logps.topk(10)
    assert [each["id"] for each in data["predictions"]] == expected.indices.tolist()
    assert [each["logp"] for each in data["predictions"]] == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert [each["prob"] for each in data["predictions"]] == pytest.approx(expected.values.exp().tolist(), rel=1e-4)
    assert data["predictions"][0]["token"] == ANSWER
    whole = [reader.decode([*ids, each["id"]]) for each in data["predictions"]]
    assert whole == [reader.decode(ids) + each["token"] for each in data["predictions"]]
    assert data["outcome"]["logp"] == pytest.approx(float(logps[data["answer_id"]]), abs=1e-4)


def test_layers_and_heads_are_those_of_attribute(data: dict[str, Any], bundled: at.Model) -> None:
    layers = at.attribute(bundled, PROMPT, ANSWER, unit="layer", k=None)
    for record, score in zip(layers.neurons, layers.scores.tolist(), strict=True):
        assert data[f"{record.kind}_layers"][record.layer] == pytest.approx(score, abs=1e-9)  # type: ignore[union-attr]
    heads = at.attribute(bundled, PROMPT, ANSWER, unit="head", k=None)
    for record, score in zip(heads.neurons, heads.scores.tolist(), strict=True):
        assert data["heads"][record.layer][record.head] == pytest.approx(score, abs=1e-9)  # type: ignore[union-attr]
    assert sum(len(row) for row in data["heads"]) == len(heads)


@pytest.mark.parametrize("unit", ["ffn", "attention"])
def test_value_neurons_are_those_of_attribute(data: dict[str, Any], bundled: at.Model, unit: str) -> None:
    ranking = at.attribute(bundled, PROMPT, ANSWER, unit=unit, k=K)
    found = data[f"{unit}_neurons"]
    assert [_neuron(each["neuron"]) for each in found] == ranking.neurons
    assert [each["score"] for each in found] == pytest.approx(ranking.scores.tolist(), abs=1e-9)
    assert ranking.kl is not None
    assert [each["kl"] for each in found] == pytest.approx(ranking.kl.tolist(), abs=1e-9)
    for each in found:
        position = each["neuron"].get("position")
        assert each["source"] == (None if position is None else data["tokens"][position])


def test_query_side_is_that_of_query(data: dict[str, Any], bundled: at.Model) -> None:
    queries = at.query(bundled, PROMPT, ANSWER, k=K)
    assert [_neuron(each["neuron"]) for each in data["query_neurons"]] == queries.neurons
    assert [each["score"] for each in data["query_neurons"]] == pytest.approx(queries.scores.tolist(), abs=1e-9)
    rows = [(each["value_unit"], each["component"]) for each in data["query_layers"]]
    assert rows == list(queries.layers[["value_unit", "component"]].itertuples(index=False, name=None))
    assert [each["score"] for each in data["query_layers"]] == pytest.approx(list(queries.layers["query_score"]))
    layers = [-1 if each["layer"] is None else each["layer"] for each in data["query_layers"]]
    assert layers == queries.layers["layer"].fillna(-1).tolist()


def test_effects_are_those_of_ablate(data: dict[str, Any], bundled: at.Model) -> None:
    named = {unit: [each["neuron"] for each in data[f"{unit}_neurons"]] for unit in ("ffn", "attention", "query")}
    named["both"] = named["ffn"] + named["attention"]
    assert {each["name"] for each in data["ablations"]} == set(named)
    for each in data["ablations"]:
        assert each["neurons"] == named[each["name"]]
        for neurons, outcome in (("neurons", "outcome"), ("control_neurons", "control")):
            logits = at.ablate(bundled, PROMPT, [_neuron(fields) for fields in each[neurons]])
            expected = at.measure(logits, data["answer_id"])
            assert each[outcome]["logp"] == pytest.approx(expected.logp, abs=1e-4)
            assert each[outcome]["rank"] == expected.rank


def test_controls_are_others_of_the_same_layers(data: dict[str, Any]) -> None:
    def indices(neurons: list[dict[str, int]]) -> list[tuple[int, ...]]:
        return [tuple(value for key, value in each.items() if key != "position") for each in neurons]

    for each in data["ablations"]:
        layers = [
            sorted((len(fields), fields["layer"]) for fields in each[kind]) for kind in ("neurons", "control_neurons")
        ]
        assert layers[0] == layers[1]
        assert not set(indices(each["neurons"])) & set(indices(each["control_neurons"]))


def _written(each: dict[str, Any], network: Any) -> torch.Tensor:
    """What a neuron does to the logits by plain weights, up to a positive factor; the final norm's bias is left out."""
    layer, model = each["neuron"]["layer"], network.base_model
    gpt2 = network.config.model_type == "gpt2"
    block = (model.h if gpt2 else model.layers)[layer]
    if "head" in each["neuron"]:
        row = each["neuron"]["head"] * network.config.hidden_size // network.config.num_attention_heads
        row += each["neuron"]["dim"]
        weight = block.attn.c_proj.weight if gpt2 else block.self_attn.o_proj.weight.T
    else:
        row = each["neuron"]["index"]
        weight = block.mlp.c_proj.weight if gpt2 else block.mlp.down_proj.weight.T
    vector = weight[row].double() * each["coefficient"]
    gamma = model.ln_f.weight if gpt2 else model.norm.weight
    centred = vector - vector.mean() if gpt2 else vector
    logits: torch.Tensor = network.lm_head.weight.double() @ (gamma.double() * centred)
    return logits.detach()


@pytest.mark.parametrize("unit", ["ffn", "attention"])
def test_raised_tokens_follow_the_sign_of_the_coefficient(
    data: dict[str, Any], network: Any, reader: Any, unit: str
) -> None:
    ids = reader.encode(PROMPT)

    def texts(tokens: torch.Tensor) -> list[str]:
        before = reader.decode(ids)
        whole = [reader.decode([*ids, token]) for token in tokens.tolist()]
        return [each[len(before) :] for each in whole]

    signs = set()
    for each in data[f"{unit}_neurons"]:
        logits = _written(each, network)
        signs.add(each["coefficient"] > 0)
        assert each["raised"] == texts(logits.topk(10).indices)
        assert each["lowered"] == texts((-logits).topk(10).indices)
        # Without the sign, a negative coefficient's lists would be the other way round.
        bare = logits / each["coefficient"]
        turned = (each["raised"], each["lowered"]) if each["coefficient"] > 0 else (each["lowered"], each["raised"])
        assert turned == (texts(bare.topk(10).indices), texts((-bare).topk(10).indices))
    assert signs == {True, False}


def test_text_has_every_section_and_fits_a_hundred_columns(name: str, explanation: Explanation) -> None:
    run = _run("explain", PROMPT, ANSWER, "--model", name, "-k", str(K))
    assert (run.status, run.err) == (0, "")
    assert run.out == render_text(explanation) + "\n"
    assert max(map(len, run.out.splitlines())) <= 100
    for section in sections_of(explanation):
        assert f"{section.title}\n---".replace("\u00a0", " ") in run.out
    for number in (explanation.heads[3][1], explanation.attention_layers[4], explanation.ffn_neurons[0].score):
        assert f"{number:+.2f}" in run.out
    assert "█" in run.out
    assert "one draw" in run.out


def test_a_terminal_without_unicode_gets_ascii(name: str) -> None:
    run = _run("explain", "The capital of Köln is", ANSWER, "--model", name, "-k", "2", encoding="ascii")
    assert run.status == 0
    assert "K\\xf6ln" in run.out
    assert "####" in run.out
    assert max(map(len, run.out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("encoding", "glyphs"),
    [("utf-8", UNICODE), ("cp437", UNICODE), ("latin-1", ASCII), ("ascii", ASCII), (None, ASCII), ("no-such", ASCII)],
)
def test_glyphs_are_what_the_encoding_carries(encoding: str | None, glyphs: Any) -> None:
    assert glyphs_for(encoding) == glyphs


_scores = st.floats(-30, 30, width=32)


@settings(deadline=None, max_examples=40)
@given(drawn=st.data(), unicode=st.booleans())
def test_charts_of_any_scores_fit(tiny: Explanation, drawn: st.DataObject, unicode: bool) -> None:
    layers, heads = drawn.draw(st.integers(1, 4)), drawn.draw(st.integers(1, 90))
    attention, ffn = (tuple(drawn.draw(st.lists(_scores, min_size=layers, max_size=layers))) for _ in range(2))
    numbers = drawn.draw(st.randoms(use_true_random=False))
    by_head = tuple(tuple(numbers.uniform(-30, 30) for _ in range(heads)) for _ in range(layers))
    changed = replace(tiny, attention_layers=attention, ffn_layers=ffn, heads=by_head)
    # Tokens are escaped where they are printed.
    text = render_text(changed, UNICODE if unicode else ASCII).split("FFN value neurons\n")[0].split("\nLayers\n")[1]
    assert max(map(len, text.splitlines())) <= 100
    assert unicode or text.isascii()
    bars = [line for line in text.splitlines() if re.match(r" +\d+ +[+-]\S+ [█▐# ]*[│|]", line)]
    assert len(bars) == layers
    step = float(re.search(r"^One .* is (\S+) nats\.$", text, re.MULTILINE).group(1))  # type: ignore[union-attr]
    for line, scores in zip(bars, zip(attention, ffn, strict=True), strict=True):
        # Each side in turn: what is drawn below zero, and above it. Bars are rounded to half or whole steps; the size
        # of a step is printed to three digits, half a percent of at most 30 steps.
        for score, (below, above) in zip(scores, re.findall(r"([█▐# ]*)[│|]([█▌#]*)", line), strict=True):
            drawn_steps = sum({"█": 1.0, "#": 1.0}.get(each, 0.5) for each in below.strip() + above)
            assert drawn_steps == pytest.approx(abs(score) / step, abs=0.45 if unicode else 0.7)
            assert not (below.strip() if score > 0 else above)


@pytest.fixture(scope="module")
def tiny(loaded: Callable[[str], at.Model]) -> Explanation:
    return explain(loaded("gpt2"), PROMPT, ANSWER, k=2)


def test_an_answer_left_out_is_the_models_own(name: str, bundled: at.Model) -> None:
    run = _run("explain", "The capital of Italy is", "--model", name, "-k", "2")
    assert run.status == 0
    assert "the model's own first prediction, since no answer was given" in " ".join(run.out.split())
    found = explain(bundled, "The capital of Italy is", k=2)
    assert (found.answer, found.answer_given, found.outcome.rank) == (" Rome", False, 1)
    assert replace(found, answer_given=True) == explain(bundled, "The capital of Italy is", " Rome", k=2)


class _Page(HTMLParser):
    """Collects what a page points at, and checks that its elements close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attributes if key in ("src", "href", "xlink:href", "data")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "br"):
            assert self.open.pop() == tag


def test_page_stands_alone_and_says_what_the_text_says(page_file: Path, run: Run, explanation: Explanation) -> None:
    assert run.status == 0
    page = page_file.read_text(encoding="utf-8")
    parsed = _Page(page)
    assert parsed.open == []
    assert not {"script", "link", "iframe", "img"} & set(parsed.tags)
    assert parsed.tags.count("svg") == 2
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in parsed.links)
    assert not re.search(r"url\((?!#)|@import", page)
    text = unescape(re.sub(r"<[^>]+>", "", page))
    for section in sections_of(explanation):
        assert section.title in text
        assert section.note in text
        for row in section.table.rows if section.table else ():
            assert all(f">{cell}<" in unescape(page) for cell in row)
    for each in explanation.ffn_neurons:
        assert ", ".join(map(repr, each.raised)) in text
    assert "log-probability increase (nats)" in text


def test_text_on_the_page_is_escaped(bundled: at.Model, explanation: Explanation) -> None:
    marked = "<b>The capital of &amp; France</b> is"
    page = render_page(replace(explain(bundled, marked, ANSWER, k=2), model='"><script>'))
    parsed = _Page(page)
    assert not {"b", "script"} & set(parsed.tags)
    assert "&lt;b&gt;The capital of &amp;amp; France&lt;/b&gt; is" in page
    hostile = replace(explanation, ffn_neurons=(replace(explanation.ffn_neurons[0], raised=("<i>",)),))
    assert "<span>&#39;&lt;i&gt;&#39;</span>" in render_page(hostile)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PROMPT, " Paris Paris"), "is 2 tokens"),
        (("", ANSWER), "prompt '' is empty"),
        (("  ",), "is empty"),
        ((PROMPT + " ",), "prompt"),
        ((PROMPT, "Paris"), "did you mean ' Paris'?"),
        ((PROMPT, ANSWER, "-k", "0"), "k = 0 is not between 1 and"),
        ((PROMPT, ANSWER, "-k", "100000"), "k = 100000 is not between 1 and"),
        ((PROMPT, ANSWER, "--model", "bundled:gtp2"), "is not bundled"),
        ((PROMPT, ANSWER, "--models-dir", "nowhere", "--model", "gpt2"), "not in the models folder 'nowhere'"),
        ((PROMPT, ANSWER, "-k", "1", "--html", "no/such/folder/page.html"), "the page cannot be written to"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments: tuple[str, ...], message: str) -> None:
    run = _run("explain", *arguments)
    assert run.status == 1
    assert run.err.startswith("error: ")
    assert run.err.count("\n") == 1
    assert message in run.err


def test_a_first_prediction_that_is_no_answer_is_named(bundled: at.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text is read as other tokens."""
    tokenizer = bundled.tokenizer
    token = next(
        token
        for token in range(bundled.anatomy.vocabulary)
        if tokenizer.encode(PROMPT + tokenizer.decode([token]))[len(tokenizer.encode(PROMPT)) :] != [token]
    )
    _predict(token, bundled, monkeypatch)
    with pytest.raises(at.AttributionError, match=rf"is token {token} \(.*\), .* give the answer to explain"):
        explain(bundled, PROMPT)


def test_a_first_prediction_may_go_on_with_the_prompts_last_word(
    bundled: at.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = bundled.tokenizer.convert_tokens_to_ids("um")
    _predict(token, bundled, monkeypatch)
    explanation = explain(bundled, PROMPT)
    assert (explanation.answer, explanation.answer_id) == ("um", token)
    again = explain(bundled, at.Prompt(PROMPT, "um", joined=True))
    assert (again.ffn_neurons, again.answer_given) == (explanation.ffn_neurons, True)


def _predict(token: int, model: at.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a model predict a token first."""
    logits = torch.zeros(model.anatomy.vocabulary)
    logits[token] = 1
    monkeypatch.setattr("attribution.experiments.explanation.ablate", lambda *_: logits)


def test_models_are_listed_without_importing_torch() -> None:
    code = "import sys; from attribution.__main__ import main; main(['models']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    heading, *rows, imported = done.stdout.splitlines()
    assert heading.split() == ["name", "marker", "source", "revision", "dtype", "bundled"]
    for row, each in zip(rows, registry().values(), strict=True):
        revision = [each.revision[:12]] if each.revision else []
        bundled = "yes" if each.bundled else "no"
        assert re.split(r" {2,}", row) == [each.name, each.marker, each.source, *revision, each.dtype, bundled]
    assert imported == "False"


def test_methods_are_listed_with_their_passes() -> None:
    run = _run("methods")
    assert run.status == 0
    heading, *rows = run.out.splitlines()
    assert heading.split() == ["name", "units", "forward", "backward", "source"]
    for row, method in zip(rows, METHODS.values(), strict=True):
        cells = re.split(r" {2,}", row)
        assert cells == [method.name, ", ".join(method.units), str(method.forward), str(method.backward), method.source]


def test_preflight_prints_every_check_with_its_bound(folder: Path, model: at.Model) -> None:
    run = _run("preflight", str(folder))
    assert run.status == 0
    *lines, last = run.out.splitlines()
    assert lines == [str(check) for check in at.preflight(model)]
    assert last == f"all {len(lines)} identities hold on {folder}"


def test_preflight_of_a_broken_model_fails_with_a_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = copytree(folders["gpt2"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    # What it writes is more than float32 holds.
    weights["transformer.h.1.mlp.c_proj.weight"].fill_(1e38)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run = _run("preflight", str(broken))
    assert (run.status, run.out) == (1, "")
    assert re.fullmatch(r"error: model .* breaks the identity '\w+' .*\n", run.err)


def test_rankings_are_tables_in_a_notebook(model: at.Model) -> None:
    prompt = "<b>The capital of France is"
    ranking = at.attribute(model, prompt, ANSWER, unit="attention", k=30)
    queries = at.query(model, prompt, ANSWER, k=30)
    for shown in (ranking, queries):
        html = shown._repr_html_()
        assert _Page(html).tags[:2] == ["p", "table"]
        assert "b" not in _Page(html).tags
        assert unescape(re.sub(r"<[^>]+>", "", html)).strip().startswith(repr(shown).splitlines()[0])
        # As many rows as the text has: a long ranking is cut in its middle.
        assert html.count("<tr") == 1 + 1 + 21
