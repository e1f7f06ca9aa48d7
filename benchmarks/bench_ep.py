"""Expert parallelism on this machine: transports against MPI's own Alltoallv, and the whole layer against one process.

    python benchmarks/bench_ep.py --ranks 2 --output benchmarks/results/ep.json
    python benchmarks/bench_ep.py --device --output benchmarks/results/ep_h200.json      (two ranks, a GPU each)
    python benchmarks/plot_ep.py benchmarks/results/ep.json docs/_static/ep_cpu.svg

The file keeps the last result of each MPI; the MPI is that of the Python that runs this, two minutes each.  Starts
its own ranks with the launcher beside this Python.  Each time is that of the slowest rank, from a barrier until
everything is there; the least of many is kept, since neighbours only ever add.  Bytes are physical: what a rank keeps
for itself is not counted.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import checkout  # noqa: F401  before pymoe
import numpy as np

from pymoe.comm.runner import launch

ROW = 4096
SIZES = [1 << power for power in range(12, 24)]
LAYER = {"M": 1024, "E": 8, "topk": 2, "K": 1024, "I": 1024}
ROUNDS = 2
TRANSPORTS = ("shm", "host")
WAYS = {"": "rows in order", ", gathered": "gathered rows", ", used": "made, gathered and read"}


def slowest(comm, work, seconds=0.2, least=5):
    """Return the least over many runs of the time of the slowest rank, in seconds."""
    from mpi4py import MPI

    best, end = float("inf"), time.perf_counter() + seconds
    number = 0
    while True:
        comm.Barrier()
        begin = time.perf_counter()
        work()
        took = comm.allreduce(time.perf_counter() - begin, MPI.MAX)
        best = min(best, took)
        number += 1
        if comm.bcast(number >= least and time.perf_counter() > end):
            return best


def transfers(comm, transport):
    """Return {bytes a pair: seconds} of one transport, beside the first also of Alltoallv, for each of `WAYS`.

    A dispatch gathers its rows: that is one pass for a transport, and a pass before Alltoallv.  "Used" rows are made
    just before and read just after, as those of a layer are, so that each core has to fetch what the other wrote.
    """
    from mpi4py import MPI

    from pymoe.comm import agree, connecting, place
    from pymoe.comm.plan import counts_of
    from pymoe.comm.transports.base import DISPATCH, Payload
    from pymoe.comm.waiting import Wait

    with connecting("bench", comm, transport) as group:
        ranks = place("bench", group, "linear", comm.size, 1)
        agree("bench", ranks, {}, {})
    times = {}
    for size in SIZES:
        rows = max(1, size // ROW)
        matrix = np.full((comm.size, comm.size), rows, np.int64)
        np.fill_diagonal(matrix, 0)
        counts = counts_of(matrix, comm.rank)
        source = np.ones((rows * (comm.size - 1), ROW), np.uint8)
        target, packed = np.empty_like(source), np.empty_like(source)
        order = np.random.default_rng(size).permutation(len(source))

        def move(order=None, counts=counts, source=source):
            transfer = group.transport.open(DISPATCH, counts, [ROW])
            transfer.send([Payload(source, order)])
            wait = None
            while transfer.missing() or transfer.unsettled():
                # As a layer waits: a yield at once would give a busy core away for milliseconds.
                wait = wait or Wait(60.0)
                wait.pause()
            return transfer.inbox[0]

        sizes = matrix[comm.rank] * ROW
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])

        def alltoallv(source=source, target=target, sizes=sizes, starts=starts):
            comm.Alltoallv([source, sizes, starts, MPI.BYTE], [target, sizes, starts, MPI.BYTE])
            return target

        def gathered_alltoallv(order=order, source=source, packed=packed, alltoallv=alltoallv):
            np.take(source, order, axis=0, out=packed, mode="clip")
            return alltoallv(packed)

        gathered_move = functools.partial(move, order)

        def used(travel, source=source, read=np.empty_like(source)):  # noqa: B008  one for each size
            source[...] = 1
            np.copyto(read, travel())

        ways = {
            "": (move, alltoallv),
            ", gathered": (gathered_move, gathered_alltoallv),
            ", used": (functools.partial(used, gathered_move), functools.partial(used, gathered_alltoallv)),
        }
        times[size] = {transport + way: slowest(comm, ours) for way, (ours, _) in ways.items()}
        if transport == TRANSPORTS[0]:
            times[size] |= {f"Alltoallv{way}": slowest(comm, theirs) for way, (_, theirs) in ways.items()}
    ranks.close("bench")
    return times


def problem():
    """Return weights, gate and tokens of the layer's benchmark."""
    rng = np.random.default_rng(0)
    E, K, I, M = (LAYER[name] for name in ("E", "K", "I", "M"))
    w1 = rng.standard_normal((E, 2 * I, K), dtype=np.float32) / 32
    w2 = rng.standard_normal((E, K, I), dtype=np.float32) / 32
    return w1, w2, rng.standard_normal((E, K), dtype=np.float32), rng.standard_normal((M, K), dtype=np.float32)


