"""Slips in norms, and in what is seen through the final one."""

from dataclasses import replace

import torch
from fault import SCORES, TOP, Faults

FAULTS = Faults()


@FAULTS.patch("the norm's weight is dropped", "before_softmax", "pull_back")
def _(original, readout):
    return original(readout=replace(readout, norm=replace(readout.norm, weight=None)))


@FAULTS.patch("centring is dropped", "before_softmax")
def _(original, readout):
    return original(readout=replace(readout, norm=replace(readout.norm, centred=False)))


@FAULTS.patch("the norm's bias is added to every vector", "before_softmax")
def _(original, readout):
    logits, bias = original(), readout.norm.bias
    return logits if bias is None else logits + (readout.unembedding @ bias).to(logits)


@FAULTS.patch("the scale is of the unbiased variance", "frozen_scale")
def _(original, vectors, norm):
    n = vectors.shape[-1]
    return (n / (n - 1)) ** 0.5 * original(norm=replace(norm, eps=norm.eps * (n - 1) / n))


@FAULTS.patch("the scale is of what is not centred", "frozen_scale")
def _(original, norm):
    return original(norm=replace(norm, centred=False))


@FAULTS.patch("epsilon is added to the scale, not to the variance", "frozen_scale")
def _(original, norm):
    return original(norm=replace(norm, eps=0.0)) + norm.eps


@FAULTS.patch("the bound's gradient is not centred", "pull_back", claims=SCORES + TOP)
def _(original, readout):
    return original(readout=replace(readout, norm=replace(readout.norm, centred=False)))


@FAULTS.patch("the bound's gradient is not scaled", "pull_back", claims=SCORES + TOP)
def _(original, scale):
    return original(scale=torch.ones_like(scale))
