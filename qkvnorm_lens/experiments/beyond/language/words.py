"""What the experiment found, in words and as claims."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.language.measure import GRAMS
from qkvnorm_lens.experiments.core import Mean, traits

_CACHES: Final = ("int8", "int4 KIVI", "int4")


def of(mine: pd.DataFrame, quantity: str, variant: str = core.PLAIN, at: float = 0.0) -> Mean:
    """A group's mean over its seeds; numbers that are none, or infinite, left out."""
    values = traits.whole(mine, quantity, variant, at)
    over = core.share if quantity in traits.SHARES else core.mean
    return over(values[np.isfinite(values)].tolist())


def gap(
    table: pd.DataFrame, a: str, b: str, quantity: str, variant: str = core.PLAIN, at: float = 0.0
) -> Mean:
    """A placement's number minus another's, by seed: both read the same windows in one order."""
    seeds = []
    for placement in (a, b):
        rows = core.pick(
            table, quantity=quantity, variant=variant, at=at, layer=traits.WHOLE,
            placement=placement,
        )  # fmt: skip
        seeds.append(rows.set_index("seed")["value"].astype(float))
    both = pd.concat(seeds, axis=1, join="inner").dropna()
    found = core.mean((both.iloc[:, 0] - both.iloc[:, 1]).tolist())
    return found.cut(-1.0, 1.0) if quantity in traits.SHARES else found


_PERCENT: Final = {
    "sparse rows": ("sparse share", core.PLAIN, 0.0),
    "sinks of these": ("sink share", core.PLAIN, 0.0),
    "attention to the first": ("first token's attention", core.PLAIN, 0.0),
    "loose": ("loose", core.PLAIN, traits.SIGMA),
    "content": ("loose", "content", traits.SIGMA),
    "centred": ("loose", "centred gauge", traits.SIGMA),
    "strict": ("strict", core.PLAIN, traits.SIGMA),
    "spread": ("spread", "stream", 0.0),
    "of k": ("spread", "k", 0.0),
    "of v": ("spread", "v", 0.0),
    "interference": ("interference", core.PLAIN, 0.0),
    "first spared": ("interference", "first token spared", 0.0),
}


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """One table, a row for each placement; the n-grams; what the columns say."""
    head = ["norm", "seeds", "loss", "bits", *_PERCENT, "σ at 1%", "content", "score level"]
    head += ["cosine at the end", "gap, last layer", *(f"KL {name}" for name in _CACHES)]
    rows = []
    for _, mine in core.by_group(table):
        cells = [core.PLACEMENT_NAMES[core.placement_of(mine)], str(mine["model"].nunique())]
        cells += [of(mine, "loss").words(".3f"), of(mine, "bits per character").words(".3f")]
        cells += [_percent(of(mine, *where)) for where in _PERCENT.values()]
        cells += [_sigma(mine, variant) for variant in (core.PLAIN, "content")]
        cells.append(of(mine, "score level").words(".2f"))
        cells.append(_end(mine, "mean_cosine").words(".3f"))
        cells.append(_end(mine, "gap").words(".3f"))
        cells += [of(mine, "cache: KL", name).words(".2g") for name in _CACHES]
        rows.append(cells)
    yield core.markdown(head, rows)
    grams = ", ".join(f"{name} {traits.whole(table, 'loss', name).iloc[0]:.3f}" for name in GRAMS)
    yield f"\n{_LEGEND}\n\nLoss of n-grams (Witten-Bell) on the same books: {grams}."
    yield from _moved(table)


_LEGEND: Final = (
    "Loss on held-out books in nats per token, and in bits per character; the other columns on "
    "windows of these. In percent: sparse rows (max >= 0.95) of all; sinks of these; all attention "
    "that the first token receives; collapse at σ = 10% (loose, content rows alone, in the centred "
    "gauge, strict); half-width of the band that holds 90% of the lengths, of the stream at the "
    "layers' inputs, of keys, of values; content rows that move when the norm before their layer "
    "uses one scale for all tokens, with the first token frozen too and spared (-: no such norm). "
    "Then the noise at which 1% collapse, in percent; the mean q.k part of an attended score; mean "
    "|cosine| of tokens behind the last block; s1 - s2 of the last layer's attention; KL of the "
    "output with all keys and values quantised, in nats per token. 95% intervals over seeds."
)


