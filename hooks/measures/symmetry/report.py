"""SymmetryReport: what permuting the earlier tokens changes at the last position, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from hooks.arguments import Settings, check_choice, check_integers
from hooks.measures.symmetry.positions import Status, Variant
from hooks.reports import (
    Curves,
    Form,
    SavedReport,
    Unsound,
    check_numbers,
    per_layer,
)

SymmetryBy = Literal["variant", "layer", "permutation", "distance"]
FLOORS = 2  # how often each prompt is run again with the last digit of its stream changed
REACH = 16  # the greatest distance of positions that are compared
CLEAR = 10.0  # a gap is clear from this many times what rounding does
SMALL = 0.01  # of total variation and stream: below, there is no gap
Verdict = Literal["gap", "none", "undecided"]
_MEASURES = ("kl", "tv", "logits", "moved")


@dataclass(frozen=True, kw_only=True)
class SymmetrySettings(Settings):
    """How a symmetry gap was measured; ``seed`` is None where permutations were given."""

    permutations: int
    seed: int | None
    keep_first: bool
    variants: tuple[str, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class SymmetryReport(SavedReport):
    """What changed at the last position, by variant, prompt and permutation.

    The axis ``run`` holds the permutations, and ``tried`` the runs of the unpermuted prompt with
    the last digit of the stream changed, which show what rounding does. ``point`` is the stream
    before the first of the blocks, and after each.

    Attributes:
        settings: how it was measured.
        model: facts of the model, versions; whether ``positions`` and ``mask`` can be removed.
        tokens: each prompt's tokens as strings.
        orders: each prompt's permutations: which position's token comes where.
        kl: KL(p || p_pi) of the next token's distributions, nats.
        tv: their total variation, half the sum of absolute differences.
        logits: largest absolute difference of logits.
        moved: whether the arg max is another.
        stream: |y - y_pi| / |y| of the last position's stream y.
        added: this change of what each block adds to the stream, over the |y| after it.
        floor_tv, floor_logits, floor_stream: these changes under rounding alone.
        similarity: mean cosine of positions i and i - d by d = 1, 2, .., without the first.
        pairs: how many such pairs there are.
        nearer: share of pairs of distances in which the nearer position is more alike.
    """

    settings: SymmetrySettings
    model: Mapping[str, Any]
    tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    orders: tuple[Int[np.ndarray, "_ _"], ...] = field(repr=False)
    kl: Float[np.ndarray, "variant prompt run"] = field(repr=False)
    tv: Float[np.ndarray, "variant prompt run"] = field(repr=False)
    logits: Float[np.ndarray, "variant prompt run"] = field(repr=False)
    moved: Bool[np.ndarray, "variant prompt run"] = field(repr=False)
    stream: Float[np.ndarray, "variant prompt run point"] = field(repr=False)
    added: Float[np.ndarray, "variant prompt run layer"] = field(repr=False)
    floor_tv: Float[np.ndarray, "variant prompt tried"] = field(repr=False)
    floor_logits: Float[np.ndarray, "variant prompt tried"] = field(repr=False)
    floor_stream: Float[np.ndarray, "variant prompt tried point"] = field(repr=False)
    similarity: Float[np.ndarray, "variant point distance"] = field(repr=False)
    pairs: Float[np.ndarray, "variant distance"] = field(repr=False)
    nearer: Float[np.ndarray, "variant prompt point"] = field(repr=False)

    def verdict(self, variant: str) -> Verdict:
        """Whether there is a gap, as far as rounding lets it show; prompt by prompt.

        With g a prompt's largest change of a logit over permutations, f the largest that rounding
        makes in the same prompt, and m the median of f over prompts (a prompt that rounding
        happened to change little is not measured more exactly than others), a prompt has

        - a gap, where ``g > 10 max(f, m)``;
        - none, where it has no gap, and ten times what rounding does, or else what the permutations
          themselves do, is at most 0.01 in total variation and in |y - y_pi| / |y| after the last
          block;
        - else an undecided one: both are more than that, and a gap could hide in the rounding.

        Returns:
            ``"gap"``: at least one prompt has one; ``"none"``: every prompt has none;
            ``"undecided"`` otherwise.

        Raises:
            ValueError: a variant that was not measured.
        """
        i = self._index(variant)
        gap, floor = self.logits[i].max(-1), self.floor_logits[i].max(-1)
        clear = gap > CLEAR * np.maximum(floor, np.median(floor))
        if clear.any():
            return "gap"
        by_rounding = np.maximum(self.floor_tv[i], self.floor_stream[i, :, :, -1]).max(-1)
        by_order = np.maximum(self.tv[i], self.stream[i, :, :, -1]).max(-1)
        return "none" if (np.minimum(CLEAR * by_rounding, by_order) <= SMALL).all() else "undecided"

    def vanishes(self, variant: str) -> bool:
        """Whether there is no gap: :meth:`verdict` is ``"none"``, neither a gap nor undecided.

        Raises:
            ValueError: a variant that was not measured.
        """
        return self.verdict(variant) == "none"

    def _index(self, variant: str) -> int:
        known = self.settings.variants
        return known.index(check_choice("variant", variant, known))

    def to_frame(self, by: SymmetryBy = "variant") -> pd.DataFrame:
        """Tidy numbers: one row per variant, per layer, per permutation, or per distance.

        Columns:
            variant: ``"as is"``, ``"positions removed"``, ``"mask removed"``, ``"both removed"``.

            By variant: kl, tv, logits, moved, stream (after the last block), each a mean over
            prompts and permutations; largest (of the differences of logits); floor_tv,
            floor_logits, floor_stream (what rounding does: the largest of its runs); verdict
            (``"gap"``, ``"none"``, ``"undecided"``); vanishes (none).

            By layer, the stream before the first block (layer -1, ``embed``) and after each:
            layer, label, stream, added (means), floor_stream, neighbours and distant (mean cosine
            at distance 1 and at the greatest one that all prompts have), nearer.

            By permutation: prompt, permutation, kl, tv, logits, moved, stream.

            By distance: layer, label, distance, similarity, pairs.

        Raises:
            ValueError: an unknown ``by``.
        """
        check_choice("by", by, get_args(SymmetryBy))
        make = {
            "variant": self._of_variant,
            "layer": self._of_layers,
            "permutation": self._of_permutations,
            "distance": self._of_distances,
        }[by]
        rows = [row for i, v in enumerate(self.settings.variants) for row in make(i, v)]
        return pd.DataFrame(rows)

    def _of_variant(self, i: int, variant: str) -> list[dict[str, Any]]:
        row: dict[str, Any] = {"variant": variant}
        row |= {name: float(getattr(self, name)[i].mean()) for name in _MEASURES}
        row["stream"] = float(self.stream[i, :, :, -1].mean())
        row["largest"] = float(self.logits[i].max())
        row["floor_tv"] = float(self.floor_tv[i].max())
        row["floor_logits"] = float(self.floor_logits[i].max())
        row["floor_stream"] = float(self.floor_stream[i, :, :, -1].max())
        row["verdict"] = self.verdict(variant)
        row["vanishes"] = row["verdict"] == "none"
        return [row]

    def _points(self) -> list[tuple[int, str]]:
        return [(-1, "embed"), *zip(self.settings.layers, self.model["labels"], strict=True)]

    def _of_layers(self, i: int, variant: str) -> list[dict[str, Any]]:
        some = np.flatnonzero(self.pairs[i])
        out = []
        for point, (layer, label) in enumerate(self._points()):
            alike = self.similarity[i, point]
            nearer = self.nearer[i, :, point]
            out.append(
                {
                    "variant": variant,
                    "layer": layer,
                    "label": label,
                    "stream": float(self.stream[i, :, :, point].mean()),
                    "added": float(self.added[i, :, :, point - 1].mean()) if point else np.nan,
                    "floor_stream": float(self.floor_stream[i, :, :, point].max()),
                    "neighbours": float(alike[0]),
                    "distant": float(alike[some[-1]]) if len(some) else np.nan,
                    "nearer": float(np.nanmean(nearer)) if (nearer == nearer).any() else np.nan,
                }
            )
        return out

    def _of_permutations(self, i: int, variant: str) -> list[dict[str, Any]]:
        return [
            {
                "variant": variant,
                "prompt": prompt,
                "permutation": run,
                **{name: getattr(self, name)[i, prompt, run].item() for name in _MEASURES},
                "stream": float(self.stream[i, prompt, run, -1]),
            }
            for prompt in range(len(self.tokens))
            for run in range(self.settings.permutations)
        ]

    def _of_distances(self, i: int, variant: str) -> list[dict[str, Any]]:
        return [
            {
                "variant": variant,
                "layer": layer,
                "label": label,
                "distance": d + 1,
                "similarity": float(self.similarity[i, point, d]),
                "pairs": int(self.pairs[i, d]),
            }
            for point, (layer, label) in enumerate(self._points())
            for d in np.flatnonzero(self.pairs[i])
        ]

    # -- words ------------------------------------------------------------------------------

    def glance(self) -> tuple[pd.DataFrame, Curves]:
        """Each variant, and whether permuting the earlier tokens changes its output."""
        columns = {"variant": "variant", "tv": "total variation", "kl": "KL (nats)"}
        frame = self.to_frame()[[*columns, "verdict"]].rename(columns=columns)
        return frame.rename(columns={"verdict": "gap"}), {}

    def summary(self) -> str:
        """A few sentences: the gap, what remains of it without positions and mask, and where."""
        s, frame = self.settings, self.to_frame().set_index("variant")
        n = len(self.tokens)
        drawn = f"{s.permutations} permutation{'s' * (s.permutations != 1)}"
        kept = ", the first and the last kept" if s.keep_first else ", the last kept"
        parts = [
            f"{self.model['name']}: {n} prompt{'s' * (n != 1)}, {drawn} of the earlier tokens "
            f"each{kept}."
        ]
        for variant, row in frame.iterrows():
            named = "As it is" if variant == "as is" else f"{str(variant).capitalize()}"
            if row["vanishes"]:
                parts.append(
                    f"{named}: no gap (a logit moves by {row['largest']:.2g} at most, by rounding "
                    f"{row['floor_logits']:.2g})."
                )
                continue
            parts.append(
                f"{named}: total variation {row['tv']:.3g}, KL {row['kl']:.3g} nats, the arg max "
                f"moves in {100 * row['moved']:.3g}%{self._doubt(row)}."
            )
        bare = self._bare()
        if bare in s.variants and self.verdict(bare) == "gap":
            parts.append("Something else than positions and mask tells this model the order.")
        return " ".join([*parts, *self._where(), *self._left()])

    @staticmethod
    def _doubt(row: pd.Series[Any]) -> str:
        """A note on a gap that rounding may have made."""
        if row["verdict"] != "undecided":
            return ""
        return (
            f"; undecided: rounding too large (a total variation of up to {row['floor_tv']:.2g}, "
            f"logits by {row['floor_logits']:.2g}, the stream by {100 * row['floor_stream']:.2g}%; "
            "a model in float32 can decide it)"
        )

    def _bare(self) -> str:
        """The variant without positions and mask."""
        absent = {name: self.model[name]["status"] == "absent" for name in ("positions", "mask")}
        return Variant(positions=absent["positions"], mask=absent["mask"]).name

    def _where(self) -> list[str]:
        """Which block adds most, in the first variant that has a gap."""
        for variant in self.settings.variants:
            if self.verdict(variant) == "gap":
                layers = self.to_frame("layer")
                mine = layers[(layers["variant"] == variant) & (layers["layer"] >= 0)]
                top = mine.nlargest(1, "added").iloc[0]
                how = "" if variant == "as is" else f" ({variant})"
                return [
                    f"The block of {top['label']} adds most to the change of the stream: "
                    f"{100 * top['added']:.3g}% of its length{how}."
                ]
        return []

    def _left(self) -> list[str]:
        """What is absent, and what could not be removed."""
        out = []
        for name, words in (("positions", "positions"), ("mask", "mask")):
            fact = self.model[name]
            if fact["status"] == "absent":
                out.append(f"The model has no {words}.")
            elif fact["status"] == "unremovable":
                verb = "are" if name == "positions" else "is"
                out.append(f"The {words} {verb} not removed: {fact['why']}.")
        return out


def _check_settings(s: SymmetrySettings) -> None:
    check_integers(permutations=(s.permutations, 1), seed=(s.seed or 0, 0))
    known = [Variant(positions=p, mask=m).name for p in (True, False) for m in (True, False)]
    if not s.variants or len({*s.variants}) < len(s.variants) or {*s.variants} - {*known}:
        raise Unsound("settings.variants", wanted=f"some of {known}", got=f"{s.variants}"[:80])


def _sizes(s: SymmetrySettings, model: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    per_layer(s, model, "labels")
    for name in ("positions", "mask"):
        said = model[name]
        if set(said) != {"status", "why"} or said["status"] not in get_args(Status):
            raise Unsound(
                f"model.{name}", wanted=f"a status of {get_args(Status)}", got=f"{said}"[:80]
            )
    return {
        "variant": len(s.variants),
        "prompt": prompts,
        "run": s.permutations,
        "tried": FLOORS,
        "layer": len(s.layers),
        "point": len(s.layers) + 1,
        "distance": REACH,
        "orders": [(s.permutations, f"token of {i}") for i in range(prompts)],
    }


def _check_numbers(report: SymmetryReport) -> None:
    first = int(report.settings.keep_first)
    for i, order in enumerate(report.orders):
        n = order.shape[1]
        fits = n >= 3 + first and np.array_equal(
            np.sort(order), np.broadcast_to(np.arange(n), order.shape)
        )
        if not fits or (order[:, -1] != n - 1).any() or (first and order[:, 0].any()):
            raise Unsound(f"orders.{i}", wanted="permutations of 0, 1, ..", got="something else")
    for name in ("tv", "floor_tv"):
        check_numbers(name, getattr(report, name), 0, 1 + 1e-6)
    for name in ("kl", "logits", "floor_logits", "stream", "added", "floor_stream"):
        check_numbers(name, getattr(report, name), 0, infinite=True)
    check_numbers("nearer", report.nearer, 0, 1, nan=True)
    check_numbers("pairs", report.pairs, 0)
    none = (report.pairs == 0)[:, None]
    check_numbers("similarity", report.similarity, -1 - 1e-6, 1 + 1e-6, nan=none)


_FORM = Form(
    SymmetryReport,
    "symmetry report",
    2,
    _check_settings,
    _sizes,
    _check_numbers,
    {"labels": tuple[str, ...], "positions": Mapping[str, str], "mask": Mapping[str, str]},
)
