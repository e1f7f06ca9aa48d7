"""The benchmark as a whole: build, check against float64, time in turns, store, show."""

from __future__ import annotations

import dataclasses
import datetime
import fnmatch
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pymoe import environment
from pymoe.bench import contenders, machine, rates
from pymoe.bench.cases import SETS, Item, Shape, Weights, draw_items, draw_weights, hidden_dtype
from pymoe.bench.contenders import PEERS, Contender
from pymoe.bench.floor import Floor, Rates, Work, floor, work
from pymoe.bench.reference import Definition, Quantized, frobenius, limit_for
from pymoe.bench.store import Results, Row
from pymoe.bench.timing import QUICK, Pace, Samples, take_turns
from pymoe.errors import ArgumentError, BackendUnavailableError, PymoeError, complaint
from pymoe.ops.quantize.schemes import ALIASES, SCHEMES

__all__ = ["DEFAULT_SCHEMES", "DEFAULT_TOKENS", "Options", "Outcome", "run", "show"]

CALL = "pymoe bench"
DEFAULT_TOKENS = (1, 16, 128, 1024)
QUICK_GEMM_SIDE = 512
DEFAULT_SCHEMES = ("fp32", "bf16", "int8", "fp8", "int4", "mxfp4")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time and where to leave it.

    Attributes
    ----------
    shape : Shape
    tokens : tuple of int
    schemes : tuple of str
        "fp32", "bf16", or a name that `quantize_experts` knows.
    peers : tuple of str, optional
        None is every peer that can be imported.
    only : tuple of str
        Patterns of ``contender/scheme/tokens``; empty is all.
    results : Path, optional
        JSON file to which rows are added.
    resume : bool
        Leave out what the file's last run has.
    quick : bool
        A few short calls: shows that all works, times nothing seriously.
    seed : int
    command : str
        The command line, kept with the run.
    """

    shape: Shape = Shape()
    tokens: tuple[int, ...] = DEFAULT_TOKENS
    schemes: tuple[str, ...] = DEFAULT_SCHEMES
    peers: tuple[str, ...] | None = None
    only: tuple[str, ...] = ()
    results: Path | None = None
    resume: bool = False
    quick: bool = False
    seed: int = 0
    command: str = ""

    def __post_init__(self) -> None:
        for scheme in self.schemes:
            if scheme not in ("fp32", "bf16", *SCHEMES, *ALIASES):
                raise ArgumentError(complaint(CALL, "--schemes", "name fp32, bf16 or a quantization", repr(scheme)))
        for name in self.peers or ():
            if name not in PEERS:
                raise ArgumentError(complaint(CALL, "--peers", f"be among {', '.join(PEERS)}", repr(name)))
            if reason := contenders.importable(name):
                raise BackendUnavailableError(complaint(CALL, "--peers", "name what can be timed", f"{name}: {reason}"))
        if self.resume and self.results is None:
            raise ArgumentError(complaint(CALL, "--resume", "come with --results", None))

    @property
    def pace(self) -> Pace:
        return QUICK if self.quick else Pace()

    def wanted(self, M: int) -> list[tuple[str, str]]:
        """Return (contender, scheme) of what is to be timed for M tokens, ours first."""
        pairs = [("ours", scheme) for scheme in self.schemes]
        for name in PEERS if self.peers is None else self.peers:
            if contenders.importable(name):
                continue
            # fp32 peers answer for fp32 alone if nothing else is asked, bf16 peers for every other scheme.
            needed = {"fp32", *(("bf16",) if set(self.schemes) - {"fp32"} else ())}
            pairs += [(name, scheme) for scheme in PEERS[name][1] if scheme in needed]
        keys = {pair: f"{pair[0]}/{pair[1]}/{M}" for pair in pairs}
        return [pair for pair in pairs if not self.only or any(fnmatch.fnmatch(keys[pair], p) for p in self.only)]


class Outcome(NamedTuple):
    """All results, the key of this run (None: none was), and which contenders were not timed, being wrong."""

    results: Results
    run: str | None
    wrong: tuple[str, ...]

    def check(self) -> None:
        """Raise `PymoeError` if a contender was wrong."""
        if self.wrong:
            rule = "compute the layer before they are timed"
            raise PymoeError(complaint(CALL, "the contenders", rule, "; ".join(self.wrong), "They were not timed"))


def run(options: Options) -> Outcome:
    """Time what is asked; rows are stored after each number of tokens, so that an interrupted run can be resumed.

    Raises
    ------
    ArgumentError
        The results file is none, or its last run cannot be resumed.
    """
    results = Results(options.results)
    started = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    load = machine.load()
    if load > 0.3:
        _say(f"{load:.1f} other processes run on this machine: figures that shall count need a quiet one")
    conditions = machine.describe() | {"seed": options.seed, "pace": dataclasses.asdict(options.pace)}
    key = results.begin(conditions, started, options.resume)
    done = results.done(key, dataclasses.astuple(options.shape))
    pending = {M: [p for p in options.wanted(M) if f"{p[0]}/{p[1]}/{M}" not in done] for M in options.tokens}
    if not any(pending.values()):
        _say("nothing to time: the file has every row, or --only names none")
        return Outcome(results, key, ())
    results.runs[key].setdefault("commands", []).append(options.command)
    bench = _Bench(options, results, key)
    bench.measure_rates([pair for pairs in pending.values() for pair in pairs])
    try:
        for M, pairs in pending.items():
            results.add(bench.rows(M, pairs))
    finally:
        bench.close()
    return Outcome(results, key, tuple(bench.wrong))


def show(options: Options) -> Outcome:
    """Return what the results file holds; nothing is timed."""
    if options.results is None or not options.results.is_file():
        raise ArgumentError(complaint(CALL, "--results", "be a file to show", options.results))
    return Outcome(Results(options.results), None, ())


class _Bench:
    """One run: its weights, its contenders, built when first needed, and the rates of its floor."""

    def __init__(self, options: Options, results: Results, key: str) -> None:
        self.options, self.key, self.record = options, key, results.runs[key]
        self.wrong: list[str] = []
        self._sets: list[Weights] = draw_weights(options.shape, options.seed)
        self._quantized: dict[str, list[Quantized]] = {}
        self._contenders: dict[tuple[str, str], Contender] = {}

    def quantized(self, scheme: str) -> list[Quantized]:
        if scheme not in self._quantized:
            self._quantized[scheme] = [Quantized.of(weights, scheme) for weights in self._sets]
        return self._quantized[scheme]

    def contender(self, pair: tuple[str, str]) -> Contender:
        if pair not in self._contenders:
            name, scheme = pair
            quantized = self.quantized(scheme) if name == "ours" else []
            self._contenders[pair] = contenders.build(name, scheme, self.options.shape, self._sets, quantized)
        return self._contenders[pair]

    def close(self) -> None:
        for contender in self._contenders.values():
            contender.close()

    def _rotating_bytes(self, scheme: str) -> int:
        return round(SETS * self.options.shape.E * self.quantized(scheme)[0].expert_bytes)

    def measure_rates(self, pairs: list[tuple[str, str]]) -> None:
        """Measure what the run does not have yet: before any contender's library has threads of its own."""
        seconds = 0.05 if self.options.quick else 1.5
        known = self.record.setdefault("rates", {"read": {}, "gemm": {}})
        for size in sorted({self._rotating_bytes(scheme) for _, scheme in pairs}):
            if str(size) not in known["read"]:
                known["read"][str(size)] = rates.measure_read(size, seconds)
                _say(f"read rate   {known['read'][str(size)] / 1e9:.1f} GB/s over {size / 1e6:.3g} MB")
        if not known["gemm"]:
            side = QUICK_GEMM_SIDE if self.options.quick else rates.GEMM_SIDE
            known["gemm"] = rates.measure_gemm(side, seconds, environment.num_threads())
            for name, by in known["gemm"].items():
                for library, rate in by.items():
                    _say(f"GEMM rate   {rate / 1e9:.0f} GFLOP/s, {library} {name}")

    def rows(self, M: int, pairs: list[tuple[str, str]]) -> list[Row]:
        """Check and time these contenders for M tokens; wrong ones are noted and left out."""
        if not pairs:
            return []
        _say(f"M {M:<6} comparing {len(pairs)} contenders with float64, then timing them")
        items = draw_items(self.options.shape, M, self._sets, self.options.seed)
        calls: dict[tuple[str, str], list[Any]] = {}
        facts: dict[tuple[str, str], tuple[str, float]] = {}
        for pair, error in self._errors(M, pairs, items).items():
            limit = limit_for(*pair, self.options.shape.K, self.options.shape.I)
            if not error <= limit:
                self.wrong.append(f"{pair[0]}/{pair[1]}/{M} is off by {error:.2e}, limit {limit:.2e}")
                continue
            variant = self._fastest_variant(self.contender(pair), M, items)
            calls[pair] = [self.contender(pair).bind(item.number, item.x, variant) for item in items]
            facts[pair] = variant, error
        samples = take_turns(calls, self.options.pace)
        rows = [self._row(M, pair, samples[pair], facts[pair], items) for pair in calls]
        for row in rows:
            _say(f"M {M:<6} {row.contender:6} {row.scheme:8} {1e3 * row.median_s:9.3f} ms {row.variant}".rstrip())
        return rows

    def _errors(self, M: int, pairs: list[tuple[str, str]], items: list[Item]) -> dict[tuple[str, str], float]:
        """Return the largest error of each contender and of each of its variants, on one call of each weight set."""
        worst = dict.fromkeys(pairs, 0.0)
        for scheme in dict.fromkeys(scheme for _, scheme in pairs):
            for item in items[:SETS]:
                expected = Definition(self._sets[item.number], self.quantized(scheme)[item.number])(item)
                for pair in (pair for pair in pairs if pair[1] == scheme):
                    contender = self.contender(pair)
                    for variant in contender.variants(M):
                        y = contender.as_float32(contender.bind(item.number, item.x, variant)())
                        worst[pair] = max(worst[pair], frobenius(y, expected))
        return worst

    def _fastest_variant(self, contender: Contender, M: int, items: list[Item]) -> str:
        names = contender.variants(M)
        if len(names) == 1:
            return names[0]
        pace = dataclasses.replace(self.options.pace, rounds=2, seconds=self.options.pace.seconds / 2)
        bound = {name: [contender.bind(item.number, item.x, name) for item in items] for name in names}
        taken = take_turns(bound, pace)
        return min(names, key=lambda name: taken[name].median)

    def _row(self, M: int, pair: tuple[str, str], samples: Samples, fact: tuple[str, float], items: list[Item]) -> Row:
        name, scheme = pair
        variant, error = fact
        shape = self.options.shape
        gemm, gemm_name = rates.best_gemm(self.record["rates"]["gemm"], scheme)
        measured = Rates(self.record["rates"]["read"][str(self._rotating_bytes(scheme))], gemm)
        least = self._work(M, scheme, items)
        floors = sorted(floor(w, measured) for w in least)
        middle: Floor = floors[len(floors) // 2]
        return Row(
            self.key, dataclasses.astuple(shape), M, name, scheme, variant, self.contender(pair).threads,
            samples.median, samples.least, samples.calls, samples.spread,
            statistics.median(f.seconds for f in floors), middle.bound, gemm_name,
            statistics.mean(w.bytes for w in least), statistics.mean(w.flops for w in least),
            error, limit_for(name, scheme, shape.K, shape.I),
        )  # fmt: skip

    def _work(self, M: int, scheme: str, items: list[Item]) -> list[Work]:
        """Return the least work of each call of the rotation, from the experts that it names."""
        size = hidden_dtype(scheme).itemsize
        return [
            work(self.options.shape, M, len(np.unique(item.ids)), q.expert_bytes, size)
            for item in items
            for q in (self.quantized(scheme)[item.number],)
        ]


def _say(text: str) -> None:
    """Tell how far the run is, on stderr: the table alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)
