"""Slips in the experiment: rank, ablate, rerun, measure."""

from fault import BASELINES, VALUE, Faults

FAULTS = Faults()


@FAULTS.patch("before and after are swapped", "table_of", claims=VALUE)
def _(original):
    swapped = {"before": "after", "after": "before"}
    return original().rename(columns=lambda name: "_".join(swapped.get(part, part) for part in name.split("_")))


@FAULTS.patch("the best of the ranked are spared", "run_design", claims=BASELINES)
def _(original, ranked):
    def behind(by_unit):
        return {unit: records[10:] for unit, records in by_unit.items()}

    return original(ranked=[{name: behind(by_unit) for name, by_unit in own.items()} for own in ranked])


@FAULTS.patch("every method ablates the first one's neurons", "run_design", claims=BASELINES)
def _(original, ranked):
    return original(ranked=[dict.fromkeys(own, next(iter(own.values()))) for own in ranked])


@FAULTS.patch("reruns begin above the first layer that is edited", "Edits.first", claims=BASELINES + VALUE)
def _(original, self, layers):
    return max([*self.coefficients, *self.mixed_values, *self.sources], default=layers)


@FAULTS.patch("reruns begin with another prompt", "skip_blocks", claims=BASELINES + VALUE)
def _(original, rows):
    return original(rows=rows.flip(0))
