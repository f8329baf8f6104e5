"""What is measured: a table for each part."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from qkvnorm_lens.experiments.core import Amount, Part, Size, Subject, by_size, reading
from qkvnorm_lens.experiments.related.spectrum.words import DEEP

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hooks import SpectrumReport
    from qkvnorm_lens.theory import Recursion

COLUMNS: Final = ("model", "group", "placement", "seed", "what", "attention", "scaled", "mask",
                  "fix", "norm", "skip", "tokens", "layer", "quantity", "value")  # fmt: skip
LEADING: Final = 3
NARROW: Final = 16  # the head dimension of the study models
LENGTHS: Final = {"addition": (8, 12, 16), "language": (20, 50, 100, 150)}
OF_MODELS: Final = ("s1", "s2", "s3", "gap", "stable_rank", "uniform_s1", "uniform_s2",
                    "uniform_gap", "left_s1", "edge", "edge_left")  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much: T of the constructed networks, those of the deep ones, layers, seeds, probes."""

    tokens: tuple[int, ...]
    deep: int
    depth: int
    seeds: int
    probes: int
    sums: int
    windows: int


SCALES: Final = by_size(
    Scale((20, 50), 20, 3, 2, 2, 16, 1),
    Scale((20, 30, 50, 100, 150), 100, 10, 4, 4, 64, 1),
    Scale((20, 30, 50, 75, 100, 150), 100, 10, 20, 16, 256, 4),
)


# -- constructed networks -----------------------------------------------------------------------


