"""The comparison with the authors' notebooks, proved without their weights.

Below is a second notebook, written from the paper's equations and what is known of the published code: plain
transformers, hooks, loops, and nothing of this package. On small models it prints figures in the layout of
``fixtures/paper/notebooks.json``. The comparison must agree with all of them, and with none that was changed.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import attribution as at
from attribution.claims.about_notebooks import sections
from attribution.claims.about_notebooks.printed import NOT_COMPARED, SECTIONS, figures_of
from attribution.claims.about_notebooks.tolerance import Ranked, largest
from attribution.claims.bench import Workbench
from attribution.claims.judge import Status
from attribution.claims.paper import PAPER_MODELS
from attribution.claims.sample import Sample
from attribution.models.registry import registry
from attribution.prompts.knowledge import Knowledge
from attribution.resources import fixtures_folder

# Tests are not a package, so this folder is on the path only while its module is imported.
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1]))
    from suite import module, verdict_of

AGREES = module("test_published").test_engine_computes_what_the_notebook_printed

Tensor = torch.Tensor

# Numbers of what is printed, small enough for models of a hundred neurons.
TOKENS, HEADS, NEURONS, OTHER_PROMPT_HEADS = 10, 6, 8, 3
VALUE_NEURONS, QUERIED, COUNTED, COUNTED_QUERIES = 10, 6, 20, 15
# Shares of an input that nearly cancels are chance: prompts on which one does are passed over.
AMPLIFICATION = 30


class Notebook:
    """One model and one prompt, as the published notebooks go through them: float32, one number after the other."""

    def __init__(self, folder: Path, prompt: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.network = _network(folder)
        self.prompt = prompt
        self.gpt2 = self.network.config.model_type == "gpt2"
        self.heads = self.network.config.num_attention_heads
        base = self.network.transformer if self.gpt2 else self.network.model
        self.blocks = list(base.h if self.gpt2 else base.layers)
        self.final = base.ln_f if self.gpt2 else base.norm
        self.ids = self.tokenizer(prompt)["input_ids"]
        seen, self.predictions = self._run(self.ids)
        self.inputs, self.attention, self.values, self.coefficients, self.ffn, self.weights, final = seen
        state = final[-1]
        spread = state.var(unbiased=False) + 1e-5 if self.gpt2 else state.pow(2).mean() + 1e-6
        self.scale = spread.sqrt()
        self.token = int(self.predictions.argmax())

    def _run(self, ids: list[int]) -> tuple[Any, Tensor]:
        found: dict[str, list[Tensor]] = {name: [] for name in ("input", "attention", "values", "m", "ffn", "final")}
        hooks = []

        def keep(module: Any, name: str, *, entering: bool) -> None:
            def pre(_: Any, inputs: Any) -> None:
                found[name].append(inputs[0][0].detach().clone())

            def post(_: Any, __: Any, output: Any) -> None:
                found[name].append(output[0].detach().clone())

            hooks.append(module.register_forward_pre_hook(pre) if entering else module.register_forward_hook(post))

        for block in self.blocks:
            attention = block.attn if self.gpt2 else block.self_attn
            keep(block, "input", entering=True)
            keep(attention.c_attn if self.gpt2 else attention.v_proj, "values", entering=False)
            keep(attention.c_proj if self.gpt2 else attention.o_proj, "attention", entering=False)
            down = block.mlp.c_proj if self.gpt2 else block.mlp.down_proj
            keep(down, "m", entering=True)
            keep(down, "ffn", entering=False)
        keep(self.final, "final", entering=True)
        with torch.no_grad():
            output = self.network(torch.tensor([ids]), output_attentions=True)
        for hook in hooks:
            hook.remove()
        values = [self._by_head(each) for each in found["values"]]
        weights = [each[0] for each in output.attentions]
        seen = found["input"], found["attention"], values, found["m"], found["ffn"], weights, found["final"][0]
        return seen, output.logits[0, -1]

    def _by_head(self, projected: Tensor) -> Tensor:
        """(position, head, dimension); heads of a group read the same values."""
        if self.gpt2:
            projected = projected[:, 2 * projected.shape[1] // 3 :]
        dims = self.output_rows(0).shape[0] // self.heads
        split = projected.view(len(projected), -1, dims)
        return split.repeat_interleave(self.heads // split.shape[1], dim=1)

    def output_rows(self, layer: int) -> Tensor:
        block = self.blocks[layer]
        return (block.attn.c_proj.weight if self.gpt2 else block.self_attn.o_proj.weight.T).detach()

    def subvalue(self, layer: int, index: int) -> Tensor:
        mlp = self.blocks[layer].mlp
        return (mlp.c_proj.weight[index] if self.gpt2 else mlp.down_proj.weight[:, index]).detach()

    def output_vector(self, layer: int, head: int, dim: int) -> Tensor:
        dims = self.output_rows(layer).shape[0] // self.heads
        return self.output_rows(layer)[head * dims + dim]

    def attention_key(self, layer: int, head: int, dim: int) -> Tensor:
        dims = self.output_rows(layer).shape[0] // self.heads
        block = self.blocks[layer]
        if self.gpt2:
            width = self.inputs[0].shape[1]
            return block.attn.c_attn.weight[:, 2 * width + head * dims + dim].detach() * block.ln_1.weight.detach()
        rows = block.self_attn.v_proj.weight
        group = self.heads // (rows.shape[0] // dims)
        return rows[head // group * dims + dim].detach() * block.input_layernorm.weight.detach()

    def ffn_key(self, layer: int, index: int) -> Tensor:
        block = self.blocks[layer]
        if self.gpt2:
            return block.mlp.c_fc.weight[:, index].detach() * block.ln_2.weight.detach()
        # Sic: the subvalue.
        return block.mlp.down_proj.weight[:, index].detach() * block.post_attention_layernorm.weight.detach()

    def logits(self, vector: Tensor) -> Tensor:
        centred = vector - vector.mean(-1, keepdim=True) if self.gpt2 else vector
        return (centred / self.scale * self.final.weight.detach()) @ self.network.lm_head.weight.detach().T

    def log_prob(self, vector: Tensor) -> Tensor:
        return torch.log(torch.softmax(self.logits(vector), -1))[..., self.token]

    def increase(self, vector: Tensor, stream: Tensor) -> Tensor:
        return self.log_prob(vector + stream) - self.log_prob(stream)

    def text(self, token: int) -> str:
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        # The Llama tokenizer of the notebooks names bytes.
        return piece if re.fullmatch("<0x..>", piece) else str(self.tokenizer.decode([token]))

    def top(self, logits: Tensor, number: int = TOKENS) -> list[str]:
        return [self.text(token) for token in logits.argsort(descending=True)[:number].tolist()]

    def last(self, logits: Tensor) -> list[str]:
        lowest_last = [self.text(token) for token in logits.argsort(descending=True)[-TOKENS:].tolist()]
        return lowest_last if self.gpt2 else lowest_last[::-1]

    @functools.cached_property
    def ffn_neurons(self) -> list[tuple[str, float]]:
        found = []
        for layer in range(len(self.blocks)):
            middle = self.inputs[layer][-1] + self.attention[layer][-1]
            subvalues = torch.stack([self.subvalue(layer, k) for k in range(self.coefficients[layer].shape[1])])
            scores = self.increase(self.coefficients[layer][-1][:, None] * subvalues, middle)
            found += [(f"{layer}_{index}", score) for index, score in enumerate(scores.tolist())]
        return _falling(found)

    @functools.cached_property
    def attention_neurons(self) -> list[tuple[str, float]]:
        found = []
        for layer in range(len(self.blocks)):
            for position in range(len(self.ids)):
                for head in range(self.heads):
                    taken = self.weights[layer][head, -1, position] * self.values[layer][position, head]
                    rows = torch.stack([self.output_vector(layer, head, dim) for dim in range(len(taken))])
                    scores = self.increase(taken[:, None] * rows, self.inputs[layer][-1]).tolist()
                    found += [(f"{layer}_{head}_{dim}_{position}", score) for dim, score in enumerate(scores)]
        return _falling(found)

    def of_head(self, layer: int, head: int) -> Tensor:
        """What the last position takes of each position through a head, (positions, width)."""
        dims = self.values[layer].shape[-1]
        rows = self.output_rows(layer)[head * dims : (head + 1) * dims]
        return (self.weights[layer][head, -1][:, None] * self.values[layer][:, head]) @ rows

    def components(self, layer: int, position: int, *, ffn: bool) -> Tensor:
        parts = [self.inputs[0][position]]
        for below in range(layer):
            parts += [self.attention[below][position], self.ffn[below][position]]
        if ffn:
            parts.append(self.attention[layer][position])
        return torch.stack(parts)

    def query_layers(self, neurons: Sequence[tuple[str, float]]) -> list[list[float]]:
        totals = [0.0] * (2 * len(self.blocks) + 1)
        for name, score in neurons:
            products = self._products(name)
            for number, share in enumerate((products / products.sum()).tolist()):
                totals[number] += share * score
        return [[place / 2 - 0.5, total] for place, total in _falling(list(enumerate(totals)))]

    def _products(self, name: str) -> Tensor:
        if name.count("_") == 1:
            layer, index = map(int, name.split("_"))
            return self.components(layer, -1, ffn=True) @ self.ffn_key(layer, index)
        layer, head, dim, position = map(int, name.split("_"))
        return self.components(layer, position, ffn=False) @ self.attention_key(layer, head, dim)

    def amplification(self, name: str) -> float:
        products = self._products(name)
        return float(products.abs().sum() / products.sum().abs())

    def query_neurons(self, neurons: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
        totals: dict[str, float] = {}
        for name, score in neurons:
            layer, head, dim, position = map(int, name.split("_"))
            key = self.attention_key(layer, head, dim)
            whole = (self.inputs[layer][position] * key).sum()
            for below in range(layer):
                for index, m in enumerate(self.coefficients[below][position]):
                    share = float((m * self.subvalue(below, index) * key).sum() / whole)
                    totals[f"{below}_{index}"] = totals.get(f"{below}_{index}", 0.0) + share * score
        return _falling(list(totals.items()))

    def vector(self, name: str) -> Tensor:
        numbers = list(map(int, name.split("_")))
        return self.subvalue(*numbers) if len(numbers) == 2 else self.output_vector(*numbers[:3])

    def neurons(self, listed: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
        rows = []
        for name, score in listed:
            logits = self.logits(self.vector(name))
            rows.append({"id": name, "score": round(score, 4), "top": self.top(logits), "last": self.last(logits)})
        return rows

    def printed(self, other: str) -> dict[str, Any]:
        """Everything that the published notebooks print; ``other`` is another prompt."""
        layers = range(len(self.blocks))
        attention = [float(self.increase(self.attention[n][-1], self.inputs[n][-1])) for n in layers]
        ffn = [float(self.increase(self.ffn[n][-1], self.inputs[n][-1] + self.attention[n][-1])) for n in layers]
        attention, ffn = [round(each, 3) for each in attention], [round(each, 3) for each in ffn]
        heads = [
            [f"{n}_{head}", round(float(self.increase(self.of_head(n, head).sum(0), self.inputs[n][-1])), 4)]
            for n in layers
            for head in range(self.heads)
        ]
        heads = _falling(heads)
        # One above the first layer, so that what is below it has parts.
        layer, head = next(map(int, name.split("_")) for name, _ in heads if not name.startswith("0_"))
        layer, head = int(layer), int(head)
        written = self.of_head(layer, head)
        positions = _falling(list(enumerate(self.increase(written, self.inputs[layer][-1]).tolist())))
        weights, _ = self._run(self.tokenizer(other)["input_ids"])
        other_ids = self.tokenizer(other)["input_ids"]
        value, query = self.attention_neurons, self.query_neurons(self.attention_neurons[:QUERIED])
        both = {name for name, _ in self.ffn_neurons[:COUNTED]} & {name for name, _ in query[:COUNTED_QUERIES]}
        only = {name for name, _ in query[:COUNTED_QUERIES]} - both
        one = next(name for name, _ in value if _layer(name) > 0)
        of_one = self.query_neurons([(one, value[QUERIED - 1][1])])
        through = of_one[0][0]
        read = self._through_head(through, one)
        query_of_ffn = self.query_layers(self.ffn_neurons[:VALUE_NEURONS])
        query_of_attention = self.query_layers(value[:VALUE_NEURONS])
        return {
            "notebook": "test_published.py",
            "last_order": "lowest last" if self.gpt2 else "lowest first",
            "leading_space": "kept" if self.gpt2 else "dropped",
            "prediction": {
                "cell": 4,
                "sentence": self.prompt,
                "tokens": [self.text(token) for token in self.ids],
                "top": self.top(self.predictions),
                "analysed": {"id": self.token, "text": self.text(self.token)},
            },
            "layers": {
                "cell": 5,
                "decimals": 3,
                "attention": attention,
                "ffn": ffn,
                "attention_sum": round(sum(attention), 3),
                "ffn_sum": round(sum(ffn), 3),
                "total": round(sum(attention) + sum(ffn), 3),
            },
            "heads": {"cell": 6, "decimals": 4, "rounded_before_sorting": True, "scores": heads[:HEADS]},
            "head_by_position": {
                "cell": 7,
                "decimals": 4,
                "head": f"{layer}_{head}",
                "positions": [
                    {
                        "position": position,
                        "token": self.text(self.ids[position]),
                        "score": round(score, 4),
                        "attention_weight": round(float(self.weights[layer][head, -1, position]), 4),
                        "layer_input": self.top(self.logits(self.inputs[layer][position]), 2 * TOKENS),
                        "attention_outputs": self.top(
                            self.logits(sum(self.attention[below][position] for below in range(layer))), 2 * TOKENS
                        ),
                        "head_output": self.top(self.logits(written[position])),
                    }
                    for position, score in positions
                ],
            },
            "attention_weights": {
                "cell": 8,
                "decimals": 5,
                "sentence": other,
                "tokens": [self.text(token) for token in other_ids],
                "causal": True,
                "heads": {
                    name: [
                        round(weight, 5) for weight in weights[5][_layer(name)][int(name.split("_")[1]), -1].tolist()
                    ]
                    for name, _ in heads[:OTHER_PROMPT_HEADS]
                },
            },
            "ffn_value_neurons": {"cell": 9, "decimals": 4, "neurons": self.neurons(self.ffn_neurons[:NEURONS])},
            "attention_value_neurons": {"cell": 11, "decimals": 4, "neurons": self.neurons(value[:NEURONS])},
            "query_layers_of_ffn_neurons": {
                "cell": 13,
                "decimals": 4,
                "value_neurons": VALUE_NEURONS,
                "subkey": "up" if self.gpt2 else "down",
                "scores": [[place, round(score, 4)] for place, score in query_of_ffn],
                "sum": round(sum(round(score, 4) for _, score in query_of_ffn), 4),
            },
            "query_layers_of_attention_neurons": {
                "cell": 14,
                "decimals": 6,
                "value_neurons": VALUE_NEURONS,
                "mean_layer": round(sum(_layer(name) for name, _ in value[:VALUE_NEURONS]) / VALUE_NEURONS, 4),
                "mean_layer_decimals": 4,
                "scores": [[place, round(score, 6)] for place, score in query_of_attention[:5]],
            },
            "query_neurons": {
                "cell": 15,
                "printed_by_cell": 16,
                "decimals": 4,
                "value_neurons": QUERIED,
                "neurons": self.neurons(query[:NEURONS]),
            },
            "counts_by_layer": {
                "cells": [10, 12, 17],
                "value_neurons": COUNTED,
                "query_neurons": COUNTED_QUERIES,
                "value_neurons_of_query": QUERIED,
                "remark": "",
                "ffn_value": _by_layer(name for name, _ in self.ffn_neurons[:COUNTED]),
                "attention_value": _by_layer(name for name, _ in value[:COUNTED]),
                "query_only": _by_layer(only),
                "query_and_value": _by_layer(both),
            },
            "query_neurons_of_one_neuron": {
                "cell": 18,
                "decimals": 4,
                "attention_neuron": one,
                "multiplier_rank": QUERIED,
                "remark": "",
                "neurons": self.neurons(of_one[:NEURONS]),
            },
            "neuron_through_head": {
                "cell": 19,
                "ffn_neuron": through,
                "head": "_".join(one.split("_")[:2]),
                "top": self.top(self.logits(read)),
                "last": self.last(self.logits(read)),
            },
        }

    def _through_head(self, ffn_neuron: str, attention_neuron: str) -> Tensor:
        layer, head = map(int, attention_neuron.split("_")[:2])
        block = self.blocks[layer]
        with torch.no_grad():
            normed = (block.ln_1 if self.gpt2 else block.input_layernorm)(self.vector(ffn_neuron))
            projected = (block.attn.c_attn if self.gpt2 else block.self_attn.v_proj)(normed[None])
        dims = self.values[layer].shape[-1]
        return self._by_head(projected)[0, head] @ self.output_rows(layer)[head * dims : (head + 1) * dims]


@functools.cache
def _network(folder: Path) -> Any:
    network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return network.eval()


def _falling(pairs: list[Any]) -> list[Any]:
    return sorted(pairs, key=lambda pair: pair[1])[::-1]


def _layer(name: str) -> int:
    return int(name.split("_")[0])


def _by_layer(names: Any) -> dict[str, int]:
    return {str(layer): count for layer, count in sorted(Counter(_layer(name) for name in names).items())}


WORDS = ["The", "capital", "of", "France", "Italy", "is", "number", "legs", "that", "a", "dog", "has", "ripe"]


def _suitable(notebook: Notebook) -> bool:
    """Whether the first prediction can be given as an answer, and no value neuron's input nearly cancels."""
    ids = notebook.tokenizer(f"{notebook.prompt} {notebook.text(notebook.token).lstrip()}")["input_ids"]
    named = [*notebook.ffn_neurons[:VALUE_NEURONS], *notebook.attention_neurons[:VALUE_NEURONS]]
    return (
        ids == [*notebook.ids, notebook.token]
        and notebook.text(notebook.token).strip() != ""
        and max(notebook.amplification(name) for name, _ in named) < AMPLIFICATION
        and notebook.query_neurons(notebook.attention_neurons[:1]) != []
    )


