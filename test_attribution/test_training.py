"""The trainer of the bundled models, end to end on a few facts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import attribution as at

SCRIPT = Path(__file__).parents[1] / "fixtures" / "training" / "train.py"


@pytest.mark.parametrize("arch", ["gpt2", pytest.param("llama", marks=pytest.mark.exhaustive)])
def test_smoke_training_writes_a_model_that_the_suite_can_use(arch: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--arch", arch, "--smoke", "--threads", "1", "--work", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "model"
    assert "6/6" in result.stderr, "no progress bar"
    assert {"README.md", "accuracy.json", "config.json", "held_out.json", "model.safetensors", "training_log.csv"} <= {
        path.name for path in folder.iterdir()
    }
    assert (folder / "model.safetensors").stat().st_size <= 10_000_000
    accuracy = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))
    assert accuracy["smoke"] is True
    model = at.load(str(folder))
    assert model.anatomy.family.model_type == arch
    assert model.anatomy.kv_heads < model.anatomy.heads or arch == "gpt2"
    ranking = at.attribute(model, "The capital of France is", " Paris", k=3)
    assert len(ranking) == 3


@pytest.mark.exhaustive
def test_interrupted_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """The first run dies after its first checkpoint, at step 3 of 6."""
    base = [sys.executable, str(SCRIPT), "--arch", "llama", "--smoke", "--threads", "1"]
    killed = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); sys.argv[0] = 'train.py'\n"
        "import train\n"
        "replace = train.replace_file\n"
        "def replace_and_die(path, write):\n"
        "    replace(path, write)\n"
        "    if path.name == 'checkpoint.pt': raise SystemExit('killed')\n"
        "train.replace_file = replace_and_die\n"
        "train.main(sys.argv[1:])\n"
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*base, "--work", str(whole)], capture_output=True, check=True)
    died = subprocess.run(
        [sys.executable, "-c", killed, *base[2:], "--work", str(broken)], capture_output=True, text=True, check=False
    )
    assert "killed" in died.stderr
    assert not (broken / "model").exists(), "a folder was written by a run that did not finish"
    subprocess.run([*base, "--work", str(broken), "--resume"], capture_output=True, check=True)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, broken)]
    assert weights[0] == weights[1]
