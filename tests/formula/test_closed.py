"""Functions that are not translated: what Numba makes of them is Python's answer on float32, whatever changes later."""

from __future__ import annotations

import linecache
import math

import numpy as np
import pytest

import pymoe
from pymoe.formula import ClosedFunction, Untranslated, close_function, read_function
from pymoe.formula._numba import check, function_of
from tests.formula import untranslated
from tests.formula.evaluate import defined, same
from tests.formula.test_reader import by_python, line_of

SINE = 2.0


def run(fn, *arrays):
    """Return what Numba gives, through the kernel that layers run."""
    from pymoe.ops.activation._numba_formula import rows

    closed = close_function("call", fn, len(arrays))
    x = np.concatenate([a.reshape(1, -1) for a in arrays], axis=1)
    y = np.empty((1, len(arrays[0])), np.float32)
    rows(closed, len(arrays) == 2)(0, 1, x, y, np.empty((0, 0), np.uint16))
    return y[0]


@pytest.mark.parametrize("fn", untranslated.GATED, ids=lambda fn: fn.__name__)
def test_the_translator_refuses_them(fn):
    with pytest.raises(Untranslated):
        read_function("call", fn, 2)


def repeated(g, u):
    y = g
    while abs(y) > 2:
        y = y * 0.3 - 0.1
    for k in range(7):
        if y > u:
            break
        y = y + k / 3
    else:
        y -= 1
    return y * 0.1


def indexed(g, u):
    y = 0
    for k, c in enumerate(untranslated.TABLE):
        y = y * g + c * k
    a, b, c = untranslated.TABLE
    return y + a * untranslated.TABLE[1] - b / c + u % 1.5


def nested(g, u):
    def inner(x, y=0.3):
        return x * y if x < 2 else x - y

    return inner(g) + (lambda x: x * 1.1)(u) + inner(u, 0.7)


@pytest.mark.parametrize("fn", [repeated, indexed, nested, untranslated.helped, untranslated.picked],
                         ids=lambda fn: fn.__name__)  # fmt: skip
def test_arithmetic_is_pythons_on_float32_scalars(fn):
    """Python's own loops, on NumPy's float32, whose operations round one by one and take literals as they are."""
    g, u = untranslated.operands(1500)
    assert same(run(fn, g, u), by_python(fn, g, u))


@pytest.mark.parametrize(
    "fn", [untranslated.wave, untranslated.horner, untranslated.newton], ids=lambda fn: fn.__name__
)
def test_functions_are_near_the_true_value(fn):
    g, u = untranslated.operands(1500)
    g, u = g[np.abs(g) > 1e-20], u[np.abs(g) > 1e-20]
    expected = np.array([fn(float(a), float(b)) for a, b in zip(g, u, strict=True)])
    got = run(fn, g, u).astype(np.float64)
    limit = 2e-5 if fn is untranslated.newton else 2e-6  # it stops at 1e-5
    assert (np.abs(got - expected) <= limit * (1 + np.abs(g.astype(np.float64) * u) + np.abs(expected))).all()


def test_exp_and_its_like_have_the_bits_of_programs():
    def looped(g, u):
        y = g
        while y > 9:
            y = y / 2
        return math.exp(y) / math.tanh(u) + math.sqrt(abs(u)) + math.log1p(abs(g)) ** 1.5

    def straight(g, u):
        return math.exp(g) / math.tanh(u) + math.sqrt(abs(u)) + math.log1p(abs(g)) ** 1.5

    from tests.formula.evaluate import run as run_program

    g, u = untranslated.operands(1500)
    g, u = g[g < 9], u[g < 9]
    assert same(run(looped, g, u), run_program(straight, g, u))


def test_numbers_are_those_of_the_moment():
    table, helper = np.array([2.0, 3.0]), defined("def helper(x):\n    return x - x", "helper")
    text = "def f(x):\n    while x > 50: x = x / 2\n    return x * factor + table[1] + helper(x)"
    fn = defined(text, factor=2.0, table=table, helper=helper)
    closed = close_function("call", fn, 1)
    table[1], fn.__globals__["factor"], fn.__globals__["helper"] = 7, 5.0, None
    assert function_of(closed)(np.float32(1.5)) == 6