# Random models; the ungrouped Llama has keys and values for each head, as Llama-7B has.
MODELS = ("gpt2", "llama", "llama-ungrouped", "bundled:gpt2", "bundled:llama")


def _ungrouped(folder: Path, target: Path) -> Path:
    """A Llama whose heads have keys and values of their own, as Llama-7B's."""
    config = AutoConfig.from_pretrained(folder)
    config.num_key_value_heads = config.num_attention_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 1:
                    parameter.uniform_(0.5, 1.5)
    network.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


Printed = tuple[Workbench, dict[str, Any]]


@pytest.fixture(scope="module")
def printed(make_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Printed]:
    """A model with what the notebook above prints for it, by name."""

    @functools.cache
    def of(name: str) -> Printed:
        if name.startswith("bundled:"):
            folder = registry()[name].folder
            prompts: Any = [f"The capital of {country} is" for country in ("France", "Italy", "Spain")]
        else:
            grouped = make_folder(name.removesuffix("-ungrouped"))
            folder = grouped if "-" not in name else _ungrouped(grouped, tmp_path_factory.mktemp("ungrouped"))
            prompts = (" ".join(words) for words in itertools.permutations(WORDS, 4))
        notebook = next(filter(_suitable, (Notebook(folder, prompt) for prompt in prompts)))
        model = at.load(name if name.startswith("bundled:") else str(folder))
        return Workbench(Sample(model, Knowledge((), {}))), notebook.printed("A ripe cherry is red")

    return of


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest, printed: Callable[[str], Printed]) -> Printed:
    return printed(request.param)


