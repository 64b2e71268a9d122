"""Evaluations that are interrupted go on where they were, and give what one that was not gives."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import attribution as at
from attribution.experiments import evaluation

PROMPTS = [
    at.Prompt("The capital of France is", " Paris"),
    at.Prompt("The capital of Italy is", " Rome"),
    at.Prompt("The number of legs that a dog has is", " four"),
    at.Prompt("A ripe cherry is", " red"),
]
ASKED: dict[str, Any] = {"method": ["log_prob_increase", "coefficient"], "k": [1, 3], "progress": False}
# One prompt a batch, and slowly, so that there is time to kill it.
SLOW = """
import sys, time
import attribution as at
from attribution.experiments import evaluation

folder, file, go_on = sys.argv[1:]
model = at.load("bundled:gpt2", batch_tokens=1)
prompts = [prompt for prompt in at.load_knowledge().prompts if prompt.phrasing == 0][:12]
if go_on == "slowly":
    experiment = evaluation.measure_batch

    def slowly(*arguments):
        time.sleep(0.3)
        return experiment(*arguments)

    evaluation.measure_batch = slowly
frame = at.evaluate(
    model, prompts, method=["log_prob_increase", "random"], k=[1, 10], kind=["zero", "resample"], progress=False,
    resume=file or None,
)
frame.to_pickle(f"{folder}/frame")
"""


@pytest.fixture(scope="module")
def whole(model: at.Model) -> pd.DataFrame:
    return at.evaluate(model, PROMPTS, **ASKED)


@pytest.fixture
def one_a_batch(monkeypatch: pytest.MonkeyPatch, model: at.Model) -> None:
    monkeypatch.setattr("attribution.models.model.CHUNK_TOKENS", 1)


def _run(folder: Path, file: Path | str, go_on: str = "") -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SLOW, str(folder), str(file), go_on], cwd=folder)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="only Unix has kill -9")
def test_killed_run_goes_on_to_the_result_of_an_uninterrupted_one(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    killed = _run(tmp_path, file, "slowly")
    deadline = time.monotonic() + 120
    # The first line says what was asked.
    while time.monotonic() < deadline and (not file.exists() or file.read_bytes().count(b"\n") < 4):
        assert killed.poll() is None, "it ended by itself"
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "frame").exists()
    measured = file.read_bytes().count(b"\n") - 1
    assert 3 <= measured < 12
    assert _run(tmp_path, file).wait() == 0
    resumed = pd.read_pickle(tmp_path / "frame")
    assert _run(tmp_path, "").wait() == 0
    pd.testing.assert_frame_equal(resumed, pd.read_pickle(tmp_path / "frame"), check_exact=True)
    assert len(file.read_text().splitlines()) == 1 + 12


def test_results_are_appended_batch_by_batch_and_not_measured_again(
    model: at.Model, whole: pd.DataFrame, one_a_batch: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, asked = tmp_path / "results", []
    experiment = evaluation.measure_batch

    def interrupted(model: at.Model, jobs: Any, *rest: Any) -> Any:
        asked.append([question.text for question, *_ in jobs])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return experiment(model, jobs, *rest)

    monkeypatch.setattr(evaluation, "measure_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        at.evaluate(model, PROMPTS, resume=file, **ASKED)
    assert len(file.read_text().splitlines()) == 1 + 2
    frame = at.evaluate(model, PROMPTS, resume=file, **ASKED)
    assert len(asked) == 3 + 2
    assert asked[2] == asked[3]
    pd.testing.assert_frame_equal(frame, whole, check_exact=False, rtol=1e-5)
    again = at.evaluate(model, PROMPTS, resume=file, **ASKED)
    assert len(asked) == 5
    pd.testing.assert_frame_equal(again, frame, check_exact=True)


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_line_that_was_cut_off_is_measured_again(model: at.Model, one_a_batch: None, tmp_path: Path, cut: int) -> None:
    file = tmp_path / "results"
    frame = at.evaluate(model, PROMPTS, resume=file, **ASKED)
    content = file.read_bytes()
    lines = content.splitlines(keepends=True)
    last = lines[-1][:cut]
    file.write_bytes(b"".join(lines[:-1]) + last)
    pd.testing.assert_frame_equal(at.evaluate(model, PROMPTS, resume=file, **ASKED), frame, check_exact=True)
    assert file.read_bytes() == content
    # Also where nothing but a part of the first line was written.
    file.write_bytes(lines[0][:cut])
    pd.testing.assert_frame_equal(at.evaluate(model, PROMPTS, resume=file, **ASKED), frame, check_exact=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": [1, 2]}, "k"),
        ({"method": "coefficient"}, "method"),
        ({"seed": 1}, "seed"),
        ({"kind": "mean"}, "kind"),
        ({"at_source": True}, "at_source"),
        ({"steps": 3}, "steps"),
        ({"kind": "mean", "reference": "A ripe cherry is"}, "kind, reference"),
    ],
)
def test_file_of_other_arguments_is_refused(
    model: at.Model, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    file = tmp_path / "results"
    at.evaluate(model, PROMPTS, resume=file, **ASKED)
    before = file.read_bytes()
    with pytest.raises(at.AttributionError, match=f"begun by a run with other {named}; ask the same again"):
        at.evaluate(model, PROMPTS, resume=file, **(ASKED | changes))
    assert file.read_bytes() == before


def test_file_of_other_prompts_or_weights_is_refused(
    loaded: Any, model: at.Model, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results"
    at.evaluate(model, PROMPTS, resume=file, **ASKED)
    with pytest.raises(at.AttributionError, match="begun by a run with other prompts"):
        at.evaluate(model, PROMPTS[1:], resume=file, **ASKED)
    other = loaded("llama" if family == "gpt2" else "gpt2")
    with pytest.raises(at.AttributionError, match=r"begun by a run with other .*model, weights"):
        at.evaluate(other, PROMPTS, resume=file, **ASKED)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rank,mrr\n1,2\n", "is no file of results; remove it"),
        (b'{"format": "another"}\n', "is no file of results of this version"),
        (b"\xff\xfe\n", "is no file of results; remove it"),
        (b"[1]\n", "is no file of results; remove it"),
    ],
)
def test_file_of_something_else_is_refused_and_left(
    model: at.Model, tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "results"
    file.write_bytes(content)
    with pytest.raises(at.AttributionError, match=message) as failure:
        at.evaluate(model, PROMPTS, resume=file, **ASKED)
    assert "\n" not in str(failure.value)
    assert file.read_bytes() == content


@pytest.mark.parametrize("line", [{"prompt": 9, "found": []}, {"prompt": "0", "found": []}, {"prompt": 0}])
def test_line_that_is_no_result_is_refused(model: at.Model, tmp_path: Path, line: dict[str, Any]) -> None:
    file = tmp_path / "results"
    at.evaluate(model, PROMPTS, resume=file, **ASKED)
    with file.open("a") as end:
        end.write(json.dumps(line) + "\n")
    with pytest.raises(at.AttributionError, match="holds a line that is no result"):
        at.evaluate(model, PROMPTS, resume=file, **ASKED)


def test_folder_that_is_missing_is_an_error(model: at.Model, tmp_path: Path) -> None:
    with pytest.raises(at.AttributionError, match=r"cannot be written .*name a file in a folder that exists"):
        at.evaluate(model, PROMPTS, resume=tmp_path / "missing" / "results", **ASKED)


def test_two_runs_do_not_write_one_file(model: at.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, experiment = tmp_path / "results", evaluation.measure_batch

    def nested(*arguments: Any) -> Any:
        with pytest.raises(at.AttributionError, match="is being written by another run"):
            at.evaluate(model, PROMPTS, resume=file, **ASKED)
        return experiment(*arguments)

    monkeypatch.setattr(evaluation, "measure_batch", nested)
    at.evaluate(model, PROMPTS, resume=file, **ASKED)


def test_file_may_be_written_again_under_whatever_name(model: at.Model, tmp_path: Path) -> None:
    """The lock is released when a run ends; a link and the file that it points to have the same one."""
    file, link = tmp_path / "results", tmp_path / "link"
    link.symlink_to(file)
    frame = at.evaluate(model, PROMPTS, resume=file, **ASKED)
    pd.testing.assert_frame_equal(at.evaluate(model, PROMPTS, resume=link, **ASKED), frame, check_exact=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "results", "results.lock"]


def test_folder_that_takes_no_lock_is_an_error(model: at.Model, tmp_path: Path) -> None:
    file = tmp_path / "results"
    (tmp_path / "results.lock").mkdir()
    with pytest.raises(at.AttributionError, match=r"cannot be locked \(.*\); name a file in a folder that can be"):
        at.evaluate(model, PROMPTS, resume=file, **ASKED)
