"""SpectrumReport: leading singular values of attention matrices, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from hooks.arguments import Settings, check_choice, check_integers
from hooks.reports import (
    Curves,
    Form,
    SavedReport,
    Unsound,
    check_ascending,
    check_numbers,
    per_layer,
)

SpectrumBy = Literal["prompt", "head", "layer", "length"]
_NAMES = {
    "prompt": ("layer", "head", "label", "prompt", "length"),
    "head": ("layer", "head", "label"),
    "layer": ("layer", "label"),
    "length": ("layer", "label", "length"),
}


@dataclass(frozen=True, kw_only=True)
class SpectrumSettings(Settings):
    """How spectra were measured; ``lengths``: to which the prompts were cut, or None."""

    k: int
    lengths: tuple[int, ...] | None
    layers: tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class SpectrumReport(SavedReport):
    """Leading singular values of each head's attention matrix A on each prompt.

    One array per layer and field; matrices have T rows and columns. U is the uniform matrix of A's
    mask.

    Attributes:
        settings: how they were measured.
        model: facts of the model, versions; ``centred``: labels of the layers that average with A -
            U, not with A.
        tokens, decoder_tokens: each prompt's tokens as strings; empty where there are none.
        prompt: which of the caller's prompts each is (several may be one prompt cut to lengths).
        length: T ``[prompt]``.
        singular: of A, largest first ``[prompt, head, k]``; NaN where T < k.
        uniform, left: singular values of U and of A - U, shaped like ``singular``.
        square, left_square: |A|_F^2 and |A - U|_F^2 ``[prompt, head]``.
    """

    settings: SpectrumSettings
    model: Mapping[str, Any]
    tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    decoder_tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    prompt: Int[np.ndarray, "_"] = field(repr=False)
    length: tuple[Int[np.ndarray, "_"], ...] = field(repr=False)
    singular: tuple[Float[np.ndarray, "_ _ k"], ...] = field(repr=False)
    uniform: tuple[Float[np.ndarray, "_ _ k"], ...] = field(repr=False)
    left: tuple[Float[np.ndarray, "_ _ k"], ...] = field(repr=False)
    square: tuple[Float[np.ndarray, "_ _"], ...] = field(repr=False)
    left_square: tuple[Float[np.ndarray, "_ _"], ...] = field(repr=False)

    def to_frame(self, by: SpectrumBy = "head") -> pd.DataFrame:
        """One row per layer and head (or layer; or layer and length; or layer, head and prompt).

        Each number is computed for every matrix; a row of several matrices has its mean.

        Args:
            by: ``"prompt"``, ``"head"``, ``"layer"`` or ``"length"``.

        Columns:
            layer, head, label: block index; head; ``L5H1`` (``L5`` by layer and length).
            prompt, length: which prompt; T (a mean where rows of several lengths are averaged).
            s1, s2, ... : singular values of A.
            gap, ratio: s1 - s2, and s2 / s1.
            stable_rank: |A|_F^2 / s1^2.
            uniform_s1, uniform_s2, uniform_gap: of the uniform matrix U of A's mask.
            left_s1, left_s2, left_stable_rank: of A - U, what the fix leaves (NaN: A = U).
            edge: 2 / sqrt(T), the bulk's edge of a random Markov matrix without a mask whose
                entries' standard deviation is their mean.
            edge_left: 2 |A - U|_F / sqrt(T), the edge of a random matrix as large as A - U.

        Raises:
            ValueError: an unknown ``by``.
        """
        check_choice("by", by, get_args(SpectrumBy))
        rows = pd.concat([self._rows(i) for i in range(len(self.singular))], ignore_index=True)
        if by == "prompt":
            return rows
        if by != "head":
            rows["label"] = rows["label"].str.rpartition("H")[0]
        names = list(_NAMES[by])
        numbers = [c for c in rows.columns if c not in (*names, "head", "label", "prompt")]
        return rows.groupby(names, sort=False)[numbers].mean().reset_index()

    def _rows(self, index: int) -> pd.DataFrame:
        """One layer's matrices."""
        s, u, rest = self.singular[index], self.uniform[index], self.left[index]
        n_prompts, n_heads, k = s.shape
        length = np.repeat(self.length[index], n_heads)
        head = np.tile(np.arange(n_heads), n_prompts)
        s, u, rest = (x.reshape(-1, k) for x in (s, u, rest))
        square, left_square = self.square[index].ravel(), self.left_square[index].ravel()
        label = self.model["labels"][index]
        with np.errstate(divide="ignore", invalid="ignore"):
            left_rank = left_square / rest[:, 0] ** 2
            numbers = {
                **{f"s{i + 1}": s[:, i] for i in range(k)},
                "gap": s[:, 0] - s[:, 1],
                "ratio": s[:, 1] / s[:, 0],
                "stable_rank": square / s[:, 0] ** 2,
                "uniform_s1": u[:, 0],
                "uniform_s2": u[:, 1],
                "uniform_gap": u[:, 0] - u[:, 1],
                "left_s1": rest[:, 0],
                "left_s2": rest[:, 1],
                "left_stable_rank": np.where(rest[:, 0] > 0, left_rank, np.nan),
                "edge": 2 / np.sqrt(length),
                "edge_left": 2 * np.sqrt(left_square / length),
            }
        return pd.DataFrame(
            {
                "layer": self.settings.layers[index],
                "head": head,
                "label": [f"{label}H{h}" for h in head],
                "prompt": np.repeat(self.prompt, n_heads),
                "length": length,
                **numbers,
            }
        )

    # -- words ------------------------------------------------------------------------------

    def glance(self) -> tuple[pd.DataFrame, Curves]:
        """The layers with the widest gap."""
        columns = {"label": "layer", "gap": "gap", "uniform_gap": "the mask's own", "s1": "s1"}
        frame = self.to_frame("layer").sort_values("gap", ascending=False)
        return frame[list(columns)].rename(columns=columns), {}

    def summary(self) -> str:
        """A few sentences: the gap, beside the uniform matrix's, and what the fix leaves."""
        s, rows = self.settings, self.to_frame("prompt")
        n, layers = len(set(self.prompt.tolist())), self.to_frame("layer")
        low, high = rows["length"].min(), rows["length"].max()
        mean = rows.mean(numeric_only=True)
        least, most = (layers.loc[layers["gap"].agg(f)] for f in ("idxmin", "idxmax"))
        parts = [
            f"{self.model['name']}: {n} prompt{'s' * (n != 1)} of "
            f"{f'{low}' if low == high else f'{low} to {high}'} tokens, {len(s.layers)} attention "
            f"layer{'s' * (len(s.layers) != 1)}; singular values of each head's attention matrix.",
            f"On average the largest is {mean['s1']:.3g} and the second {mean['s2']:.3g}, a gap of "
            f"{mean['gap']:.3g} (by layer from {least['gap']:.3g} in {least['label']} to "
            f"{most['gap']:.3g} in {most['label']}); uniform attention under the same mask has "
            f"{mean['uniform_s1']:.3g} and {mean['uniform_s2']:.3g}, a gap of "
            f"{mean['uniform_gap']:.3g}.",
            f"The stable rank is {mean['stable_rank']:.3g}. Without the uniform part the largest "
            f"is {mean['left_s1']:.3g}; 2/sqrt(T), the edge of an unmasked random Markov matrix, "
            f"is {mean['edge']:.3g}.",
        ]
        centred = self.model.get("centred", [])
        if centred:
            where = "" if len(centred) == len(s.layers) else f" in {', '.join(centred)}"
            parts.append(
                f"Values are averaged with A - U{where}, not with A: the gap and the stable rank "
                "above are of A, and what acts on the values is what is left without the uniform "
                "part."
            )
        return " ".join(parts)


