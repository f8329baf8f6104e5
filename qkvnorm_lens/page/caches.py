"""The page of a cache risk report: what formats cost, where, and the recipe."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from markupsafe import Markup

from qkvnorm_lens.page.template import environment

if TYPE_CHECKING:
    from hooks import CacheRecipe, CacheRisk


def cache_page(
    report: CacheRisk,
    recipe: CacheRecipe,
    engines: Mapping[str, str],
    *,
    source: str = "",
    advice: str = "",
) -> str:
    """One file that opens offline, light or dark.

    Args:
        report: what :func:`hooks.cache_risk` gave.
        recipe: chosen from it.
        engines: what each engine is told, by its name.
        source: what was read, in words.
        advice: what to do where no engine takes the recipe.
    """
    whole = report.to_frame("model").sort_values("risk").to_dict("records")
    heads = report.to_frame("head").sort_values("risk", ascending=False)
    made: str = (
        environment()
        .get_template("cache.html")
        .render(
            report=report,
            recipe=recipe,
            layers=recipe.to_frame().to_dict("records"),
            engines=engines,
            source=source,
            advice=advice,
            whole=whole,
            heads=heads.head(30).to_dict("records"),
            figure=_figure(report),
        )
    )
    return made


def _figure(report: CacheRisk) -> Markup:
    """The risk by layer as SVG; nothing where matplotlib is missing."""
    from qkvnorm_lens.plots import cache_by_depth

    try:
        figure = cache_by_depth(report)
    except ImportError:
        return Markup("")
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    return Markup(text)
