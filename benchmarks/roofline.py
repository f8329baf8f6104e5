"""What the Triton engine must cost on an H200, from its kernels' machine code.

    make .venv-triton/installed
    .venv-triton/bin/python -m benchmarks.roofline [--measure] [--docs]

The kernels are compiled for an H200, which needs none. Instructions of their loops are counted, by
the unit that runs them, and multiplied by how often a real model's rows run through them:
``--measure`` counts that on SmolLM2 and keeps it in docs/roofline.json. ``--docs`` writes
docs/benchmarks-roofline.md. No time is measured: a roofline is what the busiest unit needs at its
peak, with nothing waiting.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks._side_by_side import markdown_table

STORED, PAGE = Path("docs/roofline.json"), Path("docs/benchmarks-roofline.md")
# An H200's SXM5 module, NVIDIA's data sheet: dense bf16, memory, and lanes a clock of each unit of
# its 132 multiprocessors at the clock that gives its peak.
BF16, MEMORY, UNITS = 989.4e12, 4.8e12, {"issue": 128, "fp64": 64, "mufu": 16, "shared": 32}
CLOCK = BF16 / (132 * 4096)
CACHE = 5120 * CLOCK  # bytes from the second-level cache, which NVIDIA gives for the A100
GROUP = 64  # rows that run through the loose rates together


class Shape(NamedTuple):
    """Llama-3.1-8B."""

    d_model: int = 4096
    d_mlp: int = 14336
    n_layers: int = 32
    n_heads: int = 32
    n_kv: int = 8
    d_head: int = 128
    d_vocab: int = 128256

    def forward(self, n: int) -> tuple[float, float]:
        """Operations of a forward pass with logits, and of what a probe needs of it."""
        attention = 2 * self.d_model * self.d_head * (2 * self.n_heads + 2 * self.n_kv)
        mlp, scores = 6 * self.d_model * self.d_mlp, 4 * n / 2 * self.d_model
        whole = self.n_layers * (attention + mlp + scores) + 2 * self.d_model * self.d_vocab
        without = mlp + scores / 2 + 2 * self.d_model**2 + 2 * self.d_model * self.d_vocab
        return n * whole, n * (whole - without)

    def product(self, n: int) -> float:
        """Operations of all q.k below the diagonal, in tiles of 128."""
        return 2 * self.d_head * self.n_layers * self.n_heads * n * (n + 128) / 2


@dataclass
class Work:
    """How often rows run through the loops; all but the first two per sparse row.

    Attributes:
        sparse: share of the rows.
        tiles: share of tiles of 128 queries with a sparse row.
        long: share with more competitors than a list's room.
        panels: of the loose rates, of all sigmas and both gauges, as many as the busiest row of a
            group of 64 has.
        parts: of panels.
        steps: competitors in parts.
        items: sigmas with a strict rate.
        factors: of the query, of an item.
        blocks: of 32 competitors, of an item.
        keys: tokens of the prompt.
    """

    sparse: float
    tiles: float
    long: float
    panels: float
    parts: float
    steps: float
    items: float
    factors: float
    blocks: float
    keys: int


# -- how often -------------------------------------------------------------------------------------


def measure(pos: int) -> Work:
    """Count on SmolLM2 with English prose."""
    import hooks
    from benchmarks._side_by_side import CASES

    case, samples, counts = CASES["smollm2"](1, pos), [], []

    def look(seen: Any) -> None:
        for head in range(seen.scores.shape[1]):
            rows = seen.scores[0, head].float()
            total = torch.logsumexp(rows, 1) - rows.amax(1)
            sparse = (total <= -math.log(0.95)) & ((rows > -3e4).sum(1) > 1)
            counts.append((len(rows), int(sparse.sum()), _tiles(sparse)))
            samples.append(rows[sparse][:GROUP])  # a group of each head's

    layers = hooks.attention_sites(case.bridge)
    hooks.observe(case.bridge, layers, hooks.encode(case.bridge, case.tokens), look)
    rows, sparse, tiles = (sum(x) for x in zip(*counts, strict=True))
    each = [_trips(group) for group in samples if len(group) == GROUP]
    mean = {name: sum(x[name] for x in each) / len(each) for name in each[0]}
    for name in ("factors", "blocks"):  # of an item
        mean[name] /= max(1e-9, mean["items"])
    n_tiles = len(counts) * math.ceil(pos / 128)
    return Work(sparse=sparse / rows, tiles=tiles / n_tiles, keys=pos, **mean)


def _tiles(sparse: Tensor) -> int:
    return sum(int(part.any()) for part in sparse.split(128))


def _trips(rows: Tensor) -> dict[str, float]:
    """Of a group of sparse rows, the mean of what each makes the others wait for."""
    from hooks.collapse.probe import DEFAULT_SIGMAS
    from hooks.kernels.engines.triton_nearest import ROOM

    visible = rows > -3e4
    ordered = torch.where(visible, rows, -math.inf).double().sort(1, descending=True).values
    top, s = ordered[:, 0], ordered[:, 1 : 1 + 4 * ROOM]
    mean = torch.where(visible, rows, 0).double().sum(1) / visible.sum(1)
    most = math.sqrt(3) * DEFAULT_SIGMAS[-1]
    lowest = top * (1 - most) / (1 + most) + (mean * 2 * most / (1 + most)).clamp_max(0)
    found = {"long": float((s > lowest[:, None]).sum(1).gt(ROOM).double().mean())}
    total = dict.fromkeys(("panels", "parts", "steps"), 0.0)
    for shift in (torch.zeros_like(mean), mean):
        for sigma in DEFAULT_SIGMAS:
            one = _walk(top - shift, s - shift[:, None], math.sqrt(3) * sigma)
            total = {name: total[name] + one[name] for name in total}
    items, factors, blocks = 0, 0.0, 0.0
    needed = -math.log(1 / 0.95 - 1)
    for sigma in DEFAULT_SIGMAS:
        a = math.sqrt(3) * sigma
        gap = s[:, 0] * (1 + a) - top * (1 - a)
        wins = (1 + a) * gap > needed
        first = (needed / gap.clamp_min(1e-9)).clamp_min(1 - a)
        inside = (s * (1 + a) > (top * (1 - a))[:, None]).sum(1) + 1
        items += int(wins.sum())
        factors += float(torch.where(1 + a > 8 * first, 2, 1)[wins].sum())
        blocks += float(((inside + 31) // 32)[wins].sum())
    of_items = {"items": items, "factors": factors, "blocks": blocks}
    return found | total | {name: x / len(rows) for name, x in of_items.items()}


def _walk(star: Tensor, s: Tensor, a: float) -> dict[str, float]:
    """Panels, their parts and the competitors in them, as the kernel makes them."""
    from hooks.kernels.engines.triton_loose import DEEP, FALL

    able = (s > 0) & (s * (1 + a) > (star * (1 - a))[:, None]) & (star[:, None] > 0)
    s = torch.where(able, s, 1.0)
    g = torch.where(able, 0.5 / (a * s), 0.0)
    reach = s[:, 0] * (1 + a)
    d = reach[:, None] - s * (1 + a)
    width = reach - star * (1 - a)
    steep, moment = g.cumsum(1), (g * d).cumsum(1)
    end = torch.where(able.roll(-1, 1), d.roll(-1, 1), width[:, None])
    end[:, -1] = width
    deep = (DEEP + moment) / steep.clamp_min(1e-30)
    going = able & (torch.where(able, d, math.inf) < deep.roll(1, 1).cummin(1).values.roll(0, 1))
    going[:, 0] = able[:, 0]
    span = (torch.minimum(end, deep) - d).clamp_min(0)
    parts = torch.where(going, (steep * span / FALL).ceil(), 0).amax(0)
    any_going = going.any(0).double()
    order = torch.arange(1, s.shape[1] + 1)
    return {
        "panels": float(any_going.sum()),
        "parts": float(parts.sum()),
        "steps": float((parts * order).sum()),
    }


# -- what it costs ---------------------------------------------------------------------------------

Cost = dict[str, float]
"""Lanes' instructions of each unit."""


