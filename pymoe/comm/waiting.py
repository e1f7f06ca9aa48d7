"""Waits that give the core away: ranks outnumber cores in tests and on shared machines."""

from __future__ import annotations

import os
import time

_SPIN_S = 20e-6
"""Shorter than a thread switch (about 50 us): a peer that runs on another core answers within it."""
_YIELD_S = 2e-3
MOVING_S = 50e-3
"""While rows move: some MPIs copy them piece by piece, and only while they are asked; naps would add to each piece."""
_NAP_S = 50e-6
_LONG_NAP_S = 1e-3


class Wait:
    """One wait with a deadline; call `pause` between two looks.

    Parameters
    ----------
    seconds : float
        From now to the deadline.
    patience : float
        Seconds before the first nap.
    """

    def __init__(self, seconds: float, patience: float = _YIELD_S) -> None:
        self._start = time.monotonic()
        self.seconds, self._patience = seconds, patience

    @property
    def over(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() - self._start > self.seconds

    def pause(self) -> None:
        """Spin at first, then give the core to whoever is ready, then sleep, longer after a while."""
        waited = time.monotonic() - self._start
        if waited < _SPIN_S:
            return
        if waited < self._patience:
            os.sched_yield()
        else:
            time.sleep(_NAP_S if waited < 100 * _YIELD_S else _LONG_NAP_S)
