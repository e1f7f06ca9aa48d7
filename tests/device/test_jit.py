"""Compiling kernels without a GPU: the cubin cache, its keys, and every error told by name (reliability J1 to J6)."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pymoe.device import cubins, jit, toolkit
from pymoe.device.cubins import CompiledKernel
from pymoe.device.jit import PROBE, KernelId, compile_all, compile_kernel
from pymoe.errors import ArgumentError, BackendUnavailableError, KernelCompileError

pytest.importorskip("cuda.core", reason="cuda-core is not installed")

ROOT = Path(__file__).parents[2]
CODE = """
from pymoe.device.jit import KernelId, compile_kernel
for arch in ("sm_80", "sm_90a"):
    print(len(compile_kernel(KernelId("common/probe.cu", "pymoe::probe_kernel<float>"), arch).cubin))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a process that has compiled nothing."""
    monkeypatch.setenv("PYMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_compiled", {})
    cubins._say_once.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch):
    """The kernels that were compiled rather than read, in order."""
    made = []
    compile_now = jit.compile_now
    monkeypatch.setattr(jit, "compile_now", lambda kernel, arch: made.append(kernel) or compile_now(kernel, arch))
    return made


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the device code that a test may change."""
    folder = tmp_path / "cuda_src"
    shutil.copytree(jit.source_folder(), folder)
    monkeypatch.setattr(jit, "source_folder", lambda: folder)
    jit.sources_digest.cache_clear()
    yield folder
    jit.sources_digest.cache_clear()


def forget(monkeypatch):
    """Act as a new process would."""
    monkeypatch.setattr(jit, "_compiled", {})
    jit.sources_digest.cache_clear()