def cost(blocks: Sequence[Any], warps: int) -> Cost:
    """Of one run through these blocks by all lanes of a program."""
    ops = [op.split(".")[0] for block in blocks for op in block.ops]
    return {
        "issue": 32.0 * warps * len(ops),
        "fp64": 32.0 * warps * sum(op in ("DADD", "DMUL", "DFMA", "DSETP") for op in ops),
        "mufu": 32.0 * warps * sum(op in ("MUFU", "F2F", "I2F", "F2I") for op in ops),
        "shared": 32.0 * warps * sum(op in ("SHFL", "LDS", "STS", "LDSM") for op in ops),
    }


def plus(*terms: tuple[float, Cost]) -> Cost:
    """A weighted sum."""
    return {unit: sum(times * part[unit] for times, part in terms) for unit in UNITS}


def seconds(of: Cost) -> float:
    """What the busiest unit needs."""
    return max(of[unit] / (132 * lanes * CLOCK) for unit, lanes in UNITS.items())


class Loops:
    """A kernel's loops in the order in which they begin, outer ones first."""

    def __init__(self, kernel: Any, expected: int) -> None:
        index = {id(block): i for i, block in enumerate(kernel.blocks)}
        spans = {(index[id(x[0])], index[id(x[-1])]) for x in kernel.loops()}
        spans = {x for x in spans if kernel.blocks[x[0]].ops != ("BRA",)}
        main = len(kernel.blocks)
        if kernel.name == "_strict":
            # Behind the last exit lie divisions of numbers so small that they need other code.
            main = [i for i, block in enumerate(kernel.blocks) if "EXIT" in block.ops][-1]
        spans = {x for x in spans if x[1] < main}
        self.spans = sorted(spans, key=lambda x: (x[0], -x[1]))
        if len(self.spans) != expected:
            raise ValueError(f"{kernel.name}: wanted {expected} loops; got {self.spans}")
        self.kernel = kernel
        self.costs = [self.of(*span) for span in self.spans]
        outer = [x for x in self.spans if not any(self._in(x, y) for y in self.spans)]
        whole = cost(kernel.blocks[: main + 1], kernel.warps)
        self.rest = plus((1, whole), *((-1, self.of(*x)) for x in outer))

    def of(self, first: int, last: int) -> Cost:
        """One run from block to block."""
        return cost(self.kernel.blocks[first : last + 1], self.kernel.warps)

    def own(self, i: int) -> Cost:
        """One run through a loop without those inside it."""
        span = self.spans[i]
        inner = [x for x in self.spans if self._in(x, span)]
        inner = [x for x in inner if not any(self._in(x, y) for y in inner)]
        return plus((1, self.costs[i]), *((-1, self.of(*x)) for x in inner))

    @staticmethod
    def _in(x: tuple[int, int], y: tuple[int, int]) -> bool:
        return x != y and x[0] >= y[0] and x[1] <= y[1]


