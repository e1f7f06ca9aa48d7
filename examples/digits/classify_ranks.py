"""Classify the held-out digits with the experts shared out over all ranks; each reads only its own from the checkpoint.

mpiexec -n 4 python -m mpi4py examples/digits/classify_ranks.py
"""

from __future__ import annotations

import numpy as np
from model import CHECKPOINT, LAYER, DigitsModel, load_digits, read_float32
from mpi4py import MPI

import pymoe


def main() -> None:
    """Classify a part of the images on each rank; rank 0 prints the accuracy of all, and each expert's rows."""
    comm = MPI.COMM_WORLD
    images, labels = (np.array_split(part, comm.size)[comm.rank] for part in load_digits("test"))
    with pymoe.MoELayer.from_checkpoint(CHECKPOINT, LAYER, comm=comm) as layer:
        model = DigitsModel(read_float32(CHECKPOINT / "model.safetensors"), layer)
        right = int((model.logits(images).argmax(axis=1) == labels).sum())
        rows = comm.reduce(layer.last_load)
    right, images_of_all = comm.allreduce(right), comm.allreduce(len(images))
    if comm.rank == 0:
        print(f"{comm.size} ranks accuracy {right / images_of_all:.4f}")
        print(f"rows by expert {rows.tolist()}")


if __name__ == "__main__":
    main()
