"""The command from end to end on a tiny shape: the gate before the clock, resuming, output, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

import pymoe
from pymoe.bench import Options, Shape, contenders, machine, run
from pymoe.bench.contenders import ours
from pymoe.cli import main

SHAPE = "4,2,128,128"


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    """The GEMM rate costs seconds and would load PyTorch where it is installed."""
    monkeypatch.setattr("pymoe.bench.rates.measure_gemm", lambda *arguments: {"fp32": {"numpy": 1e11}})
    monkeypatch.setattr("pymoe.bench.machine.load", lambda: 0.0)


def bench(*words):
    return main(["bench", "--quick", "--shape", SHAPE, "--tokens", "1,5", "--peers", "numpy", *map(str, words)])


def test_every_default_scheme_is_checked_timed_stored_and_shown(tmp_path, capsys):
    file, plot = tmp_path / "r.json", tmp_path / "r.svg"
    assert bench("--results", file) == 0
    printed = capsys.readouterr()
    table = [line.split() for line in printed.out.splitlines() if line[:3].strip() in ("1", "5")]
    schemes = ["fp32", "bf16", "int8", "fp8", "int4", "mxfp4"]
    assert [row[:2] for row in table] == [[M, scheme] for M in ("1", "5") for scheme in schemes]
    stored = json.loads(file.read_text())
    assert len(stored["rows"]) == 2 * (len(schemes) + 1)
    for row in stored["rows"]:
        assert 0 < row["error"] <= row["limit"] < 0.01
        assert 0 < row["min_s"] <= row["median_s"] and row["floor_s"] > 0 and row["calls"] >= 4
    (conditions,) = stored["runs"].values()
    assert conditions["versions"]["numpy"] == np.__version__ and conditions["device"]["features"]
    assert conditions["threads"] == pymoe.environment.num_threads() and len(conditions["rates"]["read"]) == 4
    assert main(["bench", "--results", str(file), "--show"]) == 0
    assert capsys.readouterr().out == printed.out
    pytest.importorskip("matplotlib")
    assert main(["bench", "--results", str(file), "--show", "--plot", str(plot)]) == 0
    assert plot.read_text().startswith("<?xml")
    first = plot.read_bytes()
    assert main(["bench", "--results", str(file), "--show", "--plot", str(plot)]) == 0
    assert plot.read_bytes() == first


def test_only_and_resume_time_what_is_missing(tmp_path, capsys):
    file = tmp_path / "r.json"
    assert bench("--results", file, "--only", "ours/fp32/*,numpy/*/1") == 0
    before = {(r["contender"], r["tokens"]): r["median_s"] for r in json.loads(file.read_text())["rows"]}
    assert set(before) == {("ours", 1), ("ours", 5), ("numpy", 1)}
    assert bench("--results", file, "--schemes", "fp32", "--resume") == 0
    after = json.loads(file.read_text())
    times = {(r["contender"], r["tokens"]): r["median_s"] for r in after["rows"]}
    assert set(times) == {*before, ("numpy", 5)} and len(after["runs"]) == 1
    assert {key: times[key] for key in before} == before
    capsys.readouterr()
    assert bench("--results", file, "--schemes", "fp32", "--resume") == 0
    assert "nothing to time" in capsys.readouterr().err


def test_a_run_without_resume_measures_again(tmp_path):
    file = tmp_path / "r.json"
    for _ in range(2):
        assert bench("--results", file, "--only", "numpy/*/1") == 0
    assert len(json.loads(file.read_text())["rows"]) == 1


def test_json_goes_to_stdout_alone(capsys):
    assert bench("--only", "numpy/fp32/1", "--json") == 0
    assert [row["contender"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["numpy"]


class Faulty(ours.Ours):
    """Computes another layer: `spoil` says which."""

    spoil = staticmethod(lambda y: y)

    def bind(self, number, x, variant=""):
        call = super().bind(number, x)
        return lambda: self.spoil(call())


FAULTS = {
    "a scale that is off by a percent": lambda y: y * np.float32(1.01),
    "one row of zeros": lambda y: y * (np.arange(len(y)) > 0).astype(y.dtype)[:, None],
    "zeros": np.zeros_like,
    "a NaN": lambda y: np.where(np.arange(y.shape[1]) == 3, np.float32("nan"), y),
    "the rows of other tokens": lambda y: np.roll(y, 1, axis=0),
    "half of the columns": lambda y: y[:, ::2],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_contender_that_computes_something_else_is_not_timed(tmp_path, capsys, monkeypatch, fault):
    monkeypatch.setattr(Faulty, "spoil", staticmethod(FAULTS[fault]))
    monkeypatch.setattr("pymoe.bench.contenders.registry.Ours", Faulty)
    file = tmp_path / "r.json"
    words = ("--results", file, "--schemes", "fp32,bf16", "--tokens", "5", "--only", "ours/bf16/5,numpy/*")
    assert bench(*words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the contenders must compute the layer before they are timed; got ours/bf16/5 is off by" in error
    assert [row["contender"] for row in json.loads(file.read_text())["rows"]] == ["numpy"]


def test_the_planted_contender_without_a_fault_is_timed(monkeypatch):
    monkeypatch.setattr("pymoe.bench.contenders.registry.Ours", Faulty)
    assert bench("--schemes", "fp32,bf16", "--peers", "none") == 0


def test_one_wrong_weight_set_is_found(monkeypatch):
    class SecondSetWrong(ours.Ours):
        def bind(self, number, x, variant=""):
            return super().bind(0, x)

    monkeypatch.setattr("pymoe.bench.contenders.registry.Ours", SecondSetWrong)
    outcome = run(Options(Shape(4, 2, 128, 128), (3,), ("fp32",), (), quick=True))
    assert len(outcome.wrong) == 1 and not outcome.results.rows


@pytest.mark.parametrize(
    "words, text",
    [
        (["--shape", "1,2"], "--shape must be E,topk,K,I"),
        (["--tokens", "0"], "--tokens must be positive whole numbers"),
        (["--schemes", "fp3"], "--schemes must name fp32, bf16 or a quantization; got 'fp3'"),
        (["--schemes", "fp16"], "--schemes must name"),
        (["--peers", "julia"], "--peers must be among numpy, torch, jax; got 'julia'"),
        (["--resume"], "--resume must come with --results"),
        (["--show"], "--results must be a file to show"),
        (["--results", "/nowhere/r.json"], "the output must lie in an existing folder"),
        (["--results", "r.txt"], "the output must end in .json"),
        (["--plot", "r.txt"], "the output must end in .png or .svg or .pdf"),
        (["--page", "README.md"], "--page must come with --results"),
    ],
)
def test_refusals_are_one_line_before_any_work(capsys, monkeypatch, words, text):
    monkeypatch.setattr("pymoe.bench.command.draw_weights", lambda *arguments: 1 // 0)
    assert main(["bench", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pymoe: pymoe bench: ") and error.count("\n") == 1 and text in error


def test_a_peer_that_is_not_installed_is_named_or_left_out(capsys, monkeypatch):
    monkeypatch.setattr("pymoe.bench.contenders.registry.PEERS", {"torch": (("absent",), ("fp32",), "pip install it")})
    monkeypatch.setattr("pymoe.bench.command.PEERS", {"torch": (("absent",), ("fp32",), "pip install it")})
    assert bench("--peers", "torch") == 1
    assert "got torch: absent not installed (pip install it)" in capsys.readouterr().err
    assert Options(schemes=("fp32",)).wanted(1) == [("ours", "fp32")]


def test_peers_that_cannot_be_held_to_the_threads_are_left_out(monkeypatch):
    monkeypatch.setattr("pymoe.bench.contenders.registry.importlib.util.find_spec",
                        lambda name: None if name == "threadpoolctl" else True)  # fmt: skip
    monkeypatch.setenv("PYMOE_NUM_THREADS", "3")
    monkeypatch.setattr("pymoe.bench.machine.cores", lambda: 3)
    assert [contenders.importable(name) for name in ("numpy", "jax")] == ["", ""]
    monkeypatch.setattr("pymoe.bench.machine.cores", lambda: 4)
    assert "holds its BLAS to 3 threads" in contenders.importable("numpy")
    assert "all 4 cores of the process, not 3" in contenders.importable("jax")


def test_blas_has_the_threads_that_are_recorded():
    control = pytest.importorskip("threadpoolctl")

    def threads():
        return [pool["num_threads"] for pool in control.threadpool_info() if pool["user_api"] == "blas"]

    before = threads()
    with machine.blas_threads(1) as found:
        assert found == 1 and set(threads()) == {1}
    assert threads() == before


def test_a_plot_without_matplotlib_names_the_extra(capsys, monkeypatch):
    monkeypatch.setattr("pymoe.cli.report.can_plot", lambda: False)
    assert bench("--plot", "r.svg") == 1
    assert "pip install 'pymoe[plot]'" in capsys.readouterr().err


def test_which_peers_answer_for_which_schemes(monkeypatch):
    monkeypatch.setattr("pymoe.bench.contenders.importable", lambda name: "")
    assert Options(schemes=("fp32",)).wanted(1)[1:] == [("numpy", "fp32"), ("torch", "fp32"), ("jax", "fp32")]
    assert Options(schemes=("int8",)).wanted(1)[1:] == [
        ("numpy", "fp32"), ("torch", "fp32"), ("torch", "bf16"), ("jax", "fp32"), ("jax", "bf16")
    ]  # fmt: skip


def test_the_results_page_and_file_can_be_rewritten(tmp_path, capsys):
    file, page = tmp_path / "r.json", tmp_path / "p.md"
    page.write_text("a\n<!-- results: r.json -->\n<!-- end of results -->\nb\n")
    assert bench("--results", file, "--only", "ours/fp32/1,numpy/*/1", "--page", page) == 0
    text = page.read_text()
    assert text.startswith("a\n<!--") and text.endswith("-->\nb\n") and "| 1 | fp32 |" in text


@pytest.mark.interop
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_peers_compute_the_layer(name, tmp_path):
    pytest.importorskip(name)
    file = tmp_path / "r.json"
    assert bench("--peers", name, "--results", file, "--only", f"{name}/*") == 0
    rows = json.loads(file.read_text())["rows"]
    assert {(row["scheme"], row["tokens"]) for row in rows} == {(s, M) for s in ("fp32", "bf16") for M in (1, 5)}
