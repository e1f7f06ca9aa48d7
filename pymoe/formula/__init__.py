"""Users' formulas of float32 scalars: read from Python, checked, and held as a program that every backend spells alike.

``source`` finds a function's text, ``reader`` turns it into a ``program`` of single float32 operations, in which
``elementary`` has written out exp, log, tanh, erf and pow.  Each backend spells those operations in its own language,
and none may contract, reorder or widen them: so all of them give the same bits.

What ``reader`` does not translate, ``closed`` makes independent of all around it, for compilers of whole functions:
Numba's on the CPU (``_numba``) and on CUDA.
"""

from pymoe.formula.closed import ClosedFunction, close_function
from pymoe.formula.program import Program, spell
from pymoe.formula.reader import Untranslated, read_function

__all__ = ["ClosedFunction", "Program", "Untranslated", "close_function", "read_function", "spell"]
