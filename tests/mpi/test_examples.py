"""The examples over ranks, as their first lines say to start them."""

from __future__ import annotations

import importlib.util
import re

import pytest

from tests.mpi.launch import ROOT, mpiexec, run

LIMIT = 280


def example(name, ranks, **environment):
    """Return what an example prints on so many ranks, which are those of its first lines."""
    path = ROOT / "examples" / name
    assert f"mpiexec -n {ranks} python -m mpi4py examples/{name}" in path.read_text().split('"""')[1]
    ended = run(ranks, str(path.with_suffix("")), limit=LIMIT, **environment)
    assert ended.status == 0, ended
    return ended.out


def check_layer(out, ranks):
    """Refuse rows that are lost, and a result that differs from one process by more than the order of sums."""
    assert f"{ranks} ranks, {1000 * ranks} tokens, {4000 * ranks} routed rows" in out
    assert float(re.search(r"largest difference from one \w+: (\S+)", out)[1]) < 2e-6, out


@pytest.mark.mpi
@pytest.mark.timeout(LIMIT + 20)
def test_the_main_job():
    check_layer(example("expert_parallel.py", 4), 4)


@pytest.mark.mpi
@pytest.mark.timeout(LIMIT + 20)
def test_the_digits():
    out = example("digits/classify_ranks.py", 4)
    assert float(re.search(r"4 ranks accuracy (\S+)", out)[1]) >= 0.985, out
    rows = [int(n) for n in re.search(r"rows by expert \[(.*)\]", out)[1].split(",")]
    assert len(rows) == 8 and min(rows) > 0, out


@pytest.mark.gpu
@pytest.mark.timeout(LIMIT + 20)
def test_the_main_job_on_one_gpu():
    check_on_gpus(CUDA_VISIBLE_DEVICES="0")


@pytest.mark.gpu2
@pytest.mark.timeout(LIMIT + 20)
def test_the_main_job_on_two_gpus():
    check_on_gpus()


def check_on_gpus(**environment):
    """Run the example of CuPy arrays."""
    if mpiexec() is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("MPI is not installed")
    check_layer(example("expert_parallel_gpu.py", 2, **environment), 2)
