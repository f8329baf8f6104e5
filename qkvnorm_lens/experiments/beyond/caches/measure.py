"""What is measured: layers by isolated KL and by what should predict it; recipes on other text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.caches.decoding import CACHES, decoding
from qkvnorm_lens.experiments.core import (
    Amount,
    Part,
    Reading,
    Size,
    Subject,
    reading as read,
    reading_parts,
)

if TYPE_CHECKING:
    from qkvnorm_lens.experiments.beyond.caches.passes import Watched

AMOUNT: Final = core.by_size(
    Amount(16, 2, 24), Amount(64, 4, 32), Amount(3072, 24, 128, books=True)
)
FORMATS: Final = ("fp8-e4m3", "q8_0", "q5_0", "q4_0", "quanto-int2")
MENU: Final = ("q8_0", "q5_0", "q4_0", "quanto-int2")
"""What recipes choose from: 8.5, 5.5, 4.5 and 2.5 bits."""
STEPS: Final = {"smoke": 4, "quick": 50, "full": 1_000}
BUDGETS: Final = (4.0, 4.5, 5.5)
PREDICTORS: Final = (
    "risk", "more", "score", "mse", "relative", "gradient", "entropy", "ends", "sigma",
)  # fmt: skip
GRADIENTS: Final = {"risk": 2, "more": 8}
"""Of the risk: as many as `hooks.cache_risk` has by default, and more."""
HALVES: Final = ("even", "odd")
"""Isolated KL of every other prompt: how well the reference ranks layers itself."""
NAMES: Final = {
    "risk": "cache risk", "more": "cache risk, 8 gradients",
    "score": "score error", "mse": "mean square error",
    "relative": "relative error", "gradient": "gradient norm", "entropy": "entropy",
    "ends": "first and last two layers", "sigma": "norm-only sigma",
    "isolated": "isolated KL", "uniform": "uniform", "random": "random",
}  # fmt: skip
CALIBRATED: Final = 3  # one in so many prompts is calibrated on; of the others some are held out
HELD: Final = 256
RANDOM: Final = 3


def measure(subject: Subject, amount: Amount) -> pd.DataFrame:
    """One row per layer and format, per recipe and held-out prompt, and one of seconds."""
    import hooks
    from hooks.model import encode
    from qkvnorm_lens.experiments.beyond.caches.passes import Watched

    model, given = subject.load(), read(subject, amount)
    known, held = _split(given)
    watched = Watched(model, list(hooks.attention_sites(model)), encode(model, known), FORMATS)
    how: Any = {"formats": watched.formats, "batch_size": len(known), "progress": False}
    found, seconds = {}, {}
    for name, samples in GRADIENTS.items():
        started = time.perf_counter()
        report = hooks.cache_risk(model, known, samples=samples, **how)
        seconds[name] = time.perf_counter() - started
        found[name] = report.to_frame("layer").set_index(["format", "layer"])
    layers = _layers(model, watched, found, known)
    times = pd.DataFrame([{"what": "seconds", **seconds, "isolated": watched.seconds}])
    choices = _choices(layers, watched)
    recipes = watched.judge(encode(model, held), choices)
    table = pd.concat([layers.assign(what="layer"), recipes.assign(what="recipe"), times])
    return core.about(subject, table.reset_index(drop=True).map(_short), "what")


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _split(given: Reading) -> tuple[list[list[int]], list[list[int]]]:
    """Every third prompt, at least one, and as many others as are held out."""
    known = [row for i, row in enumerate(given.ids) if i % CALIBRATED == 0]
    return known, [row for i, row in enumerate(given.ids) if i % CALIBRATED][:HELD] or known


def _layers(
    model: Any, watched: Watched, found: dict[str, Any], ids: Sequence[Any]
) -> pd.DataFrame:
    """Isolated KL of each layer, role and format, and every predictor of it."""
    import hooks

    isolated, errors = watched.isolated(), watched.errors()
    gradient, entropy = watched.gradients(), watched.entropy()
    tokens, several = watched.positions, len(watched.positions) > 1
    probe = hooks.collapse_probe(model, ids, on="k", strict=False, progress=False)
    sigma: Any = probe.sigma_at(0.01, by="layer")
    n, rows = len(watched.layers), []
    for i, sites in enumerate(watched.layers):
        noise = float(sigma[i])
        for name in watched.formats:
            of = found["risk"].loc[name, sites.layer]
            for role in ("k", "v"):
                mse, relative = errors[name, i, role]
                nats = isolated[name, i, role]
                rows.append(
                    {
                        "layer": sites.layer,
                        "format": name,
                        "role": role,
                        "isolated": nats.sum() / tokens.sum(),
                        **{
                            half: nats[at::2].sum() / tokens[at::2].sum() if several else np.nan
                            for at, half in enumerate(HALVES)
                        },
                        **{n: f.loc[name, sites.layer][f"risk_{role}"] for n, f in found.items()},
                        "score": of["score"] ** 2 if role == "k" else relative,
                        "mse": mse,
                        "relative": relative,
                        "gradient": gradient[i, role] * relative,
                        "entropy": relative / (0.01 + entropy[i]),
                        "ends": relative * (100.0 if min(i, n - 1 - i) < 2 else 1.0),
                        "sigma": relative / noise if 0 < noise < np.inf else 0.0,
                    }
                )
    return pd.DataFrame(rows)


def _choices(layers: pd.DataFrame, watched: Watched) -> dict[tuple[str, float], Any]:
    """By name and budget: a format for each layer's keys and values, the same knapsack for all.

    ``isolated`` and the predictors are the loss that is minimised; ``uniform`` is the largest
    format within the budget, for all; ``random`` has losses that say nothing.
    """
    menu = [name for name in MENU if name in watched.formats]
    rng = np.random.default_rng(0)
    losses = {name: layers[name].to_numpy(float) for name in ("isolated", *PREDICTORS)}
    relative = layers["relative"].to_numpy(float)
    of_pair = layers.groupby(["layer", "role"], sort=False).ngroup().to_numpy()
    for i in range(RANDOM):
        losses[f"random {i + 1}"] = relative * rng.exponential(size=of_pair.max() + 1)[of_pair]
    out = {}
    for budget in BUDGETS:
        for name, loss in losses.items():
            chosen = watched.choose(layers.assign(loss=loss), menu, budget)
            if chosen is not None:
                out[name, budget] = chosen
        fits = [form for form in menu if watched.bits(form) <= budget]
        if fits:
            best = max(fits, key=watched.bits)
            out["uniform", budget] = [(best, best)] * len(watched.layers)
    return out


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model, and for a language model one that decodes."""
    how = {"formats": list(FORMATS), "samples": list(GRADIENTS.values())}
    out = reading_parts(subjects, AMOUNT[size], measure, **how)
    for s in subjects:
        if s.kind == "language" and not s.placement:  # transformers decodes those it can load
            work = partial(decoding, s, STEPS[size])
            settings = {"steps": STEPS[size], "caches": list(CACHES)}
            out.append(Part(f"{s.name} decoding", work, s, settings))
    return out


