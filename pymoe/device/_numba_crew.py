"""Native threads that share out a program of blocks, without Python or its lock between one kernel and the next.

A program is a list of jobs in order; a job is blocks of a range, which whoever is free takes next.  The caller works
through it alone where nobody comes, and helpers who come late join in at the job of the moment: nobody waits for a
thread to wake up, only for blocks that have begun.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pymoe import environment
from pymoe.device.numba_cpu import jit

__all__ = ["Job", "Program"]

_LINE = 8
"""Words of a cache line: counters that threads write stand in lines of their own."""
_LENGTH, _JOBS, _STATES, _FAILED, _HEADER = range(5)
_ENTRY, _ARGUMENTS, _COUNT, _GRAIN, _JOB = range(5)
_NEXT, _DONE, _STATE = 0, _LINE, 2 * _LINE
_PROGRAM, _TURN, _PRESENT, _ENDED, _BOX = 0, _LINE, 2 * _LINE, 3 * _LINE, 4 * _LINE
_SPINS = 16000
"""Looks at the mailbox, some 12 ns each, before a helper sleeps: it is awake for calls that follow each other."""
_PATIENCE = 4000
"""Looks at a counter before a waiting thread offers its core to others, who may hold the block it waits for."""

_WORD = ir.IntType(64)
_I32 = ir.IntType(32)
_X86, _ARM = ("llvm.x86.sse2.pause", ()), ("llvm.aarch64.hint", (1,))
_HINTS = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}
"""How a core is told that a loop waits; on Arm the hint 1 is YIELD."""


class Job(NamedTuple):
    """A kernel as `entry(start, stop, arguments)`, all addresses; that of its length, a word; and blocks of `grain`."""

    entry: int
    arguments: int
    length: int
    grain: int


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _WORD.as_pointer())


@intrinsic
def _add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to a word, in one order for all threads, and return what it was."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _set(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.atomic_rmw("xchg", _pointer(builder, args[0]), args[1], "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _get(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0]), "seq_cst", align=8)

    return types.int64(types.int64), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:
    """Tell the core that this is a loop that waits."""
    hint, operands = _HINTS.get(platform.machine(), ("", ()))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if hint:
            kind = ir.FunctionType(ir.VoidType(), [_I32] * len(operands))
            function = cgutils.get_or_insert_function(builder.module, kind, hint)
            builder.call(function, [_I32(operand) for operand in operands])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _call(typingctx: Any, entry: Any, start: Any, stop: Any, arguments: Any) -> Any:
    """Call the function at an address; return its status, 0 where all is well."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I32, [_WORD] * 3)
        status = builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return builder.zext(status, _WORD)

    return types.int64(*[types.int64] * 4), codegen


