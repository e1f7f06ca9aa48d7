"""The layer of expert_parallel.py with CuPy arrays: each rank on a GPU, or several on one.

mpiexec -n 2 python -m mpi4py examples/expert_parallel_gpu.py
"""

import cupy as cp
import numpy as np
from mpi4py import MPI

import pymoe

comm = MPI.COMM_WORLD
cp.cuda.Device(comm.rank % cp.cuda.runtime.getDeviceCount()).use()
E, K, I, TOPK, TOKENS = 16, 256, 512, 4, 1000

everywhere = np.random.default_rng(0)  # the same on all ranks: experts, of which each keeps its own part, and the gate
w1 = cp.asarray(everywhere.standard_normal((E, 2 * I, K), dtype=np.float32) / 16)
w2 = cp.asarray(everywhere.standard_normal((E, K, I), dtype=np.float32) / 16)
gate = cp.asarray(everywhere.standard_normal((E, K), dtype=np.float32))
mine = np.array_split(np.arange(E), comm.size)[comm.rank]
x = cp.asarray(np.random.default_rng([1, comm.rank]).standard_normal((TOKENS, K), dtype=np.float32))  # my own tokens

with pymoe.MoELayer(w1[mine], w2[mine], topk=TOPK, num_experts=E, gate=gate, comm=comm) as layer:
    y = layer(x)  # on CuPy's current stream, like every call; rows of other ranks pass through pinned memory
    load = comm.allreduce(layer.last_load)
whole = pymoe.MoELayer(w1, w2, topk=TOPK, gate=gate)(x)  # one GPU with all experts
worst = comm.allreduce(float(abs(y - whole).max() / abs(whole).max()), MPI.MAX)
if comm.rank == 0:
    print(
        f"{comm.size} ranks, {comm.size * TOKENS} tokens, {load.sum()} routed rows, {load.min()} to {load.max()} each"
    )
    print(f"largest difference from one GPU: {worst:.1e} of the largest value")
