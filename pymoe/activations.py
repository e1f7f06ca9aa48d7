"""The activation between GEMM1 and GEMM2: its names, its parameters and the users' own functions.

No arithmetic stands here; ``pymoe.ops.activation`` computes.  Formulas: ``docs/numerics``.
"""

from __future__ import annotations

import enum
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from pymoe.errors import ArgumentError, DTypeError, UnsupportedError, complaint
from pymoe.formula import ClosedFunction, Program, Untranslated, close_function, read_function
from pymoe.formula.source import where

__all__ = ["ActivationConfig", "MoEActivation", "RegisteredActivation", "find_activation", "register_activation",
           "registered_activations"]  # fmt: skip


class MoEActivation(enum.Enum):
    """Activations under vLLM's names; the value string is the public spelling.

    Gated members read ``x (..., N)`` as gate and up halves and write ``(..., N // 2)``; ``SWIGLUOAI`` has gate and up
    interleaved (even columns gate).  Members that end in ``_NO_MUL`` keep the width.
    """

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU2 = "relu2"
    SWIGLUOAI = "swigluoai"
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"
    SWIGLUSTEP = "swiglustep"
    SITU = "situ"
    SILU_NO_MUL = "silu_no_mul"
    GELU_NO_MUL = "gelu_no_mul"
    GELU_TANH_NO_MUL = "gelu_tanh_no_mul"
    RELU2_NO_MUL = "relu2_no_mul"

    @property
    def is_gated(self) -> bool:
        """Whether GEMM1 yields gate and up, so that the activation halves the width."""
        return not self.value.endswith("_no_mul")

    @property
    def is_interleaved(self) -> bool:
        """Whether gate and up rows of w1 alternate (even rows gate) instead of standing in two halves."""
        return self is MoEActivation.SWIGLUOAI

    def without_mul(self) -> MoEActivation:
        """Return the non-gated form of SILU, GELU, GELU_TANH and RELU2; other members return themselves."""
        return _WITHOUT_MUL.get(self, self)

    @classmethod
    def from_str(cls, name: str) -> MoEActivation:
        """Return the member with value `name` (``gelu_pytorch_tanh`` is an alias of ``gelu_tanh``)."""
        name = "gelu_tanh" if name == "gelu_pytorch_tanh" else name
        for member in cls:
            if member.value == name:
                return member
        valid = ", ".join(member.value for member in cls)
        raise ArgumentError(complaint("MoEActivation.from_str", "name", f"be one of {valid}", repr(name)))


_WITHOUT_MUL = {
    MoEActivation.SILU: MoEActivation.SILU_NO_MUL,
    MoEActivation.GELU: MoEActivation.GELU_NO_MUL,
    MoEActivation.GELU_TANH: MoEActivation.GELU_TANH_NO_MUL,
    MoEActivation.RELU2: MoEActivation.RELU2_NO_MUL,
}


@dataclass(frozen=True)
class RegisteredActivation:
    """A user's activation: ``fn(gate, up)`` of float32 scalars if gated, else ``fn(x)``.

    Two of one name are equal if what they compute is, as `program` has it.
    """

    name: str
    fn: Callable[..., Any] = field(compare=False)
    is_gated: bool
    program: Program | ClosedFunction = field(repr=False)
    is_interleaved = False

    @property
    def value(self) -> str:
        """The name, so that both kinds of activation read alike."""
        return self.name


Activation = MoEActivation | RegisteredActivation

_registry: dict[str, RegisteredActivation] = {}
_registry_lock = threading.Lock()
_ALIASES = ("gelu_pytorch_tanh",)


