"""Deliberate faults, each with the test file that must go red; `old` stands exactly once in its file."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One fault: replace `old` by `new` in `file`, then `killer` must fail."""

    name: str
    file: str
    old: str
    new: str
    killer: str


GEMM = "pymoe/ops/grouped_gemm/_numba.py"
DOTS = "pymoe/ops/grouped_gemm/_numba_dots.py"
UNITS = "pymoe/ops/grouped_gemm/_numba_units.py"
LANES = "pymoe/ops/grouped_gemm/_lanes.py"
CODES = "pymoe/ops/grouped_gemm/_numba_codes_ir.py"
TILES = "pymoe/ops/grouped_gemm/_numba_tiles.py"
PERMUTE = "pymoe/ops/permute/_numba.py"
UNPERMUTE = "pymoe/ops/unpermute/_numba.py"
RULES = "pymoe/ops/quantize/_rules.py"
WEIGHTS = "pymoe/codec/weights.py"
MODULAR = "pymoe/kernel/modular.py"
CHECKS = "pymoe/checks.py"
READER = "pymoe/checkpoint/safetensors.py"
ROUTE = "pymoe/ops/route/_numba.py"
TEST_GEMM = "tests/ops/test_grouped_gemm.py"
TEST_LEVELS = "tests/ops/test_gemm_instructions.py"
TEST_ROUTE = "tests/ops/test_route_backends.py"

