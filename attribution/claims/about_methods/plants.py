"""What is planted in a model for the claims about planted truth: where, how loud, and which word each prompt is asked.

Every prompt is asked for a word of its category that is not its answer. Each category has two such words, each with a
neuron of its own: both fire on all prompts of the category, equally and equally loud, so that only what they write
tells the one that is asked for from the other. A method that looks at loudness alone finds about every second one.

Strength 1 is as loud as the loudest neuron of the unplanted model, in the median over prompts: the L2 norm of what it
writes into the residual stream at the last position. What is planted writes straight towards its word.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from attribution.claims.bench import Workbench, measured_once
from attribution.engine.batching import batches_of
from attribution.engine.questions import Question, is_askable, question_of
from attribution.engine.subkeys import folded_subkeys
from attribution.engine.trace import Activations, read_activations
from attribution.engine.vectors import VectorTable, vector_table
from attribution.experiments.planting import (
    Plant,
    answer_direction,
    firing_subkeys,
    planted,
    quiet_subkeys,
    vector_along,
)
from attribution.models.model import Model
from attribution.models.norms import normalise
from attribution.records import AttentionNeuron, FFNNeuron, Neuron, SublayerKind

__all__ = ["KINDS", "PROMPTS", "Kind", "Planting", "Task", "planting_of", "task_of"]

Kind: TypeAlias = Literal["ffn", "attention", "chain"]
KINDS: tuple[Kind, ...] = ("ffn", "attention", "chain")
"""What is planted: a neuron that fires by itself, or an FFN query neuron that activates an attention value neuron."""

PROMPTS = 64
# Words of a category.
_SIDES = 2
# A whole trace keeps every position; this many times fewer tokens at once keep it small for large models as well.
_SHARE_OF_CHUNK = 4


@dataclass(frozen=True)
class Task:
    """What is asked, and of which planted word.

    Attributes:
        indices: Indices into the prompts of the sample.
        questions: The same prompts, each with the word that is asked for.
        column: Number of the word that each prompt is asked for; those of one category follow each other.
        words: Token of each word.
        fires: 1 where a word's neuron is to fire, (prompts, words), float64.
    """

    indices: list[int]
    questions: list[Question]
    column: list[int]
    words: list[int]
    fires: Tensor

    @property
    def last(self) -> Tensor:
        """Last position of each prompt, (prompts,)."""
        return torch.tensor([len(question.ids) - 1 for question in self.questions])


@dataclass(frozen=True)
class Planting:
    """What is planted, one of each for every word.

    Attributes:
        driven: Plants whose vector counts times the strength.
        activated: In a chain, the value neurons that the driven ones activate; else empty. They read through a norm, so
            that what they write grows less than the strength.
    """

    driven: tuple[Plant, ...]
    activated: tuple[Plant, ...] = ()

    def at(self, strength: float) -> list[Plant]:
        """Return what is planted at a strength."""
        return [*(replace(plant, vector=strength * plant.vector) for plant in self.driven), *self.activated]

    @property
    def values(self) -> list[Neuron]:
        """The value neuron of each word."""
        return [plant.neuron for plant in self.activated or self.driven]


@measured_once
def task_of(bench: Workbench) -> Task:
    """Return what is asked of a model's prompts; of no prompt for a model that knows nothing."""
    draw = random.Random(bench.seed)
    indices: list[int] = []
    questions: list[Question] = []
    column: list[int] = []
    words: list[int] = []
    # A prompt of one token has nothing to attend to but itself.
    asked = [place for place in bench.sample.subset(PROMPTS) if len(bench.sample.questions[place].ids) > 1]
    for category in bench.sample.knowledge.words:
        mine = [place for place in asked if bench.prompts[place].category == category]
        answers = list(dict.fromkeys(prompt.answer for prompt in bench.prompts if prompt.category == category))
        # Where answers join the prompt, which of them are one token depends on it.
        joined = [bench.prompts[place] for place in mine if bench.prompts[place].joined]
        answers = [
            answer
            for answer in answers
            if all(is_askable(bench.model, replace(prompt, answer=answer)) for prompt in joined)
        ]
        if not mine or len(answers) < _SIDES:
            continue
        pair = draw.sample(answers, _SIDES)
        for number, place in enumerate(mine):
            prompt, side = bench.prompts[place], number % _SIDES
            # In turn, so that neither word is asked for more often; never the prompt's own answer.
            side = 1 - side if pair[side] == prompt.answer else side
            indices.append(place)
            questions.append(question_of(bench.model, replace(prompt, answer=pair[side])))
            column.append(len(words) + side)
        words += [question_of(bench.model, replace(bench.prompts[mine[0]], answer=word)).answer_id for word in pair]
    category_of_row, category_of_word = torch.tensor(column) // _SIDES, torch.arange(len(words)) // _SIDES
    fires = (category_of_row[:, None] == category_of_word).double()
    return Task(indices, questions, column, words, fires)


