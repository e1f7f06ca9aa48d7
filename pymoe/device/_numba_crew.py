"""Native threads that share out a program of blocks, without Python or its lock between one kernel and the next.

A program is a list of jobs in order; a job is blocks of a range, which whoever is free takes next.  The caller works
through it alone where nobody comes, and helpers who come late join in at the job of the moment: nobody waits for a
thread to wake up, only for blocks that have begun.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pymoe import environment
from pymoe.device._numba_words import I32, WORD, add, get, pause, put
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


class Job(NamedTuple):
    """A kernel as `entry(start, stop, arguments)`, all addresses; that of its length, a word; and blocks of `grain`."""

    entry: int
    arguments: int
    length: int
    grain: int


@intrinsic
def _call(typingctx: Any, entry: Any, start: Any, stop: Any, arguments: Any) -> Any:
    """Call the function at an address; return its status, 0 where all is well."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(I32, [WORD] * 3)
        status = builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return builder.zext(status, WORD)

    return types.int64(*[types.int64] * 4), codegen


@intrinsic
def _offer_core(typingctx: Any, function: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        with builder.if_then(builder.icmp_signed("!=", args[0], WORD(0))):
            kind = ir.FunctionType(I32, [])
            builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@jit
def _wait_for(address, value, yield_core):
    spins = 0
    while get(address) != value:
        pause()
        spins += 1
        if spins % _PATIENCE == 0:
            _offer_core(yield_core)


@jit
def _perform(header, yield_core):
    """Take blocks of one job after the other until none is left, each job once the one before is done."""
    jobs, states = get(header + 8 * _JOBS), get(header + 8 * _STATES)
    for number in range(get(header + 8 * _LENGTH)):
        job, state = jobs + 8 * _JOB * number, states + 8 * _STATE * number
        entry, arguments, grain = get(job + 8 * _ENTRY), get(job + 8 * _ARGUMENTS), get(job + 8 * _GRAIN)
        count = get(get(job + 8 * _COUNT))
        start = add(state + 8 * _NEXT, grain)
        while start < count:
            stop = min(start + grain, count)
            if _call(entry, start, stop, arguments) != 0:
                put(header + 8 * _FAILED, 1)
            add(state + 8 * _DONE, stop - start)
            start = add(state + 8 * _NEXT, grain)
        _wait_for(state + 8 * _DONE, count, yield_core)


@jit
def _conduct(box, header, yield_core):
    """Run a program with whoever looks into the mailbox; return whether a kernel failed."""
    states = get(header + 8 * _STATES)
    for number in range(get(header + 8 * _LENGTH)):
        put(states + 8 * (_STATE * number + _NEXT), 0)
        put(states + 8 * (_STATE * number + _DONE), 0)
    put(header + 8 * _FAILED, 0)
    if box != 0:
        put(box + 8 * _PROGRAM, header)
    _perform(header, yield_core)
    if box != 0:
        put(box + 8 * _PROGRAM, 0)
        # Who is still there has nothing left to take, but may look at the program.
        _wait_for(box + 8 * _PRESENT, 0, yield_core)
    return get(header + 8 * _FAILED) != 0


@jit
def _serve(box, seen, spins, yield_core):
    """Help with programs until the mailbox has been empty for a while; return the last turn seen."""
    idle = 0
    while idle < spins:
        if get(box + 8 * _PROGRAM) != 0 and get(box + 8 * _TURN) != seen:
            # Present first, then look again: whoever empties the mailbox afterwards waits for us.
            add(box + 8 * _PRESENT, 1)
            turn, header = get(box + 8 * _TURN), get(box + 8 * _PROGRAM)
            if header != 0 and turn != seen:
                seen = turn
                _perform(header, yield_core)
            add(box + 8 * _PRESENT, -1)
            idle = 0
        else:
            pause()
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
