"""Ablating is setting value vectors to zero in the weights, or coefficients to what they are elsewhere; nothing more.

Every kind is compared with plain transformers: copies whose weights are edited, and forward hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import attribution as at
from attribution.engine.ablation import Donors, reference_of
from attribution.engine.masks import AblationKind, ablation_masks
from attribution.engine.questions import ids_of
from attribution.engine.trace import Edits, rerun
from attribution.engine.vectors import vector_table
from attribution.errors import BadInputError
from attribution.experiments.edited_copies import zeroed_parameters
from attribution.models.anatomy import resolve
from attribution.prompts.tokens import pad

PROMPT = "The capital of France is"
# As long as the prompt, and ending in the same token.
TWIN = "The capital of Italy is"
LONGER = "The number of legs that a dog has is"
SHORTER = "A ripe"
FFN = [at.FFNNeuron(0, 5), at.FFNNeuron(1, 0), at.FFNNeuron(2, 47)]
ATTENTION = [at.AttentionNeuron(0, 3, 7, 0), at.AttentionNeuron(1, 2, 1, 4), at.AttentionNeuron(2, 0, 0, 1)]
HEADS = [at.Head(0, 3), at.Head(2, 1)]
LAYERS = [at.Layer(0, "ffn"), at.Layer(1, "attention")]
MIXED = [*FFN[:2], *ATTENTION[1:], at.Head(0, 1), at.Layer(1, "ffn")]
SETS = {"ffn": FFN, "attention": ATTENTION, "heads": HEADS, "layers": LAYERS, "mixed": MIXED}
KINDS = [kind.value for kind in AblationKind]
REFERENCE = [LONGER, SHORTER, TWIN]

PlainLogits = Callable[..., Tensor]


@pytest.fixture(scope="module")
def make_plain(make_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """Load a fresh copy of a tiny model in plain transformers, for a test to edit."""

    def make(architecture: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(make_folder(architecture), attn_implementation="eager").eval()

    return make


def _tolerance(model: at.Model, logits: Tensor) -> float:
    """What float32 rounding may come to: n additions of numbers no larger than the logits, each off by eps.

    n counts every sum on the longest path: per block the values, mixed values, FFN input and neurons, and last the
    unembedding.
    """
    anatomy = model.anatomy
    per_block = 2 * anatomy.width + anatomy.heads * anatomy.head_dim + anatomy.ffn_neurons
    terms = anatomy.layers * per_block + anatomy.width
    return terms * torch.finfo(torch.float32).eps * float(logits.abs().max())


def _assert_same(model: at.Model, logits: Tensor, expected: Tensor) -> None:
    assert (logits - expected).abs().max() <= _tolerance(model, expected)


def _assert_differ(model: at.Model, logits: Tensor, other: Tensor) -> None:
    """An edit without effect would prove nothing, nor would one that rounding could explain."""
    assert (logits - other).abs().max() > 10 * _tolerance(model, other)


def _ids(model: at.Model, text: str) -> list[int]:
    return ids_of(model, text)


def _rows_of(module: nn.Module) -> Tensor:
    """A projection's weight as (input, output), a view. nn.Linear stores (output, input), GPT-2's Conv1D this."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, nn.Linear) else weight


def _columns(model: at.Model, neurons: Sequence[Any], layer: int, sublayer: str) -> list[int]:
    """Inputs of a layer's output projection that records stand for, from the records alone."""
    columns: set[int] = set()
    head_dim = model.anatomy.head_dim
    for neuron in neurons:
        if neuron.layer != layer:
            continue
        if isinstance(neuron, at.FFNNeuron) and sublayer == "ffn":
            columns.add(neuron.index)
        if isinstance(neuron, at.AttentionNeuron) and sublayer == "attention":
            columns.add(neuron.head * head_dim + neuron.dim)
        if isinstance(neuron, at.Head) and sublayer == "attention":
            columns.update(range(neuron.head * head_dim, (neuron.head + 1) * head_dim))
        if isinstance(neuron, at.Layer) and neuron.kind == sublayer:
            sizes = {"ffn": model.anatomy.ffn_neurons, "attention": model.anatomy.heads * head_dim}
            columns.update(range(sizes[sublayer]))
    return sorted(columns)


def _projections(model: at.Model, network: Any) -> Iterator[tuple[int, str, nn.Module]]:
    """Every output projection of a plain network."""
    family = model.anatomy.family
    for layer, block in enumerate(resolve(network, family.blocks)):
        yield layer, "attention", resolve(block, family.attention_out)
        yield layer, "ffn", resolve(block, family.ffn_out)


def _with_zeroed_rows(model: at.Model, plain: Any, neurons: Sequence[Any]) -> Any:
    """Copy a plain network and set the neurons' value vectors to zero there."""
    edited = copy.deepcopy(plain)
    for layer, sublayer, projection in _projections(model, edited):
        _rows_of(projection)[_columns(model, neurons, layer, sublayer)] = 0
    return edited


