"""Problems over several ranks, and their answers in one process; without MPI, so that every rank knows them all."""

from __future__ import annotations

import dataclasses

import numpy as np

import pymoe
from pymoe.comm.placement import experts_of

K, N = 32, 64


@dataclasses.dataclass
class Problem:
    """Tokens of all ranks, weights of all experts."""

    x: list
    ids: list
    weights: list
    w1: np.ndarray
    w2: np.ndarray
    config: pymoe.FusedMoEQuantConfig | None
    owned: list
    node_size: int = 1
    """Ranks whose sums are added first, in a transport that knows nodes."""

    @property
    def num_experts(self):
        return len(self.w1)

    def experts(self, rank):
        """Return (w1, w2, quant_config) of what `rank` owns."""
        mine = np.asarray(self.owned[rank], int)
        return self.w1[mine], self.w2[mine], None if self.config is None else cut(self.config, mine)

    def add(self, parts):
        """Return the declared sum of one float32 array a rank: by ranks, or in each node first, then by nodes."""
        total = np.zeros_like(parts[0])
        for start in range(0, len(parts), self.node_size):
            node = parts[start : start + self.node_size]
            total += node[0] if len(node) == 1 else sum(node[1:], np.zeros_like(total) + node[0])
        return total

    def one_process(self, rank_order: bool):
        """Return what one process makes of all tokens in rank order, cut by rank.

        In the order of the slots, or, with `rank_order`, as the declared sum: each rank's experts alone in float32,
        added in the order of the ranks, rounded once.
        """
        x, ids, weights = (np.concatenate(part) for part in (self.x, self.ids, self.weights))
        if not rank_order:
            whole = pymoe.MoELayer(self.w1, self.w2, topk=ids.shape[1], quant_config=self.config)
            y = whole(x, topk_weights=weights, topk_ids=ids)
        else:
            parts = [self.partial(x, ids, weights, np.asarray(owned, int)) for owned in self.owned]
            y = self.add(parts).astype(x.dtype)
        return np.split(y, np.cumsum([len(part) for part in self.x])[:-1])

    def one_process_monolithic(self, logits):
        """Return the declared sum of what each rank's experts, which route themselves, make of all tokens."""
        x, logits = np.concatenate(self.x), np.concatenate(logits)
        topk = self.ids[0].shape[1]
        parts = []
        for owned in self.owned:
            if not len(owned):
                parts.append(np.zeros(x.shape, np.float32))
                continue
            mapping = np.full(self.num_experts, -1, np.int32)
            mapping[owned] = np.arange(len(owned))
            w1, w2 = self.w1[owned], self.w2[owned]
            sizes = pymoe.FusedMoEConfig(self.num_experts, topk, w2.shape[1], w1.shape[1] // 2, len(owned),
                                         in_dtype=x.dtype, routing=pymoe.RoutingConfig(topk))  # fmt: skip
            experts = pymoe.CpuMonolithicExperts(sizes, pymoe.FusedMoEQuantConfig())
            kernel = pymoe.FusedMoEKernel(pymoe.SingleProcessMonolithicPrepareAndFinalize(), experts)
            y = kernel.apply_monolithic(x, w1, w2, router_logits=logits, expert_map=mapping,
                                        global_num_experts=self.num_experts)  # fmt: skip
            parts.append(y.astype(np.float32))
        return np.split(self.add(parts).astype(x.dtype), np.cumsum([len(part) for part in self.x])[:-1])

    def partial(self, x, ids, weights, owned):
        """Return the float32 sums over the slots of the experts `owned`, in slot order, by one process's kernel."""
        if not len(owned):
            return np.zeros(x.shape, np.float32)
        mapping = np.full(self.num_experts, -1, np.int32)
        mapping[owned] = np.arange(len(owned))
        w1, w2 = self.w1[owned], self.w2[owned]
        config = pymoe.FusedMoEQuantConfig() if self.config is None else cut(self.config, owned)
        config = pymoe.checks.quant_config("test", config, w1, w1.shape[1], w2.shape[1], w1.shape[1] // 2)
        sizes = pymoe.FusedMoEConfig(self.num_experts, ids.shape[1], w2.shape[1], w1.shape[1] // 2, len(owned),
                                     in_dtype=x.dtype)  # fmt: skip
        kernel = pymoe.FusedMoEKernel(pymoe.SingleProcessPrepareAndFinalize(), pymoe.CpuExperts(sizes, config))
        return kernel.apply_as(
            "test", x, w1, w2, topk_weights=weights, topk_ids=ids, activation="silu",
            global_num_experts=self.num_experts, expert_map=mapping, apply_router_weight_on_input=False,
            out_dtype=np.float32,
        )  # fmt: skip


def cut(config, mine):
    """Return the part of a quant config that belongs to some experts."""
    parts = {}
    for name in ("w1", "w2"):
        desc = getattr(config, name)
        arrays = {field: getattr(desc, field) for field in ("scale", "scale_2", "zp", "bias")}
        parts[name] = dataclasses.replace(desc, **{f: a[mine] for f, a in arrays.items() if a is not None})
    return dataclasses.replace(config, **parts)


def tokens_a_rank(pattern, ranks, rng):
    """Return how many tokens each rank has."""
    if pattern == "uneven":
        return [[7, 0, 1, 19, 4][rank % 5] for rank in range(ranks)]
    if pattern == "many":
        return [2304] * ranks
    if pattern == "none":
        return [0] * ranks
    if pattern == "first":
        return [11] + [0] * (ranks - 1)
    if pattern == "last":
        return [0] * (ranks - 1) + [11]
    return [int(m) for m in rng.integers(0, 24, ranks)]


def problem(ranks, E=8, topk=2, *, tokens="uneven", routing="random", dtype=np.float32, scheme=None,
            placement="linear", seed=0, exact=False):  # fmt: skip
    """Return a problem; `exact` data make every sum exact in any order."""
    rng = np.random.default_rng([seed, ranks, E, topk])
    counts = tokens_a_rank(tokens, ranks, rng)
    if isinstance(placement, str) and placement == "shuffled":
        order = rng.permutation(E)
        cuts = np.sort(rng.integers(0, E + 1, ranks - 1))
        owned = [part.tolist() for part in np.split(order, cuts)]
    else:
        owned = [experts_of("test", placement, E, ranks, rank) for rank in range(ranks)]
    x, ids, weights = [], [], []
    for m in counts:
        if exact:
            x.append(rng.integers(-2, 3, (m, K)).astype(dtype))
            weights.append(rng.choice([0.25, 0.5, 1.0], (m, topk)).astype(np.float32))
        else:
            x.append(rng.standard_normal((m, K)).astype(dtype))
            weights.append(rng.random((m, topk), np.float32))
        ids.append(ids_of(routing, m, topk, E, owned, rng))
    if exact:
        # Few small whole numbers, and an activation of 32 exactly: float32 sums of these are exact.
        w1 = np.zeros((E, N, K), np.float32)
        w1[:, : N // 2, 0] = 0
        w1[np.arange(E)[:, None], np.arange(N // 2), 0] = 32
        w1[np.arange(E)[:, None], N // 2 + np.arange(N // 2), rng.integers(1, K, (E, N // 2))] = 1
        w2 = rng.integers(-1, 2, (E, K, N // 2)).astype(np.float32)
        for part in x:
            part[:, 0] = 1
        return Problem(x, ids, weights, w1.astype(dtype), w2.astype(dtype), None, owned)
    w1 = (rng.standard_normal((E, N, K)) / 4).astype(np.float32)
    w2 = (rng.standard_normal((E, K, N // 2)) / 4).astype(np.float32)
    config = None
    if scheme is None:
        w1, w2 = w1.astype(dtype), w2.astype(dtype)
    elif scheme == "fp8_static":
        w1, w2, config = pymoe.quantize_experts(w1, w2, "fp8_w8a8_tensor")
        desc = [dataclasses.replace(getattr(config, name), scale=np.array([0.02], np.float32)) for name in ("a1", "a2")]
        config = dataclasses.replace(config, a1=desc[0], a2=desc[1])
    else:
        w1, w2, config = pymoe.quantize_experts(w1, w2, scheme)
    return Problem(x, ids, weights, w1, w2, config, owned)


def ids_of(routing, m, topk, E, owned, rng):
    """Return (m, topk) ids."""
    if routing == "dead":
        return np.full((m, topk), -1, np.int32)
    if routing == "one rank":
        busiest = max(owned, key=len)
        return rng.choice(busiest, (m, topk)).astype(np.int32)
    if routing == "skewed":
        ids = rng.integers(0, E, (m, topk)).astype(np.int32)
        ids[rng.random((m, topk)) < 0.95] = E - 1
        return ids
    if routing == "duplicate":
        return np.repeat(rng.integers(0, E, (m, 1)), topk, axis=1).astype(np.int32)
    ids = np.argsort(rng.random((m, max(E, topk))), axis=1)[:, :topk].astype(np.int64) % max(E, 1)
    if routing == "holes":
        ids[rng.random((m, topk)) < 0.4] = -1
        ids[rng.random((m, topk)) < 0.2] = E + 7
    return ids
