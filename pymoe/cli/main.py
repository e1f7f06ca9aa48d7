"""Commands and their options; errors become one line on stderr and an exit status."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from pymoe import environment
from pymoe._version import __version__
from pymoe.cli import commands
from pymoe.device.arch import ARCHS
from pymoe.errors import PymoeError

OK, FAILURE, USAGE = 0, 1, 2


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 1 after an error that is told on stderr.  A wrong command line exits with 2."""
    options = _parser().parse_args(arguments)
    if environment.show_debug():
        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        options.command(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("pymoe: interrupted", file=sys.stderr)
        return FAILURE
    except BrokenPipeError:
        # Whoever read our output has left; the interpreter must not fail again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:  # the boundary of the program: whatever happened is told in one line
        if environment.show_debug():
            traceback.print_exc()
        expected = isinstance(error, PymoeError | OSError) and str(error)
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        print(f"pymoe: {' '.join(text.split())}", file=sys.stderr)
        return FAILURE
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pymoe", description="Fused Mixture-of-Experts layers without PyTorch.")
    parser.add_argument("--version", action="version", version=f"pymoe {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = subparsers.add_parser("run", help="run one layer of a checkpoint on tokens in a file")
    run.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with config.json and safetensors files")
    run.add_argument("--layer", type=int, required=True, metavar="L", help="number of the decoder layer")
    run.add_argument("--input", required=True, metavar="X", help="tokens (M, K): .npy or .safetensors")
    run.add_argument("--output", required=True, metavar="Y", help=".npy to write, float32")
    run.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), metavar="D",
                     help="dtype to compute in: float32, float16 or bfloat16; default the checkpoint's")  # fmt: skip
    run.add_argument("--scheme", metavar="S", help="quantize the weights first, such as fp8 or int4")
    run.add_argument("--plot", metavar="P", help="draw the expert load into this file (needs matplotlib)")
    run.set_defaults(command=commands.run)

    info = subparsers.add_parser("info", help="list the MoE layers of a checkpoint")
    info.add_argument("checkpoint", metavar="CHECKPOINT")
    info.set_defaults(command=commands.info)

    doctor = subparsers.add_parser("doctor", help="show versions, processor, threads, caches, optional libraries")
    doctor.add_argument("--mpi", action="store_true", help="try the transports between ranks (start it by mpiexec)")
    doctor.set_defaults(command=commands.doctor)

    mpirun = subparsers.add_parser("mpirun", help="run a Python program on several ranks that end together")
    mpirun.add_argument("-n", type=int, metavar="N", help="start N ranks here; without it, this process is one of them")
    mpirun.add_argument("--mpiexec", metavar="PATH", help="launcher; default the one beside this Python")
    mpirun.add_argument("program", metavar="PROGRAM", help="a Python file")
    mpirun.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the program")
    mpirun.set_defaults(command=commands.mpirun)

    compile_ = subparsers.add_parser("compile", help="compile the CUDA kernels into the cache; needs no GPU")
    known = f"one of {', '.join(ARCHS)}; may be given again; default the current device's"
    compile_.add_argument("--arch", action="append", metavar="A", choices=tuple(ARCHS), help=known)
    compile_.add_argument("--jobs", type=_positive, metavar="N", help="compilations at a time; default the threads")
    compile_.set_defaults(command=commands.compile_kernels)

    _add_bench(subparsers)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _add_bench(subparsers: argparse._SubParsersAction[_Parser]) -> None:
    bench = subparsers.add_parser("bench", help="time a layer beside its peers and the machine's floor")
    bench.add_argument("--shape", default="32,4,1024,512", metavar="E,T,K,I",
                       help="experts, experts a token, widths; default 32,4,1024,512")  # fmt: skip
    bench.add_argument("--tokens", default="1,16,128,1024", metavar="M,...", help="default 1,16,128,1024")
    bench.add_argument("--schemes", default="fp32,bf16,int8,fp8,int4,mxfp4", metavar="S,...",
                       help="default fp32,bf16,int8,fp8,int4,mxfp4")  # fmt: skip
    bench.add_argument("--peers", metavar="P,...", help="of numpy, torch, jax, or none; default those installed")
    bench.add_argument("--only", default="", metavar="PATTERN,...",
                       help="time what matches contender/scheme/tokens, such as 'ours/int8/*'")  # fmt: skip
    bench.add_argument("--results", metavar="FILE", help="add the rows to this JSON file")
    bench.add_argument("--resume", action="store_true", help="leave out what the last run in the file has")
    bench.add_argument("--show", action="store_true", help="time nothing; show what the file holds")
    bench.add_argument("--json", action="store_true", help="print JSON in place of the table")
    bench.add_argument("--plot", metavar="FILE", help="draw time against tokens (needs matplotlib)")
    bench.add_argument("--page", metavar="FILE", help="rewrite the tables of a Markdown page that marks them")
    bench.add_argument("--quick", action="store_true", help="a few short calls: shows that all works")
    bench.set_defaults(command=commands.bench)
