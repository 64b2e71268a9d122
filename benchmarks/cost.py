"""What attribution costs by size: passes, arithmetic, bytes and memory, as formulas; nothing is run.

    python -m benchmarks.cost            # print the table of docs/scale.md
    python -m benchmarks.cost --write    # and put it there

Matrix products are counted exactly, and a test compares them with what the engine does. Bytes and memory count what is
large and leave out the rest. Times follow from stated rates: a phase takes as long as its arithmetic or its traffic,
whichever is longer, and every block costs what it takes to launch it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- predictions: begin, written by python -m benchmarks.cost --write -->", "<!-- predictions: end -->"

# Figures of the engine that decide how it splits its work; a test compares them with the engine's own.
CHUNK_TOKENS = 1024
BLOCK_NUMBERS = 2**23
KEPT_NUMBERS = 2**24
# The first block that a search scores exactly holds this many more than k, and is enough for most prompts.
SPARE = 6

SINGLE, DOUBLE = 4, 8
# How often exact scores go over an array of candidates x vocabulary, in float64: scaled, gathered, added, exponentiated
# and summed, each read and written, and once more for the first-order term.
SWEEPS = 12


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its cost depends on.

    Attributes:
        name: What it is called.
        layers: L.
        width: D, of the residual stream.
        heads: H, query heads per layer.
        kv_heads: K, heads that hold keys and values.
        head_dim: d.
        ffn: N, FFN neurons per layer.
        vocabulary: V.
        gated: Whether the FFN has a third matrix.
        bytes: b, bytes of one weight.
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    gated: bool = False
    bytes: int = SINGLE

    @property
    def block_weights(self) -> int:
        """P, the numbers in the matrices of all blocks."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + (2 + self.gated) * self.width * self.ffn)

    @property
    def unembedding(self) -> int:
        """V D, the numbers in the unembedding."""
        return self.vocabulary * self.width

    @property
    def ffn_neurons(self) -> int:
        """FFN neurons of all layers."""
        return self.layers * self.ffn

    @property
    def attention_vectors(self) -> int:
        """Dimensions of heads of all layers; each is a neuron at every source position."""
        return self.layers * self.heads * self.head_dim

    def keeps_logits(self, vectors: int) -> bool:
        """Whether so few vectors are projected once per model and kept."""
        return vectors * self.vocabulary <= KEPT_NUMBERS


@dataclass(frozen=True)
class Phase:
    """Work of one kind.

    Attributes:
        name: What is done.
        flops: Operations in the type of the weights, two for a multiplication with an addition.
        singles: Operations in float32 whatever the type of the weights.
        doubles: Operations in float64.
        bytes: Bytes read and written.
    """

    name: str
    flops: float = 0
    singles: float = 0
    doubles: float = 0
    bytes: float = 0


@dataclass(frozen=True)
class Work:
    """What one question, or one experiment, costs.

    Attributes:
        forward: Forward passes through all blocks, one for each row of a batch.
        backward: The same, backward.
        products: Vocabulary products: vectors multiplied with the unembedding, either way, V D multiplications each.
        phases: The arithmetic and the traffic.
        memory: Bytes at the peak, above the weights.
        plain_blocks: How often a block is launched.
        traced_blocks: How often a block is launched with its activations read.
        questions: How often a question is asked.
    """

    forward: float
    backward: float
    products: float
    phases: tuple[Phase, ...]
    memory: float = 0
    plain_blocks: float = 0
    traced_blocks: float = 0
    questions: float = 0

    @property
    def flops(self) -> float:
        """All operations."""
        return sum(each.flops + each.singles + each.doubles for each in self.phases)

    @property
    def doubles(self) -> float:
        """Operations in float64."""
        return sum(each.doubles for each in self.phases)

    @property
    def bytes(self) -> float:
        """Bytes read and written."""
        return sum(each.bytes for each in self.phases)

    def __add__(self, other: Work) -> Work:
        names = ("forward", "backward", "products", "plain_blocks", "traced_blocks", "questions")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Work(phases=self.phases + other.phases, memory=max(self.memory, other.memory), **sums)

    def times(self, number: float) -> Work:
        """Return the work of doing it so many times, one after the other."""
        names = ("forward", "backward", "products", "plain_blocks", "traced_blocks", "questions")
        phases = tuple(
            Phase(each.name, *(number * value for value in (each.flops, each.singles, each.doubles, each.bytes)))
            for each in self.phases
        )
        return Work(phases=phases, memory=self.memory, **{name: number * getattr(self, name) for name in names})


