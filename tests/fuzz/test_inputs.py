"""The fuzzer's execution on its seeds and on fixed mutations of them, without the fuzzer."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.inputs import CONFIG, FORMS, Workplace, mutate


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("fuzz"))


def test_honest_inputs_are_read(place):
    seeds = list(place.seeds())
    assert {seed[0] for seed in seeds} == set(range(CONFIG + len(FORMS)))
    for seed in seeds:
        place.read(seed)


@pytest.mark.parametrize("start", range(4))
def test_mutations_are_read_or_refused(place, start):
    """Chains of mutations, so that some are far from honest; both outcomes must occur."""
    rng, outcomes = random.Random(start), set()
    for seed in place.seeds():
        for _ in range(10):
            data = seed
            for _ in range(rng.randint(1, 6)):
                data = mutate(data, rng)
                outcomes.add(place.run(data))
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("data", [b"", b"\0", b"\1", b"\2", b"\xff" * 40, b"\0" + b"\xff" * 8, b"\2{}", b"\1{}"])
def test_next_to_nothing_is_refused(place, data):
    assert place.run(data) == "refused"
