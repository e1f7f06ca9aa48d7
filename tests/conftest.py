"""What all tests share: how Hypothesis runs, and no state of one test reaching the next."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings

import pymoe

# The same cases in every run, so that a red run can be repeated; no deadline, since the first case compiles kernels.
# More and other cases: pytest --hypothesis-profile=wide.
settings.register_profile("same", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("wide", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _process_state_is_left_alone():
    """The checked mode is reset for the next test; NumPy's error state must not have changed at all."""
    checked, errors = pymoe.environment.is_checked(), np.geterr()
    yield
    pymoe.checked(checked)
    changed = np.geterr()
    np.seterr(**errors)
    assert changed == errors
