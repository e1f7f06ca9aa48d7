"""What ranks tell each other before and after rows travel, and the verdict that every rank reaches from it.

A header is 64 words of 8 bytes, the same size for success and failure, so that a rank with an error fits into the
exchange that the others are waiting for.  `verdict` is a pure function of all headers: all ranks see the same ones, so
all raise the same error.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pymoe.errors import CommError, complaint

Array = Any

WORDS = 64
"""Words of a header: 18 numbers and 368 bytes of text."""
SEQUENCE, COUNT, BACK = 1, 4, 5
"""Places that the control fills in: the exchange's number; the rows for the receiver of this copy, and from it back."""
TOKENS = 7
_MAGIC = 0x70796D6F65  # "pymoe"
_VALUES, _TEXT = 8, 18
_TEXT_BYTES = 8 * (WORDS - _TEXT)


class Kind(enum.IntEnum):
    """What an exchange is for."""

    PLACE = 1
    AGREE = 2
    CALL = 3
    COMBINE = 4
    CLOSE = 5


class Code(enum.IntEnum):
    """How the sender fares."""

    FINE = 0
    RAISED = 1
    SAW_AN_ERROR = 2
    """The sender stops because of another rank's error, which that rank tells itself."""
    SILENT = 3
    """The sender gave up waiting for the rank in `blamed`."""
    LEFT = 4
    """The sender's process ends."""


@dataclass(frozen=True)
class Header:
    """One rank's word on one exchange.

    `values` are compared between ranks as they are; `names` are texts that are compared by checksum and shown when
    they differ; `tokens` may differ.
    """

    kind: Kind
    code: Code = Code.FINE
    blamed: int = -1
    tokens: int = 0
    values: dict[str, int] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    text: str = ""

    def encode(self) -> Array:
        """Return the (64,) int64 words."""
        words = np.zeros(WORDS, np.int64)
        numbers = [*self.values.values(), *(zlib.crc32(name.encode()) for name in self.names.values())]
        assert len(numbers) <= _TEXT - _VALUES
        words[:_VALUES] = _MAGIC, 0, self.kind, self.code, 0, 0, self.blamed, self.tokens
        words[_VALUES : _VALUES + len(numbers)] = numbers
        text = "\n".join(name[: _TEXT_BYTES // max(len(self.names), 1) - 1] for name in self.names.values())
        raw = (self.text or text).encode()[:_TEXT_BYTES]
        words[_TEXT:].view(np.uint8)[: len(raw)] = np.frombuffer(raw, np.uint8)
        return words


def text_of(words: Array) -> str:
    """Return the text of an encoded header."""
    return np.ascontiguousarray(words[_TEXT:]).tobytes().rstrip(b"\0").decode(errors="replace")


def code_of(words: Array) -> Code:
    """Return how the sender of an encoded header fares."""
    return Code(int(words[3]))


def blamed_of(words: Array) -> int:
    """Return the rank that the sender of an encoded header gave up waiting for, or -1."""
    return int(words[6])


def verdict(call: str, table: Array, own: Header) -> CommError | None:
    """Return the error that all ranks raise for the headers `table` (R, 64) of one exchange, or None.

    The lowest rank that raised comes first, then ranks in different calls, then the first field that differs: there
    the value of most ranks (of the lowest rank among equals) counts as right, and the first rank with another is named.
    """
    codes = table[:, 3]
    for rank in np.flatnonzero(codes == Code.RAISED):
        return _error(call, f"rank {rank}", "complete the call", text_of(table[rank]), int(rank), None)
    for rank in np.flatnonzero(codes == Code.LEFT):
        return _error(call, f"rank {rank}", "stay until the layer is closed", "its process ended", int(rank), None)
    if (odd := _odd_rank(table[:, 2])) is not None:
        shown = [_KIND_NAMES.get(int(kind), "something unknown") for kind in table[:, 2]]
        return _error(call, "every rank", "make the same calls in the same order", _groups(shown), odd, "call")
    fields = [*own.values, *own.names]
    for place, name in enumerate(fields, _VALUES):
        if (odd := _odd_rank(table[:, place])) is None:
            continue
        shown = [str(value) for value in table[:, place]]
        if name in own.names:
            position = list(own.names).index(name)
            shown = [(text_of(words).split("\n") + [""] * len(own.names))[position] for words in table]
        return _error(call, name, "be the same on all ranks", _groups(shown), odd, name)
    return None


_KIND_NAMES = {1: "building a layer", 2: "building a layer", 3: "a call", 4: "the end of a call", 5: "close"}


def silence(call: str, rank: int, seconds: float, stage: str) -> CommError:
    """Return the error for a rank that did not answer in time."""
    return _error(call, f"rank {rank}", f"answer within {seconds:g} s", f"no word from it {stage}", rank, None)


def end_of(call: str, rank: int | None, error: CommError) -> CommError:
    """Return the error for MPI's own `error`, which came of the end of `rank`, if that is known."""
    if rank is None:
        return error
    return _error(call, f"rank {rank}", "stay until the layer is closed", "its process ended", rank, None)


def _error(call: str, argument: str, rule: str, got: str, rank: int, name: str | None) -> CommError:
    error = CommError(complaint(call, argument, rule, got.rstrip(".")))
    error.rank, error.field = rank, name
    return error


def _odd_rank(values: Array) -> int | None:
    """Return the first rank whose value is not that of most ranks; None where all agree."""
    found, first, counts = np.unique(values, return_index=True, return_counts=True)
    if len(found) == 1:
        return None
    usual = min(range(len(found)), key=lambda i: (-counts[i], first[i]))
    return int(np.flatnonzero(values != found[usual])[0])


def _groups(shown: Sequence[str]) -> str:
    """Return such as ``64 on ranks 0, 1, 3; 32 on rank 2``."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(shown):
        ranks.setdefault(value, []).append(rank)
    parts = []
    for value, holders in ranks.items():
        some = ", ".join(map(str, holders[:8])) + (", ..." if len(holders) > 8 else "")
        parts.append(f"{value} on rank{'s' * (len(holders) > 1)} {some}")
    return "; ".join(parts)