@dataclass(frozen=True)
class _Nature:
    """What the unplanted model does at the last position of the prompts.

    Attributes:
        loudest: Of FFN and of attention neurons, the median over prompts of the largest norm that one writes.
        heads: The head of each layer that attends most to one token, in the median over prompts.
        sources: The token that this head attends to most, (layers, prompts). Never the first: in many models that is
            the same for all prompts.
    """

    loudest: dict[SublayerKind, float]
    heads: list[int]
    sources: Tensor


@measured_once
def _nature(bench: Workbench) -> _Nature:
    model, task = bench.model, task_of(bench)
    anatomy, number = model.anatomy, len(task.questions)
    tables = [cast(VectorTable, vector_table(model, unit)) for unit in ("ffn", "attention")]
    ffn_norms, attention_norms = (table.norms.view(anatomy.layers, 1, -1) for table in tables)
    loud: dict[SublayerKind, Tensor] = {"ffn": torch.zeros(number), "attention": torch.zeros(number)}
    attends = torch.zeros(anatomy.layers, number, anatomy.heads)
    source = torch.zeros(anatomy.layers, number, anatomy.heads, dtype=torch.long)
    for rows, batch in batches_of(model, task.questions):
        seen = read_activations(model, batch, logits=False)
        written = seen.coefficients.abs() * ffn_norms * seen.ffn_post_scale[..., None]
        loud["ffn"][rows] = written.amax((0, 2)).float().cpu()
        taken = (seen.pattern.movedim(-1, 2)[..., None] * seen.values.abs()).amax(2).flatten(2)
        written = taken * attention_norms * seen.attention_post_scale[..., None]
        loud["attention"][rows] = written.amax((0, 2)).float().cpu()
        most = seen.pattern[..., 1:].max(-1)
        attends[:, rows], source[:, rows] = most.values.float().cpu(), most.indices.cpu() + 1
    heads = attends.median(1).values.argmax(-1)
    sources = source.gather(2, heads[:, None, None].expand(-1, number, 1))[..., 0]
    return _Nature({each: float(norms.median()) for each, norms in loud.items()}, heads.tolist(), sources)


def _whole_traces(model: Model, task: Task) -> Iterator[tuple[list[int], Tensor, Activations]]:
    """Yield row numbers, mask of real tokens and activations at all positions, part by part."""
    for rows, batch in batches_of(model, task.questions, variants=_SHARE_OF_CHUNK):
        yield rows, batch.mask.bool(), read_activations(model, batch, positions="all", logits=False)


