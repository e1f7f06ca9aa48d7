"""Results as data: rows that cite the run they were measured in, added to one JSON file."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pymoe.bench.machine import same_conditions
from pymoe.errors import ArgumentError, complaint

__all__ = ["Results", "Row", "dump", "write_text"]

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender's time for one number of tokens.

    Attributes
    ----------
    run : str
        Key of the run in the file: device, versions, commit, threads, rates.
    shape : tuple of int
        (E, topk, K, I).
    tokens : int
        M.
    contender, scheme, variant : str
    threads : int
    median_s, min_s : float
        Seconds a call.
    calls : int
        Timed calls.
    spread : float
        Slowest over fastest median of the rounds.
    floor_s : float
        Median over the rotating calls, each from the experts it names.
    bound, gemm : str
        "bytes" or "flops", and whose GEMM rate counted.
    bytes, flops : float
        Least work of a call, means over the rotation.
    error, limit : float
        Relative Frobenius error against float64, and what it may be.
    """

    run: str
    shape: tuple[int, int, int, int]
    tokens: int
    contender: str
    scheme: str
    variant: str
    threads: int
    median_s: float
    min_s: float
    calls: int
    spread: float
    floor_s: float
    bound: str
    gemm: str
    bytes: float
    flops: float
    error: float
    limit: float

    @property
    def key(self) -> str:
        """Name of what was timed, such as ``ours/int8/128``."""
        return f"{self.contender}/{self.scheme}/{self.tokens}"


class Results:
    """The rows and runs of a file; None keeps them in memory alone."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.runs: dict[str, dict[str, Any]] = {}
        self.rows: list[Row] = []
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            self.runs = content["runs"]
            self.rows = [Row(**(row | {"shape": tuple(row["shape"])})) for row in content["rows"]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            got = f"{path} ({type(error).__name__}: {str(error)[:200].rstrip('.')})"
            raise ArgumentError(complaint("pymoe bench", "--results", "hold results of this command", got)) from None

    def begin(self, conditions: dict[str, Any], started: str, resume: bool) -> str:
        """Return the key of a new run, or of the last one where it is resumed.

        Raises
        ------
        ArgumentError
            The last run was measured in other conditions, so that rows of the two must not stand beside each other.
        """
        if resume and self.runs:
            last = max(self.runs)
            different = same_conditions(self.runs[last], conditions)
            if different:
                rule = "continue a run of the same conditions"
                remedy = "Run without --resume to begin a new one"
                raise ArgumentError(complaint("pymoe bench", "--resume", rule, f"other {', '.join(different)}", remedy))
            return last
        while started in self.runs:
            started += "'"
        self.runs[started] = conditions
        return started

    def done(self, run: str, shape: tuple[int, int, int, int]) -> set[str]:
        """Return the keys of the rows that `run` has for `shape`."""
        return {row.key for row in self.rows if row.run == run and row.shape == shape}

    def add(self, rows: list[Row]) -> None:
        """Add rows, as short as a file has them, and save.

        A row replaces the same contender's on the same machine with as many threads.
        """
        rows = [_short(row) for row in rows]
        fresh = {self._place(row) for row in rows}
        self.rows = [row for row in self.rows if self._place(row) not in fresh] + rows
        self.rows.sort(key=lambda row: (row.run, row.shape, row.tokens))
        if self.path is not None:
            write_text(self.path, dump(self) + "\n")

    def _place(self, row: Row) -> tuple[Any, ...]:
        processor = self.runs[row.run]["device"]["processor"]
        return row.shape, row.key, row.threads, processor


def dump(results: Results) -> str:
    """Return the results as JSON with one row a line, so that a diff shows which rows changed; uncited runs go."""
    cited = {row.run for row in results.rows}
    runs = {key: run for key, run in sorted(results.runs.items()) if key in cited}
    head = json.dumps({"format": FORMAT, "runs": runs}, indent=1)
    rows = ",\n".join("  " + json.dumps(dataclasses.asdict(row)) for row in results.rows)
    return head.removesuffix("\n}") + ',\n "rows": [\n' + rows + "\n ]\n}"


def _short(row: Row) -> Row:
    """Return the row with six significant digits: more than any of it was measured to."""
    given = dataclasses.asdict(row).items()
    short: dict[str, Any] = {name: float(f"{value:.6g}") for name, value in given if isinstance(value, float)}
    return dataclasses.replace(row, **short)


def write_text(path: Path, text: str) -> None:
    """Write beside the file, then rename: a reader sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
