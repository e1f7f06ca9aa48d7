"""Python functions as programs: the bits that Python itself gives on NumPy's float32 scalars, or a refusal by line."""

from __future__ import annotations

import functools
import importlib.util
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pymoe
from pymoe.formula import read_function
from tests.formula.evaluate import EDGES, defined, run, same, sample

SCALE, BIAS, WHOLE, TOGETHER = 0.3, np.float32(0.1), 3, (1.0, 2.0)


def by_python(fn, *arrays):
    """Return what Python gives, scalar by scalar; NumPy's float32 leaves literals at float32."""
    with np.errstate(all="ignore"):
        return np.array([fn(*values) for values in zip(*arrays, strict=True)], np.float32)


def helper(x, factor=2.0):
    return x * factor


def arithmetic(g, u):
    return (g * SCALE + u / 7 - BIAS) * -g + +u - WHOLE * g


def conditional(g, u):
    return g * u if g > u else (u if g <= 0.0 else -u / g)


def chained(g, u):
    return g if -1 < g <= 1 else (u if not (u == 2 or g >= 5) and u != g else 0.25)


def statements(g, u):
    """A docstring."""
    y, z = g, u  # both
    y += 1
    y = z2 = y + 0.25  # the value is computed once
    z = z + z2
    y *= z
    z: float = y - 0.5
    if z > 2:
        y = z
        w = 1.0
    elif z < -2:
        y, w = -z, 2.0
    else:
        w = g
        pass
    return y * w


def early(g, u):
    if g < 0:
        return -u
    if u < 0:
        y = g - u
        if y > 3:
            return y
    else:
        y = u
    return y * 2


def loop(g, u):
    y = 0.0
    for k in range(1, 8, 2):
        y = y * g + k / 3
        if k == 5:
            y = y - u
    return y


def calling(g, u):
    return helper(g) + helper(u, 0.7) - helper(helper(g))


def extremes(g, u):
    return max(g, 0.0) * min(u, 1, g) + abs(-g) - max(min(u, 0.5), -0.5)


def truths(g, u):
    positive = g > 0
    return (u > 0) * g + positive - (not positive) * 0.5


def bools(g, u):
    a = g > u if g > 0 else u > 0
    return 1.5 if a else g


def converted(g, u):
    return float(g) + np.float32(u) * np.float32(0.1) + np.float32(1) / 3


PYTHON = [arithmetic, conditional, chained, statements, early, loop, calling, extremes, truths, bools, converted]


@pytest.mark.parametrize("fn", PYTHON, ids=lambda fn: fn.__name__)
def test_arithmetic_is_pythons_on_float32_scalars(fn):
    rng = np.random.default_rng(3)
    g = np.concatenate([np.repeat(EDGES, len(EDGES)), rng.normal(0, 2, 3000).astype(np.float32), sample(500)])
    u = np.concatenate([np.tile(EDGES, len(EDGES)), rng.normal(0, 2, 3000).astype(np.float32), sample(500, 1)])
    if fn is truths:  # NaN times False is not what a select gives Python either, but bool arithmetic is ours to define
        g, u = g[np.isfinite(g) & np.isfinite(u)], u[np.isfinite(g) & np.isfinite(u)]
    assert same(run(fn, g, u), by_python(fn, g, u))


LEAVES = st.one_of(
    st.sampled_from(["g", "u", "0", "1", "2.5", "-0.1", "1e-3", "3"]), st.floats(-10, 10, width=32).map(repr)
)


def larger(inner):
    two = st.tuples(inner, inner)
    return st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        two.map(lambda t: f"({t[0]} / (abs({t[1]}) + 1))"),
        two.map(lambda t: f"min({t[0]}, {t[1]})"), two.map(lambda t: f"max({t[0]}, {t[1]})"),
        inner.map(lambda t: f"(-{t})"),
        st.tuples(inner, inner, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), inner, inner).map(
            lambda t: f"({t[0]} if {t[1]} {t[2]} {t[3]} else {t[4]})"
        ),
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.recursive(LEAVES, larger, max_leaves=12))
def test_any_expression(text):
    fn = defined(f"f = lambda g, u: {text}")
    rng = np.random.default_rng(4)
    g, u = np.concatenate([rng.normal(0, 3, (2, 60)), np.zeros((2, 3))], axis=1).astype(np.float32)
    try:
        expected = by_python(fn, g, u)
    except ZeroDivisionError:
        return
    assert same(run(fn, g, u), expected)