@intrinsic
def _offer_core(typingctx: Any, function: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        with builder.if_then(builder.icmp_signed("!=", args[0], _WORD(0))):
            kind = ir.FunctionType(_I32, [])
            builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@jit
def _wait_for(address, value, yield_core):
    spins = 0
    while _get(address) != value:
        _pause()
        spins += 1
        if spins % _PATIENCE == 0:
            _offer_core(yield_core)


@jit
def _perform(header, yield_core):
    """Take blocks of one job after the other until none is left, each job once the one before is done."""
    jobs, states = _get(header + 8 * _JOBS), _get(header + 8 * _STATES)
    for number in range(_get(header + 8 * _LENGTH)):
        job, state = jobs + 8 * _JOB * number, states + 8 * _STATE * number
        entry, arguments, grain = _get(job + 8 * _ENTRY), _get(job + 8 * _ARGUMENTS), _get(job + 8 * _GRAIN)
        count = _get(_get(job + 8 * _COUNT))
        start = _add(state + 8 * _NEXT, grain)
        while start < count:
            stop = min(start + grain, count)
            if _call(entry, start, stop, arguments) != 0:
                _set(header + 8 * _FAILED, 1)
            _add(state + 8 * _DONE, stop - start)
            start = _add(state + 8 * _NEXT, grain)
        _wait_for(state + 8 * _DONE, count, yield_core)


@jit
def _conduct(box, header, yield_core):
    """Run a program with whoever looks into the mailbox; return whether a kernel failed."""
    states = _get(header + 8 * _STATES)
    for number in range(_get(header + 8 * _LENGTH)):
        _set(states + 8 * (_STATE * number + _NEXT), 0)
        _set(states + 8 * (_STATE * number + _DONE), 0)
    _set(header + 8 * _FAILED, 0)
    if box != 0:
        _set(box + 8 * _PROGRAM, header)
    _perform(header, yield_core)
    if box != 0:
        _set(box + 8 * _PROGRAM, 0)
        # Who is still there has nothing left to take, but may look at the program.
        _wait_for(box + 8 * _PRESENT, 0, yield_core)
    return _get(header + 8 * _FAILED) != 0


@jit
def _serve(box, seen, spins, yield_core):
    """Help with programs until the mailbox has been empty for a while; return the last turn seen."""
    idle = 0
    while idle < spins:
        if _get(box + 8 * _PROGRAM) != 0 and _get(box + 8 * _TURN) != seen:
            # Present first, then look again: whoever empties the mailbox afterwards waits for us.
            _add(box + 8 * _PRESENT, 1)
            turn, header = _get(box + 8 * _TURN), _get(box + 8 * _PROGRAM)
            if header != 0 and turn != seen:
                seen = turn
                _perform(header, yield_core)
            _add(box + 8 * _PRESENT, -1)
            idle = 0
        else:
            _pause()
            idle += 1
    return seen


class _Helper:
    """A thread that serves a mailbox, and sleeps when that has been empty for a while."""

    def __init__(self, box: np.ndarray, yield_core: int) -> None:
        self._box, self._yield_core = box, yield_core
        self._woken = threading.Event()
        self.asleep = False
        # Compiled before the thread runs: a process may end while a thread of its own still compiles.
        _serve(box.ctypes.data, 0, 0, yield_core)
        threading.Thread(target=self._run, name="pymoe-crew", daemon=True).start()

    def _run(self) -> None:
        seen = 0
        while True:
            seen = _serve(self._box.ctypes.data, seen, _SPINS, self._yield_core)
            # Not while a call is on that this thread has not seen: its caller found nobody asleep.  Both look under the
            # GIL, so one of them sees the other.
            if self._box[_TURN] in (seen, self._box[_ENDED]):
                self.asleep = True
                self._woken.wait()
                self._woken.clear()

    def wake(self) -> None:
        if self.asleep:
            self.asleep = False
            self._woken.set()


class _Crew:
    """The helpers of this process, who serve one caller at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.yield_core = _address_of("sched_yield")
        self._box = np.zeros(_BOX, np.int64)
        self._helpers: list[_Helper] = []

    def conduct(self, header: int) -> bool:
        """Run a program; alone where the helpers are another caller's or none are wanted."""
        wanted = environment.num_threads() - 1
        if wanted == 0 or not self.lock.acquire(blocking=False):
            return bool(_conduct(0, header, self.yield_core))
        try:
            while len(self._helpers) < wanted:
                self._helpers.append(_Helper(self._box, self.yield_core))
            self._box[_TURN] += 1
            for helper in self._helpers[:wanted]:
                helper.wake()
            return bool(_conduct(self._box.ctypes.data, header, self.yield_core))
        finally:
            self._box[_ENDED] = self._box[_TURN]
            self.lock.release()


def _address_of(name: str) -> int:
    """Return the address of a function of the C library, 0 where it has none."""
    function = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


_crew = _Crew()


def _after_fork() -> None:
    """Forget the parent's helpers: their threads do not exist in the child."""
    global _crew
    _crew = _Crew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Program:
    """Jobs to run again and again, in order, on all threads of a call.  One runner at a time.

    The memory that the jobs' addresses name is the caller's to keep.
    """

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = np.array(jobs, np.int64)
        self._states = np.zeros(_STATE * len(jobs), np.int64)
        self._header = np.zeros(_HEADER, np.int64)
        self._header[:_FAILED] = len(jobs), self._jobs.ctypes.data, self._states.ctypes.data
        self._address = self._header.ctypes.data

    def run(self) -> bool:
        """Run the jobs; return whether a kernel of them failed, for want of memory."""
        return _crew.conduct(self._address)
