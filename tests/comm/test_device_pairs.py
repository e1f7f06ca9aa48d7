"""Pairs over virtual ranks whose arrays count as a device's: kernels that g++ compiled, copies that come late.

What is sent, where it lands and what the experts make of it is the code that runs with CuPy; only launches, copies and
messages are others'.
"""

from __future__ import annotations

import contextlib
import threading
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe import CudaBatchedExperts, CudaGroupedExperts
from pymoe.comm import Ranks
from pymoe.comm.group import Group
from pymoe.comm.placement import Placement
from pymoe.comm.sim import SimComm
from pymoe.comm.transports.staging import StagedTransport
from pymoe.device.launch import LaunchPlan
from pymoe.prepare_finalize import (
    AllGatherPrepareAndFinalize,
    BatchedEpPrepareAndFinalize,
    StandardEpPrepareAndFinalize,
    batched_ep,
    ep,
    exchange,
    standard_ep,
)
from tests.comm.late_copies import LateCopies
from tests.emulator import emulator
from tests.mpi.problems import problem
from tests.ops.devices import emulation

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(not emulator.AVAILABLE, reason="g++ is not installed"),
]
BF16 = np.dtype(ml_dtypes.bfloat16)
ROOM = 24
_one_at_a_time = threading.Lock()
"""Emulated blocks have one shared memory for all threads of this process."""


class PromptCopies(LateCopies):
    """The user's stream reads at once what it has waited for."""

    def lead(self):
        super().lead()
        self.user_stream(self.led)


def locked(plan, *args):
    with _one_at_a_time:
        emulator.emulated(plan, *args)


@contextlib.contextmanager
def devices(R):
    """Within it NumPy arrays count as a device's, one a rank."""
    staged = {}

    def transport_for(group, rows):
        if group.rank not in staged:
            staged[group.rank] = StagedTransport(group.transport, PromptCopies(), owned=False)
        return staged[group.rank]

    is_array = lambda x: isinstance(x, np.ndarray)  # noqa: E731
    with emulation(), contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(LaunchPlan, "__call__", locked))
        patches.enter_context(mock.patch.object(Group, "transport_for", transport_for))
        for module in (ep, exchange, standard_ep, batched_ep):
            patches.enter_context(mock.patch.object(module, "is_cuda", is_array))
        yield
    assert len(staged) == R


def run(p, kind, late):
    """Return what each rank's kernel answers."""
    R, topk, K = len(p.x), p.ids[0].shape[1], p.w2.shape[1]
    placement = Placement.from_ids("test", p.owned, p.num_experts)

    def program(group):
        w1, w2, config = p.experts(group.rank)
        config = pymoe.FusedMoEQuantConfig() if config is None else config
        if p.config is not None:
            config = pymoe.checks.quant_config("test", config, w1, w1.shape[1], K, w1.shape[1] // 2)
        sizes = pymoe.FusedMoEConfig(
            p.num_experts, topk, K, p.w1.shape[1] // 2, len(w1), in_dtype=p.x[0].dtype, device="cuda"
        )
        members = Ranks(group, placement, 0)
        if kind == "batched":
            pair = BatchedEpPrepareAndFinalize(members, ROOM, asynchronous=late)
            experts = CudaBatchedExperts(sizes, config, ROOM, R)
        else:
            pairs = {"standard": StandardEpPrepareAndFinalize, "allgather": AllGatherPrepareAndFinalize}
            pair, experts = pairs[kind](members, asynchronous=late), CudaGroupedExperts(sizes, config)
        kernel = pymoe.FusedMoEKernel(pair, experts)
        answers = []
        for _ in range(2):
            with group.guard("test"):
                answers.append(
                    kernel.impl.apply(p.x[group.rank], w1, w2, p.ids[group.rank].astype(np.int32),
                                      p.weights[group.rank], sizes.activation, p.num_experts)
                )  # fmt: skip
        np.testing.assert_array_equal(answers[0].view(np.uint8), answers[1].view(np.uint8))
        return answers[0]

    comm = SimComm(R)
    with devices(R):
        return comm.run(program)


@pytest.mark.parametrize("kind", ["standard", "allgather", "batched"])
@pytest.mark.parametrize(
    "case",
    [
        {"dtype": BF16, "topk": 3, "E": 7},
        {"dtype": np.dtype("float32"), "routing": "holes", "E": 5, "topk": 4},
        {"dtype": BF16, "routing": "duplicate", "E": 2},
        {"dtype": BF16, "tokens": "none"},
        {"dtype": BF16, "routing": "dead", "tokens": "last"},
    ],
    ids=["uneven", "holes", "more ranks than experts", "no tokens", "nobody's"],
)
def test_exact_data_give_the_bits_of_one_process(kind, case):
    R = 3
    p = problem(R, exact=True, **case)
    expected = p.one_process(rank_order=False)
    for late in (False, True):
        for y, due in zip(run(p, kind, late), expected, strict=True):
            np.testing.assert_array_equal(y.view(np.uint8), due.view(np.uint8))


@pytest.mark.parametrize("kind", ["standard", "batched"])
@pytest.mark.parametrize("scheme", ["fp8_w8a8_block", "fp8_w8a8", "fp8_w8a8_tensor", "fp8_static", "int8_w8a8"])
def test_codes_travel_with_their_scales(kind, scheme):
    p = problem(2, E=6, topk=2, dtype=BF16, scheme=scheme)
    expected = np.concatenate(p.one_process(rank_order=kind != "batched")).astype(np.float64)
    y = np.concatenate(run(p, kind, False)).astype(np.float64)
    assert np.abs(y - expected).max() <= 3e-2 * np.abs(expected).max()