def test_literals_do_not_promote():
    x = np.float32([1.1])
    assert run(lambda v: v * 0.1, x)[0] == x[0] * np.float32(0.1) != np.float32(np.float64(x[0]) * 0.1)


def test_known_numbers_are_computed_as_python_does_and_rounded_once():
    x = np.float32([1.0])
    assert run(lambda v: v * (2.0 / math.pi) ** 0.5, x)[0] == np.float32(math.sqrt(2 / math.pi))
    assert run(lambda v: v * math.exp(1) if math.tanh(3) < 1 else v, x)[0] == np.float32(math.e)


def test_numbers_from_closures_globals_modules_and_defaults():
    def made(c):
        return lambda v, d=c + 1: v * c + d - SCALE + math.pi

    x = sample(50)
    for c in (2, 2.5, np.float32(0.1), np.int64(7)):
        with np.errstate(all="ignore"):
            expected = x * np.float32(c) + np.float32(c + 1) - np.float32(SCALE) + np.float32(math.pi)
        assert same(run(made(c), x), expected)


def test_maximum_of_numpy_passes_nan_and_pythons_takes_the_first():
    nan, one = np.float32([np.nan]), np.float32([1.0])
    assert np.isnan(run(lambda a, b: np.maximum(a, b), nan, one)).all()
    assert np.isnan(run(lambda a, b: np.minimum(a, b), one, nan)).all()
    assert np.isnan(run(lambda a, b: max(a, b), nan, one)).all() and run(lambda a, b: max(a, b), one, nan) == 1
    assert run(lambda a, b: np.where(a > 0, a, b), nan, one) == 1


def of_numpy(g, u):
    y = np.add(np.multiply(g, 0.1), np.divide(u, 3))
    return np.square(y) - np.negative(g) + np.subtract(y, np.sign(g)) + np.sign(u) * u


def test_numpys_names_of_operators():
    g, u = np.meshgrid(EDGES, EDGES)
    assert same(run(of_numpy, g.ravel(), u.ravel()), by_python(of_numpy, g.ravel(), u.ravel()))
    signs = run(lambda x: 1.0 / np.sign(x), np.float32([0.0, -0.0, -2, np.nan]))
    assert same(signs, [np.inf, np.inf, -1, np.nan])


def test_large_numbers_may_stand_between_known_ones():
    x = np.float32([2.0])
    assert run(lambda v: v * math.log(1e20 * 1e20), x)[0] == x[0] * np.float32(math.log(1e40))
    assert run(lambda v: v if v < math.inf else -math.inf, x)[0] == 2


def test_lambdas_of_one_line_are_told_apart():
    first, second = lambda v: v + 1.0, lambda v: v + 2.0
    x = np.float32([0.0])
    assert (run(first, x), run(second, x)) == (1, 2)
    both = [lambda v: v * 3.0, lambda v: v * 5.0]
    assert [run(fn, x + 1)[0] for fn in both] == [3, 5]


def test_what_numba_has_compiled_is_read():
    numba = pytest.importorskip("numba")
    x = sample(20)
    assert same(run(numba.njit(arithmetic), x, x[::-1]), run(arithmetic, x, x[::-1]))


def counted(fn):
    @functools.wraps(fn)
    def around(*args):
        return fn(*args)

    return around


def line_of(text, mark="#!"):
    return next(i for i, line in enumerate(text.splitlines(), 1) if mark in line)


