"""The table of faults stays true to the code: each is one place of an existing file, and its killer exists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.mutants.table import MUTANTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_each_fault_is_one_place_and_a_change(mutant):
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.old != mutant.new and (ROOT / mutant.killer).is_file()


def test_the_committed_result_is_of_this_table_and_good_enough():
    result = json.loads((Path(__file__).parent / "result.json").read_text(encoding="utf-8"))
    assert [outcome["name"] for outcome in result["outcomes"]] == [mutant.name for mutant in MUTANTS]
    assert len(MUTANTS) >= 30 and result["caught"] >= 0.95 * result["of"]
