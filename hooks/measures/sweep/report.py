"""SweepReport: what norm noise in many layers at once costs a model's output, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from hooks.arguments import Settings, check_choice, check_integers, check_number
from hooks.noise import LAWS, At, NormNoise, Rows, Shared
from hooks.reports import (
    Curves,
    Form,
    PoolingReport,
    Unsound,
    check_ascending,
    check_counts,
    check_numbers,
    check_word,
    moments,
    percent,
    se_draws,
    se_moments,
    se_prompts,
    told,
)

SweepBy = Literal["sigma", "prompt", "draw"]
_MOST_NATS = 1e60  # far beyond any logit
_BY_CHANCE = 4  # lost answers: two standard deviations of as many rare events
_METRICS = ("accuracy", "loss", "kl", "top1_agreement")
_WITH_TARGETS = ("accuracy", "loss")


@dataclass(frozen=True, kw_only=True)
class SweepSettings(Settings):
    """How a sweep was run; two reports of equal settings can be merged."""

    sigmas: tuple[float, ...]
    replicates: int
    on: str
    law: str
    shared: str
    at: str
    rows: str
    layers: tuple[int, ...]
    seed: int
    pooled: bool = False  # sums over all prompts, with moments, in place of sums for each


@dataclass(frozen=True, eq=False, repr=False)
class SweepReport(PoolingReport):
    """What a model's output loses under norm noise in all chosen layers at once, against sigma.

    Sums over the scored positions of each prompt, for each sigma and draw; the clean row is this
    model in the same batches, without noise.

    Attributes:
        settings: how the sweep was run.
        model: facts of the model and what noise means there (``sites``), versions.
        first_prompt: index of the first prompt, where this is part of a corpus.
        tokens, decoder_tokens: each prompt's tokens as strings; empty where there are none.
        positions: scored positions of each prompt.
        targets: how many of them have a target; none where the model predicts no next token and no
            targets were given: accuracy and loss are then NaN.
        clean_correct, clean_loss: of the clean row: positions whose arg max is the target; sum of
            -log p(target), nats.
        correct, loss: these two under noise.
        kl: sum of KL(clean || noisy), nats.
        agree: positions whose arg max is the clean row's.
        moments: where prompts are pooled, of the changes of accuracy and of loss: prompts with
            targets, and over prompts with c targets and changes x, the sums of c^2, and of xc and
            x^2 by sigma, the clean row in front.
    """

    settings: SweepSettings
    model: Mapping[str, Any]
    first_prompt: int
    tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    decoder_tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    positions: Int[np.ndarray, "prompt"] = field(repr=False)
    targets: Int[np.ndarray, "prompt"] = field(repr=False)
    clean_correct: Int[np.ndarray, "prompt"] = field(repr=False)
    clean_loss: Float[np.ndarray, "prompt"] = field(repr=False)
    correct: Int[np.ndarray, "sigma draw prompt"] = field(repr=False)
    loss: Float[np.ndarray, "sigma draw prompt"] = field(repr=False)
    kl: Float[np.ndarray, "sigma draw prompt"] = field(repr=False)
    agree: Int[np.ndarray, "sigma draw prompt"] = field(repr=False)
    # Of pooled reports alone.
    moments: Float[np.ndarray, "moment 2"] = field(
        repr=False, default_factory=lambda: np.zeros((0, 2))
    )

    # -- curves -----------------------------------------------------------------------------

    def to_frame(self, by: SweepBy = "sigma") -> pd.DataFrame:
        """One row per sigma (or sigma and prompt, or sigma and draw), the clean row as sigma = 0.

        Columns:
            sigma, prompt, draw: the row; prompts count from ``first_prompt``, and the clean row
                has the draw -1.
            positions: scored positions.
            accuracy: share of them whose arg max is the target.
            loss: mean of -log p(target), nats per token.
            kl: mean of KL(clean || noisy), nats per token.
            top1_agreement: share of them whose arg max is the clean one.
            accuracy_change, loss_change: noisy minus clean, on the same prompts.
            se_...: standard error of the four over draws (not by draw; NaN for one draw). The clean
                row does not vary over draws, so a change has the error of its noisy side. Draws
                are the same at every sigma: compare two sigmas draw by draw (``by="draw"``).
            se_prompts_accuracy_change, se_prompts_loss_change: standard error of the changes over
                prompts, clean and noisy paired (by sigma; NaN for one prompt).

        Raises:
            ValueError: an unknown ``by``, or ``"prompt"`` of a pooled report.
        """
        known = get_args(SweepBy)
        check_choice("by", by, [k for k in known if k != "prompt" or not self.settings.pooled])
        sums = self._sums()  # [sigma, draw, prompt]
        over = {"sigma": (1, 2), "prompt": (1,), "draw": (2,)}[by]
        n = {name: self._counts(name) for name in _METRICS}
        columns: dict[str, np.ndarray] = {}
        pooled = {name: n[name].sum() if by != "prompt" else n[name] for name in _METRICS}
        draws = 1 if by == "draw" else self.settings.replicates
        with np.errstate(invalid="ignore", divide="ignore"):
            for name in _METRICS:
                columns[name] = sums[name].sum(axis=over) / (pooled[name] * draws)
            for name in _WITH_TARGETS:
                columns[f"{name}_change"] = columns[name] - columns[name][:1]
            if by != "draw":
                each = {k: v if by == "prompt" else v.sum(2) for k, v in sums.items()}
                for name in _METRICS:
                    columns[f"se_{name}"] = _se_draws(each[name] / pooled[name])
            if by == "sigma":
                change, targets = self._changes()
                if self.settings.pooled:
                    errors = se_moments(self.moments, change.sum(-1), targets.sum(-1))
                else:
                    errors = se_prompts(change, targets)
                for name, error in zip(_WITH_TARGETS, errors.T, strict=True):
                    columns[f"se_prompts_{name}_change"] = error
        return self._tidy(by, columns, pooled["kl"])

    def _tidy(self, by: SweepBy, columns: dict[str, np.ndarray], positions: Any) -> pd.DataFrame:
        shape = next(iter(columns.values())).shape
        grid = np.indices(shape).reshape(len(shape), -1)
        frame = pd.DataFrame({"sigma": np.asarray([0.0, *self.settings.sigmas])[grid[0]]})
        if by == "prompt":
            frame["prompt"] = self.first_prompt + grid[1]
        if by == "draw":
            frame["draw"] = np.where(grid[0] == 0, -1, grid[1])
        frame["positions"] = np.broadcast_to(positions, shape).ravel()
        for name, values in columns.items():
            frame[name] = values.ravel()
        if by == "draw":  # one clean row, not one for each draw
            frame = frame[(grid[0] > 0) | (grid[1] == 0)].reset_index(drop=True)
        return frame

    def _sums(self) -> dict[str, Float[np.ndarray, "sigma_and_clean draw prompt"]]:
        """The four sums with the clean row in front, as sigma = 0."""
        wide = (1, *self.correct.shape[1:])
        clean: dict[str, Any] = {
            "accuracy": self.clean_correct,
            "loss": self.clean_loss,
            "kl": np.zeros(len(self.positions)),
            "top1_agreement": self.positions,
        }
        noisy = {
            "accuracy": self.correct,
            "loss": self.loss,
            "kl": self.kl,
            "top1_agreement": self.agree,
        }
        return {
            name: np.concatenate([np.broadcast_to(clean[name], wide), noisy[name]]).astype(float)
            for name in _METRICS
        }

    def _counts(self, metric: str) -> Int[np.ndarray, "prompt"]:
        return self.targets if metric in _WITH_TARGETS else self.positions

    def _changes(
        self,
    ) -> tuple[Float[np.ndarray, "sigma_and_clean 2 prompt"], Int[np.ndarray, "2 prompt"]]:
        """Changes of accuracy and loss, the mean of the draws, and how many targets they are of."""
        sums = self._sums()
        changes = [(sums[name] - sums[name][:1]).mean(1) for name in _WITH_TARGETS]
        return np.stack(changes, 1), np.stack([self._counts(name) for name in _WITH_TARGETS])

    def _over_prompts(self) -> dict[str, np.ndarray]:
        return {"moments": moments(*self._changes())}

    def sigma_at(self, drop: float = 0.1) -> float:
        """The sigma at which the accuracy has fallen by the share ``drop`` of the clean accuracy.

        accuracy(sigma) = (1 - drop) accuracy(0), interpolated linearly where the measured curve,
        which starts at the clean row, first crosses it. Where ``drop`` is a share of few right
        answers, these come and go by chance, and so does this sigma.

        Raises:
            ValueError: a share outside (0, 1), no accuracy, or a fall that no measured sigma
                brackets.
        """
        drop = check_number("drop", drop, "a share between 0 and 1", lambda x: 0 < x < 1)
        frame = self.to_frame()
        sigma, accuracy = (frame[name].to_numpy(dtype=float) for name in ("sigma", "accuracy"))
        if not accuracy[0] > 0:
            raise ValueError(f"drop: wanted a clean accuracy above 0; got {accuracy[0]}")
        wanted = (1 - drop) * accuracy[0]
        below = np.flatnonzero(accuracy <= wanted)
        if not len(below):
            raise ValueError(
                f"drop: wanted a fall that the sweep brackets, at most "
                f"{1 - accuracy.min() / accuracy[0]:.3g} (sigmas up to {sigma[-1]:g}); got {drop:g}"
            )
        i = int(below[0])
        share = (accuracy[i - 1] - wanted) / (accuracy[i - 1] - accuracy[i])
        return float(sigma[i - 1] + share * (sigma[i] - sigma[i - 1]))

    # -- words ------------------------------------------------------------------------------

    def glance(self) -> tuple[pd.DataFrame, Curves]:
        """By sigma: how far the output moves."""
        frame = self.to_frame()
        changed = 1 - frame["top1_agreement"]
        table = pd.DataFrame({"sigma": frame["sigma"].map(percent), "KL (nats)": frame["kl"]})
        table["arg max changed"] = changed.map(percent)
        if frame["accuracy"].notna().any():
            table["accuracy"] = frame["accuracy"].map(percent)
            table["loss (nats)"] = frame["loss"]
        return table, {"arg max changed": (frame["sigma"].to_numpy(), changed.to_numpy())}

    def summary(self) -> str:
        """A few sentences: what was noised, what the output lost, and what that means here."""
        s = self.settings
        parts = [
            f"{self.model['name']}: {_count(len(self.tokens), 'prompt')}, "
            f"{_count(int(self.positions.sum()), 'scored position')}; {s.law} noise on the norms "
            f"of {', '.join(s.on)} in {_count(len(s.layers), 'attention layer')} at once"
            f"{'' if s.rows == 'all' else f', in {s.rows} rows only'}, "
            f"{_count(s.replicates, 'draw')} per sigma."
        ]
        frame = self.to_frame()
        known = bool(self.targets.any())
        if known:
            clean = frame.iloc[0]
            parts.append(
                f"Clean: accuracy {clean.accuracy:.1%} ({int(self.clean_correct.sum())} of "
                f"{int(self.targets.sum())}), loss {clean.loss:.3f} nats."
            )
        else:
            parts.append("No targets: what follows compares the noisy output with the clean one.")
        chosen = sorted({*np.linspace(1, len(s.sigmas), min(3, len(s.sigmas))).round().astype(int)})
        for row in frame.iloc[chosen].itertuples():
            task = f"accuracy {row.accuracy:.1%}, loss {row.loss:.3f}, " if known else ""
            parts.append(
                f"At sigma = {row.sigma:.3g}: {task}KL(clean || noisy) {row.kl:.3g} nats, "
                f"the clean top token in {row.top1_agreement:.1%}."
            )
        right = int(self.clean_correct.sum())
        if known and right and 0.1 * right < _BY_CHANCE:
            parts.append("Too few answers are right to say where a tenth of the accuracy is lost.")
        elif known and right:
            try:
                parts.append(
                    f"A tenth of the accuracy is lost at sigma = {self.sigma_at(0.1):.3g}."
                )
            except ValueError:
                parts.append("No measured sigma takes a tenth of the accuracy.")
        if s.at == "projection":
            parts.append(_projected(self.model["shields"], s.on))
        return " ".join([*parts, told(self.model)])


def _check_settings(s: SweepSettings) -> None:
    check_word("settings.shared", s.shared, get_args(Shared))
    check_word("settings.at", s.at, get_args(At))
    check_word("settings.rows", s.rows, get_args(Rows))
    known = s.law in LAWS  # a law of the user's own may not be there
    for sigma in s.sigmas:
        if not sigma > 0:
            raise Unsound("settings.sigmas", wanted="numbers above 0", got=f"{sigma}")
        same = {name: getattr(s, name) for name in ("on", "shared", "at", "rows", "layers", "seed")}
        NormNoise(sigma=sigma if known else 0.0, law=s.law if known else "uniform", **same)
    check_ascending("settings.sigmas", s.sigmas)
    check_integers(replicates=(s.replicates, 1))


def _sizes(s: SweepSettings, model: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    return {
        "sigma": len(s.sigmas),
        "draw": s.replicates,
        "prompt": 1 if s.pooled else prompts,
        "moment": 2 + 2 * (1 + len(s.sigmas)) if s.pooled else 0,
    }


def _check_numbers(report: SweepReport) -> None:
    check_counts(report, "positions")
    check_counts(report, "targets", "agree", most=report.positions)
    check_counts(report, "clean_correct", "correct", most=report.targets)
    # Under noise a half-precision model may overflow: its loss is infinite then, or NaN.
    for name in ("clean_loss", "loss", "kl"):
        least = -1.0 - report.positions  # rounding
        check_numbers(name, getattr(report, name), least, _MOST_NATS, nan=True, infinite=True)


_FORM = Form(
    SweepReport,
    "sweep report",
    2,
    _check_settings,
    _sizes,
    _check_numbers,
    {"sites": str, "shields": Mapping[str, tuple[str, ...]]},
)


def _se_draws(rates: Float[np.ndarray, "sigma draw *group"]) -> Float[np.ndarray, "sigma *group"]:
    """Standard error of the mean over draws; 0 for the clean row, which no draw changes."""
    out = se_draws(rates)
    out[0] = np.where(np.isnan(rates[0, 0]), np.nan, 0.0)
    return out


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _projected(shields: Mapping[str, list[str]], on: str) -> str:
    """A warning that noise before a norm must not be read as stability."""
    shielded = [role for role in on if set(shields[role]) - {"none"}]
    if not shielded:
        return "The noise is at the projection's output, and no norm follows before the attention."
    return (
        f"The noise is at the projection's output; a norm that follows removes it from "
        f"{', '.join(shielded)} in part or whole: this curve shows the norm's work, not what the "
        "attention tolerates (at='dot')."
    )
