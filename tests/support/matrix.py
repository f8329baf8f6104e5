"""The support matrix: what this library says of each architecture, and whether that is true.

A row is made by the library's own self-check and then by recomputation: arg max shifts of sparse
rows under drawn noise, counted by `hooks` on the bridge and by `oracles/shifts.py` on the model
as its authors wrote it, must be the same for every head.

    python -m tests.support.matrix            # print the table
    python -m tests.support.matrix --write    # and write docs/support.json and docs/support.md
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

import hooks
from hooks.model.protocol import ROLES
from hooks.sites.types import AttentionSites
from tests.oracles.recompute import POS, Disagreement, recompute, truth
from tests.support import builders
from tests.support.inputs import check_inputs
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
ORDER = ("verified", "limited", "refused", "not tried")


# What transformers 5.24 stops by itself: `docs/transformerlens-traps.md`, section 8.
STOPPED_BY_5_24 = ("CodeGenForCausalLM", "Llama4ForConditionalGeneration")
NO_BF16_ON_5_24 = [
    (name, "gqa")
    for name in ("FlexOlmoForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM")
]


@dataclass(frozen=True)
class Row:
    """One architecture with one kind of heads."""

    name: str
    heads: str
    verdict: str
    why: str
    layers: str = ""
    scores: str = ""
    noise: str = ""
    rows: int = 0
    moved: int = 0
    sparse: float = 0.0
    inputs: str = ""


def kinds() -> list[tuple[str, str]]:
    """Every (architecture, kind of heads) that has a row; one row for names that are not tried."""
    out = []
    for name in builders.groups():
        try:
            out += [(name, heads) for heads in builders.variants(name)]
        except builders.NotTried:
            out.append((name, ""))
    return out


def judge(name: str, heads: str) -> Row:
    """Build, check, recompute.

    Raises:
        Disagreement: the library's numbers are not the model's.
    """
    try:
        built = builders.build(name, heads or None)
    except builders.NotTried as error:
        return Row(name, heads, "not tried", str(error))
    try:
        sites = hooks.attention_sites(built.model)
    except hooks.UnsupportedModelError as error:
        return Row(name, heads, "refused", str(error))
    hf = builders.build_hf(name, heads or None, dtype=torch.float64)
    real = truth(hf, built.inputs(1, POS, 0), sites)
    rows, moved, sparse = recompute(built, sites, real)
    tried = ""
    if (heads or None) in (None, builders.preferred(name)):  # one kind of heads for each adapter
        tried = check_inputs(name, hf, built, sites, sparse, real)
    limits = _limits(sites)
    return Row(
        name,
        heads,
        "limited" if limits else "verified",
        limits,
        layers=_ranges([s.label for s in sites]),
        scores=_scores(sites),
        noise=_noise(sites),
        rows=rows,
        moved=moved,
        sparse=sparse,
        inputs=tried,
    )


def _limits(sites: AttentionSites) -> str:
    """Where noise is refused although the probe is right: by the vectors it is refused on."""
    refused: dict[str, list[str]] = {}
    for s in sites:
        if s.averaging == "unverified":
            refused.setdefault("v", []).append(s.label)
    limits = [f"noise on {roles} is refused in {_ranges(ls)}" for roles, ls in refused.items()]
    left_out: dict[str, list[str]] = {}
    for name, why in sites.left_out:
        left_out.setdefault(why, []).append(name)
    limits += [f"{', '.join(names)} left out, {why}" for why, names in left_out.items()]
    return "; ".join(limits)


def _scores(sites: AttentionSites) -> str:
    facts = {
        "a hook": any(not s.tapped for s in sites),
        "the softmax": any(s.tapped and not s.bare for s in sites),
        "the product": any(s.bare for s in sites),
        "bias": any(s.has_bias for s in sites),
        "soft cap": any(s.soft_cap for s in sites),
        "sink": any(s.sink for s in sites),
        "gate": any(s.averaging == "gated" for s in sites),
    }
    return ", ".join(fact for fact, holds in facts.items() if holds)


def _noise(sites: AttentionSites) -> str:
    """What becomes of noise at the projections, where that is not all of it."""
    return ", ".join(
        f"{role} {shield}"
        for shield in ("removed", "mixed")
        for role in ROLES
        if any(s.vector(role).shield == shield for s in sites)
    )


def _ranges(labels: list[str]) -> str:
    """L0-L3, X0: labels of one letter together."""
    by_kind: dict[str, list[int]] = {}
    for label in labels:
        kind = label.rstrip("0123456789")
        by_kind.setdefault(kind, []).append(int(label[len(kind) :]))
    parts = []
    for kind, numbers in by_kind.items():
        run = numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > 1
        ends = [f"{kind}{numbers[0]}-{numbers[-1]}"] if run else [f"{kind}{n}" for n in numbers]
        parts += ends
    return " ".join(parts)


# --- the table -------------------------------------------------------------------------------


def as_json(rows: list[Row]) -> str:
    """One row a line, so that a change shows as one."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    return f"[\n{lines}\n]\n"


def stored() -> dict[tuple[str, str], Row]:
    """The committed table."""
    rows = json.loads((DOCS / "support.json").read_text(encoding="utf-8"))
    return {(row["name"], row["heads"]): Row(**row) for row in rows}


