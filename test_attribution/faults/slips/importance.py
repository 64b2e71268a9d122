"""Slips in the candidates of a prompt, and in their importance."""

from dataclasses import replace

import torch
from fault import PLANTED, SCORES, SPECIFIC, VALUE, Faults

from attribution.models.norms import frozen_scale
from attribution.records import AttentionNeuron

FAULTS = Faults()


def _seen(prompt, **changes):
    """Return a traced prompt of which something else was seen."""
    return replace(prompt, activations=replace(prompt.activations, **changes))


@FAULTS.patch("wrong x for the FFN", "candidates_of", claims=SCORES)
def _(original, prompt):
    return original(prompt=_seen(prompt, resid_mid=prompt.activations.resid_pre))


@FAULTS.patch("wrong x for attention", "candidates_of", claims=SCORES)
def _(original, prompt):
    return original(prompt=_seen(prompt, resid_pre=prompt.activations.resid_mid))


@FAULTS.patch("every x is re-normalised", "Streams.log_probs", claims=SCORES)
def _(original, self):
    return original(self=replace(self, scale=frozen_scale(self.states, self.readout.norm)))


@FAULTS.patch("the scale is that of another layer", "candidates_of", claims=SCORES)
def _(original, prompt):
    found, other = original(), prompt.activations.resid_pre[-1, prompt.row].double()
    return replace(found, streams=replace(found.streams, scale=frozen_scale(other, prompt.anatomy.readout.norm)))


@FAULTS.patch("the coefficient's sign is lost", "Candidates.update", claims=SCORES + PLANTED)
def _(original, self):
    return original(self=replace(self, coefficient=self.coefficient.abs()))


@FAULTS.patch("log of a rounded softmax", "Streams.log_probs", claims=SCORES)
def _(original):
    return original().float().softmax(-1).double().log()


@FAULTS.patch("importance is the logit alone", "log_prob_increase")
def _(original, update, answer):
    return update[..., answer]


@FAULTS.patch("importance is its first-order term", "log_prob_increase")
def _(original, log_probs, update, answer):
    return update[..., answer] - (log_probs.exp() * update).sum(-1)


@FAULTS.patch("attention weights are left out", "candidates_of", claims=SCORES + PLANTED)
def _(original, prompt):
    return original(prompt=_seen(prompt, pattern=torch.ones_like(prompt.activations.pattern)))


@FAULTS.patch("values of a batch's first prompt for all", "candidates_of", claims=SCORES + PLANTED)
def _(original, prompt):
    values = prompt.activations.values
    return original(prompt=_seen(prompt, values=values[:, :1].expand_as(values)))


@FAULTS.patch("a head takes from the last position only", "candidates_of", claims=SCORES)
def _(original, unit, prompt):
    if unit != "head":
        return original()
    pattern = prompt.activations.pattern
    return original(prompt=_seen(prompt, pattern=pattern * (torch.arange(pattern.shape[-1]) == prompt.length - 1)))


@FAULTS.patch("source positions are counted before dimensions", "VectorTable.indices", claims=SCORES + PLANTED)
def _(original):
    index, sublayer_index, row, position = original()
    order = torch.argsort(sublayer_index * len(position) + position, stable=True)
    return index, sublayer_index, row[order], position[order]


@FAULTS.patch("records number dimensions from the end", "Candidates.records", claims=SCORES + PLANTED)
def _(original, self):
    last = self.table.per_head - 1
    return [replace(each, dim=last - each.dim) if isinstance(each, AttentionNeuron) else each for each in original()]


@FAULTS.patch("the answer of a batch's first prompt for all", "all_candidates", claims=SCORES + VALUE + SPECIFIC)
def _(original, questions):
    answer = questions[0].answer_id
    return [{unit: replace(each, answer=answer) for unit, each in by_unit.items()} for by_unit in original()]
