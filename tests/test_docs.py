"""The documentation says what the code says: examples run, and the pages that list names list all of them."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

import pymoe
from tests import architecture, families_table, support_table

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in (ROOT / "pymoe").rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


def page(name):
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module):
    loaded = importlib.import_module(module)
    result = doctest.testmod(loaded, extraglobs={"np": np, "pymoe": pymoe})
    assert result.attempted > 0
    assert result.failed == 0


def test_readme_example(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(code, "README.md", "exec"), {})
    assert "CpuExperts" in capsys.readouterr().out


def test_readme_tables_of_support_are_what_the_library_answers():
    assert support_table.written() == support_table.table(), "python -m tests.support_table"


def test_readme_table_of_families_is_what_the_tests_cover():
    assert families_table.written() == families_table.table(), "python -m tests.families_table"


def test_reference_lists_every_public_name():
    listed = set(re.findall(r"^   (\w+)$", page("reference"), flags=re.MULTILINE))
    expected = set(pymoe.__all__) - set(pymoe.QUANT_KEYS) - {"QUANT_KEYS", "__version__", "ops", "ep_model"}
    assert listed == expected | set(pymoe.ops.__all__)


def test_environment_page_lists_every_variable():
    text = (ROOT / "pymoe/environment.py").read_text(encoding="utf-8")
    read = set(re.findall(r"PYMOE_[A-Z_]+[A-Z]", text))
    listed = set(re.findall(r"^\| `(PYMOE_[A-Z_]+)`", page("environment"), flags=re.MULTILINE))
    assert read
    assert read <= listed


def test_errors_page_lists_every_kind_with_its_builtin():
    listed = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page("errors"), flags=re.MULTILINE))
    kinds = {name: getattr(pymoe.errors, name) for name in pymoe.errors.__all__ if name.endswith("Error")}
    assert listed == {name: kind.__bases__[-1].__name__ for name, kind in kinds.items()}


def test_architecture_page_has_every_floor():
    rows = re.findall(r"^\| ([\d.]+) \| ([^|]+) \|", page("architecture"), flags=re.MULTILINE)
    shown = {room: float(floor) for floor, rooms in rows for room in re.findall(r"`(\w+)`", rooms)}
    there = {path.stem for path in (ROOT / "pymoe").glob("[!_]*.py")}
    there |= {path.parent.name for path in (ROOT / "pymoe").glob("[!_]*/__init__.py")} | {"__main__"}
    assert shown == {room: floor for room, floor in architecture.FLOORS.items() if room in there}


def test_names_in_pages_exist():
    named = {name for path in DOCS.glob("*.md") for name in re.findall(r"`~pymoe\.(\w+)`", path.read_text("utf-8"))}
    assert named
    assert [name for name in named if not hasattr(pymoe, name)] == []


@pytest.mark.parametrize("path", ["README.md", *sorted(f"docs/{path.name}" for path in DOCS.glob("*.md"))])
def test_links(path):
    targets = re.findall(r"\]\(([\w/.-]+)(?:#[\w-]+)?\)", (ROOT / path).read_text(encoding="utf-8"))
    folder = (ROOT / path).parent
    assert [t for t in targets if not (folder / t).exists() and not (folder / f"{t}.md").exists()] == []
