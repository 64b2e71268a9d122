"""Pages: one self-contained HTML file that needs no network, no script from elsewhere and no font."""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["render"]


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("attribution.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: object) -> str:
    """Return a page.

    Args:
        template: A file of ``attribution/report/templates``; those that extend ``page.html`` have its frame and style.
        values: What the template names. Text is escaped; what is HTML already comes as ``markupsafe.Markup``.
    """
    return str(_environment().get_template(template).render(**values))
