"""Times things beside plain forward passes, on a processor or an accelerator."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import attribution as at
from attribution.claims.about_methods.common import BASELINES, METHOD
from attribution.engine.ablation import outcomes
from attribution.engine.batching import batches_of
from attribution.engine.questions import Question, question_of
from attribution.engine.trace import read_activations
from attribution.prompts.knowledge import Prompt
from attribution.prompts.tokens import pad
from attribution.records import Component
from benchmarks.cost import Machine, Shape
from benchmarks.random_models import SEED, random_model, text, word

K, VARIANTS, TOKENS = 10, 10, 12
# A thing that takes this long once is not repeated, and no thing is repeated for longer.
PATIENCE = 4.0
MOST_ROUNDS = 7
# Launches take little and vary much, and everything else is predicted from them.
CALIBRATION_ROUNDS = 100

Thing = Callable[[], Any]


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(thing: Thing, device: torch.device) -> float:
    """Return how long a thing takes: of the processor's time what this process used, of an accelerator's all.

    With one thread the two are the same on a quiet machine, and on a busy one the first does not count the neighbours.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait(device)
    start = clock()
    thing()
    wait(device)
    return clock() - start


def beside(
    plain: Thing, things: dict[str, Thing], device: torch.device, most: int = MOST_ROUNDS
) -> Iterator[dict[str, Any]]:
    """Time things in turn, each behind a plain forward pass, ``most`` times at most; yield what was found of each.

    What runs first is a warm-up, unless it alone exhausts the patience.
    """
    plain()
    first = {name: (seconds_of(plain, device), seconds_of(thing, device)) for name, thing in things.items()}
    found = {name: [pair] for name, pair in first.items()}
    rounds = {name: min(most, int(PATIENCE / sum(pair))) for name, pair in first.items()}
    for number in range(max(rounds.values(), default=0)):
        for name, thing in things.items():
            if number < rounds[name]:
                if number == 0:
                    found[name] = []
                found[name].append((seconds_of(plain, device), seconds_of(thing, device)))
    for name, pairs in found.items():
        before, after = zip(*pairs, strict=True)
        yield {
            "what": name,
            "seconds": statistics.median(after),
            "plain": statistics.median(before),
            "rounds": len(pairs),
        }


class Asked:
    """A model and the prompts that it is asked.

    Attributes:
        model: The model.
        questions: The prompts, made ready.
    """

    def __init__(self, model: at.Model, prompts: Sequence[Prompt]) -> None:
        self.model, self.prompts = model, list(prompts)
        self.questions = [question_of(model, each) for each in prompts]
        self.batches = [batch for _, batch in batches_of(model, self.questions)]
        self.ranked: list[list[Component]] = []

    @property
    def tokens(self) -> float:
        """Tokens of a prompt, on average."""
        return statistics.mean(len(question.ids) for question in self.questions)

    def plain(self) -> None:
        """Run plain forward passes; nothing of this package takes part in them."""
        with torch.no_grad():
            for batch in self.batches:
                self.model.network._module(input_ids=batch.ids, attention_mask=batch.mask)

    def attribute(self, unit: str, k: int | None) -> list[at.Ranking]:
        """Attribute every prompt."""
        rankings: list[at.Ranking] = at.attribute(self.model, self.prompts, unit=unit, k=k)
        return rankings

    def rank(self) -> None:
        """Find the neurons that are ablated, once."""
        if not self.ranked:
            self.ranked = [ranking.neurons for ranking in self.attribute("ffn", VARIANTS)]

    def rerun(self) -> None:
        """Rerun every prompt without its best neuron, its two best, and so on."""
        self.rank()
        asked: list[Question] = []
        variants: list[list[Component]] = []
        for question, neurons in zip(self.questions, self.ranked, strict=True):
            asked += [question] * VARIANTS
            variants += [neurons[: number + 1] for number in range(VARIANTS)]
        outcomes(self.model, asked, variants)

    def table_2(self) -> None:
        """Ablate the top 10 FFN neurons of eight methods."""
        at.evaluate(self.model, self.prompts, method=[METHOD, *BASELINES], k=K, progress=False)

    def table_13(self) -> None:
        """Ablate the value neurons."""
        at.evaluate(self.model, self.prompts, k={"attention": 200, "ffn": 100}, progress=False)

    def things(self) -> dict[str, Thing]:
        """Return what is timed, by its key in the tables."""
        return {
            "ffn": lambda: self.attribute("ffn", K),
            "neuron": lambda: self.attribute("neuron", K),
            "every": lambda: self.attribute("ffn", None),
            "rerun": self.rerun,
        }

    def point(self, shape: Shape, axis: str) -> dict[str, Any]:
        """Return what the points of this model and these prompts have in common."""
        return {"axis": axis, "shape": asdict(shape), "prompts": len(self.prompts), "tokens": round(self.tokens, 2)}

    def points(self, shape: Shape, axis: str, *, every: bool = True) -> Iterator[dict[str, Any]]:
        """Time everything, but the scores of every neuron if they are not wanted; yield a point for each thing."""
        self.rank()
        scored = {unit: [each.exact.scored for each in self.attribute(unit, K)] for unit in ("ffn", "neuron")}
        things = {name: thing for name, thing in self.things().items() if every or name != "every"}
        for found in beside(self.plain, things, self.model.device):
            counted = scored.get(found["what"])
            yield (self.point(shape, axis) | found | ({} if counted is None else {"scored": statistics.mean(counted)}))


