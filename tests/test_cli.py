"""The command line: what it prints and writes, exit statuses, one-line errors, files in and out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe.cli import files, main, progress
from tests.checkpoint.files import mixtral, write

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    mixtral(tmp_path / "ck", K=64, width=32)
    x = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    return tmp_path


def arguments(folder, **options):
    options = {"layer": 0, "input": folder / "x.npy", "output": folder / "y.npy"} | options
    return ["run", str(folder / "ck"), *(str(v) for name, value in options.items() for v in (f"--{name}", value))]


def test_run_writes_what_the_layer_computes_and_prints_plan_load_time_memory(folder, capsys):
    assert main(arguments(folder)) == 0
    x = np.load(folder / "x.npy")
    layer = pymoe.MoELayer.from_checkpoint(folder / "ck", 0)
    y = np.load(folder / "y.npy")
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, layer(x))
    printed = capsys.readouterr()
    assert printed.err == ""
    for word in ("CpuExperts", "not NaiveBatchedExperts: kernel does not support", "time ", "memory ", "100 rows"):
        assert word in printed.out
    bars = [line.split() for line in printed.out.splitlines() if line.strip()[:1].isdigit() and "#" in line]
    assert [int(rows) for _, rows, *_ in bars] == layer.last_load.tolist()


@pytest.mark.parametrize("scheme", ["fp8", "int4", "fp8_w8a8_tensor"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_run_with_scheme_and_dtype(folder, scheme, dtype):
    assert main(arguments(folder, scheme=scheme, dtype=dtype)) == 0
    layer = pymoe.MoELayer.from_checkpoint(folder / "ck", 0, scheme=scheme, dtype=dtype)
    assert layer.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = np.load(folder / "x.npy").astype(layer.dtype)
    np.testing.assert_array_equal(np.load(folder / "y.npy"), layer(x).astype(np.float32))


def test_steps_of_the_progress_bar_do_not_change_bits(folder, monkeypatch):
    assert main(arguments(folder)) == 0
    whole = np.load(folder / "y.npy")
    monkeypatch.setattr("pymoe.cli.commands.TOKENS_A_STEP", 7)
    assert main(arguments(folder)) == 0
    np.testing.assert_array_equal(np.load(folder / "y.npy"), whole)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "safetensors"])
def test_inputs(folder, kind):
    x = np.load(folder / "x.npy").astype(getattr(ml_dtypes, kind, "float16" if kind == "float16" else "float32"))
    path = folder / ("x.safetensors" if kind == "safetensors" else "x2.npy")
    write(path, {"x": x}) if kind == "safetensors" else np.save(path, x)
    np.testing.assert_array_equal(files.read_tokens(str(path)), x)
    assert main(arguments(folder, input=path)) == 0


def test_no_tokens(folder):
    np.save(folder / "x.npy", np.zeros((0, 64), np.float32))
    assert main(arguments(folder)) == 0
    assert np.load(folder / "y.npy").shape == (0, 64)


def test_plot(folder):
    pytest.importorskip("matplotlib")
    assert main(arguments(folder, plot=folder / "load.png")) == 0
    assert (folder / "load.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_refused_before_work(folder, capsys, monkeypatch):
    monkeypatch.setattr("pymoe.cli.report.can_plot", lambda: False)
    assert main(arguments(folder, plot=folder / "load.png")) == 1
    assert "pip install 'pymoe[plot]'" in capsys.readouterr().err and not (folder / "y.npy").exists()


class Opened:
    """What a pickle would run."""

    def __reduce__(self):
        return os.system, ("touch /tmp/pymoe-was-here",)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda f: {"layer": 4}, "must hold an MoE layer 4"),
        (lambda f: {"input": f / "gone.npy"}, "gone.npy"),
        (lambda f: {"input": f / "ck" / "config.json"}, "--input must be a .npy or .safetensors file"),
        (lambda f: {"output": f / "none" / "y.npy"}, "the output must lie in an existing folder"),
        (lambda f: {"output": f / "y.txt"}, "the output must end in .npy"),
        (lambda f: {"scheme": "fp3"}, "scheme"),
        (lambda f: {"plot": f / "load.txt"}, "must"),
        (
            lambda f: np.save(f / "b.npy", np.zeros((3, 5), np.float32)) or {"input": f / "b.npy"},
            "shape (M, 64); got (3, 5)",
        ),
        (lambda f: np.save(f / "b.npy", np.zeros((3, 64))) or {"input": f / "b.npy"}, "float64"),
        (
            lambda f: np.save(f / "b.npy", np.zeros(64, np.float32)) or {"input": f / "b.npy"},
            "shape (M, 64); got (64,)",
        ),
        (lambda f: np.save(f / "b.npy", [Opened()], allow_pickle=True) or {"input": f / "b.npy"}, "without pickles"),
        (lambda f: write(f / "b.safetensors", {}) and {"input": f / "b.safetensors"}, "must hold one tensor; got 0"),
    ],
)
def test_errors_are_one_line_and_status_1(folder, capsys, change, text):
    assert main(arguments(folder, **change(folder))) == 1
    error = capsys.readouterr().err
    assert error.startswith("pymoe: ") and error.count("\n") == 1 and text in error
    assert not (folder / "y.npy").exists()


@pytest.mark.parametrize(
    "line", [[], ["run"], ["run", "x", "--layer", "one", "--input", "a", "--output", "b"], ["fly"], ["info"]]
)
def test_a_wrong_command_line_is_one_line_and_status_2(capsys, line):
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_debug_shows_the_traceback(folder, capsys, monkeypatch):
    monkeypatch.setenv("PYMOE_LOG", "debug")
    assert main(arguments(folder, layer=4)) == 1
    assert "Traceback" in capsys.readouterr().err


def test_info(folder, capsys):
    assert main(["info", str(folder / "ck")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:6] == ["0", "4", "2", "64", "32", "float32"] and lines[-1].startswith("1 MoE layers")


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert pymoe.__version__ in printed and "numba" in printed and "threads" in printed


@pytest.mark.parametrize("command", ["bench", "compile"])
def test_commands_of_later_versions_refuse(capsys, command):
    assert main([command]) == 1
    assert f"{command} must wait for a later version" in capsys.readouterr().err


def test_an_interrupt_leaves_no_output_and_no_traceback(folder, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("pymoe.cli.files.np.save", interrupted)
    assert main(arguments(folder)) == 1
    assert capsys.readouterr().err == "pymoe: interrupted\n"
    assert sorted(path.name for path in folder.iterdir()) == ["ck", "x.npy"]


def test_the_bar_is_drawn_on_a_terminal_and_cleared(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    with progress.Progress(10, "tokens") as bar:
        bar.advance(5)
    drawn = capsys.readouterr().err
    assert "5/10 tokens" in drawn and drawn.endswith("\r\x1b[K")


def test_as_a_module(folder):
    done = subprocess.run(
        [sys.executable, "-m", "pymoe", *arguments(folder, layer=9)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stdout == ""
    version = subprocess.run([sys.executable, "-m", "pymoe", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert version.stdout.strip() == f"pymoe {pymoe.__version__}"
