"""Small parts that both impls share: errors that name their stage, and the slices of a chunk."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from pymoe.contracts import ExpertTokensMetadata

Array = Any
Method = TypeVar("Method", bound=Callable[..., Any])


def guarded(method: Method) -> Method:
    """Run a method of a kernel inside the guard of its prepare/finalize; a string before the tokens names the call."""

    @functools.wraps(method)
    def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        call = args[0] if args and isinstance(args[0], str) else f"FusedMoEKernel.{method.__name__}"
        with kernel.prepare_finalize.guard(call):
            return method(kernel, *args, **kwargs)

    return run  # type: ignore[return-value]


@contextlib.contextmanager
def note_stage(name: str, impl: Any) -> Iterator[None]:
    """Say in which stage of which pair an error arose."""
    try:
        yield
    except Exception as error:
        pair = f"{type(impl.prepare_finalize).__name__} with {type(impl.fused_experts).__name__}"
        error.add_note(f"in stage {name} of FusedMoEKernel({pair})")
        raise


def size_of(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= int(extent)
    return size


def first_of(flat: Array, shape: tuple[int, ...]) -> Array:
    """Return the front of a flat workspace in `shape`; the workspace itself where that is all of it."""
    return flat if flat.shape == shape else flat[: size_of(shape)].reshape(shape)


def slice_scales(scale: Array | None, tokens: slice) -> Array | None:
    """Return the scales of a chunk: one scale for all tokens stays, one a token is cut."""
    return scale if scale is None or scale.size == 1 else scale[tokens]


def recount(
    topk_ids: Array, E_local: int, expert_map: Array | None, meta: ExpertTokensMetadata | None
) -> ExpertTokensMetadata | None:
    """Return the counts of a chunk's own slots, where prepare gave counts at all."""
    if meta is None:
        return None
    local = topk_ids if expert_map is None else np.where(topk_ids >= 0, expert_map[np.maximum(topk_ids, 0)], -1)
    local = local[(local >= 0) & (local < E_local)]
    return ExpertTokensMetadata.make_from_list(np.bincount(local, minlength=E_local).tolist())
