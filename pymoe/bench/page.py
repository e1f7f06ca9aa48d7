"""Tables inside a Markdown page, rewritten from the results they come from."""

from __future__ import annotations

import re
from pathlib import Path

from pymoe.bench.store import Results, write_text
from pymoe.bench.table import tables
from pymoe.errors import ArgumentError, complaint

__all__ = ["page_with", "rewrite"]

_BEGIN, _END = "<!-- results: {name} -->\n", "<!-- end of results -->"


def page_with(text: str, name: str, results: Results) -> str:
    """Return the page's text with the tables of `results` between the marks that carry the file's name.

    Raises
    ------
    ArgumentError
        The page has no such marks, or several.
    """
    begin = _BEGIN.format(name=name)
    pattern = f"{re.escape(begin)}.*?{re.escape(_END)}"
    found = re.findall(pattern, text, flags=re.DOTALL)
    if len(found) != 1:
        rule = f"hold the line '<!-- results: {name} -->' once, and '<!-- end of results -->' after it"
        raise ArgumentError(complaint("pymoe bench", "--page", rule, f"{len(found)} of them"))
    marked = f"{begin}\n{tables(results, markdown=True)}\n\n{_END}"
    return re.sub(pattern, lambda _: marked, text, flags=re.DOTALL)


def rewrite(path: Path, results: Results) -> None:
    """Rewrite the tables of a page in place."""
    assert results.path is not None
    write_text(path, page_with(path.read_text(encoding="utf-8"), results.path.name, results))
