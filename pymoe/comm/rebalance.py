"""From loads to a plan: how many replicas each expert gets, and which ranks hold them.

Three steps: *replicate* (one more slot for whichever expert has the most rows a slot), *pack* (heaviest first, onto the
lightest rank that has room), *refine* (exchange experts while that lightens the heaviest rank).  With node groups,
groups of experts are packed onto nodes first, and the three steps happen inside each node.  Every rank makes the same
plan of the same loads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe import checks
from pymoe.comm.eplb import ExpertPlan, initial_plan, slots_per_rank
from pymoe.comm.packing import pack, recount, refine, replicate
from pymoe.device.arrays import as_numpy
from pymoe.errors import ArgumentError, DTypeError, complaint

__all__ = ["rebalance"]

Array = Any


def rebalance(
    loads: Array,
    *,
    num_physical: int,
    ranks: int,
    nodes: int = 1,
    groups: int = 1,
    current: ExpertPlan | None = None,
    slack: float = 0.01,
) -> ExpertPlan:
    """Return a plan that makes the ranks' loads even.

    Parameters
    ----------
    loads : ndarray, (layers, L), integer or floating, finite and at least 0
        Rows of each logical expert, summed over all ranks.
    num_physical : int
        P: slots of all ranks, a multiple of `ranks`, in L..L * ranks / nodes.
    ranks : int
    nodes, groups : int, optional
        Keep each of `groups` blocks of consecutive experts, with all its replicas, on one of `nodes` blocks of
        consecutive ranks, for routers that choose groups first.  Default: replicas anywhere.
    current : ExpertPlan, optional
        The plan in force: its ranks and slots keep what they hold where the new plan allows it.
    slack : float, optional
        With `current`: how much more than in the evenest plan found the heaviest rank may carry in a plan that moves
        fewer weights, as a share.

    Returns
    -------
    ExpertPlan
        Every expert has at least one slot and every rank P / ranks different experts.

    Raises
    ------
    DTypeError, ShapeError, ArgumentError
        `loads` is not such an array, or a number does not divide as it must.

    Notes
    -----
    Replication minimises the greatest load of a replica; packing is a heuristic (an optimum is NP-hard).  The heaviest
    rank is never heavier than under `current`, nor, without `current` and with one node, than under `initial_plan`;
    provided that those hold no expert twice on a rank and keep groups together.

    Source
    ------
    The steps are those of DeepSeek's EPLB and vLLM 0.33.0.  Differs: no rank holds an expert twice; exchanges follow
    the packing; a plan in force is mended where that is enough, and replaced only where it is not; numbers that do not
    divide are refused instead of falling back to one node.

    Examples
    --------
    >>> from pymoe.comm.rebalance import rebalance
    >>> loads = np.array([[10, 60, 20, 90]])
    >>> plan = rebalance(loads, num_physical=6, ranks=2)
    >>> plan.physical_to_logical.tolist(), plan.rank_loads(loads).tolist()
    ([[1, 2, 3, 0, 1, 3]], [[95.0, 85.0]])
    """
    call = "rebalance"
    weight = _loads(call, loads)
    layers, L = weight.shape
    P, R, nodes, groups = _sizes(call, L, num_physical, ranks, nodes, groups)
    size = L // groups
    by_group = weight.reshape(layers, groups, size).sum(axis=2)
    groups_of = pack(by_group, np.ones_like(by_group, np.int64), nodes)
    fresh = _fill(weight, groups_of, size, P, R)
    if current is None:
        plans = [initial_plan(L, P - L, R, layers), ExpertPlan.of(fresh.reshape(layers, P), L, R)]
        return _first_even_enough(weight, plans[nodes > 1 :], 0.0)
    _check_current(call, current, (layers, L, P, R))
    if not 0 <= slack < 1:
        raise ArgumentError(complaint(call, "slack", "be in 0..1", slack))
    held = current.physical_to_logical.reshape(layers, nodes, R // nodes, P // R)
    fresh = np.stack([_keep(new, old, L) for new, old in zip(fresh, held, strict=True)])
    plans = [ExpertPlan.of(fresh.reshape(layers, P), L, R)]
    legal = (current.repeats() == 0) & _keeps_groups(current, nodes, groups)
    if legal.any():
        mended = fresh.copy()
        group = held[legal].reshape(-1, nodes, P // nodes) // size
        groups_of = np.stack([[np.unique(of_node) for of_node in of_layer] for of_layer in group])
        mended[legal] = _fill(weight[legal], groups_of, size, P, R, held[legal], slack)
        stay = fresh.copy()
        stay[legal] = held[legal]
        plans = [ExpertPlan.of(slots.reshape(layers, P), L, R) for slots in (stay, mended, fresh)]
    return _first_even_enough(weight, plans, slack)


def _loads(call: str, loads: Array) -> Array:
    """Return the loads as float64, or refuse them."""
    given = as_numpy(call, "loads", loads)
    checks.shape(call, "loads", given, (None, None))
    if given.dtype.kind not in "iu":
        checks.float_dtype(call, "loads", given)
    if not given.size:
        raise ArgumentError(complaint(call, "loads", "have at least one layer and one expert", given.shape))
    weight = given.astype(np.float64)
    wrong = ~(np.isfinite(weight) & (weight >= 0))
    if wrong.any():
        layer, expert = (int(i) for i in np.argwhere(wrong)[0])
        got = f"{weight[layer, expert]} for expert {expert} in layer {layer}"
        raise ArgumentError(complaint(call, "loads", "be finite and at least 0", got))
    with np.errstate(over="ignore"):
        if not np.isfinite(weight.sum(axis=1)).all():
            raise ArgumentError(complaint(call, "loads", "have a finite sum", "one beyond float64"))
    return weight


def _sizes(call: str, L: int, num_physical: Any, ranks: Any, nodes: Any, groups: Any) -> tuple[int, int, int, int]:
    """Return P, R, nodes and groups, or refuse what does not divide."""
    named = (("num_physical", num_physical), ("ranks", ranks), ("nodes", nodes), ("groups", groups))
    P, R, nodes, groups = (checks.integer(call, name, value, 1) for name, value in named)
    slots_per_rank(call, P, R)
    for name, value, divisor, what in (
        ("ranks", R, nodes, "nodes"),
        ("the number of logical experts", L, groups, "groups"),
        ("groups", groups, nodes, "nodes"),
    ):
        if value % divisor:
            remedy = "Pass nodes=1 for replicas anywhere" if what == "nodes" else ""
            raise ArgumentError(complaint(call, name, f"divide by {divisor} {what}", value, remedy))
    if not L <= P <= L * (R // nodes):
        rule = f"be in {L}..{L * (R // nodes)}, from one slot an expert to one on each rank of a node"
        raise ArgumentError(complaint(call, "num_physical", rule, P))
    return P, R, nodes, groups


def _check_current(call: str, current: Any, sizes: tuple[int, int, int, int]) -> None:
    """Refuse a plan of other sizes (layers, L, P, ranks)."""
    if not isinstance(current, ExpertPlan):
        raise DTypeError(complaint(call, "current", "be an ExpertPlan or None", type(current).__name__))
    found = current.layers, current.num_logical, current.num_physical, current.ranks
    if found != sizes:
        rule, got = ("{} layers, {} experts, {} slots and {} ranks".format(*numbers) for numbers in (sizes, found))
        raise ArgumentError(complaint(call, "current", f"have {rule}", got))


def _fill(
    weight: Array, groups_of: Array, size: int, P: int, R: int, held: Array | None = None, slack: float = 0.0
) -> Array:
    """Return the experts of all slots, (layers, nodes, R / nodes, P / R).

    Parameters
    ----------
    weight : ndarray, (layers, L)
    groups_of : ndarray, (layers, nodes, groups / nodes)
        Groups of each node, ascending; of `size` experts each.
    held : ndarray, shaped as the answer, optional
        Slots to mend instead of filling them anew, until the heaviest rank of a node is within `slack` of its mean.
    """
    layers, nodes, _ = groups_of.shape
    experts = (groups_of[..., None] * size + np.arange(size)).reshape(layers * nodes, -1)
    loads = weight[np.repeat(np.arange(layers), nodes)[:, None], experts]
    counts = replicate(loads, P // nodes, R // nodes)
    if held is None:
        packs = pack(loads, counts, R // nodes)
    else:
        flat = held.reshape(layers * nodes, R // nodes, P // R)
        packs = np.stack([np.searchsorted(*pair) for pair in zip(experts, flat, strict=True)])
        for row, of_node in enumerate(packs):
            recount(of_node, counts[row], loads[row])
            refine(of_node, loads[row] / counts[row], slack)
    filled = np.take_along_axis(experts, packs.reshape(layers * nodes, -1), axis=1)
    return filled.reshape(layers, nodes, R // nodes, P // R)


def _keep(new: Array, old: Array, L: int) -> Array:
    """Return the packs `new` (nodes, ranks, slots) of one layer, each where most of it was before, in `old` (P,)."""
    nodes, ranks, slots = new.shape
    before = old.reshape(nodes, ranks, slots)
    shared = _overlaps(new.reshape(nodes * ranks, slots), before.reshape(nodes * ranks, slots), L)
    shared = shared.reshape(nodes, ranks, nodes, ranks)
    inside = np.zeros((nodes, nodes), np.int64)
    matches = {}
    for a in range(nodes):
        for b in range(nodes):
            match = _match(shared[a, :, b])
            matches[a, b], inside[a, b] = match, shared[a, np.arange(ranks), b, match].sum()
    kept = np.empty_like(new)
    for a, b in enumerate(_match(inside)):
        for rank, place in enumerate(matches[a, int(b)]):
            kept[b, place] = _keep_slots(new[a, rank], before[b, place])
    return kept


def _overlaps(new: Array, old: Array, L: int) -> Array:
    """Return (n, n) int64: how many experts each new pack (n, slots) has in common with each old one."""
    holders = np.zeros((L, len(old)), bool)
    holders[old, np.arange(len(old))[:, None]] = True
    return holders[new].sum(axis=1)


def _match(shared: Array) -> Array:
    """Return for each row another column, the greatest entries first, ties to the lowest row and column."""
    n = len(shared)
    match = np.full(n, -1)
    taken = np.zeros(n, bool)
    alike = np.flatnonzero(shared)
    for flat in alike[np.argsort(-shared.reshape(-1)[alike], kind="stable")]:
        row, column = divmod(int(flat), n)
        if match[row] < 0 and not taken[column]:
            match[row], taken[column] = column, True
    match[match < 0] = np.flatnonzero(~taken)
    return match


def _keep_slots(new: Array, old: Array) -> list[int]:
    """Return the experts `new` (slots,) in the slots of `old` where they were, the others ascending in the gaps."""
    coming, kept = set(new.tolist()), []
    for expert in old.tolist():
        kept.append(expert if expert in coming else -1)
        coming.discard(expert)
    filler = iter(sorted(coming))
    return [next(filler) if expert < 0 else expert for expert in kept]


def _first_even_enough(weight: Array, plans: list[ExpertPlan], slack: float) -> ExpertPlan:
    """Return for each layer the first plan without repeats whose heaviest rank is within `slack` of the evenest's.

    The last plan has no repeats in any layer.
    """
    most = np.stack([plan.rank_loads(weight).max(axis=1) for plan in plans])
    most[np.stack([plan.repeats() for plan in plans]) > 0] = np.inf
    # A plan in force that is not worth replacing comes first; nothing may be heavier than it.
    limit = np.minimum(most.min(axis=0) * (1 + slack), most[0])
    first = (most <= limit).argmax(axis=0)
    held = np.stack([plan.physical_to_logical for plan in plans])[first, np.arange(len(weight))]
    return ExpertPlan.of(held, plans[0].num_logical, plans[0].ranks)


def _keeps_groups(plan: ExpertPlan, nodes: int, groups: int) -> Array:
    """Return (layers,) bool: whether all experts of a group are on one node."""
    if nodes == 1:
        return np.ones(plan.layers, bool)
    group = plan.physical_to_logical // (plan.num_logical // groups)
    node = np.arange(plan.num_physical) // (plan.num_physical // nodes)
    seen = np.zeros((plan.layers, groups, nodes), bool)
    seen[np.arange(plan.layers)[:, None], group, node] = True
    return (seen.sum(axis=2) == 1).all(axis=1)
