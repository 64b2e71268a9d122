"""Slips in the claims: in what they measure, in their controls, and in what the bench remembers."""

from dataclasses import replace

from fault import (
    BASELINES,
    BROKEN,
    CONTROLS,
    PLANTED,
    QUERY_NEURONS,
    RANDOM,
    SPECIFIC,
    VALUE,
    Faults,
)

from attribution.claims.about_methods.common import METHOD
from attribution.records import FFNNeuron

FAULTS = Faults()


@FAULTS.patch("method and baseline are swapped", "Workbench.judge", claims=BASELINES)
def _(original, claim, effects):
    return original(effects=-effects if claim.family == "superiority" else effects)


@FAULTS.patch("method and baseline have the same frame", "Workbench.frames", claims=BASELINES)
def _(original, methods):
    return dict.fromkeys(methods, original()[methods[0]])


@FAULTS.patch("the random control has the method's neurons", "Workbench.frames", claims=RANDOM)
def _(original, methods):
    return original() if "random" not in methods else {"random": original(methods=(METHOD,))[METHOD]}


@FAULTS.patch("the matched control is drawn with the method's neurons", "matched", claims=CONTROLS)
def _(original, chosen):
    return chosen


@FAULTS.patch("the matched control comes from any layer", "matched", claims=CONTROLS)
def _(original, candidates):
    one_layer = len(candidates) // len(candidates.table.sublayers)
    return (original() + one_layer) % len(candidates)


@FAULTS.patch("a claim swaps before and after", "Workbench.judge", claims=VALUE)
def _(original, effects, baselines):
    return original() if baselines is None else original(effects=-effects, baselines=baselines - effects)


@FAULTS.patch("experiments with other seeds are taken for the first", "Workbench.frames", claims=CONTROLS)
def _(original):
    return original(seed=None)


@FAULTS.patch("rankings with other seeds are taken for the first", "Workbench.ranked", claims=CONTROLS)
def _(original):
    return original(seed=None)


@FAULTS.patch("rankings are kept for other prompts", "Workbench.ranked", claims=VALUE)
def _(original, indices):
    return original(indices=indices[::-1])


@FAULTS.patch("of a longer ranking the last are taken for the first", "Ranking.first", claims=VALUE + BASELINES)
def _(original, self, k):
    return replace(original(), neurons=self.neurons[-k:])


@FAULTS.patch("method and baseline are not paired by prompt", "Workbench.frames", claims=BASELINES)
def _(original, methods):
    return {name: frame if name == methods[0] else frame[::-1] for name, frame in original().items()}


@FAULTS.patch("query neurons and random ones are swapped", "Workbench.judge", claims=QUERY_NEURONS)
def _(original, claim, effects):
    return original(effects=-effects if claim.family == "deletion" else effects)


@FAULTS.patch("an unrelated fact is the fact itself", "unrelated", claims=SPECIFIC)
def _(original):
    return {place: place for place in original()}


@FAULTS.patch("own and unrelated neurons are swapped", "Workbench.judge", claims=SPECIFIC)
def _(original, claim, effects):
    return original(effects=-effects if claim.family == "specificity" else effects)


@FAULTS.patch("the flipped scorer is not flipped", "samples", claims=BROKEN)
def _(original):
    return [replace(each, lowest=each.records[: len(each.lowest)]) for each in original()]


@FAULTS.patch("the randomised model keeps its weights", "randomised", claims=BROKEN)
def _(original, model):
    return model


@FAULTS.patch("what is planted is not written", "planted", claims=PLANTED)
def _(original, model, plants):
    return original(plants=[_unwritten(model.anatomy, each) for each in plants])


def _unwritten(anatomy, plant):
    """Return a plant that writes what its neuron wrote before."""
    layer, neuron = plant.neuron.layer, plant.neuron
    return (
        replace(plant, vector=anatomy.sublayer(layer, "ffn").vectors[neuron.index])
        if isinstance(neuron, FFNNeuron)
        else plant
    )


@FAULTS.patch("prompts lose each other's query neurons", "query", claims=SPECIFIC)
def _(original):
    return original()[::-1]
