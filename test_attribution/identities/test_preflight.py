"""Preflight holds on a sound model of every family, and each of its checks breaks on a fault of its kind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, normalizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import attribution as at
from attribution.engine import trace
from attribution.engine.trace import Activations, Edits
from attribution.errors import BadInputError, PreflightError
from attribution.identities import edits as trials
from attribution.identities import preflight as checks
from attribution.identities.preflight import CHECKS, Check
from attribution.models.anatomy import Anatomy, Sublayer, read_anatomy
from attribution.models.model import Model
from attribution.models.norms import Norm
from attribution.models.opening import wrap
from attribution.prompts.tokens import TokenBatch, pad

pytest_plugins = ["pytester"]

PROMPTS = ["The capital of France is", "A ripe cherry"]
Load = Callable[[str], Model]


def _passes(model: Model, prompts: Any = None) -> list[Check]:
    made = at.preflight(model, prompts)
    assert [check.name for check in made] == list(CHECKS)
    assert all(math.isfinite(check.value) and math.isfinite(check.bound) for check in made)
    assert all(0 <= check.value <= check.bound for check in made)
    return made


def test_every_family_passes_batched_and_single(architecture_model: Model) -> None:
    _passes(architecture_model)
    _passes(architecture_model, PROMPTS)
    _passes(architecture_model, PROMPTS[0])


def test_no_identity_compares_a_number_with_itself(model: Model) -> None:
    """Sums in another order differ by rounding."""
    inexact = {check.name: check.value for check in _passes(model) if check.bound > 0}
    # Products with zero are zero whichever factor is, and some kernels add up a batch as they do a single row.
    assert {name for name, value in inexact.items() if value == 0} <= {"zeroed_parameters", "batched"}


# Faults. Each takes a sound model and returns one that is wrong in one place, or breaks the code under it.

Fault = Callable[[Model, pytest.MonkeyPatch], Model]


def _anatomy(**changes: Callable[[Anatomy], Any]) -> Fault:
    """Return a model whose anatomy has some fields wrong."""

    def fault(model: Model, _: pytest.MonkeyPatch) -> Model:
        return replace(
            model, anatomy=replace(model.anatomy, **{name: wrong(model.anatomy) for name, wrong in changes.items()})
        )

    return fault


def _beginning(*, said: bool, done: bool) -> Fault:
    """Return a model whose tokenizer says that texts begin with BOS, or that they do not, and does what it likes."""

    def fault(model: Model, _: pytest.MonkeyPatch) -> Model:
        tokenizer = copy.deepcopy(model.tokenizer)
        first, number = tokenizer.bos_token, tokenizer.bos_token_id
        template = f"{first} $A" if done else "$A"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=[(first, number)]
        )
        return replace(model, tokenizer=tokenizer, begins=said)

    return fault


def _normalised(normaliser: Any) -> Fault:
    """Return a model whose tokenizer changes texts before it reads them."""

    def fault(model: Model, _: pytest.MonkeyPatch) -> Model:
        tokenizer = copy.deepcopy(model.tokenizer)
        tokenizer.backend_tokenizer.normalizer = normaliser
        return replace(model, tokenizer=tokenizer)

    return fault


def _ended(tokenizer: Any, text: str) -> list[int]:
    return [*tokenizer.encode(text), tokenizer.eos_token_id]


def _sublayers(kind: str, wrong: Callable[[Sublayer], Sublayer]) -> Fault:
    """Return a model that is wrong about the attention, or about the FFN, of every block."""
    return _anatomy(**{kind: lambda anatomy: tuple(wrong(own) for own in getattr(anatomy, kind))})


def _without(kind: str, name: str) -> Fault:
    """Return a model whose sublayers of a kind lack something."""
    return _sublayers(kind, lambda own: replace(own, **{name: None}))


def _readout(**changes: Callable[[Anatomy], Any]) -> Fault:
    return _anatomy(
        readout=lambda anatomy: replace(anatomy.readout, **{name: wrong(anatomy) for name, wrong in changes.items()})
    )


def _of_neighbours(own: Sublayer) -> Sublayer:
    """Each neuron has its neighbour's vector."""
    return replace(own, read_vectors=lambda: own.vectors.roll(1, 0))


def _weighted_as_neighbours(own: Sublayer) -> Sublayer:
    """Each dimension has its neighbour's factor."""
    assert own.post_weight is not None
    return replace(own, post_weight=own.post_weight.roll(1, 0))


