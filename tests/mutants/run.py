"""Apply each fault of the table to a copy of the tree, run the test file that must catch it, write what happened.

Usage: ``python tests/mutants/run.py [--jobs 4] [--only WORD]``.  Outside CI; at most 10 minutes on 4 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutants.table import MUTANTS, Mutant  # noqa: E402  the tree is not installed

LIMIT_S = 240
COPIED = ("pymoe", "tests", "cuda_src", "setup.cfg", "examples")


def run(mutant: Mutant | None, killer: str) -> dict:
    """Return the outcome of one fault, or of none (`mutant` None: the tests must pass)."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.nb?"))
            else:
                shutil.copy2(source, tree / name)
        if mutant is not None:
            file = tree / mutant.file
            text = file.read_text(encoding="utf-8")
            assert text.count(mutant.old) == 1, f"{mutant.name}: {text.count(mutant.old)} places in {mutant.file}"
            file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        env = os.environ | {"PYMOE_CACHE_DIR": str(tree / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout", "120", killer]
        started = time.monotonic()
        try:
            done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=LIMIT_S)
            code, last = done.returncode, (done.stdout.strip().splitlines() or [""])[-1]
        except subprocess.TimeoutExpired:
            code, last = -1, "time limit"
        seconds = round(time.monotonic() - started, 1)
    # 1: a test failed; a crash or a hang is caught as well.  2 to 5: pytest itself did not get that far.
    caught = code == 1 or code < 0
    return {"name": mutant.name if mutant else "none", "killer": killer, "code": code, "caught": caught,
            "seconds": seconds, "last_line": last}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    started = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        sound = list(pool.map(lambda killer: run(None, killer), sorted({mutant.killer for mutant in chosen})))
        broken = [outcome for outcome in sound if outcome["code"] != 0]
        if broken:
            print(json.dumps(broken, indent=1))
            print("the tests fail without any fault")
            return 1
        outcomes = list(pool.map(lambda mutant: run(mutant, mutant.killer), chosen))
    caught = sum(outcome["caught"] for outcome in outcomes)
    for outcome in outcomes:
        print(f"{'caught ' if outcome['caught'] else 'MISSED '} {outcome['seconds']:6.1f} s  {outcome['name']}")
    seconds = round(time.monotonic() - started)
    print(f"{caught} of {len(outcomes)} caught ({100 * caught / len(outcomes):.0f} %) in {seconds} s")
    if not options.only:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        result = {
            "command": "python tests/mutants/run.py", "commit": commit, "python": platform.python_version(),
            "seconds": seconds, "caught": caught, "of": len(outcomes), "outcomes": outcomes,
        }  # fmt: skip
        (Path(__file__).parent / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if caught >= 0.95 * len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
