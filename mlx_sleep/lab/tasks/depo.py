"""The task `depo`: k hops along a cycle of which only the edges are told.

After "Physics of Language Models 4.1" (Allen-Zhu) as arXiv 2605.26099 uses it. The context is the
edges of one directed cycle in random order, padded on the left to a fixed length; then come
queries "k, start = the node k hops on". An edge lost in the cut between two windows is lost as in
the paper. The difficulty is k.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...utils.errors import UserError
from .synthetic import Batch, check_int, check_split, draws, window_count

PAD, ANSWER = 0, 1  # then a token for each number of hops, then the pieces of names


class Depo:
    """Cycles of nodes[0] to nodes[1] nodes, up to `hops` hops, `queries` questions an example.

    A name is `name_tokens` tokens of an alphabet of `alphabet`; an edge is two names, a query
    k, start, ANSWER, answer. window: tokens between two sleeps. Each query is a question of its
    own; a test has one, for the answer of an earlier one can help, or be the same. The paper's
    size: 300 tokens of edges (75 nodes, names of two tokens), 60 of queries.
    """

    trained_apart = False

    def __init__(
        self,
        nodes: Sequence[int] = (20, 75),
        hops: int = 16,
        queries: int = 10,
        name_tokens: int = 2,
        alphabet: int = 50,
        window: int = 75,
        seed: int = 0,
    ):
        low, high = (check_int("the nodes of a cycle", n, 2) for n in nodes)
        if low > high:
            raise UserError(f"nodes must be [fewest, most], not [{low}, {high}]")
        self.low, self.high = low, high
        self.hops = check_int("hops", hops, 1)
        if hops >= low:
            raise UserError(
                f"{hops} hops go round a cycle of {low} nodes; use more nodes or fewer hops"
            )
        self.queries = check_int("queries", queries, 1)
        self.name_tokens = check_int("name_tokens", name_tokens, 1)
        self.alphabet = check_int("alphabet", alphabet, 2)
        self.names = alphabet**name_tokens
        if self.names < high:
            raise UserError(f"{self.names} names are too few for {high} nodes")
        self.window = window
        self.windows = window_count(high * 2 * name_tokens, window)
        self.query_tokens = 2 + 2 * name_tokens
        self.final_tokens = queries * self.query_tokens
        self.vocab_size = 2 + hops + alphabet
        self.seed = seed

    def check(self, difficulty: int | None) -> None:
        if difficulty is not None and check_int("hops", difficulty, 1) > self.hops:
            raise UserError(f"{difficulty} hops are more than the {self.hops} of this task")

    def batch(self, split: str, indices: Sequence[int], difficulty: int | None = None) -> Batch:
        """The examples `indices`; None mixes 1 to `hops` hops, evenly, query by query.

        With a difficulty it is a test, of one query an example.
        """
        check_split(split)
        self.check(difficulty)
        key = ("depo", self.seed, split)
        size = draws((*key, "size"), indices, 1)[:, 0] % np.uint64(self.high - self.low + 1)
        size = size.astype(np.int64) + self.low
        # The first nodes of a random order of all names are the cycle.
        cycle = np.argsort(draws((*key, "names"), indices, self.names), axis=1)[:, : self.high]
        context = self._edges(cycle, size, draws((*key, "order"), indices, self.high))
        context = context.reshape(len(size), self.windows, self.window)
        final, question = self._queries(cycle, size, key, indices, difficulty)
        return Batch(context, None, final, None, question)

    def retention(self, split: str, indices: Sequence[int], difficulty: int, further: int) -> Batch:
        """A cycle that fits one window, then `further` windows of cycles over other names."""
        check_split(split)
        self.check(difficulty)
        fits = self.window // (2 * self.name_tokens)
        if self.names < 2 * fits:
            raise UserError(f"retention needs {2 * fits} names, not {self.names}")
        if difficulty >= fits:
            raise UserError(
                f"{difficulty} hops go round a cycle that fits one window ({fits} nodes)"
            )
        key = ("depo", self.seed, split, "retention")
        order = np.argsort(draws((*key, "names"), indices, self.names), axis=1)
        size = np.full(len(order), fits)
        cycles = [order[:, :fits]]
        for w in range(further):
            again = np.argsort(draws((*key, w), indices, self.names - fits), axis=1)[:, :fits]
            cycles.append(np.take_along_axis(order[:, fits:], again, axis=1))
        context = np.full((len(order), 1 + further, self.window), PAD, np.int32)
        for w, cycle in enumerate(cycles):
            edges = self._edges(cycle, size, draws((*key, "order", w), indices, fits))
            context[:, w, self.window - edges.shape[1] :] = edges
        final, question = self._queries(cycles[0], size, key, indices, difficulty)
        return Batch(context, None, final, None, question)

    def _edges(self, cycle: np.ndarray, size: np.ndarray, order: np.ndarray) -> np.ndarray:
        """[B, n * edge] int32: shuffled edges of cycles of `size` nodes, padded on the left."""
        B, n = cycle.shape
        at = np.arange(n)
        real = at < size[:, None]
        following = np.take_along_axis(cycle, (at + 1) % size[:, None], axis=1)
        edges = np.concatenate([self._name(cycle), self._name(following)], axis=-1)
        edges[~real] = PAD
        # The smallest keys come first: padding, then the edges in random order.
        keys = np.where(real, order >> np.uint64(1), 0) + real.astype(np.uint64)
        shuffled = np.argsort(keys, axis=1, kind="stable")
        edges = np.take_along_axis(edges, shuffled[..., None], axis=1)
        return edges.reshape(B, -1)

    def _queries(self, cycle, size, key, indices, difficulty):
        """(final [B, F] int32, question [B, F] int32)"""
        B, n = len(cycle), self.name_tokens
        Q = self.queries if difficulty is None else 1
        size = size[:, None]
        start = (draws((*key, "start"), indices, Q) % size.astype(np.uint64)).astype(np.int64)
        if difficulty is None:
            k = (draws((*key, "hops"), indices, Q) % np.uint64(self.hops)).astype(np.int64) + 1
        else:
            k = np.full((B, Q), difficulty)
        final = np.full((B, Q, self.query_tokens), ANSWER, np.int32)
        final[..., 0] = 1 + k
        final[..., 1 : 1 + n] = self._name(np.take_along_axis(cycle, start, axis=1))
        final[..., -n:] = self._name(np.take_along_axis(cycle, (start + k) % size, axis=1))
        question = np.full(final.shape, -1, np.int32)
        question[..., -n:] = np.arange(Q)[:, None]
        return final.reshape(B, -1), question.reshape(B, -1)

    def _name(self, node: np.ndarray) -> np.ndarray:
        """[..., name_tokens] int32: the tokens of a node."""
        digits = [node // self.alphabet**i % self.alphabet for i in range(self.name_tokens)]
        return (2 + self.hops + np.stack(digits, axis=-1)).astype(np.int32)
