"""The same figures however the work is divided: over processes of torchrun, over devices, over workers of xdist."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import attribution as at
from attribution.experiments.edited_copies import zeroed_parameters
from attribution.models.registry import registry

ROOT = Path(__file__).parents[2]
# What is asked of a model, in one process or as one of several. Every process writes what it found.
ASKED = """
import json, os, sys
from dataclasses import asdict

import attribution as at
from attribution.claims.bench import Workbench
from attribution.claims.sample import Sample

name, device, folder, tests = sys.argv[1:]
sys.path.insert(0, tests)
from suite import module, verdict_of
sys.path.remove(tests)
model = at.load(name, device=device)
knowledge = at.load_knowledge()
# Some prompts of every category that the model knows: which those are would take longer to find out than all else here.
known = [
    prompt
    for prompt in knowledge.prompts
    if prompt.phrasing == 0 and len(model.tokenizer.encode(prompt.text + prompt.answer)) < 14
][::9]
bench = Workbench(Sample(model, knowledge, max_prompts=12, known=known))
prompts = bench.prompts[:4]
found = {"spread": model.anatomy.spread, "rankings": [], "verdicts": []}
ranked = ("neuron", "log_prob_increase"), ("ffn", "relp"), ("head", "log_prob_increase"), ("ffn", "coefficient")
for unit, method in ranked:
    for ranking in at.attribute(model, prompts, unit=unit, method=method, k=10):
        found["rankings"].append(([str(each) for each in ranking.neurons], ranking.scores.tolist()))
queried = at.query(model, prompts[0], k=10)
found["rankings"].append(([str(each) for each in queried.neurons], queried.scores.tolist()))
options = dict(k=10, kind=["zero", "mean", "resample"], progress=False)
found["evaluation"] = at.evaluate(model, prompts, **options).to_dict("list")
found["sources"] = at.ablate(model, prompts[0], [at.HeadPosition(1, 1, 2), at.Head(2, 0)]).tolist()
top_10 = module("test_top_neurons").test_zeroing_the_top_10_hurts_more_than_a_baselines_top_10
value_neurons = module("test_value_neurons").test_zeroing_value_neurons_removes_the_answer
for metric in ("mrr", "prob", "logp"):
    found["verdicts"].append(asdict(verdict_of(top_10, bench, baseline="coefficient", metric=metric)))
found["verdicts"].append(asdict(verdict_of(value_neurons, bench, metric="prob")))
with open(f"{folder}/{os.environ.get('RANK', 'alone')}.json", "w") as file:
    json.dump(found, file, default=str)
"""


def _ask(script: Path, folder: Path, device: str, launcher: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    tests = str(ROOT / "test_attribution")
    command = [sys.executable, *launcher, str(script), "bundled:llama", device, str(folder), tests]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


def _assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Neurons and verdicts are the same; what is measured is so to the rounding of sums that are added up otherwise."""
    close: dict[str, Any] = {"rel": 1e-4, "abs": 1e-5}
    for (neurons, scores), (expected_neurons, expected_scores) in zip(
        found["rankings"], expected["rankings"], strict=True
    ):
        assert neurons == expected_neurons
        assert scores == pytest.approx(expected_scores, **close)
    one, other = (pd.DataFrame(each["evaluation"]) for each in (found, expected))
    pd.testing.assert_frame_equal(one, other, rtol=1e-3, atol=1e-5)
    assert found["sources"] == pytest.approx(expected["sources"], abs=1e-3)
    for verdict, same in zip(found["verdicts"], expected["verdicts"], strict=True):
        assert verdict["status"] == same["status"]
        assert verdict["n"] == same["n"]
        assert verdict["effect"] == pytest.approx(same["effect"], **close)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("asked") / "asked.py"
    script.write_text(ASKED)
    return script


