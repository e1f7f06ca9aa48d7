"""Users' formulas of float32 scalars: read from Python, checked, and held as a program that every backend spells alike.

``source`` finds a function's text, ``reader`` turns it into a ``program`` of single float32 operations, in which
``elementary`` has written out exp, log, tanh, erf and pow.  Each backend spells those operations in its own language,
and none may contract, reorder or widen them: so all of them give the same bits.
"""

from pymoe.formula.program import Program, spell
from pymoe.formula.reader import read_function

__all__ = ["Program", "read_function", "spell"]
