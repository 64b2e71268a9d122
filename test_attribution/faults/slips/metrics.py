"""Slips in what is measured of a model's answer, and in which prompts count as known."""

from dataclasses import replace

from fault import KNOWN, METRICS, VALUE, Faults

FAULTS = Faults()


@FAULTS.patch("rank counts from the wrong end", "measure_each", claims=METRICS + KNOWN)
def _(original, logits):
    pairs = zip(original(), original(logits=-logits), strict=True)
    return [replace(each, rank=other.rank, mrr=other.mrr) for each, other in pairs]


@FAULTS.patch("equal tokens rank behind the answer", "measure_each", claims=METRICS)
def _(original, logits, answer_ids):
    found = zip(original(), logits, answer_ids, strict=True)
    ahead = [(each, int((row > row[answer]).sum())) for each, row, answer in found]
    return [replace(each, rank=1 + number, mrr=1 / (1 + number)) for each, number in ahead]


@FAULTS.patch("log p is the log of a rounded softmax", "measure_each", claims=METRICS)
def _(original, logits, answer_ids):
    found = zip(original(), logits.softmax(-1).log(), answer_ids, strict=True)
    return [replace(each, logp=float(row[answer]), prob=float(row[answer].exp())) for each, row, answer in found]


@FAULTS.patch("the probability of another token", "measure_each", claims=VALUE)
def _(original, answer_ids):
    pairs = zip(original(), original(answer_ids=[each - 1 for each in answer_ids]), strict=True)
    return [replace(each, prob=other.prob, logp=other.logp) for each, other in pairs]


@FAULTS.patch("MRR is the mean rank", "measure_each", claims=VALUE)
def _(original):
    return [replace(each, mrr=each.rank) for each in original()]


@FAULTS.patch("the selection rule forgets the top 10", "selection_outcome", claims=METRICS)
def _(original, logits, answer_id, rival_ids):
    rivals = [each for each in rival_ids if each != answer_id]
    return original(logits=logits[[answer_id, *rivals]], answer_id=0, rival_ids=range(1, 1 + len(rivals)))


@FAULTS.patch("the selection rule forgets the rivals", "selection_outcome", claims=KNOWN)
def _(original):
    return original(rival_ids=())


@FAULTS.patch("known prompts are not filtered", "known_prompts", claims=KNOWN)
def _(original, prompts):
    return list(prompts)


@FAULTS.patch("the control of what is known asks for the same answers", "Sample.swapped", claims=KNOWN)
def _(original, self):
    return self.knowledge.prompts
