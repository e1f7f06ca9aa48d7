"""The quant config of a layer: which scheme each operand has, with the weights' scales, zero points and biases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pymoe.errors import ArgumentError, UnsupportedError, complaint
from pymoe.quantization.keys import (
    PER_CHANNEL,
    PER_TENSOR,
    PER_TOKEN,
    GroupShape,
    QuantKey,
    kInt4Static,
    kInt4StaticAsym,
    kInt8Static,
    kInt8StaticAsym,
    kMxfp4Dynamic,
    kMxfp4Static,
    kMxfp8Dynamic,
    kMxfp8Static,
    kNvfp4Dynamic,
    kNvfp4Static,
    kTf32,
    make_key,
)

Array = Any

_WEIGHT_DTYPES = ("fp8", "int8", "int4", "mxfp8", "mxfp4", "nvfp4", "tf32")
_ACTIVATION_DTYPES = ("fp8", "int8", "mxfp8", "mxfp4", "nvfp4")
_LATER = ("mxfp6_e3m2", "mxfp6_e2m3", "mxfp6", "fp8_e5m2", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "fnuz")
# Activation dtypes that each weight dtype may be multiplied with; None is weight-only (a16).
_PARTNERS: dict[str | None, tuple[str | None, ...]] = {
    None: (None,),
    "fp8": ("fp8", None),
    "int8": ("int8", None),
    "int4": (None,),
    "mxfp8": ("mxfp8", None),
    "mxfp4": ("mxfp4", "mxfp8", None),
    "nvfp4": ("nvfp4", None),
    "tf32": (None,),
}


def _dtype_name(argument: str, dtype: Any, valid: tuple[str, ...]) -> str | None:
    """Return pymoe's word for a quantized dtype given as a word, a NumPy dtype or an ml_dtypes type."""
    call = "FusedMoEQuantConfig.make"
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    name = {"float8_e4m3fn": "fp8", "float8_e4m3": "fp8", "nf4": "", "float4_e2m1fn": "mxfp4"}.get(name, name)
    if name in _LATER:
        raise UnsupportedError(complaint(call, argument, f"be one of {', '.join(valid)}", name))
    if name not in valid:
        raise ArgumentError(complaint(call, argument, f"be None or one of {', '.join(valid)}", repr(dtype)))
    return name


@dataclass(frozen=True)
class FusedMoEQuantDesc:
    """One operand of one GEMM: its dtype word, what shares a scale, and the arrays that go with it.

    `scale_2` is nvfp4's per-expert global scale (multiplies); `gscale` its activation counterpart (divides).
    """

    dtype: str | None = None
    shape: GroupShape | None = None
    scale: Array | None = None
    scale_2: Array | None = None
    gscale: Array | None = None
    zp: Array | None = None
    bias: Array | None = None