def kernels() -> dict[str, Any]:
    """Each, compiled for rows of 8,192 keys in bf16 with heads of 128."""
    from hooks.kernels.engines import operands
    from tests.support.launches import pass_of_kernels, rule
    from tests.support.sm90 import compiling

    q, k = torch.zeros(1, 4, 8192, 128), torch.zeros(1, 2, 8192, 128)
    of = operands(q.bfloat16(), k.bfloat16(), None, causal=True, scale=None)
    with compiling() as found:
        pass_of_kernels().add_fused(0, rule(), of, [0], biased=False)
    named = {}
    for kernel in found:
        write = kernel.constants.get("WRITE")
        named[kernel.name + {True: "_write", False: ""}.get(write, "")] = kernel
    return named


class Part(NamedTuple):
    """One line of the table."""

    what: str
    seconds: float


def parts(work: Work, n: int, made: dict[str, Any], shape: Shape) -> list[Part]:
    """What the probe adds to the forward pass that it needs."""
    product = shape.product(n)
    scores, rows = product / (2 * shape.d_head), shape.n_layers * shape.n_heads * n
    sparse = work.sparse * rows

    tell, write = Loops(made["_walk"], 1), Loops(made["_walk_write"], 1)
    masked = min(len(b.ops) for b in made["_walk"].blocks[slice(*_inside(tell))])
    mask = 32.0 * made["_walk"].warps * masked * (1 - 2 * 128 / n)  # most tiles need none
    per = plus((1, tell.costs[0]))
    per["issue"] -= mask
    tile = made["_walk"].constants["QUERIES"] * made["_walk"].constants["KEYS"]
    tensor = product / BF16
    found = [Part("rows told apart: q.k once more, by tile", max(
        tensor, _keys(made["_walk"], scores, shape) / CACHE,
        seconds(plus((scores / tile, per)))))]  # fmt: skip
    tile = made["_walk_write"].constants["QUERIES"] * made["_walk_write"].constants["KEYS"]
    found.append(Part("sparse rows written", max(
        work.tiles * tensor, work.tiles * _keys(made["_walk_write"], scores, shape) / CACHE,
        seconds(plus((work.tiles * scores / tile, write.costs[0]))),
        sparse * n / 2 * 4 / MEMORY)))  # fmt: skip

    near, blocks = Loops(made["_nearest"], 7), math.ceil(n / 2 / 1024)
    one, two, count, outer, inner, fits, pack = range(7)
    found.append(Part("attended keys, and lists of the nearest", sparse * seconds(plus(
        (1, near.rest), (blocks, near.costs[one]), (blocks, near.costs[two]),
        (blocks, near.costs[count]), (work.long * 8, near.own(outer)),
        (work.long * 8 * blocks, near.costs[inner]), (work.long * blocks, near.costs[fits]),
        (blocks, near.costs[pack])))))  # fmt: skip

    loose = Loops(made["_rates"], 5)
    outer, part, four, single, _ = range(5)
    found.append(Part("loose rates", sparse / GROUP * seconds(plus(
        (32, loose.rest), (work.panels, loose.own(outer)), (work.parts, loose.own(part)),
        (work.steps / 4, loose.costs[four]),
        (work.parts * 1.5, loose.costs[single])))))  # fmt: skip

    strict, keys = Loops(made["_strict"], 10), math.ceil(n / 2 / made["_strict"].constants["KEYS"])
    crowd, factor, few, outer, inner, done, cell, moments, winners, node = range(10)
    times, wide = work.factors, work.blocks
    found.append(Part("strict rates", sparse * work.items * seconds(plus(
        (1, strict.rest), (times, strict.own(factor)), (keys, strict.costs[crowd]),
        (5 * times, strict.costs[few]), (5 * times, strict.own(outer)),
        (5 * times * wide, strict.costs[inner]),
        (times * keys, strict.costs[done]), (10 * times, strict.own(cell)),
        (10 * times * wide, strict.costs[moments]), (10 * times * wide, strict.own(winners)),
        (80 * times * wide, strict.costs[node])))))  # fmt: skip

    listing = [Loops(made[name], 1) for name in ("_list", "_list_write")]
    terms: list[tuple[float, Cost]] = []
    for one_of in listing:
        first, last = one_of.spans[0]
        ends = plus((1, one_of.of(first, first)), (1, one_of.of(last, last)))
        terms += [(1, one_of.rest), (1, one_of.costs[0]), (blocks, ends)]
    found.append(Part("the table of nearest competitors", sparse * seconds(plus(*terms))))
    return found


