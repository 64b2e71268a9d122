"""A comparison with a stored run as text: what was compared, what came of it, and how to accept it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from attribution.gate.comparison import Change, Comparison
from attribution.gate.stored_run import StoredRun, key_of, label

__all__ = ["comparison_lines"]

# Of each method on each model.
_SHOWN = 5


def comparison_lines(comparison: Comparison, name: str, before: StoredRun, after: StoredRun) -> list[str]:
    """Return the lines that end a run which was compared with a stored run.

    Args:
        comparison: The comparison.
        name: Name of the stored run.
        before: The stored run.
        after: The run.
    """
    kinds = Counter(each.kind for each in comparison.changes)
    worse, reported = (comparison.of_kind("regressed", asserted=asserted) for asserted in (True, False))
    lines = [
        f"{len(comparison.changes)} of {len(before.verdicts)} claims of stored run {name!r} ({before.made}): "
        f"{kinds['unchanged']} unchanged, {kinds['changed']} changed within their intervals, "
        f"{kinds['improved']} improved, {len(worse)} regressed, {len(reported)} worse but only reported"
    ]
    other = [
        f"{library} {version}, then {before.versions.get(library)}"
        for library, version in after.versions.items()
        if version != before.versions.get(library)
    ]
    if other:
        lines.append(f"made with other versions: {'; '.join(other)}")
    if not before.binding:
        lines.append(
            f"stored run {name!r} does not say which claims were binding: an earlier version wrote it; update it"
        )
    lines += [f"not comparable: {problem}" for problem in comparison.problems]
    for what, changes in (("regressed", worse), ("worse, only reported", reported)):
        lines += _surest(what, changes)
    if comparison.problems or kinds["regressed"] or kinds["improved"]:
        lines.append(f"to store this run instead: --attribution-save={name} --attribution-update, and commit the file")
    return lines


def _surest(what: str, changes: Sequence[Change]) -> list[str]:
    """Return a sentence for the surest changes of each method on each model, and the names of the rest."""
    groups: dict[tuple[str, str], list[Change]] = defaultdict(list)
    for each in changes:
        groups[key_of(each.after)[:2]].append(each)
    lines = []
    for group in groups.values():
        # The one whose interval is farthest from zero, in its own widths.
        ordered = sorted(group, key=lambda each: (each.high - each.low) / each.worsening if each.worsening else 0.0)
        lines += [f"{what}: {each.sentence()}" for each in ordered[:_SHOWN]]
        rest = [label(key_of(each.after)) for each in ordered[_SHOWN:]]
        if rest:
            lines.append(f"{what}: also {', '.join(rest)}")
    return lines
