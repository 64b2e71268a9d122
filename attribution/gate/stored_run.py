"""Stored runs: what a run measured, kept as one JSON file that a person can read and a diff can show.

It holds, for each model, what tells its weights apart, and for each claim its definition, its verdict and its effect
on every prompt. A file that cannot be trusted is an error, never an empty stored run.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from attribution.claims.judge import EXTREMES, Claim, Evidence, Status, Verdict
from attribution.errors import BadInputError
from attribution.models.fingerprint import ModelFacts

__all__ = [
    "DEFINING",
    "StoredRun",
    "Key",
    "stored_run_of",
    "dumps",
    "is_finite",
    "is_possible",
    "checksum_of",
    "key_of",
    "label",
    "loads",
    "record_of",
    "some",
]

FORMAT = 1
"""Raised whenever the file's layout changes; other formats are refused."""

LEAST_LOG_PROB = -1e6
"""Far below what logits of any model are apart, in nats."""
# Effects are stored with six digits.
ROUNDED = 1e-5

# Of the largest effect of a claim: a hundredth of what rounding moves effects of about 1.
DIGITS = 6

Key: TypeAlias = tuple[str, str, str]

# Whether a claim takes part, and on which models it is binding, is not a part of what it says.
_STORED = {name: kind for name, kind in get_type_hints(Claim).items() if name not in ("gated", "family")}
# Fields that files name otherwise than the code does, so that the files of earlier versions can be read.
_IN_FILE = {"effect_bounds": "extremes"}
# A citation defines nothing: all that is left of a claim does.
DEFINING = tuple(name for name in _STORED if name != "source")
_NUMBERS = ("effect", "low", "high")


@dataclass(frozen=True)
class StoredRun:
    """What one run measured.

    Attributes:
        models: The models it was measured on, by name.
        verdicts: One for each gated claim, with evidence, in the order of :func:`key_of`.
        made: When, in UTC.
        versions: Of this package, Python, and the libraries that numbers depend on.
        binding: For each claim that was measured, also for those that are not gated, whether its test fails unless it
            is supported. Empty if an earlier version wrote the file.
    """

    models: Mapping[str, ModelFacts]
    verdicts: tuple[Verdict, ...]
    made: str
    versions: Mapping[str, str]
    binding: Mapping[Key, bool] = field(default_factory=dict)


def _rounded(values: Sequence[float]) -> list[float]:
    """Return numbers with as many decimals as give the largest of them six digits."""
    largest = max(map(abs, values), default=0.0)
    if largest == 0 or not math.isfinite(largest):
        return [float(value) for value in values]
    decimals = DIGITS - 1 - math.floor(math.log10(largest))
    # Adding zero takes the sign from a zero.
    return [float(round(value, decimals)) + 0.0 for value in values]


def _measured(verdict: Verdict) -> bool:
    """Say whether a verdict has an effect: no prompt has none, and the prompts of one fact have no interval."""
    return verdict.n > 0 if verdict.evidence is None else verdict.facts > 1


def is_finite(verdict: Verdict) -> bool:
    """Say whether everything that was measured is a number; NaN and infinity come from something broken."""
    numbers = [getattr(verdict, name) for name in _NUMBERS] if _measured(verdict) else []
    if verdict.evidence is not None:
        numbers += [*verdict.evidence.effects, *(verdict.evidence.baselines or ())]
    return all(map(math.isfinite, numbers))


def is_possible(verdict: Verdict) -> bool:
    """Say whether every effect is one that its claim can have.

    Shares and correlations have their limits; whatever else is measured is a difference of log-probabilities, or of
    what is no larger, and no model in floating point gives a token less than :data:`LEAST_LOG_PROB` nats.
    """
    if verdict.evidence is None:
        return True
    effects = verdict.evidence.effects
    if verdict.claim.effect_bounds in ("share", "correlation"):
        (least, _), (most, _) = EXTREMES[verdict.claim.effect_bounds]
        return all(least - ROUNDED <= each <= most + ROUNDED for each in effects)
    return all(abs(each) <= -LEAST_LOG_PROB for each in (*effects, *(verdict.evidence.baselines or ())))


