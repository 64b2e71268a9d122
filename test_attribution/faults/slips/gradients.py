"""Slips in backward passes."""

from fault import BACKWARD, Faults

FAULTS = Faults()


@FAULTS.patch("gradients count at the last position only", "_ffn_effect", claims=BACKWARD)
def _(original, coefficients, slope):
    return original(coefficients=coefficients[:, -1:], slope=slope[:, -1:])


@FAULTS.patch("gradients reach values by the transposed pattern", "_to_values", claims=BACKWARD)
def _(original, pattern):
    return original(pattern=pattern.transpose(-1, -2))


@FAULTS.patch("gradients are of p, not of log p", "gradients:_log_prob", claims=BACKWARD)
def _(original, logits, answers):
    return logits.softmax(-1).gather(-1, answers[:, None]).sum()


@FAULTS.patch("gradients are of another prompt's answer", "read_effects", claims=BACKWARD)
def _(original, answers):
    return original(answers=answers.flip(0))


# The points are made inside, and what gets them is not told how many there are.
FAULTS.edit(
    "the path of integrated gradients starts at zero",
    "_integrated",
    "% steps + 0.5",
    "% steps",
    claims=BACKWARD,
)


@FAULTS.patch("AtP* averages over one layer too many", 'METHODS["atp_star"].score', claims=BACKWARD)
def _(original, candidates):
    layers = 1 + candidates.table.sublayers[-1].layer
    return original() * (layers - 1) / layers


@FAULTS.patch("AtP* loses the sign", 'METHODS["atp_star"].score', claims=BACKWARD)
def _(original):
    return original().abs()
