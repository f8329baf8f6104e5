"""What the experiment found, in words and as claims."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.quantisation.measure import (
    LEAST_ROWS,
    SHARES,
    TOLERATED,
    heads,
    models,
    schemes,
)
from qkvnorm_lens.experiments.beyond.quantisation.schemes import GROUP, SCHEMES

_NAMED = 3  # heads named in a cell


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """Errors and shifts by group and scheme, which heads stand which format, and what tells it."""
    yield f"{_errors_table(models(table))}\n\n{_legend()}\n\n{_heads_table(table)}"
    yield (
        f"\nHeads of which at most {100 * TOLERATED:g}% of the sparse rows move, of those with "
        f"{LEAST_ROWS} sparse rows or more, sinks counted; then the worst of the others, with "
        "the share that moves.\n"
    )
    yield from _left_out(table)
    yield from _findings(table)


def _legend() -> str:
    formats = "; ".join(f"{s.name}: {s.what}" for s in SCHEMES)
    return (
        f"Formats: {formats}. A group of tokens is never longer than a prompt: sums of some 20 "
        "tokens are one; heads that groups of channels do not divide are refused, as the engines "
        "refuse them. Columns: RMS over tokens and heads of the relative error of |k| and |v|; 1 - "
        "cos of the angle between k and the quantised k; share of sparse rows that the norm error "
        "could move at all (critical half-width below the head's largest error), that independent "
        "noise of that RMS is expected to move (exact), that the norms of the quantised keys "
        "alone, their directions alone, and the quantised keys really move (each layer on clean "
        "inputs; strict: onto a new maximum that is sparse again). All these in percent, with 95% "
        "intervals over seeds. Then the change of the loss and KL(clean || quantised) with all "
        "layers' keys and values quantised at once, and KL with the keys alone and the values "
        "alone, in nats per scored token."
    )


def _errors_table(each: pd.DataFrame) -> str:
    head = [
        "models", "format", "|k| error", "|v| error", "1 - cos of k", "could move", "predicted",
        "norm alone", "direction alone", "moved", "strict", "loss", "KL", "KL of k", "KL of v",
    ]  # fmt: skip
    shares = ("able", "predicted", "moved_norm", "moved_direction", "moved", "strict")
    rows = []
    for group, mine in core.by_group(each):
        for scheme in schemes(mine):
            own = mine[mine["scheme"] == scheme]
            of = partial(core.group_mean, own)
            cells = [of(name).percent(2) for name in ("norm_k", "norm_v")]
            cells.append(f"{of('direction_k').value:.1e}")
            cells += [_percent(own, f"{name}_share") for name in shares]
            cells.append(f"{of('loss_change_kv').value:+.4f}")
            cells += [f"{of(f'kl_{which}').value:.2g}" for which in ("kv", "k", "v")]
            rows.append([group, scheme, *cells])
    return core.markdown(head, rows)


def _percent(rows: pd.DataFrame, column: str) -> str:
    found = core.group_share(rows, column)
    return "no rows" if math.isnan(found.value) else found.percent(2)


def _heads_table(table: pd.DataFrame) -> str:
    each = heads(table)
    rows = []
    for name, mine in each.groupby("model", sort=False):
        cells = []
        for scheme in schemes(each):
            own = mine[mine["scheme"] == scheme]
            fits = len(own) > 0
            cells.append(which_stand(own[own["rows"] >= LEAST_ROWS]) if fits else "no such format")
        rows.append([str(name), *cells])
    return core.markdown(["model", *schemes(each)], rows)


def _left_out(table: pd.DataFrame) -> list[str]:
    """Formats that do not exist for a model's heads, by model."""
    without: dict[str, list[str]] = {}
    for name, mine in table.groupby("model", sort=False):
        lacking = [s.name for s in SCHEMES if s.channels > 1 and s.name not in schemes(mine)]
        if lacking:
            without.setdefault(" and ".join(lacking), []).append(str(name))
    return [
        f"Left out: {formats} of {', '.join(names)}, whose heads are no multiple of {GROUP} "
        "channels: a format in groups of so many does not exist for them.\n"
        for formats, names in without.items()
    ]


def which_stand(own: pd.DataFrame) -> str:
    """``30 of 36; not L2H1 (4.1%)``."""
    if own.empty:
        return "no head with enough sparse rows"
    bad = own[own["moved_share"] > TOLERATED].sort_values("moved_share", ascending=False)
    text = f"{len(own) - len(bad)} of {len(own)}"
    if not len(bad):
        return text
    worst = bad.head(_NAMED)
    pairs = zip(worst["label"], worst["moved_share"], strict=True)
    named = [f"{name} ({100 * share:.2g}%)" for name, share in pairs]
    more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return f"{text}; not {', '.join(named)}{more}"


