"""Fuzz the checkpoint reader with atheris: ``python tests/fuzz/fuzz_safetensors.py [options of libFuzzer] [folder]``.

Writes honest inputs into the folder, an empty one of its own unless one is given, and starts from them::

    python tests/fuzz/fuzz_safetensors.py -runs=1000000 -timeout=10 -rss_limit_mb=500 -max_len=4096

An exception that is no error of pymoe's own, an input that takes longer than ``-timeout`` seconds, or a process above
``-rss_limit_mb`` ends the run and leaves the input in a file ``crash-*``; ``--replay FILE`` runs one such file.
"""

from __future__ import annotations

import atexit
import random
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

with atheris.instrument_imports(include=["pymoe.checkpoint"]):
    import pymoe.checkpoint  # noqa: F401  instrumented on import

from tests.fuzz.inputs import Workplace, mutate  # noqa: E402  found only now


def main() -> None:
    """Run the fuzzer until it has done its runs or found something."""
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    home = Path(tempfile.mkdtemp(prefix="pymoe-fuzz-", dir=base))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    place = Workplace(home)
    arguments = sys.argv[1:]
    if arguments[:1] == ["--replay"]:
        print(place.run(Path(arguments[1]).read_bytes()))
        return
    folders = [argument for argument in arguments if not argument.startswith("-")]
    corpus = Path(folders[0]) if folders else home / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(place.seeds()):
        (corpus / f"seed-{number:02}").write_bytes(seed)

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return atheris.Mutate(data, max_size) if rng.random() < 0.5 else mutate(data, rng)[:max_size]

    atheris.Setup([sys.argv[0], *arguments, *([] if folders else [str(corpus)])], place.run, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