def _row(what: str, attention: str, quantity: str, value: float, **more: Any) -> dict[str, Any]:
    """A row about a constructed network."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, 0)
    row |= {"model": "constructed", "group": "constructed", "placement": "", "mask": "none"}
    row |= {"layer": -1, "what": what, "attention": attention, "quantity": quantity}
    return row | {"value": value} | more


def spectra(scale: Scale) -> pd.DataFrame:
    """Leading singular values of one random attention matrix, by T, mask and seed."""
    import torch

    from qkvnorm_lens.theory import random_markov, random_softmax, uniform

    rows = []
    for n in scale.tokens:
        for mask in ("none", "causal"):
            causal = mask == "causal"
            matrices = [("uniform", 0, uniform(n, causal=causal))]
            for seed in range(scale.seeds):
                x = math.sqrt(n) * torch.eye(n, dtype=torch.float64)
                narrow = random_softmax(x, seed=seed, causal=causal, d_head=NARROW)
                matrices += [
                    ("markov", seed, random_markov(n, seed=seed, causal=causal)),
                    ("softmax", seed, random_softmax(x, seed=seed, causal=causal)),
                    ("softmax narrow", seed, narrow),
                ]
            for attention, seed, matrix in matrices:
                where = {"mask": mask, "tokens": n, "seed": seed}
                values = torch.linalg.svdvals(matrix)[:LEADING].tolist()
                left = matrix - uniform(n, causal=causal)
                found = {f"s{i + 1}": v for i, v in enumerate(values)}
                found["left_s1"] = float(torch.linalg.svdvals(left)[0])
                found["edge_left"] = 2 * float(left.norm()) / math.sqrt(n)
                rows += [_row("spectrum", attention, q, v, **where) for q, v in found.items()]
    return _frame(rows)


def width(scale: Scale) -> pd.DataFrame:
    """Stable rank behind one layer against T."""
    from qkvnorm_lens.theory import Recursion, propagate

    kinds: tuple[Any, ...] = ("markov", "softmax")
    rows = []
    for attention, mask, fix in itertools.product(kinds, ("none", "causal"), (False, True)):
        made = Recursion(attention=attention, causal=mask == "causal", centred=fix)
        for n, seed in itertools.product(scale.tokens, range(scale.seeds)):
            after = propagate(made, n, 1, seed=seed).states[-1].detach()
            where = {"mask": mask, "fix": int(fix), "tokens": n, "layer": 1, "seed": seed}
            rows.append(_row("width", attention, "stable rank", _rank(after), **where))
    return _frame(rows)


def _rank(x: Tensor) -> float:
    """Stable rank; NaN where nothing is left of a signal."""
    from qkvnorm_lens.theory import stable_rank

    return stable_rank(x) if bool(x.any()) else math.nan


def depth(scale: Scale, attention: str, mask: str) -> pd.DataFrame:
    """Stable rank and gradient by layer, with and without fix, LayerNorm and skip."""
    from qkvnorm_lens.theory import gradient_norms, propagate

    rows = []
    for made in networks(attention, mask, scale.deep):
        where: dict[str, Any] = {"mask": mask, "tokens": scale.deep, "fix": int(made.centred)}
        where |= {"norm": int(made.norm), "skip": int(made.skip)}
        where["scaled"] = int(made.gain != 1)
        for seed in range(scale.seeds):
            signal = propagate(made, scale.deep, scale.depth, seed=seed)
            at = {**where, "seed": seed}
            for layer, x in enumerate(signal.states):
                rank = _rank(x.detach())
                rows.append(_row("depth", attention, "stable rank", rank, layer=layer, **at))
            norms = gradient_norms(signal, probes=scale.probes, seed=seed)
            rows += [
                _row("gradient", attention, "norm", g, layer=layer, **at)
                for layer, g in enumerate(norms)
            ]
    return _frame(rows)


def networks(attention: str, mask: str, n_tokens: int) -> Iterable[Recursion]:
    """All combinations of fix, LayerNorm and skip; without a mask the fix times sqrt(T) as well.

    Under a causal mask no one factor keeps the lengths of what the fix leaves.
    """
    from qkvnorm_lens.theory import Recursion

    kind: Any = attention
    causal = mask == "causal"
    for fix, norm, skip in itertools.product((False, True), repeat=3):
        yield Recursion(attention=kind, causal=causal, centred=fix, norm=norm, skip=skip)
    if not causal:
        yield Recursion(attention=kind, centred=True, gain=math.sqrt(n_tokens))


def _frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS))


# -- models -------------------------------------------------------------------------------------


def measure(subject: Subject, scale: Scale) -> pd.DataFrame:
    """`hooks.spectral_gap` of a model against T, and of its random start with and without mask."""
    import hooks

    model = subject.load()
    read = reading(subject, Amount(scale.sums, scale.windows, max(LENGTHS["language"])))
    longest = max(len(row) for row in read.ids)
    lengths = [n for n in LENGTHS[subject.kind] if n <= longest]
    report = hooks.spectral_gap(model, read.ids, lengths=lengths, batch_size=16, progress=False)
    frames = [_of_report(subject, report, "trained", "model's")]
    if subject.path is not None and subject.placement:
        for mask in ("none", "causal"):
            bridge, ids = random_start(subject, mask, max(scale.tokens))
            report = hooks.spectral_gap(bridge, ids, lengths=scale.tokens, progress=False)
            frames.append(_of_report(subject, report, "start", mask))
    return pd.concat(frames, ignore_index=True)


def random_start(subject: Subject, mask: str, n_tokens: int) -> tuple[Any, torch.Tensor]:
    """One of our models before its training, with room for more tokens; and random tokens.

    Scales that its training calibrated once are calibrated here too.
    """
    import torch

    from qkvnorm_lens.models import QKVNormConfig, QKVNormTransformer, to_bridge

    assert subject.path is not None
    values = json.loads((subject.path / "config.json").read_text(encoding="utf-8"))
    direction = "bidirectional" if mask == "none" else "causal"
    values |= {"n_ctx": n_tokens, "attention_dir": direction, "window_size": None}
    values["seed"] = subject.seed or 0
    plain = QKVNormTransformer(QKVNormConfig.from_json(values)).eval()
    rng = torch.Generator().manual_seed(values["seed"])
    ids = torch.randint(plain.cfg.d_vocab, (2, n_tokens), generator=rng)
    with plain.calibrating():
        plain(ids)
    return to_bridge(plain), ids


def _of_report(subject: Subject, report: SpectrumReport, what: str, mask: str) -> pd.DataFrame:
    """One row for each layer, length and quantity."""
    by = report.to_frame("length")
    rows = [
        {
            **subject.columns,
            **_row(what, "model", quantity, float(row[quantity]), mask=mask),
            **subject.columns,
            "tokens": int(row["length"]),
            "layer": int(row["layer"]),
        }
        for _, row in by.iterrows()
        for quantity in OF_MODELS
    ]
    return _frame(rows)


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """The constructed networks, then one for each model."""
    scale = SCALES[size]
    settings = asdict(scale)
    made = [
        Part("spectra", partial(spectra, scale), None, {**settings, "narrow": NARROW}),
        Part("width", partial(width, scale), None, settings),
    ]
    made += [Part(f"depth-{a}-{m}", partial(depth, scale, a, m), None, settings) for a, m in DEEP]
    made += [
        Part(s.name, partial(measure, s, scale), s, {**settings, "lengths": LENGTHS[s.kind]})
        for s in subjects
    ]
    return made
