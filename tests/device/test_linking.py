"""What a user's function needs to be linked into a kernel, told by name where it is missing; nothing is compiled."""

from __future__ import annotations

import importlib.util
import sys

import pytest

import pymoe
from pymoe import ActivationConfig
from pymoe.device import jit, linking
from pymoe.device.jit import KernelId
from pymoe.device.own_activation import with_activation
from tests.formula.untranslated import horner

KERNEL = KernelId("activation/activation.cu", "pymoe::activation_kernel")


@pytest.fixture
def function():
    linking.function_ltoir.cache_clear()
    linking.versions.cache_clear()
    linking._nvjitlink.cache_clear()
    yield pymoe.register_activation("test_linking_horner", horner).program
    linking.function_ltoir.cache_clear()
    linking.versions.cache_clear()
    linking._nvjitlink.cache_clear()


def test_without_numba_cuda(function, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba_cuda" else find(name))
    kernel = with_activation(KERNEL, ActivationConfig("test_linking_horner"))
    for call in (
        lambda: jit.cache_key(kernel, "sm_90a", (13, 0)),
        lambda: linking.function_ltoir(function, "sm_90a"),
    ):
        with pytest.raises(pymoe.PymoeError) as caught:
            call()
        assert isinstance(caught.value, pymoe.errors.BackendUnavailableError)
        assert "numba-cuda must be installed for activations that are not translated" in str(caught.value)
        assert "pip install 'pymoe[numba-cu13]'" in str(caught.value)


def hide_nvjitlink(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvjitlink", None)
    if "cuda.bindings" in sys.modules:  # which knows it by name once it was loaded
        monkeypatch.delattr(sys.modules["cuda.bindings"], "nvjitlink", raising=False)


def test_without_nvjitlink(function, monkeypatch):
    hide_nvjitlink(monkeypatch)
    with pytest.raises(pymoe.errors.BackendUnavailableError) as caught:
        linking.link(b"", function, "sm_90a")
    assert "nvJitLink must be installed for activations that" in str(caught.value)
    assert "pip install 'pymoe[numba-cu13]'" in str(caught.value)


def test_other_kernels_need_neither(monkeypatch):
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    hide_nvjitlink(monkeypatch)
    monkeypatch.setattr(linking, "made_by", None)
    own = pymoe.register_activation("test_linking_plain", lambda gate, up: gate * up)
    for kernel in (KERNEL, with_activation(KERNEL, ActivationConfig(own))):
        assert jit.compile_now(kernel, "sm_90a").cubin and jit.cache_key(kernel, "sm_90a")
