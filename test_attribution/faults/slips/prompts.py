"""Slips between a prompt's text and its tokens, and in the random draws that belong to it."""

from dataclasses import replace

import torch
from fault import ABLATION, CONTROLS, KNOWN, Faults

FAULTS = Faults()


@FAULTS.patch("positions are off by one", "pad", claims=KNOWN)
def _(original):
    batch = original()
    return replace(batch, last=batch.last - 1)


@FAULTS.patch("padding is on the left", "pad", claims=KNOWN)
def _(original):
    batch = original()
    last = batch.ids.shape[1] - 1
    shifted = [ids.roll(last - int(own)) for ids, own in zip(batch.ids, batch.last, strict=True)]
    return replace(batch, ids=torch.stack(shifted), mask=batch.mask.flip(1), last=torch.full_like(batch.last, last))


@FAULTS.patch("padding is not masked", "pad", claims=ABLATION)
def _(original):
    batch = original()
    return replace(batch, mask=torch.ones_like(batch.mask))


@FAULTS.patch("the token in front is left out", "encode", claims=KNOWN)
def _(original, tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@FAULTS.patch("the answer loses its space", "answer_tokens", claims=KNOWN)
def _(original, answer):
    return original(answer=answer.strip())


@FAULTS.patch("prompts of a batch are mixed up", "selection_outcomes", claims=KNOWN)
def _(original, prompts):
    mixed_up = [replace(each, text=other.text) for each, other in zip(prompts, reversed(prompts), strict=True)]
    return original(prompts=mixed_up)


@FAULTS.patch("one random draw for all prompts", "Question.seed", claims=CONTROLS)
def _(original, self):
    return original(self=replace(self, text="", answer=""))


@FAULTS.patch("random draws ignore the seed", "Question.seed", claims=CONTROLS)
def _(original):
    return original(seed=0)


@FAULTS.patch("random neurons come from the early layers", 'METHODS["random"].score', claims=CONTROLS)
def _(original, candidates):
    return original() - candidates.index / candidates.total