def _percent(found: Mean) -> str:
    return "-" if math.isnan(found.value) else found.percent()


def _end(mine: pd.DataFrame, quantity: str) -> Mean:
    """A quantity of the last layer, at its end."""
    rows = core.pick(mine, quantity=quantity, variant=core.PLAIN)
    last = rows.sort_values(["layer", "at"]).groupby("model", sort=False).tail(1)
    return core.mean(last["value"].astype(float).tolist())


def _sigma(mine: pd.DataFrame, variant: str) -> str:
    values = traits.whole(mine, "sigma at 1%", variant).to_numpy()
    never = int(np.isinf(values).sum())
    known = of(mine, "sigma at 1%", variant)
    if not known.n:
        return "never" if never else "-"
    return known.percent() + (f" (never in {never})" if never else "")


def _moved(table: pd.DataFrame) -> Iterator[str]:
    """Sparse rows that formats move, by placement."""
    names = [v for v in dict.fromkeys(table["variant"]) if v in _CACHES]
    for name in names:
        said = ", ".join(
            f"{core.PLACEMENT_NAMES[core.placement_of(mine)]} "
            f"{_percent(of(mine, 'cache: rows moved', name))}"
            for _, mine in core.by_group(table)
        )
        yield f"Sparse rows that a cache in {name} moves, in percent: {said}."


def _points(found: Mean, digits: int = 1) -> str:
    """A difference with its sign, in percentage points."""
    return f"{found.percent(digits, '+')} points"


def _each(table: pd.DataFrame, quantity: str, variant: str = core.PLAIN, at: float = 0.0) -> str:
    """``No-Norm 1.2, Pre-Norm 3.4``, in percent."""
    return ", ".join(
        f"{core.PLACEMENT_NAMES[core.placement_of(mine)]} "
        f"{_percent(of(mine, quantity, variant, at))}"
        for _, mine in core.by_group(table)
    )


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """The paper's statements on sums, and what is known of QK-norm models, beside ours on text."""
    if not {"pre", "qkv"} <= set(table["placement"]):
        return
    yield from _of_the_paper(table)
    if "qk" in set(table["placement"]):
        yield from _of_qk_norm(table)
    yield from _unpublished(table)


def _of_the_paper(table: pd.DataFrame) -> Iterator[core.Claim]:
    loss = gap(table, "pre", "qkv", "loss")
    same = core.above(loss)
    yield core.Claim(
        "text: loss of Pre-Norm minus loss of QKV-Norm",
        "sums: 91.4 and 91.0% per token, one seed (Menary et al. 2024, Table 1); language models "
        "of 0.8 and 1.2B parameters: QKV-Norm is better (arXiv 2410.16682, 2503.04598)",
        f"{loss.words('+.3f', '.3f')} nats per token (by seed, {loss.seeds})",
        core.decide(same),
        "same data in the same order; our models have 0.5M parameters, and our QKV-Norm is the "
        "paper's, without a norm on the block's input, which the larger models keep",
        core.power(loss),
    )
    sparse = gap(table, "pre", "qkv", "sparse share")
    yield core.Claim(
        "text: Pre-Norm has more sparse rows than QKV-Norm",
        "sums: a sharp peak at 1 for Pre-Norm, none for QKV-Norm (sparsity)",
        f"{_points(sparse)}; in percent: {_each(table, 'sparse share')}",
        core.decide(core.above(sparse)),
        "here both have scores over sqrt(d_head) and gains without decay; the paper calibrates "
        "scores to a deviation of 0.1, which alone takes QKV-Norm's sparse rows (confound)",
        core.power(sparse),
    )
    pre = core.pick(table, placement="pre")
    band, wider = of(pre, "spread", "stream"), gap(table, "qkv", "pre", "spread", "stream")
    yield core.Claim(
        "text: spread of the lengths that Pre-Norm attention reads",
        "sums: 90% within ±20 to ±30% (Fig. 1)",
        f"±{band.percent()}%",
        core.decide(core.within(band, 0.2, 0.3)),
        "weighted with the attention that tokens receive, the first one left out",
        core.power(band, 0.2, 0.3),
    )
    yield core.Claim(
        "text: QKV-Norm's lengths spread wider than Pre-Norm's",
        "sums: wider (Fig. 1)",
        f"{_points(wider)}; in percent: {_each(table, 'spread', 'stream')}",
        core.decide(core.above(wider)),
        "where the norm follows the projection, no length of the stream counts in attention",
        core.power(wider),
    )
    sigma = of(pre, "sigma at 1%")
    yield core.Claim(
        "text: σ at which 1% of Pre-Norm's sparse rows collapse",
        "sums: 11%, 7.5%, 5.5% (Fig. 3)",
        f"{_sigma(pre, core.PLAIN)}% (content rows {_sigma(pre, 'content')}%)",
        core.decide(core.within(sigma, 0.055, 0.11)),
        "sinks are counted; the rate depends on the score level (gauge)",
        core.power(sigma, 0.055, 0.11),
    )


