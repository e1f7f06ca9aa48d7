"""CuPy arrays in and out of layers and pairs over the ranks: argv is the transport.

Ranks share the GPUs there are.  What a rank answers is compared, bit for bit, with the declared sum that one process
makes on the same GPU.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from unittest import mock

import cupy
import ml_dtypes
import numpy as np
from mpi4py import MPI

import pymoe
from pymoe.comm import agree, connecting, place
from pymoe.comm.transports import host
from pymoe.comm.transports.host import HostTransport
from pymoe.comm.transports.staging import StagedTransport
from tests.cuda.transfer import to_device
from tests.mpi.problems import cut, problem

comm = MPI.COMM_WORLD
rank, ranks = comm.Get_rank(), comm.Get_size()
cupy.cuda.Device(rank % cupy.cuda.runtime.getDeviceCount()).use()
transport = sys.argv[1]
NODE_SIZE = int(os.environ.get("PYMOE_NODE_SIZE", "1")) if transport == "hier" else 1
BF16 = np.dtype(ml_dtypes.bfloat16)
ODD = 1


def raw(y):
    """Return the bytes of a result."""
    assert isinstance(y, cupy.ndarray) and y.device.id == cupy.cuda.runtime.getDevice()
    return np.ascontiguousarray(y.get()).view(np.uint8)


def pair_of(p, owned, number, ids, dtype, device="cuda"):
    """Return an expert's kernel for the experts `owned` alone, and its weights on the GPU."""
    w1, w2 = p.w1[owned], p.w2[owned]
    config = pymoe.FusedMoEQuantConfig() if p.config is None else cut(p.config, owned)
    config = to_device(pymoe.checks.quant_config("test", config, w1, w1.shape[1], w2.shape[1], w1.shape[1] // 2))
    sizes = pymoe.FusedMoEConfig(number, ids.shape[1], w2.shape[1], w1.shape[1] // 2, len(owned), in_dtype=dtype,
                                 device=device)  # fmt: skip
    kernel = pymoe.FusedMoEKernel(pymoe.SingleProcessPrepareAndFinalize(), pymoe.CudaGroupedExperts(sizes, config))
    return kernel, to_device(w1), to_device(w2)


def declared(p):
    """Return this rank's rows of the sum over ranks that one process makes on this GPU, float32, rounded once."""
    x, ids, weights = (np.concatenate(part) for part in (p.x, p.ids, p.weights))
    parts = []
    for owned in p.owned:
        if not len(owned):
            parts.append(np.zeros(x.shape, np.float32))
            continue
        mapping = np.full(p.num_experts, -1, np.int32)
        mapping[owned] = np.arange(len(owned))
        kernel, w1, w2 = pair_of(p, np.asarray(owned), p.num_experts, ids, x.dtype)
        y = kernel.apply_as(
            "test", to_device(x), w1, w2, topk_weights=to_device(weights), topk_ids=to_device(ids), activation="silu",
            global_num_experts=p.num_experts, expert_map=to_device(mapping), apply_router_weight_on_input=False,
            out_dtype=np.float32,
        )  # fmt: skip
        parts.append(y.get())
    y = p.add(parts).astype(x.dtype)
    return np.split(y, np.cumsum([len(part) for part in p.x])[:-1])[rank]


def mine(p):
    """Return (x, weights, ids) and (w1, w2, quant_config) of this rank on its GPU."""
    w1, w2, config = p.experts(rank)
    call = tuple(to_device(part[rank]) for part in (p.x, p.weights, p.ids))
    return call, (to_device(w1), to_device(w2), None if config is None else to_device(config))


LAYERS = (
    {"dtype": BF16},
    {"dtype": np.dtype("float32"), "E": 10, "topk": 3, "routing": "holes"},
    {"dtype": np.dtype("float16"), "tokens": "last"},
    {"dtype": BF16, "tokens": "none"},
    {"dtype": BF16, "E": 1, "topk": 1},
    {"dtype": BF16, "routing": "dead", "topk": 3},
    {"dtype": BF16, "routing": "one rank", "tokens": "many"},
    {"dtype": BF16, "scheme": "fp8_w8a8_block", "tokens": "many"},
    {"dtype": BF16, "scheme": "fp8_w8a8"},
    {"dtype": BF16, "scheme": "fp8_w8a8_tensor"},
    {"dtype": BF16, "scheme": "fp8_static"},
    {"dtype": BF16, "scheme": "mxfp8"},
    {"dtype": BF16, "scheme": "int4_w4a16"},
)


def run_layer(case, seed):
    """Return what is wrong with a layer's rows, on the default stream and late on another one."""
    p = problem(ranks, seed=seed, **case)
    p.node_size = NODE_SIZE
    (x, weights, ids), (w1, w2, config) = mine(p)
    due = np.ascontiguousarray(declared(p)).view(np.uint8)
    wrong = []
    with pymoe.MoELayer(w1, w2, topk=ids.shape[1], num_experts=p.num_experts, quant_config=config, comm=comm,
                        transport=transport) as layer:  # fmt: skip
        for _ in range(3):
            y = layer(x, topk_weights=weights, topk_ids=ids)
            wrong += [] if np.array_equal(raw(y), due) else ["bits differ"]
        with cupy.cuda.Stream(non_blocking=True) as stream:
            late, out = cupy.zeros_like(x), cupy.full_like(x, 7)
            busy(stream)
            late[...] = x  # only this stream knows when
            layer(late, topk_weights=weights, topk_ids=ids, out=out)
            late[...] = 3  # and what was read must have been read by then
            stream.synchronize()
        wrong += [] if np.array_equal(raw(out), due) else ["bits differ on another stream"]
        everyone = np.concatenate([part.reshape(-1) for part in p.ids])
        load = np.bincount(everyone[(everyone >= 0) & (everyone < p.num_experts)], minlength=p.num_experts)
        here = np.zeros_like(load)
        here[p.owned[rank]] = load[p.owned[rank]]
        wrong += [] if np.array_equal(layer.last_load, here) else [f"load {layer.last_load} is not {here}"]
    return "; ".join(wrong)


def busy(stream):
    """Keep a stream busy for a few milliseconds."""
    a = cupy.ones((2048, 2048), np.float32)
    for _ in range(8):
        a = a @ a * np.float32(1e-6)


def run_format(kind, late, case, seed):
    """Return what is wrong with a kernel built by hand."""
    p = problem(ranks, seed=seed, **case)
    p.node_size = NODE_SIZE
    (x, weights, ids), (w1, w2, config) = mine(p)
    config = pymoe.FusedMoEQuantConfig() if config is None else config
    formats = pymoe.FusedMoEActivationFormat
    batched, monolithic = kind == "batched", kind == "monolithic"
    backend = "standard" if kind == "standard" else "allgather_reducescatter"
    sizes = pymoe.FusedMoEConfig(
        p.num_experts, ids.shape[1], x.shape[1], p.w1.shape[1] // 2, len(w1), in_dtype=x.dtype, device="cuda",
        max_num_tokens=24, routing=pymoe.RoutingConfig(ids.shape[1]) if monolithic else None,
        moe_parallel_config=pymoe.FusedMoEParallelConfig.make_expert_parallel(ranks, rank, backend),
    )  # fmt: skip
    with connecting("test", comm, transport, keep=False) as group:
        members = place("test", group, p.owned[rank], p.num_experts, len(w1))
        agree("test", members, {}, {})
        group.users += 1
    try:
        chosen = pymoe.select(sizes, config, ranks=members, monolithic=monolithic,
                              activation_format=formats.BatchedExperts if batched else formats.Standard)  # fmt: skip
        if not monolithic:
            chosen.prepare_finalize._asynchronous = late
        kernel = pymoe.FusedMoEKernel(chosen.prepare_finalize, chosen.experts)
        if monolithic:
            logits = np.random.default_rng([seed, rank]).standard_normal((len(x), p.num_experts)).astype(np.float32)
            y = kernel.apply_monolithic(x, w1, w2, router_logits=to_device(logits), global_num_experts=p.num_experts,
                                        expert_map=to_device(members.expert_map))  # fmt: skip
            weights, ids = pymoe.select_experts(to_device(logits), p.ids[0].shape[1])
            alone = pymoe.fused_experts(x, to_device(p.w1), to_device(p.w2), weights, ids).get().astype(np.float64)
            off = np.abs(y.get().astype(np.float64) - alone).max(initial=0)
            return "" if off <= 2e-2 * np.abs(alone).max(initial=0) else f"off by {off}"
        y = kernel.apply(x, w1, w2, topk_weights=weights, topk_ids=ids, global_num_experts=p.num_experts,
                         expert_map=to_device(members.expert_map))  # fmt: skip
        due = p.one_process(rank_order=False)[rank] if case.get("exact") else declared(p)
        return "" if np.array_equal(raw(y), np.ascontiguousarray(due).view(np.uint8)) else "bits differ"
    finally:
        members.close("test")


FORMATS = [
    (kind, late, case)
    for kind in ("standard", "allgather", "batched")
    for late in (False, True)
    for case in (
        {"exact": True, "dtype": BF16, "topk": 3, "E": 7},
        {"exact": True, "routing": "duplicate", "E": 2},
        {"exact": True, "dtype": BF16, "tokens": "none"},
    )  # fmt: skip
] + [("monolithic", False, {"dtype": BF16}), ("monolithic", False, {"dtype": np.dtype("float32"), "tokens": "first"})]


def disagreements():
    """Return what is wrong with the errors of ranks that disagree."""
    p = problem(ranks, tokens="random", seed=3)
    (x, weights, ids), (w1, w2, _) = mine(p)
    options = {"topk": 2, "num_experts": p.num_experts, "comm": comm, "transport": transport}
    layer = pymoe.MoELayer(w1, w2, **options)
    good = {"hidden_states": x, "topk_weights": weights, "topk_ids": ids}

    def call(**changes):
        return layer(**(good | (changes if rank == ODD else {})))

    def build():
        if rank == ODD:
            return pymoe.MoELayer(w1.get(), w2.get(), **options)
        return pymoe.MoELayer(w1, w2, **options)

    wrong = []
    for action, text in (
        (functools.partial(call, hidden_states=x.get()), "hidden_states must be on the device of w1"),
        (functools.partial(call, hidden_states=x.astype(np.float16)), "dtype must be the same on all ranks"),
        (functools.partial(call, topk_ids=ids.get()), "topk_ids"),
        (functools.partial(call, topk_ids=ids.astype(np.float32)), "topk_ids must have an integer dtype"),
        (build, "float32 on CUDA on rank"),
    ):
        found = ""
        try:
            action()
        except pymoe.CommError as error:
            found = str(error)
        everywhere = comm.allgather(found)
        if len(set(everywhere)) != 1 or text not in found:
            wrong.append(f"{text}: {everywhere}")
        y = layer(**good)
        if not np.array_equal(raw(y), np.ascontiguousarray(declared(p)).view(np.uint8)):
            wrong.append(f"after {text}: bits differ")
    layer.close()
    return wrong


def host_layer_beside(seed):
    """Return what is wrong with layers of the host and of the GPU that take turns on one communicator."""
    p = problem(ranks, seed=seed, tokens="random", exact=True)
    (x, weights, ids), (w1, w2, _) = mine(p)
    options = {"topk": 2, "num_experts": p.num_experts, "comm": comm, "transport": transport}
    with pymoe.MoELayer(w1, w2, **options) as on_gpu, pymoe.MoELayer(w1.get(), w2.get(), **options) as on_host:
        wrong = []
        for _ in range(4):
            y = on_gpu(x, topk_weights=weights, topk_ids=ids)
            z = on_host(p.x[rank], topk_weights=p.weights[rank], topk_ids=p.ids[rank])
            due = p.one_process(rank_order=False)[rank]
            wrong += [] if np.array_equal(y.get(), due) and np.array_equal(z, due) else ["layers in turn: bits differ"]
        try:
            on_gpu.capture(4, "topk")
            wrong.append("a layer over ranks was captured")
        except pymoe.UnsupportedError:
            pass
    return wrong


def main():
    host.DEVICE_MESSAGE_BYTES = 1 << 12, 1 << 12  # many messages also for small rows
    wrong, opened, built = {}, [], StagedTransport.__init__

    def noted(staged, *args, **kwargs):
        opened.append(staged)
        built(staged, *args, **kwargs)

    no_wait = mock.patch(
        "cupy.cuda.runtime.deviceSynchronize", side_effect=AssertionError("waits for the whole device")
    )
    with mock.patch.object(StagedTransport, "__init__", noted), no_wait:
        for seed, case in enumerate(LAYERS):
            wrong[f"layer {case}"] = run_layer(case, seed)
        for seed, (kind, late, case) in enumerate(FORMATS):
            wrong[f"{kind} {late} {case}"] = run_format(kind, late, case, seed)
        wrong["layers in turn"] = "; ".join(host_layer_beside(5))
        if transport != "hier":
            wrong["disagreement"] = "; ".join(disagreements())
    if not opened or any(isinstance(each.inner, HostTransport) != (transport == "host") for each in opened):
        wrong["transport"] = f"{len(opened)} staged transports, not all over {transport}"
    if any(each.arena._memory or getattr(each.inner, "_windows", None) for each in opened):
        wrong["memory"] = "a closed transport holds buffers"
    everywhere = comm.gather({name: text for name, text in wrong.items() if text})
    if rank == 0:
        print(json.dumps({"cases": len(wrong), "wrong": [w for w in everywhere if w]}))


main()
