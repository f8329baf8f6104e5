"""Reduces a layer's scores and pattern to sums: sparse rows, competitors, probabilities."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.collapse.table import COMPLETE
from hooks.collapse.tally import Tally
from hooks.kernels import (
    ABLE,
    BROKEN,
    EXAMINED,
    LAW_CODES,
    N_COUNTS,
    SINGLE,
    TIES,
    Draws,
    Found,
    Layer,
    Rule,
    Sums,
    Table,
    add_strict,
    no_pending,
    scan,
    scratch,
)
from hooks.model import Fused
from hooks.noise import NormNoise, draw_uniforms, get_law
from hooks.sites import LayerSites

_WAITING = 2  # layers that may be copied but not yet reduced
_ROWS, _ENTRIES = 1 << 13, 1 << 15  # of one part's piece of the table


class Workers:
    """Threads over the matrices of a layer: the compiled loop holds no lock.

    Scores on an accelerator are copied and reduced, layer after layer, while the model runs on: the
    model's thread waits for no copy.
    """

    def __init__(self) -> None:
        self.count = max(1, torch.get_num_threads())
        self._pool: ThreadPoolExecutor | None = None
        self._alone: ThreadPoolExecutor | None = None
        self._entered = False
        self._behind: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()

    @contextmanager
    def open(self) -> Iterator[Workers]:
        """Threads for the time of a probe; at its end all work is done."""
        others = ThreadPoolExecutor(max(1, self.count - 1))
        alone = ThreadPoolExecutor(self.count)
        with others as pool, alone, ThreadPoolExecutor(1) as behind:
            self._pool, self._behind, self._alone = pool, behind, alone
            try:
                yield self
                self.finish()
            finally:
                for job in self._waiting:
                    job.cancel()
                self._pool, self._behind, self._alone = None, None, None
                self._entered = False

    def later(self, job: Callable[[], None]) -> None:
        """Queue a job to run beside the model, in order; few wait at a time."""
        assert self._behind is not None
        self._waiting.append(self._behind.submit(job))
        while len(self._waiting) > _WAITING:  # bounds the memory of what was copied
            self._waiting.popleft().result()

    def finish(self) -> None:
        """Wait for running jobs; raises what a job raised."""
        while self._waiting:
            self._waiting.popleft().result()

    def each(self, work: Callable[[int, int], None], n: int) -> None:
        """Call ``work(first, end)`` on parts of ``range(n)``; raises what a part raised."""
        parts = min(n, self.count)
        edges = [n * i // parts for i in range(parts + 1)]
        if self._pool is None or parts == 1:
            work(0, n)
            return
        jobs = [self._pool.submit(work, *edge) for edge in pairwise(edges[1:])]
        work(edges[0], edges[1])  # this thread takes its share
        for job in jobs:
            job.result()

    def apart(self, works: Sequence[Callable[[], None]]) -> None:
        """Run each in a thread in which torch works alone; raises what one raised.

        After a product on several threads torch's own wait for the next one, busily, for some
        milliseconds: threads that reduce what it gave would share their cores with them.
        """
        assert self._alone is not None
        ready = threading.Barrier(self.count)

        def enter() -> None:
            torch.set_num_threads(1)  # of this thread
            ready.wait()

        if not self._entered:
            self._entered = True
            for job in [self._alone.submit(enter) for _ in range(self.count)]:
                job.result()
            torch.set_num_threads(self.count)  # of this thread, and of those to come
        jobs = [self._alone.submit(work) for work in works]
        try:
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()


class LayerReducer:
    """Adds one layer of one batch to a :class:`Tally`."""

    def __init__(
        self,
        tally: Tally,
        index: int,
        sites: LayerSites,
        noise: NormNoise,
        prompts: Sequence[int],
        workers: Workers,
    ) -> None:
        self.tally = tally
        self.settings = tally.settings
        self.index = index
        self.sites = sites
        self.noise = noise
        self.prompts = np.asarray(prompts)
        self.workers = workers
        self._draws: Draws | None = None

    def add(
        self,
        scores: Float[Tensor, "batch head query key"],
        pattern: Float[Tensor, "batch head query key"] | None,
        s: Float[Tensor, "batch head query key"] | None,
        *,
        first_query: int = 0,
        n_query: int | None = None,
        n_key: int | None = None,
        eps: float | None = None,
    ) -> None:
        """Count these rows.

        Args:
            scores: pre-softmax scores, masked ones -inf or the dtype's least number.
            pattern: the model's own softmax of them; None: computed from the scores.
            s: the q.k part, where the layer adds a bias; None where the scores are the q.k part.
            first_query: index of the first row, where these are not all rows of the layer.
            n_query, n_key: queries and keys of the layer, all blocks together (default: these).
            eps: rounding of the dtype that the scores were made in (default: theirs).
        """
        given = [x.detach() for x in (scores, pattern, s) if x is not None]
        eps = torch.finfo(scores.dtype).eps if eps is None else eps
        has = (pattern is not None, s is not None)
        rows = (first_query, n_query or scores.shape[2], n_key or scores.shape[3])
        if scores.device.type == "cpu":
            self._reduce(given, has, rows, eps)
            return
        arrive = _copies_to_the_cpu(given)
        self.workers.later(lambda: self._reduce(arrive(), has, rows, eps))

    def _reduce(
        self, given: list[Tensor], has: tuple[bool, bool], rows: tuple[int, int, int], eps: float
    ) -> None:
        """Count rows in the CPU's memory: scores, and the pattern and s where given."""
        (has_pattern, has_s), (first_query, n_query, n_key) = has, rows
        batch, n_heads, queries, _ = given[0].shape
        draws = self._drawn(n_query, n_key)
        if self.settings.draws:  # this block's own queries
            draws = draws._replace(
                q=np.ascontiguousarray(draws.q[..., first_query : first_query + queries])
            )
        flat = [x.flatten(0, 1) for x in given]
        rule = self._rule(first_query, eps, n_key)
        sums = self._sums(batch * n_heads)

        def work(first: int, end: int) -> None:
            arrays = [_array(x[first:end]) for x in flat]
            empty = np.zeros((0, 0, 0), arrays[0].dtype)
            layer = Layer(
                arrays[0],
                arrays[1] if has_pattern else empty,
                arrays[-1] if has_s else empty,
            )
            part = _Part(self, first, end - first, n_key)
            part.scan(rule, layer, draws)
            part.add_to(sums)

        self.workers.each(work, batch * n_heads)
        self._refuse_broken(sums.counts[BROKEN].reshape(batch, n_heads))
        self._take(sums, batch)

    def add_fused(self, fused: Fused, query_block: int | None, room: int) -> None:
        """Count all rows of a fused attention on the CPU, whose scores are the q.k parts.

        Each thread makes scores for heads of its own, blocks of queries at a time, and reduces
        them while they are in its cache.

        Args:
            fused: the attention.
            query_block: queries of a block; None: as many as fit.
            room: bytes of all scores that exist at a time.
        """
        batch, n_heads, n_query, n_key = fused.shape
        parts = fused.split(self.workers.count)
        drawn, sums = self._drawn(n_query, n_key), self._sums(batch * n_heads)
        eps = torch.finfo(fused.query.dtype).eps
        square = fused.is_causal and n_query == n_key
        empty = np.zeros((0, 0, 0), np.float32)

        def work(first: int, mine: Fused) -> None:
            n = mine.shape[0] * mine.shape[1]
            part = _Part(self, first, n, n_key)
            fits = max(1, room // (4 * n * n_key * min(len(parts), self.workers.count)))
            block = fits if query_block is None else query_block
            for at in range(0, n_query, block):
                end = min(at + block, n_query)
                seen = end if square else n_key  # later keys are masked for all of these
                scores = _array(mine.scores(at, end, n_key=seen).flatten(0, 1))
                draws = drawn
                if self.settings.draws:
                    draws = drawn._replace(q=np.ascontiguousarray(drawn.q[..., at:end]))
                part.scan(self._rule(at, eps, n_key), Layer(scores, empty, empty), draws)
            part.add_to(sums)

        self.workers.apart([partial(work, *part) for part in parts])
        self._refuse_broken(sums.counts[BROKEN].reshape(batch, n_heads))
        self._take(sums, batch)

    def _refuse_broken(self, rows: np.ndarray) -> None:
        if rows.any():
            at = int(rows.sum(1).argmax())
            raise ValueError(
                f"layer {self.sites.label or self.sites.layer}: wanted scores that are finite "
                f"numbers; got NaN or inf in {int(rows[at].sum())} rows of prompt "
                f"{self.tally.first_prompt + int(self.prompts[at])}"
            )

    def _first_tokens(self, n_key: int) -> np.ndarray:
        """1 where one of the batch's documents begins, ``[batch, key]``."""
        first = np.zeros((len(self.prompts), n_key), np.int8)
        first[:, 0] = 1
        for row, prompt in enumerate(self.prompts):
            if self.sites.sequence("k") == "target":  # an encoder's tokens are one document
                first[row, list(self.tally.starts[prompt])] = 1
        return first

    def _rule(self, first_query: int, eps: float, n_key: int) -> Rule:
        sink = self.sites.sink or (-math.inf,) * self.sites.n_heads
        return Rule(
            law=LAW_CODES[self.settings.law],
            sigmas=np.asarray(self.settings.sigmas, dtype=np.float64),
            on_q="q" in self.noise.roles,
            on_k="k" in self.noise.roles,
            exact=self.settings.method == "exact",
            sparse=self.settings.sparse,
            # A row of this dtype shows the weight 1 where the others have less than half its eps.
            room=max(1 / self.settings.sparse - 1, eps / 2),
            cutoff=COMPLETE,
            n_heads=self.sites.n_heads,
            first_matrix=0,
            first_query=first_query,
            eps=eps,
            soft_cap=self.sites.soft_cap,
            sink=np.asarray(sink, dtype=np.float64),
            kv_head=np.asarray(self.sites.kv_head_of, dtype=np.int64),
            first=self._first_tokens(n_key),
            biased=self.sites.has_bias,
        )

    def _sums(self, n: int) -> Sums:
        n_s, n_d = len(self.settings.sigmas), self.settings.draws
        sampled = n_d if self.settings.method == "sample" else 0
        return Sums(
            counts=np.zeros((N_COUNTS, n), np.int64),
            rows=np.zeros((n, 2), np.int64),
            level=np.zeros((n, 2)),
            loose=np.zeros((n_s, n, 2)),
            centred=np.zeros((n_s, n, 2)),
            strict=np.zeros((n_s, n, 2)),
            strict_low=np.zeros((n_s, n, 2)),
            strict_high=np.zeros((n_s, n, 2)),
            loose_draws=np.zeros((n_s, sampled, n, 2)),
            centred_draws=np.zeros((n_s, sampled, n, 2)),
            strict_draws=np.zeros((n_s, n_d, n, 2)),
        )

    def _take(self, sums: Sums, batch: int) -> None:
        """Add a layer's sums to the tally, matrices split into prompts and heads."""
        tally, heads, mine = self.tally, self.sites.n_heads, self.prompts

        def add(to: np.ndarray, matrices: np.ndarray, axis: int) -> None:
            """Add ``matrices``, on the axis (prompt, head), to ``to``, on axes (head, prompt)."""
            shape = (*matrices.shape[:axis], batch, heads, *matrices.shape[axis + 1 :])
            apart = np.swapaxes(matrices.reshape(shape), axis, axis + 1)
            of_heads = to[(slice(None),) * axis + (slice(heads),)]
            of_heads[(slice(None),) * (axis + 1) + (mine,)] += apart

        for name, row in (("examined", EXAMINED), ("single_key", SINGLE), ("ties", TIES)):
            add(tally.counts[name][self.index], sums.counts[row], 0)
        add(tally.able[self.index], sums.counts[ABLE : ABLE + 2].T, 0)
        add(tally.rows[self.index], sums.rows, 0)
        add(tally.level[self.index], sums.level, 0)
        exact, computed = self.settings.method == "exact", self.settings.strict == "computed"
        for name, total, draws, known in (
            ("loose", sums.loose, sums.loose_draws, exact),
            ("centred", sums.centred, sums.centred_draws, exact),
            ("strict", sums.strict, sums.strict_draws, computed),
        ):
            if not known:
                total = draws.sum(1) / max(1, self.settings.draws)
            add(tally.sums[name][:, self.index], total, 1)
            by_head = draws.reshape(*draws.shape[:2], batch, heads, 2).sum(2)
            tally.draws[name][:, :, self.index, :heads] += by_head
        for name, bound in tally.bounds.items() if computed else ():
            of_heads = getattr(sums, name).reshape(-1, batch, heads, 2).sum(1)
            bound[:, self.index, :heads] += of_heads

    def _drawn(self, n_query: int, n_key: int) -> Draws:
        """The numbers from which NormNoise with this seed makes its factors, uniform or normal."""
        if self._draws is None:
            n_d = self.settings.draws
            self._draws = Draws(
                q=self._numbers("q", n_d, n_query, self.sites.n_heads),
                k=self._numbers("k", n_d, n_key, self.sites.n_kv_heads),
            )
        return self._draws

    def _numbers(self, role: Any, n_draws: int, n_pos: int, n_heads: int) -> np.ndarray:
        if not n_draws:
            return np.empty((0, len(self.prompts), n_heads, n_pos))
        u = draw_uniforms(
            self.noise,
            places=[(self.sites.layer, role)],
            prompts=[self.tally.first_prompt + int(prompt) for prompt in self.prompts],
            draws=range(n_draws),
            n_pos=n_pos,
            n_heads=n_heads,
        )[0]
        shape = (*u.shape[:3], n_heads)  # a factor that heads share is drawn once
        out = np.array(np.broadcast_to(u, shape).transpose(1, 0, 3, 2), order="C")
        law = get_law(self.settings.law)
        return law.base(torch.from_numpy(out)).numpy()


class _Part:
    """Some matrices of a layer: their sums, and what one thread needs to scan them.

    Args:
        reducer: of the layer.
        first, n: these matrices.
        n_key: keys of a row, at most.
    """

    def __init__(self, reducer: LayerReducer, first: int, n: int, n_key: int) -> None:
        self.reducer, self.first = reducer, first
        settings = reducer.settings
        self.sums = reducer._sums(n)  # whole arrays: each layout would be compiled for itself
        self.use = scratch(n_key, len(settings.sigmas))
        self.table = empty_piece(_ROWS, max(_ENTRIES, 2 * n_key), reducer.tally.biased)
        n_rows = _ROWS if settings.strict == "computed" else 0
        self.pending = no_pending(n_rows, len(settings.sigmas))

    def scan(self, rule: Rule, layer: Layer, draws: Draws) -> None:
        """Add these rows of the matrices, from query ``rule.first_query`` on."""
        reducer, tally = self.reducer, self.reducer.tally
        n_matrices, n_query, _ = layer.scores.shape
        found = Found(self.sums, self.table, self.pending)
        heads, at = reducer.sites.n_heads, 0
        while at < n_matrices * n_query:
            self.table.used[:] = 0
            near = rule._replace(cutoff=tally.parts.cutoff, first_matrix=self.first)
            at = scan(near, layer, draws, found, self.use, at)
            if self.pending.used[0]:
                add_strict(near, layer, found, self.use)
            tally.parts.take(self.table, near.cutoff, reducer.index, heads, reducer.prompts)
            tally.showing.take(
                self.table,
                layer,
                index=reducer.index,
                n_heads=heads,
                prompts=reducer.prompts,
                first=(self.first, rule.first_query),
                eps=rule.eps,
            )

    def add_to(self, sums: Sums) -> None:
        """Put these matrices' sums into the layer's."""
        for name, values in self.sums._asdict().items():
            where = (slice(None),) * _MATRIX_AXIS.get(name, 2)
            place = slice(self.first, self.first + values.shape[len(where)])
            getattr(sums, name)[(*where, place)] = values


def _copies_to_the_cpu(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Start copying; the function that is returned waits until the copies are there."""
    if tensors[0].device.type != "cuda":
        here = [x.cpu() for x in tensors]
        return lambda: here
    copies = []
    for x in tensors:
        copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        copies.append(copy.copy_(x, non_blocking=True))
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensors[0].device))

    def arrive() -> list[Tensor]:
        copied.synchronize()
        return copies

    return arrive


def empty_piece(n_rows: int, n_entries: int, biased: bool) -> Table:
    """An empty piece of the table for the compiled loop to fill."""
    return Table(
        row=np.empty((n_rows, 5), np.int64),
        s_star=np.empty(n_rows, np.float32),
        s=np.empty(n_entries, np.float32),
        beta=np.empty(n_entries if biased else 0, np.float32),
        a=np.empty(n_entries, np.float32),
        used=np.zeros(2, np.int64),
    )


def _array(x: Tensor) -> np.ndarray:
    """On the CPU, in one piece, as float32 or, where it is that already, float64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    array: np.ndarray = x.to("cpu", wide).contiguous().numpy()
    return array


_MATRIX_AXIS = {"counts": 1, "rows": 0, "level": 0} | dict.fromkeys(
    ("loose", "centred", "strict", "strict_low", "strict_high"), 1
)
