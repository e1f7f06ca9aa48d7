"""Sphinx configuration: Markdown pages, the reference drawn from docstrings, every example run as a doctest."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from numpydoc.docscrape import NumpyDocString  # noqa: E402

import pymoe  # noqa: E402  found only now

project = "pymoe"
author = "the pymoe authors"
version = release = pymoe.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "numpydoc",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates"]
default_role = "py:obj"  # single backticks in docstrings are names
html_theme = "alabaster"
html_theme_options = {"page_width": "1080px", "description": pymoe.__doc__.rstrip(".")}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"  # docstrings say more: shapes and dtypes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
# The examples of a stage see the names of its module, as they do for Python's own `doctest`.
doctest_global_setup = f"""
import importlib, os, pkgutil
os.chdir({str(ROOT)!r})
import numpy as np
import pymoe
for stage in pkgutil.iter_modules(pymoe.ops.__path__, "pymoe.ops."):
    module = importlib.import_module(stage.name)
    globals().update({{name: getattr(module, name) for name in module.__all__}})
"""

# Known to the parser, so that it does not warn; rendered by the function below.
NumpyDocString.sections["Source"] = []


def _source_as_note(app, what, name, obj, options, lines):
    """Turn pymoe's own section "Source", which numpydoc does not know, into a paragraph of "Notes"."""
    headings = [i for i in range(len(lines) - 1) if lines[i] == "Source" and set(lines[i + 1]) == {"-"}]
    for i in reversed(headings):
        notes = any(lines[j] == "Notes" and set(lines[j + 1]) == {"-"} for j in range(i))
        lines[i : i + 2] = ["", "**Source.**", ""] if notes else ["Notes", "-----", "**Source.**", ""]


def setup(app):
    """Connect before numpydoc (priority 500) parses the sections."""
    app.connect("autodoc-process-docstring", _source_as_note, priority=100)
