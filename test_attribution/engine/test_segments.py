"""Passes over the unembedding by segments: no result depends on how many threads there are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from attribution.engine.base import base_of
from attribution.engine.importance import Candidates, Streams
from attribution.engine.in_float64 import increases
from attribution.engine.methods import method_named
from attribution.engine.moments import moments_of
from attribution.engine.ranks import counted
from attribution.engine.search import Together
from attribution.engine.segments import chunks_of, each_segment, segments_of
from attribution.engine.vectors import VectorTable
from attribution.models.anatomy import Readout
from attribution.models.norms import Norm
from attribution.records import Layer

TOKENS, WIDTH, ROWS = 3000, 16, 40


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _prompts() -> list[Candidates]:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    readout = Readout(numbers(TOKENS, WIDTH).float(), None, Norm(numbers(WIDTH).float(), None, 1e-5, True), 1.0, None)
    sublayers = (Layer(0, "ffn"), Layer(1, "ffn"))
    table = VectorTable("ffn", sublayers, [numbers(ROWS, WIDTH).float() for _ in sublayers], (None, None), readout, 1)
    index, sublayer_index, row, position = table.indices(1)
    return [
        Candidates(
            table,
            index,
            sublayer_index,
            row,
            position,
            numbers(len(index)),
            Streams(numbers(2, WIDTH), torch.tensor(1.3, dtype=torch.float64), readout),
            answer,
            len(index),
            seed=0,
        )
        for answer in (5, 2900)
    ]


def _everything() -> list[torch.Tensor]:
    """Whatever is computed by segments."""
    prompts = _prompts()
    table, method = prompts[0].table, method_named("log_prob_increase", "ffn")
    assert method.rising is not None
    base = base_of(prompts, [0, 1], uniform=False)
    moments = moments_of(table.vectors[0], table.readout.unembedding, base.probs)
    found = [base.probs, base.means, base.log_probs, moments.powers, moments.largest]
    for each in Together(prompts).best(method, method.rising, 5):
        found += [each.indices, each.scores]
    for (pair,) in increases([[each] for each in prompts]):
        found += pair
    reach = torch.full((ROWS,), 1e-5, dtype=torch.float64)
    return [*found, counted(table.every(0), 7, table.readout, torch.float32, reach)]


def test_results_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    torch.set_num_threads(1)
    alone = _everything()
    torch.set_num_threads(3)
    for one, other in zip(alone, _everything(), strict=True):
        assert torch.equal(one, other)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("tokens", [1, 511, 512, 513, 50_257, 262_144])
def test_segments_cover_every_token_once(tokens: int) -> None:
    unembedding = torch.empty(tokens, 1)
    covered = [token for segment in segments_of(unembedding) for token in range(tokens)[segment]]
    assert covered == list(range(tokens))
    assert each_segment(unembedding, lambda segment: segment) == segments_of(unembedding)
    assert [part.stop - part.start for part in chunks_of(slice(3, 20), 8)] == [8, 8, 1]


def test_what_fails_in_a_thread_fails_here(threads: None) -> None:
    torch.set_num_threads(2)

    def work(segment: slice) -> None:
        raise ValueError(f"at {segment.start}")

    with pytest.raises(ValueError, match="at "):
        each_segment(torch.empty(TOKENS, 1), work)
    assert torch.get_num_threads() == 2


def test_no_graph_is_kept_of_what_threads_do(threads: None) -> None:
    torch.set_num_threads(2)
    weight = torch.ones(TOKENS, 1, requires_grad=True)
    assert not any(each.requires_grad for each in each_segment(weight, lambda segment: weight[segment].sum()))
