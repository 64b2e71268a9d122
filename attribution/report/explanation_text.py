"""An explanation as text: its sections, which the page shares, and how they look on a terminal 100 columns wide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from attribution.records import AttentionNeuron, FFNNeuron
from attribution.report.table import Column, Table, width_of

if TYPE_CHECKING:
    from attribution.engine.metrics import Outcome
    from attribution.experiments.explanation import Explanation, QueryLayer, ValueNeuron

__all__ = ["ASCII", "UNICODE", "Glyphs", "Section", "glyphs_for", "render_text", "sections_of"]

_WIDTH = 100
_BAR = 30
# More heads than this, with a number each, would not fit the width; cells without numbers wrap at the second figure.
_NUMBERED_HEADS, _SHADED_HEADS = 12, 40
_NO_BREAK = "\u00a0"
_SUBLAYER = {"attention": "attention", "ffn": "FFN"}
_ABLATED = {
    "ffn": "FFN value neurons",
    "attention": "attention value neurons",
    "both": "both kinds of value neurons",
    "query": "query FFN neurons",
}


@dataclass(frozen=True)
class Section:
    """One section of an explanation, as text.

    Attributes:
        name: What a figure is looked up by.
        title: Its heading.
        note: What is seen, with units; spaces that belong to tokens are no-break ones, so that lines break elsewhere.
        table: What is seen, as a table; ``None`` if the section has none.
        words: More columns of the table, of several words a cell: by heading, the words of each row.
    """

    name: str
    title: str
    note: str
    table: Table | None = None
    words: Mapping[str, Sequence[tuple[str, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Glyphs:
    """What bars and cells are drawn with.

    Attributes:
        full: A whole step of a bar.
        right: Half a step to the right of its end; empty where there is none.
        left: Half a step to the left of it.
        axis: Zero.
        shades: Cells by size, the smallest first.
    """

    full: str
    right: str
    left: str
    axis: str
    shades: str


UNICODE = Glyphs("█", "▌", "▐", "│", " ░▒▓█")
ASCII = Glyphs("#", "", "", "|", " .:*#")


def glyphs_for(encoding: str | None) -> Glyphs:
    """Return the glyphs that an encoding can carry."""
    try:
        "".join((UNICODE.full, UNICODE.right, UNICODE.left, UNICODE.axis, UNICODE.shades)).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE


def sections_of(explanation: Explanation) -> list[Section]:
    """Return what is said about a prompt, in the order in which it is read."""
    return [
        _prompt(explanation),
        _predictions(explanation),
        _layers(explanation),
        _heads(explanation),
        _ffn_neurons(explanation),
        _attention_neurons(explanation),
        _query_layers(explanation),
        _query_neurons(explanation),
        _ablations(explanation),
    ]


def _number(value: float) -> str:
    """Return a probability, or another number of any size."""
    return f"{value:.3g}"


def _signed(value: float) -> str:
    """Return a difference in nats, or a coefficient."""
    return f"{value:+.4f}"


def _numbers(heading: str) -> Column:
    return Column(heading, "number")


def _table(columns: Iterable[Column | str], rows: Sequence[Sequence[str]]) -> Table | None:
    return Table.of(columns, rows) if rows else None


def _whole(token: str) -> str:
    """Return a token as it stands in a sentence."""
    return repr(token).replace(" ", _NO_BREAK)


def _prompt(explanation: Explanation) -> Section:
    answer = _whole(explanation.answer)
    tokens = ", ".join(f"{position}:{_NO_BREAK}{_whole(token)}" for position, token in enumerate(explanation.tokens))
    asked = "" if explanation.answer_given else ", the model's own first prediction, since no answer was given"
    return Section(
        "prompt",
        f"{explanation.prompt!r} -> {answer}",
        f"Model {explanation.model}. The answer is {answer}{asked}: {_outcome(explanation.outcome)}. "
        "Scores are log-probability increases, log p(w|x+v) - log p(w|x) of the answer w at the last position, in "
        f"nats. Layers, heads, dimensions and positions count from 0. Tokens by position: {tokens}.",
    )


def _outcome(outcome: Outcome) -> str:
    return f"rank {outcome.rank:,}, probability {_number(outcome.prob)}, log p {outcome.logp:.4f} nats"


def _predictions(explanation: Explanation) -> Section:
    return Section(
        "predictions",
        "Top predictions",
        "What the model puts first, its own softmax.",
        _table(
            (_numbers("rank"), "token", _numbers("probability"), _numbers("log p, nats")),
            [
                (str(rank), repr(each.token), _number(each.prob), f"{each.logp:.4f}")
                for rank, each in enumerate(explanation.predictions, 1)
            ],
        ),
    )


def _layers(explanation: Explanation) -> Section:
    pairs = list(zip(explanation.attention_layers, explanation.ffn_layers, strict=True))
    return Section(
        "layers",
        "Layers",
        "What each attention and FFN layer adds to log p of the answer, in nats. From the embedding to the final "
        f"state, under the final norm's frozen scale, they add up to {_signed(sum(map(sum, pairs)))}.",
        _table(
            map(_numbers, ("layer", "attention", "FFN")),
            [(str(layer), _signed(attention), _signed(ffn)) for layer, (attention, ffn) in enumerate(pairs)],
        ),
    )


def _heads(explanation: Explanation) -> Section:
    scored = [(score, layer, head) for layer, row in enumerate(explanation.heads) for head, score in enumerate(row)]
    strongest = ", ".join(
        f"layer {layer} head {head} ({_signed(score)})"
        for score, layer, head in sorted(scored, key=lambda each: -each[0])[:5]
    )
    return Section(
        "heads",
        "Heads",
        f"What each head alone adds to log p of the answer, in nats. The strongest: {strongest}.",
        _table(
            map(_numbers, ("layer", *(f"head {head}" for head in range(len(explanation.heads[0]))))),
            [(str(layer), *map(_signed, row)) for layer, row in enumerate(explanation.heads)],
        ),
    )


_PARTS = "The score is the first-order part minus KL, what the neuron spends on the rest of the distribution, in nats."
_TOKENS = "Raised and lowered are the tokens whose logit its output, coefficient times vector, raises and lowers most."


_PARTS_OF_A_SCORE = ("score", "first order", "KL", "coefficient")


def _parts(each: ValueNeuron) -> tuple[str, ...]:
    return _signed(each.score), _signed(each.first_order), f"{each.kl:.4f}", _signed(each.coefficient)


def _moved(neurons: Sequence[ValueNeuron]) -> dict[str, list[tuple[str, ...]]]:
    return {
        "raised": [tuple(map(repr, each.raised)) for each in neurons],
        "lowered": [tuple(map(repr, each.lowered)) for each in neurons],
    }


def _ffn_neurons(explanation: Explanation) -> Section:
    rows = []
    for each in explanation.ffn_neurons:
        assert isinstance(each.neuron, FFNNeuron)
        rows.append((str(each.neuron.layer), str(each.neuron.index), *_parts(each)))
    return Section(
        "ffn_neurons",
        "FFN value neurons",
        f"The FFN neurons that add most to log p of the answer. {_PARTS} {_TOKENS}",
        _table(map(_numbers, ("layer", "index", *_PARTS_OF_A_SCORE)), rows),
        _moved(explanation.ffn_neurons),
    )


def _attention_neurons(explanation: Explanation) -> Section:
    rows = []
    for each in explanation.attention_neurons:
        neuron = each.neuron
        assert isinstance(neuron, AttentionNeuron)
        place = (neuron.layer, neuron.head, neuron.dim, neuron.position)
        rows.append((*map(str, place), repr(each.source), *_parts(each)))
    return Section(
        "attention_neurons",
        "Attention value neurons",
        "The attention neurons, each one dimension of a head as read from one source token, that add most to log p of "
        "the answer; columns as above.",
        _table(
            (
                *map(_numbers, ("layer", "head", "dim", "position")),
                "source",
                *map(_numbers, _PARTS_OF_A_SCORE),
            ),
            rows,
        ),
        _moved(explanation.attention_neurons),
    )


def _component(each: QueryLayer) -> str:
    if each.layer is None:
        return {"embedding": "embedding", "bias": "biases"}[each.component]
    return f"{_SUBLAYER[each.component]} {each.layer}"


def _query_layers(explanation: Explanation) -> Section:
    columns: list[Column | str] = [_numbers("rank")]
    sides: list[list[tuple[str, str]]] = []
    for unit in ("ffn", "attention"):
        found = [each for each in explanation.query_layers if each.value_unit == unit]
        if found:
            columns += [f"activate {_SUBLAYER[unit]} neurons", _numbers(f"score, {_SUBLAYER[unit]}")]
            best = sorted(found, key=lambda each: -each.score)[:10]
            sides.append([(_component(each), _signed(each.score)) for each in best])
    left_out = f" ({explanation.query_left_out} left out)" if explanation.query_left_out else ""
    return Section(
        "query_layers",
        "Query layers",
        f"What activates the {explanation.query_value_neurons} best value neurons{left_out}: each component's share of "
        "what a neuron reads, times the neuron's score, summed over FFN and over attention value neurons, in nats. "
        f"Shares are of sums that cancel up to {_number(explanation.query_amplification)} to 1.",
        _table(
            columns,
            [
                (str(rank), *(cell for pair in pairs for cell in pair))
                for rank, pairs in enumerate(zip(*sides, strict=True), 1)
            ],
        ),
    )


def _query_neurons(explanation: Explanation) -> Section:
    return Section(
        "query_neurons",
        "Query FFN neurons",
        "The FFN neurons that do most to activate those attention value neurons, at their source positions; query "
        "score in nats."
        if explanation.query_neurons
        else "No FFN layer comes before the attention value neurons.",
        _table(
            map(_numbers, ("layer", "index", "query score")),
            [
                (str(each.neuron.layer), str(each.neuron.index), _signed(each.score))
                for each in explanation.query_neurons
            ],
        ),
    )


def _ablations(explanation: Explanation) -> Section:
    before = explanation.outcome

    def row(zeroed: str, number: int, distinct: int, after: Outcome) -> tuple[str, ...]:
        change = _signed(after.logp - before.logp)
        return zeroed, str(number), str(distinct), f"{after.rank:,}", _number(after.prob), f"{after.logp:.4f}", change

    rows: list[tuple[str, ...]] = [
        ("nothing", "0", "0", f"{before.rank:,}", _number(before.prob), f"{before.logp:.4f}", "")
    ]
    for each in explanation.ablations:
        rows.append(row(_ABLATED[each.name], len(each.neurons), each.distinct, each.outcome))
        rows.append(row("  random others instead", len(each.control_neurons), each.control_distinct, each.control))
    return Section(
        "ablations",
        "Effect of zeroing them",
        "The answer after a rerun with the neurons named above set to zero at every position. Random others are a "
        "control, one draw: neurons of the same layers, each writing about as much as the one that it stands for. "
        "Attention neurons that differ by position only are zeroed as one.",
        _table(
            ("zeroed", *map(_numbers, ("neurons", "distinct", "rank", "probability", "log p, nats", "change"))),
            rows,
        ),
    )


def render_text(explanation: Explanation, glyphs: Glyphs = UNICODE) -> str:
    """Return an explanation for a terminal, at most 100 columns wide."""
    blocks = []
    for section in sections_of(explanation):
        title, lines = list(_wrapped(section.title)), []
        if section.name == "layers":
            lines = _bars(explanation, glyphs)
        elif section.name == "heads":
            lines = _shaded(explanation.heads, glyphs)
        elif section.table is not None:
            heading, *rows = section.table.text()
            lines.append(heading)
            for number, row in enumerate(rows):
                lines.append(row)
                lines += [_listed(f"      {name:<8}", words[number]) for name, words in section.words.items()]
        underline = "-" * max(map(width_of, title))
        whole = [*title, underline, *_wrapped(section.note), *([""] if lines else []), *lines]
        blocks.append("\n".join(line.rstrip() for line in whole))
    return "\n\n\n".join(blocks)


def _listed(line: str, words: Sequence[str]) -> str:
    """Return a line with as many whole words as fit behind its beginning."""
    separator = ""
    for word in words:
        longer = line + separator + word
        if width_of(longer) > _WIDTH:
            break
        line, separator = longer, ", "
    return line


def _wrapped(text: str) -> Iterator[str]:
    """Yield a text's lines; a word that is longer than one stays whole."""
    line = ""
    for word in text.split(" "):
        if line and width_of(line) + 1 + width_of(word) > _WIDTH:
            yield line.replace(_NO_BREAK, " ")
            line = word
        else:
            line = f"{line} {word}" if line else word
    yield line.replace(_NO_BREAK, " ")