@pytest.fixture(scope="module")
def alone(script: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = _ask(script, tmp_path_factory.mktemp("alone") / "found", "cpu")
    assert not found["spread"]
    return found


def test_torchrun_of_two_processes_gives_the_rankings_and_claims_of_one(
    script: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    both = _ask(script, tmp_path / "found", "tensor_parallel", launcher)
    assert len(both) == 2
    for found in both:
        assert found["spread"]
        _assert_same(found, alone)


def test_device_auto_gives_the_rankings_and_claims_of_a_device(
    script: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    (found,) = _ask(script, tmp_path / "found", "auto")
    _assert_same(found, alone)


def test_tensor_parallel_without_torchrun_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(at.AttributionError, match="needs the processes that torchrun starts, and this one is alone"):
        at.load("bundled:llama", device="tensor_parallel")


def test_weights_on_disk_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # As "auto" lays a model out that neither accelerators nor memory hold.
    layers = at.load("bundled:llama").anatomy.layers
    here = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    indices = dict.fromkeys(here, "cpu") | {f"model.layers.{layer}": "cpu" for layer in range(layers)}
    on_disk = {"device_map": indices | {"model.layers.1": "disk"}, "offload_folder": str(tmp_path)}
    monkeypatch.setattr("attribution.models.opening._placement", lambda _: on_disk)
    with pytest.raises(at.AttributionError, match=r"does not fit: \d+ weights, such as model.layers.1.* stay on disk"):
        at.load("bundled:llama", device="auto")


def test_a_spread_model_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attribution.models.anatomy._is_spread", lambda *_: True)
    model = at.load("bundled:llama")
    assert model.anatomy.spread
    prompt = at.Prompt("The capital of France is", " Paris")
    with pytest.raises(at.AttributionError, match=r"takes backward passes, and model .* is spread"):
        at.attribute(model, prompt, method="gradient_x_activation")
    with (
        pytest.raises(at.AttributionError, match="are to be edited, and they are elsewhere or spread"),
        zeroed_parameters(model, [at.FFNNeuron(0, 0)]),
    ):
        pass


def test_a_spread_model_gives_the_rankings_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are made whole one layer at a time, when they are asked for."""
    plain = at.load("bundled:llama")
    monkeypatch.setattr("attribution.models.anatomy._is_spread", lambda *_: True)
    spread = at.load("bundled:llama")
    prompt = at.Prompt("The capital of France is", " Paris")
    for unit in ("neuron", "head_position", "layer"):
        one, other = (at.attribute(each, prompt, unit=unit, k=10) for each in (plain, spread))
        assert one.neurons == other.neurons
        assert torch.equal(one.scores, other.scores)
    assert len(spread.anatomy.ffn) == spread.anatomy.layers
    assert torch.equal(spread.anatomy.sublayer(-1, "ffn").vectors, plain.anatomy.sublayer(-1, "ffn").vectors)
    assert len(spread.anatomy.subkeys[1:3]) == 2
    with pytest.raises(IndexError):
        spread.anatomy.subkeys[spread.anatomy.layers]


@pytest.mark.exhaustive
def test_xdist_workers_give_the_verdicts_of_one_process_and_one_report(tmp_path: Path) -> None:
    """Each worker has the models of its own claims; what they judge is written once."""
    verdicts = []
    for workers in ("-n0", "-n2"):
        report = tmp_path / workers
        selected = ["test_faithfulness/test_top_neurons.py", "-m", "bundled", "-k", "top_10_hurts", "--max-prompts=6"]
        # Not as a module of Python, which would take the package from this folder instead of what is installed.
        pytest_itself = str(Path(sys.executable).with_name("pytest"))
        command = [pytest_itself, *selected, workers, f"--attribution-report={report}"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
        assert result.stdout.count(f"report: {report / 'index.html'}") == 1, result.stdout[-3000:]
        assert result.stdout.count("attribution: claims and verdicts") == 1
        with (report / "verdicts.csv").open() as file:
            verdicts.append(list(csv.DictReader(file)))
    assert verdicts[0] == verdicts[1]
    models = {row["model"] for row in verdicts[0]}
    assert models == {name for name in registry() if name.startswith("bundled:")}
    assert len(verdicts[0]) == 2 * 21