@dataclass(frozen=True)
class Machine:
    """The rates that turn work into time.

    Attributes:
        name: What it is.
        flops: Operations per second in float32, and in half precision if ``half_flops`` does not say otherwise.
        double_flops: Operations per second in float64.
        bandwidth: Bytes per second.
        block: Seconds to launch one block of a plain forward pass.
        traced_block: Seconds to launch one block and read its activations.
        question: Seconds of a question beside its passes and products.
        half_flops: Operations per second in 16 bits.
    """

    name: str
    flops: float
    double_flops: float
    bandwidth: float
    block: float
    traced_block: float
    question: float
    half_flops: float = 0

    def seconds(self, work: Work, shape: Shape) -> float:
        """Return the time that some work takes."""
        own = self.half_flops if shape.bytes < SINGLE and self.half_flops else self.flops
        total = work.plain_blocks * self.block + work.traced_blocks * self.traced_block + work.questions * self.question
        for each in work.phases:
            arithmetic = each.flops / own + each.singles / self.flops + each.doubles / self.double_flops
            total += max(arithmetic, each.bytes / self.bandwidth)
        return total


def _blocks(shape: Shape, tokens: int, rows: float) -> Phase:
    """All blocks, for rows of so many tokens."""
    attention = 4 * shape.layers * shape.heads * shape.head_dim * tokens**2
    passes = ceil(rows * tokens / CHUNK_TOKENS)
    return Phase(
        "blocks",
        flops=rows * (2 * tokens * shape.block_weights + attention),
        bytes=passes * shape.bytes * shape.block_weights,
    )


def _own_unembedding(shape: Shape, vectors: float, passes: float = 1) -> Phase:
    """The model's own unembedding of so many vectors."""
    return Phase(
        "unembedding",
        flops=2 * shape.unembedding * vectors,
        bytes=passes * shape.bytes * shape.unembedding + SINGLE * shape.vocabulary * vectors,
    )


def _exact(shape: Shape, vectors: float, passes: float = 1) -> Phase:
    """Products in float64; each pass reads the unembedding and converts it piece by piece."""
    return Phase(
        "exact products",
        doubles=2 * shape.unembedding * vectors,
        bytes=passes * (shape.bytes + 2 * DOUBLE) * shape.unembedding + DOUBLE * shape.vocabulary * vectors,
    )


def plain_forward(shape: Shape, tokens: int, rows: int = 1) -> Work:
    """A forward pass of transformers, logits at every position."""
    passes = ceil(rows * tokens / CHUNK_TOKENS)
    return Work(
        forward=rows,
        backward=0,
        products=rows * tokens,
        phases=(_blocks(shape, tokens, rows), _own_unembedding(shape, rows * tokens, passes)),
        memory=SINGLE * shape.vocabulary * min(rows * tokens, CHUNK_TOKENS),
        plain_blocks=passes * shape.layers,
    )


def traced_forward(shape: Shape, tokens: int, rows: int = 1) -> Work:
    """A pass that reads activations and stops before the unembedding."""
    passes = ceil(rows * tokens / CHUNK_TOKENS)
    return Work(rows, 0, 0, (_blocks(shape, tokens, rows),), traced_blocks=passes * shape.layers)


