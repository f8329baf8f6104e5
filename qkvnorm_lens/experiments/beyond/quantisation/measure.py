"""Which heads a quantised key/value cache collapses: norm error, its prediction, and what happens.

The practical use of critical noise: a cache's error on the norms of keys against the arg max shifts
that the cache really makes. Beyond Menary et al. 2024.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.beyond.quantisation.schemes import GROUP, SCHEMES
from qkvnorm_lens.experiments.core import (
    COLOURS,
    Amount,
    Claim,
    Experiment,
    Part,
    Size,
    Subject,
    by_group,
    group_mean,
    markdown,
    panels,
    reading,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hooks import CollapseReport
    from qkvnorm_lens.experiments.beyond.quantisation.errors import CacheErrors

AMOUNT: Final[dict[Size, Amount]] = {
    "smoke": Amount(sums=48, windows=1, length=64),
    "quick": Amount(sums=400, windows=4),
    "full": Amount(sums=2_000, windows=8),
}
BATCH: Final = {"addition": 64, "language": 2}
KINDS: Final = ("content", "sink")
TOLERATED: Final = 0.01
LEAST_ROWS: Final = 20
_KEEP: Final = 1 << 22  # competitors: rows must be complete up to the largest norm error
_NAMED = 3  # heads named in a cell


def measure(subject: Subject, amount: Amount) -> pd.DataFrame:
    """Errors, predicted and real shifts by head and scheme; the output's loss with each cache."""
    import hooks
    from hooks.model import encode
    from hooks.sites import observe
    from qkvnorm_lens.experiments.beyond.quantisation.errors import (
        CacheErrors,
        largest_magnitudes,
        output_effect,
    )

    model, read = subject.load(), reading(subject, amount)
    layers, prompts = hooks.attention_sites(model).layers, encode(model, read.ids)
    batch = BATCH[subject.kind]
    widths: set[int] = set()
    largest = largest_magnitudes(model, layers, prompts, batch, widths)
    formats = [scheme for scheme in SCHEMES if scheme.fits(widths)]
    errors = CacheErrors(layers, formats, largest)
    observe(model, layers, prompts, errors.add, vectors=("q", "k", "v"), batch_size=batch)
    probe = hooks.collapse_probe(
        model,
        read.ids,
        sigmas=(0.1,),
        on="k",
        draws=0,
        keep=_KEEP,
        batch_size=batch,
        progress=False,
    )
    rows = [
        {
            "what": "head",
            "scheme": scheme.name,
            "layer": sites.layer,
            "head": head,
            "label": f"{sites.label}H{head}",
            "kind": kind,
            **of_head(errors, probe, scheme.name, i, head, sites.kv_head_of[head], k),
        }
        for scheme in formats
        for i, sites in enumerate(layers)
        for head in range(sites.n_heads)
        for k, kind in enumerate(KINDS)
    ]
    output = output_effect(model, layers, prompts, read.targets, formats, largest, batch)
    frames = [pd.DataFrame(rows), pd.DataFrame(output).assign(what="output")]
    table = pd.concat(frames, ignore_index=True).map(_short).assign(**subject.columns)
    first = [*subject.columns, "what", "scheme"]
    return table[[*first, *(c for c in table.columns if c not in first)]]


