"""The table of reliability rows stays true: every row once, and every named file holds a test of that row."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROW = re.compile(r"^\| ([A-K]\d+) \| .+ \| (.+) \|$", re.MULTILINE)
REASONS = ("needs a GPU", "needs MPI ranks", "needs arrays of other libraries", "weights of a layer", "no tuner")


def test_every_row_has_tests_or_a_reason():
    rows = ROW.findall((TESTS / "corpus" / "README.md").read_text(encoding="utf-8"))
    assert len(rows) == 145 and len({row for row, _ in rows}) == 145
    for row, cell in rows:
        files = re.findall(r"`([^`]+)`", cell)
        assert files or cell.startswith(REASONS), row
        for file in files:
            text = (TESTS / file).read_text(encoding="utf-8")
            assert re.search(rf"(_|\"){row}(_|\b)", text), (row, file)
