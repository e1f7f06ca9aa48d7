"""Tables and pages: which rows stand beside each other, how numbers look, what a page keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

import pymoe
from pymoe.bench.page import page_with
from pymoe.bench.store import Results
from pymoe.bench.table import as_markdown, as_text, cells, lines, milliseconds, tables
from tests.bench.rows import RUN, row

ROOT = Path(__file__).parents[2]


def in_memory(*rows, **runs):
    results = Results()
    results.runs = {"r1": RUN} | runs
    results.add(list(rows))
    return results


@pytest.mark.parametrize(
    "seconds, text",
    [(0.0, "0.00"), (1.2345e-6, "0.00123"), (5.8e-4, "0.580"), (9.996e-3, "10.00"), (0.0123, "12.3"), (0.1234, "123"),
     (3.4, "3400"), (1e-10, "0.000000")],
)  # fmt: skip
def test_milliseconds(seconds, text):
    assert milliseconds(seconds) == text


def test_a_peer_answers_in_the_same_precision_else_in_bf16_else_in_fp32():
    rows = [row(), row(scheme="bf16"), row(scheme="int8"), row("numpy"), row("torch"), row("torch", "bf16", ms=4.0),
            row("torch", "bf16", tokens=1)]  # fmt: skip
    found = {line.ours.scheme: {name: peer.scheme for name, peer in line.peers.items()} for line in lines(rows)}
    assert found == {
        "fp32": {"numpy": "fp32", "torch": "fp32"},
        "bf16": {"numpy": "fp32", "torch": "bf16"},
        "int8": {"numpy": "fp32", "torch": "bf16"},
    }


def test_cells():
    rows = [row(ms=10.0), row("numpy", ms=25.0), row("torch", ms=20.0, variant="eager"), row(tokens=1, ms=1.0)]
    header, body = cells(lines(rows))
    assert header == ["M", "scheme", "ms", "least", "floor", "times floor", "NumPy fp32", "PyTorch", "speed-up", "aim"]
    assert body == [
        ["1", "fp32", "1.00", "0.800", "0.500 bytes", "2.00", "-", "-", "-", "-"],
        ["16", "fp32", "10.0", "8.00", "5.00 bytes", "2.00", "25.0", "20.0 eager", "2.00", "2 met"],
    ]


@pytest.mark.parametrize(
    "ms, floor, spread, aim",
    [
        (10.0, 1.0, 1.2, "2 met"), (10.1, 1.0, 1.2, "2 missed"), (11.0, 10.0, 1.2, "2 met (floor)"),
        (10.0, 1.0, 1.3, "2 noisy"),
    ],
)  # fmt: skip
def test_aims(ms, floor, spread, aim):
    for ours, peer in ((spread, 1.0), (1.0, spread)):
        rows = [row(ms=ms, floor_s=floor / 1e3, spread=ours), row("torch", ms=20.0, spread=peer)]
        _, ((*_, cell),) = cells(lines(rows))
        assert cell == aim
    _, ((*_, none),) = cells(lines([row(shape=(8, 2, 64, 32)), row("torch", shape=(8, 2, 64, 32))]))
    assert none == "-"


def test_text_is_aligned_and_markdown_has_a_rule():
    header, body = ["M", "name"], [["1", "a"], ["128", "long one"]]
    assert as_text(header, body) == "  M      name\n  1         a\n128  long one"
    assert as_markdown(header, body) == "| M | name |\n| --: | --: |\n| 1 | a |\n| 128 | long one |"


def test_rows_of_two_runs_never_stand_in_one_table():
    results = in_memory(row(), row("numpy", run="r2", ms=1.0), r2=RUN)
    text = tables(results)
    assert "numpy/fp32/16: 1.00 ms" in text and "NumPy fp32" not in text
    assert "numpy" not in tables(results, only_run="r1").split("GFLOP/s")[1].partition("\n\n")[2]


def test_the_heading_names_machine_versions_commit_and_rates():
    text = " ".join(tables(in_memory(row())).split())
    for words in ("E 32, topk 4, K 1024, I 512", "2 threads of P (2 cores; avx2)", "commit 012345678", "numpy 2",
                  "blas b 1", "1 MB at 20.0 GB/s", "numpy fp32 100", "load before 0.0", "1.10 times"):  # fmt: skip
        assert words in text
    assert "Measured by `python -m pymoe bench`." in tables(in_memory(row()), markdown=True)


def test_the_heading_leaves_out_what_a_device_does_not_have():
    gpu = {name: value for name, value in RUN.items() if name != "threads"} | {"device": {"processor": "G"}}
    results = Results()
    results.runs = {"r1": gpu}
    results.add([row()])
    assert "I 512; G; r1" in " ".join(tables(results).split())


PAGE = "before\n<!-- results: r.json -->\nold\n<!-- end of results -->\nafter\n"


def test_a_page_gets_the_tables_and_keeps_the_rest():
    results = in_memory(row())
    text = page_with(PAGE, "r.json", results)
    assert text.startswith("before\n<!-- results: r.json -->\n\nE 32") and text.endswith("results -->\nafter\n")
    assert "old" not in text and "| 16 | fp32 | 10.0 |" in text
    assert page_with(text, "r.json", results) == text


@pytest.mark.parametrize("page", ["", PAGE.replace("r.json", "s.json"), PAGE + PAGE])
def test_a_page_without_marks_is_refused(page):
    with pytest.raises(pymoe.ArgumentError, match="--page must hold the line '<!-- results: r.json -->' once"):
        page_with(page, "r.json", in_memory(row()))


def test_the_performance_page_shows_what_its_results_hold():
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert page_with(page, "cpu.json", Results(ROOT / "benchmarks/results/cpu.json")) == page
