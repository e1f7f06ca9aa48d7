"""Systems and layers that have been fitted or published.  Every constant says what it was fitted to; the other figures
of the same source are predictions, compared in ``docs/scaling``.
"""

from __future__ import annotations

from pymoe.ep_model.times import Compute, System
from pymoe.ep_model.traffic import ModelShape

DEEPSEEK_V3 = ModelShape("DeepSeek-V3", K=7168, I=2048, E=256, topk=8, groups=8, topk_group=4)
QWEN3_235B = ModelShape("Qwen3-235B-A22B", K=4096, I=1536, E=128, topk=8)
QWEN3_30B = ModelShape("Qwen3-30B-A3B", K=2048, I=768, E=128, topk=8)

_SYSTEMS = (
    System(
        "deepep-h800-ib", 8, inside=133.9, network=44.6, start_us=(0, 0),
        source="DeepEP V1 normal kernels, H800 and CX7: dispatch at EP8 and EP64; start-up not separable",
    ),
    System(
        "deepep-ll-h800-ib", 8, inside=137.5, network=48.5, start_us=(27.0, 27.0),
        source="DeepEP V1 low-latency kernels, H800 and CX7: dispatch at EP8, EP16 and EP64",
    ),
    System(
        "deepep-ll-h100", 8, inside=132.0, network=48.5, start_us=(24.0, 24.0),
        source="DeepEP V1 low-latency kernels, 8 H100: dispatch of 128 and 512 tokens; network as on H800",
    ),
    System(
        "deepep-h200-ib", 8, inside=280.0, network=45.8, start_us=(0, 0),
        source="DeepEP V1 on 8 H200 (UCCL): dispatch at EP8; network: DeepEP V2, SM90 and CX7, dispatch at EP32",
    ),
    System(
        "deepep-sm100-ib", 8, inside=635.0, network=45.8, start_us=(0, 0),
        source="DeepEP V2, SM100, 64 SMs: dispatch at EP8; network as on SM90",
    ),
    System(
        "uccl-mi300x-ib", 8, inside=230.0, network=45.5, start_us=(0, 0), inside_kind="xgmi",
        source="UCCL-EP normal kernels, MI300X and CX7: fp8 dispatch at EP8 and EP64",
    ),
    System(
        "uccl-h200-efa", 8, inside=280.0, network=40.6, start_us=(0, 0),
        source="UCCL-EP normal kernels, H200 and EFA: dispatch at EP8 and EP32",
    ),
    System(
        "trtllm-gb200-nvl72", 72, inside=688.0, network=45.8, start_us=(12.2, 17.4), floor_us=(18.9, 31.0),
        message_us=0.13,
        source="TensorRT-LLM one-sided all-to-all, GB200 NVL72: EP8 dispatch of 1, 128 and 2048 tokens, EP8 combine "
        "of 1 and 512, EP64 dispatch of 128; network as on SM90",
    ),
)  # fmt: skip
SYSTEMS = {system.name: system for system in _SYSTEMS}
"""By name."""

_SOURCE = "DeepGEMM 2.6.1 on one H200 under held load, measured: DeepSeek-V3's 32 local experts at 128 and 4096 tokens"
H200_FP8 = Compute(tflops=1093.0, memory=3755.0, tile=128, weight_bytes=1.0, source=_SOURCE)
H200_BF16 = Compute(tflops=651.0, memory=4007.0, tile=128, weight_bytes=2.0, source=_SOURCE)