def _short(value: Any) -> Any:
    """Six digits: a language model has thousands of rows."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def of_head(
    errors: CacheErrors,
    probe: CollapseReport,
    scheme: str,
    index: int,
    head: int,
    kv_head: int,
    kind: int,
) -> dict[str, Any]:
    """Columns of one head under one scheme, for one kind of rows.

    ``rows``: sparse rows; ``able``: those whose critical half-width lies below the head's largest
    norm error of a key, the only ones that any norm error of that size can move; ``predicted``:
    expected number of moved rows under independent uniform noise on the keys' norms whose RMS is
    the head's RMS norm error, exact; ``moved_norm``, ``moved_direction``, ``moved``: rows moved by
    the lengths of the quantised keys alone, by their directions alone, by both; ``strict``: by
    both, onto a new maximum that is sparse again. Then the errors of keys and values.
    """
    from qkvnorm_lens.experiments.beyond.quantisation.errors import EFFECTS

    measured = {
        name: value
        for role in ("k", "v")
        for name, value in errors.errors[scheme, index, role].measures(role, kv_head).items()
    }
    sigma, most = measured["norm_k"], measured["norm_largest_k"]
    table = probe.table
    of_kind = probe.is_first(table.prompt, table.key) == (kind == 1)
    mine = np.flatnonzero((table.layer == index) & (table.head == head) & of_kind)
    n = int(errors.rows[index][head, kind])
    able: float = int((table.half_width[mine] < most).sum()) if most < 1 else n
    predicted = math.nan
    if math.sqrt(3) * sigma < 1:
        predicted = float(probe.exact_rate(sigma, mine).sum()) if sigma > 0 else 0.0
    if min(max(most, math.sqrt(3) * sigma), 1) > float(table.cutoff):
        able = predicted = math.nan  # the table had no room for all that this error reaches
    moved = {name: int(errors.moved[scheme, index, name][head, kind]) for name in EFFECTS}
    return {"rows": n, "able": able, "predicted": predicted, **moved, **measured}


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model."""
    amount = AMOUNT[size]
    return [Part(s.name, partial(measure, s, amount), s, amount.settings(s)) for s in subjects]


# -- numbers ----------------------------------------------------------------------------------

_COUNTS: Final = ["rows", "able", "predicted", "moved_norm", "moved_direction", "moved", "strict"]
_SHARES: Final = _COUNTS[1:]
_ERRORS: Final = ["norm_k", "norm_v", "direction_k", "direction_v"]
_HEAD: Final = ["model", "group", "placement", "seed", "scheme", "layer", "head", "label"]


def heads(table: pd.DataFrame, *, content: bool = False) -> pd.DataFrame:
    """One row per model, scheme and head: counts over kinds of rows, and shares ``..._share``."""
    rows = table[table["what"] == "head"]
    rows = rows[rows["kind"] == "content"] if content else rows
    rows = rows.assign(placement=rows["placement"].astype(object).fillna(""))
    errors = rows.groupby(_HEAD, sort=False)[_ERRORS].first()
    out = _added_up(rows, _HEAD).join(errors).reset_index()
    return _with_shares(out)


def models(table: pd.DataFrame, *, content: bool = False) -> pd.DataFrame:
    """The same per model and scheme, all heads added up; errors are means (RMS) over heads."""
    each = heads(table, content=content)
    each["norm_k"], each["norm_v"] = each["norm_k"] ** 2, each["norm_v"] ** 2
    errors = each.groupby(_HEAD[:5], sort=False)[_ERRORS].mean()
    out = _added_up(each, _HEAD[:5]).join(errors).reset_index()
    out["norm_k"], out["norm_v"] = np.sqrt(out["norm_k"]), np.sqrt(out["norm_v"])
    output = table[table["what"] == "output"]
    for quantised in ("kv", "k", "v"):
        own = output[output["quantised"] == quantised].set_index(["model", "scheme"])
        found = pd.DataFrame({"kl": own["kl"], "loss_change": own["loss"] - own["loss_clean"]})
        out = out.join(found.add_suffix(f"_{quantised}"), on=["model", "scheme"])
    return _with_shares(out)