@dataclass(frozen=True)
class FusedMoEQuantConfig:
    """How activations (a1, a2) and weights (w1, w2) are quantized, with the weights' scales, zero points and biases.

    Build it with :meth:`make` or a class method named after a scheme; shapes are checked against the weights at the
    call.  Shapes: ``docs/shapes``.
    """

    a1: FusedMoEQuantDesc = field(default_factory=FusedMoEQuantDesc)
    a2: FusedMoEQuantDesc = field(default_factory=FusedMoEQuantDesc)
    w1: FusedMoEQuantDesc = field(default_factory=FusedMoEQuantDesc)
    w2: FusedMoEQuantDesc = field(default_factory=FusedMoEQuantDesc)
    gemm1_alpha: float | None = None
    gemm1_beta: float | None = None
    gemm1_clamp_limit: float | None = None
    per_act_token_quant: bool = False
    per_out_ch_quant: bool = False
    block_shape: tuple[int, int] | None = None

    @classmethod
    def make(
        cls,
        quant_dtype: Any = None,
        weight_dtype: Any = None,
        *,
        per_act_token_quant: bool = False,
        per_out_ch_quant: bool = False,
        block_shape: tuple[int, int] | list[int] | None = None,
        w1_scale: Array | None = None,
        w2_scale: Array | None = None,
        a1_scale: Array | None = None,
        a2_scale: Array | None = None,
        w1_zp: Array | None = None,
        w2_zp: Array | None = None,
        w1_scale_2: Array | None = None,
        w2_scale_2: Array | None = None,
        a1_gscale: Array | None = None,
        a2_gscale: Array | None = None,
        w1_bias: Array | None = None,
        w2_bias: Array | None = None,
        gemm1_alpha: float | None = None,
        gemm1_beta: float | None = None,
        gemm1_clamp_limit: float | None = None,
    ) -> FusedMoEQuantConfig:
        """Return the config for activations in `quant_dtype` and weights in `weight_dtype`.

        Parameters
        ----------
        quant_dtype : {None, "fp8", "int8", "mxfp8", "mxfp4", "nvfp4"} or dtype
            Activations; None leaves them as they are (weight-only when `weight_dtype` is given).
        weight_dtype : {None, "fp8", "int8", "int4", "mxfp8", "mxfp4", "nvfp4", "tf32"} or dtype
            Weights; None means `quant_dtype`.  "tf32" leaves float32 as it is and permits CUDA devices to round both
            operands to TF32 where they multiply them.
        per_act_token_quant : bool
            One scale a token instead of one for all tokens (fp8, int8).
        per_out_ch_quant : bool
            One scale an output channel, `w1_scale` (E, N), instead of one an expert, (E,) (fp8, int8).
        block_shape : (int, int), optional
            fp8, int8: (bn, bk) of the weights, activations in groups of bk.  Weight-only int4, int8: (0, group);
            None is one group a row.
        w1_scale, w2_scale, a1_scale, a2_scale, w1_zp, w2_zp, w1_scale_2, w2_scale_2, a1_gscale, a2_gscale : array
            Scales and zero points; static activations when `a1_scale` is given.  uint8 block scales are e8m0.
        w1_bias, w2_bias : array
            (E, N) and (E, K), added in float32 after the scales.
        gemm1_alpha, gemm1_beta, gemm1_clamp_limit : float
            Parameters of the activation, see `ActivationConfig`.

        Raises
        ------
        ArgumentError
            Flags or dtypes that contradict each other, or a scale that is missing or unused.
        UnsupportedError
            mxfp6, int4 with quantized activations, e5m2, fnuz.
        """
        call = "FusedMoEQuantConfig.make"
        a_dtype = _dtype_name("quant_dtype", quant_dtype, _ACTIVATION_DTYPES)
        w_dtype = a_dtype if weight_dtype is None else _dtype_name("weight_dtype", weight_dtype, _WEIGHT_DTYPES)
        if a_dtype not in _PARTNERS[w_dtype]:
            rule = f"be one of {_PARTNERS[w_dtype]} for {w_dtype} weights"
            raise UnsupportedError(complaint(call, "quant_dtype", rule, a_dtype))
        block = _block(call, block_shape, w_dtype, a_dtype)
        weights = {"scale": (w1_scale, w2_scale), "scale_2": (w1_scale_2, w2_scale_2), "zp": (w1_zp, w2_zp)}
        a1_scale, a2_scale, a1_gscale, a2_gscale = map(_number, (a1_scale, a2_scale, a1_gscale, a2_gscale))
        activations = {"scale": (a1_scale, a2_scale), "gscale": (a1_gscale, a2_gscale)}
        _check_flags(call, w_dtype, a_dtype, bool(per_act_token_quant), bool(per_out_ch_quant), block)
        _check_operands(call, w_dtype, a_dtype, weights, activations, bool(per_act_token_quant), block)
        a_shape = _activation_shape(a_dtype, per_act_token_quant, block)
        w_shape = _weight_shape(w_dtype, a_dtype, per_out_ch_quant, block)
        return cls(
            a1=FusedMoEQuantDesc(a_dtype, a_shape, a1_scale, gscale=a1_gscale),
            a2=FusedMoEQuantDesc(a_dtype, a_shape, a2_scale, gscale=a2_gscale),
            w1=FusedMoEQuantDesc(w_dtype, w_shape, w1_scale, w1_scale_2, None, w1_zp, w1_bias),
            w2=FusedMoEQuantDesc(w_dtype, w_shape, w2_scale, w2_scale_2, None, w2_zp, w2_bias),
            gemm1_alpha=gemm1_alpha,
            gemm1_beta=gemm1_beta,
            gemm1_clamp_limit=gemm1_clamp_limit,
            per_act_token_quant=bool(per_act_token_quant),
            per_out_ch_quant=bool(per_out_ch_quant),
            block_shape=block,
        )

    @classmethod
    def fp8_w8a8(cls, **kwargs: Any) -> FusedMoEQuantConfig:
        """fp8 weights and activations: per tensor, channel and token, or in blocks, by the keywords of `make`."""
        return cls.make("fp8", "fp8", **kwargs)

    @classmethod
    def fp8_w8a16(cls, **kwargs: Any) -> FusedMoEQuantConfig:
        """fp8 weights, activations as they are."""
        return cls.make(None, "fp8", **kwargs)

    @classmethod
    def int8_w8a8(cls, **kwargs: Any) -> FusedMoEQuantConfig:
        """int8 weights and activations, int32 accumulation."""
        return cls.make("int8", "int8", **kwargs)

    @classmethod
    def int8_w8a16(cls, **kwargs: Any) -> FusedMoEQuantConfig:
        """uint8 weights (128 is zero, or with zero points), activations as they are."""
        return cls.make(None, "int8", **kwargs)

    @classmethod
    def int4_w4a16(cls, **kwargs: Any) -> FusedMoEQuantConfig:
        """4-bit integer weights (8 is zero, or with zero points), activations as they are."""
        return cls.make(None, "int4", **kwargs)

    @classmethod
    def mxfp8(cls, **kwargs: Any) -> FusedMoEQuantConfig:
        """mxfp8 weights and activations."""
        return cls.make("mxfp8", "mxfp8", **kwargs)

    @classmethod
    def mxfp4_w4a16(cls, **kwargs: Any) -> FusedMoEQuantConfig:
        """mxfp4 weights, activations as they are."""
        return cls.make(None, "mxfp4", **kwargs)

    @classmethod
    def mxfp4(cls, **kwargs: Any) -> FusedMoEQuantConfig:
        """mxfp4 weights and activations."""
        return cls.make("mxfp4", "mxfp4", **kwargs)

    @classmethod
    def mxfp4_mxfp8(cls, **kwargs: Any) -> FusedMoEQuantConfig:
        """mxfp4 weights, mxfp8 activations."""
        return cls.make("mxfp8", "mxfp4", **kwargs)

    @classmethod
    def nvfp4(cls, **kwargs: Any) -> FusedMoEQuantConfig:
        """nvfp4 weights and activations; without `a1_gscale`, `a2_gscale` the global scale is 1."""
        return cls.make("nvfp4", "nvfp4", **kwargs)

    @classmethod
    def nvfp4_w4a16(cls, **kwargs: Any) -> FusedMoEQuantConfig:
        """nvfp4 weights, activations as they are."""
        return cls.make(None, "nvfp4", **kwargs)

    @classmethod
    def tf32(cls, **kwargs: Any) -> FusedMoEQuantConfig:
        """float32 weights and activations, rounded to TF32 (10 bits of fraction) in products; CUDA devices only."""
        return cls.make(None, "tf32", **kwargs)

    @classmethod
    def biased(cls, **kwargs: Any) -> FusedMoEQuantConfig:
        """Unquantized, with biases."""
        return cls.make(None, None, **kwargs)

    @property
    def quant_dtype(self) -> str | None:
        """Dtype word of the activations, None if they stay as they are."""
        return self.a1.dtype

    @property
    def weight_quant_dtype(self) -> str | None:
        """Dtype word of the weights, None if unquantized."""
        return self.w1.dtype

    @property
    def is_e8m0(self) -> bool:
        """Whether block scales are powers of two (their weights' scales come as uint8 e8m0)."""
        scale = self.w1.scale
        return self.block_shape is not None and scale is not None and np.dtype(scale.dtype).itemsize == 1

    @property
    def is_static(self) -> bool:
        """Whether activations are quantized with given scales."""
        return self.a1.scale is not None

    @property
    def weight_key(self) -> QuantKey | None:
        """Key of the weights, None if unquantized."""
        dtype, shape = self.w1.dtype, self.w1.shape
        if dtype is None or shape is None:
            return None
        if dtype in ("mxfp8", "mxfp4", "nvfp4"):
            return {"mxfp8": kMxfp8Static, "mxfp4": kMxfp4Static, "nvfp4": kNvfp4Static}[dtype]
        if dtype == "tf32":
            return kTf32
        if dtype == "int4":
            return kInt4Static if self.w1.zp is None else kInt4StaticAsym
        if dtype == "int8" and self.quant_dtype is None:
            return kInt8Static if self.w1.zp is None else kInt8StaticAsym
        return make_key(dtype, "e8m0" if self.is_e8m0 else "float32", True, shape)

    @property
    def activation_key(self) -> QuantKey | None:
        """Key of the activations of both GEMMs, None if they stay as they are."""
        dtype, shape = self.a1.dtype, self.a1.shape
        if dtype is None or shape is None:
            return None
        if dtype in ("mxfp8", "mxfp4", "nvfp4"):
            return {"mxfp8": kMxfp8Dynamic, "mxfp4": kMxfp4Dynamic, "nvfp4": kNvfp4Dynamic}[dtype]
        return make_key(dtype, "e8m0" if self.is_e8m0 else "float32", self.is_static, shape)

    @property
    def is_dynamic_per_tensor(self) -> bool:
        """Whether one scale is computed over all tokens, so that tokens are not independent of each other."""
        return self.a1.dtype is not None and self.a1.shape == PER_TENSOR and not self.is_static


