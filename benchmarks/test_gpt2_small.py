"""Time of every way to attribute one prompt at GPT-2-small size, as multiples of a plain forward pass.

    pytest benchmarks/test_gpt2_small.py        # or python -m benchmarks.summary, for the table of README.md

No time makes these pass or fail. What can fail is the comparison at the end: the certified top 10 must be that of the
published way. Plain forward passes are run before every round of everything, so that a ratio is one of neighbours in
time, whatever else the machine does.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import attribution as at
from attribution.engine.trace import read_activations, rerun
from attribution.prompts.tokens import TokenBatch, pad
from benchmarks import memory
from benchmarks.gpt2_small import prompt, word, write_model
from benchmarks.published import rescore, rounding, score_attention_neurons, score_ffn_neurons

K, STEPS = 10, 20
# Before each round; the first may find its weights pushed out of the cache.
PLAIN_PASSES = 3

AsPublished = Callable[[Any, Tensor, int], Tensor]
AS_PUBLISHED: dict[str, AsPublished] = {"ffn": score_ffn_neurons, "attention": score_attention_neurons}
RECORDS: dict[str, Any] = {"ffn": at.FFNNeuron, "attention": at.AttentionNeuron}
SHOWN = {"ffn": "FFN", "attention": "attention", "neuron": "FFN + attention"}


@dataclass(frozen=True)
class Setting:
    """The model and its one question.

    Attributes:
        folder: Where the model was loaded from.
        model: The model.
        prompt: The prompt.
        answer: The model's most likely next token, as in the published notebooks.
        answer_id: Its token id.
        batch: The prompt's tokens.
        published: Scores by the published way, kept for the comparison, by unit.
    """

    folder: Path
    model: at.Model
    prompt: str
    answer: str
    answer_id: int
    batch: TokenBatch
    published: dict[str, Tensor] = field(default_factory=dict)

    @property
    def gpt2(self) -> Any:
        """The module of transformers; hooks apart, nothing of this package takes part in calling it."""
        return self.model.network._module

    def plain_pass(self) -> Tensor:
        """Return the logits of the last position by a plain forward pass."""
        with torch.no_grad():
            logits: Tensor = self.gpt2(self.batch.ids).logits[0, -1]
        return logits

    def attribute(self, unit: str, **options: Any) -> at.Ranking:
        """Attribute the question."""
        return at.attribute(self.model, self.prompt, self.answer, unit=unit, **options)

    def score_as_published(self, unit: str) -> Tensor:
        """Score every neuron the published way and sort; return the scores as they were."""
        scores = AS_PUBLISHED[unit](self.gpt2, self.batch.ids, self.answer_id)
        scores.flatten().sort(descending=True)
        self.published[unit] = scores
        return scores


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    # Not pytest's temporary folder: it keeps half a gigabyte of each of the last three runs.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        model = at.load(name)
        ids = model.tokenizer.encode(prompt())
        with torch.no_grad():
            answer_id = int(model.network._module(torch.tensor([ids])).logits[0, -1].argmax())
        yield Setting(folder, model, prompt(), f" {word(answer_id)}", answer_id, pad([ids]))


class Beside:
    """Times things beside plain forward passes."""

    def __init__(self, benchmark: BenchmarkFixture, setting: Setting) -> None:
        self.benchmark, self.setting = benchmark, setting

    def __call__(
        self,
        row: str,
        target: Callable[..., Any],
        *,
        rounds: int,
        warmup: int = 1,
        arguments: Callable[[], tuple[Any, ...]] = tuple,
    ) -> Any:
        """Time ``target`` and plain forward passes in turn; ``row`` says what it is in the table of the summary."""
        plain: list[float] = []

        def before_round() -> tuple[tuple[Any, ...], dict[str, Any]]:
            made = arguments()
            for _ in range(PLAIN_PASSES):
                start = time.perf_counter()
                self.setting.plain_pass()
                plain.append(time.perf_counter() - start)
            return made, {}

        result = self.benchmark.pedantic(target, setup=before_round, rounds=rounds, warmup_rounds=warmup)
        self.benchmark.group = "GPT-2 small"
        self.benchmark.extra_info |= {"row": row, "plain": statistics.median(plain)}
        return result


@pytest.fixture
def beside(benchmark: BenchmarkFixture, setting: Setting) -> Beside:
    return Beside(benchmark, setting)


def _keep_certificate(benchmark: BenchmarkFixture, ranking: at.Ranking) -> None:
    benchmark.extra_info |= {
        "scored": ranking.exact.scored,
        "total": ranking.exact.total,
        "best": float(ranking.scores[0]),
        "last": float(ranking.scores[-1]),
    }


def test_plain_forward_pass(setting: Setting, beside: Beside) -> None:
    logits = beside("plain forward pass", setting.plain_pass, rounds=20)
    log_probs = logits.double().log_softmax(-1)
    beside.benchmark.extra_info |= {
        "tokens": setting.batch.ids.shape[1],
        "vocabulary": len(logits),
        "entropy": float(-(log_probs.exp() * log_probs).sum()),
        "prob": float(log_probs.max().exp()),
        "logit_std": float(logits.std()),
    }


def test_bare_trace(setting: Setting, beside: Beside) -> None:
    beside("traced forward pass, logits only", lambda: rerun(setting.model, setting.batch), rounds=20)


def test_traced_forward_pass(setting: Setting, beside: Beside) -> None:
    beside("traced forward pass, activations read", lambda: read_activations(setting.model, setting.batch), rounds=20)


@pytest.mark.parametrize("unit", SHOWN)
def test_certified_top_10(setting: Setting, unit: str, beside: Beside) -> None:
    ranking = beside(f"certified top {K}, {SHOWN[unit]}", lambda: setting.attribute(unit, k=K), rounds=15)
    _keep_certificate(beside.benchmark, ranking)


def test_certified_top_10_of_a_freshly_loaded_model(setting: Setting, beside: Beside) -> None:
    def load() -> tuple[Any, ...]:
        model = at.load(str(setting.folder))
        with torch.no_grad():
            model.network._module(setting.batch.ids)  # reads the weights from disk
        return (model,)

    ranking = beside(
        f"certified top {K}, FFN + attention, first question after loading",
        lambda model: at.attribute(model, setting.prompt, setting.answer, unit="neuron", k=K),
        rounds=3,
        warmup=0,
        arguments=load,
    )
    _keep_certificate(beside.benchmark, ranking)
    if Path("/proc/self/clear_refs").exists():
        command = [sys.executable, memory.__file__, str(setting.folder), setting.prompt, setting.answer]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        beside.benchmark.extra_info["megabytes"] = json.loads(output)


@pytest.mark.parametrize(("method", "rounds"), [("gradient_x_activation", 5), ("relp", 5), ("atp_star", 3)])
def test_gradient_methods(setting: Setting, method: str, rounds: int, beside: Beside) -> None:
    beside(
        f"{method}, top {K}, FFN + attention",
        lambda: setting.attribute("neuron", method=method, k=K),
        rounds=rounds,
    )


def test_integrated_gradients(setting: Setting, beside: Beside) -> None:
    beside(
        f"integrated_gradients, {STEPS} steps, top {K}, FFN + attention",
        lambda: setting.attribute("neuron", method="integrated_gradients", k=K, steps=STEPS),
        rounds=1,
        warmup=0,
    )


def test_score_of_every_neuron(setting: Setting, beside: Beside) -> None:
    ranking = beside(
        "score of every neuron in blocks, FFN", lambda: setting.attribute("ffn", k=None), rounds=1, warmup=0
    )
    _keep_certificate(beside.benchmark, ranking)


@pytest.mark.parametrize("unit", AS_PUBLISHED)
def test_published_way(setting: Setting, unit: str, beside: Beside) -> None:
    scores = beside(f"published way, {SHOWN[unit]}", lambda: setting.score_as_published(unit), rounds=1, warmup=0)
    beside.benchmark.extra_info |= {"scored": scores.numel(), "total": scores.numel()}


def _published_top(scores: dict[str, Tensor], kinds: Sequence[str]) -> dict[Any, float]:
    """Return the K best published scores of some kinds of neurons, by record, best first."""
    found: dict[Any, float] = {}
    for kind in kinds:
        best = scores[kind].flatten().topk(K)
        indices = torch.stack(torch.unravel_index(best.indices, scores[kind].shape), 1).tolist()
        found |= {RECORDS[kind](*place): value for place, value in zip(indices, best.values.tolist(), strict=True)}
    return dict(sorted(found.items(), key=lambda item: -item[1])[:K])


@pytest.mark.parametrize("unit", SHOWN)
def test_certified_top_10_is_that_of_the_published_way(
    setting: Setting, unit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = list(AS_PUBLISHED) if unit == "neuron" else [unit]
    for kind in kinds:
        if kind not in setting.published:  # with -k, its benchmark may not have run
            setting.score_as_published(kind)
    published = _published_top(setting.published, kinds)
    certified = setting.attribute(unit, k=K)

    # The published scores are float32; the same equation in float64 tells how far each is off.
    involved = list(dict.fromkeys([*published, *certified.neurons]))
    exact = dict(zip(involved, rescore(setting.gpt2, setting.batch.ids, setting.answer_id, involved), strict=True))
    of_kind = {record: kind for kind, record in RECORDS.items()}
    noise = max(
        abs(float(score - setting.published[of_kind[type(neuron)]][astuple(neuron)])) for neuron, score in exact.items()
    )
    assert noise <= rounding(setting.gpt2, setting.batch.ids)

    # By either route float64 errs by no more than the tolerance of the certificate.
    tolerance = 2 * certified.exact.tolerance
    by_other_route = torch.stack([exact[neuron] for neuron in certified.neurons])
    torch.testing.assert_close(by_other_route, certified.scores, rtol=0, atol=tolerance)
    # Nothing that the published way ranks higher is better: noise can exchange only what is closer than twice of it.
    best = torch.stack([exact[neuron] for neuron in published]).sort(descending=True).values
    torch.testing.assert_close(best, certified.scores, rtol=0, atol=2 * noise + tolerance)
    same = len(set(published) & set(certified.neurons))
    apart = float((by_other_route - certified.scores).abs().max())
    with capsys.disabled():
        print(f"\n{SHOWN[unit]}: {same} of {K} neurons are the same; float64 scores differ by at most {apart:.0e} nats")
        print(f"between the two routes, published float32 scores from float64 by up to {noise:.0e} nats")
