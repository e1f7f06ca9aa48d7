"""What every expert on the CPU can do; each answers the contract's questions the same way."""

from __future__ import annotations

from pymoe.config import FusedMoEParallelConfig
from pymoe.contracts.experts import Activation
from pymoe.experts.routed import supports_quant_scheme
from pymoe.quantization import QuantKey


class CpuAbilities:
    """Every activation, pair of schemes, shape and layout of ranks; expert maps too."""

    def supports_expert_map(self) -> bool:
        return True

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: Activation) -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
        return supports_quant_scheme(weight_key, activation_key)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return True
