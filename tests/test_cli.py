"""The command line: what it prints and writes, exit statuses, one-line errors, files in and out."""

from __future__ import annotations

import struct
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
    monkeypatch.setattr("pymoe.cli.commands._tokens_a_step", lambda layer: 7)
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


ran = []


class Opened:
    """Notes in `ran` that it was unpickled."""

    def __reduce__(self):
        return ran.append, (1,)


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
    assert not (folder / "y.npy").exists() and not ran


NPY = "{'descr':%s,'fortran_order':False,'shape':%s}"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x93NUMPY", b"PK\x03\x04", b"\x80\x04\x95", b"\x93NUMPY\x01\x00\x10\x00{'a':",
        NPY % ("'<f4'", "(-2, -64)"), NPY % ("'<f4'", "(9" + "9" * 30 + ", 64)"), NPY % ("'<f4'", "(True, 64)"),
        NPY % ("'<f4'", "(" + "1," * 70 + ")"), NPY % ("'O'", "(2, 64)"), NPY % ("[('a', 'O')]", "(2,)"),
        NPY % ("3", "(2, 64)"), NPY % ("'<f4'", "(2, 64"), "(" * 3000, "{1: 2, 'a': 3}", "__import__('os')",
        NPY % ("'<f4'", "(1000000, 64)"), NPY % ("'>f4'", "(1, 1)"), NPY % ("[('a', '<f4')]", "(1,)"),
        NPY % ("'<c8'", "(1, 1)"),
    ],
    ids=range(20),
)  # fmt: skip
def test_K6_malformed_npy_files_are_one_line(folder, capsys, content):
    if isinstance(content, str):
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(content)) + content.encode() + bytes(64)
    (folder / "b.npy").write_bytes(content)
    assert main(arguments(folder, input=folder / "b.npy")) == 1
    error = capsys.readouterr().err
    assert error.startswith("pymoe: pymoe run: --input must ") and error.count("\n") == 1 and len(error) < 600


def test_an_unexpected_error_is_one_line_and_names_its_kind(folder, capsys, monkeypatch):
    monkeypatch.setattr("pymoe.cli.commands.list_layers", lambda folder: 1 // 0)
    assert main(["info", str(folder / "ck")]) == 1
    assert capsys.readouterr().err == "pymoe: ZeroDivisionError: integer division or modulo by zero\n"


def test_an_output_that_was_there_stays_whole_after_a_failure(folder, monkeypatch):
    (folder / "y.npy").write_bytes(b"before")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pymoe.cli.files.np.save", full)
    assert main(arguments(folder)) == 1
    assert (folder / "y.npy").read_bytes() == b"before"
    assert sorted(path.name for path in folder.iterdir()) == ["ck", "x.npy", "y.npy"]


def test_the_input_may_be_the_output(folder):
    x = np.load(folder / "x.npy")
    assert main(arguments(folder, output=folder / "x.npy")) == 0
    np.testing.assert_array_equal(np.load(folder / "x.npy"), pymoe.MoELayer.from_checkpoint(folder / "ck", 0)(x))


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
    assert "processor can: " in printed


def test_doctor_says_why_an_optional_library_cannot_be_used(capsys, monkeypatch, tmp_path):
    (tmp_path / "raises.py").write_text("raise RuntimeError('no libmpi.so')")
    (tmp_path / "dies.py").write_text("import os; os._exit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    extras = {"raises": ("mpi", "ranks"), "dies": ("cu13", "y"), "absent": ("plot", "z"), "numpy": ("x", "x")}
    monkeypatch.setattr("pymoe.cli.commands.EXTRAS", extras)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    told = "raises cannot be used: RuntimeError: no libmpi.so; it is optional, for ranks: pip install 'pymoe[mpi]'"
    assert told in printed
    assert "dies cannot be used: its import ends with status 3" in printed
    assert "absent cannot be used: not installed" in printed and "numpy cannot" not in printed


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


def test_a_reader_that_leaves_early_gets_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-m", "pymoe", "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.close()
    with process.stderr as stream:
        assert stream.read() == b""
    assert process.wait() == 1


def test_main_does_not_change_numpys_error_state(folder):
    before = np.geterr()
    assert main(arguments(folder)) == 0
    assert np.geterr() == before


def test_as_a_module(folder):
    done = subprocess.run(
        [sys.executable, "-m", "pymoe", *arguments(folder, layer=9)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stdout == ""
    good = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pymoe", *arguments(folder)], capture_output=True, text=True, cwd=ROOT
    )
    assert (good.returncode, good.stderr) == (0, "") and "CpuExperts" in good.stdout
    x = np.load(folder / "x.npy")
    np.testing.assert_array_equal(np.load(folder / "y.npy"), pymoe.MoELayer.from_checkpoint(folder / "ck", 0)(x))
    version = subprocess.run([sys.executable, "-m", "pymoe", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert version.stdout.strip() == f"pymoe {pymoe.__version__}"