def _check_settings(s: SpectrumSettings) -> None:
    check_integers(k=(s.k, 2))
    if s.lengths is not None:
        check_ascending("settings.lengths", s.lengths)
        check_integers(lengths=(s.lengths[0], 2))


def _sizes(s: SpectrumSettings, model: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    per_layer(s, model, "labels", "heads")
    heads: list[int] = model["heads"]
    return {
        "_": prompts,
        "length": [(prompts,) for _ in heads],
        **{name: [(prompts, n, s.k) for n in heads] for name in _SPECTRA},
        **{name: [(prompts, n) for n in heads] for name in ("square", "left_square")},
    }


def _check_numbers(report: SpectrumReport) -> None:
    k, n = report.settings.k, len(report.tokens)
    check_numbers("prompt", report.prompt, 0, n - 1)
    for i, length in enumerate(report.length):
        check_numbers(f"length.{i}", length, 1)
        beyond = (np.arange(k) >= length[:, None])[:, None]  # [prompt, 1, k]
        for name in _SPECTRA:
            values = getattr(report, name)[i]
            check_numbers(f"{name}.{i}", values, 0, nan=beyond)
            if (np.diff(values, axis=-1) > 1e-9).any():
                raise Unsound(f"{name}.{i}", wanted="numbers in descending order", got="others")
        for name in ("square", "left_square"):
            check_numbers(f"{name}.{i}", getattr(report, name)[i], 0)


_SPECTRA = ("singular", "uniform", "left")
_FORM = Form(
    SpectrumReport,
    "spectrum report",
    2,
    _check_settings,
    _sizes,
    _check_numbers,
    {"labels": tuple[str, ...], "heads": tuple[int, ...]},
    {"prompt": "I32", "length": "I32"},
)