def shape_of(model: at.Model) -> Shape:
    """Return the sizes of a loaded model."""
    anatomy = model.anatomy
    vocabulary, width = anatomy.readout.unembedding.shape
    return Shape(
        model.name,
        anatomy.layers,
        width,
        anatomy.heads,
        anatomy.kv_heads,
        anatomy.head_dim,
        anatomy.ffn_neurons,
        vocabulary,
        gated=anatomy.family.model_type == "llama",
        bytes=anatomy.readout.unembedding.element_size(),
    )


def words_asked(model: at.Model, number: int) -> list[Prompt]:
    """Return prompts of random words; the answer to each is what the model finds most likely."""
    vocabulary = model.anatomy.vocabulary
    texts = [text(vocabulary, TOKENS, seed=SEED + row) for row in range(number)]
    answers: list[int] = []
    for start in range(0, number, 64):
        batch = pad([model.tokenizer.encode(each) for each in texts[start : start + 64]], device=model.device)
        with torch.no_grad():
            logits: Tensor = model.network._module(batch.ids).logits[:, -1]
        answers += logits.argmax(-1).tolist()
    return [Prompt(each, f" {word(answer)}") for each, answer in zip(texts, answers, strict=True)]


def peak_reset(device: torch.device) -> int:
    """Forget the device's peak; return the bytes that are in use."""
    if device.type != "cuda":
        return 0
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_allocated(device))


def peak_since(device: torch.device, before: int) -> int | None:
    """Return how many bytes more were in use at the peak; ``None`` on a device that does not count them."""
    return None if device.type != "cuda" else int(torch.cuda.max_memory_allocated(device)) - before


def calibrate(device: torch.device) -> Machine:
    """Measure the rates of :class:`benchmarks.cost.Machine` here.

    Arithmetic by products of the kind that dominates; bandwidth by a sum over numbers that no cache holds; launches by
    a model so small that it has nothing to compute.
    """

    def rate(amount: float, thing: Thing) -> float:
        thing()
        return amount / statistics.median(seconds_of(thing, device) for _ in range(20))

    def product(dtype: torch.dtype) -> float:
        left, right = (
            torch.ones(512, 768, dtype=dtype, device=device),
            torch.ones(768, 4096, dtype=dtype, device=device),
        )
        return rate(2 * 512 * 768 * 4096, lambda: left @ right)

    many = torch.ones(2**26, device=device)
    shape = Shape("nothing", 12, 16, 2, 2, 8, 32, 64)
    asked = Asked(model := random_model(shape, device), words_asked(model, 1))
    things: dict[str, Thing] = {
        "traced": lambda: read_activations(model, asked.batches[0], logits=False),
        "ffn": lambda: asked.attribute("ffn", K),
    }
    found = {each["what"]: each for each in beside(asked.plain, things, device, CALIBRATION_ROUNDS)}
    traced = found["traced"]["seconds"]
    return Machine(
        name="this machine",
        flops=product(torch.float32),
        double_flops=product(torch.float64),
        bandwidth=rate(many.nbytes, many.sum),
        block=found["traced"]["plain"] / shape.layers,
        traced_block=traced / shape.layers,
        question=max(0.0, found["ffn"]["seconds"] - traced),
        half_flops=product(torch.bfloat16),
    )