def entries(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_a_kernel_is_compiled_once_and_then_read(cache, compilations, monkeypatch):
    first = compile_kernel(PROBE, "sm_90a")
    assert first.cubin.startswith(b"\x7fELF") and "probe_kernel" in first.symbol and "0 bytes spill" in first.log
    assert compile_kernel(PROBE, "sm_90a") is first
    forget(monkeypatch)
    assert compile_kernel(PROBE, "sm_90a") == first
    assert compilations == [PROBE] and len(entries(cache)) == 1
    assert os.stat(cache).st_mode & 0o077 == 0


def test_J6_the_key_holds_instance_arch_options_compiler_and_every_source(cache, sources, monkeypatch):
    def key(kernel=PROBE, arch="sm_90a"):
        jit.sources_digest.cache_clear()
        return jit.cache_key(kernel, arch)

    keys = [key(), key(arch="sm_80"), key(PROBE._replace(expression="pymoe::probe_kernel<int>"))]
    with monkeypatch.context() as patch:
        patch.setitem(jit._OPTIONS, "fma", False)
        keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(toolkit, "nvrtc_version", lambda: (99, 0))
        keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(jit, "_header_digest", lambda name: "another " + name)
        keys.append(key())
    for name in ("probe.cu", "ptx.cuh", "types.cuh"):  # the unit, its header, and its header's header
        with open(sources / "common" / name, "a", encoding="utf-8") as file:
            file.write("// changed\n")
        keys.append(key())
    assert len(set(keys)) == len(keys)
    (sources / "common" / "unrelated.cuh").write_text("int x;")
    assert key() == keys[-1]


def test_a_kept_kernel_is_read_without_loading_the_compiler(cache, compilations, monkeypatch):
    compile_kernel(PROBE, "sm_90a")
    forget(monkeypatch)
    version = toolkit.nvrtc_version()
    monkeypatch.setattr(toolkit, "likely_nvrtc_version", lambda: version)
    monkeypatch.setattr(toolkit, "nvrtc_version", None)
    assert compile_kernel(PROBE, "sm_90a").cubin and len(compilations) == 1


def test_J6_a_wrong_guess_of_the_compilers_version_finds_and_keeps_the_right_one(cache, compilations, monkeypatch):
    monkeypatch.setattr(toolkit, "likely_nvrtc_version", lambda: (99, 1))
    compile_kernel(PROBE, "sm_90a")
    forget(monkeypatch)
    compile_kernel(PROBE, "sm_90a")
    assert len(compilations) == 1
    (entry,) = entries(cache)
    assert cubins.unseal(jit.cache_key(PROBE, "sm_90a", toolkit.nvrtc_version()), entry.read_bytes()) is not None


def test_the_guess_is_right_here_and_falls_back_to_the_library(monkeypatch):
    likely = toolkit.likely_nvrtc_version.__wrapped__
    assert likely() == toolkit.nvrtc_version()
    for found in ("13", "thirteen.zero", "13.x"):
        monkeypatch.setattr(toolkit.importlib.metadata, "version", lambda name, found=found: found)
        assert likely() == toolkit.nvrtc_version()


def test_J6_a_changed_header_is_compiled_anew(cache, sources, compilations, monkeypatch):
    compile_kernel(PROBE, "sm_90a")
    header = sources / "common" / "types.cuh"
    header.write_text(header.read_text() + '\nstatic_assert(sizeof(int) == 5, "a change that is seen");\n')
    forget(monkeypatch)
    with pytest.raises(KernelCompileError, match="a change that is seen"):
        compile_kernel(PROBE, "sm_90a")


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "text", "another key"])
def test_J1_K2_a_damaged_or_foreign_entry_is_made_anew(cache, compilations, monkeypatch, caplog, damage):
    good = compile_kernel(PROBE, "sm_90a")
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    another = cubins.seal("another key", good)
    content = {"empty": b"", "half": whole[: len(whole) // 2], "flipped": flipped, "text": b"\x80\x04pickle"}
    entry.write_bytes(content.get(damage, another))
    forget(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="pymoe"):
        assert compile_kernel(PROBE, "sm_90a").cubin == good.cubin
    assert "damaged or foreign" in caplog.text and len(compilations) == 2
    assert cubins.unseal(jit.cache_key(PROBE, "sm_90a"), entry.read_bytes()) is not None  # and it is whole again


@pytest.mark.parametrize("size", range(0, 120, 7))
def test_an_entry_cut_anywhere_is_refused(size):
    entry = cubins.seal("key", CompiledKernel(b"cubin\n" * 9, "symbol", "log"))
    assert cubins.unseal("key", entry) == CompiledKernel(b"cubin\n" * 9, "symbol", "log")
    assert cubins.unseal("key", entry[:size]) is None
    assert cubins.unseal("key", entry[size + 1 :]) is None


@pytest.mark.parametrize("kind", ["K2_writable", "K2_inner_writable", "K2_symlink", "J3_a_file", "J3_read_only"])
def test_an_unsafe_or_impossible_cache_is_off_and_says_so(cache, compilations, monkeypatch, caplog, tmp_path, kind):
    inner = cache / cubins.FOLDER
    if kind == "K2_writable":
        cache.mkdir()
        cache.chmod(0o777)
    elif kind == "K2_inner_writable":
        cache.mkdir(mode=0o700)
        inner.mkdir()
        inner.chmod(0o770)
    elif kind == "K2_symlink":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        cache.symlink_to(tmp_path / "elsewhere")
    elif kind == "J3_a_file":
        cache.write_text("not a folder")
    else:
        monkeypatch.setenv("PYMOE_CACHE_DIR", "/proc/self/pymoe")
    before = entries(tmp_path)
    with caplog.at_level(logging.WARNING, logger="pymoe"):
        assert compile_kernel(PROBE, "sm_90a").cubin
    assert "kernel cache off" in caplog.text
    forget(monkeypatch)
    compile_kernel(PROBE, "sm_90a")
    assert len(compilations) == 2 and entries(tmp_path) == before


def test_K1_an_entry_planted_in_a_folder_of_others_is_not_loaded(cache, compilations, monkeypatch):
    compile_kernel(PROBE, "sm_90a")
    (entry,) = entries(cache)
    entry.write_bytes(cubins.seal(jit.cache_key(PROBE, "sm_90a"), CompiledKernel(b"planted", "evil", "")))
    cache.chmod(0o777)
    forget(monkeypatch)
    assert compile_kernel(PROBE, "sm_90a").symbol != "evil"
    assert len(compilations) == 2


def test_K1_a_folder_of_another_user_is_refused(cache, compilations, monkeypatch, caplog):
    compile_kernel(PROBE, "sm_90a")
    forget(monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with caplog.at_level(logging.WARNING, logger="pymoe"):
        compile_kernel(PROBE, "sm_90a")
    assert "is not a folder of this user alone" in caplog.text and len(compilations) == 2


def test_J3_no_home_folder(tmp_path):
    """HOME is missing and the user is not in the list of users."""
    code = "import os.path; os.path.expanduser = lambda path: path\n" + CODE
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "PYMOE_CACHE_DIR", "XDG_CACHE_HOME")}
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_J2_a_cache_that_vanishes_after_it_was_opened(cache, compilations, monkeypatch):
    compile_kernel(PROBE, "sm_90a")
    shutil.rmtree(cache)
    forget(monkeypatch)
    compile_kernel(PROBE, "sm_90a")
    assert len(compilations) == 2 and len(entries(cache)) == 1


def test_J1_sixteen_cold_processes_share_one_cache(tmp_path):
    environment = {**os.environ, "PYMOE_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", CODE]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment)
        for _ in range(16)
    ]
    answers = set()
    for process in started:
        out, error = process.communicate(timeout=280)
        assert process.returncode == 0, error.decode()
        answers.add(out)
    assert len(answers) == 1
    assert len(entries(tmp_path)) == 2  # no file is left behind by those that came late
    for entry in entries(tmp_path):
        assert entry.read_bytes().startswith(cubins._MAGIC)