@pytest.mark.parametrize("section", SECTIONS)
def test_all_that_an_independent_notebook_prints_is_what_the_engine_computes(pair: Printed, section: str) -> None:
    bench, figures = pair
    differences = sections.Comparison.of(bench, figures).differences(section)
    assert differences
    assert largest(differences).size <= 1, largest(differences)


def test_what_float32_does_to_a_score_is_within_the_allowance_for_it(pair: Printed) -> None:
    """Without the half unit of the last printed digit, which alone would hide a small error."""
    bench, figures = pair
    recount = sections.Comparison.of(bench, figures).recount
    folder = registry()[bench.model.name].folder if bench.model.name in registry() else Path(bench.model.name)
    notebook = Notebook(folder, figures["prediction"]["sentence"])
    for unit, raw in (("ffn", notebook.ffn_neurons), ("attention", notebook.attention_neurons)):
        ranked = recount.ranked(unit)
        names = ["_".join(map(str, vars(record).values())) for record in ranked.items]
        gaps = (torch.tensor([dict(raw)[name] for name in names], dtype=torch.float64) - ranked.scores).abs()
        assert 0 < float(gaps.max()) <= recount.rounding.nats


# Every figure is changed, one at a time.

Path_ = tuple[Any, ...]


def _leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(part, (*path, key))
    else:
        yield path, value


