"""What is measured: a table for each part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.quantisation.schemes import SCHEMES
from qkvnorm_lens.experiments.core import Amount, Part, Size, Subject, reading, reading_parts

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from hooks import CollapseReport
    from qkvnorm_lens.experiments.beyond.quantisation.errors import CacheErrors

AMOUNT: Final = core.by_size(Amount(48, 1, 64), Amount(400, 4), Amount(2_000, 8))
BATCH: Final = {"addition": 64, "language": 2}
KINDS: Final = ("content", "sink")
TOLERATED: Final = 0.01
LEAST_ROWS: Final = 20
_KEEP: Final = 1 << 22  # competitors: rows must be complete up to the largest norm error


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
    options: dict[str, Any] = {"batch_size": batch, "progress": False}
    probe = hooks.collapse_probe(
        model, read.ids, sigmas=(0.1,), on="k", draws=0, keep=_KEEP, **options
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
    table = pd.concat(frames, ignore_index=True).map(_short)
    return core.about(subject, table, "what", "scheme")


def _short(value: Any) -> Any:
    """Six digits: a language model has thousands of rows."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def cache_effects(
    model: TransformerBridge,
    ids: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    batch_size: int,
) -> list[dict[str, Any]]:
    """What each format does to a whole model.

    ``rows``: sparse rows; ``moved``: those that the quantised keys move; ``kl``, ``loss_change``:
    of the output, with all layers' keys and values quantised, in nats per scored token.

    Args:
        model: the model.
        ids: token ids of each prompt.
        targets: the token that should follow each.
        batch_size: prompts at once.
    """
    import hooks
    from hooks.model import encode
    from hooks.sites import observe
    from qkvnorm_lens.experiments.beyond.quantisation.errors import (
        CacheErrors,
        largest_magnitudes,
        output_effect,
    )

    layers, prompts = hooks.attention_sites(model).layers, encode(model, ids)
    widths: set[int] = set()
    largest = largest_magnitudes(model, layers, prompts, batch_size, widths)
    formats = [scheme for scheme in SCHEMES if scheme.fits(widths)]
    errors = CacheErrors(layers, formats, largest)
    observe(model, layers, prompts, errors.add, vectors=("q", "k", "v"), batch_size=batch_size)
    output = output_effect(
        model, layers, prompts, targets, formats, largest, batch_size, apart=False
    )
    moved = {
        scheme.name: sum(
            int(errors.moved[scheme.name, i, "moved"].sum()) for i in range(len(layers))
        )
        for scheme in formats
    }
    return [
        {
            "scheme": each["scheme"],
            "rows": sum(int(rows.sum()) for rows in errors.rows),
            "moved": moved[each["scheme"]],
            "kl": each["kl"],
            "loss_change": each["loss"] - each["loss_clean"],
        }
        for each in output
    ]


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
    return reading_parts(subjects, AMOUNT[size], measure)


# -- numbers ----------------------------------------------------------------------------------

_COUNTS: Final = ["rows", "able", "predicted", "moved_norm", "moved_direction", "moved", "strict"]
SHARES: Final = _COUNTS[1:]
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
    for name in SHARES:
        frame[f"{name}_share"] = frame[name] / frame["rows"].where(frame["rows"] > 0)
    return frame


def schemes(table: pd.DataFrame) -> list[str]:
    """In the table's order."""
    return list(dict.fromkeys(table["scheme"]))
