"""What a forked child of a test did."""

from __future__ import annotations

import os
import signal
import time

import pytest

LIMIT_S = 30


def assert_child_succeeds(child: int) -> None:
    """Wait for the child process to end well, and end it if it hangs."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child hangs")
