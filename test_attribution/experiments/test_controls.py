"""Matched controls: other neurons of the same sublayers that write vectors of about the same norms."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.engine.importance import Candidates, Streams
from attribution.engine.vectors import VectorTable
from attribution.experiments.controls import matched
from attribution.models.anatomy import Readout
from attribution.models.norms import Norm
from attribution.records import SUBLAYERS, Layer, Unit

WIDTH, PER_HEAD = 3, 2
# As stated in the contract: a control is drawn among this many of nearest norm.
NEAREST = 5


def _candidates(
    unit: Unit, *, layers: int, rows: int, positions: int, values: int, draw: int = 0, rounded: bool = False
) -> Candidates:
    """Neurons with random vectors and coefficients; ``rounded`` ones share many norms."""
    generator = torch.Generator().manual_seed(values)
    sublayers = tuple(Layer(layer, kind) for layer in range(layers) for kind in SUBLAYERS[unit])
    # Even, so that they are whole heads.
    sizes = [2 * rows] * len(sublayers)
    vectors = tuple(torch.randn(size, WIDTH, generator=generator) for size in sizes)
    if rounded:
        vectors = tuple(torch.ones(size, WIDTH) for size in sizes)
    readout = Readout(torch.eye(WIDTH), None, Norm(None, None, 1e-5, centred=False), 1.0, None)
    table = VectorTable(unit, sublayers, vectors, (None,) * len(sublayers), readout, PER_HEAD)
    index, sublayer_index, row, position = table.indices(positions)
    coefficient = torch.randn(len(index), generator=generator, dtype=torch.float64)
    return Candidates(
        table=table,
        index=index,
        sublayer_index=sublayer_index,
        row=row,
        position=position,
        coefficient=coefficient.round() if rounded else coefficient,
        streams=Streams(
            torch.zeros(len(sublayers), WIDTH, dtype=torch.float64),
            torch.ones((), dtype=torch.float64),
            readout,
        ),
        answer=0,
        total=len(index),
        seed=draw,
    )


def _norms(candidates: Candidates) -> list[float]:
    """|m| |v| of each candidate, by hand."""
    found = []
    for sublayer_index, row, coefficient in zip(
        candidates.sublayer_index.tolist(), candidates.row.tolist(), candidates.coefficient.tolist(), strict=True
    ):
        found.append(abs(coefficient) * float(candidates.table.vectors[sublayer_index][row].double().norm()))
    return found


def _sublayers(candidates: Candidates) -> list[int]:
    return candidates.sublayer_index.tolist()  # type: ignore[no-any-return]


def _vectors(candidates: Candidates) -> list[tuple[int, int]]:
    """What tells vectors apart: neurons of one head's dimension at several positions share one."""
    return list(zip(candidates.sublayer_index.tolist(), candidates.row.tolist(), strict=True))


@st.composite
def _cases(draw: Any) -> tuple[Candidates, list[int]]:
    unit = draw(st.sampled_from(["ffn", "attention", "neuron"]))
    candidates = _candidates(
        unit,
        layers=draw(st.integers(1, 3)),
        rows=draw(st.integers(1, 12)),
        positions=draw(st.integers(1, 4)),
        values=draw(st.integers(0, 10**6)),
        draw=draw(st.integers(0, 10**6)),
        rounded=draw(st.booleans()),
    )
    chosen = draw(st.lists(st.integers(0, len(candidates) - 1), max_size=25, unique=True))
    return candidates, chosen


def _matched(candidates: Candidates, chosen: list[int]) -> list[int]:
    drawn = matched(candidates, torch.tensor(chosen, dtype=torch.long))
    assert drawn.dtype == torch.long
    return drawn.tolist()  # type: ignore[no-any-return]


@given(_cases())
@settings(max_examples=150, deadline=None)
def test_controls_are_other_neurons_each_drawn_once(case: tuple[Candidates, list[int]]) -> None:
    candidates, chosen = case
    drawn, vectors = _matched(candidates, chosen), _vectors(candidates)
    assert len(set(drawn)) == len(drawn)
    assert not set(drawn) & set(chosen)
    assert not {vectors[place] for place in drawn} & {vectors[place] for place in chosen}


