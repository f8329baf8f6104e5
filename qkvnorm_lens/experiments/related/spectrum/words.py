"""What the experiment `spectrum` found, in words, beside what was published."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core

CAUSAL: Final = (1.72, 1.25, 0.85)  # published, T = 150
NETWORKS: Final = {"A": (0, 0), "A - U": (0, 1), "√T (A - U)": (1, 1)}  # scaled, with the fix
MASKS: Final = {"none": "no mask", "causal": "causal"}
LIMIT: Final = 3 / (27 / 4) ** 2  # m2 and edge^2 of a product of two, Fuss-Catalan; derived
DEEP: Final = (("markov", "none"), ("markov", "causal"), ("softmax", "none"), ("softmax", "causal"))
CLAIMED: Final = {
    ("markov", "none"): "random Markov, no mask",
    ("softmax", "none"): "softmax, no mask",
    ("softmax", "causal"): "softmax, causal",
}
_OF_MODELS: Final = ("s1", "s2", "gap", "uniform_gap", "stable_rank", "left_s1")
PARTS: Final = {"neither": (0, 0), "LayerNorm": (1, 0), "skip": (0, 1), "both": (1, 1)}


def over_seeds(rows: pd.DataFrame, **wanted: Any) -> core.Mean:
    """Mean over seeds with its interval; signals of which nothing is left do not count."""
    return core.mean(core.pick(rows, **wanted)["value"].astype(float).dropna().tolist())


def _said(m: core.Mean, digits: int = 3) -> str:
    """``1.02 ± 0.01``."""
    if math.isnan(m.value):
        return "-"
    return m.words(f".{digits}g", ".1g") if m.half else f"{m.value:.{digits}g}"


def _ranks(values: pd.Series[float]) -> str:
    """Mean of the seeds of whose signal something is left, and how many those are."""
    left = values.astype(float).dropna().tolist()
    if not left:
        return "nothing left"
    return _said(core.mean(left)) + (
        "" if len(left) == len(values) else f" ({_share_of(left, values)})"
    )


def _share_of(left: list[float], values: pd.Series[float]) -> str:
    return f"{len(left)} of {len(values)} seeds; nothing left of the others"


def _size(x: float) -> str:
    return f"{x:.0f}" if 10 <= x < 10_000 else f"{x:.2g}"


@dataclass(frozen=True)
class Sizes:
    """Geometric mean and range of the numbers above 0 (a gradient of 0 or NaN is of no signal)."""

    centre: float
    least: float
    most: float
    n: int
    of: int

    @property
    def words(self) -> str:
        """``1.6e+04 (16 of 20 seeds)``."""
        if not self.n:
            return "0"
        return _size(self.centre) + ("" if self.n == self.of else f" ({self.n} of {self.of})")

    @property
    def ranged(self) -> str:
        """``1.6e+04 (1.9e+03 to 8.3e+04)``; and in how many seeds, unless in all."""
        if not self.n:
            return "0"
        span = [f"{_size(self.least)} to {_size(self.most)}"] * (self.n > 1)
        dead = [f"{self.n} of {self.of} seeds, 0 in the others"] * (self.n < self.of)
        inside = "; ".join([*span, *dead])
        return _size(self.centre) + (f" ({inside})" if inside else "")

    def away(self, one: float) -> float:
        """|ln(centre / one)|; infinite where a seed has nothing left."""
        return abs(math.log(self.centre / one)) if self.n and self.n == self.of else math.inf


def sizes(values: pd.Series[float]) -> Sizes:
    """Of one number for each seed."""
    x = values.to_numpy(dtype=float)
    left = x[np.isfinite(x) & (x > 0)]
    if not len(left):
        return Sizes(0.0, 0.0, 0.0, 0, len(x))
    centre = float(np.exp(np.log(left).mean()))
    return Sizes(centre, float(left.min()), float(left.max()), len(left), len(x))


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """Tables of the constructed networks and of the models, with what they say."""
    for part in (_spectra, _width, _depth):
        yield f"{part(table)}\n"
    yield from _models(table)


def _tokens(rows: pd.DataFrame) -> list[int]:
    return sorted(int(t) for t in rows["tokens"].unique())


def _spectra(table: pd.DataFrame) -> str:
    rows = core.pick(table, what="spectrum")
    head = ["T", "mask", "s1", "s2", "s2 / (2/√T)", "s2, softmax", "s2, softmax, d_head = 16",
            "uniform s1, s2"]  # fmt: skip
    body = []
    for mask, n in itertools.product(MASKS, _tokens(rows)):
        of = partial(over_seeds, core.pick(rows, mask=mask, tokens=n))
        s1, s2 = (of(attention="markov", quantity=q) for q in ("s1", "s2"))
        full, narrow = (of(attention=a, quantity="s2") for a in ("softmax", "softmax narrow"))
        flat = [of(attention="uniform", quantity=q) for q in ("s1", "s2")]
        edge = f"{s2.value * math.sqrt(n) / 2:.2f}" if mask == "none" else "-"
        row = [str(n), mask, _said(s1, 4), _said(s2), edge, _said(full), _said(narrow)]
        body.append([*row, ", ".join(f"{max(m.value, 0):.2f}" for m in flat)])
    return (
        f"{core.markdown(head, body)}\n\n"
        "Singular values of one random attention matrix: random Markov (softmax of N(-ln2/2, ln2) "
        "entries) and softmax of random queries and keys on orthogonal tokens (scores of the same "
        f"variance); {_seeds(rows)}, 95% intervals."
    )


def _seeds(rows: pd.DataFrame) -> str:
    return core.counted(rows["seed"].nunique(), "seed")


def slope(rows: pd.DataFrame) -> float:
    """Of ln value against ln T, by least squares over seeds and T."""
    x, y = np.log(rows["tokens"].astype(float)), np.log(rows["value"].astype(float))
    return float(np.polyfit(x, y, 1)[0])


def _width(table: pd.DataFrame) -> str:
    rows = core.pick(table, what="width")
    counts = _tokens(rows)
    head = ["stable rank of XX^T, one layer", *(f"T = {n}" for n in counts), "grows as T^"]
    body = []
    for attention, mask, fix in itertools.product(("markov", "softmax"), MASKS, (0, 1)):
        mine = core.pick(rows, attention=attention, mask=mask, fix=fix)
        name = f"{attention}, {MASKS[mask]}, {'A - U' if fix else 'A'}"
        cells = (_said(over_seeds(mine, tokens=n)) for n in counts)
        body.append([name, *cells, f"{slope(mine):.2f}"])
    return (
        f"{core.markdown(head, body)}\n\n"
        "Stable rank of XX^T: |S|_F²/|S|_2² of S = XX^T behind one layer, the sum of s_i^4 over "
        "s_1^4 for the singular values s of X, from T orthogonal tokens of "
        f"width T; values' weights N(0, 1/T); {_seeds(rows)}."
    )


def _depth(table: pd.DataFrame) -> str:
    rows, gradients = core.pick(table, what="depth"), core.pick(table, what="gradient")
    last, n = int(rows["layer"].max()), int(rows["tokens"].iloc[0])
    head = ["network", f"stable rank of XX^T, layer {last}", "gradient, first layer", "last layer"]
    body = []
    for attention, mask in DEEP:
        for what, (scaled, fix) in NETWORKS.items():
            if scaled and mask == "causal":  # no one factor keeps lengths there
                continue
            for part, (norm, skip) in PARTS.items():
                at: dict[str, Any] = {"attention": attention, "scaled": scaled, "mask": mask}
                at |= {"fix": fix, "norm": norm, "skip": skip}
                of = core.pick(gradients, **at)
                if not len(of):
                    continue
                ranks = core.pick(rows, quantity="stable rank", layer=last, **at)["value"]
                first, final = (sizes(core.pick(of, layer=i)["value"]) for i in (0, last - 1))
                name = f"{attention}, {MASKS[mask]}, {what}, {part}"
                body.append([name, _ranks(ranks), first.ranged, final.ranged])
    return (
        f"{core.markdown(head, body)}\n\n"
        f"{last} layers of T = {n} tokens; X_(l+1) = N(X_l + (A_l - U) X_l W_l) with or without "
        f"U, the skip X_l, and LayerNorm N; gradients are |dX_L/dW_l|_F, estimated with "
        f"Gaussian probes: geometric mean over seeds, and their range; {_seeds(rows)}. Where "
        "scores are made of X, the fix alone shrinks X, and with it the scores, until nothing is "
        "left. √T keeps the length of X without a mask alone: under a causal one row i of A - U "
        "has entries of variance about 1/i², and no one factor serves all rows."
    )


def _models(table: pd.DataFrame) -> Iterator[str]:
    rows = core.pick(table, what="trained")
    head = ["model", "T", "s1", "s2", "gap", "uniform's gap", "stable rank of A", "A - U: s1"]
    body = []
    for group in core.groups(rows):
        mine = core.pick(rows, group=group)
        for n in _tokens(mine):
            at = core.pick(mine, tokens=n)
            cells = (_said(_mean_of(core.pick(at, quantity=q))) for q in _OF_MODELS)
            body.append([group, str(n), *cells])
    yield core.markdown(head, body) + "\n"
    yield (
        "Trained models under their own mask: means over layers, heads and prompts cut to T tokens "
        "(95% intervals over seeds where a group has several). Stable rank of A: |A|_F²/s1², of "
        "the attention matrix itself, where the tables above have that of XX^T."
    )
    start = core.pick(table, what="start", mask="none", layer=0)
    for group in core.groups(start):
        mine = core.pick(start, group=group)
        counts = _tokens(mine)
        seconds = [_mean_of(core.pick(mine, tokens=n, quantity="s2")) for n in counts]
        top = _mean_of(core.pick(mine, tokens=counts[-1], quantity="s1"))
        edge = _mean_of(core.pick(mine, tokens=counts[-1], quantity="edge_left"))
        yield (
            f"{group} before training, without a mask, first layer: s1 = {_said(top)} at "
            f"T = {counts[-1]}; s2 = {', '.join(f'{m.value:.2g}' for m in seconds)} at T = "
            f"{', '.join(map(str, counts))} (a random matrix as large as A - U: edge "
            f"{edge.value:.2g} at T = {counts[-1]})."
        )


def _mean_of(rows: pd.DataFrame) -> core.Mean:
    """Over seeds of the mean over layers."""
    return core.mean(rows.groupby("seed")["value"].mean().tolist())


# -- claims -------------------------------------------------------------------------------------


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """Naderi et al.'s statements beside ours."""
    yield _unmasked(table)
    yield _softmax(table)
    yield from _causal(table)
    yield _in_width(table)
    yield _fixed_width(table)
    yield _in_depth(table)
    yield _gradients(table)
    yield from _of_models(table)