def _compared(path: Path_) -> bool:
    """Whether a leaf of a section is a figure; ``path`` starts below the section."""
    return not set(path) & set(NOT_COMPARED)


def _pattern(path: Path_) -> Path_:
    """A path with one sign for whatever numbers an entry: places in lists, heads, layers."""
    return tuple("*" if isinstance(key, int) or re.fullmatch(r"[\d_]+", key) else key for key in path)


def _at(figures: Any, path: Path_) -> Any:
    return functools.reduce(lambda part, key: part[key], path, figures)


def _put(figures: Any, path: Path_, value: Any) -> Any:
    changed = copy.deepcopy(figures)
    _at(changed, path[:-1])[path[-1]] = value
    return changed


def _other(figures: dict[str, Any], section: str, path: Path_, value: Any, texts: Sequence[str]) -> Any:
    """Return a figure changed by as little as must be seen."""
    if isinstance(value, float):
        decimals = figures[section]["mean_layer_decimals" if path == ("mean_layer",) else "decimals"]
        # Cell 14 printed a sixth decimal, which is beyond what float32 leaves of a query score.
        return value + 3 * 10.0 ** -min(decimals, 5)
    if isinstance(value, int):
        return value + 1
    if re.fullmatch(r"\d+(_\d+)+", value):
        *first, last = value.split("_")
        return "_".join([*first, str(int(last) + 1 if last == "0" else int(last) - 1)])
    around = _at(figures[section], path[:-1])
    taken = set(around) if isinstance(around, list) else {value}
    return next(text for text in texts if text not in taken and text.strip())