def _norms(kind: str, wrong: Callable[[Norm], Norm]) -> Fault:
    def with_norm(own: Sublayer) -> Sublayer:
        assert own.input_norm is not None
        return replace(own, input_norm=wrong(own.input_norm))

    return _sublayers(kind, with_norm)


def _subkeys(wrong: Callable[[Any], Any]) -> Fault:
    return _anatomy(subkeys=lambda anatomy: tuple(wrong(each) for each in anatomy.subkeys))


def _shuffled(norm: Norm) -> Norm:
    assert norm.weight is not None
    return replace(norm, weight=norm.weight.roll(1))


def _off_centre(norm: Norm) -> Norm:
    return replace(norm, centred=not norm.centred)


def _dimensions_before_heads(anatomy: Anatomy) -> tuple[Sublayer, ...]:
    heads = (anatomy.heads, anatomy.head_dim)

    def turned(own: Sublayer) -> Sublayer:
        return replace(own, read_vectors=lambda: own.vectors.unflatten(0, heads).transpose(0, 1).flatten(0, 1))

    return tuple(map(turned, anatomy.attention))


def _next_group(anatomy: Anatomy) -> Tensor:
    """Heads share key/value heads in turn instead of by neighbours."""
    one_each = anatomy.value_rows.view(anatomy.kv_heads, -1, anatomy.head_dim)[:, 0]
    return one_each.repeat(anatomy.heads // anatomy.kv_heads, 1).flatten()


def _last_third(anatomy: Anatomy) -> Tensor:
    """Queries, keys and values one after the other, where they take turns by heads."""
    return torch.arange(2, 3).mul(len(anatomy.value_rows)) + torch.arange(len(anatomy.value_rows))


def _on_the_left(rows: Sequence[Sequence[int]], *, device: Any = "cpu") -> TokenBatch:
    right = pad(rows, device=device)
    width = right.ids.shape[1]
    turned = [(ids.roll(width - 1 - int(last)), mask.roll(width - 1 - int(last))) for ids, mask, last in _each(right)]
    ids, masks = zip(*turned, strict=True)
    return TokenBatch(torch.stack(ids), torch.stack(masks), torch.full_like(right.last, width - 1))


def _inputs(change: Callable[[TokenBatch], dict[str, Tensor]]) -> Fault:
    """Return the same model, which is given something else whenever it is given several prompts."""

    def fault(model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
        real = TokenBatch.inputs
        monkeypatch.setattr(
            TokenBatch, "inputs", lambda batch: real(batch) | (change(batch) if len(batch.ids) > 1 else {})
        )
        return model

    return fault


def _each(batch: TokenBatch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(batch.ids, batch.mask, batch.last, strict=True)


def _patched(target: str, value: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Fault:
    """Return the same model over code of which one function is wrapped."""

    def fault(model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
        module, name = target.rsplit(".", 1)
        home = {"checks": checks, "trace": trace, "trials": trials}.get(module)
        home = home or __import__(f"attribution.{module}", fromlist=[name])
        monkeypatch.setattr(home, name, value(getattr(home, name)))
        return model

    return fault


def _always(value: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda _: value


def _changed(change: Callable[[Activations], Activations]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda read: lambda *args, **options: change(read(*args, **options))


def _with_a_nan(activations: Activations) -> Activations:
    coefficients = activations.coefficients.clone()
    coefficients[-1, 0, 0, 0] = torch.nan
    return replace(activations, coefficients=coefficients)


def _with_attention_of_another_layer(activations: Activations) -> Activations:
    return replace(activations, attention_output=activations.attention_output.roll(1, 0))


def _kind(edits: Edits) -> str:
    """Which part of the preflight makes an edit: the one that zeroes edits coefficients and mixed values at once."""
    kinds = [name for name in ("coefficients", "mixed_values", "sources") if getattr(edits, name)]
    return "zeroing" if len(kinds) == 2 else kinds[0]


def _stale(kind: str, field: str) -> Fault:
    """Edits of one kind act, but an activation is read as it is without them."""

    def wrap_read(read: Callable[..., Activations]) -> Callable[..., Activations]:
        def stale(model: Model, batch: TokenBatch, *, positions: Any, edits: Edits | None = None) -> Activations:
            found = read(model, batch, positions=positions, edits=edits)
            if edits is None or _kind(edits) != kind:
                return found
            return replace(found, **{field: getattr(read(model, batch, positions=positions), field)})

        return stale

    return _patched("trials.read_activations", wrap_read)


def _shifted(kind: str, by: int) -> Fault:
    """Edits of one kind act in another layer."""

    def make(real: Callable[..., Edits]) -> Callable[..., Edits]:
        def edits(**layers: Any) -> Edits:
            made = real(**layers)
            if _kind(made) != kind:
                return made
            return real(**{name: {(at + by) % 3: what for at, what in each.items()} for name, each in layers.items()})

        return edits

    return _patched("trials.Edits", make)


def _only_at_the_last_position(edit: Callable[..., None]) -> Callable[..., None]:
    def wrapped(projection: Any, replacement: Any, batch: TokenBatch) -> None:
        mask, value = replacement
        here = torch.arange(batch.ids.shape[1]) == batch.last[:, None]
        edit(projection, (mask & here[..., None], value), batch)

    return wrapped


def _a_little_too_much(neurons: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Edits of the projection that reads that many neurons write a thousandth more than they should."""

    def wrap_edit(edit: Callable[..., None]) -> Callable[..., None]:
        def wrapped(projection: Any, replacement: Any, batch: TokenBatch) -> None:
            mask, value = replacement
            edit(projection, (mask, value * 1.001 if mask.shape[-1] == neurons else value), batch)

        return wrapped

    return wrap_edit


def _in_every_row(edit: Callable[..., None]) -> Callable[..., None]:
    def wrapped(projection: Any, replacement: Any, batch: TokenBatch) -> None:
        mask, value = replacement
        edit(projection, (mask.any(0, keepdim=True), value), batch)

    return wrapped


def _at_the_first_position(edit: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What the last position should have taken enters at the first."""

    def wrapped(attention: Any, *args: Any) -> Tensor:
        before = attention.output
        change = edit(attention, *args)
        moved = change.flip(1)
        attention.output = (before[0] + moved, *before[1:])
        return moved

    return wrapped


def _reported_only(edit: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A change of the attention's output that is reported but not made."""

    def wrapped(attention: Any, *args: Any) -> Tensor:
        before = attention.output
        change = edit(attention, *args)
        attention.output = before
        return change

    return wrapped


def _never(attention: Any, *_: Any) -> Tensor:
    return torch.zeros_like(attention.output[0])


def _of_half(real: Callable[..., AbstractContextManager[Model]]) -> Callable[..., AbstractContextManager[Model]]:
    """Parameters of every second neuron are forgotten."""
    return lambda model, neurons: real(model, neurons[::2])


def _of_the_biases_too(
    real: Callable[..., AbstractContextManager[Model]],
) -> Callable[..., AbstractContextManager[Model]]:
    @contextmanager
    def wrapped(model: Model, neurons: Any) -> Iterator[Model]:
        with real(model, neurons) as other:
            twin = copy.deepcopy(other.network._module)
            with torch.no_grad():
                twin.transformer.h[-1].mlp.c_proj.bias.zero_()
            yield replace(other, network=wrap(twin, model.tokenizer))

    return wrapped


_NULL = "null_intervention"
FAULTS: dict[str, tuple[str, Fault, str]] = {
    # Texts are not what they seem.
    "all texts are one": ("gpt2", _normalised(normalizers.Replace(Regex(".+"), "a")), "tokens"),
    "the tokenizer is larger than the model": ("llama", _anatomy(vocabulary=lambda _: 40), "tokens"),
    "words run together": ("gpt2", _normalised(normalizers.Replace(" ", "")), "continuations"),
    "a text ends with EOS, and its answer stands behind that": (
        "llama",
        _patched("identities.texts.tokens_of", lambda _: _ended),
        "continuations",
    ),
    # Texts are not those that the model learned.
    "BOS is forgotten": ("llama", _beginning(said=True, done=False), "beginning"),
    "BOS is not wanted": ("llama", _beginning(said=False, done=True), "beginning"),
    # What is read does not add up.
    "the factor on what sublayers write is forgotten": ("granite", _anatomy(residual_scale=lambda _: 1.0), "layers"),
    "attention is read one layer late": (
        "llama",
        _patched("checks.read_activations", _changed(_with_attention_of_another_layer)),
        "layers",
    ),
    "attention bias is forgotten": ("gpt2", _without("attention", "bias"), "heads"),
    "weight of the norm after attention is forgotten": ("olmo2", _without("attention", "post_weight"), "heads"),
    "scale of the norm after attention is forgotten": ("olmo2", _without("attention", "post_norm"), "heads"),
    "dimensions are counted before heads": ("gpt2", _anatomy(attention=_dimensions_before_heads), "heads"),
    "heads share values in turn": ("llama", _anatomy(value_rows=_next_group), "heads"),
    "queries, keys and values do not take turns": ("gpt_neox", _anatomy(value_rows=_last_third), "heads"),
    "values are not clamped": ("olmo-clipped", _anatomy(value_clip=lambda _: None), "heads"),
    "values of heads are mixed by each other's patterns": (
        "gpt2",
        _patched("engine.decomposition.mix", lambda mix: lambda pattern, values: mix(pattern.flip(1), values)),
        "attention_neurons",
    ),
    "FFN bias is forgotten": ("gpt2", _without("ffn", "bias"), "ffn_neurons"),
    "subvalues belong to their neighbours": ("llama", _sublayers("ffn", _of_neighbours), "ffn_neurons"),
    "factor on what the FFN writes is not folded": ("granite", _without("ffn", "post_weight"), "ffn_neurons"),
    "weight of the norm after the FFN is shuffled": (
        "gemma2",
        _sublayers("ffn", _weighted_as_neighbours),
        "ffn_neurons",
    ),
    "scale of the norm after the FFN is forgotten": ("gemma3", _without("ffn", "post_norm"), "ffn_neurons"),
    # The readout is wrong.
    "final norm weight counts from zero": (
        "gemma",
        _readout(norm=lambda anatomy: replace(anatomy.readout.norm, weight=anatomy.readout.norm.weight - 1)),
        "logits",
    ),
    "final norm does not centre": (
        "gpt2",
        _readout(norm=lambda anatomy: replace(anatomy.readout.norm, centred=False)),
        "logits",
    ),
    "final norm centres": (
        "llama",
        _readout(norm=lambda anatomy: replace(anatomy.readout.norm, centred=True)),
        "logits",
    ),
    "final norm bias is forgotten": (
        "opt",
        _readout(norm=lambda anatomy: replace(anatomy.readout.norm, bias=None)),
        "logits",
    ),
    "unembedding bias is forgotten": ("gptj", _readout(bias=lambda _: None), "logits"),
    "soft cap is forgotten": ("gemma2", _readout(softcap=lambda _: None), "logits"),
    "soft cap is another": ("gemma2", _readout(softcap=lambda anatomy: anatomy.readout.softcap * 1.01), "logits"),
    "logit scale is forgotten": ("cohere", _readout(logit_scale=lambda _: 1.0), "logits"),
    "logits are multiplied where they are divided": (
        "granite",
        _readout(logit_scale=lambda anatomy: 1 / anatomy.readout.logit_scale),
        "logits",
    ),
    # The score is wrong.
    "importance is in bits": (
        "llama",
        _patched("checks.log_prob_increase", lambda increase: lambda *args: increase(*args) / math.log(2)),
        "layer_importances",
    ),
    "importance is its first-order term": (
        "gpt2",
        _patched(
            "checks.log_prob_increase",
            _always(lambda base, update, answer: update[..., answer] - (base.exp() * update).sum(-1)),
        ),
        "layer_importances",
    ),
    # The subkeys are wrong.
    "norm weight before the FFN is shuffled": ("llama", _norms("ffn", _shuffled), "ffn_subkeys"),
    "norm before the FFN does not centre": ("gpt2", _norms("ffn", _off_centre), "ffn_subkeys"),
    "FFN is taken to read the block's input": ("llama", _anatomy(parallel=lambda _: True), "ffn_subkeys"),
    "FFN is taken to read what attention wrote": ("gptj", _anatomy(parallel=lambda _: False), "ffn_subkeys"),
    "gate and up are swapped": (
        "phi3",
        _subkeys(lambda subkeys: replace(subkeys, up=subkeys.gate, gate=subkeys.up)),
        "ffn_subkeys",
    ),
    "bias of the up projection is forgotten": (
        "gpt2",
        _subkeys(lambda subkeys: replace(subkeys, up_bias=None)),
        "ffn_subkeys",
    ),
    "another activation": (
        "llama",
        _subkeys(lambda subkeys: replace(subkeys, activation=torch.nn.functional.gelu)),
        "ffn_subkeys",
    ),
    "norm weight before attention is shuffled": ("llama", _norms("attention", _shuffled), "value_subkeys"),
    "bias of the value projection is forgotten": (
        "gpt2",
        _anatomy(value_biases=lambda anatomy: (None,) * anatomy.layers),
        "value_subkeys",
    ),
    # Tracing is not neutral.
    "masks are ignored": (
        "gpt2",
        _patched("trace._replace", _always(lambda tensor, new: new[1].expand_as(tensor))),
        _NULL,
    ),
    "a rerun rounds": ("llama", _patched("checks.rerun", lambda rerun: lambda *args: rerun(*args) * (1 + 1e-6)), _NULL),
    "a coefficient is NaN": ("gpt2", _patched("checks.read_activations", _changed(_with_a_nan)), "finite"),
    # nnsight counts positions from the first token, the plain module from the padding.
    "padding is on the left": ("gpt2", _patched("checks.pad", _always(_on_the_left)), _NULL),
    "positions are counted from one in a batch": (
        "gpt2",
        _inputs(lambda batch: {"position_ids": torch.arange(1, 1 + batch.ids.shape[1]).expand_as(batch.ids)}),
        "batched",
    ),
    "second tokens are hidden in a batch": (
        "llama",
        _inputs(lambda batch: {"attention_mask": batch.mask.index_fill(1, torch.tensor([1]), 0)}),
        "batched",
    ),
    # Zeroing does not do what it says.
    "edits never fire": ("gpt2", _patched("trace._edit_input", _always(lambda *_: None)), "zeroing_reaches"),
    "zeroing reaches no logits": ("llama", _stale("zeroing", "logits"), "zeroing_reaches"),
    "edits fire at the last position only": (
        "llama",
        _patched("trace._edit_input", _only_at_the_last_position),
        "zeroed_parameters",
    ),
    "zeroing fires one layer late": ("gpt2", _shifted("zeroing", 1), "zeroed_parameters"),
    "every second vector stays": ("gemma2", _patched("trials.zeroed_parameters", _of_half), "zeroed_parameters"),
    "a bias goes with the vectors": (
        "gpt2",
        _patched("trials.zeroed_parameters", _of_the_biases_too),
        "zeroed_parameters",
    ),
    "zeroing fires in every row": ("llama", _patched("trace._edit_input", _in_every_row), "last_layer_ffn"),
    "final state is read before zeroing": ("olmo2", _stale("zeroing", "resid_final"), "last_layer_ffn"),
    "attention is read before zeroing": ("gptj", _stale("zeroing", "attention_output"), "last_layer_attention"),
    # Edits do not do what they say.
    "edits overshoot": ("llama", _patched("trace._edit_input", _a_little_too_much(48)), "coefficient_edits_hit"),
    "coefficients are edited one layer early": ("gpt2", _shifted("coefficients", -1), "coefficient_edits_hit"),
    "coefficients are edited one layer late": ("gpt2", _shifted("coefficients", 1), "coefficient_edits_hit"),
    "FFN output is read before the edit": ("llama", _stale("coefficients", "ffn_output"), "coefficient_edits_add"),
    "edited coefficients reach no logits": ("llama", _stale("coefficients", "logits"), "coefficient_edits_reach"),
    "mixed values are edited one layer early": ("gpt2", _shifted("mixed_values", -1), "mixed_value_edits_hit"),
    "mixed values are edited one layer late": ("gpt2", _shifted("mixed_values", 1), "mixed_value_edits_hit"),
    "mixed values overshoot": (
        "gemma2",
        _patched("trace._edit_input", _a_little_too_much(40)),
        "mixed_value_edits_add",
    ),
    "edited mixed values reach no logits": ("llama", _stale("mixed_values", "logits"), "mixed_value_edits_reach"),
    "source edits act at another position": (
        "gpt2",
        _patched("trace._edit_sources", _at_the_first_position),
        "source_edits_hit",
    ),
    "source edits never fire": ("gpt2", _patched("trace._edit_sources", _always(_never)), "source_edits_add"),
    "source edits are only reported": (
        "llama",
        _patched("trace._edit_sources", _reported_only),
        "source_edits_reach",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_by_the_check_of_its_kind(loaded: Load, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    architecture, fault, expected = FAULTS[name]
    broken = fault(loaded(architecture), monkeypatch)
    with pytest.raises(PreflightError, match=f"breaks the identity '{expected}'"):
        at.preflight(broken)


def test_every_check_has_a_fault_that_it_is_the_first_to_catch() -> None:
    # All neurons add up wherever each kind of them does and the layers do, which is checked before;
    # test_identities.py shows it broken.
    assert {expected for _, _, expected in FAULTS.values()} == CHECKS.keys() - {"all_neurons"}


def test_the_message_gives_model_identity_value_bound_derivation_and_remedy(
    loaded: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = _without("ffn", "bias")(loaded("gpt2"), monkeypatch)
    with pytest.raises(PreflightError) as caught:
        at.preflight(broken)
    message = str(caught.value)
    for part in (
        f"model {broken.name!r}",
        "'ffn_neurons' (FFN neurons + bias = FFN output)",
        "times the rounding bound, where at most 1 is allowed",
        "n * eps * (sum of |terms|) for n = FFN neurons + 1",
        "correct the record of its family in attribution/models/families.py",
    ):
        assert part in message
    assert isinstance(caught.value, at.AttributionError)


def test_a_check_prints_its_verdict_and_nan_never_holds() -> None:
    holds = Check("layers", "one = other", 0.25, 1)
    assert holds.holds
    assert str(holds) == "holds: layers: one = other (0.25, at most 1)"
    broken = replace(holds, value=math.nan)
    assert not broken.holds
    assert str(broken).startswith("BROKEN: layers")


# What the verdict must not depend on.


def test_random_numbers_neither_matter_nor_are_used_up(model: Model) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = at.preflight(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert at.preflight(model) == first


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "gemma2", "olmo-clipped"])
def test_other_random_weights_pass(loaded: Load, architecture: str) -> None:
    model = loaded(architecture)
    for seed in range(5):
        module = copy.deepcopy(model.network._module)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                shuffled = parameter.flatten()[torch.randperm(parameter.numel(), generator=generator)]
                parameter.copy_(shuffled.view_as(parameter))
        _passes(Model(f"seed {seed}", wrap(module, model.tokenizer), read_anatomy(module, "shuffled"), model.tokenizer))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gptj", "granite", "olmo2"])
def test_bounds_follow_the_type_of_the_weights(
    make_folder: Callable[[str], Path], architecture: str, dtype: Any
) -> None:
    sound = at.load(str(make_folder(architecture)), dtype=dtype)
    _passes(sound)
    # And they are still bounds: neighbours' vectors exceed them.
    with pytest.raises(PreflightError, match="'ffn_neurons'"):
        at.preflight(_sublayers("ffn", _of_neighbours)(sound, pytest.MonkeyPatch()))


def test_a_type_in_which_the_model_gives_no_numbers_is_named(make_folder: Callable[[str], Path]) -> None:
    # transformers masks whole rows of padding beyond a sliding window with what float32 takes for minus infinity.
    with pytest.raises(PreflightError, match=r"'finite'.*load the model with another dtype"):
        at.preflight(at.load(str(make_folder("mistral")), dtype=torch.float64))


# Prompts.


@pytest.mark.parametrize(
    "prompts",
    ["a", "The capital of France is", at.Prompt("A ripe cherry", " red"), PROMPTS, (*PROMPTS, PROMPTS[0]), ["a", "a"]],
    ids=str,
)
def test_prompts_may_be_the_users(model: Model, prompts: Any) -> None:
    _passes(model, prompts)


@pytest.mark.parametrize("prompts", [[], [""], "The number " * 40, 3, [3]], ids=["none", "empty", "long", "3", "[3]"])
def test_prompts_that_cannot_be_used_are_bad_input(model: Model, prompts: Any) -> None:
    with pytest.raises(BadInputError):
        at.preflight(model, prompts)


def test_a_prompt_that_is_too_long_is_told_the_context(model: Model) -> None:
    with pytest.raises(BadInputError, match="the model's context holds 32; shorten it"):
        at.preflight(model, "The number of legs " * 20)


@pytest.mark.parametrize("ids", [(5,), (1, 5), tuple(range(100)), (7,) * 100], ids=["one", "two", "many", "same"])
def test_any_tokenizer_gives_prompts_within_the_context(
    model: Model, monkeypatch: pytest.MonkeyPatch, ids: tuple[int, ...]
) -> None:
    monkeypatch.setattr(checks, "tokens_of", lambda *_: list(ids))
    _passes(model)


# What it leaves behind.


def _hooks(model: Model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.network._module.modules())


def test_nothing_of_it_stays_in_the_model(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("gpt2")
    weights = {name: tensor.clone() for name, tensor in model.network._module.state_dict().items()}
    at.preflight(model)
    read = checks.read_activations

    def fail_when_shaken(model: Model, *args: Any, **options: Any) -> Activations:
        if _hooks(model):
            raise ZeroDivisionError
        return read(model, *args, **options)

    monkeypatch.setattr(checks, "read_activations", fail_when_shaken)
    with pytest.raises(ZeroDivisionError):
        at.preflight(model)
    monkeypatch.undo()
    assert _hooks(model) == 0
    after = model.network._module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    _passes(model)


# Shapes at the edge.


def _tiny_gpt2(model: Model, **sizes: int) -> Model:
    config = GPT2Config(vocab_size=model.anatomy.vocabulary, attn_implementation="eager", **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = GPT2LMHeadModel(config).eval().requires_grad_(requires_grad=False)
    return Model("tiny", wrap(module, model.tokenizer), read_anatomy(module, "tiny"), model.tokenizer)


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_layer": 1, "n_head": 1, "n_embd": 8},
        {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_inner": 1},
        {"n_layer": 12, "n_head": 2, "n_embd": 8},
    ],
    ids=["one layer, one head", "one FFN neuron", "more layers than zeroed rows"],
)
def test_smallest_and_deep_models_pass(loaded: Load, sizes: dict[str, int]) -> None:
    _passes(_tiny_gpt2(loaded("gpt2"), **sizes))


def _silenced(model: Model, layers: Sequence[int]) -> Model:
    """Return a copy some of whose FFNs write nothing."""
    module = copy.deepcopy(model.network._module)
    with torch.no_grad():
        for layer in layers:
            module.transformer.h[layer].mlp.c_proj.weight.zero_()
    return Model("silenced", wrap(module, model.tokenizer), read_anatomy(module, "silenced"), model.tokenizer)


def test_a_layer_that_writes_nothing_is_not_asked_to_change_anything(loaded: Load) -> None:
    _passes(_silenced(loaded("gpt2"), [1]))


def test_a_model_in_which_no_edit_can_be_seen_does_not_pass(loaded: Load) -> None:
    with pytest.raises(PreflightError, match=r"'coefficient_edits_reach'.*in which neurons make a difference"):
        at.preflight(_silenced(loaded("gpt2"), range(3)))


# In the suite.

SUITE = """
def test_one(attribution_model): pass
def test_two(attribution_model): pass
"""
COUNTING = """
from attribution.identities import preflight as checks
preflight = checks.preflight
def counted(model):
    made = preflight(model)
    print(f"PREFLIGHT of {model.name}: {len(made)}")
    return made
checks.preflight = counted
"""
BROKEN = """
from attribution.engine import trace
trace._edit_input = lambda *_: None
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, folders: dict[str, Path], tmp_path: Path) -> Callable[[str], pytest.RunResult]:
    """Run a suite of two tests that use a model, with some code in its conftest.py."""

    def run(conftest: str) -> pytest.RunResult:
        (tmp_path / "gpt2").symlink_to(folders["gpt2"], target_is_directory=True)
        pytester.makepyfile(test_suite=SUITE)
        pytester.makeconftest(conftest)
        options = ("-m", "gpt2", "-p", "no:cacheprovider", "-s", f"--models-dir={tmp_path}")
        return pytester.runpytest_subprocess(*options)

    return run


def test_a_suite_runs_it_once_per_model(suite: Callable[[str], pytest.RunResult]) -> None:
    result = suite(COUNTING)
    result.assert_outcomes(passed=2)
    assert f"PREFLIGHT of gpt2: {len(CHECKS)}" in result.stdout.str()
    assert result.stdout.str().count("PREFLIGHT") == 1


def test_a_suite_on_a_broken_model_is_one_error_that_names_the_identity(
    suite: Callable[[str], pytest.RunResult],
) -> None:
    result = suite(BROKEN)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(errors=1)
    text = result.stdout.str()
    assert "model 'gpt2' breaks the identity 'zeroing_reaches'" in text
    assert "Traceback" not in text
