"""How the routed experts of a layer lie on disk: their tensors' names say which of these it is, never their shapes.

Every header is checked when one of these is made; memory is taken and pages of the files are touched by `read` and
`copy` alone, and only those of the experts that are asked for.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pymoe.checkpoint.fields import FLOATS, expect
from pymoe.checkpoint.fp8_blocks import SCALE, ScaleForm, check_blocks, decoded, row_block, spread_rows
from pymoe.checkpoint.safetensors import SafetensorsFolder, fail
from pymoe.ops.quantize import dequantize
from pymoe.quantization import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig

Array = Any
Names = Callable[[int, int], str]
"""``names(part, expert)`` is a tensor: part 0 is the gate projection, 1 up, 2 down."""

GROUP = 32
"""Weights that share an mx scale; 16 bytes of two codes."""


class StoredExperts(abc.ABC):
    """Routed experts of one layer.

    Attributes
    ----------
    K, I : int
    dtype : dtype
        Of the numbers that `copy` writes without rounding them.
    scheme : str
        What the weights are stored in, for people.
    nbytes : int
        Of all experts, with their scales.
    """

    K: int
    I: int  # noqa: E741  the project's symbol
    dtype: np.dtype
    scheme: str
    nbytes: int

    @abc.abstractmethod
    def copy(self, e: int, w1: Array, w2: Array) -> None:
        """Write the numbers of expert `e` into w1 (2 I, K) and w2 (K, I), cast to their dtype."""

    def read(self, chosen: Sequence[int], target: np.dtype) -> tuple[Array, Array, FusedMoEQuantConfig]:
        """Return (w1, w2, quant_config) of the chosen experts: codes as they are, floats cast to `target`."""
        w1 = np.empty((len(chosen), 2 * self.I, self.K), target)
        w2 = np.empty((len(chosen), self.K, self.I), target)
        for local, e in enumerate(chosen):
            self.copy(e, w1[local], w2[local])
        return w1, w2, FUSED_MOE_UNQUANTIZED_CONFIG


class SeparateFloats(StoredExperts):
    """Three matrices an expert: gate and up (I, K), down (K, I)."""

    dtypes: tuple[str, ...] = FLOATS

    def __init__(self, tensors: SafetensorsFolder, names: Names, K: int, E: int, checked: Sequence[int]) -> None:
        self._tensors, self._names = tensors, names
        first = names(0, next(iter(checked), 0))
        self.I, self.K = expect(tensors, first, (None, K), self.dtypes)
        self.dtype = tensors.dtype(first)
        self.scheme = self.dtype.name
        for e in checked:
            for part, shape in enumerate(((self.I, K), (self.I, K), (K, self.I))):
                expect(tensors, names(part, e), shape, (self.dtype.name,))
        self.nbytes = 3 * E * K * self.I * self.dtype.itemsize

    def copy(self, e: int, w1: Array, w2: Array) -> None:
        w1[: self.I] = self._tensors[self._names(0, e)]
        w1[self.I :] = self._tensors[self._names(1, e)]
        w2[...] = self._tensors[self._names(2, e)]


class SeparateFp8(SeparateFloats):
    """Three matrices an expert in e4m3, each with a scale for every block of 128 by 128."""

    dtypes = ("float8_e4m3fn",)

    def __init__(
        self,
        tensors: SafetensorsFolder,
        names: Names,
        K: int,
        E: int,
        checked: Sequence[int],
        form: ScaleForm,
    ) -> None:
        super().__init__(tensors, names, K, E, checked)
        self._form = form
        for e in checked:
            for part in range(3):
                check_blocks(tensors, names(part, e))
        self.dtype, self.scheme = np.dtype(np.float32), f"fp8 blocks{', e8m0 scales' if form.is_e8m0 else ''}"
        if len(checked) > 0:
            self.nbytes += E * sum(tensors.nbytes(names(part, checked[0]) + SCALE) for part in range(3))

    def copy(self, e: int, w1: Array, w2: Array) -> None:
        w1[: self.I] = decoded(self._tensors, self._names(0, e))
        w1[self.I :] = decoded(self._tensors, self._names(1, e))
        w2[...] = decoded(self._tensors, self._names(2, e))

    def read(self, chosen: Sequence[int], target: np.dtype) -> tuple[Array, Array, FusedMoEQuantConfig]:
        w1 = np.empty((len(chosen), 2 * self.I, self.K), np.uint8)
        w2 = np.empty((len(chosen), self.K, self.I), np.uint8)
        # A block of w1 must not hold rows of both gate and up: where I is no multiple of 128, blocks are cut.
        rows = row_block(self.I)
        blocks = [(2 * self.I // rows, self.K), (-(-self.K // rows), self.I)]
        scales = [np.empty((len(chosen), n, -(-columns // 128)), self._form.dtype) for n, columns in blocks]
        half = self.I // rows
        for local, e in enumerate(chosen):
            gate, up, down = (self._tensors[self._names(part, e)].view(np.uint8) for part in range(3))
            w1[local, : self.I], w1[local, self.I :], w2[local] = gate, up, down
            gate, up, down = (self._form.read(self._tensors, self._names(part, e) + SCALE) for part in range(3))
            scales[0][local, :half], scales[0][local, half:] = (spread_rows(s, rows, half) for s in (gate, up))
            scales[1][local] = spread_rows(down, rows, blocks[1][0])
        config = FusedMoEQuantConfig.fp8_w8a8(w1_scale=scales[0], w2_scale=scales[1], block_shape=(rows, 128))
        return w1, w2, config


class FusedFloats(StoredExperts):
    """All experts of a projection in one tensor: (E, 2 I, K) and (E, K, I), or with the last two axes transposed.

    `rows` is the order to put the rows of w1 in; None leaves them.
    """

    def __init__(
        self,
        tensors: SafetensorsFolder,
        names: Sequence[str],
        size: tuple[int, int],
        transposed: bool,
        rows: Any = None,
    ) -> None:
        E, self.K = size
        self._tensors, self._names, self._transposed, self._rows = tensors, names, transposed, rows
        shape = (E, self.K, None) if transposed else (E, None, self.K)
        N = max(expect(tensors, names[0], shape, FLOATS)[1 + transposed], 1)
        self.dtype = tensors.dtype(names[0])
        if N % 2:
            raise fail(tensors.folder, f"hold {names[0]} with gate and up of one width", (E, N, self.K))
        self.I = N // 2
        down = (E, self.I, self.K) if transposed else (E, self.K, self.I)
        expect(tensors, names[1], down, (self.dtype.name,))
        self.scheme = self.dtype.name
        self.nbytes = sum(tensors.nbytes(name) for name in names)

    def copy(self, e: int, w1: Array, w2: Array) -> None:
        gate_up, down = (self._tensors[name][e] for name in self._names)
        gate_up, down = (gate_up.T, down.T) if self._transposed else (gate_up, down)
        w1[...] = gate_up if self._rows is None else gate_up[self._rows]
        w2[...] = down


class PackedMxfp4(StoredExperts):
    """Blocks (E, rows, columns / 32, 16) of two codes a byte, low nibble first, with e8m0 scales beside them."""

    scheme = "mxfp4"
    dtype = np.dtype(np.float32)

    def __init__(
        self, tensors: SafetensorsFolder, names: Sequence[str], size: tuple[int, int], N: int, rows: Any = None
    ) -> None:
        E, self.K = size
        self.I = N // 2
        self._tensors, self._names, self._rows = tensors, names, rows
        self.nbytes = 0
        for name, height, columns in ((names[0], N, self.K), (names[1], self.K, self.I)):
            if columns % GROUP or N % 2:
                raise fail(tensors.folder, f"hold {name} of a multiple of {GROUP} columns", (E, height, columns))
            shape = (E, height, columns // GROUP)
            expect(tensors, f"{name}_blocks", (*shape, GROUP // 2), ("uint8",))
            expect(tensors, f"{name}_scales", shape, ("uint8", "float8_e8m0fnu"))
            self.nbytes += tensors.nbytes(f"{name}_blocks") + tensors.nbytes(f"{name}_scales")

    def copy(self, e: int, w1: Array, w2: Array) -> None:
        for part, w in enumerate((w1, w2)):
            codes, scales = self._codes(part, e)
            w[...] = dequantize(codes, scales, "kMxfp4Static")

    def read(self, chosen: Sequence[int], target: np.dtype) -> tuple[Array, Array, FusedMoEQuantConfig]:
        arrays = []
        for part, (rows, columns) in enumerate(((2 * self.I, self.K), (self.K, self.I))):
            codes = np.empty((len(chosen), rows, columns // 2), np.uint8)
            scales = np.empty((len(chosen), rows, columns // GROUP), np.uint8)
            for local, e in enumerate(chosen):
                codes[local], scales[local] = self._codes(part, e)
            arrays.append((codes, scales))
        (w1, w1_scale), (w2, w2_scale) = arrays
        return w1, w2, FusedMoEQuantConfig.mxfp4_w4a16(w1_scale=w1_scale, w2_scale=w2_scale)

    def _codes(self, part: int, e: int) -> tuple[Array, Array]:
        """Return (rows, columns / 2) bytes, whose nibble order is pymoe's own, and (rows, columns / 32) scales."""
        blocks = self._tensors[f"{self._names[part]}_blocks"][e]
        scales = self._tensors[f"{self._names[part]}_scales"][e].view(np.uint8)
        codes = blocks.reshape(blocks.shape[0], -1)
        return (codes, scales) if part or self._rows is None else (codes[self._rows], scales[self._rows])
