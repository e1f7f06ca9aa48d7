"""fused_experts, select_experts and fused_moe: arguments, ids, maps, odd arrays."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe import ArgumentError, DTypeError, ShapeError

E, N, K, TOPK, M = 4, 12, 10, 2, 6


def arguments(seed=0, **replaced):
    rng = np.random.default_rng(seed)
    given = {
        "hidden_states": rng.standard_normal((M, K), dtype=np.float32),
        "w1": rng.standard_normal((E, N, K), dtype=np.float32),
        "w2": rng.standard_normal((E, K, N // 2), dtype=np.float32),
        "topk_weights": rng.random((M, TOPK), dtype=np.float32),
        "topk_ids": rng.integers(0, E, (M, TOPK)),
    }
    return given | replaced


def run(**given):
    return pymoe.fused_experts(**given)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    "replaced, kind, text",
    [
        ({"hidden_states": ones(M, K, 1)}, ShapeError, "hidden_states must have shape (any, any); got (6, 10, 1)"),
        ({"hidden_states": ones(M, K, dtype=np.float64)}, DTypeError, "hidden_states must have dtype float32"),
        ({"hidden_states": ones(M, K, dtype=np.uint8)}, DTypeError, "hidden_states must have dtype"),
        ({"hidden_states": ones(M, K, dtype=np.complex64)}, DTypeError, "hidden_states must hold real numbers"),
        ({"hidden_states": ones(M, K, dtype=">f4")}, DTypeError, "hidden_states must be in native byte order"),
        (
            {"hidden_states": ones(M, K).tolist()},
            DTypeError,
            "hidden_states must be a NumPy, CuPy or DLPack array; got list",
        ),
        ({"hidden_states": np.ma.masked_array(ones(M, K))}, DTypeError, "hidden_states must be a plain array"),
        ({"hidden_states": ones(M, K + 1)}, ShapeError, "w1 must have 11 columns for K = 11; got (4, 12, 10)"),
        ({"hidden_states": ones(M, 0)}, ShapeError, "hidden_states must have at least one column"),
        ({"hidden_states": ones(M + 1, K)}, ShapeError, "topk_ids must have shape (7, any); got (6, 2)"),
        ({"w1": ones(E, N, K, dtype=np.float64)}, DTypeError, "w1 must have dtype float32 or float16 or bfloat16"),
        ({"w1": ones(E, N, K, dtype=np.uint8)}, DTypeError, "for unquantized weights; got uint8"),
        ({"w1": ones(E, N, K, dtype=np.float16)}, DTypeError, "w2 must have the dtype of w1, float16; got float32"),
        ({"w1": ones(N, K)}, ShapeError, "w1 must have shape (any, any, any); got (12, 10)"),
        ({"w1": ones(E, N + 1, K)}, ShapeError, "w1 must have an even number of rows for a gated activation"),
        ({"w1": ones(E, 0, K), "w2": ones(E, K, 0)}, ShapeError, "w1 must have at least one row"),
        ({"w1": ones(E, N, K, dtype=ml_dtypes.int4)}, DTypeError, "w1 must pack narrow codes in uint8; got int4"),
        ({"w2": ones(E, K, N)}, ShapeError, "w2 must have shape (4, 10, 6); got (4, 10, 12)"),
        ({"w2": ones(E + 1, K, N // 2)}, ShapeError, "w2 must have shape (4, 10, 6)"),
        ({"topk_ids": ones(M, TOPK)}, DTypeError, "topk_ids must have an integer dtype; got float32"),
        ({"topk_ids": ones(M, TOPK, dtype=bool)}, DTypeError, "topk_ids must have an integer dtype; got bool"),
        ({"topk_ids": ones(M, 0, dtype=int)}, ShapeError, "topk_ids must have at least one column"),
        ({"topk_ids": ones(M, dtype=int)}, ShapeError, "topk_ids must have shape (6, any); got (6,)"),
        ({"topk_weights": ones(M, TOPK, dtype=int)}, DTypeError, "topk_weights must have a floating dtype"),
        ({"topk_weights": ones(M, TOPK + 1)}, ShapeError, "topk_weights must have shape (6, 2); got (6, 3)"),
        ({"activation": "nope"}, ArgumentError, "activation must be one of silu"),
        ({"activation": None}, DTypeError, "activation must be a MoEActivation"),
        ({"quant_config": {}}, DTypeError, "quant_config must be a FusedMoEQuantConfig or None; got dict"),
        ({"global_num_experts": 5}, ArgumentError, "global_num_experts must be -1 or w1's 4 experts"),
        ({"global_num_experts": 0}, ArgumentError, "global_num_experts must be -1 or at least 1; got 0"),
        ({"global_num_experts": 4.0}, DTypeError, "global_num_experts must be an integer; got 4.0"),
        (
            {"expert_map": np.array([0, 1, 2, 4])},
            ArgumentError,
            "expert_map must hold -1 or local ids in 0..3; got 4 at 3",
        ),
        ({"expert_map": np.array([0, -2])}, ArgumentError, "expert_map must hold -1 or local ids in 0..3; got -2 at 1"),
        ({"expert_map": ones(4)}, DTypeError, "expert_map must have an integer dtype"),
        ({"expert_map": ones(4, 1, dtype=int)}, ShapeError, "expert_map must have shape (any)"),
        (
            {"expert_map": np.array([0, 1, 2, 3]), "global_num_experts": 5},
            ArgumentError,
            "global_num_experts must be -1 or the length of expert_map, 4; got 5",
        ),
        ({"apply_router_weight_on_input": True}, ArgumentError, "must be False unless topk is 1; got True with topk 2"),
        ({"out": ones(M, K, dtype=np.float16)}, DTypeError, "out must have the dtype of hidden_states, float32"),
        ({"out": ones(M - 1, K)}, ShapeError, "out must have shape (6, 10); got (5, 10)"),
        ({"out": np.broadcast_to(ones(1, K), (M, K))}, ArgumentError, "out must be writeable"),
    ],
)
def test_errors_name_argument_value_and_rule(replaced, kind, text):
    with pytest.raises(kind) as caught:
        run(**arguments(**replaced))
    assert str(caught.value).startswith("fused_experts: ") and text in str(caught.value)


def test_a_producer_that_cannot_export_is_refused_by_name():
    class Tracer:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **options):
            raise RuntimeError("traced")

    with pytest.raises(DTypeError, match=r"hidden_states must be a concrete, dense array .*Tracer \(.*traced"):
        run(**arguments(hidden_states=Tracer()))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_every_integer_dtype_of_ids(dtype):
    given = arguments()
    np.testing.assert_array_equal(run(**given), run(**given | {"topk_ids": given["topk_ids"].astype(dtype)}))


@pytest.mark.parametrize(
    "bad, dtype",
    [(-1, np.int32), (-7, np.int64), (E, np.int32), (2**32, np.int64), (2**32 + 1, np.uint64), (2**63, np.uint64),
     (255, np.uint8)],
)  # fmt: skip
def test_ids_outside_the_range_contribute_exactly_nothing(bad, dtype):
    given = arguments()
    ids = given["topk_ids"].astype(dtype)
    ids[:, 1] = bad
    ids[0, 0] = bad
    given["topk_weights"][:, 1] = np.nan  # the weight of a slot without a row is never read
    given["topk_weights"][0, 0] = np.inf
    y = run(**given | {"topk_ids": ids})
    assert not y[0].any() and np.isfinite(y).all()
    alone = given | {"topk_ids": ids[:, :1], "topk_weights": given["topk_weights"][:, :1]}
    np.testing.assert_array_equal(y, run(**alone))


def test_checked_mode_names_row_slot_and_id():
    given = arguments()
    given["topk_ids"][3, 1] = 17
    given["topk_ids"][2, 0] = -1
    before = pymoe.checked(True)
    try:
        with pytest.raises(ArgumentError, match=r"topk_ids must be -1 or in 0\.\.3; got 17 at row 3, slot 1"):
            run(**given)
    finally:
        pymoe.checked(before)
    run(**given)


def test_odd_layouts_are_the_same_numbers():
    given = arguments()
    expected = run(**given)
    x = given["hidden_states"]
    wide = np.zeros((2 * M, 3 * K), np.float32)
    wide[::2, ::3] = x
    layouts = {
        "hidden_states": [wide[::2, ::3], np.asfortranarray(x), x[::-1].copy()[::-1]],
        "w1": [np.asfortranarray(given["w1"]), given["w1"][::-1].copy()[::-1]],
        "w2": [np.ascontiguousarray(given["w2"].swapaxes(1, 2)).swapaxes(1, 2)],
        "topk_weights": [np.asfortranarray(given["topk_weights"]), given["topk_weights"].astype(np.float64)],
        "topk_ids": [np.asfortranarray(given["topk_ids"])],
    }
    for name, variants in layouts.items():
        for variant in variants:
            readonly = variant.view()
            readonly.flags.writeable = False
            np.testing.assert_array_equal(run(**given | {name: readonly}), expected, err_msg=name)


def test_strided_out_is_written_in_place():
    given = arguments()
    big = np.full((M, 2 * K), 7, np.float32)
    assert run(**given, out=big[:, ::2]).base is not None
    np.testing.assert_array_equal(big[:, ::2], run(**given))
    assert (big[:, 1::2] == 7).all()


@pytest.mark.parametrize("name", ["hidden_states", "w1", "w2", "topk_weights", "topk_ids"])
def test_inputs_are_never_written(name):
    given = arguments()
    copies = {key: value.copy() for key, value in given.items()}
    y = run(**given)
    np.testing.assert_array_equal(given[name], copies[name])
    assert not np.shares_memory(y, given[name])


def test_no_tokens_and_no_local_experts():
    assert run(
        **arguments(hidden_states=ones(0, K), topk_weights=ones(0, 2), topk_ids=ones(0, 2, dtype=int))
    ).shape == (0, K)
    nobody = arguments(w1=ones(0, N, K), w2=ones(0, K, N // 2), expert_map=np.full(E, -1))
    assert not run(**nobody).any()


def test_fused_moe_is_select_experts_then_fused_experts():
    given = arguments()
    logits = np.random.default_rng(4).standard_normal((M, E)).astype(np.float32)
    flags = {"scoring_func": "sigmoid", "renormalize": False, "routed_scaling_factor": 2.5}
    weights, ids = pymoe.select_experts(logits, 3, **flags)
    x, w1, w2 = (given[name] for name in ("hidden_states", "w1", "w2"))
    y = pymoe.fused_moe(x, w1, w2, logits, 3, **flags)
    np.testing.assert_array_equal(y, pymoe.fused_experts(x, w1, w2, weights, ids))


@pytest.mark.parametrize(
    "replaced, kind, text",
    [
        ({"router_logits": ones(M, E + 1)}, ShapeError, "router_logits must have shape (6, 4); got (6, 5)"),
        ({"topk": 5}, ArgumentError, "topk"),
        ({"topk": 0}, ArgumentError, "topk must be at least 1"),
        ({"w2": ones(E, K, N)}, ShapeError, "fused_moe: w2 must have shape"),
        ({"topk": 2, "apply_router_weight_on_input": True}, ArgumentError, "must be False unless topk is 1"),
        ({"routing_method": "Sigmoid", "scoring_func": "sqrtsoftplus"}, ArgumentError, "scoring_func must be sigmoid"),
    ],
)
def test_fused_moe_errors(replaced, kind, text):
    given = arguments()
    call = {name: given[name] for name in ("hidden_states", "w1", "w2")} | {"router_logits": ones(M, E), "topk": 2}
    with pytest.raises(kind) as caught:
        pymoe.fused_moe(**call | replaced)
    assert text in str(caught.value)


def test_every_public_name_of_the_package_exists():
    assert [name for name in pymoe.__all__ if not hasattr(pymoe, name)] == []


def test_numpy_error_state_is_unchanged_and_nothing_warns():
    given = arguments()
    given["hidden_states"][0] = [np.nan, np.inf, -np.inf, 3e38, 1e-45, 0, -0.0, 1, 1, 1]
    before = np.geterr()
    with np.errstate(all="raise"):
        y = run(**given)
        assert np.geterr()["over"] == "raise"
    assert np.geterr() == before
    np.testing.assert_array_equal(y[1:], run(**arguments())[1:])
    assert np.isnan(y[0]).all()
