"""Where things are in a model, read by the record of its family.

Sizes are read from weights and checked against the config.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from attribution.errors import ModelError, UnsupportedModelError
from attribution.models.families import Family, family_of
from attribution.models.norms import Norm
from attribution.records import SublayerKind

__all__ = [
    "Anatomy",
    "ByLayer",
    "Readout",
    "Subkeys",
    "Sublayer",
    "first_tensor",
    "read_anatomy",
    "resolve",
]

T = TypeVar("T")


class ByLayer(Sequence[T], Generic[T]):
    """What is made of one layer's weights when it is asked for, and not kept.

    The weights of a model that is spread over devices or processes need not fit on one of them together.

    Args:
        make: Layer to what is made of it.
        layers: Number of layers.
    """

    def __init__(self, make: Callable[[int], T], layers: int) -> None:
        self._make, self._layers = make, layers

    def __len__(self) -> int:
        return self._layers

    @overload
    def __getitem__(self, layer: int) -> T: ...

    @overload
    def __getitem__(self, layer: slice) -> Sequence[T]: ...

    def __getitem__(self, layer: int | slice) -> T | Sequence[T]:
        if isinstance(layer, slice):
            return [self._make(each) for each in range(*layer.indices(self._layers))]
        if not -self._layers <= layer < self._layers:
            raise IndexError(layer)
        return self._make(layer % self._layers)


@dataclass(frozen=True)
class Readout:
    """The final norm and the unembedding: how the final residual state becomes logits.

    Attributes:
        unembedding: ``W_U``, (vocabulary, width), in the model's dtype.
        bias: Bias of the unembedding, (vocabulary,), or ``None``.
        norm: The final norm.
        logit_scale: Factor on the logits; 1 in most families.
        softcap: c in logits = c tanh(logits / c), or ``None``.
    """

    unembedding: Tensor
    bias: Tensor | None
    norm: Norm
    logit_scale: float
    softcap: float | None


@dataclass(frozen=True)
class Subkeys:
    """What the FFN neurons of one layer look for: m = act(up . x + b) or m = act(gate . x + b') (up . x + b).

    Attributes:
        up: Rows of the up projection, (ffn_neurons, width).
        up_bias: (ffn_neurons,), or ``None``.
        gate: Rows of the gate projection, (ffn_neurons, width); ``None`` in a plain FFN.
        gate_bias: (ffn_neurons,), or ``None``.
        activation: act.
    """

    up: Tensor
    up_bias: Tensor | None
    gate: Tensor | None
    gate_bias: Tensor | None
    activation: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sublayer:
    """The attention or the FFN of one block: what its neurons write, and the norms around it.

    A neuron writes ``coefficient * post_scale * (post_weight * vector)`` into the residual stream, where the post scale
    is 1 / s of the norm that follows the sublayer, 1 where none does.

    Attributes:
        layer: Number of the block.
        kind: ``"attention"`` or ``"ffn"``.
        bias: Of the output projection, (width,) or ``None``; it belongs to no neuron.
        input_norm: Norm before the sublayer, or ``None``.
        post_norm: Norm between the sublayer and the residual stream, or ``None``.
        post_weight: The post-norm's weight times the family's constant, (width,); ``None`` for ones.
        read_vectors: Returns :attr:`vectors`.
    """

    layer: int
    kind: SublayerKind
    bias: Tensor | None
    input_norm: Norm | None
    post_norm: Norm | None
    post_weight: Tensor | None
    read_vectors: Callable[[], Tensor] = field(repr=False)

    @property
    def vectors(self) -> Tensor:
        """The value vectors: a view of the weight, (rows, width).

        Row ``index`` of an FFN belongs to its neuron ``index``, row ``head * head_dim + dim`` of an attention to
        (head, dim). Of a model that is spread over devices or processes, a whole copy, made each time it is asked for.
        """
        return self.read_vectors()


@dataclass(frozen=True)
class Anatomy:
    """Sizes, weights and module paths of one loaded model.

    Tensors are the model's own weights, not copies, unless it is spread over devices or processes: then they are whole
    copies on the device of the unembedding, and those of the projections are made each time they are asked for.

    Attributes:
        family: The family record.
        layers: Number of blocks.
        width: Width of the residual stream.
        heads: Attention heads per layer.
        kv_heads: Key/value heads per layer; fewer than ``heads`` under grouped queries.
        head_dim: Dimensions per head.
        ffn_neurons: FFN neurons per layer.
        vocabulary: Number of tokens.
        context: Longest prompt in tokens; ``None`` if the family sets no limit.
        parallel: Whether the FFN reads the block's input instead of what attention has written to.
        attention: The attention of each block, see :meth:`sublayer`.
        ffn: The FFN of each block.
        residual_scale: The family's constant, contained in the sublayers' post weights.
        value_rows: Row of the value projection that computes each (head, dim), (heads * head_dim,); heads that
            share a key/value head share rows.
        value_weights: Weight of the value projection per layer, (features, width).
        value_biases: Its bias per layer, (features,) or ``None``.
        value_clip: Values are clamped to plus and minus this; ``None`` for no limit.
        subkeys: FFN subkeys per layer.
        readout: Final norm and unembedding.
        spread: Whether the weights lie on several devices, or in parts with several processes.
        breaks: Lengths in tokens beyond which the model reads positions otherwise, in all rows of a batch.
    """

    family: Family
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_neurons: int
    vocabulary: int
    context: int | None
    parallel: bool
    attention: tuple[Sublayer, ...] = field(repr=False)
    ffn: tuple[Sublayer, ...] = field(repr=False)
    residual_scale: float
    value_rows: Tensor
    value_weights: Sequence[Tensor]
    value_biases: tuple[Tensor | None, ...]
    value_clip: float | None
    subkeys: Sequence[Subkeys]
    readout: Readout
    spread: bool = False
    breaks: tuple[int, ...] = ()
    _made: dict[Callable[[Anatomy], Any], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, make: Callable[[Anatomy], T]) -> T:
        """Return what a function makes of these weights: made when first asked for, and kept with them."""
        if make not in self._made:
            self._made[make] = make(self)
        made: T = self._made[make]
        return made

    def forget(self) -> None:
        """Drop all that :meth:`once` made, after the weights were edited."""
        self._made.clear()

    def __repr__(self) -> str:
        return (
            f"Anatomy({self.family.model_type}: {self.layers} layers, width {self.width}, {self.heads} heads "
            f"({self.kv_heads} key/value) of {self.head_dim}, {self.ffn_neurons} FFN neurons per layer, "
            f"vocabulary {self.vocabulary}, context {self.context})"
        )

    def sublayer(self, layer: int, kind: SublayerKind) -> Sublayer:
        """Return the attention or the FFN of a block."""
        return (self.attention if kind == "attention" else self.ffn)[layer]

    def blocks(self, root: Any) -> list[Any]:
        """Return the blocks of ``root``, which may be the plain module or its traced envoy."""
        return list(resolve(root, self.family.blocks))

    def split_values(self, projected: Tensor) -> Tensor:
        """Return each head's values from the value projection's output.

        Args:
            projected: (batch, position, features).

        Returns:
            (batch, position, head, dim), a copy.
        """
        values: Tensor = projected[..., self.value_rows.to(projected.device)].unflatten(-1, (self.heads, self.head_dim))
        return values if self.value_clip is None else values.clamp(-self.value_clip, self.value_clip)

    def value_subkeys(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Return what each (head, dim) looks for: weight (heads * head_dim, width) and bias or ``None``."""
        bias = self.value_biases[layer]
        return self.value_weights[layer][self.value_rows], None if bias is None else bias[self.value_rows]


def resolve(root: Any, path: str) -> Any:
    """Follow a dotted path of attributes, on a module or on its traced envoy."""
    return reduce(getattr, path.split("."), root)


def first_tensor(output: Any) -> Any:
    """Return what a module passes on: some families' blocks return a tuple with their weights second."""
    return output[0] if isinstance(output, tuple) else output


def _has(block: nn.Module, path: str) -> bool:
    """Whether a block has a module at a path; some families set what they lack to ``None``."""
    return getattr(block, path, None) is not None


def _whole(weight: Tensor, home: torch.device) -> Tensor:
    """Return a weight whole and on one device: itself, if it is. Of parts, every process must ask for it at once."""
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    return weight.detach().to(home)


def _output_by_input(module: nn.Module) -> tuple[int, int]:
    """Return the sizes of a projection without reading it."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _rows_by_output(module: nn.Module, home: torch.device) -> Tensor:
    """Return a projection's weight as (output, input): row i is what output i looks for.

    ``nn.Linear`` stores (output, input); GPT-2's ``Conv1D`` stores (input, output).
    """
    weight = _whole(module.weight, home)  # type: ignore[arg-type]
    return weight if isinstance(module, nn.Linear) else weight.T


def _bias(module: nn.Module, home: torch.device) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else _whole(bias, home)


def _read_norm(module: nn.Module | None, family: Family, home: torch.device) -> Norm | None:
    if module is None:
        return None
    weight: Tensor | None = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name)), None)
    eps = family.fixed_eps if eps is None else eps
    assert eps is not None, f"{type(module).__name__} holds no epsilon"
    return Norm(
        weight=None if weight is None else _whole(weight, home) + family.weight_offset,
        bias=_bias(module, home),
        eps=float(eps),
        centred=family.centred,
    )


def _norm_at(block: nn.Module, paths: tuple[str, ...], family: Family, home: torch.device) -> Norm | None:
    return _read_norm(next((getattr(block, path) for path in paths if _has(block, path)), None), family, home)


def _value_rows(outputs: int, heads: int, head_dim: int, family: Family, name: str) -> tuple[Tensor, int]:
    """Return the value projection's row of each (head, dim) and the number of key/value heads."""
    parts, remainder = divmod(outputs, head_dim)
    if family.values == "separate":
        kv_heads = parts
    else:
        # Queries of all heads, keys and values of the key/value heads.
        kv_heads, odd = divmod(parts - heads, 2)
        remainder += odd
    if remainder or kv_heads < 1 or heads % kv_heads:
        raise ModelError(
            f"model {name!r} has {heads} heads of {head_dim} dimensions, which do not divide the {outputs} outputs of "
            "its value projection; its config and weights do not belong together."
        )
    group = heads // kv_heads
    rows = torch.arange(outputs)
    if family.values == "interleaved":
        values = rows.view(kv_heads, group + 2, head_dim)[:, -1]
    else:
        values = rows[-kv_heads * head_dim :].view(kv_heads, head_dim)
    return values.repeat_interleave(group, dim=0).flatten(), kv_heads


def _subkeys(block: nn.Module, family: Family, home: torch.device) -> Subkeys:
    up_module = resolve(block, family.ffn_up)
    up, up_bias = _rows_by_output(up_module, home), _bias(up_module, home)
    gate, gate_bias = None, None
    if family.ffn_gate == family.ffn_up:
        gate, up = up.chunk(2)
        if up_bias is not None:
            gate_bias, up_bias = up_bias.chunk(2)
    elif family.ffn_gate is not None:
        gate_module = resolve(block, family.ffn_gate)
        gate, gate_bias = _rows_by_output(gate_module, home), _bias(gate_module, home)
    return Subkeys(up, up_bias, gate, gate_bias, resolve(block, family.activation))


def _setting(config: Any, name: str | None, default: Any) -> Any:
    return default if name is None else getattr(config, name)


def _sublayer(
    block: nn.Module, layer: int, kind: SublayerKind, family: Family, scale: float, home: torch.device
) -> Sublayer:
    """Read one sublayer; ``scale`` is the family's constant."""
    if kind == "attention":
        norm_paths, post_path, out_path = family.attention_norm, family.attention_post_norm, family.attention_out
    else:
        norm_paths, post_path, out_path = family.ffn_norm, family.ffn_post_norm, family.ffn_out
    projection = resolve(block, out_path)
    post_norm = _norm_at(block, () if post_path is None else (post_path,), family, home)
    post_weight = None if post_norm is None else post_norm.weight
    if post_weight is not None:
        post_weight = post_weight * scale
    elif scale != 1:
        width = _output_by_input(projection)[0]
        post_weight = torch.full((width,), scale, dtype=projection.weight.dtype, device=home)
    return Sublayer(
        layer=layer,
        kind=kind,
        bias=_bias(projection, home),
        input_norm=_norm_at(block, norm_paths, family, home),
        post_norm=post_norm,
        post_weight=post_weight,
        read_vectors=lambda: _rows_by_output(projection, home).T,
    )


def _check_finite(module: nn.Module, name: str) -> None:
    for parameter_name, parameter in module.named_parameters():
        finite = torch.isfinite(parameter.detach()).all()
        if not (finite.full_tensor() if isinstance(finite, DTensor) else finite):
            raise ModelError(
                f"model {name!r} has weights that are NaN or infinite in {parameter_name}; train or download it again."
            )


def _check_classes(module: nn.Module, name: str) -> None:
    """Complain of modules that are not the architecture's own: they compute something else than what is read here."""
    for path, each in module.named_modules():
        place = type(each).__module__
        if not place.startswith(("torch.nn.", "transformers.")) or place.startswith("transformers.integrations."):
            raise UnsupportedModelError(
                f"model {name!r} has a {place}.{type(each).__name__} at {path or 'its root'}, which is no part of the "
                "architecture; merge adapters into the weights and load these unquantised."
            )


def _breaks(config: Any) -> tuple[int, ...]:
    """Return the lengths beyond which "longrope" takes other angles: for a whole batch, by its longest row."""
    parameters = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one for each type of layer.
    sets = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    found = (each["original_max_position_embeddings"] for each in sets if each.get("rope_type") == "longrope")
    return tuple(sorted(set(found)))


def _is_spread(module: nn.Module, home: torch.device) -> bool:
    return any(isinstance(each, DTensor) or each.device != home for each in module.parameters())


def read_anatomy(module: nn.Module, name: str, *, check: bool = True) -> Anatomy:
    """Read the anatomy of a loaded model.

    Args:
        module: A causal language model of transformers.
        name: What to call it in errors.
        check: Whether to look for weights that are not finite, which reads all of them; of a model without weights
            (on the meta device) there are none to look at.

    Raises:
        UnsupportedModelError: If its family has no record.
        ModelError: If sizes disagree or weights are not finite.
    """
    whole: Any = module.config
    family, config = family_of(whole, name), whole.get_text_config()
    _check_classes(module, name)
    blocks = list(resolve(module, family.blocks))
    attention_outs = [resolve(block, family.attention_out) for block in blocks]
    ffn_outs = [resolve(block, family.ffn_out) for block in blocks]
    value_projections = [resolve(block, family.value_projection) for block in blocks]
    unembedding = resolve(module, family.unembedding)
    home = unembedding.weight.device
    spread = _is_spread(module, home)

    def by_layer(make: Callable[[int], T]) -> Sequence[T]:
        lazy = ByLayer(make, len(blocks))
        return lazy if spread else tuple(lazy)

    heads = config.num_attention_heads
    mixed = _output_by_input(attention_outs[0])[1]
    head_dim, remainder = divmod(mixed, heads)
    if remainder:
        raise ModelError(
            f"model {name!r} has {heads} heads over {mixed} attention outputs, which do not divide; its config and "
            "weights do not belong together."
        )
    value_rows, kv_heads = _value_rows(_output_by_input(value_projections[0])[0], heads, head_dim, family, name)
    if check:
        _check_finite(module, name)
    width, ffn_neurons = _output_by_input(ffn_outs[0])
    if unembedding.weight.shape[1] != width:
        raise UnsupportedModelError(
            f"model {name!r} projects its final state from width {width} to {unembedding.weight.shape[1]} before the "
            "unembedding, which is not supported; use a model without that projection."
        )
    scale = float(_setting(config, family.residual_scale, 1.0))
    final_norm = _read_norm(resolve(module, family.final_norm), family, home)
    assert final_norm is not None
    whole_unembedding = _whole(unembedding.weight, home)
    softcap = _setting(config, family.softcap, None)
    clip = _setting(config, family.value_clip, None)
    flags = family.parallel
    return Anatomy(
        family=family,
        layers=len(blocks),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_neurons=ffn_neurons,
        vocabulary=unembedding.weight.shape[0],
        context=next(
            (value for key in ("max_position_embeddings", "n_positions") if (value := getattr(config, key, None))),
            None,
        ),
        parallel=flags if isinstance(flags, bool) else any(getattr(config, flag) for flag in flags),
        attention=tuple(
            _sublayer(block, layer, "attention", family, scale, home) for layer, block in enumerate(blocks)
        ),
        ffn=tuple(_sublayer(block, layer, "ffn", family, scale, home) for layer, block in enumerate(blocks)),
        residual_scale=scale,
        value_rows=value_rows.to(home),
        value_weights=by_layer(lambda layer: _rows_by_output(value_projections[layer], home)),
        value_biases=tuple(_bias(projection, home) for projection in value_projections),
        value_clip=None if clip is None else float(clip),
        subkeys=by_layer(lambda layer: _subkeys(blocks[layer], family, home)),
        readout=Readout(
            unembedding=whole_unembedding,
            bias=_bias(unembedding, home),
            norm=final_norm,
            logit_scale=float(_setting(config, family.logit_scale, 1.0))
            / float(_setting(config, family.logit_divisor, 1.0)),
            softcap=None if softcap is None else float(softcap),
        ),
        spread=spread,
        breaks=_breaks(config),
    )
