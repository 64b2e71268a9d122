"""Figures: one style for all of them, readable in print and by the colour-blind, as SVG that stands in a page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS", "HATCHES", "MARKERS", "canvas", "svg"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's colours, which the colour-blind can tell apart, darkest contrasts first."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Shapes that tell lines apart where print has no colour."""

HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
"""Fillings that tell bars apart where print has no colour."""

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    # Text stays text: it can be searched, and read aloud.
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # The same figure is the same text.
    "svg.hashsalt": "attribution",
}


@contextmanager
def canvas(rows: int = 1, columns: int = 1, *, width: float = 6.4, height: float = 3.2) -> Iterator[tuple[Figure, Any]]:
    """Give a figure with its axes: one :class:`~matplotlib.axes.Axes`, or an array of them. Inches.

    It belongs to no window and needs no display.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        axes: Axes | Any = figure.subplots(rows, columns)
        yield figure, axes


def svg(figure: Figure, description: str) -> str:
    """Return a figure as an ``<svg>`` element that fits the width of its frame.

    Call it inside :func:`canvas`, whose style says how text is written.

    Args:
        figure: The figure.
        description: What it shows, for those who cannot see it.
    """
    from html import escape

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    element = buffer.getvalue()
    element = element[element.index("<svg") :]
    # Several figures stand in one page, and each numbers its parts from 1: keep the names that something refers to,
    # which are made of what they name.
    referred = set(re.findall(r"#([\w.-]+)", element))
    element = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in referred else "", element)
    head, body = element.split(">", 1)
    return f'{head} role="img" class="figure"><title>{escape(description)}</title>{body}'
