"""Models whose weights are elsewhere: what is asked of them runs there, and only its small result comes back."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnsight.intervention.backends.remote import RemoteError
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import save
from nnsight.tracing.util import push

import attribution as at
from attribution.engine.methods import METHODS
from attribution.engine.trace import read_activations
from attribution.errors import BadInputError, ModelError
from attribution.models.anatomy import read_anatomy
from attribution.models.running import _packed, _unpacked, run_where_weights_are

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parent))
    from elsewhere import read, write

PROMPTS = [
    at.Prompt("The capital of France is", " Paris"),
    at.Prompt("The capital of Italy is", " Rome"),
    at.Prompt("The number of legs that a dog has is", " four"),
]
# Every kind of method: with a bound, without, random, and each kind of backward pass.
RANKED = [
    ("ffn", "log_prob_increase"),
    ("attention", "log_prob_increase"),
    ("neuron", "prob_increase"),
    ("head", "log_prob_increase"),
    ("head_position", "output_norm"),
    ("layer", "log_prob_increase"),
    ("ffn", "reciprocal_rank"),
    ("ffn", "random"),
    ("ffn", "gradient_x_activation"),
    ("attention", "integrated_gradients"),
    ("ffn", "atp_star"),
    ("attention", "relp"),
]


# Sessions cost seconds: another family only where a test says so.
@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["gpt2"]


@pytest.fixture(scope="module")
def model(loaded: Callable[[str], at.Model]) -> at.Model:
    return loaded("gpt2")


class _Wire(Backend):
    """Sends a session to another process, and counts what goes each way."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("elsewhere.py")), str(folder)]
        # Where the package cannot be found by accident.
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.sent: list[int] = []
        self.received: list[int] = []

    def __call__(self, tracer: Any) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = RequestModel.serialize(tracer)
        write(self.process.stdin, request)  # type: ignore[arg-type]
        answer = read(self.process.stdout)  # type: ignore[arg-type]
        self.sent.append(len(request))
        self.received.append(len(answer))
        found = torch.load(io.BytesIO(answer), weights_only=False)
        if "failed" in found:
            raise RemoteError(found["failed"])
        for each in found.values():
            save(each)
        push(tracer.info.frame, found)


@pytest.fixture(scope="module")
def wire(folder: Path) -> Iterator[_Wire]:
    wire, here = _Wire(folder), Remotable._remote_backend

    def backend(network: Any, remote: bool | str, *rest: Any) -> Any:
        return here(network, remote, *rest) if remote == "local" else wire

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Remotable, "_remote_backend", backend)
        yield wire

    wire.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def distant(folder: Path, wire: _Wire) -> at.Model:
    """A model with no weights here; sessions go to the process that has them."""
    loaded = at.load(str(folder))
    loaded.network._module.to("meta")
    anatomy = read_anatomy(loaded.network._module, "a model elsewhere", check=False)
    return replace(loaded, remote=True, anatomy=anatomy)


@pytest.fixture(params=["local", "another process"])
def remote(request: pytest.FixtureRequest, folder: Path) -> at.Model:
    if request.param == "local":
        return at.load(str(folder), remote="local")
    return request.getfixturevalue("distant")  # type: ignore[no-any-return]


def _assert_same_rankings(here: at.Model, there: at.Model, unit: str, method: str) -> None:
    asked: dict[str, Any] = {"unit": unit, "method": method, "k": 4, "steps": 3}
    for one, other in zip(at.attribute(here, PROMPTS, **asked), at.attribute(there, PROMPTS, **asked), strict=True):
        assert one.neurons == other.neurons
        assert torch.equal(one.scores, other.scores)
        assert (one.exact, one.tokens) == (other.exact, other.tokens)
        assert (one.first_order is None) == (other.first_order is None)


@pytest.mark.parametrize(("unit", "method"), RANKED)
def test_remote_rankings_are_identical(model: at.Model, distant: at.Model, unit: str, method: str) -> None:
    _assert_same_rankings(model, distant, unit, method)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"], indirect=True)
@pytest.mark.parametrize(("unit", "method"), [("neuron", "log_prob_increase"), ("ffn", "gradient_x_activation")])
def test_rankings_of_remote_local_are_identical(
    architecture_model: at.Model, architecture_folder: Path, unit: str, method: str
) -> None:
    _assert_same_rankings(architecture_model, at.load(str(architecture_folder), remote="local"), unit, method)


def test_remote_evaluation_is_identical(model: at.Model, remote: at.Model) -> None:
    asked: dict[str, Any] = {
        "method": ["log_prob_increase", "random"],
        "k": [1, 5],
        "kind": ["zero", "mean", "resample"],
    }
    here, there = (at.evaluate(each, PROMPTS, progress=False, **asked) for each in (model, remote))
    pd.testing.assert_frame_equal(here, there, check_exact=True)


