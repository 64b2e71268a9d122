"""An explanation as a page: the sections of its text, with figures of its layers and heads."""

from __future__ import annotations

from attribution.experiments.explanation import Explanation
from attribution.report.drawing import COLORS, HATCHES, canvas, svg
from attribution.report.explanation_text import Section, sections_of
from attribution.report.page import render
from attribution.report.table import Column, Table

__all__ = ["render_page"]

_UNIT = "log-probability increase (nats)"
# Narrow, so that its text is still read when a phone shrinks it.
_WIDTH = 5.2
# More heads than this leave no room for numbers in their cells.
_NUMBERED_HEADS = 8


def render_page(explanation: Explanation) -> str:
    """Return an explanation as one self-contained HTML file."""
    from markupsafe import Markup

    sections = sections_of(explanation)
    # Our own drawings; the text in them is escaped by what draws them.
    figures = {"layers": Markup(_layers(explanation)), "heads": Markup(_heads(explanation))}
    return render(
        "explain.html",
        title=sections[0].title,
        sections=sections,
        tables={section.name: _with_words(section.table, section) for section in sections if section.table is not None},
        figures=figures,
    )


def _with_words(table: Table, section: Section) -> Table:
    """Return a section's table with its words as columns like the others; lines break only between words."""
    from markupsafe import Markup

    word = Markup("<span>{}</span>")
    rows = []
    for number, row in enumerate(table.rows):
        lists = [Markup(", ").join(word.format(each) for each in cells[number]) for cells in section.words.values()]
        rows.append((*row, *lists))
    return Table.of((*table.columns, *(Column(name, "words") for name in section.words)), rows)


def _layers(explanation: Explanation) -> str:
    from matplotlib.ticker import MaxNLocator

    with canvas(width=_WIDTH, height=3.0) as (figure, axes):
        layers = range(len(explanation.ffn_layers))
        for offset, (name, scores) in enumerate(
            (("attention", explanation.attention_layers), ("FFN", explanation.ffn_layers))
        ):
            indices = [layer + 0.4 * (offset - 0.5) for layer in layers]
            axes.bar(
                indices, scores, 0.4, label=name, color=COLORS[offset], hatch=HATCHES[offset], edgecolor="white", lw=0
            )
        # No tick for a layer that does not exist.
        axes.set_xlim(-0.6, len(layers) - 0.4)
        axes.axhline(0, color="black", lw=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel(_UNIT)
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside upper center", ncols=2)
        return svg(
            figure, "Bars: what each attention and FFN layer adds to log p of the answer; the table has the numbers."
        )


def _heads(explanation: Explanation) -> str:
    from matplotlib.ticker import MaxNLocator

    scores = explanation.heads
    largest = max(abs(score) for row in scores for score in row) or 1.0
    with canvas(width=_WIDTH, height=min(7.0, 1.2 + 0.28 * len(scores))) as (figure, axes):
        # Cells as shapes: a picture of so few points would be blurred. The colour-blind can tell brown from teal.
        edges = [[place - 0.5 for place in range(size + 1)] for size in (len(scores[0]), len(scores))]
        cells = axes.pcolormesh(*edges, scores, cmap="BrBG", vmin=-largest, vmax=largest)
        axes.invert_yaxis()
        axes.grid(visible=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        if len(scores[0]) <= _NUMBERED_HEADS:
            for layer, row in enumerate(scores):
                for head, score in enumerate(row):
                    # Both ends of the map are dark.
                    ink = "white" if abs(score) > 0.7 * largest else "black"
                    axes.text(head, layer, f"{score:+.2f}", ha="center", va="center", fontsize=8, color=ink)
        figure.colorbar(cells, ax=axes, label=_UNIT)
        return svg(figure, "Heat map: what each head adds to log p of the answer; the table has the numbers.")