def test_threads_share_one_compilation(cache, compilations):
    barrier, found = threading.Barrier(8), []

    def work():
        barrier.wait()
        found.append(compile_kernel(PROBE, "sm_90a"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(compilations) == 1 and all(compiled is found[0] for compiled in found) and len(found) == 8


def test_many_kernels_are_compiled_in_order_and_counted(cache):
    kernels = [PROBE._replace(expression=f"pymoe::probe_kernel<{name}>") for name in ("int", "float", "double")]
    done = []
    compiled = compile_all(kernels, "sm_80", jobs=2, done=done.append)
    assert ["IiE" in compiled[0].symbol, "IfE" in compiled[1].symbol, "IdE" in compiled[2].symbol] == [True] * 3
    assert sorted(done) == sorted(kernels)
    with pytest.raises(KernelCompileError, match="probe_kernel<nothing>"):
        compile_all([*kernels, PROBE._replace(expression="pymoe::probe_kernel<nothing>")], "sm_80", jobs=2)


def test_a_compile_error_shows_file_line_options_and_log(cache, sources):
    unit = sources / "common" / "broken.cu"
    unit.write_text('#include "common/types.cuh"\n\n__global__ void broken_kernel() { undeclared = 1; }\n')
    with pytest.raises(KernelCompileError) as caught:
        compile_kernel(KernelId("common/broken.cu", "broken_kernel"), "sm_90a")
    text = str(caught.value)
    assert 'common/broken.cu(3): error: identifier "undeclared" is undefined' in text
    assert str(unit) in text and "sm_90a" in text and "'ftz': False" in text
    with pytest.raises(KernelCompileError):  # and the failure is not kept
        compile_kernel(KernelId("common/broken.cu", "broken_kernel"), "sm_90a")
    unit.write_text("__global__ void broken_kernel() {}\n")
    jit.sources_digest.cache_clear()
    assert compile_kernel(KernelId("common/broken.cu", "broken_kernel"), "sm_90a").cubin


def test_a_unit_that_is_not_there(cache):
    with pytest.raises(KernelCompileError, match="nowhere.cu must be readable"):
        compile_kernel(KernelId("common/nowhere.cu", "kernel"), "sm_90a")


def test_J5_an_arch_that_this_version_or_this_nvrtc_does_not_know(cache, monkeypatch):
    with pytest.raises(ArgumentError, match="arch must be one of sm_80.*got 'sm_90'"):
        compile_kernel(PROBE, "sm_90")
    monkeypatch.setattr(toolkit, "nvrtc_archs", lambda: (75, 80, 90))
    with pytest.raises(BackendUnavailableError, match=r"sm_75 to sm_90.*got sm_120\. Install a newer NVRTC"):
        compile_kernel(PROBE, "sm_120")


MISSING = """
import importlib, sys
from pymoe.device import toolkit
from pymoe.device.jit import KernelId, compile_kernel
{}
try:
    compile_kernel(KernelId("common/probe.cu", "pymoe::probe_kernel<float>"), "sm_90a")
except Exception as error:
    print(type(error).__name__, error)
import numpy as np, pymoe
print(pymoe.ops.permute(np.array([[2, 0], [2, -1]]), 3, backend="numpy").row_to_slot.sum())
"""


@pytest.mark.parametrize(
    "fault, what",
    [
        ("sys.modules['cuda.core'] = None", "cuda-core must be importable"),
        (
            "from cuda.bindings import nvrtc\ndef gone(): raise RuntimeError('no libnvrtc.so\\nsearched')\n"
            "nvrtc.nvrtcVersion = gone",
            "NVRTC must be installed; got no libnvrtc.so.",
        ),
        (
            "import cuda.pathfinder\ncuda.pathfinder.find_nvidia_header_directory = lambda name: None",
            "the CUDA runtime's headers must be installed; got none",
        ),
    ],
    ids=["cuda-core", "nvrtc", "headers"],
)
def test_J4_what_is_missing_is_named_with_its_remedy_and_the_processor_still_works(tmp_path, fault, what):
    environment = {**os.environ, "PYMOE_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", MISSING.format(fault)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=100)
    error, answer = done.stdout.strip().splitlines()
    assert error.startswith(f"BackendUnavailableError pymoe: {what}") and "pip install 'pymoe[cu13]'" in error
    assert answer == "3" and done.stderr == ""


def test_J4_wrong_variables_do_not_matter(tmp_path):
    """A CUDA_PATH that leads nowhere: the packages' own headers are found first."""
    environment = {
        **os.environ,
        "PYMOE_CACHE_DIR": str(tmp_path / "cache"),
        "CUDA_PATH": "/nowhere",
        "CUDA_HOME": "/no",
    }
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.timeout(60)
def test_a_fork_compiles_for_itself(cache, compilations):
    """The child of a process with a compilation under way has neither its threads nor its locks."""
    jit._compiled[PROBE, "sm_80"] = jit.Future()  # as if another thread were compiling
    jit._lock.acquire()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that waits for its parent's thread ends all the same
        status = 1
        try:
            status = 0 if compile_kernel(PROBE, "sm_80").cubin else 1
        finally:
            os._exit(status)
    jit._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