def register_activation(name: str, fn: Callable[..., Any], gated: bool = True) -> RegisteredActivation:
    """Register a Python function of float32 scalars as an activation called `name`.

    It is read from its source text and translated for every backend; on CUDA it becomes part of GEMM1's epilogue.
    Arithmetic, comparisons, conditional expressions, ``if``, local names, ``for`` over a known range, calls of other
    such functions, and abs, min, max, pow, exp, expm1, log, log1p, tanh, sqrt, erf and floor are translated.  Numba
    compiles a function that holds anything else, and on CUDA it is linked into the kernel.

    Parameters
    ----------
    name : str
        Not one of `MoEActivation`.  A name may be registered again for what computes the same, and for nothing else.
    fn : callable
        ``fn(gate, up) -> float`` if `gated`, else ``fn(x) -> float``.  Every operation is rounded to float32, literals
        included.  Numbers that it uses from closures, globals, modules and defaults are taken as they are now.
    gated : bool
        Whether GEMM1 yields gate and up halves.

    Returns
    -------
    RegisteredActivation
        May be passed wherever an activation is expected, as may its name.

    Raises
    ------
    ArgumentError
        `name` is empty, taken by a built-in activation or by another function; or `fn` is a mistake, or neither
        translated nor compiled by Numba: the message names the file and the line.  Nothing has been registered.
    DTypeError
        `name` is no string, `fn` is not callable, or `gated` is not a bool.

    Notes
    -----
    All backends do the same float32 operations, so they give the same bits; functions that are compiled whole agree to
    4 ulp.  ``docs/own_activations`` has the rules.
    May be called from any thread.

    Examples
    --------
    >>> import math
    >>> import numpy as np
    >>> from pymoe import register_activation
    >>> from pymoe.ops import activation
    >>> def reglu(gate, up):
    ...     return max(gate, 0.0) * up
    >>> mine = register_activation("reglu", reglu)
    >>> activation(np.array([[-1.0, 2.0, 3.0, 5.0]], "f4"), "reglu").tolist()
    [[0.0, 10.0]]
    """
    call = "register_activation"
    if not isinstance(name, str):
        raise DTypeError(complaint(call, "name", "be a string", type(name).__name__))
    if not name or name != name.strip():
        raise ArgumentError(complaint(call, "name", "be a word", repr(name)))
    if name in _ALIASES or any(member.value == name for member in MoEActivation):
        raise ArgumentError(complaint(call, "name", "be new", f"{name!r}, which is built in"))
    if not callable(fn):
        raise DTypeError(complaint(call, "fn", "be callable", type(fn).__name__))
    if not isinstance(gated, bool):
        raise DTypeError(complaint(call, "gated", "be True or False", repr(gated)))
    program = _read(call, fn, 2 if gated else 1)
    registered = RegisteredActivation(name, fn, gated, program)
    with _registry_lock:
        known = _registry.setdefault(name, registered)
    if known != registered:
        rule = "be new, or be registered again for what computes the same"
        raise ArgumentError(complaint(call, "name", rule, f"{name!r} of {described(known)}", "Choose another name"))
    return known


def _read(call: str, fn: Callable[..., Any], arity: int) -> Program | ClosedFunction:
    """Translate a function, or leave it whole to Numba."""
    try:
        return read_function(call, fn, arity)
    except Untranslated as error:
        reason = str(error)
    from pymoe.formula._numba import check

    closed = close_function(call, fn, arity)
    check(call, closed, reason)
    return closed


def registered_activations() -> tuple[RegisteredActivation, ...]:
    """Return every registered activation, by name."""
    with _registry_lock:
        return tuple(_registry[name] for name in sorted(_registry))


def described(activation: RegisteredActivation) -> str:
    """Return a registered activation as its function, with the file and line where that stands."""
    return f"{getattr(activation.fn, '__name__', activation.fn)} at {where(activation.fn)}"


def find_activation(call: str, activation: object) -> Activation:
    """Return the activation that a member, a registered activation or a name stands for.

    Raises
    ------
    ArgumentError
        An unknown name; the message lists the known ones.
    DTypeError
        Neither a name nor an activation.
    """
    if isinstance(activation, MoEActivation | RegisteredActivation):
        return activation
    if not isinstance(activation, str):
        rule = "be a MoEActivation, its string, a registered name or an ActivationConfig"
        raise DTypeError(complaint(call, "activation", rule, type(activation).__name__))
    registered = _registry.get(activation)
    if registered is not None:
        return registered
    try:
        return MoEActivation.from_str(activation)
    except ArgumentError:
        valid = ", ".join([*(member.value for member in MoEActivation), *(r.name for r in registered_activations())])
        raise ArgumentError(complaint(call, "activation", f"be one of {valid}", repr(activation))) from None


# Parameters each activation reads; one that is given to another activation is refused, since losing it silently is a
# known way to serve a model wrongly (vllm#49941).
_PARAMETERS: dict[MoEActivation, tuple[str, ...]] = {
    MoEActivation.SILU: ("clamp_limit", "alpha", "beta"),
    MoEActivation.SWIGLUOAI: ("clamp_limit", "alpha", "beta"),
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: ("clamp_limit", "alpha", "beta"),
    MoEActivation.SWIGLUSTEP: ("clamp_limit",),
    MoEActivation.SITU: ("situ_beta", "situ_linear_beta"),
}
_FIXED: dict[MoEActivation, dict[str, float]] = {
    MoEActivation.SWIGLUOAI: {"clamp_limit": 7.0, "alpha": 1.702, "beta": 1.0},
    MoEActivation.SWIGLUSTEP: {"clamp_limit": 7.0},
}
_DEFAULTS: dict[MoEActivation, dict[str, float]] = {
    MoEActivation.SILU: {"alpha": 1.0, "beta": 0.0},
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: {"alpha": 1.0, "beta": 0.0},
}


