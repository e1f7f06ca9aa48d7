"""The results file: cumulative rows, resuming, and files that are none."""

from __future__ import annotations

import json

import pytest

import pymoe
from pymoe.bench.store import Results
from tests.bench.rows import RUN, row


@pytest.fixture
def results(tmp_path):
    results = Results(tmp_path / "r.json")
    assert results.begin(RUN, "r1", resume=False) == "r1"
    results.add([row(), row("numpy", ms=20.0)])
    return results


def test_rows_survive_the_file(results):
    again = Results(results.path)
    assert again.rows == results.rows and again.runs == {"r1": RUN}
    assert json.loads(results.path.read_text())["format"] == 1


def test_a_row_replaces_its_predecessor_and_no_other(results):
    results.begin(RUN, "r2", resume=False)
    others = [row(run="r2", tokens=1), row(run="r2", scheme="bf16"), row(run="r2", shape=(8, 2, 64, 32)),
              row(run="r2", threads=1)]  # fmt: skip
    results.add([row(run="r2", ms=5.0), *others])
    assert len(results.rows) == 6 and results.done("r2", (32, 4, 1024, 512)) == {
        "ours/fp32/16", "ours/fp32/1", "ours/bf16/16"
    }  # fmt: skip
    assert [r.median_s for r in results.rows if r.key == "ours/fp32/16" and r.shape[0] == 32 and r.threads == 2] == [
        0.005
    ]


def test_another_machine_keeps_its_rows(results):
    other = RUN | {"device": RUN["device"] | {"processor": "Q"}}
    results.begin(other, "r2", resume=False)
    results.add([row(run="r2", ms=1.0)])
    assert [r.median_s for r in results.rows if r.key == "ours/fp32/16"] == [0.01, 0.001]


def test_runs_that_no_row_cites_are_dropped(results):
    results.begin(RUN, "r2", resume=False)
    results.add([row(run="r2"), row("numpy", run="r2")])
    assert list(json.loads(results.path.read_text())["runs"]) == ["r2"]


def test_resume_continues_the_last_run(results):
    again = Results(results.path)
    assert again.begin(dict(RUN), "r2", resume=True) == "r1"
    assert again.done("r1", (32, 4, 1024, 512)) == {"ours/fp32/16", "numpy/fp32/16"}
    assert again.done("r1", (8, 2, 64, 32)) == set()


@pytest.mark.parametrize("name", ["device", "threads", "versions", "sources", "seed", "pace"])
def test_resume_refuses_other_conditions(results, name):
    with pytest.raises(pymoe.ArgumentError, match=f"--resume must continue .* got other {name}. Run without"):
        results.begin(RUN | {name: "other"}, "r2", resume=True)


def test_resume_without_a_run_begins_one_and_a_commit_that_left_the_sources_alone_does_not_matter(results, tmp_path):
    assert Results(tmp_path / "none.json").begin(RUN, "r1", resume=True) == "r1"
    assert results.begin(RUN | {"commit": "other", "load_before": 3.0}, "r2", resume=True) == "r1"


def test_two_runs_of_one_second_are_two(results):
    assert results.begin(RUN, "r1", resume=False) == "r1'"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "runs": {}, "rows": [{}]}', "\xff"])
def test_a_file_that_holds_no_results_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(pymoe.ArgumentError, match="--results must hold results of this command"):
        Results(path)
    assert path.read_text(encoding="latin-1") == text


def test_a_failed_write_leaves_the_old_file(results, monkeypatch):
    before = results.path.read_text()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pymoe.bench.store.os.replace", full)
    with pytest.raises(OSError):
        results.add([row(tokens=1)])
    assert results.path.read_text() == before and [p.name for p in results.path.parent.iterdir()] == ["r.json"]
