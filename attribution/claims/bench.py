"""What the claims about one model share: each experiment is run once, and its result is judged by many claims."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, wraps
from typing import Concatenate, Literal, ParamSpec, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import Tensor

from attribution.claims.judge import Claim, Verdict, judge, judge_exact
from attribution.claims.measured import Exact, Measured, NotApplicable
from attribution.claims.sample import Sample
from attribution.engine.ablation import outcomes
from attribution.engine.all_scores import AllScores, score_all, score_parts
from attribution.engine.batching import batches_of, freed_memory_returned
from attribution.engine.decomposition import IDENTITIES, decomposition_errors, worst
from attribution.engine.masks import AblationKind
from attribution.engine.methods import METHODS, method_named
from attribution.engine.metrics import METRICS, Outcome, by_metric
from attribution.engine.progress import Progress
from attribution.engine.questions import Question, question_of
from attribution.engine.ranking import Ranking, Search, candidates_of_each, rank_all
from attribution.engine.trace import read_activations
from attribution.experiments.design import Budget, Design, budgets_of, table_of
from attribution.experiments.evaluation import references_of, run_design
from attribution.models.model import Model
from attribution.models.registry import Entry, entry_of
from attribution.prompts.knowledge import Prompt
from attribution.records import Unit, unit_named

__all__ = ["STEPS", "Workbench", "measured_once", "prompt_key"]

P = ParamSpec("P")
T = TypeVar("T")

STEPS = 20
"""Points on the path of integrated gradients."""

# Vectors of heads and layers that are held at a time: 2**25 float64 numbers are 256 MiB.
_HELD_NUMBERS = 2**25
# The deletion curves go up to this many FFN neurons. Ranking them all at once costs little more than ranking ten, and
# less than ranking a second time.
_DEEP = 100
# Fewer say little of an engine that is checked on them.
_ENOUGH = 24
OWN_PROMPTS = "the prompts are one's own: only more than with swapped answers"


_Arm: TypeAlias = tuple[str, str, tuple[tuple[str, int], ...], int]
_NOTHING = pd.DataFrame()


def _arm(method: str, kind: str, budget: Budget, seed: int) -> _Arm:
    """Return what tells an arm of an experiment apart: method, kind of ablation, how many of each unit, and seed."""
    return method, kind, tuple(sorted(budget.items())), seed


def prompt_key(prompt: Prompt) -> str:
    """Return what tells a prompt apart from others: its text with its answer."""
    return f"{prompt.text}{prompt.answer}"


def _named(measure: Callable[..., object], *args: object) -> str:
    """Return in words what is measured: the module, the function, and what it is measured of."""
    words = f"{measure.__module__.rpartition('.')[2]}: {measure.__name__.strip('_')}".replace("_", " ")
    what = ", ".join(each for each in args if isinstance(each, str))
    return f"{words} ({what})" if what else words


def measured_once(measure: Callable[Concatenate[Workbench, P], T]) -> Callable[Concatenate[Workbench, P], T]:
    """Make a measurement run once for each bench and arguments, because several claims share its result.

    Args:
        measure: A function of a bench and of hashable arguments.
    """

    @wraps(measure)
    def remembered(bench: Workbench, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return bench.once(measure, *args, **kwargs)

    return remembered


class Workbench:
    """Measures a model on a sample of prompts, remembers what it measured, and judges claims by it.

    Args:
        sample: The prompts that claims are judged on, and the model.
        seed: Seed of everything that is drawn at random.
        progress: How it is shown what is measured; its label is the measurement's.

    Attributes:
        spent: Seconds that each experiment took, those that it rests on aside, by what it is.
    """

    def __init__(self, sample: Sample, *, seed: int = 0, progress: Progress | None = None) -> None:
        self.sample = sample
        self.seed = seed
        self.progress = progress or Progress()
        self.spent: dict[str, float] = {}
        self._within = 0.0
        self._frames: dict[_Arm, pd.DataFrame] = {}
        self._results: dict[Hashable, object] = {}
        self._every: dict[tuple[str, Unit, int], AllScores] = {}
        self._scores: dict[tuple[str, Unit, Question], npt.NDArray[np.float64]] = {}
        self._rankings: dict[tuple[str, Unit, int, int], Ranking] = {}

    @property
    def model(self) -> Model:
        """The model that claims are about."""
        return self.sample.model

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts that claims are judged on, one of each known fact."""
        if "prompts" not in vars(self.sample):
            with self._timed("which prompts it knows"):
                return self.sample.prompts
        return self.sample.prompts

    @property
    def entry(self) -> Entry:
        """What the registry says of the model; of prompts of one's own it records nothing."""
        entry = entry_of(self.model.name)
        if self.sample.knowledge.bundled:
            return entry
        return replace(entry, known_share=0.0, known_share_reason=OWN_PROMPTS, asserted={}, not_supported={})

    @cached_property
    def of_the_engine(self) -> Workbench:
        """The bench that the engine itself is checked on: this one, unless the model knows next to nothing.

        What the engine computes has to be right whether or not the model is. If the model knows too little, the engine
        is checked on all prompts.
        """
        if len(self.prompts) >= min(_ENOUGH, self.sample.max_prompts or _ENOUGH):
            return self
        return Workbench(self.sample.regardless_of_knowledge(), seed=self.seed, progress=self.progress)

    @cached_property
    def _answered(self) -> list[Outcome]:
        """How the plain model answers :attr:`prompts`."""
        return outcomes(self.model, self.sample.questions, [()] * len(self.sample.questions))[0]

    @cached_property
    def before(self) -> dict[str, npt.NDArray[np.float64]]:
        """Each metric of the plain model on :attr:`prompts`."""
        return by_metric(self._answered)

    def once(self, measure: Callable[Concatenate[Workbench, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return ``measure(self, *args, **kwargs)``; called again with the same arguments, the same result."""
        key = measure, args, tuple(sorted(kwargs.items()))
        if key not in self._results:
            with self._timed(_named(measure, *args)):
                self._results[key] = measure(self, *args, **kwargs)
        return cast(T, self._results[key])

    def bar(self, what: str) -> Progress:
        """Return how it is shown how far a measurement is."""
        return replace(self.progress, label=f"{self.model.name}: {what}")

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Take the time of an experiment."""
        start, outside, self._within = time.perf_counter(), self._within, 0.0
        try:
            with freed_memory_returned():
                yield
        finally:
            took = time.perf_counter() - start
            self.spent[what] = self.spent.get(what, 0.0) + took - self._within
            self._within = outside + took

    def ranked(
        self, methods: Sequence[str], k: Mapping[Unit, int], *, indices: Sequence[int], seed: int | None = None
    ) -> list[dict[str, dict[Unit, Ranking]]]:
        """Return the best of each prompt by method and unit; no claim's search is run again for a claim that asks less.

        Args:
            methods: Registered methods; all that have to be run share one trace per batch.
            k: How many of each unit.
            indices: Which of :attr:`prompts`.
            seed: Seed of random draws; the bench's own when ``None``.
        """
        seed = self.seed if seed is None else seed
        deep = dict(k)
        if "ffn" in k:
            anatomy = self.model.anatomy
            deep["ffn"] = max(k["ffn"], min(_DEEP, anatomy.layers * anatomy.ffn_neurons))

        def lacks(method: str, unit: Unit, place: int) -> bool:
            known = self._rankings.get((method, unit, seed, place))
            return known is None or len(known) < k[unit]

        wanted: dict[str, dict[Unit, int | None]] = {}
        missing: set[int] = set()
        for method in methods:
            for unit in k:
                shallow = [place for place in indices if lacks(method, unit, place)]
                if shallow:
                    wanted.setdefault(method, {})[unit] = deep[unit]
                    missing.update(shallow)
        asked = sorted(missing)
        what = f"ranking by {', '.join(wanted)}"
        with self._timed(what):
            found = rank_all(
                self.model,
                [self.sample.questions[place] for place in asked],
                wanted,
                Search(seed, STEPS),
                progress=self.bar(what),
            )
        for place, by_method in zip(asked, found, strict=True):
            for method, by_unit in by_method.items():
                for unit, ranking in by_unit.items():
                    if lacks(method, unit, place):
                        self._rankings[method, unit, seed, place] = ranking
        return [
            {
                method: {unit: self._rankings[method, unit, seed, place].first(number) for unit, number in k.items()}
                for method in methods
            }
            for place in indices
        ]

    def all_scores(self, method: str, unit: Unit, indices: Sequence[int]) -> list[AllScores]:
        """Return the scores of all neurons of a unit on some of :attr:`prompts`.

        One sweep over the vectors serves all prompts on which any claim wants them.
        """
        missing = [place for place in indices if (method, unit, place) not in self._every]
        if missing:
            asked = sorted({*missing, *self.sample.scored_in_full(unit)})
            with self._timed(f"every {unit} by {method}"):
                found = self._scored(method, unit, [self.sample.questions[place] for place in asked])
            self._every.update({(method, unit, place): each for place, each in zip(asked, found, strict=True)})
        return [self._every[method, unit, place] for place in indices]

    def _scored(self, method: str, unit: Unit, questions: Sequence[Question]) -> list[AllScores]:
        scorer = method_named(method, unit)
        found = candidates_of_each(self.model, questions, {unit: [scorer]}, Search(self.seed, STEPS))
        return score_all([each[unit] for each in found], scorer, progress=self.bar(f"every {unit} by {method}"))

    def scores(
        self, method: str, unit: Literal["head", "layer"], questions: Sequence[Question]
    ) -> npt.NDArray[np.float64]:
        """Return the scores of all heads or layers on each prompt, (questions, candidates), each scored once.

        Heads and layers, for the prompt's own answer and the swapped one, are scored together: most of the work is the
        same, and some claim will ask for the rest.
        """
        swapped = {prompt.text: prompt for prompt in self.sample.swapped}
        answers: dict[tuple[int, ...], list[Question]] = {}
        for question in dict.fromkeys(questions):
            if (method, unit, question) not in self._scores:
                own = answers.setdefault(tuple(question.ids), [])
                own.append(question)
                if question.text in swapped:
                    own.append(question_of(self.model, swapped[question.text]))
        anatomy = self.model.anatomy
        # Each prompt has vectors of its own.
        size = max(1, _HELD_NUMBERS // (anatomy.layers * (anatomy.heads + 2) * anatomy.width))
        what = f"heads and layers by {method}"
        with self._timed(what), self.bar(what).over(len(answers), "prompt") as update:
            prompts = [list(dict.fromkeys(own)) for own in answers.values()]
            for start in range(0, len(prompts), size):
                self._score_parts(method, unit, prompts[start : start + size])
                update(min(size, len(prompts) - start))
        number = anatomy.layers * (2 if unit == "layer" else anatomy.heads)
        scores = np.zeros((len(questions), number))
        for row, question in enumerate(questions):
            scores[row] = self._scores[method, unit, question]
        return scores

    def _score_parts(self, method: str, unit: Literal["head", "layer"], prompts: Sequence[Sequence[Question]]) -> None:
        """Score the heads and layers of some prompts for all answers that are asked for of each.

        Args:
            method: The method.
            unit: What is asked for; the other is scored as well if the method can.
            prompts: The questions that each prompt is asked.
        """
        units: list[Unit] = [each for each in ("head", "layer") if each == unit or each in METHODS[method].units]
        scorers = {each: [method_named(method, each)] for each in units}
        found = candidates_of_each(self.model, [own[0] for own in prompts], scorers, Search(self.seed, STEPS))
        asked = [
            [
                replace(by_unit[each], answer=question.answer_id, seed=question.seed(self.seed))
                for question in own
                for each in units
            ]
            for own, by_unit in zip(prompts, found, strict=True)
        ]
        for own, scored in zip(prompts, score_parts(asked, method_named(method, unit)), strict=True):
            keys = [(method, each, question) for question in own for each in units]
            self._scores.update({key: each.numpy(force=True) for key, each in zip(keys, scored, strict=True)})

    def final_states(self, questions: Sequence[Question]) -> list[Tensor]:
        """Return the final residual state of each prompt at its last position, (width,) each."""
        states: dict[int, Tensor] = {}
        for rows, batch in batches_of(self.model, questions):
            states.update(zip(rows, read_activations(self.model, batch, logits=False).resid_final, strict=True))
        return [states[row] for row in range(len(questions))]

    def rankings(self, method: str, unit: str, k: int, *, indices: Sequence[int]) -> list[Ranking]:
        """Return the best of each prompt as rankings without first-order terms, see :meth:`ranked`."""
        chosen = unit_named(unit)
        return [each[method][chosen] for each in self.ranked((method,), {chosen: k}, indices=indices)]

    def frames(
        self,
        methods: Sequence[str],
        k: int | Sequence[int] | Mapping[str, int],
        *,
        kind: str = "zero",
        together: Sequence[str] = (),
        seed: int | None = None,
        number: int | None = None,
    ) -> dict[str, pd.DataFrame]:
        """Ablate the best neurons of each method on every prompt, see :func:`attribution.evaluate`.

        Args:
            methods: Registered methods; those not measured yet are measured together.
            k: How many, several numbers, or how many of each unit; FFN neurons when it names none.
            kind: An ablation kind; what is not zero takes its values from the prompts themselves.
            together: Kinds that are measured along with it, by the same ranking.
            seed: Seed of random draws; the bench's own when ``None``.
            number: On so many prompts only.

        Returns:
            Method to its frame; for each k, one row per prompt in the order of :attr:`prompts`.
        """
        seed = self.seed if seed is None else seed
        indices = self.sample.subset(len(self.prompts) if number is None else number)
        if not indices:
            # Nothing to measure: the judge then says that there are too few prompts.
            columns = ["k", "fact", *(f"{metric}_{when}" for metric in METRICS for when in ("before", "after"))]
            return {name: pd.DataFrame(columns=columns, dtype=float) for name in methods}
        budgets = budgets_of(list(k) if isinstance(k, tuple) else k, "ffn")
        self._measure([(name, kind, budget, seed) for name in methods for budget in budgets], together, indices)
        return {
            name: pd.concat(
                [self._frames[_arm(name, kind, budget, seed)].loc[indices] for budget in budgets]
            ).reset_index(drop=True)
            for name in methods
        }

    def _measure(
        self, asked: Sequence[tuple[str, str, Budget, int]], together: Sequence[str], indices: Sequence[int]
    ) -> None:
        """Measure some of :attr:`prompts` in those of some arms in which they were not, methods together.

        Args:
            asked: Method, kind of ablation, budget and seed of each arm; of one kind and seed.
            together: Other kinds that are measured along with it.
            indices: Which prompts.
        """
        lacking = {
            place: arms
            for place in indices
            if (arms := [arm for arm in asked if place not in self._frames.get(_arm(*arm), _NOTHING).index])
        }
        if not lacking:
            return
        every = [arm for arm in asked if any(arm in arms for arms in lacking.values())]
        places, (_, kind, _, seed) = list(lacking), every[0]
        methods = list(dict.fromkeys(name for name, *_ in every))
        budgets = list({_arm(*arm)[2]: arm[2] for arm in every}.values())
        design = Design.of(methods, budgets, list(dict.fromkeys((kind, *together))), seed=seed, steps=STEPS)
        questions = [self.sample.questions[place] for place in places]
        ranked = self.ranked(methods, design.largest, indices=places, seed=seed)
        what = f"ablation by {', '.join(methods)}"
        with self._timed(what):
            measured = run_design(
                self.model,
                questions,
                design,
                references_of(self.model, design, questions, self._reference(design)),
                ranked=[
                    {name: {unit: each.neurons for unit, each in by_unit.items()} for name, by_unit in own.items()}
                    for own in ranked
                ],
                before=[self._answered[place] for place in places],
                progress=self.bar(what),
            )
        table = table_of([self.prompts[place] for place in places], design, measured)
        for number, arm in enumerate(design.arms):
            own = table.iloc[number * len(places) : (number + 1) * len(places)].set_index(pd.Index(places))
            key = _arm(arm.method, arm.kind.value, arm.budget, seed)
            known = self._frames.get(key, _NOTHING)
            new = own.loc[[place for place in places if place not in known.index]]
            self._frames[key] = new if known.empty else pd.concat([known, new])

    def _reference(self, design: Design) -> list[tuple[int, ...]] | None:
        """Return what ablated coefficients take their values from: all prompts, also where few are ablated."""
        return (
            None if set(design.kinds) == {AblationKind.ZERO} else [question.ids for question in self.sample.questions]
        )

    def judge(
        self,
        claim: Claim,
        effects: Sequence[float] | npt.NDArray[np.float64] | pd.Series,
        *,
        baselines: Sequence[float] | npt.NDArray[np.float64] | pd.Series | None = None,
        indices: Sequence[int] | None = None,
        seed: int | None = None,
        note: str = "",
    ) -> Verdict:
        """Judge a claim by one effect for each prompt, see :func:`attribution.claims.judge.judge`.

        Args:
            claim: The claim.
            effects: One number per prompt.
            baselines: What the effects are relative to.
            indices: Which of :attr:`prompts` were measured; all when ``None``.
            seed: Seed of the measurement's random draws, to be reported.
            note: What the table says beside the verdict, such as what the measurement cost.
        """
        prompts = self.prompts if indices is None else [self.prompts[place] for place in indices]
        verdict = judge(
            claim,
            model=self.model.name,
            effects=np.asarray(effects, dtype=np.float64).tolist(),
            facts=[prompt.fact for prompt in prompts],
            baselines=None if baselines is None else np.asarray(baselines, dtype=np.float64).tolist(),
            prompts=[prompt_key(prompt) for prompt in prompts],
            seed=seed,
        )
        return replace(verdict, note=note)

    def verdict(self, claim: Claim, measured: Measured) -> Verdict:
        """Judge a claim by what was measured for it.

        If the claim does not apply to the method, the verdict only reports the reason. The claim is not asserted then,
        and it is left out of stored runs: if a method stops scoring a unit, the gate finds the claim missing.

        Args:
            claim: The claim.
            measured: Effects by prompt, one exact number, or why nothing was measured.
        """
        if isinstance(measured, NotApplicable):
            unasked = replace(claim, asserted=False, gated=False)
            return self.judge(unasked, [], indices=[], note=f"not applicable: {measured.reason}")
        if isinstance(measured, Exact):
            exact = judge_exact(
                claim, model=self.model.name, effect=measured.value, n=measured.prompts, facts=measured.facts
            )
            return replace(exact, seed=measured.seed, note=measured.note)
        return self.judge(
            claim,
            measured.values,
            baselines=measured.baselines,
            indices=measured.indices,
            seed=measured.seed,
            note=measured.note,
        )

    @cached_property
    def decomposition_errors(self) -> dict[str, float]:
        """Worst error of each identity over the prompts, all layers and positions, in rounding bounds."""
        errors = [
            decomposition_errors(read_activations(self.model, batch, positions="all"), self.model.anatomy, batch.mask)
            for _, batch in batches_of(self.model, self.sample.questions)
        ]
        return {name: worst(each[name] for each in errors) for name in IDENTITIES}