@dataclass(frozen=True)
class ActivationConfig:
    """An activation with its parameters; ``None`` means the activation's own default.

    Parameters
    ----------
    activation : MoEActivation, RegisteredActivation or str
        Which function.
    clamp_limit : float, optional
        L > 0: gate is limited to at most L, up to [-L, L], before anything else (SILU; required by
        SWIGLUOAI_UNINTERLEAVE; fixed at 7 by SWIGLUOAI and SWIGLUSTEP).
    alpha, beta : float, optional
        ``gate * sigmoid(alpha * gate) * (up + beta)``; default 1 and 0, fixed at 1.702 and 1 by SWIGLUOAI.
    situ_beta, situ_linear_beta : float, optional
        SITU: ``b tanh(g/b) sigmoid(g) * (l tanh(u/l) if l > 0 else u)``; `situ_beta` is required.

    Raises
    ------
    ArgumentError
        A parameter that the activation does not read, or that contradicts a fixed one, or a missing required one.
    UnsupportedError
        Gated RELU2, which exists as a name only.
    """

    activation: MoEActivation | RegisteredActivation | str = MoEActivation.SILU
    clamp_limit: float | None = None
    alpha: float | None = None
    beta: float | None = None
    situ_beta: float | None = None
    situ_linear_beta: float | None = None

    def __post_init__(self) -> None:
        call = "ActivationConfig"
        activation = find_activation(call, self.activation)
        object.__setattr__(self, "activation", activation)
        if activation is MoEActivation.RELU2:
            raise UnsupportedError(complaint(call, "activation", "not be the gated relu2", "relu2", "Use relu2_no_mul"))
        reads = _PARAMETERS.get(activation, ()) if isinstance(activation, MoEActivation) else ()
        fixed = _FIXED.get(activation, {}) if isinstance(activation, MoEActivation) else {}
        for name, value in self.parameters().items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ArgumentError(complaint(call, name, "be a finite number or None", repr(value)))
            if name not in reads:
                raise ArgumentError(complaint(call, name, f"be None, since {activation.value} does not read it", value))
            if name in fixed and value != fixed[name]:
                raise ArgumentError(complaint(call, name, f"be {fixed[name]} for {activation.value}", value))
        self._check_ranges(call, activation)

    def _check_ranges(self, call: str, activation: Activation) -> None:
        if self.clamp_limit is not None and self.clamp_limit <= 0:
            raise ArgumentError(complaint(call, "clamp_limit", "be above 0", self.clamp_limit))
        if activation is MoEActivation.SWIGLUOAI_UNINTERLEAVE and self.clamp_limit is None:
            raise ArgumentError(complaint(call, "clamp_limit", f"be given for {activation.value}", None))
        if activation is MoEActivation.SITU and (self.situ_beta is None or self.situ_beta == 0):
            raise ArgumentError(complaint(call, "situ_beta", "be given and not 0 for situ", self.situ_beta))

    def parameters(self) -> dict[str, float | None]:
        """Return the five parameters by name, as they were given."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "activation"}

    def resolved(self) -> dict[str, float | None]:
        """Return the five parameters with the activation's fixed and default values filled in."""
        return dict(self._resolved)

    @cached_property
    def _resolved(self) -> dict[str, float | None]:
        known: dict[str, float] = {}
        if isinstance(self.activation, MoEActivation):
            known = _DEFAULTS.get(self.activation, {}) | _FIXED.get(self.activation, {})
        return {name: known.get(name) if value is None else float(value) for name, value in self.parameters().items()}

    @cached_property
    def is_gated(self) -> bool:
        """Whether the activation halves the width of GEMM1's output."""
        return find_activation("ActivationConfig", self.activation).is_gated

    @cached_property
    def is_interleaved(self) -> bool:
        """Whether gate and up alternate along GEMM1's output."""
        return find_activation("ActivationConfig", self.activation).is_interleaved

    def width(self, N: int) -> int:
        """Return I, the width after the activation, for a GEMM1 of width `N`."""
        return N // 2 if self.is_gated else N
