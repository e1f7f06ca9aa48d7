"""What each command does."""

from __future__ import annotations

import argparse
import resource
import shlex
import sys
import time
from pathlib import Path

import numpy as np

from pymoe import bench as benchmark
from pymoe import environment, installation
from pymoe.catalogue import all_kernels
from pymoe.checkpoint import list_layers
from pymoe.cli import files, report
from pymoe.cli.progress import Progress
from pymoe.comm import probe, runner
from pymoe.comm.mpi import load_mpi
from pymoe.device import cubins, jit
from pymoe.device.arch import ARCHS, current_arch
from pymoe.device.private import private_folder
from pymoe.errors import ArgumentError, BackendUnavailableError, complaint
from pymoe.layer import MoELayer

WORK_A_STEP = 2e11
"""Floating-point operations between two steps of the progress bar: seconds at most."""


EXTRAS = {
    "cupy": ("cu13", "GPUs"),
    "numba_cuda": ("numba-cu13", "NumbaCudaExperts and own activations that are not translated"),
    "mpi4py": ("mpi", "several ranks"),
    "matplotlib": ("plot", "the pictures of bench"),
}
"""The extra that installs each optional library, and what the library is for."""


def run(options: argparse.Namespace) -> None:
    """Run a layer of a checkpoint: print plan, expert load, time and memory; write the output."""
    output = files.output_path("pymoe run", options.output)
    plot = None if options.plot is None else _plot_path("pymoe run", options.plot)
    started = time.perf_counter()
    layer = MoELayer.from_checkpoint(options.checkpoint, options.layer, scheme=options.scheme, dtype=options.dtype)
    x = files.read_tokens(options.input)
    if x.ndim != 2 or x.shape[1] != layer.K:
        raise ArgumentError(complaint("pymoe run", "--input", f"hold tokens of shape (M, {layer.K})", x.shape))
    loaded = time.perf_counter()
    M = x.shape[0]
    # One scale over all tokens needs them all in one call; otherwise the bits do not depend on how they are cut.
    step = max(M, 1) if layer.quant_config.is_dynamic_per_tensor else _tokens_a_step(layer)
    print(f"layer      {layer}")
    report.print_plan(layer.plan(min(M, step)), M, layer.dtype)
    layer.warm_up(min(M, 1))
    warm = time.perf_counter()
    y = np.empty((M, layer.K), np.float32)
    load = np.zeros(layer.num_experts, np.int64)
    with Progress(M, "tokens") as progress, np.errstate(all="ignore"):
        for start in range(0, M, step):
            tokens = np.ascontiguousarray(x[start : start + step]).astype(layer.dtype)
            y[start : start + step] = layer(tokens).astype(np.float32)
            load += 0 if layer.last_load is None else layer.last_load
            progress.advance(len(tokens))
    computed = time.perf_counter()
    files.write_npy(output, y)
    report.print_load(load)
    rate = f", {M / (computed - warm):,.0f} tokens/s" if M else ""
    print(f"time       load {loaded - started:.3f} s, compile {warm - loaded:.3f} s, run {computed - warm:.3f} s{rate}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"memory     peak {report.size(peak)} of this process, {environment.num_threads()} threads")
    print(f"output     {output}  float32 {y.shape}")
    if plot is not None:
        report.plot_load(load, plot, f"layer {options.layer}, {M} tokens")
        print(f"plot       {plot}")


def info(options: argparse.Namespace) -> None:
    """List the MoE layers of a checkpoint."""
    layers = list_layers(options.checkpoint)
    print(f"{'layer':>5} {'experts':>8} {'topk':>5} {'K':>7} {'I':>7}  {'stored in':24} {'bytes':>10}")
    for entry in layers:
        sizes = f"{entry.layer:>5} {entry.num_experts:>8} {entry.topk:>5} {entry.K:>7} {entry.I:>7}"
        print(f"{sizes}  {entry.scheme:24} {report.size(entry.nbytes):>10}")
    print(f"{len(layers)} MoE layers, {report.size(sum(entry.nbytes for entry in layers))}")


def mpirun(options: argparse.Namespace) -> None:
    """Start a program on several ranks, or run it as one of them."""
    if options.n is None:
        runner.run_program(options.program, options.arguments)
    elif status := runner.launch(options.n, options.program, options.arguments, options.mpiexec):
        sys.exit(status if 0 < status < 256 else 1)


def doctor(options: argparse.Namespace) -> None:
    """Show what pymoe found on this machine, and why what is optional cannot be used."""
    if options.mpi:
        comm = load_mpi().COMM_WORLD
        with runner.abort_on_error():
            lines = probe.describe(comm)
        if comm.Get_rank() == 0:
            print("\n".join(lines))
        return
    installation.show_config()
    print(f"processor can: {' '.join(installation.cpu_features()) or 'nothing beyond its baseline'}")
    for library, (extra, purpose) in EXTRAS.items():
        reason = report.why_missing(library)
        if reason:
            print(f"{library} cannot be used: {reason}; it is optional, for {purpose}: pip install 'pymoe[{extra}]'")
    found = installation.installation()
    if any(found[library] != "not installed" for library in ("cupy", "cuda.core")):
        report.print_cuda()


def compile_kernels(options: argparse.Namespace) -> None:
    """Compile every kernel for the architectures asked for, so that no later process has to."""
    try:
        folder = private_folder(cubins.FOLDER)
    except OSError as error:
        remedy = "Set PYMOE_CACHE_DIR to a folder of your own"
        text = complaint("pymoe compile", "the cache folder", "be usable", error, remedy)
        raise BackendUnavailableError(text) from None
    for arch in options.arch or [_arch_of_the_device()]:
        started = time.perf_counter()
        kernels = all_kernels(arch)
        missing = [kernel for kernel in kernels if not jit.is_kept(kernel, arch)]
        with Progress(len(missing), "kernels") as progress:
            jit.compile_all(missing, arch, options.jobs, lambda _: progress.advance(1))
        seconds = time.perf_counter() - started
        kept = len(kernels) - len(missing)
        print(f"{arch:8} {len(kernels)} kernels, {kept} of them there before, {seconds:.1f} s, in {folder}")


def _arch_of_the_device() -> str:
    try:
        return current_arch()
    except BackendUnavailableError as error:
        rule = "be given where no device says it"
        remedy = f"Name one of {', '.join(ARCHS)}. ({str(error).rstrip('.')})"
        raise ArgumentError(complaint("pymoe compile", "--arch", rule, "none", remedy)) from None


def bench(options: argparse.Namespace) -> None:
    """Time a layer beside its peers and its floor; print, draw and store what was measured."""
    call = "pymoe bench"
    chosen = benchmark.Options(
        shape=benchmark.Shape.parse(call, options.shape),
        tokens=benchmark.whole_numbers(call, "--tokens", options.tokens),
        schemes=_words(options.schemes),
        peers=None if options.peers is None else () if options.peers == "none" else _words(options.peers),
        only=_words(options.only),
        results=None if options.results is None else files.output_path(call, options.results, (".json",)),
        resume=options.resume,
        quick=options.quick,
        command=shlex.join(["python", "-m", "pymoe", *sys.argv[1:]]),
    )
    plot = None if options.plot is None else _plot_path(call, options.plot)
    page = None if options.page is None else files.output_path(call, options.page, (".md",))
    if page is not None and chosen.results is None:
        raise ArgumentError(complaint(call, "--page", "come with --results, whose name its marks carry", None))
    outcome = benchmark.show(chosen) if options.show else benchmark.run(chosen)
    results = outcome.results
    print(benchmark.dump(results) if options.json else benchmark.tables(results, only_run=outcome.run))
    if plot is not None:
        benchmark.draw(results, plot)
    if page is not None:
        benchmark.rewrite(page, results)
    outcome.check()


def _tokens_a_step(layer: MoELayer) -> int:
    """Return how many tokens to compute between two steps: few enough for a lively bar, enough to reuse weights."""
    return int(min(max(WORK_A_STEP / (6 * layer.topk * layer.K * layer.I), 512), 4096))


def _words(text: str) -> tuple[str, ...]:
    """Return the words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _plot_path(call: str, path: str) -> Path:
    """Return where to draw, or refuse before any work."""
    target = files.output_path(call, path, (".png", ".svg", ".pdf"))
    if not report.can_plot():
        rule = "have matplotlib to draw with"
        remedy = "Install the extra: pip install 'pymoe[plot]'"
        raise BackendUnavailableError(complaint(call, "--plot", rule, "no matplotlib", remedy))
    return target