def _chosen(figures: dict[str, Any], section: str) -> list[tuple[Path_, Any]]:
    """The first and the last figure of each kind."""
    kinds: dict[Path_, list[tuple[Path_, Any]]] = {}
    for path, value in _leaves(figures[section]):
        if _compared(path):
            kinds.setdefault(_pattern(path), []).append((path, value))
    return [each for found in kinds.values() for each in {found[0][0]: found[0], found[-1][0]: found[-1]}.values()]


@pytest.mark.parametrize("section", SECTIONS)
def test_no_figure_that_is_changed_agrees(pair: Printed, section: str) -> None:
    bench, figures = pair
    comparison = sections.Comparison.of(bench, figures)
    texts = sorted(comparison.recount.vocabulary.ids)
    unseen = []
    for path, value in _chosen(figures, section):
        other = _other(figures, section, path, value, texts)
        changed = _put(figures, (section, *path), other)
        if largest(sections.Comparison(comparison.recount, changed).differences(section)).size <= 1:
            unseen.append((path, value, other))
    assert not unseen


@pytest.mark.parametrize("section", [each for each in SECTIONS if each not in ("prediction", "counts_by_layer")])
def test_no_two_figures_that_changed_places_agree(pair: Printed, section: str) -> None:
    bench, figures = pair
    comparison = sections.Comparison.of(bench, figures)
    lists = {
        path[:cut]: _at(figures[section], path[:cut])
        for path, _ in _leaves(figures[section])
        for cut in range(1, len(path))
        if isinstance(_at(figures[section], path[:cut]), list) and _compared(path)
    }
    unseen, swapped = [], 0
    for path, entries in lists.items():
        pair_of_a_score = len(entries) == 2 and isinstance(entries[0], str | float) and isinstance(entries[1], float)
        # Several tokens may look alike.
        if len(entries) < 2 or pair_of_a_score or entries[0] == entries[-1]:
            continue
        swapped += 1
        changed = _put(figures, (section, *path), [entries[-1], *entries[1:-1], entries[0]])
        if largest(sections.Comparison(comparison.recount, changed).differences(section)).size <= 1:
            unseen.append(path)
    assert swapped
    assert not unseen


