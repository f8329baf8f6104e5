"""RankReport: how far a prompt's tokens are from being equal, by depth and site, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooks.arguments import Settings, check_booleans, check_choice
from hooks.measures.rank.numbers import MEASURES
from hooks.reports import (
    MOST,
    Curves,
    Form,
    SavedReport,
    Unsound,
    check_ascending,
    check_numbers,
)

RankBy = Literal["prompt", "site"]
WITH: Final = ("all", "without first")  # the axis of tokens

LETTERS: Final = {"encoder_blocks": "E", "decoder_blocks": "D"}
MEANING: Final = {
    "in": "the stream at the block's input",
    "attn_norm": "after the norm that attention reads",
    "mid": "the stream between attention and MLP",
    "cross_norm": "after the norm that cross-attention reads",
    "mid2": "the stream between cross-attention and MLP",
    "mlp_norm": "after the norm that the MLP reads",
    "mixer_norm": "after the norm that the block's mixer reads",
    "out": "the stream at the block's output",
    "final_norm": "after the norm of the last block's output",
}
"""Sites, in the order of the forward pass."""
_STREAM: Final = ("in", "mid", "mid2", "out")


@dataclass(frozen=True, kw_only=True)
class RankSite(Settings):
    """Where the tokens were measured.

    Attributes:
        stack: ``blocks``; ``encoder_blocks`` or ``decoder_blocks``.
        layer: block index within the stack.
        site: one of `MEANING`.
        hook: the hook point that was read.
    """

    stack: str
    layer: int
    site: str
    hook: str

    @property
    def label(self) -> str:
        """``L3 mid``; ``E3``, ``D3`` in an encoder and a decoder."""
        return f"{LETTERS.get(self.stack, 'L')}{self.layer} {self.site}"


@dataclass(frozen=True, kw_only=True)
class RankSettings(Settings):
    """Where a profile was measured; ``layers`` is None for all blocks."""

    layers: tuple[int, ...] | None
    sites: tuple[RankSite, ...]


@dataclass(frozen=True, eq=False, repr=False)
class RankReport(SavedReport):
    """Measures of each prompt's tokens at each site.

    Attributes:
        settings: how they were measured.
        model: facts of the model, versions; ``notes``: which sites are missing, and why.
        tokens, decoder_tokens: each prompt's tokens as strings; empty where there are none.
        numbers: ``[prompt, site, tokens, measure]``: tokens are `all` and `without first`, measures
            those of `to_frame`.
        first_share: the first token's share of ||X||_F^2, ``[prompt, site]``.
    """

    settings: RankSettings
    model: Mapping[str, Any]
    tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    decoder_tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    numbers: Float[np.ndarray, "prompt site 2 measure"] = field(repr=False)
    first_share: Float[np.ndarray, "prompt site"] = field(repr=False)

    def to_frame(self, by: RankBy = "site", *, without_first: bool = False) -> pd.DataFrame:
        """One row per site, the prompts averaged; or per prompt and site.

        Args:
            by: ``"site"`` or ``"prompt"``.
            without_first: leave the first token out of X: an attention sink's length can be a
                hundred times the others', and then it alone decides every measure except the
                cosine.

        Columns:
            stack, layer, site, label: where; ``prompt``: which.
            mu: || X - 1 mean(X)^T ||_F, in the units of the stream.
            relative_mu: mu / ||X||_F.
            stable_rank: ||X||_F^2 / ||X||_2^2, of X (of X X^T it would have fourth powers).
            effective_rank: exp of the entropy of the singular values over their sum.
            rank: singular values above eps/2 ||X||_F, eps of the model's dtype: those that
                rounding X once can't have made. At least 1 for X != 0; NaN where rounding hides
                all (eps/2 sqrt(min(T, d)) >= 1: bfloat16 from 65536 on).
            least, relative_least: the least of the min(T, d) singular values; over the largest.
            mean_cosine: mean |cosine| of different tokens.
            norm: ||X||_F.
            first_share: the first token's share of ||X||_F^2, whatever ``without_first``.

        Means leave out prompts without a number (only zeros; one token).

        Raises:
            ValueError: an unknown ``by``.
        """
        check_choice("by", by, get_args(RankBy))
        (without_first,) = check_booleans(without_first=without_first)
        names = [
            {"stack": s.stack, "layer": s.layer, "site": s.site, "label": s.label}
            for s in self.settings.sites
        ]
        n = len(self.numbers)
        rows = pd.DataFrame(names * n)
        rows["prompt"] = np.repeat(np.arange(n), len(names))
        rows[list(MEASURES)] = self.numbers[:, :, int(without_first)].reshape(-1, len(MEASURES))
        rows["first_share"] = self.first_share.ravel()
        if by == "prompt":
            return rows
        where = ["stack", "layer", "site", "label"]
        return rows.drop(columns="prompt").groupby(where, sort=False).mean().reset_index()

    # -- words ------------------------------------------------------------------------------

    def glance(self) -> tuple[pd.DataFrame, Curves]:
        """Some of the sites, by depth."""
        frame = self.to_frame()
        at = np.unique(np.linspace(0, len(frame) - 1, min(MOST, len(frame))).round().astype(int))
        columns = {
            "label": "site", "relative_mu": "distance from the mean token", "rank": "rank",
            "stable_rank": "stable rank", "mean_cosine": "mean cosine",
        }  # fmt: skip
        return frame.iloc[at][list(columns)].rename(columns=columns), {}

    def summary(self) -> str:
        """A few sentences: the stream at its first and last site, and what the first token does."""
        n, sites = len(self.numbers), self.settings.sites
        parts = [
            f"{self.model['name']}: {n} prompt{'s' * (n != 1)}, {len(sites)} sites in "
            f"{len({(s.stack, s.layer) for s in sites})} blocks."
        ]
        for stack in dict.fromkeys(s.stack for s in sites):
            parts += [_depth(self, stack, without_first=w) for w in (False, True)]
        frame = self.to_frame()
        for _, most in frame.dropna(subset="first_share").nlargest(1, "first_share").iterrows():
            parts.append(
                f"The first token has up to {100 * most['first_share']:.3g}% of ||X||_F^2 "
                f"({most['label']})."
            )
        return " ".join([*parts, *self.model["notes"]])


def _check_settings(s: RankSettings) -> None:
    if s.layers is not None:
        check_ascending("settings.layers", s.layers)
    if not s.sites or len({*s.sites}) < len(s.sites):
        raise Unsound("settings.sites", wanted="one or more, each once", got=f"{len(s.sites)}")
    for site in s.sites:
        if site.stack not in ("blocks", *LETTERS) or site.site not in MEANING or site.layer < 0:
            raise Unsound("settings.sites", wanted="sites of blocks", got=f"{site!r:.120}")
    for stack in {site.stack for site in s.sites}:
        if not {site.site for site in s.sites if site.stack == stack} & {*_STREAM}:
            raise Unsound("settings.sites", wanted=f"one of the stream of {stack}", got="none")


def _sizes(s: RankSettings, model: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    return {"prompt": prompts, "site": len(s.sites), "measure": len(MEASURES)}


def _check_numbers(report: RankReport) -> None:
    shares = ("relative_mu", "relative_least", "mean_cosine")
    for i, name in enumerate(MEASURES):
        most = 1 + 1e-6 if name in shares else 1e200
        check_numbers(f"numbers: {name} ", report.numbers[..., i], 0, most, nan=True)
    check_numbers("first_share", report.first_share, 0, 1 + 1e-6, nan=True)


_FORM = Form(
    RankReport,
    "rank report",
    2,
    _check_settings,
    _sizes,
    _check_numbers,
    {"notes": tuple[str, ...]},
)


def _depth(report: RankReport, stack: str, *, without_first: bool) -> str:
    """The change from the first to the last stream site of a stack."""
    frame = report.to_frame(without_first=without_first)
    stream = frame[(frame["stack"] == stack) & frame["site"].isin(_STREAM)]
    first, last = stream.iloc[0], stream.iloc[-1]
    what = "Without the first token" if without_first else "All tokens"
    changes = [
        _change(name, first[column], last[column])
        for column, name in (
            ("relative_mu", "mu/||X||_F"),
            ("stable_rank", "stable rank"),
            ("effective_rank", "effective rank"),
            ("mean_cosine", "mean |cosine|"),
        )
    ]
    return f"{what}, from {first['label']} to {last['label']}: {', '.join(changes)}."


def _change(name: str, first: float, last: float) -> str:
    """A change as "from one number to the other", with NaN in words."""
    if math.isnan(first) and math.isnan(last):
        few = "no two tokens of a length above 0 to compare"
        return f"no {name} ({few if 'cosine' in name else 'tokens of zeros'})"
    said = ("none" if math.isnan(x) else f"{x:.3g}" for x in (first, last))
    return f"{name} {' to '.join(said)}"