def _unmasked(table: pd.DataFrame) -> core.Claim:
    rows = core.pick(table, what="spectrum", attention="markov", mask="none")
    counts = _tokens(rows)
    ratios = {}
    for n in counts:
        ratios[n] = over_seeds(rows, tokens=n, quantity="s2").value * math.sqrt(n) / 2
    top = max(over_seeds(rows, tokens=n, quantity="s1").value for n in counts)
    near = top < 1.1 and all(0.8 < r < 1.25 for r in ratios.values())
    return core.Claim(
        "random Markov matrix: one singular value near 1, the rest below about 2/√T",
        "limits for T to infinity",
        f"s1 at most {top:.3f}; s2 over 2/√T: "
        + ", ".join(f"{r:.2f} (T = {n})" for n, r in ratios.items()),
        core.graded(True, near),
        "at small T the second lies on either side of the edge: entries are lognormal, whose large "
        "ones make single rows stand out, and the edge is a limit",
    )


def _softmax(table: pd.DataFrame) -> core.Claim:
    rows = core.pick(table, what="spectrum", mask="none")
    n = _tokens(rows)[-1]
    of = {
        a: over_seeds(rows, attention=a, tokens=n, quantity="s2")
        for a in ("markov", "softmax", "softmax narrow")
    }
    close = abs(of["softmax"].value / of["markov"].value - 1) < 0.25
    narrow = abs(of["softmax narrow"].value / of["markov"].value - 1) < 0.25
    return core.Claim(
        "softmax attention at random start, without a mask, is like a random Markov matrix",
        "same spectrum in a single layer",
        f"second singular value at T = {n}: {_said(of['markov'])} (random Markov), "
        f"{_said(of['softmax'])} (softmax, d_head = T), {_said(of['softmax narrow'])} (softmax, "
        "d_head = 16)",
        core.graded(close, narrow),
        "scores of heads narrower than T are of low rank, so that their entries are not "
        "independent and the second singular value does not fall as 2/√T",
    )