def _run(network: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
    return logits


@contextmanager
def _hooks(model: at.Model, network: Any, visit: Callable[[int, str, Tensor], Tensor | None]) -> Iterator[None]:
    """Show the input of every output projection, (positions, features), to a function that may return another."""

    def hook(layer: int, sublayer: str) -> Callable[..., Any]:
        def pre(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            found = visit(layer, sublayer, inputs[0].reshape(-1, inputs[0].shape[-1]))
            return None if found is None else (found.reshape(inputs[0].shape), *inputs[1:])

        return pre

    with ExitStack() as stack:
        for layer, sublayer, projection in _projections(model, network):
            stack.enter_context(projection.register_forward_pre_hook(hook(layer, sublayer)))
        yield


def _inputs(model: at.Model, network: Any, text: str) -> dict[tuple[int, str], Tensor]:
    """Coefficients and mixed values of a prompt by plain hooks, each (positions, features)."""
    seen: dict[tuple[int, str], Tensor] = {}
    with _hooks(model, network, lambda layer, sublayer, entered: seen.update({(layer, sublayer): entered.clone()})):
        _run(network, _ids(model, text))
    return seen


def _replaced(
    model: at.Model, network: Any, text: str, neurons: Sequence[Any], values: Mapping[tuple[int, str], Tensor]
) -> Tensor:
    """Logits of a plain network whose hooks put values, (features,) or (positions, features), in neurons' place."""

    def visit(layer: int, sublayer: str, entered: Tensor) -> Tensor:
        columns = _columns(model, neurons, layer, sublayer)
        entered = entered.clone()
        entered[:, columns] = values[layer, sublayer].expand_as(entered)[:, columns].to(entered.dtype)
        return entered

    with _hooks(model, network, visit):
        return _run(network, _ids(model, text))


def _values(model: at.Model, network: Any, kind: str, reference: Sequence[str]) -> dict[tuple[int, str], Tensor]:
    """What a kind of ablation puts in place of PROMPT's coefficients; for "resample" from the only donor."""
    length = len(_ids(model, PROMPT))
    if kind == "zero":
        return {key: torch.zeros(()) for key in _inputs(model, network, PROMPT)}
    if kind == "mean":
        inputs = [_inputs(model, network, text) for text in reference]
        return {key: torch.cat([each[key] for each in inputs]).double().mean(0) for key in inputs[0]}
    (donor,) = reference
    inputs_of_donor = _inputs(model, network, donor)
    from_end = [max(0, position) for position in range(len(_ids(model, donor)) - length, len(_ids(model, donor)))]
    return {key: each[from_end] for key, each in inputs_of_donor.items()}


def _options(kind: str, reference: Sequence[str] = REFERENCE) -> dict[str, Any]:
    return {"kind": kind} if kind == "zero" else {"kind": kind, "reference": list(reference)}


# The empty edit, and edits that stay where they belong


@pytest.mark.parametrize("prompt", [PROMPT, LONGER])
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_edit_reproduces_the_logits_bit_for_bit(
    model: at.Model, plain_logits: PlainLogits, prompt: str, kind: str
) -> None:
    assert torch.equal(at.ablate(model, prompt, [], **_options(kind)), plain_logits(prompt))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_neurons_is_untouched_by_its_neighbours_edit(
    model: at.Model, plain_logits: PlainLogits, kind: str
) -> None:
    rows = at.ablate(model, [PROMPT, PROMPT], [MIXED, []], **_options(kind))
    _assert_same(model, rows[1], plain_logits(PROMPT))
    _assert_differ(model, rows[0], rows[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_different_edits_equals_one_at_a_time(model: at.Model, kind: str) -> None:
    variants: list[list[Any]] = [[], FFN[:1], ATTENTION, MIXED, HEADS, LAYERS, [at.HeadPosition(1, 0, 2), *FFN]]
    prompts = [PROMPT, LONGER, PROMPT, LONGER, LONGER, SHORTER, TWIN]
    together = at.ablate(model, prompts, variants, **_options(kind, [*REFERENCE, PROMPT]))
    assert together.shape == (7, model.anatomy.vocabulary)
    for row, (prompt, neurons) in enumerate(zip(prompts, variants, strict=True)):
        _assert_same(model, together[row], at.ablate(model, prompt, neurons, **_options(kind, [*REFERENCE, PROMPT])))


@pytest.mark.parametrize("kind", KINDS)
def test_several_forward_passes_give_what_one_does(model: at.Model, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, options = [PROMPT, LONGER, SHORTER, TWIN], _options(kind, [PROMPT, LONGER, SHORTER, TWIN])
    whole = at.ablate(model, prompts, [MIXED] * 4, **options)
    passes = _counted_passes(model, monkeypatch)
    monkeypatch.setattr("attribution.models.model.CHUNK_TOKENS", 12)
    parts = at.ablate(model, prompts, [MIXED] * 4, **options)
    assert len(passes) >= 3
    for row in range(4):
        _assert_same(model, parts[row], whole[row])


def _counted_passes(model: at.Model, monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the forward passes from here on."""
    passes: list[torch.Size] = []
    original = type(model.network).trace

    def counted(network: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        passes.append(inputs["input_ids"].shape)
        return original(network, inputs, *args, **kwargs)

    monkeypatch.setattr(type(model.network), "trace", counted)
    return passes


# Zero by activation is zero by parameter


@pytest.mark.parametrize(
    "neurons", [*([n] for n in (*FFN, *ATTENTION, *HEADS, *LAYERS)), *SETS.values()], ids=lambda each: str(each[0])
)
def test_ablating_is_zeroing_rows_in_the_weights(
    model: at.Model, plain: Any, plain_logits: PlainLogits, neurons: list[Any]
) -> None:
    expected = plain_logits(PROMPT, _with_zeroed_rows(model, plain, neurons))
    _assert_same(model, at.ablate(model, PROMPT, neurons), expected)
    _assert_differ(model, expected, plain_logits(PROMPT))


def test_three_ways_of_switching_off_agree_in_every_setting(
    representative_model: at.Model, representative_plain: Any
) -> None:
    """An activation, a parameter of the copy that the package makes, and one of a plain copy."""
    model = representative_model
    ids = _ids(model, PROMPT)
    whole = _run(representative_plain, ids)
    activations = at.ablate(model, [PROMPT] * len(SETS), list(SETS.values()))
    for neurons, logits in zip(SETS.values(), activations, strict=True):
        expected = _run(_with_zeroed_rows(model, representative_plain, neurons), ids)
        _assert_same(model, logits, expected)
        _assert_differ(model, expected, whole)
        with zeroed_parameters(model, neurons) as edited:
            # Up to rounding: a product of one row depends on where in memory its matrix begins.
            _assert_same(model, rerun(edited, pad([ids]))[0], expected)


@pytest.mark.parametrize("row", ["gate", "up"])
def test_zeroing_either_subkey_of_a_gated_neuron_is_ablating_it(
    loaded: Callable[[str], at.Model], make_plain: Callable[[str], Any], row: str
) -> None:
    model, edited = loaded("llama"), make_plain("llama")
    projection = edited.get_submodule(f"model.layers.0.mlp.{row}_proj")
    projection.weight.detach()[5] = 0
    _assert_same(model, at.ablate(model, PROMPT, FFN[:1]), _run(edited, _ids(model, PROMPT)))


def test_zeroing_the_subkey_of_a_plain_neuron_is_ablating_it_only_without_its_bias(
    loaded: Callable[[str], at.Model], make_plain: Callable[[str], Any]
) -> None:
    model, edited = loaded("gpt2"), make_plain("gpt2")
    ablated, ids = at.ablate(model, PROMPT, FFN[:1]), _ids(model, PROMPT)
    projection = edited.get_submodule("transformer.h.0.mlp.c_fc")
    projection.weight.detach()[:, 5] = 0
    _assert_differ(model, _run(edited, ids), ablated)
    projection.bias.detach()[5] = 0
    _assert_same(model, ablated, _run(edited, ids))


@pytest.mark.parametrize("architecture_without_bias", ["gptj", "gpt_neo"])
def test_zeroing_the_subkey_of_a_head_dimension_is_ablating_it_without_bias_and_grouping(
    loaded: Callable[[str], at.Model], make_plain: Callable[[str], Any], architecture_without_bias: str
) -> None:
    model = loaded(architecture_without_bias)
    edited = make_plain(architecture_without_bias)
    projection = resolve(resolve(edited, model.anatomy.family.blocks)[0], model.anatomy.family.value_projection)
    assert projection.bias is None
    projection.weight.detach()[3 * model.anatomy.head_dim + 7] = 0
    _assert_same(model, at.ablate(model, PROMPT, ATTENTION[:1]), _run(edited, _ids(model, PROMPT)))


def test_zeroing_the_subkey_of_a_gpt2_head_dimension_is_ablating_it_only_without_its_bias(
    loaded: Callable[[str], at.Model], make_plain: Callable[[str], Any]
) -> None:
    model, edited = loaded("gpt2"), make_plain("gpt2")
    ablated, ids = at.ablate(model, PROMPT, ATTENTION[:1]), _ids(model, PROMPT)
    projection = edited.get_submodule("transformer.h.0.attn.c_attn")
    column = 2 * model.anatomy.width + 3 * model.anatomy.head_dim + 7
    projection.weight.detach()[:, column] = 0
    _assert_differ(model, _run(edited, ids), ablated)
    projection.bias.detach()[column] = 0
    _assert_same(model, ablated, _run(edited, ids))


def test_zeroing_the_subkey_under_grouped_queries_ablates_the_whole_group(
    loaded: Callable[[str], at.Model], make_plain: Callable[[str], Any]
) -> None:
    model, edited = loaded("llama"), make_plain("llama")
    group = model.anatomy.heads // model.anatomy.kv_heads
    assert group == 2
    edited.get_submodule("model.layers.0.self_attn.v_proj").weight.detach()[
        (3 // group) * model.anatomy.head_dim + 7
    ] = 0
    expected = _run(edited, _ids(model, PROMPT))
    _assert_differ(model, at.ablate(model, PROMPT, ATTENTION[:1]), expected)
    _assert_same(model, at.ablate(model, PROMPT, [at.AttentionNeuron(0, head, 7, 0) for head in (2, 3)]), expected)


def test_a_last_layer_neuron_takes_exactly_its_own_output_away(model: at.Model, plain: Any) -> None:
    """Nothing comes after it but the final norm: h becomes h - m v."""
    anatomy = model.anatomy
    coefficients = _inputs(model, plain, PROMPT)[2, "ffn"][-1]
    index = int(coefficients.abs().argmax())
    subvalue = _rows_of(resolve(resolve(plain, anatomy.family.blocks)[2], anatomy.family.ffn_out))[index]
    norm = resolve(plain, anatomy.family.final_norm)
    states: list[Tensor] = []
    with norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0, -1])):
        whole = _run(plain, _ids(model, PROMPT))
    with torch.no_grad():
        expected = plain.lm_head(norm(states[0] - coefficients[index] * subvalue))
    _assert_same(model, at.ablate(model, PROMPT, [at.FFNNeuron(2, index)]), expected)
    _assert_differ(model, expected, whole)


# Where an edit applies


def test_an_attention_neuron_is_switched_off_at_every_source_position(model: at.Model) -> None:
    by_position = [at.ablate(model, PROMPT, [at.AttentionNeuron(0, 3, 7, position)]) for position in range(4)]
    for logits in by_position[1:]:
        assert torch.equal(logits, by_position[0])
    every = at.ablate(model, PROMPT, [at.AttentionNeuron(0, 3, 7, position) for position in range(4)])
    assert torch.equal(every, by_position[0])


@pytest.mark.parametrize("neuron", [FFN[0], ATTENTION[0]], ids=str)
def test_ablation_reaches_earlier_positions_too(model: at.Model, plain: Any, neuron: Any) -> None:
    """A first-layer neuron also feeds later layers through earlier positions; the last alone is another experiment."""

    def at_last_position_only(layer: int, sublayer: str, entered: Tensor) -> Tensor:
        entered = entered.clone()
        entered[-1, _columns(model, [neuron], layer, sublayer)] = 0
        return entered

    with _hooks(model, plain, at_last_position_only):
        last_only = _run(plain, _ids(model, PROMPT))
    _assert_differ(model, at.ablate(model, PROMPT, [neuron]), last_only)


def test_all_source_positions_of_the_last_layer_are_the_dimension_itself(representative_model: at.Model) -> None:
    """Nothing reads the other query positions any more, so what only the last position takes is all there is."""
    model = representative_model
    last, length = model.anatomy.layers - 1, len(_ids(model, PROMPT))
    dims = [at.AttentionNeuron(last, 1, dim, position) for dim in range(5) for position in range(length)]
    heads = [at.HeadPosition(last, 1, position) for position in range(length)]
    for sources, everywhere in ((dims, dims[::length]), (heads, [at.Head(last, 1)])):
        expected = at.ablate(model, PROMPT, everywhere)
        _assert_same(model, at.ablate(model, PROMPT, sources, at_source=True), expected)
        first_alone = [each for each in sources if each.position == 0]
        _assert_differ(model, at.ablate(model, PROMPT, first_alone, at_source=True), expected)


def test_all_source_positions_of_an_early_layer_are_another_experiment_than_the_head(model: at.Model) -> None:
    positions = range(len(_ids(model, PROMPT)))
    everywhere = at.ablate(model, PROMPT, [at.Head(0, 3)])
    _assert_differ(model, at.ablate(model, PROMPT, [at.HeadPosition(0, 3, each) for each in positions]), everywhere)


def _taken(model: at.Model, network: Any, text: str, layer: int) -> Tensor:
    """alpha * val of the last position, (heads, head_dim, positions), by plain hooks; values may be grouped."""
    family, heads = model.anatomy.family, model.anatomy.heads
    block = resolve(network, family.blocks)[layer]
    seen: dict[str, Tensor] = {}
    with (
        resolve(block, family.value_projection).register_forward_hook(lambda _, __, out: seen.update(values=out[0])),
        resolve(block, family.attention).register_forward_hook(
            lambda _, __, out: seen.update(pattern=out[1][0, :, -1])
        ),
    ):
        _run(network, _ids(model, text))
    # GPT-2 computes queries, keys and values in one; Llama's heads share values in pairs.
    values = seen["values"][:, -model.anatomy.kv_heads * model.anatomy.head_dim :]
    values = values.unflatten(-1, (model.anatomy.kv_heads, -1)).repeat_interleave(heads // model.anatomy.kv_heads, 1)
    return torch.einsum("hp,phd->hdp", seen["pattern"], values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("donor", [TWIN, LONGER, SHORTER])
def test_one_source_position_is_replaced_as_the_last_position_reads_it(
    model: at.Model, plain: Any, kind: str, donor: str
) -> None:
    """By plain hooks: the last position's output moves by (replacement - alpha val) o, and later layers see it."""
    family, layer, position = model.anatomy.family, 1, 1
    taken = _taken(model, plain, PROMPT, layer)
    others = [_taken(model, plain, text, layer) for text in ([donor, TWIN] if kind == "mean" else [donor])]
    if kind == "zero":
        replacement = torch.zeros_like(taken[..., 0])
    elif kind == "mean":
        replacement = torch.cat(others, dim=-1).mean(-1)
    else:
        replacement = others[0][..., max(0, position - taken.shape[-1] + others[0].shape[-1])]
    change = replacement - taken[..., position]
    block = resolve(plain, family.blocks)[layer]
    vectors = _rows_of(resolve(block, family.attention_out)).unflatten(0, change.shape)

    def moved(chosen: Tensor) -> Tensor:
        def hook(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            written = output[0].clone()
            written[0, -1] += torch.einsum("hd,hdw->w", change * chosen, vectors)
            return (written, *output[1:])

        with resolve(block, family.attention).register_forward_hook(hook):
            return _run(plain, _ids(model, PROMPT))

    chosen = torch.zeros_like(change)
    chosen[2] = 1
    options = _options(kind, [donor, TWIN] if kind == "mean" else [donor])
    head = moved(chosen)
    _assert_same(model, at.ablate(model, PROMPT, [at.HeadPosition(layer, 2, position)], **options), head)
    chosen[2, :5] = 0
    chosen[0, 4] = 1
    neurons = [
        at.AttentionNeuron(layer, 0, 4, position),
        *(at.AttentionNeuron(layer, 2, d, position) for d in (5, 6, 7)),
    ]
    dims = moved(chosen)
    _assert_same(model, at.ablate(model, PROMPT, neurons, at_source=True, **options), dims)
    _assert_differ(model, head, dims)
    _assert_differ(model, dims, _run(plain, _ids(model, PROMPT)))


def test_what_is_ablated_everywhere_is_not_taken_away_again_at_a_source(model: at.Model) -> None:
    expected = at.ablate(model, PROMPT, [at.Head(1, 2)])
    twice = [at.Head(1, 2), at.HeadPosition(1, 2, 0), at.HeadPosition(1, 2, 3), at.AttentionNeuron(1, 2, 4, 1)]
    assert torch.equal(at.ablate(model, PROMPT, twice, at_source=True), expected)
    assert torch.equal(at.ablate(model, PROMPT, twice), expected)


# Mean and resample


@pytest.mark.parametrize(("kind", "reference"), [("zero", []), ("mean", REFERENCE), ("resample", [LONGER])])
def test_each_kind_is_what_hooks_on_a_plain_model_do_in_every_setting(
    representative_model: at.Model, representative_plain: Any, kind: str, reference: list[str]
) -> None:
    model = representative_model
    values = _values(model, representative_plain, kind, reference)
    logits = at.ablate(model, [PROMPT] * len(SETS), list(SETS.values()), **_options(kind, reference))
    for ablated, neurons in zip(logits, SETS.values(), strict=True):
        expected = _replaced(model, representative_plain, PROMPT, neurons, values)
        _assert_same(model, ablated, expected)
        _assert_differ(model, expected, _run(representative_plain, _ids(model, PROMPT)))


@pytest.mark.parametrize("donor", [LONGER, SHORTER, TWIN])
def test_a_donor_is_aligned_at_the_last_token(model: at.Model, plain: Any, donor: str) -> None:
    """Positions before a shorter donor's first take what it has there."""
    expected = _replaced(model, plain, PROMPT, MIXED, _values(model, plain, "resample", [donor]))
    _assert_same(model, at.ablate(model, PROMPT, MIXED, kind="resample", reference=[donor]), expected)


def test_a_prompt_resampled_whole_answers_as_its_donor(representative_model: at.Model) -> None:
    """Both end in one token at one position: with all that blocks write replaced, the final state is the donor's."""
    model = representative_model
    assert (len(_ids(model, TWIN)), _ids(model, TWIN)[-1]) == (len(_ids(model, PROMPT)), _ids(model, PROMPT)[-1])
    everything = [at.Layer(layer, kind) for layer in range(model.anatomy.layers) for kind in ("attention", "ffn")]
    resampled = at.ablate(model, PROMPT, everything, kind="resample", reference=TWIN)
    donor = at.ablate(model, TWIN, [])
    _assert_same(model, resampled, donor)
    _assert_differ(model, at.ablate(model, PROMPT, []), donor)


def test_the_mean_over_one_token_is_the_coefficient_itself(loaded: Callable[[str], at.Model]) -> None:
    model = loaded("gpt2")
    assert len(_ids(model, "Paris")) == 1
    everything = [at.Layer(layer, kind) for layer in range(3) for kind in ("attention", "ffn")]
    expected = at.ablate(model, "Paris", [])
    assert torch.equal(at.ablate(model, "Paris", everything, kind="mean", reference="Paris"), expected)
    _assert_differ(model, at.ablate(model, "Paris", everything), expected)


def test_a_reference_prompt_counts_in_the_mean_as_often_as_it_is_listed(model: at.Model) -> None:
    def mean(*reference: str) -> Tensor:
        return at.ablate(model, PROMPT, MIXED, kind="mean", reference=list(reference))

    _assert_same(model, mean(LONGER, LONGER), mean(LONGER))
    _assert_same(model, mean(LONGER, SHORTER), mean(SHORTER, LONGER))
    _assert_differ(model, mean(LONGER, LONGER, SHORTER), mean(LONGER, SHORTER))


def test_a_reference_may_be_prompts_with_answers(model: at.Model) -> None:
    plain = at.ablate(model, PROMPT, FFN, kind="mean", reference=[LONGER])
    assert torch.equal(at.ablate(model, PROMPT, FFN, kind="mean", reference=at.Prompt(LONGER, " four")), plain)


def test_a_prompt_is_never_its_own_donor(model: at.Model) -> None:
    prompts = tuple(tuple(_ids(model, text)) for text in (PROMPT, LONGER, SHORTER, TWIN))
    for seed in range(50):
        donors = Donors(prompts, seed)
        for prompt in prompts:
            assert donors.donor_of(prompt) in set(prompts) - {prompt}
    # Its text under another object, and beside others.
    with_itself = at.ablate(model, PROMPT, FFN, kind="resample", reference=[at.Prompt(PROMPT, " Paris"), LONGER])
    assert torch.equal(with_itself, at.ablate(model, PROMPT, FFN, kind="resample", reference=[LONGER]))


def test_the_seed_draws_the_donor(model: at.Model) -> None:
    def drawn(seed: int) -> Tensor:
        return at.ablate(model, PROMPT, MIXED, kind="resample", reference=REFERENCE, seed=seed)

    by_donor = [at.ablate(model, PROMPT, MIXED, kind="resample", reference=[donor]) for donor in REFERENCE]
    chosen = []
    for seed in range(12):
        logits = drawn(seed)
        assert torch.equal(logits, drawn(seed))
        same = [donor for donor, each in enumerate(by_donor) if torch.equal(logits, each)]
        assert len(same) == 1
        chosen += same
    assert set(chosen) == {0, 1, 2}


def test_every_donor_is_drawn_equally_often_over_seeds_and_over_prompts() -> None:
    """3,000 draws among three: a share's standard deviation is 0.86%, so five of them are 4.3%."""
    prompts = tuple((number,) for number in range(4))
    over_seeds = [Donors(prompts, seed).donor_of((0,)) for seed in range(3000)]
    over_prompts = [Donors(prompts[1:], 0).donor_of((number,)) for number in range(100, 3100)]
    for draws in (over_seeds, over_prompts):
        for donor in prompts[1:]:
            assert abs(draws.count(donor) / len(draws) - 1 / 3) < 5 * (2 / 9 / len(draws)) ** 0.5


def test_a_row_without_neurons_runs_no_donor(model: at.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = _counted_passes(model, monkeypatch)
    at.ablate(model, [PROMPT, TWIN], [[], []], kind="resample", reference=LONGER)
    assert passes == [(2, len(_ids(model, PROMPT)))]


def test_a_long_donor_does_not_make_a_forward_pass_large(model: at.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are split by what they need with their donors; each has one at most, so a pass is twice the limit."""
    expected = at.ablate(model, SHORTER, MIXED, kind="resample", reference=LONGER)
    limit = 2 * len(_ids(model, LONGER))
    passes = _counted_passes(model, monkeypatch)
    monkeypatch.setattr("attribution.models.model.CHUNK_TOKENS", limit)
    logits = at.ablate(model, [SHORTER] * 6, [MIXED] * 6, kind="resample", reference=LONGER)
    assert max(rows * positions for rows, positions in passes) <= 2 * limit
    for row in logits:
        _assert_same(model, row, expected)


def test_a_donor_does_not_depend_on_the_other_prompts_of_a_batch(model: at.Model) -> None:
    prompts = [LONGER, PROMPT, SHORTER]
    together = at.ablate(model, prompts, [MIXED] * 3, kind="resample", reference=[*REFERENCE, PROMPT], seed=3)
    for prompt, logits in zip(prompts, together, strict=True):
        alone = at.ablate(model, prompt, MIXED, kind="resample", reference=[*REFERENCE, PROMPT], seed=3)
        _assert_same(model, logits, alone)


# Nothing outlives its block


def _weights(model: at.Model) -> dict[str, Tensor]:
    return dict(model.network._module.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_the_same_after_an_ablation(
    model: at.Model, plain: Any, plain_logits: PlainLogits, kind: str
) -> None:
    at.ablate(model, PROMPT, [*MIXED, at.HeadPosition(0, 0, 0)], **_options(kind))
    for name, parameter in plain.named_parameters():
        assert torch.equal(_weights(model)[name], parameter), name
    assert torch.equal(at.ablate(model, PROMPT, []), plain_logits(PROMPT))


def test_an_edit_of_activations_does_not_outlive_an_error_inside_it(
    model: at.Model, plain: Any, plain_logits: PlainLogits
) -> None:
    batch = pad([_ids(model, PROMPT)])
    mask = torch.ones((), dtype=torch.bool)

    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("inside the trace")

    edits = Edits(coefficients={0: (mask, torch.zeros(())), 2: (mask, fail)})
    with pytest.raises(RuntimeError, match="inside the trace"):
        rerun(model, batch, edits)
    assert torch.equal(rerun(model, batch)[0], plain_logits(PROMPT))
    for name, parameter in plain.named_parameters():
        assert torch.equal(_weights(model)[name], parameter), name


def test_zeroed_parameters_leave_the_original_alone_and_share_all_that_they_do_not_edit(
    model: at.Model, plain: Any, plain_logits: PlainLogits
) -> None:
    names = {name: (block, part) for block, part, name in _edited_names(model)}
    before = at.ablate(model, PROMPT, [])
    with zeroed_parameters(model, [FFN[1], at.Head(2, 1)]) as edited:
        originals, twins = _weights(model), _weights(edited)
        assert originals.keys() == twins.keys()
        copied = {name for name in originals if originals[name].data_ptr() != twins[name].data_ptr()}
        assert {names[name] for name in copied} == {(1, "ffn"), (2, "attention")}
        assert torch.equal(at.ablate(model, PROMPT, []), before)
        _assert_differ(model, at.ablate(edited, PROMPT, []), before)
        assert float(edited.anatomy.sublayer(1, "ffn").vectors[0].abs().max()) == 0
        assert float(model.anatomy.sublayer(1, "ffn").vectors[0].abs().max()) > 0
    for name, parameter in plain.named_parameters():
        assert torch.equal(_weights(model)[name], parameter), name
    assert torch.equal(at.ablate(model, PROMPT, []), plain_logits(PROMPT))


def _edited_names(model: at.Model) -> Iterator[tuple[int, str, str]]:
    by_id = {id(parameter): name for name, parameter in model.network._module.named_parameters()}
    for layer, sublayer, projection in _projections(model, model.network._module):
        yield layer, sublayer, by_id[id(projection.weight)]


@pytest.mark.parametrize("failing", [False, True])
def test_zeroed_parameters_do_not_outlive_their_block(
    model: at.Model, plain: Any, plain_logits: PlainLogits, failing: bool
) -> None:
    leaked: list[at.Model] = []

    def work() -> None:
        with zeroed_parameters(model, MIXED) as edited:
            leaked.append(edited)
            # What a model computes from its weights and keeps would carry the edit on.
            table = vector_table(edited, "ffn")
            assert table is not None
            assert float(table.norms.min()) == 0
            if failing:
                raise KeyError("inside the block")

    if failing:
        with pytest.raises(KeyError, match="inside the block"):
            work()
    else:
        work()
    for each in (model, leaked[0]):
        for name, parameter in plain.named_parameters():
            assert torch.equal(_weights(each)[name], parameter), name
        assert torch.equal(at.ablate(each, PROMPT, []), plain_logits(PROMPT))
        table = vector_table(each, "ffn")
        assert table is not None
        assert float(table.norms.min()) > 0


def test_zeroed_parameters_may_be_nested(model: at.Model) -> None:
    expected = at.ablate(model, PROMPT, [*FFN, *HEADS])
    with zeroed_parameters(model, FFN) as once, zeroed_parameters(once, HEADS) as twice:
        _assert_same(model, at.ablate(twice, PROMPT, []), expected)
        _assert_same(model, at.ablate(once, PROMPT, HEADS), expected)


def test_zeroing_no_parameters_changes_nothing_and_copies_nothing(model: at.Model, plain_logits: PlainLogits) -> None:
    with zeroed_parameters(model, []) as same:
        assert torch.equal(at.ablate(same, PROMPT, []), plain_logits(PROMPT))
        for name, parameter in _weights(model).items():
            assert _weights(same)[name] is parameter


# Arguments


@pytest.mark.parametrize(
    "neuron",
    [
        at.FFNNeuron(3, 0),
        at.FFNNeuron(-1, 0),
        at.FFNNeuron(0, 48),
        at.FFNNeuron(0, -1),
        at.AttentionNeuron(3, 0, 0, 0),
        at.AttentionNeuron(0, 4, 0, 0),
        at.AttentionNeuron(0, 0, 8, 0),
        at.AttentionNeuron(0, 0, -1, 0),
        at.Head(0, 4),
        at.Head(-1, 0),
        at.HeadPosition(3, 0, 0),
        at.HeadPosition(0, 4, 0),
        at.Layer(3, "ffn"),
        at.Layer(3, "attention"),
    ],
    ids=str,
)
def test_what_lies_outside_the_model_is_an_error(model: at.Model, neuron: Any) -> None:
    with pytest.raises(BadInputError, match=r"\w+\(layer=.*the model has \d+; count from 0"):
        at.ablate(model, PROMPT, [FFN[0], neuron])


@pytest.mark.parametrize("position", [-1, 99])
@pytest.mark.parametrize("record", [at.HeadPosition, lambda *place: at.AttentionNeuron(*place[:2], 0, place[2])])
def test_a_position_outside_its_prompt_is_an_error(model: at.Model, record: Any, position: int) -> None:
    with pytest.raises(BadInputError, match=rf"position {position}, but its prompt has \d+ tokens; count from 0"):
        at.ablate(model, [LONGER, PROMPT], [[], [record(0, 0, position)]], at_source=True)


def test_a_position_in_the_padding_of_a_shorter_prompt_is_an_error(model: at.Model) -> None:
    length = len(_ids(model, PROMPT))
    assert length < len(_ids(model, LONGER))
    at.ablate(model, [LONGER, PROMPT], [[at.HeadPosition(0, 0, length)], []])
    with pytest.raises(BadInputError, match=f"its prompt has {length} tokens"):
        at.ablate(model, [LONGER, PROMPT], [[], [at.HeadPosition(0, 0, length)]])


@pytest.mark.parametrize("thing", [(0, 5), "f0-5", at.FFNNeuron], ids=str)
def test_what_is_no_record_cannot_be_ablated(model: at.Model, thing: Any) -> None:
    with pytest.raises(BadInputError, match="cannot be ablated; pass records: FFNNeuron, AttentionNeuron, Head,"):
        at.ablate(model, PROMPT, [thing])


def test_a_layer_of_no_known_kind_is_an_error(model: at.Model) -> None:
    with pytest.raises(BadInputError, match="'mlp'; use ffn or attention"):
        at.ablate(model, PROMPT, [at.Layer(0, "mlp")])  # type: ignore[arg-type]


def test_what_is_taken_from_one_position_has_no_parameters_to_zero(model: at.Model) -> None:
    with (
        pytest.raises(BadInputError, match=r"HeadPosition\(.*no parameters of its own.*ablate the Head"),
        zeroed_parameters(model, [at.HeadPosition(0, 0, 0)]),
    ):
        pass


@pytest.mark.parametrize("kind", ["median", "", "ZERO"])
def test_an_unknown_kind_is_an_error(model: at.Model, kind: str) -> None:
    with pytest.raises(BadInputError, match=f"ablation kind '{kind}' is unknown; use one of zero, mean, resample"):
        at.ablate(model, PROMPT, FFN, kind=kind)


def test_zero_takes_no_reference(model: at.Model) -> None:
    with pytest.raises(BadInputError, match=r"'zero' takes nothing.*2 prompts.*leave it out"):
        at.ablate(model, PROMPT, FFN, reference=[LONGER, TWIN])


@pytest.mark.parametrize("kind", ["mean", "resample"])
def test_mean_and_resample_need_a_reference(model: at.Model, kind: str) -> None:
    with pytest.raises(BadInputError, match=rf"'{kind}' .*none were given; pass reference=.* or use kind 'zero'"):
        at.ablate(model, PROMPT, FFN, kind=kind)
    with pytest.raises(BadInputError, match="none were given"):
        reference_of(model, kind, [])


def test_a_prompt_without_a_donor_is_an_error_before_anything_runs(
    model: at.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = [PROMPT, at.Prompt(PROMPT, " Paris")]
    passes = _counted_passes(model, monkeypatch)
    # One pass for each prompt, the one with a donor first.
    monkeypatch.setattr("attribution.models.model.CHUNK_TOKENS", 1)
    with pytest.raises(BadInputError, match=r"'resample' found 1 reference prompts and none that differs"):
        at.ablate(model, [SHORTER, PROMPT], [FFN, FFN], kind="resample", reference=reference)
    assert passes == []


def test_a_kind_may_be_given_as_the_enums_member(model: at.Model) -> None:
    assert torch.equal(
        at.ablate(model, PROMPT, FFN, kind=AblationKind.ZERO), at.ablate(model, PROMPT, FFN, kind="zero")
    )


# What is counted


def test_masks_mark_each_record_in_its_own_variant(model: at.Model) -> None:
    batch = pad([_ids(model, PROMPT)] * 5)
    variants = [
        FFN,
        ATTENTION,
        [],
        [at.Head(1, 3), at.Layer(2, "ffn")],
        [at.HeadPosition(1, 0, 2), at.Layer(0, "attention")],
    ]
    masks = ablation_masks(variants, model.anatomy, batch)
    assert masks.ffn[:, :3].nonzero().tolist() == [[0, 0, 5], [1, 0, 0], [2, 0, 47]]
    assert masks.attention[:, :3].nonzero().tolist() == [[0, 1, 3, 7], [1, 1, 2, 1], [2, 1, 0, 0]]
    assert masks.ffn[:, 3].nonzero().tolist() == [[2, index] for index in range(48)]
    assert masks.attention[:, 3].nonzero().tolist() == [[1, 3, dim] for dim in range(8)]
    assert masks.attention[:, 4].nonzero().tolist() == [[0, head, dim] for head in range(4) for dim in range(8)]
    assert masks.sources.nonzero().tolist() == [[1, 4, 0, dim, 2] for dim in range(8)]
    assert not masks.ffn[:, 4].any()
    assert masks.distinct().tolist() == [3, 3, 0, 8 + 48, 8 + 32]


def test_what_several_records_name_counts_once(model: at.Model) -> None:
    batch = pad([_ids(model, PROMPT)] * 2)
    records = [at.AttentionNeuron(0, 1, 2, 0), at.AttentionNeuron(0, 1, 2, 3), at.Head(0, 1), at.HeadPosition(0, 1, 2)]
    others = [at.AttentionNeuron(0, 1, 2, 0), at.AttentionNeuron(0, 1, 2, 3), at.HeadPosition(0, 1, 3)]
    assert ablation_masks([records, others], model.anatomy, batch).distinct().tolist() == [8, 1 + 7]
    assert ablation_masks([records, others], model.anatomy, batch, at_source=True).distinct().tolist() == [8, 1 + 8]
