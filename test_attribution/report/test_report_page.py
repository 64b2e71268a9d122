"""The report of a run: its page, its summary and its files, of made-up exhibits; and nested runs that write one."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Claim, Status, Verdict
from attribution.claims.paper import ADDRESS, paper_model, published, remarks
from attribution.prompts.knowledge import CATEGORIES
from attribution.report.run_page import run_header, write_report
from attribution.report.verdicts import verdict_row

pytest_plugins = ["pytester"]

METHODS = (
    "none",
    "log_prob_increase",
    "log_prob",
    "prob_increase",
    "vector_norm",
    "coefficient",
    "reciprocal_rank",
    "output_norm",
    "coefficient_by_rank",
)
HEADER = {"Made": "2025-01-01 12:00 UTC", "Models": "bundled:gpt2", "Versions": "torch 2"}
SECTIONS = [*(f"table-{number}" for number in range(1, 15)), *(f"figure-{number}" for number in range(1, 11))]


def _frames(layers: int = 8, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Made-up numbers in the columns of every exhibit."""
    rng = np.random.default_rng(seed)

    def cut() -> float:
        return float(rng.uniform(0, 1))

    def layer() -> str:
        return f"{rng.choice(['a', 'f'])}{rng.integers(layers)}"

    ranked = [(category, rank) for category in CATEGORIES for rank in range(1, 11)]
    rows: dict[str, tuple[str, list[tuple[object, ...]]]] = {
        "table_2": ("method mrr prob logp", [(each, cut(), cut(), -4 * cut()) for each in METHODS]),
        "table_3": (
            "category kind total",
            [(each, kind, 8 * cut()) for each in CATEGORIES for kind in ("attention", "ffn")],
        ),
        "table_4": ("category rank layer importance", [(*each, layer(), 2 * cut()) for each in ranked]),
        "table_5": (
            "category kind which total",
            [
                (each, kind, which, 30 * cut())
                for each in CATEGORIES
                for kind in ("attention", "ffn")
                for which in ("all", "positive", "top 100", "top 200")
            ],
        ),
        "table_6": ("category rank layer share", [(*each, layer(), cut()) for each in ranked]),
        "table_7": (
            "category neurons number mrr_cut prob_cut",
            [(each, kind, 1000, cut(), cut()) for each in CATEGORIES for kind in ("query", "random")],
        ),
        "table_8": (
            "category side shared share expected top",
            [
                (each, side, int(rng.integers(100)), cut(), 2 * cut(), 300)
                for each in CATEGORIES
                for side in ("value", "query")
            ],
        ),
        "table_9": (
            "category role neuron score sign tokens hits",
            [
                (each, role, f"f{rng.integers(layers)}-{rng.integers(512)}", cut(), "+", " · ".join(TOKENS), 3)
                for each in CATEGORIES
                for role in ("value", "query", "random")
            ],
        ),
        "table_10": (
            "category rank head importance",
            [(*each, f"{rng.integers(layers)}_{rng.integers(20)}", cut()) for each in ranked],
        ),
        "table_11": (
            "heads_of category mrr_cut prob_cut",
            [(own, each, cut(), cut()) for own in CATEGORIES for each in CATEGORIES],
        ),
        "table_13": ("category number mrr_cut prob_cut", [(each, 300, cut(), cut()) for each in CATEGORIES]),
        "table_14": ("category rank layer share", [(*each, layer(), cut()) for each in ranked]),
        "figure_2": (
            "method layer share",
            [(method, each, cut() / layers) for method in METHODS[1:4] for each in range(layers)],
        ),
        "figure_3": (
            "segment logp prob",
            [(each, -8 + 7 * each / 60, np.exp(-8 + 7 * each / 60)) for each in range(61)],
        ),
        "figure_8": (
            "layer query_only query_value",
            [(each, 1000 * cut() / layers, 300 * cut() / layers) for each in range(layers)],
        ),
    }
    return {name: pd.DataFrame(of, columns=columns.split()) for name, (columns, of) in rows.items()}


TOKENS = ("Paris", "<s>", "|", "Rome", "Oslo", "&", "Berlin", "Cairo", "Lima", "Quito")


def made_up(model: str, layers: int = 8) -> list[Exhibit]:
    """One exhibit of every name."""
    seen = "A <b>sentence</b> of what is seen | here."
    return [Exhibit.of_frame(name, model, of, seen=seen, prompts=60) for name, of in _frames(layers).items()]