def _added_up(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Sums of the counts; NaN where one of them is, for a part is not the whole."""
    sums = rows.groupby(by, sort=False)[_COUNTS].sum()
    unknown = rows[_COUNTS].isna().groupby([rows[name] for name in by], sort=False).any()
    return sums.mask(unknown)


def _with_shares(frame: pd.DataFrame) -> pd.DataFrame:
    for name in _SHARES:
        frame[f"{name}_share"] = frame[name] / frame["rows"].where(frame["rows"] > 0)
    return frame


def schemes(table: pd.DataFrame) -> list[str]:
    """In the table's order."""
    return list(dict.fromkeys(table["scheme"]))


# -- figure -----------------------------------------------------------------------------------


def figure(table: pd.DataFrame) -> Figure:
    """A panel per scheme: heads by the share predicted from their norm error, and really moved."""
    each = heads(table)
    each = each[each["rows"] >= LEAST_ROWS]
    named = schemes(table)
    columns = 3
    fig, axes = panels(-(-len(named) // columns), columns, width=3.4, height=3.1)
    for i, (ax, scheme) in enumerate(zip(axes, named, strict=False)):
        _draw(ax, each[each["scheme"] == scheme])
        ax.set_title(scheme, fontsize=10)
        if i % columns == 0:
            ax.set_ylabel("sparse rows moved (%)")
        if i >= len(named) - columns:
            ax.set_xlabel("predicted from the norm error (%)")
    for ax in axes[len(named) :]:
        ax.set_axis_off()
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return fig


def _draw(ax: Axes, each: pd.DataFrame) -> None:
    """Points: the whole error; rings: the norm error alone, which lies near the diagonal."""
    from qkvnorm_lens.plots.charts import grid, plain

    known = {"pre": "Pre-Norm", "qkv": "QKV-Norm", "none": "No-Norm", "": "language models"}
    for placement, name in known.items():
        mine = each[each["placement"] == placement]
        if not len(mine):
            continue
        x, colour = 100 * mine["predicted_share"], COLOURS[placement]
        ax.plot(
            x,
            100 * mine["moved_norm_share"],
            "o",
            markerfacecolor="none",
            color=colour,
            alpha=0.5,
            markersize=4,
            markeredgewidth=0.6,
            label=f"{name}, norm error alone",
        )
        ax.plot(
            x,
            100 * mine["moved_share"],
            ".",
            color=colour,
            alpha=0.7,
            markersize=5,
            label=f"{name}, whole error",
        )
    ax.plot([0, 100], [0, 100], color="#777777", linewidth=0.8, linestyle=":", zorder=0)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(plain)
    ax.set_xscale("symlog", linthresh=0.1, linscale=0.5)
    ax.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([0, 0.1, 1, 10, 100])
        axis.set_major_formatter(plain)
    ax.set_xlim(-0.03, 100)
    ax.set_ylim(-0.03, 100)
    ax.axhline(100 * TOLERATED, color="#777777", linewidth=0.6, zorder=0)
    grid(ax)


# -- words ------------------------------------------------------------------------------------


def text(table: pd.DataFrame) -> str:
    """Errors and shifts by group and scheme, which heads stand which format, and what tells it."""
    lines = [_errors_table(models(table)), "", _legend(), "", _heads_table(table), ""]
    lines += [
        f"Heads of which at most {100 * TOLERATED:g}% of the sparse rows move, of those with "
        f"{LEAST_ROWS} sparse rows or more, sinks counted; then the worst of the others, with "
        "the share that moves.",
        "",
        *_left_out(table),
        *_findings(table),
    ]
    return "\n".join(lines)


def _legend() -> str:
    formats = "; ".join(f"{s.name}: {s.what}" for s in SCHEMES)
    return (
        f"Formats: {formats}. A group of tokens is never longer than a prompt: sums of some 20 "
        "tokens are one; heads that groups of channels do not divide are refused, as the engines "
        "refuse them. Columns: RMS over tokens "
        f"and heads of the relative error of |k| and |v|; 1 - cos of the angle between k and the "
        "quantised k; share of sparse rows that the norm error could move at all "
        "(critical half-width below the head's largest error), that "
        "independent noise of that RMS is expected to move (exact), that the norms of the "
        "quantised keys alone, their directions alone, and the quantised keys really move (each "
        "layer on clean inputs; strict: onto a new maximum that is sparse again). All these in "
        "percent, with 95% intervals over seeds. Then the change of the loss and KL(clean || "
        "quantised) with all layers' keys and values quantised at once, and KL with the keys alone "
        "and the values alone, in nats per scored token."
    )


def _errors_table(each: pd.DataFrame) -> str:
    head = [
        "models", "format", "|k| error", "|v| error", "1 - cos of k", "could move", "predicted",
        "norm alone", "direction alone", "moved", "strict", "loss", "KL", "KL of k", "KL of v",
    ]  # fmt: skip
    shares = ("able", "predicted", "moved_norm", "moved_direction", "moved", "strict")
    rows = []
    for group, mine in by_group(each):
        for scheme in schemes(mine):
            own = mine[mine["scheme"] == scheme]
            cells = [group_mean(own, name).percent(2) for name in ("norm_k", "norm_v")]
            cells.append(f"{group_mean(own, 'direction_k').value:.1e}")
            cells += [_percent(own, f"{name}_share") for name in shares]
            cells += [f"{group_mean(own, 'loss_change_kv').value:+.4f}"]
            cells += [f"{group_mean(own, f'kl_{which}').value:.2g}" for which in ("kv", "k", "v")]
            rows.append([group, scheme, *cells])
    return markdown(head, rows)


def _percent(rows: pd.DataFrame, column: str) -> str:
    found = group_mean(rows, column)
    return "no rows" if math.isnan(found.value) else found.percent(2)


def _heads_table(table: pd.DataFrame) -> str:
    each = heads(table)
    rows = []
    for name, mine in each.groupby("model", sort=False):
        cells = []
        for scheme in schemes(each):
            own = mine[mine["scheme"] == scheme]
            fits = len(own) > 0
            cells.append(_stand(own[own["rows"] >= LEAST_ROWS]) if fits else "no such format")
        rows.append([str(name), *cells])
    return markdown(["model", *schemes(each)], rows)


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


def _stand(own: pd.DataFrame) -> str:
    """``30 of 36; not L2H1 (4.1%)``."""
    if not len(own):
        return "no head with enough sparse rows"
    bad = own[own["moved_share"] > TOLERATED].sort_values("moved_share", ascending=False)
    text = f"{len(own) - len(bad)} of {len(own)}"
    if not len(bad):
        return text
    worst = bad.head(_NAMED)
    named = [
        f"{name} ({100 * share:.2g}%)"
        for name, share in zip(worst["label"], worst["moved_share"], strict=True)
    ]
    more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return f"{text}; not {', '.join(named)}{more}"


def _findings(table: pd.DataFrame) -> list[str]:
    """Does the norm error tell which rows move, and do these tell what the output loses?"""
    each, content = heads(table), heads(table, content=True)
    by = {g: float(m["moved"].sum()) for g, m in by_group(each)}
    moving = [f"{g} {n:,.0f}" for g, n in by.items() if n]
    still = [g for g, n in by.items() if not n]
    lines = [
        f"Moved rows, over all formats: {', '.join(moving) or 'none'}"
        f"{'; none in ' + ', '.join(still) if still else ''}. What follows pools the models, and "
        "so speaks of those that have moved rows.",
        "",
    ]
    for scheme in schemes(each):
        own, apart = (frame[frame["scheme"] == scheme] for frame in (each, content))
        rows, total = own["rows"].sum(), own[_SHARES].sum()
        if not rows:
            continue
        without = _part(apart["moved"].sum(), apart["rows"].sum())
        lines.append(
            f"- {scheme}: of {rows:,.0f} sparse rows {_part(total['moved'], rows)} move (sinks "
            f"left out: {without}); the norms alone move {_part(total['moved_norm'], rows)} "
            f"(predicted {_part(total['predicted'], rows)}), the directions alone "
            f"{_part(total['moved_direction'], rows)}.{_named_by_norm(own)}"
        )
    return [*lines, "", *_verdict(each), *_beyond_rows(models(table)), "Nothing was published."]


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
    whole = each[_SHARES].sum()
    if not whole["moved"]:
        return ["No format moves a sparse row."]
    by_norm, by_direction = (
        whole[name] / whole["moved"] for name in ("moved_norm", "moved_direction")
    )
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


def claims(table: pd.DataFrame) -> list[Claim]:
    """Nothing was published; what was found by format, pooled over each group."""
    each = models(table)
    out = []
    for scheme in schemes(each):
        own = each[each["scheme"] == scheme]
        cells = []
        for group, mine in by_group(own):
            if mine["rows"].sum():
                cells.append(f"{group} {_percent(mine, 'moved_share')}")
        same: Any = "-"
        out.append(
            Claim(
                f"sparse rows that a cache in {scheme} moves, in percent",
                "nothing",
                "; ".join(cells) if cells else "no sparse rows",
                same,
                "keys are quantised as they enter the dot product, each layer on clean inputs",
            )
        )
    return out


EXPERIMENT: Final = Experiment(
    name="quantisation",
    title="Heads that a quantised key/value cache collapses",
    source="beyond Menary et al. 2024",
    models="any",
    minutes={"smoke": 0.2, "quick": 0.8, "full": 5.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