def _causal(table: pd.DataFrame) -> list[core.Claim]:
    rows = core.pick(table, what="spectrum", attention="markov", mask="causal")
    if 150 not in _tokens(rows):
        return []
    spans = []
    for q in ("s1", "s2", "s3"):
        values = core.pick(rows, tokens=150, quantity=q)["value"]
        spans.append((float(values.mean()), float(values.min()), float(values.max())))
    inside = all(low <= c <= high for c, (_, low, high) in zip(CAUSAL, spans, strict=True))
    flat = core.pick(table, what="spectrum", attention="uniform", mask="causal", tokens=150)
    beside = [f"{over_seeds(flat, quantity=q).value:.2f}" for q in ("s1", "s2", "s3")]
    return [
        core.Claim(
            "the same under a causal mask, T = 150",
            ", ".join(f"{c:.2f}" for c in CAUSAL) + ": no single large value",
            "; ".join(f"{m:.2f} ({low:.2f} to {high:.2f} over seeds)" for m, low, high in spans),
            core.graded(True, inside),
            f"the mask does it: uniform causal attention alone has {', '.join(beside)}",
        )
    ]


def _in_width(table: pd.DataFrame) -> core.Claim:
    rows = core.pick(table, what="width", fix=0)
    n = _tokens(rows)[-1]
    of = {m: over_seeds(rows, attention="markov", mask=m, tokens=n) for m in ("none", "causal")}
    slopes = {m: slope(core.pick(rows, attention="markov", mask=m)) for m in ("none", "causal")}
    first = over_seeds(rows, attention="markov", mask="none", tokens=_tokens(rows)[0])
    return core.Claim(
        "rank collapse in width: after one layer the stable rank falls to 1 as T grows",
        "for random Markov attention without a mask",
        f"{_said(first, 4)} at T = {_tokens(rows)[0]}, {_said(of['none'], 4)} at T = {n}; under a "
        f"causal mask {_said(of['causal'])}, growing as T^{slopes['causal']:.2f}",
        core.decide(of["none"].value < 1.05 and of["none"].value <= first.value),
        "one direction, the tokens' mean, keeps its length while the others shrink by 1/√T; a "
        "causal mask leaves several",
    )


