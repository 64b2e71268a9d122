"""The model of costs counts what the engine does, and the pages show what was measured; nothing here is about time."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attribution.engine import all_scores, ranking, vectors
from attribution.engine import top_k as selection
from attribution.models import model

ROOT = Path(__file__).parents[1]
# The benchmarks are no part of the package.
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import cost, growth, growth_report, peers, timing
    from benchmarks.cost import Shape, Work
    from benchmarks.random_models import random_model
finally:
    sys.path.remove(str(ROOT))

# No two sizes are equal, nor sums of them, so that a product says by its shape what it is.
TINY = {
    "gpt2": Shape("tiny", 2, 40, 4, 4, 10, 136, 211),
    "llama": Shape("tiny llama", 2, 40, 4, 2, 10, 136, 211, gated=True),
}
TOKENS = timing.TOKENS


class Counted(TorchDispatchMode):
    """Counts matrix products, by the type of their numbers, and how many vectors meet the unembedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.operations, self.products = shape, Counter[torch.dtype](), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "mv", "addmv", "baddbmm", "dot", "vdot"):
            left, right = [each for each in args if isinstance(each, torch.Tensor)][-2:]
            if name != "dot":
                columns = right.shape[-1] if right.dim() > left.dim() - 1 and name not in ("mv", "addmv") else 1
                self.operations[left.dtype] += 2 * left.numel() * columns
                sizes = Counter([*left.shape, columns])
                if sizes[self.shape.vocabulary] and sizes[self.shape.width]:
                    sizes.subtract([self.shape.vocabulary, self.shape.width])
                    (vectors_met,) = sizes.elements()
                    self.products += vectors_met
        return result