FUSED_MOE_UNQUANTIZED_CONFIG = FusedMoEQuantConfig()


def _number(value: Any) -> Array | None:
    """Return a Python number as an array of one, anything else as it is."""
    return np.asarray([value], np.float32) if isinstance(value, int | float) else value


def _block(call: str, block_shape: Any, w_dtype: str | None, a_dtype: str | None) -> tuple[int, int] | None:
    if block_shape is None:
        return None
    try:
        row, col = (int(extent) for extent in block_shape)
    except (TypeError, ValueError):
        raise ArgumentError(complaint(call, "block_shape", "be two integers", repr(block_shape))) from None
    weight_only = w_dtype in ("int4", "int8") and a_dtype is None
    if weight_only and (row not in (0, 1) or (col < 1 and col != -1)):
        raise ArgumentError(complaint(call, "block_shape", "be (0, group) for weight-only integers", (row, col)))
    if not weight_only and (row < 1 or col < 1):
        raise ArgumentError(complaint(call, "block_shape", "have positive extents", (row, col)))
    if w_dtype not in ("fp8", "int8", "int4"):
        raise ArgumentError(complaint(call, "block_shape", f"be None for {w_dtype}", (row, col)))
    return None if weight_only and col == -1 else (row, col)


def _check_flags(
    call: str, w_dtype: str | None, a_dtype: str | None, token: bool, channel: bool, block: tuple[int, int] | None
) -> None:
    if token and a_dtype not in ("fp8", "int8"):
        raise ArgumentError(complaint(call, "per_act_token_quant", f"be False for {a_dtype} activations", True))
    if channel and w_dtype not in ("fp8", "int8"):
        raise ArgumentError(complaint(call, "per_out_ch_quant", f"be False for {w_dtype} weights", True))
    for name, flag in (("per_act_token_quant", token), ("per_out_ch_quant", channel)):
        if flag and block is not None and not (name == "per_out_ch_quant" and a_dtype is None and w_dtype == "int8"):
            raise ArgumentError(complaint(call, name, "be False with a block_shape", True))


