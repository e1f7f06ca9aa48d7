"""The checks can fail: each is shown a kernel with the fault that it is there to find."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pymoe.device import jit
from pymoe.device.jit import KernelId
from tests.compile import facts, rules
from tests.compile.test_kernels import _tools  # noqa: F401

pytestmark = pytest.mark.compile

BF16 = KernelId(rules.GEMM, "pymoe::grouped_gemm_kernel<pymoe::Format::kBF16, pymoe::Format::kBF16, 32, 64>")
FP8 = BF16._replace(expression=BF16.expression.replace("BF16", "E4M3"))
INT8 = BF16._replace(expression=BF16.expression.replace("BF16", "S8"))

SM90 = KernelId(rules.SM90, "pymoe::grouped_gemm_sm90_kernel<pymoe::Format::kBF16>")


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """``planted(unit, arch)`` returns the faults of a planted kernel, judged as another kernel if asked."""
    folder = tmp_path / "cuda_src"
    shutil.copytree(jit.source_folder(), folder)
    shutil.copytree(Path(__file__).parent / "planted", folder / "planted")
    monkeypatch.setattr(jit, "source_folder", lambda: folder)
    jit.sources_digest.cache_clear()

    def look(unit, arch="sm_90a", judged_as=None, arguments=""):
        kernel = KernelId(f"planted/{unit}.cu", f"pymoe::{unit}_kernel{arguments}")
        compiled = jit.compile_kernel(kernel, arch)
        known = facts.facts_of(compiled, sass=judged_as is not None)
        return [fault.split(": ", 1)[1] for fault in rules.faults(judged_as or kernel, arch, known)]

    yield look
    jit.sources_digest.cache_clear()


def has(found, *texts):
    return all(any(text in fault for fault in found) for text in texts)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
def test_spills(planted, arch):
    assert has(planted("spills", arch), "spills ", "has a stack frame of", "warning: ")


def test_spills_may_be_excused_by_name(planted, monkeypatch):
    monkeypatch.setitem(rules.MAY_SPILL, "pymoe::spills_kernel", "planted")
    assert not has(planted("spills"), "spills ") and not has(planted("spills"), "stack")


def test_a_stack_frame(planted):
    assert has(planted("stack"), "has a stack frame of 256 bytes")


def test_local_memory_in_a_gemm(planted):
    assert has(planted("stack", judged_as=BF16), "keeps registers in local memory")


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120"])
def test_no_tensor_cores_and_narrow_loads(planted, arch):
    assert planted("scalar", arch) == []  # sound, where nothing is prescribed
    found = planted("scalar", arch, judged_as=BF16)
    assert has(found, "multiplies without HMMA", "loads nothing from global memory 16 bytes at a time")


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120"])
def test_a_gemm_as_it_should_be(planted, arch):
    assert planted("tensor", arch, judged_as=BF16, arguments="<true>") == []
    assert planted("tensor", arch, BF16, "<false>") == ["loads nothing from global memory 16 bytes at a time"]


@pytest.mark.parametrize(
    "kernel, arch, wanted",
    [(FP8, "sm_89", "QMMA"), (FP8, "sm_120", "QMMA"), (INT8, "sm_80", "IMMA"), (INT8, "sm_100a", "IMMA")],
)
def test_the_wrong_tensor_cores(planted, kernel, arch, wanted):
    found = planted("tensor", arch, kernel, "<true>")
    assert found == [f"multiplies without {wanted}", f"multiplies with another instruction than {wanted}"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_fp8_is_decoded_where_mma_sync_has_none(planted, arch):
    assert planted("tensor", arch, FP8, "<true>") == []


def test_the_portable_path_where_sm90a_has_its_own(planted):
    assert has(
        planted("tensor", judged_as=SM90, arguments="<true>"),
        "multiplies without HGMMA", "copies tiles without UTMALDG", "shares out registers without USETMAXREG",
        "multiplies with another instruction than HGMMA",
    )  # fmt: skip
    assert has(planted("stack", judged_as=SM90), "keeps registers in local memory")


@pytest.mark.parametrize("unit", ["setmaxnreg", "serialized"])
def test_a_potential_performance_loss(planted, unit):
    assert has(planted(unit), "Potential Performance Loss")


def test_a_warning_of_the_front_end(planted):
    (found,) = planted("pointless")
    assert found.startswith("warning: planted/pointless.cu(5): warning #186-D")
