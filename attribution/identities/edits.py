"""What edits do to a model, held against what they claim to do: the part of the preflight that edits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from attribution.engine.decomposition import mix, rounding, worst
from attribution.engine.trace import Activations, Edits, read_activations, rerun
from attribution.experiments.edited_copies import zeroed_parameters
from attribution.models.anatomy import Anatomy
from attribution.models.model import Model
from attribution.models.norms import frozen_scale
from attribution.prompts.tokens import TokenBatch, pad
from attribution.records import AttentionNeuron, FFNNeuron, SublayerKind

__all__ = ["EDITS", "EditName", "Trial", "differing", "edit_errors", "logits_of", "ratio", "zeroing_errors"]

EditName: TypeAlias = Literal["coefficient", "mixed_value", "source"]

EDITS: dict[EditName, SublayerKind] = {"coefficient": "ffn", "mixed_value": "attention", "source": "attention"}
"""The sublayer that each kind of edit acts in."""

# What an edit leaves alone in its own layer; in the layers before it, that is everything.
_UNTOUCHED: dict[EditName, tuple[str, ...]] = {
    "coefficient": ("resid_pre", "values", "pattern", "attention_post_scale", "attention_output", "resid_mid"),
    "mixed_value": ("resid_pre", "values", "pattern"),
    "source": ("resid_pre", "values", "pattern"),
}
# Neurons that an edit replaces.
_EDITED = 2
# What is written instead moves the residual stream by this share of its norm: far beyond rounding in any type.
_PUSH = 0.5
# What is zeroed must matter, also where one neuron among thousands does not: an eighth of a sublayer.
_ZEROED_SHARE = 8
# Two ways of zeroing agree only if they differ by less than this part of what zeroing any one sublayer changes. Only in
# half precision is that less than what rounding may change.
_VISIBLE = 4


def differing(one: Tensor, other: Tensor) -> int:
    """Return how many numbers differ; two NaN do not, which other checks catch."""
    return int(((one != other) & ~(one.isnan() & other.isnan())).sum())


def ratio(errors: Tensor, bounds: Tensor) -> float:
    """Return the largest error in units of its bound."""
    return float((errors / (bounds + torch.finfo(torch.float64).tiny)).max())


def logits_of(activations: Activations) -> Tensor:
    """Return the logits of a trace that went on to them."""
    assert activations.logits is not None
    return activations.logits


@dataclass(frozen=True)
class Trial:
    """Rows of a few tokens to edit, each in its own way, and how they run when nothing is edited.

    Attributes:
        model: The model.
        batch: At least one row for each layer, and one more than sublayers are zeroed in.
        plain: Its activations at all positions.
        response: How far rounding may move each row's last logits, an L2 norm, (batch,).
    """

    model: Model
    batch: TokenBatch
    plain: Activations
    response: Tensor

    @classmethod
    def of(cls, model: Model, rows: Sequence[Sequence[int]], moved: Tensor) -> Trial:
        """Return a trial of some rows of tokens in turn.

        Args:
            model: A loaded model.
            rows: Tokens.
            moved: How rounding moves their logits, in several draws, (draws, rows, position, vocabulary).
        """
        turns = [number % len(rows) for number in range(max(model.anatomy.layers, len(_cases(model)) + 1))]
        batch = pad([rows[turn] for turn in turns], device=model.device)
        plain = read_activations(model, batch, positions="all")
        response = torch.stack([moved[:, turn, len(rows[turn]) - 1].double().norm(dim=-1).max() for turn in turns])
        return cls(model, batch, plain, response)

    def edited(self, edits: Edits) -> Activations:
        """Return the activations behind edits."""
        return read_activations(self.model, self.batch, positions="all", edits=edits)

    def last_logits(self, run: Activations) -> Tensor:
        """Return the logits at each row's last real token, (batch, vocabulary)."""
        return logits_of(run)[torch.arange(len(self.batch.last), device=self.model.device), self.batch.last]

    def unmoved(self, edited: Activations, live: Sequence[bool]) -> int:
        """Return how many of the first rows have the very logits that they have without an edit.

        Rows whose edit writes nothing are not counted, unless all are such.
        """
        pairs = zip(self.last_logits(edited), self.last_logits(self.plain), live, strict=False)
        return sum(differing(one, other) == 0 for one, other, alive in pairs if alive or not any(live))

    def inputs(self, sublayer: SublayerKind, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Return what a projection reads, and the sum of |terms| it is made of, float64, (position, neurons)."""
        if sublayer == "ffn":
            coefficients = self.plain.coefficients[layer, row].double()
            return coefficients, coefficients.abs()
        pattern = self.plain.pattern[layer, row, None].double()
        values = self.plain.values[layer, row, None].double()
        return mix(pattern, values)[0], mix(pattern, values.abs())[0]

    def written(self, sublayer: SublayerKind, layer: int, inputs: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a sublayer writes given its projection's inputs, and how far rounding can move it.

        With V the value vectors, b the bias and f the post-norm's weight, ``f * (inputs V + b) / s``. s is the scale of
        the norm that follows, at what it then reads, as an edit changes the scale too; it is 1 where no norm follows.
        """
        anatomy, dtype = self.model.anatomy, self.plain.resid_pre.dtype
        own = anatomy.sublayer(layer, sublayer)
        vectors, bias, norm = own.vectors.double(), own.bias, own.post_norm
        raw, size = inputs @ vectors, sizes @ vectors.abs()
        if bias is not None:
            raw, size = raw + bias.double(), size + bias.double().abs()
        terms = len(vectors) + len(inputs) + 1
        if norm is not None:
            terms += anatomy.width
            post_scale = 1 / frozen_scale(raw, norm)[..., None]
            # Rounding of what the norm reads moves its scale too, relatively by the rms of the one over the other.
            size = post_scale * (size + (post_scale * raw).abs() * size.square().mean(-1, keepdim=True).sqrt())
            raw = post_scale * raw
        post_weight = _post_weight(anatomy, sublayer, layer)
        return post_weight * raw, rounding(dtype, terms, normed=norm is not None) * post_weight.abs() * size


def _post_weight(anatomy: Anatomy, sublayer: SublayerKind, layer: int) -> Tensor:
    weight = anatomy.sublayer(layer, sublayer).post_weight
    return torch.ones((), dtype=torch.float64) if weight is None else weight.double()


def _lengths(anatomy: Anatomy, sublayer: SublayerKind, layer: int) -> Tensor:
    """Return the L2 norm of what each neuron writes per unit of coefficient and post-norm scale, (neurons,)."""
    vectors = anatomy.sublayer(layer, sublayer).vectors
    lengths: Tensor = torch.linalg.vector_norm(vectors.double() * _post_weight(anatomy, sublayer, layer), dim=-1)
    return lengths


def _cases(model: Model) -> list[tuple[int, SublayerKind]]:
    """Return the sublayers whose neurons are zeroed; the last layer's come last, its FFN before its attention."""
    layers = model.anatomy.layers
    sublayers: tuple[SublayerKind, SublayerKind] = ("ffn", "attention")
    return [(layer, each) for layer in sorted({0, layers // 2, layers - 1}) for each in sublayers]


def zeroing_errors(trial: Trial) -> Iterator[tuple[str, float]]:
    """Zero neurons of one sublayer in each of the first rows, and all of them together in the next.

    Yields:
        Check and value.
    """
    model, anatomy, plain = trial.model, trial.model.anatomy, trial.plain
    cases = _cases(model)
    together, rows = len(cases), len(trial.batch.last)
    ffn = torch.zeros(anatomy.layers, rows, 1, anatomy.ffn_neurons, dtype=torch.bool, device=model.device)
    attention = ffn.new_zeros(anatomy.layers, rows, 1, anatomy.heads * anatomy.head_dim)
    records: list[FFNNeuron | AttentionNeuron] = []
    live = []
    for row, (layer, sublayer) in enumerate(cases):
        strengths = trial.inputs(sublayer, layer, row)[0].abs().amax(0) * _lengths(anatomy, sublayer, layer)
        strongest = strengths.topk(math.ceil(len(strengths) / _ZEROED_SHARE))
        live.append(bool(strongest.values[0] > 0))
        mask = ffn if sublayer == "ffn" else attention
        for edited_row in (row, together):
            mask[layer, edited_row, 0, strongest.indices] = True
        for place in strongest.indices.tolist():
            head, dim = divmod(place, anatomy.head_dim)
            records.append(FFNNeuron(layer, place) if sublayer == "ffn" else AttentionNeuron(layer, head, dim, 0))
    zero = torch.zeros((), device=model.device)
    switched_off = [
        {layer: (mask, zero) for layer, mask in enumerate(of_all) if mask.any()} for of_all in (ffn, attention)
    ]
    edited = trial.edited(Edits(coefficients=switched_off[0], mixed_values=switched_off[1]))
    yield "zeroing_reaches", trial.unmoved(edited, live)
    with zeroed_parameters(model, records) as other:
        by_parameters = rerun(other, trial.batch)[together]
    logits, unedited = trial.last_logits(edited).double(), trial.last_logits(plain).double()
    effects = (logits - unedited)[: len(cases)].norm(dim=-1)[torch.tensor(live, device=model.device)]
    tolerance = torch.cat([effects / _VISIBLE, trial.response[together, None]]).min()
    yield "zeroed_parameters", ratio((by_parameters.double() - logits[together]).norm(), tolerance)

    def error(row: int, stream: Callable[[Activations], Tensor], additions: int) -> float:
        """Return the error of what ablation moves a stream by, which is that many rounded sums away."""
        layer, sublayer = cases[row]
        inputs, sizes = trial.inputs(sublayer, layer, row)
        kept = ~(ffn if sublayer == "ffn" else attention)[layer, row]
        before, bound = trial.written(sublayer, layer, inputs, sizes)
        after, after_bound = trial.written(sublayer, layer, inputs * kept, sizes * kept)
        bound = bound + after_bound
        for run in (plain, edited):
            for part in (run.resid_pre, run.attention_output, run.ffn_output):
                bound = bound + rounding(part.dtype, 0, stored=additions) * part[layer, row].double().abs()
        moved = stream(edited)[row].double() - stream(plain)[row].double()
        real = trial.batch.mask[row].bool()
        return ratio((moved - (after - before)).abs()[real], bound[real])

    ffn_row, attention_row = together - 2, together - 1
    yield "last_layer_ffn", error(ffn_row, lambda run: run.resid_final, 2)
    errors = [error(attention_row, lambda run: run.attention_output[-1], 0)]
    if anatomy.parallel:
        errors.append(error(attention_row, lambda run: run.resid_final, 2))
    yield "last_layer_attention", worst(errors)


@dataclass(frozen=True)
class _Edit:
    """An edit of two neurons of a layer in the row of the layer's number, at every position.

    Attributes:
        mask: What is replaced, in the shape of :class:`~attribution.engine.trace.Edits`.
        filler: What with, in that row.
        inputs: What the projection then reads, (position, neurons).
        sizes: The sum of |terms| that it is made of.
        live: Whether what is replaced is written at all.
    """

    mask: Tensor
    filler: Tensor
    inputs: Tensor
    sizes: Tensor
    live: bool


def _edit(trial: Trial, name: EditName, layer: int) -> _Edit:
    anatomy, plain, row = trial.model.anatomy, trial.plain, layer
    sublayer, dtype, device = EDITS[name], plain.resid_pre.dtype, trial.model.device
    inputs, sizes = trial.inputs(sublayer, layer, row)
    rows, (positions, neurons) = len(trial.batch.last), inputs.shape
    strongest = _lengths(anatomy, sublayer, layer).topk(min(_EDITED, neurons))
    live = bool(strongest.values[-1] > 0)
    stream = plain.resid_mid[layer, row].double().norm(dim=-1, keepdim=True)
    post_scale = (plain.ffn_post_scale if sublayer == "ffn" else plain.attention_post_scale)[
        layer, row, :, None
    ].double()
    push = _PUSH * stream / (post_scale * strongest.values if live else torch.ones_like(strongest.values))
    if name != "source":
        mask = torch.zeros(rows, 1, neurons, dtype=torch.bool, device=device)
        mask[row, 0, strongest.indices] = True
        filler = inputs.index_add(1, strongest.indices, push).to(dtype)
        replaced, new = mask[row], filler.double()
        return _Edit(mask, filler, torch.where(replaced, new, inputs), torch.where(replaced, new.abs(), sizes), live)
    # What the last position takes: of one neuron from the first position, of the other from the last.
    last = int(trial.batch.last[row])
    mask = torch.zeros(rows, neurons, positions, dtype=torch.bool, device=device)
    mask[row, strongest.indices, torch.tensor([0, last], device=device)[: len(strongest.indices)]] = True
    pattern, values = plain.pattern[layer, row, :, last].double(), plain.values[layer, row].double()
    taken = torch.einsum("hp,phd->hdp", pattern, values).flatten(0, 1)
    filler = taken.index_add(0, strongest.indices, push[last, :, None].expand(-1, positions)).to(dtype)
    new = filler.double()
    inputs[last] += torch.where(mask[row], new - taken, 0).sum(-1)
    sizes[last] += torch.where(mask[row], new.abs() + taken.abs(), 0).sum(-1)
    heads = (anatomy.heads, anatomy.head_dim)
    return _Edit(mask.unflatten(1, heads), filler.unflatten(0, heads), inputs, sizes, live)


def edit_errors(trial: Trial, name: EditName) -> Iterator[tuple[str, float]]:
    """Replace neurons of each layer, in a row of its own.

    Yields:
        Check and value.
    """
    plain, sublayer = trial.plain, EDITS[name]
    planned = [_edit(trial, name, layer) for layer in range(trial.model.anatomy.layers)]
    replacements = {layer: (plan.mask, plan.filler) for layer, plan in enumerate(planned)}
    edited = trial.edited(Edits(**{f"{name}s": replacements}))
    per_layer = [each.name for each in fields(Activations) if each.name not in ("resid_final", "logits")]
    misses, errors = 0, []
    for layer, plan in enumerate(planned):
        row = layer
        for each in per_layer:
            upto = layer + (each in _UNTOUCHED[name])
            misses += differing(getattr(edited, each)[:upto, row], getattr(plain, each)[:upto, row])
        written, unedited = (getattr(run, f"{sublayer}_output")[layer, row] for run in (edited, plain))
        if name == "coefficient":
            expected = torch.where(plan.mask[row], plan.filler, plain.coefficients[layer, row])
            misses += differing(edited.coefficients[layer, row], expected)
        elif name == "source":
            others = torch.arange(len(written), device=written.device) != trial.batch.last[row]
            misses += differing(written[others], unedited[others])
        before, bound = trial.written(sublayer, layer, *trial.inputs(sublayer, layer, row))
        after, after_bound = trial.written(sublayer, layer, plan.inputs, plan.sizes)
        moved = written.double() - unedited.double()
        real = trial.batch.mask[row].bool()
        errors.append(ratio((moved - (after - before)).abs()[real], (bound + after_bound)[real]))
    yield f"{name}_edits_hit", misses
    yield f"{name}_edits_add", worst(errors)
    yield f"{name}_edits_reach", trial.unmoved(edited, [plan.live for plan in planned])