def _findings(table: pd.DataFrame) -> Iterator[str]:
    """Does the norm error tell which rows move, and do these tell what the output loses?"""
    each, content = heads(table), heads(table, content=True)
    by = {g: float(m["moved"].sum()) for g, m in core.by_group(each)}
    moving = [f"{g} {n:,.0f}" for g, n in by.items() if n]
    still = [g for g, n in by.items() if not n]
    yield (
        f"Moved rows, over all formats: {', '.join(moving) or 'none'}"
        f"{'; none in ' + ', '.join(still) if still else ''}. What follows pools the models, and "
        "so speaks of those that have moved rows.\n"
    )
    for scheme in schemes(each):
        own, apart = (frame[frame["scheme"] == scheme] for frame in (each, content))
        rows, total = own["rows"].sum(), own[SHARES].sum()
        if not rows:
            continue
        without = _part(apart["moved"].sum(), apart["rows"].sum())
        yield (
            f"- {scheme}: of {rows:,.0f} sparse rows {_part(total['moved'], rows)} move (sinks "
            f"left out: {without}); the norms alone move {_part(total['moved_norm'], rows)} "
            f"(predicted {_part(total['predicted'], rows)}), the directions alone "
            f"{_part(total['moved_direction'], rows)}.{_named_by_norm(own)}"
        )
    yield ""
    yield from _verdict(each)
    yield from _beyond_rows(models(table))
    yield "Nothing was published."


def _part(count: float, of: float) -> str:
    """A share in percent, however small."""
    if not of:
        return "no rows"
    share = 100 * count / of
    return f"{share:.2g}%" if share >= 0.01 or not share else "less than 0.01%"


def _named_by_norm(own: pd.DataFrame) -> str:
    """How many of the heads that a format moves does the norm error name?"""
    known = own[own["rows"] >= LEAST_ROWS]
    bad = known[known["moved_share"] > TOLERATED]
    if not len(bad):
        return ""
    named = [int((bad[f"{name}_share"] > TOLERATED).sum()) for name in ("predicted", "able")]
    return (
        f" {len(bad)} of {len(known)} heads lose more than {100 * TOLERATED:g}%: the norm error "
        f"predicts it for {named[0]} of them and allows it for {named[1]}."
    )


def _verdict(each: pd.DataFrame) -> list[str]:
    whole = each[SHARES].sum()
    if not whole["moved"]:
        return ["No format moves a sparse row."]
    by_norm, by_direction = whole[["moved_norm", "moved_direction"]] / whole["moved"]
    says = (
        "the norm error alone says too little about a quantised cache: most rows move because "
        "keys turn"
        if by_direction > 2 * by_norm
        else "the norm error alone explains much of what moves"
    )
    return [
        f"Over all formats the norms alone move {100 * by_norm:.0f}% as many rows as the whole "
        f"error, the directions alone {100 * by_direction:.0f}%: {says}."
    ]


def _beyond_rows(each: pd.DataFrame) -> list[str]:
    """Outputs that change although hardly a sparse row does."""
    still = each[(each["moved_share"] <= 0.1 * TOLERATED) & (each["kl_kv"] > 0.1)]
    if not len(still):
        return []
    worst = still.nlargest(1, "kl_kv").iloc[0]
    return [
        f"Sparse rows that stay do not make a harmless format: in {len(still)} of {len(each)} "
        "pairs of model and format at most 0.1% of the sparse rows move and the output still "
        f"changes by more than 0.1 nats ({worst['model']} under {worst['scheme']}: KL "
        f"{worst['kl_kv']:.2g}; keys alone {worst['kl_k']:.2g}, values alone "
        f"{worst['kl_v']:.2g}). What the other rows and the values lose, no arg max shows."
    ]


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """Nothing was published; what was found by format, pooled over each group."""
    each = models(table)
    for scheme in schemes(each):
        own = each[each["scheme"] == scheme]
        cells = []
        for group, mine in core.by_group(own):
            if mine["rows"].sum():
                cells.append(f"{group} {_percent(mine, 'moved_share')}")
        yield core.Claim(
            f"sparse rows that a cache in {scheme} moves, in percent",
            "nothing",
            "; ".join(cells) if cells else "no sparse rows",
            "-",
            "keys are quantised as they enter the dot product, each layer on clean inputs",
        )
