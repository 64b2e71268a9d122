"""Slips in which coefficients are replaced, and in what replaces them."""

from dataclasses import fields, replace

import torch
from fault import ABLATION, QUERY_NEURONS, SPECIFIC, UNDONE, VALUE, Faults

from attribution.records import AttentionNeuron, Head

FAULTS = Faults()


@FAULTS.patch("the wrong layer is ablated", "ablated_logits", claims=ABLATION + VALUE + UNDONE)
def _(original, model, variants):
    layers = model.anatomy.layers
    return original(variants=[[replace(each, layer=(each.layer + 1) % layers) for each in own] for own in variants])


@FAULTS.patch("nothing is ablated in the last layer", "ablation_masks", claims=ABLATION)
def _(original):
    masks = original()
    for each in (masks.ffn, masks.attention, masks.sources):
        each[-1] = False
    return masks


@FAULTS.patch("a dimension takes its whole head along", "ablation_masks", claims=ABLATION)
def _(original, variants, at_source):
    if at_source:
        return original()
    return original(variants=[[_whole_head(each) for each in own] for own in variants])


def _whole_head(record):
    return Head(record.layer, record.head) if isinstance(record, AttentionNeuron) else record


@FAULTS.patch("every prompt loses the neurons of all", "ablation_masks", claims=ABLATION + SPECIFIC)
def _(original):
    masks = original()
    return replace(masks, ffn=masks.ffn.any(1, keepdim=True).expand_as(masks.ffn))


@FAULTS.patch("means count the padding", "reference_of", claims=ABLATION)
def _(original, kind, prompts):
    if kind != "mean":
        return original()
    longest = max(map(len, prompts))
    return original(prompts=[[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])


@FAULTS.patch("means are over prompts, not tokens", "reference_of", claims=ABLATION)
def _(original, kind, prompts):
    if kind != "mean":
        return original()
    means, length = original(), sum(map(len, prompts)) / len(prompts)
    return replace(means, **{each.name: length * getattr(means, each.name) for each in fields(means)})


@FAULTS.patch("donors are aligned at the first token", "_aligned", claims=ABLATION)
def _(original, last):
    return original(last=torch.zeros_like(last))


@FAULTS.patch("a prompt is its own donor", "Donors.donor_of", claims=ABLATION)
def _(original, ids):
    return ids


@FAULTS.patch("a source position stands for all", "ablation_masks", claims=ABLATION)
def _(original):
    return original(at_source=False)


@FAULTS.patch("nothing is ablated", "measure_ablated", claims=VALUE + UNDONE + QUERY_NEURONS)
def _(original, jobs):
    return original(jobs=[(question, ()) for question, _ in jobs])


@FAULTS.patch("outcomes belong to other prompts of the batch", "measure_ablated", claims=VALUE + QUERY_NEURONS)
def _(original, jobs):
    # Each prompt's logits with the answer of another, in the order of the answers.
    pairs = zip(jobs, reversed(jobs), strict=True)
    found = original(jobs=[(replace(own, answer_id=other.answer_id), drop) for (own, drop), (other, _) in pairs])
    outcomes = [outcome for outcome, _ in found]
    return [(outcome, replaced) for outcome, (_, replaced) in zip(reversed(outcomes), found, strict=True)]