def rerun(shape: Shape, tokens: int, variants: int = 10, *, plain: int = 0) -> Work:
    """Ablated variants of prompts as rows of a batch, logits at the last position of each.

    Blocks below the first one that is edited are counted as if they ran.

    Args:
        shape: The model.
        tokens: Of each prompt.
        variants: How many rows, of all prompts together.
        plain: How many prompts are run as they are before, for their variants to begin in.
    """
    variants += plain
    passes = ceil(variants * tokens / CHUNK_TOKENS)
    return Work(
        forward=variants,
        backward=0,
        products=variants,
        phases=(_blocks(shape, tokens, variants), _own_unembedding(shape, variants, passes)),
        memory=SINGLE * (shape.vocabulary + shape.ffn * tokens) * min(variants, CHUNK_TOKENS // tokens),
        traced_blocks=passes * shape.layers,
    )


@dataclass(frozen=True)
class _Unit:
    """What of a model one unit holds."""

    sublayer_indices: int
    vectors: int
    candidates: int


def _unit(shape: Shape, unit: str, tokens: int) -> _Unit:
    ffn = _Unit(shape.layers, shape.ffn_neurons, shape.ffn_neurons)
    attention = _Unit(shape.layers, shape.attention_vectors, shape.attention_vectors * tokens)
    both = _Unit(*(one + other for one, other in zip(vars(ffn).values(), vars(attention).values(), strict=True)))
    return {"ffn": ffn, "attention": attention, "neuron": both}[unit]


def _states(shape: Shape, sublayer_indices: int) -> Work:
    """bs(x) of every sublayer, in float64."""
    return Work(0, 0, sublayer_indices, (_exact(shape, sublayer_indices),))


def _bounds(shape: Shape, sublayer_indices: int, vectors: int, candidates: int) -> Work:
    """A pull-back through the unembedding for each sublayer, in float32, and a dot product for each vector."""
    pulled = Phase(
        "pull-back",
        singles=2 * shape.unembedding * sublayer_indices,
        bytes=shape.bytes * shape.unembedding + 3 * DOUBLE * shape.vocabulary * sublayer_indices,
    )
    # A candidate's coefficient, places, bound and margin are read or written a dozen times.
    scanned = Phase(
        "bounds",
        singles=2 * shape.width * vectors,
        bytes=shape.bytes * shape.width * vectors + 12 * DOUBLE * candidates,
    )
    return Work(0, 0, sublayer_indices, (pulled, scanned))


def _scores(shape: Shape, unit: _Unit, number: float, *, first_order: bool = True) -> Work:
    """Exact scores of so many candidates."""
    kept = shape.keeps_logits(unit.vectors)
    rows = max(1, (2**18 if kept else BLOCK_NUMBERS) // shape.vocabulary)
    sweeps = SWEEPS if first_order else SWEEPS - 2
    swept = Phase("sweeps", bytes=sweeps * DOUBLE * shape.vocabulary * number)
    if kept:
        return Work(0, 0, 0, (swept,))
    return Work(0, 0, number, (_exact(shape, number, ceil(number / rows)), swept))


def _ranks(shape: Shape, unit: _Unit, number: float) -> Work:
    """The answer's own logit in every vector, which brackets its rank, and the rank counted in so many."""
    own = Phase("own logits", singles=2 * shape.width * unit.vectors, bytes=shape.bytes * shape.width * unit.vectors)
    counted = Phase(
        "counted ranks",
        singles=2 * shape.unembedding * number,
        bytes=shape.bytes * shape.unembedding + 3 * SINGLE * shape.vocabulary * number,
    )
    return Work(0, 0, number, (own, counted))


def _search_memory(shape: Shape, unit: _Unit, scored: float) -> float:
    """Bytes at the peak of one question."""
    # Places of candidates and norms of vectors are kept for the next question.
    kept = 4 * DOUBLE * unit.candidates + DOUBLE * unit.vectors
    if shape.keeps_logits(unit.vectors):
        kept += DOUBLE * shape.vocabulary * unit.vectors
    of_candidates = 8 * DOUBLE * unit.candidates
    states = DOUBLE * shape.vocabulary * unit.sublayer_indices
    # p, its negative and its copy in float32; or of each scored candidate its update, p(t|x) and what they sum to.
    working = max(2.5 * states, 4 * DOUBLE * shape.vocabulary * min(scored, max(1, BLOCK_NUMBERS // shape.vocabulary)))
    norms = (shape.bytes + 2 * DOUBLE) * shape.width * max(shape.ffn, shape.heads * shape.head_dim)
    return kept + max(norms, of_candidates + states + working)


def certified(
    shape: Shape, tokens: int, unit: str = "ffn", *, k: int = 10, scored: float | None = None, prompts: int = 1
) -> Work:
    """The certified top k of a unit.

    Args:
        shape: The model.
        tokens: Of each prompt.
        unit: ``"ffn"``, ``"attention"`` or ``"neuron"``.
        k: How many.
        scored: How many candidates are scored exactly; k and six where the first block settles it.
        prompts: How many prompts, which share forward passes but no products.
    """
    held, number = _unit(shape, unit, tokens), k + SPARE if scored is None else scored
    each = (
        _states(shape, held.sublayer_indices)
        + _bounds(shape, held.sublayer_indices, held.vectors, held.candidates)
        + _scores(shape, held, number)
        + Work(0, 0, 0, (), memory=_search_memory(shape, held, number), questions=1)
    )
    return traced_forward(shape, tokens, prompts) + each.times(prompts)


def every_neuron(shape: Shape, tokens: int, unit: str = "ffn", *, prompts: int = 1) -> Work:
    """Exact scores of every candidate of a unit, in blocks."""
    held = _unit(shape, unit, tokens)
    each = (
        _states(shape, held.sublayer_indices)
        + _scores(shape, held, held.candidates)
        + Work(0, 0, 0, (), memory=_search_memory(shape, held, held.candidates), questions=1)
    )
    return traced_forward(shape, tokens, prompts) + each.times(prompts)


def published(shape: Shape, tokens: int) -> Work:
    """Scores of every FFN neuron the published way: each projected in float32, layer by layer."""
    number = shape.ffn_neurons + shape.layers
    projected = Phase(
        "projections",
        singles=2 * shape.unembedding * number,
        bytes=shape.layers * shape.bytes * shape.unembedding + 6 * SINGLE * shape.vocabulary * number,
    )
    work = plain_forward(shape, tokens)
    return work + Work(0, 0, number, (projected,), memory=3 * SINGLE * shape.vocabulary * shape.ffn)


def knowledge_neurons(shape: Shape, tokens: int, steps: int = 20, rows: int = 10) -> Work:
    """Integrated gradients as in Dai et al. 2022: per layer a pass, and ``steps`` passes forward and backward.

    Backward, only activations get gradients, down to the layer that is scaled: half of the blocks on average. Points of
    the path go through the model ``rows`` at a time.
    """
    forward = plain_forward(shape, tokens) + plain_forward(shape, tokens, rows).times(steps / rows)
    blocks, unembedding = plain_forward(shape, tokens, rows).times(steps / rows).phases
    half = replace(blocks, flops=blocks.flops / 2, bytes=blocks.bytes / 2)
    back = Work(0, steps, steps * tokens, (half, unembedding), plain_blocks=steps / rows * shape.layers / 2)
    return (forward + back).times(shape.layers)


def table_2(
    shape: Shape, tokens: int, *, k: int = 10, scored: dict[str, float] | None = None, prompts: int = 1
) -> Work:
    """Table 2: the top k FFN neurons of eight methods, and a rerun without each.

    Args:
        shape: The model.
        tokens: Of each prompt.
        k: How many neurons are ablated.
        scored: How many candidates each method that projects them scores exactly, by name, and of how many vectors
            the answer's rank is counted, ``"counted"``.
        prompts: How many prompts.
    """
    held, found = _unit(shape, "ffn", tokens), scored or {}
    each = _states(shape, held.sublayer_indices)
    # Both increases rest on one bound; log p(w|mv) is an increase over one uniform distribution for all layers.
    for sublayer_indices in (held.sublayer_indices, 1):
        each += _bounds(shape, sublayer_indices, held.vectors, held.candidates)
    for name in ("log_prob_increase", "log_prob", "prob_increase"):
        each += _scores(shape, held, found.get(name, k + SPARE), first_order=False)
    each += _ranks(shape, held, found.get("counted", 2 * (k + SPARE)))
    each += Work(0, 0, 0, (), memory=_search_memory(shape, held, k + SPARE), questions=8)
    reruns = rerun(shape, tokens, prompts) + rerun(shape, tokens, 8 * prompts)
    return traced_forward(shape, tokens, prompts) + each.times(prompts) + reruns


def table_13(
    shape: Shape,
    tokens: int,
    *,
    attention: int = 200,
    ffn: int = 100,
    scored: dict[str, float] | None = None,
    prompts: int = 1,
) -> Work:
    """Table 13: attention and FFN value neurons, and a rerun without them."""
    each = Work(0, 0, 0, ())
    for unit, k in (("attention", attention), ("ffn", ffn)):
        held, number = _unit(shape, unit, tokens), (scored or {}).get(unit, k + SPARE)
        each += _states(shape, held.sublayer_indices) + _bounds(
            shape, held.sublayer_indices, held.vectors, held.candidates
        )
        each += _scores(shape, held, number, first_order=False)
        each += Work(0, 0, 0, (), memory=_search_memory(shape, held, number), questions=1)
    return traced_forward(shape, tokens, prompts) + each.times(prompts) + rerun(shape, tokens, prompts).times(2)


GPT2 = Shape("gpt2", 12, 768, 12, 12, 64, 3_072, 50_257)
GPT2_LARGE = Shape("gpt2-large", 36, 1_280, 20, 20, 64, 5_120, 50_257)
LLAMA_7B = Shape("llama-7b", 32, 4_096, 32, 32, 128, 11_008, 32_000, gated=True)
LLAMA_70B = Shape("Llama 3.1 70B", 80, 8_192, 64, 8, 128, 28_672, 128_256, gated=True, bytes=2)
LLAMA_405B = Shape("Llama 3.1 405B", 126, 16_384, 128, 8, 128, 53_248, 128_256, gated=True, bytes=2)
SHAPES = (GPT2, GPT2_LARGE, LLAMA_7B, LLAMA_70B, LLAMA_405B)

PROMPTS, TOKENS = 1_350, 12
# What is asked of how many prompts.
WORKLOADS: dict[str, tuple[int, Callable[[Shape], Work]]] = {
    "plain forward pass": (1, lambda shape: plain_forward(shape, TOKENS)),
    "certified top 10, FFN": (1, lambda shape: certified(shape, TOKENS)),
    "certified top 10, FFN + attention": (1, lambda shape: certified(shape, TOKENS, "neuron")),
    "every FFN neuron": (1, lambda shape: every_neuron(shape, TOKENS)),
    "rerun of 10 variants": (1, lambda shape: rerun(shape, TOKENS, plain=1)),
    "published way, FFN": (1, lambda shape: published(shape, TOKENS)),
    "Dai et al. 2022, 20 steps": (1, lambda shape: knowledge_neurons(shape, TOKENS)),
    f"Table 2, {PROMPTS:,} prompts": (PROMPTS, lambda shape: table_2(shape, TOKENS, prompts=PROMPTS)),
    f"Table 13, {PROMPTS:,} prompts": (PROMPTS, lambda shape: table_13(shape, TOKENS, prompts=PROMPTS)),
}

# Half of the arithmetic and three quarters of the bandwidth that an H100 (SXM) is sold with: 67 TFLOP/s in float32 and
# in float64, 990 in 16 bits, 3.35 TB/s. What Python takes to launch things is what growth_cpu.json has, rounded up.
ON_PAPER = Machine(
    "one H100-class device",
    flops=33e12,
    double_flops=33e12,
    bandwidth=2.5e12,
    block=0.5e-3,
    traced_block=0.9e-3,
    question=3e-3,
    half_flops=495e12,
)


def quantity(number: float) -> str:
    """Return a number in three digits with its prefix."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "


def duration(seconds: float) -> str:
    """Return a time in words."""
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def predictions() -> str:
    """Return the table of docs/scale.md, in Markdown."""
    lines = [
        "| model | what | forward | backward | vocabulary products | FLOP | in float64 | bytes | extra memory | time | "
        "x plain |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for shape in SHAPES:
        for name, (prompts, build) in WORKLOADS.items():
            work, plain = build(shape), ON_PAPER.seconds(plain_forward(shape, TOKENS, prompts), shape)
            seconds = ON_PAPER.seconds(work, shape)
            cells = (
                shape.name,
                name,
                f"{work.forward:,.0f}",
                f"{work.backward:,.0f}",
                f"{work.products:,.0f}",
                quantity(work.flops),
                quantity(work.doubles),
                f"{quantity(work.bytes)}B",
                f"{quantity(work.memory)}B",
                duration(seconds),
                f"{seconds / plain:,.3g}" if seconds / plain < 1000 else f"{seconds / plain:,.0f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two lines of a page."""
    before, rest = page.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Print, and write if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/scale.md as well")
    options = parser.parse_args(arguments)
    print(predictions())
    if options.write:
        between(DOCS, BEGIN, END, predictions())


if __name__ == "__main__":
    main(sys.argv[1:])
