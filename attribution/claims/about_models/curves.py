"""Curves: the answer's probability on the straight way from the embedding to the final state (Figures 3 and 10).

The state at segment S is h^{-1} + S (h^{L-1} - h^{-1}) / 60, for S from 0 to 60, under the scale that is frozen for
the prompt, so that bs is linear in S.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from attribution.claims.about_models.survey import survey
from attribution.claims.bench import Workbench, measured_once
from attribution.claims.exhibits import Exhibit
from attribution.claims.measured import Effects
from attribution.engine.batching import batches_of
from attribution.engine.projection import before_softmax, frozen_scale
from attribution.engine.trace import read_activations

__all__ = ["PIECES", "curve", "straightness", "straightness_of"]

Piece = Literal["logp", "prob"]
PIECES: tuple[Piece, ...] = ("logp", "prob")

_SEGMENTS = 60


@measured_once
def _log_probs(bench: Workbench, segments: int) -> npt.NDArray[np.float64]:
    """Return the answer's log-probability at every segment, in nats, (n, segments + 1), on the survey's prompts."""
    questions = [bench.sample.questions[place] for place in survey(bench).indices]
    readout, curves = bench.model.anatomy.readout, np.zeros((len(questions), segments + 1))
    way = torch.linspace(0, 1, segments + 1, dtype=torch.float64, device=bench.model.device)[:, None]
    for rows, batch in batches_of(bench.model, questions):
        activations = read_activations(bench.model, batch, logits=False)
        starts, ends = activations.resid_pre[0].double(), activations.resid_final.double()
        for row, start, end in zip(rows, starts, ends, strict=True):
            first, last = before_softmax(torch.stack([start, end]), frozen_scale(end, readout.norm), readout)
            log_probs = (first + way * (last - first)).log_softmax(-1)
            curves[row] = log_probs[:, questions[row].answer_id].cpu().numpy()
    return curves


def straightness(curves: npt.NDArray[np.float64], first: int, last: int) -> npt.NDArray[np.float64]:
    """Return R^2 of the least-squares line through each curve from one segment to another, (n,), 0 to 1.

    A curve that does not move is a line: 1.

    Args:
        curves: (n, segments).
        first: First segment.
        last: Last segment, included.
    """
    part = curves[:, first : last + 1]
    centred = part - part.mean(1, keepdims=True)
    way = np.arange(part.shape[1]) - (part.shape[1] - 1) / 2
    explained = (centred @ way) ** 2 / (way @ way)
    moved = (centred**2).sum(1)
    flat = moved <= np.finfo(np.float64).eps * part.shape[1] * np.abs(part).max(1, initial=0) ** 2
    return np.where(flat, 1.0, np.clip(explained / np.where(flat, 1.0, moved), 0, 1))


def _of(bench: Workbench, piece: Piece, segments: int) -> npt.NDArray[np.float64]:
    log_probs = _log_probs(bench, segments)
    return log_probs if piece == "logp" else np.exp(log_probs)


def straightness_of(bench: Workbench, piece: Piece, first: int, last: int, *, segments: int) -> Effects:
    """Measure R^2 of a line through each prompt's curve from one segment to another, 0 to 1 (Figures 3 and 10).

    The note has the mean of the other curve there.

    Args:
        bench: The model with its prompts.
        piece: Which curve: log p or p.
        first: First segment.
        last: Last segment, included.
        segments: How many segments the whole way has.
    """
    other: Piece = "prob" if piece == "logp" else "logp"
    here = straightness(_of(bench, piece, segments), first, last)
    note = ""
    if len(here):
        elsewhere = straightness(_of(bench, other, segments), first, last).mean()
        note = f"{other} there: {elsewhere:.2f}"
    return Effects(here, indices=survey(bench).indices, note=note)


def curve(bench: Workbench) -> Exhibit:
    """Return Figures 3 and 10: the mean log-probability and probability of the answer at every segment."""
    curves = _log_probs(bench, _SEGMENTS)
    empty = np.full(_SEGMENTS + 1, np.nan)
    frame = pd.DataFrame(
        {
            "segment": np.arange(_SEGMENTS + 1),
            "logp": curves.mean(0) if len(curves) else empty,
            "prob": np.exp(curves).mean(0) if len(curves) else empty,
        }
    )
    half = int((frame["prob"] < frame["prob"].iloc[-1] / 2).sum())
    seen = (
        f"The mean log-probability rises from {frame['logp'].iloc[0]:.2f} to {frame['logp'].iloc[-1]:.2f} nats; the "
        f"mean probability passes half of its end at segment {half} of {_SEGMENTS}."
    )
    return Exhibit.of_frame("figure_3", bench.model.name, frame, seen=seen, prompts=len(curves))