def _row(model: str = "bundled:gpt2", status: Status = Status.SUPPORTED, **claim: object) -> dict[str, str]:
    fields = {"id": "top 10: mrr", "sentence": "s", "source": "ours", "effect": "e", "test": "above", "threshold": 0}
    of_claim = Claim(**(fields | {"control": "c"} | claim))  # type: ignore[arg-type]
    return verdict_row(Verdict(of_claim, model, status, 0.5, 0.25, 0.75, 300, 100))


ROWS = [
    _row(),
    _row(status=Status.REFUTED, id="left | of"),
    _row("bundled:llama", asserted=False),
    _row("bundled:llama", status=Status.INCONCLUSIVE),
]

# Tables of more columns are laid out as cards on a phone, where no heading stands above a cell.
_FEW_COLUMNS = 4


class _Page(HTMLParser):
    """What the tests ask about a page: its ids, its addresses, its elements, and its tables by section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.elements: set[str] = set()
        self.sections: dict[str, list[list[list[str]]]] = {}
        self.text: dict[str, str] = {}
        self.columns_of_cells: list[tuple[str, str | None]] = []
        self._section = ""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.add(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.addresses += [value for name, value in attrs if name in ("href", "src", "xlink:href") and value]
        if tag == "section":
            self._section = given["id"] or ""
            self.sections[self._section] = []
        elif tag == "table":
            self.sections[self._section].append([])
        elif tag == "tr":
            self.sections[self._section][-1].append([])
        elif tag in ("td", "th"):
            *_, table = self.sections[self._section]
            table[-1].append("")
            self._in_cell = True
            if tag == "td" and len(table[0]) > _FEW_COLUMNS:
                self.columns_of_cells.append((table[0][len(table[-1]) - 1], given.get("data-column")))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text[self._section] = self.text.get(self._section, "") + data
        if self._in_cell:
            self.sections[self._section][-1][-1][-1] += data


def _page(folder: Path) -> _Page:
    return _Page((folder / "index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of every exhibit, on a bundled model and on one of the paper's."""
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, ROWS, [*made_up("gpt2-large", 36), *made_up("bundled:gpt2")], HEADER)
    return folder


def test_page_opens_without_network_and_without_scripts(whole: Path) -> None:
    page, text = _page(whole), (whole / "index.html").read_text(encoding="utf-8")
    files = {path.name for path in whole.iterdir()}
    assert {each for each in page.addresses if each[0] != "#"} - files == {ADDRESS}
    assert {each[1:] for each in page.addresses if each[0] == "#"} <= set(page.ids)
    assert not page.elements & {"script", "link", "img", "image", "iframe", "object"}
    assert "@import" not in text
    assert set(re.findall(r"url\(([^)])", text)) <= {"#"}


def test_every_table_and_figure_has_its_place(whole: Path) -> None:
    page = _page(whole)
    assert [each for each in page.ids if each in SECTIONS] == SECTIONS
    assert list(page.sections) == ["claims", *SECTIONS]
    for name in SECTIONS:
        assert f"#{name}" in page.addresses
        assert "Not measured in this run" not in page.text[name]
    for number in (4, 5, 6, 7):
        assert "not among the published ones that the project holds as data" in page.text[f"figure-{number}"]
        assert "python -m attribution explain" in page.text[f"figure-{number}"]


def test_cells_of_many_columns_name_their_column_themselves(whole: Path) -> None:
    cells = _page(whole).columns_of_cells
    assert len(cells) > 1000
    assert [(heading, own) for heading, own in cells if heading != own] == []


def test_text_is_escaped(whole: Path) -> None:
    text = (whole / "index.html").read_text(encoding="utf-8")
    assert "<b>" not in text
    assert "A &lt;b&gt;sentence&lt;/b&gt; of what is seen | here." in text
    assert "&lt;s&gt; · | · Rome" in text


@pytest.mark.parametrize("name", sorted(_frames()))
def test_published_figures_have_the_columns_of_the_exhibit(name: str) -> None:
    frame = published(name, "gpt2-large")
    if name.startswith("figure"):
        assert frame is None
    else:
        assert frame is not None
        assert list(frame.columns) == list(_frames()[name].columns)
    assert published(name, "bundled:gpt2") is None


