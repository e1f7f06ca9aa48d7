"""Threads for kernels that release the GIL: blocks of a range, run by a small pool of our own.

Thread-safe (two callers share the pool), fork-safe (a child starts a pool of its own), and a caller that is interrupted
waits for its running blocks before the interrupt goes on, so that no kernel writes into arrays that are gone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from pymoe import environment

__all__ = ["record", "refuse_recording", "run_blocks"]

_BLOCKS_PER_THREAD = 4
"""More blocks than threads, so that uneven blocks even out."""

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_inside = threading.local()


def record(recorder: Any) -> None:
    """Have `recorder` note what this thread runs from now on; None ends that."""
    _inside.recorder = recorder


def refuse_recording() -> None:
    """Say that something is computed outside of `run_blocks` from what differs between calls."""
    recorder = getattr(_inside, "recorder", None)
    if recorder is not None:
        recorder.refuse()


def run_blocks(kernel: Callable[..., Any], count: Any, *args: Any, grain: int = 1) -> None:
    """Call ``kernel(start, stop, *args)`` over blocks that cover ``range(count)``, on up to `num_threads` threads.

    Parameters
    ----------
    kernel : callable
        Releases the GIL; the result must not depend on how the range is cut.
    count : int or ndarray, (1,) int64
        Length of the range; an array where an earlier kernel has written it.
    *args
        Passed on to every block.
    grain : int
        Least length of a block but the last; blocks are multiples of it.

    Raises
    ------
    Exception
        The first error of a block, once no block runs any more.
    """
    recorder = getattr(_inside, "recorder", None)
    if recorder is not None:
        recorder.note(kernel, count, grain, args)
    count = int(count[0]) if isinstance(count, np.ndarray) else count
    if count <= 0:
        return
    units = -(-count // grain)
    if units == 1:
        kernel(0, count, *args)
        return
    threads = environment.num_threads()
    blocks = min(units, threads * _BLOCKS_PER_THREAD)
    if threads == 1 or blocks == 1 or getattr(_inside, "a_block", False):
        kernel(0, count, *args)
        return
    bounds = [min(units * i // blocks * grain, count) for i in range(blocks + 1)]
    pending = iter(zip(bounds[:-1], bounds[1:], strict=True))
    take = threading.Lock()
    stop = threading.Event()

    def work() -> None:
        _inside.a_block = True
        try:
            while not stop.is_set():
                with take:
                    block = next(pending, None)
                if block is None:
                    return
                kernel(*block, *args)
        except BaseException:
            stop.set()
            raise
        finally:
            _inside.a_block = False

    pool = _get_pool(threads - 1)
    helpers: list[Future[None]] = []
    try:
        helpers.extend(pool.submit(work) for _ in range(min(threads, blocks) - 1))
        work()
    finally:
        # Also after KeyboardInterrupt: no block may still run when the caller's arrays go away.
        _settle([helper for helper in helpers if not helper.cancel()], stop)
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def _settle(helpers: list[Future[None]], stop: threading.Event) -> None:
    """Wait until no helper runs; an interrupt on the way is raised after that."""
    interrupt: BaseException | None = None
    for helper in helpers:
        while not helper.done():
            try:
                helper.exception()
            except KeyboardInterrupt as error:
                stop.set()
                interrupt = error
    if interrupt is not None:
        raise interrupt


def _get_pool(size: int) -> ThreadPoolExecutor:
    """Return a pool of at least `size` threads; a smaller one is left to finish its work and replaced."""
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < size:
            _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="pymoe"), size
        return _pool


def _after_fork() -> None:
    """Forget the parent's pool: its threads do not exist in the child."""
    global _pool, _pool_size, _lock, _inside
    _pool, _pool_size, _lock, _inside = None, 0, threading.Lock(), threading.local()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