def _bars(explanation: Explanation, glyphs: Glyphs) -> list[str]:
    """Return attention and FFN layers as signed bars side by side, on one scale."""
    sides = (explanation.attention_layers, explanation.ffn_layers)
    low, high = min(0.0, *map(min, sides)), max(0.0, *map(max, sides))
    step = (high - low) / _BAR or 1.0
    # Room for a half step more on either side of zero.
    below, above = -int(low // step), -int(-high // step)

    def bar(score: float) -> str:
        halves = round(2 * abs(score) / step) if glyphs.right else 2 * round(abs(score) / step)
        full, half = glyphs.full * (halves // 2), halves % 2
        if score < 0:
            return f"{(glyphs.left if half else '') + full:>{below}}{glyphs.axis}{'':{above}}"
        return f"{'':{below}}{glyphs.axis}{full + (glyphs.right if half else ''):{above}}"

    heading = f"{'attention':>9} {'':{below + 1 + above}}  {'FFN':>9}"
    lines = [f"layer  {heading}"]
    for layer, (attention, ffn) in enumerate(zip(*sides, strict=True)):
        lines.append(f"{layer:>5}  {attention:>+9.4f} {bar(attention)}  {ffn:>+9.4f} {bar(ffn)}")
    return [*lines, f"One {glyphs.full} is {step:.3g} nats."]


def _shaded(heads: Sequence[Sequence[float]], glyphs: Glyphs) -> list[str]:
    """Return heads as cells, layer by layer: the darker, the larger; with numbers where there is room."""
    number = len(heads[0])
    largest = max(abs(score) for row in heads for score in row) or 1.0
    steps = len(glyphs.shades) - 1
    numbered = number <= _NUMBERED_HEADS

    def cell(score: float) -> str:
        level = round(steps * abs(score) / largest)
        if numbered:
            return f"{glyphs.shades[level]}{score:+.2f} "
        return ("+" if score > 0 else "-") + glyphs.shades[level] if level else "  "

    lines: list[str] = []
    for first in range(0, number, _SHADED_HEADS):
        shown = range(first, min(first + _SHADED_HEADS, number))
        names = [f"{head:>6}" for head in shown] if numbered else [f"{head:<8}" for head in shown[::4]]
        lines += [f" head  {(' ' if numbered else '').join(names)}", "layer"]
        for layer, row in enumerate(heads):
            lines.append(f"{layer:>5}  {''.join(cell(row[head]) for head in shown)}")
    scale = ", ".join(f"'{shade}' {largest * level / steps:.3g}" for level, shade in enumerate(glyphs.shades))
    return [*lines, f"Cells by size, in nats: {scale}."]
