"""A collapse report as a file: what it must hold, and which numbers fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from hooks.arguments import check_integers
from hooks.collapse.report import CollapseReport
from hooks.collapse.row_checks import ROW, check_kept, check_table
from hooks.collapse.settings import ProbeSettings
from hooks.kernels import LAW_CODES
from hooks.noise import NormNoise, Shared
from hooks.reports import (
    Form,
    Unsound,
    check_ascending,
    check_counts,
    check_numbers,
    check_sums,
    check_word,
    per_layer,
)


def _check_settings(s: ProbeSettings) -> None:
    check_word("settings.law", s.law, sorted(LAW_CODES))
    check_word("settings.shared", s.shared, get_args(Shared))
    check_word("settings.method", s.method, ("exact", "sample"))
    check_word("settings.strict", s.strict, ("computed", "sampled"))
    for sigma in s.sigmas:
        NormNoise(sigma=sigma, on=s.on, law=s.law, shared=s.shared, layers=s.layers, seed=s.seed)  # type: ignore[arg-type]
    check_ascending("settings.sigmas", s.sigmas)
    if not 0 < s.sparse <= 1:
        raise Unsound("settings.sparse", wanted="a maximum in (0, 1]", got=f"{s.sparse}")
    least = 2 if s.method == "sample" else 0
    check_integers(draws=(s.draws, least), keep=(s.keep, 1), keep_rows=(s.keep_rows, 0))


def _sizes(s: ProbeSettings, model: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    per_layer(s, model, "labels", "heads", "kv_heads")
    return {
        "sigma": len(s.sigmas),
        "draw": s.draws,
        "bound": len(s.sigmas) if s.strict == "computed" else 0,
        "loose_draw": s.draws if s.method == "sample" else 0,
        "layer": len(s.layers),
        "head": max(model["heads"]),
        "prompt": 1 if s.pooled else prompts,
        "kind": 2,
        "moment": 2 + 2 * len(s.sigmas) if s.pooled else 0,
        "group": len(s.layers) * (max(model["heads"]) + 1) + 1,
        "total": 1 if s.pooled else 0,
    }


def _check_numbers(report: CollapseReport) -> None:
    check_counts(report, "examined", "single_key", "padding", "able", "read")
    check_numbers("moments", report.moments, 0)
    check_counts(report, "ties", most=report.examined)
    check_counts(report, "rows", most=report.examined[..., None])
    check_numbers("rows", report.rows.sum(-1), 0, report.examined)
    most = 3.5e38 * (1.0 + report.rows)  # what float32 scores add up to
    check_numbers("level", report.level, -most, most)
    check_sums(report, "loose", "strict", "centred", most=report.rows)
    if report.settings.strict == "computed":
        check_sums(report, "strict_low", "strict_high", most=report.rows.sum(-2))
    check_sums(report, "loose_draws", "strict_draws", "centred_draws", most=report.rows.sum(-2))
    check_table(report)
    check_kept(report)


FORM = Form(
    CollapseReport,
    "collapse report",
    4,
    _check_settings,
    _sizes,
    _check_numbers,
    {
        **dict.fromkeys(("sites", "architecture", "dtype", "device"), str),
        "labels": tuple[str, ...],
        "heads": tuple[int, ...],
        "kv_heads": tuple[int, ...],
        "shields": Mapping[str, tuple[str, ...]],
        "versions": Mapping[str, str],
    },
    {
        **{f"table.{name}": "I32" for name in ROW},
        **{f"table.{name}": "F32" for name in ("s_star", "s", "beta", "a", "cutoff")},
        **{f"kept.{name}": "I32" for name in (*ROW, "draw")},
        **{f"kept.{name}": "F32" for name in ("half_width", "clean", "noisy")},
    },
)