@pytest.mark.parametrize("name", ["ffn_value", "attention_value", "query_only", "query_and_value"])
def test_a_neuron_that_is_counted_in_another_layer_is_seen(printed: Callable[[str], Printed], name: str) -> None:
    bench, figures = printed("bundled:gpt2")
    recount = sections.Comparison.of(bench, figures).recount
    changed = copy.deepcopy(figures)
    counts = changed["counts_by_layer"][name]
    fullest = max(counts, key=counts.__getitem__)
    emptiest = min(map(str, range(8)), key=lambda layer: counts.get(layer, 0))
    counts[fullest] -= 1
    counts[emptiest] = counts.get(emptiest, 0) + 1
    found = largest(sections.Comparison(recount, changed).differences("counts_by_layer"))
    assert 1 < found.size < math.inf
    assert found.what.startswith(f"{name} in layer")


def test_neighbours_swap_within_their_errors_and_not_beyond() -> None:
    ranked = Ranked("abcd", torch.tensor([4.0, 3.0, 2.9, 1.0]).double(), torch.tensor([0.2, 0.2, 0.2, 0.2]).double())
    assert largest(ranked.order("", "abc")).size == 0
    # What is left out at the end is the smaller one of two that may be equal.
    assert 0 < largest(ranked.order("", "ac")).size <= 1
    assert largest(ranked.order("", "ba")).size > 1
    assert largest(ranked.order("", "abd")).size > 1
    assert largest(ranked.order("", "aa")).size == math.inf
    assert largest(ranked.order("", "az")).size == math.inf
    assert ranked.members(1) == ({"a"}, {"a"})
    assert ranked.members(2) == ({"a"}, {"a", "b", "c"})
    assert ranked.members(4) == ({*"abcd"}, {*"abcd"})


def test_a_nan_is_no_agreement() -> None:
    bad = sections.Difference("a figure", math.nan)
    assert largest([sections.Difference("another", 3.0), bad]) is bad


def _named(bench: Workbench, name: str) -> Workbench:
    """The same model under a registered name."""
    model = copy.copy(bench.model)
    object.__setattr__(model, "name", name)
    return Workbench(Sample(model, bench.sample.knowledge))


@pytest.mark.parametrize(("ours", "name"), [("gpt2", "gpt2-large"), ("llama-ungrouped", "llama-7b")])
def test_a_section_is_one_claim_that_can_be_refuted(
    printed: Callable[[str], Printed], monkeypatch: pytest.MonkeyPatch, ours: str, name: str
) -> None:
    bench, figures = printed(ours)
    bench = _named(bench, name)
    monkeypatch.setattr(sections, "figures_of", lambda model: {name: figures}[model])
    verdict = verdict_of(AGREES, bench, section="heads")
    assert (verdict.status, verdict.claim.source) == (Status.SUPPORTED, "notebook cell 6")
    assert verdict.claim.asserted
    assert not verdict.claim.gated
    assert verdict_of(AGREES, bench, section="counts_by_layer").claim.source == "notebook cells 10, 12, 17"
    figures = _put(figures, ("heads", "scores", 0, 1), figures["heads"]["scores"][0][1] + 3e-4)
    verdict = verdict_of(AGREES, bench, section="heads")
    assert verdict.status is Status.REFUTED
    assert "score of head" in verdict.note