MUTANTS = [
    # GEMM: tails, tiles, offsets
    Mutant("last tile of output features is skipped", UNITS, 'for feature in range(0, N, width):', 'for feature in range(0, N - N % width or N, width):', TEST_GEMM),
    Mutant("last row of a tile is skipped", DOTS, 'r = min(row0 + i, row1 - 1)', 'r = min(row0 + i, max(row1 - 2, row0))', TEST_GEMM),
    Mutant("rows after the first 256 are skipped", UNITS, 'for row in range(expert_offsets[e], expert_offsets[e + 1], ROWS):', 'for row in range(expert_offsets[e], min(expert_offsets[e + 1], expert_offsets[e] + ROWS), ROWS):', TEST_GEMM),
    Mutant("the tail of k is not multiplied", GEMM, 'padded = -(-group // step) * step', 'padded = max(group // step, 1) * step', TEST_GEMM),
    Mutant("gather is ignored", DOTS, 'row = task.rows + task.gather[r] * width', 'row = task.rows + r * width', TEST_GEMM),
    Mutant("int8 sums pass 2^24 in float32", GEMM, "EXACT_GROUP = 1024", "EXACT_GROUP = 1 << 20", TEST_GEMM),
    Mutant("high and low nibble are swapped", CODES, 'builder.and_(packed, mask), builder.lshr(packed, shift)', 'builder.lshr(packed, shift), builder.and_(packed, mask)', TEST_GEMM),
    Mutant("a word of two nibbles holds only the low one", CODES, 'builder.shl(both, _splat(_I32, 12))', 'builder.shl(both, _splat(_I32, 16))', TEST_LEVELS),
    Mutant("subnormals of e4m3 are read as normal numbers", CODES, 'builder.icmp_unsigned("<", magnitude, word(8))', 'builder.icmp_unsigned("<", magnitude, word(1))', TEST_LEVELS),
    Mutant("the end of a row of codes is left out", UNITS, '            if rest > 0:', '            if rest > LANES:', TEST_GEMM),
    Mutant("a block of features keeps the scale of its first", TILES, 'row, inside = row + 1, 0', 'inside = 0', TEST_LEVELS),
    Mutant("zero points of odd rows are those of even ones", UNITS, 'zero = np.float32((byte >> 4) if n & 1 else (byte & 15))', 'zero = np.float32(byte & 15)', TEST_GEMM),
    Mutant("the row's scale is left out", DOTS, 'factor = rows[gather[r] if rows.shape[0] > 1 else 0, 0]', 'factor = np.float32(1)', TEST_LEVELS),
    Mutant("a block's scale is that of the block before", DOTS, 'scale_at(scaling.scale, scaling.table, e, n // scaling.bn, part)', 'scale_at(scaling.scale, scaling.table, e, n // scaling.bn, max(part - 1, 0))', TEST_LEVELS),
    Mutant("lanes are added without the last two", LANES, 'other = [lane ^ half if not', 'other = [lane ^ (half - (half > 1)) if not', TEST_GEMM),
    Mutant("interleaved tensor scales are taken as halves", WEIGHTS, "xp.tile(scale, (1, N // 2)) if interleaved else", "xp.repeat(scale, N // 2, axis=1) if interleaved else", TEST_GEMM),
    Mutant("the bias is added once too often", DOTS, "value += bias[e, n]", "value += 2 * bias[e, n]", TEST_GEMM),
    # Permute, unpermute, reduce
    Mutant("ids are only checked from above", PERMUTE, "if ids[s] >= 0 and ids[s] < ids_end:", "if ids[s] < ids_end:", "tests/ops/test_permute.py"),
    Mutant("ids are only checked from below", PERMUTE, "if ids[s] >= 0 and ids[s] < ids_end:", "if ids[s] >= 0:", "tests/ops/test_permute.py"),
    Mutant("the expert map is ignored", PERMUTE, "local = expert_map[ids[s]] if mapped else ids[s]", "local = ids[s]", "tests/ops/test_permute.py"),
    Mutant("a dead slot adds weight times garbage", UNPERMUTE, "        if places[j] < 0:\n            continue\n", "", "tests/ops/test_unpermute.py"),
    Mutant("the sum skips the first slot", UNPERMUTE, "for j in range(len(places)):", "for j in range(1, len(places)):", "tests/ops/test_unpermute.py"),
    Mutant("bf16 rounds half up instead of to even", UNPERMUTE, "rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16", "rounded = (b + 0x8000) >> 16", "tests/ops/test_unpermute.py"),
    # Activation
    Mutant("sigmoid gets the wrong sign", "pymoe/ops/activation/_numba.py", "return g / (_ONE + _exp(minus_alpha * g))", "return g / (_ONE + _exp(-minus_alpha * g))", "tests/ops/test_activation.py"),
    # Quantize
    Mutant("fp8 scales divide by 240", RULES, "scale = np.maximum(amax / _448, TOKEN_FLOOR)", "scale = np.maximum(amax / np.float32(240), TOKEN_FLOOR)", "tests/ops/test_quantize.py"),
    Mutant("an all-zero group divides by zero", RULES, "scale = np.maximum(amax, TINY_AMAX) / _448", "scale = amax / _448", "tests/corpus/test_F_numerics.py"),
    Mutant("mx exponents are floored", RULES, "power = (bits >> 23) - exponent + ((bits & 0x7FFFFF) > threshold)", "power = (bits >> 23) - exponent", "tests/ops/test_quantize.py"),
    Mutant("e4m3 overflows to NaN", "pymoe/codec/fp8.py", "inside = np.clip(x, np.float32(-E4M3_MAX), np.float32(E4M3_MAX))", "inside = np.asarray(x, np.float32)", "tests/codec/test_fp8.py"),
    Mutant("padding enters a scale that all tokens share", "pymoe/prepare_finalize/single.py", 'quantize_activations(a1, quant_config, "a1", live=live)', 'quantize_activations(a1, quant_config, "a1")', "tests/experts/test_pairs.py"),
    # Route
    Mutant("NaN logits count as the largest", ROUTE, "(LARGEST if v > LARGEST else MINUS_INFINITY)", "LARGEST", TEST_ROUTE),
    Mutant("the largest logit is not subtracted", ROUTE, "powers[e] = _exp(np.float64(x[e]) - top)", "powers[e] = _exp(np.float64(x[e]))", TEST_ROUTE),
    Mutant("experts outside the kept groups may be chosen", "pymoe/ops/route/_numpy.py", "ids = np.lexsort((-choice, ~eligible), axis=-1)", "ids = np.lexsort((-choice,), axis=-1)", "tests/ops/test_route.py"),
    Mutant("a weight sum of zero divides", "pymoe/ops/route/_numpy.py", "w = np.where(total > 0, w / (total + rule.epsilon), 0.0)", "w = w / (total + rule.epsilon)", "tests/ops/test_route_robust.py"),
    # Kernel
    Mutant("the last chunk is dropped", MODULAR, "return -(-M // chunk), chunk", "return M // chunk, chunk", "tests/kernel/test_modular.py"),
    Mutant("workspace13 of a chunk is the output of all", MODULAR, "if M_chunk < M_full:", "if M_chunk < 0:", "tests/kernel/test_modular.py"),
    Mutant("finalize is skipped without rows", MODULAR, "            self.prepare_finalize.finalize(*arguments)\n", "            if len(fused_out):\n                self.prepare_finalize.finalize(*arguments)\n", "tests/kernel/test_modular.py"),
    Mutant("the receiver runs before the hook", MODULAR, "                if hook is not None:\n                    hook()\n                receiver()\n", "                receiver()\n                if hook is not None:\n                    hook()\n", "tests/kernel/test_modular.py"),
    Mutant("shared experts get the chunk's input too late", MODULAR, "shared_input = hidden_states if shared_experts_input is None else shared_experts_input", "shared_input = hidden_states", "tests/kernel/test_modular.py"),
    Mutant("h is not rounded to the hidden dtype", "pymoe/experts/routed.py", "dtype = np.dtype(np.float32 if key is not None else self.hidden_dtype)", "dtype = np.dtype(np.float32)", "tests/experts/test_pairs.py"),
    Mutant("router weights apply twice on the input", "pymoe/experts/standard.py", "topk_weights=None if apply_router_weight_on_input else topk_weights", "topk_weights=topk_weights", "tests/test_layer.py"),
    Mutant("unused rows of a slab keep what memory held", "pymoe/experts/naive_batched.py", "        output[...] = 0\n", "", "tests/experts/test_slabs.py"),
    # Layer and checks
    Mutant("shared and routed are rounded one by one", "pymoe/dense.py", "        routed += beside.astype(np.float32)\n        out[...] = routed.astype(dtype)\n", "        out[...] = routed.astype(dtype) + beside.astype(dtype)\n", "tests/test_layer.py"),
    Mutant("an output may overlap an input", CHECKS, 'raise ArgumentError(complaint(call, "out", f"not overlap {label}", "shared memory"))', "pass", "tests/test_layer.py"),
    Mutant("wide ids wrap into the range", CHECKS, "    legal = (topk_ids >= 0) & (topk_ids < global_num_experts)\n    if topk_ids.dtype", "    topk_ids = topk_ids.astype(np.int32)\n    legal = (topk_ids >= 0) & (topk_ids < global_num_experts)\n    if topk_ids.dtype", "tests/test_functional.py"),
    Mutant("the load counts dead slots", "pymoe/layer/router.py", "ids[local >= 0]", "np.maximum(ids, 0)[ids < num_experts]", "tests/test_layer.py"),
    Mutant("threads miss the last block", "pymoe/device/threads.py", "bounds = [min(units * i // blocks * grain, count) for i in range(blocks + 1)]", "bounds = [min(units * i // blocks * grain, count - 1) for i in range(blocks + 1)]", "tests/device/test_threads.py"),
    # Checkpoints
    Mutant("offsets may leave holes", READER, "if entry.start != at:", "if entry.start < at:", "tests/checkpoint/test_safetensors.py"),
    Mutant("up rows are gate rows", "pymoe/checkpoint/stored.py", "w1[self.I :] = self._tensors[self._names(1, e)]", "w1[self.I :] = self._tensors[self._names(0, e)]", "tests/checkpoint/test_mixtral.py"),
]  # fmt: skip