def _keys(walk: Any, scores: float, shape: Shape) -> float:
    """Bytes of keys in bf16: each tile of queries reads its own."""
    return 2 * shape.d_head * scores / walk.constants["QUERIES"]


def _inside(loops: Loops) -> tuple[int, int]:
    first, last = loops.spans[0]
    return first + 1, last


def table(work: Work, n: int, made: dict[str, Any]) -> list[dict[str, Any]]:
    """Forward passes of each part, and in all."""
    shape = Shape()
    whole, needed = shape.forward(n)
    base = whole / BF16
    each = [Part("the forward pass, ended at the last scores", needed / BF16)]
    each += parts(work, n, made, shape)
    lines = [
        {"part": x.what, "ms": 1e3 * x.seconds, "forward passes": x.seconds / base} for x in each
    ]
    total = sum(x.seconds for x in each)
    return [*lines, {"part": "in all", "ms": 1e3 * total, "forward passes": total / base}]


def per_score(made: dict[str, Any], shape: Shape) -> list[dict[str, Any]]:
    """Of the walk that tells rows apart: what each unit does for a score, and what it may do."""
    walk = Loops(made["_walk"], 1)
    tile = made["_walk"].constants["QUERIES"] * made["_walk"].constants["KEYS"]
    first, last = walk.spans[0]
    unmasked = plus((1, walk.costs[0]), (-1, walk.of(first + 1, last - 1)))
    lines = [
        {
            "unit": {"issue": "instructions", "fp64": "of them in float64", "mufu": "exponentials",
                     "shared": "through shared memory, or between lanes"}[unit],
            "a score": round(of / tile, 2),
            "a clock": UNITS[unit],
        }
        for unit, of in unmasked.items()
    ]  # fmt: skip
    product = {"unit": "tensor cores, operations", "a score": 2 * shape.d_head}
    keys = {"unit": "bytes of keys, from the second-level cache", "a clock": 5120 / 132}
    keys["a score"] = _keys(made["_walk"], 1, shape)
    return [*lines, product | {"a clock": 4096}, keys]


