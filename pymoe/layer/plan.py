"""What a layer does for a number of tokens, and what it does not do and why."""

from __future__ import annotations

from typing import NamedTuple

from pymoe.select import Refusal


class Plan(NamedTuple):
    """What a layer does for a number of tokens.

    Attributes
    ----------
    prepare_finalize, experts : str
        Class names of the pair that runs.
    workspace_bytes : int
        Memory that a call allocates for workspaces at most, if as many tokens reach the experts of this rank.
    packed_bytes : int
        Memory of repacked weights; 0 where the given ones are used as they are.
    chunks : int
        Calls of the experts.
    refused : tuple of (experts, reason)
        Every candidate that does not run, and why.
    """

    prepare_finalize: str
    experts: str
    workspace_bytes: int
    packed_bytes: int
    chunks: int
    refused: tuple[Refusal, ...]
