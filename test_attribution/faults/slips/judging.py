"""Slips in the judge."""

import math
from dataclasses import replace

import numpy as np
from fault import JUDGE, Faults

from attribution.claims.judge import Status, bootstrap

FAULTS = Faults()


@FAULTS.patch("the bootstrap is unpaired", "bootstrap", claims=JUDGE)
def _(original, denominators):
    return original(denominators=np.random.default_rng(0).permutation(denominators, axis=-1))


@FAULTS.patch("facts that were not drawn are forgotten", "interval", claims=JUDGE)
def _(original, numerators, denominators, confidence):
    return bootstrap(numerators, denominators, confidence)


@FAULTS.patch("a fact that was not drawn is like those that were", "with_one_more", claims=JUDGE)
def _(original):
    return original(effect_bounds="seen")


@FAULTS.patch("the best and the worst fact are swapped", "_extreme_facts", claims=JUDGE)
def _(original):
    return original()[::-1]


@FAULTS.patch("prompts are resampled, not facts", "judge", claims=JUDGE)
def _(original, facts):
    return original(facts=[str(number) for number in range(len(facts))])


@FAULTS.patch("no effect is the absence of significance", "decide", claims=JUDGE)
def _(original, claim, low, high):
    return Status.SUPPORTED if claim.test == "within" and low <= 0 <= high else original()


@FAULTS.patch("the point estimate is compared with the threshold", "interval", claims=JUDGE)
def _(original, numerators, denominators):
    effect = numerators.sum(-1) / denominators.sum(-1)
    return effect, effect


@FAULTS.patch("the threshold is always zero", "decide", claims=JUDGE)
def _(original, claim):
    return original(claim=replace(claim, threshold=0))


@FAULTS.patch("the number of comparisons is ignored", "Claim.confidence", claims=JUDGE)
def _(original, self):
    return original(self=replace(self, comparisons=1))


@FAULTS.patch("the confidence is ignored", "interval", claims=JUDGE)
def _(original):
    return original(confidence=0.5)


@FAULTS.patch("one interval serves both kinds of test", "Claim.confidence", claims=JUDGE)
def _(original, self):
    return original(self=replace(self, test="within"))


@FAULTS.patch("too few prompts decide", "judge", claims=JUDGE)
def _(original, claim):
    return original(claim=replace(claim, min_prompts=0))


@FAULTS.patch("the mean of ratios for the ratio of means", "judge", claims=JUDGE)
def _(original, effects, baselines):
    return original(effects=effects if baselines is None else np.divide(effects, baselines), baselines=None)


@FAULTS.patch("NaN is judged", "judge", claims=JUDGE)
def _(original, effects):
    return original(effects=np.where(np.isfinite(effects), effects, 0))


@FAULTS.patch("NaN supports an exact claim", "judge_exact", claims=JUDGE)
def _(original, effect):
    return replace(original(), status=Status.SUPPORTED) if math.isnan(effect) else original()


@FAULTS.patch("whatever is not refuted is supported", "decide", claims=JUDGE)
def _(original):
    return Status.SUPPORTED if original() is Status.INCONCLUSIVE else original()


@FAULTS.patch("a prompt may be counted twice", "judge", claims=JUDGE)
def _(original):
    return original(prompts=None)
