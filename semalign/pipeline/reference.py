"""A Sphinx extension for the reference: docstrings as this project writes them, in the markup that Sphinx reads."""

from __future__ import annotations

import re
from typing import Any

LITERAL = re.compile(r"(``.*?``)")


def as_markup(lines: list[str], *, named: bool = False) -> list[str]:
    """A docstring's lines as reStructuredText.

    Args:
        lines: the docstring. Its ``|h|`` is a length, which the markup would take for the name of a substitution.
        named: it belongs to an attribute, a value of a module or a property: a colon in its first sentence separates no
            type from its description, as napoleon would read it.
    """
    escaped = ["".join(_bars(part) for part in LITERAL.split(line)) for line in lines]
    return ["..", "", *escaped] if named else escaped  # an empty comment: the first line is what napoleon splits


def _bars(part: str) -> str:
    return part if LITERAL.fullmatch(part) else part.replace("|", r"\|")


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_markup(lines, named=what in ("attribute", "data", "property"))


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx; docstrings are prepared before napoleon, of priority 500, reads them."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
