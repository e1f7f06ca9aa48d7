"""``python -m pymoe compile`` and the CUDA part of ``doctor``."""

from __future__ import annotations

import importlib.util

import pytest

from pymoe.catalogue import all_kernels
from pymoe.cli import commands, main, report
from pymoe.device import arch as archs
from pymoe.device import findings, jit, linking, toolkit
from pymoe.device.jit import KernelId
from pymoe.errors import BackendUnavailableError
from tests import gpu

needs_core = pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="cuda-core is not installed")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_compiled", {})
    return tmp_path / "cache"


def test_the_catalogue_is_sorted_and_names_units_that_exist():
    for arch in archs.ARCHS:
        kernels = all_kernels(arch)
        assert kernels and list(kernels) == sorted(set(kernels))
        assert {k.unit for k in kernels if not (jit.source_folder() / k.unit).is_file()} == set()


@needs_core
def test_compile_fills_the_cache_without_a_gpu(cache, capsys, monkeypatch):
    some = [KernelId("common/probe.cu", f"pymoe::probe_kernel<{name}>") for name in ("int", "float", "double")]
    monkeypatch.setattr(commands, "all_kernels", lambda arch: tuple(some[: 2 if arch == "sm_80" else 3]))
    assert main(["compile", "--arch", "sm_80", "--arch", "sm_90a", "--jobs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sm_80    2 kernels, 0 of them there before") and str(cache) in lines[0]
    assert lines[1].startswith("sm_90a   3 kernels, 0 of them there before")
    assert all(jit.is_kept(kernel, "sm_90a") for kernel in some) and not jit.is_kept(some[2], "sm_80")
    monkeypatch.setattr(jit, "compile_now", None)  # a second time nothing is compiled
    assert main(["compile", "--arch", "sm_90a"]) == 0
    assert "3 kernels, 3 of them there before" in capsys.readouterr().out


@needs_core
def test_compile_tells_what_does_not_compile(cache, capsys, monkeypatch):
    bad = KernelId("common/probe.cu", "pymoe::probe_kernel<nothing>")
    monkeypatch.setattr(commands, "all_kernels", lambda arch: (jit.PROBE, bad))
    assert main(["compile", "--arch", "sm_80"]) == 1
    assert "probe.cu must compile for sm_80; got errors for pymoe::probe_kernel<nothing>" in capsys.readouterr().err


@needs_core
def test_compile_refuses_a_folder_it_cannot_fill(capsys, monkeypatch):
    monkeypatch.setenv("PYMOE_CACHE_DIR", "/proc/self/pymoe")
    assert main(["compile", "--arch", "sm_80"]) == 1
    assert "the cache folder must be usable" in capsys.readouterr().err


@pytest.mark.skipif(not gpu.why_no_gpu(), reason="there is a device")
def test_compile_asks_for_an_architecture_where_there_is_no_device(cache, capsys):
    assert main(["compile"]) == 1
    assert "--arch must be given where no device says it; got none. Name one of sm_80" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--arch", "sm_90"], ["--jobs", "0"], ["--jobs", "two"]])
def test_a_wrong_command_line(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compile", *wrong])
    assert "pymoe compile: argument" in capsys.readouterr().err


@needs_core
def test_doctor_shows_what_there_is_of_cuda(cache, capfd):
    assert main(["doctor"]) == 0
    rows = dict(
        line.split(None, 1) if line[:2] != "a " else ("probe", line) for line in capfd.readouterr().out.splitlines()
    )
    assert "compiles for sm_" in rows["NVRTC"] and "compiles for sm_" in rows["probe"]
    assert str(cache) in rows["kernel"] and "0 kernels" in rows["kernel"]
    assert len([line for line in rows if line == "CUDA"]) == 1


def test_every_item_is_told_though_another_fails(monkeypatch, capsys, tmp_path):
    def missing():
        raise BackendUnavailableError("pymoe: NVRTC must be installed; got none. Install it.")

    def broken(*args):
        raise OSError("bad\nlibrary")

    monkeypatch.setenv("PYMOE_CACHE_DIR", "/proc/self/pymoe")
    monkeypatch.setattr(toolkit, "nvrtc_version", missing)
    monkeypatch.setattr(toolkit, "include_path", broken)
    monkeypatch.setattr(toolkit, "device_count", lambda: 2)
    monkeypatch.setattr(toolkit, "why_no_device", lambda: "")
    monkeypatch.setattr(findings, "_driver", lambda: "for CUDA 13.0")
    monkeypatch.setattr(findings, "_device", lambda number: f"device {number}")
    monkeypatch.setattr(toolkit, "nvrtc_archs", missing)
    versions = {"numba-cuda": "0.30", "nvJitLink": "13.0"}
    monkeypatch.setattr(linking, "versions", lambda: versions)
    findings.show()
    assert capsys.readouterr().out.splitlines() == [
        "NVRTC         missing: pymoe: NVRTC must be installed; got none. Install it.",
        "CUDA headers  broken: OSError: bad library",
        "a kernel      missing: pymoe: NVRTC must be installed; got none. Install it.",
        "kernel cache  off, every process compiles for itself: [Errno 2] No such file or directory: '/proc/self/pymoe' "
        "(PYMOE_CACHE_DIR)",
        "numba-cuda    0.30 with nvJitLink 13.0; for NumbaCudaExperts and own activations that are not translated",
        "CUDA driver   for CUDA 13.0",
        "GPU 0         device 0",
        "GPU 1         device 1",
    ]


@pytest.mark.parametrize(
    "fault, text", [("import os; os._exit(7)", "ended with status 7"), ("raise OSError('libcuda')", "OSError: libcuda")]
)
def test_doctor_survives_libraries_that_crash(monkeypatch, tmp_path, capsys, fault, text):
    """The look is another process's: a package that breaks on import ends that one only."""
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda/__init__.py").write_text(fault)
    (tmp_path / "cupy.py").write_text(fault)
    monkeypatch.syspath_prepend(tmp_path)
    report.print_cuda()
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    "status, text",
    [
        (35, "the CUDA driver must be installed and new enough; got old driver. Install NVIDIA's driver"),
        (100, "a CUDA device must be visible; got old driver. See nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (3, "the process must begin to use CUDA itself; got old driver. Start workers by multiprocessing.get_con"),
    ],
)
def test_H10_why_no_device(monkeypatch, status, text):
    runtime = pytest.importorskip("cupy.cuda").runtime

    def refuse():
        error = runtime.CUDARuntimeError(status)
        error.args = ("old driver",)
        raise error

    monkeypatch.setattr(runtime, "getDeviceCount", refuse)
    monkeypatch.setattr(runtime, "driverGetVersion", lambda: 12000)
    assert text in toolkit.why_no_device()


@pytest.mark.gpu
def test_doctor_on_a_device(cuda, capfd):
    assert main(["doctor"]) == 0
    printed = capfd.readouterr().out
    assert "CUDA driver   for CUDA 1" in printed and "GPU 0 " in printed and archs.current_arch() in printed
    assert "missing" not in printed.split("NVRTC")[1]