def _fixed_width(table: pd.DataFrame) -> core.Claim:
    rows = core.pick(table, what="width", fix=1, mask="none", attention="markov")
    n = _tokens(rows)[-1]
    grows, found = slope(rows), over_seeds(rows, tokens=n)
    close = abs(found.value / (LIMIT * n) - 1) < 0.2
    return core.Claim(
        "with the fix the stable rank grows with T",
        "proportional to T",
        f"{_said(found)} at T = {n}, over T = {_tokens(rows)[0]} to {n} as T^{grows:.2f}",
        core.graded(close or grows > 0.2, close),
        f"two square random matrices, A - U and W, have {LIMIT:.3f} T in the limit, which is "
        f"{LIMIT * n:.1f} here; at small T the largest singular value is still below its limit",
    )


def _in_depth(table: pd.DataFrame) -> core.Claim:
    rows = core.pick(table, what="depth", quantity="stable rank")
    last, n = int(rows["layer"].max()), int(rows["tokens"].iloc[0])
    said, better = [], []
    for (attention, mask), name in CLAIMED.items():
        mine = core.pick(rows, attention=attention, scaled=0, mask=mask, layer=last)
        if not len(mine):  # a table of version 1
            continue
        of = []
        for part, (norm, skip) in PARTS.items():
            one, other = (
                core.pick(mine, norm=norm, skip=skip, fix=fix)["value"].astype(float)
                for fix in (0, 1)
            )
            of.append(f"{part} {_ranks(one)} -> {_ranks(other)}")
            # A seed with nothing left has kept no rank.
            better.append(bool(other.fillna(0).mean() > 1.1 * one.fillna(0).mean()))
        said.append(f"{name}: {', '.join(of)}")
    return core.Claim(
        f"the fix keeps rank in depth too (stable rank behind layer {last}, T = {n}, without -> "
        "with the fix)",
        "the gap makes rank collapse in depth worse",
        "; ".join(said),
        core.decide(*better),
        "the skip connection keeps what the fix leaves; without it a product of random matrices "
        "loses rank whatever A is, and scores that are made of tokens alike are alike; under a "
        "causal mask softmax keeps little without LayerNorm",
    )