def test_published_figures_are_those_of_the_paper() -> None:
    def one(name: str, model: str, **where: object) -> pd.Series:
        frame = published(name, model)
        assert frame is not None
        for column, value in where.items():
            frame = frame[frame[column] == value]
        (_, row), *others = frame.iterrows()
        assert not others
        return row

    # Read off the paper's tables.
    assert tuple(one("table_2", "gpt2-large", method="log_prob_increase"))[1:] == (0.201, 0.034, -4.06)
    assert tuple(one("table_2", "llama-7b", method="none"))[1:] == (0.551, 0.215, -2.24)
    assert one("table_3", "gpt2-large", category="number", kind="ffn").total == 4.70
    assert one("table_4", "llama-7b", category="color", rank=1).layer == "f29"
    assert one("table_5", "llama-7b", category="capital", kind="ffn", which="positive").total == 77.6
    assert one("table_5", "gpt2-large", category="capital", kind="attention", which="top 200").total == 5.3
    assert tuple(one("table_7", "gpt2-large", category="month"))[1:] == ("query", 1000, 0.83, 0.88)
    assert one("table_8", "gpt2-large", category="month", side="value").shared == 137
    assert one("table_9", "llama-7b", role="value").neuron == "a23.12-70"
    assert one("table_10", "gpt2-large", category="language", rank=2)["head"] == "a26.17"
    assert tuple(one("table_11", "gpt2-large", heads_of="month", category="country"))[2:] == (0.13, 0.19)
    assert tuple(one("table_13", "llama-7b", category="color"))[1:] == (300, 0.98, 0.99)
    assert one("table_14", "gpt2-large", category="language", rank=3).layer == "a0"
    assert published("table_6", "gpt2-large").groupby("category").size().tolist() == [10] * 6  # type: ignore[union-attr]


def test_models_of_the_paper_are_known_by_name_and_hub_id() -> None:
    assert paper_model("gpt2-large") == paper_model("openai-community/gpt2-large") == "gpt2-large"
    assert paper_model("llama-7b") == "llama-7b"
    assert paper_model("bundled:llama") is None


def test_what_the_paper_says_in_words_is_told() -> None:
    assert "0.8% of the MRR and 1.1% of the probability" in remarks("table_7")[0]
    assert "layers 17 to 31" in remarks("figure_2")[0]
    assert "segments 40 to 60" in remarks("figure_3")[0]
    assert "a23 twice" in remarks("table_4")[0]


def test_published_numbers_stand_beside_ours_where_the_model_is_the_same(whole: Path) -> None:
    sections = _page(whole).sections
    ours, paper_model_, others = sections["table-2"]
    assert ours[0] == ["method", "MRR", "p (%)", "log p (nats)"]
    head, *rows = paper_model_
    assert head == ["method", "MRR", "MRR, paper", "p (%)", "p (%), paper", "log p (nats)", "log p (nats), paper"]
    assert [(row[2], row[4], row[6]) for row in rows[:2]] == [("0.361", "7.1", "-3.15"), ("0.201", "3.4", "-4.06")]
    assert [row[0] for row in rows] == list(METHODS)
    # Of a model that is not in the run: by itself.
    assert others[1] == ["none", "0.551", "21.5", "-2.24"]
    matrix = sections["table-11"][1]
    assert matrix[0] == ["heads of", "from", *CATEGORIES]
    assert matrix[2] == ["language", "paper", "44 / 51", "33 / 52", "38 / 56", "6 / 5", "1 / 2", "3 / 0"]
    ranks = sections["table-4"][1]
    assert ranks[0] == ["category", "from", *map(str, range(1, 11))]
    assert ranks[2][:5] == ["language", "paper", "a26", "a30", "a32"]
    assert ranks[1][:2] == ["language", "this run"]
    # The random neurons of Table 7 have nothing beside them, and the paper has no chance level in Table 8.
    cuts = sections["table-7"][1]
    assert (cuts[1][4], cuts[1][6]) == ("91", "96")
    assert cuts[2][:3] == ["language", "random", "1000"]
    assert (cuts[2][4], cuts[2][6]) == ("-", "-")
    assert sections["table-8"][1][0][-3:] == ["by chance", "of the top", "of the top, paper"]


def test_numbers_are_ours(whole: Path) -> None:
    shown = _page(whole).sections["table-13"][0]
    frame = _frames()["table_13"]
    assert shown[1] == ["language", "300", f"{frame.mrr_cut[0]:.1%}"[:-1], f"{frame.prob_cut[0]:.1%}"[:-1]]


def test_tables_12_and_figures_9_and_10_are_served_by_those_of_the_other_model(whole: Path) -> None:
    page = _page(whole)
    for name, other in (("table-12", "Table 5"), ("figure-9", "Figure 2"), ("figure-10", "Figure 3")):
        assert f"Ours of every model stands under {other}" in page.text[name]
    (_, ours, llama) = page.sections["table-5"]
    assert ours[2] == ["attention", "all", "paper", "7.3", "6.7", "6.6", "3.6", "2.3", "4.3"]
    assert llama[1] == ["attention", "all", "6.7", "5.5", "6.9", "4.0", "2.4", "5.4"]


