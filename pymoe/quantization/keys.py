"""Keys: one value object for each way to quantize one operand, under vLLM's constant names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class GroupShape(NamedTuple):
    """Rows and columns that share one scale; -1 is the full extent."""

    row: int
    col: int


PER_TENSOR = GroupShape(-1, -1)
PER_TOKEN = GroupShape(1, -1)
PER_CHANNEL = GroupShape(-1, 1)


@dataclass(frozen=True)
class ScaleDesc:
    """Element type of a scale, whether it is given beforehand (static), and what shares one."""

    dtype: str
    static: bool
    group_shape: GroupShape


@dataclass(frozen=True)
class QuantKey:
    """One way to quantize one operand; compared by value.

    `dtype` is one of ``fp8`` (e4m3fn), ``int8``, ``uint8b128`` (stored + 128), ``uint8`` (with zero point), ``uint4b8``
    (stored + 8), ``uint4`` (with zero point) and ``fp4`` (e2m1); two 4-bit codes a byte, low nibble = even k.  The
    weights of `kTf32` are float32 without scales, rounded to TF32 where they are multiplied.
    """

    dtype: str
    scale: ScaleDesc
    scale2: ScaleDesc | None = None
    symmetric: bool = True

    @property
    def is_packed(self) -> bool:
        """Whether one byte holds two codes."""
        return self.dtype in ("fp4", "uint4b8", "uint4")

    @property
    def name(self) -> str:
        """The constant's name, such as ``kFp8DynamicTokenSym``; the representation for a key without one."""
        return next((name for name, key in (QUANT_KEYS | {"kTf32": kTf32}).items() if key == self), repr(self))


def make_key(dtype: str, scale: str, static: bool, shape: tuple[int, int], **kwargs: Any) -> QuantKey:
    """Return the key for codes `dtype` whose scales of dtype `scale` are shared by a group of `shape`."""
    return QuantKey(dtype, ScaleDesc(scale, static, GroupShape(*shape)), **kwargs)


_GLOBAL = ScaleDesc("float32", True, PER_TENSOR)

kFp8StaticTensorSym = make_key("fp8", "float32", True, PER_TENSOR)
kFp8DynamicTensorSym = make_key("fp8", "float32", False, PER_TENSOR)
kFp8DynamicTokenSym = make_key("fp8", "float32", False, PER_TOKEN)
kFp8StaticChannelSym = make_key("fp8", "float32", True, PER_CHANNEL)
kFp8Dynamic128Sym = make_key("fp8", "float32", False, (1, 128))
kFp8Dynamic128E8M0Sym = make_key("fp8", "e8m0", False, (1, 128))
kFp8Static128BlockSym = make_key("fp8", "float32", True, (128, 128))
kFp8Static128BlockE8M0Sym = make_key("fp8", "e8m0", True, (128, 128))
kInt8StaticTensorSym = make_key("int8", "float32", True, PER_TENSOR)
kInt8DynamicTensorSym = make_key("int8", "float32", False, PER_TENSOR)
kInt8DynamicTokenSym = make_key("int8", "float32", False, PER_TOKEN)
kInt8StaticChannelSym = make_key("int8", "float32", True, PER_CHANNEL)
kInt8Static128BlockSym = make_key("int8", "float32", True, (128, 128))
kInt8Dynamic128Sym = make_key("int8", "float32", False, (1, 128))
kInt8Static = make_key("uint8b128", "float32", True, (1, -1))
kInt8StaticAsym = make_key("uint8", "float32", True, (1, -1), symmetric=False)
kInt4Static = make_key("uint4b8", "float32", True, (1, -1))
kInt4StaticAsym = make_key("uint4", "float32", True, (1, -1), symmetric=False)
kMxfp8Static = make_key("fp8", "e8m0", True, (1, 32))
kMxfp8Dynamic = make_key("fp8", "e8m0", False, (1, 32))
kMxfp4Static = make_key("fp4", "e8m0", True, (1, 32))
kMxfp4Dynamic = make_key("fp4", "e8m0", False, (1, 32))
kNvfp4Static = make_key("fp4", "fp8", True, (1, 16), scale2=_GLOBAL)
kNvfp4Dynamic = make_key("fp4", "fp8", False, (1, 16), scale2=_GLOBAL)

QUANT_KEYS: dict[str, QuantKey] = {name: key for name, key in list(globals().items()) if isinstance(key, QuantKey)}

kTf32 = make_key("tf32", "float32", True, PER_TENSOR)
"""No quantization: it has no codes, so `QUANT_KEYS` does without it."""