def record_of(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as plain data, rounded, with its prompts in alphabetical order.

    It holds nothing but dicts, lists, texts, numbers and ``None``, so that it can travel between processes.
    """
    evidence = verdict.evidence
    if evidence is None:
        prompts = effects = baselines = None
    else:
        order = sorted(range(len(evidence.prompts)), key=lambda place: evidence.prompts[place])
        prompts = {evidence.prompts[place]: evidence.facts[place] for place in order}
        effects = _rounded([evidence.effects[place] for place in order])
        baselines = None
        if evidence.baselines is not None:
            baselines = _rounded([evidence.baselines[place] for place in order])
    return {
        "model": verdict.model,
        # A threshold may be given as 0.
        "claim": {
            _IN_FILE.get(name, name): float(getattr(verdict.claim, name))
            if kind is float
            else getattr(verdict.claim, name)
            for name, kind in _STORED.items()
        },
        "status": verdict.status.value,
        **{name: _rounded([getattr(verdict, name)])[0] if _measured(verdict) else None for name in _NUMBERS},
        "n": verdict.n,
        "facts": verdict.facts,
        "seed": verdict.seed,
        "prompts": prompts,
        "effects": effects,
        "baselines": baselines,
    }


def stored_run_of(
    records: Sequence[dict[str, Any]], models: Mapping[str, ModelFacts], binding: Mapping[Key, bool] | None = None
) -> StoredRun:
    """Return what a run measured.

    Args:
        records: See :func:`record_of`; one for each gated claim.
        models: The models, by name.
        binding: See :class:`StoredRun`.

    Raises:
        BadInputError: If a claim was measured twice or without evidence.
    """
    verdicts = sorted((_verdict(record) for record in records), key=key_of)
    twice = _twice(verdicts)
    if twice is not None:
        raise BadInputError(
            f"claim {label(twice)} was measured twice; give the claims about one model and method different ids."
        )
    for verdict in verdicts:
        if verdict.evidence is None and verdict.claim.test != "at_most":
            raise BadInputError(
                f"claim {label(key_of(verdict))} came without its effect on each prompt; judge it by "
                "attribution.claims.judge.judge, or set gated=False."
            )
    libraries = {name: metadata.version(name) for name in ("nnsight", "numpy", "torch", "transformers")}
    own = metadata.version("attribution-suite")
    return StoredRun(
        models=dict(sorted(models.items())),
        verdicts=tuple(verdicts),
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"attribution": own, "python": platform.python_version(), **libraries},
        binding=dict(sorted((binding or {}).items())),
    )


def key_of(verdict: Verdict) -> Key:
    """Return what pairs a claim with itself in another run; also the order of a stored run."""
    return verdict.model, verdict.claim.method, verdict.claim.id


def label(key: Key) -> str:
    """Return a claim in words."""
    model, method, claim = key
    return f"{claim!r} ({f'{method} on ' if method else ''}{model})"


def some(labels: Collection[str] | Iterator[str], noun: str) -> str:
    """Return a few of many in words."""
    every = list(labels)
    if len(every) == 1:
        return f"the {noun} {every[0]}"
    rest = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return f"each of {len(every)} {noun}s, {', '.join(every[:3])}{rest},"


def _twice(verdicts: Sequence[Verdict]) -> Key | None:
    seen: set[Key] = set()
    return next((key for key in map(key_of, verdicts) if key in seen or seen.add(key)), None)  # type: ignore[func-returns-value]


def _verdict(record: Mapping[str, Any]) -> Verdict:
    prompts = record["prompts"]
    evidence = None
    if prompts is not None:
        baselines = record["baselines"]
        evidence = Evidence(
            prompts=tuple(prompts),
            facts=tuple(prompts.values()),
            effects=tuple(map(float, record["effects"])),
            baselines=None if baselines is None else tuple(map(float, baselines)),
        )
    nothing = float("nan")
    effect, low, high = (nothing if record[name] is None else float(record[name]) for name in _NUMBERS)
    claim = Claim(**{name: record["claim"][_IN_FILE.get(name, name)] for name in _STORED})
    return Verdict(
        claim, record["model"], Status(record["status"]), effect, low, high,
        record["n"], record["facts"], record["seed"], None, evidence,
    )  # fmt: skip


def checksum_of(content: object) -> str:
    """Return a hash that does not depend on the layout of the text."""
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def dumps(stored_run: StoredRun) -> str:
    """Return a stored run as JSON, one line for each claim's effects; each list of prompts stands there once.

    Raises:
        BadInputError: If a number is NaN or infinite.
    """
    lists: dict[str, dict[str, str]] = {}
    claims = []
    for verdict in stored_run.verdicts:
        if not is_finite(verdict):
            raise BadInputError(
                f"claim {label(key_of(verdict))} has an effect that is NaN or infinite, which nothing can be compared "
                "with; find out what broke before storing the run."
            )
        if not is_possible(verdict):
            raise BadInputError(
                f"claim {label(key_of(verdict))} has an effect that no measurement of its kind can have; find out what "
                "broke before storing the run."
            )
        record = record_of(verdict)
        if record["prompts"] is not None:
            name = checksum_of(list(record["prompts"].items()))[:12]
            lists[name] = record["prompts"]
            record["prompts"] = name
        claims.append(record)
    content: dict[str, Any] = {
        "format": f"attribution baseline {FORMAT}",
        "made": stored_run.made,
        "versions": dict(stored_run.versions),
        "models": {name: asdict(facts) for name, facts in stored_run.models.items()},
        "prompts": dict(sorted(lists.items())),
        "claims": claims,
    }
    if stored_run.binding:
        content["binding"] = _nested(stored_run.binding)
    return _laid_out({**content, "checksum": checksum_of(content)}) + "\n"


def _nested(binding: Mapping[Key, bool]) -> dict[str, dict[str, dict[str, bool]]]:
    found: dict[str, dict[str, dict[str, bool]]] = {}
    for (model, method, claim), bound in sorted(binding.items()):
        found.setdefault(model, {}).setdefault(method, {})[claim] = bound
    return found


def _binding(nested: object) -> dict[Key, bool]:
    """Return what :func:`_nested` was made of.

    Raises:
        ValueError: If it was made of nothing of the kind.
    """
    if not (
        isinstance(nested, dict)
        and all(isinstance(methods, dict) for methods in nested.values())
        and all(isinstance(claims, dict) for methods in nested.values() for claims in methods.values())
    ):
        raise ValueError("does not say by model and method which claims were binding")
    found = {
        (model, method, claim): bound
        for model, methods in nested.items()
        for method, claims in methods.items()
        for claim, bound in claims.items()
    }
    if not all(isinstance(bound, bool) for bound in found.values()):
        raise ValueError("does not say by true or false which claims were binding")
    return found


def _laid_out(value: object, indent: str = "") -> str:
    """Return JSON with one line for each key, except that a list of numbers is one line."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        lines = [
            f"{inner}{json.dumps(key, ensure_ascii=False)}: {_laid_out(each, inner)}" for key, each in value.items()
        ]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(inner + _laid_out(each, inner) for each in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def loads(text: str) -> StoredRun:
    """Return the stored run that a text holds.

    Raises:
        ValueError: If it holds none, or one that was changed since it was written; the message completes "the
            file ...".
    """
    try:
        content = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_finite_number, parse_float=_finite_number
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"is not whole JSON ({error})") from None
    except RecursionError:
        raise ValueError("is nested too deeply for a stored run") from None
    written = content.get("format") if isinstance(content, dict) else None
    if not isinstance(written, str) or not written.startswith("attribution baseline "):
        raise ValueError("is not a stored run of this package")
    if written != f"attribution baseline {FORMAT}":
        raise ValueError(f"has the format {written!r}, and this version reads 'attribution baseline {FORMAT}'")
    checksum = content.pop("checksum", None)
    if checksum != checksum_of(content):
        raise ValueError("was changed after it was written: its checksum does not fit")
    # Earlier versions did not write it.
    binding = _binding(content.pop("binding", {}))
    _require_fields(content, {"format": str, "made": str, "versions": dict, "models": dict, "prompts": dict,
                              "claims": list}, "it")  # fmt: skip
    models = {}
    for name, facts in content["models"].items():
        # Earlier versions did not write it, and knew no quantised weights.
        facts = {"quantised": "", **facts} if isinstance(facts, dict) else facts
        _require_fields(facts, get_type_hints(ModelFacts), f"model {name!r}")
        models[name] = ModelFacts(**facts)
    for name, prompts in content["prompts"].items():
        if not (isinstance(prompts, dict) and all(isinstance(fact, str) for fact in prompts.values())):
            raise ValueError(f"has a list of prompts {name!r} that is not made of prompts with their facts")
    verdicts = tuple(_read_claim(record, content["prompts"]) for record in content["claims"])
    if not verdicts:
        raise ValueError("holds no claims")
    twice = _twice(verdicts)
    if twice is not None:
        raise ValueError(f"holds the claim {label(twice)} twice")
    for verdict in verdicts:
        if verdict.model not in models:
            raise ValueError(f"does not say which weights {verdict.model!r} had")
    if not all(isinstance(version, str) for version in content["versions"].values()):
        raise ValueError("has versions that are not texts")
    return StoredRun(models, verdicts, content["made"], content["versions"], binding)