@pytest.fixture(params=TINY)
def asked(request: pytest.FixtureRequest) -> timing.Asked:
    model = random_model(TINY[request.param])
    return timing.Asked(model, timing.words_asked(model, 3))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many candidates were scored exactly, by method and by unit, and how many ranks were counted."""
    found: Counter[str] = Counter()
    count = vectors.counted

    def counting_ranks(written: Any, *args: Any) -> Any:
        found["counted"] += len(written)
        return count(written, *args)

    monkeypatch.setattr(vectors, "counted", counting_ranks)

    def counting(candidates: Any, method: Any, *args: Any, **options: Any) -> Any:
        selected = selection.top_k_together(candidates, method, *args, **options)
        for each, own in zip(selected, candidates, strict=True):
            found[method.name] += each.certificate.scored
            found[own.table.unit] += each.certificate.scored
        return selected

    monkeypatch.setattr(ranking, "top_k_together", counting)
    return found


def _kept(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    monkeypatch.setattr(vectors, "_KEPT_NUMBERS", numbers)
    monkeypatch.setattr(cost, "KEPT_NUMBERS", numbers)


def _rows_through_blocks(asked: timing.Asked, thing: timing.Thing) -> tuple[int, Counted]:
    """Run a thing; return how many rows went through the blocks, and the products it took."""
    rows = 0

    def seen(_: Any, args: Any) -> None:
        nonlocal rows
        rows += len(args[0])

    blocks = asked.model.anatomy.blocks(asked.model.network._module)
    handle = blocks[0].register_forward_pre_hook(seen)
    shape = timing.shape_of(asked.model)
    try:
        with Counted(shape) as counted:
            thing()
    finally:
        handle.remove()
    return rows, counted


def _agree(work: Work, rows: int, counted: Counted, shape: Shape, *, prompts: int = 0) -> None:
    """Compare what is predicted with what was counted.

    Args:
        work: What is predicted.
        rows: How many went through the first block.
        counted: What was counted.
        shape: Of the model.
        prompts: If the work is of an experiment, how many: blocks below the first edited one are then run once for
            each prompt instead of for each rerun.
    """
    # What two methods ablate alike is rerun once.
    assert work.products * (0.95 if prompts else 1) <= counted.products <= work.products
    assert counted.operations[torch.float64] == pytest.approx(work.doubles)
    # Llama's rotary angles are a product too.
    slack = 1e-3 if shape.gated else 1e-9
    if prompts:
        # A trace and a plain run at least.
        assert 2 * prompts <= rows <= work.forward
        assert work.flops / 2 < counted.operations.total() <= work.flops * (1 + slack)
    else:
        assert rows == work.forward
        assert counted.operations.total() == pytest.approx(work.flops, rel=slack)


def test_figures_of_the_engine_are_its_own() -> None:
    assert cost.CHUNK_TOKENS == model.CHUNK_TOKENS
    assert cost.BLOCK_NUMBERS == all_scores._BLOCK_NUMBERS
    assert cost.KEPT_NUMBERS == vectors._KEPT_NUMBERS


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "projected"])
@pytest.mark.parametrize("what", ["plain", "ffn", "neuron", "every", "rerun"])
def test_passes_and_products_are_as_the_model_of_costs_says(
    asked: timing.Asked, what: str, kept: bool, scored: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _kept(monkeypatch, 2**24 if kept else 0)
    shape, prompts = timing.shape_of(asked.model), len(asked.prompts)
    asked.rank()
    thing = {"plain": asked.plain, **asked.things()}[what]
    thing()  # what is computed once per model is not counted
    scored.clear()
    rows, counted = _rows_through_blocks(asked, thing)
    found = scored["neuron" if what == "neuron" else "ffn"] / prompts
    works = {
        "plain": cost.plain_forward(shape, TOKENS, prompts),
        "ffn": cost.certified(shape, TOKENS, scored=found, prompts=prompts),
        "neuron": cost.certified(shape, TOKENS, "neuron", scored=found, prompts=prompts),
        "every": cost.every_neuron(shape, TOKENS, prompts=prompts),
        "rerun": cost.rerun(shape, TOKENS, timing.VARIANTS * prompts, plain=prompts),
    }
    _agree(works[what], rows, counted, shape, prompts=prompts if what == "rerun" else 0)


@pytest.mark.parametrize("table", ["table 2", "table 13"])
def test_passes_and_products_of_the_papers_tables_are_as_the_model_of_costs_says(
    asked: timing.Asked, table: str, scored: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _kept(monkeypatch, 0)
    shape, prompts = timing.shape_of(asked.model), len(asked.prompts)
    thing = {"table 2": asked.table_2, "table 13": asked.table_13}[table]
    thing()
    scored.clear()
    rows, counted = _rows_through_blocks(asked, thing)
    found = {name: number / prompts for name, number in scored.items()}
    build = {"table 2": cost.table_2, "table 13": cost.table_13}[table]
    _agree(build(shape, TOKENS, scored=found, prompts=prompts), rows, counted, shape, prompts=prompts)


def test_first_question_projects_every_vector_once_where_logits_are_kept(asked: timing.Asked) -> None:
    shape = timing.shape_of(asked.model)
    _, counted = _rows_through_blocks(asked, lambda: asked.attribute("ffn", 10))
    again = cost.certified(shape, TOKENS, prompts=len(asked.prompts)).products
    assert counted.products == again + shape.ffn_neurons


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a run of the growth table finds, of tiny models and without peers."""
    here = torch.device("cpu")
    shape = TINY["gpt2"]
    points = list(timing.Asked(model := random_model(shape), timing.words_asked(model, 2)).points(shape, "prompts"))
    points += growth.by_size([shape, replace(shape, name="wider", vocabulary=307)])
    machine = timing.calibrate(here)
    measured = {"machine": asdict(machine), "points": points, "memory": [{"peak": 3.0, "loaded": 1.0}]}
    return (
        growth.conditions(here)
        | measured
        | {"peers_shape": asdict(shape), "peers": [{"peer": "Nobody", "error": "gone"}]}
    )