def as_markdown(rows: list[Row]) -> str:
    """The page for people: one line per architecture, its kinds of heads together."""
    groups = builders.groups()
    merged: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        facts = (row.name, row.verdict, row.why, row.layers, row.scores, row.noise)
        merged.setdefault(facts, []).append(row)
    count = adapters(rows)
    lines = [_HEAD.format(**count)]
    for verdict, title in _TITLES.items():
        mine = [same for same in merged.values() if same[0].verdict == verdict]
        if not mine:
            continue
        lines += [f"\n## {title}\n", *_COLUMNS[verdict == "verified" or verdict == "limited"]]
        for same in sorted(mine, key=lambda rows: rows[0].name.lower()):
            lines.append(_line(same, groups[same[0].name]))
    return "\n".join(lines) + "\n"


_TITLES = {
    "verified": "Verified",
    "limited": "Verified, with a limit",
    "refused": "Refused",
    "not tried": "Not tried",
}
_COLUMNS = {
    True: (
        "| architecture | heads | attentions | scores from | noise at the projection | "
        "rows/shifts compared | limit |",
        "|---|---|---|---|---|---|---|",
    ),
    False: ("| architecture | heads | reason |", "|---|---|---|"),
}
_HEAD = """# Which models

Written by `python -m tests.support.matrix --write`; `make matrix` makes every row again and fails
where one got worse. Each architecture that TransformerLens {version} has an adapter for is built
with random weights, offline, with multi-head (mha), grouped-query (gqa) and multi-query (mqa)
attention where the family has them.

*Verified* means: the self-check passed, and on {pos} positions the sparse rows and their arg max
shifts under drawn noise are, head by head, those of the Hugging Face model itself in float64, in
which the operands of the dot product are multiplied and nothing of this library runs. *Scores
from*: `a hook` of TransformerLens, or `the softmax` that the model takes, where no hook shows its
scores, `the product` where none shows q and k either: these are read, and noised by
`NormNoise.applied`, where the model multiplies them. *Noise at the projection*: `removed` by a norm
over each head, `mixed` by a norm over all heads, else it arrives unchanged. Models of text and
images run on text here; the attention of their other towers is no layer of a probe, and where it
has hooks `attention_sites` names it as left out. The same is asked of your own model each time it
is probed.

Of {adapters} adapters {tried} could be built here; {attention} of these have attention, and
{verified} of those are verified ({limited} with a limit)."""


def adapters(rows: list[Row]) -> dict[str, Any]:
    """Numbers of adapters: an adapter is verified if every row of it is."""
    from importlib.metadata import version

    by_adapter: dict[type, list[Row]] = {}
    for row in rows:
        by_adapter.setdefault(builders.adapter_of(row.name), []).append(row)
    worst = {
        a: max(mine, key=lambda row: ORDER.index(row.verdict)) for a, mine in by_adapter.items()
    }
    verdicts = Counter(row.verdict for row in worst.values())
    without = sum("no attention layer" in row.why for row in worst.values())
    return {
        "version": version("transformer-lens"),
        "pos": POS,
        "adapters": len(by_adapter),
        "tried": len(by_adapter) - verdicts["not tried"],
        "attention": len(by_adapter) - verdicts["not tried"] - without,
        "verified": verdicts["verified"] + verdicts["limited"],
        "limited": verdicts["limited"],
    }


def _line(same: list[Row], names: tuple[str, ...]) -> str:
    row = same[0]
    others = [name for name in names if name != row.name]
    title = f"`{row.name}`" + (f" ({', '.join(others)})" if others else "")
    heads = ", ".join(r.heads for r in same)
    if row.verdict in ("refused", "not tried"):
        return f"| {title} | {heads} | {row.why.replace('|', '/')} |"
    compared = ", ".join(f"{r.rows}/{r.moved}" for r in same)
    cells = [title, heads, row.layers, row.scores, row.noise, compared, row.why]
    return f"| {' | '.join(cells)} |"


def _judged(kind: tuple[str, str]) -> Row:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return judge(*kind)
        except Disagreement as error:
            return Row(*kind, "WRONG", str(error))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.matrix")
    parser.add_argument("--write", action="store_true", help="write docs/support.{json,md}")
    parser.add_argument("names", nargs="*", help="only these (parts of names)")
    options = parser.parse_args()
    rows, started = [], time.perf_counter()
    chosen = [
        kind
        for kind in kinds()
        if not options.names or any(part.lower() in kind[0].lower() for part in options.names)
    ]
    apart = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        mp_context=apart, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for row in tqdm(pool.map(_judged, chosen), total=len(chosen), leave=False):
            rows.append(row)
            if row.verdict in ("WRONG", "refused") or options.names:
                tqdm.write(
                    f"{row.name} {row.heads}: {row.verdict} {row.why} {row.rows} {row.moved}"
                )
    print(Counter(row.verdict for row in rows), f"{time.perf_counter() - started:.0f} s")
    if options.write:
        assert all(row.verdict != "WRONG" for row in rows)
        (DOCS / "support.json").write_text(as_json(rows), encoding="utf-8")
        (DOCS / "support.md").write_text(as_markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
