"""Fuzz the checkpoint reader with atheris: ``python tests/fuzz/fuzz_safetensors.py [options of libFuzzer] [folder]``.

Starts from honest inputs, which it writes into the folder, one of its own unless one is given::

    python tests/fuzz/fuzz_safetensors.py -runs=1000000 -timeout=10 -rss_limit_mb=400 -max_len=4096

An exception that is no error of pymoe's own, an input that takes longer than ``-timeout`` seconds, or a process above
``-rss_limit_mb`` ends the run and leaves the input in a file; ``--replay FILE`` runs one such file.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

with atheris.instrument_imports(include=["pymoe"]):
    import pymoe.checkpoint  # noqa: F401  instrumented on import

from tests.fuzz.inputs import Workplace, mutate  # noqa: E402  found only now

REPORT = 50_000
"""Executions between two lines that say how many were read and how many refused."""
BLIND = 0.2
"""Share of mutations that know nothing of the format."""


def main() -> int:
    """Run the fuzzer in a process of its own, which ends without clearing up, in a folder that is cleared here."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="pymoe-fuzz-", dir=memory if memory.is_dir() else None) as home:
        if sys.argv[1:2] == ["--replay"]:
            print(Workplace(Path(home)).run(Path(sys.argv[2]).read_bytes()))
            return 0
        return subprocess.run([sys.executable, __file__, "--inside", home, *sys.argv[1:]]).returncode


def fuzz(home: Path, arguments: list[str]) -> None:
    """Run the fuzzer until it has done its runs or found something."""
    place = Workplace(home)
    folders = [argument for argument in arguments if not argument.startswith("-")]
    corpus = Path(folders[0]) if folders else home / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(place.seeds()):
        (corpus / f"seed-{number:02}").write_bytes(seed)
    outcomes: Counter[str] = Counter()

    def execute(data: bytes) -> None:
        outcomes[place.run(data)] += 1
        if outcomes.total() % REPORT == 0:
            print(f"{outcomes.total()} executions: {dict(outcomes)}", file=sys.stderr, flush=True)

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return atheris.Mutate(data, max_size) if rng.random() < BLIND else mutate(data, rng)[:max_size]

    # One mutation an execution, and no shrinking, unless the caller wants it: what is far from honest is soon refused.
    options = ["-mutate_depth=1", "-reduce_inputs=0", *arguments, *([] if folders else [str(corpus)])]
    atheris.Setup([sys.argv[0], *options], execute, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        fuzz(Path(sys.argv[2]), sys.argv[3:])
    sys.exit(main())