def _of_qk_norm(table: pd.DataFrame) -> Iterator[core.Claim]:
    level = gap(table, "none", "qk", "score level")
    yield core.Claim(
        "text: a norm on q and k keeps scores small",
        "without it attention logits grow until training fails (ViT-22B, arXiv 2302.05442)",
        f"score level of No-Norm minus QK-norm's {level.words('+.2f', '.2f')}; mean q.k part of "
        f"an attended score: {_levels(table)}",
        core.decide(core.above(level)),
        "learned gains may grow as logits do; of this size all placements train",
        core.power(level),
    )
    loss = gap(table, "none", "qk", "loss")
    yield core.Claim(
        "text: a norm on q and k costs no loss",
        "the same or better, more stable (arXiv 2302.05442; Qwen3, Gemma 3, OLMo 2 have one)",
        f"loss of No-Norm minus QK-norm's {loss.words('+.3f', '.3f')} nats per token",
        core.decide(core.above(loss)),
        "QK-norm here has no norm on the block's input, as No-Norm; the models named have both",
        core.power(loss),
    )


def _levels(table: pd.DataFrame) -> str:
    return ", ".join(
        f"{core.PLACEMENT_NAMES[core.placement_of(mine)]} {of(mine, 'score level').words('.2f')}"
        for _, mine in core.by_group(table)
    )


def _unpublished(table: pd.DataFrame) -> Iterator[core.Claim]:
    yield core.Claim(
        "text: sinks among the sparse rows, in percent",
        "most heads of language models attend to the first token (arXiv 2309.17453); not by "
        "placement",
        _each(table, "sink share"),
        "-",
        "every window begins with <s>, in training too",
    )
    rates = _each(table, "loose", at=traits.SIGMA)
    centred = _each(table, "loose", "centred gauge", traits.SIGMA)
    yield core.Claim(
        "text: collapse at σ = 10%, in percent",
        "not of language models",
        f"{rates}; centred gauge: {centred}",
        "-",
        "noise on the vectors that enter the dot product; rates compare in the centred gauge",
    )
    moved = _each(core.pick(table, placement="pre"), "interference")
    spared = _each(core.pick(table, placement="pre"), "interference", "first token spared")
    yield core.Claim(
        "text: content rows that depend on the common length, in percent",
        "not measured: interference is simulated, not observed (limitations)",
        f"{moved}; with the first token spared {spared}",
        "-",
        "placements without a norm on the block's input have no such length",
    )
    kl = ", ".join(
        f"{core.PLACEMENT_NAMES[core.placement_of(mine)]} "
        f"{of(mine, 'cache: KL', 'int4').words('.2g')}"
        for _, mine in core.by_group(table)
    )
    yield core.Claim(
        "text: KL of the output with keys and values in int4, in nats per token",
        "nothing by placement",
        kl,
        "-",
        "one scale per token and head; the figure has other formats",
    )
