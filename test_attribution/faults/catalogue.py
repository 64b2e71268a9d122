"""The faults: each an edit of the engine's or the suite's source, and the claims that it concerns."""

from __future__ import annotations

from dataclasses import dataclass

SCORES = ("scores by definition",)
TOP = ("top 10 by definition",)
QUERY = ("query scores by definition",)
BACKWARD = ("scores by hand",)
ABLATION = ("ablation by hand",)
CONTROLS = ("controls by definition",)
METRICS = ("known outcomes",)
JUDGE = ("known verdicts",)
VALUE = ("value neurons cut",)
RANDOM = ("random neurons have no effect",)
BASELINES = ("top 10 beat baselines",)
KNOWN = ("known facts",)
QUERY_NEURONS = ("query neurons beat random ones",)
BROKEN = ("broken scorers lose their effect",)
PLANTED = ("planted neurons are found",)
CHAIN = ("both ends of a chain are found",)
UNDONE = ("planted neurons are undone",)
SPECIFIC = ("neurons are specific to a fact",)


@dataclass(frozen=True)
class Edit:
    """One change of a function's source.

    Attributes:
        where: Module of the package and function, ``"engine.trace:rerun"``.
        old: A part of its source that stands there once.
        new: What stands there instead.
    """

    where: str
    old: str
    new: str

    def __str__(self) -> str:
        def shown(code: str) -> str:
            return f"`{' '.join(code.split())}`" if code.strip() else "nothing"

        return f"{self.where.replace(':', '.')}: {shown(self.old)} → {shown(self.new)}"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: What is wrong.
        edits: How it is made.
        claims: The families of claims that it concerns, which are judged if the preflight finds nothing.
        missed: Why nothing catches it; empty for what is caught.
    """

    name: str
    edits: tuple[Edit, ...]
    claims: tuple[str, ...]
    missed: str = ""


def _fault(name: str, where: str, old: str, new: str, claims: tuple[str, ...] = ()) -> Fault:
    return Fault(name, (Edit(where, old, new),), claims)


ANATOMY = (
    _fault(
        "attention's output projection is transposed",
        "models.anatomy:read_anatomy",
        "_rows_by_output(attention_outs[layer], home).T",
        "_rows_by_output(attention_outs[layer], home)",
    ),
    _fault(
        "Conv1D is read as Linear",
        "models.anatomy:_rows_by_output",
        "weight if isinstance(module, nn.Linear) else weight.T",
        "weight",
    ),
    _fault(
        "heads share keys and values in turn",
        "models.anatomy:_value_rows",
        "values.repeat_interleave(group, dim=0)",
        "values.repeat(group, 1)",
    ),
    _fault(
        "queries are read as values",
        "models.anatomy:_value_rows",
        "rows[-kv_heads * head_dim :]",
        "rows[: kv_heads * head_dim]",
    ),
    _fault(
        "heads are split by dimensions first",
        "models.anatomy:Anatomy.split_values",
        ".unflatten(-1, (self.heads, self.head_dim))",
        ".unflatten(-1, (self.head_dim, self.heads)).transpose(-1, -2)",
    ),
    _fault(
        "the FFN's bias is forgotten",
        "models.anatomy:read_anatomy",
        "_bias(out, home) for out in ffn_outs",
        "None for out in ffn_outs",
    ),
    _fault(
        "the value bias is forgotten",
        "models.anatomy:read_anatomy",
        "_bias(projection, home) for projection in value_projections",
        "None for projection in value_projections",
    ),
    _fault("norms never centre", "models.anatomy:_read_norm", "centred=family.centred", "centred=False"),
    _fault("norms always centre", "models.anatomy:_read_norm", "centred=family.centred", "centred=True"),
    _fault("every norm has the same epsilon", "models.anatomy:_read_norm", "eps=float(eps)", "eps=1e-6"),
    _fault(
        "gate and up projection are swapped",
        "models.anatomy:_subkeys",
        "Subkeys(up, up_bias, gate, gate_bias",
        "Subkeys(gate if gate is not None else up, up_bias, None if gate is None else up, gate_bias",
    ),
    _fault(
        "blocks are taken to be parallel",
        "models.anatomy:read_anatomy",
        "parallel=flags if isinstance(flags, bool)",
        "parallel=True if isinstance(flags, bool)",
    ),
)

NORMS = (
    _fault(
        "the norm's weight is dropped",
        "engine.projection:_weighted",
        "vectors * readout.norm.weight.to(vectors.dtype)",
        "vectors",
    ),
    _fault(
        "centring is dropped",
        "engine.projection:before_softmax",
        "_weighted(centre(vectors, readout.norm), scale, readout)",
        "_weighted(vectors, scale, readout)",
    ),
    _fault(
        "the norm's bias is added to every vector",
        "engine.projection:before_softmax",
        "_weighted(centre(vectors, readout.norm), scale, readout)",
        "_weighted(centre(vectors, readout.norm), scale, readout) + (0 if readout.norm.bias is None else "
        "readout.norm.bias)",
    ),
    _fault(
        "the scale is of the unbiased variance",
        "models.norms:frozen_scale",
        "square().mean(-1)",
        "square().sum(-1) / (vectors.shape[-1] - 1)",
    ),
    _fault(
        "the scale is of what is not centred",
        "models.norms:frozen_scale",
        "centre(vectors, norm).square()",
        "vectors.square()",
    ),
    _fault(
        "epsilon is added to the scale, not to the variance",
        "models.norms:frozen_scale",
        "mean(-1) + norm.eps)",
        "mean(-1)) + norm.eps",
    ),
    _fault(
        "the bound's gradient is not centred",
        "engine.projection:pull_back",
        "centre(_weighted(pulled, scale, readout), readout.norm)",
        "_weighted(pulled, scale, readout)",
        SCORES + TOP,
    ),
    _fault(
        "the bound's gradient is not scaled",
        "engine.projection:pull_back",
        "_weighted(pulled, scale, readout)",
        "_weighted(pulled, torch.ones_like(scale), readout)",
        SCORES + TOP,
    ),
)

TRACE = (
    _fault(
        "coefficients are taken before the nonlinearity",
        "engine.trace:read_activations",
        "query(batched(ffn_out.input))",
        "query(batched(resolve(block, family.ffn_up).output))",
    ),
    _fault(
        "coefficients are taken before the up product",
        "engine.trace:read_activations",
        "query(batched(ffn_out.input))",
        "query(batched(ffn_out.input if anatomy.subkeys[layer].gate is None else "
        "resolve(block, family.activation).output))",
    ),
    _fault(
        "the value bias is left out of the values",
        "engine.trace:read_activations",
        "resolve(block, family.value_projection).output)",
        "resolve(block, family.value_projection).output - (0 if anatomy.value_biases[layer] is None else "
        "anatomy.value_biases[layer]))",
    ),
    _fault(
        "the middle of a block is its beginning",
        "engine.trace:read_activations",
        'seen["resid_pre"] + seen["attention_output"]',
        'seen["resid_pre"]',
    ),
    _fault(
        "the position before the last is read",
        "engine.trace:read_activations",
        "movedim(axis, 1)[rows.to(place), batch.last.to(place)]",
        "movedim(axis, 1)[rows.to(place), batch.last.to(place) - 1]",
        SCORES,
    ),
    _fault(
        "a rerun reads the padding",
        "engine.trace:last_logits",
        "unembedding.input[rows, batch.last]",
        "unembedding.input[rows, -1]",
    ),
    _fault(
        "edits never fire",
        "engine.trace:_edit_input",
        "projection.input = _replace(shaped, replacement)",
        "_replace(shaped, replacement)",
    ),
    _fault(
        "edits fire at the last position only",
        "engine.trace:_edit_input",
        "_replace(shaped, replacement)",
        "torch.where((torch.arange(shaped.shape[1]) == batch.last[:, None])[..., None], _replace(shaped, replacement), "
        "shaped)",
    ),
    _fault(
        "edits fire in every row",
        "engine.trace:_replace",
        "torch.where(mask.to(tensor.device),",
        "torch.where(mask.any(0, keepdim=True),",
    ),
    _fault(
        "edits add where they should replace",
        "engine.trace:_replace",
        "value.to(tensor), tensor)",
        "tensor + value.to(tensor), tensor)",
    ),
    Fault(
        "coefficients are edited one layer late",
        (
            Edit("engine.trace:apply_edits", "if layer in edits.coefficients:", "if layer - 1 in edits.coefficients:"),
            Edit(
                "engine.trace:apply_edits", "edits.coefficients[layer], batch)", "edits.coefficients[layer - 1], batch)"
            ),
        ),
        ABLATION + UNDONE,
    ),
    _fault(
        "reruns leave attention alone",
        "engine.trace:apply_edits",
        "if layer in edits.mixed_values:",
        "if False:",
        ABLATION + VALUE + UNDONE,
    ),
    _fault(
        "edits of one source position have the wrong sign",
        "engine.trace:_edit_sources",
        "(_replace(taken, replacement) - taken)",
        "(taken - _replace(taken, replacement))",
    ),
    _fault(
        "edits of one source position read another query's pattern",
        "engine.trace:_edit_sources",
        "pattern[rows, :, last]",
        "pattern[rows, :, 0]",
    ),
)

IMPORTANCE = (
    _fault(
        "wrong x for the FFN",
        "engine.importance:candidates_of",
        '"ffn": activations.resid_mid',
        '"ffn": activations.resid_pre',
        SCORES,
    ),
    _fault(
        "wrong x for attention",
        "engine.importance:candidates_of",
        '"attention": activations.resid_pre',
        '"attention": activations.resid_mid',
        SCORES,
    ),
    _fault(
        "every x is re-normalised",
        "engine.importance:Candidates.log_probs",
        "before_softmax(self.stream, self.scale,",
        "before_softmax(self.stream, frozen_scale(self.stream, self.table.readout.norm),",
        SCORES,
    ),
    _fault(
        "the scale is that of another layer",
        "engine.importance:candidates_of",
        "frozen_scale(activations.resid_final[prompt]",
        "frozen_scale(activations.resid_pre[-1, prompt]",
        SCORES,
    ),
    _fault(
        "the coefficient's sign is lost",
        "engine.importance:Candidates.update",
        "(self.coefficient / self.scale)",
        "(self.coefficient.abs() / self.scale)",
        SCORES + PLANTED,
    ),
    _fault(
        "log of a rounded softmax",
        "engine.importance:Candidates.log_probs",
        ".log_softmax(-1)",
        ".float().softmax(-1).double().log()",
        SCORES,
    ),
    _fault(
        "importance is the logit alone",
        "engine.importance:log_prob_increase",
        "update[..., answer] - torch.logsumexp(log_probs + update, dim=-1)",
        "update[..., answer]",
    ),
    _fault(
        "importance is its first-order term",
        "engine.importance:log_prob_increase",
        "torch.logsumexp(log_probs + update, dim=-1)",
        "(log_probs.exp() * update).sum(-1)",
    ),
    _fault(
        "attention weights are left out",
        "engine.importance:candidates_of",
        '"lhp,lphd->lhdp", pattern, values',
        '"lhp,lphd->lhdp", torch.ones_like(pattern), values',
        SCORES + PLANTED,
    ),
    _fault(
        "values of a batch's first prompt for all",
        "engine.importance:candidates_of",
        "activations.values[:, prompt, :length]",
        "activations.values[:, 0, :length]",
        SCORES + PLANTED,
    ),
    _fault(
        "a head takes from the last position only",
        "engine.importance:_of_prompt",
        "coefficients.sum(-1, keepdim=True)",
        "coefficients[..., -1:]",
        SCORES,
    ),
    _fault(
        "source positions are counted before dimensions",
        "engine.vectors:VectorTable.places",
        "row, position = torch.unravel_index(torch.arange(size * depth), (size, depth))",
        "position, row = torch.unravel_index(torch.arange(size * depth), (depth, size))",
        SCORES + PLANTED,
    ),
    _fault(
        "records number dimensions from the end",
        "engine.importance:Candidates._record",
        "AttentionNeuron(sublayer.layer, head, dim, position)",
        "AttentionNeuron(sublayer.layer, head, self.table.per_head - 1 - dim, position)",
        SCORES + PLANTED,
    ),
    _fault(
        "the answer of a batch's first prompt for all",
        "engine.ranking:all_candidates",
        "answer=question.answer_id",
        "answer=questions[0].answer_id",
        SCORES + VALUE + SPECIFIC,
    ),
)

RANKING = (
    _fault(
        "the least important come first",
        "engine.top_k:_descending",
        "descending=True",
        "descending=False",
        TOP + VALUE + PLANTED,
    ),
    _fault(
        "the best is left out",
        "engine.top_k:_selected",
        "_descending(scores, tolerance)[:k]",
        "_descending(scores, tolerance)[1 : k + 1]",
        TOP + PLANTED,
    ),
    _fault(
        "the search stops at the first block",
        "engine.top_k:top_k",
        "while done < total and slack <= tolerance:",
        "while done < k:",
        TOP,
    ),
    _fault(
        "ties are broken by memory order",
        "engine.top_k:_selected",
        "places, back = places.sort()",
        "back = torch.arange(len(places))",
        TOP,
    ),
    _fault(
        "the bound has the wrong sign",
        "engine.importance:first_order_bound",
        "-log_probs.exp()",
        "log_probs.exp()",
        SCORES + TOP,
    ),
    _fault(
        "the rank counts from the wrong end",
        "engine.vectors:_reciprocal_ranks",
        "logits > logits[:, answer, None]",
        "logits < logits[:, answer, None]",
        SCORES,
    ),
    _fault(
        "a baseline keeps the coefficient's sign",
        "engine.methods:_coefficient",
        "candidates.coefficient.abs()",
        "candidates.coefficient",
        SCORES,
    ),
    _fault(
        "a baseline ranks by the vector's sum, not its norm",
        "engine.vectors:VectorTable.norms",
        "self.written(slot, rows).norm(dim=-1)",
        "self.written(slot, rows).sum(dim=-1)",
        SCORES,
    ),
    _fault(
        "a baseline is the method",
        "engine.methods:_prob_increase",
        "_as_probability(candidates, _log_prob_increase(candidates))",
        "_log_prob_increase(candidates)",
        SCORES,
    ),
    _fault(
        "rankings come in order of length",
        "engine.ranking:ranked",
        "[rankings[row] for row in range(len(questions))]",
        "list(rankings.values())",
        TOP,
    ),
)

TOKENS = (
    _fault(
        "positions are off by one", "prompts.tokens:pad", "(lengths - 1).to(device)", "(lengths - 2).to(device)", KNOWN
    ),
    Fault(
        "padding is on the left",
        (
            Edit("prompts.tokens:pad", "ids[number, : len(row)]", "ids[number, ids.shape[1] - len(row) :]"),
            Edit("prompts.tokens:pad", "< lengths[:, None]", ">= ids.shape[1] - lengths[:, None]"),
            Edit("prompts.tokens:pad", "(lengths - 1).to(device)", "torch.full_like(lengths, ids.shape[1] - 1)"),
        ),
        KNOWN,
    ),
    _fault(
        "padding is not masked",
        "prompts.tokens:pad",
        "(torch.arange(ids.shape[1])[None] < lengths[:, None]).long()",
        "torch.ones_like(ids)",
        ABLATION,
    ),
    _fault(
        "the token in front is left out",
        "prompts.tokens:encode",
        "tokenizer.encode(text)",
        "tokenizer.encode(text, add_special_tokens=False)",
        KNOWN,
    ),
    _fault(
        "the answer loses its space",
        "prompts.tokens:answer_tokens",
        "tokenizer.encode(prompt + answer)",
        "tokenizer.encode(prompt + answer.strip())",
        KNOWN,
    ),
    _fault(
        "prompts of a batch are mixed up",
        "experiments.selection_rule:_judged",
        "pad([question.ids for question in questions]",
        "pad([question.ids for question in reversed(questions)]",
        KNOWN,
    ),
    _fault(
        "one random draw for all prompts",
        "prompts.questions:Question.seed",
        "{seed}\\n{self.text}\\n{self.answer}",
        "{seed}",
        CONTROLS,
    ),
    _fault(
        "random draws ignore the seed",
        "prompts.questions:Question.seed",
        "{seed}\\n{self.text}",
        "{self.text}",
        CONTROLS,
    ),
    _fault(
        "random neurons come from the early layers",
        "engine.methods:_random",
        "draws.to(candidates.index.device)[candidates.index]",
        "(draws - torch.arange(candidates.total) / candidates.total)[candidates.index]",
        CONTROLS,
    ),
)

ABLATING = (
    _fault(
        "the wrong layer is ablated",
        "engine.ablation:_edits",
        "{layer: (mask[layer], filler)",
        "{layer: (mask[layer - 1], filler)",
        ABLATION + VALUE + UNDONE,
    ),
    _fault(
        "a dimension takes its whole head along",
        "engine.masks:ablation_masks",
        "attention[layer, variant, head, dim] = True",
        "attention[layer, variant, head] = True",
        ABLATION,
    ),
    _fault(
        "every prompt loses the neurons of all",
        "engine.masks:ablation_masks",
        "ffn[layer, variant, index] = True",
        "ffn[layer, :, index] = True",
        ABLATION + SPECIFIC,
    ),
    _fault("means count the padding", "engine.ablation:_sums", "mixed[real]", "mixed.flatten(0, 1)", ABLATION),
    _fault(
        "means are over prompts, not tokens",
        "engine.ablation:_means",
        "total / tokens",
        "total / len(prompts)",
        ABLATION,
    ),
    _fault(
        "donors are aligned at the first token",
        "engine.ablation:_aligned",
        "+ (last[giver] - last)[:, None]",
        "+ (last - last)[:, None]",
        ABLATION,
    ),
    _fault(
        "a prompt is its own donor",
        "engine.ablation:Donors.donor_of",
        "if prompt != ids:",
        "if prompt == ids:",
        ABLATION,
    ),
    _fault(
        "a source position stands for all",
        "engine.masks:ablation_masks",
        "if not at_source:",
        "if True:",
        ABLATION,
    ),
)

MEASURING = (
    _fault(
        "rank counts from the wrong end",
        "engine.metrics:measure_each",
        "logits >= logits.gather(-1, answers)",
        "logits <= logits.gather(-1, answers)",
        METRICS + KNOWN,
    ),
    _fault(
        "equal tokens rank behind the answer",
        "engine.metrics:measure_each",
        "(logits >= logits.gather(-1, answers)).sum(-1)",
        "1 + (logits > logits.gather(-1, answers)).sum(-1)",
        METRICS,
    ),
    _fault(
        "log p is the log of a rounded softmax",
        "engine.metrics:measure_each",
        "logits.double().log_softmax(-1).gather",
        "logits.softmax(-1).log().double().gather",
        METRICS,
    ),
    _fault(
        "the probability of another token",
        "engine.metrics:measure_each",
        "log_softmax(-1).gather(-1, answers)",
        "log_softmax(-1).gather(-1, answers - 1)",
        VALUE,
    ),
    _fault(
        "MRR is the mean rank", "engine.metrics:measure_each", "Outcome(rank, 1 / rank,", "Outcome(rank, rank,", VALUE
    ),
    _fault(
        "the selection rule forgets the top 10",
        "experiments.selection_rule:selection_outcome",
        ".rank > 10",
        ".rank > 100",
        METRICS,
    ),
    _fault(
        "the selection rule forgets the rivals",
        "experiments.selection_rule:selection_outcome",
        "not rivals or",
        "True or",
        KNOWN,
    ),
    _fault(
        "known prompts are not filtered",
        "experiments.selection_rule:known_prompts",
        "if fate is SelectionOutcome.KEPT",
        "if True",
        KNOWN,
    ),
    _fault(
        "the control of what is known asks for the same answers",
        "claims.bench:Workbench.swapped",
        "distinct[1:] + distinct[:1]",
        "distinct",
        KNOWN,
    ),
    Fault(
        "before and after are swapped",
        (
            Edit("experiments.evaluation:_table_row", "zip(names, before,", "zip(names, measured,"),
            Edit(
                "experiments.evaluation:_table_row",
                'after": value for name, value in zip(names, measured,',
                'after": value for name, value in zip(names, before,',
            ),
        ),
        VALUE,
    ),
    _fault(
        "the best of the ranked are spared",
        "experiments.evaluation:_chosen",
        "ranked[unit][:number]",
        "ranked[unit][number:]",
        BASELINES,
    ),
    _fault(
        "every method ablates the first one's neurons",
        "experiments.evaluation:_ablated",
        "ranked[row][arms[place][0]]",
        "ranked[row][names[0]]",
        BASELINES,
    ),
    _fault(
        "reruns begin above the first layer that is edited",
        "engine.trace:Edits.first",
        "return min(",
        "return max(",
        BASELINES + VALUE,
    ),
    _fault(
        "reruns begin with another prompt",
        "engine.trace:skip_blocks",
        "[rows, :width]",
        "[rows.flip(0), :width]",
        BASELINES + VALUE,
    ),
    _fault(
        "nothing is ablated",
        "engine.ablation:_measured",
        "ablated_logits(model, batch, variants,",
        "ablated_logits(model, batch, [() for _ in variants],",
        VALUE + UNDONE + QUERY_NEURONS,
    ),
    _fault(
        "outcomes belong to other prompts of the batch",
        "engine.ablation:_measured",
        "measure_each(logits,",
        "measure_each(logits.flip(0),",
        VALUE + QUERY_NEURONS,
    ),
)

QUERIES = (
    _fault(
        "value neurons read the last position",
        "engine.subkeys:read_subkeys",
        "whole([neuron.position for neuron in readers])",
        "torch.full_like(numbers, length - 1)",
        QUERY + CHAIN,
    ),
    _fault(
        "value neurons read what their own layer writes",
        "engine.subkeys:read_subkeys",
        'anatomy.sublayer(layer, "attention").input_norm, 2 * layer + 1',
        'anatomy.sublayer(layer, "attention").input_norm, 2 * layer + 2',
        QUERY,
    ),
    _fault(
        "the query side does not centre",
        "engine.subkeys:folded_subkeys",
        "if norm.centred and centring else folded",
        "if False else folded",
        QUERY,
    ),
    _fault(
        "the query side drops the norm's weight",
        "engine.subkeys:folded_subkeys",
        "subkeys * norm.weight.to(subkeys.dtype)",
        "subkeys",
        QUERY + CHAIN,
    ),
    _fault(
        "query neurons wake value neurons of their own layer",
        "engine.subkeys:query_neuron_scores",
        "keys = reads[above > layer].T @ folded[above > layer]",
        "keys = reads[above >= layer].T @ folded[above >= layer]",
        QUERY,
    ),
    _fault(
        "query neurons are not weighted by importance",
        "engine.queries:_explain",
        "importance[attention] / divided.denominator[attention]",
        "1 / divided.denominator[attention]",
        QUERY,
    ),
    _fault(
        "the subkey is the subvalue",
        "engine.subkeys:ffn_subkeys",
        "up, up_bias = of(subkeys.up, subkeys.up_bias)",
        "up, up_bias = of(subvalues, None)",
        QUERY,
    ),
    _fault(
        "all heads have the first one's subkeys",
        "engine.subkeys:read_subkeys",
        "neuron.head * anatomy.head_dim + neuron.dim",
        "neuron.dim",
        QUERY + CHAIN,
    ),
    _fault(
        "biases are not scaled as the stream is",
        "engine.subkeys:read_subkeys",
        "terms[-1, numbers] = scale[numbers] * bias",
        "terms[-1, numbers] = bias",
        QUERY,
    ),
)

GRADIENTS = (
    _fault(
        "gradients count at the last position only",
        "engine.gradients:_ffn_effect",
        "(coefficients * slope).sum(1)",
        "(coefficients * slope)[:, -1]",
        BACKWARD,
    ),
    _fault(
        "gradients reach values by the transposed pattern",
        "engine.gradients:_to_values",
        "bhqp,bqhd->bphd",
        "bhpq,bqhd->bphd",
        BACKWARD,
    ),
    _fault(
        "gradients are of p, not of log p", "engine.gradients:_log_prob", ".log_softmax(-1)", ".softmax(-1)", BACKWARD
    ),
    _fault(
        "gradients are of another prompt's answer",
        "engine.gradients:_log_prob",
        "answers[:, None]",
        "answers.flip(0)[:, None]",
        BACKWARD,
    ),
    _fault(
        "the path of integrated gradients starts at zero",
        "engine.gradients:_integrated",
        "(part % steps + 0.5) / steps",
        "(part % steps) / steps",
        BACKWARD,
    ),
    _fault(
        "AtP* averages over one layer too many",
        "engine.gradients:_grad_drop",
        "total / (layers - 1)",
        "total / layers",
        BACKWARD,
    ),
    _fault("AtP* loses the sign", "engine.gradients:_grad_drop", "effect.sign() * total", "total", BACKWARD),
)

JUDGING = (
    _fault("the bootstrap is unpaired", "claims.judge:bootstrap", "paired=True", "paired=False", JUDGE),
    _fault(
        "facts that were not drawn are forgotten",
        "claims.judge:interval",
        "np.minimum(low, lower), np.maximum(high, higher)",
        "low, high",
        JUDGE,
    ),
    _fault(
        "a fact that was not drawn is like those that were",
        "claims.judge:_extreme_facts",
        'if extremes != "seen":',
        "if False:",
        JUDGE,
    ),
    _fault(
        "the best and the worst fact are swapped",
        "claims.judge:_extreme_facts",
        "return worst, best",
        "return best, worst",
        JUDGE,
    ),
    _fault(
        "prompts are resampled, not facts",
        "claims.judge:judge",
        "np.unique(np.asarray(facts, dtype=str), return_inverse=True)",
        "np.unique(np.arange(len(facts)).astype(str), return_inverse=True)",
        JUDGE,
    ),
    _fault(
        "no effect is the absence of significance",
        "claims.judge:decide",
        "inside = -claim.threshold < low and high < claim.threshold",
        "inside = low <= 0 <= high",
        JUDGE,
    ),
    _fault(
        "the point estimate is compared with the threshold",
        "claims.judge:judge",
        "decide(claim, low, high)",
        "decide(claim, effect, effect)",
        JUDGE,
    ),
    _fault(
        "the threshold is always zero",
        "claims.judge:decide",
        "low > claim.threshold, high <= claim.threshold",
        "low > 0, high <= 0",
        JUDGE,
    ),
    _fault("the number of comparisons is ignored", "claims.judge:Claim.confidence", "/ self.comparisons", "/ 1", JUDGE),
    _fault(
        "the confidence is ignored",
        "claims.judge:judge",
        "denominators, claim.confidence,",
        "denominators, 0.5,",
        JUDGE,
    ),
    _fault(
        "one interval serves both kinds of test",
        "claims.judge:Claim.confidence",
        '0.10 if self.test == "within" else 0.05',
        "0.10",
        JUDGE,
    ),
    _fault("too few prompts decide", "claims.judge:judge", "len(values) < claim.min_prompts", "False", JUDGE),
    _fault(
        "the mean of ratios for the ratio of means",
        "claims.judge:judge",
        "return_inverse=True)",
        "return_inverse=True)\n    values, weights = values / weights, np.ones_like(weights)",
        JUDGE,
    ),
    _fault(
        "NaN is judged",
        "claims.judge:judge",
        "if not (np.isfinite(values).all() and np.isfinite(weights).all()):",
        "if False:",
        JUDGE,
    ),
    _fault(
        "NaN supports an exact claim",
        "claims.judge:judge_exact",
        "Status.SUPPORTED if effect <= claim.threshold else Status.REFUTED",
        "Status.REFUTED if effect > claim.threshold else Status.SUPPORTED",
        JUDGE,
    ),
    _fault(
        "whatever is not refuted is supported",
        "claims.judge:decide",
        "else Status.INCONCLUSIVE",
        "else Status.SUPPORTED",
        JUDGE,
    ),
    _fault(
        "a prompt may be counted twice", "claims.judge:judge", "if len(set(named)) != len(facts):", "if False:", JUDGE
    ),
)

SUITE = (
    _fault(
        "method and baseline are swapped",
        "claims.about_methods.top_neurons:beats_a_baseline",
        "_left(bench, baseline, kind, metric, method) - _left(bench, method, kind, metric, method)",
        "_left(bench, method, kind, metric, method) - _left(bench, baseline, kind, metric, method)",
        BASELINES,
    ),
    _fault(
        "method and baseline have the same frame",
        "claims.about_methods.top_neurons:beats_a_baseline",
        "_left(bench, baseline, kind",
        "_left(bench, method, kind",
        BASELINES,
    ),
    _fault(
        "the random control has the method's neurons",
        "claims.about_methods.value_neurons:random_neurons_have_no_effect",
        'bench.frames(("random",), budget, seed=seed)["random"]',
        "bench.frames((method,), budget)[method]",
        RANDOM,
    ),
    _fault(
        "the matched control is drawn with the method's neurons",
        "experiments.controls:matched",
        "~taken[vectors]",
        "torch.ones_like(vectors, dtype=torch.bool)",
        CONTROLS,
    ),
    _fault(
        "the matched control comes from any layer",
        "experiments.controls:matched",
        "free & (slots == slot)",
        "free",
        CONTROLS,
    ),
    _fault(
        "a claim swaps before and after",
        "claims.about_methods.value_neurons:value_neurons_cut",
        'before, after = frame[f"{metric}_before"], frame[f"{metric}_after"]',
        'after, before = frame[f"{metric}_before"], frame[f"{metric}_after"]',
        VALUE,
    ),
    _fault(
        "experiments with other seeds are taken for the first",
        "claims.bench:Workbench.frames",
        "asked), seed, len(places))",
        "asked), len(places))",
        CONTROLS,
    ),
    Fault(
        "rankings with other seeds are taken for the first",
        (
            Edit("claims.bench:Workbench.picked", "seed, asked[row]] = best", "0, asked[row]] = best"),
            Edit("claims.bench:Workbench.picked", "seed, place))", "0, place))"),
            Edit("claims.bench:Workbench.picked", "seed, place].first", "0, place].first"),
        ),
        CONTROLS,
    ),
    _fault(
        "rankings are kept for other prompts",
        "claims.bench:Workbench.picked",
        "self.questions[place] for place in asked]",
        "self.questions[place] for place in reversed(asked)]",
        VALUE,
    ),
    _fault(
        "of a longer ranking the last are taken for the first",
        "engine.ranking:Picked.first",
        "Picked(self.records[:k],",
        "Picked(self.records[-k:],",
        VALUE + BASELINES,
    ),
    _fault(
        "method and baseline are not paired by prompt",
        "claims.about_methods.top_neurons:beats_a_baseline",
        "effects = _left(bench, baseline, kind, metric, method)",
        "effects = _left(bench, baseline, kind, metric, method)[::-1]",
        BASELINES,
    ),
    _fault(
        "query neurons and random ones are swapped",
        "claims.about_methods.query_neurons:query_neurons_beat_random_ones",
        '_left_by_random(bench, seed, metric) - left_without_query_neurons(bench, method)["query"][metric]',
        'left_without_query_neurons(bench, method)["query"][metric] - _left_by_random(bench, seed, metric)',
        QUERY_NEURONS,
    ),
    _fault(
        "an unrelated fact is the fact itself",
        "claims.about_methods.specificity:strangers",
        "row[(number + step) % len(row)]",
        "row[number]",
        SPECIFIC,
    ),
    _fault(
        "own and unrelated neurons are swapped",
        "claims.about_methods.specificity:_paired",
        "([ranked[row] for row in rows], [ranked[partner[row]] for row in rows])",
        "([ranked[partner[row]] for row in rows], [ranked[row] for row in rows])",
        SPECIFIC,
    ),
    _fault(
        "the flipped scorer is not flipped",
        "claims.about_methods.single_neurons:_measured",
        "order.flip(0)[:TOP]",
        "order[:TOP]",
        BROKEN,
    ),
    _fault(
        "the randomised model keeps its weights",
        "experiments.randomisation:randomised",
        "parameter.flatten()[order]",
        "parameter.flatten()",
        BROKEN,
    ),
    _fault(
        "what is planted is not written",
        "experiments.planting:_plant_ffn",
        "vectors[neuron.index] = plant.vector.to(vectors)",
        "",
        PLANTED,
    ),
    _fault(
        "prompts lose each other's query neurons",
        "claims.about_methods.query_neurons:waking",
        "for each in query(bench.model, prompts, value_neurons=rankings, k=query_budget(bench))]",
        "for each in query(bench.model, prompts, value_neurons=rankings, k=query_budget(bench))][::-1]",
        SPECIFIC,
    ),
)

FAULTS: tuple[Fault, ...] = (
    *ANATOMY,
    *NORMS,
    *TRACE,
    *IMPORTANCE,
    *RANKING,
    *TOKENS,
    *ABLATING,
    *MEASURING,
    *QUERIES,
    *GRADIENTS,
    *JUDGING,
    *SUITE,
)