def made(c):
    def f(x):
        y = x
        while y > 2:
            y = y - c
        return y

    return f


def test_the_digest_tells_code_and_numbers_apart():
    def digest(fn):
        return close_function("call", fn, 1).digest

    assert digest(made(1.0)) == digest(made(1.0)) != digest(made(1.5))
    assert digest(made(0.0)) != digest(made(-0.0)) and digest(made(1)) != digest(made(1.0)) != digest(made(True))
    texts = ["while x > 2: x -= 1", "while x > 2: x -= 2", "while x >= 2: x -= 1", "while x > 2:   x -= 1  # other"]
    found = [digest(defined(f"def f(x):\n    {text}\n    return x")) for text in texts]
    assert found[0] == found[3] and len(set(found)) == 3
    helpers = [defined(f"def h(x):\n    return x % {n}", "h") for n in (2, 3)]
    found = [digest(defined("def f(x):\n    return h(x)", h=h)) for h in helpers]
    assert found[0] != found[1]


def registered(text, gated=True, **names):
    fn = defined(text, math=math, np=np, **names)
    return fn, lambda: pymoe.register_activation("test_closed_bad", fn, gated)


TAKEN = {
    "a while loop": "def f(g, u):\n    while g > 0:\n        g = g - 1\n    return g",
    "a long loop": "def f(g, u):\n    for k in range(65):\n        u += k\n    return u",
    "break": "def f(g, u):\n    for k in range(3):\n        break\n    return u",
    "another function": "def f(g, u):\n    return math.sin(g)",
    "modulo": "def f(g, u):\n    return g % u + g // 2",
    "a subscript": "def f(g, u):\n    return pair[0] * g",
    "and of numbers": "def f(g, u):\n    return g and u",
    "an inner function": "def f(g, u):\n    def h(x):\n        return x\n    return h(g)",
    "a lambda inside": "def f(g, u):\n    return (lambda x: x)(g)",
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_what_was_refused_is_taken(case):
    closed = close_function("call", defined(TAKEN[case], math=math, np=np, pair=(1.0, 2.0)), 2)
    check("call", closed, "reason")
    assert isinstance(closed, ClosedFunction) and closed.arity == 2


REFUSED = {
    "a text": ("def f(g, u):\n    while g > 1: g -= 1\n    return 'a' * g #!", "Numba does not compile it either: "),
    "a dictionary": ("def f(g, u):\n    y = {1: g}\n    return y[u] #!", "Numba does not compile it either: "),
    "an attribute": ("def f(g, u):\n    return g.missing #!", "either: Unknown attribute 'missing'"),
    "a list": ("def f(g, u): #!\n    y = [g]\n    return y", "return a number on every path; got list(float32)"),
    "a path without an answer": ("def f(g, u): #!\n    while g > 1:\n        return g", "on every path; got Optional"),
    "a complex number": ("def f(g, u):\n    return complex(g) #!", "use real numbers only; got complex(g)"),
    "an imaginary one": ("def f(g, u):\n    return abs(g * 1j) #!", "use real numbers only; got 1j"),
    "another width": ("def f(g, u):\n    return np.int32(g) #!", "use whole numbers of 64 bits only"),
    "an assignment inside": ("def f(g, u):\n    return (y := g % 2) + y #!", "assign names in statements of their own"),
    "a type without a number": ("def f(g, u):\n    y: float\n    if g % 2 > 1: y = u\n    return y #!", "before use"),
    "an array": ("def f(g, u): #!\n    return g * array", "return a number on every path; got array(float32"),
    "an object": ("def f(g, u):\n    return g * thing.factor #!", "tuples and arrays of numbers, only; got thing"),
    "a name that is none": ("def f(g, u):\n    while g > 1: g -= missing #!\n    return g", "use names that exist"),
    "a large number": ("def f(g, u):\n    while g > 1: g -= 1e39 #!\n    return g", "that float32 can hold; got 1e+39"),
    "a large number of a tuple": ("def f(g, u):\n    return pair[1] * g #!", "that float32 can hold; got pair"),
    "a large number of an array": ("def f(g, u):\n    return larges[0] * g #!", "that float32 can hold; got larges"),
    "a large number in a loop": ("def f(g, u):\n    for c in (1, 1e39): g += c #!\n    return g", "got (1, 1e+39)"),
    "a large result": ("def f(g, u):\n    return g % (1e20 * 1e20) #!", "that float32 can hold; got 1e+20 * 1e+20"),
    "a large default": ("def f(g, u, c=1e39):\n    return g % c #!", "that float32 can hold; got c"),
    "a large default that changes": ("def f(g, u, c=1e39): #!\n    c -= g % 2\n    return c", "the default of c"),
    "a division of known numbers": ("def f(g, u):\n    return g % (1 / 0) #!", "compute numbers that exist; got 1 / 0"),
    "an exception": ("def f(g, u):\n    if g % 2 > 1:\n        raise ValueError #!\n    return g", "neither raise"),
    "assert": ("def f(g, u):\n    while g > 1: g -= 1\n    assert g < 1 #!\n    return g", "neither raise, catch nor"),
    "try": ("def f(g, u):\n    try: #!\n        return g % u\n    except ValueError: return u", "neither raise"),
    "print": ("def f(g, u):\n    print(g) #!\n    return g", "must not print; got print(g)"),
    "recursion": ("def f(g, u):\n    return f(g, u) if g % 2 > 1 else u #!", "not call itself"),
}  # fmt: skip


UNASSIGNED = [
    "    t = [y * k for k in (1, 2)] #!\n    y = g % 2\n    return y",
    "    while g > 1:\n        y = g\n        g = g - 1\n    return y #!",
    "    while g > 1:\n        y += g #!\n    return g",
    "    for k in range(int(g)):\n        y = g\n    return y #!",
    "    for k in range(3):\n        if g > 1:\n            break\n        y = g % 2\n    return y #!",
    "    while g > 1:\n        g -= 1\n    if g > 0:\n        y = 1.0\n    return y * g #!",
    "    for k in range(3):\n        if g % 2 > k:\n            continue\n        y = g\n    return y #!",
]
ASSIGNED = [
    "    for k in range(1, N):\n        y = g % 2\n    return y",
    "    while True:\n        y = g\n        if y % 2 < 5:\n            break\n    return y",
    "    for c in table:\n        if g > c:\n            y = g\n            break\n    else: y = 2\n    return y",
    "    for k, c in enumerate(table):\n        y = g % 2 * c + k\n    return y",
    "    if g % 2 > 1:\n        return g\n    else:\n        y = 1.0\n    return y",
    "    def h(a):\n        b = a\n        return b\n    return h(g)",
]


@pytest.mark.parametrize("text", UNASSIGNED)
def test_a_name_that_a_path_leaves_unassigned_is_refused(text):
    """Numba would take whatever lies in a register."""
    fn, register = registered(f"def f(g):\n{text}", gated=False)
    with pytest.raises(pymoe.ArgumentError, match="must assign names before use, on every path") as caught:
        register()
    assert f"{fn.__code__.co_filename}:{line_of(text) + 1}" in str(caught.value)


@pytest.mark.parametrize("text", ASSIGNED)
def test_names_that_every_path_assigns_are_taken(text):
    closed = close_function("call", defined(f"def f(g):\n{text}", N=3, table=(0.5, 1.5)), 1)
    check("call", closed, "reason")


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_file_and_line(case):
    text, rule = REFUSED[case]
    thing = type("Thing", (), {"factor": 2.0})()
    fn, register = registered(text, thing=thing, array=np.ones(3), pair=(1, -1e39), larges=np.array([1e39, np.inf]))
    with pytest.raises(pymoe.ArgumentError) as caught:
        register()
    said = str(caught.value)
    assert said.startswith("register_activation: fn must ") and rule in said, said
    assert f"{fn.__code__.co_filename}:{line_of(text)}" in said, said
    with pytest.raises(pymoe.ArgumentError, match="activation must be one of silu, "):
        pymoe.ActivationConfig("test_closed_bad")


ALIASED = {
    "a local name": "m = max\n    return m(g, 2.0)",
    "a name of a name": "t = math.exp\n    s = t\n    return s(g)",
    "a choice": "return (max if g > 0 else min)(g, u)",
    "an element": "return (max, min)[0](g, u)",
    "an argument": "h = lambda a, b: a(b, 2.0)\n    return h(np.maximum, g)",
    "an argument of map": "for y in map(abs, (g, u)):\n        g += y\n    return g",
    "a method": "return np.add.reduce(TABLE) * g",
    "an annotated name": "m: object = max\n    return m(g, 2.0)",
}  # fmt: skip


@pytest.mark.parametrize("case", ALIASED)
def test_functions_of_libraries_have_no_other_names_inside(case):
    """Numba has answers of its own there: which NaN of max stays, the last bits of exp, a square root by hardware."""
    fn, register = registered(f"def f(g, u):\n    {ALIASED[case]}", TABLE=untranslated.TABLE)
    with pytest.raises(pymoe.ArgumentError, match="call Python's and libraries' functions by their names") as caught:
        register()
    assert f" at {fn.__code__.co_filename}:" in str(caught.value)


@pytest.mark.parametrize(
    "body, rule",
    [
        ("p = (g, 2.0)\n    return max(*p)", r"one by one, or in a tuple .*; got max\(\*p\) at .*:3\."),
        ("p = (g, 2.0)\n    return min(p)", r"one by one, or in a tuple .*; got min\(p\) at .*:3\."),
        ("p = (g, 2.0)\n    return math.atan2(*p)", r"one by one, or in a tuple .*; got math\.atan2\(\*p\) at .*:3\."),
        ("return sum([c * g for c in (1, 2)])", r"one by one, or in a tuple .*; got sum\(\[c \* g"),
        ("return max(g % 2, u, key=abs)", r"give max 1 to 64 numbers and no keywords; got max\(g % 2, u, key"),
        ("return math.exp(*(g, u))", r"give math\.exp 1 arguments; got math\.exp\(\*\(g, u\)\) at .*:2"),
    ],
)  # fmt: skip
def test_what_hides_numbers_from_max_and_its_like_is_refused(body, rule):
    _, register = registered(f"def f(g, u):\n    {body}")
    with pytest.raises(pymoe.ArgumentError, match=rule):
        register()


PAIR = (0.75, -2.0)


def joined(g, u):
    return max((g, 2.0 % 3, u)) - min(*PAIR, g % 5) + max(2.0, *(u, g)) * sum(PAIR) + sum((g, u, g), 0.5)


def of_numpy(g, u):
    y = np.add(np.multiply(g, 0.1), np.divide(u, 3)) % 0.7
    return np.square(y) - np.negative(g) + np.subtract(y, np.floor_divide(g, 0.3)) + np.fabs(u) + np.sign(g % 2 - 1)


def of_either(g, u):
    y = np.maximum(g, u % 7) - np.minimum(u, np.maximum(g, 0.5))
    return np.where(y > 1, y, np.where(u < 0.5, g, 0.1)) % 3


def split(g, u):
    q, r = divmod(g, 0.3)
    return q * 0.1 + r - u


def rebound(g, u, c=2.0, table=(0.5, 0.25), *, n=3):
    while c < u:
        c = c * n
    for t in table:
        g = g * t
    return c + g * table[1] % n


def otherwise_named(g, u, f=max, k=abs):
    return f(g, 2.0) + LARGER(u, g % 2) - k(u)


LARGER = max


@pytest.mark.parametrize(
    "fn", [joined, of_numpy, of_either, split, rebound, otherwise_named], ids=lambda fn: fn.__name__
)
def test_calls_are_pythons_on_float32_scalars(fn):
    g, u = untranslated.operands(1500)
    g, u = (np.append(x, np.float32([1, np.nan, np.nan, np.inf, 2])) for x in (g, u[::-1]))
    assert same(run(fn, g, u), by_python(fn, g, u))


@pytest.mark.parametrize(
    "call, operators",
    [("divmod(x, 0.3)[1]", "(x // 0.3, x % 0.3)[1]"), ("np.remainder(x, 0.3)", "x % 0.3"),
     ("np.add(x % 2, 1)", "x % 2 + 1")],
)  # fmt: skip
def test_calls_that_are_operators(call, operators):
    """As the compiler's own, CUDA has other remainders, and no np.add at all."""
    texts = [f"def f(x):\n    return {text}" for text in (call, operators)]
    assert len({close_function("call", defined(text, np=np), 1).digest for text in texts}) == 1


def test_numbers_that_are_known_are_computed_once_in_float64():
    def looped(x):
        while x > 1e30:
            x = x / 2
        return x * (2.0 / math.pi) ** 0.5 + 1 / 3 + x / (math.exp(1) * 2**5)

    def straight(x):
        return x * (2.0 / math.pi) ** 0.5 + 1 / 3 + x / (math.exp(1) * 2**5)

    from tests.formula.evaluate import run as run_program

    x = np.random.default_rng(5).normal(0, 3, 1000).astype(np.float32)
    assert same(run(looped, x), run_program(straight, x))


def test_whole_numbers_of_any_float():
    """Compilers leave open what a float beyond 64 bits gives, and processors differ."""

    def whole(x):
        return int(x) * 2.0**-30

    def nearest(x):
        return round(x) * 2.0**-30

    def cut(x):
        return math.trunc(x) * 2.0**-30 + np.int64(x) * 2.0**-30

    x = np.float32([1.5, -2.5, 3.5, 9e17, -9e17, 1e19, -1e19, 3e38, np.inf, -np.inf])
    held = np.clip(x.astype(np.float64), -(2.0**63), 2.0**63)
    assert same(run(whole, x), np.trunc(held) * 2.0**-30)
    assert same(run(nearest, x), np.rint(held) * 2.0**-30)
    assert same(run(cut, x), np.trunc(held) * 2.0**-29)
    assert [run(fn, np.float32([np.nan]))[0] for fn in (whole, nearest, cut)] == [0, 0, 0]


def test_whole_numbers_beyond_64_bits_are_floats():
    text = "def f(x):\n    return x % 10**30 * 1267650600228229401496703205376 + table[0] - large"
    fn = defined(text, large=2**97, table=(2**98, -(2**63)))
    assert same(run(fn, np.float32([1.5, 0.0])), np.float32([1.5 * 2.0**100 + 2.0**97, 2.0**97]))


def test_infinities_on_purpose_stay():
    fn = defined("def f(x):\n    return min(x % 3, table[0]) + (inf if x > 5 else array[1])", table=(math.inf, 1.0),
                 array=np.array([1e3, -np.inf]), inf=math.inf)  # fmt: skip
    assert same(run(fn, np.float32([1, 6])), [-np.inf, np.inf])


def test_a_helper_must_have_a_text():
    fn = defined("def f(x):\n    while x > 2: x -= 1\n    return h(x)", h=eval("lambda x: x"))
    with pytest.raises(pymoe.ArgumentError, match="have its source text at hand; got <lambda>: there is no source"):
        pymoe.register_activation("test_closed_bad", fn, gated=False)


def test_the_text_must_be_that_of_the_code():
    fn = defined("def f(x):\n    while x > 2: x -= 1\n    return x")
    file = fn.__code__.co_filename
    changed = "def f(x):\n    while x > 2: x -= 2\n    return x"
    linecache.cache[file] = (len(changed), None, changed.splitlines(True), file)
    with pytest.raises(pymoe.ArgumentError, match="has changed since it was loaded"):
        pymoe.register_activation("test_closed_changed", fn, gated=False)
