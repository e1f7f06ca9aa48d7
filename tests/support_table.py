"""README's tables of stages, experts and pairs of schemes, drawn from what the library itself answers.

``python -m tests.support_table`` writes them into README.md.
"""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np

import pymoe
from pymoe.codec.weights import WeightOperand
from pymoe.config import FusedMoEConfig
from pymoe.ops.grouped_gemm import _cuda_instances as instances
from pymoe.ops.quantize import quantize_experts
from pymoe.ops.quantize.schemes import SCHEMES
from pymoe.quantization import FUSED_MOE_UNQUANTIZED_CONFIG
from pymoe.select import CANDIDATES

README = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- support: written by python -m tests.support_table -->\n", "<!-- end of support -->\n")
OPS = Path(pymoe.__file__).parent / "ops"
ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120")
PLAIN = ("fp32", "fp16", "bf16")
CODES = {"fp8": "E4M3", "int8": "S8", "uint8b128": "U8", "uint8": "U8", "uint4b8": "U4", "uint4": "U4", "fp4": "E2M1"}
K = 256


def stages() -> list[str]:
    """Return a row a stage: which backends there are files for."""
    rows = ["| stage | NumPy, the definition | Numba | CUDA | Numba on CUDA |", "| --- | --- | --- | --- | --- |"]
    for op in sorted(path.parent.name for path in OPS.glob("*/__init__.py")):
        backends = ("numpy", "numba", "cuda", "numba_cuda")
        cells = ["yes" if (OPS / op / f"_{backend}.py").exists() else "no" for backend in backends]
        rows.append(f"| {op.replace('_', ' ')} | {' | '.join(cells)} |")
    return rows


def keys_of(scheme: str):
    """Return the quant config of a scheme, and its first weight as a GEMM reads it."""
    w1, w2 = np.ones((2, 256, K), np.float32), np.ones((2, K, 128), np.float32)
    if scheme in PLAIN:
        return FUSED_MOE_UNQUANTIZED_CONFIG, WeightOperand.unquantized(w1)
    codes, _, config = quantize_experts(w1, w2, scheme)
    return config, WeightOperand.from_quant_config(codes, config.w1, config, K)


def supported(scheme: str, experts) -> bool:
    """Return what `is_supported_config` says of a pair and a class."""
    config, _ = keys_of(scheme)
    routing = pymoe.RoutingConfig(2)
    device = next(device for device, classes in CANDIDATES.items() if experts in classes)
    moe = FusedMoEConfig(4, 2, K, 128, 4, in_dtype=np.dtype(ml_dtypes.bfloat16), device=device, routing=routing)
    # Whether a device is here is not the table's business.
    ask = type(experts.__name__, (experts,), {"_supports_current_device": staticmethod(lambda: True)})
    return ask.is_supported_config(moe, config.weight_key, config.activation_key, experts.activation_format())[0]


def native_archs(scheme: str) -> list[str]:
    """Return the architectures whose tensor cores multiply this pair's codes, or floats, as they are."""
    config, w = keys_of(scheme)
    if scheme in PLAIN:
        name = {"fp32": "F32", "fp16": "FP16", "bf16": "BF16"}[scheme]
        found = instances.Operands(name, name, K)
    else:
        key, wkey = config.activation_key, config.weight_key
        scale = "F32" if w.group_scale is None or w.group_scale.dtype != np.uint8 else "E8M0"
        scale = "E4M3" if scale == "E8M0" and wkey.scale.dtype == "fp8" else scale
        found = instances.Operands(
            "BF16" if key is None else CODES[key.dtype], CODES[wkey.dtype], K,
            0 if w.group_scale is None else w.block[1], key is not None and key.scale.group_shape.col > 1, scale,
        )  # fmt: skip
    return [arch for arch in ARCHS if instances.choose(found, 64, arch).native]


def pairs() -> list[str]:
    """Return a row a pair: the experts that take it, and how the GPU multiplies it."""
    classes = [experts for device in ("cpu", "cuda") for experts in CANDIDATES[device]]
    rows = [f"| pair | {' | '.join(c.__name__.removesuffix('Experts') for c in classes)} | multiplied on a GPU |"]
    rows.append("| --- |" + " --- |" * (len(classes) + 1))
    for scheme in (*PLAIN, *SCHEMES):
        archs = native_archs(scheme)
        exact = "as they are, exact float32" if scheme == "fp32" else "as they are"
        how = exact if archs == list(ARCHS) else f"codes on {', '.join(archs)}, else decoded" if archs else "decoded"
        if scheme not in PLAIN and archs == list(ARCHS):
            how = "codes"
        cells = ["yes" if supported(scheme, experts) else "no" for experts in classes]
        rows.append(f"| `{scheme}` | {' | '.join(cells)} | {how} |")
    return rows


def table() -> str:
    """Return both tables."""
    return "\n".join([*stages(), "", *pairs()]) + "\n"


def written() -> str:
    """Return what README holds between the marks."""
    found = re.search(f"{re.escape(MARKS[0])}(.*?){re.escape(MARKS[1])}", README.read_text("utf-8"), re.S)
    assert found, "README.md has lost its marks"
    return found[1]


if __name__ == "__main__":
    old, new = ("".join((MARKS[0], text, MARKS[1])) for text in (written(), table()))
    README.write_text(README.read_text("utf-8").replace(old, new), "utf-8")