@pytest.mark.exhaustive
def test_growth_table_has_a_line_for_every_model_and_number_of_prompts(found: dict[str, Any]) -> None:
    lines = growth_report.growth_table(found).splitlines()
    assert [line.split(" | ")[3:5] for line in lines[2:]] == [["211", "2"], ["211", "1"], ["307", "1"]]
    times = re.compile(r"[\d.]+ (ms|s|min), [\d.,]+$")
    for line in lines[2:]:
        cells = line.strip("| ").split(" | ")
        assert len(cells) == len(lines[0].strip("| ").split(" | "))
        assert all(times.match(cell) for cell in cells[6:10]), line
    beside = growth_report.peers_table(found).splitlines()
    assert [line.split(" | ")[:2] for line in beside[2:]] == [
        ["| Nobody", "not measured: gone"],
        ["| this package: certified top 10, FFN", ""],
        ["| this package: every FFN neuron, exact", ""],
    ]
    checked = growth_report.check(found)
    assert " 2 MB measured" in checked
    assert len(re.findall(r"[\d.,]+ / [\d.,]+ = [\d.]+", checked)) == 3 * len(growth_report.TITLES)


def test_large_shapes_take_the_same_path_on_any_device() -> None:
    shape, device = TINY["llama"], torch.device("cpu")
    points = list(growth.on_device(shape, device, 4))
    assert [point["what"] for point in points] == list(growth_report.DEVICE_TITLES)
    assert [point["prompts"] for point in points] == [1, 1, 1, 1, 1, 4, 4]
    assert all(point["seconds"] > 0 and point["plain"] > 0 for point in points)
    # A processor does not count what was in use at the peak.
    assert {point["memory"] for point in points} == {None}
    found = growth.conditions(device) | {"points": points}
    lines = growth_report.device_table(found).splitlines()
    assert len(lines) == 2 + 2 + len(points)
    assert "no CUDA device" in growth_report.device_table(None)


def test_a_device_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        growth.main(["--device", "nowhere"])
    assert re.search(r"device 'nowhere' is not one that torch has here \(.+\); name another\.", capsys.readouterr().err)


def test_a_peer_that_is_not_there_says_why(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    model = random_model(TINY["gpt2"])
    rows = growth.ask_peers(str(bare), "nowhere", timing.words_asked(model, 1)[0], model)
    assert [row["peer"] for row in rows] == list(peers.PEERS)
    for row, (package, _) in zip(rows, peers.PEERS.values(), strict=True):
        assert row["error"].startswith(f"{package} is not installed; name an interpreter")


def test_pages_show_what_is_kept() -> None:
    """``python -m benchmarks.cost --write`` and ``growth_report.write()`` bring them up to date."""
    scale, readme = (page.read_text(encoding="utf-8") for page in (cost.DOCS, growth_report.README))
    assert _between(scale, cost.BEGIN, cost.END) == cost.predictions()
    found = growth_report.read("cpu")
    assert found is not None
    assert _between(scale, *growth_report.CHECK) == growth_report.check(found)
    assert _between(readme, *growth_report.GROWTH) == growth_report.tables(found)
    assert _between(readme, *growth_report.DEVICE) == growth_report.device_table(growth_report.read("cuda"))


def test_kept_figures_are_of_every_model_and_peer() -> None:
    found = growth_report.read("cpu")
    assert found is not None
    by_prompts = {(each["shape"]["name"], each["prompts"]) for each in found["points"] if each["axis"] == "prompts"}
    assert by_prompts == {(name, number) for name, numbers in growth.BY_PROMPTS.items() for number in numbers}
    sizes = {(each["shape"]["name"], each["shape"]["vocabulary"]) for each in found["points"] if each["axis"] == "size"}
    vocabularies = (growth.SMALL_VOCABULARY, growth.SIZES[0].vocabulary)
    assert sizes == {(shape.name, size) for shape in growth.SIZES for size in vocabularies}
    assert [each["peer"] for each in found["peers"]] == list(peers.PEERS)
    (dai,) = (each for each in found["peers"] if each["peer"] == "knowledge-neurons")
    work = cost.knowledge_neurons(Shape(**found["peers_shape"]), TOKENS, peers.STEPS)
    assert (dai["forward"], dai["backward"]) == (work.forward, work.backward)


def _between(text: str, begin: str, end: str) -> str:
    return text.split(begin)[1].split(end)[0].strip()
