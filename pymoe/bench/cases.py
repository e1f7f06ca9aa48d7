"""What is timed: the shape of a layer, two sets of weights, and tokens that rotate over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pymoe.device.arrays import BFLOAT16
from pymoe.errors import ArgumentError, complaint

__all__ = ["SETS", "Item", "Shape", "Weights", "draw_items", "draw_weights", "hidden_dtype", "whole_numbers"]

Array = Any

SETS = 2
"""Weight sets in rotation, so that no call finds the last call's weights nearest to the core."""

ITEMS = 16
"""Token sets in rotation, each with a routing of its own."""

LOGIT_GAP = 0.05
"""Least distance between the last chosen logit and the next: rounding to bfloat16 (2**-7 at a logit of 4) must not
change which experts a peer chooses, else it would compute something else."""


def whole_numbers(call: str, option: str, text: str) -> tuple[int, ...]:
    """Return the positive integers of ``"1,16,128"``."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ArgumentError(complaint(call, option, "be positive whole numbers with commas between", repr(text)))
    return tuple(int(part) for part in parts)


@dataclass(frozen=True)
class Shape:
    """Experts, experts a token, hidden width, width after the activation (silu, gated)."""

    E: int = 32
    topk: int = 4
    K: int = 1024
    I: int = 512

    @classmethod
    def parse(cls, call: str, text: str) -> Shape:
        """Return the shape of ``"E,topk,K,I"``."""
        numbers = whole_numbers(call, "--shape", text)
        if len(numbers) != 4:
            raise ArgumentError(complaint(call, "--shape", "be E,topk,K,I", repr(text)))
        if numbers[1] > numbers[0]:
            raise ArgumentError(complaint(call, "--shape", "have topk in 1..E", repr(text)))
        return cls(*numbers)

    def __str__(self) -> str:
        return f"E {self.E}, topk {self.topk}, K {self.K}, I {self.I}"


@dataclass(frozen=True)
class Weights:
    """One layer's numbers in float32, each of them exact in bfloat16: every contender computes with the same ones."""

    gate: Array
    w1: Array
    w2: Array

    @cached_property
    def bfloat16(self) -> Weights:
        """The same numbers as bfloat16."""
        return Weights(*(w.astype(BFLOAT16) for w in (self.gate, self.w1, self.w2)))

    def cast(self, dtype: Any) -> Weights:
        """Return the set in float32 or bfloat16; every caller gets the same arrays."""
        return self.bfloat16 if np.dtype(dtype) == BFLOAT16 else self


def hidden_dtype(scheme: str) -> np.dtype:
    """Return the dtype of tokens and output under `scheme`: float32 for fp32, else bfloat16, as models have it."""
    return np.dtype("float32") if scheme == "fp32" else BFLOAT16


def _normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> Array:
    """Return normal numbers in float32, rounded to bfloat16."""
    x = rng.standard_normal(shape, np.float32)
    x *= np.float32(deviation)
    return x.astype(BFLOAT16).astype(np.float32)


def draw_weights(shape: Shape, seed: int, count: int = SETS) -> list[Weights]:
    """Return `count` sets of random weights, scaled so that activations keep the size of the tokens."""
    sets = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        gate = _normal(rng, (shape.E, shape.K), shape.K**-0.5)
        w1 = _normal(rng, (shape.E, 2 * shape.I, shape.K), shape.K**-0.5)
        sets.append(Weights(gate, w1, _normal(rng, (shape.E, shape.K, shape.I), shape.I**-0.5)))
    return sets


@dataclass(frozen=True)
class Item:
    """One call of the rotation: which weight set, its tokens (M, K) float32 exact in bfloat16, and their experts."""

    number: int
    x: Array
    ids: Array


def draw_items(shape: Shape, M: int, sets: Sequence[Weights], seed: int, count: int = ITEMS) -> list[Item]:
    """Return the `count` calls that rotate: random tokens, kept where their routing survives a rounding to bfloat16."""
    items = []
    for i in range(count):
        number = i % len(sets)
        rng = np.random.default_rng([seed, M, i])
        kept: list[Array] = []
        while sum(map(len, kept)) < M:
            x = _normal(rng, (max(M, 8), shape.K), 1.0)
            kept.append(x[_gaps(x, sets[number].gate, shape.topk) > LOGIT_GAP])
        x = np.concatenate(kept)[:M]
        logits = x.astype(np.float64) @ sets[number].gate.T.astype(np.float64)
        items.append(Item(number, x, np.argsort(-logits, axis=1, kind="stable")[:, : shape.topk]))
    return items


def _gaps(x: Array, gate: Array, topk: int) -> Array:
    """Return by how much the last chosen logit of each token exceeds the next; infinite where all are chosen."""
    if topk == len(gate):
        return np.full(len(x), np.inf)
    logits = -np.sort(-(x.astype(np.float64) @ gate.T.astype(np.float64)), axis=1)
    return logits[:, topk - 1] - logits[:, topk]