def layer_over_ranks(comm, transport):
    """Return seconds of dispatch, combine and the whole layer, and the bytes that leave the busiest rank."""
    import pymoe
    from pymoe.prepare_finalize.exchange import Exchange

    w1, w2, gate, x = problem()
    mine = np.array_split(np.arange(LAYER["E"]), comm.size)[comm.rank]
    tokens = np.array_split(x, comm.size)[comm.rank]
    spent = dict.fromkeys(("announce", "send", "receive", "give_back", "collect"), 0.0)
    for name in spent:
        method = getattr(Exchange, name)

        def timed(self, *args, name=name, method=method):
            begin = time.perf_counter()
            result = method(self, *args)
            spent[name] += time.perf_counter() - begin
            return result

        setattr(Exchange, name, timed)
    with pymoe.MoELayer(w1[mine], w2[mine], topk=LAYER["topk"], num_experts=LAYER["E"], gate=gate, comm=comm,
                        transport=transport) as layer:  # fmt: skip
        layer(tokens)
        whole = slowest(comm, lambda: layer(tokens), 3.0, 10)
        parts = []
        for _ in range(20):
            spent.update(dict.fromkeys(spent, 0.0))
            comm.Barrier()
            layer(tokens)
            parts.append((sum(list(spent.values())[:3]), sum(list(spent.values())[3:])))
        dispatch, combine = np.min(parts, axis=0)
        rows = layer._kernel(tokens.dtype)[0].prepare_finalize._exchange
        assert rows is None
        sent = sent_rows(layer, tokens, comm)
    return {
        "layer_s": whole,
        "dispatch_s": max(comm.allgather(float(dispatch))),
        "combine_s": max(comm.allgather(float(combine))),
        "dispatch_bytes": max(comm.allgather(sent * 4 * LAYER["K"])),
        "combine_bytes": max(comm.allgather(sent * 4 * LAYER["K"])),
        "busiest_rows": max(comm.allgather(int(layer_load(layer)))),
    }


def sent_rows(layer, tokens, comm):
    """Return how many rows of a call leave this rank."""
    _, ids = layer._router.route("bench", tokens, router_logits=None, topk_weights=None, topk_ids=None, input_ids=None)
    owner, _ = layer._ranks.placement.find(ids)
    return sum(int((owner == rank).any(axis=1).sum()) for rank in range(comm.size) if rank != comm.rank)


def layer_load(layer):
    """Return the rows that this rank computed in the last call."""
    return layer.last_load.sum()


def rank_program(output):
    """Measure on all ranks; rank 0 writes the result."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    result = {"MPI": MPI.Get_library_version().splitlines()[0].strip(" \0,"), "transfers": {}, "layer": {}}
    for transport in TRANSPORTS:
        for size, times in transfers(comm, transport).items():
            result["transfers"].setdefault(size, {}).update(times)
    for transport in TRANSPORTS:
        result["layer"][transport] = layer_over_ranks(comm, transport)
    if comm.rank == 0:
        Path(output).write_text(json.dumps(result))


def device_program(output):
    """Measure arrays of GPUs on two ranks; rank 0 writes the result."""
    import ep_device
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    name = ep_device.use_gpu(comm)
    library = MPI.Get_library_version().splitlines()[0].strip(" \0,")
    result = {"MPI": library, "GPU": name, "device": ep_device.transfers(comm, slowest)}
    result["device_layer"] = {name: ep_device.layer_s(comm, slowest, name) for name in ("host", "shm")}
    if comm.rank == 0:
        Path(output).write_text(json.dumps(result))


def one_process(threads):
    """Return seconds of the same layer in one process."""
    code = f"""