# -- numbers ----------------------------------------------------------------------------------

_LAYER: Final = ["model", "group", "format", "layer"]


def by_layer(table: pd.DataFrame) -> pd.DataFrame:
    """One row per model, format and layer: keys and values added up."""
    rows = table[table["what"] == "layer"]
    columns = ["isolated", *HALVES, *PREDICTORS]
    return rows.groupby(_LAYER, sort=False)[columns].sum(min_count=1).reset_index()


def rank_correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's, of each predictor with isolated KL over a model's layers, by format.

    ``halves``: isolated KL of one half of the prompts with that of the other.
    """
    rows = []
    for (model, form), mine in by_layer(table).groupby(["model", "format"], sort=False):
        every = mine[["isolated", *HALVES, *PREDICTORS]].corr(method="spearman")
        found = every["isolated"][list(PREDICTORS)]
        ratio = mine["risk"].sum() / mine["isolated"].sum()
        halves = every.loc[HALVES]
        rows.append({"model": model, "format": form, **found, "ratio": ratio, "halves": halves})
    return pd.DataFrame(rows)


def recipes(table: pd.DataFrame) -> pd.DataFrame:
    """One row per model, choice, budget and held-out prompt; the random choices in one."""
    rows = table[table["what"] == "recipe"]
    one = rows["choice"].str.replace(r" \d+$", "", regex=True)
    keys = ["model", "group", "choice", "budget", "prompt"]
    some = rows.assign(choice=one).groupby(keys, sort=False)[["bits", "kl", "agreement"]]
    return some.mean().reset_index()


def against(table: pd.DataFrame, model: str, budget: float) -> pd.DataFrame:
    """Of each choice: KL and agreement, and by how much more it loses than the risk's recipe.

    Columns: choice, bits, kl, agreement; more_kl and less_agreement with the half-widths of 95%
    intervals over prompts, from paired differences.
    """
    rows = recipes(table)
    rows = rows[(rows["model"] == model) & (rows["budget"] == budget)]
    kl, agreement = (
        rows.pivot_table(index="prompt", columns="choice", values=v) for v in ("kl", "agreement")
    )
    out = []
    for name in dict.fromkeys(rows["choice"]):
        more, less = kl[name] - kl["risk"], agreement["risk"] - agreement[name]
        out.append(
            {
                "choice": name,
                "bits": rows[rows["choice"] == name]["bits"].mean(),
                "kl": kl[name].mean(),
                "agreement": agreement[name].mean(),
                "more_kl": more.mean(),
                "more_kl_half": _half(more),
                "less_agreement": less.mean(),
                "less_agreement_half": _half(less),
            }
        )
    return pd.DataFrame(out)


def _half(differences: pd.Series) -> float:
    from scipy import stats

    n = len(differences)
    if n < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5)
