"""Exhibits as figures: those of the paper that are figures, and the matrix of Table 11 as a heat map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from attribution.claims.exhibits import Exhibit
from attribution.report.exhibit_tables import MISSING, Row, in_order, rows_of

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["pictures_of"]

# From here on white reads better than black on the colour of a fall, in per cent.
_DARK = 70


def pictures_of(exhibit: Exhibit) -> list[Markup]:
    """Return the figures of an exhibit, each an ``<svg>`` element; none of what is read better as a table."""
    draw = _DRAWN.get(exhibit.name)
    return [draw(exhibit.model, rows_of(exhibit))] if draw is not None and exhibit.rows else []


def _picture(figure: Any, description: str) -> Markup:
    from markupsafe import Markup

    from attribution.report.drawing import svg

    return Markup(svg(figure, description))


def _numbers(rows: Iterable[Row], column: str) -> list[float]:
    """Return a column for drawing; what is missing is a gap."""
    return [math.nan if row[column] is None else float(row[column]) for row in rows]  # type: ignore[arg-type]


def _whole_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=12, steps=[1, 2, 5, 10]))


def _layers_of_methods(model: str, rows: Sequence[Row]) -> Markup:
    from attribution.report.drawing import COLORS, HATCHES, canvas

    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    with canvas(len(methods), height=1.3 * len(methods) + 0.5) as (figure, axes):
        panels = axes if len(methods) > 1 else [axes]
        highest = max((share for share in _numbers(rows, "share") if share == share), default=0) * 100
        for place, (method, panel) in enumerate(zip(methods, panels, strict=True)):
            of_method = [row for row in rows if row["method"] == method]
            panel.bar(
                _numbers(of_method, "layer"),
                [100 * share for share in _numbers(of_method, "share")],
                color=COLORS[place % len(COLORS)],
                hatch=HATCHES[place % len(HATCHES)],
                edgecolor="black",
                linewidth=0.5,
            )
            panel.set_title(method, loc="left", fontsize="medium")
            panel.set_ylim(0, highest * 1.05 or 1)
            panel.grid(visible=False, axis="x")
            # Not so wide that a tick stands where there is no layer.
            panel.margins(x=0.01)
            _whole_ticks(panel.xaxis)
        panels[-1].set_xlabel("layer")
        figure.supylabel("share of the top 10 FFN neurons (%)", fontsize="medium")
        return _picture(figure, f"{model}: share of the top 10 FFN neurons by layer, for {', '.join(methods)}")


def _curve(model: str, rows: Sequence[Row]) -> Markup:
    from attribution.report.drawing import COLORS, MARKERS, canvas

    with canvas(2, height=4.2) as (figure, (upper, lower)):
        for place, (panel, column, label) in enumerate(
            [(upper, "logp", "mean log p (nats)"), (lower, "prob", "mean p (0 to 1)")]
        ):
            panel.plot(
                _numbers(rows, "segment"),
                _numbers(rows, column),
                color=COLORS[place],
                marker=MARKERS[place],
                markersize=3,
                linewidth=1.2,
            )
            panel.set_ylabel(label)
            _whole_ticks(panel.xaxis)
        lower.set_ylim(bottom=0)
        lower.set_xlabel("segment (0: embedding, 60: output of the last layer)")
        return _picture(figure, f"{model}: log p and p of the answer in 61 points from the embedding to the output")


def _query_and_value(model: str, rows: Sequence[Row]) -> Markup:
    from attribution.report.drawing import COLORS, HATCHES, canvas

    with canvas() as (figure, axes):
        layers = _numbers(rows, "layer")
        for place, (column, label) in enumerate(
            [("query_only", "query neurons only"), ("query_value", "query and value neurons")]
        ):
            axes.bar(
                [layer + 0.4 * place - 0.2 for layer in layers],
                _numbers(rows, column),
                width=0.4,
                color=COLORS[place],
                hatch=HATCHES[place] * 2,
                edgecolor="black",
                linewidth=0.5,
                label=label,
            )
        axes.set_xlabel("layer")
        axes.set_ylabel("FFN neurons per prompt (mean)")
        axes.grid(visible=False, axis="x")
        axes.margins(x=0.01)
        _whole_ticks(axes.xaxis)
        figure.legend(loc="outside upper center", ncols=2)
        return _picture(figure, f"{model}: query neurons by layer, those that are value neurons as well and the others")


def _matrix(model: str, rows: Sequence[Row]) -> Markup:
    import matplotlib as mpl

    from attribution.report.drawing import canvas

    heads_of, categories = (in_order(str(row[column]) for row in rows) for column in ("heads_of", "category"))
    cuts = {
        (str(row["heads_of"]), str(row["category"])): pair
        for row, pair in zip(rows, zip(_numbers(rows, "mrr_cut"), _numbers(rows, "prob_cut"), strict=True), strict=True)
    }
    gap = (math.nan, math.nan)
    falls = [[100 * cuts.get((a, b), gap)[0] for b in categories] for a in heads_of]
    with canvas(height=0.8 + 0.5 * len(heads_of)) as (figure, axes):
        # One hue from light to dark, in ten steps: it keeps its order in grey, and a bar of few steps is no bitmap.
        mesh = axes.pcolormesh(
            falls, cmap=mpl.colormaps["Blues"].resampled(10), vmin=0, vmax=100, edgecolors="white", linewidth=1
        )
        for row, own in enumerate(heads_of):
            for column, other in enumerate(categories):
                mrr, prob = (MISSING if cut != cut else str(round(100 * cut)) for cut in cuts.get((own, other), gap))
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    f"{mrr} / {prob}",
                    ha="center",
                    va="center",
                    color="white" if falls[row][column] > _DARK else "black",
                )
        axes.set_xticks([place + 0.5 for place in range(len(categories))], categories)
        axes.set_yticks([place + 0.5 for place in range(len(heads_of))], heads_of)
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlabel("category of the prompts")
        axes.set_ylabel("category of the heads")
        figure.colorbar(mesh, ax=axes, label="fall of MRR (%)", ticks=range(0, 101, 20))
        return _picture(
            figure, f"{model}: fall of MRR / of p, in per cent, by category of the heads and of the prompts"
        )


_DRAWN: dict[str, Callable[[str, Sequence[Row]], Markup]] = {
    "table_11": _matrix,
    "figure_2": _layers_of_methods,
    "figure_3": _curve,
    "figure_8": _query_and_value,
}