@given(_cases())
@settings(max_examples=150, deadline=None)
def test_every_sublayer_gives_as_many_controls_as_were_chosen_from_it_or_all_it_has(
    case: tuple[Candidates, list[int]],
) -> None:
    candidates, chosen = case
    sublayers, vectors = _sublayers(candidates), _vectors(candidates)
    gone = {vectors[place] for place in chosen}
    wanted = Counter(sublayers[place] for place in chosen)
    others = Counter(sublayer for sublayer, vector in zip(sublayers, vectors, strict=True) if vector not in gone)
    given_by = Counter(sublayers[place] for place in _matched(candidates, chosen))
    assert given_by == Counter({sublayer: min(number, others[sublayer]) for sublayer, number in wanted.items()})


@given(_cases())
@settings(max_examples=150, deadline=None)
def test_each_control_is_one_of_the_five_nearest_in_norm_that_are_left(case: tuple[Candidates, list[int]]) -> None:
    """Replayed one by one, with every distance measured."""
    candidates, chosen = case
    norms, sublayers, vectors = _norms(candidates), _sublayers(candidates), _vectors(candidates)
    gone = {vectors[place] for place in chosen}
    left = [place for place in range(len(candidates)) if vectors[place] not in gone]
    drawn = _matched(candidates, chosen)
    for sublayer in sorted(set(sublayers)):
        here = [place for place in drawn if sublayers[place] == sublayer]
        sizes = sorted((norms[place] for place in chosen if sublayers[place] == sublayer), reverse=True)
        for size, pick in zip(sizes, here, strict=False):
            distances = sorted(abs(norms[place] - size) for place in left if sublayers[place] == sublayer)
            # Products of float64 numbers in another order differ in the last bits.
            assert abs(norms[pick] - size) <= distances[min(NEAREST, len(distances)) - 1] + 1e-12
            left.remove(pick)


@given(_cases(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_seed_alone_decides_the_draw(case: tuple[Candidates, list[int]], shuffle: Any) -> None:
    candidates, chosen = case
    drawn = _matched(candidates, chosen)
    shuffle.shuffle(chosen)
    assert _matched(candidates, chosen) == drawn


@pytest.mark.parametrize("place", [0, 17, 39])
def test_each_of_the_five_nearest_is_drawn_equally_often(place: int) -> None:
    """Also next to the smallest and the largest norm, where all neighbours are on one side."""
    candidates = _candidates("ffn", layers=1, rows=20, positions=1, values=3)
    norms = _norms(candidates)
    chosen = sorted(range(len(norms)), key=norms.__getitem__)[place]
    others = [other for other in range(len(norms)) if other != chosen]
    nearest = sorted(others, key=lambda other: abs(norms[other] - norms[chosen]))[:NEAREST]
    draws = 1000
    counts = Counter(
        _matched(_candidates("ffn", layers=1, rows=20, positions=1, values=3, draw=seed), [chosen])[0]
        for seed in range(draws)
    )
    assert set(counts) == set(nearest)
    share = 1 / NEAREST
    # Five standard deviations of a binomial count.
    bound = 5 * (draws * share * (1 - share)) ** 0.5
    assert all(abs(count - draws * share) < bound for count in counts.values())


def test_draws_for_two_neurons_are_independent() -> None:
    """Two layers with the same norms: the same neighbour is drawn in one case of five, not always."""
    draws, same = 1000, 0
    for seed in range(draws):
        candidates = _candidates("ffn", layers=2, rows=20, positions=1, values=3, draw=seed)
        half = len(candidates) // 2
        candidates.table.vectors[1].copy_(candidates.table.vectors[0])
        candidates.coefficient[half:] = candidates.coefficient[:half]
        first, second = _matched(candidates, [4, half + 4])
        same += first == second - half
    share = 1 / NEAREST
    assert abs(same - draws * share) < 5 * (draws * share * (1 - share)) ** 0.5


def test_nothing_is_drawn_for_nothing_or_from_nothing() -> None:
    candidates = _candidates("attention", layers=1, rows=1, positions=3, values=0)
    assert _matched(candidates, []) == []
    # Two dimensions at three positions: choosing each at one position leaves no vector.
    rows = candidates.row.tolist()
    assert _matched(candidates, [rows.index(0), rows.index(1)]) == []
