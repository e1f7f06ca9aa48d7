"""Rows of GPUs by way of the host, for ``bench_ep.py --device``: against MPI's own rate and PCIe's, in one run.

A pair of ranks sends the same number of bytes both ways.  The floor is the slower of two: messages of the same size
between pinned buffers, by MPI alone; and copies of as many bytes from and to the GPU at once.  Every time is that of
the slowest rank, from a barrier until the rows can be read on the device.
"""

from __future__ import annotations

import time

import numpy as np

ROW = 8192
SIZES = [1 << power for power in (16, 18, 20, 22, 24, 26)]
LAYER = {"M": 4096, "E": 128, "topk": 8, "K": 2048, "I": 768}


def use_gpu(comm):
    """Make this rank's GPU the current one; return its name."""
    import cupy

    number = comm.rank % cupy.cuda.runtime.getDeviceCount()
    cupy.cuda.Device(number).use()
    return cupy.cuda.runtime.getDeviceProperties(number)["name"].decode()


def message_bytes(comm, size):
    """Return how the `host` transport cuts `size` bytes."""
    from pymoe.comm.transports.host import DEVICE_MESSAGE_BYTES, HostTransport, Message

    whole = Message(True, 0, 0, 0, max(1, size // ROW))
    return HostTransport(comm, DEVICE_MESSAGE_BYTES).messages(whole, ROW)[0].stop * ROW


def messages_s(comm, slowest, size, message):
    """Return seconds of MPI alone: `size` bytes to and from the other rank in messages, between pinned buffers."""
    from mpi4py import MPI

    from pymoe.device.copies import pinned

    source, target = pinned(size), pinned(size)
    other = 1 - comm.rank

    def work():
        cuts = [slice(start, min(start + message, size)) for start in range(0, size, message)]
        requests = [comm.Irecv([target[cut], MPI.BYTE], other) for cut in cuts]
        requests += [comm.Isend([source[cut], MPI.BYTE], other) for cut in cuts]
        while not MPI.Request.Testall(requests):
            pass

    return slowest(comm, work, 0.15)


def pcie_s(comm, slowest, size):
    """Return seconds of copies of `size` bytes from the GPU and as many to it, at once, pinned, no messages."""
    import cupy

    from pymoe.device.copies import Copies

    copies = Copies()
    source, target = cupy.zeros((1, size), np.uint8), cupy.empty((1, size), np.uint8)
    out, into = copies.pinned(size).reshape(1, size), copies.pinned(size).reshape(1, size)

    def work():
        copies.to_host(source, out)
        copies.to_device(into, target)
        copies.left().synchronize()
        copies.came().synchronize()

    return slowest(comm, work, 0.15)


def staged_s(comm, slowest, group, size, gathered):
    """Return seconds of a dispatch of `size` bytes a pair, rows as they lie or by a list of rows."""
    import cupy

    from pymoe.comm.plan import counts_of
    from pymoe.comm.transports.base import Payload

    rows = max(1, size // ROW)
    matrix = np.full((comm.size, comm.size), rows, np.int64)
    np.fill_diagonal(matrix, 0)
    counts = counts_of(matrix, comm.rank)
    source = cupy.ones((rows * (comm.size - 1), ROW), np.uint8)
    order = np.random.default_rng(size).permutation(len(source)) if gathered else None
    staged = group.transport_for(source)

    def work():
        staged.ready()
        transfer = staged.open_dispatch(None, counts, [ROW])
        transfer.send([Payload(source, order)])
        while transfer.missing() or transfer.unsettled():
            pass
        cupy.cuda.get_current_stream().synchronize()

    work()
    return slowest(comm, work, 0.15)


def transfers(comm, slowest):
    """Return {bytes a pair: {what: seconds}}."""
    from pymoe.comm import agree, connecting, place

    times = {}
    for size in SIZES:
        alone = messages_s(comm, slowest, size, message_bytes(comm, size))
        times[size] = {"PCIe": pcie_s(comm, slowest, size), "MPI": alone}
    for name in ("host", "shm"):
        with connecting("bench", comm, name) as group:
            ranks = place("bench", group, "linear", comm.size, 1)
            agree("bench", ranks, {}, {})
        for size in SIZES:
            times[size][name] = staged_s(comm, slowest, group, size, False)
            times[size][f"{name}, gathered"] = staged_s(comm, slowest, group, size, True)
        ranks.close("bench")
    return times


def layer_s(comm, slowest, transport):
    """Return seconds of a layer over the ranks, of its dispatch and its combine, and of one GPU with all of it."""
    import pymoe

    E, topk, M = (LAYER[name] for name in ("E", "topk", "M"))
    w1, w2, gate, x = layer_arrays()
    mine = np.array_split(np.arange(E), comm.size)[comm.rank]
    tokens = np.array_split(np.arange(M), comm.size)[comm.rank]
    here = x[tokens[0] : tokens[-1] + 1]
    first, last = int(mine[0]), int(mine[-1]) + 1
    with pymoe.MoELayer(w1[first:last], w2[first:last], topk=topk, num_experts=E, gate=gate, comm=comm,
                        transport=transport) as layer:  # fmt: skip
        work = finished(layer, here)
        for _ in range(3):
            work()
        whole = slowest(comm, work, 0.5)
        dispatch, combine = halves_s(comm, work)
    one = finished(pymoe.MoELayer(w1, w2, topk=topk, gate=gate), x)
    for _ in range(3):
        one()
    return {
        "layer_s": whole,
        "dispatch_s": max(comm.allgather(dispatch)),
        "combine_s": max(comm.allgather(combine)),
        "one_gpu_s": slowest(comm, one, 0.3),
    }


def layer_arrays():
    """Return random weights, gate and tokens of the layer, bfloat16, the same on every rank."""
    import cupy

    from pymoe.device.arrays import BFLOAT16

    E, K, width, M = (LAYER[name] for name in ("E", "K", "I", "M"))
    random = cupy.random.default_rng(0)
    w1 = (random.standard_normal((E, 2 * width, K), dtype=np.float32) / 32).astype(BFLOAT16)
    w2 = (random.standard_normal((E, K, width), dtype=np.float32) / 32).astype(BFLOAT16)
    gate = random.standard_normal((E, K), dtype=np.float32).astype(BFLOAT16)
    return w1, w2, gate, random.standard_normal((M, K), dtype=np.float32).astype(BFLOAT16)


def finished(layer, x):
    """Return a call of the layer that waits for its end."""
    import cupy

    def work():
        layer(x)
        cupy.cuda.get_current_stream().synchronize()

    return work


def halves_s(comm, work):
    """Return the least seconds that ten calls spent in dispatch and in combine, the device idle around each step."""
    import cupy

    from pymoe.prepare_finalize.exchange import Exchange

    spent = dict.fromkeys(("announce", "send", "receive", "give_back", "collect"), 0.0)
    kept = {name: getattr(Exchange, name) for name in spent}

    def timed(name, method):
        def call(self, *args):
            cupy.cuda.get_current_stream().synchronize()
            begin = time.perf_counter()
            result = method(self, *args)
            cupy.cuda.get_current_stream().synchronize()
            spent[name] += time.perf_counter() - begin
            return result

        return call

    for name, method in kept.items():
        setattr(Exchange, name, timed(name, method))
    try:
        parts = []
        for _ in range(10):
            spent.update(dict.fromkeys(spent, 0.0))
            comm.Barrier()
            work()
            parts.append((sum(list(spent.values())[:3]), sum(list(spent.values())[3:])))
    finally:
        for name, method in kept.items():
            setattr(Exchange, name, method)
    return map(float, np.min(parts, axis=0))


def report(result):
    """Print the tables and the aim."""
    print(f"{result['MPI']}; {result['GPU']}, {result['ranks']} ranks")
    labels = list(next(iter(result["device"].values())))
    print(f"{'MiB a pair':>12}" + "".join(f"{label:>17}" for label in labels) + "   us; host against max(PCIe, MPI)")
    for size, times in result["device"].items():
        floor = max(times["PCIe"], times["MPI"])
        ratios = ", ".join(f"{times[way] / floor:.3f}x" for way in ("host", "host, gathered"))
        print(f"{int(size) / 2**20:12g}" + "".join(f"{1e6 * times[label]:17.1f}" for label in labels) + f"   {ratios}")
    for transport, found in result["device_layer"].items():
        ms = {name: f"{1e3 * seconds:.2f} ms" for name, seconds in found.items()}
        print(f"{transport:5} layer {LAYER} bf16 {ms['layer_s']}, dispatch {ms['dispatch_s']}, combine "
              f"{ms['combine_s']}; one GPU {ms['one_gpu_s']}")  # fmt: skip