def page(work: Work, made: dict[str, Any]) -> str:
    """The page of the documentation."""
    shares = []
    for share in (work.sparse, 0.1, 0.25, 0.5):
        more = Work(**asdict(work) | {"sparse": share, "tiles": max(work.tiles, min(1, 4 * share))})
        line: dict[str, Any] = {"sparse rows": f"{share:.1%}"}
        for n in (4096, 8192, 32768):
            line[f"{n:,} tokens"] = table(more, n, made)[-1]["forward passes"]
        shares.append(line)
    kernels_of = [
        {"kernel": name, "registers": x.registers, "bytes beside them": x.stack,
         "shared KiB": x.shared / 1024, "warps": x.warps}
        for name, x in made.items()
    ]  # fmt: skip
    return PAGE_TEXT.format(
        parts=markdown_table(table(work, 8192, made)),
        scores=markdown_table(per_score(made, Shape())),
        shares=markdown_table(shares),
        kernels=markdown_table(kernels_of),
        keys=f"{work.keys:,}",
        share=f"{work.sparse:.1%}",
        tiles=f"{work.tiles:.0%}",
        items=f"{work.items:.2f}",
        steps=f"{work.steps / 32:,.0f}",
    )


PAGE_TEXT = """# What the Triton engine must cost on an H200

Written by `python -m benchmarks.roofline --docs`. **Nothing on this page was timed**: no
accelerator was at hand. The kernels are compiled for an H200, which works without one; the
instructions of their loops are counted, by the unit that runs them, and multiplied by how often a
real model's rows run through them. A roofline is what the busiest unit needs at its peak. What
waits, for memory or for each other, comes on top.

Llama-3.1-8B's shape, bf16, fused attention, one prompt of 8,192 tokens, default sigmas, strict
rate included. Forward passes at the tensor cores' peak (989 TFLOP/s; one takes 142 ms then):

{parts}

The first line is the forward pass without its unembedding and what follows the last scores.
Sparse rows are taken from SmolLM2-135M on {keys} tokens of English prose, as the CPU's probe sees
them: {share} of the rows are sparse, in {tiles} of the tiles of 128 queries; each has {items}
sigmas at which another token can win strictly, and the busiest of 64 rows multiplies {steps}
factors a node of the loose rates, on average over sigmas and gauges.

## With more sparse rows

Forward passes in all, if a model has more of them, each as much work as SmolLM2's:

{shares}

With few sparse rows the probe stays near the pass that it measures; with half of all rows sparse,
or at 32k, it does not. A sparse row is written out, read seven times and sorted, where the others
cost some 8 instructions a score.

## A score

The walk that tells rows apart makes q.k again, tile by tile, and keeps a maximum and a sum of
each row (tiles that no mask cuts, 128 queries by 128 keys). "A clock": what one of the 132
multiprocessors can do, 1.83e9 times a second:

{scores}

## The kernels

As they are compiled for rows of 8,192 keys and heads of 128 dimensions:

{kernels}

## Scores that exist (eager attention)

There the model itself writes [head, query, key] numbers and reads them several times, some 20
bytes a score. The probe reads scores and pattern once, 4 bytes a score in bf16, and sparse rows
again.

| tokens | in all | at 4.8 TB/s | over 142 ms, or 67 |
|---|---|---|---|
| 4,096 | 69 GB | 14 ms | 0.22 |
| 8,192 | 275 GB | 57 ms | 0.40 |

The model's own pass takes more than twice these 142 ms then.

## What was checked, and what not

`make test-triton` runs the kernels under Triton's interpreter against the compiled code, and
compiles each for an H200; `python -m tests.support.triton_checks` compares them on every
architecture of the [support table](support.md). Neither sees what only hardware shows: order of
memory between threads, a driver's faults, time. So `engine="auto"` compares Triton's sums with
torch's on the device itself before it takes them, once a process, and falls back with a warning.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=int, metavar="TOKENS", help="count the work anew")
    parser.add_argument("--docs", action="store_true", help=f"write {PAGE}")
    options = parser.parse_args()
    if options.measure:
        STORED.write_text(json.dumps(asdict(measure(options.measure)), indent=1) + "\n")
        return
    work, made = Work(**json.loads(STORED.read_text())), kernels()
    if options.docs:
        PAGE.write_text(page(work, made))
        return
    for n in (4096, 8192, 32768):
        print(f"\n{n} tokens\n\n{markdown_table(table(work, n, made))}")


if __name__ == "__main__":
    main()