def test_worked_example_is_computed_anew(whole: Path) -> None:
    page = _page(whole)
    (table,) = page.sections["table-1"]
    assert table[4] == ["[6, 2, 2, 2]", "[7, 4, 5, 6]", "0.644, 0.032, 0.087, 0.237", "0.64, 0.03, 0.09, 0.23"]
    assert "are met within 0.007" in page.text["table-1"]


def test_figures_are_drawings_with_labelled_axes_and_no_name_twice(whole: Path) -> None:
    page, text = _page(whole), (whole / "index.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 2 * 4
    for label in (
        "share of the top 10 FFN neurons (%)",
        "mean log p (nats)",
        "mean p (0 to 1)",
        "FFN neurons per prompt (mean)",
        "fall of MRR (%)",
        "category of the heads",
    ):
        assert text.count(f">{label}</text>") == 2, label
    # Parts that figures share, such as a marker, have one name and one shape.
    assert not [each for each in page.ids if re.fullmatch(r"(figure|axes|patch|text|legend|line2d|xtick)_\d+", each)]


def test_missing_numbers_are_gaps(tmp_path: Path) -> None:
    gaps = [
        Exhibit(each.name, each.model, each.columns, tuple(_with_gap(row) for row in each.rows), each.seen, 1)
        for each in made_up("bundled:gpt2")
    ]
    write_report(tmp_path, [], gaps, HEADER)
    assert _page(tmp_path).sections["table-13"][0][1][3] == "-"


def _with_gap(row: tuple[object, ...]) -> tuple[object, ...]:
    return (*row[:2], *(None if isinstance(cell, float) else cell for cell in row[2:]))


def test_files_hold_every_number(whole: Path) -> None:
    exhibits = [Exhibit.of_json(each) for each in json.loads((whole / "exhibits.json").read_text(encoding="utf-8"))]
    made = {(each.name, each.model): each for each in [*made_up("gpt2-large", 36), *made_up("bundled:gpt2")]}
    assert {(each.name, each.model): each for each in exhibits} == made
    assert len(exhibits) == len(made)
    for name in _frames():
        read = pd.read_csv(whole / f"{name}.csv", keep_default_na=False)
        expected = pd.concat([each.to_frame().assign(model=each.model) for each in exhibits if each.name == name])
        pd.testing.assert_frame_equal(
            read, expected[read.columns].reset_index(drop=True), check_exact=True, check_dtype=False
        )
    with (whole / "verdicts.csv").open(encoding="utf-8", newline="") as file:
        unwritten = {"waived", "least"}
        assert list(csv.DictReader(file)) == [{name: row[name] for name in row.keys() - unwritten} for row in ROWS]


def test_claims_stand_by_model_with_asserted_ones_first(whole: Path) -> None:
    counts, *tables = _page(whole).sections["claims"]
    assert counts[1:] == [["bundled:gpt2", "1", "1", "0", "0", "0"], ["bundled:llama", "0", "0", "1", "0", "1"]]
    assert [[row[0] for row in table[1:]] for table in tables] == [
        ["top 10: mrr", "left | of"],
        ["top 10: mrr"],
        ["top 10: mrr"],
    ]
    assert [table[1][-1] for table in tables] == ["supported", "inconclusive", "supported"]


def test_summary_is_markdown_that_tables_survive(whole: Path) -> None:
    lines = (whole / "summary.md").read_text(encoding="utf-8").splitlines()
    assert "| bundled:gpt2 | 1 | 1 | 0 | 0 | 0 |" in lines
    assert r"| bundled:gpt2 |  | left \| of | 0.500 | 0.250 .. 0.750 | 300 | refuted |" in lines
    assert r"- **Table 13**, gpt2-large: A \<b\>sentence\</b\> of what is seen \| here." in lines
    # Every row of a table has as many cells as its head.
    for line, following in pairwise(lines):
        if line.startswith("|") and following.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", following))


@pytest.mark.parametrize(
    ("asserted", "sentence"),
    [(True, "Every asserted claim is supported."), (False, "No claim is asserted in this run.")],
)
def test_summary_praises_no_run_that_asserts_nothing(tmp_path: Path, asserted: bool, sentence: str) -> None:
    write_report(tmp_path, [_row(asserted=asserted)], [], HEADER)
    assert sentence in (tmp_path / "summary.md").read_text(encoding="utf-8").splitlines()


def test_summary_stays_short(tmp_path: Path) -> None:
    many = [f"model-{number}" for number in range(20)]
    rows = [_row(model, Status.REFUTED, id=f"claim {number}") for model in many for number in range(20)]
    exhibits = [Exhibit(name, model, (), (), "seen", 1) for model in many for name in _frames()]
    write_report(tmp_path, rows, exhibits, HEADER)
    lines = (tmp_path / "summary.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 200
    assert "350 more are in verdicts.csv." in lines
    assert "220 more are in exhibits.json." in lines


def test_run_without_claims_and_exhibits_says_so(tmp_path: Path) -> None:
    (tmp_path / "table_2.csv").write_text("of an earlier run")
    write_report(tmp_path, [], [], run_header([], []))
    page = _page(tmp_path)
    assert "No claim was judged in this run." in page.text["claims"]
    assert (
        page.text["table-2"].count(
            "Not measured in this run. pytest test_faithfulness test_knowledge --attribution-report=DIR"
        )
        == 1
    )
    # What the paper prints is there to be read all the same.
    assert [len(table) for table in page.sections["table-2"]] == [10, 10]
    assert not (tmp_path / "table_2.csv").exists()
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "No claim was judged in this run." in summary
    assert "No exhibit was made in this run." in summary


EXHIBIT = """
from types import SimpleNamespace

import pytest
from attribution.claims.exhibits import Exhibit

MADE = []

def made(bench):
    MADE.append(bench)
    columns = "category", "number", "mrr_cut", "prob_cut"
    return Exhibit("table_13", bench.model.name, columns, (("color", 300, .5, None),), "S.", 9)

@pytest.mark.parametrize("model", ["one", "two"])
def test_exhibit(model, attribution_exhibit):
    bench = SimpleNamespace(model=SimpleNamespace(name=model))
    attribution_exhibit(bench, made)
    attribution_exhibit(bench, made)
    assert MADE.count(bench) <= 1

def test_nothing_is_measured_unasked(request):
    assert not MADE or request.config.getoption("--attribution-report") is not None
"""
# What the fixture assert_claim records, without the seconds that it takes to import torch.
CLAIM = f"""
from attribution.pytest_plugin.recorded import VERDICT, record

def test_claim(request):
    record(request.node, VERDICT, {ROWS[0]!r})
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(test_exhibit=EXHIBIT)
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:cacheprovider\nfilterwarnings = error")
    return pytester


def test_run_writes_the_same_report_in_one_process_and_in_two(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_claim=CLAIM)
    written = []
    for workers in ("-n0", "-n2"):
        result = suite.runpytest_subprocess(workers, f"--attribution-report=reports/{workers}")
        result.assert_outcomes(passed=4)
        text = result.stdout.str()
        assert text.count(f"report: {Path('reports') / workers / 'index.html'}") == 1
        assert text.count("attribution: claims and verdicts") == 1
        files = {path.name: path.read_text(encoding="utf-8") for path in (suite.path / "reports" / workers).iterdir()}
        written.append({name: re.sub(r"\d+-\d+-\d+ \d+:\d+ UTC", "", text) for name, text in files.items()})
    alone, together = written
    assert sorted(alone) == ["exhibits.json", "index.html", "summary.md", "table_13.csv", "verdicts.csv"]
    assert alone == together
    assert [(each["name"], each["model"], each["rows"]) for each in json.loads(alone["exhibits.json"])] == [
        ("table_13", model, [["color", 300, 0.5, None]]) for model in ("one", "two")
    ]
    assert alone["verdicts.csv"].splitlines()[1] == "bundled:gpt2,,top 10: mrr,0.500,0.250 .. 0.750,300,supported,,yes"


def test_run_without_the_option_measures_no_exhibit_and_writes_nothing(suite: pytest.Pytester) -> None:
    result = suite.runpytest_subprocess("-n0")
    result.assert_outcomes(passed=3)
    assert "report:" not in result.stdout.str()
    assert not list(suite.path.rglob("*.html"))


@pytest.mark.parametrize("folder", ["taken/report", ""])
def test_folder_that_cannot_be_written_is_an_error_before_anything_runs(suite: pytest.Pytester, folder: str) -> None:
    (suite.path / "taken").write_text("a file")
    result = suite.runpytest_subprocess("-n0", f"--attribution-report={folder}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --attribution-report=*name a folder that can."])
    assert "Traceback" not in result.stderr.str()


def test_exhibits_survive_the_way_between_processes() -> None:
    for exhibit in made_up("bundled:gpt2"):
        assert Exhibit.of_json(json.loads(json.dumps(asdict(exhibit)))) == exhibit