def test_remote_query_neurons_are_identical(model: at.Model, remote: at.Model) -> None:
    here, there = (at.query(each, PROMPTS[0], k=7) for each in (model, remote))
    assert here.neurons == there.neurons
    assert torch.equal(here.scores, there.scores)
    pd.testing.assert_frame_equal(here.layers, there.layers, check_exact=True)
    assert (here.value_neurons, here.left_out) == (there.value_neurons, there.left_out)


def test_remote_logits_and_known_prompts_are_identical(model: at.Model, remote: at.Model) -> None:
    neurons = [at.FFNNeuron(1, 3), at.AttentionNeuron(0, 1, 2, 1), at.HeadPosition(2, 0, 1)]
    assert torch.equal(*(at.ablate(each, PROMPTS[0], neurons) for each in (model, remote)))
    assert torch.equal(*(at.ablate(each, PROMPTS[0], neurons[1:2], at_source=True) for each in (model, remote)))
    prompts = [replace(prompt, category="number") for prompt in PROMPTS]
    words = {"number": ["four", "Rome"]}
    here, there = (at.known_prompts(each, prompts, words) for each in (model, remote))
    assert here == there


def test_a_method_of_ones_own_goes_to_the_remote_machine(distant: at.Model, model: at.Model) -> None:
    @at.register_method("own_for_remote", unit="ffn", source="a test")
    def _own(candidates: Any) -> torch.Tensor:
        return -candidates.coefficient * _DOUBLE

    try:
        here, there = (at.attribute(each, PROMPTS[0], method="own_for_remote", k=5) for each in (model, distant))
    finally:
        del METHODS["own_for_remote"]
    assert here.neurons == there.neurons


_DOUBLE = 2


def test_remote_results_are_small(distant: at.Model, wire: _Wire) -> None:
    """Far less comes back than one prompt's activations, and it does not grow with what was scored."""
    anatomy = distant.anatomy
    wire.sent.clear()
    wire.received.clear()
    at.attribute(distant, PROMPTS[0], unit="neuron", k=1)
    at.attribute(distant, PROMPTS[0], unit="attention", k=1)
    at.evaluate(distant, PROMPTS[0], k=1, progress=False)
    weights = sum(each.numel() for each in distant.network._module.parameters()) * 4
    # A message of torch holds over a kilobyte of itself.
    assert max(wire.received) < 4096
    assert max(wire.received) < anatomy.layers * anatomy.ffn_neurons * anatomy.vocabulary
    # What goes there is code and prompts: of this size whatever the model's.
    assert max(wire.sent) < 600_000
    assert min(wire.sent) > 0
    assert weights > 0


def test_a_remote_failure_is_one_sentence(distant: at.Model) -> None:
    with pytest.raises(ModelError, match=r"could not be asked where its weights are .*is not between 1 and") as failure:
        at.attribute(distant, PROMPTS[0], k=10**6)
    assert "\n" not in str(failure.value)


def test_what_needs_weights_here_says_so_of_a_remote_model(distant: at.Model) -> None:
    from attribution.engine.batching import batches_of
    from attribution.engine.questions import question_of

    ((_, batch),) = batches_of(distant, [question_of(distant, PROMPTS[0])])
    with pytest.raises(BadInputError, match="has its weights elsewhere"):
        read_activations(distant, batch)


@pytest.mark.parametrize(
    "named", [("os", "system"), ("attribution.engine.trace", "run"), ("attribution.nowhere", "Record")]
)
def test_an_answer_makes_nothing_but_records_of_this_package(named: tuple[str, str]) -> None:
    with pytest.raises(ModelError, match="which is no record of this package"):
        _unpacked({"class": named, "fields": {}})


@given(
    st.recursive(
        st.integers() | st.text() | st.none() | st.builds(at.FFNNeuron, st.integers(), st.integers()),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    )
)
def test_a_result_is_the_same_on_both_ways(value: Any) -> None:
    assert _unpacked(_packed(value)) == value


def test_a_local_model_runs_work_as_it_is(model: at.Model) -> None:
    assert run_where_weights_are(model, lambda here, number: (here is model, number), 3) == (True, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "bundled:gpt2", "remote": True}, "and no other has it; name a model of the hub"),
        ({"name": "org/name", "remote": "nowhere"}, "is no place of a model; use True, 'local' or an address"),
        ({"name": "org/name", "remote": True, "dtype": "float32"}, "would be ignored"),
        ({"name": "org/name", "remote": True}, "cannot be fetched from the hub"),
    ],
)
def test_a_remote_model_that_cannot_be(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(at.AttributionError, match=message) as failure:
        at.load(**changes)
    assert "\n" not in str(failure.value)
