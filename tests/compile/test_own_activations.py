"""Kernels with a user's activation as machine code: as sound as the others, and without a call.

Compiling them asks for nothing but NVRTC, so that what the translation makes is seen by a real compiler here too.
"""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from pymoe import ActivationConfig, environment, register_activation
from pymoe.device.jit import KernelId, compile_all
from pymoe.device.own_activation import with_activation
from pymoe.ops.grouped_gemm._cuda_instances import all_instances
from tests.compile import facts, rules
from tests.compile.test_kernels import _tools  # noqa: F401

pytestmark = [pytest.mark.compile, pytest.mark.timeout(900)]


def silu(gate, up):
    return gate / (1.0 + math.exp(-gate)) * up


def everything(gate, up):
    y = math.sqrt(abs(gate)) + math.log(up) ** 2 - math.tanh(gate) / 3
    if gate > up and not up == 0:
        y = max(y, math.erf(gate), math.expm1(up)) if y < 1e30 else math.inf
    return pow(y, up) + math.floor(gate) + math.log1p(y) + (gate > 0) + math.nan * 0


SILU = ActivationConfig(register_activation("test_compiled_silu", silu))
EVERYTHING = ActivationConfig(register_activation("test_compiled_everything", everything))
ALONE = KernelId("activation/activation.cu", "pymoe::activation_kernel")


INTEGERS = re.compile(r"__cuda_sm20_(div|rem)_[su](16|64)")
"""Subroutines that kernels of any format call to find their place, whatever the activation."""


def kernels(arch, config):
    """Return a GEMM of every pair and unit, in the middle tile, and the activation alone."""
    gemms = [i.kernel for i in all_instances(arch) if rules.tile_rows(i.kernel) in (None, 64)]
    return [with_activation(kernel, config) for kernel in (*gemms, ALONE)]


def subroutines(compiled):
    """Return the names of what the compiler has put beside the kernel to be called."""
    return {name.decode() for name in re.findall(rb"\$__internal_\d+_\$(\w+)", compiled.cubin)}


def faults(kernel, arch, compiled, may_spill=False):
    """Return what is wrong with a kernel that holds an activation; a very long one may keep registers in memory."""
    tensor = kernel.unit != "grouped_gemm/simt.cu" and kernel != ALONE._replace(prelude=kernel.prelude)
    known = facts.facts_of(compiled, sass=tensor)
    found = [] if may_spill else rules.faults(kernel, arch, known)
    found += [f"calls {name}" for name in subroutines(compiled) if tensor or not INTEGERS.fullmatch(name)]
    if tensor and known.count("RET"):  # sm_80 and sm_89 also jump by CALL, but never come back
        found.append("returns from a call")
    return found


@pytest.mark.parametrize(
    "arch, config",
    [("sm_90a", SILU), ("sm_80", EVERYTHING), ("sm_90a", EVERYTHING), ("sm_120", EVERYTHING)],
    ids=lambda value: value.activation.name if isinstance(value, ActivationConfig) else value,
)
def test_no_call_and_no_spill(arch, config):
    wanted = kernels(arch, config)
    compiled = compile_all(wanted, arch)
    with ThreadPoolExecutor(environment.num_threads()) as pool:
        long = [config is EVERYTHING] * len(wanted)
        found = list(pool.map(faults, wanted, [arch] * len(wanted), compiled, long))
    assert not any(found), "\n".join(f"{k}: {f}" for k, f in zip(wanted, found, strict=True) if f)
    assert any(kernel.unit == rules.GEMM for kernel in wanted)
    print(f"{arch}: {len(wanted)} kernels")


def test_a_product_and_a_sum_stay_two_operations():
    """Joined, they would be rounded once, and the bits would not be those of the other backends."""
    counts = []
    for name, fn in (
        ("product", lambda g, u: g * u),
        ("sum", lambda g, u: g * u + g),
        ("half", lambda g, u: u - g * u),
    ):
        own = ActivationConfig(register_activation(f"test_compiled_{name}", fn))
        kernel = with_activation(ALONE, own)
        known = facts.facts_of(compile_all([kernel], "sm_90a")[0], sass=True)
        counts.append((known.count("FFMA"), known.count("FMUL") > 0))
    assert counts[0] == counts[1] == counts[2] and counts[0][1], counts


def test_the_check_sees_a_call():
    """The built-in activations are calls, so as not to stand in every GEMM nine times over."""
    kernel = next(k for k in kernels("sm_90a", SILU) if k.unit == rules.GEMM)._replace(prelude="")
    found = faults(kernel, "sm_90a", compile_all([kernel], "sm_90a")[0])
    assert "returns from a call" in found and any("div_rn" in fault for fault in found), found