import sys, time
sys.path[:0] = [{str(Path(__file__).parent)!r}]
import bench_ep, pymoe
w1, w2, gate, x = bench_ep.problem()
layer = pymoe.MoELayer(w1, w2, topk=bench_ep.LAYER["topk"], gate=gate)
layer(x)
best, end = 1e9, time.perf_counter() + 3
while time.perf_counter() < end:
    begin = time.perf_counter()
    layer(x)
    best = min(best, time.perf_counter() - begin)
print(best)
"""
    environment = os.environ | {"PYMOE_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def processor():
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def keep(output, result):
    """Write the result to a file beside those of other MPIs."""
    if output:
        path = Path(output)
        runs = json.loads(path.read_text())["runs"] if path.exists() else []
        runs = [run for run in runs if run["MPI"] != result["MPI"]] + [result]
        path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


def least(old, new):
    """Return the smaller of two results, number by number."""
    if isinstance(new, dict):
        return {key: least(old.get(key), value) if old else value for key, value in new.items()}
    return min(old, new) if isinstance(new, float) and old is not None else new


def report(result):
    """Print the tables and the two aims."""
    print(f"{result['MPI']}; {result['ranks']} ranks of {result['threads']} threads on {result['cores']} cores")
    names = (*TRANSPORTS, "Alltoallv")
    heads = "".join(f"{name:>11}" for name in names)
    print(f"\n{'':12}" + "".join(f" {text + ', us':>33} {'':>7}" for text in WAYS.values()))
    print(f"{'bytes a pair':>12}" + f" {heads} {'ratio':>7}" * len(WAYS))
    ratios = {}
    for size, times in result["transfers"].items():
        line = f"{size:>12}"
        for way in WAYS:
            ratios[int(size), way] = ratio = times[f"Alltoallv{way}"] / times[f"shm{way}"]
            line += " " + "".join(f"{1e6 * times[name + way]:11.1f}" for name in names) + f" {ratio:6.2f}x"
        print(line)
    print(f"\nlayer {LAYER}, one process of {result['cores']} threads: {1e3 * result['one_process_s']:.2f} ms")
    for transport, found in result["layer"].items():
        against = found["layer_s"] / result["one_process_s"]
        print(f"{transport:5} layer {1e3 * found['layer_s']:.2f} ms ({against:.3f}x), dispatch "
              f"{1e3 * found['dispatch_s']:.3f} ms for {found['dispatch_bytes']} bytes, combine "
              f"{1e3 * found['combine_s']:.3f} ms for {found['combine_bytes']} bytes, slowest rank "
              f"{found['busiest_rows']} rows")  # fmt: skip
    best = min(found["layer_s"] for found in result["layer"].values()) / result["one_process_s"]
    print("\naim: shm at least 2x Alltoallv up to 1 MiB a pair")
    for way, text in WAYS.items():
        found = {size: ratio for (size, kind), ratio in ratios.items() if kind == way and size <= 1 << 20}
        reached = [size for size, ratio in found.items() if ratio >= 2]
        extent = f"least {min(found.values()):.2f}x, most {max(found.values()):.2f}x"
        print(f"  {text}: {extent}, at least 2x for {reached}")
    print(f"aim: layer at most 1.1x one process: {best:.3f}x")


def on_devices(options):
    """Run the benchmark of GPUs, which has floors of its own."""
    import ep_device

    part = Path(options.output or "ep_device.json").with_suffix(".part")
    status = launch(2, __file__, ["--device", "--as-rank", str(part)], options.mpiexec)
    if status:
        sys.exit(status)
    result = json.loads(part.read_text()) | {"ranks": 2}
    part.unlink()
    ep_device.report(result)
    keep(options.output, result)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--mpiexec")
    parser.add_argument("--output", help="write the result here, as JSON")
    parser.add_argument("--device", action="store_true", help="arrays of GPUs, two ranks")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        return (device_program if options.device else rank_program)(options.as_rank)
    if options.device:
        return on_devices(options)
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // options.ranks)
    os.environ["PYMOE_NUM_THREADS"] = str(threads)
    part = Path(options.output or "ep.json").with_suffix(".part")
    result = None
    for _ in range(options.rounds):
        status = launch(options.ranks, __file__, ["--as-rank", str(part)], options.mpiexec)
        if status:
            sys.exit(status)
        found = json.loads(part.read_text()) | {"one_process_s": one_process(cores)}
        result = found if result is None else least(result, found)
        part.unlink()
    result |= {"ranks": options.ranks, "threads": threads, "cores": cores, "processor": processor()}
    report(result)
    keep(options.output, result)


if __name__ == "__main__":
    main()