_RECORD: dict[str, Any] = {
    "model": str,
    "claim": dict,
    "status": Literal[tuple(status.value for status in Status)],
    **dict.fromkeys(_NUMBERS, float | None),
    "n": int,
    "facts": int,
    "seed": int | None,
    "prompts": str | None,
    "effects": list[float] | None,
    "baselines": list[float] | None,
}


def _read_claim(record: object, lists: Mapping[str, dict[str, str]]) -> Verdict:
    where = "a claim"
    if isinstance(record, dict) and isinstance(record.get("claim"), dict):
        where = f"claim {record['claim'].get('id')!r}"
    _require_fields(record, _RECORD, where)
    assert isinstance(record, dict)
    _require_fields(record["claim"], {_IN_FILE.get(name, name): kind for name, kind in _STORED.items()}, where)
    if record["prompts"] is None:
        if record["effects"] is not None or record["baselines"] is not None:
            raise ValueError(f"gives effects but no prompts for {where}")
        if record["claim"]["test"] != "at_most":
            raise ValueError(f"gives no effects for {where}")
        return _verdict(record)
    prompts = lists.get(record["prompts"])
    if prompts is None:
        raise ValueError(f"lacks the list of prompts {record['prompts']!r} of {where}")
    baselines = record["effects"] if record["baselines"] is None else record["baselines"]
    if record["effects"] is None or not len(record["effects"]) == len(baselines) == len(prompts) == record["n"]:
        raise ValueError(f"does not give one effect for each of the {len(prompts)} prompts of {where}")
    return _verdict({**record, "prompts": prompts})


def _require_fields(record: object, kinds: Mapping[str, Any], where: str) -> None:
    if not isinstance(record, dict) or set(record) != set(kinds):
        different = sorted(set(record) ^ set(kinds)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"does not have the fields of {where} that this version writes ({different})")
    for name, kind in kinds.items():
        if not _fits(record[name], kind):
            raise ValueError(f"has {str(record[name])[:60]!r} as {name!r} of {where}")


def _fits(value: object, kind: Any) -> bool:
    """Say whether a value read from JSON is of a kind."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(each, get_args(kind)[0]) for each in value)
    if get_args(kind):
        return any(_fits(value, each) for each in get_args(kind))
    # Not isinstance: True is no number.
    return type(value) is kind


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"holds {twice!r} twice")
    return found


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"holds {text}, which is no number that was measured")
    return number
