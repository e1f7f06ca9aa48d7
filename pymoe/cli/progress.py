"""A progress bar on stderr for work that takes long; silent where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

WIDTH = 30
QUIET_SECONDS = 0.5
"""Work that ends sooner shows no bar."""


class Progress:
    """Counts up to `total`; a context manager, so that the line is cleared also after an error."""

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit, self.done = total, unit, 0
        self._started = time.monotonic()
        self._drawn = False

    def __enter__(self) -> Progress:
        return self

    def advance(self, count: int) -> None:
        """Count `count` more and redraw."""
        self.done += count
        elapsed = time.monotonic() - self._started
        if not sys.stderr.isatty() or elapsed < QUIET_SECONDS or not self.done:
            return
        filled = WIDTH * self.done // max(self.total, 1)
        left = elapsed / self.done * (self.total - self.done)
        bar = "#" * filled + "." * (WIDTH - filled)
        print(
            f"\r[{bar}] {self.done}/{self.total} {self.unit}, {left:.0f} s left ", end="", file=sys.stderr, flush=True
        )
        self._drawn = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
