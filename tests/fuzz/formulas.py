"""Random functions of float32 scalars, each in two texts: the user's, and one that says what it is to compute.

In the second every operation is NumPy's on float32 scalars, and what chooses between numbers gives float32; exp and its
like are those of programs, whose accuracy has tests of its own.  So whatever the first becomes on a backend has the
bits that Python gives for the second.

``python -m tests.fuzz.formulas FIRST COUNT`` runs as many seeds on the CPU.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numba import njit

from pymoe.formula import ClosedFunction, Program, close_function, read_function
from pymoe.formula._numba import function_of
from pymoe.formula.words import ELEMENTARY, program_of
from pymoe.ops.activation._numpy import _evaluator
from tests.formula.evaluate import EDGES, defined, same

TABLE, SCALE, WHOLE = (0.5, -0.25, 1.75), 0.3, 3
KNOWN = ("0.1", "2", "1e-3", "-1.5", "7", "math.pi", "SCALE", "WHOLE", "(2.0 / 7)", "-(SCALE * 3)", "math.sqrt(2)",
         "1e20", "0.0")  # fmt: skip
OF_ONE = ("math.exp", "np.exp", "math.log", "np.log1p", "math.tanh", "math.erf", "np.expm1", "math.sqrt", "np.floor",
          "math.ceil", "abs", "math.fabs", "np.sign", "np.square", "np.negative")  # fmt: skip
OF_TWO = ("np.maximum", "np.minimum", "np.add", "np.multiply", "np.divide")
UNTRANSLATED = ("math.atan", "math.sin", "np.arctan", "math.degrees")
f32 = np.float32

Texts = tuple[str, str]


@dataclass(frozen=True)
class Formula:
    """A function of g and u as the user writes it, and as it is to be computed."""

    text: str
    meaning: str

    def function(self):
        return defined(self.text, math=math, np=np, TABLE=TABLE, SCALE=SCALE, WHOLE=WHOLE)

    def expected(self, g, u):
        names = {"math": math, "np": np, "TABLE": tuple(map(f32, TABLE)), "SCALE": SCALE, "WHOLE": WHOLE}
        exec(self.meaning, names := names | MEANINGS)
        with np.errstate(all="ignore"):
            return np.array([names["f"](*x) for x in zip(g, u, strict=True)], f32)


def by_word(word):
    evaluate = _evaluator(program_of(word))
    return lambda *x: f32(evaluate(*map(f32, x)))


def by_float64(function):
    def meaning(x):
        try:
            return f32(function(float(x)))
        except (OverflowError, ValueError):
            return f32(math.nan)

    return meaning


def product(x, n):
    """As programs have it: every product rounded."""
    return {2: x * x, 3: x * x * x, 4: (x * x) * (x * x)}[n]


def wide_product(x, n):
    """As of what is compiled whole: products in float64, rounded once."""
    return f32(product(np.float64(x), n))


def whole(x):
    return 0 if np.isnan(x) else round(min(max(float(x), -(2.0**63)), 2.0**63 - 1024))


MEANINGS = {
    "f32": f32, "product": product, "wide_product": wide_product, "whole": whole,
    "m": {name: by_word(name.split(".")[1]) for name in (*OF_ONE, *OF_TWO) if name.split(".")[-1] in ELEMENTARY}
    | {name: by_float64(getattr(math, name.split(".")[1].replace("arc", "a"))) for name in UNTRANSLATED}
    | {"math.pow": by_word("power"), "abs": abs, "math.fabs": abs, "np.square": lambda x: x * x,
       "np.negative": lambda x: -x, "np.add": lambda x, y: f32(x + y), "np.multiply": lambda x, y: f32(x * y),
       "np.divide": lambda x, y: f32(x / y)},
}  # fmt: skip


def both(form: str, *parts: Texts, meaning: str = "") -> Texts:
    """Return a form filled in with both texts of its parts; `meaning` where the second has another form."""
    return form.format(*(a for a, _ in parts)), (meaning or form).format(*(b for _, b in parts))


class Writer:
    """Writes both texts of one formula; `whole` with what only compilers of whole functions take."""

    def __init__(self, seed: int, whole: bool) -> None:
        self.rng, self.whole = random.Random(seed), whole
        self.names = ["g", "u"]

    def formula(self) -> Formula:
        lines = [line for _ in range(self.rng.randint(1, 4)) for line in self.statement(1)]
        lines += self.loop(1) if self.whole else []
        lines.append(both("    return {}", self.value(3)))
        return Formula(*("\n".join(["def f(g, u):", *text]) for text in zip(*lines, strict=True)))

    def statement(self, depth: int) -> Iterator[Texts]:
        """Yield the lines of a statement."""
        kinds = ["new", "assign", "change", "if", "for"] + ["loop"] * self.whole
        kind = self.rng.choice(kinds if depth == 1 else ["assign", "change"])
        indent, name = "    " * depth, self.rng.choice(self.names)
        match kind:
            case "new":
                yield both(f"{indent}y{len(self.names)} = {{}}", self.value(2))
                self.names.append(f"y{len(self.names)}")
            case "assign":
                yield both(f"{indent}{name} = {{}}", self.value(2))
            case "change":
                yield both(f"{indent}{name} {self.rng.choice('+-*')}= {{}}", self.either(2))
            case "if":
                yield both(f"{indent}if {{}}:", self.truth(1))
                yield from self.statement(depth + 1)
                if self.rng.random() < 0.5:
                    yield (f"{indent}else:",) * 2
                    yield from self.statement(depth + 1)
            case "for":
                yield (f"{indent}for k in range({self.rng.randint(0, 4)}):",) * 2
                yield both(f"{indent}    {name} = {{}} * 0.5 + k", self.value(1))
            case "loop":
                yield from self.loop(depth)

    def loop(self, depth: int) -> Iterator[Texts]:
        """Yield the lines of a loop that is not translated; every one ends."""
        indent, name = "    " * depth, self.rng.choice(self.names)
        head = self.rng.choice(
            ["k, c in enumerate(TABLE)", "c, k in zip(TABLE, TABLE)", "c in TABLE", "c in (0.5, -2.0)"]
        )
        yield (f"{indent}for {head}:",) * 2
        if self.rng.random() < 0.5:
            yield both(f"{indent}    if {{}}: {self.rng.choice(['break', 'continue'])}", self.truth(1))
        yield both(f"{indent}    {name} = {{}} * c", self.value(1))
        if self.rng.random() < 0.5:
            yield (f"{indent}    while 4.0 < abs({name}) < 1e30: {name} = {name} / 3",) * 2

    def value(self, depth: int) -> Texts:
        """Return an expression that holds an argument, so that it is float32 and no number that is known."""
        if depth == 0 or self.rng.random() < 0.1:
            return (self.rng.choice(self.names),) * 2
        kinds = ["binary", "binary", "minus", "one", "one", "two", "extreme", "choice", "where", "power", "product"]
        kinds += ["remainder", "untranslated", "tuple", "whole", "divmod"] * self.whole
        kind, x = self.rng.choice(kinds), self.value(depth - 1)
        mixed = [x, self.either(depth - 1)]
        self.rng.shuffle(mixed)
        match kind:
            case "binary":
                return both(f"({{}} {self.rng.choice('+-*/')} {{}})", *mixed)
            case "minus":
                return both("(-{})", x)
            case "one" | "untranslated":
                name = self.rng.choice(OF_ONE if kind == "one" else UNTRANSLATED)
                return both(f"{name}({{}})", x, meaning=f"m['{name}']({{}})")
            case "two":
                name = self.rng.choice(OF_TWO)
                return both(f"{name}({{}}, {{}})", *mixed, meaning=f"m['{name}']({{}}, {{}})")
            case "extreme":
                call = f"{self.rng.choice(['max', 'min'])}({{}}, {{}}, {{}})"
                return both(call, *mixed, self.either(depth - 1), meaning=f"f32({call})")
            case "choice":
                return both(
                    "({} if {} else {})", mixed[0], self.truth(depth - 1), mixed[1], meaning="f32({} if {} else {})"
                )
            case "where":
                return both("np.where({}, {}, {})", self.truth(depth - 1), *mixed, meaning="f32({1} if {0} else {2})")
            case "power":
                n = self.rng.choice(["0.5", "-1.5", "7"])
                return both(f"({{}} ** {n})", x, meaning=f"m['math.pow']({{}}, {n})")
            case "product":
                n = self.rng.choice("234")
                return both(f"({{}} ** {n})", x, meaning=f"{'wide_' * self.whole}product({{}}, {n})")
            case "remainder":
                return both("({} % {})", *mixed)
            case "tuple":
                call = f"{self.rng.choice(['max', 'min', 'sum'])}(({{}}, {{}}, *TABLE))"
                return both(call, *mixed, meaning=f"f32({call})")
            case "whole":
                return both("(round({}) * 0.25)", x, meaning="f32(whole({}) * 0.25)")
        return both(f"divmod({{}}, 0.7)[{self.rng.randint(0, 1)}]", x)

    def either(self, depth: int) -> Texts:
        """Return an expression or a known number."""
        return (self.rng.choice(KNOWN),) * 2 if self.rng.random() < 0.5 else self.value(depth)

    def truth(self, depth: int) -> Texts:
        compare = self.rng.choice(["<", "<=", ">", ">=", "==", "!="])
        first = both(f"{{}} {compare} {{}}", self.value(max(depth - 1, 0)), self.either(max(depth - 1, 0)))
        if self.rng.random() < 0.7:
            return first
        return both(f"({self.rng.choice(['not {}', '{} and {}', '{} or {}'])})", first, self.truth(0))


def formulas(seeds, whole: bool) -> Iterator[tuple[Formula, Program | ClosedFunction]]:
    """Yield formulas, each with what pymoe makes of it."""
    for seed in seeds:
        formula = Writer(seed, whole).formula()
        read = close_function if whole else read_function
        yield formula, read("call", formula.function(), 2)


def operands(size: int = 40, seed: int = 0):
    """Return g and u of everyday size, and the edges."""
    rng = np.random.default_rng(seed)
    g, u = rng.normal(0, 3, (2, size)).astype(f32)
    edges = rng.permutation(EDGES)
    return np.concatenate([g, EDGES, EDGES]), np.concatenate([u, edges, np.ones_like(edges)])


def by_numba(made: Program | ClosedFunction, g, u):
    formula = function_of(made)

    @njit(error_model="numpy")
    def loop(g, u, y):
        for i in range(len(y)):
            y[i] = formula(g[i], u[i])

    loop(g, u, y := np.empty_like(g))
    return y


def faults(formula: Formula, made: Program | ClosedFunction) -> list[str]:
    """Return where the CPU's backends give other bits than the formula's meaning."""
    g, u = operands()
    expected = formula.expected(g, u)
    found = {"numba": by_numba(made, g, u)}
    if isinstance(made, Program):
        with np.errstate(all="ignore"):
            found["numpy"] = np.broadcast_to(_evaluator(made)(g, u), g.shape)
    return [difference(name, formula, g, u, y, expected) for name, y in found.items() if not same(y, expected)]


def difference(name, formula, g, u, y, expected) -> str:
    at = next(i for i in range(len(g)) if not same(y[i], expected[i]))
    return f"{name}: f({g[at]!r}, {u[at]!r}) is {y[at]!r}, not {expected[at]!r}:\n{formula.text}\n{formula.meaning}"


if __name__ == "__main__":
    first, count = map(int, sys.argv[1:])
    for whole_ in (False, True):
        for formula_, made_ in formulas(range(first, first + count), whole_):
            for fault in faults(formula_, made_):
                print(fault)