def _check_operands(
    call: str, w_dtype: str | None, a_dtype: str | None, weights: dict, activations: dict, token: bool, block: Any
) -> None:
    """Every array that the scheme needs is there, and none that it would not read."""
    static_ok = a_dtype in ("fp8", "int8") and not token and block is None
    allowed = {
        "scale": w_dtype not in (None, "tf32"),
        "scale_2": w_dtype == "nvfp4",
        "zp": w_dtype == "int4" or (w_dtype == "int8" and a_dtype is None),
    }
    for name, pair in weights.items():
        labels = [f"w1_{name}", f"w2_{name}"]
        _check_pair(call, labels, pair, allowed[name], f"{w_dtype} weights", name in ("scale", "scale_2"))
    _check_pair(call, ["a1_scale", "a2_scale"], activations["scale"], static_ok, f"{a_dtype} activations", False)
    _check_pair(call, ["a1_gscale", "a2_gscale"], activations["gscale"], a_dtype == "nvfp4", f"{a_dtype}", False)


def _check_pair(call: str, labels: list[str], pair: tuple, allowed: bool, scheme: str, required: bool) -> None:
    for label, value, other in zip(labels, pair, reversed(pair), strict=True):
        if value is not None and not allowed:
            raise ArgumentError(complaint(call, label, f"be None for {scheme} in this form", "an array"))
        if value is None and allowed and (required or other is not None):
            raise ArgumentError(complaint(call, label, f"be given for {scheme}", None))


def _activation_shape(a_dtype: str | None, token: bool, block: tuple[int, int] | None) -> GroupShape | None:
    if a_dtype is None:
        return None
    fixed = {"mxfp8": GroupShape(1, 32), "mxfp4": GroupShape(1, 32), "nvfp4": GroupShape(1, 16)}
    if a_dtype in fixed:
        return fixed[a_dtype]
    if block is not None:
        return GroupShape(1, block[1])
    return PER_TOKEN if token else PER_TENSOR


def _weight_shape(
    w_dtype: str | None, a_dtype: str | None, channel: bool, block: tuple[int, int] | None
) -> GroupShape | None:
    if w_dtype is None:
        return None
    fixed = {"mxfp8": GroupShape(1, 32), "mxfp4": GroupShape(1, 32), "nvfp4": GroupShape(1, 16)}
    if w_dtype in fixed:
        return fixed[w_dtype]
    if w_dtype == "int4" or (w_dtype == "int8" and a_dtype is None):
        return GroupShape(1, block[1] if block else -1)
    if block is not None:
        return GroupShape(*block)
    return PER_CHANNEL if channel else PER_TENSOR