REFUSED = {
    "a while loop": ("def f(g, u):\n    while g > 0: #!\n        g = g - 1\n    return g", "translated statements"),
    "a loop over a list": ("def f(g, u):\n    for k in [1, 2]: #!\n        g += k\n    return g", "a range of known"),
    "an assignment inside": ("def f(g, u):\n    return (y := g) + y #!", "translated expressions only, not NamedExpr"),
    "another name": ("def f(g, u):\n    m = max #!\n    return m(g, u)", "use numbers only; got max"),
    "a loop over g": ("def f(g, u):\n    for k in range(g): #!\n        u += k\n    return u", "over a range of known"),
    "a long loop": ("def f(g, u):\n    for k in range(65): #!\n        u += k\n    return u", "at most 64 times"),
    "break": ("def f(g, u):\n    for k in range(3): #!\n        break\n    return u", "without break"),
    "a list": ("def f(g, u):\n    y = [g] #!\n    return y", "translated expressions only, not List"),
    "a subscript": ("def f(g, u):\n    return pair[0] * g #!", "translated expressions only, not Subscript"),
    "a string": ("def f(g, u):\n    return g * 'a' #!", "translated expressions only, not Constant"),
    "None": ("def f(g, u):\n    return None #!", "translated expressions only, not Constant"),
    "no value": ("def f(g, u):\n    return #!", "return a number on every path"),
    "a path without an answer": ("def f(g, u):\n    if g > 0: #!\n        return g", "return a number on every path"),
    "no return": ("def f(g, u): #!\n    g = g + 1", "return a number on every path"),
    "an unknown name": ("def f(g, u):\n    return g * missing #!", "use names that exist"),
    "a name of one branch": ("def f(g, u):\n    if g > 0:\n        y = g\n    return y #!", "assign names before use"),
    "an unknown attribute": ("def f(g, u):\n    return g * math.tau2 #!", "use names that exist"),
    "an attribute of a number": ("def f(g, u):\n    return g.real #!", "from outside only"),
    "an attribute of an object": ("def f(g, u):\n    return g * thing.factor #!", "attributes of modules only"),
    "a method": ("def f(g, u):\n    return g.sum() #!", "from outside only"),
    "an unknown function": ("def f(g, u):\n    return math.sin(g) #!", "call translated functions only"),
    "another library's function": ("def f(g, u):\n    return np.sinc(g) #!", "translated"),
    "a class": ("def f(g, u):\n    return complex(g) #!", "call translated functions only"),
    "a keyword": ("def f(g, u):\n    return pow(base=g, exp=u) #!", "translated expressions only, not Call"),
    "stars": ("def f(g, u):\n    return max(*(g, u)) #!", "translated expressions only, not Call"),
    "one argument too many": ("def f(g, u):\n    return math.exp(g, u) #!", "give math.exp 1 arguments"),
    "modulo": ("def f(g, u):\n    return g % u #!", "translated operators only"),
    "whole division": ("def f(g, u):\n    return g // u #!", "translated operators only"),
    "bits": ("def f(g, u):\n    return ~g #!", "translated operators only"),
    "identity": ("def f(g, u):\n    return g if g is u else 1 #!", "translated comparisons only"),
    "and of numbers": ("def f(g, u):\n    return g and u #!", "join truth values only"),
    "a large number": ("def f(g, u):\n    return g * 1e39 #!", "that float32 can hold"),
    "a large default": ("def f(g, u, c=1e39):\n    return g * c #!", "that float32 can hold; got g * c"),
    "a large default that changes": ("def f(g, u, c=1e39):\n    c *= u #!\n    return g", "hold; got c * u"),
    "a large product": ("def f(g, u):\n    return g * (1e20 * 1e20) #!", "that float32 can hold"),
    "a large power": ("def f(g, u):\n    return max(g, 10**400) #!", "that float32 can hold"),
    "a large exp": ("def f(g, u):\n    return g if u > math.exp(700) else u #!", "that float32 can hold"),
    "a large answer": ("def f(g, u): #!\n    return 1e20 * 1e20", "return numbers that float32 can hold"),
    "a division by zero": ("def f(g, u):\n    return g * (1 / 0) #!", "compute numbers that exist"),
    "a complex number": ("def f(g, u):\n    return g * 1j #!", "translated expressions only"),
    "a complex root": ("def f(g, u):\n    return g * (-1) ** 0.5 #!", "use numbers only"),
    "an array": ("def f(g, u):\n    return g * array #!", "use numbers only; got array, which is a ndarray,"),
    "an inner function": ("def f(g, u):\n    def h(x): #!\n        return x\n    return h(g)", "translated statements"),
    "a lambda inside": ("def f(g, u):\n    return (lambda x: x)(g) #!", "translated expressions only, not Lambda"),
    "a comprehension": ("def f(g, u):\n    return sum(x for x in (g, u)) #!", "translated expressions only"),
    "global": ("def f(g, u):\n    global h #!\n    h = g\n    return g", "translated statements"),
    "recursion": ("def f(g, u):\n    return f(g, u) #!", "not call itself"),
    "recursion of two": ("def f(g, u):\n    return h(g, u)\ndef h(g, u):\n    return f(g, u) #!", "not call itself"),
    "a helper's fault": ("def f(g, u):\n    return h(g)\ndef h(x):\n    return x % 2 #!", "translated operators only"),
    "a helper of other arity": ("def f(g, u):\n    return h(g, u) #!\ndef h(x):\n    return x", "take 2 positional"),
    "one parameter": ("def f(g): #!\n    return g", "take 2 positional arguments; got f(g)"),
    "three parameters": ("def f(g, u, v): #!\n    return g", "take 2 positional arguments; got f(g, u, v)"),
    "a keyword parameter": ("def f(g, u, *, k): #!\n    return g", "take 2 positional arguments"),
    "*args": ("def f(*args): #!\n    return 1.0", "neither *args nor **kwargs"),
    "**kwargs": ("def f(g, u, **rest): #!\n    return 1.0", "neither *args nor **kwargs"),
    "a default that is no number": ("def f(g, u, k='a'): #!\n    return g", "use numbers only"),
    "a generator": ("def f(g, u): #!\n    yield g", "return a number; got the generator"),
    "a coroutine": ("async def f(g, u): #!\n    return g", "return a number; got the generator or coroutine"),
    "deletion": ("def f(g, u):\n    del g #!\n    return u", "translated statements"),
    "unpacking": ("def f(g, u):\n    a, b = together #!\n    return a", "assign to names only"),
    "an assignment elsewhere": ("def f(g, u):\n    thing.x = g #!\n    return g", "assign to names only"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_file_and_line(case):
    text, rule = REFUSED[case]
    thing = type("Thing", (), {"factor": 2.0})()
    fn = defined(text, math=math, np=np, pair=(1.0, 2.0), thing=thing, array=np.ones(3), together=TOGETHER)
    with pytest.raises(pymoe.ArgumentError) as caught:
        read_function("register_activation", fn, 2)
    said = str(caught.value)
    assert said.startswith("register_activation: fn must ")
    assert rule in said and f"at {fn.__code__.co_filename}:{line_of(text)}" in said, said


@pytest.mark.parametrize(
    "fn",
    [math.exp, np.exp, float, functools.partial(helper, factor=2), print],
    ids=["math.exp", "numpy.exp", "float", "partial", "print"],
)
def test_what_is_no_python_function_is_refused(fn):
    with pytest.raises(pymoe.ArgumentError, match="fn must be a Python function"):
        read_function("call", fn, 1)


def test_a_wrapper_is_refused_as_what_it_is():
    with pytest.raises(pymoe.ArgumentError, match=r"neither \*args nor"):
        read_function("call", counted(arithmetic), 2)


def test_no_source_text():
    names = {}
    exec("def f(x): return x", names)
    with pytest.raises(pymoe.ArgumentError, match="have its source text at hand; got f: there is no source text"):
        read_function("call", names["f"], 1)


def loaded(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "later", ["def f(x):\n    return x * 3.0\n", "\ndef f(x):\n    return x * 2.0\n", "def f(x:\n", "x = 1\n",
              "def f(x):\n    return x * 2\n"]
)  # fmt: skip
def test_a_file_that_has_changed_since_is_not_believed(tmp_path, monkeypatch, later):
    """The text would be another function's: what Python runs and what the GPU runs must be one."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "mine.py"
    path.write_text("def f(x):\n    return x * 2.0\n")
    f = loaded(path, "mine").f
    assert run(f, np.float32([1.5])) == 3
    path.write_text(later + "# longer\n")
    with pytest.raises(pymoe.ArgumentError, match="has changed since it was loaded"):
        read_function("call", f, 1)


def test_too_long_and_too_deep():
    body = "".join(f"    y = y * g + math.tanh(y + {k})\n" for k in range(200))
    with pytest.raises(pymoe.ArgumentError, match="take at most 4000 operations"):
        read_function("call", defined(f"def f(g):\n    y = g\n{body}    return y", math=math), 1)
    branches = "".join(f"    if g > {k}:\n        if u > {k}:\n            return u\n" for k in range(40))
    with pytest.raises(pymoe.ArgumentError, match="take at most 4000 operations"):
        read_function("call", defined(f"def f(g, u):\n{branches}    return g"), 2)


def test_equal_work_is_done_once():
    program = read_function("call", lambda g, u: math.exp(g) * u + math.exp(g), 2)
    once = read_function("call", lambda g, u: math.exp(g), 2)
    assert len(program.steps) == len(once.steps) + 2
