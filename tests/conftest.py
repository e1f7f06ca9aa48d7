"""What all tests share: one seed printed on failure, and no state of one test reaching the next."""

from __future__ import annotations

import pytest

import pymoe


@pytest.fixture(autouse=True)
def _process_state_is_left_alone():
    """A test that leaves the checked mode on would change what the next ones see."""
    before = pymoe.environment.is_checked()
    yield
    pymoe.checked(before)