def test_a_model_without_a_notebook_is_an_error(printed: Callable[[str], Printed]) -> None:
    bench, _ = printed("gpt2")
    with pytest.raises(at.AttributionError, match="no notebook printed 'heads' for the model"):
        verdict_of(AGREES, bench, section="heads")


# The published figures themselves.

SIZES = {"gpt2-large": (36, 20, 64, 5120, 50257), "llama-7b": (32, 32, 128, 11008, 32000)}


@pytest.fixture(params=list(PAPER_MODELS))
def published(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param, figures_of(request.param)


def test_every_key_of_the_file_is_compared_or_listed_with_a_reason(
    published: tuple[str, dict[str, Any]], printed: Callable[[str], Printed]
) -> None:
    """What is compared is what the tests above change, one figure of each kind at a time."""
    name, figures = published
    small = [printed(each)[1] for each in MODELS if ("gpt2" in each) is ("gpt2" in name)]
    changed = {(part, *_pattern(path)) for each in small for part in SECTIONS for path, _ in _chosen(each, part)}
    assert set(figures) - set(SECTIONS) <= set(NOT_COMPARED)
    kinds = {
        (section, *_pattern(path)) for section in SECTIONS for path, _ in _leaves(figures[section]) if _compared(path)
    }
    assert kinds == changed
    assert all(NOT_COMPARED.values())
    text = (fixtures_folder("paper") / "notebooks.json").read_text(encoding="utf-8")
    assert set(json.loads(text)) == {"source", "conventions", *PAPER_MODELS}
    # Nothing is listed that the file does not have.
    used = {key for model in PAPER_MODELS for path, _ in _leaves(figures_of(model)) for key in path}
    assert set(NOT_COMPARED) <= used | {"source", "conventions"}


def _units(decimals: int, number: int) -> float:
    """Half a unit for each of so many rounded numbers."""
    return 0.5 * 10.0**-decimals * number + 1e-9


def test_published_sums_add_up(published: tuple[str, dict[str, Any]]) -> None:
    _, figures = published
    layers = figures["layers"]
    for kind in ("attention", "ffn"):
        assert layers[f"{kind}_sum"] == pytest.approx(sum(layers[kind]), abs=1e-9)
    assert layers["total"] == pytest.approx(layers["attention_sum"] + layers["ffn_sum"], abs=1e-9)
    query = figures["query_layers_of_ffn_neurons"]
    assert query["sum"] == pytest.approx(sum(score for _, score in query["scores"]), abs=1e-9)
    # It is the sum of all value neurons' importance, of which the first ten were printed, the largest.
    top = [row["score"] for row in figures["ffn_value_neurons"]["neurons"]]
    assert sum(top) < query["sum"] < sum(top) + (query["value_neurons"] - len(top)) * top[-1]
    counts = figures["counts_by_layer"]
    for name in ("ffn_value", "attention_value"):
        assert sum(counts[name].values()) == counts["value_neurons"]
    assert sum(counts["query_only"].values()) + sum(counts["query_and_value"].values()) == counts["query_neurons"]


def test_published_total_is_that_of_an_answer_raised_from_chance_to_near_certainty(
    published: tuple[str, dict[str, Any]],
) -> None:
    """The layers telescope: log p of the final state less log p of the embedding, which is about 1 / vocabulary."""
    name, figures = published
    total = figures["layers"]["total"]
    assert 0 < math.log(SIZES[name][-1]) - total < 1


def test_published_attention_weights_add_up_to_one(published: tuple[str, dict[str, Any]]) -> None:
    _, figures = published
    weights = figures["attention_weights"]
    for row in weights["heads"].values():
        assert len(row) == len(weights["tokens"])
        assert sum(row) == pytest.approx(1, abs=_units(5, len(row)))
    by_position = figures["head_by_position"]
    rows = by_position["positions"]
    assert sum(row["attention_weight"] for row in rows) == pytest.approx(1, abs=_units(4, len(rows)))
    if weights["sentence"] == figures["prediction"]["sentence"]:
        same_head = weights["heads"][by_position["head"]]
        for row in rows:
            assert row["attention_weight"] == pytest.approx(same_head[row["position"]], abs=_units(4, 1) + _units(5, 1))


def _lists(figures: dict[str, Any]) -> dict[str, list[tuple[Any, float]]]:
    """Every list with scores, by section."""
    found = {}
    for section in SECTIONS:
        part = figures[section]
        if "neurons" in part:
            found[section] = [(row["id"], row["score"]) for row in part["neurons"]]
        elif "positions" in part:
            found[section] = [(row["position"], row["score"]) for row in part["positions"]]
        elif "scores" in part:
            found[section] = [(name, score) for name, score in part["scores"]]
    return found


def test_published_lists_fall_and_name_what_there_is(published: tuple[str, dict[str, Any]]) -> None:
    name, figures = published
    layers, heads, dims, ffn, _ = SIZES[name]
    length = len(figures["prediction"]["tokens"])
    limits = {2: (layers, ffn), 4: (layers, heads, dims, length)}
    lists = _lists(figures)
    assert len(lists) == 8
    for section, entries in lists.items():
        scores = [score for _, score in entries]
        assert scores == sorted(scores, reverse=True), section
        assert len({item for item, _ in entries}) == len(entries), section
        decimals = figures[section]["decimals"]
        assert all(round(score, decimals) == score for score in scores), section
        if "neurons" in figures[section]:
            for item, _ in entries:
                numbers = list(map(int, item.split("_")))
                assert all(number < limit for number, limit in zip(numbers, limits[len(numbers)], strict=True)), item
    for head, _ in lists["heads"]:
        layer, number = map(int, head.split("_"))
        assert layer < layers
        assert number < heads
    indices = {place for place, _ in lists["query_layers_of_ffn_neurons"]}
    assert indices == {number / 2 - 0.5 for number in range(2 * layers + 1)}
    assert {position for position, _ in lists["head_by_position"]} == set(range(length))
    assert [len(figures["layers"][kind]) for kind in ("attention", "ffn")] == [layers, layers]


def test_published_sections_agree_with_each_other(published: tuple[str, dict[str, Any]]) -> None:
    _, figures = published
    prediction = figures["prediction"]
    assert prediction["top"][0] == prediction["analysed"]["text"]
    by_position = figures["head_by_position"]
    assert all(prediction["tokens"][row["position"]] == row["token"] for row in by_position["positions"])
    assert by_position["head"] in dict(figures["heads"]["scores"])
    # A neuron that several cells print has the same tokens in each.
    tokens: dict[str, tuple[list[str], list[str]]] = {}
    repeated = 0
    for section in SECTIONS:
        for row in figures[section].get("neurons", []):
            repeated += row["id"] in tokens
            assert tokens.setdefault(row["id"], (row["top"], row["last"])) == (row["top"], row["last"]), row["id"]
    assert repeated >= 5
    # Of the value neurons that are counted by layer, these are the first.
    for unit in ("ffn", "attention"):
        listed = _by_layer(row["id"] for row in figures[f"{unit}_value_neurons"]["neurons"])
        counts = figures["counts_by_layer"][f"{unit}_value"]
        assert all(counts[layer] >= number for layer, number in listed.items())
    query = figures["query_layers_of_attention_neurons"]
    first = figures["attention_value_neurons"]["neurons"][: query["value_neurons"]]
    if len(first) == query["value_neurons"]:
        mean = sum(_layer(row["id"]) for row in first) / len(first)
        assert query["mean_layer"] == round(mean, query["mean_layer_decimals"])
    one, through = figures["query_neurons_of_one_neuron"], figures["neuron_through_head"]
    assert one["attention_neuron"] in {row["id"] for row in figures["attention_value_neurons"]["neurons"]}
    assert one["attention_neuron"].startswith(f"{through['head']}_")
    assert through["ffn_neuron"] in {row["id"] for row in one["neurons"]}


def _gpt2_tokenizer() -> Path:
    default = Path(__file__).resolve().parents[3] / "shared" / "gpt2-tokenizer"
    return Path(os.environ.get("GPT2_TOKENIZER", default))


@pytest.mark.skipif(
    not _gpt2_tokenizer().is_dir(),
    reason="the real GPT-2 tokenizer is not part of this project; name its folder in GPT2_TOKENIZER",
)
def test_published_gpt2_tokens_are_those_of_the_real_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(_gpt2_tokenizer())
    figures = figures_of("gpt2-large")
    prediction, weights = figures["prediction"], figures["attention_weights"]
    for part in (prediction, weights):
        assert [tokenizer.decode([token]) for token in tokenizer.encode(part["sentence"])] == part["tokens"]
    assert tokenizer.decode([prediction["analysed"]["id"]]) == prediction["analysed"]["text"]
    alone = {tokenizer.decode([token]) for token in range(SIZES["gpt2-large"][-1])}
    names = {"top", "last", "layer_input", "attention_outputs", "head_output", "tokens"}
    printed = [value for path, value in _leaves(figures) if names & set(path) and isinstance(value, str)]
    assert len(printed) > 1000
    assert not [text for text in printed if text not in alone]