def _gradients(table: pd.DataFrame) -> core.Claim:
    rows = core.pick(table, what="gradient", quantity="norm")
    last = int(rows["layer"].max())
    said, closer = [], []
    n = int(rows["tokens"].iloc[0])
    for (attention, mask), name in CLAIMED.items():
        mine = core.pick(rows, attention=attention, scaled=0, mask=mask, layer=0)
        if not len(mine):  # a table of version 1
            continue
        of, single = [], of_one_layer(table, attention, mask, n)
        for part, (norm, skip) in PARTS.items():
            one, other = (
                sizes(core.pick(mine, norm=norm, skip=skip, fix=fix)["value"]) for fix in (0, 1)
            )
            of.append(f"{part} {one.words} -> {other.words}")
            closer.append(other.away(single) < one.away(single))
        said.append(f"{name}: {', '.join(of)} (of one layer of A - U: {single:.3g})")
    return core.Claim(
        f"the gap worsens vanishing and exploding gradients (first of {last + 1} layers, without "
        "-> with the fix)",
        "removing it makes gradients milder",
        f"{'; '.join(said)}; geometric means over seeds",
        core.decide(*closer),
        "where the stream is added up (skip) the fix takes the growth away, under a causal mask a "
        "part of it; where nothing else holds the signal (neither) the fix alone makes it vanish, "
        "without a mask by 1/√T a layer, which updates times √T make up for; with LayerNorm alone "
        "softmax's gradients grow with the fix",
    )


def of_one_layer(table: pd.DataFrame, attention: str, mask: str, n: int) -> float:
    """|dX_1/dW_0|_F = T |A - U|_F of T orthogonal tokens: the size that gradients are held by."""
    rows = core.pick(table, what="spectrum", attention=attention, mask=mask, tokens=n)
    edge = over_seeds(rows, quantity="edge_left").value  # 2 |A - U|_F / sqrt(T)
    return n * edge * math.sqrt(n) / 2


def _of_models(table: pd.DataFrame) -> list[core.Claim]:
    rows = core.pick(table, what="trained")
    said = []
    left = []
    for group in core.groups(rows):
        mine = core.pick(rows, group=group)
        n = _tokens(mine)[-1]
        at = core.pick(mine, tokens=n)
        gap, flat = (_mean_of(core.pick(at, quantity=q)) for q in ("gap", "uniform_gap"))
        said.append(f"{group} {gap.value:.2f} against {flat.value:.2f} (T = {n})")
        top, rest = (_mean_of(core.pick(at, quantity=q)).value for q in ("s1", "left_s1"))
        left.append(f"{rest / top:.0%}")
    if not said:
        return []
    return [
        core.Claim(
            "gap of trained causal models against uniform causal attention",
            "not measured",
            "; ".join(said),
            "-",
            f"what the fix leaves of the largest singular value is {', '.join(left)} of it: where "
            "most rows attend to one token (a sink) that is the gap, and U does not hold it",
        )
    ]