def _reads(
    model: Model, task: Task, indices: Sequence[tuple[SublayerKind, int, Tensor]], moments: Collection[int]
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Return what sublayers read behind their norms.

    Args:
        model: The model.
        task: The prompts.
        indices: SublayerKind, layer, and one position of each prompt, (prompts,).
        moments: Layers whose attention's second moment is asked for.

    Returns:
        For each place, (prompts, width), float64; and for each layer the mean of x x^T over all real tokens.
    """
    anatomy, width = model.anatomy, model.anatomy.width
    found = [torch.zeros(len(task.questions), width, dtype=torch.float64, device=model.device) for _ in indices]
    summed = {layer: torch.zeros(width, width, dtype=torch.float64, device=model.device) for layer in moments}
    for rows, real, seen in _whole_traces(model, task):
        for each, (sublayer, layer, positions) in zip(found, indices, strict=True):
            stream = seen.resid_pre if sublayer == "attention" or anatomy.parallel else seen.resid_mid
            norm = anatomy.sublayer(layer, sublayer).input_norm
            each[rows] = normalise(stream[layer, range(len(rows)), positions[rows].to(model.device)].double(), norm)
        for layer, sum_of in summed.items():
            tokens = normalise(seen.resid_pre[layer][real].double(), anatomy.sublayer(layer, "attention").input_norm)
            sum_of += tokens.T @ tokens
    tokens_in_all = sum(len(question.ids) for question in task.questions)
    return found, {layer: sum_of / tokens_in_all for layer, sum_of in summed.items()}


def _louder(
    model: Model,
    task: Task,
    plants: Sequence[Plant],
    positions: Sequence[Tensor],
    loudness: float,
    beside: Sequence[Plant] = (),
) -> list[Plant]:
    """Return plants that write as loudly as wanted, in the median over their prompts.

    How strongly each fires is measured on a copy in which it writes nothing.

    Args:
        model: The model.
        task: The prompts.
        plants: With vectors that a coefficient and a post-norm scale of 1 write with length 1.
        positions: Where each plant fires, (prompts,) each.
        loudness: The L2 norm of what each is to write.
        beside: What else is planted.
    """
    fired = torch.zeros(len(task.questions), len(plants))
    silent = [replace(plant, vector=torch.zeros_like(plant.vector)) for plant in plants]
    last = task.last
    with planted(model, [*silent, *beside]) as copy:
        for rows, _, seen in _whole_traces(copy, task):
            here = range(len(rows))
            for number, (plant, where) in enumerate(zip(plants, positions, strict=True)):
                neuron, at = plant.neuron, where[rows]
                if isinstance(neuron, FFNNeuron):
                    m = (
                        seen.coefficients[neuron.layer, here, at, neuron.index]
                        * seen.ffn_post_scale[neuron.layer, here, at]
                    )
                else:
                    alpha = seen.pattern[neuron.layer, here, neuron.head, last[rows], at]
                    value = seen.values[neuron.layer, here, at, neuron.head, neuron.dim]
                    m = alpha * value * seen.attention_post_scale[neuron.layer, here, last[rows]]
                fired[rows, number] = m.float().cpu()
    louder = []
    for number, plant in enumerate(plants):
        typical = float(fired[task.fires[:, number] > 0, number].median())
        louder.append(replace(plant, vector=plant.vector * (loudness / typical)))
    return louder


@measured_once
def planting_of(bench: Workbench, kind: Kind) -> Planting:
    """Return what is planted in a model, at strength 1; nothing in one that knows nothing or has no room for it."""
    model, task = bench.model, task_of(bench)
    anatomy, ends = model.anatomy, 2 if kind == "chain" else 1
    if not task.words or anatomy.layers < ends:
        return Planting(())
    nature = _nature(bench)
    # By kind: where one kind is planted tells nothing of where another is.
    draw = random.Random(f"{bench.seed} {kind}")
    free: dict[tuple[SublayerKind, int], list[int]] = {}

    def neuron_of(sublayer: SublayerKind, layer: int) -> Neuron:
        """Draw a neuron of a layer that is not planted yet; of attention, one of the head that attends most."""
        size = anatomy.ffn_neurons if sublayer == "ffn" else anatomy.head_dim
        number = free.setdefault((sublayer, layer), draw.sample(range(size), size)).pop()
        return FFNNeuron(layer, number) if sublayer == "ffn" else AttentionNeuron(layer, nature.heads[layer], number, 0)

    # For each category the layer of what fires by itself and, in a chain, the layer of what that activates.
    layers = [sorted(draw.sample(range(anatomy.layers), ends)) for _ in range(len(task.words) // _SIDES)]
    if kind != "ffn":
        # At the tokens that heads attend to, plants of other categories fire as they happen to. Further down they would
        # change what is attended to and read there; in one layer none disturbs another.
        layers = layers[:1] * len(layers)
    first: SublayerKind = "attention" if kind == "attention" else "ffn"
    sources = [task.last if kind == "ffn" else nature.sources[upper] for *_, upper in layers]
    inputs, moments = _reads(
        model,
        task,
        [(first, lower, source) for (lower, *_), source in zip(layers, sources, strict=True)],
        {upper for _, upper in layers} if kind == "chain" else (),
    )
    quiet = {
        layer: quiet_subkeys(moment, anatomy.sublayer(layer, "attention").input_norm, len(task.words))
        for layer, moment in moments.items()
    }
    dtype = anatomy.readout.unembedding.dtype
    subkeys = torch.cat(
        [firing_subkeys(own, fires, dtype) for own, fires in zip(inputs, task.fires.split(_SIDES, 1), strict=True)]
    )
    driven, activated = [], []
    for column, word in enumerate(task.words):
        lower, upper = layers[column // _SIDES][0], layers[column // _SIDES][-1]
        towards = answer_direction(anatomy.readout, word)
        if kind == "chain":
            reads = quiet[upper][column]
            vector = vector_along(towards, anatomy.sublayer(upper, "attention").post_weight)
            activated.append(Plant(neuron_of("attention", upper), reads, vector))
            towards = folded_subkeys(reads[None], anatomy.sublayer(upper, "attention").input_norm)[0]
        vector = vector_along(towards, anatomy.sublayer(lower, first).post_weight)
        driven.append(Plant(neuron_of(first, lower), subkeys[column], vector))
    where = [sources[column // _SIDES] for column in range(len(task.words))]
    driven = _louder(model, task, driven, where, nature.loudest[first])
    activated = _louder(model, task, activated, where[: len(activated)], nature.loudest["attention"], beside=driven)
    return Planting(tuple(driven), tuple(activated))
